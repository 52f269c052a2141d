//! The files of a data folder: reading what a replica starts from, and writing it once, when it joins.
//!
//! Names and contexts are `palyra_pki::layout`'s; the database is `storage`'s. Invariants: a file is replaced
//! as a whole (written aside, synced, renamed, folder synced); secrets are written with mode 0600 and a key
//! file that others may read is refused; `palyrad.toml` is written last, so a folder with it is complete.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use palyra_pki::{Authority, CaError, Kek, KeyPair, Purpose, TrustBundle, TrustDomain, layout};
use palyra_replica::transport::AddressBook;
use zeroize::Zeroizing;

use crate::config::Config;

/// No file that is read here is larger.
const MAX_FILE: u64 = 1 << 20;

/// Why a data folder can't be used; the text names path, cause and next step.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct FilesError(pub(crate) String);

/// What a replica starts from.
pub(crate) struct ReplicaFiles {
    /// The cluster's key encryption key.
    pub(crate) kek: Kek,
    /// This replica's issuing authority, with the first of its certificates.
    pub(crate) authority: Authority,
    /// Its certificates, DER: one for each root that trusts it.
    pub(crate) own: Vec<Vec<u8>>,
    /// The cluster's roots.
    pub(crate) trust: TrustBundle,
}

impl ReplicaFiles {
    /// Reads the files of the folder that the configuration names.
    pub(crate) fn load(config: &Config) -> Result<ReplicaFiles, FilesError> {
        let dir = &config.replica.data_dir;
        let kek_path = dir.join(layout::KEK);
        let text = secret_text(&kek_path)?;
        let kek = Kek::from_text(&text).map_err(|error| unusable(&kek_path, &error))?;
        let domain = TrustDomain::new(&config.replica.trust_domain)
            .map_err(|error| FilesError(format!("replica.trust_domain: {error}")))?;
        let root_path = dir.join(layout::ROOT_CERT);
        let roots = certificates(&root_path)?;
        let trust = TrustBundle::new(&config.replica.cluster_id, domain, roots)
            .map_err(|error| unusable(&root_path, &error))?;
        let open_key = |path: &Path| {
            let context = layout::authority_context(&config.replica.cluster_id, config.replica.id);
            let key = kek.open(Purpose::ReplicaKey, &context, &read(path)?).map_err(|error| {
                FilesError(format!(
                    "{} does not open with {}: {error}; put back the key file that belongs to this folder, and \
                     replica.id and replica.cluster_id as they were",
                    path.display(),
                    kek_path.display()
                ))
            })?;
            KeyPair::from_pkcs8(&key).map_err(|error| unusable(path, &error))
        };
        let key = open_key(&dir.join(layout::AUTHORITY_KEY))?;
        let certificate_path = dir.join(layout::AUTHORITY_CERT);
        let certificate = first_certificate(&certificate_path)?;
        let authority = match Authority::new(certificate.clone(), key) {
            // A rotation of the authority was cut off between its two files: the new key lies beside the old one.
            Err(CaError::KeyMismatch) => {
                let name = palyra_pki::identity::spki_sha256(&certificate)
                    .map_err(|error| unusable(&certificate_path, &error))?;
                Authority::new(certificate, open_key(&key_path(dir, &name))?)
            }
            other => other,
        };
        let authority = authority.map_err(|error| unusable(&certificate_path, &error))?;
        Ok(ReplicaFiles {
            kek,
            authority,
            own: certificates(&certificate_path)?,
            trust,
        })
    }
}

/// Where the sealed key of an authority is kept beside the one in use.
pub(crate) fn key_path(dir: &Path, name: &[u8; 32]) -> PathBuf {
    let name: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
    dir.join(layout::KEYS_DIR).join(format!("{name}.sealed"))
}

/// The first certificate of a PEM file.
pub(crate) fn first_certificate(path: &Path) -> Result<Vec<u8>, FilesError> {
    certificates(path)?.into_iter().next().ok_or_else(|| {
        FilesError(format!(
            "{} holds no certificate; restore it from a backup",
            path.display()
        ))
    })
}

