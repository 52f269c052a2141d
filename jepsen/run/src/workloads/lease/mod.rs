//! `lease`: operators start runs, and workers hold leases for them: three that the harness plays, and two real ones.
//!
//! Each played worker holds by its own clock, sleeps now and then for longer than its leases while its programs go
//! on writing, and sometimes dies and comes back knowing nothing. What leases protect is a resource of the harness
//! that looks at fences. Conditions: `palyra_jepsen_check::lease`.

mod proof;
mod real;
mod resource;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use palyra_client::{Client, new_ulid};
use palyra_proto::approval::v1::grant_service_client::GrantServiceClient;
use palyra_proto::approval::v1::{CreateGrantRequest, CreateGrantResponse, DecideRequest};
use palyra_proto::common::v1::{Consistency, ReadOptions};
use palyra_proto::run::v1 as wire;
use palyra_proto::run::v1::run_service_client::RunServiceClient;
use serde_json::json;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::operator::{Asked, Operator};
use super::session::Papers;
use super::{Kind, Workload, fleet};
use crate::run::Run;
use proof::Signer;
use real::Real;
use resource::Resource;
use worker::{Shared, Worker};

pub(super) const KIND: Kind = Kind {
    name: "lease",
    does: "runs, and workers that hold leases for them, played and real ones; a resource that looks at fences",
    usual: &[
        "kill",
        "pause",
        "partition:leader",
        "partition:hosts",
        "transfer",
        "clock:jump",
        "clock:skew",
        "disk:stall",
        "machine-kill",
        "machine-pause",
    ],
    make: || Box::new(Lease::default()),
};

/// Workers that the harness plays.
const PLAYED: u64 = 3;
/// Real ones.
const REAL: u64 = 2;
/// Slots of each.
const SLOTS: u32 = 2;
/// Of a lease: short, so that it ends within faults.
const TTL_MS: u64 = 4_000;
/// Longest time that a run holds its slot.
const HOLD_MS: u64 = 2_500;
/// Runs of one client that have not come to an end.
const OPEN: usize = 6;
/// How long an operator insists on an answer.
const INSIST: Duration = Duration::from_secs(10);
/// For everything to come to its end, once all is whole.
const LAST: Duration = Duration::from_secs(60);
/// What the approval of the first run covers.
const SESSION: &str = "jepsen";

#[derive(Default)]
struct Lease {
    shared: Arc<Shared>,
    workers: Mutex<JoinSet<()>>,
    real: Mutex<Option<Real>>,
    /// Runs that were started, or may have been.
    runs: Mutex<Vec<String>>,
    over: Arc<AtomicBool>,
}

#[async_trait]
impl Workload for Lease {
    fn name(&self) -> &'static str {
        "lease"
    }

    fn hosts(&self) -> u64 {
        REAL
    }

    fn floors(&self) -> &'static [&'static str] {
        // Only who has renewed touches. After all replicas were killed places are free again only when leases run out.
        &["start", "touch"]
    }

    async fn prepare(&self, run: &Arc<Run>) -> Result<()> {
        let client = run.cluster.client_of_all(Duration::from_secs(20))?;
        let real = Real::prepare(run, REAL, 1).await?;
        proof::allow(&client, real.digests(), u32::try_from(PLAYED + REAL)?, SLOTS).await?;
        for number in 1..=PLAYED {
            let machine = fleet::pair(&run.cluster, &format!("w{number}")).await?;
            let signer = Signer::of(&machine.credential, SLOTS)?;
            let worker = Worker::new(run, Papers::of(&machine)?, signer, number);
            self.workers
                .lock()
                .await
                .spawn(worker.live(Arc::clone(&self.shared), Arc::clone(&self.over)));
        }
        real.start(run)?;
        *self.real.lock().await = Some(real);
        permit(&client).await?;
        admitted(&client, PLAYED + REAL).await
    }

    async fn client(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        let mut operator = Operator::new(run, &format!("lease {number}"))?;
        let mut open: Vec<String> = Vec::new();
        while run.is_loading() {
            if open.len() < OPEN {
                self.start(&mut operator, &mut open).await?;
            } else if operator.chance.percent(15) {
                let place = operator.chance.place(open.len());
                cancel(&mut operator, &open[place]).await;
            }
            // Those that have ended make room.
            if !open.is_empty() {
                let place = operator.chance.place(open.len());
                if has_ended(&mut operator, &open[place], Duration::ZERO).await {
                    open.swap_remove(place);
                }
            }
            operator.roam(false);
            operator.pace().await;
        }
        Ok(())
    }

    async fn finish(&self, run: &Arc<Run>) -> Result<()> {
        run.machines.resume_all();
        let client = run.cluster.client_of_all(Duration::from_secs(10))?;
        let until = Instant::now() + LAST;
        while Instant::now() < until && is_busy(&client).await {
            sleep(Duration::from_millis(300)).await;
        }
        self.over.store(true, Ordering::Relaxed);
        let mut workers = self.workers.lock().await;
        while let Some(ended) = workers.join_next().await {
            ended.context("a worker panicked")?;
        }
        let mut operator = Operator::new(run, "lease, last reads")?;
        for id in self.runs.lock().await.iter() {
            has_ended(&mut operator, id, INSIST).await;
        }
        if let Some(real) = self.real.lock().await.as_ref() {
            real.tell_held(run)?;
        }
        operator.rows().await
    }
}

