//! `registry`: registers in the product's own records, written and read at each replica directly.
//!
//! A register `nK` is a label in the registration of a machine that the harness pretends to be: written by
//! `Register` with the machine's own certificate, read by `GetNode`, its version the registration's generation. The
//! register `policy` is the workers' policy, which changes only from the version that the caller has seen: that is
//! `cas`. A `list` reads all machines at one revision, and a stale read is answered by the asked replica alone.
//! Conditions: `palyra_jepsen_check::registry`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use palyra_client::new_ulid;
use palyra_jepsen_check::context::RegisterRows;
use palyra_proto::common::v1::{Consistency, ReadInfo, ReadOptions, WriteInfo};
use palyra_proto::node::v1 as node;
use palyra_proto::node::v1::fleet_service_client::FleetServiceClient;
use palyra_proto::node::v1::node_service_client::NodeServiceClient;
use palyra_proto::worker::v1 as worker;
use palyra_proto::worker::v1::worker_service_client::WorkerServiceClient;
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use super::fleet::{self, Machine};
use super::{Kind, Workload};
use crate::chance::Chance;
use crate::door::{Door, Identity, Miss};
use crate::record::{End, Process};
use crate::run::Run;

pub(super) const KIND: Kind = Kind {
    name: "registry",
    does: "registers in nodes' labels and in the workers' policy: reads, writes, compare-and-set, lists, stale reads",
    usual: &[
        "kill",
        "pause",
        "partition",
        "power",
        "transfer",
        "restart",
        "loss",
        "dup",
        "delay",
        "reset",
    ],
    make: || Box::new(Registry::named("n")),
};

/// Few keys, so that clients meet.
const KEYS: u64 = 5;
/// The key of the policy.
const POLICY: &str = "policy";
/// A replica that is well answers within this, elections included.
const CALL: Duration = Duration::from_millis(2_500);

/// The workload; others build on it.
pub(super) struct Registry {
    /// How its machines' names begin.
    prefix: &'static str,
    /// Whether keys are device ids, as in the journal, and not machines' names.
    by_id: bool,
    ready: OnceCell<Ready>,
    /// The last value that was written; each is written once.
    last: AtomicU64,
}

struct Ready {
    machines: Vec<Machine>,
    operator: Identity,
}

/// One client.
pub(super) struct Hand<'a> {
    ready: &'a Ready,
    by_id: bool,
    last: &'a AtomicU64,
    run: &'a Arc<Run>,
    process: Process,
    chance: Chance,
    operators: BTreeMap<u64, Door>,
    machines: BTreeMap<(u64, usize), Door>,
    at: u64,
    /// What the client saw last of the policy, from which it changes it: version and value.
    policy: Option<(u64, Value)>,
}

#[async_trait]
impl Workload for Registry {
    fn name(&self) -> &'static str {
        "registry"
    }

    fn floors(&self) -> &'static [&'static str] {
        &["read", "write", "cas"]
    }

    async fn prepare(&self, run: &Arc<Run>) -> Result<()> {
        let mut machines = Vec::new();
        for number in 1..=KEYS {
            machines.push(fleet::pair(&run.cluster, &format!("{}{number}", self.prefix)).await?);
        }
        let operator = Identity::of(&run.cluster.operator()?)?;
        ensure!(
            self.ready.set(Ready { machines, operator }).is_ok(),
            "prepared twice"
        );
        Ok(())
    }

    async fn client(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        let mut hand = self.hand(run, &format!("client {number}"))?;
        while run.is_loading() {
            let broke = hand.step().await;
            let stay = (!broke).then_some(hand.at);
            hand.at = run.pick(&mut hand.chance, stay);
            run.pace(&mut hand.chance).await;
        }
        Ok(())
    }

    async fn finish(&self, run: &Arc<Run>) -> Result<()> {
        let mut hand = self.hand(run, "last reads")?;
        for id in run.cluster.replicas() {
            hand.at = id;
            for key in 0..self.ready()?.machines.len() {
                hand.read(key, false).await;
            }
            if run.settings.workload != "mix" {
                hand.read_policy().await;
            }
            hand.list().await;
        }
        Ok(())
    }
}

