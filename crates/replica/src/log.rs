//! The Raft log over an [`Engine`]: a tail in memory, and one task that does all durable writes.
//!
//! Group commit: the task drains its queue into one batch, writes it, syncs once, then answers in order.
//! Votes, truncations, purges and the pointer flips of the state machine go through the same queue, because
//! one write-ahead log in one order is what makes every crash a prefix: nothing that came later survives
//! without what came before. A failed write or sync is never retried: what the disk holds is then unknown, so
//! the process ends.
//!
//! Invariants: an entry is readable when `append` returns; the tail never drops an entry that the engine does
//! not have yet; the tail is a gapless suffix of the log; `committed` reaches the disk only after the entries
//! that it covers; what is read for replication or for applying begins with the entry that was asked for.

mod writer;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, ControlFlow, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::stream::{self, Stream};
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};
use palyra_platform as platform;
use palyra_storage::{Batch, Engine, Family};
use tokio::sync::{mpsc, oneshot, watch};

use self::writer::{Op, Writer};
use crate::codec;
use crate::meta::{self, OpenError};
use crate::size::LogSize;
use crate::types::{Entry, LogId, TypeConfig, Vote};

/// Bytes of entries in one reply to replication.
const READ_BYTES: usize = 1024 * 1024;
/// Entries read from the engine at a time when a whole range is asked for.
const STREAM_BYTES: usize = 4 * 1024 * 1024;
/// Bytes of entries kept in memory behind what is written.
const TAIL_BYTES: usize = 8 * 1024 * 1024;

/// The log; a cheap handle.
#[derive(Clone)]
pub(crate) struct LogStore {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Arc<dyn Engine>,
    mem: Mutex<Mem>,
    io: IoTask,
    written: watch::Receiver<u64>,
    /// Snapshots that were handed to Raft and are not installed yet; also touched when one was installed.
    installing: watch::Sender<u32>,
}

/// The queue of the IO task, and its thread. The last handle of the log waits for that thread, so that nothing uses the
/// engine any more once everybody let go: a process that exits while RocksDB closes on another thread is aborted.
struct IoTask {
    queue: Option<mpsc::UnboundedSender<Op>>,
    thread: Option<platform::IoHandle>,
}

impl Drop for IoTask {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

/// What is known without asking the engine.
struct Mem {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    /// Index of the oldest entry; meaningless while there is none.
    first: u64,
    last: Option<LogId>,
    tail: BTreeMap<u64, Held>,
    tail_bytes: usize,
    size: LogSize,
    next_seq: u64,
}

struct Held {
    entry: Entry,
    bytes: usize,
    seq: u64,
}

fn key(index: u64) -> Vec<u8> {
    index.to_be_bytes().to_vec()
}

fn missing(index: u64) -> io::Error {
    io::Error::other(format!("log entry {index} is missing"))
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!("{what}: {error}"))
}

impl LogStore {
    /// Loads what the engine holds and starts the IO task.
    pub(crate) fn open(engine: Arc<dyn Engine>) -> Result<LogStore, OpenError> {
        let purged = meta::load_purged(&*engine)?;
        let mut newest: Option<Bytes> = None;
        engine.scan_rev(Family::Log, &key(0), &[u8::MAX; 9], &mut |_, frame| {
            newest = Some(Bytes::copy_from_slice(frame));
            ControlFlow::Break(())
        })?;
        // Not from the very beginning: what was purged there may still be in the way.
        let kept = purged.map_or(0, |id| id.index + 1);
        let mut oldest = kept;
        engine.scan(Family::Log, &key(kept), &[u8::MAX; 9], &mut |found, _| {
            oldest = <[u8; 8]>::try_from(found).map_or(0, u64::from_be_bytes);
            ControlFlow::Break(())
        })?;
        if oldest != kept {
            let what = format!("log entry {kept} is missing, {oldest} is the oldest");
            return Err(OpenError::Damaged(what));
        }
        let newest = newest
            .map(|frame| codec::unseal_entry(&frame))
            .transpose()?
            .map(|entry| entry.log_id);
        let mem = Mem {
            vote: meta::load_vote(&*engine)?,
            committed: meta::load_committed(&*engine)?,
            purged,
            first: oldest,
            last: newest.max(purged),
            tail: BTreeMap::new(),
            tail_bytes: 0,
            size: LogSize::default(),
            next_seq: 1,
        };
        let (queue, ops) = mpsc::unbounded_channel();
        let (progress, written) = watch::channel(0);
        let writer = Writer::new(engine.clone(), progress);
        let io = platform::vital("the log's IO task", writer.run(ops));
        let io = IoTask {
            queue: Some(queue),
            thread: Some(platform::spawn_io("palyra-log", io)),
        };
        Ok(LogStore {
            inner: Arc::new(Inner {
                engine,
                mem: Mutex::new(mem),
                io,
                written,
                installing: watch::channel(0).0,
            }),
        })
    }

