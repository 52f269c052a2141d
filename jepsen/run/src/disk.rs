//! Where replicas keep their data, and the command of the disk below each.
//!
//! `--disk faultfs` mounts an own file system below each replica's folder, in memory; `tmpfs` is memory without
//! one, and
//! `dir` the disk that the run is kept on. Never here: faults as a nemesis means them. Invariant: what is mounted
//! here lives in the run's own mount namespace, and ends with it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use palyra_jepsen_faultfs::{FaultFs, Handle, Settings};

use crate::abilities::{Abilities, Ability};
use crate::inside::Ground;

/// What the data folders are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// The file system that fails on command.
    Faultfs,
    /// Memory.
    Tmpfs,
    /// The disk that the run is kept on.
    Dir,
}

impl fmt::Display for Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Medium::Faultfs => "faultfs",
            Medium::Tmpfs => "tmpfs",
            Medium::Dir => "dir",
        })
    }
}

impl Medium {
    /// What `--disk` means on this ground; `needed` says whether a nemesis that was asked for needs faultfs.
    ///
    /// # Errors
    /// When it is no medium, or none that is possible here.
    pub fn choose(wanted: &str, ground: Ground, needed: bool) -> Result<Medium> {
        match wanted {
            "auto" if needed && ground.is_apart() => Ok(Medium::Faultfs),
            "auto" if ground.is_apart() => Ok(Medium::Tmpfs),
            "auto" | "dir" => Ok(Medium::Dir),
            "faultfs" | "tmpfs" if !ground.is_apart() => {
                bail!(
                    "--disk {wanted} needs a mount namespace, which there is none of here; see jepsen doctor"
                )
            }
            "faultfs" => Ok(Medium::Faultfs),
            "tmpfs" => Ok(Medium::Tmpfs),
            other => bail!("--disk {other}: it is faultfs, tmpfs, dir or auto"),
        }
    }
}

/// Chooses what data folders are on, and notes whether they fail on command: by trying, in an empty folder of the
/// run's own.
///
/// # Errors
/// See [`Medium::choose`]; and when faultfs was asked for by name and can't be mounted.
pub fn choose(
    abilities: &mut Abilities,
    wanted: &str,
    ground: Ground,
    needed: bool,
    scratch: &Path,
) -> Result<Medium> {
    let medium = Medium::choose(wanted, ground, needed)?;
    if medium != Medium::Faultfs {
        abilities.no(Ability::Fuse, format!("data is on {medium}; use --disk faultfs"));
        return Ok(medium);
    }
    let tried = std::fs::create_dir_all(scratch)
        .map_err(|error| format!("cannot make {}: {error}", scratch.display()))
        .and_then(|()| palyra_jepsen_faultfs::probe(scratch).map_err(|error| error.to_string()));
    // A folder that stays is empty, and in the run's own.
    drop(std::fs::remove_dir(scratch));
    match tried {
        Ok(()) => abilities.yes(Ability::Fuse),
        Err(why) if wanted == "auto" => {
            abilities.no(Ability::Fuse, why);
            return Ok(Medium::Tmpfs);
        }
        Err(why) => bail!("--disk faultfs: {why}"),
    }
    Ok(medium)
}

/// The disks of a run.
pub struct Disks {
    medium: Medium,
    seed: u64,
    mounted: Mutex<BTreeMap<u64, FaultFs>>,
}

impl Disks {
    /// None yet; see [`Disks::make`].
    #[must_use]
    pub fn new(medium: Medium, seed: u64) -> Disks {
        Disks {
            medium,
            seed,
            mounted: Mutex::default(),
        }
    }

    fn mounted(&self) -> MutexGuard<'_, BTreeMap<u64, FaultFs>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What data folders are on.
    #[must_use]
    pub fn medium(&self) -> Medium {
        self.medium
    }

    /// Makes the disk of a replica that has none.
    ///
    /// # Errors
    /// When it can't be made or mounted.
    pub fn make(&self, id: u64, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        if self.medium == Medium::Faultfs {
            let settings = Settings {
                seed: self.seed ^ id,
                ..Settings::default()
            };
            self.mounted().insert(id, FaultFs::mount(folder, &settings)?);
        }
        Ok(())
    }

    /// The command of a replica's disk.
    ///
    /// # Errors
    /// When it is none that takes commands.
    pub fn handle(&self, id: u64) -> Result<Handle> {
        let mounted = self.mounted();
        let disk = mounted.get(&id).with_context(|| {
            format!(
                "the data of r{id} is on {}, which takes no commands; use --disk faultfs",
                self.medium
            )
        })?;
        Ok(disk.handle())
    }

    /// Lets the requests of a process go on that wait for its disk; it can't be killed before.
    pub fn let_go(&self, id: u64) {
        if let Some(disk) = self.mounted().get(&id) {
            disk.handle().let_go();
        }
    }

    /// Ends all faults of all disks.
    pub fn heal(&self) {
        for disk in self.mounted().values() {
            disk.handle().clear_all();
        }
    }
}

/// Writes a file of the harness's own into a replica's folder so that it survives what becomes of the disk.
///
/// # Errors
/// From the operating system.
pub fn write_durably(path: &Path, text: &str) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        path.parent()
            .map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_medium_is_chosen_by_what_is_asked_for_and_what_is_possible() {
        let choose = |wanted, ground, needed| {
            Medium::choose(wanted, ground, needed).map_err(|error| error.to_string())
        };
        assert_eq!(choose("auto", Ground::Root, true), Ok(Medium::Faultfs));
        assert_eq!(choose("auto", Ground::Root, false), Ok(Medium::Tmpfs));
        assert_eq!(choose("auto", Ground::Loopback, true), Ok(Medium::Dir));
        assert_eq!(choose("dir", Ground::Root, true), Ok(Medium::Dir));
        assert!(
            choose("faultfs", Ground::Loopback, true)
                .unwrap_err()
                .contains("jepsen doctor")
        );
        assert!(choose("ext4", Ground::Root, true).unwrap_err().contains("ext4"));
    }

    #[test]
    fn disks_without_commands_say_how_to_get_some() {
        let folder = tempfile::tempdir().unwrap();
        let disks = Disks::new(Medium::Tmpfs, 1);
        disks.make(1, &folder.path().join("r1")).unwrap();
        let error = disks.handle(1).unwrap_err().to_string();
        assert!(
            error.contains("r1") && error.contains("--disk faultfs"),
            "{error}"
        );
        let mut abilities = Abilities::default();
        let medium = choose(&mut abilities, "tmpfs", Ground::Root, true, folder.path()).unwrap();
        assert_eq!(medium, Medium::Tmpfs);
        assert!(
            abilities
                .has(Ability::Fuse)
                .unwrap_err()
                .contains("--disk faultfs")
        );
    }
}
