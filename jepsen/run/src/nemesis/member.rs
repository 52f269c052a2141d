//! Membership: a replica joins, another is removed, and what was removed must not come back.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use palyra_client::new_ulid;
use palyra_proto::cluster::v1::RemoveReplicaRequest;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{Evidence, Fault, Kind, Nemesis, Scene};
use crate::chance::Chance;
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

pub(super) const KINDS: &[Kind] = &[
    Kind {
        name: "member:add",
        argument: None,
        does: "a replica joins, is promoted, and is removed after the fault",
        needs: &[],
        all: Some(""),
        make: |_| Ok(Box::new(Member { replace: false })),
    },
    Kind {
        name: "member:replace",
        argument: None,
        does: "a replica is killed and removed, another takes its place; its old self is started and must not count",
        needs: &[],
        all: Some(""),
        make: |_| Ok(Box::new(Member { replace: true })),
    },
];

const CALL: Duration = Duration::from_secs(20);
/// For a removal to be known to have happened: other faults may leave nobody to decide it for a while.
const DECIDED: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_millis(500);
/// For a removed replica to notice that it was.
const NOTICE: Duration = Duration::from_secs(6);

struct Member {
    replace: bool,
}

struct Changed {
    new: u64,
    /// Removed again at the end, when nothing was replaced.
    remove: bool,
    seen: String,
}

#[async_trait]
impl Nemesis for Member {
    fn name(&self) -> &str {
        if self.replace {
            "member:replace"
        } else {
            "member:add"
        }
    }

    fn targets(&self) -> &'static [Target] {
        if self.replace {
            &[Target::One, Target::Leader]
        } else {
            &[]
        }
    }

    fn draw(&self, _: &mut Chance, _: &Scene) -> String {
        String::new()
    }

    async fn start(&self, run: &Arc<Run>, _: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let _turn = run.membership.lock().await;
        let mut seen = String::new();
        if self.replace {
            let old = *targets.first().context("nobody to replace")?;
            ensure!(
                run.cluster.replicas().len() > 2,
                "with fewer than three replicas none can be replaced"
            );
            run.cluster.kill(old).await?;
            run.cluster.strike_out(old)?;
            if let Err(error) = remove(run, old).await {
                // It is a member still, and has to be there for the others.
                run.cluster.reinstate(old)?;
                run.cluster.start(old).await?;
                return Err(error);
            }
            seen = format!("r{old} was killed and removed; {}; ", old_self(run, old).await?);
        }
        let new = run.cluster.next_id();
        run.cluster.join(new).await?;
        run.cluster
            .settled(CALL)
            .await
            .with_context(|| format!("r{new} has joined"))?;
        seen += &format!("r{new} is a voter");
        Ok(Box::new(Changed {
            new,
            remove: !self.replace,
            seen,
        }))
    }
}

/// Removes one, and does not stop at an unknown outcome: one that counts for the cluster and not for this run would
/// be missing for good.
async fn remove(run: &Arc<Run>, id: u64) -> Result<()> {
    let members = run.cluster.replicas();
    let others: Vec<u64> = members.into_iter().filter(|other| *other != id).collect();
    let client = run.cluster.client(&others, CALL)?;
    let request = RemoveReplicaRequest {
        replica_id: id,
        force: true,
        // One request, asked for until it is answered.
        request_id: new_ulid(),
    };
    let until = Instant::now() + DECIDED;
    while let Err(error) = client.remove_replica(request.clone()).await {
        if Instant::now() >= until {
            return Err(error).with_context(|| format!("r{id} can't be removed"));
        }
        sleep(AGAIN).await;
    }
    // From here on it must not acknowledge anything.
    run.record.fault("removed", json!({"replica": format!("r{id}")}));
    Ok(())
}

/// Starts what was removed, with the data that it had: it must not count any more. What a removed replica that has
/// not heard of its removal tells nodes and operators is bounded by its freshness, which other checks watch.
async fn old_self(run: &Arc<Run>, id: u64) -> Result<String> {
    let ended = run.cluster.try_removed(id, NOTICE).await?;
    Ok(match ended {
        Some(how) => format!("started again it ended: {how}"),
        None => "started again it ran, and nobody counted it; it was killed".to_owned(),
    })
}

#[async_trait]
impl Fault for Changed {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        if !self.remove {
            return Ok(Evidence::when(true, self.seen));
        }
        let _turn = run.membership.lock().await;
        remove(run, self.new).await?;
        // It stops by itself when it hears of it; either way it is no member any more.
        run.cluster.may_end(self.new)?;
        drop(run.cluster.kill(self.new).await);
        run.cluster.strike_out(self.new)?;
        Ok(Evidence::when(
            true,
            format!("{}, and was removed again", self.seen),
        ))
    }
}
