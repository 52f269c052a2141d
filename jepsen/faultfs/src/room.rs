//! Where requests wait: one thread that does each when its time has come or its fault is over.
//!
//! No thread of the file system ever blocks, so a stalled write does not keep reads from being answered.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::fault::{FaultId, Wait};

/// What is done when the waiting is over.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

struct Guest {
    fault: FaultId,
    due: Instant,
    stall: bool,
    job: Job,
}

#[derive(Default)]
struct State {
    guests: Vec<Guest>,
    /// Stalls that ended because they had lasted too long.
    watchdog: Vec<FaultId>,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The waiting room. Dropping it does what still waits, at once.
pub(crate) struct Room {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// How long the thread sleeps when nobody waits; somebody who comes wakes it.
const IDLE: Duration = Duration::from_secs(3600);

impl Room {
    pub(crate) fn new() -> std::io::Result<Room> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let thread = std::thread::Builder::new()
            .name("faultfs-room".to_owned())
            .spawn({
                let shared = shared.clone();
                move || serve(&shared)
            })?;
        Ok(Room {
            shared,
            thread: Some(thread),
        })
    }

    pub(crate) fn hold(&self, wait: Wait, job: Job) {
        self.shared.state().guests.push(Guest {
            fault: wait.fault,
            due: Instant::now() + wait.at_most,
            stall: wait.stall,
            job,
        });
        self.shared.changed.notify_all();
    }

    /// Lets go of all that wait because of this fault.
    pub(crate) fn release(&self, fault: FaultId) {
        self.release_if(|guest| guest.fault == fault);
    }

    pub(crate) fn release_all(&self) {
        self.release_if(|_| true);
    }

    fn release_if(&self, which: impl Fn(&Guest) -> bool) {
        let now = Instant::now();
        for guest in self.shared.state().guests.iter_mut().filter(|guest| which(guest)) {
            guest.due = now;
            guest.stall = false;
        }
        self.shared.changed.notify_all();
    }

    /// How many wait.
    pub(crate) fn waiting(&self) -> usize {
        self.shared.state().guests.len()
    }

    /// Waits until at least so many wait, or for `at_most`; whether they do.
    pub(crate) fn await_guests(&self, count: usize, at_most: Duration) -> bool {
        let state = self.shared.state();
        let short = |state: &mut State| state.guests.len() < count;
        let waited = self.shared.changed.wait_timeout_while(state, at_most, short);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Waits until nobody waits, or for `at_most`; whether that is so.
    pub(crate) fn await_empty(&self, at_most: Duration) -> bool {
        let state = self.shared.state();
        let held = |state: &mut State| !state.guests.is_empty();
        let waited = self.shared.changed.wait_timeout_while(state, at_most, held);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// The faults whose stall the watchdog has ended since the last call.
    pub(crate) fn overdue(&self) -> Vec<FaultId> {
        std::mem::take(&mut self.shared.state().watchdog)
    }
}

fn serve(shared: &Shared) {
    let mut state = shared.state();
    loop {
        let now = Instant::now();
        let closed = state.closed;
        let due = state.guests.iter().position(|guest| closed || guest.due <= now);
        if let Some(due) = due {
            let guest = state.guests.remove(due);
            shared.changed.notify_all();
            if guest.stall && !closed {
                state.watchdog.push(guest.fault);
            }
            drop(state);
            (guest.job)();
            state = shared.state();
            continue;
        }
        if closed {
            return;
        }
        let next = state
            .guests
            .iter()
            .map(|guest| guest.due.duration_since(now))
            .min();
        let waited = shared.changed.wait_timeout(state, next.unwrap_or(IDLE));
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A job that panicked has said so; there is nobody left to answer.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn wait(fault: u64, at_most: Duration) -> Wait {
        Wait {
            fault: FaultId(fault),
            at_most,
            stall: true,
        }
    }

    #[test]
    fn guests_leave_by_time_by_release_and_at_the_end() {
        let room = Room::new().unwrap();
        let (said, heard) = mpsc::channel();
        let hour = Duration::from_secs(3600);
        for (fault, at_most) in [(1, hour), (2, hour), (3, Duration::ZERO), (1, hour)] {
            let said = said.clone();
            room.hold(wait(fault, at_most), Box::new(move || said.send(fault).unwrap()));
        }
        assert_eq!(heard.recv().unwrap(), 3);
        assert_eq!(room.overdue(), [FaultId(3)]);
        room.release(FaultId(1));
        assert_eq!([heard.recv().unwrap(), heard.recv().unwrap()], [1, 1]);
        assert_eq!((room.waiting(), room.overdue().len()), (1, 0));
        drop(room);
        assert_eq!(heard.recv().unwrap(), 2);
    }
}
