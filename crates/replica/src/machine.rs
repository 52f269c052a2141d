//! The state machine as openraft drives it: apply, build and install snapshots.
//!
//! Apply writes state, position and membership of a chunk of entries in one batch, unsynced: the log replays
//! it. The log's write comes first, so what a crash leaves of the state is never ahead of the log. A snapshot
//! is a pinned view and costs nothing until it is sent; building one makes durable what it covers, since the
//! log is purged behind it. Installing writes under a generation of its own and flips one record; before the
//! flip the old state stands, after it the new one, and what is left of the other is removed at the next
//! start.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder, alias};
use palyra_platform as platform;
use palyra_state::Position;
use palyra_storage::{Batch, Engine, Family, Snapshot};
use tokio::sync::watch;

use crate::hot::Hot;
use crate::log::LogStore;
use crate::log_clock::LogClock;
use crate::meta::{self, Applied, OpenError};
use crate::types::{Answer, Decided, Entry, LogCommand, LogId, SnapshotMeta, StoredMembership, TypeConfig};
use crate::view::{Generation, Overlay, disk_key};

/// Entries applied in one batch.
const CHUNK_ENTRIES: usize = 1_000;
/// Bytes of commands applied in one batch.
const CHUNK_BYTES: usize = 1024 * 1024;

type Responder = openraft::storage::ApplyResponder<TypeConfig>;

/// The state machine; a cheap handle.
#[derive(Clone)]
pub(crate) struct Machine {
    shared: Arc<Shared>,
}

struct Shared {
    engine: Arc<dyn Engine>,
    log: LogStore,
    applied: Mutex<Applied>,
    /// What apply has in memory; taken while it works.
    hot: Mutex<Hot>,
    index: watch::Sender<u64>,
    next_generation: AtomicU32,
    has_snapshot: AtomicBool,
    clock: Arc<LogClock>,
}

/// What a snapshot is on this replica.
pub(crate) enum SnapshotData {
    /// The state at one position, to be sent.
    Pinned(Arc<dyn Snapshot>, u32),
    /// A state that was received under a generation of its own.
    Received(u32),
}

impl Machine {
    /// Takes up the state that the engine holds and removes what an interrupted installation left.
    pub(crate) fn open(engine: Arc<dyn Engine>, log: LogStore) -> Result<Machine, OpenError> {
        let applied = meta::load_applied(&*engine)?;
        sweep(&*engine, applied.generation)?;
        // What was applied but not synced may be offered as a snapshot from now on: it must not be lost any
        // more.
        engine.sync()?;
        let (index, _) = watch::channel(applied.last.map_or(0, |id| id.index));
        let shared = Shared {
            has_snapshot: AtomicBool::new(meta::has_snapshot(&*engine)?),
            next_generation: AtomicU32::new(applied.generation + 1),
            applied: Mutex::new(applied),
            hot: Mutex::default(),
            engine,
            log,
            index,
            clock: Arc::default(),
        };
        let machine = Machine {
            shared: Arc::new(shared),
        };
        machine.note_clock();
        Ok(machine)
    }