impl Registry {
    /// Registers whose keys are machines' names.
    pub(super) fn named(prefix: &'static str) -> Registry {
        Registry {
            prefix,
            by_id: false,
            ready: OnceCell::new(),
            last: AtomicU64::new(0),
        }
    }

    /// Registers whose keys are device ids, so that rows of the journal tell of them; without `policy`, of which
    /// they don't.
    pub(super) fn by_id(prefix: &'static str) -> Registry {
        Registry {
            by_id: true,
            ..Registry::named(prefix)
        }
    }

    /// How rows of the journal tell of registers whose keys are device ids.
    pub(super) fn rows() -> RegisterRows {
        RegisterRows {
            action: "node.registered".to_owned(),
            version: "generation".to_owned(),
        }
    }

    /// Device ids of its machines.
    pub(super) fn devices(&self) -> Result<Vec<String>> {
        let ready = self.ready()?;
        Ok(ready
            .machines
            .iter()
            .map(|machine| machine.device_id.clone())
            .collect())
    }

    fn ready(&self) -> Result<&Ready> {
        self.ready.get().context("the workload was not prepared")
    }

    /// A client of these registers.
    pub(super) fn hand<'a>(&'a self, run: &'a Arc<Run>, name: &str) -> Result<Hand<'a>> {
        let mut chance = run.chance(name);
        let at = run.pick(&mut chance, None);
        Ok(Hand {
            ready: self.ready()?,
            by_id: self.by_id,
            last: &self.last,
            run,
            process: run.record.process(),
            chance,
            operators: BTreeMap::new(),
            machines: BTreeMap::new(),
            at,
            policy: None,
        })
    }
}

