//! The live sessions of this replica, in memory: which device has which, when it was last heard, what waits
//! for it.
//!
//! What never lives here: the replicated record of a session, and proposals. Heartbeats end here.
//! Invariants: an entry is made before the attach is proposed and before the state is checked, so that a
//! revocation or a newer session either finds the entry or is found by the check; it stays until its end is
//! settled in the state and its owner has let go of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palyra_pki::PeerIdentity;
use palyra_platform::{self as platform, Instant};
use palyra_state::Id;
use tokio::sync::watch;

use crate::error::Error;
use crate::limits::Limits;
use crate::outbox::{Outbox, Waiting};
use crate::workers::seat::Seat;

/// How a node receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// One bidirectional stream, gRPC.
    Stream,
    /// One bidirectional stream, QUIC.
    Quic,
    /// Long polls and unary results.
    Poll,
}

impl Transport {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Transport::Stream => "stream",
            Transport::Quic => "quic",
            Transport::Poll => "poll",
        }
    }
}

/// One session.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Names it on this replica, before it has an epoch.
    pub(crate) key: u64,
    pub(crate) device_id: Id,
    pub(crate) peer: PeerIdentity,
    pub(crate) transport: Transport,
    /// The mTLS connection that carries it; 0 when there is none to close.
    pub(crate) connection: u64,
    pub(crate) outbox: Outbox,
    /// 0 until the attach is committed.
    epoch: AtomicU64,
    /// When a message came last.
    heard: Mutex<Instant>,
    /// Calls and messages of the node that are being worked on; a node that waits for us is not silent.
    busy: AtomicUsize,
    /// Dispatches that were put into the outbox or that the node holds.
    /// With the attempt of each; 0 when the node did not say.
    delivered: Mutex<BTreeMap<Id, u32>>,
    /// [`RELEASED`] and [`SETTLED`], as they come true.
    over: AtomicU8,
    /// Somebody tells the state of its end.
    detaching: AtomicBool,
    /// The generation of the trust bundle that the node holds; all ones until it said so.
    pub(crate) trust: AtomicU64,
    /// The newest generation that was put into the outbox.
    pub(crate) offered: AtomicU64,
    /// Of the worker that the node may be.
    pub(crate) worker: Seat,
}

/// The owner has let go of the entry.
const RELEASED: u8 = 1;
/// The state knows of the session's end, or never knew of the session.
const SETTLED: u8 = 2;

impl Entry {
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    pub(crate) fn touch(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = platform::now();
    }

    /// How long nothing came. What is being worked on counts as a message.
    pub(crate) fn silence(&self) -> Duration {
        if self.busy.load(Ordering::Acquire) > 0 {
            return Duration::ZERO;
        }
        self.unheard_for()
    }

    /// How long ago a message came, whatever is being worked on.
    pub(crate) fn unheard_for(&self) -> Duration {
        self.heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .elapsed()
    }

    /// Counts a call or message until the guard is dropped.
    pub(crate) fn work(self: &Arc<Self>) -> WorkGuard {
        self.busy.fetch_add(1, Ordering::AcqRel);
        WorkGuard(Arc::clone(self))
    }

    /// Notes dispatches that the node has already.
    pub(crate) fn holds(&self, held: impl IntoIterator<Item = (Id, u32)>) {
        self.delivered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(held);
    }

    /// Puts an attempt of a dispatch into the outbox, unless it was there before. `false` when the box is full.
    pub(crate) fn deliver(&self, dispatch_id: Id, attempt: u32) -> bool {
        let mut delivered = self.delivered.lock().unwrap_or_else(PoisonError::into_inner);
        // What is held without a number is the attempt that its first look finds.
        let known = delivered.get(&dispatch_id).copied();
        if known.is_some_and(|known| known == 0 || known >= attempt) {
            delivered.insert(dispatch_id, attempt);
            return true;
        }
        let fits = self.outbox.put(Waiting::Assign(dispatch_id));
        if fits {
            delivered.insert(dispatch_id, attempt);
        }
        fits
    }

