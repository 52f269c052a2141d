//! The node's data folder: what is in it, how it is written, and how a wrong folder is told apart from a
//! right one.
//!
//! ```text
//! PALYRA-NODE              marks the folder; holds its form
//! node.toml                the owner's: name, labels, capability files
//! identity/credential.json key, certificates, roots, replicas (0600); replaced as a whole
//! identity/next.json       a renewed credential that hasn't been used yet (0600)
//! identity/renewal.json    the counter of renewals, and the key of one that was not answered yet (0600)
//! identity/node.json       device id, name, known replicas
//! identity/pending.json    a pairing that waits for the operator (0600)
//! ledger/ledger.log        dispatches begun and results owed
//! logs/agent.log           output of the background process
//! worker/records/          leases that this worker has something of
//! worker/leases/           their folders
//! run/                     lock, process id and socket of the running agent
//! ```
//!
//! Invariants: every file is written to a temporary one, synced, renamed, and the folder synced; secrets are
//! readable by their owner only, from the moment they exist; a folder without the mark is only taken when it
//! is empty.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use palyra_pki::Credential;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Error, Kind, Result};

const MARK: &str = "PALYRA-NODE";
const FORM: &str = "palyra node data folder, form 1\n";
const FORM_START: &str = "palyra node data folder, form ";
const MAX_FILE: u64 = 1 << 20;
const EXAMPLE: &str = "\
# What this node is called and what it may do. Read when the agent starts: palyra node restart
# name = \"web-1\"
# labels = { site = \"brno\" }
# capabilities = [\"capabilities.toml\"]
# lost_after = \"24h\"   # away for longer, it is gone and nothing waits for it; or \"never\"
# transport = \"auto\"   # QUIC, and gRPC where UDP does not get through; or quic, or grpc
# [worker]               # run other people's work: docs/workers.md
";

/// A replica as this node knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownReplica {
    /// Its id; 0 when it isn't known.
    pub replica_id: u64,
    /// Where nodes connect, `host:port`.
    pub node_addr: String,
    /// Where machines enrol, `host:port`; may be empty.
    pub enrol_addr: String,
    /// Where nodes connect over QUIC, `host:port`, UDP; empty when it isn't known or it has none.
    #[serde(default)]
    pub quic_addr: String,
}

/// Who this node is, apart from its secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The device id, a ULID.
    pub device_id: String,
    /// The name that the operator saw when the node was paired.
    pub name: String,
    /// The cluster's id.
    pub cluster_id: String,
    /// The replicas that were last heard of; never empty.
    pub replicas: Vec<KnownReplica>,
}

/// The owner's `node.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// The node's name; the host name when absent.
    pub name: Option<String>,
    /// Labels, for operators to select by.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Capability files, relative to the data folder.
    #[serde(default)]
    pub capabilities: Vec<PathBuf>,
    /// How long the node may be away before it counts as gone: `24h`, `30d`, `never`.
    #[serde(default)]
    pub lost_after: Option<String>,
    /// How many dispatches run at a time, of all capabilities; absent: 256 at most.
    pub concurrency: Option<u32>,
    /// How many dispatches may wait for this node; absent: 1024 at most.
    pub queue_limit: Option<u32>,
    /// What carries the sessions: `auto`, `quic` or `grpc`; `auto` when absent.
    pub transport: Option<String>,
    /// What makes this node a worker.
    pub worker: Option<crate::worker::config::Config>,
}

/// A node's data folder that was checked to be one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    dir: PathBuf,
}

/// `$XDG_DATA_HOME/palyra/node`, or `~/.local/share/palyra/node`.
pub fn default_dir() -> PathBuf {
    let base = std::env::var_os("XDG_DATA_HOME")
        .filter(|value| !value.is_empty())
        .map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/".into())).join(".local/share");
    base.unwrap_or_else(home).join("palyra/node")
}

