//! The time that a leader stamps on entries.
//!
//! The state's clock never goes back, so one leader whose wall clock is an hour ahead takes it there for good. If its
//! successors stamped their own wall clocks only, the state's time would stand still for that hour: no deadline would
//! pass and no lease would end. So the log's time also goes on at the pace of this replica's boot clock from the last
//! stamp that was applied here.
//!
//! Never here: a judgement of wall clocks. Invariant: what [`LogClock::now`] answers is never before the state's clock,
//! and between two questions it moves at least as far as the boot clock did.

use std::sync::{Mutex, PoisonError};

/// When the state's clock was last moved on here, in both times, milliseconds.
#[derive(Clone, Copy, Default)]
struct Anchor {
    log: u64,
    boot: u64,
}

impl Anchor {
    fn at(self, boot_ms: u64) -> u64 {
        self.log + boot_ms.saturating_sub(self.boot)
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct LogClock(Mutex<Anchor>);

impl LogClock {
    /// The state's clock is this now, and the boot clock that.
    pub(crate) fn applied(&self, state_ms: u64, boot_ms: u64) {
        let mut anchor = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // An entry that says less than has passed since the last is of a clock that stands still.
        if state_ms >= anchor.at(boot_ms) {
            *anchor = Anchor {
                log: state_ms,
                boot: boot_ms,
            };
        }
    }

    /// The time by which deadlines are judged and entries are stamped.
    pub(crate) fn now(&self, wall_ms: u64, boot_ms: u64) -> u64 {
        let anchor = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        wall_ms.max(anchor.at(boot_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000;

    #[test]
    fn time_goes_on_after_a_leader_whose_clock_was_ahead() {
        let clock = LogClock::default();
        clock.applied(1_000, 50);
        assert_eq!(clock.now(1_010, 60), 1_010, "the wall clock, as long as it leads");
        clock.applied(1_020 + HOUR, 70);
        assert_eq!(clock.now(1_030, 80), 1_030 + HOUR, "ten milliseconds later");
        clock.applied(1_020 + HOUR, 90);
        assert_eq!(
            clock.now(1_050, 100),
            1_050 + HOUR,
            "an entry by a clock that stands still holds nothing up"
        );
        assert_eq!(
            clock.now(1_060 + 2 * HOUR, 110),
            1_060 + 2 * HOUR,
            "the wall clock leads again"
        );
    }

    #[test]
    fn it_is_never_before_what_was_applied() {
        let clock = LogClock::default();
        for (state, boot, wall) in [
            (500, 9_000, 0),
            (900, 9_001, 10),
            (900, 9_002, 20),
            (5_000, 9_003, 30),
        ] {
            clock.applied(state, boot);
            assert!(clock.now(wall, boot) >= state);
        }
    }
}
