//! What only the production engine does: folders, locks, formats, checkpoints, and the errors of a real disk.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::disallowed_types)]

use std::fs;
use std::ops::ControlFlow;

use super::*;

fn open(dir: &Path) -> Result<RocksEngine> {
    RocksEngine::open(dir, Options::default())
}

fn put(engine: &RocksEngine, key: &[u8], value: &[u8]) {
    let mut batch = Batch::new();
    batch.put(Family::State, key.to_vec(), value.to_vec());
    engine.write(batch).unwrap();
}

#[test]
fn a_folder_has_one_user_and_the_error_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    let error = open(dir.path()).unwrap_err();
    assert_eq!(
        error,
        EngineError::Locked {
            folder: dir.path().to_owned()
        }
    );
    assert!(error.to_string().contains(dir.path().to_str().unwrap()));
    let snapshot = engine.snapshot().unwrap();
    drop(engine);
    assert!(
        matches!(open(dir.path()), Err(EngineError::Locked { .. })),
        "a snapshot keeps the folder open"
    );
    drop(snapshot);
    open(dir.path()).unwrap();
}

#[test]
fn a_folder_from_the_future_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()).unwrap());
    let file = dir.path().join("FORMAT");
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        "palyra data folder\nformat 1\n"
    );
    fs::write(&file, "palyra data folder\nformat 7\n").unwrap();
    let error = open(dir.path()).unwrap_err();
    assert_eq!(
        error,
        EngineError::Future {
            folder: dir.path().to_owned(),
            found: 7,
            known: FORMAT_VERSION
        }
    );
    assert!(
        error.to_string().contains("format 7") && error.to_string().contains("up to 1"),
        "{error}"
    );
    fs::write(&file, "").unwrap();
    assert!(
        matches!(open(dir.path()), Err(EngineError::Corrupt { .. })),
        "an unreadable format is not a guess"
    );
}

#[test]
fn a_folder_that_lost_its_head_is_not_started_afresh() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    put(&engine, b"k", b"v");
    drop(engine);
    // First with a log only, then also with the table file that replaying makes of it.
    for _ in 0..2 {
        for file in ["CURRENT", "FORMAT"] {
            let (file, aside) = (dir.path().join(file), dir.path().join("aside"));
            fs::rename(&file, &aside).unwrap();
            let error = open(dir.path()).unwrap_err();
            let name = file.file_name().unwrap().to_str().unwrap();
            assert!(
                matches!(&error, EngineError::Corrupt { cause, .. } if cause.contains(name)),
                "{error}"
            );
            fs::rename(&aside, &file).unwrap();
        }
        let engine = open(dir.path()).unwrap();
        assert_eq!(
            engine.get(Family::State, b"k").unwrap().as_deref(),
            Some(&b"v"[..])
        );
    }
}

#[test]
fn no_family_pins_the_write_ahead_log_beyond_its_limit() {
    const LIMIT: u64 = 1024 * 1024;
    let dir = tempfile::tempdir().unwrap();
    let bounded = Options {
        max_wal_bytes: LIMIT,
        ..small()
    };
    let engine = RocksEngine::open(dir.path(), bounded).unwrap();
    let settle = || {
        let mut wait = rocksdb::WaitForCompactOptions::default();
        wait.set_flush(false);
        engine.folder.db.wait_for_compact(&wait).unwrap();
    };
    let bytes = || -> u64 {
        let files = log_files(dir.path());
        files.iter().map(|file| fs::metadata(file).unwrap().len()).sum()
    };
    // Written once and never again, like a vote: its memtable would hold the first log file for ever.
    let mut vote = Batch::new();
    vote.put(Family::Meta, "vote", "mine")
        .put(Family::Log, "0", "first");
    engine.write(vote).unwrap();
    let first = log_files(dir.path()).swap_remove(0);
    let mut worst = 0;
    for round in 0..64_u64 {
        for number in 0..64_u64 {
            put(&engine, &number.to_be_bytes(), &vec![round as u8; 2048]);
        }
        settle();
        worst = worst.max(bytes());
    }
    assert!(!first.exists(), "{first:?} holds nothing that is needed");
    assert!(worst <= 2 * LIMIT, "{worst} bytes of log, the limit is {LIMIT}");
    assert_eq!(
        engine.get(Family::Meta, b"vote").unwrap().as_deref(),
        Some(&b"mine"[..])
    );
}

