//! The care for workers of this replica: who is asked to attest, and who is asked to clean up again.
//!
//! What never lives here: whether a statement is good (`apply`), and offers (`delivery`). Invariants: a worker
//! is asked once in a session for one cause, so that one that cannot pass is not asked without end; a question
//! that did not get through is asked again; challenges that are being opened are bounded in number, however many
//! workers a new policy concerns.

use std::sync::Arc;
use std::time::Duration;

use palyra_platform as platform;
use palyra_state::fleet::{self, OpenChallenge, Policy, Worker};
use palyra_state::{Digest, Id, Read, Reply, limits};

use super::messages::{Challenge, ToWorker};
use crate::control::Control;
use crate::error::Error;
use crate::registry::Entry;

/// Pause between two looks at the statements of this replica's workers.
const LOOK: Duration = Duration::from_secs(1);
/// A challenge that was shown is not replaced for so long, in milliseconds: the worker has it, and another would
/// make void what it says over this one.
const SHOWN_FOR: u64 = 10_000;

/// Why a worker is to attest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Why {
    /// It has not, or it asked.
    First,
    /// Its statement runs out.
    Expiring,
    /// An operator wants it.
    Reverify,
    /// It is held to something else since its statement was refused.
    Policy,
}

impl Why {
    fn as_str(self) -> &'static str {
        match self {
            Why::First => "first",
            Why::Expiring => "expiring",
            Why::Reverify => "reverify",
            Why::Policy => "policy",
        }
    }
}

/// Why a worker is to attest now, if it is, and what makes another such cause another one. A statement that was
/// refused is not asked for again in the same session before the policy is another.
fn cause(worker: &Worker, policy: &Policy, now: u64) -> Option<(Why, u64)> {
    if worker.barred {
        return None;
    }
    if worker.reverify_at != 0 {
        return Some((Why::Reverify, worker.reverify_at));
    }
    // Only an operator lifts it.
    if worker.quarantine.is_some() {
        return None;
    }
    let good = worker
        .attested
        .as_ref()
        .filter(|attested| attested.policy_version != 0 && now < attested.expires_at);
    match good {
        Some(attested) if is_expiring(worker.id, attested.accepted_at, attested.expires_at, now) => {
            Some((Why::Expiring, attested.index))
        }
        Some(_) => None,
        None => {
            let refused = worker.refusal.as_ref();
            if refused.is_some_and(|refusal| refusal.at < policy.set_at) {
                return Some((Why::Policy, policy.version));
            }
            Some((
                Why::First,
                worker.attested.as_ref().map_or(0, |attested| attested.index),
            ))
        }
    }
}

/// Whether the last quarter of a statement's life has begun; for each worker a little later or earlier than for
/// the others.
fn is_expiring(id: Id, from: u64, until: u64, now: u64) -> bool {
    let life = until.saturating_sub(from);
    let share = u64::from(id.to_bytes()[15]);
    now >= until.saturating_sub(life / 4 + life * share / 2048)
}

