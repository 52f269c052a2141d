//! What a worker runs, as digests, and how it comes to be what is run.
//!
//! The digests (all SHA-256; lines end with `\n`, files are sorted by path):
//! - *image*: of a root folder, over `palyra image v1` and a line for each entry: kind, mode, path, and the
//!   digest of the file or the target of the link. Of this machine, over `palyra host v1` and the text of
//!   `/etc/os-release`: it names the release and proves nothing about the files, which is why tools that
//!   matter bring their files along.
//! - *artifact*: over `palyra tools v1` and, for each tool, its name, authority, command, environment, limits
//!   and the digests of its files; an absolute program is digested too.
//! - *build* and *supervisor*: of this program.
//!
//! Invariant: what is run is a copy that was digested while it was made, and compared to what was attested;
//! the original may change at any time, and is then refused, never run.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use palyra_pki::sha256;

use super::config::{Config, Level, Tool};
use super::folder;
use super::spec::Arg;
use crate::{Error, Kind, Result};

/// Entries of an image.
const IMAGE_MAX: usize = 500_000;

/// What a worker says that it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digests {
    /// Of the root.
    pub image: [u8; 32],
    /// Of this program.
    pub build: [u8; 32],
    /// Of the tools.
    pub artifact: [u8; 32],
    /// Of the program that computed them; nothing when they are only said.
    pub supervisor: Option<[u8; 32]>,
}

/// The tools as they were when they were digested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measured {
    /// What goes into the statement.
    pub digests: Digests,
    /// By tool: digests of its own files, and of an absolute program.
    tools: Vec<Files>,
    /// Changes with any file of the image.
    image_mark: [u8; 32],
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Files {
    name: String,
    own: Vec<(String, [u8; 32], bool)>,
    absolute: Option<(PathBuf, [u8; 32])>,
}

/// Digests everything that `config` names.
///
/// Errors: a file that is missing or no plain file.
pub fn measure(config: &Config) -> Result<Measured> {
    let tools = config.tools.iter().map(files_of).collect::<Result<Vec<_>>>()?;
    let artifact = sha256(canonical(config, &tools).as_bytes());
    let image_mark = mark(config)?;
    let digests = match (&config.digests, config.evidence) {
        (Some(said), Level::SelfReported) => Digests {
            image: parse("image", &said.image)?,
            build: parse("build", &said.build)?,
            artifact: parse("artifact", &said.artifact)?,
            supervisor: None,
        },
        _ => {
            let own = own_digest()?;
            Digests {
                image: image(config)?,
                build: own,
                artifact,
                supervisor: Some(own),
            }
        }
    };
    Ok(Measured {
        digests,
        tools,
        image_mark,
    })
}

fn parse(name: &str, text: &str) -> Result<[u8; 32]> {
    let bytes = hex::decode(text)
        .ok()
        .and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    bytes.ok_or_else(|| super::config::bad(format!("digests.{name} is no SHA-256 in hex: {text:?}")))
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    let message = format!("{} cannot be digested: {error}", path.display());
    Error::new(
        Kind::Precondition,
        "N1003",
        message,
        "put the file there, or correct the worker's configuration",
    )
}

/// Of the program that is running, whatever its path names by now.
fn own_digest() -> Result<[u8; 32]> {
    let path = Path::new("/proc/self/exe");
    let digest = File::open(path).and_then(|mut file| folder::hash(&mut file));
    Ok(digest.map_err(|error| unreadable(path, &error))?.0)
}

fn files_of(tool: &Tool) -> Result<Files> {
    let dir = folder::open_dir(&tool.dir).map_err(|error| unreadable(&tool.dir, &error))?;
    let mut own = Vec::new();
    for path in tool.own_files() {
        let failed = |error: io::Error| unreadable(&tool.dir.join(&path), &error);
        let mut file = folder::open_below(&dir, Path::new(&path)).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        if !meta.is_file() {
            return Err(failed(io::Error::other("it is no plain file")));
        }
        let executable = meta.permissions().mode() & 0o111 != 0;
        own.push((
            path.clone(),
            folder::hash(&mut file).map_err(failed)?.0,
            executable,
        ));
    }
    let absolute = tool
        .command
        .first()
        .filter(|first| first.starts_with('/'))
        .map(PathBuf::from);
    let absolute = absolute.map(|path| -> Result<_> {
        let digest = File::open(&path).and_then(|mut file| folder::hash(&mut file));
        Ok((path.clone(), digest.map_err(|error| unreadable(&path, &error))?.0))
    });
    Ok(Files {
        name: tool.name.clone(),
        own,
        absolute: absolute.transpose()?,
    })
}

