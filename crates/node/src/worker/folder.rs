//! The folders of a lease: made, filled with inputs, read for outputs, measured and removed.
//!
//! What never lives here: whether a tool may have them (see `sandbox`). Invariants: no link is followed,
//! neither in what a tool left nor in a workspace; the manifest of outputs is what lies there after every
//! process of the lease is gone, and nothing that the tool says; what is no plain file of one name is no
//! output.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;
use sha2::{Digest, Sha256};

/// Files and folders that a measurement looks at; a tool that has made more is stopped.
pub(crate) const FILES_MAX: u64 = 100_000;
/// The deepest folder that is measured or removed.
const DEPTH_MAX: usize = 256;
/// Files of a manifest, see `palyra_state::limits::MANIFEST`.
pub(crate) const MANIFEST_MAX: usize = 64;
/// Longest path of a manifest, see `palyra_state::limits::PATH_MAX`.
pub(crate) const PATH_MAX: usize = 255;

/// What lies in a folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) bytes: u64,
    pub(crate) files: u64,
    pub(crate) too_many: bool,
}

/// Measures a folder, by the blocks that its files take. What cannot be read counts nothing: it is about to
/// go, or the tool took its own right away, which does not take it from what lies there for the owner.
pub(crate) fn used(path: &Path) -> Used {
    let mut used = Used::default();
    let mut open = vec![path.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().filter_map(Result::ok) {
            used.files += 1;
            if used.files > FILES_MAX || open.len() > DEPTH_MAX * 64 {
                used.too_many = true;
                return used;
            }
            // Of the entry itself: a link is not followed.
            let Ok(meta) = entry.metadata() else { continue };
            used.bytes += meta.blocks() * 512;
            if meta.is_dir() {
                open.push(entry.path());
            }
        }
    }
    used
}

/// A relative path of plain parts, or why it is none.
pub(crate) fn relative(path: &str) -> Result<PathBuf, String> {
    let bad = |why: &str| Err(format!("the path {path:?} {why}"));
    if path.is_empty() || path.len() > PATH_MAX {
        return bad("is empty or too long");
    }
    if path.chars().any(char::is_control) {
        return bad("has control characters");
    }
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    if !Path::new(path).components().all(plain) {
        return bad("leaves its folder");
    }
    let parts = Path::new(path)
        .components()
        .filter(|part| matches!(part, Component::Normal(_)));
    Ok(parts.collect())
}

/// Opens a plain file below `dir`; no link is followed on the way, and nothing leaves the folder.
pub(crate) fn open_below(dir: &File, path: &Path) -> io::Result<File> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        );
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    Ok(File::from(openat2(dir.as_fd(), path, how)?))
}

/// Holds a file or folder below `dir`, to mount or to name it: no link is followed on the way, and none is
/// held.
pub(crate) fn hold_below(dir: &Path, path: &Path) -> io::Result<File> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        );
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    Ok(File::from(openat2(open_dir(dir)?.as_fd(), path, how)?))
}

/// Opens a folder itself.
pub(crate) fn open_dir(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(File::from(nix::fcntl::open(path, flags, Mode::empty())?))
}

/// SHA-256 and size of an open file.
pub(crate) fn hash(file: &mut File) -> io::Result<([u8; 32], u64)> {
    copy_hashed(file, &mut io::sink())
}

/// The same, of what is copied.
pub(crate) fn copy_hashed(from: &mut impl Read, to: &mut impl Write) -> io::Result<([u8; 32], u64)> {
    let mut hasher = Sha256::new();
    let (mut piece, mut size) = (vec![0u8; 64 * 1024], 0u64);
    loop {
        let count = match from.read(&mut piece) {
            Ok(0) => return Ok((hasher.finalize().into(), size)),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&piece[..count]);
        to.write_all(&piece[..count])?;
        size += count as u64;
    }
}

/// A file that a tool made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) path: String,
    pub(crate) digest: [u8; 32],
    pub(crate) size: u64,
    pub(crate) executable: bool,
}