impl Hand<'_> {
    /// One operation. Answers whether the replica was of no use.
    async fn step(&mut self) -> bool {
        let key = self.chance.place(self.ready.machines.len());
        // In mix the policy is what admits the workers of another workload.
        let bound = if self.run.settings.workload == "mix" {
            72
        } else {
            100
        };
        match self.chance.below(bound) {
            0..35 => self.write(key).await,
            35..65 => self.read(key, false).await,
            65..72 => self.read(key, true).await,
            72..96 if self.by_id => self.read(key, false).await,
            72..86 => self.read_policy().await,
            86..96 => self.set_policy().await,
            _ => self.list().await,
        }
    }

    /// One change or read at a replica that is no member any more.
    pub(super) async fn knock(&mut self, at: u64, changes: bool) {
        self.at = at;
        let key = self.chance.place(self.ready.machines.len());
        if changes {
            self.write(key).await;
        } else {
            self.read(key, false).await;
        }
    }

    fn operator(&mut self) -> Door {
        let (cluster, identity, at) = (&self.run.cluster, &self.ready.operator, self.at);
        self.operators
            .entry(at)
            .or_insert_with(|| cluster.door(at, identity))
            .clone()
    }

    fn machine(&mut self, key: usize) -> Door {
        let (cluster, identity, at) = (&self.run.cluster, &self.ready.machines[key].identity, self.at);
        self.machines
            .entry((at, key))
            .or_insert_with(|| cluster.door(at, identity))
            .clone()
    }

    fn key(&self, at: usize) -> &str {
        let machine = &self.ready.machines[at];
        if self.by_id {
            &machine.device_id
        } else {
            &machine.name
        }
    }

    fn name(&self) -> String {
        format!("r{}", self.at)
    }

    fn fresh(&self) -> u64 {
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    async fn write(&mut self, key: usize) -> bool {
        let (value, request) = (self.fresh(), new_ulid());
        let machine = &self.ready.machines[key];
        let asked = json!({"key": self.key(key), "value": value});
        let register = node::RegisterRequest {
            request_id: request.clone(),
            device_id: machine.device_id.clone(),
            platform: "jepsen".to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            labels: [("value".to_owned(), value.to_string())].into(),
            ..Default::default()
        };
        let door = self.machine(key);
        let call = self
            .process
            .invoke("write", asked.clone(), Some(&self.name()), Some(&request));
        let answer = door
            .call(CALL, |channel| async move {
                NodeServiceClient::new(channel).register(register).await
            })
            .await;
        let end = match &answer {
            Ok(done) => {
                let value = changed(asked, done.generation, done.write.as_ref());
                End::ok(value).at(done.write.as_ref().map_or(0, |write| write.index))
            }
            Err(miss) => End::missed(miss.kind(true), asked, miss.to_string()),
        };
        self.process.end(call, end);
        is_broken(&answer)
    }

    async fn read(&mut self, key: usize, stale: bool) -> bool {
        let machine = &self.ready.machines[key];
        let mut asked = json!({"key": self.key(key)});
        if stale {
            asked["stale"] = true.into();
            // A session is a client's reads at one replica.
            asked["session"] = format!("{}@{}", self.process.id(), self.name()).into();
        }
        let request = node::GetNodeRequest {
            read: Some(options(stale)),
            device_id: machine.device_id.clone(),
        };
        let door = self.operator();
        let call = self
            .process
            .invoke("read", asked.clone(), Some(&self.name()), None);
        let answer = door
            .call(CALL, |channel| async move {
                FleetServiceClient::new(channel).get_node(request).await
            })
            .await;
        let end = match &answer {
            Ok(found) => seen(asked, found.node.as_ref(), found.read.as_ref()),
            // A machine that never registered is no node yet; the refusal does not tell at which index.
            Err(Miss::Answered(error)) if error.code == NO_SUCH_NODE && !stale => {
                End::ok(merge(asked, &json!({"version": 0, "value": null})))
            }
            Err(miss) => End::missed(miss.kind(false), asked, miss.to_string()),
        };
        self.process.end(call, end);
        is_broken(&answer)
    }

    async fn list(&mut self) -> bool {
        let request = node::ListNodesRequest {
            read: Some(options(false)),
            ..Default::default()
        };
        let door = self.operator();
        let call = self.process.invoke("list", json!({}), Some(&self.name()), None);
        let answer = door
            .call(CALL, |channel| async move {
                FleetServiceClient::new(channel).list_nodes(request).await
            })
            .await;
        let end = match &answer {
            Ok(page) => {
                let entries: Vec<Value> = page.nodes.iter().filter_map(|node| self.entry(node)).collect();
                End::ok(json!({"entries": entries})).at(index(page.read.as_ref()))
            }
            Err(miss) => End::missed(miss.kind(false), json!({}), miss.to_string()),
        };
        self.process.end(call, end);
        is_broken(&answer)
    }

    fn entry(&self, info: &node::NodeInfo) -> Option<Value> {
        let machine = self
            .ready
            .machines
            .iter()
            .find(|machine| machine.device_id == info.device_id)?;
        let key = if self.by_id {
            &machine.device_id
        } else {
            &machine.name
        };
        Some(json!({"key": key, "version": info.generation, "value": value_of(info)}))
    }

    async fn read_policy(&mut self) -> bool {
        let asked = json!({"key": POLICY});
        let request = worker::GetPolicyRequest {
            read: Some(options(false)),
        };
        let door = self.operator();
        let call = self
            .process
            .invoke("read", asked.clone(), Some(&self.name()), None);
        let answer = door
            .call(CALL, |channel| async move {
                WorkerServiceClient::new(channel).get_policy(request).await
            })
            .await;
        let end = match &answer {
            Ok(found) => {
                let (version, value) = policy_of(found.policy.as_ref());
                self.policy = Some((version, value.clone()));
                End::ok(merge(asked, &json!({"version": version, "value": value})))
                    .at(index(found.read.as_ref()))
            }
            Err(miss) => End::missed(miss.kind(false), asked, miss.to_string()),
        };
        self.process.end(call, end);
        is_broken(&answer)
    }

    /// Changes the policy from what this client has seen last.
    async fn set_policy(&mut self) -> bool {
        let Some((expected_version, from)) = self.policy.take() else {
            return self.read_policy().await;
        };
        let (value, id) = (self.fresh(), new_ulid());
        let asked = json!({"key": POLICY, "from": from, "value": value});
        let request = worker::SetPolicyRequest {
            request_id: id.clone(),
            policy: Some(policy_with(value)),
            expected_version,
            ..Default::default()
        };
        let door = self.operator();
        let call = self
            .process
            .invoke("cas", asked.clone(), Some(&self.name()), Some(&id));
        let answer = door
            .call(CALL, |channel| async move {
                WorkerServiceClient::new(channel).set_policy(request).await
            })
            .await;
        let end = match &answer {
            Ok(done) => {
                let version = done.policy.as_ref().map_or(0, |policy| policy.version);
                self.policy = Some((version, value.into()));
                let told = changed(asked, version, done.write.as_ref());
                End::ok(told).at(done.write.as_ref().map_or(0, |write| write.index))
            }
            Err(miss) => End::missed(miss.kind(true), asked, miss.to_string()),
        };
        self.process.end(call, end);
        is_broken(&answer)
    }
}

