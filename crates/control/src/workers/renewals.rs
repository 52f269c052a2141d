//! Renewals of leases: gathered in memory, and committed together.
//!
//! Ten thousand leases that are renewed one by one would cost the log a thousand entries a second; what the
//! workers of one replica want within [`RENEW_EVERY`] is one entry. What never lives here: deadlines (`apply`).
//! Invariants: of one lease the newest wish counts, and is answered under its own sequence; a wish is answered
//! as renewed only by an entry that came after it; an outcome that is not known is asked for under the same
//! request id, and a wish that was not decided is never answered as refused; what waits is bounded, in all and
//! for each session.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palyra_platform as platform;
use palyra_state::leases::{LeaseRef, Renew};
use palyra_state::reply::Renewal;
use palyra_state::{Id, Reply, limits};
use tokio::sync::Notify;

use super::delivery::own_lease;
use super::messages::{LeaseName, Renewed, ToWorker};
use super::session::is_undecided;
use crate::control::Control;
use crate::error::Error;
use crate::limits::{RENEW_EVERY, RENEW_WAITING};
use crate::registry::Entry;
use crate::workers::WorkerRefusal;

/// First pause after an entry whose outcome is not known; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// One wish.
#[derive(Debug)]
struct Wish {
    entry: Arc<Entry>,
    sequence: u64,
    named: LeaseName,
    wanted: LeaseRef,
}

/// By worker and lease, so that nobody's wish takes the place of another worker's.
type Wishes = BTreeMap<(Id, Id), Wish>;

/// Wishes that wait, and what came of those before.
#[derive(Debug, Default)]
pub(crate) struct Renewals {
    waiting: Mutex<Wishes>,
    arrived: Notify,
    full: Notify,
    entries: AtomicU64,
    renewed: AtomicU64,
    refused: AtomicU64,
}

/// Counters of renewals, since this replica started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RenewalCounts {
    /// Entries of the log that they cost.
    pub entries: u64,
    /// Leases that were renewed.
    pub renewed: u64,
    /// Leases that were not, because they are over, or not the worker's.
    pub refused: u64,
}

impl Renewals {
    fn lock(&self) -> MutexGuard<'_, Wishes> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a wish in the place of an older one. `false` when too many wait.
    fn put(&self, wish: Wish) -> bool {
        let mut waiting = self.lock();
        let key = (wish.wanted.worker_id, wish.wanted.lease_id);
        if waiting.len() >= RENEW_WAITING && !waiting.contains_key(&key) {
            return false;
        }
        waiting.insert(key, wish);
        let full = waiting.len() >= limits::RENEW_BATCH;
        drop(waiting);
        self.arrived.notify_one();
        if full {
            self.full.notify_one();
        }
        true
    }

    /// The next batch. Who has waited longest is not known; who is left comes next, for the keys go round.
    fn take(&self, after: &mut Option<(Id, Id)>) -> Vec<Wish> {
        let mut waiting = self.lock();
        let begin = after
            .take()
            .map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let later = waiting
            .range((begin, std::ops::Bound::Unbounded))
            .map(|(key, _)| *key);
        let mut keys: Vec<(Id, Id)> = later.take(limits::RENEW_BATCH).collect();
        let room = limits::RENEW_BATCH - keys.len();
        let first = keys.first().copied();
        let around = waiting
            .keys()
            .copied()
            .take_while(|key| first.is_none_or(|first| *key < first));
        keys.extend(around.take(room).collect::<Vec<_>>());
        *after = keys.last().copied();
        keys.iter().filter_map(|key| waiting.remove(key)).collect()
    }

    fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn has_batch(&self) -> bool {
        self.lock().len() >= limits::RENEW_BATCH
    }

    pub(crate) fn counts(&self) -> RenewalCounts {
        RenewalCounts {
            entries: self.entries.load(Ordering::Relaxed),
            renewed: self.renewed.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }
}

impl Control {
    /// What came of renewals of leases on this replica.
    #[must_use]
    pub fn renewal_counts(&self) -> RenewalCounts {
        self.workers().renewals.counts()
    }

    /// How many renewals wait here to be committed.
    #[must_use]
    pub fn renewals_waiting(&self) -> usize {
        self.workers().renewals.lock().len()
    }

    /// A worker wants these leases longer. What this replica knows to be over, or not the worker's, is answered
    /// at once: that never changes again. The rest waits for the next entry.
    pub(super) fn wish_longer(&self, entry: &Arc<Entry>, sequence: u64, leases: Vec<LeaseName>) {
        let mut answers = Vec::new();
        let view = self.replica().view();
        let reported = entry.worker.lock().reconciled;
        for (number, named) in leases.into_iter().enumerate() {
            let found = if number >= limits::LEASES_HELD {
                Err(Error::Busy {
                    what: "leases in one renewal",
                })
            } else if reported {
                own_lease(&view, entry, &named)
            } else {
                Err(WorkerRefusal::NotReported.into())
            };
            let wanted = match found {
                Ok(found) => LeaseRef {
                    lease_id: found.id,
                    fence: found.fence,
                    worker_id: entry.device_id,
                    epoch: entry.epoch(),
                },
                Err(error) => {
                    answers.push(not_renewed(named, &error));
                    continue;
                }
            };
            let wish = Wish {
                entry: Arc::clone(entry),
                sequence,
                named: named.clone(),
                wanted,
            };
            if !self.workers().renewals.put(wish) {
                answers.push(not_renewed(named, &Error::Busy { what: "renewals" }));
            }
        }
        if !answers.is_empty() {
            self.tell_worker(
                entry,
                ToWorker::Renewed {
                    sequence,
                    leases: answers,
                },
            );
        }
    }

