//! What the twin does that the production engine cannot be told to do: losing power at a chosen batch, and
//! failing on demand. What both do is in `tests/conformance.rs`.
#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;

use super::*;

fn put(engine: &MemEngine, key: &'static str, value: &'static str) -> Result<()> {
    let mut batch = Batch::new();
    batch.put(Family::State, key, value);
    engine.write(batch)
}

fn keys(engine: &dyn Engine) -> Vec<String> {
    let mut keys = Vec::new();
    let collect = &mut |key: &[u8], _: &[u8]| {
        keys.push(String::from_utf8_lossy(key).into_owned());
        ControlFlow::Continue(())
    };
    engine.scan(Family::State, b"", b"\xff", collect).unwrap();
    keys
}

#[test]
fn a_killed_process_loses_nothing_and_a_power_loss_keeps_a_prefix() {
    let disk = Disk::new("d");
    let engine = MemEngine::open(&disk).unwrap();
    put(&engine, "a", "1").unwrap();
    engine.sync().unwrap();
    put(&engine, "b", "1").unwrap();
    put(&engine, "c", "1").unwrap();
    assert_eq!(disk.unsynced(), 2);
    let snapshot = engine.snapshot().unwrap();
    disk.kill();
    assert!(matches!(
        put(&engine, "d", "1"),
        Err(EngineError::Poisoned { .. })
    ));
    assert!(matches!(
        snapshot.get(Family::State, b"a"),
        Err(EngineError::Poisoned { .. })
    ));

    let reopened = MemEngine::open(&disk).unwrap();
    drop(engine);
    assert_eq!(
        keys(&reopened),
        ["a", "b", "c"],
        "and the dead engine's drop does not close the living one"
    );
    assert_eq!(disk.unsynced(), 0, "opening makes durable what it found");
    put(&reopened, "d", "1").unwrap();
    put(&reopened, "e", "1").unwrap();
    put(&reopened, "f", "1").unwrap();
    disk.power_loss(1);
    assert_eq!(keys(&MemEngine::open(&disk).unwrap()), ["a", "b", "c", "d"]);
}

#[test]
fn a_disk_that_lies_about_sync_loses_what_it_acknowledged() {
    let disk = Disk::new("d");
    let engine = MemEngine::open(&disk).unwrap();
    disk.lie_about_sync(true);
    put(&engine, "a", "1").unwrap();
    engine.sync().unwrap();
    assert_eq!(disk.unsynced(), 1);
    drop(engine);
    let engine = MemEngine::open(&disk).unwrap();
    assert_eq!(keys(&engine), ["a"], "the page cache still has it");
    disk.power_loss(0);
    let engine = MemEngine::open(&disk).unwrap();
    assert_eq!(keys(&engine), [""; 0]);
    put(&engine, "b", "1").unwrap();
    disk.lie_about_sync(false);
    engine.sync().unwrap();
    disk.power_loss(0);
    assert_eq!(keys(&MemEngine::open(&disk).unwrap()), ["b"]);
}

#[test]
fn a_failed_write_or_sync_poisons_until_the_next_process() {
    for (fault, full) in [
        (Fault::WriteFails, false),
        (Fault::WriteFindsNoSpace, true),
        (Fault::SyncFails, false),
        (Fault::SyncFindsNoSpace, true),
    ] {
        let disk = Disk::new("d");
        let engine = MemEngine::open(&disk).unwrap();
        put(&engine, "a", "1").unwrap();
        engine.sync().unwrap();
        disk.inject(fault);
        let failed = put(&engine, "b", "1").and_then(|()| engine.sync()).unwrap_err();
        match full {
            true => assert!(matches!(failed, EngineError::Full { .. }), "{failed}"),
            false => assert!(matches!(failed, EngineError::Io { .. }), "{failed}"),
        }
        let poisoned = |result: Result<()>| matches!(result, Err(EngineError::Poisoned { .. }));
        assert!(poisoned(engine.sync()) && poisoned(put(&engine, "c", "1")));
        assert!(poisoned(engine.get(Family::State, b"a").map(drop)) && poisoned(engine.snapshot().map(drop)));
        disk.power_loss(0);
        assert_eq!(keys(&MemEngine::open(&disk).unwrap()), ["a"], "{fault:?}");
    }
}

#[test]
fn a_damaged_block_fails_one_read() {
    let disk = Disk::new("d");
    let engine = MemEngine::open(&disk).unwrap();
    put(&engine, "a", "1").unwrap();
    disk.inject(Fault::ReadFindsCorruption);
    assert!(matches!(
        engine.get(Family::State, b"a"),
        Err(EngineError::Corrupt { .. })
    ));
    assert_eq!(
        engine.get(Family::State, b"a").unwrap().as_deref(),
        Some(&b"1"[..])
    );
}

#[test]
fn versions_last_as_long_as_the_snapshots_that_read_them() {
    let disk = Disk::new("d");
    let engine = MemEngine::open(&disk).unwrap();
    let kept = || disk.lock().open.as_ref().unwrap().versions.versions_kept();
    put(&engine, "a", "1").unwrap();
    let first = engine.snapshot().unwrap();
    let same = engine.snapshot().unwrap();
    put(&engine, "a", "2").unwrap();
    put(&engine, "a", "3").unwrap();
    assert_eq!(kept(), 2, "nobody reads `2`");
    let mut batch = Batch::new();
    batch.delete(Family::State, "a");
    engine.write(batch).unwrap();
    assert_eq!(kept(), 2);
    drop(first);
    assert_eq!(same.get(Family::State, b"a").unwrap().as_deref(), Some(&b"1"[..]));
    drop(same);
    assert_eq!(kept(), 0, "a deleted key that no snapshot reads is gone");
}

#[test]
fn a_visitor_may_use_the_engine() {
    let disk = Disk::new("d");
    let engine = MemEngine::open(&disk).unwrap();
    for key in ["a", "b", "c"] {
        put(&engine, key, "1").unwrap();
    }
    let mut seen = 0;
    let delete_all = &mut |_: &[u8], _: &[u8]| {
        let mut batch = Batch::new();
        batch.delete_range(Family::State, "a", "z");
        engine.write(batch).unwrap();
        seen += 1;
        ControlFlow::Continue(())
    };
    engine.scan(Family::State, b"a", b"z", delete_all).unwrap();
    assert_eq!(seen, 3, "a scan shows the moment at which it began");
    assert_eq!(keys(&engine), [""; 0]);
}
