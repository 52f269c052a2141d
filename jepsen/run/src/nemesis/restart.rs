//! Restarts in good order, one replica after the other, with the same binary or another.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;

use super::{Evidence, Fault, Kind, Nemesis};
use crate::abilities::Ability;
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

pub(super) const KINDS: &[Kind] = &[
    Kind {
        name: "restart",
        argument: None,
        does: "replicas are stopped by SIGTERM and started, one after the other, as an upgrade does",
        needs: &[],
        all: Some(""),
        make: |_| Ok(Box::new(Restart)),
    },
    Kind {
        name: "upgrade",
        argument: None,
        does: "some replicas run the old binary for a while, then the new one again (--old-binary)",
        needs: &[Ability::OldBinary],
        all: Some(""),
        make: |_| Ok(Box::new(Upgrade)),
    },
];

/// For a replica to have caught up after its start, before the next one is stopped.
const CAUGHT_UP: Duration = Duration::from_secs(15);

struct Restart;

struct Restarted {
    seen: Vec<String>,
    complete: bool,
}

#[async_trait]
impl Nemesis for Restart {
    fn name(&self) -> &str {
        "restart"
    }

    fn targets(&self) -> &'static [Target] {
        &[Target::All, Target::Leader, Target::One]
    }

    fn lasts(&self) -> (Duration, Duration) {
        (Duration::ZERO, Duration::ZERO)
    }

    async fn start(&self, run: &Arc<Run>, _: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let mut restarted = Restarted {
            seen: Vec::new(),
            complete: true,
        };
        for id in targets {
            match roll(run, *id).await {
                Ok(seen) => restarted.seen.push(seen),
                Err(error) => {
                    restarted.complete = false;
                    restarted.seen.push(format!("r{id}: {error:#}"));
                }
            }
        }
        Ok(Box::new(restarted))
    }
}

#[async_trait]
impl Fault for Restarted {
    async fn stop(self: Box<Self>, _: &Arc<Run>) -> Result<Evidence> {
        Ok(Evidence::when(
            self.complete && !self.seen.is_empty(),
            self.seen.join("; "),
        ))
    }
}

/// One replica: down, up, caught up. Answers what was seen.
async fn roll(run: &Arc<Run>, id: u64) -> Result<String> {
    let old = run.cluster.pid(id).context("it does not run")?;
    let stopped = run.cluster.terminate(id).await;
    // Also one that did not stop in good order has to come back.
    run.cluster.start(id).await?;
    stopped?;
    caught_up(run, id).await;
    let new = run.cluster.pid(id).context("it does not run after its start")?;
    ensure!(new != old, "it is the same process");
    Ok(format!("r{id}: process {old} stopped in order, {new} serves"))
}

/// Waits until it has applied what any other has now, a while at most.
async fn caught_up(run: &Arc<Run>, id: u64) {
    let others = run
        .cluster
        .up()
        .into_iter()
        .filter_map(|other| run.leaders.last(other));
    let wanted = others.map(|metrics| metrics.applied()).max().unwrap_or(0);
    let until = tokio::time::Instant::now() + CAUGHT_UP;
    while tokio::time::Instant::now() < until {
        if run
            .cluster
            .metrics(id)
            .await
            .is_ok_and(|metrics| metrics.applied() >= wanted)
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

struct Upgrade;

struct Mixed {
    ids: Vec<u64>,
    seen: Vec<String>,
    complete: bool,
}

#[async_trait]
impl Nemesis for Upgrade {
    fn name(&self) -> &str {
        "upgrade"
    }

    fn targets(&self) -> &'static [Target] {
        &[Target::One, Target::Minority, Target::All]
    }

    fn lasts(&self) -> (Duration, Duration) {
        // Two versions side by side for long enough that leadership has been with both.
        (Duration::from_secs(10), Duration::from_secs(20))
    }

    async fn start(&self, run: &Arc<Run>, _: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let folder = run
            .settings
            .old_binary
            .as_ref()
            .context("--old-binary was not given")?;
        let old = folder.join("palyrad");
        let mut mixed = Mixed {
            ids: targets.to_vec(),
            seen: Vec::new(),
            complete: true,
        };
        for id in targets {
            run.cluster
                .launch(*id, |launch| launch.palyrad = Some(old.clone()))?;
            let rolled = roll(run, *id).await;
            let runs = running(run, *id);
            let is_old = rolled.is_ok() && runs.as_ref() == Some(&old.canonicalize()?);
            mixed.complete &= is_old;
            mixed.seen.push(match (rolled, runs) {
                (Ok(_), Some(path)) => format!("r{id} runs {}", path.display()),
                (Ok(_), None) => format!("r{id} does not run"),
                (Err(error), _) => format!("r{id}: {error:#}"),
            });
        }
        Ok(Box::new(mixed))
    }
}

/// The program that a replica is.
fn running(run: &Run, id: u64) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{}/exe", run.cluster.pid(id)?)).ok()
}

#[async_trait]
impl Fault for Mixed {
    async fn stop(mut self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        for id in &self.ids {
            run.cluster.launch(*id, |launch| launch.palyrad = None)?;
            if run.cluster.pid(*id).is_some() {
                self.seen.push(roll(run, *id).await?);
            } else {
                run.cluster.start(*id).await?;
            }
        }
        Ok(Evidence::when(self.complete, self.seen.join("; ")))
    }
}
