//! What one lease has on this machine: its folder and its control groups; and their end.
//!
//! ```text
//! worker/leases/<lease>/work   in/ and out/: what the tool sees as its working folder
//! worker/leases/<lease>/tool   the tool's files, as they were attested
//! worker/leases/<lease>/root   empty: where its root is mounted, in its own namespace only
//! worker/leases/<lease>/params its standard input
//! ```
//!
//! Invariant: a place is clean when no process is in its groups, its folder is gone and its groups are gone;
//! anything else is an error that says what is left.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cgroup::{self, Groups};
use super::folder::{self, Removed};
use super::spec::{Bounds, Spec, boot_ms};

/// How long what was killed may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Where one lease lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its folder.
    pub dir: PathBuf,
    /// Folders of its control groups.
    pub groups: Vec<PathBuf>,
    held: Vec<String>,
}

impl Place {
    /// Makes a new one. What an earlier life left under the same name is removed first.
    ///
    /// Errors: a disk that does not take it, leftovers that do not go.
    pub fn make(base: &Path, lease_id: &str, bounds: &Bounds) -> io::Result<Self> {
        let dir = base.join(lease_id);
        folder::remove(&dir)?;
        folder::make(base, 0o700)?;
        for (name, mode) in [("", 0o700), ("work", 0o755), ("tool", 0o755), ("root", 0o700)] {
            folder::make(&dir.join(name), mode)?;
        }
        for name in ["in", "out"] {
            folder::make(&dir.join("work").join(name), 0o700)?;
        }
        let Groups { dirs, held } = Groups::make(lease_id, bounds);
        Ok(Self {
            dir,
            groups: dirs,
            held,
        })
    }

    /// One of an earlier life, by its record.
    #[must_use]
    pub fn left(base: &Path, lease_id: &str, groups: Vec<PathBuf>) -> Self {
        Self {
            dir: base.join(lease_id),
            groups,
            held: Vec::new(),
        }
    }

    /// Its working folder.
    #[must_use]
    pub fn work(&self) -> PathBuf {
        self.dir.join("work")
    }

    /// The folder of the tool's files.
    #[must_use]
    pub fn tool(&self) -> PathBuf {
        self.dir.join("tool")
    }

    /// Writes the standard input, and hands what the tool may change to its user.
    ///
    /// Errors: a disk that does not take it.
    pub fn fill(&self, params: &[u8], uid: Option<u32>) -> io::Result<()> {
        let mut file = folder::create(&self.dir.join("params"), 0o400)?;
        file.write_all(params)?;
        if let Some(uid) = uid {
            for name in ["in", "out"] {
                folder::give(&self.work().join(name), uid)?;
            }
        }
        Ok(())
    }

    /// Puts into a spec what is of this place.
    pub fn describe(&self, spec: &mut Spec) {
        spec.params = self.dir.join("params");
        spec.tool_dir = self.tool();
        spec.work_dir = self.work();
        spec.root_dir = self.dir.join("root");
        spec.cgroup_procs = self.procs();
        spec.cgroups.clone_from(&self.held);
    }

    /// Whether the kernel ended something of it for want of memory.
    #[must_use]
    pub fn out_of_memory(&self) -> bool {
        let groups = Groups {
            dirs: self.groups.clone(),
            held: Vec::new(),
        };
        groups.out_of_memory()
    }

    fn procs(&self) -> Vec<PathBuf> {
        self.groups.iter().map(|dir| dir.join("cgroup.procs")).collect()
    }

    /// Ends what still runs, and removes everything. May be repeated.
    ///
    /// Errors: what is left, and why.
    pub fn clean(&self) -> io::Result<(u64, u64)> {
        cgroup::kill_all(&self.procs());
        let left = cgroup::wait_empty(&self.procs(), GONE_WITHIN);
        if !left.is_empty() {
            return Err(io::Error::other(format!("processes {left:?} do not end")));
        }
        let left = end_strays(&self.dir);
        if !left.is_empty() {
            return Err(io::Error::other(format!(
                "processes {left:?} have the lease in their environment"
            )));
        }
        let Removed { files, bytes } = folder::remove(&self.dir)?;
        cgroup::remove(&self.groups)?;
        if fs::symlink_metadata(&self.dir).is_ok() {
            return Err(io::Error::other(format!("{} is still there", self.dir.display())));
        }
        Ok((files, bytes))
    }
}

/// Ends processes that have this lease in their environment: only where there are no groups and the warden
/// was killed can there be any. Answers those that do not end.
fn end_strays(dir: &Path) -> Vec<i32> {
    let Some(lease_id) = dir.file_name().and_then(|name| name.to_str()) else {
        return Vec::new();
    };
    let until = boot_ms() + u64::try_from(GONE_WITHIN.as_millis()).unwrap_or(0);
    loop {
        let left = strays(lease_id);
        if left.is_empty() || boot_ms() >= until {
            return left;
        }
        for pid in left {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn strays(lease_id: &str) -> Vec<i32> {
    let wanted = format!("PALYRA_LEASE_ID={lease_id}");
    let has = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment
            .split(|byte| *byte == 0)
            .any(|variable| variable == wanted.as_bytes())
    };
    let listed = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(std::result::Result::ok);
    listed
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(has)
        .collect()
}
