//! Random scripts that both engines and a plain map run side by side, and must agree on: batches, range
//! deletions, reads, scans both ways, snapshots that outlive changes, syncs, and reopening after a shutdown.
//!
//! Keys are drawn from a small alphabet so that scripts hit the same keys, prefixes and bounds again and
//! again.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use palyra_storage::{Batch, Disk, Engine, Family, MemEngine, Op, Options, RocksEngine, Snapshot};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

type Model = BTreeMap<(Family, Vec<u8>), Vec<u8>>;
type Entries = Vec<(Vec<u8>, Vec<u8>)>;

#[derive(Clone, Debug)]
enum Step {
    Write(Vec<Op>),
    Sync,
    Get(Family, Vec<u8>),
    Scan {
        family: Family,
        from: Vec<u8>,
        to: Vec<u8>,
        reverse: bool,
        limit: usize,
    },
    TakeSnapshot,
    ReadSnapshot(prop::sample::Index),
    DropSnapshot(prop::sample::Index),
    Reclaim {
        family: Family,
        from: Vec<u8>,
        to: Vec<u8>,
    },
    Reopen,
}

fn family() -> impl Strategy<Value = Family> {
    prop::sample::select(Family::ALL.to_vec())
}

/// Up to three bytes from the edges and the middle of the byte order; the empty key is a key.
fn key() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(vec![0_u8, 1, b'a', b'b', 0xff]), 0..4)
}

fn op() -> impl Strategy<Value = Op> {
    let value = prop::collection::vec(any::<u8>(), 0..40);
    prop_oneof![
        6 => (family(), key(), value).prop_map(|(family, key, value)| Op::Put {
            family,
            key: key.into(),
            value: value.into(),
        }),
        2 => (family(), key()).prop_map(|(family, key)| Op::Delete { family, key: key.into() }),
        1 => (family(), key(), key()).prop_map(|(family, from, to)| Op::DeleteRange {
            family,
            from: from.into(),
            to: to.into(),
        }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => prop::collection::vec(op(), 0..6).prop_map(Step::Write),
        2 => Just(Step::Sync),
        4 => (family(), key()).prop_map(|(family, key)| Step::Get(family, key)),
        6 => (family(), key(), key(), any::<bool>(), 1_usize..6).prop_map(
            |(family, from, to, reverse, limit)| Step::Scan { family, from, to, reverse, limit },
        ),
        2 => Just(Step::TakeSnapshot),
        3 => any::<prop::sample::Index>().prop_map(Step::ReadSnapshot),
        1 => any::<prop::sample::Index>().prop_map(Step::DropSnapshot),
        1 => (family(), key(), key()).prop_map(|(family, from, to)| Step::Reclaim { family, from, to }),
        1 => Just(Step::Reopen),
    ]
}

fn batch(ops: &[Op]) -> Batch {
    let mut batch = Batch::new();
    for op in ops {
        match op.clone() {
            Op::Put { family, key, value } => batch.put(family, key, value),
            Op::Delete { family, key } => batch.delete(family, key),
            Op::DeleteRange { family, from, to } => batch.delete_range(family, from, to),
        };
    }
    batch
}

fn apply(model: &mut Model, batch: &Batch) {
    for op in batch.ops() {
        match op {
            Op::Put { family, key, value } => drop(model.insert((*family, key.to_vec()), value.to_vec())),
            Op::Delete { family, key } => drop(model.remove(&(*family, key.to_vec()))),
            Op::DeleteRange { family, from, to } => {
                model.retain(|(of, key), _| of != family || key[..] < from[..] || key[..] >= to[..]);
            }
        }
    }
}

fn expected(model: &Model, family: Family, from: &[u8], to: &[u8], reverse: bool, limit: usize) -> Entries {
    let within = |key: &[u8]| from <= key && key < to;
    let entries = model.iter().filter(|((of, key), _)| *of == family && within(key));
    let mut entries: Entries = entries
        .map(|((_, key), value)| (key.clone(), value.clone()))
        .collect();
    if reverse {
        entries.reverse();
    }
    entries.truncate(limit);
    entries
}

fn scanned(
    view: &dyn Snapshot,
    family: Family,
    from: &[u8],
    to: &[u8],
    reverse: bool,
    limit: usize,
) -> Entries {
    let mut entries = Entries::new();
    let visit = &mut |key: &[u8], value: &[u8]| {
        entries.push((key.to_vec(), value.to_vec()));
        match entries.len() < limit {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    };
    match reverse {
        true => view.scan_rev(family, from, to, visit).unwrap(),
        false => view.scan(family, from, to, visit).unwrap(),
    }
    entries
}

/// Everything, both ways, and each key by itself.
fn assert_shows(view: &dyn Snapshot, model: &Model) {
    for family in Family::ALL {
        for reverse in [false, true] {
            let all = expected(model, family, b"", &[0xff; 5], reverse, usize::MAX);
            assert_eq!(scanned(view, family, b"", &[0xff; 5], reverse, usize::MAX), all);
        }
    }
    for ((family, key), value) in model {
        assert_eq!(view.get(*family, key).unwrap().as_deref(), Some(&value[..]));
    }
}

/// One engine under test, with the snapshots taken of it and what each of them must show for ever.
struct Subject {
    reopen: Box<dyn Fn() -> Arc<dyn Engine>>,
    engine: Option<Arc<dyn Engine>>,
    snapshots: Vec<(Arc<dyn Snapshot>, Model)>,
    model: Model,
}

impl Subject {
    fn new(reopen: Box<dyn Fn() -> Arc<dyn Engine>>) -> Self {
        let engine = Some(reopen());
        Subject {
            reopen,
            engine,
            snapshots: Vec::new(),
            model: Model::new(),
        }
    }

    fn run(&mut self, step: &Step) {
        let engine = self.engine.clone().unwrap();
        match step {
            Step::Write(ops) => {
                let batch = batch(ops);
                apply(&mut self.model, &batch);
                engine.write(batch).unwrap();
            }
            Step::Sync => engine.sync().unwrap(),
            Step::Get(family, key) => {
                let expected = self.model.get(&(*family, key.clone())).map(Vec::as_slice);
                assert_eq!(engine.get(*family, key).unwrap().as_deref(), expected);
            }
            Step::Scan {
                family,
                from,
                to,
                reverse,
                limit,
            } => {
                let expected = expected(&self.model, *family, from, to, *reverse, *limit);
                assert_eq!(scanned(&*engine, *family, from, to, *reverse, *limit), expected);
            }
            Step::TakeSnapshot => self
                .snapshots
                .push((engine.snapshot().unwrap(), self.model.clone())),
            Step::ReadSnapshot(which) if !self.snapshots.is_empty() => {
                let (snapshot, model) = which.get(&self.snapshots);
                assert_shows(&**snapshot, model);
            }
            Step::DropSnapshot(which) if !self.snapshots.is_empty() => {
                drop(self.snapshots.remove(which.index(self.snapshots.len())));
            }
            Step::ReadSnapshot(_) | Step::DropSnapshot(_) => {}
            Step::Reclaim { family, from, to } => self.reclaim(&*engine, *family, from, to),
            Step::Reopen => {
                drop(engine);
                self.snapshots.clear();
                self.engine = None;
                self.engine = Some((self.reopen)());
                assert_shows(&**self.engine.as_ref().unwrap(), &self.model);
            }
        }
    }

    /// As the contract asks: delete, sync, let go of the snapshots, and only then give the space back.
    fn reclaim(&mut self, engine: &dyn Engine, family: Family, from: &[u8], to: &[u8]) {
        let mut purge = Batch::new();
        purge.delete_range(family, from.to_vec(), to.to_vec());
        apply(&mut self.model, &purge);
        engine.write(purge).unwrap();
        engine.sync().unwrap();
        self.snapshots.clear();
        engine.reclaim(family, from, to).unwrap();
    }
}

fn rocks(dir: &Path) -> Subject {
    // Small buffers, so that scripts meet table files and compactions and not only the memtable.
    let options = Options {
        log_buffer_bytes: 64 * 1024,
        state_buffer_bytes: 64 * 1024,
        ..Options::default()
    };
    let dir = dir.to_owned();
    Subject::new(Box::new(move || {
        Arc::new(RocksEngine::open(&dir, options).unwrap())
    }))
}

fn memory() -> Subject {
    let disk = Disk::new("twin");
    Subject::new(Box::new(move || Arc::new(MemEngine::open(&disk).unwrap())))
}

fn runner(cases: u32) -> TestRunner {
    // A fixed seed: a failure here is a failure everywhere.
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]))
}

