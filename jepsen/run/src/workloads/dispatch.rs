//! `dispatch`: operators submit jobs under keys, cancel some, and read at the end what became of each.
//!
//! Nodes are of two kinds: real agents in namespaces of their own, whose program notes each begin and end in a
//! ledger that is read at the end, and nodes that the harness plays, which see every delivery, die and come back
//! with or without what they held. Conditions: `palyra_jepsen_check::dispatch`.

mod node;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use palyra_client::{Client, new_ulid};
use palyra_proto::common::v1::{Consistency, ReadOptions};
use palyra_proto::dispatch::v1 as wire;
use palyra_proto::dispatch::v1::dispatch_service_client::DispatchServiceClient;
use palyra_proto::node::v1::ListNodesRequest;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::operator::{Asked, Operator};
use super::session::Papers;
use super::{Kind, Workload, fleet};
use crate::machines::{Machine, enlist, text};
use crate::record::End;
use crate::run::Run;
use node::Node;

pub(super) const KIND: Kind = Kind {
    name: "dispatch",
    does: "jobs under keys on real agents with a ledger of effects, and on nodes that see each delivery; cancels",
    usual: &[
        "kill",
        "restart",
        "transfer",
        "reset",
        "partition:hosts",
        "partition:leader",
        "machine-kill",
        "machine-pause",
        "loss",
    ],
    make: || Box::new(Dispatch::default()),
};

/// Real agents.
const REAL: u64 = 2;
/// Nodes that the harness plays.
const PLAYED: u64 = 2;
/// A program that must not run twice.
pub(super) const ONCE: &str = "jepsen.once";
/// One that may, three times.
pub(super) const AGAIN: &str = "jepsen.again";
const ATTEMPTS: u32 = 3;
/// Longest time that a program takes.
const HOLD_MS: u64 = 900;
/// From the acceptance of a job to its latest end.
const DEADLINE_MS: u64 = 30_000;
/// Jobs of one client that it may still cancel.
const OPEN: usize = 8;
/// How long an operator insists on an answer.
const INSIST: Duration = Duration::from_secs(12);

#[derive(Default)]
struct Dispatch {
    /// Device ids of all nodes.
    devices: Mutex<Vec<String>>,
    machines: Mutex<Vec<(Machine, PathBuf)>>,
    nodes: Mutex<JoinSet<()>>,
    jobs: Mutex<Vec<String>>,
    over: Arc<AtomicBool>,
}

#[async_trait]
impl Workload for Dispatch {
    fn name(&self) -> &'static str {
        "dispatch"
    }

    fn hosts(&self) -> u64 {
        REAL
    }

    fn floors(&self) -> &'static [&'static str] {
        &["submit", "deliver", "complete"]
    }

    async fn prepare(&self, run: &Arc<Run>) -> Result<()> {
        let client = run.cluster.client_of_all(Duration::from_secs(20))?;
        let mut devices = Vec::new();
        for _ in 0..REAL {
            let machine = enlist(run).await?;
            let ledger = machine.folder.join("effects");
            let capabilities = machine.folder.join("jepsen-capabilities.toml");
            std::fs::write(&capabilities, programs(&ledger)?)?;
            run.machines.keep(
                run,
                &machine,
                &["node", "run", "--capabilities", text(&capabilities)?],
            )?;
            devices.push(machine.device.clone());
            self.machines.lock().await.push((machine, ledger));
        }
        for number in 1..=PLAYED {
            let machine = fleet::pair(&run.cluster, &format!("n{number}")).await?;
            devices.push(machine.device_id.clone());
            let node = Node::new(run, Papers::of(&machine)?, number);
            self.nodes.lock().await.spawn(node.live(Arc::clone(&self.over)));
        }
        online(&client, &devices).await?;
        *self.devices.lock().await = devices;
        Ok(())
    }

    async fn client(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        let mut operator = Operator::new(run, &format!("dispatch {number}"))?;
        let devices = self.devices.lock().await.clone();
        let mut open: Vec<String> = Vec::new();
        while run.is_loading() {
            if !open.is_empty() && operator.chance.percent(12) {
                let place = operator.chance.place(open.len());
                cancel(&mut operator, &open.swap_remove(place)).await;
            } else if let Some(job) = self.submit(&mut operator, &devices).await {
                // One that is cancelled at once has often not begun.
                if operator.chance.percent(10) {
                    cancel(&mut operator, &job).await;
                } else {
                    open.push(job);
                }
            }
            if open.len() > OPEN {
                open.remove(0);
            }
            operator.roam(false);
            operator.pace().await;
        }
        Ok(())
    }

    async fn finish(&self, run: &Arc<Run>) -> Result<()> {
        run.machines.resume_all();
        let client = run.cluster.client_of_all(Duration::from_secs(10))?;
        let until = Instant::now() + Duration::from_millis(DEADLINE_MS + 15_000);
        while Instant::now() < until && is_busy(&client).await {
            sleep(Duration::from_millis(300)).await;
        }
        self.over.store(true, Ordering::Relaxed);
        let mut nodes = self.nodes.lock().await;
        while let Some(ended) = nodes.join_next().await {
            ended.context("a node panicked")?;
        }
        let mut operator = Operator::new(run, "dispatch, last reads")?;
        for job in self.jobs.lock().await.iter() {
            read(&mut operator, job).await;
        }
        for (machine, ledger) in self.machines.lock().await.iter() {
            tell_effects(run, machine, ledger)?;
        }
        operator.rows().await
    }
}

