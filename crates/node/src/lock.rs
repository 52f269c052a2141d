//! Who owns the data folder: one agent at a time, known by process id and start time.
//!
//! Invariants: the kernel's lock decides, not the file's content, so a crash never leaves a folder locked; a
//! process is believed to be the agent only when the lock is held and its start time is the recorded one, so
//! a process id that was reused is never signalled.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::ledger::Started;
use crate::{Error, Home, Result};

/// How the environment of every program of an agent begins to name its dispatch.
const MARK: &[u8] = b"PALYRA_DISPATCH_ID=";

/// Held as long as the value lives.
#[derive(Debug)]
pub(crate) struct FolderLock {
    _file: File,
}

/// The process that holds the folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owner(pub(crate) Started);

impl FolderLock {
    /// Takes the folder; `None` when another process has it.
    pub(crate) fn agent(home: &Home) -> Result<Option<Self>> {
        let path = home.run_dir().join("agent.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path);
        let file = file.map_err(|error| Error::io("open", &path, &error))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(Error::io("lock", &path, &error)),
        }
    }
}

/// Says who runs, for `status` and `stop`. Call with the lock held.
pub(crate) fn record_owner(home: &Home) -> Result<()> {
    let owner = identify(std::process::id()).map(Owner);
    match owner {
        Some(owner) => home.write_json("run/agent.pid", &owner, 0o644),
        // Without /proc nobody can be told apart; better no record than a wrong one.
        None => home.remove("run/agent.pid"),
    }
}

/// The process that holds the folder, when there is one and it is the recorded one.
pub(crate) fn owner(home: &Home) -> Result<Option<u32>> {
    if FolderLock::agent(home)?.is_some() {
        return Ok(None);
    }
    let recorded: Option<Owner> = home.read_json("run/agent.pid")?;
    Ok(recorded
        .filter(|owner| is_alive(&owner.0))
        .map(|owner| owner.0.pid))
}

/// What identifies a living process beyond its id.
pub(crate) fn identify(pid: u32) -> Option<Started> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .ok()?
        .trim()
        .to_owned();
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    Some(Started {
        pid,
        ticks: parse_ticks(&stat)?,
        boot,
    })
}

/// Whether the very same process is still there.
pub(crate) fn is_alive(started: &Started) -> bool {
    identify(started.pid).is_some_and(|now| now == *started)
}

/// Whether something is left of the group that a program led, be it only children of a leader that is gone. Such
/// ones are known by their group and by the variable that every program of an agent has: the group's id alone
/// could be somebody else's by now.
pub(crate) fn is_group_left(leader: &Started) -> bool {
    if is_alive(leader) {
        return true;
    }
    let here = identify(std::process::id()).is_some_and(|here| here.boot == leader.boot);
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    here && processes.map(|entry| entry.path()).any(|process| {
        let stat = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
        parse_group(&stat) == Some(leader.pid)
            && parse_ticks(&stat).is_some_and(|ticks| ticks >= leader.ticks)
            && std::fs::read(process.join("environ")).is_ok_and(|environment| {
                let mut variables = environment.split(|byte| *byte == 0);
                variables.any(|variable| variable.starts_with(MARK))
            })
    })
}

/// Field 5 of `/proc/<pid>/stat`. The second field, the program's name, may hold blanks and parentheses.
fn parse_group(stat: &str) -> Option<u32> {
    field(stat, 5)?.parse().ok()
}

/// Field 22 of `/proc/<pid>/stat`.
fn parse_ticks(stat: &str) -> Option<u64> {
    field(stat, 22)?.parse().ok()
}

fn field(stat: &str, number: usize) -> Option<&str> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(number - 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_owner_and_a_dead_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::create(dir.path()).unwrap();
        assert_eq!(owner(&home).unwrap(), None);
        let lock = FolderLock::agent(&home).unwrap().unwrap();
        record_owner(&home).unwrap();
        assert!(FolderLock::agent(&home).unwrap().is_none());
        assert_eq!(owner(&home).unwrap(), Some(std::process::id()));
        drop(lock);
        assert_eq!(
            owner(&home).unwrap(),
            None,
            "the record is still there, the lock is not"
        );
    }

    #[test]
    fn a_reused_process_id_is_somebody_else() {
        let me = identify(std::process::id()).unwrap();
        assert!(is_alive(&me));
        assert!(!is_alive(&Started {
            ticks: me.ticks + 1,
            ..me.clone()
        }));
        assert!(!is_alive(&Started {
            boot: "another boot".to_owned(),
            ..me
        }));
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = format!(
            "5 (a) b (c) S {} 777 0",
            (1..=18).map(|n| n.to_string()).collect::<Vec<_>>().join(" ")
        );
        assert_eq!((parse_ticks(&stat), parse_group(&stat)), (Some(777), Some(2)));
    }
}
