//! A root folder for one lease: programs and libraries of the image read only, the tool's files, the working
//! folder, the parts of the workspace that the scope names, and a private `/tmp`, `/proc` and `/dev`. Nothing
//! else of the machine is there, neither the node's key nor another lease.
//!
//! What never lives here: Landlock, which holds the same once more (see `sandbox`).

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::folder;
use super::sandbox::{DEVICES, ETC, ETC_NETWORK, SYSTEM, View, touch};
use super::spec::Spec;

/// Where the tool finds its own files.
const TOOL: &str = "/palyra/tool";
/// Where it works.
const WORK: &str = "/work";
/// Where a named workspace is.
const WORKSPACE: &str = "/workspace";
/// The most that `/tmp` holds; it counts as memory.
const TMP_MAX: u64 = 64 << 20;
/// What `/dev/shm` holds.
const SHM: u64 = 16 << 20;
/// Entries of an image that are made here instead.
const OWN: [&str; 7] = ["proc", "dev", "tmp", "sys", "work", "workspace", "palyra"];

/// What went wrong, and whether it is too late to do without.
type Broken = (bool, String);

/// What a tool may execute, as it sees it.
pub(crate) fn programs(spec: &Spec, view: &View) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = match (&spec.image, view.own_root) {
        (Some(image), true) => entries(image)
            .into_iter()
            .map(|name| Path::new("/").join(name))
            .collect(),
        _ => SYSTEM.iter().map(PathBuf::from).collect(),
    };
    all.extend(spec.read.iter().cloned());
    all
}

/// What a tool may read of the machine, as it sees it.
pub(crate) fn readable(spec: &Spec) -> Vec<PathBuf> {
    if spec.image.is_some() {
        return Vec::new();
    }
    let network = ETC_NETWORK.iter().filter(|_| spec.bounds.network);
    ETC.iter().chain(network).map(PathBuf::from).collect()
}

/// Builds it and goes there.
pub(crate) fn build(spec: &Spec, held: &mut Vec<String>) -> Result<View, Broken> {
    let root = &spec.root_dir;
    let early = |what: String| move |error: nix::Error| (false, format!("{what}: {error}"));
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(early("private mounts".to_owned()))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some("tmpfs"),
        root,
        Some("tmpfs"),
        flags,
        Some("size=1m,mode=755"),
    )
    .map_err(early("a root of its own".to_owned()))?;
    system(spec, root)?;
    private(spec, root, held)?;
    // What the scope names and is not there is no reason to do without a root.
    work(spec, root).map_err(|(_, why)| (true, why))?;
    pivot(root).map_err(|why| (true, why))?;
    Ok(View {
        tool: PathBuf::from(TOOL),
        work: PathBuf::from(WORK),
        workspace: PathBuf::from(if spec.workspace.is_some() { WORKSPACE } else { WORK }),
        tmp: PathBuf::from("/tmp"),
        own_root: true,
    })
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> Broken + '_ {
    move |error| (false, format!("{}: {error}", path.display()))
}

fn entries(image: &Path) -> Vec<String> {
    let listed = fs::read_dir(image)
        .into_iter()
        .flatten()
        .filter_map(std::result::Result::ok);
    let names = listed.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| !OWN.contains(&name.as_str())).collect()
}

/// Programs and libraries.
fn system(spec: &Spec, root: &Path) -> Result<(), Broken> {
    if let Some(image) = &spec.image {
        for name in entries(image) {
            show(&image.join(&name), &root.join(&name), false)?;
        }
    } else {
        for path in SYSTEM
            .iter()
            .map(Path::new)
            .chain(readable(spec).iter().map(PathBuf::as_path))
        {
            show(path, &below(root, path), false)?;
        }
    }
    for path in &spec.read {
        if !below(root, path).exists() {
            show(path, &below(root, path), false)?;
        }
    }
    Ok(())
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Shows a file or folder of the machine at a place, read only unless it is to be written. What isn't there
/// is passed over; a link stays a link.
fn show(from: &Path, to: &Path, writable: bool) -> Result<(), Broken> {
    let Ok(meta) = fs::symlink_metadata(from) else {
        return Ok(());
    };
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(io(parent))?;
    }
    if meta.is_symlink() {
        let target = fs::read_link(from).map_err(io(from))?;
        return symlink(target, to).map_err(io(to));
    }
    if meta.is_dir() {
        fs::create_dir_all(to).map_err(io(to))?;
    } else {
        touch(to).map_err(io(to))?;
    }
    bind(from, to, writable)
}

