//! What replicas of a test keep their data on: a disk in memory, or a real folder that can lose its power as well.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::future::BoxFuture;
use palyra_storage::{
    Batch, Disk, Engine, EngineError, Family, Fault, MemEngine, Options, Result, RocksEngine, Snapshot, Visit,
};

/// Something that outlives the process of a replica.
pub trait Medium: Send + Sync {
    /// Opens it as a new process would, once the tasks of the last one are gone.
    fn open(&self) -> BoxFuture<'_, Arc<dyn Engine>>;
    /// Ends the process: what was written survives.
    fn kill(&self);
    /// Ends the process and cuts the power: of what was not synced, `keep` batches survive.
    fn power_loss(&self, keep: usize);
    /// Batches that a power loss could take back now.
    fn unsynced(&self) -> usize;
    /// The disk in memory, which can be told to fail.
    fn memory(&self) -> &Disk;
}

pub fn in_memory(id: u64) -> Arc<dyn Medium> {
    Arc::new(Memory(Disk::new(format!("r{id}"))))
}

struct Memory(Arc<Disk>);

impl Medium for Memory {
    fn open(&self) -> BoxFuture<'_, Arc<dyn Engine>> {
        Box::pin(async { Arc::new(MemEngine::open(&self.0).unwrap()) as Arc<dyn Engine> })
    }

    fn kill(&self) {
        self.0.kill();
    }

    fn power_loss(&self, keep: usize) {
        self.0.power_loss(keep);
    }

    fn unsynced(&self) -> usize {
        self.0.unsynced()
    }

    fn memory(&self) -> &Disk {
        &self.0
    }
}

impl dyn Medium {
    pub fn inject(&self, fault: Fault) {
        self.memory().inject(fault);
    }

    pub fn lie_about_sync(&self, lies: bool) {
        self.memory().lie_about_sync(lies);
    }
}

/// A folder of the production engine.
pub fn on_disk(_id: u64) -> Arc<dyn Medium> {
    Arc::new(Folder {
        dir: tempfile::tempdir().unwrap(),
        machine: Mutex::new(0),
        synced: Arc::default(),
    })
}

struct Folder {
    dir: tempfile::TempDir,
    /// After a loss of power the replica goes on in a folder of its own: what the disk kept of the one before.
    machine: Mutex<u32>,
    /// How much of each write-ahead log was synced.
    synced: Arc<Mutex<BTreeMap<PathBuf, u64>>>,
}

impl Folder {
    fn path(&self) -> PathBuf {
        self.dir.path().join(self.machine.lock().unwrap().to_string())
    }
}

fn is_log(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "log")
}

fn log_sizes(dir: &Path) -> BTreeMap<PathBuf, u64> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|path| is_log(path))
        // A log that is needed no more goes from one moment to the next.
        .filter_map(|path| fs::metadata(&path).ok().map(|data| (path, data.len())))
        .collect()
}

impl Medium for Folder {
    fn open(&self) -> BoxFuture<'_, Arc<dyn Engine>> {
        Box::pin(async {
            let dir = self.path();
            loop {
                match RocksEngine::open(&dir, Options::default()) {
                    // The tasks of the life before let go of it when the runtime gets to them.
                    Err(EngineError::Locked { .. }) => tokio::task::yield_now().await,
                    opened => {
                        let (engine, synced) = (opened.unwrap(), self.synced.clone());
                        return Arc::new(Recorded { engine, synced }) as Arc<dyn Engine>;
                    }
                }
            }
        })
    }

    fn kill(&self) {}

    fn power_loss(&self, keep: usize) {
        assert_eq!(keep, 0, "of a folder nothing survives that was not synced");
        let from = self.path();
        *self.machine.lock().unwrap() += 1;
        let to = self.path();
        fs::create_dir(&to).unwrap();
        let synced = std::mem::take(&mut *self.synced.lock().unwrap());
        for entry in fs::read_dir(&from).unwrap() {
            let path = entry.unwrap().path();
            let copy = to.join(path.file_name().unwrap());
            fs::copy(&path, &copy).unwrap();
            if is_log(&path) {
                let kept = synced.get(&path).copied().unwrap_or(0);
                let copy = fs::File::options().write(true).open(&copy).unwrap();
                copy.set_len(kept).unwrap();
            }
        }
    }

    fn unsynced(&self) -> usize {
        0
    }

    fn memory(&self) -> &Disk {
        panic!("a real folder cannot be told to fail")
    }
}

/// Notes how much of the logs each sync covers.
struct Recorded {
    engine: RocksEngine,
    synced: Arc<Mutex<BTreeMap<PathBuf, u64>>>,
}

impl Snapshot for Recorded {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>> {
        self.engine.get(family, key)
    }

    fn scan(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.engine.scan(family, from, to, visit)
    }

    fn scan_rev(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.engine.scan_rev(family, from, to, visit)
    }
}

impl Engine for Recorded {
    fn write(&self, batch: Batch) -> Result<()> {
        self.engine.write(batch)
    }

    fn sync(&self) -> Result<()> {
        let written = log_sizes(self.engine.path());
        self.engine.sync()?;
        *self.synced.lock().unwrap() = written;
        Ok(())
    }

    fn snapshot(&self) -> Result<Arc<dyn Snapshot>> {
        self.engine.snapshot()
    }

    fn reclaim(&self, family: Family, from: &[u8], to: &[u8]) -> Result<()> {
        self.engine.reclaim(family, from, to)
    }
}
