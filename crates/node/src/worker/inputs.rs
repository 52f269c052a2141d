//! The files of a run: where they come from and go to, and that they are what they should be.
//!
//! What never lives here: the session that carries them (a closure does). Invariants: no input is used before
//! its digest and size were compared; pieces are written in order, each once; an output that changed while it
//! was sent is not sent.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use palyra_proto::run::v1::{Manifest, ManifestEntry};

use super::folder::{self, Output};

/// Pieces of a file; see `palyra_state::limits::ARTIFACT_CHUNK`.
pub(crate) const CHUNK: usize = 256 * 1024;
/// See `palyra_state::limits::ARTIFACT_MAX`.
const FILE_MAX: u64 = 4 << 20;
/// See `palyra_state::limits::ARTIFACTS_OF_RUN`.
const ALL_MAX: u64 = 8 << 20;

/// Where an input of this path goes, below the working folder: always in `in`.
pub(crate) fn input_path(path: &str) -> Result<PathBuf, String> {
    let path = folder::relative(path)?;
    let inside = path.strip_prefix("in").unwrap_or(&path).to_path_buf();
    if inside.as_os_str().is_empty() {
        return Err(format!("the path {:?} names no file", path.display().to_string()));
    }
    Ok(Path::new("in").join(inside))
}

/// A file that is being fetched.
pub(crate) struct Fetched {
    file: File,
    path: PathBuf,
    entry: ManifestEntry,
    offset: u64,
}

impl Fetched {
    /// Begins one below the working folder.
    pub(crate) fn begin(work: &Path, entry: &ManifestEntry) -> Result<Self, String> {
        let path = work.join(input_path(&entry.path)?);
        let mode = if entry.executable { 0o500 } else { 0o400 };
        let file = folder::create(&path, mode).map_err(|error| format!("{}: {error}", path.display()))?;
        let entry = entry.clone();
        Ok(Self {
            file,
            path,
            entry,
            offset: 0,
        })
    }

    /// Where the next piece begins; nothing when all are there.
    pub(crate) fn next(&self) -> Option<u64> {
        (self.offset < self.entry.size).then_some(self.offset)
    }

    /// Takes a piece.
    pub(crate) fn take(&mut self, offset: u64, piece: &[u8]) -> Result<(), String> {
        let fits =
            offset == self.offset && !piece.is_empty() && offset + piece.len() as u64 <= self.entry.size;
        if !fits {
            return Err(format!(
                "the input {} came in pieces that do not fit",
                self.entry.path
            ));
        }
        let written = self.file.write_all(piece);
        written.map_err(|error| format!("{}: {error}", self.path.display()))?;
        self.offset += piece.len() as u64;
        Ok(())
    }

    /// Compares it.
    pub(crate) fn finish(self) -> Result<(), String> {
        let mut file = File::open(&self.path).map_err(|error| format!("{}: {error}", self.path.display()))?;
        compare(&mut file, &self.entry)
    }
}

/// Compares a file with its entry.
fn compare(file: &mut File, entry: &ManifestEntry) -> Result<(), String> {
    let (digest, size) = folder::hash(file).map_err(|error| format!("the input {}: {error}", entry.path))?;
    if size != entry.size || digest != entry.digest.as_ref() {
        let is = hex::encode(digest);
        return Err(format!(
            "the input {} is not what its manifest says: {size} bytes, SHA-256 {is}",
            entry.path
        ));
    }
    Ok(())
}

/// An input that is not kept in the cluster must lie in the workspace.
pub(crate) fn in_place(workspace: &Path, entry: &ManifestEntry) -> Result<(), String> {
    let path = folder::relative(&entry.path)?;
    let failed =
        |error: std::io::Error| format!("the input {} in {}: {error}", entry.path, workspace.display());
    let dir = folder::open_dir(workspace).map_err(failed)?;
    let mut file = folder::open_below(&dir, &path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(format!("the input {} is no plain file", entry.path));
    }
    compare(&mut file, entry)
}

