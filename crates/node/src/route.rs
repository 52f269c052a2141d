//! Which replica to try next, and how long to wait before.
//!
//! Invariants: the replica that served last is tried first; after a failure it comes last; the wait before a
//! try is drawn from zero to a ceiling that doubles with each failure in a row, from 100 ms to 5 s, so that
//! nodes that lost the same replica don't come back in step; a session that is lost as soon as it is there is a
//! failure like any other, so that it is not begun in a tight loop: each one is an entry of the log.

use std::time::Duration;

use palyra_client::fill_random;
use tokio::time::Instant;

use crate::home::KnownReplica;

const FIRST_MS: u64 = 100;
const LAST_MS: u64 = 5_000;
/// A session that lived this long was a good one: what follows its end is not a row of failures.
const STEADY: Duration = Duration::from_secs(5);
/// No replica's word keeps a node away for longer.
const LONGEST_TOLD: Duration = Duration::from_secs(60);

/// The known replicas, in the order in which they will be tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    replicas: Vec<KnownReplica>,
    failures: u32,
    served_at: Option<Instant>,
    /// Sessions in a row that were lost as soon as they were there.
    flaps: u32,
    /// When to try next, as a replica told.
    told: Option<Pace>,
}

/// When to come back, as a replica tells those that it sends away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pace {
    after: Duration,
    spread: Duration,
}

impl Pace {
    /// What a replica says, within reason.
    pub(crate) fn told(after_ms: u64, spread_ms: u64) -> Pace {
        let bounded = |ms| Duration::from_millis(ms).min(LONGEST_TOLD);
        Pace {
            after: bounded(after_ms),
            spread: bounded(spread_ms),
        }
    }
}

impl Route {
    /// Begins in random order.
    pub(crate) fn new(mut replicas: Vec<KnownReplica>) -> Self {
        replicas.retain(|replica| !replica.node_addr.is_empty());
        shuffle(&mut replicas);
        Self {
            replicas,
            failures: 0,
            served_at: None,
            flaps: 0,
            told: None,
        }
    }

    /// The replica to try; `None` when none is known.
    pub(crate) fn replica(&self) -> Option<KnownReplica> {
        self.replicas.first().cloned()
    }

    /// How long to wait before the next try.
    pub(crate) fn pause(&self) -> Duration {
        if self.failures == 0 || self.served_at.is_some() {
            return Duration::ZERO;
        }
        if let Some(pace) = self.told {
            let spread = u64::try_from(pace.spread.as_millis()).unwrap_or(u64::MAX);
            return pace.after + Duration::from_millis(random_below(spread.saturating_add(1)));
        }
        let ceiling = FIRST_MS
            .saturating_mul(1 << (self.failures - 1).min(10))
            .min(LAST_MS);
        Duration::from_millis(random_below(ceiling + 1))
    }

    /// The first replica sends the node away, and says when to come, here or elsewhere.
    pub(crate) fn sent_away(&mut self, now: Instant, pace: Pace) {
        self.failed(now);
        self.told = Some(pace);
    }

    /// The first replica serves.
    pub(crate) fn served(&mut self, now: Instant) {
        self.told = None;
        self.served_at = Some(now);
    }

    /// The first replica failed, or asks to be left.
    pub(crate) fn failed(&mut self, now: Instant) {
        self.told = None;
        match self.served_at.take() {
            Some(at) if now >= at + STEADY => (self.flaps, self.failures) = (0, 1),
            Some(_) => {
                self.flaps = self.flaps.saturating_add(1);
                self.failures = self.flaps;
            }
            None => self.failures = self.failures.saturating_add(1),
        }
        if self.replicas.len() > 1 {
            self.replicas.rotate_left(1);
        }
    }

    /// The replicas that there are now. Keeps the order of those that stay. Answers whether anything changed.
    pub(crate) fn learn(&mut self, now: Vec<KnownReplica>) -> bool {
        let mut now: Vec<KnownReplica> = now
            .into_iter()
            .filter(|replica| !replica.node_addr.is_empty())
            .collect();
        let unchanged =
            now.len() == self.replicas.len() && now.iter().all(|replica| self.replicas.contains(replica));
        if now.is_empty() || unchanged {
            return false;
        }
        shuffle(&mut now);
        let place = |replica: &KnownReplica| {
            let known = self
                .replicas
                .iter()
                .position(|known| known.node_addr == replica.node_addr);
            known.unwrap_or(self.replicas.len())
        };
        now.sort_by_key(place);
        self.replicas = now;
        true
    }

