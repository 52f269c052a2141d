//! Where the other replicas can be reached, as far as this process knows.
//!
//! The truth is in the replicated state; whoever follows it writes it here. A copy on disk lets a restarted
//! replica find its peers before it has a leader. Addresses are no authority: the TLS handshake decides whom
//! one reached.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::peers_cache;

/// Addresses of peers, `host:port`, by replica id.
#[derive(Debug, Default)]
pub struct AddressBook {
    entries: Mutex<BTreeMap<u64, String>>,
    cache: Option<PathBuf>,
}

impl AddressBook {
    /// An empty book that is not kept on disk.
    #[must_use]
    pub fn new() -> Arc<AddressBook> {
        Arc::new(AddressBook::default())
    }

    /// A book that begins with what `file` holds, and keeps it up to date. A file that cannot be read is no
    /// error: the book is then empty, and the file is replaced by the next change.
    #[must_use]
    pub fn cached(file: PathBuf) -> Arc<AddressBook> {
        let entries = peers_cache::load(&file).unwrap_or_default();
        Arc::new(AddressBook {
            entries: Mutex::new(entries),
            cache: Some(file),
        })
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<u64, String>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a replica can be reached.
    #[must_use]
    pub fn get(&self, id: u64) -> Option<String> {
        self.entries().get(&id).cloned()
    }

    /// The whole book.
    #[must_use]
    pub fn all(&self) -> BTreeMap<u64, String> {
        self.entries().clone()
    }

    /// Sets one address. Connections to an older one are not used again.
    pub fn set(&self, id: u64, address: impl Into<String>) {
        let address = address.into();
        let mut entries = self.entries();
        if entries.get(&id) != Some(&address) {
            entries.insert(id, address);
            self.keep(&entries);
        }
    }

    /// Sets all addresses: replicas that are not named are forgotten.
    pub fn replace(&self, all: BTreeMap<u64, String>) {
        let mut entries = self.entries();
        if *entries != all {
            *entries = all;
            self.keep(&entries);
        }
    }

    fn keep(&self, entries: &BTreeMap<u64, String>) {
        if let Some(file) = &self.cache
            && let Err(error) = peers_cache::store(file, entries)
        {
            tracing::warn!(file = %file.display(), %error, "the cache of peer addresses cannot be written");
        }
    }
}