impl Dispatch {
    async fn submit(&self, operator: &mut Operator, devices: &[String]) -> Option<String> {
        let device = operator.chance.one(devices).clone();
        let once = operator.chance.percent(50);
        let (capability, effect) = if once {
            (ONCE, "once")
        } else {
            (AGAIN, "idempotent")
        };
        let (key, hold_ms) = (new_ulid(), operator.chance.between(10, HOLD_MS));
        let fails = operator.chance.percent(10);
        let ask = wire::InvokeRequest {
            request_id: key.clone(),
            device_id: device.clone(),
            capability: capability.to_owned(),
            payload: format!("{{\"hold_ms\":{hold_ms},\"fails\":{fails}}}").into(),
            timeout_ms: DEADLINE_MS,
            ..Default::default()
        };
        // The same key again, also when the answer was heard.
        let times = if operator.chance.percent(10) { 2 } else { 1 };
        let mut job = None;
        for _ in 0..times {
            let asked = Asked::change("submit", json!({"device": device, "effect": effect}), &key);
            let submitted = operator.insist(
                asked,
                INSIST,
                |channel| {
                    let ask = ask.clone();
                    async move { DispatchServiceClient::new(channel).invoke(ask).await }
                },
                |done: &wire::InvokeResponse| {
                    let id = done
                        .dispatch
                        .as_ref()
                        .map(|dispatch| dispatch.id.clone())
                        .unwrap_or_default();
                    (
                        json!({"job": id}),
                        done.write.as_ref().map_or(0, |write| write.index),
                    )
                },
            );
            if let Ok(done) = submitted.await {
                job = done.dispatch.map(|dispatch| dispatch.id);
            }
            operator.roam(times > 1);
        }
        if let Some(job) = &job {
            self.jobs.lock().await.push(job.clone());
        }
        job
    }
}

async fn cancel(operator: &mut Operator, job: &str) {
    let request = new_ulid();
    let ask = wire::CancelRequest {
        request_id: request.clone(),
        id: job.to_owned(),
        reason: "jepsen".to_owned(),
    };
    let cancelled = operator.ask(
        Asked::change("cancel", json!({"job": job}), &request),
        |channel| async move { DispatchServiceClient::new(channel).cancel(ask).await },
        |done: &wire::CancelResponse| {
            let state = done
                .dispatch
                .as_ref()
                .map(|dispatch| dispatch.state.clone())
                .unwrap_or_default();
            (
                json!({"state": state}),
                done.write.as_ref().map_or(0, |write| write.index),
            )
        },
    );
    drop(cancelled.await);
}

async fn read(operator: &mut Operator, job: &str) {
    let ask = wire::GetRequest {
        read: Some(ReadOptions {
            consistency: Consistency::Linearizable.into(),
            min_index: 0,
        }),
        id: job.to_owned(),
    };
    let read = operator.insist(
        Asked::read("job", json!({"job": job})),
        INSIST,
        |channel| {
            let ask = ask.clone();
            async move { DispatchServiceClient::new(channel).get(ask).await }
        },
        |done: &wire::GetResponse| {
            let found = done.dispatch.clone().unwrap_or_default();
            let told = json!({"state": found.state, "attempt": found.attempt, "error": found.error_code});
            (told, done.read.as_ref().map_or(0, |read| read.index))
        },
    );
    drop(read.await);
}

/// What the real agents may be asked to do: this program itself, which notes begin and end.
fn programs(ledger: &Path) -> Result<String> {
    let own = std::env::current_exe().context("where is this program?")?;
    let (own, ledger) = (text(&own)?, text(ledger)?);
    let one = |name: &str, effect: &str, more: &str| {
        format!(
            "[[capability]]\nname = \"{name}\"\nprogram = {own:?}\nargs = [\"effect\", \"--ledger\", {ledger:?}]\n\
             effect = \"{effect}\"\ntimeout = \"20s\"\nconcurrency = 4\n{more}\n"
        )
    };
    let again =
        format!("attempts = {ATTEMPTS}\nbackoff = \"200ms\"\nretry_on = [\"failed\", \"session_lost\"]\n");
    Ok(one(ONCE, "once", "") + &one(AGAIN, "idempotent", &again))
}

/// Waits until all nodes are there.
async fn online(client: &Client, devices: &[String]) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(40);
    loop {
        let listed = client
            .list_nodes(ListNodesRequest::default())
            .await
            .context("the nodes")?;
        let there = |device: &&String| {
            let mut nodes = listed.nodes.iter();
            nodes.any(|node| {
                node.device_id == **device && node.status == "online" && !node.capabilities.is_empty()
            })
        };
        let missing: Vec<&String> = devices.iter().filter(|device| !there(device)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        ensure!(
            Instant::now() < until,
            "nodes that did not come: {missing:?}; see the logs of h1 and h2"
        );
        sleep(Duration::from_millis(100)).await;
    }
}

async fn is_busy(client: &Client) -> bool {
    for state in ["queued", "dispatched", "cancelling", "awaiting_local_mediation"] {
        let request = wire::ListRequest {
            state: state.to_owned(),
            ..Default::default()
        };
        match client.list_dispatches(request).await {
            Ok(page) if page.dispatches.is_empty() => {}
            _ => return true,
        }
    }
    false
}

/// Writes into the history what an agent's programs left.
fn tell_effects(run: &Run, machine: &Machine, ledger: &Path) -> Result<()> {
    let text = match std::fs::read_to_string(ledger) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", ledger.display())),
    };
    let effects = crate::effect::parse(&text, run.record.clock())?;
    let mut process = run.record.process();
    let asked = json!({"device": machine.device});
    let call = process.invoke("effects", asked, None, None);
    let told: Vec<Value> = effects
        .iter()
        .map(|effect| json!({"job": effect.job, "from": effect.from, "to": effect.to}))
        .collect();
    process.end(call, End::ok(json!({"device": machine.device, "effects": told})));
    Ok(())
}
