//! Machines without memory or processor time: control groups of the kernel, of both versions.
//!
//! The groups are the one thing of a run that the kernel does not take away with its namespaces. They are made
//! below the harness's own group, named after its process, removed at the end of each fault, and those that a
//! killed run left are removed by the next.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use tokio::process::{Child, Command};

use super::{Evidence, Fault, Kind, Nemesis, Scene, revive};
use crate::abilities::{Abilities, Ability};
use crate::chance::Chance;
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

pub(super) const KINDS: &[Kind] = &[
    Kind {
        name: "memory",
        argument: None,
        does: "a limit of memory and a balloon in it, until the kernel kills the replica for want of memory",
        needs: &[Ability::Cgroups],
        all: Some(""),
        make: |_| Ok(Box::new(Limit { sort: Sort::Memory })),
    },
    Kind {
        name: "cpu",
        argument: None,
        does: "2 to 15 hundredths of one processor for a while",
        needs: &[Ability::Cgroups],
        all: Some(""),
        make: |_| Ok(Box::new(Limit { sort: Sort::Cpu })),
    },
];

/// Where the kernel shows control groups.
const ROOT: &str = "/sys/fs/cgroup";
/// What a replica may still take: little, so that the balloon has it full at once.
const MEMORY: u64 = 48 << 20;
/// The kernel's usual period, in microseconds.
const PERIOD_US: u64 = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Memory,
    Cpu,
}

impl Sort {
    fn word(self) -> &'static str {
        match self {
            Sort::Memory => "memory",
            Sort::Cpu => "cpu",
        }
    }
}

/// A group of the harness's own.
struct Group {
    folder: PathBuf,
    parent: PathBuf,
    /// One tree of all controllers, as version 2 has it.
    unified: bool,
}

impl Group {
    /// Makes one with this controller.
    fn make(sort: Sort, name: &str) -> Result<Group> {
        let own = fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
        let (parent, unified) = parent(&own, sort, Path::new(ROOT))?;
        sweep(&parent);
        let folder = parent.join(format!("jepsen-{}-{name}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let group = Group {
            folder,
            parent,
            unified,
        };
        // Without a file of its controller it limits nothing.
        let file = group.folder.join(match (sort, unified) {
            (Sort::Memory, true) => "memory.max",
            (Sort::Memory, false) => "memory.limit_in_bytes",
            (Sort::Cpu, true) => "cpu.max",
            (Sort::Cpu, false) => "cpu.cfs_quota_us",
        });
        if !file.exists() {
            bail!(
                "the {} controller is not there: {} is missing",
                sort.word(),
                file.display()
            );
        }
        Ok(group)
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.folder.join(file);
        fs::write(&path, text).with_context(|| format!("cannot write {text} to {}", path.display()))
    }

    fn limit(&self, sort: Sort, amount: u64) -> Result<()> {
        match (sort, self.unified) {
            (Sort::Memory, true) => {
                self.write("memory.max", &amount.to_string())?;
                // Absent without swap.
                drop(self.write("memory.swap.max", "0"));
                Ok(())
            }
            (Sort::Memory, false) => self.write("memory.limit_in_bytes", &amount.to_string()),
            (Sort::Cpu, true) => self.write("cpu.max", &format!("{amount} {PERIOD_US}")),
            (Sort::Cpu, false) => {
                self.write("cpu.cfs_period_us", &PERIOD_US.to_string())?;
                self.write("cpu.cfs_quota_us", &amount.to_string())
            }
        }
    }

    fn enter(&self, pid: u32) -> Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// How often the kernel has killed in it for want of memory, or has held it back.
    fn hits(&self, sort: Sort) -> u64 {
        let (file, key) = match (sort, self.unified) {
            (Sort::Memory, true) => ("memory.events", "oom_kill"),
            (Sort::Memory, false) => ("memory.oom_control", "oom_kill"),
            (Sort::Cpu, _) => ("cpu.stat", "nr_throttled"),
        };
        figure(
            &fs::read_to_string(self.folder.join(file)).unwrap_or_default(),
            key,
        )
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        remove(&self.folder, &self.parent);
    }
}

/// The line `key number` of a page.
fn figure(page: &str, key: &str) -> u64 {
    let mut lines = page.lines().filter_map(|line| line.split_once(' '));
    let found = lines.find(|(name, _)| *name == key);
    found
        .and_then(|(_, number)| number.trim().parse().ok())
        .unwrap_or(0)
}

/// Moves what is in a group to its parent and removes it.
fn remove(folder: &Path, parent: &Path) {
    for pid in fs::read_to_string(folder.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
    {
        // It may have ended just now.
        drop(fs::write(parent.join("cgroup.procs"), pid));
    }
    // One that is busy is left for the next run.
    drop(fs::remove_dir(folder));
}

/// Removes groups of harnesses that are no more.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("jepsen-") && entry.path().join("cgroup.procs").exists() {
            let empty =
                fs::read_to_string(entry.path().join("cgroup.procs")).is_ok_and(|page| page.is_empty());
            if empty {
                drop(fs::remove_dir(entry.path()));
            }
        }
    }
}

/// The folder of the harness's own group for a controller, from `/proc/self/cgroup`, and whether it is of version 2.
fn parent(own: &str, sort: Sort, root: &Path) -> Result<(PathBuf, bool)> {
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let path = path.trim_start_matches('/');
        if controllers.split(',').any(|controller| controller == sort.word()) {
            return Ok((existing(&root.join(sort.word()), path), false));
        }
    }
    if root.join("cgroup.controllers").exists() {
        let line = own.lines().find_map(|line| line.strip_prefix("0::/"));
        return Ok((existing(root, line.unwrap_or_default()), true));
    }
    bail!("there is no {} controller below {}", sort.word(), root.display())
}