impl Home {
    /// Opens the folder, making it when it doesn't exist or is empty.
    ///
    /// Errors: a folder with something else in it, one of a newer release, no permission.
    pub fn create(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            make_dir(dir)?;
            // A power loss must not take the whole folder, and with it the key of a node that was approved.
            sync_parents(dir)?;
        }
        if !dir.join(MARK).exists() {
            let mut entries = std::fs::read_dir(dir).map_err(|error| Error::io("read", dir, &error))?;
            if let Some(first) = entries
                .find_map(|entry| entry.ok())
                .filter(|entry| !is_own_temporary(entry))
            {
                return Err(foreign(
                    dir,
                    &format!("it holds {}", first.file_name().to_string_lossy()),
                ));
            }
            for name in ["identity", "ledger", "logs", "run"] {
                make_dir(&dir.join(name))?;
            }
            write_atomic(&dir.join("node.toml"), EXAMPLE.as_bytes(), 0o644)?;
            // The mark comes last: with it the folder is complete.
            write_atomic(&dir.join(MARK), FORM.as_bytes(), 0o644)?;
        }
        Self::open(dir)
    }

    /// Opens a folder that exists.
    ///
    /// Errors: no such folder, not a node's folder, one of a newer release, one with parts missing.
    pub fn open(dir: &Path) -> Result<Self> {
        let mark = dir.join(MARK);
        let text = match std::fs::read_to_string(&mark) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(absent(dir)),
            Err(error) => return Err(Error::io("read", &mark, &error)),
        };
        if text != FORM {
            return Err(match text.strip_prefix(FORM_START) {
                Some(form) => Error::new(
                    Kind::Precondition,
                    "N0103",
                    format!(
                        "{} is a node's data folder of form {}, this release knows form 1",
                        dir.display(),
                        form.trim()
                    ),
                    "update this program, or choose another folder with --data-dir",
                ),
                None => foreign(dir, &format!("its {MARK} file says something else")),
            });
        }
        let dir = std::fs::canonicalize(dir).map_err(|error| Error::io("find", dir, &error))?;
        for name in ["identity", "ledger", "logs", "run"] {
            make_dir(&dir.join(name))?;
        }
        Ok(Self { dir })
    }

    /// The folder, absolute.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the background process writes.
    pub fn log_file(&self) -> PathBuf {
        self.dir.join("logs/agent.log")
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    pub(crate) fn ledger_dir(&self) -> PathBuf {
        self.dir.join("ledger")
    }

    /// Reads `node.toml`; all defaults when it isn't there. Errors name file and line.
    pub fn config(&self) -> Result<NodeConfig> {
        let path = self.dir.join("node.toml");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(NodeConfig::default()),
            Err(error) => return Err(Error::io("read", &path, &error)),
        };
        let mut config: NodeConfig = toml::from_str(&text).map_err(|error| {
            let line = error
                .span()
                .map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            let message = format!("{}:{line}: {}", path.display(), error.message().trim());
            Error::new(
                Kind::Usage,
                "N0303",
                message,
                "correct the file, then: palyra node restart",
            )
        })?;
        config.worker = config
            .worker
            .map(|worker| worker.checked(&self.dir))
            .transpose()?;
        for file in &mut config.capabilities {
            *file = self.dir.join(&*file);
        }
        Ok(config)
    }

    /// Who this node is. `None` before the first pairing.
    pub fn record(&self) -> Result<Option<NodeRecord>> {
        self.read_json("identity/node.json")
    }

    /// Stores who this node is.
    pub(crate) fn set_record(&self, record: &NodeRecord) -> Result<()> {
        self.write_json("identity/node.json", record, 0o644)
    }

    /// The credential in use. `None` before the first pairing.
    pub fn credential(&self) -> Result<Option<Credential>> {
        self.read_credential("identity/credential.json")
    }

    /// A renewed credential that hasn't proved itself yet.
    pub(crate) fn next_credential(&self) -> Result<Option<Credential>> {
        self.read_credential("identity/next.json")
    }

    /// Stores the credential in use, or the renewed one.
    pub(crate) fn set_credential(&self, credential: &Credential, next: bool) -> Result<()> {
        let name = if next {
            "identity/next.json"
        } else {
            "identity/credential.json"
        };
        let text = credential.to_json().map_err(|error| {
            Error::new(
                Kind::Internal,
                "N0001",
                format!("the credential cannot be written: {error}"),
                "",
            )
        })?;
        write_atomic(&self.dir.join(name), text.as_bytes(), 0o600)
    }

    /// The renewed credential worked: from now on it is the one in use.
    pub(crate) fn promote_credential(&self) -> Result<()> {
        let (from, to) = (
            self.dir.join("identity/next.json"),
            self.dir.join("identity/credential.json"),
        );
        std::fs::rename(&from, &to).map_err(|error| Error::io("replace", &to, &error))?;
        sync_parent(&to)
    }

    /// The renewed credential didn't work.
    pub(crate) fn drop_next_credential(&self) -> Result<()> {
        self.remove("identity/next.json")
    }

    pub(crate) fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.read_text(name)? else {
            return Ok(None);
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| self.broken(name, &error.to_string()))
    }

    pub(crate) fn write_json<T: Serialize>(&self, name: &str, value: &T, mode: u32) -> Result<()> {
        let text = serde_json::to_vec_pretty(value).map_err(|error| {
            Error::new(
                Kind::Internal,
                "N0001",
                format!("cannot encode {name}: {error}"),
                "",
            )
        })?;
        write_atomic(&self.dir.join(name), &text, mode)
    }

    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        let path = self.dir.join(name);
        match std::fs::remove_file(&path) {
            Ok(()) => sync_parent(&path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io("remove", &path, &error)),
        }
    }

    fn read_credential(&self, name: &str) -> Result<Option<Credential>> {
        let Some(text) = self.read_text(name)? else {
            return Ok(None);
        };
        Credential::from_json(&text)
            .map(Some)
            .map_err(|error| self.broken(name, &error.to_string()))
    }

    fn read_text(&self, name: &str) -> Result<Option<zeroize::Zeroizing<String>>> {
        let path = self.dir.join(name);
        match std::fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &path, &error)),
            Ok(meta) if meta.len() > MAX_FILE => return Err(self.broken(name, "it is far too large")),
            Ok(_) => {}
        }
        let text = std::fs::read_to_string(&path).map_err(|error| Error::io("read", &path, &error))?;
        Ok(Some(zeroize::Zeroizing::new(text)))
    }

    fn broken(&self, name: &str, why: &str) -> Error {
        Error::new(
            Kind::Precondition,
            "N0104",
            format!("{} is broken: {why}", self.dir.join(name).display()),
            "restore the file from a copy, or pair again: palyra node pair --replace",
        )
    }
}