/// The outputs, and why each of the others is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Outputs {
    pub(crate) files: Vec<Output>,
    pub(crate) refused: Vec<String>,
}

/// Looks at what lies in `out`. Nothing of the lease may run any more.
pub(crate) fn outputs(out: &Path) -> io::Result<Outputs> {
    let root = open_dir(out)?;
    let mut found = Outputs::default();
    let mut open = vec![PathBuf::new()];
    while let Some(dir) = open.pop() {
        let here = if dir.as_os_str().is_empty() {
            out.to_path_buf()
        } else {
            out.join(&dir)
        };
        let mut names: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(&here)? {
            names.push(dir.join(entry?.file_name()));
        }
        names.sort_unstable();
        for path in names {
            let meta = fs::symlink_metadata(out.join(&path))?;
            if meta.is_dir() && open.len() < DEPTH_MAX {
                open.push(path);
                continue;
            }
            if found.files.len() + found.refused.len() >= 2 * MANIFEST_MAX {
                found.refused.push("and more".to_owned());
                return Ok(found);
            }
            match output(&root, &path, found.files.len()) {
                Ok(output) => found.files.push(output),
                Err(why) => found.refused.push(format!("{}: {why}", path.display())),
            }
        }
    }
    found.files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn output(root: &File, path: &Path, before: usize) -> Result<Output, String> {
    let text = path.to_str().ok_or("its name is no UTF-8")?;
    relative(text)?;
    if text.contains('\\') {
        return Err("a manifest takes no backslash".to_owned());
    }
    let mut file = open_below(root, path).map_err(|error| match error.raw_os_error() {
        Some(code) if code == nix::errno::Errno::ELOOP as i32 => "a link".to_owned(),
        Some(code) if code == nix::errno::Errno::ENXIO as i32 => "no plain file".to_owned(),
        _ => error.to_string(),
    })?;
    let meta = file.metadata().map_err(|error| error.to_string())?;
    if !meta.is_file() {
        return Err("no plain file".to_owned());
    }
    if meta.nlink() != 1 {
        return Err(format!(
            "it has {} names: another one may lie elsewhere",
            meta.nlink()
        ));
    }
    if before >= MANIFEST_MAX {
        return Err(format!("more than {MANIFEST_MAX} files"));
    }
    let (digest, size) = hash(&mut file).map_err(|error| error.to_string())?;
    Ok(Output {
        path: text.to_owned(),
        digest,
        size,
        executable: meta.permissions().mode() & 0o100 != 0,
    })
}

/// Makes a folder for its owner.
pub(crate) fn make(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(mode).create(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// A new file below a folder that only the supervisor has written in.
pub(crate) fn create(path: &Path, mode: u32) -> io::Result<File> {
    if let Some(parent) = path.parent() {
        make(parent, 0o700)?;
    }
    let file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    Ok(file)
}

/// Hands a folder and all in it to another user.
pub(crate) fn give(path: &Path, uid: u32) -> io::Result<()> {
    std::os::unix::fs::lchown(path, Some(uid), Some(uid))?;
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            give(&entry?.path(), uid)?;
        }
    }
    Ok(())
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Removed {
    pub(crate) files: u64,
    pub(crate) bytes: u64,
}

/// Removes a folder and all in it; links are removed, never followed. A folder that the tool closed is opened
/// first.
pub(crate) fn remove(path: &Path) -> io::Result<Removed> {
    let before = fs::symlink_metadata(path);
    match before {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Removed::default()),
        Err(error) => return Err(error),
        Ok(meta) if !meta.is_dir() => {
            return Err(io::Error::other(format!("{} is no folder", path.display())));
        }
        Ok(_) => {}
    }
    open_up(path);
    let mut removed = Removed::default();
    count(path, &mut removed);
    // Goes down by handles, and so cannot be led elsewhere.
    fs::remove_dir_all(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    Ok(removed)
}

fn open_up(path: &Path) {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return;
    };
    if !meta.is_dir() {
        return;
    }
    if meta.permissions().mode() & 0o700 != 0o700 {
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o700));
    }
    for entry in fs::read_dir(path).into_iter().flatten().filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}