#[test]
fn both_engines_do_what_a_map_does() {
    let scripts = prop::collection::vec(step(), 1..80);
    let run = |script: Vec<Step>| {
        let dir = tempfile::tempdir().unwrap();
        let mut subjects = [rocks(dir.path()), memory()];
        for step in &script {
            for subject in &mut subjects {
                subject.run(step);
            }
        }
        for subject in &mut subjects {
            subject.run(&Step::Reopen);
        }
        Ok(())
    };
    runner(40).run(&scripts, run).unwrap();
}

#[test]
fn the_twin_does_what_a_map_does_for_longer() {
    let scripts = prop::collection::vec(step(), 1..200);
    let run = |script: Vec<Step>| {
        let mut subject = memory();
        for step in script.iter().chain([&Step::Reopen]) {
            subject.run(step);
        }
        Ok(())
    };
    runner(400).run(&scripts, run).unwrap();
}

#[test]
fn a_batch_over_the_limit_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for mut subject in [rocks(dir.path()), memory()] {
        let engine = subject.engine.take().unwrap();
        let mut batch = Batch::new();
        batch.put(Family::State, "small", "value").put(
            Family::State,
            "big",
            vec![0; palyra_storage::MAX_BATCH_BYTES],
        );
        let error = engine.write(batch).unwrap_err();
        assert!(
            matches!(error, palyra_storage::EngineError::TooLarge { .. }),
            "{error}"
        );
        assert_eq!(engine.get(Family::State, b"small").unwrap(), None);
        engine.sync().unwrap();
    }
}

#[test]
fn the_twin_survives_a_power_loss_with_a_prefix_that_holds_all_synced_batches() {
    let scripts = (prop::collection::vec(step(), 1..60), any::<prop::sample::Index>());
    let run = |(script, keep): (Vec<Step>, prop::sample::Index)| {
        let disk = Disk::new("twin");
        let engine = MemEngine::open(&disk).unwrap();
        let (mut model, mut since_sync) = (Model::new(), vec![Model::new()]);
        for step in &script {
            match step {
                Step::Write(ops) if !ops.is_empty() => {
                    let batch = batch(ops);
                    if batch.is_empty() {
                        continue;
                    }
                    apply(&mut model, &batch);
                    engine.write(batch).unwrap();
                    since_sync.push(model.clone());
                }
                Step::Sync => {
                    engine.sync().unwrap();
                    since_sync = vec![model.clone()];
                }
                _ => {}
            }
        }
        let keep = keep.index(since_sync.len());
        disk.power_loss(keep);
        assert_shows(&MemEngine::open(&disk).unwrap(), &since_sync[keep]);
        Ok(())
    };
    runner(200).run(&scripts, run).unwrap();
}