    /// Forgets a dispatch that has ended; whether the node had it.
    pub(crate) fn forget(&self, dispatch_id: Id) -> bool {
        self.delivered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&dispatch_id)
            .is_some()
    }

    /// Everything that was put into the outbox or that the node holds.
    pub(crate) fn all_delivered(&self) -> Vec<Id> {
        let delivered = self.delivered.lock().unwrap_or_else(PoisonError::into_inner);
        delivered.keys().copied().collect()
    }

    pub(crate) fn release(&self) {
        self.over.fetch_or(RELEASED, Ordering::AcqRel);
    }

    /// Whether that is news.
    fn settle(&self) -> bool {
        self.over.fetch_or(SETTLED, Ordering::AcqRel) & SETTLED == 0
    }

    /// Whether the asker is the first, and so the one that tells the state.
    pub(crate) fn begin_detach(&self) -> bool {
        !self.detaching.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn is_released(&self) -> bool {
        self.over.load(Ordering::Acquire) & RELEASED != 0
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.over.load(Ordering::Acquire) & SETTLED != 0
    }
}

/// A call or message that is being worked on.
#[derive(Debug)]
pub(crate) struct WorkGuard(Arc<Entry>);

impl Drop for WorkGuard {
    fn drop(&mut self) {
        self.0.touch();
        self.0.busy.fetch_sub(1, Ordering::AcqRel);
    }
}

#[derive(Debug, Default)]
struct Inside {
    by_key: BTreeMap<u64, Slot>,
    by_device: BTreeMap<Id, BTreeSet<u64>>,
    /// When each is to be looked at, with its key: a look at all that are due costs as much as there are of them.
    due: BTreeSet<(Instant, u64)>,
    next: u64,
    /// Live, or ended without the state's knowing.
    unsettled: usize,
    /// Those of them that have an epoch.
    attached: usize,
}

#[derive(Debug)]
struct Slot {
    entry: Arc<Entry>,
    due: Instant,
}

/// All sessions.
#[derive(Debug)]
pub(crate) struct Registry {
    inside: Mutex<Inside>,
    changed: watch::Sender<u64>,
    limit: usize,
    per_device: usize,
    outbound: usize,
    look_after: Duration,
}

