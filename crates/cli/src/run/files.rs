//! The files of a run on this machine: what goes in, and what comes out.
//!
//! What never lives here: what a run is. Invariants: what is written has the digest that was named, or is not
//! there; nothing is
//! written outside of the folder that was given, whatever a manifest says; no link is followed below it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use palyra_client::{Class, Client, Error};
use palyra_proto::run::v1::{Manifest, ManifestEntry, PutArtifactRequest, RunInfo};
use palyra_state::limits::ARTIFACT_CHUNK;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::failure::{Failure, Result};
use crate::output::note;

/// How much of a file is read at once when it is hashed.
const READ: usize = 64 * 1024;

/// An input file: where it lies here, and what the manifest says of it.
#[derive(Debug)]
pub(crate) struct Input {
    source: PathBuf,
    pub(crate) entry: ManifestEntry,
}

/// What `--input` said: `PATH` or `PATH=NAME`; a folder stands for all files in it.
pub(crate) fn inputs(given: &[String]) -> Result<Vec<Input>> {
    let mut inputs = Vec::new();
    for one in given {
        let (path, name) = match one.rsplit_once('=') {
            Some((path, name)) if !name.is_empty() => (Path::new(path), name.to_owned()),
            _ => {
                let path = Path::new(one);
                let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
                (path, name.unwrap_or_default())
            }
        };
        relative(&name)?;
        collect(path, &name, &mut inputs)?;
    }
    inputs.sort_by(|a, b| a.entry.path.cmp(&b.entry.path));
    if let Some(pair) = inputs
        .windows(2)
        .find(|pair| pair[0].entry.path == pair[1].entry.path)
    {
        let message = format!(
            "{} and {} would both be {}",
            pair[0].source.display(),
            pair[1].source.display(),
            pair[0].entry.path
        );
        return Err(Failure::usage(message, "name them apart: --input PATH=NAME"));
    }
    Ok(inputs)
}

fn collect(path: &Path, name: &str, inputs: &mut Vec<Input>) -> Result {
    let meta = fs::metadata(path).map_err(|error| Failure::file("read", path, &error))?;
    if meta.is_dir() {
        let entries = fs::read_dir(path).map_err(|error| Failure::file("list", path, &error))?;
        for entry in entries {
            let entry = entry.map_err(|error| Failure::file("list", path, &error))?;
            let below = format!("{name}/{}", entry.file_name().to_string_lossy());
            collect(&entry.path(), &below, inputs)?;
        }
        return Ok(());
    }
    if !meta.is_file() {
        let message = format!("{} is no regular file", path.display());
        return Err(Failure::usage(message, "inputs are files and folders of files"));
    }
    let (digest, size) = hash(path)?;
    inputs.push(Input {
        source: path.to_owned(),
        entry: ManifestEntry {
            path: name.to_owned(),
            digest,
            size,
            stored: true,
            executable: meta.mode() & 0o111 != 0,
        },
    });
    Ok(())
}

/// The manifest of inputs.
pub(crate) fn manifest(inputs: &[Input]) -> Option<Manifest> {
    (!inputs.is_empty()).then(|| Manifest {
        entries: inputs.iter().map(|input| input.entry.clone()).collect(),
    })
}

/// Digest and size of a file.
fn hash(path: &Path) -> Result<(Bytes, u64)> {
    let failed = |error: std::io::Error| Failure::file("read", path, &error);
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; READ];
    let mut size = 0;
    loop {
        let read = file.read(&mut buffer).map_err(failed)?;
        if read == 0 {
            return Ok((Bytes::copy_from_slice(&hasher.finalize()), size));
        }
        hasher.update(&buffer[..read]);
        size += read as u64;
    }
}

/// Sends what the cluster has not got of the inputs of a run. Answers the run as it is then.
pub(crate) async fn upload(client: &Client, mut run: RunInfo, inputs: &[Input]) -> Result<RunInfo> {
    for input in inputs {
        let wanted = hex::encode(&input.entry.digest);
        if run.missing.contains(&wanted) {
            run = send(client, run, input).await?;
        }
    }
    Ok(run)
}