/// What the artifact digest is over.
fn canonical(config: &Config, files: &[Files]) -> String {
    let mut text = String::from("palyra tools v1\n");
    let mut line = |parts: &[&str]| {
        // JSON strings: no value can look like two.
        let parts: Vec<String> = parts
            .iter()
            .map(|part| serde_json::Value::from(*part).to_string())
            .collect();
        text.push_str(&parts.join(" "));
        text.push('\n');
    };
    for (tool, files) in config.tools.iter().zip(files) {
        let (timeout, grace) = (tool.timeout_s.to_string(), tool.grace_s.to_string());
        line(&["tool", &tool.name, &tool.authority, &timeout, &grace]);
        for word in &tool.command {
            line(&["command", word]);
        }
        for (name, value) in &tool.env {
            line(&["env", name, value]);
        }
        for (path, digest, executable) in &files.own {
            line(&[
                "file",
                path,
                &hex::encode(digest),
                if *executable { "x" } else { "-" },
            ]);
        }
        if let Some((path, digest)) = &files.absolute {
            line(&["program", &path.display().to_string(), &hex::encode(digest)]);
        }
    }
    text
}

fn image(config: &Config) -> Result<[u8; 32]> {
    let Some(root) = &config.image.root else {
        let release = fs::read("/etc/os-release").unwrap_or_default();
        return Ok(sha256(&[b"palyra host v1\n".as_slice(), &release].concat()));
    };
    let mut text = String::from("palyra image v1\n");
    walk(root, &mut |path, name, meta| {
        let what = if meta.is_symlink() {
            fs::read_link(path)?.display().to_string()
        } else if meta.is_file() {
            hex::encode(File::open(path).and_then(|mut file| folder::hash(&mut file))?.0)
        } else {
            String::new()
        };
        text.push_str(&format!(
            "{:o} {} {}\n",
            meta.mode(),
            serde_json::Value::from(name),
            serde_json::Value::from(what)
        ));
        Ok(())
    })?;
    Ok(sha256(text.as_bytes()))
}

/// Changes when a file of the image may have changed: cheap enough to look before each run.
fn mark(config: &Config) -> Result<[u8; 32]> {
    let Some(root) = &config.image.root else {
        return Ok([0; 32]);
    };
    let mut text = String::new();
    walk(root, &mut |_, name, meta| {
        let (ino, size, ctime, nanos) = (meta.ino(), meta.size(), meta.ctime(), meta.ctime_nsec());
        text.push_str(&format!("{name} {ino} {size} {ctime} {nanos}\n"));
        Ok(())
    })?;
    Ok(sha256(text.as_bytes()))
}

type Visit<'a> = dyn FnMut(&Path, &str, &fs::Metadata) -> io::Result<()> + 'a;

/// All entries below a folder, in the order of their paths.
fn walk(root: &Path, visit: &mut Visit<'_>) -> Result<()> {
    let mut open = vec![PathBuf::new()];
    let mut count = 0;
    while let Some(dir) = open.pop() {
        let here = root.join(&dir);
        let listed = fs::read_dir(&here).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let mut names: Vec<PathBuf> = listed
            .map_err(|error| unreadable(&here, &error))?
            .iter()
            .map(|entry| dir.join(entry.file_name()))
            .collect();
        names.sort_unstable();
        count += names.len();
        if count > IMAGE_MAX {
            return Err(unreadable(
                root,
                &io::Error::other(format!("more than {IMAGE_MAX} entries")),
            ));
        }
        for path in &names {
            let whole = root.join(path);
            let name = path
                .to_str()
                .ok_or_else(|| unreadable(&whole, &io::Error::other("its name is no UTF-8")))?;
            let meta = fs::symlink_metadata(&whole).map_err(|error| unreadable(&whole, &error))?;
            visit(&whole, name, &meta).map_err(|error| unreadable(&whole, &error))?;
        }
        // The last one is popped first.
        open.extend(
            names
                .into_iter()
                .rev()
                .filter(|path| root.join(path).symlink_metadata().is_ok_and(|m| m.is_dir())),
        );
    }
    Ok(())
}

