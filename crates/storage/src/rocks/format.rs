//! The file `FORMAT`: what wrote this data folder, in text, readable before the database is opened; and the
//! lock on it, which says that the folder is in use. RocksDB has a lock of its own, but takes it after we
//! have to look inside.
//!
//! Never here: who the folder belongs to. Cluster and replica ids are records of the replica.
//!
//! Invariants: `FORMAT` is durable before the database is created; it is written whole or not at all; a
//! folder that holds data (table files, or a write-ahead log) has both `FORMAT` and `CURRENT`, and one that
//! lost either is refused, not started afresh: the votes in it would be forgotten.
// The only place of the crate, with the tests, that touches files by itself.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use crate::error::{EngineError, Result};

/// The newest format that this release reads and writes. Raised when an older release could misread a folder.
pub const FORMAT_VERSION: u64 = 1;

const FILE: &str = "FORMAT";
const TITLE: &str = "palyra data folder";

/// The right to use a data folder; dropping it gives the folder free.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

/// Makes sure that `dir` is a data folder that this release may open and that nobody else has open; creates
/// it when there is none.
pub(super) fn prepare(dir: &Path) -> Result<Lock> {
    let io = |during| move |error: std::io::Error| EngineError::from_io(dir, during, &error);
    // Only its owner: the state holds who may do what, and sealed secrets.
    let create = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    create.map_err(io("creating the data folder"))?;
    let data = holds_data(dir).map_err(io("listing the data folder"))?;
    for needed in [FILE, "CURRENT"] {
        if data && !dir.join(needed).exists() {
            return Err(damaged(
                dir,
                &format!("it holds data, but the file `{needed}` is missing"),
            ));
        }
    }
    if !dir.join(FILE).exists() {
        mark(dir)?;
    }
    let read = io("reading the file FORMAT");
    let mut file = File::open(dir.join(FILE)).map_err(read)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(EngineError::Locked {
                folder: dir.to_owned(),
            });
        }
        Err(TryLockError::Error(error)) => return Err(io("locking the file FORMAT")(error)),
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(read)?;
    accept(dir, &text)?;
    Ok(Lock { _file: file })
}

fn accept(dir: &Path, text: &str) -> Result<()> {
    let found = text
        .strip_prefix(TITLE)
        .and_then(|rest| rest.trim().strip_prefix("format "));
    match found.and_then(|number| number.trim().parse::<u64>().ok()) {
        Some(found) if found > FORMAT_VERSION => Err(EngineError::Future {
            folder: dir.to_owned(),
            found,
            known: FORMAT_VERSION,
        }),
        Some(_) => Ok(()),
        None => Err(damaged(
            dir,
            "the file `FORMAT` does not say which format the folder has",
        )),
    }
}

/// Says of a folder that this release wrote it.
pub(super) fn mark(dir: &Path) -> Result<()> {
    create_file(dir).map_err(|error| EngineError::from_io(dir, "writing the file FORMAT", &error))
}

fn create_file(dir: &Path) -> std::io::Result<()> {
    let unfinished = dir.join("FORMAT.tmp");
    let mut file = File::create(&unfinished)?;
    write!(file, "{TITLE}\nformat {FORMAT_VERSION}\n")?;
    file.sync_all()?;
    fs::rename(&unfinished, dir.join(FILE))?;
    File::open(dir)?.sync_all()
}

fn holds_data(dir: &Path) -> std::io::Result<bool> {
    for entry in fs::read_dir(dir)? {
        if entry?
            .path()
            .extension()
            .is_some_and(|end| end == "sst" || end == "log")
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn damaged(dir: &Path, cause: &str) -> EngineError {
    EngineError::Corrupt {
        folder: dir.to_owned(),
        cause: cause.to_owned(),
    }
}
