//! Disks that refuse, lie, dawdle, hang and fill up, by commands to the file system below a replica.
//!
//! After an error of a write or a sync nobody knows what is on the disk, so the daemon has to end and read it
//! again: one that goes on is written into the history (`survived-disk-error`), which the judge calls a violation.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use palyra_jepsen_faultfs as faultfs;
use palyra_jepsen_faultfs::{FaultId, Handle, Keep, Operation, PowerLoss};
use serde_json::json;

use super::{Evidence, Fault, Kind, Nemesis, Scene, power, revive};
use crate::abilities::Ability;
use crate::chance::Chance;
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

/// The event of a daemon that went on after its disk had failed a write or a sync.
pub(crate) const SURVIVED: &str = "survived-disk-error";

/// For the daemon to end after such an error: what it was at may take a moment to come to it.
const TO_END: Duration = Duration::from_secs(10);
/// Nobody should have to wait longer for a disk that hangs than the longest fault lasts.
const WATCHDOG: Duration = Duration::from_secs(60);

const fn kind(name: &'static str, does: &'static str, make: fn(&str) -> Result<Box<dyn Nemesis>>) -> Kind {
    Kind {
        name,
        argument: None,
        does,
        needs: &[Ability::Fuse],
        all: Some(""),
        make,
    }
}

pub(super) const KINDS: &[Kind] = &[
    kind(
        "disk:eio",
        "reads, writes or syncs answer EIO for a while",
        |_| made(Way::Eio),
    ),
    kind(
        "disk:fsync-eio-once",
        "one sync answers EIO, its bytes are lost, and the next would succeed",
        |_| made(Way::SyncEioOnce),
    ),
    kind("disk:slow-fsync", "syncs take 20 to 500 ms longer", |_| {
        made(Way::SlowSync)
    }),
    kind("disk:stall", "writes and syncs get no answer for a while", |_| {
        made(Way::Stall)
    }),
    kind(
        "disk:full",
        "writes answer ENOSPC until there is space again",
        |_| made(Way::Full),
    ),
    Kind {
        name: "disk:lost-fsync",
        argument: None,
        does: "syncs say yes and do nothing, then the power goes: breaks any consensus, to see that it shows",
        needs: &[Ability::Fuse],
        // No replicated log survives a majority of such disks, nor always a minority.
        all: None,
        make: |_| made(Way::LostSync),
    },
];

fn made(way: Way) -> Result<Box<dyn Nemesis>> {
    Ok(Box::new(Disk { way }))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Eio,
    SyncEioOnce,
    LostSync,
    SlowSync,
    Stall,
    Full,
}

struct Disk {
    way: Way,
}

/// The words for what EIO meets, in a plan.
const MEETS: &[(&str, Operation)] = &[
    ("read", Operation::Read),
    ("write", Operation::Write),
    ("sync", Operation::Sync),
];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Eio => "disk:eio",
            Way::SyncEioOnce => "disk:fsync-eio-once",
            Way::LostSync => "disk:lost-fsync",
            Way::SlowSync => "disk:slow-fsync",
            Way::Stall => "disk:stall",
            Way::Full => "disk:full",
        }
    }

    fn draw(self, chance: &mut Chance) -> String {
        match self {
            Way::Eio => chance.one(MEETS).0.to_owned(),
            Way::SlowSync => chance.between(20, 500).to_string(),
            // How many bytes are left: some of the time a few writes still fit.
            Way::Full => chance.one(&[0, 4096, 16_384]).to_string(),
            Way::SyncEioOnce | Way::LostSync | Way::Stall => String::new(),
        }
    }

    /// Whether the daemon must not go on after this has met it.
    fn must_end(self, draw: &str) -> bool {
        match self {
            Way::SyncEioOnce => true,
            Way::Eio => draw != "read",
            _ => false,
        }
    }

    fn begin(self, disk: &Handle, draw: &str) -> Result<Begun> {
        let number = || {
            draw.parse::<u64>()
                .with_context(|| format!("{draw:?} is no number"))
        };
        let fault = match self {
            Way::Eio => {
                let found = MEETS.iter().find(|(word, _)| *word == draw);
                let (_, meets) = found.with_context(|| format!("{draw:?} is nothing that EIO meets"))?;
                faultfs::Fault::eio(&[*meets])
            }
            Way::SyncEioOnce => faultfs::Fault::fsync_eio_once(),
            Way::LostSync => faultfs::Fault::lost_fsync(),
            Way::SlowSync => faultfs::Fault::slow_fsync(Duration::from_millis(number()?)),
            Way::Stall => {
                faultfs::Fault::stall(&[Operation::Write, Operation::Sync, Operation::Name], WATCHDOG)
            }
            Way::Full => {
                let before = disk.counters().full;
                disk.fill(number()?);
                return Ok(Begun::Space { before });
            }
        };
        Ok(Begun::Fault(disk.inject(fault)))
    }
}

