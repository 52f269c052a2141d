//! openraft's own conformance suite for log and state machine, over both engines.

use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use palyra_state::Id;
use palyra_storage::{Disk, Engine, MemEngine, Options, RocksEngine};

use crate::log::LogStore;
use crate::machine::Machine;
use crate::meta::{self, Identity};
use crate::types::{Runtime, TypeConfig};

fn open(engine: Arc<dyn Engine>) -> (LogStore, Machine) {
    let identity = Identity {
        cluster_id: Id::from_bytes([7; 16]),
        replica_id: 1,
    };
    meta::claim(&*engine, identity).expect("an empty engine");
    let log = LogStore::open(engine.clone()).expect("an empty log");
    let machine = Machine::open(engine, log.clone()).expect("an empty state");
    (log, machine)
}

struct InMemory;

impl StoreBuilder<TypeConfig, LogStore, Machine, ()> for InMemory {
    async fn build(&self) -> Result<((), LogStore, Machine), StorageError<TypeConfig>> {
        let engine = MemEngine::open(&Disk::new("conformance")).expect("a new disk");
        let (log, machine) = open(Arc::new(engine));
        Ok(((), log, machine))
    }
}

struct OnDisk;

impl StoreBuilder<TypeConfig, LogStore, Machine, tempfile::TempDir> for OnDisk {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, Machine), StorageError<TypeConfig>> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let engine = RocksEngine::open(folder.path(), Options::default()).expect("an empty folder");
        let (log, machine) = open(Arc::new(engine));
        Ok((folder, log, machine))
    }
}

fn run(suite: impl Future<Output = Result<(), StorageError<TypeConfig>>>) {
    use openraft::AsyncRuntime;
    Runtime::run(suite).expect("the suite passes");
}

#[test]
fn the_engine_in_memory_conforms() {
    run(Suite::test_all(InMemory));
}

#[test]
fn the_engine_on_disk_conforms() {
    run(Suite::test_all(OnDisk));
}
