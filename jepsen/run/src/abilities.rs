//! What a machine can do, by trying it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::inside::Ground;

/// Something that nemeses and settings need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ability {
    /// Network namespaces with a bridge, and rules of nftables in them.
    Network,
    /// TAP devices.
    Tap,
    /// FUSE file systems.
    Fuse,
    /// Limits of memory and processor time by control groups.
    Cgroups,
    /// Ending a TCP connection of another process.
    SocketKill,
    /// Time namespaces.
    TimeNamespace,
    /// The library that moves a process's wall clock.
    Skew,
    /// A binary with failpoints in it.
    Failpoints,
    /// The binary of an earlier release.
    OldBinary,
    /// A daemon whose log can be kept short, so that a snapshot is needed soon.
    ShortLog,
    /// Machines of the fleet: the workload has some.
    Hosts,
    /// Replicas enough for a ring of majorities: five.
    Ring,
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Ability::Network => "network",
            Ability::Tap => "tap",
            Ability::Fuse => "fuse",
            Ability::Cgroups => "cgroups",
            Ability::SocketKill => "socket-kill",
            Ability::TimeNamespace => "time-namespace",
            Ability::Skew => "skew",
            Ability::Failpoints => "failpoints",
            Ability::OldBinary => "old-binary",
            Ability::ShortLog => "short-log",
            Ability::Hosts => "hosts",
            Ability::Ring => "ring",
        })
    }
}

/// Which of them there are, and why not the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abilities(BTreeMap<Ability, Result<(), String>>);

impl Abilities {
    /// What a ground brings by itself; more is noted by whoever tries it.
    #[must_use]
    pub fn of(ground: Ground) -> Abilities {
        let mut abilities = Abilities::default();
        if ground.is_apart() {
            abilities.yes(Ability::Network);
        } else {
            abilities.no(
                Ability::Network,
                "there are no namespaces here; see jepsen doctor",
            );
        }
        abilities
    }

    /// It is there.
    pub fn yes(&mut self, ability: Ability) {
        self.0.insert(ability, Ok(()));
    }

    /// It is not.
    pub fn no(&mut self, ability: Ability, why: impl Into<String>) {
        self.0.insert(ability, Err(why.into()));
    }

    /// Whether it is there.
    ///
    /// # Errors
    /// Why not.
    pub fn has(&self, ability: Ability) -> Result<(), String> {
        let unknown = || Err("nobody has tried it; see jepsen doctor".to_owned());
        self.0.get(&ability).cloned().unwrap_or_else(unknown)
    }

    /// Whether all of them are there.
    ///
    /// # Errors
    /// Which is not, and why.
    pub fn have(&self, needs: &[Ability]) -> Result<(), String> {
        for need in needs {
            self.has(*need).map_err(|why| format!("it needs {need}: {why}"))?;
        }
        Ok(())
    }
}
