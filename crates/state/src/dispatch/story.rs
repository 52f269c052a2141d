//! What a dispatch remembers beside its state: how urgent it is, when it may run again, what came of its earlier
//! attempts, who has to act, and what came too late.
//!
//! Everything here is bounded: a record holds [`limits::ATTEMPTS_KEPT`] attempts and one late result.

use super::Dispatch;
use crate::ids::{Digest, Id};
use crate::limits;
use crate::nodes::Capability;

/// How urgent a dispatch is. A class is a head start in the queue of its node, not a wall: see
/// [`Priority::rank`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Priority {
    /// What is asked for when nothing is said.
    Normal = 0,
    /// Behind the normal ones.
    Low = 1,
    /// Before the normal ones.
    High = 2,
}

impl Priority {
    /// All of them, the most urgent first.
    pub const ALL: [Priority; 3] = [Priority::High, Priority::Normal, Priority::Low];

    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Priority::Normal => "normal",
            Priority::Low => "low",
            Priority::High => "high",
        }
    }

    /// From the text form; an empty one is `normal`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Priority> {
        match text {
            "" => Some(Priority::Normal),
            text => Priority::ALL.into_iter().find(|one| one.as_str() == text),
        }
    }

    /// Where in the queue of its node a dispatch of this class stands that was submitted at `submitted_at`: by
    /// time, as if each class below `high` had come [`limits::PRIORITY_LEAD`] later than it did. So a class
    /// passes all that is at most as old, and nothing waits for ever: what is older by more goes first.
    #[must_use]
    pub fn rank(self, submitted_at: u64) -> u64 {
        let behind = match self {
            Priority::High => 0,
            Priority::Normal => 1,
            Priority::Low => 2,
        };
        submitted_at + behind * limits::PRIORITY_LEAD
    }
}

/// When an idempotent dispatch is run again. A dispatch without one is run once.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Retry {
    /// Deliveries in all, the first one included.
    #[prost(uint32, tag = "1")]
    pub max_attempts: u32,
    /// Wait before the second attempt, in milliseconds; doubles with each further one, up to
    /// [`limits::BACKOFF_MAX`].
    #[prost(uint64, tag = "2")]
    pub backoff_ms: u64,
    /// After what: error codes of the node, [`SESSION_LOST`], or [`ANY_FAILURE`].
    #[prost(string, repeated, tag = "3")]
    pub on: Vec<String>,
}

/// In [`Retry::on`]: the node came back without it.
pub const SESSION_LOST: &str = "session_lost";
/// In [`Retry::on`]: the node reported a failure, whatever its code.
pub const ANY_FAILURE: &str = "failed";
/// What is tried again where a capability says how often and not after what: a lost session, the capability's own
/// timeout, and a program that said itself that trying again may help.
const RETRIED: [&str; 3] = [SESSION_LOST, "timeout", "temporary_failure"];

impl Retry {
    /// The policy of a dispatch of an idempotent capability. `asked` attempts are the caller's: fewer than
    /// declared, never more; 0: as declared.
    #[must_use]
    pub fn of(capability: &Capability, asked: u32) -> Retry {
        let declared = match capability.max_attempts {
            // Nothing is tried again, but what its session lost moves to the next one.
            0 => Retry {
                max_attempts: limits::DELIVERIES,
                backoff_ms: 0,
                on: vec![SESSION_LOST.to_owned()],
            },
            max_attempts => Retry {
                max_attempts,
                backoff_ms: capability.backoff_ms,
                on: if capability.retry_on.is_empty() {
                    RETRIED.map(str::to_owned).to_vec()
                } else {
                    capability.retry_on.clone()
                },
            },
        };
        Retry {
            max_attempts: if asked == 0 {
                declared.max_attempts
            } else {
                declared.max_attempts.min(asked)
            },
            ..declared
        }
    }

    /// Whether an attempt that ended so is followed by another, as far as its reason goes.
    #[must_use]
    pub fn covers(&self, why: &str, failed: bool) -> bool {
        self.on
            .iter()
            .any(|on| on == why || (failed && on == ANY_FAILURE))
    }

    /// The wait before the attempt after number `attempt`.
    #[must_use]
    pub fn wait(&self, attempt: u32) -> u64 {
        let doubled = 1u64.checked_shl(attempt.saturating_sub(1)).unwrap_or(u64::MAX);
        self.backoff_ms.saturating_mul(doubled).min(limits::BACKOFF_MAX)
    }
}

