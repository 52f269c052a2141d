//! What the kernel's requests and the harness's commands share: the store, the faults, the open handles, the counts.
//!
//! Never here: FUSE's types (`driver`), mounting (`mount`).

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::fault::{Fault, FaultId, Faults, Operation, Outcome, Verdict};
use crate::loss::{Lost, PowerLoss};
use crate::room::Room;
use crate::store::{Limits, Store};

/// How a file system is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// What it may take of this machine.
    pub limits: Limits,
    /// Decides which requests a fault by chance meets, and which bits it flips.
    pub seed: u64,
}

/// What was asked of a file system so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads that were answered.
    pub reads: u64,
    /// Writes, truncations and allocations that were made.
    pub writes: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Syncs that were asked for, those that failed or lied included.
    pub syncs: u64,
    /// Creates, links, renames and unlinks that were made.
    pub names: u64,
    /// Requests that answered ENOSPC.
    pub full: u64,
    /// Requests on handles of before a loss of power, which answer EIO.
    pub stale: u64,
    /// Losses of power.
    pub power_losses: u64,
}

/// One open file or folder.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) node: u64,
    /// A folder's entries when its reading began.
    pub(crate) entries: Vec<(u64, OsString)>,
}

#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) store: Store,
    pub(crate) faults: Faults,
    pub(crate) counters: Counters,
    opens: HashMap<u64, Open>,
    last_open: u64,
}

impl Core {
    fn new(settings: &Settings) -> Core {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        Core {
            store: Store::new(settings.limits, uid, gid),
            faults: Faults::new(SmallRng::seed_from_u64(settings.seed)),
            counters: Counters::default(),
            opens: HashMap::new(),
            last_open: 0,
        }
    }

    /// A new handle on a node.
    pub(crate) fn open(&mut self, node: u64) -> Result<u64, Errno> {
        // The kernel looks the name up once more when it hears this.
        self.store.open(node).map_err(|_| Errno::ESTALE)?;
        self.last_open += 1;
        let entries = Vec::new();
        self.opens.insert(self.last_open, Open { node, entries });
        Ok(self.last_open)
    }

    /// The node behind a handle, which a loss of power makes void.
    pub(crate) fn opened(&mut self, handle: u64) -> Result<&mut Open, Errno> {
        let Core { opens, counters, .. } = self;
        opens.get_mut(&handle).ok_or_else(|| {
            counters.stale += 1;
            Errno::EIO
        })
    }

    pub(crate) fn close(&mut self, handle: u64) {
        if let Some(open) = self.opens.remove(&handle) {
            self.store.close(open.node);
        }
    }

    /// Counts an answer that there is no space, and passes it on.
    pub(crate) fn counted<T>(&mut self, result: Result<T, Errno>) -> Result<T, Errno> {
        if matches!(result, Err(Errno::ENOSPC)) {
            self.counters.full += 1;
        }
        result
    }
}

/// The core behind its lock.
#[derive(Debug)]
pub(crate) struct Shared(Mutex<Core>);

