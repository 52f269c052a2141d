//! What this worker has of leases, on disk: one record a lease, from before its folder is made until the
//! control plane has taken both the result and the word that it is clean.
//!
//! What never lives here: folders of leases themselves (see `place`). Invariants: a record is on disk before
//! anything of its lease is; a result is on disk before it is sent, under the request id that it keeps; what
//! a record says is at most what there is, so that whoever cleans up after a crash looks at everything.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::folder;
use crate::home::write_atomic;
use crate::{Error, Kind, Result};

/// A lease that this worker has something of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) lease_id: String,
    pub(crate) fence: u64,
    pub(crate) run_id: String,
    /// Control groups that may be there.
    pub(crate) groups: Vec<PathBuf>,
    /// An encoded `LeaseFinish` that was not answered, hex.
    #[serde(default)]
    pub(crate) finish: Option<String>,
    /// It is clean, and nothing of it is left; the control plane may not know.
    #[serde(default)]
    pub(crate) clean: bool,
    /// Request id of that word.
    #[serde(default)]
    pub(crate) cleaned_id: String,
    /// Why the last cleanup failed.
    #[serde(default)]
    pub(crate) unclean: String,
    #[serde(default)]
    pub(crate) removed_files: u64,
    #[serde(default)]
    pub(crate) removed_bytes: u64,
}

/// The folder of records.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    dir: PathBuf,
}

impl Store {
    /// Opens it below the node's folder, making it.
    pub(crate) fn open(home: &Path) -> Result<Self> {
        let dir = home.join("worker/records");
        folder::make(&dir, 0o700).map_err(|error| Error::io("make", &dir, &error))?;
        Ok(Self { dir })
    }

    fn path(&self, lease_id: &str) -> PathBuf {
        self.dir.join(format!("{lease_id}.json"))
    }

    /// Writes a record; it is on disk on return.
    pub(crate) fn put(&self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec(record).map_err(|error| {
            let message = format!(
                "the record of the lease {} cannot be encoded: {error}",
                record.lease_id
            );
            Error::new(Kind::Internal, "N0001", message, "")
        })?;
        write_atomic(&self.path(&record.lease_id), &text, 0o600)
    }

    /// Forgets one. Losing this is harmless: it is said to be clean once more.
    pub(crate) fn forget(&self, lease_id: &str) -> Result<()> {
        let path = self.path(lease_id);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", &path, &error))
            }
            _ => Ok(()),
        }
    }

    /// All of them.
    ///
    /// Errors: one that is damaged: nothing may be said of that lease, so nothing is begun.
    pub(crate) fn all(&self) -> Result<BTreeMap<String, Record>> {
        let mut all = BTreeMap::new();
        let listed = std::fs::read_dir(&self.dir).map_err(|error| Error::io("read", &self.dir, &error))?;
        for entry in listed.filter_map(std::result::Result::ok) {
            let path = entry.path();
            if path.extension().is_none_or(|ending| ending != "json") {
                continue;
            }
            let text = std::fs::read(&path).map_err(|error| Error::io("read", &path, &error))?;
            let record: Record =
                serde_json::from_slice(&text).map_err(|error| damaged(&path, &error.to_string()))?;
            if path.file_stem().and_then(|stem| stem.to_str()) != Some(record.lease_id.as_str()) {
                return Err(damaged(&path, "it is of another lease"));
            }
            all.insert(record.lease_id.clone(), record);
        }
        Ok(all)
    }
}

fn damaged(path: &Path, why: &str) -> Error {
    let message = format!("the record {} is damaged: {why}", path.display());
    let next = "see that nothing of that lease runs, move the file away and start again; the lease's cleanup is then \
                the operator's to vouch for: palyra worker cleanup --force";
    Error::new(Kind::Internal, "N1005", message, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_a_damaged_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let record = Record {
            lease_id: "L1".to_owned(),
            fence: 7,
            ..Record::default()
        };
        store.put(&record).unwrap();
        assert_eq!(store.all().unwrap().get("L1"), Some(&record));
        std::fs::copy(store.path("L1"), store.path("L2")).unwrap();
        assert_eq!(
            store.all().unwrap_err().code,
            "N1005",
            "a copy is of another lease"
        );
        store.forget("L2").unwrap();
        store.forget("L1").unwrap();
        assert!(store.all().unwrap().is_empty());
        std::fs::write(store.path("L3"), "{").unwrap();
        assert!(store.all().unwrap_err().message.contains("L3.json"));
    }
}
