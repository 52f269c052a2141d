//! What can go wrong with a disk, said so that the reader knows which folder, why, and what to do next.
//!
//! Never here: retrying. No error of this crate goes away by calling again in the same process, except
//! [`EngineError::TooLarge`], which changes nothing.

use std::path::{Path, PathBuf};

/// The result of everything that touches an engine.
pub type Result<T, E = EngineError> = std::result::Result<T, E>;

/// Why an engine refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The operating system failed a read, a write or a sync.
    #[error(
        "{}: {during} failed: {cause}; check the disk (`dmesg`, `smartctl -a`) and the folder's \
         permissions, then start this replica again",
        .folder.display()
    )]
    Io {
        /// The data folder.
        folder: PathBuf,
        /// What was being done.
        during: &'static str,
        /// What the operating system said.
        cause: String,
    },
    /// The folder's content contradicts itself. Serving it could un-acknowledge what was acknowledged.
    #[error(
        "{}: the data is damaged: {cause}; do not repair it by hand: keep the folder aside, remove \
         this replica from the cluster, and let it join again with an empty folder (`palyrad join`)",
        .folder.display()
    )]
    Corrupt {
        /// The data folder.
        folder: PathBuf,
        /// What was found.
        cause: String,
    },
    /// No space is left on the device.
    #[error(
        "{}: {during} failed: no space is left on the device; free some (`df -h {}`), then \
         start this replica again",
        .folder.display(), .folder.display()
    )]
    Full {
        /// The data folder.
        folder: PathBuf,
        /// What was being done.
        during: &'static str,
    },
    /// An earlier write or sync failed; this process must not use the folder any more.
    #[error("{}: closed after an earlier failure ({cause}); restart this replica", .folder.display())]
    Poisoned {
        /// The data folder.
        folder: PathBuf,
        /// The first failure.
        cause: String,
    },
    /// Another process has the folder open.
    #[error(
        "{}: another process has this folder open; a replica needs a folder of its own: stop the other one \
         (`fuser {}/FORMAT` names it), or give this one another data_dir",
        .folder.display(), .folder.display()
    )]
    Locked {
        /// The data folder.
        folder: PathBuf,
    },
    /// The folder was written by a later release.
    #[error(
        "{}: the data has format {found}, this release knows formats up to {known}; start the \
         release that wrote it, or a later one",
        .folder.display()
    )]
    Future {
        /// The data folder.
        folder: PathBuf,
        /// The folder's format.
        found: u64,
        /// The newest format that this release reads and writes.
        known: u64,
    },
    /// The batch is beyond [`crate::MAX_BATCH_BYTES`]. Nothing was written and the engine goes on.
    #[error("a batch of {bytes} bytes is over the limit of {limit} bytes; split it")]
    TooLarge {
        /// The size of the batch, keys and values.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
}

impl EngineError {
    /// Tells a full disk from other failures of the operating system.
    pub(crate) fn from_io(folder: &Path, during: &'static str, error: &std::io::Error) -> Self {
        let folder = folder.to_owned();
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                EngineError::Full { folder, during }
            }
            _ => EngineError::Io {
                folder,
                during,
                cause: error.to_string(),
            },
        }
    }
}
