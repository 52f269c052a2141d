//! What the leader does about workers on its own: leases and runs whose time is over, workers of whom time has
//! changed something, statements that were checked against an older policy.
//!
//! What never lives here: whether something is due (`apply` decides again, by the log's time). Invariants: a
//! pass that finds nothing to do proposes nothing; every batch is bounded; a deadline that was given stands,
//! whoever leads, but no worker is given up for its absence by a leader that has not led for as long as a node
//! may take to come back, nor while it is at somebody's door.

use std::collections::BTreeSet;
use std::time::Duration;

use palyra_platform::{self as platform, Instant};
use palyra_state::{Id, fleet, leases, limits};

use crate::control::Control;
use crate::error::Error;
use crate::limits::DIGEST_KNOCKING;
use crate::reconcile::{PASS, PAUSE_MIN, tried};

/// Batches of one kind that one pass commits; the next goes on.
const BATCHES: u32 = 16;

impl Control {
    /// Does what is due of workers and leases, while this replica leads, until it stops.
    pub(crate) async fn sweep_leases(self) {
        let mut stopping = self.stopping();
        let mut since: Option<Instant> = None;
        loop {
            let pause = if since.is_some() {
                self.until_next_lease().clamp(PAUSE_MIN, PASS)
            } else {
                PASS
            };
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop) => return,
                () = platform::sleep(pause) => {}
            }
            if !self.acts_as_leader() {
                since = None;
                continue;
            }
            let since = *since.get_or_insert_with(platform::now);
            tried("statements", self.recheck_workers().await);
            tried("leases", self.expire_leases().await);
            tried("workers", self.lapse_workers(since).await);
        }
    }

    fn until_next_lease(&self) -> Duration {
        let view = self.replica().view();
        let nexts = [leases::next_due(&view), fleet::next_due(&view)];
        let next = nexts.into_iter().flatten().min().unwrap_or(u64::MAX);
        Duration::from_millis(next.saturating_sub(self.now_ms(&view)))
    }

    /// Ends leases and runs whose deadline has passed. Answers how many.
    pub(super) async fn expire_leases(&self) -> Result<usize, Error> {
        let mut ended = 0;
        for _ in 0..BATCHES {
            let due = {
                let view = self.replica().view();
                // Planted: what will be due when the entry is written is named already.
                let ahead = 1_000 * u64::from(palyra_fault::planted("sweeper-decides"));
                leases::due(&view, self.now_ms(&view) + ahead)
            };
            if due.leases.is_empty() && due.runs.is_empty() {
                break;
            }
            ended += self.as_system(due).await?;
        }
        Ok(ended)
    }

    /// Checks statements against the present policy.
    async fn recheck_workers(&self) -> Result<usize, Error> {
        let mut checked = 0;
        for _ in 0..BATCHES {
            let ids = fleet::unchecked(&self.replica().view(), limits::RECHECK_BATCH);
            if ids.is_empty() {
                break;
            }
            checked += self.as_system(fleet::Recheck { ids }).await?;
        }
        Ok(checked)
    }

    /// Notes what time has changed of workers.
    async fn lapse_workers(&self, since: Instant) -> Result<usize, Error> {
        let mut lapsed = 0;
        for _ in 0..BATCHES {
            let ids = self.late_workers(since);
            if ids.is_empty() {
                break;
            }
            let count = self.as_system(fleet::Lapse { ids }).await?;
            lapsed += count;
            if count == 0 {
                break;
            }
        }
        Ok(lapsed)
    }

    /// Workers that are due, save those that are away and may be on their way back.
    fn late_workers(&self, since: Instant) -> Vec<Id> {
        let view = self.replica().view();
        let (knocking, more) = self.admission().knocking(DIGEST_KNOCKING);
        let elsewhere = self.liveness().knocking(since);
        let none_can_be_given_up =
            more || elsewhere.is_none() || since.elapsed() < self.timings().suspect_for;
        let knocking: BTreeSet<Id> = knocking
            .into_iter()
            .chain(elsewhere.unwrap_or_default())
            .collect();
        let may = |id: &Id| {
            let away = fleet::worker(&view, *id).is_some_and(|worker| worker.away_since != 0);
            !away || !(none_can_be_given_up || knocking.contains(id))
        };
        let mut ids = fleet::due(&view, self.now_ms(&view), limits::LAPSE_BATCH * 4);
        ids.retain(may);
        ids.truncate(limits::LAPSE_BATCH);
        ids
    }
}