    /// All of them.
    pub(crate) fn replicas(&self) -> &[KnownReplica] {
        &self.replicas
    }
}

/// A number below `bound`, for jitter; 0 when `bound` is 0.
pub(crate) fn random_below(bound: u64) -> u64 {
    let mut bytes = [0u8; 8];
    fill_random(&mut bytes);
    u64::from_le_bytes(bytes).checked_rem(bound).unwrap_or(0)
}

fn shuffle(replicas: &mut [KnownReplica]) {
    for end in (1..replicas.len()).rev() {
        replicas.swap(end, usize::try_from(random_below(end as u64 + 1)).unwrap_or(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(number: u64) -> KnownReplica {
        KnownReplica {
            replica_id: number,
            node_addr: format!("r{number}:7441"),
            enrol_addr: String::new(),
            quic_addr: String::new(),
        }
    }

    #[test]
    fn a_failed_replica_comes_last_and_a_good_one_stays_first() {
        let mut route = Route::new((1..=3).map(replica).collect());
        let now = Instant::now();
        let first = route.replica().unwrap().node_addr;
        assert_eq!(route.pause(), Duration::ZERO);
        route.failed(now);
        let second = route.replica().unwrap().node_addr;
        route.failed(now);
        let third = route.replica().unwrap().node_addr;
        assert!(first != second && second != third && third != first);
        route.failed(now);
        assert_eq!(route.replica().unwrap().node_addr, first);
        route.served(now);
        assert_eq!(
            (route.replica().unwrap().node_addr, route.pause()),
            (first, Duration::ZERO)
        );
    }

    #[test]
    fn only_a_session_that_lasts_ends_a_row_of_failures() {
        let mut route = Route::new(vec![replica(1)]);
        let now = Instant::now();
        for _ in 0..20 {
            route.failed(now);
        }
        for failures in 1..5 {
            route.served(now);
            route.failed(now + STEADY / 2);
            assert_eq!(
                route.failures, failures,
                "of its own, not on top of an outage before"
            );
        }
        route.served(now);
        route.failed(now + STEADY);
        assert_eq!(route.failures, 1);
        route.failed(now + STEADY);
        assert_eq!(route.failures, 2, "it failed without having served");
    }

    #[test]
    fn pauses_stay_below_the_ceiling_and_vary() {
        let mut route = Route::new(vec![replica(1)]);
        for failures in 1..40 {
            route.failed(Instant::now());
            let ceiling = (100u64 << (failures - 1).min(10)).min(5_000);
            assert!(route.pause() <= Duration::from_millis(ceiling));
        }
        let pauses: std::collections::BTreeSet<Duration> = (0..50).map(|_| route.pause()).collect();
        assert!(pauses.len() > 10);
    }

    #[test]
    fn who_is_sent_away_comes_when_it_was_told_and_elsewhere() {
        let mut route = Route::new((1..=3).map(replica).collect());
        let now = Instant::now();
        let first = route.replica().unwrap().node_addr;
        route.served(now);
        route.sent_away(now + STEADY, Pace::told(3_000, 500));
        assert_ne!(route.replica().unwrap().node_addr, first);
        let pauses: Vec<u64> = (0..50)
            .map(|_| u64::try_from(route.pause().as_millis()).unwrap())
            .collect();
        assert!(
            pauses.iter().all(|pause| (3_000..=3_500).contains(pause)),
            "{pauses:?}"
        );
        route.failed(now + STEADY);
        assert!(route.pause() <= Duration::from_millis(200), "its own pace again");
        route.sent_away(now, Pace::told(u64::MAX, u64::MAX));
        assert!(route.pause() <= 2 * LONGEST_TOLD);
    }

    #[test]
    fn learning_keeps_the_good_one_first_and_ignores_an_empty_list() {
        let mut route = Route::new(vec![replica(2)]);
        assert!(!route.learn(vec![]));
        assert!(!route.learn(vec![replica(2)]));
        assert!(route.learn(vec![replica(1), replica(2), replica(3)]));
        assert_eq!(route.replica().unwrap().node_addr, "r2:7441");
        assert!(route.learn(vec![replica(1), replica(3)]));
        assert_eq!(route.replicas().len(), 2);
    }
}
