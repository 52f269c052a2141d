//! What an operator does to a cluster that is busy: hands leadership over, makes snapshots, has certificates
//! replaced. None of it is a fault; all of it is where faults were found in others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;
use palyra_proto::ca::v1::RotateAuthorityRequest;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Evidence, Fault, Kind, Nemesis};
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

const CALL: Duration = Duration::from_secs(3);

pub(super) const KINDS: &[Kind] = &[
    Kind {
        name: "transfer",
        argument: None,
        does: "leadership is handed on, every half to two seconds",
        needs: &[],
        all: Some(""),
        make: |_| Ok(Box::new(Again { deed: Deed::Transfer })),
    },
    Kind {
        name: "snapshot",
        argument: None,
        does: "replicas make snapshots, every half to two seconds, and purge what they may of their logs",
        needs: &[],
        all: Some(""),
        make: |_| Ok(Box::new(Again { deed: Deed::Snapshot })),
    },
    Kind {
        name: "purge",
        argument: None,
        does: "as snapshot, and it counts only when a log was really purged (settings with a short log)",
        needs: &[],
        all: None,
        make: |_| Ok(Box::new(Again { deed: Deed::Purge })),
    },
    Kind {
        name: "cert-rotate",
        argument: None,
        does: "replicas get new issuing authorities and certificates while they serve",
        needs: &[],
        all: Some(""),
        make: |_| Ok(Box::new(Rotate)),
    },
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Deed {
    Transfer,
    Snapshot,
    Purge,
}

/// Does something again and again for as long as the fault lasts.
struct Again {
    deed: Deed,
}

struct Going {
    deed: Deed,
    task: JoinHandle<()>,
    done: Arc<AtomicU64>,
    purged: BTreeMap<u64, u64>,
    _ends: DropGuard,
}

#[async_trait]
impl Nemesis for Again {
    fn name(&self) -> &str {
        match self.deed {
            Deed::Transfer => "transfer",
            Deed::Snapshot => "snapshot",
            Deed::Purge => "purge",
        }
    }

    fn targets(&self) -> &'static [Target] {
        &[]
    }

    fn lasts(&self) -> (Duration, Duration) {
        (Duration::from_secs(2), Duration::from_secs(8))
    }

    async fn start(&self, run: &Arc<Run>, step: &Step, _: &[u64]) -> Result<Box<dyn Fault>> {
        let stop = CancellationToken::new();
        let done = Arc::new(AtomicU64::new(0));
        let (deed, told, count) = (self.deed, stop.clone(), Arc::clone(&done));
        let mut chance = run.chance(&format!("{} {}", step.nemesis, step.number));
        let here = Arc::clone(run);
        let task = tokio::spawn(async move {
            while !told.is_cancelled() {
                let did = match deed {
                    Deed::Transfer => transfer(&here).await,
                    Deed::Snapshot | Deed::Purge => snapshot(&here).await,
                };
                count.fetch_add(did, Ordering::Relaxed);
                let pause = Duration::from_millis(chance.between(500, 2_000));
                tokio::select! {
                    () = tokio::time::sleep(pause) => {},
                    () = told.cancelled() => {},
                }
            }
        });
        Ok(Box::new(Going {
            deed,
            task,
            done,
            purged: purged(run),
            _ends: stop.drop_guard(),
        }))
    }
}

#[async_trait]
impl Fault for Going {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let Going {
            deed,
            task,
            done,
            purged: before,
            _ends,
        } = *self;
        drop(_ends);
        drop(task.await);
        let count = done.load(Ordering::Relaxed);
        Ok(match deed {
            Deed::Transfer => Evidence::when(count > 0, format!("leadership went to another {count} times")),
            Deed::Snapshot => Evidence::when(count > 0, format!("{count} snapshots were made")),
            Deed::Purge => {
                let rose = purged(run)
                    .into_iter()
                    .filter(|(id, now)| before.get(id).is_some_and(|then| now > then));
                let names: Vec<String> = rose.map(|(id, index)| format!("r{id} up to {index}")).collect();
                Evidence::when(
                    !names.is_empty(),
                    format!("{count} snapshots; purged: {}", names.join(", ")),
                )
            }
        })
    }
}

fn purged(run: &Run) -> BTreeMap<u64, u64> {
    let ids = run.cluster.replicas().into_iter();
    ids.filter_map(|id| Some((id, run.leaders.last(id)?.purged())))
        .collect()
}

/// Hands leadership to whoever is fit for it. Answers how often that was seen to have happened.
async fn transfer(run: &Arc<Run>) -> u64 {
    let Some(before) = run.leaders.now() else { return 0 };
    let Ok(client) = run.cluster.client(&[before.replica], CALL) else {
        return 0;
    };
    match client.transfer_leader(0).await {
        Ok(answer) => u64::from(answer.leader_id != 0 && answer.leader_id != before.replica),
        Err(_) => 0,
    }
}

/// Answers how many were made.
async fn snapshot(run: &Arc<Run>) -> u64 {
    let mut made = 0;
    for id in run.cluster.up() {
        let Ok(client) = run.cluster.client(&[id], CALL) else {
            continue;
        };
        made += u64::from(
            client
                .trigger_snapshot()
                .await
                .is_ok_and(|answer| answer.index > 0),
        );
    }
    made
}

struct Rotate;

struct Rotated {
    /// Ends of the replicas' certificates before.
    before: BTreeMap<u64, u64>,
    asked: u32,
}

#[async_trait]
impl Nemesis for Rotate {
    fn name(&self) -> &str {
        "cert-rotate"
    }

    fn targets(&self) -> &'static [Target] {
        &[Target::One, Target::Leader]
    }

    fn lasts(&self) -> (Duration, Duration) {
        (Duration::from_secs(3), Duration::from_secs(8))
    }

    async fn start(&self, run: &Arc<Run>, _: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let client = run.cluster.client_of_all(CALL)?;
        let before = ends(run).await?;
        let mut asked = 0;
        for id in targets {
            let request = RotateAuthorityRequest {
                replica_id: *id,
                reason: "jepsen".to_owned(),
                ..Default::default()
            };
            asked += client.rotate_authority(request).await?.asked;
        }
        Ok(Box::new(Rotated { before, asked }))
    }
}

#[async_trait]
impl Fault for Rotated {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let after = ends(run).await?;
        let changed: Vec<String> = after
            .into_iter()
            .filter(|(id, end)| self.before.get(id).is_some_and(|before| before != end))
            .map(|(id, _)| format!("r{id}"))
            .collect();
        let seen = format!(
            "{} asked; other certificates are shown by: {}",
            self.asked,
            changed.join(", ")
        );
        Ok(Evidence::when(!changed.is_empty(), seen))
    }
}

/// When the certificate that each replica shows ends.
async fn ends(run: &Arc<Run>) -> Result<BTreeMap<u64, u64>> {
    let status = run.cluster.client_of_all(CALL)?.status().await?;
    let ends = status
        .replicas
        .into_iter()
        .map(|replica| (replica.id, replica.certificate_not_after_ms));
    Ok(ends.filter(|(_, end)| *end > 0).collect())
}
