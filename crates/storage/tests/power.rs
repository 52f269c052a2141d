//! Power loss, on a real data folder: what had not been synced is cut off a copy of it, or left torn, or
//! turned into garbage, and the copy must show everything that was acknowledged, and a clean prefix of the
//! rest. The twin in memory goes through the same script, and loses its power in its own way.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::disallowed_types)]

mod script;

use std::fs;
use std::path::{Path, PathBuf};

use palyra_storage::{Disk, Engine, EngineError, MemEngine, Options, RocksEngine};
use script::{batch, survived};

fn open(dir: &Path) -> Result<RocksEngine, EngineError> {
    RocksEngine::open(dir, Options::default())
}

/// The write-ahead log that is being written.
fn log_of(dir: &Path) -> PathBuf {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .max()
        .unwrap()
}

fn length(file: &Path) -> u64 {
    fs::metadata(file).unwrap().len()
}

/// Copies the folder of a running engine, as a disk would have it: nothing is flushed for the purpose.
fn copy(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
    }
    to
}

fn edit_log(dir: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
    let log = log_of(dir);
    let mut bytes = fs::read(&log).unwrap();
    edit(&mut bytes);
    fs::write(log, bytes).unwrap();
}

/// A small generator, so that garbage is the same garbage in every run.
fn garbage(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

#[test]
fn everything_synced_survives_and_the_rest_is_a_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    let (mut synced, mut synced_length) = (0, 0);
    for number in 1..=45 {
        engine.write(batch(number)).unwrap();
        if number % 4 == 0 {
            engine.sync().unwrap();
            (synced, synced_length) = (number, length(&log_of(dir.path())));
        }
        let written_length = length(&log_of(dir.path()));

        let lost = copy(dir.path());
        edit_log(lost.path(), |log| log.truncate(synced_length as usize));
        assert_eq!(
            survived(&open(lost.path()).unwrap()),
            synced,
            "all of the rest was lost after batch {number}"
        );

        // The disk was in the middle of the rest: one byte less than all of it, so a record is torn.
        if written_length > synced_length {
            let torn = copy(dir.path());
            edit_log(torn.path(), |log| log.truncate(written_length as usize - 1));
            assert_eq!(
                survived(&open(torn.path()).unwrap()),
                number - 1,
                "batch {number} was torn"
            );
        }
    }
}

#[test]
fn the_twin_survives_the_same_losses() {
    for count in 1..=45 {
        let unsynced = count % 4;
        for keep in 0..=unsynced {
            let disk = Disk::new("twin");
            let engine = MemEngine::open(&disk).unwrap();
            for number in 1..=count {
                engine.write(batch(number)).unwrap();
                if number % 4 == 0 {
                    engine.sync().unwrap();
                }
            }
            disk.kill();
            let engine = MemEngine::open(&disk).unwrap();
            assert_eq!(survived(&engine), count, "killed after batch {count}");
            // What a start found is durable; what comes after it is not.
            for number in count + 1..=count + unsynced {
                engine.write(batch(number)).unwrap();
            }
            disk.power_loss(keep as usize);
            let left = survived(&MemEngine::open(&disk).unwrap());
            assert_eq!(left, count + keep, "{keep} of {unsynced} batches were kept");
        }
    }
}

#[test]
fn space_that_was_never_written_is_the_end_of_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    for number in 1..=10 {
        engine.write(batch(number)).unwrap();
    }
    engine.sync().unwrap();
    for zeros in [1, 7, 4096, 100_000] {
        let copy = copy(dir.path());
        edit_log(copy.path(), |log| log.extend(vec![0; zeros]));
        assert_eq!(survived(&open(copy.path()).unwrap()), 10, "{zeros} zeros");
    }
}

#[test]
fn garbage_after_the_last_sync_is_refused_or_ignored_and_never_believed() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    for number in 1..=10 {
        engine.write(batch(number)).unwrap();
    }
    engine.sync().unwrap();
    let (mut refused, mut ignored) = (0, 0);
    for seed in 0..40 {
        let copy = copy(dir.path());
        edit_log(copy.path(), |log| {
            log.extend(garbage(seed, 1 + seed as usize * 5))
        });
        match open(copy.path()) {
            Ok(engine) => {
                assert_eq!(survived(&engine), 10, "seed {seed}");
                ignored += 1;
            }
            Err(EngineError::Corrupt { .. }) => refused += 1,
            Err(error) => panic!("seed {seed}: {error}"),
        }
    }
    assert!(
        refused > 0 && ignored > 0,
        "both happen: {refused} refused, {ignored} ignored"
    );
}

#[test]
fn damage_in_the_middle_of_the_log_is_refused_and_the_error_says_where() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    for number in 1..=60 {
        engine.write(batch(number)).unwrap();
    }
    engine.sync().unwrap();
    let whole = length(&log_of(dir.path())) as usize;
    let refused = |what: &str, edit: &dyn Fn(&mut Vec<u8>)| {
        let copy = copy(dir.path());
        edit_log(copy.path(), |log| edit(log));
        match open(copy.path()) {
            Err(EngineError::Corrupt { cause, .. }) => assert!(cause.contains(".log"), "{what}: {cause}"),
            other => panic!("{what}: {other:?}"),
        }
    };
    for eighth in 0..7 {
        let at = whole * eighth / 8 + 3;
        refused(&format!("a changed byte at {at} of {whole}"), &|log| {
            log[at] ^= 0x10
        });
    }
    refused("a zeroed sector", &|log| log[whole / 2..whole / 2 + 512].fill(0));
    // The type byte of the first fragment, turned into a recycled log's: RocksDB alone takes this for an
    // empty log.
    refused("a recycled type", &|log| log[6] = 5);
    // Its length: RocksDB alone takes this for a torn last record while the log is shorter than a block.
    refused("a length beyond the log", &|log| log[5] = 0xff);
}

#[test]
fn what_a_start_shows_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).unwrap();
    for number in 1..=10 {
        engine.write(batch(number)).unwrap();
    }
    // The process ends without a sync, and the next one answers for what it found.
    drop(engine);
    let engine = open(dir.path()).unwrap();
    assert_eq!(survived(&engine), 10);
    let copy = copy(dir.path());
    edit_log(copy.path(), Vec::clear);
    assert_eq!(survived(&open(copy.path()).unwrap()), 10);
}