#[test]
fn a_checkpoint_opens_like_a_data_folder_and_stays_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir.path().join("live")).unwrap();
    put(&engine, b"k", b"before");
    let copy = dir.path().join("copy");
    engine.checkpoint(&copy).unwrap();
    put(&engine, b"k", b"after");
    assert!(engine.checkpoint(&copy).is_err(), "a checkpoint never overwrites");
    assert_eq!(
        engine.get(Family::State, b"k").unwrap().as_deref(),
        Some(&b"after"[..])
    );
    let copied = open(&copy).unwrap();
    assert_eq!(
        copied.get(Family::State, b"k").unwrap().as_deref(),
        Some(&b"before"[..])
    );
}

#[test]
fn after_one_failure_nothing_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    put(&engine, b"k", b"v");
    let snapshot = engine.snapshot().unwrap();
    // The database itself refuses this range; to the engine it is a failure like any other.
    let failed = engine.run("write", |db| {
        let handle = db.cf_handle("state").unwrap();
        db.delete_range_cf(handle, b"b", b"a")
    });
    assert!(matches!(failed, Err(EngineError::Corrupt { .. })), "{failed:?}");
    let poisoned = |result: Result<()>| matches!(result, Err(EngineError::Poisoned { .. }));
    assert!(poisoned(engine.sync()));
    assert!(poisoned(engine.write(Batch::new())));
    assert!(poisoned(engine.get(Family::State, b"k").map(drop)));
    assert!(poisoned(engine.snapshot().map(drop)));
    assert!(poisoned(snapshot.get(Family::State, b"k").map(drop)));
    assert!(poisoned(engine.checkpoint(&dir.path().join("copy"))));
}

#[test]
fn errors_of_the_disk_are_told_apart() {
    let say = |kind, text: &str| classify_text(Path::new("/d"), "sync", kind, text.to_owned());
    let folder = PathBuf::from("/d");
    let full = "IO error: No space left on device: While appending to file: /d/000004.log";
    assert_eq!(
        say(ErrorKind::IOError, full),
        EngineError::Full {
            folder: folder.clone(),
            during: "sync"
        }
    );
    let locked = "IO error: While lock file: /d/LOCK: Resource temporarily unavailable";
    assert_eq!(say(ErrorKind::IOError, locked), EngineError::Locked { folder });
    let failed = "IO error: While fsync: /d/000004.log: Input/output error";
    assert!(matches!(say(ErrorKind::IOError, failed), EngineError::Io { .. }));
    let damaged = "Corruption: checksum mismatch";
    assert!(matches!(
        say(ErrorKind::Corruption, damaged),
        EngineError::Corrupt { .. }
    ));
}

#[test]
fn purged_files_are_gone_and_their_neighbours_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let small = Options {
        log_buffer_bytes: 64 * 1024,
        ..Options::default()
    };
    let engine = RocksEngine::open(dir.path(), small).unwrap();
    for index in 0..400_u64 {
        let mut batch = Batch::new();
        batch.put(Family::Log, index.to_be_bytes().to_vec(), vec![index as u8; 2048]);
        engine.write(batch).unwrap();
    }
    let log = engine.folder.handle(Family::Log).unwrap();
    engine
        .folder
        .db
        .compact_range_cf(log, None::<&[u8]>, None::<&[u8]>);
    let files = || {
        engine
            .folder
            .db
            .live_files()
            .unwrap()
            .iter()
            .filter(|file| file.column_family_name == "log")
            .count()
    };
    let before = files();
    let (from, to) = (0_u64.to_be_bytes(), 300_u64.to_be_bytes());
    let mut purge = Batch::new();
    purge.delete_range(Family::Log, from.to_vec(), to.to_vec());
    engine.write(purge).unwrap();
    engine.sync().unwrap();
    engine.reclaim(Family::Log, &from, &to).unwrap();
    assert!(files() < before, "{} of {before} files are left", files());
    let mut left = Vec::new();
    let collect = &mut |key: &[u8], _: &[u8]| {
        left.push(u64::from_be_bytes(key.try_into().unwrap()));
        ControlFlow::Continue(())
    };
    engine.scan(Family::Log, b"", b"\xff", collect).unwrap();
    assert_eq!(left, (300..400).collect::<Vec<_>>());
}