/// The product's code for a node that there is not.
const NO_SUCH_NODE: &str = "E0601";

fn is_broken<T>(answer: &Result<T, Miss>) -> bool {
    match answer {
        Ok(_) => false,
        Err(Miss::Answered(error)) => error.retryable || error.unknown,
        Err(_) => true,
    }
}

fn options(stale: bool) -> ReadOptions {
    let consistency = if stale {
        Consistency::Local
    } else {
        Consistency::Linearizable
    };
    ReadOptions {
        consistency: consistency.into(),
        min_index: 0,
    }
}

fn index(read: Option<&ReadInfo>) -> u64 {
    read.map_or(0, |read| read.index)
}

/// What a change answers.
fn changed(asked: Value, version: u64, write: Option<&WriteInfo>) -> Value {
    let mut told = merge(asked, &json!({"version": version}));
    if write.is_some_and(|write| write.duplicate) {
        told["duplicate"] = true.into();
    }
    told
}

/// What a read of a node answers.
fn seen(asked: Value, info: Option<&node::NodeInfo>, read: Option<&ReadInfo>) -> End {
    let version = info.map_or(0, |info| info.generation);
    let mut told = merge(
        asked,
        &json!({"version": version, "value": info.map_or(Value::Null, value_of)}),
    );
    if told.get("stale").is_some() {
        told["age_ms"] = read.map_or(0, |read| read.age_ms).into();
    }
    End::ok(told).at(index(read))
}

fn value_of(info: &node::NodeInfo) -> Value {
    let label = info.labels.get("value").and_then(|text| text.parse::<u64>().ok());
    label.map_or(Value::Null, Value::from)
}

/// A policy that holds a number: the only image that it allows.
fn policy_with(value: u64) -> worker::FleetPolicy {
    worker::FleetPolicy {
        images: vec![format!("{value:064x}")],
        sdk_protocol_min: 1,
        sdk_protocol_max: 1,
        max_workers: 1,
        leases_per_worker: 1,
        ..Default::default()
    }
}

fn policy_of(policy: Option<&worker::FleetPolicy>) -> (u64, Value) {
    let Some(policy) = policy else {
        return (0, Value::Null);
    };
    let image = policy
        .images
        .first()
        .and_then(|image| u64::from_str_radix(image, 16).ok());
    (policy.version, image.map_or(Value::Null, Value::from))
}

fn merge(mut into: Value, from: &Value) -> Value {
    if let (Some(into), Some(from)) = (into.as_object_mut(), from.as_object()) {
        for (key, value) in from {
            into.insert(key.clone(), value.clone());
        }
    }
    into
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_holds_the_number_that_was_put_into_it() {
        let mut policy = policy_with(77);
        policy.version = 4;
        assert_eq!(policy_of(Some(&policy)), (4, json!(77)));
        assert_eq!(policy_of(Some(&worker::FleetPolicy::default())), (0, Value::Null));
        assert_eq!(policy_of(None), (0, Value::Null));
    }

    #[test]
    fn answers_have_the_shape_that_the_checker_reads() {
        let info = node::NodeInfo {
            generation: 3,
            labels: [("value".to_owned(), "41".to_owned())].into(),
            ..Default::default()
        };
        let read = ReadInfo {
            index: 9,
            age_ms: 12,
            served_by: 1,
        };
        let told = format!(
            "{:?}",
            seen(json!({"key": "n1", "stale": true}), Some(&info), Some(&read))
        );
        for part in [
            "\"version\": Number(3)",
            "\"value\": Number(41)",
            "\"age_ms\": Number(12)",
            "rev: Some(9)",
        ] {
            assert!(told.contains(part), "{part} in {told}");
        }
    }
}