/// What a joined replica's folder is made of, besides its configuration.
pub(crate) struct NewFiles<'a> {
    /// The cluster's key encryption key.
    pub(crate) kek: &'a Kek,
    /// The authority's key, sealed.
    pub(crate) authority_key_sealed: &'a [u8],
    /// The authority's certificate, DER.
    pub(crate) authority_cert: &'a [u8],
    /// The cluster's roots, DER.
    pub(crate) root_certs: &'a [Vec<u8>],
    /// Where the other replicas are, `host:port` by id.
    pub(crate) peers: BTreeMap<u64, String>,
    /// The configuration's text.
    pub(crate) config: &'a str,
}

impl NewFiles<'_> {
    /// Writes the folder, the configuration last. Safe to be repeated after a crash.
    pub(crate) fn store(&self, dir: &Path) -> Result<(), FilesError> {
        make_private_dir(dir)?;
        make_private_dir(&dir.join(layout::TLS_DIR))?;
        replace(&dir.join(layout::KEK), self.kek.to_text().as_bytes(), 0o600)?;
        replace(&dir.join(layout::AUTHORITY_KEY), self.authority_key_sealed, 0o600)?;
        let authority = layout::certificates_to_pem(&[self.authority_cert]);
        replace(&dir.join(layout::AUTHORITY_CERT), authority.as_bytes(), 0o644)?;
        let root = layout::certificates_to_pem(self.root_certs);
        replace(&dir.join(layout::ROOT_CERT), root.as_bytes(), 0o644)?;
        AddressBook::cached(dir.join(layout::PEERS)).replace(self.peers.clone());
        replace(&dir.join(layout::CONFIG), self.config.as_bytes(), 0o644)
    }
}

/// The lock of a data folder; held while the process lives, released by the kernel when it ends in whatever
/// way.
#[derive(Debug)]
pub(crate) struct FolderLock(
    #[allow(dead_code, reason = "holding the open file is what locks")] nix::fcntl::Flock<File>,
);

impl FolderLock {
    /// Takes the lock, or says which process has it.
    pub(crate) fn take(dir: &Path) -> Result<FolderLock, FilesError> {
        let path = dir.join(layout::LOCK);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| failed("open", &path, &error))?;
        let mut holder = String::new();
        let _ = file.read_to_string(&mut holder);
        match nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                let _ = lock.set_len(0).and_then(|()| {
                    io::Seek::rewind(&mut *lock)?;
                    lock.write_all(format!("{}\n", std::process::id()).as_bytes())
                });
                Ok(FolderLock(lock))
            }
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(FilesError(format!(
                "{} is in use by palyrad process {}; stop that one first, or give this one another folder",
                dir.display(),
                holder.trim()
            ))),
            Err((_, error)) => Err(FilesError(format!("cannot lock {}: {error}", path.display()))),
        }
    }
}

/// Refuses a folder whose replica has run and whose database is gone. Started afresh it would have forgotten its
/// votes and what it acknowledged, and could help to elect a leader that lacks committed entries.
pub(crate) fn refuse_lost_database(dir: &Path) -> Result<(), FilesError> {
    let db = dir.join(layout::DB);
    let holds_something = fs::read_dir(&db).is_ok_and(|mut entries| entries.next().is_some());
    if holds_something || !dir.join(layout::STARTED).exists() {
        return Ok(());
    }
    Err(FilesError(format!(
        "{} is gone or empty, but this replica has run before, and one that forgot its votes must not come \
         back under its id; put the database back, or remove the replica (`palyra cluster remove-replica \
         NAME`) and join with an empty folder (`palyrad join`)",
        db.display()
    )))
}

/// Notes that the folder's replica has a database from now on.
pub(crate) fn mark_started(dir: &Path) -> Result<(), FilesError> {
    let path = dir.join(layout::STARTED);
    if path.exists() {
        return Ok(());
    }
    replace(&path, b"", 0o600)
}

/// Makes a folder that only its owner may enter, durably; its parents too. One that exists is left as it is.
///
/// What is synced in a folder is lost with it when the power goes before its own name was synced.
pub(crate) fn make_private_dir(path: &Path) -> Result<(), FilesError> {
    let absent = path
        .ancestors()
        .filter(|folder| !folder.as_os_str().is_empty() && !folder.exists());
    let made: Vec<&Path> = absent.collect();
    let sync = || {
        if made.is_empty() {
            // One that was made before a crash may not have been synced then. A parent that this user may not read
            // is the system's own, and older than this.
            return sync_dir_of(path).or_else(|error| match error.kind() {
                io::ErrorKind::PermissionDenied => Ok(()),
                _ => Err(error),
            });
        }
        made.iter().rev().try_for_each(|folder| sync_dir_of(folder))
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .and_then(|()| sync())
        .map_err(|error| failed("make the folder", path, &error))
}

/// Replaces a file as a whole: a crash leaves the old one or the new one.
pub(crate) fn replace(path: &Path, contents: &[u8], mode: u32) -> Result<(), FilesError> {
    let write = || -> io::Result<()> {
        let aside = PathBuf::from(format!("{}.new", path.display()));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&aside)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&aside, path)?;
        sync_dir_of(path)
    };
    write().map_err(|error| failed("write", path, &error))
}