async fn send(client: &Client, mut run: RunInfo, input: &Input) -> Result<RunInfo> {
    let failed = |error: std::io::Error| Failure::file("read", &input.source, &error);
    let mut file = File::open(&input.source).map_err(failed)?;
    let ManifestEntry { digest, size, .. } = input.entry.clone();
    let mut offset = 0;
    loop {
        let mut piece = Vec::new();
        let room = u64::try_from(ARTIFACT_CHUNK).unwrap_or(u64::MAX);
        (&mut file)
            .take(room.min(size - offset))
            .read_to_end(&mut piece)
            .map_err(failed)?;
        if piece.len() as u64 != room.min(size - offset) {
            let message = format!("{} changed while it was sent", input.source.display());
            let next = format!("palyra run cancel {}, and start it again", run.id);
            return Err(Failure::local(Class::Conflict, message, next));
        }
        let sent = piece.len() as u64;
        let request = PutArtifactRequest {
            request_id: palyra_client::new_ulid(),
            run_id: run.id.clone(),
            digest: digest.clone(),
            size,
            offset,
            chunk: piece.into(),
        };
        let answer = client.put_artifact(request).await?;
        offset += sent;
        run = answer.run.unwrap_or(run);
        if answer.complete || offset >= size {
            return Ok(run);
        }
    }
}

/// What was written.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Fetched {
    pub(crate) folder: PathBuf,
    pub(crate) files: Vec<String>,
    bytes: u64,
    /// Of the manifest, not kept in the cluster.
    pub(crate) not_kept: Vec<String>,
}

impl Fetched {
    /// For people.
    pub(crate) fn told(&self) -> String {
        let mut text = String::new();
        for file in &self.files {
            text += &format!("{}\n", self.folder.join(file).display());
        }
        for file in &self.not_kept {
            text += &format!("(not kept in the cluster: {file})\n");
        }
        text
    }
}

/// Writes the output files of a run below `folder`.
pub(crate) async fn download(
    client: &Client,
    run: &RunInfo,
    folder: &Path,
    overwrite: bool,
) -> Result<Fetched> {
    let mut fetched = Fetched {
        folder: folder.to_owned(),
        ..Fetched::default()
    };
    fs::create_dir_all(folder).map_err(|error| Failure::file("make", folder, &error))?;
    let entries = run.outputs.clone().unwrap_or_default().entries;
    if entries.is_empty() {
        note(&format!(
            "run {} has no output files (it is {})",
            run.id, run.state
        ));
    }
    for entry in entries {
        if !entry.stored {
            fetched.not_kept.push(entry.path);
            continue;
        }
        let to = place(folder, &entry.path, overwrite)?;
        fetched.bytes += fetch(client, &run.id, &entry, &to).await?;
        fetched.files.push(entry.path);
    }
    Ok(fetched)
}

/// Where a file goes, with its folders made.
fn place(folder: &Path, name: &str, overwrite: bool) -> Result<PathBuf> {
    let name = relative(name)?;
    let mut at = folder.to_owned();
    let mut parts = name.components().peekable();
    while let Some(part) = parts.next() {
        at.push(part);
        let there = fs::symlink_metadata(&at).ok();
        let last = parts.peek().is_none();
        match there {
            None if last => {}
            None => fs::create_dir(&at).map_err(|error| Failure::file("make", &at, &error))?,
            Some(meta) if meta.is_dir() && !last => {}
            Some(meta) if meta.is_file() && last && overwrite => {}
            Some(meta) => {
                let kind = if meta.is_symlink() {
                    "is a link"
                } else if meta.is_dir() {
                    "is a folder"
                } else {
                    "is there already"
                };
                let message = format!("{} {kind}", at.display());
                let next = "another --output-dir, or --overwrite for files that are there";
                return Err(Failure::local(Class::Conflict, message, next));
            }
        }
    }
    Ok(at)
}

/// Fetches one file, aside first.
async fn fetch(client: &Client, run_id: &str, entry: &ManifestEntry, to: &Path) -> Result<u64> {
    let aside = to.with_file_name(format!(".palyra-{}", palyra_client::new_ulid()));
    let done = fetch_aside(client, run_id, entry, &aside).await;
    let placed = done.and_then(|size| {
        fs::rename(&aside, to).map_err(|error| Failure::file("write", to, &error))?;
        Ok(size)
    });
    if placed.is_err() {
        let _ = fs::remove_file(&aside);
    }
    placed
}

