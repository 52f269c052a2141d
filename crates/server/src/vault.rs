//! The keys of this replica's authorities on disk, and what its listeners trust and show.
//!
//! What never lives here: plain keys (`palyra_control` seals them), and the decision what to install. Invariants:
//! each file is replaced as a whole; a crash at any point leaves a folder from which the replica starts: the
//! certificate of a new authority is written while its key is stored beside the old one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use palyra_control::{Installed, Vault};
use palyra_pki::{TrustBundle, TrustDomain, layout};

use crate::config::Config;
use crate::files::{self, FilesError};
use crate::tls::Tls;

/// [`Vault`] over the data folder and the listeners.
pub(crate) struct FileVault {
    dir: PathBuf,
    cluster_id: String,
    domain: TrustDomain,
    tls: Arc<Tls>,
}

impl std::fmt::Debug for FileVault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileVault({})", self.dir.display())
    }
}

impl FileVault {
    pub(crate) fn new(config: &Config, domain: TrustDomain, tls: Arc<Tls>) -> FileVault {
        FileVault {
            dir: config.replica.data_dir.clone(),
            cluster_id: config.replica.cluster_id.clone(),
            domain,
            tls,
        }
    }

    fn store(&self, installed: &Installed) -> Result<(), FilesError> {
        let roots = layout::certificates_to_pem(&installed.roots);
        update(&self.dir.join(layout::ROOT_CERT), roots.as_bytes(), 0o644)?;
        let own = layout::certificates_to_pem(&installed.own);
        let path = self.dir.join(layout::AUTHORITY_CERT);
        let before = files::first_certificate(&path)?;
        let before = palyra_pki::identity::spki_sha256(&before).ok();
        let name = installed.authority.key().spki_sha256();
        let key = self.dir.join(layout::AUTHORITY_KEY);
        if let Some(before) = before.filter(|before| *before != name) {
            // What the old authority issued is good still, and its list of revoked certificates has to be signed.
            self.save(&before, &files::read(&key)?)?;
            self.save(&name, &installed.key_sealed)?;
        }
        update(&path, own.as_bytes(), 0o644)?;
        if before != Some(name) {
            files::replace(&key, &installed.key_sealed, 0o600)?;
        }
        Ok(())
    }

    fn save(&self, name: &[u8; 32], sealed: &[u8]) -> Result<(), FilesError> {
        files::make_private_dir(&self.dir.join(layout::KEYS_DIR))?;
        files::replace(&files::key_path(&self.dir, name), sealed, 0o600)
    }
}

/// Replaces a file, unless it says the same already.
fn update(path: &Path, contents: &[u8], mode: u32) -> Result<(), FilesError> {
    if files::read(path).is_ok_and(|before| before == contents) {
        return Ok(());
    }
    files::replace(path, contents, mode)
}

impl Vault for FileVault {
    fn install(&self, installed: &Installed) -> Result<(), String> {
        self.store(installed).map_err(|error| error.to_string())?;
        let bundle = TrustBundle::new(&self.cluster_id, self.domain.clone(), installed.roots.clone())
            .map_err(|error| error.to_string())?
            .with_authorities(installed.authorities.clone());
        self.tls
            .install(Arc::clone(&installed.authority), installed.own.clone(), bundle)
            .map_err(|error| format!("{error:#}"))
    }

    fn save_key(&self, name: &[u8; 32], sealed: &[u8]) -> Result<(), String> {
        self.save(name, sealed).map_err(|error| error.to_string())
    }

    fn keys(&self) -> Result<Vec<Vec<u8>>, String> {
        let dir = self.dir.join(layout::KEYS_DIR);
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(format!("cannot read {}: {error}", dir.display())),
        };
        let mut keys = Vec::new();
        for entry in entries {
            let path = entry.map_err(|error| error.to_string())?.path();
            if path.extension().is_some_and(|end| end == "sealed") {
                keys.push(files::read(&path).map_err(|error| error.to_string())?);
            }
        }
        Ok(keys)
    }

    fn forget_key(&self, name: &[u8; 32]) -> Result<(), String> {
        files::remove(&files::key_path(&self.dir, name)).map_err(|error| error.to_string())
    }
}
