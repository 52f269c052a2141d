//! Reads the write-ahead log before RocksDB does, and refuses what RocksDB would drop in silence or hang on.
//!
//! `TolerateCorruptedTailRecords` means to tolerate a torn last record and nothing else. RocksDB 11.8.1,
//! given a log with one damaged byte, does three other things, and the first two un-acknowledge synced
//! batches without a word: a damaged length in the last block passes for a torn record although valid ones
//! follow; a type byte that turns into that of a recycled log ends the replay there; the same later in the
//! log makes it loop for ever. It also skips a zeroed stretch that ends where a record begins. This check
//! closes these holes, at the price of reading the log twice on a start, which `max_wal_bytes` bounds.
//!
//! Never here: repair. Nothing is written, and what is damaged stays for whoever looks into it.
//!
//! Invariants that it holds the log to: every fragment before the torn end has a right checksum and stands in
//! a right order; nothing valid follows a torn fragment; sequence numbers have no gap, also from one file to
//! the next. What it cannot see: damage that makes the very last record look torn, and the loss of the newest
//! file.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::{EngineError, Result};

const BLOCK: usize = 32 * 1024;
/// Checksum (4 bytes), length (2), type (1).
const HEADER: usize = 7;
/// A logical record begins with its first sequence number (8 bytes) and how many it uses (4).
const BATCH_HEAD: usize = 12;

/// Checks all log files of `dir`, oldest first. A folder without any is fine.
///
/// `oldest_needed` says which files still matter (those from that number on). It is asked only when records
/// are missing between two files, which is damage, unless the older file is a left-over: RocksDB drops files
/// that it needs no more from several threads, and a process that is killed meanwhile leaves any of them
/// behind.
pub(super) fn check(dir: &Path, oldest_needed: impl FnOnce() -> Result<u64>) -> Result<()> {
    let mut oldest_needed = Some(oldest_needed);
    let io = |error: io::Error| EngineError::from_io(dir, "reading the write-ahead log", &error);
    let mut log = Log::default();
    let mut previous = 0;
    for (number, path) in files(dir).map_err(io)? {
        let read = |log: &mut Log| log.file(&mut File::open(&path)?);
        let mut verdict = read(&mut log);
        if matches!(verdict, Err(Bad::Missing(_)))
            && let Some(ask) = oldest_needed.take()
            && previous < ask()?
        {
            log = Log::default();
            verdict = read(&mut log);
        }
        match verdict {
            Ok(()) => previous = number,
            Err(Bad::Io(error)) => return Err(io(error)),
            Err(Bad::Damaged(what) | Bad::Missing(what)) => {
                let cause = format!("write-ahead log {number:06}.log: {what}");
                return Err(EngineError::Corrupt {
                    folder: dir.to_owned(),
                    cause,
                });
            }
        }
    }
    Ok(())
}

fn files(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let number = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .and_then(|stem| stem.parse::<u64>().ok());
        if let (Some(number), true) = (
            number,
            path.extension().is_some_and(|extension| extension == "log"),
        ) {
            files.push((number, path));
        }
    }
    files.sort();
    Ok(files)
}

#[derive(Debug)]
enum Bad {
    Io(io::Error),
    Damaged(String),
    /// Whole records are missing between the end of the file before and the beginning of this one.
    Missing(String),
}

impl From<io::Error> for Bad {
    fn from(error: io::Error) -> Self {
        Bad::Io(error)
    }
}

fn damaged<T>(at: u64, what: &str) -> Result<T, Bad> {
    Err(Bad::Damaged(format!("{what} at byte {at}")))
}

/// What stands at a place of a block.
enum Fragment<'a> {
    Whole {
        kind: Kind,
        payload: &'a [u8],
    },
    /// Longer than what is left.
    Short,
    Wrong(&'static str),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Full,
    First,
    Middle,
    Last,
    /// About the log itself; part of no record.
    Note,
}

fn fragment(bytes: &[u8]) -> Fragment<'_> {
    let [c0, c1, c2, c3, l0, l1, kind, ..] = *bytes else {
        return Fragment::Short;
    };
    // The types of recycled logs are missing on purpose: we never recycle.
    let kind = match kind {
        1 => Kind::Full,
        2 => Kind::First,
        3 => Kind::Middle,
        4 => Kind::Last,
        9 | 10 | 130 => Kind::Note,
        _ => return Fragment::Wrong("a fragment of an unknown type"),
    };
    let length = usize::from(u16::from_le_bytes([l0, l1]));
    let Some(payload) = bytes.get(HEADER..HEADER + length) else {
        return Fragment::Short;
    };
    // RocksDB stores checksums rotated and shifted, so that a checksum over a checksum is none of its own.
    let checksum = crc32c::crc32c(&bytes[HEADER - 1..HEADER + length])
        .rotate_right(15)
        .wrapping_add(0xa282_ead8);
    match checksum == u32::from_le_bytes([c0, c1, c2, c3]) {
        true => Fragment::Whole { kind, payload },
        false => Fragment::Wrong("a fragment with a wrong checksum"),
    }
}

