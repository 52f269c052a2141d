//! When a certificate is renewed: at half of its life, with jitter; sooner when somebody asks; after a failure again,
//! the sooner the nearer the end.
//!
//! What never lives here: the renewal itself (see `link`).
//!
//! Invariants: the replica's word on how much of the life is left counts as well as this machine's clock, which may
//! be wrong; a try that failed is not repeated at once, and never later than an eighth of what is left.

use std::time::Duration;

use palyra_pki::PeerIdentity;
use palyra_proto::node::v1 as wire;
use tokio::time::Instant;

use crate::route::random_below;

const FIRST_AGAIN: Duration = Duration::from_secs(1);
const LAST_AGAIN: Duration = Duration::from_secs(600);
const LEAST_AGAIN: Duration = Duration::from_millis(250);

/// When the next renewal is due.
#[derive(Debug)]
pub(crate) struct Schedule {
    /// By the wall clock: a machine that slept must notice.
    wall_ms: u64,
    not_after_ms: u64,
    /// By the replica's word, in this process's own time.
    told: Option<Told>,
    /// Somebody asked for it.
    asked: bool,
    /// Not before this.
    again_at: Option<Instant>,
    failures: u32,
}

#[derive(Debug)]
struct Told {
    renew_at: Instant,
    ends_at: Instant,
}

impl Schedule {
    /// For a certificate as it says of itself: at half of its life, and up to a tenth of it later, so that a fleet
    /// doesn't renew in step.
    pub(crate) fn of(peer: &PeerIdentity) -> Self {
        let life = peer.not_after_ms.saturating_sub(peer.not_before_ms);
        Self {
            wall_ms: peer.not_before_ms + life / 2 + random_below(life / 10 + 1),
            not_after_ms: peer.not_after_ms,
            told: None,
            asked: false,
            again_at: None,
            failures: 0,
        }
    }

    /// A replica said how much is left of the certificate.
    pub(crate) fn told(&mut self, times: &wire::CertificateTimes, now: Instant) {
        let jitter = random_below(times.life_ms / 10 + 1);
        let after = |ms: u64| now + Duration::from_millis(ms.min(u64::from(u32::MAX) * 1000));
        self.told = Some(Told {
            renew_at: after(times.renew_in_ms.saturating_add(jitter)),
            ends_at: after(times.expires_in_ms),
        });
    }

    /// Somebody wants it now.
    pub(crate) fn ask(&mut self) {
        self.asked = true;
        self.again_at = None;
    }

    /// Whether it is time.
    pub(crate) fn is_due(&self, wall_ms: u64, now: Instant) -> bool {
        if self.again_at.is_some_and(|at| now < at) {
            return false;
        }
        let by_word = self.told.as_ref().is_some_and(|told| now >= told.renew_at);
        self.asked || by_word || wall_ms >= self.wall_ms
    }

    /// A try begins: not another one while it is under way.
    pub(crate) fn begin(&mut self, patience: Duration, now: Instant) {
        self.again_at = Some(now + patience);
    }

    /// It failed. Answers how long it is until the next try.
    pub(crate) fn failed(&mut self, wall_ms: u64, now: Instant) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let by_clock = Duration::from_millis(self.not_after_ms.saturating_sub(wall_ms));
        let left = self
            .told
            .as_ref()
            .map_or(by_clock, |told| told.ends_at.saturating_duration_since(now));
        let pause = FIRST_AGAIN
            .saturating_mul(1 << (self.failures - 1).min(16))
            .min(LAST_AGAIN)
            .min(left / 8)
            .max(LEAST_AGAIN);
        let millis = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        // The upper half: never in step, and never at once.
        let pause = Duration::from_millis(millis / 2 + random_below(millis / 2 + 1));
        self.again_at = Some(now + pause);
        pause
    }
}

#[cfg(test)]
mod tests {
    use palyra_pki::{Role, SpiffeId, TrustDomain};

    use super::*;

    const HOUR: u64 = 3_600_000;

    fn schedule(not_before_ms: u64) -> Schedule {
        let domain = TrustDomain::new("palyra.test.internal").unwrap();
        Schedule::of(&PeerIdentity {
            id: SpiffeId::new(domain, Role::Node, "01JD7ZA1B2C3D4E5F6G7H8J9K0").unwrap(),
            fingerprint: [0; 32],
            serial: String::new(),
            not_before_ms,
            not_after_ms: not_before_ms + 24 * HOUR,
            spki_sha256: [0; 32],
        })
    }

    #[test]
    fn half_of_the_life_and_a_tenth_at_most() {
        let now = Instant::now();
        let dues: std::collections::BTreeSet<u64> = (0..50).map(|_| schedule(0).wall_ms).collect();
        assert!(dues.len() > 10, "a fleet does not renew in step");
        assert!(
            dues.iter()
                .all(|due| (12 * HOUR..=14 * HOUR + HOUR / 2).contains(due))
        );
        assert!(!schedule(0).is_due(12 * HOUR - 1, now) && schedule(0).is_due(15 * HOUR, now));
    }

    #[test]
    fn a_replicas_word_counts_when_the_clock_is_wrong() {
        let now = Instant::now();
        // By this machine's clock the certificate is not even valid yet.
        let mut schedule = schedule(100 * HOUR);
        let times = wire::CertificateTimes {
            renew_in_ms: 1_000,
            expires_in_ms: 11_000,
            life_ms: 20_000,
        };
        schedule.told(&times, now);
        assert!(!schedule.is_due(0, now + Duration::from_millis(999)));
        assert!(schedule.is_due(0, now + Duration::from_millis(3_001)));
    }

    #[test]
    fn near_the_end_it_is_tried_harder() {
        let now = Instant::now();
        let mut calm = schedule(0);
        for _ in 0..20 {
            calm.failed(12 * HOUR, now);
        }
        let pause = calm.failed(12 * HOUR, now);
        assert!((LAST_AGAIN / 2..=LAST_AGAIN).contains(&pause), "{pause:?}");
        let pause = calm.failed(24 * HOUR - 8_000, now);
        assert!(pause <= Duration::from_secs(1), "{pause:?}");
        let pause = calm.failed(25 * HOUR, now);
        assert!((LEAST_AGAIN / 2..=LEAST_AGAIN).contains(&pause), "{pause:?}");
    }

    #[test]
    fn a_request_is_heard_at_once_and_a_failure_waits() {
        let now = Instant::now();
        let mut schedule = schedule(0);
        assert!(!schedule.is_due(HOUR, now));
        schedule.ask();
        assert!(schedule.is_due(HOUR, now));
        schedule.begin(Duration::from_secs(10), now);
        assert!(!schedule.is_due(HOUR, now));
        let pause = schedule.failed(HOUR, now);
        assert!(!schedule.is_due(HOUR, now) && schedule.is_due(HOUR, now + pause));
    }
}