impl Lease {
    /// A grant, and the run that it is for.
    async fn start(&self, operator: &mut Operator, open: &mut Vec<String>) -> Result<()> {
        let (run, request) = (new_ulid(), new_ulid());
        let ask = grant(&run, &request);
        let asked = Asked::change("grant", json!({"run": run}), &request);
        let granted = operator.insist(
            asked,
            INSIST,
            |channel| {
                let ask = ask.clone();
                async move { GrantServiceClient::new(channel).create(ask).await }
            },
            |_: &CreateGrantResponse| (json!({}), 0),
        );
        if granted.await.is_err() {
            return Ok(());
        }
        let hold_ms = operator.chance.between(HOLD_MS / 8, HOLD_MS);
        let (effect, max_attempts) = if operator.chance.percent(20) {
            ("once", 1)
        } else {
            ("idempotent", 8)
        };
        let request = new_ulid();
        let ask = wire::StartRequest {
            request_id: request.clone(),
            run_id: run.clone(),
            tool: proof::TOOL.to_owned(),
            params: format!("{{\"hold_ms\":{hold_ms}}}").into(),
            scope: Some(real::scope()),
            effect: effect.to_owned(),
            max_attempts,
            ttl_ms: TTL_MS,
            timeout_ms: 120_000,
            ..Default::default()
        };
        let value = json!({"run": run, "effect": effect, "max_attempts": max_attempts});
        let asked = Asked::change("start", value, &request);
        let started = operator.insist(
            asked,
            INSIST,
            |channel| {
                let ask = ask.clone();
                async move { RunServiceClient::new(channel).start(ask).await }
            },
            |done: &wire::StartResponse| (json!({}), done.write.as_ref().map_or(0, |write| write.index)),
        );
        let known = started.await.is_ok();
        self.runs.lock().await.push(run.clone());
        if known {
            open.push(run);
        }
        Ok(())
    }
}

async fn cancel(operator: &mut Operator, run: &str) {
    let request = new_ulid();
    let ask = wire::CancelRunRequest {
        request_id: request.clone(),
        id: run.to_owned(),
        reason: "jepsen".to_owned(),
    };
    let asked = Asked::change("cancel-run", json!({"run": run}), &request);
    let cancelled = operator.ask(
        asked,
        |channel| async move { RunServiceClient::new(channel).cancel(ask).await },
        |done: &wire::StartResponse| (json!({}), done.write.as_ref().map_or(0, |write| write.index)),
    );
    drop(cancelled.await);
}

/// Reads a run. Whether it is over, or there is none.
async fn has_ended(operator: &mut Operator, run: &str, patience: Duration) -> bool {
    let ask = wire::GetRunRequest {
        read: Some(ReadOptions {
            consistency: Consistency::Linearizable.into(),
            min_index: 0,
        }),
        id: run.to_owned(),
    };
    let asked = Asked::read("run", json!({"run": run}));
    let read = operator.insist(
        asked,
        patience,
        |channel| {
            let ask = ask.clone();
            async move { RunServiceClient::new(channel).get(ask).await }
        },
        |done: &wire::GetRunResponse| {
            let info = done.run.clone().unwrap_or_default();
            let index = done.read.as_ref().map_or(0, |read| read.index);
            (
                json!({"state": info.state, "fence": info.fence, "attempt": info.attempt}),
                index,
            )
        },
    );
    match read.await {
        Ok(done) => {
            let state = done.run.unwrap_or_default().state;
            ["succeeded", "failed", "refused", "cancelled", "timed_out", "lost"].contains(&state.as_str())
        }
        Err(_) => false,
    }
}

fn grant(run: &str, request: &str) -> CreateGrantRequest {
    CreateGrantRequest {
        request_id: request.to_owned(),
        grant_id: new_ulid(),
        run_id: run.to_owned(),
        tool: proof::TOOL.to_owned(),
        session: SESSION.to_owned(),
        risk: "low".to_owned(),
        ..Default::default()
    }
}

/// Permits the first run of the session for all that follow.
async fn permit(client: &Client) -> Result<()> {
    let grant = client
        .create_grant(grant(&new_ulid(), &new_ulid()))
        .await
        .context("the first grant")?
        .grant
        .unwrap_or_default();
    if grant.state != "pending" {
        return Ok(());
    }
    let decide = DecideRequest {
        request_id: new_ulid(),
        id: grant.approval_id,
        decision: "allow".to_owned(),
        scope: "session".to_owned(),
        ttl_ms: 24 * 3_600_000,
        reason: "jepsen".to_owned(),
        ..Default::default()
    };
    client
        .decide_approval(decide)
        .await
        .context("the approval of the session")?;
    Ok(())
}

/// Waits until so many workers may be given work.
async fn admitted(client: &Client, wanted: u64) -> Result<()> {
    let until = Instant::now() + LAST;
    loop {
        let totals = client.fleet_totals().await.context("the fleet")?;
        let ready = totals.workers.get("available").copied().unwrap_or(0);
        if ready >= wanted {
            return Ok(());
        }
        ensure!(
            Instant::now() < until,
            "{ready} of {wanted} workers were admitted: {:?}",
            totals.workers
        );
        sleep(Duration::from_millis(100)).await;
    }
}

async fn is_busy(client: &Client) -> bool {
    let ends = ["succeeded", "failed", "refused", "cancelled", "timed_out", "lost"];
    match client.fleet_totals().await {
        Ok(totals) => {
            let open = totals
                .runs
                .iter()
                .filter(|(state, _)| !ends.contains(&state.as_str()));
            totals.leases > 0 || open.map(|(_, count)| count).sum::<u64>() > 0
        }
        Err(_) => true,
    }
}