#[test]
fn just_below_is_below() {
    assert_eq!(just_below(&[1, 0, 0]), Some(vec![0, 255, 255]));
    assert_eq!(just_below(&[0, 5]), Some(vec![0, 4]));
    assert_eq!(just_below(&[0, 0]), None);
}

/// Small buffers: several log files at once, each held by another family.
fn small() -> Options {
    Options {
        log_buffer_bytes: 64 * 1024,
        state_buffer_bytes: 64 * 1024,
        ..Options::default()
    }
}

fn write_from_threads(engine: &RocksEngine, threads: u64, each: u64) {
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                for number in 0..each {
                    let mut batch = Batch::new();
                    let key = [thread.to_be_bytes(), number.to_be_bytes()].concat();
                    batch.put(Family::State, key, vec![thread as u8; 300]);
                    batch.put(Family::Meta, vec![thread as u8], number.to_be_bytes().to_vec());
                    engine.write(batch).unwrap();
                    if number % 50 == 0 {
                        engine.sync().unwrap();
                    }
                }
            });
        }
    });
}

fn log_files(dir: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files
        .filter(|path| path.extension().is_some_and(|end| end == "log"))
        .collect();
    files.sort();
    files
}

#[test]
fn logs_of_several_files_and_writers_pass_the_check_and_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = RocksEngine::open(dir.path(), small()).unwrap();
    write_from_threads(&engine, 4, 500);
    drop(engine);
    assert!(log_files(dir.path()).len() > 1, "{:?}", log_files(dir.path()));
    let engine = RocksEngine::open(dir.path(), small()).unwrap();
    let mut count = 0;
    let visit = &mut |_: &[u8], value: &[u8]| {
        assert_eq!(value.len(), 300);
        count += 1;
        ControlFlow::Continue(())
    };
    engine.scan(Family::State, b"", &[0xff; 17], visit).unwrap();
    assert_eq!(count, 4 * 500);
}

#[test]
fn an_older_log_file_that_lost_its_end_or_is_gone_is_refused() {
    for gone in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let engine = RocksEngine::open(dir.path(), small()).unwrap();
        write_from_threads(&engine, 1, 1000);
        drop(engine);
        let files = log_files(dir.path());
        assert!(files.len() > 2, "{files:?}");
        match gone {
            true => fs::remove_file(&files[1]).unwrap(),
            false => {
                let file = fs::File::options().write(true).open(&files[1]).unwrap();
                file.set_len(file.metadata().unwrap().len() - 10).unwrap();
            }
        }
        let error = RocksEngine::open(dir.path(), small()).unwrap_err();
        assert!(matches!(&error, EngineError::Corrupt { .. }), "{error}");
    }
}

#[test]
fn a_log_file_that_is_needed_no_more_and_was_left_behind_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let engine = RocksEngine::open(dir.path(), small()).unwrap();
    write_from_threads(&engine, 1, 300);
    let left_behind = log_files(dir.path()).swap_remove(0);
    let bytes = fs::read(&left_behind).unwrap();
    for _ in 0..2 {
        for family in Family::ALL {
            engine
                .folder
                .db
                .flush_cf(engine.folder.handle(family).unwrap())
                .unwrap();
        }
        write_from_threads(&engine, 1, 301);
    }
    drop(engine);
    assert!(!left_behind.exists());
    fs::write(&left_behind, bytes).unwrap();
    let alone = wal::check(dir.path(), || Ok(0));
    assert!(
        matches!(alone, Err(EngineError::Corrupt { .. })),
        "it looks like a hole: {alone:?}"
    );
    let engine = RocksEngine::open(dir.path(), small()).unwrap();
    let key = [0_u64.to_be_bytes(), 300_u64.to_be_bytes()].concat();
    assert!(engine.get(Family::State, &key).unwrap().is_some());
}
