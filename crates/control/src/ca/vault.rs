//! What an authority's rotation needs from outside: somebody who keeps keys, and somebody who shows certificates.
//!
//! What never lives here: files and sockets. Invariants: a key is durable before its certificate is proposed; keys
//! leave this replica for nobody, and are sealed before they reach a [`Vault`].

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use palyra_pki::ca::Described;
use palyra_pki::{Authority, KeyPair};
use tokio::sync::Notify;

use super::acks::Acks;

/// The SHA-256 of a key's subject public key info, by which keys are told apart.
pub(super) type KeyName = [u8; 32];

/// What this replica trusts and shows, as the state says.
#[derive(Debug, Clone)]
pub struct Installed {
    /// The step of the rotation that this is.
    pub step: u64,
    /// The trusted roots, DER, the one that signs first.
    pub roots: Vec<Vec<u8>>,
    /// The certificates of all authorities, DER: what chains may leave out.
    pub authorities: Vec<Vec<u8>>,
    /// The certificates of this replica's own authority, DER, one for each root that trusts it.
    pub own: Vec<Vec<u8>>,
    /// This replica's own authority.
    pub authority: Arc<Authority>,
    /// Its key, sealed.
    pub key_sealed: Vec<u8>,
}

/// Keeps keys durably, and puts trust and certificates in force.
pub trait Vault: Send + Sync + fmt::Debug {
    /// Stores all of it durably, and puts it in force for handshakes that begin from now on.
    ///
    /// # Errors
    /// A sentence about what went wrong; it is tried again.
    fn install(&self, installed: &Installed) -> Result<(), String>;

    /// Stores a sealed key durably, beside the others.
    ///
    /// # Errors
    /// As [`Vault::install`].
    fn save_key(&self, name: &[u8; 32], sealed: &[u8]) -> Result<(), String>;

    /// The sealed keys that are stored.
    ///
    /// # Errors
    /// As [`Vault::install`].
    fn keys(&self) -> Result<Vec<Vec<u8>>, String>;

    /// Removes a key that is no use any more.
    ///
    /// # Errors
    /// As [`Vault::install`].
    fn forget_key(&self, name: &[u8; 32]) -> Result<(), String>;
}

/// Keeps keys in memory and shows nothing: for a replica without files and sockets.
#[derive(Debug, Default)]
pub struct MemoryVault(Mutex<BTreeMap<KeyName, Vec<u8>>>);

impl MemoryVault {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<KeyName, Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vault for MemoryVault {
    fn install(&self, _installed: &Installed) -> Result<(), String> {
        Ok(())
    }

    fn save_key(&self, name: &KeyName, sealed: &[u8]) -> Result<(), String> {
        self.lock().insert(*name, sealed.to_vec());
        Ok(())
    }

    fn keys(&self) -> Result<Vec<Vec<u8>>, String> {
        Ok(self.lock().values().cloned().collect())
    }

    fn forget_key(&self, name: &KeyName) -> Result<(), String> {
        self.lock().remove(name);
        Ok(())
    }
}

/// The keys of this replica's authorities, and what is in force.
pub(crate) struct Authorities {
    pub(super) vault: Arc<dyn Vault>,
    pub(super) inside: RwLock<Inside>,
    pub(super) acks: Mutex<Acks>,
    /// There is something to write down.
    pub(super) wake: Notify,
    /// What the certificates say that were looked at: every pass asks about the same few. By their DER.
    described: Mutex<BTreeMap<Vec<u8>, Described>>,
}

/// Certificates of which it is remembered what they say.
const REMEMBERED: usize = 256;

/// What changes.
#[derive(Default)]
pub(super) struct Inside {
    /// All keys, sealed and open, by name; filled at the first look.
    pub(super) keys: Option<BTreeMap<KeyName, HeldKey>>,
    /// The authority that issues, and its number.
    pub(super) issuing: Option<(u32, Arc<Authority>)>,
    pub(super) installed: Option<Installed>,
    /// A key that was made and is not in the state yet.
    pub(super) pending: Option<KeyName>,
}

/// A key, in both forms.
pub(super) struct HeldKey {
    pub(super) key: Arc<KeyPair>,
    pub(super) sealed: Vec<u8>,
}

impl fmt::Debug for Authorities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authorities")
    }
}

impl Authorities {
    pub(crate) fn new(vault: Arc<dyn Vault>) -> Authorities {
        Authorities {
            vault,
            inside: RwLock::new(Inside::default()),
            acks: Mutex::new(Acks::default()),
            wake: Notify::new(),
            described: Mutex::default(),
        }
    }

    /// What the certificate of an authority says, if it can be read.
    pub(super) fn describe(&self, der: &[u8]) -> Option<Described> {
        let mut known = self.described.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(described) = known.get(der) {
            return Some(described.clone());
        }
        let described = palyra_pki::ca::describe(der).ok()?;
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(der.to_vec(), described.clone());
        Some(described)
    }

    /// The name of the key in a certificate.
    pub(super) fn key_of(&self, der: &[u8]) -> Option<KeyName> {
        self.describe(der).map(|described| described.spki_sha256)
    }

    pub(super) fn read(&self) -> std::sync::RwLockReadGuard<'_, Inside> {
        self.inside.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> std::sync::RwLockWriteGuard<'_, Inside> {
        self.inside.write().unwrap_or_else(PoisonError::into_inner)
    }
}
