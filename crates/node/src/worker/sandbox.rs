//! What holds a tool, put around the calling process in this order: cgroups, namespaces and a root of its
//! own, limits, another user without capabilities, Landlock.
//!
//! What never lives here: a decision that something may be missing: what could not be had is listed with its
//! cause, and the owner's `require` decides (see [`missing`]).
//!
//! Invariants: nothing is given back once it was taken; each part holds without the others, so that a hole in
//! one is not a hole in all; nothing of the machine is writable but what the scope names, `/tmp` and
//! `/dev/null`.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid};

use super::spec::Spec;
use super::{folder, mounts};

/// The newest kernel interface whose rights are known here; an older kernel holds what it knows.
const KNOWN: ABI = ABI::V6;
/// What a tool may read of `/etc`.
pub(crate) const ETC: [&str; 12] = [
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/group",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/ssl",
    "/etc/timezone",
];
/// And when it may use the network.
pub(crate) const ETC_NETWORK: [&str; 2] = ["/etc/hosts", "/etc/resolv.conf"];
/// Where programs and libraries are.
pub(crate) const SYSTEM: [&str; 7] = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"];
/// Devices that every program may use.
pub(crate) const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];

/// Where things are, as the tool sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) tool: PathBuf,
    pub(crate) work: PathBuf,
    /// The named workspace, or the working folder.
    pub(crate) workspace: PathBuf,
    pub(crate) tmp: PathBuf,
    /// It has a root of its own.
    pub(crate) own_root: bool,
}

/// Puts everything around this process that can be had. Adds to `held` what there is and what is missing.
///
/// Errors: what is half done and must not go on.
pub(crate) fn enter(spec: &Spec, held: &mut Vec<String>) -> Result<View, String> {
    for procs in &spec.cgroup_procs {
        // "0" is whoever writes.
        let entered = fs::OpenOptions::new().write(true).open(procs);
        let entered = entered.and_then(|mut file| file.write_all(b"0\n"));
        entered.map_err(|error| format!("{} cannot be entered: {error}", procs.display()))?;
    }
    namespaces(spec, held);
    let view = root(spec, held)?;
    limits(spec, held)?;
    identity(spec, &view, held)?;
    confine(spec, &view, held)?;
    // A file that a tool makes is for its own user: the supervisor reads it all the same, or is that user.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    Ok(view)
}