/// A delivery that did not end its dispatch.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Attempt {
    /// From 1.
    #[prost(uint32, tag = "1")]
    pub number: u32,
    /// The session that it was bound to.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// The replica that held that session.
    #[prost(uint64, tag = "3")]
    pub replica_id: u64,
    /// When it was bound.
    #[prost(uint64, tag = "4")]
    pub assigned_at: u64,
    /// When it ended.
    #[prost(uint64, tag = "5")]
    pub ended_at: u64,
    /// Why: [`SESSION_LOST`], or the node's error code.
    #[prost(string, tag = "6")]
    pub why: String,
    /// In words, cut to [`limits::ATTEMPT_MESSAGE`] bytes.
    #[prost(string, tag = "7")]
    pub message: String,
}

/// Who has to act before a dispatch goes on.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Mediation {
    /// Since when.
    #[prost(uint64, tag = "1")]
    pub since: u64,
    /// What the person at the machine is asked.
    #[prost(string, tag = "2")]
    pub prompt: String,
    /// The machine, as it calls itself.
    #[prost(string, tag = "3")]
    pub host: String,
}

/// A result that came after the end of its dispatch. It changes nothing and is kept for people.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Late {
    /// When it came.
    #[prost(uint64, tag = "1")]
    pub at: u64,
    /// How the node says that it ended.
    #[prost(enumeration = "super::Outcome", tag = "2")]
    pub outcome: i32,
    /// The node's error code, if it failed.
    #[prost(string, tag = "3")]
    pub code: String,
    /// Bytes of the result, which is not kept.
    #[prost(uint32, tag = "4")]
    pub size: u32,
    /// SHA-256 of the result.
    #[prost(message, required, tag = "5")]
    pub digest: Digest,
}

/// Somebody wants a dispatch back that is with its node.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CancelAsked {
    /// When.
    #[prost(uint64, tag = "1")]
    pub at: u64,
    /// Actor.
    #[prost(string, tag = "2")]
    pub by: String,
}

impl Dispatch {
    /// Where it stands in the queue of its node and capability: by class and time, then in the order of the log.
    #[must_use]
    pub fn rank(&self) -> (u64, u64, Id) {
        (self.priority().rank(self.submitted_at), self.order, self.id)
    }

    /// Notes that the present attempt ended without ending the dispatch.
    pub(super) fn note_attempt(&mut self, now: u64, why: &str, message: &str) {
        if self.attempts.len() >= limits::ATTEMPTS_KEPT {
            self.attempts.remove(0);
        }
        self.attempts.push(Attempt {
            number: self.attempt,
            epoch: self.epoch,
            replica_id: self.replica_id,
            assigned_at: self.assigned_at,
            ended_at: now,
            why: why.to_owned(),
            message: crate::check::cut(message.to_owned(), limits::ATTEMPT_MESSAGE),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_passes_what_is_younger_than_its_lead_and_no_more() {
        let lead = limits::PRIORITY_LEAD;
        assert!(Priority::High.rank(lead) <= Priority::Normal.rank(0));
        assert!(
            Priority::High.rank(lead + 1) > Priority::Normal.rank(0),
            "the older one goes first"
        );
        assert!(Priority::Normal.rank(0) < Priority::Low.rank(0));
        assert!(Priority::High.rank(2 * lead + 1) > Priority::Low.rank(0));
        let parsed = Priority::ALL.map(|one| Priority::parse(one.as_str()));
        assert_eq!(parsed, Priority::ALL.map(Some));
        assert_eq!(
            (Priority::parse(""), Priority::parse("urgent")),
            (Some(Priority::Normal), None)
        );
    }

    #[test]
    fn a_caller_may_ask_for_fewer_attempts_and_never_for_more() {
        let mut capability = Capability {
            max_attempts: 3,
            backoff_ms: 500,
            ..Capability::default()
        };
        assert_eq!(Retry::of(&capability, 0).max_attempts, 3);
        assert_eq!(Retry::of(&capability, 1).max_attempts, 1);
        assert_eq!(Retry::of(&capability, 9).max_attempts, 3);
        let declared = Retry::of(&capability, 0);
        assert!(declared.covers("timeout", true) && !declared.covers("program_failed", true));
        assert_eq!(
            [1, 2, 3].map(|attempt| declared.wait(attempt)),
            [500, 1_000, 2_000]
        );
        assert_eq!(declared.wait(200), limits::BACKOFF_MAX);
        capability.retry_on = vec![ANY_FAILURE.to_owned()];
        let any = Retry::of(&capability, 0);
        assert!(any.covers("program_failed", true) && !any.covers(SESSION_LOST, false));
        capability.max_attempts = 0;
        let undeclared = Retry::of(&capability, 0);
        assert!(undeclared.covers(SESSION_LOST, false) && !undeclared.covers("timeout", true));
    }
}