enum Begun {
    Fault(FaultId),
    /// With how many requests had found it full before.
    Space {
        before: u64,
    },
}

impl Begun {
    /// How many requests it has met.
    fn hits(&self, disk: &Handle) -> u64 {
        match self {
            Begun::Fault(fault) => disk.hits(*fault),
            Begun::Space { before } => disk.counters().full - before,
        }
    }

    fn end(&self, disk: &Handle) {
        match self {
            Begun::Fault(fault) => drop(disk.clear(*fault)),
            Begun::Space { .. } => disk.set_quota(u64::MAX),
        }
    }
}

struct Ill {
    way: Way,
    draw: String,
    disks: Vec<IllDisk>,
}

struct IllDisk {
    id: u64,
    disk: Handle,
    begun: Begun,
    /// The process that met it.
    pid: Option<u32>,
}

#[async_trait]
impl Nemesis for Disk {
    fn name(&self) -> &str {
        self.way.name()
    }

    fn targets(&self) -> &'static [Target] {
        match self.way {
            Way::LostSync => &[Target::All],
            Way::Full => &[Target::All, Target::Leader, Target::Minority],
            _ => &[Target::Leader, Target::One, Target::Minority],
        }
    }

    fn lasts(&self) -> (Duration, Duration) {
        let (shortest, longest) = match self.way {
            Way::Stall => (1, 8),
            // What is left has to be written first.
            Way::Full => (3, 6),
            _ => (1, 5),
        };
        (Duration::from_secs(shortest), Duration::from_secs(longest))
    }

    fn draw(&self, chance: &mut Chance, _: &Scene) -> String {
        self.way.draw(chance)
    }

    async fn start(&self, run: &Arc<Run>, step: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let mut disks = Vec::new();
        for id in targets {
            let disk = run.cluster.disks().handle(*id)?;
            let pid = run.cluster.pid(*id);
            if pid.is_none() {
                continue;
            }
            run.cluster.may_end(*id)?;
            let begun = self.way.begin(&disk, &step.draw)?;
            disks.push(IllDisk {
                id: *id,
                disk,
                begun,
                pid,
            });
        }
        if disks.is_empty() {
            bail!("none of {targets:?} was running");
        }
        Ok(Box::new(Ill {
            way: self.way,
            draw: step.draw.clone(),
            disks,
        }))
    }
}

#[async_trait]
impl Fault for Ill {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let looks = self.disks.iter().map(|ill| self.heal(run, ill));
        let seen = futures::future::try_join_all(looks).await?;
        let happened = seen.iter().all(|(met, _)| *met);
        let seen: Vec<String> = seen.into_iter().map(|(_, seen)| seen).collect();
        Ok(Evidence::when(happened, seen.join("; ")))
    }
}

impl Ill {
    /// Ends the fault on one disk and has its replica serve again. Whether it met anything, and what was seen.
    async fn heal(&self, run: &Arc<Run>, ill: &IllDisk) -> Result<(bool, String)> {
        let hits = ill.begun.hits(&ill.disk);
        let mut seen = format!("r{}: {hits} requests met it", ill.id);
        if self.way.must_end(&self.draw) && hits > 0 {
            if revive::ends(run, ill.id, ill.pid, TO_END).await {
                seen += ", its process ended";
            } else {
                seen += ", and its process went on";
                let value =
                    json!({"replica": format!("r{}", ill.id), "nemesis": self.way.name(), "hits": hits});
                run.record.fault(SURVIVED, value);
            }
        }
        if self.way == Way::LostSync {
            let loss = PowerLoss {
                keep: Keep::Nothing,
                strict_dir: false,
                seed: 0,
            };
            for (_, lost) in power::cut(run, &loss, &[ill.id]).await?.values() {
                seen += &format!(", {}", power::tell(lost));
            }
        }
        ill.begun.end(&ill.disk);
        revive::serves(run, ill.id).await?;
        run.cluster.must_live(ill.id)?;
        Ok((hits > 0, seen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_has_its_name_and_reads_what_it_draws() {
        let ways = [
            Way::Eio,
            Way::SyncEioOnce,
            Way::LostSync,
            Way::SlowSync,
            Way::Stall,
            Way::Full,
        ];
        let mut chance = Chance::of(1);
        for way in ways {
            assert!(KINDS.iter().any(|kind| kind.name == way.name()));
            for _ in 0..20 {
                let draw = way.draw(&mut chance);
                match way {
                    Way::Eio => assert!(MEETS.iter().any(|(word, _)| *word == draw)),
                    Way::SlowSync | Way::Full => drop(draw.parse::<u64>().unwrap()),
                    _ => assert!(draw.is_empty()),
                }
            }
        }
        assert!(Way::Eio.must_end("sync") && Way::SyncEioOnce.must_end("") && !Way::Eio.must_end("read"));
    }
}
