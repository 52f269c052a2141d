//! When a lease is over for the worker, by its own clock: never later than for the control plane, whatever
//! the network did.
//!
//! A renewal that was sent at `s` and answered moves the deadline to at least `s + ttl` by the control
//! plane's clock, for it was handled after `s`. So `s + ttl` is never too late here, however long the answer
//! took, and the clocks need not agree. The offer itself says nothing of that kind, for it may have lain in a
//! buffer while this machine slept: what it grants is used for preparing only, and nothing is started before
//! the first renewal was answered.
//!
//! What never lives here: clocks. All times are milliseconds of `CLOCK_BOOTTIME`.

use std::time::Duration;

/// How long before its deadline everything of a lease is killed: time for the kernel to end it, and for
/// clocks that run apart. An eighth of the lease, at least 100 ms and at most 2 s.
pub(crate) fn margin(ttl_ms: u64) -> u64 {
    (ttl_ms / 8).clamp(100, 2_000)
}

/// When a renewal is asked for: each third of the ttl, so that two may fail.
pub(crate) fn renew_every(ttl_ms: u64) -> Duration {
    Duration::from_millis((ttl_ms / 3).max(100))
}

/// The moment to kill at, after a renewal that was sent at `sent_ms` was answered. `remaining_ms` is what the
/// control plane said that is left then; 0: it did not say. `run_ends_ms` is the run's own deadline, as
/// counted from the offer.
pub(crate) fn kill_at(sent_ms: u64, ttl_ms: u64, remaining_ms: u64, run_ends_ms: u64) -> u64 {
    let granted = if remaining_ms == 0 {
        ttl_ms
    } else {
        ttl_ms.min(remaining_ms)
    };
    (sent_ms + granted)
        .min(run_ends_ms)
        .saturating_sub(margin(ttl_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_over_here_before_it_is_over_there() {
        // The renewal is handled any time after it was sent, and its answer comes any time after that.
        for ttl in [1_000, 30_000, 3_600_000] {
            for way in [0, 10, 900, 50_000] {
                let (sent, handled) = (1_000_000, 1_000_000 + way);
                assert!(kill_at(sent, ttl, ttl, u64::MAX) + margin(ttl) <= handled + ttl);
                assert!(kill_at(sent, ttl, 0, u64::MAX) + margin(ttl) <= handled + ttl);
                // Cut by the run's deadline, which the control plane knows.
                assert!(kill_at(sent, ttl, 400, u64::MAX) + margin(ttl) <= handled + 400);
            }
        }
        assert_eq!(
            kill_at(1_000, 30_000, 0, 5_000),
            3_000,
            "and by the run's deadline as it was told with the offer"
        );
        assert_eq!(kill_at(10, 1_000, 20, u64::MAX), 0, "too late is at once");
    }

    #[test]
    fn two_renewals_may_fail() {
        for ttl in [1_000, 30_000, 3_600_000] {
            let every = u64::try_from(renew_every(ttl).as_millis()).unwrap();
            assert!(2 * every + margin(ttl) < ttl);
        }
    }
}