/// Why the tool must not be started, if so.
pub(crate) fn missing(require: &[String], held: &[String]) -> Option<String> {
    let has = |part: &String| {
        held.iter().any(|one| {
            one.strip_prefix(part.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
        })
    };
    let gone: Vec<&str> = require
        .iter()
        .filter(|part| !has(part))
        .map(String::as_str)
        .collect();
    if gone.is_empty() {
        return None;
    }
    let why: Vec<&str> = held.iter().filter_map(|part| part.strip_prefix('-')).collect();
    Some(format!(
        "this machine cannot hold it with {}, which `require` of the worker's configuration names ({})",
        gone.join(" and "),
        why.join("; ")
    ))
}

fn left_out(spec: &Spec, part: &str) -> bool {
    spec.without.iter().any(|one| one == part)
}

fn namespaces(spec: &Spec, held: &mut Vec<String>) {
    let mut wanted = vec![
        ("mountns", CloneFlags::CLONE_NEWNS),
        ("ipcns", CloneFlags::CLONE_NEWIPC),
        ("utsns", CloneFlags::CLONE_NEWUTS),
    ];
    if !spec.bounds.network {
        wanted.push(("netns", CloneFlags::CLONE_NEWNET));
    }
    for (name, flag) in wanted {
        let had = if left_out(spec, name) {
            Err("left out".to_owned())
        } else {
            unshare(flag).map_err(|error| error.to_string())
        };
        match had {
            Ok(()) => held.push(name.to_owned()),
            Err(why) => held.push(format!("-{name}: {why}")),
        }
    }
    if held.iter().any(|part| part == "utsns") {
        let _ = nix::unistd::sethostname("worker");
    }
}

fn root(spec: &Spec, held: &mut Vec<String>) -> Result<View, String> {
    let outside = View {
        tool: spec.tool_dir.clone(),
        work: spec.work_dir.clone(),
        workspace: spec.workspace.clone().unwrap_or_else(|| spec.work_dir.clone()),
        tmp: spec.work_dir.join("tmp"),
        own_root: false,
    };
    if !held.iter().any(|part| part == "mountns") {
        if spec.image.is_some() {
            return Err("the image needs a mount namespace, which cannot be had".to_owned());
        }
        return without_root(spec, outside);
    }
    match mounts::build(spec, held) {
        Ok(view) => {
            held.push("root".to_owned());
            Ok(view)
        }
        // What was mounted until now is seen by nobody else.
        Err((true, why)) => Err(why),
        Err((false, why)) => {
            held.retain(|part| part != "mountns");
            held.push(format!("-mountns: {why}"));
            without_root(spec, outside)
        }
    }
}

/// Without a root of its own, a part of what may be written cannot be taken out again.
fn without_root(spec: &Spec, view: View) -> Result<View, String> {
    let inside = |path: &PathBuf| spec.allowed.iter().any(|allowed| path.starts_with(allowed));
    if let Some(path) = spec.read_only.iter().find(|path| inside(path)) {
        return Err(format!(
            "{} is to be read only inside of what may be written, which needs a mount namespace",
            path.display()
        ));
    }
    fs::create_dir_all(&view.tmp).map_err(|error| format!("{}: {error}", view.tmp.display()))?;
    if spec.uid.is_some() {
        // They were made for a user that it cannot be here.
        for name in ["in", "out"] {
            let path = spec.work_dir.join(name);
            let own = nix::unistd::geteuid().as_raw();
            folder::give(&path, own).map_err(|error| format!("{}: {error}", path.display()))?;
        }
    }
    Ok(view)
}

fn limits(spec: &Spec, held: &mut Vec<String>) -> Result<(), String> {
    let bounds = &spec.bounds;
    let mut wanted = vec![
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_NOFILE, u64::from(bounds.open_files)),
        (Resource::RLIMIT_FSIZE, bounds.disk_bytes),
        (Resource::RLIMIT_MEMLOCK, 1 << 20),
        (Resource::RLIMIT_MSGQUEUE, 1 << 20),
    ];
    let has = |part: &str| held.iter().any(|one| one == part);
    if !has("cgroup:memory") {
        wanted.push((Resource::RLIMIT_AS, bounds.memory_bytes));
    }
    if !has("cgroup:pids") {
        // By user: of a lease only when it has a user of its own.
        wanted.push((Resource::RLIMIT_NPROC, u64::from(bounds.processes)));
    }
    for (resource, most) in wanted {
        // Nothing is raised: that is the machine's owner's to do.
        let set =
            getrlimit(resource).and_then(|(_, hard)| setrlimit(resource, most.min(hard), most.min(hard)));
        set.map_err(|error| format!("the limit {resource:?} cannot be set: {error}"))?;
    }
    held.push("rlimits".to_owned());
    Ok(())
}

/// Another user, and no capabilities, whatever the tool executes.
fn identity(spec: &Spec, view: &View, held: &mut Vec<String>) -> Result<(), String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    nix::sys::prctl::set_no_new_privs().map_err(|error| failed("no_new_privs", &error))?;
    held.push("no_new_privs".to_owned());
    let privileged =
        caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SETPCAP).unwrap_or(false);
    if privileged {
        caps::clear(None, caps::CapSet::Bounding).map_err(|error| failed("the capabilities", &error))?;
    }
    match spec.uid {
        Some(uid) if view.own_root => {
            nix::unistd::setgroups(&[]).map_err(|error| failed("the groups", &error))?;
            let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
            nix::unistd::setresgid(group, group, group).map_err(|error| failed("the group", &error))?;
            nix::unistd::setresuid(user, user, user).map_err(|error| failed("the user", &error))?;
            held.push(format!("uid:{uid}"));
        }
        // Its folders are below folders that another user must not enter.
        Some(_) => held.push("-uid: it needs a mount namespace".to_owned()),
        None => {}
    }
    for set in [
        caps::CapSet::Ambient,
        caps::CapSet::Inheritable,
        caps::CapSet::Effective,
        caps::CapSet::Permitted,
    ] {
        // Old kernels know no ambient ones, and there is nothing to clear.
        let cleared = caps::clear(None, set);
        if !matches!(set, caps::CapSet::Ambient) {
            cleared.map_err(|error| failed("the capabilities", &error))?;
        }
    }
    held.push("caps".to_owned());
    // Set anew: a change of user forgets it.
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    // The tool has the same user, and must not look into this process nor speak for it.
    let _ = nix::sys::prctl::set_dumpable(false);
    Ok(())
}