async fn fetch_aside(client: &Client, run_id: &str, entry: &ManifestEntry, aside: &Path) -> Result<u64> {
    let failed = |error: std::io::Error| Failure::file("write", aside, &error);
    let mut file = File::create_new(aside).map_err(failed)?;
    let mut hasher = Sha256::new();
    let got = client
        .get_artifact(run_id, entry.digest.clone(), |piece| {
            hasher.update(piece);
            file.write_all(piece).map_err(|error| {
                let message = format!("cannot write {}: {error}", aside.display());
                Error::local(Class::Internal, message, "is there room on the disk?")
            })
        })
        .await?;
    if got != entry.size || hasher.finalize().as_slice() != &entry.digest[..] {
        let message = format!(
            "{} of run {run_id} is not what its manifest names: {got} bytes came, {} with sha256 {} were named",
            entry.path,
            entry.size,
            hex::encode(&entry.digest)
        );
        return Err(Failure::local(
            Class::Internal,
            message,
            "palyra journal verify, and report it",
        ));
    }
    let mode = if entry.executable { 0o755 } else { 0o644 };
    fs::set_permissions(aside, fs::Permissions::from_mode(mode)).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    Ok(got)
}

/// A path that stays below where it is put.
fn relative(name: &str) -> Result<&Path> {
    let path = Path::new(name);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if name.is_empty() || !plain {
        let message = format!("{name:?} is no name of a file below a folder");
        return Err(Failure::usage(
            message,
            "relative names without `..`: --input PATH=NAME",
        ));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> PathBuf {
        let folder = std::env::temp_dir().join(format!("palyra-files-{}", palyra_client::new_ulid()));
        fs::create_dir(&folder).unwrap();
        folder
    }

    #[test]
    fn inputs_are_hashed_and_named_in_order() {
        let folder = folder();
        fs::create_dir(folder.join("in")).unwrap();
        fs::write(folder.join("in/b.csv"), "2").unwrap();
        fs::write(folder.join("in/a.csv"), "1").unwrap();
        fs::write(folder.join("c"), "").unwrap();
        let given = [
            format!("{}=z", folder.join("c").display()),
            folder.join("in").display().to_string(),
        ];
        let found = inputs(&given).unwrap();
        let names: Vec<&str> = found.iter().map(|input| input.entry.path.as_str()).collect();
        assert_eq!(names, ["in/a.csv", "in/b.csv", "z"]);
        assert_eq!(
            hex::encode(&found[2].entry.digest)[..8].to_owned(),
            "e3b0c442",
            "of nothing"
        );
        let twice = [given[0].clone(), given[0].clone()];
        assert_eq!(inputs(&twice).unwrap_err().exit_code(), 2);
        let outside = [format!("{}=../z", folder.join("c").display())];
        assert_eq!(inputs(&outside).unwrap_err().exit_code(), 2);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn outputs_stay_below_their_folder() {
        let folder = folder();
        let outside = folder.join("outside");
        let out = folder.join("out");
        fs::create_dir(&outside).unwrap();
        fs::create_dir(&out).unwrap();
        std::os::unix::fs::symlink(&outside, out.join("link")).unwrap();
        fs::write(out.join("there"), "x").unwrap();
        assert_eq!(place(&out, "a/b/c", false).unwrap(), out.join("a/b/c"));
        assert!(out.join("a/b").is_dir());
        for bad in ["../x", "/etc/x", "", "a/../x"] {
            assert_eq!(place(&out, bad, true).unwrap_err().exit_code(), 2, "{bad:?}");
        }
        assert_eq!(place(&out, "link/x", true).unwrap_err().exit_code(), 11);
        assert_eq!(place(&out, "link", true).unwrap_err().exit_code(), 11);
        assert_eq!(place(&out, "there", false).unwrap_err().exit_code(), 11);
        assert!(place(&out, "there", true).is_ok());
        assert!(!outside.join("x").exists());
        fs::remove_dir_all(folder).unwrap();
    }
}
