//! The check against real logs, written by RocksDB: whole, torn, and with every byte of them damaged.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::{Batch, Engine, Family, Options, RocksEngine};

/// A log of `batches` batches as it stands on disk after the process was killed.
fn log(batches: u64, value_bytes: usize) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let engine = RocksEngine::open(dir.path(), Options::default()).unwrap();
    for number in 0..batches {
        let mut batch = Batch::new();
        batch.put(
            Family::Log,
            number.to_be_bytes().to_vec(),
            vec![number as u8; value_bytes],
        );
        batch.put(Family::Meta, "count", number.to_be_bytes().to_vec());
        engine.write(batch).unwrap();
    }
    let files = files(dir.path()).unwrap();
    assert_eq!(files.len(), 1);
    fs::read(&files[0].1).unwrap()
}

fn verdict(bytes: &[u8]) -> Result<(), String> {
    match Log::default().file(&mut &bytes[..]) {
        Ok(()) => Ok(()),
        Err(Bad::Damaged(what) | Bad::Missing(what)) => Err(what),
        Err(Bad::Io(error)) => panic!("{error}"),
    }
}

/// Where each fragment of a whole log begins.
fn fragments(bytes: &[u8]) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        match fragment(&bytes[at..]) {
            Fragment::Whole { payload, .. } if at % BLOCK + HEADER <= BLOCK => {
                starts.push(at);
                at += HEADER + payload.len();
            }
            _ => at = at.next_multiple_of(BLOCK).max(at + 1),
        }
    }
    starts
}

#[test]
fn whole_logs_of_all_sizes_are_accepted() {
    assert_eq!(verdict(b""), Ok(()));
    for value_bytes in [0, 10, 1000, BLOCK - 60, BLOCK, 3 * BLOCK + 5] {
        let bytes = log(40, value_bytes);
        assert!(fragments(&bytes).len() >= 40);
        assert_eq!(verdict(&bytes), Ok(()), "values of {value_bytes} bytes");
    }
}

#[test]
fn a_log_cut_anywhere_is_accepted() {
    let bytes = log(30, 50);
    for length in 0..bytes.len() {
        assert_eq!(verdict(&bytes[..length]), Ok(()), "cut to {length} bytes");
    }
    // Also where records span blocks, and when the rest of the space was given out and never written.
    let bytes = log(20, 5000);
    for length in (0..bytes.len()).step_by(37) {
        assert_eq!(verdict(&bytes[..length]), Ok(()), "cut to {length} bytes");
    }
    let end = bytes.len();
    let padded = [&bytes[..], &vec![0; 3 * BLOCK]].concat();
    assert_eq!(verdict(&padded), Ok(()));
    let again = [&padded[..], &bytes[..end]].concat();
    assert!(verdict(&again).is_err(), "records after an unwritten stretch");
}

#[test]
fn every_flipped_bit_is_seen_except_a_length_that_makes_the_last_record_look_torn() {
    let mut bytes = log(20, 40);
    let last = *fragments(&bytes).last().unwrap();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            if verdict(&bytes).is_ok() {
                assert!(
                    (last + 4..last + 6).contains(&at),
                    "bit {bit} of byte {at} went unnoticed"
                );
            }
            bytes[at] ^= 1 << bit;
        }
    }
}

#[test]
fn a_zeroed_stretch_and_a_missing_record_are_seen() {
    let bytes = log(60, 2000);
    let starts = fragments(&bytes);
    for (at, len) in [
        (0, 512),
        (4096, 4096),
        (starts[5], 100),
        (BLOCK, BLOCK),
        (BLOCK - 4096, 8192),
    ] {
        let mut zeroed = bytes.clone();
        zeroed[at..at + len].fill(0);
        assert!(verdict(&zeroed).is_err(), "{len} bytes zeroed at {at}");
    }
    // Two whole records of one size change the log's order without breaking a checksum.
    let bytes = log(20, 40);
    let starts = fragments(&bytes);
    let missing = [&bytes[..starts[8]], &bytes[starts[9]..]].concat();
    assert!(
        verdict(&missing).unwrap_err().contains("are missing"),
        "{:?}",
        verdict(&missing)
    );
}