    /// The index of the last applied entry; what it wrote is visible when the number changes.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.shared.index.subscribe()
    }

    pub(crate) fn engine(&self) -> &Arc<dyn Engine> {
        &self.shared.engine
    }

    /// The log's time.
    pub(crate) fn clock(&self) -> &Arc<LogClock> {
        &self.shared.clock
    }

    /// See [`crate::Replica::log_ms`].
    pub(crate) fn log_ms(&self) -> u64 {
        self.shared.clock.now(platform::wall_ms(), platform::boot_ms())
    }

    /// The state has become another: its clock may be further.
    fn note_clock(&self) {
        let state = Generation {
            source: &*self.shared.engine,
            number: self.generation(),
        };
        let clock = palyra_state::clock(&state);
        self.shared.clock.applied(clock, platform::boot_ms());
    }

    fn applied(&self) -> MutexGuard<'_, Applied> {
        self.shared.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hot(&self) -> MutexGuard<'_, Hot> {
        self.shared.hot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, batch: Batch, what: &str) {
        if let Err(error) = self.shared.engine.write(batch) {
            platform::abort(&format!("{what} cannot be written: {error}"));
        }
    }

    async fn apply_chunk(&self, chunk: Vec<(Entry, Option<Responder>)>) -> io::Result<()> {
        let Some(last) = chunk.last().map(|(entry, _)| entry.log_id) else {
            return Ok(());
        };
        self.shared.log.wait_written(last.index).await?;
        platform::io_point("apply.write").await;
        let mut applied = self.applied().clone();
        let base = Generation {
            source: &*self.shared.engine,
            number: applied.generation,
        };
        let mut overlay = Overlay::new(base, std::mem::take(&mut *self.hot()));
        let mut answers = Vec::with_capacity(chunk.len());
        for (entry, responder) in chunk {
            let answer = apply_entry(&mut overlay, &mut applied, entry);
            answers.push((responder, answer));
        }
        let clock = palyra_state::clock(&overlay);
        let mut batch = Batch::new();
        let (writes, hot) = overlay.into_writes();
        for (key, value) in writes {
            let key = disk_key(applied.generation, &key);
            match value {
                Some(value) => batch.put(Family::State, key, value),
                None => batch.delete(Family::State, key),
            };
        }
        // Planted: what entries did and that they did it are two writes.
        if palyra_fault::planted("apply-in-two-writes") {
            self.write(std::mem::take(&mut batch), "the state");
            platform::io_point("apply.write").await;
        }
        meta::put_applied(&mut batch, &applied);
        self.write(batch, "the state");
        *self.hot() = hot;
        *self.applied() = applied;
        self.shared.clock.applied(clock, platform::boot_ms());
        self.shared.index.send_replace(last.index);
        platform::io_point("apply.answer").await;
        for (responder, answer) in answers {
            if let Some(responder) = responder {
                responder.send(answer);
            }
        }
        Ok(())
    }

    /// The generation that the state lies under.
    pub(crate) fn generation(&self) -> u32 {
        self.applied().generation
    }

    /// A generation that nothing lies under.
    pub(crate) fn new_generation(&self) -> u32 {
        self.shared.next_generation.fetch_add(1, Ordering::Relaxed)
    }

    /// Writes a part of a snapshot that is being received.
    pub(crate) fn receive<K: AsRef<[u8]>>(
        &self,
        generation: u32,
        pairs: impl Iterator<Item = (K, bytes::Bytes)>,
    ) {
        let mut batch = Batch::new();
        for (key, value) in pairs {
            batch.put(Family::State, disk_key(generation, key.as_ref()), value);
        }
        self.write(batch, "a snapshot");
    }

    /// Removes a generation that is not the active one.
    pub(crate) fn discard(&self, generation: u32) {
        let mut batch = Batch::new();
        batch.delete_range(
            Family::State,
            disk_key(generation, &[]),
            disk_key(generation + 1, &[]),
        );
        self.write(batch, "the removal of a snapshot");
    }

    /// A copy of a pinned state under a new generation.
    fn copy(&self, source: &dyn Snapshot, from: u32) -> io::Result<u32> {
        let to = self.new_generation();
        let mut batch = Batch::new();
        let (first, end) = (disk_key(from, &[]), disk_key(from + 1, &[]));
        source
            .scan(Family::State, &first, &end, &mut |key, value| {
                batch.put(Family::State, disk_key(to, &key[4..]), value.to_vec());
                std::ops::ControlFlow::Continue(())
            })
            .map_err(io::Error::other)?;
        self.write(batch, "a snapshot");
        Ok(to)
    }

    fn pin(&self) -> io::Result<(Arc<dyn Snapshot>, Applied)> {
        let pinned = self.shared.engine.snapshot().map_err(io::Error::other)?;
        let applied = meta::pinned_applied(&pinned).map_err(io::Error::other)?;
        Ok((pinned, applied))
    }
}

/// Applies one entry on top of what the overlay holds.
fn apply_entry(overlay: &mut Overlay<'_>, applied: &mut Applied, entry: Entry) -> Answer {
    let index = entry.log_id.index;
    if let Some(last) = applied.last
        && index <= last.index
    {
        // Applied twice, this state would differ from the others' for ever. (That none is left out, the log sees to:
        // it is asked for the one after the last.)
        platform::abort(&format!(
            "log entry {index} came to be applied after {}",
            last.index
        ));
    }
    let answer = match entry.payload {
        EntryPayload::Blank => Answer::default(),
        EntryPayload::Membership(members) => {
            applied.membership = StoredMembership::new(Some(entry.log_id), members);
            Answer::default()
        }
        EntryPayload::Normal(command) => apply_command(overlay, entry.log_id, &command),
    };
    applied.last = Some(entry.log_id);
    answer
}