/// Removes a file for good; one that is absent already is fine.
pub(crate) fn remove(path: &Path) -> Result<(), FilesError> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir_of(path).map_err(|error| failed("remove", path, &error)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("remove", path, &error)),
    }
}

fn sync_dir_of(path: &Path) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    File::open(parent).and_then(|dir| dir.sync_all())
}

/// Reads a file of bounded size.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, FilesError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
        .map_err(|error| failed("read", path, &error))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(FilesError(format!(
            "{} is larger than {MAX_FILE} bytes; it is not what it should be",
            path.display()
        )));
    }
    Ok(bytes)
}

/// Reads a text file that nobody but its owner may read.
pub(crate) fn secret_text(path: &Path) -> Result<Zeroizing<String>, FilesError> {
    let mode = fs::metadata(path)
        .map_err(|error| failed("read", path, &error))?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        return Err(FilesError(format!(
            "{} can be read by others (mode {:03o}); run `chmod 600 {}`",
            path.display(),
            mode & 0o777,
            path.display()
        )));
    }
    let bytes = Zeroizing::new(read(path)?);
    let text = std::str::from_utf8(&bytes).map_err(|error| unusable(path, &error))?;
    Ok(Zeroizing::new(text.to_owned()))
}

fn certificates(path: &Path) -> Result<Vec<Vec<u8>>, FilesError> {
    let bytes = read(path)?;
    let parsed = std::str::from_utf8(&bytes)
        .ok()
        .and_then(layout::certificates_from_pem);
    parsed.ok_or_else(|| FilesError(format!("{} is no PEM; restore it from a backup", path.display())))
}

fn failed(what: &str, path: &Path, error: &io::Error) -> FilesError {
    let next = match error.kind() {
        io::ErrorKind::NotFound => {
            "; is this the folder of a replica? `palyra cluster init` or `palyrad join` make one"
        }
        io::ErrorKind::PermissionDenied => "; run palyrad as the owner of the folder",
        io::ErrorKind::StorageFull => "; free some space on the disk",
        _ => "",
    };
    FilesError(format!("cannot {what} {}: {error}{next}", path.display()))
}

fn unusable(path: &Path, error: &dyn std::error::Error) -> FilesError {
    FilesError(format!(
        "{} is unusable: {error}; restore it from a backup",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_locked_once() {
        let dir = tempfile::tempdir().unwrap();
        let lock = FolderLock::take(dir.path()).unwrap();
        let error = FolderLock::take(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(lock);
        FolderLock::take(dir.path()).unwrap();
    }

    #[test]
    fn a_replaced_file_is_whole_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        replace(&path, b"one", 0o600).unwrap();
        replace(&path, b"two", 0o600).unwrap();
        assert_eq!(secret_text(&path).unwrap().as_str(), "two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "nothing is left aside"
        );
        remove(&path).unwrap();
        remove(&path).unwrap();
    }

    #[test]
    fn a_replica_that_ran_does_not_start_without_its_database() {
        let dir = tempfile::tempdir().unwrap();
        refuse_lost_database(dir.path()).unwrap();
        make_private_dir(&dir.path().join(layout::DB)).unwrap();
        refuse_lost_database(dir.path()).unwrap();
        mark_started(dir.path()).unwrap();
        let error = refuse_lost_database(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("db is gone") && error.contains("palyrad join"),
            "{error}"
        );
        replace(&dir.path().join("db/CURRENT"), b"x", 0o600).unwrap();
        refuse_lost_database(dir.path()).unwrap();
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kek.key");
        replace(&path, b"x", 0o640).unwrap();
        let error = secret_text(&path).unwrap_err().to_string();
        assert!(
            error.contains("chmod 600") && error.contains("kek.key"),
            "{error}"
        );
    }
}
