//! The addresses of peers in a local file that may be lost, and the only place that uses bincode.
//!
//! bincode has no schema and its encoding does not outlive a change of the type, so it serves for nothing
//! that matters: magic, schema number and SHA-256 stand in front, sizes are limited, and what does not fit is
//! ignored.

// A disposable cache is not durable data: it stays out of the engine on purpose.
#![allow(clippy::disallowed_methods)]

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use bincode::Options;
use sha2::{Digest, Sha256};

const MAGIC: &[u8; 8] = b"PALYPEER";
const SCHEMA: u16 = 1;
const LIMIT: u64 = 1024 * 1024;
/// Magic, schema, digest.
const HEADER: usize = 8 + 2 + 32;

fn options() -> impl Options {
    bincode::DefaultOptions::new()
        .with_limit(LIMIT)
        .with_fixint_encoding()
}

/// What the file holds, if it is ours and whole.
pub(super) fn load(file: &Path) -> Option<BTreeMap<u64, String>> {
    let size = std::fs::metadata(file).ok()?.len();
    if size > LIMIT + HEADER as u64 {
        return None;
    }
    decode(&std::fs::read(file).ok()?)
}

/// Replaces the file.
pub(super) fn store(file: &Path, entries: &BTreeMap<u64, String>) -> io::Result<()> {
    let payload = options().serialize(entries).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&SCHEMA.to_le_bytes());
    bytes.extend_from_slice(&Sha256::digest(&payload));
    bytes.extend_from_slice(&payload);
    let new = file.with_extension("new");
    std::fs::write(&new, bytes)?;
    std::fs::rename(&new, file)
}

fn decode(bytes: &[u8]) -> Option<BTreeMap<u64, String>> {
    let (header, payload) = bytes.split_at_checked(HEADER)?;
    let ours = header.starts_with(MAGIC) && header[8..10] == SCHEMA.to_le_bytes();
    if !ours || header[10..] != Sha256::digest(payload)[..] {
        return None;
    }
    options().deserialize(payload).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_found_and_damage_is_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("peers.cache");
        assert_eq!(load(&file), None);
        let entries = BTreeMap::from([(1, "127.0.0.1:7444".to_owned()), (2, "h2:7454".to_owned())]);
        store(&file, &entries).unwrap();
        assert_eq!(load(&file), Some(entries));
        let good = std::fs::read(&file).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert_eq!(decode(&bad), None, "byte {at}");
        }
        assert_eq!(decode(&good[..20]), None);
        std::fs::write(&file, vec![0; 2 * LIMIT as usize]).unwrap();
        assert_eq!(load(&file), None);
    }
}
