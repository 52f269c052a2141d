//! The simulated world behind `palyra-platform`: which task belongs to which replica, what its clocks show,
//! and where an `io_point` delays or crashes it.
//!
//! Invariant: everything here is decided by the seed, in the order in which the one thread asks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use palyra_platform::{Hooks, Instant, IoVerdict};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::breaks::Break;
use crate::chance::{self, Stream};
use crate::faults::Kind;
use crate::raft::Raft;
use crate::reach::Reached;
use crate::setup::Setup;

/// Unix time at which every simulation begins, in milliseconds: 2026-01-01.
pub(crate) const EPOCH_MS: u64 = 1_767_225_600_000;

/// One process of a replica, from its start to its end: the tag of all its tasks. A replica that starts again
/// is another life, so that nothing that an earlier one left behind can speak for it, or end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Life(u64);

/// Lives are numbered in steps of this; what is below it is the replica's id.
const LIFE_STEP: u64 = 16;

impl Life {
    /// The `number`th life of all, of this replica.
    pub(crate) fn of(replica: u64, number: u64) -> Life {
        Life(number * LIFE_STEP + replica)
    }

    /// The replica whose life it is.
    pub(crate) fn replica(self) -> u64 {
        self.0 % LIFE_STEP
    }

    /// As the tag of tasks.
    pub(crate) fn tag(self) -> u64 {
        self.0
    }
}

/// A replica that died by itself, and why.
#[derive(Clone, Debug)]
pub(crate) struct Death {
    /// The life that ended.
    pub(crate) life: Life,
    pub(crate) reason: String,
    /// An injected crash; any other death is a finding.
    pub(crate) injected: bool,
}

/// When a replica is to crash.
#[derive(Clone, Copy, Debug)]
struct Fuse {
    /// At the how manieth io point from now.
    left: u64,
    /// Only points of this name count; any when there is none.
    at: Option<&'static str>,
}

#[derive(Default)]
struct Inner {
    /// The living, with their tasks.
    tasks: BTreeMap<Life, Vec<AbortHandle>>,
    lives: u64,
    skew_ms: BTreeMap<u64, i64>,
    fuses: BTreeMap<u64, Fuse>,
    /// Who first writes that the members change dies soon after.
    change_kills: bool,
    stall_ms: BTreeMap<u64, u64>,
    /// Lives that an injected crash is about to end.
    crashing: BTreeSet<Life>,
    deaths: Vec<Death>,
    panics: Vec<String>,
    trace: bool,
    digest: u64,
    reached: Reached,
    /// Virtual milliseconds that a sync may take at most.
    sync_ms: u64,
    /// Parts in a thousand by which a replica's clocks go too fast.
    drift: BTreeMap<u64, i64>,
    points: Points,
    /// Strikes so far.
    strikes: u64,
}

/// Named places that do something of their own now and then. Each is on in a quarter of the seeds.
#[derive(Default)]
struct Points {
    seed: Option<u64>,
    on: BTreeMap<&'static str, bool>,
    crashes: u64,
}

/// What a passage of a named place comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passage {
    Straight,
    Yields,
    Waits(u64),
    Dies,
}

/// Of a hundred passages of a place that is on, so many do something.
const POINT_PERCENT: u64 = 5;
/// Most deaths that they cause in a run: busy places are passed thousands of times.
const POINT_DEATHS: u64 = 4;

impl Points {
    fn pass(&mut self, name: &'static str) -> Passage {
        let Some(seed) = self.seed else {
            return Passage::Straight;
        };
        let on = *self
            .on
            .entry(name)
            .or_insert_with(|| Stream::new(seed, name).percent(25));
        if !on || !chance::percent(POINT_PERCENT) {
            return Passage::Straight;
        }
        match chance::below(20) {
            0 if self.crashes < POINT_DEATHS => {
                self.crashes += 1;
                Passage::Dies
            }
            0..=11 => Passage::Yields,
            _ => Passage::Waits(chance::between(1, 40)),
        }
    }
}