impl Registry {
    /// An empty one; an entry is looked at for the first time when it is `look_after` old.
    pub(crate) fn new(limits: &Limits, look_after: Duration) -> Registry {
        Registry {
            inside: Mutex::new(Inside::default()),
            changed: watch::Sender::new(0),
            limit: limits.sessions,
            per_device: limits.sessions_per_device,
            outbound: limits.outbound,
            look_after,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn enter(
        &self,
        device_id: Id,
        peer: &PeerIdentity,
        transport: Transport,
        connection: u64,
    ) -> Result<Arc<Entry>, Error> {
        let mut inside = self.lock();
        if inside.by_key.len() >= self.limit {
            return Err(Error::Busy { what: "sessions" });
        }
        // Each new session ends the one before it; what piles up is streams that are not read to their end.
        if inside.by_device.get(&device_id).map_or(0, BTreeSet::len) >= self.per_device {
            return Err(Error::Busy {
                what: "sessions of this device",
            });
        }
        inside.next += 1;
        let entry = Arc::new(Entry {
            key: inside.next,
            device_id,
            peer: peer.clone(),
            transport,
            connection,
            outbox: Outbox::new(self.outbound),
            epoch: AtomicU64::new(0),
            heard: Mutex::new(platform::now()),
            busy: AtomicUsize::new(0),
            delivered: Mutex::new(BTreeMap::new()),
            over: AtomicU8::new(0),
            detaching: AtomicBool::new(false),
            trust: AtomicU64::new(u64::MAX),
            offered: AtomicU64::new(0),
            worker: Seat::default(),
        });
        let valid = Duration::from_millis(peer.not_after_ms.saturating_sub(platform::wall_ms()));
        let due = platform::now() + self.look_after.min(valid);
        let slot = Slot {
            entry: Arc::clone(&entry),
            due,
        };
        inside.by_key.insert(entry.key, slot);
        inside.by_device.entry(device_id).or_default().insert(entry.key);
        inside.due.insert((due, entry.key));
        inside.unsettled += 1;
        Ok(entry)
    }

    /// The attach is committed.
    pub(crate) fn set_epoch(&self, entry: &Entry, epoch: u64) {
        let mut inside = self.lock();
        entry.epoch.store(epoch, Ordering::Release);
        inside.attached += 1;
    }

    /// Those that are due to be looked at. Each is looked at once: who wants to see it again says when.
    pub(crate) fn due(&self, now: Instant) -> Vec<Arc<Entry>> {
        let mut inside = self.lock();
        let later = inside.due.split_off(&(now, u64::MAX));
        let due = std::mem::replace(&mut inside.due, later);
        due.into_iter()
            .filter_map(|(_, key)| inside.by_key.get(&key).map(|slot| Arc::clone(&slot.entry)))
            .collect()
    }

    /// Has an entry looked at again, not before `at`.
    pub(crate) fn look_again(&self, entry: &Entry, at: Instant) {
        let mut inside = self.lock();
        let Some(slot) = inside.by_key.get_mut(&entry.key) else {
            return;
        };
        let before = std::mem::replace(&mut slot.due, at);
        inside.due.remove(&(before, entry.key));
        inside.due.insert((at, entry.key));
    }

    /// The state knows of the session's end, or never knew of the session.
    pub(crate) fn settle(&self, entry: &Entry) {
        let mut inside = self.lock();
        if entry.settle() {
            inside.unsettled -= 1;
            inside.attached -= usize::from(entry.epoch() != 0);
        }
        drop(inside);
        self.remove_when_over(entry);
    }

    /// Lets an entry go whose end is settled and whose owner has let go. Whoever brings either about asks for
    /// it afterwards; the second finds both.
    pub(crate) fn remove_when_over(&self, entry: &Entry) {
        if entry.is_released() && entry.is_settled() {
            self.remove(entry);
        } else {
            self.changed.send_modify(|count| *count += 1);
        }
    }

    fn remove(&self, entry: &Entry) {
        let mut inside = self.lock();
        if let Some(slot) = inside.by_key.remove(&entry.key) {
            inside.due.remove(&(slot.due, entry.key));
        }
        if let Some(keys) = inside.by_device.get_mut(&entry.device_id) {
            keys.remove(&entry.key);
            if keys.is_empty() {
                inside.by_device.remove(&entry.device_id);
            }
        }
        drop(inside);
        self.changed.send_modify(|count| *count += 1);
    }

    pub(crate) fn of_device(&self, device_id: Id) -> Vec<Arc<Entry>> {
        let inside = self.lock();
        let keys = inside.by_device.get(&device_id);
        keys.into_iter()
            .flatten()
            .filter_map(|key| inside.by_key.get(key).map(|slot| Arc::clone(&slot.entry)))
            .collect()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        let inside = self.lock();
        inside
            .by_key
            .values()
            .map(|slot| Arc::clone(&slot.entry))
            .collect()
    }

    /// The session with this epoch, if it is live here.
    pub(crate) fn live(&self, device_id: Id, epoch: u64) -> Option<Arc<Entry>> {
        let mut of_device = self.of_device(device_id).into_iter();
        of_device.find(|entry| entry.epoch() == epoch && epoch != 0 && entry.outbox.end().is_none())
    }

    pub(crate) fn count(&self) -> usize {
        self.lock().by_key.len()
    }

    /// How many sessions have an epoch and no end that the state knows of: so many the state has at this replica,
    /// unless it has some that nobody holds.
    pub(crate) fn attached(&self) -> usize {
        self.lock().attached
    }

    /// How many sessions are live, or have ended without the state's knowing.
    pub(crate) fn unsettled(&self) -> usize {
        self.lock().unsettled
    }

    /// Changes whenever a session is settled or gone.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// How long ago something was heard from a device in a session that is live here.
    pub(crate) fn last_seen(&self, device_id: Id, epoch: u64) -> Option<Duration> {
        self.live(device_id, epoch).map(|entry| entry.silence())
    }
}