fn count(path: &Path, removed: &mut Removed) {
    for entry in fs::read_dir(path).into_iter().flatten().filter_map(Result::ok) {
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() {
            count(&entry.path(), removed);
        } else {
            removed.files += 1;
            removed.bytes += meta.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn paths_stay_in_their_folder() {
        assert_eq!(relative("./a//b").unwrap(), PathBuf::from("a/b"));
        for bad in ["", "..", "a/../b", "/etc/shadow", "a\nb", &"x".repeat(256)] {
            assert!(relative(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_plain_files_of_one_name_are_outputs() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        fs::create_dir_all(out.join("sub")).unwrap();
        fs::write(dir.path().join("secret"), "key").unwrap();
        fs::write(out.join("good"), "abc").unwrap();
        fs::write(out.join("sub/other"), "").unwrap();
        fs::write(out.join("back\\slash"), "").unwrap();
        symlink(dir.path().join("secret"), out.join("link")).unwrap();
        symlink("/etc", out.join("linked-folder")).unwrap();
        fs::hard_link(dir.path().join("secret"), out.join("hard")).unwrap();
        nix::unistd::mkfifo(&out.join("pipe"), Mode::S_IRWXU).unwrap();
        let _listening = std::os::unix::net::UnixListener::bind(out.join("socket")).unwrap();
        let found = outputs(&out).unwrap();
        let names: Vec<&str> = found.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(names, ["good", "sub/other"]);
        assert_eq!(found.files[0].size, 3);
        assert_eq!(found.files[0].digest, palyra_pki::sha256(b"abc"));
        let refused = found.refused.join("\n");
        for (name, why) in [
            ("back", "backslash"),
            ("hard", "names"),
            ("link", "link"),
            ("linked-folder", "link"),
            ("pipe", "no plain"),
            ("socket", "no plain"),
        ] {
            assert!(
                refused
                    .lines()
                    .any(|line| line.starts_with(name) && line.contains(why)),
                "{name}: {refused}"
            );
        }
    }

    #[test]
    fn too_many_outputs_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        for at in 0..300 {
            fs::write(dir.path().join(format!("{at:03}")), "x").unwrap();
        }
        let found = outputs(dir.path()).unwrap();
        assert_eq!(
            (found.files.len(), found.refused.len()),
            (MANIFEST_MAX, MANIFEST_MAX + 1)
        );
    }

    #[test]
    fn a_removal_follows_no_link_and_opens_what_was_closed() {
        let dir = tempfile::tempdir().unwrap();
        let (gone, kept) = (dir.path().join("gone"), dir.path().join("kept"));
        fs::create_dir_all(gone.join("a/b")).unwrap();
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("file"), "stays").unwrap();
        fs::write(gone.join("a/b/file"), "12345").unwrap();
        symlink(&kept, gone.join("a/link")).unwrap();
        fs::set_permissions(gone.join("a/b"), fs::Permissions::from_mode(0o000)).unwrap();
        let removed = remove(&gone).unwrap();
        assert_eq!(removed.files, 2);
        assert!(!gone.exists() && kept.join("file").exists());
        assert_eq!(remove(&gone).unwrap(), Removed::default(), "again is fine");
        symlink(&kept, &gone).unwrap();
        assert!(remove(&gone).is_err(), "a link in its place is not followed");
        assert!(kept.join("file").exists());
    }

    #[test]
    fn a_folder_is_measured_by_what_it_takes() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(used(dir.path()).files, 0);
        fs::write(dir.path().join("a"), vec![1u8; 300_000]).unwrap();
        let used = used(dir.path());
        assert!(
            used.files == 1 && used.bytes >= 300_000 && !used.too_many,
            "{used:?}"
        );
    }
}