impl Inner {
    /// What happens to this life at this place.
    fn pass(&mut self, life: Life, name: &'static str) -> Passage {
        if !self.tasks.contains_key(&life) {
            return Passage::Straight;
        }
        let replica = life.replica();
        let mut dies = false;
        if let Some(fuse) = self.fuses.get_mut(&replica)
            && fuse.at.is_none_or(|at| at == name)
        {
            fuse.left = fuse.left.saturating_sub(1);
            dies = fuse.left == 0;
        }
        let passage = if dies {
            self.fuses.remove(&replica);
            Passage::Dies
        } else {
            self.points.pass(name)
        };
        if passage == Passage::Dies {
            self.crashing.insert(life);
            self.reached.note(&format!("crash-at-{name}"));
            return passage;
        }
        if passage != Passage::Straight {
            self.reached.note("point-struck");
            return passage;
        }
        // Only what waits for the disk takes time: an apply that slept would reorder nothing and slow everything.
        if !name.starts_with("log.s") && !name.starts_with("log.w") {
            return Passage::Straight;
        }
        match self.stall_ms.remove(&replica) {
            Some(stall) => {
                self.reached.note("disk-stalled");
                Passage::Waits(stall)
            }
            None if name == "log.sync" => match chance::below(self.sync_ms + 1) {
                0 => Passage::Straight,
                delay => Passage::Waits(delay),
            },
            None => Passage::Straight,
        }
    }
}

