//! The time that a leader stamps on entries, and by which every replica judges deadlines.
//!
//! It is nobody's wall clock. It goes at the pace of the leader's boot clock, and comes nearer to the leader's wall
//! clock by at most a thousandth of the time that passes: a wall clock that jumps moves no deadline. Followers take
//! it from the leader's heartbeats and go on by their own boot clocks, so that it does not jump with a change of leader
//! either. Only a replica that has heard of no leader since it started begins with its wall clock: while everybody was
//! down, no other clock went on.
//!
//! Never here: a judgement of wall clocks. Invariants: what [`LogClock::now`] answers is never before the state's
//! clock, and the state's clock never stands still: from the last stamp that was applied, time goes on.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Of the time that passes, one part in so many is what the log's time may gain on the boot clock.
const SLEW: u64 = 1_000;
/// Slewing is accounted for in steps of at least this many milliseconds: shorter ones would gain nothing, or too much.
const STEP_MS: u64 = 1_000;
/// A leader's word that is behind by no more than this was on its way for so long, and says nothing new.
const LATE_MS: u64 = 2_000;

/// A moment in both times, milliseconds.
#[derive(Clone, Copy, Default)]
struct Anchor {
    log: u64,
    boot: u64,
}

impl Anchor {
    fn at(self, boot_ms: u64) -> u64 {
        self.log.saturating_add(boot_ms.saturating_sub(self.boot))
    }
}

#[derive(Default)]
struct Known {
    /// When the state's clock was last moved on here.
    state: Option<Anchor>,
    /// The log's time: by this replica while it leads, else as its leader said.
    time: Option<Anchor>,
}

/// See the module.
#[derive(Default)]
pub(crate) struct LogClock(Mutex<Known>);

impl LogClock {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state's clock is this now, and the boot clock that.
    pub(crate) fn applied(&self, state_ms: u64, boot_ms: u64) {
        let mut known = self.known();
        // An entry that says less than has passed since the last is of a clock that stands still.
        let late = known.state.is_some_and(|state| state_ms < state.at(boot_ms));
        if !late {
            known.state = Some(Anchor {
                log: state_ms,
                boot: boot_ms,
            });
        }
    }

    /// The leader says that the log's time is this.
    pub(crate) fn heard(&self, leader_ms: u64, boot_ms: u64) {
        let mut known = self.known();
        let own = known.time.map_or(0, |time| time.at(boot_ms));
        if leader_ms >= own || own - leader_ms > LATE_MS {
            known.time = Some(Anchor {
                log: leader_ms,
                boot: boot_ms,
            });
        }
    }

    /// The time by which deadlines are judged and entries are stamped.
    pub(crate) fn now(&self, wall_ms: u64, boot_ms: u64) -> u64 {
        let mut known = self.known();
        let state = known.state.map_or(0, |state| state.at(boot_ms));
        let Some(time) = known.time else {
            let now = wall_ms.max(state);
            known.time = Some(Anchor {
                log: now,
                boot: boot_ms,
            });
            return now;
        };
        let passed = boot_ms.saturating_sub(time.boot);
        let steady = time.at(boot_ms);
        let gained = wall_ms.saturating_sub(steady).min(passed / SLEW);
        let now = (steady + gained).max(state);
        if passed >= STEP_MS || now > steady + gained {
            known.time = Some(Anchor {
                log: now,
                boot: boot_ms,
            });
        }
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000;

    #[test]
    fn a_wall_clock_that_jumps_moves_no_deadline() {
        let clock = LogClock::default();
        assert_eq!(
            clock.now(5_000, 50),
            5_000,
            "who starts has nothing but its wall clock"
        );
        assert_eq!(clock.now(5_010 + HOUR, 60), 5_010, "an hour ahead");
        assert_eq!(clock.now(5_020 - HOUR.min(5_020), 70), 5_020, "and far behind");
        // A quarter of an hour with a wall clock that is two seconds ahead.
        let mut last = 5_020;
        for boot in 71..900_070 {
            let now = clock.now(5_000 + (boot - 50) + 2_000, boot);
            assert!(now > last, "{boot}");
            last = now;
        }
        let ahead = last - (5_000 + 900_069 - 50);
        assert!((850..=900).contains(&ahead), "a thousandth of the time: {ahead}");
    }

    #[test]
    fn followers_go_on_where_their_leader_was() {
        let follower = LogClock::default();
        assert_eq!(follower.now(HOUR, 10), HOUR, "its wall clock is an hour ahead");
        follower.heard(7_000, 20);
        assert_eq!(follower.now(HOUR + 30, 50), 7_030, "the leader decides");
        follower.heard(6_500, 60);
        assert_eq!(
            follower.now(HOUR + 40, 60),
            7_040,
            "a word that was long on its way"
        );
        follower.heard(9_000, 70);
        assert_eq!(
            follower.now(0, 80),
            9_010,
            "as leader itself, with a wall clock that is behind"
        );
    }

    #[test]
    fn it_is_never_before_what_was_applied_and_never_stands_still() {
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
        clock.applied(5_000, 9_050);
        assert_eq!(
            clock.now(40, 9_103),
            5_100,
            "an entry by a clock that stands still holds nothing up"
        );
    }
}
