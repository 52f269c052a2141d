//! How far a revocation is: which replicas have carried it out, and why the others have not.
//!
//! What never lives here: the entry that revokes. Invariants: a replica counts as enforced only when it said that it
//! closed the subject's connections, or when it was not heard and can serve no node because it lost the quorum too
//! long ago; what is neither is named as pending, with the reason, never passed over. Any replica can tell, at any time
//! after the revocation: nothing of it is held where it was asked for first.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use palyra_platform::{self as platform, Instant};
use palyra_replica::{PeerError, Refusal as PeerRefusal};
use palyra_state::{Id, cluster, identity};

use crate::caller::millis;
use crate::control::{Control, bounded_wait};
use crate::error::Error;
use crate::limits::{ENFORCE_WAIT, ENFORCE_WAIT_MAX, LAPSE_MARGIN, REMOVED_LINGERS};
use crate::peers::{Answer, Call, Enforce};
use crate::selector;

/// The least time that a replica gets for a word before it counts as silent.
const LAST_CALL: Duration = Duration::from_secs(1);
/// Longest pause between two words about a revocation that does not get on: what lapses is counted down.
const TELL: Duration = Duration::from_secs(1);
/// How finely it is remembered when an index was carried out, and for how many moments.
const MARK: Duration = Duration::from_millis(100);
const MARKS: usize = 4_096;

/// When this replica had carried out which index: never earlier than it had.
#[derive(Debug)]
pub(crate) struct Marks(Mutex<VecDeque<Mark>>);

#[derive(Debug, Clone, Copy)]
struct Mark {
    index: u64,
    opened: Instant,
    at: Instant,
}

impl Marks {
    pub(crate) fn new() -> Marks {
        Marks(Mutex::default())
    }

    /// Everything up to `index` is carried out by now.
    pub(crate) fn note(&self, index: u64) {
        let now = platform::now();
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match marks.back_mut() {
            // Later than the truth for what it held before, and so on the safe side, by no more than its width.
            Some(last) if now.saturating_duration_since(last.opened) < MARK => {
                last.index = last.index.max(index);
                last.at = now;
            }
            _ => {
                let (opened, at) = (now, now);
                marks.push_back(Mark { index, opened, at });
            }
        }
        if marks.len() > MARKS {
            marks.pop_front();
        }
    }

    /// A moment at which `index` had been carried out; now, when none is known.
    fn since(&self, index: u64) -> Instant {
        let marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = marks.partition_point(|mark| mark.index < index);
        marks.get(first).map_or_else(platform::now, |mark| mark.at)
    }
}

/// How one replica stands to a revocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stand {
    /// It said that it holds no session and no connection of the subject.
    Closed,
    /// It was not heard, or says itself that it is cut off, and can serve no node any more.
    Lapsed,
    /// Neither is known.
    Pending {
        /// Why.
        reason: String,
    },
}

/// One replica's part in a revocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enforcement {
    /// The replica.
    pub replica_id: u64,
    /// Its name.
    pub name: String,
    /// How it stands.
    pub stand: Stand,
    /// While it is pending: how long until it can serve nobody, unless it is heard before.
    pub lapses_in: Duration,
}

/// How far a revocation is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The device.
    pub device_id: Id,
    /// Log index of the entry that revoked it.
    pub index: u64,
    /// All replicas that may serve nodes, by id.
    pub replicas: Vec<Enforcement>,
    /// No replica serves the device any more.
    pub complete: bool,
}

type Word = Arc<Mutex<Stand>>;

/// Asks every replica until it has carried a revocation out.
pub(crate) struct Round {
    words: Vec<(u64, String, Word)>,
    under_way: FuturesUnordered<BoxFuture<'static, ()>>,
    lapsed: Instant,
}

impl Round {
    pub(crate) fn all(&self) -> Vec<Enforcement> {
        let lapses_in = self.lapsed.saturating_duration_since(platform::now());
        let told = |(replica_id, name, word): &(u64, String, Word)| Enforcement {
            replica_id: *replica_id,
            name: name.clone(),
            stand: word.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            lapses_in,
        };
        self.words.iter().map(told).collect()
    }

    /// Resolves when one more replica has carried it out; `false` when all have. Safe to cancel.
    pub(crate) async fn next(&mut self) -> bool {
        self.under_way.next().await.is_some()
    }
}

/// The progress of a revocation, as long as somebody listens.
pub struct Revocations {
    control: Control,
    device_id: Id,
    index: u64,
    round: Round,
    until: Instant,
    told: Option<Vec<Enforcement>>,
    over: bool,
}

impl std::fmt::Debug for Revocations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Revocations({} at {})", self.device_id, self.index)
    }
}