fn bind(from: &Path, to: &Path, writable: bool) -> Result<(), Broken> {
    let none: Option<&str> = None;
    let failed = |error: nix::Error| (false, format!("{} cannot be shown: {error}", from.display()));
    // With what is mounted below only where the kernel does not allow to hide it.
    let plain = mount(Some(from), to, none, MsFlags::MS_BIND, none);
    plain
        .or_else(|_| mount(Some(from), to, none, MsFlags::MS_BIND | MsFlags::MS_REC, none))
        .map_err(failed)?;
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if !writable {
        flags |= MsFlags::MS_RDONLY;
    }
    mount(none, to, none, flags, none).map_err(failed)
}

/// `/tmp`, `/proc` and `/dev`.
fn private(spec: &Spec, root: &Path, held: &mut Vec<String>) -> Result<(), Broken> {
    let none: Option<&str> = None;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let tmpfs = |path: &Path, size: u64| -> Result<(), Broken> {
        fs::create_dir_all(path).map_err(io(path))?;
        let options = format!("size={size},mode=1777,nr_inodes=16384");
        mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(options.as_str()))
            .map_err(|error| (false, format!("{}: {error}", path.display())))
    };
    tmpfs(&root.join("tmp"), spec.bounds.disk_bytes.min(TMP_MAX))?;
    let proc = root.join("proc");
    fs::create_dir_all(&proc).map_err(io(&proc))?;
    match mount(Some("proc"), &proc, Some("proc"), flags, none) {
        Ok(()) => held.push("proc".to_owned()),
        Err(error) => held.push(format!("-proc: {error}")),
    }
    let dev = root.join("dev");
    fs::create_dir_all(&dev).map_err(io(&dev))?;
    for name in DEVICES {
        let (from, to) = (Path::new("/dev").join(name), dev.join(name));
        touch(&to).map_err(io(&to))?;
        mount(Some(&from), &to, none, MsFlags::MS_BIND, none)
            .map_err(|error| (false, format!("{} cannot be shown: {error}", from.display())))?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        symlink(target, dev.join(name)).map_err(io(&dev))?;
    }
    tmpfs(&dev.join("shm"), SHM)
}

/// The tool, the working folder, and what the scope names of the workspace.
fn work(spec: &Spec, root: &Path) -> Result<(), Broken> {
    show(&spec.tool_dir, &below(root, Path::new(TOOL)), false)?;
    let to = below(root, Path::new(WORK));
    let Some(workspace) = &spec.workspace else {
        show(&spec.work_dir, &to, true)?;
        return read_only(&spec.work_dir, &to, &spec.read_only);
    };
    show(&spec.work_dir, &to, true)?;
    let space = below(root, Path::new(WORKSPACE));
    fs::create_dir_all(&space).map_err(io(&space))?;
    fs::set_permissions(&space, fs::Permissions::from_mode(0o755)).map_err(io(&space))?;
    for path in &spec.allowed {
        show_below(workspace, path, &space, true)?;
    }
    read_only(workspace, &space, &spec.read_only)
}

fn read_only(from: &Path, to: &Path, paths: &[PathBuf]) -> Result<(), Broken> {
    paths
        .iter()
        .try_for_each(|path| show_below(from, path, to, false))
}

/// Shows a part of a folder that tools write in: an earlier one may have left links in it, which are not
/// followed.
fn show_below(from: &Path, path: &Path, to: &Path, writable: bool) -> Result<(), Broken> {
    let whole = from.join(path);
    let held = folder::hold_below(from, path).map_err(io(&whole))?;
    let meta = held.metadata().map_err(io(&whole))?;
    let to = to.join(path);
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(io(parent))?;
    }
    if meta.is_dir() {
        fs::create_dir_all(&to).map_err(io(&to))?;
    } else if meta.is_file() {
        touch(&to).map_err(io(&to))?;
    } else {
        return Err((
            true,
            format!("{} is neither a file nor a folder", whole.display()),
        ));
    }
    bind(
        &PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd())),
        &to,
        writable,
    )
}

/// Makes `root` the root; the old one is gone for this process and its children.
fn pivot(root: &Path) -> Result<(), String> {
    let failed = |what: &'static str| move |error: nix::Error| format!("{what}: {error}");
    let none: Option<&str> = None;
    nix::unistd::chdir(root).map_err(failed("the new root"))?;
    nix::unistd::pivot_root(".", ".").map_err(failed("the new root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("the old root"))?;
    nix::unistd::chdir("/").map_err(failed("the new root"))?;
    let flags =
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(none, "/", none, flags, none).map_err(failed("a root that is read only"))
}
