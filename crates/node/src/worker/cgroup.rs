//! Control groups of a lease, version 1 or 2, where they may be made: limits, who is in, and the end of all
//! who are.
//!
//! What never lives here: entering one (the first process of the sandbox does, see `sandbox`). Invariant:
//! everything here is best effort and said: what could not be had is listed with its cause.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::spec::{Bounds, boot_ms};

const PREFIX: &str = "palyra-";
/// Length of a period of the processor's quota, in microseconds.
const PERIOD: u64 = 100_000;

/// The groups of one lease.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Groups {
    pub(crate) dirs: Vec<PathBuf>,
    /// What holds and what doesn't, as [`super::spec::Event::Sandbox`] says it.
    pub(crate) held: Vec<String>,
}

impl Groups {
    /// Makes them.
    pub(crate) fn make(lease: &str, bounds: &Bounds) -> Self {
        let parents = parents();
        let mut groups = Self::default();
        for name in ["memory", "pids", "cpu"] {
            match groups.limit(&parents, lease, name, bounds) {
                Ok(()) => groups.held.push(format!("cgroup:{name}")),
                Err(why) => groups.held.push(format!("-cgroup:{name}: {why}")),
            }
        }
        // The second version ends all of a group at once, also where the first one counts.
        if let Some((_, path)) = parents.iter().find(|(name, _)| name.is_empty()) {
            let dir = path.join(format!("{PREFIX}{lease}"));
            if !groups.dirs.contains(&dir) && make(&dir).is_ok() {
                groups.dirs.push(dir);
            }
        }
        groups
    }

    fn limit(
        &mut self,
        parents: &[(String, PathBuf)],
        lease: &str,
        name: &str,
        bounds: &Bounds,
    ) -> Result<(), String> {
        let own = parents.iter().find(|(controller, _)| controller == name);
        let (one, parent) = match own {
            Some((_, parent)) => (true, parent),
            None => match parents.iter().find(|(controller, _)| controller.is_empty()) {
                Some((_, parent)) => (false, parent),
                None => return Err("there are no control groups".to_owned()),
            },
        };
        if !one {
            let enabled = fs::read_to_string(parent.join("cgroup.subtree_control")).unwrap_or_default();
            if !enabled.split_whitespace().any(|word| word == name) {
                return Err(format!("not delegated to {}", parent.display()));
            }
        }
        let dir = parent.join(format!("{PREFIX}{lease}"));
        make(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        if !self.dirs.contains(&dir) {
            self.dirs.push(dir.clone());
        }
        for (file, value, must) in settings(one, name, bounds) {
            let path = dir.join(file);
            match fs::write(&path, value) {
                Err(error) if must => return Err(format!("{}: {error}", path.display())),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether the kernel ended a process of them for want of memory.
    pub(crate) fn out_of_memory(&self) -> bool {
        let count = |file: &Path| {
            let text = fs::read_to_string(file).unwrap_or_default();
            let found = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
            found
                .and_then(|count| count.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        self.dirs
            .iter()
            .any(|dir| count(&dir.join("memory.oom_control")) + count(&dir.join("memory.events")) > 0)
    }
}

/// File, value, and whether it must be taken.
fn settings(one: bool, name: &str, bounds: &Bounds) -> Vec<(&'static str, String, bool)> {
    let memory = bounds.memory_bytes.to_string();
    let quota = PERIOD * u64::from(bounds.cpu_percent) / 100;
    match (one, name) {
        (true, "memory") => vec![
            ("memory.limit_in_bytes", memory.clone(), true),
            ("memory.memsw.limit_in_bytes", memory, false),
        ],
        (false, "memory") => vec![
            ("memory.max", memory, true),
            ("memory.swap.max", "0".to_owned(), false),
            ("memory.oom.group", "1".to_owned(), false),
        ],
        // The sandbox's first process and its threads are in there too.
        (_, "pids") => vec![("pids.max", (u64::from(bounds.processes) + 3).to_string(), true)],
        (true, _) => vec![
            ("cpu.cfs_period_us", PERIOD.to_string(), false),
            ("cpu.cfs_quota_us", quota.to_string(), true),
        ],
        (false, _) => vec![("cpu.max", format!("{quota} {PERIOD}"), true)],
    }
}

fn make(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Where this process may make groups: controller of the first version, or empty for the second, and its
/// folder.
fn parents() -> Vec<(String, PathBuf)> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    parents_of(&own, &mounts)
}

fn parents_of(own: &str, mounts: &str) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, at, kind, options, ..] = fields.as_slice() else {
            continue;
        };
        let names: Vec<&str> = match *kind {
            "cgroup" => options.split(',').collect(),
            "cgroup2" => vec![""],
            _ => continue,
        };
        for group in own.lines() {
            let mut parts = group.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
                continue;
            };
            for name in controllers.split(',').filter(|name| names.contains(name)) {
                let dir = Path::new(at).join(path.trim_start_matches('/'));
                found.push((name.to_owned(), dir));
            }
        }
    }
    found
}

/// Everybody in these groups.
pub(crate) fn members(procs: &[PathBuf]) -> Vec<i32> {
    let read = procs.iter().filter_map(|path| fs::read_to_string(path).ok());
    let mut all: Vec<i32> = read
        .flat_map(|text| {
            text.lines()
                .filter_map(|line| line.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Ends everybody in these groups.
pub(crate) fn kill_all(procs: &[PathBuf]) {
    for path in procs {
        // Only the second version has it: it also ends who is just being born.
        let all_at_once = path.with_file_name("cgroup.kill");
        if all_at_once.exists() {
            let _ = fs::write(all_at_once, "1");
        }
    }
    for pid in members(procs) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Waits until nobody is in them; answers who still is.
pub(crate) fn wait_empty(procs: &[PathBuf], within: Duration) -> Vec<i32> {
    let until = boot_ms() + u64::try_from(within.as_millis()).unwrap_or(0);
    loop {
        let left = members(procs);
        if left.is_empty() || boot_ms() >= until {
            return left;
        }
        kill_all(procs);
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Removes groups that are empty.
pub(crate) fn remove(dirs: &[PathBuf]) -> io::Result<()> {
    for dir in dirs {
        match fs::remove_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io::Error::new(
                    error.kind(),
                    format!("{}: {error}", dir.display()),
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_found() {
        let mounts = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu,cpuacct 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n\
                      tmpfs /tmp tmpfs rw 0 0\n";
        let own = "4:memory:/a/b\n2:cpu,cpuacct:/\n0::/c\n1:name=systemd:/\n";
        let found = parents_of(own, mounts);
        let dir = |name: &str| {
            let one = found.iter().find(|(controller, _)| controller == name);
            one.map(|(_, path)| path.display().to_string())
                .unwrap_or_default()
        };
        assert_eq!(dir("memory"), "/sys/fs/cgroup/memory/a/b");
        assert_eq!(dir("cpu"), "/sys/fs/cgroup/cpu/");
        assert_eq!(dir(""), "/sys/fs/cgroup/unified/c");
        assert_eq!(dir("pids"), "");
    }
}