impl Revocations {
    /// How far it is: at once, then whenever that changes and at least each second, until it is complete or the wait is
    /// over. Safe to cancel.
    pub async fn next(&mut self) -> Option<Progress> {
        if self.over || self.control.is_stopping() {
            return None;
        }
        let mut complete = self.round.under_way.is_empty();
        if self.told.is_some() && !complete {
            let left = self.until.saturating_duration_since(platform::now());
            match platform::timeout(left.min(TELL), self.round.next()).await {
                Ok(_) => complete = self.round.under_way.is_empty(),
                Err(_) => self.over = platform::now() >= self.until,
            }
        }
        self.over |= complete;
        let replicas = self.round.all();
        self.told = Some(replicas.clone());
        Some(Progress {
            device_id: self.device_id,
            index: self.index,
            replicas,
            complete,
        })
    }
}

impl Control {
    /// Opens the progress of a revocation: of a device that is revoked or removed, for `wait_ms` (0: ten seconds, two
    /// minutes at most).
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is no such device, [`Error::Invalid`] when it is not revoked, and what a
    /// linearizable read can say.
    pub async fn watch_revocation(&self, device: &str, wait_ms: u64) -> Result<Revocations, Error> {
        let (view, _) = self.read(crate::control::ReadOptions::default()).await?;
        let device_id = selector::device(&view, device)?;
        let index = match (
            identity::device(&view, device_id),
            identity::ban(&view, device_id),
        ) {
            (Some(known), _) => known.revoked_index,
            (None, Some(ban)) => ban.revoked_index,
            (None, None) => {
                let refused = palyra_state::Reject::new(palyra_state::Code::NoSuchDevice, [&device_id]);
                return Err(refused.into());
            }
        };
        drop(view);
        if index == 0 {
            let next = format!("revoke it: palyra device revoke {device_id}");
            return Err(Error::invalid(
                "device_id",
                format!("{device_id} is not revoked"),
                next,
            ));
        }
        Ok(Revocations {
            control: self.clone(),
            device_id,
            index,
            round: self.enforcement(index, &device_id.to_string()),
            until: platform::now() + bounded_wait(wait_ms, ENFORCE_WAIT, ENFORCE_WAIT_MAX),
            told: None,
            over: false,
        })
    }

    /// Which replicas have carried out `index` for a subject, and which have not within `wait`.
    pub(crate) async fn enforce_everywhere(
        &self,
        index: u64,
        subject: &str,
        wait: Duration,
    ) -> (Vec<u64>, Vec<u64>) {
        let until = platform::now() + wait;
        // A replica that joined right before the entry must be among those that are asked.
        self.replica().wait_applied(index, wait).await;
        let mut round = self.enforcement(index, subject);
        while let Ok(true) =
            platform::timeout(until.saturating_duration_since(platform::now()), round.next()).await
        {}
        let (mut enforced, mut pending) = (Vec::new(), Vec::new());
        for replica in round.all() {
            match replica.stand {
                Stand::Closed | Stand::Lapsed => enforced.push(replica.replica_id),
                Stand::Pending { .. } => pending.push(replica.replica_id),
            }
        }
        (enforced, pending)
    }