impl Control {
    /// Looks after the workers of this replica, until it stops: statements that run out, questions that did not
    /// get through.
    pub(crate) async fn care_for_workers(self) {
        let mut stopping = self.stopping();
        loop {
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop) => return,
                () = platform::sleep(LOOK) => {}
            }
            if self.check_fresh().is_err() {
                continue;
            }
            let now = self.now_ms(&self.replica().view());
            for entry in self.registry().all() {
                let due = {
                    let seat = entry.worker.lock();
                    // One without a good statement is looked at each time; there are few.
                    let runs_out = |(from, until)| is_expiring(entry.device_id, from, until, now);
                    seat.reconciled && !seat.asking && seat.statement.is_none_or(runs_out)
                };
                if due {
                    self.look_after(&entry);
                }
            }
        }
    }

    /// Asks a worker for what is wanted of it, unless it was asked.
    pub(crate) fn look_after(&self, entry: &Arc<Entry>) {
        let why = {
            let mut seat = entry.worker.lock();
            if !seat.reconciled || entry.outbox.end().is_some() {
                return;
            }
            let view = self.replica().view();
            let Some(worker) = fleet::worker(&view, entry.device_id) else {
                return;
            };
            if worker.cleanup_at > seat.cleanup {
                seat.cleanup = worker.cleanup_at;
                let reason = worker.failure.as_ref().map(|failure| failure.reason.clone());
                let message = ToWorker::Cleanup {
                    reason: reason.unwrap_or_default(),
                };
                drop(seat);
                self.tell_worker(entry, message);
                seat = entry.worker.lock();
            }
            let good = worker
                .attested
                .as_ref()
                .filter(|attested| attested.policy_version != 0);
            seat.statement = good.map(|attested| (attested.accepted_at, attested.expires_at));
            let policy = fleet::policy(&view).unwrap_or_default();
            let Some(cause) = cause(&worker, &policy, self.now_ms(&view)) else {
                return;
            };
            if seat.asking || !seat.asked.insert(cause) {
                return;
            }
            // Of what is over nothing needs to be known.
            seat.asked.retain(|known| known.0 != cause.0 || *known == cause);
            seat.asking = true;
            cause
        };
        let (control, entry) = (self.clone(), Arc::clone(entry));
        platform::spawn(async move {
            let asked = control.ask_to_attest(&entry, why.0).await;
            let mut seat = entry.worker.lock();
            seat.asking = false;
            if let Err(error) = asked {
                tracing::debug!(worker = %entry.device_id, cause = %error, "a challenge was not opened");
                if error.is_retryable() {
                    seat.asked.remove(&why);
                }
            }
        })
        .detach();
    }

    async fn ask_to_attest(&self, entry: &Arc<Entry>, why: Why) -> Result<(), Error> {
        let busy = || Error::Busy { what: "challenges" };
        let _turn = self.workers().challenging.acquire().await.map_err(|_| busy())?;
        if entry.outbox.end().is_some() {
            return Ok(());
        }
        self.challenge(entry, self.fresh_id(), why).await
    }

    /// Opens a challenge in the name of the session's node, and shows it, unless one was shown a moment ago.
    pub(super) async fn challenge(&self, entry: &Arc<Entry>, request_id: Id, why: Why) -> Result<(), Error> {
        // Whoever comes second finds what the first has shown.
        let _one = entry.worker.opening.lock().await;
        let caller = self.admit_node(&entry.peer)?;
        let now = self.now_ms(&self.replica().view());
        let shown = entry.worker.lock().shown;
        if shown.is_some_and(|at| now < at.saturating_add(SHOWN_FOR)) {
            return Ok(());
        }
        let mut random = [0; 32];
        platform::fill_random(&mut random);
        let command = OpenChallenge {
            worker_id: entry.device_id,
            epoch: entry.epoch(),
            nonce: Digest::from_bytes(random),
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        let Reply::Challenged(opened) = written.reply else {
            return Err(self.odd_reply("fleet.open_challenge"));
        };
        entry.worker.lock().shown = Some(self.now_ms(&self.replica().view()));
        let max_life_ms = self.longest_statement(&self.replica().view());
        self.tell_worker(
            entry,
            ToWorker::Challenge(Challenge {
                nonce: Digest::from_bytes(opened.nonce.to_bytes()),
                expires_in_ms: opened.expires_at.saturating_sub(opened.now),
                reason: why.as_str(),
                now_ms: opened.now,
                cluster_id: self.cluster_id(),
                max_life_ms,
            }),
        );
        Ok(())
    }

    fn longest_statement(&self, view: &dyn Read) -> u64 {
        let asked = fleet::policy(view).map_or(0, |policy| policy.max_attestation_life);
        if asked == 0 {
            limits::ATTESTATION_LIFE
        } else {
            asked
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use palyra_state::fleet::{Attested, Hold, Refusal};

    fn worker() -> Worker {
        Worker {
            attested: Some(Attested {
                accepted_at: 1_000,
                expires_at: 9_000,
                policy_version: 3,
                index: 77,
                ..Attested::default()
            }),
            ..Worker::default()
        }
    }

    #[test]
    fn who_is_asked_and_what_for() {
        let policy = Policy {
            version: 3,
            set_at: 500,
            ..Policy::default()
        };
        let cause = |worker: &Worker, now| cause(worker, &policy, now);
        assert_eq!(cause(&worker(), 2_000), None);
        assert_eq!(cause(&worker(), 7_000), Some((Why::Expiring, 77)));
        assert_eq!(cause(&worker(), 9_000), Some((Why::First, 77)));
        assert_eq!(cause(&Worker::default(), 1), Some((Why::First, 0)));
        let refused = |at| Worker {
            refusal: Some(Refusal {
                at,
                ..Refusal::default()
            }),
            ..Worker::default()
        };
        assert_eq!(cause(&refused(400), 501), Some((Why::Policy, 3)));
        // The same policy would refuse it again: it is asked as in any new session, and no more.
        assert_eq!(cause(&refused(501), 502), Some((Why::First, 0)));
        let held = Worker {
            quarantine: Some(Hold::default()),
            ..worker()
        };
        assert_eq!(cause(&held, 8_999), None);
        let reverify = Worker {
            reverify_at: 5,
            ..held
        };
        assert_eq!(cause(&reverify, 6), Some((Why::Reverify, 5)));
        let barred = Worker {
            barred: true,
            ..reverify
        };
        assert_eq!(cause(&barred, 6), None);
    }

    #[test]
    fn workers_are_not_asked_in_step() {
        let (early, late) = (Id::from_bytes([255; 16]), Id::ZERO);
        assert!(is_expiring(early, 0, 8_000, 5_100) && !is_expiring(late, 0, 8_000, 5_100));
        assert!(is_expiring(late, 0, 8_000, 6_000));
    }
}
