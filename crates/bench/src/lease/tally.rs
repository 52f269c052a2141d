//! What happened to workers, counted.
//!
//! What never lives here: whether it was right.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};

/// Counters and lists that workers add to.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Leases that were offered.
    pub(crate) offers: AtomicU64,
    /// Renewals that were asked for, one a lease.
    pub(crate) wishes: AtomicU64,
    /// Renewals that were answered as done.
    pub(crate) renewals: AtomicU64,
    /// Messages that were answered with "not decided".
    pub(crate) retries: AtomicU64,
    /// Workers that slept longer than their leases.
    pub(crate) pauses: AtomicU64,
    /// Results that were reported under leases whose time was over.
    pub(crate) stale: AtomicU64,
    words: Mutex<Words>,
}

#[derive(Debug, Default)]
struct Words {
    troubles: BTreeMap<String, u64>,
    refusals: BTreeMap<(String, String), u64>,
    ends: BTreeMap<String, u64>,
    /// Leases whose result was taken; whether it was reported after the lease's own time.
    finished: Vec<(String, bool)>,
}

impl Tally {
    fn words(&self) -> std::sync::MutexGuard<'_, Words> {
        self.words.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something went wrong with a session.
    pub(crate) fn trouble(&self, kind: &str) {
        *self.words().troubles.entry(kind.to_owned()).or_default() += 1;
    }

    /// The control plane refused something.
    pub(crate) fn refused(&self, what: &str, code: &str) {
        let key = (what.to_owned(), code.to_owned());
        *self.words().refusals.entry(key).or_default() += 1;
    }

    /// The control plane ended a lease.
    pub(crate) fn ended(&self, reason: &str) {
        *self.words().ends.entry(reason.to_owned()).or_default() += 1;
    }

    /// A result was taken.
    pub(crate) fn finished(&self, lease_id: &str, stale: bool) {
        self.words().finished.push((lease_id.to_owned(), stale));
    }

    /// Refusals by what was said and by code.
    pub(crate) fn refusals(&self) -> BTreeMap<(String, String), u64> {
        self.words().refusals.clone()
    }

    /// Troubles by kind.
    pub(crate) fn troubles(&self) -> BTreeMap<String, u64> {
        self.words().troubles.clone()
    }

    /// Leases whose result was taken.
    pub(crate) fn taken(&self) -> Vec<(String, bool)> {
        self.words().finished.clone()
    }
}
