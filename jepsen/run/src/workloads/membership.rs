//! `membership`: registers under load, while every replica is asked who the members are, and removed ones whether
//! they still answer. For the nemeses `member:add` and `member:replace`, alone and with others.
//!
//! Conditions: `palyra_jepsen_check::membership`, and those of registers and of the journal.

use std::sync::Arc;

use anyhow::Result;
use async_trait::async_trait;
use palyra_proto::cluster::v1::cluster_service_client::ClusterServiceClient;
use palyra_proto::cluster::v1::{StatusRequest, StatusResponse};
use serde_json::{Value, json};

use super::operator::{Asked, Operator};
use super::registry::Registry;
use super::{Kind, Workload};
use crate::run::Run;

pub(super) const KIND: Kind = Kind {
    name: "membership",
    does: "registers, and who the members are as each replica tells it; removed replicas are asked on",
    usual: &[
        "member",
        "kill",
        "pause",
        "transfer",
        "partition:leader",
        "snapshot",
        "cert-rotate",
    ],
    make: || {
        Box::new(Membership {
            registers: Registry::named("m"),
        })
    },
};

/// One client of so many asks for members.
const ASKERS: u64 = 3;

struct Membership {
    registers: Registry,
}

#[async_trait]
impl Workload for Membership {
    fn name(&self) -> &'static str {
        "membership"
    }

    fn floors(&self) -> &'static [&'static str] {
        &["read", "write", "members"]
    }

    async fn prepare(&self, run: &Arc<Run>) -> Result<()> {
        self.registers.prepare(run).await
    }

    async fn client(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        if !number.is_multiple_of(ASKERS) {
            return self.registers.client(run, number).await;
        }
        let mut operator = Operator::new(run, &format!("membership {number}"))?;
        let mut outsider = self.registers.hand(run, &format!("outsider {number}"))?;
        while run.is_loading() {
            let removed = run.cluster.removed();
            if !removed.is_empty() && operator.chance.percent(40) {
                // It must not acknowledge anything; what it says of members may be old.
                let at = *operator.chance.one(&removed);
                outsider.knock(at, operator.chance.percent(50)).await;
                operator.at = at;
            } else {
                operator.roam(true);
            }
            members(&mut operator).await;
            operator.pace().await;
        }
        Ok(())
    }

    async fn finish(&self, run: &Arc<Run>) -> Result<()> {
        self.registers.finish(run).await?;
        let mut operator = Operator::new(run, "membership, last reads")?;
        for id in run.cluster.replicas() {
            operator.at = id;
            members(&mut operator).await;
        }
        operator.rows().await
    }
}

/// What the replica has.
async fn members(operator: &mut Operator) {
    let answer = operator.ask(
        Asked::read("members", json!({})),
        |channel| async move { ClusterServiceClient::new(channel).status(StatusRequest {}).await },
        |status| (told(status), status.read.as_ref().map_or(0, |read| read.index)),
    );
    // The history has what became of it.
    drop(answer.await);
}

fn told(status: &StatusResponse) -> Value {
    let members: Vec<(u64, &str)> = status
        .replicas
        .iter()
        .map(|replica| (replica.id, replica.status.as_str()))
        .collect();
    json!({"members": members})
}
