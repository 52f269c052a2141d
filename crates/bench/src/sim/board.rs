//! Where each simulated node is, for those who measure: written by the nodes, read at any time.
//!
//! What never lives here: what the cluster believes about the nodes, which is asked of the cluster. Times are
//! microseconds since the board was made, so that one clock measures everything.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// One node.
#[derive(Debug, Default)]
pub(crate) struct Seat {
    /// The replica that holds its session; 0 when none does.
    replica: AtomicU64,
    /// When it attached last.
    attached_us: AtomicU64,
    /// How often it attached.
    attaches: AtomicU64,
}

/// All nodes.
#[derive(Debug)]
pub(crate) struct Board {
    began: Instant,
    seats: Vec<Seat>,
    attached: AtomicU64,
    changed: Notify,
    troubles: Mutex<BTreeMap<String, u64>>,
}

impl Board {
    /// A board for so many nodes.
    pub(crate) fn new(nodes: usize) -> Board {
        Board {
            began: Instant::now(),
            seats: std::iter::repeat_with(Seat::default).take(nodes).collect(),
            attached: AtomicU64::new(0),
            changed: Notify::new(),
            troubles: Mutex::default(),
        }
    }

    fn us(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_micros()).unwrap_or(u64::MAX)
    }

    /// A node attached at a replica.
    pub(crate) fn attached(&self, node: usize, replica: u64) {
        let seat = &self.seats[node];
        seat.attached_us.store(self.us(Instant::now()), Ordering::Relaxed);
        seat.attaches.fetch_add(1, Ordering::Relaxed);
        if seat.replica.swap(replica, Ordering::Release) == 0 {
            self.attached.fetch_add(1, Ordering::Relaxed);
        }
        self.changed.notify_waiters();
    }

    /// A node's session ended.
    pub(crate) fn ended(&self, node: usize) {
        let seat = &self.seats[node];
        if seat.replica.swap(0, Ordering::Release) != 0 {
            self.attached.fetch_sub(1, Ordering::Relaxed);
        }
        self.changed.notify_waiters();
    }

    /// Something went wrong with a node; told by kind and number at the end.
    pub(crate) fn trouble(&self, kind: &str) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        // Causes carry addresses and numbers; so many kinds are enough to see what is wrong.
        if troubles.len() < 64 || troubles.contains_key(kind) {
            *troubles.entry(kind.to_owned()).or_default() += 1;
        }
    }

    /// Takes what went wrong since the last time, by kind.
    pub(crate) fn take_troubles(&self) -> BTreeMap<String, u64> {
        std::mem::take(&mut *self.troubles.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many nodes are attached.
    pub(crate) fn count(&self) -> usize {
        usize::try_from(self.attached.load(Ordering::Relaxed)).unwrap_or(usize::MAX)
    }

    /// The replica that holds a node's session; 0 when none does.
    pub(crate) fn replica_of(&self, node: usize) -> u64 {
        self.seats[node].replica.load(Ordering::Acquire)
    }

    /// The nodes whose session is at a replica.
    pub(crate) fn at(&self, replica: u64) -> Vec<usize> {
        (0..self.seats.len())
            .filter(|node| self.replica_of(*node) == replica)
            .collect()
    }

    /// How many sessions all nodes have begun.
    pub(crate) fn attaches(&self) -> u64 {
        self.seats
            .iter()
            .map(|seat| seat.attaches.load(Ordering::Relaxed))
            .sum()
    }

    /// Waits until `wanted` nodes are attached.
    pub(crate) async fn await_attached(&self, wanted: usize, within: Duration) -> Result<()> {
        let until = Instant::now() + within;
        loop {
            let changed = self.changed.notified();
            if self.count() >= wanted {
                return Ok(());
            }
            if timeout_at(until, changed).await.is_err() {
                let (count, troubles) = (self.count(), self.take_troubles());
                bail!(
                    "{count} of {wanted} nodes are attached after {} s; {troubles:?}",
                    within.as_secs()
                );
            }
        }
    }

    /// Waits until each of `nodes` has attached after `since`, then says how long each took.
    pub(crate) async fn rehomed(
        &self,
        nodes: &[usize],
        since: Instant,
        within: Duration,
    ) -> Result<Vec<Duration>> {
        let (from, until) = (self.us(since), Instant::now() + within);
        loop {
            let changed = self.changed.notified();
            let took: Vec<Duration> = nodes
                .iter()
                .filter_map(|node| self.back_after(*node, from))
                .collect();
            if took.len() == nodes.len() {
                return Ok(took);
            }
            if timeout_at(until, changed).await.is_err() {
                let (back, all, troubles) = (took.len(), nodes.len(), self.take_troubles());
                bail!(
                    "{back} of {all} nodes are back after {} s; {troubles:?}",
                    within.as_secs()
                );
            }
            // One look at all of them costs as much for one change as for a thousand.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn back_after(&self, node: usize, from: u64) -> Option<Duration> {
        let seat = &self.seats[node];
        let attached = seat.attached_us.load(Ordering::Relaxed);
        let back = self.replica_of(node) != 0 && attached > from;
        back.then(|| Duration::from_micros(attached - from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nodes_are_counted_once_wherever_they_are() {
        let board = Board::new(3);
        board.attached(0, 1);
        board.attached(1, 2);
        board.attached(1, 3);
        assert_eq!((board.count(), board.attaches()), (2, 3));
        assert_eq!((board.at(3), board.at(2)), (vec![1], vec![]));
        board.ended(0);
        board.ended(0);
        assert_eq!(board.count(), 1);
        assert!(board.await_attached(2, Duration::ZERO).await.is_err());
    }

    #[tokio::test]
    async fn a_node_is_back_when_it_attached_after_the_kill() {
        let board = Board::new(2);
        board.attached(0, 1);
        board.attached(1, 2);
        tokio::time::sleep(Duration::from_millis(2)).await;
        let killed = Instant::now();
        assert!(board.rehomed(&[0], killed, Duration::ZERO).await.is_err());
        board.ended(0);
        tokio::time::sleep(Duration::from_millis(2)).await;
        board.attached(0, 2);
        let took = board.rehomed(&[0], killed, Duration::from_secs(1)).await.unwrap();
        assert!(took.len() == 1 && took[0] >= Duration::from_millis(1));
    }

    #[test]
    fn troubles_are_told_once() {
        let board = Board::new(1);
        board.trouble("E0501");
        board.trouble("E0501");
        assert_eq!(board.take_troubles().get("E0501"), Some(&2));
        assert!(board.take_troubles().is_empty());
    }
}