/// The manifest of outputs: which of them are to be sent, within what the cluster keeps.
pub(crate) fn manifest(outputs: &[Output]) -> Manifest {
    let mut all = 0u64;
    let mut seen = std::collections::BTreeSet::new();
    let entries = outputs.iter().map(|output| {
        let more = if seen.contains(&output.digest) {
            0
        } else {
            output.size
        };
        let stored = output.size > 0 && output.size <= FILE_MAX && all + more <= ALL_MAX;
        if stored {
            all += more;
            seen.insert(output.digest);
        }
        ManifestEntry {
            path: output.path.clone(),
            digest: output.digest.to_vec().into(),
            size: output.size,
            stored,
            executable: output.executable,
        }
    });
    Manifest {
        entries: entries.collect(),
    }
}

/// One piece of an output.
pub(crate) fn piece(out: &Path, entry: &ManifestEntry, offset: u64) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("the output {}: {error}", entry.path);
    let dir = folder::open_dir(out).map_err(failed)?;
    let mut file = folder::open_below(&dir, Path::new(&entry.path)).map_err(failed)?;
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    let mut piece = Vec::new();
    file.take(CHUNK as u64).read_to_end(&mut piece).map_err(failed)?;
    Ok(piece)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, bytes: &[u8]) -> ManifestEntry {
        ManifestEntry {
            path: path.to_owned(),
            digest: palyra_pki::sha256(bytes).to_vec().into(),
            size: bytes.len() as u64,
            stored: true,
            executable: false,
        }
    }

    #[test]
    fn an_input_is_what_its_manifest_says_or_it_is_none() {
        let work = tempfile::tempdir().unwrap();
        let mut fetched = Fetched::begin(work.path(), &entry("a/b", b"12345")).unwrap();
        fetched.take(0, b"123").unwrap();
        assert_eq!(fetched.next(), Some(3));
        assert!(
            fetched.take(0, b"12").is_err()
                && fetched.take(3, b"456").is_err()
                && fetched.take(3, b"").is_err()
        );
        fetched.take(3, b"45").unwrap();
        assert_eq!(fetched.next(), None);
        fetched.finish().unwrap();
        assert_eq!(std::fs::read(work.path().join("in/a/b")).unwrap(), b"12345");
        let mut forged = Fetched::begin(work.path(), &entry("in/c", b"12345")).unwrap();
        forged.take(0, b"12346").unwrap();
        assert!(
            forged
                .finish()
                .unwrap_err()
                .contains("not what its manifest says")
        );
        assert!(Fetched::begin(work.path(), &entry("../x", b"")).is_err());
        assert!(Fetched::begin(work.path(), &entry("in", b"")).is_err());
        Fetched::begin(work.path(), &entry("empty", b""))
            .unwrap()
            .finish()
            .unwrap();
    }

    #[test]
    fn inputs_in_a_workspace_are_not_reached_through_links() {
        let space = tempfile::tempdir().unwrap();
        std::fs::write(space.path().join("file"), "x").unwrap();
        in_place(space.path(), &entry("file", b"x")).unwrap();
        assert!(in_place(space.path(), &entry("file", b"y")).is_err());
        std::os::unix::fs::symlink("file", space.path().join("link")).unwrap();
        assert!(in_place(space.path(), &entry("link", b"x")).is_err());
    }

    #[test]
    fn what_is_too_large_is_listed_and_not_sent() {
        let output = |path: &str, digest: u8, size: u64| Output {
            path: path.to_owned(),
            digest: [digest; 32],
            size,
            executable: false,
        };
        let outputs = [
            output("a", 1, 4 << 20),
            output("b", 2, 5 << 20),
            output("c", 3, 3 << 20),
            output("d", 4, 2 << 20),
            output("e", 1, 4 << 20),
            output("f", 5, 0),
        ];
        let stored: Vec<bool> = manifest(&outputs)
            .entries
            .iter()
            .map(|entry| entry.stored)
            .collect();
        assert_eq!(stored, [true, false, true, false, true, false]);
    }
}
