//! Who waits on this replica for something to happen to a dispatch, a pairing request, an approval or a
//! grant.
//!
//! Invariants: a waiter registers before it looks at the state, so no wake-up is lost; a wake-up only means
//! "look again"; a waiter that gives up leaves nothing behind.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palyra_platform as platform;
use palyra_state::Id;
use tokio::sync::Notify;

use crate::error::Error;

#[derive(Debug)]
struct Bell {
    notify: Arc<Notify>,
    listeners: usize,
}

/// The registry of waiters, by the id of what they wait for.
#[derive(Debug)]
pub(crate) struct Waiters {
    bells: Mutex<(usize, BTreeMap<Id, Bell>)>,
    limit: usize,
}

/// One registration; leaves when it is dropped.
#[derive(Debug)]
struct Seat<'a> {
    waiters: &'a Waiters,
    id: Id,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let mut bells = self.waiters.lock();
        bells.0 -= 1;
        if let Some(bell) = bells.1.get_mut(&self.id) {
            bell.listeners -= 1;
            if bell.listeners == 0 {
                bells.1.remove(&self.id);
            }
        }
    }
}

impl Waiters {
    pub(crate) fn new(limit: usize) -> Waiters {
        Waiters {
            bells: Mutex::new((0, BTreeMap::new())),
            limit,
        }
    }

    fn lock(&self) -> MutexGuard<'_, (usize, BTreeMap<Id, Bell>)> {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something happened to `id`.
    pub(crate) fn wake(&self, id: Id) {
        if let Some(bell) = self.lock().1.get(&id) {
            bell.notify.notify_waiters();
        }
    }

    /// Something may have happened to anything.
    pub(crate) fn wake_all(&self) {
        for bell in self.lock().1.values() {
            bell.notify.notify_waiters();
        }
    }

    fn sit(&self, id: Id) -> Result<(Seat<'_>, Arc<Notify>), Error> {
        let mut bells = self.lock();
        if bells.0 >= self.limit {
            return Err(Error::Busy {
                what: "waiting calls",
            });
        }
        bells.0 += 1;
        let bell = bells.1.entry(id).or_insert_with(|| Bell {
            notify: Arc::new(Notify::new()),
            listeners: 0,
        });
        bell.listeners += 1;
        let notify = Arc::clone(&bell.notify);
        Ok((Seat { waiters: self, id }, notify))
    }

    /// Calls `look` now and after each wake-up, until it says that it is done or `wait` is over; then answers
    /// what it saw last.
    ///
    /// # Errors
    /// [`Error::Busy`] when too many wait already.
    pub(crate) async fn until<T>(
        &self,
        id: Id,
        wait: Duration,
        mut look: impl FnMut() -> (T, bool),
    ) -> Result<T, Error> {
        let (_seat, notify) = self.sit(id)?;
        let deadline = platform::now() + wait;
        loop {
            let mut woken = std::pin::pin!(notify.notified());
            woken.as_mut().enable();
            let (seen, done) = look();
            if done
                || platform::timeout(deadline.saturating_duration_since(platform::now()), woken)
                    .await
                    .is_err()
            {
                return Ok(seen);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wake_up_between_look_and_wait_is_not_lost() {
        let waiters = Waiters::new(1);
        let mut looks = 0;
        let seen = waiters
            .until(Id::ZERO, Duration::from_secs(60), || {
                looks += 1;
                waiters.wake(Id::ZERO);
                (looks, looks == 3)
            })
            .await;
        assert_eq!(seen, Ok(3));
        assert!(waiters.lock().1.is_empty(), "nothing is left behind");
    }

    #[tokio::test]
    async fn too_many_waiters_are_told_so() {
        let waiters = Waiters::new(0);
        let seen = waiters.until(Id::ZERO, Duration::ZERO, || ((), true)).await;
        assert_eq!(
            seen,
            Err(Error::Busy {
                what: "waiting calls"
            })
        );
    }
}
