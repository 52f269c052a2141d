//! What openraft's conformance suite does not ask of the log: one sync for many, and no reading across a purge.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use futures::StreamExt;
use openraft::EntryPayload;
use openraft::storage::RaftLogStorageExt;
use openraft::type_config::TypeConfigExt;
use palyra_storage::{Disk, MemEngine, Result as EngineResult, Snapshot, Visit};

use super::*;
use crate::types::LeaderId;

fn id(index: u64) -> LogId {
    LogId::new(LeaderId { term: 1, node_id: 1 }, index)
}

fn blank(index: u64) -> Entry {
    Entry {
        log_id: id(index),
        payload: EntryPayload::Blank,
    }
}

fn indexes(entries: &[Entry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.log_id.index).collect()
}

#[tokio::test]
async fn what_was_purged_is_not_read_around() {
    let engine = MemEngine::open(&Disk::new("log")).unwrap();
    let mut log = LogStore::open(Arc::new(engine)).unwrap();
    log.blocking_append((0..10).map(blank)).await.unwrap();
    log.purge(id(4)).await.unwrap();
    // openraft asks like this when it looks for what there is.
    assert_eq!(indexes(&log.try_get_log_entries(2..8).await.unwrap()), [5, 6, 7]);
    // For a follower, and for the state machine, 5 does not come after 1.
    assert_eq!(log.limited_get_log_entries(2, 8).await.unwrap(), []);
    let applied: Vec<_> = log.entries_stream(2..8).await.collect().await;
    assert!(matches!(&applied[..], [Err(error)] if error.to_string().contains("entry 2")));
    assert_eq!(
        indexes(&log.limited_get_log_entries(5, 8).await.unwrap()),
        [5, 6, 7]
    );
    let applied: Vec<_> = log.entries_stream(5..8).await.collect().await;
    assert_eq!(applied.len(), 3);
}

#[tokio::test]
async fn a_log_with_a_hole_behind_what_was_purged_is_not_opened() {
    let engine = Arc::new(MemEngine::open(&Disk::new("log")).unwrap());
    let mut batch = Batch::new();
    meta::put_purged(&mut batch, &id(4));
    batch.put(Family::Log, key(6), codec::seal_entry(&blank(6)));
    engine.write(batch).unwrap();
    let refused = LogStore::open(engine.clone()).map(drop);
    assert!(
        matches!(&refused, Err(OpenError::Damaged(what)) if what.contains("entry 5")),
        "{refused:?}"
    );
    let mut batch = Batch::new();
    batch.put(Family::Log, key(5), codec::seal_entry(&blank(5)));
    engine.write(batch).unwrap();
    LogStore::open(engine).unwrap();
}

/// An engine whose syncs are counted, and the first of which waits for the test.
struct Slow {
    engine: MemEngine,
    syncs: AtomicUsize,
    started: mpsc::Sender<()>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl Snapshot for Slow {
    fn get(&self, family: Family, key: &[u8]) -> EngineResult<Option<Bytes>> {
        self.engine.get(family, key)
    }

    fn scan(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> EngineResult<()> {
        self.engine.scan(family, from, to, visit)
    }

    fn scan_rev(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> EngineResult<()> {
        self.engine.scan_rev(family, from, to, visit)
    }
}

impl Engine for Slow {
    fn write(&self, batch: Batch) -> EngineResult<()> {
        self.engine.write(batch)
    }

    fn sync(&self) -> EngineResult<()> {
        if self.syncs.fetch_add(1, Ordering::SeqCst) == 0 {
            self.started.send(()).unwrap();
            self.go_on.lock().unwrap().recv().unwrap();
        }
        self.engine.sync()
    }

    fn snapshot(&self) -> EngineResult<Arc<dyn Snapshot>> {
        self.engine.snapshot()
    }
}

#[tokio::test]
async fn what_gathers_during_one_sync_shares_the_next() {
    let disk = Disk::new("log");
    let ((started, has_started), (go, go_on)) = (mpsc::channel(), mpsc::channel());
    let engine = Arc::new(Slow {
        engine: MemEngine::open(&disk).unwrap(),
        syncs: AtomicUsize::new(0),
        started,
        go_on: Mutex::new(go_on),
    });
    let mut log = LogStore::open(engine.clone()).unwrap();
    let mut done = Vec::new();
    for index in 0..20 {
        let (sender, receiver) = TypeConfig::oneshot();
        log.append([blank(index)], IOFlushed::signal(sender))
            .await
            .unwrap();
        done.push(receiver);
        if index == 0 {
            has_started.recv().unwrap();
        }
    }
    let vote = Vote {
        leader_id: LeaderId { term: 2, node_id: 1 },
        committed: false,
    };
    let mut voter = log.clone();
    let voted = platform::spawn(async move { voter.save_vote(&vote).await });
    // Long readable, and nobody was told that any of it is durable.
    assert_eq!(log.limited_get_log_entries(0, 20).await.unwrap().len(), 20);
    assert!(done.iter_mut().all(|done| done.try_recv().is_err()) && !voted.is_finished());
    tokio::task::yield_now().await;
    go.send(()).unwrap();
    voted.await.unwrap().unwrap();
    // The vote came last: everything before it was answered before.
    assert!(done.iter_mut().all(|done| matches!(done.try_recv(), Ok(Ok(())))));
    assert_eq!(
        engine.syncs.load(Ordering::SeqCst),
        2,
        "one for the first, one for all that came meanwhile"
    );
    disk.power_loss(0);
    let engine = Arc::new(MemEngine::open(&disk).unwrap());
    assert_eq!(meta::load_vote(&*engine).unwrap(), Some(vote));
    let mut log = LogStore::open(engine).unwrap();
    assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(id(19)));
}
