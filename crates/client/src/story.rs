//! What the tries of one call came to, and what its caller is told when they end.
//!
//! What never lives here: making tries (see [`crate::pool`]).
//! Invariants: a mutation that may have been applied ends as unknown, whatever else happened; an error lists
//! the tries, the first ones and the last, and never more than a handful.

use crate::connect::{ConnectError, ConnectErrorKind};
use crate::error::{Attempt, Class, E_NO_ANSWER, E_UNKNOWN_OUTCOME, E_UNREACHABLE, Error};
use crate::pool::Repeat;

/// How many attempts an error lists at most.
const ATTEMPTS_SHOWN: usize = 16;

/// What the tries of one call came to.
#[derive(Default)]
pub(crate) struct Story {
    attempts: Vec<Attempt>,
    /// The last typed answer that allowed another try.
    answer: Option<Error>,
    /// A try may have been applied.
    ambiguous: bool,
    /// Some replica was connected to and given the request.
    pub(crate) reached: bool,
    /// This side's certificate or the server's was refused.
    refusal: Option<ConnectError>,
    /// Some try failed for another reason than a refusal: another may still succeed.
    hope: bool,
}

impl Story {
    pub(crate) fn not_sent(&mut self, error: ConnectError) {
        self.hope |= error.kind == ConnectErrorKind::Unreachable;
        note(&mut self.attempts, &mut self.refusal, error);
    }

    pub(crate) fn answered(&mut self, address: &str, error: Error) {
        self.hope = true;
        self.reached = true;
        self.ambiguous |= error.unknown;
        push(
            &mut self.attempts,
            Attempt {
                endpoint: address.to_owned(),
                cause: error.to_string(),
            },
        );
        self.answer = Some(error);
    }

    pub(crate) fn lost(&mut self, address: &str, cause: String, refused: bool) {
        push(
            &mut self.attempts,
            Attempt {
                endpoint: address.to_owned(),
                cause: cause.clone(),
            },
        );
        if refused {
            let (address, kind) = (address.to_owned(), ConnectErrorKind::Refused);
            self.refusal = Some(ConnectError {
                address,
                kind,
                cause,
                chain: None,
            });
        } else {
            self.hope = true;
            self.reached = true;
            self.ambiguous = true;
        }
    }

    /// Every replica refuses to talk to this side: waiting won't change it.
    pub(crate) fn hopeless(&self) -> bool {
        self.refusal.is_some() && !self.hope
    }

    pub(crate) fn finish(self, mut error: Error) -> Error {
        error.trail.attempts = self.attempts;
        error
    }

    pub(crate) fn give_up(self, repeat: Repeat) -> Error {
        if self.ambiguous && repeat != Repeat::Read {
            let mut error = Error::new(
                Class::Unknown,
                E_UNKNOWN_OUTCOME,
                "the request was sent and no answer came: it may have been applied",
            );
            error.unknown = true;
            error.retryable = repeat == Repeat::WithRequestId;
            return self.finish(error);
        }
        match &self.answer {
            Some(answer) => {
                let answer = answer.clone();
                self.finish(answer)
            }
            None if self.reached => {
                let error = Error::new(Class::Unavailable, E_NO_ANSWER, "no replica answered in time")
                    .with_next("palyra cluster status, or give more time: --timeout 30s");
                self.finish(error)
            }
            None => unreachable(self.refusal, self.hope, self.attempts),
        }
    }
}

/// Takes down a connection that was not made.
pub(crate) fn note(attempts: &mut Vec<Attempt>, refusal: &mut Option<ConnectError>, error: ConnectError) {
    push(
        attempts,
        Attempt {
            endpoint: error.address.clone(),
            cause: error.cause.clone(),
        },
    );
    if error.kind != ConnectErrorKind::Unreachable {
        *refusal = Some(error);
    }
}

/// Keeps the first tries and the last one: a long outage must not make a long error.
fn push(attempts: &mut Vec<Attempt>, attempt: Attempt) {
    if attempts.last() == Some(&attempt) {
        return;
    }
    if attempts.len() == ATTEMPTS_SHOWN {
        attempts.pop();
    }
    attempts.push(attempt);
}

/// The error when no replica let itself be reached. A refusal tells more than a closed port, but where there is
/// `hope` (some replica did not refuse), another try may still go well.
pub(crate) fn unreachable(refusal: Option<ConnectError>, hope: bool, attempts: Vec<Attempt>) -> Error {
    let mut error = match refusal {
        Some(refusal) => Error::from(refusal),
        None => {
            let mut tried: Vec<String> = Vec::new();
            for attempt in &attempts {
                let line = format!("{} ({})", attempt.endpoint, attempt.cause);
                if !tried.contains(&line) {
                    tried.push(line);
                }
            }
            Error::new(
                Class::Unreachable,
                E_UNREACHABLE,
                format!("no replica can be reached: {}", tried.join(", ")),
            )
            .with_next("is the cluster running? see `palyra context show` for the addresses in use")
        }
    };
    error.retryable = hope || error.class == Class::Unreachable;
    error.trail.attempts = attempts;
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_mutation_is_unknown_and_a_lost_read_is_not() {
        let story = || {
            let mut story = Story::default();
            story.lost("a:1", "broken pipe".to_owned(), false);
            story
        };
        let error = story().give_up(Repeat::WithRequestId);
        assert_eq!(
            (error.class, error.unknown, error.exit_code()),
            (Class::Unknown, true, 13)
        );
        assert_eq!(story().give_up(Repeat::Read).exit_code(), 9);
        assert_eq!(story().give_up(Repeat::Once).exit_code(), 13);
    }

    #[test]
    fn a_refused_certificate_is_told_as_such_unless_another_replica_gives_hope() {
        let mut story = Story::default();
        story.lost("a:1", "the server does not know who issued this".to_owned(), true);
        assert!(story.hopeless());
        story.answered("b:1", Error::new(Class::Unavailable, "E1", "no leader"));
        assert!(!story.hopeless());
        assert_eq!(story.give_up(Repeat::Read).exit_code(), 9);
    }

    #[test]
    fn attempts_are_bounded() {
        let mut attempts = Vec::new();
        for index in 0..100 {
            push(
                &mut attempts,
                Attempt {
                    endpoint: format!("a:{index}"),
                    cause: "x".to_owned(),
                },
            );
        }
        assert_eq!(attempts.len(), ATTEMPTS_SHOWN);
        assert_eq!(attempts.last().unwrap().endpoint, "a:99");
    }
}