    /// Begins to ask every replica that may serve nodes.
    pub(crate) fn enforcement(&self, index: u64, subject: &str) -> Round {
        // A contact with the quorum counts, on every replica, only once everything that was committed then is applied.
        // So a replica that has not applied `index` is stale `max_staleness` after the commit; it was committed when
        // it was applied here, or before.
        let lapsed = self.marks().since(index) + self.largest_staleness() + LAPSE_MARGIN;
        let under_way = FuturesUnordered::new();
        let mut words = Vec::new();
        for (id, name) in self.may_serve() {
            let pending = Stand::Pending {
                reason: "it was not heard yet".to_owned(),
            };
            let word: Word = Arc::new(Mutex::new(pending));
            words.push((id, name, Arc::clone(&word)));
            let (control, subject) = (self.clone(), subject.to_owned());
            let asked = async move {
                let stand = control.enforced_by(id, index, &subject, lapsed, &word).await;
                *word.lock().unwrap_or_else(PoisonError::into_inner) = stand;
            };
            under_way.push(Box::pin(asked) as BoxFuture<'static, ()>);
        }
        Round {
            words,
            under_way,
            lapsed,
        }
    }

    /// The replicas that may serve nodes now: all members, and those that were removed a moment ago and may
    /// not have heard of it.
    fn may_serve(&self) -> Vec<(u64, String)> {
        let view = self.replica().view();
        let lingers = millis(REMOVED_LINGERS);
        let earliest = self.now_ms(&view).saturating_sub(lingers);
        let replicas = cluster::replicas(&view).into_iter();
        replicas
            .filter(|replica| replica.is_member() || replica.removed_at > earliest)
            .map(|replica| (replica.id, replica.name))
            .collect()
    }

    /// Returns when one replica has carried out `index` for a subject, or can serve nobody.
    ///
    /// One that has applied `index` closes the connections by itself: from `lapsed` on a replica that does not answer
    /// can be left out, and one that says that it is stale. One that answers anything else, and be it with a refusal,
    /// is not silent.
    async fn enforced_by(&self, id: u64, index: u64, subject: &str, lapsed: Instant, word: &Word) -> Stand {
        if id == self.replica_id() {
            say(word, "it is closing connections".to_owned());
            self.enforced_here(index, subject).await;
            return Stand::Closed;
        }
        let step = self.timings().call_timeout;
        loop {
            // A call that hangs must not outlast the lapse by much; but the last one needs its chance as well.
            let until_lapsed = lapsed.saturating_duration_since(platform::now());
            let patience = step.min(until_lapsed.max(LAST_CALL));
            let call = Call::Enforce(Enforce {
                index,
                subject: subject.to_owned(),
                wait_ms: millis(patience / 2),
            });
            match self.call_peer(id, call, patience).await {
                Ok(Answer::Enforced(answer)) if answer.done => return Stand::Closed,
                // Only later: it might still hear of a contact from before the entry.
                Ok(Answer::Enforced(answer)) if answer.stale && platform::now() >= lapsed => {
                    return Stand::Lapsed;
                }
                Ok(Answer::Enforced(answer)) if answer.stale => {
                    say(word, "it is cut off from the quorum".to_owned());
                }
                Ok(_) => say(word, "it is closing connections".to_owned()),
                Err(error) if is_silence(&error) && platform::now() >= lapsed => return Stand::Lapsed,
                Err(error) => {
                    tracing::debug!(replica = id, cause = %error, "no word yet of a revocation");
                    let reason = if is_silence(&error) {
                        "unreachable"
                    } else {
                        "it refuses to say"
                    };
                    say(word, reason.to_owned());
                    platform::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    /// Returns when this replica has carried out `index`, and holds no session and no connection of
    /// `subject`.
    pub(crate) async fn enforced_here(&self, index: u64, subject: &str) {
        let mut applied = self.replica().applied();
        if applied.wait_for(|at| *at >= index).await.is_err() {
            // The replica has stopped: it serves nobody, and says so by not answering.
            return std::future::pending().await;
        }
        // An entry that repeats an earlier request has no rows of its own, so that the follower never reaches
        // its index: what counts is that it has carried out all rows up to there.
        let rows = palyra_state::meta(&self.replica().view()).journal_last.index;
        let mut enforced = self.enforced().subscribe();
        // The sender lives as long as this control plane.
        let _ = enforced.wait_for(|at| *at >= rows).await;
        let mut connections = self.connections().watch();
        let mut sessions = self.registry().watch();
        let device_id = Id::parse(subject);
        loop {
            let no_session = device_id.is_none_or(|id| self.registry().of_device(id).is_empty());
            if no_session && self.connections().none_of(subject) {
                return;
            }
            tokio::select! {
                biased;
                _ = connections.changed() => {}
                _ = sessions.changed() => {}
            }
        }
    }
}

fn say(word: &Word, reason: String) {
    *word.lock().unwrap_or_else(PoisonError::into_inner) = Stand::Pending { reason };
}

/// Whether an error says that a replica was not heard. A refusal is the word of one that lives, unless it stops.
fn is_silence(error: &PeerError) -> bool {
    match error {
        PeerError::Unreachable(_) | PeerError::Lost(_) | PeerError::Timeout(_) => true,
        PeerError::Refused { refusal, .. } => *refusal == PeerRefusal::Stopped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_was_carried_out_when_is_never_told_too_early() {
        let marks = Marks::new();
        let start = platform::now();
        marks.note(5);
        platform::sleep(Duration::from_millis(60)).await;
        marks.note(6);
        platform::sleep(Duration::from_secs(3)).await;
        marks.note(9);
        assert!(marks.since(6) >= start + Duration::from_millis(60));
        assert!(marks.since(4) <= start + MARK, "but not much later either");
        assert_eq!(marks.since(7), start + Duration::from_millis(3_060));
        platform::sleep(Duration::from_secs(1)).await;
        assert_eq!(marks.since(10), platform::now(), "what is not known was now");
        for index in 10..10 + 2 * MARKS as u64 {
            platform::sleep(MARK).await;
            marks.note(index);
        }
        assert!(
            marks.since(1) > start + Duration::from_secs(4),
            "bounded, and late again"
        );
    }
}