/// The path within the tree if it can be seen from here, else the tree's root.
fn existing(tree: &Path, path: &str) -> PathBuf {
    let full = tree.join(path);
    if full.is_dir() { full } else { tree.to_owned() }
}

/// Notes whether processes can be limited here: by making a group of each sort, which is removed again.
pub(crate) fn note(abilities: &mut Abilities) {
    let tried = [Sort::Memory, Sort::Cpu].iter().try_for_each(|sort| {
        let group = Group::make(*sort, "probe")?;
        group.limit(*sort, MEMORY)
    });
    match tried {
        Ok(()) => abilities.yes(Ability::Cgroups),
        Err(error) => abilities.no(Ability::Cgroups, format!("{error:#}")),
    }
}

struct Limit {
    sort: Sort,
}

struct Limited {
    sort: Sort,
    replicas: Vec<LimitedReplica>,
}

struct LimitedReplica {
    id: u64,
    pid: u32,
    // Before its group, which can only be removed without it.
    balloon: Option<Child>,
    group: Group,
}

/// Fills what memory its group has.
fn balloon(group: &Group) -> Result<Child> {
    let script = format!(
        "echo $$ > {}/cgroup.procs && exec tail /dev/zero",
        group.folder.display()
    );
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--", "sh", "-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("the balloon does not start")
}

#[async_trait]
impl Nemesis for Limit {
    fn name(&self) -> &str {
        self.sort.word()
    }

    fn targets(&self) -> &'static [Target] {
        &[Target::Leader, Target::One, Target::Minority]
    }

    fn lasts(&self) -> (Duration, Duration) {
        (Duration::from_secs(2), Duration::from_secs(6))
    }

    fn draw(&self, chance: &mut Chance, _: &Scene) -> String {
        match self.sort {
            Sort::Memory => String::new(),
            Sort::Cpu => chance.between(2, 15).to_string(),
        }
    }

    async fn start(&self, run: &Arc<Run>, step: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let amount = match self.sort {
            Sort::Memory => MEMORY,
            Sort::Cpu => {
                let share: u64 = step
                    .draw
                    .parse()
                    .with_context(|| format!("{:?} is no share", step.draw))?;
                share * PERIOD_US / 100
            }
        };
        let mut replicas = Vec::new();
        for id in targets {
            let Some(pid) = run.cluster.pid(*id) else { continue };
            let group = Group::make(self.sort, &format!("{}-r{id}", step.number))?;
            group.limit(self.sort, amount)?;
            group.enter(pid)?;
            let mut balloon_of = None;
            if self.sort == Sort::Memory {
                run.cluster.may_end(*id)?;
                // When there is nothing left, the replica goes first, not the balloon.
                let score = format!("/proc/{pid}/oom_score_adj");
                fs::write(&score, "1000").with_context(|| format!("cannot write {score}"))?;
                balloon_of = Some(balloon(&group)?);
            }
            replicas.push(LimitedReplica {
                id: *id,
                pid,
                balloon: balloon_of,
                group,
            });
        }
        if replicas.is_empty() {
            bail!("none of {targets:?} was running");
        }
        Ok(Box::new(Limited {
            sort: self.sort,
            replicas,
        }))
    }
}

#[async_trait]
impl Fault for Limited {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let mut happened = true;
        let mut seen = Vec::new();
        for mut limited in self.replicas {
            if let Some(mut balloon) = limited.balloon.take() {
                // The kernel needs a moment to find that it has nothing left.
                happened &= revive::ends(run, limited.id, Some(limited.pid), Duration::from_secs(5)).await;
                drop(balloon.kill().await);
            }
            let hits = limited.group.hits(self.sort);
            happened &= hits > 0;
            seen.push(match self.sort {
                Sort::Memory => format!(
                    "r{}: the kernel killed {hits} times for want of memory",
                    limited.id
                ),
                Sort::Cpu => format!("r{}: it was held back in {hits} periods", limited.id),
            });
            drop(limited.group);
            revive::serves(run, limited.id).await?;
            if self.sort == Sort::Memory {
                run.cluster.must_live(limited.id)?;
            }
        }
        Ok(Evidence::when(happened, seen.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_by_their_whole_name() {
        let page = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
        assert_eq!((figure(page, "oom_kill"), figure(page, "oom")), (3, 0));
    }

    #[test]
    fn the_own_group_is_found_in_both_versions() {
        let root = tempfile::tempdir().unwrap();
        let (memory, below) = (root.path().join("memory"), root.path().join("memory/user/x"));
        fs::create_dir_all(&below).unwrap();
        let own = "4:memory:/user/x\n3:cpu,cpuacct:/y\n0::/z\n";
        assert_eq!(parent(own, Sort::Memory, root.path()).unwrap(), (below, false));
        assert_eq!(
            parent("4:memory:/not/seen/here", Sort::Memory, root.path()).unwrap(),
            (memory, false)
        );
        assert!(parent("0::/z", Sort::Memory, root.path()).is_err());
        fs::write(root.path().join("cgroup.controllers"), "memory").unwrap();
        assert_eq!(
            parent("0::/z", Sort::Memory, root.path()).unwrap(),
            (root.path().to_owned(), true)
        );
    }
}