fn absent(dir: &Path) -> Error {
    let empty = std::fs::read_dir(dir)
        .map(|mut entries| entries.next().is_none())
        .unwrap_or(true);
    if empty {
        let message = format!("there is no node in {}", dir.display());
        return Error::new(
            Kind::Precondition,
            "N0101",
            message,
            "pair this machine first: palyra node pair",
        );
    }
    foreign(dir, &format!("it has no {MARK} file"))
}

fn foreign(dir: &Path, why: &str) -> Error {
    let message = format!("{} is not a node's data folder: {why}", dir.display());
    Error::new(
        Kind::Precondition,
        "N0102",
        message,
        "choose an empty or new folder with --data-dir",
    )
}

/// Left by a crash between making and renaming.
fn is_own_temporary(entry: &std::fs::DirEntry) -> bool {
    let name = entry.file_name();
    let name = name.to_string_lossy();
    name.ends_with(".tmp") || ["identity", "ledger", "logs", "run", "node.toml"].contains(&name.as_ref())
}

fn make_dir(dir: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| Error::io("make", dir, &error))
}

/// Writes a whole file so that after a crash either the old or the new one is there: temporary file, sync,
/// rename, sync of the folder.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let write = || -> io::Result<()> {
        // A leftover could have other permissions: the mode of `open` only counts for a new file.
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|error| Error::io("write", path, &error))?;
    sync_parent(path)
}

pub(crate) fn open_append(path: &Path) -> Result<File> {
    let opened = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path);
    opened.map_err(|error| Error::io("open", path, &error))
}

/// Syncs every folder above `dir`: some of them may be as new as it is.
fn sync_parents(dir: &Path) -> Result<()> {
    let dir = std::fs::canonicalize(dir).map_err(|error| Error::io("find", dir, &error))?;
    for parent in dir.ancestors().skip(1) {
        match File::open(parent).and_then(|opened| opened.sync_all()) {
            // Not ours to read, so not ours to have made.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => return Err(Error::io("sync", parent, &error)),
            Ok(()) => {}
        }
    }
    Ok(())
}

fn sync_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let synced = File::open(parent).and_then(|dir| dir.sync_all());
    synced.map_err(|error| Error::io("sync", parent, &error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_new_folder_is_made_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        assert_eq!(Home::open(&path).unwrap_err().code, "N0101");
        let home = Home::create(&path).unwrap();
        assert_eq!(Home::open(&path).unwrap(), home);
        assert_eq!(
            home.config().unwrap(),
            NodeConfig::default(),
            "the example is all comments"
        );
        assert_eq!(
            (home.record().unwrap(), home.credential().unwrap().is_none()),
            (None, true)
        );
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o700
        );
    }

    #[test]
    fn foreign_and_future_folders_are_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("photos.zip"), "x").unwrap();
        for error in [
            Home::create(dir.path()).unwrap_err(),
            Home::open(dir.path()).unwrap_err(),
        ] {
            assert!(error.code == "N0102" && error.exit_code() == 7, "{error}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let future = tempfile::tempdir().unwrap();
        std::fs::write(future.path().join(MARK), "palyra node data folder, form 9\n").unwrap();
        let error = Home::create(future.path()).unwrap_err();
        assert!(
            error.code == "N0103" && error.message.contains("form 9"),
            "{error}"
        );
    }

    #[test]
    fn a_crash_while_the_folder_is_made_does_not_make_it_foreign() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("identity")).unwrap();
        std::fs::write(dir.path().join("node.toml.tmp"), "").unwrap();
        Home::create(dir.path()).unwrap();
    }

    #[test]
    fn configuration_errors_name_file_and_line() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::create(dir.path()).unwrap();
        std::fs::write(dir.path().join("node.toml"), "name = \"a\"\ncolour = 1\n").unwrap();
        let error = home.config().unwrap_err();
        assert!(
            error.message.contains("node.toml:2") && error.message.contains("colour"),
            "{error}"
        );
        std::fs::write(dir.path().join("node.toml"), "capabilities = [\"c.toml\"]\n").unwrap();
        assert_eq!(
            home.config().unwrap().capabilities,
            vec![home.dir().join("c.toml")]
        );
    }

    #[test]
    fn secrets_are_for_their_owner_and_broken_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::create(dir.path()).unwrap();
        let path = dir.path().join("identity/credential.json");
        std::fs::write(
            dir.path().join("identity/credential.json.tmp"),
            "left over, world readable",
        )
        .unwrap();
        write_atomic(&path, b"{\"form\":1}", 0o600).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let error = home.credential().unwrap_err();
        assert!(
            error.code == "N0104" && error.message.contains("credential.json"),
            "{error}"
        );
    }
}