/// Whether a failure is that of a disk that the run itself broke: the twin of the engine names its injected
/// errors, and no other disk is there to be full.
pub(crate) fn by_broken_disk(reason: &str) -> bool {
    reason.contains("injected") || reason.contains("no space is left")
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What is lost when a time is scaled there and back.
const ROUNDING: Duration = Duration::from_nanos(1);

fn scaled(time: Duration, by: u64, of: u64) -> Duration {
    let nanos = time.as_nanos() * u128::from(by) / u128::from(of);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// What a clock that is `parts` in a thousand too fast shows of a time. Most are right.
fn local_of(time: Duration, parts: i64) -> Duration {
    if parts == 0 {
        return time;
    }
    scaled(time, 1_000_u64.saturating_add_signed(parts), 1_000)
}

/// The time after which such a clock shows `local`. Never too early: who wakes up before its moment goes to sleep
/// again, at once and for ever.
fn true_of(local: Duration, parts: i64) -> Duration {
    if parts == 0 {
        return local;
    }
    scaled(local, 1_000, 1_000_u64.saturating_add_signed(parts)) + ROUNDING
}

/// Mixes bytes into a digest, eight at a time. Enough to tell two runs apart, no more.
fn mixed(digest: u64, bytes: &[u8]) -> u64 {
    let one = |digest: u64, word: u64| {
        (digest ^ word)
            .wrapping_mul(0x0000_0100_0000_01b3)
            .rotate_left(23)
    };
    let (words, rest) = bytes.as_chunks::<8>();
    let digest = words.iter().fold(digest ^ bytes.len() as u64, |digest, word| {
        one(digest, u64::from_be_bytes(*word))
    });
    if rest.is_empty() {
        return digest;
    }
    one(
        digest,
        rest.iter().fold(0, |word, byte| (word << 8) | u64::from(*byte)),
    )
}

/// The one world of this process.
pub(crate) struct World {
    inner: Mutex<Inner>,
    start: tokio::time::Instant,
    died: Notify,
    broken: Option<Break>,
    raft: Mutex<Raft>,
}

impl World {
    /// A world that begins now, on a paused runtime.
    pub(crate) fn new(trace: bool, broken: Option<Break>, setup: &Setup) -> Self {
        let mut inner = Inner {
            trace,
            sync_ms: setup.sync_ms,
            drift: setup.drift.clone(),
            digest: 0xcbf2_9ce4_8422_2325,
            ..Inner::default()
        };
        if inner.drift.values().any(|parts| *parts != 0) {
            inner.reached.note("clock-drifted");
        }
        World {
            inner: Mutex::new(inner),
            start: tokio::time::Instant::now(),
            died: Notify::new(),
            broken,
            raft: Mutex::default(),
        }
    }

    /// Who watches what replicas write.
    pub(crate) fn raft(&self) -> MutexGuard<'_, Raft> {
        self.raft.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is broken on purpose.
    pub(crate) fn broken(&self) -> Option<Break> {
        self.broken
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // One thread; a poisoned lock only means that a replica's task ended inside of it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Virtual milliseconds since the beginning.
    pub(crate) fn elapsed_ms(&self) -> u64 {
        ms(self.start.elapsed())
    }

    /// Virtual nanoseconds since the beginning.
    pub(crate) fn elapsed_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Notes what happened: into the digest that two runs of one seed must share, and to standard output when
    /// a trace is wanted.
    pub(crate) fn note(&self, event: &str) {
        let at = self.elapsed_ms();
        let mut inner = self.inner();
        inner.digest = mixed(mixed(inner.digest, event.as_bytes()), &at.to_le_bytes());
        if inner.trace {
            println!("{at:>8} ms  {event}");
        }
    }

    /// Takes bytes into the digest that are too many for the trace: messages and what is written to disks.
    pub(crate) fn absorb(&self, bytes: &[u8]) {
        let at = self.elapsed_ms();
        let mut inner = self.inner();
        inner.digest = mixed(mixed(inner.digest, bytes), &at.to_le_bytes());
    }

    /// Counts that this was reached; see [`crate::reach`].
    pub(crate) fn reach(&self, name: &str) {
        self.inner().reached.note(name);
    }

    /// What was reached so far.
    pub(crate) fn reached(&self) -> Reached {
        self.inner().reached.clone()
    }

    /// Digest of all notes so far.
    pub(crate) fn digest(&self) -> u64 {
        self.inner().digest
    }

    /// From now on named places do something of their own; which, is drawn from this seed.
    pub(crate) fn arm_points(&self, seed: Option<u64>) {
        self.inner().points.seed = seed;
    }

    /// A fault of the plan strikes.
    pub(crate) fn struck(&self, kind: Kind) {
        let mut inner = self.inner();
        inner.strikes += 1;
        inner.reached.note(&format!("struck-{}", kind.name()));
    }

    /// Strikes of the plan so far.
    pub(crate) fn strikes(&self) -> u64 {
        self.inner().strikes
    }

    /// By how many parts in a thousand the clocks of replicas are wrong, at most.
    pub(crate) fn worst_drift(&self) -> u64 {
        let inner = self.inner();
        inner
            .drift
            .values()
            .map(|parts| parts.unsigned_abs())
            .max()
            .unwrap_or(0)
    }

    /// A time that has passed, as this replica's clocks measure it.
    fn drifted(&self, replica: u64, time: Duration) -> Duration {
        local_of(time, self.inner().drift.get(&replica).copied().unwrap_or(0))
    }

    /// Moves a replica's wall clock by this much from now on.
    pub(crate) fn skew(&self, replica: u64, ms: i64) {
        self.inner().skew_ms.insert(replica, ms);
    }

    /// Whether any replica's wall clock was ever wrong, or ran at another speed.
    pub(crate) fn clocks_were_wrong(&self) -> bool {
        let jumped = !self.inner().skew_ms.is_empty();
        jumped || self.worst_drift() > 0
    }

    /// Lets a replica crash at its `left`th io point from now, of those named `at` if that is given.
    pub(crate) fn crash_at_io_point(&self, replica: u64, left: u64, at: Option<&'static str>) {
        self.note(&format!(
            "r{replica} will crash at io point {left} {}",
            at.unwrap_or("of any name")
        ));
        self.inner().fuses.insert(replica, Fuse { left, at });
    }

    /// Lets the next replica that writes a change of the members die before it can write its end, mostly.
    pub(crate) fn kill_in_change(&self) {
        self.inner().change_kills = true;
    }

    /// A replica has written that the members change.
    pub(crate) fn change_begun(&self, replica: u64) {
        if std::mem::take(&mut self.inner().change_kills) {
            self.reach("change-cut-short");
            self.crash_at_io_point(replica, chance::between(1, 6), None);
        }
    }

    /// Lets the next sync of a replica take this many milliseconds.
    pub(crate) fn stall_disk(&self, replica: u64, ms: u64) {
        self.note(&format!("disk of r{replica} stalls for {ms} ms"));
        self.inner().stall_ms.insert(replica, ms);
    }

    /// No more crashes and stalls.
    pub(crate) fn steady(&self) {
        let mut inner = self.inner();
        inner.fuses.clear();
        inner.change_kills = false;
        inner.stall_ms.clear();
        inner.points.seed = None;
    }

    /// A new life of a replica that is dead.
    pub(crate) fn begin(&self, replica: u64) -> Life {
        let mut inner = self.inner();
        inner.lives += 1;
        let life = Life::of(replica, inner.lives);
        inner.tasks.insert(life, Vec::new());
        life
    }

    /// Whether this life has not ended yet.
    pub(crate) fn lives(&self, life: Life) -> bool {
        self.inner().tasks.contains_key(&life)
    }

    /// Ends every task of a life at its await point, as SIGKILL would.
    pub(crate) fn kill(&self, life: Life) {
        let tasks = {
            let mut inner = self.inner();
            inner.fuses.remove(&life.replica());
            inner.tasks.remove(&life).unwrap_or_default()
        };
        for task in tasks {
            task.abort();
        }
    }

    /// Waits until a replica has died by itself since the last call.
    pub(crate) async fn died(&self) {
        self.died.notified().await;
    }

    /// Deaths since the last call.
    pub(crate) fn take_deaths(&self) -> Vec<Death> {
        std::mem::take(&mut self.inner().deaths)
    }

    /// A panic anywhere is a finding.
    pub(crate) fn panicked(&self, what: String) {
        self.inner().panics.push(what);
    }

    /// Panics so far.
    pub(crate) fn panics(&self) -> Vec<String> {
        self.inner().panics.clone()
    }
}

impl Hooks for World {
    fn on_spawn(&self, tag: Option<u64>, _name: &str, task: AbortHandle) {
        let Some(life) = tag.map(Life) else { return };
        let mut inner = self.inner();
        let Some(tasks) = inner.tasks.get_mut(&life) else {
            drop(inner);
            // Spawned by what the end of a task runs, or for a caller who has not noticed: the dead do
            // nothing.
            return task.abort();
        };
        if tasks.len() % 256 == 255 {
            tasks.retain(|task| !task.is_finished());
        }
        tasks.push(task);
    }

    fn wall_ms(&self, tag: Option<u64>) -> u64 {
        let replica = tag.map_or(0, |t| Life(t).replica());
        let skew = self.inner().skew_ms.get(&replica).copied().unwrap_or(0);
        let local = self.drifted(replica, self.start.elapsed());
        (EPOCH_MS + ms(local)).saturating_add_signed(skew)
    }

    fn boot_ms(&self, tag: Option<u64>) -> u64 {
        // Each machine counts from its own boot: whoever compares the clocks of two finds them hours apart.
        let machine = tag.map_or(0, |t| Life(t).replica());
        (1 + machine * 7) * 3_600_000 + ms(self.drifted(machine, self.start.elapsed()))
    }

    fn to_local(&self, tag: Option<u64>, time: Instant) -> Instant {
        let replica = tag.map_or(0, |t| Life(t).replica());
        self.start + self.drifted(replica, time.saturating_duration_since(self.start))
    }

    fn to_true(&self, tag: Option<u64>, time: Instant) -> Instant {
        let replica = tag.map_or(0, |t| Life(t).replica());
        let parts = self.inner().drift.get(&replica).copied().unwrap_or(0);
        self.start + true_of(time.saturating_duration_since(self.start), parts)
    }

    fn fill_random(&self, _tag: Option<u64>, buf: &mut [u8]) {
        chance::fill(buf);
    }

    fn io_point(&self, tag: Option<u64>, name: &'static str) -> Option<BoxFuture<'static, IoVerdict>> {
        let life = Life(tag?);
        let mut inner = self.inner();
        if name == "snapshot.flipped" {
            inner.reached.note("snapshot-installed");
        }
        let passage = inner.pass(life, name);
        drop(inner);
        if passage == Passage::Straight {
            return None;
        }
        Some(Box::pin(async move {
            match passage {
                Passage::Straight => {}
                Passage::Yields => tokio::task::yield_now().await,
                Passage::Waits(delay) => tokio::time::sleep(Duration::from_millis(delay)).await,
                Passage::Dies => return IoVerdict::Crash,
            }
            IoVerdict::Continue
        }))
    }

    fn abort(&self, tag: Option<u64>, reason: &str) {
        let Some(life) = tag.map(Life) else {
            self.panicked(format!("abort outside of any replica: {reason}"));
            return;
        };
        if !self.lives(life) {
            return;
        }
        let crashed = self.inner().crashing.contains(&life);
        let injected = crashed || by_broken_disk(reason);
        self.note(&format!("r{} ends itself: {reason}", life.replica()));
        if injected && !crashed {
            self.reach("disk-failed");
        }
        self.inner().deaths.push(Death {
            life,
            reason: reason.to_owned(),
            injected,
        });
        self.kill(life);
        self.died.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sleeps_by_a_clock_that_is_wrong_never_wakes_before_its_moment() {
        let mut draw = Stream::new(1, "clocks");
        for _ in 0..100_000 {
            let local = Duration::from_nanos(draw.below(100_000_000_000));
            for parts in [-50, -7, -1, 0, 1, 3, 50] {
                let woken = local_of(true_of(local, parts), parts);
                assert!(woken >= local, "{local:?} by {parts}");
                assert!(woken <= local + 2 * ROUNDING, "{local:?} by {parts}");
            }
        }
    }
}
