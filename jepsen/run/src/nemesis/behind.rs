//! One replica is cut off until the others have purged what it lacks from their logs: it must be healed by a snapshot.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use async_trait::async_trait;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Evidence, Fault, Kind, Nemesis};
use crate::abilities::Ability;
use crate::net::{Layer, Rule, Seat, between};
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

pub(super) const KINDS: &[Kind] = &[Kind {
    name: "isolate-until-snapshot",
    argument: None,
    does: "a follower is cut off until the others' logs no longer hold what it lacks; a snapshot must heal it",
    needs: &[Ability::Network, Ability::ShortLog],
    all: Some(""),
    make: |_| Ok(Box::new(Behind::default())),
}];

const CALL: Duration = Duration::from_secs(3);
/// For the purge: the load has to write more entries than a log keeps.
const PURGE: Duration = Duration::from_secs(30);
/// For the snapshot to arrive after the cut was lifted.
const HEAL: Duration = Duration::from_secs(20);

/// Two of them at a time would leave three replicas without a quorum, and then nobody purges anything.
#[derive(Default)]
struct Behind {
    turn: Arc<Mutex<()>>,
}

struct Cut {
    _turn: OwnedMutexGuard<()>,
    layer: Layer,
    victim: u64,
    /// What it had applied when it was cut off.
    had: u64,
    /// Index up to which another has purged its log; kept up to date by the task.
    purged: JoinHandle<u64>,
    _ends: DropGuard,
}

#[async_trait]
impl Nemesis for Behind {
    fn name(&self) -> &str {
        "isolate-until-snapshot"
    }

    fn targets(&self) -> &'static [Target] {
        &[Target::Follower]
    }

    fn lasts(&self) -> (Duration, Duration) {
        (Duration::from_secs(4), Duration::from_secs(10))
    }

    async fn start(&self, run: &Arc<Run>, _: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let victim = *targets.first().context("nobody to cut off")?;
        let turn = Arc::clone(&self.turn)
            .try_lock_owned()
            .map_err(|_| anyhow!("another is still cut off until it needs a snapshot"))?;
        let others: Vec<u64> = run
            .cluster
            .replicas()
            .into_iter()
            .filter(|id| *id != victim)
            .collect();
        ensure!(others.len() > 1, "there would be no quorum");
        let seats: Vec<Seat> = others.iter().map(|id| Seat::Replica(*id)).collect();
        let layer = run
            .net
            .put(between(&[Seat::Replica(victim)], &seats, Rule::CUT))
            .await?;
        let had = match run.cluster.metrics(victim).await {
            Ok(metrics) => metrics.applied(),
            Err(error) => {
                run.net.lift(layer).await?;
                return Err(error);
            }
        };
        let stop = CancellationToken::new();
        let (told, run) = (stop.clone(), Arc::clone(run));
        let purged = tokio::spawn(async move { purge_past(&run, &others, had, &told).await });
        Ok(Box::new(Cut {
            _turn: turn,
            layer,
            victim,
            had,
            purged,
            _ends: stop.drop_guard(),
        }))
    }
}

/// Has the others make snapshots until one has purged past what the victim had. Answers how far.
async fn purge_past(run: &Arc<Run>, others: &[u64], had: u64, stop: &CancellationToken) -> u64 {
    let mut purged = 0;
    while purged <= had && !stop.is_cancelled() {
        for id in others {
            if let Ok(client) = run.cluster.client(&[*id], CALL) {
                // What is refused now is asked for again.
                drop(client.trigger_snapshot().await);
            }
        }
        tokio::time::sleep(Duration::from_millis(400)).await;
        // Every one of them: the one that leads after the heal is any of them.
        let mut least = u64::MAX;
        for id in others {
            least = least.min(
                run.cluster
                    .metrics(*id)
                    .await
                    .map_or(0, |metrics| metrics.purged()),
            );
        }
        purged = least;
    }
    purged
}

#[async_trait]
impl Fault for Cut {
    fn isolated(&self) -> Vec<u64> {
        vec![self.victim]
    }

    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let Cut {
            layer,
            victim,
            had,
            purged,
            _ends,
            _turn,
        } = *self;
        // The fault is not over before the logs are purged, whatever the plan says of its length.
        let purged = match tokio::time::timeout(PURGE, purged).await {
            Ok(purged) => purged?,
            Err(_) => 0,
        };
        drop(_ends);
        run.net.lift(layer).await?;
        if purged <= had {
            let seen = format!(
                "the others' logs still hold what r{victim} lacks after {} s",
                PURGE.as_secs()
            );
            return Ok(Evidence::when(false, seen));
        }
        let until = tokio::time::Instant::now() + HEAL;
        loop {
            let now = run.cluster.metrics(victim).await.ok();
            let snapshot = now.map_or(0, |metrics| metrics.snapshot());
            if snapshot > had {
                let seen = format!(
                    "r{victim} had {had}, the others purged up to {purged}, its snapshot is of {snapshot}"
                );
                return Ok(Evidence::when(true, seen));
            }
            if tokio::time::Instant::now() > until {
                let seen = format!("r{victim} has no snapshot after {} s", HEAL.as_secs());
                return Ok(Evidence::when(false, seen));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