impl Measured {
    /// Puts a tool's files into a lease's folder, as they were attested.
    ///
    /// Errors: why it must not be run: a file is not what was attested.
    pub fn place(&self, config: &Config, name: &str, into: &Path) -> std::result::Result<Vec<Arg>, String> {
        let (Some(tool), Some(files)) = (
            config.tool(name),
            self.tools.iter().find(|files| files.name == name),
        ) else {
            return Err(format!("this worker has no tool {name}"));
        };
        let changed = |path: &Path, why: &str| format!("{} is not what was attested: {why}", path.display());
        let dir = folder::open_dir(&tool.dir).map_err(|error| changed(&tool.dir, &error.to_string()))?;
        for (path, digest, executable) in &files.own {
            let whole = tool.dir.join(path);
            let copied = || -> io::Result<[u8; 32]> {
                let mut from = folder::open_below(&dir, Path::new(path))?;
                if !from.metadata()?.is_file() {
                    return Err(io::Error::other("it is no plain file"));
                }
                let mut to = folder::create(&into.join(path), if *executable { 0o555 } else { 0o444 })?;
                Ok(folder::copy_hashed(&mut from, &mut to)?.0)
            };
            let is = copied().map_err(|error| changed(&whole, &error.to_string()))?;
            if is != *digest {
                return Err(changed(&whole, &format!("its SHA-256 is {}", hex::encode(is))));
            }
        }
        open_for_all(into).map_err(|error| changed(into, &error.to_string()))?;
        if let Some((path, digest)) = &files.absolute {
            let is = File::open(path).and_then(|mut file| folder::hash(&mut file));
            if is.map_err(|error| changed(path, &error.to_string()))?.0 != *digest {
                return Err(changed(path, "its SHA-256 is another"));
            }
        }
        if mark(config).map_err(|error| error.to_string())? != self.image_mark {
            return Err("the image has changed since it was attested".to_owned());
        }
        let word = |word: &String| match word.strip_prefix("./") {
            Some(path) => Arg::Tool(path.to_owned()),
            None => Arg::Plain(word.clone()),
        };
        Ok(tool.command.iter().map(word).collect())
    }
}

/// The tool's user is another than the supervisor.
fn open_for_all(dir: &Path) -> io::Result<()> {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            open_for_all(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn config(dir: &Path) -> Config {
        let text = "[[tools]]\nname = \"t\"\nauthority = \"a\"\n\
                    command = [\"./t.sh\", \"x\"]\nfiles = [\"sub/data\"]\n";
        let config: Config = toml::from_str(text).unwrap();
        config.checked(dir).unwrap()
    }

    fn files(dir: &Path) {
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("t.sh"), "#!/bin/sh\necho 1\n").unwrap();
        fs::write(dir.join("sub/data"), "data").unwrap();
        fs::set_permissions(dir.join("t.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn what_is_run_is_what_was_measured() {
        let dir = tempfile::tempdir().unwrap();
        files(dir.path());
        let config = config(dir.path());
        let measured = measure(&config).unwrap();
        assert_eq!(measure(&config).unwrap(), measured, "the same again");
        assert_eq!(measured.digests.supervisor, Some(measured.digests.build));
        let into = dir.path().join("copy");
        fs::create_dir(&into).unwrap();
        let argv = measured.place(&config, "t", &into).unwrap();
        assert_eq!(argv, [Arg::Tool("t.sh".to_owned()), Arg::Plain("x".to_owned())]);
        assert_eq!(fs::read(into.join("sub/data")).unwrap(), b"data");
        assert_eq!(
            fs::metadata(into.join("t.sh")).unwrap().permissions().mode() & 0o777,
            0o555
        );
        for (path, change) in [("sub/data", "Data"), ("t.sh", "#!/bin/sh\necho 2\n")] {
            files(dir.path());
            fs::write(dir.path().join(path), change).unwrap();
            let again = tempfile::tempdir().unwrap();
            let why = measured.place(&config, "t", again.path()).unwrap_err();
            assert!(
                why.contains(path) && why.contains("not what was attested"),
                "{why}"
            );
            assert_ne!(
                measure(&config).unwrap().digests.artifact,
                measured.digests.artifact,
                "{path}"
            );
        }
        fs::remove_file(dir.path().join("sub/data")).unwrap();
        symlink("/etc/passwd", dir.path().join("sub/data")).unwrap();
        assert_eq!(
            measure(&config).unwrap_err().code,
            "N1003",
            "a link is no file of a tool"
        );
    }

    #[test]
    fn an_image_is_its_whole_tree() {
        let dir = tempfile::tempdir().unwrap();
        files(dir.path());
        let root = dir.path().join("image");
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        fs::write(root.join("usr/bin/a"), "1").unwrap();
        let mut config = config(dir.path());
        config.image.root = Some(root.clone());
        let before = measure(&config).unwrap();
        let mut seen = vec![before.digests.image];
        for change in 0..3 {
            match change {
                0 => fs::write(root.join("usr/bin/a"), "2").unwrap(),
                1 => symlink("a", root.join("usr/bin/b")).unwrap(),
                _ => fs::set_permissions(root.join("usr/bin/a"), fs::Permissions::from_mode(0o4755)).unwrap(),
            }
            let now = measure(&config).unwrap().digests.image;
            assert!(!seen.contains(&now), "{change}");
            seen.push(now);
        }
        let into = tempfile::tempdir().unwrap();
        assert!(
            before
                .place(&config, "t", into.path())
                .unwrap_err()
                .contains("image")
        );
    }
}
