//! The budget of attaches: how many are under way at one time, and who waits for a turn.
//!
//! An attach is an entry of the log, and when a replica dies thousands of nodes come at once. They are served in
//! the order in which they came; who would have to wait for too long is told so at once, and when to come back.
//! What never lives here: heartbeats and messages of sessions that exist, which wait for nobody. Invariants: the
//! queue is fair and bounded in number and in time; who gives up leaves nothing behind.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palyra_platform::{self as platform, Instant};
use palyra_state::Id;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::error::Error;
use crate::limits::Limits;
use crate::pace::{Pace, SessionRefusal};

/// Shortest and longest time after which somebody who found no place is asked back.
const BACK_MIN: Duration = Duration::from_millis(250);
const BACK_MAX: Duration = Duration::from_secs(30);
/// How long an attach is believed to take before one was measured.
const FIRST_GUESS: Duration = Duration::from_millis(20);

/// The budget.
#[derive(Debug)]
pub(crate) struct Admission {
    turns: Semaphore,
    in_flight: usize,
    queue: usize,
    patience: Duration,
    /// Devices that wait or are being attached, and how often.
    knocking: Mutex<BTreeMap<Id, u32>>,
    /// How long one takes, in microseconds; a moving average.
    takes: AtomicU64,
}

/// A device at the door; leaves when it is dropped.
#[derive(Debug)]
struct Knock<'a> {
    admission: &'a Admission,
    device_id: Id,
}

impl Drop for Knock<'_> {
    fn drop(&mut self) {
        let mut knocking = self.admission.lock();
        if let Some(times) = knocking.get_mut(&self.device_id) {
            *times -= 1;
            if *times == 0 {
                knocking.remove(&self.device_id);
            }
        }
    }
}

/// A turn; over when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    knock: Knock<'a>,
    began: Instant,
    _permit: SemaphorePermit<'a>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let took = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let takes = &self.knock.admission.takes;
        let before = takes.load(Ordering::Relaxed);
        takes.store(before - before / 8 + took / 8, Ordering::Relaxed);
    }
}

impl Admission {
    pub(crate) fn new(limits: &Limits, patience: Duration) -> Admission {
        Admission {
            turns: Semaphore::new(limits.attaches),
            in_flight: limits.attaches,
            queue: limits.attach_queue,
            patience,
            knocking: Mutex::new(BTreeMap::new()),
            takes: AtomicU64::new(u64::try_from(FIRST_GUESS.as_micros()).unwrap_or(u64::MAX)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Id, u32>> {
        self.knocking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn knock(&self, device_id: Id) -> Result<Knock<'_>, Error> {
        let mut knocking = self.lock();
        if knocking.len() >= self.in_flight + self.queue {
            let waiting = knocking.len();
            drop(knocking);
            return Err(self.full(waiting));
        }
        *knocking.entry(device_id).or_default() += 1;
        Ok(Knock {
            admission: self,
            device_id,
        })
    }

    /// Waits for a turn, behind all who came before.
    ///
    /// # Errors
    /// [`SessionRefusal::TooManyAttaches`] with the time after which to come back.
    pub(crate) async fn turn(&self, device_id: Id) -> Result<Turn<'_>, Error> {
        let knock = self.knock(device_id)?;
        let waited = platform::timeout(self.patience, self.turns.acquire()).await;
        let Ok(Ok(permit)) = waited else {
            return Err(self.full(self.waiting()));
        };
        Ok(Turn {
            knock,
            began: platform::now(),
            _permit: permit,
        })
    }

    fn full(&self, waiting: usize) -> Error {
        SessionRefusal::TooManyAttaches {
            waiting,
            pace: self.back_in(waiting),
        }
        .into()
    }

    /// When those that wait now will have been served, about; and as long again to spread over.
    fn back_in(&self, waiting: usize) -> Pace {
        let takes = Duration::from_micros(self.takes.load(Ordering::Relaxed));
        let rounds = u32::try_from(waiting / self.in_flight.max(1)).unwrap_or(u32::MAX);
        let wait = takes.saturating_mul(rounds).clamp(BACK_MIN, BACK_MAX);
        Pace {
            after: wait,
            spread: wait,
        }
    }

    /// How many devices wait or are being attached.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().len()
    }

    /// The devices that wait or are being attached, `limit` at most, and whether there are more.
    pub(crate) fn knocking(&self, limit: usize) -> (Vec<Id>, bool) {
        let knocking = self.lock();
        let some = knocking.keys().copied().take(limit).collect();
        (some, knocking.len() > limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u128) -> Id {
        Id::from_bytes(number.to_be_bytes())
    }

    fn small() -> Admission {
        let limits = Limits {
            attaches: 1,
            attach_queue: 2,
            ..Limits::default()
        };
        Admission::new(&limits, Duration::from_secs(8))
    }

    #[tokio::test(start_paused = true)]
    async fn turns_come_in_order_and_the_queue_has_an_end() {
        let admission = small();
        let first = admission.turn(id(1)).await.unwrap();
        let order = Mutex::new(Vec::new());
        let wait = async |number: u128| {
            let turn = admission.turn(id(number)).await.unwrap();
            order.lock().unwrap().push(number);
            drop(turn);
        };
        let late = async {
            tokio::task::yield_now().await;
            let refused = admission.turn(id(4)).await.unwrap_err();
            assert_eq!((refused.code().as_str(), refused.is_retryable()), ("E1051", true));
            assert!(refused.pace().is_some_and(|pace| pace.after >= BACK_MIN));
            assert_eq!(admission.knocking(2), (vec![id(1), id(2)], true));
            drop(first);
        };
        tokio::join!(wait(2), wait(3), late);
        assert_eq!(*order.lock().unwrap(), [2, 3]);
        assert_eq!(admission.waiting(), 0, "nobody is left behind");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_too_long_is_sent_away() {
        let admission = small();
        let _held = admission.turn(id(1)).await.unwrap();
        let refused = admission.turn(id(2)).await.unwrap_err();
        assert_eq!(refused.code(), "E1051");
        assert_eq!(admission.waiting(), 1);
    }

    #[test]
    fn the_longer_the_queue_the_later_one_comes_back() {
        let admission = small();
        let (short, long) = (admission.back_in(100), admission.back_in(1_000));
        assert!(short.after < long.after && long.after <= BACK_MAX);
    }
}