/// Landlock: read and execute programs, read little else, write what the scope names.
fn confine(spec: &Spec, view: &View, held: &mut Vec<String>) -> Result<(), String> {
    if left_out(spec, "landlock") {
        held.push("-landlock: left out".to_owned());
        return Ok(());
    }
    let made = ruleset(spec, view).map_err(|error| format!("landlock: {error}"))?;
    match (made.ruleset, made.landlock) {
        (RulesetStatus::NotEnforced, _) => held.push("-landlock: this kernel has none".to_owned()),
        (_, LandlockStatus::Available { effective_abi, .. }) => {
            held.push(format!("landlock:{}", effective_abi as i32));
        }
        _ => held.push("landlock".to_owned()),
    }
    Ok(())
}

fn ruleset(spec: &Spec, view: &View) -> Result<landlock::RestrictionStatus, landlock::RulesetError> {
    let all = AccessFs::from_all(KNOWN);
    let execute = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::Execute;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    // No devices, and nothing that was written is executed.
    let write = all & !(AccessFs::MakeBlock | AccessFs::MakeChar | AccessFs::Execute | AccessFs::IoctlDev);
    let mut rules = Ruleset::default()
        .handle_access(all)?
        .scope(Scope::from_all(KNOWN))?;
    if !spec.bounds.network {
        rules = rules.handle_access(AccessNet::from_all(KNOWN))?;
    }
    let mut grants: Vec<(PathBuf, BitFlags<AccessFs>)> = Vec::new();
    let mut grant = |path: PathBuf, access: BitFlags<AccessFs>| grants.push((path, access));
    for path in mounts::programs(spec, view) {
        grant(path, execute);
    }
    for path in mounts::readable(spec) {
        grant(path, read);
    }
    for path in [&view.tool, &view.work] {
        grant(path.clone(), if *path == view.tool { execute } else { read });
    }
    if spec.workspace.is_some() {
        for name in ["in", "out"] {
            grant(view.work.join(name), write);
        }
    }
    grant(view.tmp.clone(), write);
    grant(PathBuf::from("/proc"), read);
    for device in DEVICES {
        grant(
            Path::new("/dev").join(device),
            AccessFs::ReadFile | AccessFs::WriteFile,
        );
    }
    grant(PathBuf::from("/dev/shm"), write);
    let mut rules = rules.create()?;
    let parts = spec.allowed.iter().map(|path| (path, write));
    for (path, access) in parts.chain(spec.read_only.iter().map(|path| (path, read))) {
        // An earlier tool may have left links in a workspace.
        let Ok(held) = folder::hold_below(&view.workspace, path) else {
            continue;
        };
        let of_folder = held.metadata().is_ok_and(|meta| meta.is_dir());
        let access = if of_folder {
            access
        } else {
            access & AccessFs::from_file(KNOWN)
        };
        rules = rules.add_rule(PathBeneath::new(held, access))?;
    }
    for (path, access) in grants {
        // What is not there cannot be reached either.
        let Ok(fd) = PathFd::new(&path) else { continue };
        let of_file = AccessFs::from_file(KNOWN);
        let access = if path.is_dir() { access } else { access & of_file };
        rules = rules.add_rule(PathBeneath::new(fd, access))?;
    }
    rules.restrict_self()
}

/// Makes an empty file to mount something on.
pub(crate) fn touch(path: &Path) -> std::io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_required_and_missing_is_named_with_its_cause() {
        let held: Vec<String> = ["pidns", "landlock:7", "-netns: EPERM"].map(str::to_owned).into();
        let require = |parts: &[&str]| parts.iter().map(|part| (*part).to_owned()).collect::<Vec<_>>();
        assert_eq!(missing(&require(&["landlock", "pidns"]), &held), None);
        let why = missing(&require(&["pid", "netns"]), &held).unwrap();
        assert!(
            why.contains("pid and netns") && why.contains("netns: EPERM"),
            "{why}"
        );
    }
}
