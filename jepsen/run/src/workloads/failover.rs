//! `failover`: changes at a fixed rate, whether earlier ones were answered or not, to measure for how long none
//! succeeds.
//!
//! A pulse is one registration of a machine that the harness plays, at a replica drawn anew for each, sent when its
//! time has come. A replica that does not answer holds up its own pulses and no other, so that what stops all of
//! them is the cluster. Conditions and bounds: `palyra_jepsen_check::failover`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use palyra_client::new_ulid;
use palyra_proto::node::v1::RegisterRequest;
use palyra_proto::node::v1::node_service_client::NodeServiceClient;
use serde_json::json;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use super::fleet::{self, Machine};
use super::{Kind, Workload};
use crate::chance::Chance;
use crate::door::Door;
use crate::record::{End, Process};
use crate::run::Run;

pub(super) const KIND: Kind = Kind {
    name: "failover",
    does: "changes at a fixed rate, answered or not: for how long none succeeds, and whether the rate comes back",
    usual: &[
        "kill",
        "pause",
        "partition:leader",
        "transfer",
        "power",
        "disk:stall",
        "disk:slow-fsync",
        "cpu",
        "memory",
    ],
    make: || Box::new(Failover::default()),
};

/// Machines that pulse.
const MACHINES: u64 = 3;
/// A replica that is well answers within this.
const CALL: Duration = Duration::from_millis(2_500);

#[derive(Default)]
struct Failover {
    ready: OnceCell<Ready>,
    /// The last pulse's number.
    last: AtomicU64,
}

/// What pulses share.
struct Ready {
    machines: Vec<Machine>,
    /// By replica and machine. A connection carries many pulses.
    doors: Mutex<BTreeMap<(u64, usize), Door>>,
    /// Processes of the history without a pulse at present.
    idle: Mutex<Vec<Process>>,
}

/// One pulse.
struct Pulse {
    number: u64,
    at: u64,
    device: String,
    door: Door,
    process: Process,
}

#[async_trait]
impl Workload for Failover {
    fn name(&self) -> &'static str {
        "failover"
    }

    fn floors(&self) -> &'static [&'static str] {
        &["pulse"]
    }

    async fn prepare(&self, run: &Arc<Run>) -> Result<()> {
        let mut machines = Vec::new();
        for number in 1..=MACHINES {
            machines.push(fleet::pair(&run.cluster, &format!("f{number}")).await?);
        }
        let ready = Ready {
            machines,
            doors: Mutex::default(),
            idle: Mutex::default(),
        };
        ensure!(self.ready.set(ready).is_ok(), "prepared twice");
        Ok(())
    }

    async fn client(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        let ready = self.ready.get().context("the workload was not prepared")?;
        let mut chance = run.chance(&format!("failover {number}"));
        let each = 1_000_000 * run.settings.concurrency.max(1) / run.settings.rate.max(1);
        let mut due = interval(Duration::from_micros(each.max(1_000)));
        // Pulses that a starved harness could not send in time are not made up for.
        due.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut pulses = JoinSet::new();
        while run.is_loading() {
            tokio::select! {
                _ = due.tick() => {
                    let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
                    pulses.spawn(pulse(ready.next(run, &mut chance, number)));
                }
                Some(ended) = pulses.join_next(), if !pulses.is_empty() => {
                    lock(&ready.idle).push(ended.context("a pulse panicked")?);
                }
                () = run.load_ended() => break,
            }
        }
        while let Some(ended) = pulses.join_next().await {
            lock(&ready.idle).push(ended.context("a pulse panicked")?);
        }
        Ok(())
    }

    async fn finish(&self, _: &Arc<Run>) -> Result<()> {
        // What counts has happened: nothing is read.
        Ok(())
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ready {
    /// The next pulse, at any replica.
    fn next(&self, run: &Arc<Run>, chance: &mut Chance, number: u64) -> Pulse {
        let at = run.pick(chance, None);
        let place = chance.place(self.machines.len());
        let machine = &self.machines[place];
        let door = lock(&self.doors)
            .entry((at, place))
            .or_insert_with(|| run.cluster.door(at, &machine.identity))
            .clone();
        let idle = lock(&self.idle).pop();
        Pulse {
            number,
            at,
            device: machine.device_id.clone(),
            door,
            process: idle.unwrap_or_else(|| run.record.process()),
        }
    }
}

/// One try at one replica. Answers the process, which is free again.
async fn pulse(mut pulse: Pulse) -> Process {
    let asked = json!({"number": pulse.number});
    let request = new_ulid();
    let register = RegisterRequest {
        request_id: request.clone(),
        device_id: pulse.device,
        platform: "jepsen".to_owned(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        labels: [("pulse".to_owned(), pulse.number.to_string())].into(),
        ..Default::default()
    };
    let node = format!("r{}", pulse.at);
    let call = pulse
        .process
        .invoke("pulse", asked.clone(), Some(&node), Some(&request));
    let answer = pulse
        .door
        .call(CALL, |channel| async move {
            NodeServiceClient::new(channel).register(register).await
        })
        .await;
    let end = match answer {
        Ok(done) => End::ok(asked).at(done.write.map_or(0, |write| write.index)),
        Err(miss) => End::missed(miss.kind(true), asked, miss.to_string()),
    };
    pulse.process.end(call, end);
    pulse.process
}