/// What has been read so far, over all files.
#[derive(Default)]
struct Log {
    /// The sequence number that the next record may begin with at most.
    next: Option<u64>,
    /// Whether this file has shown a record.
    begun: bool,
}

/// A record that is being put together from its fragments.
#[derive(Default)]
struct Record {
    open: bool,
    head: Vec<u8>,
}

impl Log {
    fn file(&mut self, file: &mut impl Read) -> Result<(), Bad> {
        let mut block = vec![0; BLOCK];
        let mut record = Record::default();
        let mut start = 0;
        self.begun = false;
        loop {
            let filled = fill(file, &mut block)?;
            let rest = &block[..filled];
            let torn = self.block(rest, start, &mut record)?;
            if let Some(at) = torn {
                // Zeros up to the end are space that was given out and never written.
                if filled == BLOCK && !only_zeros(file)? {
                    return damaged(start + at as u64, "an unwritten stretch in the middle of the log");
                }
                return Ok(());
            }
            if filled < BLOCK {
                return Ok(());
            }
            start += BLOCK as u64;
        }
    }

    /// Reads one block, which is the last one when it is not full. Answers where the log ends early, if it
    /// does.
    fn block(&mut self, block: &[u8], start: u64, record: &mut Record) -> Result<Option<usize>, Bad> {
        let mut at = 0;
        // What does not fit a header at the end of a block is padding.
        while block.len() - at >= HEADER {
            let place = start + at as u64;
            match fragment(&block[at..]) {
                Fragment::Whole { kind, payload } => {
                    self.take(kind, payload, place, record)?;
                    at += HEADER + payload.len();
                }
                _ if block[at..].iter().all(|byte| *byte == 0) => return Ok(Some(at)),
                Fragment::Short if block.len() < BLOCK => {
                    let follows = (at + 1..block.len())
                        .any(|later| matches!(fragment(&block[later..]), Fragment::Whole { .. }));
                    return match follows {
                        true => damaged(
                            place,
                            "a fragment that is longer than the log, before one that is whole,",
                        ),
                        false => Ok(Some(at)),
                    };
                }
                Fragment::Short => return damaged(place, "a fragment that is longer than its block"),
                Fragment::Wrong(what) => return damaged(place, what),
            }
        }
        Ok(None)
    }

    fn take(&mut self, kind: Kind, payload: &[u8], place: u64, record: &mut Record) -> Result<(), Bad> {
        let starts = matches!(kind, Kind::Full | Kind::First);
        match kind {
            Kind::Note => return Ok(()),
            _ if starts == record.open => return damaged(place, "a fragment out of order"),
            _ => {}
        }
        if starts {
            record.head.clear();
        }
        let missing = BATCH_HEAD.saturating_sub(record.head.len());
        record
            .head
            .extend_from_slice(&payload[..missing.min(payload.len())]);
        record.open = matches!(kind, Kind::First | Kind::Middle);
        match record.open {
            true => Ok(()),
            false => self.sequence(&record.head, place),
        }
    }

    fn sequence(&mut self, head: &[u8], place: u64) -> Result<(), Bad> {
        let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3] = *head else {
            return damaged(place, "a record without a head");
        };
        let first = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let end = first.saturating_add(u64::from(u32::from_le_bytes([c0, c1, c2, c3])));
        let begun = std::mem::replace(&mut self.begun, true);
        if let Some(next) = self.next.filter(|next| first > *next) {
            let what = format!(
                "operations {next} to {} are missing before byte {place}",
                first - 1
            );
            return Err(if begun {
                Bad::Damaged(what)
            } else {
                Bad::Missing(what)
            });
        }
        self.next = Some(self.next.unwrap_or(0).max(end));
        Ok(())
    }
}

/// Fills `block` as far as the file goes.
fn fill(file: &mut impl Read, block: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match file.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn only_zeros(file: &mut impl Read) -> io::Result<bool> {
    let mut block = vec![0; BLOCK];
    loop {
        let filled = fill(file, &mut block)?;
        if block[..filled].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        if filled < BLOCK {
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests;
