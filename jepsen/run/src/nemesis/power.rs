//! A loss of power: the processes are gone, and with them what they had not synced.
//!
//! SIGKILL, then the disk drops what was not synced by the rule that was drawn. All targets lose it together.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use palyra_jepsen_faultfs::{Keep, Lost, PowerLoss};

use super::{Evidence, Fault, Kind, Nemesis, Scene, revive};
use crate::abilities::Ability;
use crate::chance::Chance;
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

pub(super) const KINDS: &[Kind] = &[Kind {
    name: "power",
    argument: None,
    does: "SIGKILL, and what was not synced is lost: in order, torn, file by file, or all of it; then a start",
    needs: &[Ability::Fuse],
    all: Some(""),
    make: |_| Ok(Box::new(Power)),
}];

struct Power;

/// What is kept, and the word for it in a plan. Not [`Keep::Scatter`]: pages of one log file that reach the disk
/// out of order leave damage in the midst of it, which a replica refuses to start from, and should.
const KEEPS: &[(&str, Keep)] = &[
    ("nothing", Keep::Nothing),
    ("prefix", Keep::Prefix),
    ("torn", Keep::Torn),
    ("file-by-file", Keep::PerFile),
];

/// `torn strict-dir 17`: what is kept, whether names need a sync of their folder, and the seed.
fn draw(chance: &mut Chance) -> String {
    let (word, _) = chance.one(KEEPS);
    let names = if chance.percent(50) {
        "strict-dir"
    } else {
        "journal"
    };
    format!("{word} {names} {}", chance.below(1 << 32))
}

pub(super) fn read(draw: &str) -> Result<PowerLoss> {
    let words: Vec<&str> = draw.split(' ').collect();
    let &[keep, names, seed] = words.as_slice() else {
        bail!("{draw:?} is no loss of power; such as: torn strict-dir 17");
    };
    let found = KEEPS.iter().find(|(word, _)| *word == keep);
    let (_, keep) = found.with_context(|| format!("{keep:?} is nothing that a loss of power keeps"))?;
    Ok(PowerLoss {
        keep: *keep,
        strict_dir: names == "strict-dir",
        seed: seed.parse().with_context(|| format!("{seed:?} is no seed"))?,
    })
}

struct Out {
    lost: BTreeMap<u64, (u32, Lost)>,
}

/// Kills replicas and takes from their disks what was not synced. Those that did not run are left out.
pub(super) async fn cut(
    run: &Arc<Run>,
    loss: &PowerLoss,
    targets: &[u64],
) -> Result<BTreeMap<u64, (u32, Lost)>> {
    let disks = targets.iter().map(|id| run.cluster.disks().handle(*id));
    let disks = disks.collect::<Result<Vec<_>>>()?;
    let kills = targets.iter().map(|id| run.cluster.kill(*id));
    let killed = futures::future::join_all(kills).await;
    let mut lost = BTreeMap::new();
    for ((id, pid), disk) in targets.iter().zip(killed).zip(disks) {
        // Another fault may have it down.
        if let Ok(pid) = pid {
            let own = PowerLoss {
                seed: loss.seed ^ id,
                ..*loss
            };
            lost.insert(*id, (pid, disk.power_loss(&own)));
        }
    }
    Ok(lost)
}

#[async_trait]
impl Nemesis for Power {
    fn name(&self) -> &str {
        "power"
    }

    fn targets(&self) -> &'static [Target] {
        &[Target::All, Target::Minority, Target::Leader, Target::One]
    }

    fn draw(&self, chance: &mut Chance, _: &Scene) -> String {
        draw(chance)
    }

    async fn start(&self, run: &Arc<Run>, step: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let lost = cut(run, &read(&step.draw)?, targets).await?;
        anyhow::ensure!(!lost.is_empty(), "none of {targets:?} was running");
        Ok(Box::new(Out { lost }))
    }
}

#[async_trait]
impl Fault for Out {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        futures::future::try_join_all(self.lost.keys().map(|id| revive::serves(run, *id))).await?;
        let mut happened = true;
        let mut seen = Vec::new();
        for (id, (old, lost)) in &self.lost {
            let alive = std::path::Path::new(&format!("/proc/{old}")).exists();
            happened &= !alive && run.cluster.pid(*id) != Some(*old);
            seen.push(format!("r{id}: process {old} is gone, {}", tell(lost)));
        }
        Ok(Evidence::when(happened, seen.join("; ")))
    }
}

/// What a loss took, for people.
pub(super) fn tell(lost: &Lost) -> String {
    if *lost == Lost::default() {
        return "all had been synced".to_owned();
    }
    format!(
        "not synced: {} edits of {} lost ({} bytes), {} names of {} lost, {} bytes torn off",
        lost.edits,
        lost.edits + lost.kept_edits,
        lost.bytes,
        lost.names,
        lost.names + lost.kept_names,
        lost.torn
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_drawn_is_read() {
        let mut chance = Chance::of(3);
        let mut keeps = Vec::new();
        for _ in 0..200 {
            let loss = read(&draw(&mut chance)).unwrap();
            assert!(loss.keep != Keep::Scatter);
            if !keeps.contains(&(loss.keep, loss.strict_dir)) {
                keeps.push((loss.keep, loss.strict_dir));
            }
        }
        assert_eq!(keeps.len(), 2 * KEEPS.len(), "every way comes");
        for wrong in ["", "torn", "half strict-dir 1", "torn journal x"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