fn apply_command(overlay: &mut Overlay<'_>, id: LogId, command: &LogCommand) -> Answer {
    let envelope = match palyra_state::decode(&command.bytes) {
        Ok(envelope) => envelope,
        // The others may understand it: skipping it would make this replica differ from them for ever.
        Err(error) => platform::abort(&format!(
            "log entry {} cannot be understood: {error}; start a palyrad that is as new as the others",
            id.index
        )),
    };
    let position = Position {
        term: id.leader_id.term,
        index: id.index,
    };
    // Planted: each replica applies by its own clock.
    let by_own_clock = palyra_fault::planted("apply-by-own-clock");
    let at_ms = if by_own_clock {
        platform::wall_ms()
    } else {
        command.at_ms
    };
    let result = palyra_state::apply(overlay, position, at_ms, &envelope, &command.bytes);
    overlay.absorb(result.writes);
    Answer(Some(Decided {
        reply: result.reply,
        duplicate: result.duplicate,
    }))
}

/// Removes generations other than the active one.
fn sweep(engine: &dyn Engine, active: u32) -> Result<(), OpenError> {
    let ranges = [
        (disk_key(0, &[]), disk_key(active, &[])),
        (disk_key(active + 1, &[]), vec![u8::MAX; 5]),
    ];
    let mut batch = Batch::new();
    for (from, to) in ranges {
        let mut found = false;
        engine.scan(Family::State, &from, &to, &mut |_, _| {
            found = true;
            std::ops::ControlFlow::Break(())
        })?;
        if found {
            batch.delete_range(Family::State, from, to);
        }
    }
    if !batch.is_empty() {
        engine.write(batch)?;
    }
    Ok(())
}

impl RaftSnapshotBuilder<TypeConfig> for Machine {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<alias::SnapshotOf<TypeConfig, SnapshotData>, io::Error> {
        let (pinned, applied) = self.pin()?;
        let mut batch = Batch::new();
        meta::put_snapshot(&mut batch, applied.last.as_ref());
        platform::io_point("snapshot.build").await;
        self.shared.log.write_durably(batch).await?;
        self.shared.has_snapshot.store(true, Ordering::Release);
        Ok(snapshot_of(pinned, applied))
    }
}

fn snapshot_of(pinned: Arc<dyn Snapshot>, applied: Applied) -> alias::SnapshotOf<TypeConfig, SnapshotData> {
    openraft::Snapshot {
        meta: SnapshotMeta {
            last_log_id: applied.last,
            last_membership: applied.membership,
        },
        snapshot: SnapshotData::Pinned(pinned, applied.generation),
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Machine;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let applied = self.applied();
        Ok((applied.last, applied.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut chunk = Vec::new();
        let mut bytes = 0;
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            if let EntryPayload::Normal(command) = &entry.payload {
                bytes += command.bytes.len();
            }
            chunk.push((entry, responder));
            if chunk.len() >= CHUNK_ENTRIES || bytes >= CHUNK_BYTES {
                self.apply_chunk(std::mem::take(&mut chunk)).await?;
                bytes = 0;
            }
        }
        self.apply_chunk(chunk).await
    }

    async fn get_snapshot_builder(&mut self) -> Machine {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, data: SnapshotData) -> Result<(), io::Error> {
        let generation = match data {
            SnapshotData::Received(generation) => generation,
            SnapshotData::Pinned(source, from) => self.copy(&*source, from)?,
        };
        let applied = Applied {
            last: meta.last_log_id,
            membership: meta.last_membership.clone(),
            generation,
        };
        let mut batch = Batch::new();
        meta::put_applied(&mut batch, &applied);
        meta::put_snapshot(&mut batch, meta.last_log_id.as_ref());
        // Planted: the log goes first, and the state follows in a write of its own.
        if palyra_fault::planted("install-in-two-writes") {
            self.shared.log.install(Batch::new(), meta.last_log_id).await?;
        }
        platform::io_point("snapshot.flip").await;
        self.shared.log.install(batch, meta.last_log_id).await?;
        platform::io_point("snapshot.flipped").await;
        let old = std::mem::replace(&mut *self.applied(), applied);
        self.note_clock();
        self.shared.has_snapshot.store(true, Ordering::Release);
        self.shared
            .index
            .send_replace(meta.last_log_id.map_or(0, |id| id.index));
        self.discard(old.generation);
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<alias::SnapshotOf<TypeConfig, SnapshotData>>, io::Error> {
        // The present state is a newer snapshot than the one that was recorded, and as good.
        if !self.shared.has_snapshot.load(Ordering::Acquire) {
            return Ok(None);
        }
        let (pinned, applied) = self.pin()?;
        Ok(Some(snapshot_of(pinned, applied)))
    }
}