    /// Commits wishes, until this replica stops.
    pub(crate) async fn renew_leases(self) {
        let mut stopping = self.stopping();
        let mut after = None;
        loop {
            if self.workers().renewals.is_empty() {
                tokio::select! {
                    biased;
                    _ = stopping.wait_for(|stop| *stop) => return,
                    () = self.workers().renewals.arrived.notified() => {}
                }
                continue;
            }
            if !self.workers().renewals.has_batch() {
                tokio::select! {
                    biased;
                    _ = stopping.wait_for(|stop| *stop) => return,
                    () = platform::sleep(RENEW_EVERY) => {}
                    () = self.workers().renewals.full.notified() => {}
                }
            }
            let batch = self.workers().renewals.take(&mut after);
            if !batch.is_empty() {
                self.commit_renewals(batch).await;
            }
        }
    }

    async fn commit_renewals(&self, mut batch: Vec<Wish>) {
        batch.retain(|wish| wish.entry.outbox.end().is_none());
        if batch.is_empty() {
            return;
        }
        let renew = Renew {
            leases: batch.iter().map(|wish| wish.wanted).collect(),
        };
        // Planted: workers are told that it is done before anybody has written it down.
        if palyra_fault::planted("renewal-before-commit") {
            let done = renew.leases.iter().map(|wish| self.as_if_renewed(wish.lease_id));
            self.answer_renewals(std::mem::take(&mut batch), Ok(done.collect()));
        }
        let (request_id, until) = (self.fresh_id(), platform::now() + 2 * self.timings().call_timeout);
        let mut pause = PAUSE_MIN;
        let outcome = loop {
            let counters = &self.workers().renewals;
            counters.entries.fetch_add(1, Ordering::Relaxed);
            match self.propose(request_id, self.as_replica(), renew.clone()).await {
                Err(error) if error.is_unknown() && platform::now() < until && !self.is_stopping() => {
                    tracing::debug!(leases = batch.len(), "renewals are asked for again");
                    platform::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                Ok(written) => match written.reply {
                    Reply::LeasesRenewed(renewed) => break Ok(renewed.renewals),
                    _ => break Err(self.odd_reply("leases.renew")),
                },
                Err(error) => break Err(error),
            }
        };
        if let Err(error) = &outcome {
            tracing::info!(leases = batch.len(), cause = %error, "renewals were not decided");
        }
        self.answer_renewals(batch, outcome);
    }

    /// Planted: what the answer would be if the entry were applied now.
    fn as_if_renewed(&self, lease_id: Id) -> Renewal {
        let view = self.replica().view();
        let ttl = palyra_state::leases::lease(&view, lease_id).map_or(0, |known| known.ttl);
        Renewal {
            lease_id,
            deadline_at: self.now_ms(&view) + ttl,
            refusal: None,
        }
    }

    fn answer_renewals(&self, batch: Vec<Wish>, outcome: Result<Vec<Renewal>, Error>) {
        let mut answers: BTreeMap<(u64, u64), (Arc<Entry>, Vec<Renewed>)> = BTreeMap::new();
        let now = self.now_ms(&self.replica().view());
        for (place, wish) in batch.into_iter().enumerate() {
            let renewed = match &outcome {
                Ok(renewals) => renewals.get(place).map_or_else(
                    || not_decided(wish.named.clone(), &self.odd_reply("leases.renew")),
                    |renewal| self.count_renewal(&wish, renewal, now),
                ),
                Err(error) => not_decided(wish.named, error),
            };
            let answer = answers
                .entry((wish.entry.key, wish.sequence))
                .or_insert_with(|| (wish.entry, Vec::new()));
            answer.1.push(renewed);
        }
        for ((_, sequence), (entry, leases)) in answers {
            self.tell_worker(&entry, ToWorker::Renewed { sequence, leases });
        }
    }

    fn count_renewal(&self, wish: &Wish, renewal: &Renewal, now: u64) -> Renewed {
        let counters = &self.workers().renewals;
        match &renewal.refusal {
            Some(reject) => {
                counters.refused.fetch_add(1, Ordering::Relaxed);
                not_renewed(wish.named.clone(), &reject.clone().into())
            }
            None => {
                counters.renewed.fetch_add(1, Ordering::Relaxed);
                Renewed {
                    lease: wish.named.clone(),
                    renewed: true,
                    code: String::new(),
                    message: String::new(),
                    retry: false,
                    // 0 would mean that nothing is said of it.
                    remaining_ms: renewal.deadline_at.saturating_sub(now).max(1),
                }
            }
        }
    }
}

fn not_renewed(lease: LeaseName, error: &Error) -> Renewed {
    Renewed {
        lease,
        renewed: false,
        code: error.code(),
        message: error.to_string(),
        retry: is_undecided(error),
        remaining_ms: 0,
    }
}

/// Whatever was refused of the whole entry says nothing of a lease.
fn not_decided(lease: LeaseName, error: &Error) -> Renewed {
    Renewed {
        retry: true,
        ..not_renewed(lease, error)
    }
}