impl Shared {
    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Commands a mounted file system: faults, space, and losses of power. Cheap to clone, usable from any thread, and
/// harmless after the file system is gone.
#[derive(Clone)]
pub struct Handle {
    pub(crate) shared: Arc<Shared>,
    pub(crate) room: Arc<Room>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl Handle {
    pub(crate) fn new(settings: &Settings) -> std::io::Result<Handle> {
        Ok(Handle {
            shared: Arc::new(Shared(Mutex::new(Core::new(settings)))),
            room: Arc::new(Room::new()?),
        })
    }

    /// Adds a fault, from now on until it is cleared or has met as many requests as it was to.
    pub fn inject(&self, fault: Fault) -> FaultId {
        self.shared.core().faults.inject(fault)
    }

    /// Ends a fault and lets the requests go on that wait because of it. Whether it was still on: not when the
    /// watchdog of a stall came first.
    pub fn clear(&self, fault: FaultId) -> bool {
        self.end_overdue(&mut self.shared.core());
        let was_on = self.shared.core().faults.clear(fault);
        self.room.release(fault);
        was_on
    }

    /// Ends all faults and lets all requests go on; gives all space back.
    pub fn clear_all(&self) {
        let cleared = {
            let mut core = self.shared.core();
            core.store.set_quota(u64::MAX);
            core.faults.clear_all()
        };
        cleared.into_iter().for_each(|fault| self.room.release(fault));
    }

    /// How many requests a fault has met, also after its end.
    pub fn hits(&self, fault: FaultId) -> u64 {
        self.shared.core().faults.hits(fault)
    }

    /// How many requests wait for the end of a delay or a stall.
    pub fn waiting(&self) -> usize {
        self.room.waiting()
    }

    /// Waits until at least `count` requests wait for the end of a delay or a stall, or for `at_most`; whether they
    /// do.
    pub fn await_waiting(&self, count: usize, at_most: std::time::Duration) -> bool {
        self.room.await_guests(count, at_most)
    }

    /// Waits until no request waits any more, or for `at_most`; whether that is so. Who is let go is gone a little
    /// later.
    pub fn await_idle(&self, at_most: std::time::Duration) -> bool {
        self.room.await_empty(at_most)
    }

    /// What was asked of the file system so far.
    pub fn counters(&self) -> Counters {
        self.shared.core().counters
    }

    /// Bytes that all files take, and how many they may.
    pub fn space(&self) -> (u64, u64) {
        self.shared.core().store.space()
    }

    /// Sets how many bytes all files may take, at most the capacity of the settings. Writes that need more answer
    /// ENOSPC; what is there stays.
    pub fn set_quota(&self, bytes: u64) {
        self.shared.core().store.set_quota(bytes);
    }

    /// Leaves only so many bytes free; returns the quota that does.
    pub fn fill(&self, leave: u64) -> u64 {
        let mut core = self.shared.core();
        let quota = core.store.space().0.saturating_add(leave);
        core.store.set_quota(quota);
        quota
    }

    /// Changes, and bytes of writes, that wait for a sync.
    pub fn unsynced(&self) -> (usize, u64) {
        self.shared.core().store.unsynced()
    }

    /// Lets the requests go on that wait now; faults stay. A process that is to be killed can only die then.
    pub fn let_go(&self) {
        self.room.release_all();
    }

    /// The power goes: what was not synced is lost as `loss` says, and every open handle is void. Kill the processes
    /// that use the file system first; what they still have in flight, or stalled, answers EIO.
    pub fn power_loss(&self, loss: &PowerLoss) -> Lost {
        let lost = {
            let mut core = self.shared.core();
            core.counters.power_losses += 1;
            core.opens.clear();
            core.store.lose_power(loss)
        };
        self.room.release_all();
        lost
    }

    fn end_overdue(&self, core: &mut Core) {
        for fault in self.room.overdue() {
            core.faults.clear(fault);
        }
    }

    /// Does `job`, now or after the wait that a fault imposes, with the outcome that a fault imposes. A request that
    /// the loss of power overtakes fails.
    pub(crate) fn gate(
        &self,
        operation: Operation,
        name: impl FnOnce(&Core) -> Option<OsString>,
        job: impl FnOnce(&mut Core, Outcome) + Send + 'static,
    ) {
        let mut core = self.shared.core();
        self.end_overdue(&mut core);
        let name = name(&core).unwrap_or_default();
        let Verdict { wait, outcome } = core.faults.decide(operation, name.as_encoded_bytes());
        let Some(wait) = wait else {
            return job(&mut core, outcome);
        };
        let (shared, born) = (self.shared.clone(), core.counters.power_losses);
        self.room.hold(
            wait,
            Box::new(move || {
                let mut core = shared.core();
                let overtaken = core.counters.power_losses != born;
                job(
                    &mut core,
                    if overtaken {
                        Outcome::Fail(Errno::EIO)
                    } else {
                        outcome
                    },
                );
            }),
        );
    }
}