    fn mem(&self) -> MutexGuard<'_, Mem> {
        self.inner.mem.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, op: Op) -> io::Result<()> {
        let sent = self.inner.io.queue.as_ref().map(|queue| queue.send(op));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(io::Error::other("the log's IO task has ended")),
        }
    }

    /// Waits until the engine has the entry at `index` and all before it (written, not yet synced).
    ///
    /// The state machine waits here before it writes what an entry did: otherwise a power loss could keep an
    /// effect and lose its entry, because a leader applies on its followers' acknowledgements too.
    pub(crate) async fn wait_written(&self, index: u64) -> io::Result<()> {
        let seq = self.mem().tail.get(&index).map_or(0, |held| held.seq);
        let mut written = self.inner.written.clone();
        match written.wait_for(|at| *at >= seq).await {
            Ok(_) => Ok(()),
            Err(_) => Err(io::Error::other("the log's IO task has ended")),
        }
    }

    /// Writes a batch in order with the log and returns when it, and everything before it, is durable.
    pub(crate) async fn write_durably(&self, batch: Batch) -> io::Result<()> {
        let (done, answer) = oneshot::channel();
        self.send(Op::Durable { batch, done })?;
        answer
            .await
            .unwrap_or_else(|_| Err(io::Error::other("the log's IO task has ended")))
    }

    /// Returns when everything that was handed over before is durable.
    pub(crate) async fn flushed(&self) -> io::Result<()> {
        self.write_durably(Batch::new()).await
    }

    /// Makes a received snapshot the state: the flip, and the removal of the entries that it covers, in one durable
    /// batch. Were they two, a crash between them would leave a log with a hole before what came after the snapshot.
    pub(crate) async fn install(&self, mut flip: Batch, upto: Option<LogId>) -> io::Result<()> {
        let Some(upto) = upto else {
            return self.write_durably(flip).await;
        };
        let from = self.first_kept();
        if from <= upto.index {
            flip.delete_range(Family::Log, key(from), key(upto.index + 1));
            meta::put_purged(&mut flip, &upto);
        }
        self.write_durably(flip).await?;
        self.forget(upto);
        self.inner.installing.send_modify(|_| ());
        Ok(())
    }

    /// From now until the guard is dropped, a snapshot is being installed.
    pub(crate) fn installing(&self) -> Installing {
        self.inner.installing.send_modify(|count| *count += 1);
        Installing { log: self.clone() }
    }

    /// Waits until an entry at `first` continues the log, while a snapshot is being installed. openraft hands over
    /// entries behind it already; made durable first, a power loss would keep them and lose what they stand on.
    async fn wait_continues(&self, first: u64) {
        let mut installing = self.inner.installing.subscribe();
        loop {
            let end = self.mem().last.map_or(0, |id| id.index + 1);
            if first <= end || *installing.borrow_and_update() == 0 {
                return;
            }
            // The sender lives as long as `self`.
            let _ = installing.changed().await;
        }
    }

    /// Drops what is known of entries up to this one; returns the first index that was not purged before.
    fn forget(&self, upto: LogId) -> u64 {
        let mut mem = self.mem();
        let from = mem.purged.map_or(0, |id| id.index + 1);
        mem.purged = mem.purged.max(Some(upto));
        mem.first = mem.first.max(upto.index + 1);
        mem.last = mem.last.max(Some(upto));
        mem.size.purge(upto.index);
        Self::drop_tail(&mut mem, ..=upto.index);
        from
    }

    /// The index up to which the log must be purged to hold at most about `limit` bytes, when it holds more.
    pub(crate) fn excess(&self, limit: u64) -> Option<u64> {
        self.mem().size.excess(limit)
    }

    /// Ends the IO task after everything queued is durable.
    pub(crate) async fn stop(&self) {
        let (done, answer) = oneshot::channel();
        if self.send(Op::Stop(done)).is_ok() {
            // An IO task that ended before has nothing left to write.
            let _ = answer.await;
        }
    }

    /// Entries of `from..to` in order, at most `limit` bytes but at least one when there is one, and the one at `from`
    /// first; `None` when that one was purged. openraft takes what it gets for the beginning of what it asked for: a
    /// follower would append behind a hole, a state machine pass entries over in silence.
    fn read_from(&self, from: u64, to: u64, limit: usize) -> io::Result<Option<Vec<Entry>>> {
        if from < to.min(self.first_kept()) {
            return Ok(None);
        }
        let entries = self.read(from, to, limit)?;
        let hole = entries.first().is_some_and(|first| first.log_id.index != from);
        // Purged between the two looks.
        Ok((!hole).then_some(entries))
    }

    /// Index of the first entry that was not purged.
    fn first_kept(&self) -> u64 {
        self.mem().purged.map_or(0, |id| id.index + 1)
    }

    /// Entries of `from..to` in order without those that were purged, at most `limit` bytes but at least one when there
    /// is one.
    fn read(&self, from: u64, to: u64, limit: usize) -> io::Result<Vec<Entry>> {
        // What is purged or truncated between the look into memory and the one into the engine is missing there. From a
        // second look on memory knows it as well; what is missing then, is.
        self.look(from, to, limit).or_else(|_| self.look(from, to, limit))
    }

    fn look(&self, from: u64, to: u64, limit: usize) -> io::Result<Vec<Entry>> {
        let (from, to, held) = self.read_tail(from, to, limit);
        if from >= to {
            return Ok(held);
        }
        let mut entries = Vec::new();
        let mut bytes = 0;
        let mut broken = None;
        let scanned = self
            .inner
            .engine
            .scan(Family::Log, &key(from), &key(to), &mut |_, frame| {
                match codec::unseal_entry(&Bytes::copy_from_slice(frame)) {
                    Ok(entry) => entries.push(entry),
                    Err(error) => {
                        broken = Some(error);
                        return ControlFlow::Break(());
                    }
                }
                bytes += frame.len();
                if bytes >= limit {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
        scanned.map_err(|error| failed("the log cannot be read", &error))?;
        if let Some(error) = broken {
            return Err(failed("a log entry cannot be read", &error));
        }
        for (entry, expected) in entries.iter().zip(from..) {
            if entry.log_id.index != expected {
                return Err(missing(expected));
            }
        }
        if bytes < limit {
            let next = from + entries.len() as u64;
            if next != to {
                return Err(missing(next));
            }
            entries.extend(held);
        }
        Ok(entries)
    }

    /// The part of `from..to` that memory holds, and the part that must come from the engine.
    fn read_tail(&self, from: u64, to: u64, limit: usize) -> (u64, u64, Vec<Entry>) {
        let mem = self.mem();
        let from = from.max(mem.first);
        let to = to.min(mem.last.map_or(0, |id| id.index + 1));
        let tail_from = mem.tail.keys().next().copied().unwrap_or(to).min(to).max(from);
        if from >= to {
            return (from, from, Vec::new());
        }
        let mut entries = Vec::new();
        let mut bytes = 0;
        for held in mem.tail.range(tail_from..to).map(|(_, held)| held) {
            entries.push(held.entry.clone());
            bytes += held.bytes;
            if bytes >= limit {
                break;
            }
        }
        (from, tail_from, entries)
    }

    /// Puts entries into the tail; returns their sequence number and encodings.
    fn hold(&self, entries: impl IntoIterator<Item = Entry>) -> (u64, Vec<(u64, Vec<u8>)>) {
        let written = *self.inner.written.borrow();
        let mut mem = self.mem();
        let seq = mem.next_seq;
        mem.next_seq += 1;
        let mut encoded = Vec::new();
        for entry in entries {
            let frame = codec::seal_entry(&entry);
            let index = entry.log_id.index;
            if mem.last == mem.purged {
                mem.first = index;
            }
            mem.last = Some(entry.log_id);
            mem.tail_bytes += frame.len();
            mem.size.append(index, frame.len());
            mem.tail.insert(
                index,
                Held {
                    entry,
                    bytes: frame.len(),
                    seq,
                },
            );
            encoded.push((index, frame));
        }
        while mem.tail_bytes > TAIL_BYTES {
            let Some(first) = mem.tail.first_entry() else {
                break;
            };
            if first.get().seq > written {
                break;
            }
            let held = first.remove();
            mem.tail_bytes -= held.bytes;
        }
        (seq, encoded)
    }

    fn drop_tail(mem: &mut Mem, range: impl RangeBounds<u64>) {
        let gone: Vec<u64> = mem.tail.range(range).map(|(index, _)| *index).collect();
        for index in gone {
            if let Some(held) = mem.tail.remove(&index) {
                mem.tail_bytes -= held.bytes;
            }
        }
    }
}

/// A snapshot is being installed while this lives; see [`LogStore::installing`].
pub(crate) struct Installing {
    log: LogStore,
}

impl Drop for Installing {
    fn drop(&mut self) {
        self.log
            .inner
            .installing
            .send_modify(|count| *count = count.saturating_sub(1));
    }
}

/// Half-open bounds of a range of indexes.
fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let from = match range.start_bound() {
        Bound::Included(at) => *at,
        Bound::Excluded(at) => at.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let to = match range.end_bound() {
        Bound::Included(at) => at.saturating_add(1),
        Bound::Excluded(at) => *at,
        Bound::Unbounded => u64::MAX,
    };
    (from, to)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let (from, to) = bounds(&range);
        self.read(from, to, usize::MAX)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        // Asked for by the remains of a stream that has ended: openraft purges nothing that one in use still needs.
        // An error would cost the leader its life; of nothing it makes a heartbeat.
        Ok(self.read_from(start, end, READ_BYTES)?.unwrap_or_default())
    }

    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (from, to) = bounds(&range);
        let log = self.clone();
        let pages = stream::unfold(Some(from), move |next| {
            let page = next.and_then(|at| match log.read_from(at, to, STREAM_BYTES) {
                Ok(None) => Some((vec![Err(missing(at))], None)),
                Ok(Some(entries)) if entries.is_empty() => None,
                Ok(Some(entries)) => {
                    let next = entries.last().map(|entry| entry.log_id.index + 1);
                    Some((entries.into_iter().map(Ok).collect::<Vec<_>>(), next))
                }
                Err(error) => Some((vec![Err(error)], None)),
            });
            std::future::ready(page)
        });
        Box::pin(futures::StreamExt::flat_map(pages, stream::iter))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.mem().vote)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let mem = self.mem();
        Ok(LogState {
            last_purged_log_id: mem.purged,
            last_log_id: mem.last,
        })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (done, answer) = oneshot::channel();
        platform::io_point("vote.save").await;
        self.send(Op::Vote { vote: *vote, done })?;
        answer
            .await
            .unwrap_or_else(|_| Err(io::Error::other("the log's IO task has ended")))?;
        platform::io_point("vote.saved").await;
        self.mem().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.mem().committed = committed;
        match committed {
            Some(committed) => self.send(Op::Committed(committed)),
            None => Ok(()),
        }
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.mem().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut entries = entries.into_iter().peekable();
        if let Some(first) = entries.peek() {
            self.wait_continues(first.log_id.index).await;
        }
        let mut callback = callback;
        // Planted: entries are acknowledged before they are on their way to the disk.
        if palyra_fault::planted("ack-before-write") {
            std::mem::replace(&mut callback, IOFlushed::noop()).io_completed(Ok(()));
        }
        let (seq, entries) = self.hold(entries);
        self.send(Op::Append {
            seq,
            entries,
            done: callback,
        })
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        platform::io_point("log.truncate").await;
        let from = last.map_or(0, |id| id.index + 1);
        let to = {
            let mut mem = self.mem();
            let to = mem.last.map_or(0, |id| id.index + 1);
            Self::drop_tail(&mut mem, from..);
            if from < to {
                mem.last = last.max(mem.purged);
                mem.size.truncate(from);
            }
            to
        };
        if from < to {
            self.send(Op::Truncate { from, to })
        } else {
            Ok(())
        }
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        platform::io_point("log.purge").await;
        let from = self.forget(upto);
        if from > upto.index {
            return Ok(());
        }
        self.send(Op::Purge { from, upto })
    }
}

#[cfg(test)]
mod tests;
