//! Clocks and timers. Three of them, and they are not interchangeable:
//!
//! - [`now`]: for timeouts inside one process. Virtual on a paused runtime. May stand still while a machine
//!   sleeps.
//! - [`boot_ms`]: for authority that must lapse (quorum age, sessions). Goes on while a machine sleeps, never
//!   back.
//! - [`wall_ms`]: for what people read and for the `at` that a leader stamps. May jump either way; nothing
//!   may depend on it for safety.
//!
//! Invariant: timers here are tokio's, so a paused runtime drives all of them.

use std::future::Future;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::hooks::{self, abort, hooks};

pub use tokio::time::error::Elapsed;
pub use tokio::time::{Instant, Interval, Sleep, Timeout};

/// This moment on the process's monotonic clock; virtual on a paused runtime, and in a simulation that of the running
/// replica, which may go too fast or too slow.
pub fn now() -> Instant {
    match hooks() {
        Some(hooks) => hooks.to_local(hooks::tag(), Instant::now()),
        None => Instant::now(),
    }
}

/// Waits for `duration`.
pub fn sleep(duration: Duration) -> Sleep {
    match hooks() {
        Some(_) => sleep_until(later(duration)),
        None => tokio::time::sleep(duration),
    }
}

/// Waits until `deadline`; at once when it is past.
pub fn sleep_until(deadline: Instant) -> Sleep {
    tokio::time::sleep_until(to_true(deadline))
}

/// Bounds `future`: `Err(Elapsed)` when it has not ended after `duration`. The future is dropped then, so it
/// must be safe to stop at any of its awaits.
pub fn timeout<F: Future>(duration: Duration, future: F) -> Timeout<F> {
    match hooks() {
        Some(_) => timeout_at(later(duration), future),
        None => tokio::time::timeout(duration, future),
    }
}

/// [`timeout`] at a moment.
pub fn timeout_at<F: Future>(deadline: Instant, future: F) -> Timeout<F> {
    tokio::time::timeout_at(to_true(deadline), future)
}

/// When the runtime's clock will show what ours shows at `deadline`.
fn to_true(deadline: Instant) -> Instant {
    match hooks() {
        Some(hooks) => hooks.to_true(hooks::tag(), deadline),
        None => deadline,
    }
}

/// A moment that far away, on the clock of [`now`]; some day when it is too far.
fn later(duration: Duration) -> Instant {
    const SOME_DAY: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
    now() + duration.min(SOME_DAY)
}

/// Ticks at once and then every `period`. Ticks that were missed are not made up for: after a stall a
/// periodic task runs once, not many times in a row.
///
/// # Panics
/// When `period` is zero.
pub fn interval(period: Duration) -> Interval {
    let period = match hooks() {
        Some(_) => to_true(later(period)).saturating_duration_since(Instant::now()),
        None => period,
    };
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    interval
}

/// Milliseconds since the Unix epoch. In a simulation, the skewed clock of the running replica. 0 when the
/// machine's clock stands before 1970.
pub fn wall_ms() -> u64 {
    match hooks() {
        Some(hooks) => hooks.wall_ms(hooks::tag()),
        None => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
    }
}

/// Milliseconds since the machine booted, suspends included. Only differences mean something, and only within
/// one boot of one machine.
pub fn boot_ms() -> u64 {
    match hooks() {
        Some(hooks) => hooks.boot_ms(hooks::tag()),
        None => os_boot_ms(),
    }
}

// CLOCK_MONOTONIC stands still in suspend on Linux: a laptop that slept for an hour would believe that its
// authority is seconds old. Elsewhere CLOCK_MONOTONIC is the nearest there is.
#[cfg(target_os = "linux")]
const BOOT_CLOCK: ClockId = ClockId::CLOCK_BOOTTIME;
#[cfg(not(target_os = "linux"))]
const BOOT_CLOCK: ClockId = ClockId::CLOCK_MONOTONIC;

fn os_boot_ms() -> u64 {
    match clock_gettime(BOOT_CLOCK) {
        Ok(time) => u64::try_from(Duration::from(time).as_millis()).unwrap_or(u64::MAX),
        Err(error) => abort(&format!("the boot-time clock cannot be read: {error}")),
    }
}

/// Measures how long something took, on the clock of [`now`].
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch {
    started: Instant,
}

impl Stopwatch {
    /// Starts now.
    pub fn start() -> Self {
        Stopwatch { started: now() }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        now().saturating_duration_since(self.started)
    }

    /// Whole milliseconds since the start.
    pub fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn timers_follow_virtual_time() {
        let watch = Stopwatch::start();
        let deadline = now() + Duration::from_secs(3600);
        sleep_until(deadline).await;
        assert_eq!(watch.elapsed(), Duration::from_secs(3600));
        assert_eq!(watch.elapsed_ms(), 3_600_000);
        let bounded = timeout(Duration::from_millis(5), std::future::pending::<()>()).await;
        assert!(bounded.is_err());
        assert_eq!(watch.elapsed_ms(), 3_600_005);
    }

    #[tokio::test(start_paused = true)]
    async fn missed_ticks_are_not_made_up_for() {
        let mut ticks = interval(Duration::from_secs(1));
        ticks.tick().await;
        sleep(Duration::from_secs(10)).await;
        let stalled = now();
        ticks.tick().await;
        assert_eq!(now(), stalled, "the first tick after a stall is due at once");
        ticks.tick().await;
        assert_eq!(
            now() - stalled,
            Duration::from_secs(1),
            "and the next one a full period later"
        );
    }

    #[test]
    fn the_machine_clocks_are_plausible() {
        assert!(wall_ms() > 1_700_000_000_000, "wall clock is after 2023");
        let earlier = boot_ms();
        assert!(earlier > 0);
        assert!(boot_ms() >= earlier);
    }
}
