//! The log's IO task: drains the queue into one batch, writes, syncs once, answers in order.
//!
//! Everything durable of a replica passes here, so what a crash leaves is a prefix of this queue. Nothing is
//! retried: after a failed write or sync nobody knows what the disk holds, so whoever waits is told, and the
//! process ends.

use std::io;
use std::sync::Arc;

use openraft::storage::IOFlushed;
use palyra_platform as platform;
use palyra_storage::{Batch, Engine, Family};
use tokio::sync::{mpsc, oneshot, watch};

use super::key;
use crate::meta;
use crate::types::{LogId, TypeConfig, Vote};

/// Bytes after which the queue is not drained further into one batch.
const BATCH_BYTES: usize = 8 * 1024 * 1024;

/// One unit of the IO task's queue.
pub(super) enum Op {
    Append {
        seq: u64,
        entries: Vec<(u64, Vec<u8>)>,
        done: IOFlushed<TypeConfig>,
    },
    Vote {
        vote: Vote,
        done: oneshot::Sender<io::Result<()>>,
    },
    Committed(LogId),
    Truncate {
        from: u64,
        to: u64,
    },
    Purge {
        from: u64,
        upto: LogId,
    },
    Durable {
        batch: Batch,
        done: oneshot::Sender<io::Result<()>>,
    },
    Stop(oneshot::Sender<()>),
}

/// The IO task's side.
pub(super) struct Writer {
    engine: Arc<dyn Engine>,
    written: watch::Sender<u64>,
    /// Waits for the next batch: alone it is worth no write.
    committed: Option<LogId>,
    /// Purged ranges whose space can be given back once the purge is synced.
    purged: Vec<(u64, u64)>,
}

/// What one turn of the IO task writes, and who waits for it.
#[derive(Default)]
struct Turn {
    /// Written in order; more than one only when one would be larger than an engine takes.
    batches: Vec<Batch>,
    appends: Vec<IOFlushed<TypeConfig>>,
    others: Vec<oneshot::Sender<io::Result<()>>>,
    stop: Option<oneshot::Sender<()>>,
    seq: u64,
    sync: bool,
    bytes: usize,
}

impl Turn {
    fn batch(&mut self) -> &mut Batch {
        if self
            .batches
            .last()
            .is_none_or(|batch| batch.bytes() >= BATCH_BYTES)
        {
            self.batches.push(Batch::new());
        }
        let at = self.batches.len() - 1;
        &mut self.batches[at]
    }

    fn answer(self, result: Result<(), &str>) -> bool {
        let result = || result.map_err(|reason| io::Error::other(reason.to_owned()));
        for done in self.appends {
            done.io_completed(result());
        }
        for done in self.others {
            // Whoever asked may have been dropped; the write stands all the same.
            let _ = done.send(result());
        }
        self.stop.is_some_and(|done| {
            let _ = done.send(());
            true
        })
    }
}

impl Writer {
    pub(super) fn new(engine: Arc<dyn Engine>, written: watch::Sender<u64>) -> Writer {
        Writer {
            engine,
            written,
            committed: None,
            purged: Vec::new(),
        }
    }

    pub(super) async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Op>) {
        while let Some(first) = queue.recv().await {
            let mut turn = Turn::default();
            self.add(first, &mut turn);
            while turn.bytes < BATCH_BYTES && turn.stop.is_none() {
                let Ok(op) = queue.try_recv() else { break };
                self.add(op, &mut turn);
            }
            if turn.sync
                && let Some(committed) = self.committed.take()
            {
                meta::put_committed(turn.batch(), &committed);
            }
            if let Err(reason) = self.write(&mut turn).await {
                turn.answer(Err(&reason));
                platform::abort(&reason);
            }
            if turn.answer(Ok(())) {
                return;
            }
        }
    }

    fn add(&mut self, op: Op, turn: &mut Turn) {
        match op {
            Op::Append { seq, entries, done } => {
                for (index, frame) in entries {
                    turn.bytes += frame.len();
                    turn.batch().put(Family::Log, key(index), frame);
                }
                turn.seq = seq;
                turn.sync = true;
                turn.appends.push(done);
            }
            Op::Vote { vote, done } => {
                // Planted: the vote is never written.
                if !palyra_fault::planted("vote-not-saved") {
                    meta::put_vote(turn.batch(), &vote);
                }
                turn.sync = true;
                turn.others.push(done);
            }
            Op::Committed(committed) => self.committed = Some(committed),
            Op::Truncate { from, to } => {
                // Planted: entries that a new leader overrules stay on the disk.
                if !palyra_fault::planted("truncation-not-saved") {
                    turn.batch().delete_range(Family::Log, key(from), key(to));
                }
            }
            Op::Purge { from, upto } => {
                let batch = turn.batch();
                batch.delete_range(Family::Log, key(from), key(upto.index + 1));
                meta::put_purged(batch, &upto);
                self.purged.push((from, upto.index + 1));
            }
            Op::Durable { batch, done } => {
                turn.batch().append(batch);
                turn.sync = true;
                turn.others.push(done);
            }
            Op::Stop(done) => {
                turn.sync = true;
                turn.stop = Some(done);
            }
        }
    }

    async fn write(&mut self, turn: &mut Turn) -> Result<(), String> {
        for batch in std::mem::take(&mut turn.batches) {
            platform::io_point("log.write").await;
            self.engine
                .write(batch)
                .map_err(|error| format!("the log cannot be written: {error}"))?;
        }
        if turn.seq > 0 {
            self.written.send_replace(turn.seq);
        }
        // Planted: entries are told to be durable before they are.
        let lies =
            palyra_fault::planted("flush-before-sync") && turn.others.is_empty() && turn.stop.is_none();
        if turn.sync && !lies {
            platform::io_point("log.sync").await;
            self.engine
                .sync()
                .map_err(|error| format!("the log cannot be synced: {error}"))?;
            platform::io_point("log.synced").await;
            for (from, to) in std::mem::take(&mut self.purged) {
                self.engine
                    .reclaim(Family::Log, &key(from), &key(to))
                    .map_err(|error| format!("the space of the purged log cannot be given back: {error}"))?;
            }
        }
        Ok(())
    }
}
