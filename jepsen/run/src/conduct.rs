//! The order of a run: birth, preparation, quiet, faults, quiet, everything whole again, last reads.
//!
//! Invariants: every fault that was begun is ended before the final stage, whatever happens; the final stage lifts
//! what may be left and waits, within bounds, until all replicas have applied the same; a trouble of the harness is
//! an error, not a verdict.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::cluster::{self, State};
use crate::nemesis::{Asked, Outcome};
use crate::plan::Step;
use crate::run::{Phase, Run};
use crate::workloads::Workload;

/// For all replicas to agree after everything was made whole: a snapshot may have to be sent.
const CONVERGE: Duration = Duration::from_secs(60);
/// A client that has been told to end ends after the operation that it is at.
const LAST_OPERATION: Duration = Duration::from_secs(40);
/// A fault begins within this: a replica may have to be removed and another to join, or to start and be copied.
const BEGIN_OF_FAULT: Duration = Duration::from_secs(240);
/// A fault that is to end may have to start several replicas.
const END_OF_FAULT: Duration = Duration::from_secs(120);
/// For the last reads of a workload: all of the journal, after half an hour of everything.
const LAST_READS: Duration = Duration::from_secs(600);
/// How long a fault waits for somebody to lead, when it is to strike the leader.
const LEADER: Duration = Duration::from_secs(3);

/// A planned fault, and what became of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Done {
    /// As planned.
    pub step: Step,
    /// Whom it struck.
    pub targets: Vec<u64>,
    /// When it began and ended, in nanoseconds since the run began; equal when it was skipped.
    pub began: u64,
    /// See `began`.
    pub ended: u64,
    /// Replicas that heard no quorum, or stood still, because of it.
    #[serde(default)]
    pub isolated: Vec<u64>,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// How it went.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Course {
    /// All faults.
    pub faults: Vec<Done>,
    /// Why the replicas did not come to agree; nothing when they did.
    pub diverged: Option<String>,
    /// Whether it was broken off.
    pub broken_off: bool,
    /// The longest time by which the harness itself was late, in milliseconds.
    pub late_ms: u64,
}

/// Runs the workload under the plan.
///
/// # Errors
/// When the harness fails.
pub async fn conduct(
    run: &Arc<Run>,
    workload: &Arc<dyn Workload>,
    asked: Vec<Asked>,
    plan: Vec<Step>,
) -> Result<Course> {
    let over = CancellationToken::new();
    let _ends_watchers = over.clone().drop_guard();
    tokio::spawn(cluster::follow_leaders(
        Arc::clone(&run.cluster),
        run.leaders.clone(),
        run.record.clone(),
        over.clone(),
    ));
    tokio::spawn(cluster::mind(
        Arc::clone(&run.cluster),
        run.record.clone(),
        over.clone(),
    ));
    let late = tokio::spawn(lateness(over.clone()));
    workload
        .prepare(run)
        .await
        .context("the workload's preparation")?;

    run.enter(Phase::Before);
    let mut clients = JoinSet::new();
    for number in 0..run.settings.concurrency {
        let (workload, run) = (Arc::clone(workload), Arc::clone(run));
        clients.spawn(async move { workload.client(&run, number).await });
    }
    pause(run, run.settings.quiet()).await;
    run.enter(Phase::Faults);
    let faults = strike(run, asked, plan).await;
    run.enter(Phase::After);
    pause(run, run.settings.quiet()).await;
    run.enter(Phase::Final);
    finish_clients(clients).await?;

    let mut course = Course {
        faults,
        ..Course::default()
    };
    if run.stop.is_cancelled() {
        course.broken_off = true;
    } else {
        course.diverged = make_whole(run).await.err().map(|error| format!("{error:#}"));
        run.record.fault("healed", json!({}));
        last_reads(run, workload.as_ref(), &mut course).await?;
    }
    run.enter(Phase::Over);
    over.cancel();
    course.late_ms = late.await.unwrap_or(0);
    Ok(course)
}

async fn pause(run: &Arc<Run>, for_: Duration) {
    tokio::select! {
        () = sleep(for_) => {},
        () = run.stop.cancelled() => {},
    }
}

async fn finish_clients(mut clients: JoinSet<Result<()>>) -> Result<()> {
    let all = async {
        while let Some(ended) = clients.join_next().await {
            ended.context("a client panicked")?.context("a client")?;
        }
        anyhow::Ok(())
    };
    let ended = timeout(LAST_OPERATION, all).await;
    ended.with_context(|| format!("clients did not end within {} s", LAST_OPERATION.as_secs()))?
}

/// The workload's last reads. A cluster that did not become whole may never answer them: that is the verdict then, and
/// what was not read is missing.
async fn last_reads(run: &Arc<Run>, workload: &dyn Workload, course: &mut Course) -> Result<()> {
    let read = tokio::select! {
        read = timeout(LAST_READS, workload.finish(run)) => read,
        () = run.stop.cancelled() => {
            course.broken_off = true;
            return Ok(());
        }
    };
    let read = read.unwrap_or_else(|_| Err(anyhow!("they did not end within {} s", LAST_READS.as_secs())));
    match read {
        Err(error) if course.diverged.is_some() => {
            eprintln!("jepsen: the last reads are not complete: {error:#}");
            Ok(())
        }
        read => read.context("the workload's last reads"),
    }
}

/// How much later than asked for this process was woken, at worst: a starved machine makes false failovers.
async fn lateness(over: CancellationToken) -> u64 {
    let step = Duration::from_millis(100);
    let mut worst = Duration::ZERO;
    while !over.is_cancelled() {
        let asked = tokio::time::Instant::now();
        sleep(step).await;
        worst = worst.max(asked.elapsed().saturating_sub(step));
    }
    u64::try_from(worst.as_millis()).unwrap_or(u64::MAX)
}

/// Applies the plan. Returns when the window is over and every fault has ended.
async fn strike(run: &Arc<Run>, asked: Vec<Asked>, plan: Vec<Step>) -> Vec<Done> {
    let asked = Arc::new(asked);
    let began = tokio::time::Instant::now();
    let mut steps = JoinSet::new();
    for step in plan {
        let (run, asked) = (Arc::clone(run), Arc::clone(&asked));
        steps.spawn(async move {
            tokio::select! {
                () = sleep_until(began + Duration::from_millis(step.at_ms)) => {},
                () = run.stop.cancelled() => {},
            }
            one_fault(&run, &asked, step).await
        });
    }
    let window = run.settings.window();
    tokio::select! {
        () = sleep_until(began + window) => {},
        () = run.stop.cancelled() => {},
    }
    let mut done = Vec::new();
    while let Some(ended) = steps.join_next().await {
        // A nemesis that panicked has left no outcome; the floors miss it.
        done.extend(ended.ok());
    }
    done.sort_by_key(|done| done.step.number);
    done
}

async fn one_fault(run: &Arc<Run>, asked: &[Asked], step: Step) -> Done {
    let now = || run.record.clock().nanos();
    let began = now();
    let skipped = |why: String, targets: Vec<u64>| Done {
        step: step.clone(),
        targets,
        began,
        ended: began,
        isolated: Vec::new(),
        outcome: Outcome::Skipped(why),
    };
    if run.stop.is_cancelled() {
        return skipped("the run was broken off".to_owned(), Vec::new());
    }
    let Some(found) = asked.iter().find(|asked| asked.nemesis.name() == step.nemesis) else {
        return skipped(format!("nobody asked for {}", step.nemesis), Vec::new());
    };
    if let Err(why) = run.abilities.have(found.kind.needs) {
        return skipped(why, Vec::new());
    }
    let leader = run.leaders.wait(LEADER).await.map(|leader| leader.replica);
    let targets = match step.aim.resolve(&run.cluster.replicas(), leader) {
        Ok(targets) => targets,
        Err(why) => return skipped(why, Vec::new()),
    };
    let names: Vec<String> = targets.iter().map(|id| format!("r{id}")).collect();
    let mut told = json!({"id": step.number, "phase": "start", "targets": names, "draw": step.draw});
    run.record.fault(&step.nemesis, told.clone());
    told["phase"] = "stop".into();
    let begun = timeout(BEGIN_OF_FAULT, found.nemesis.start(run, &step, &targets)).await;
    let late = |_| Err(anyhow!("it did not begin within {} s", BEGIN_OF_FAULT.as_secs()));
    let fault = match begun.unwrap_or_else(late) {
        Ok(fault) => fault,
        Err(error) => {
            let why = format!("{error:#}");
            run.record.fault(&step.nemesis, with(told, "skipped", &why));
            return skipped(why, targets);
        }
    };
    let isolated = fault.isolated();
    pause(run, Duration::from_millis(step.for_ms)).await;
    let outcome = match timeout(END_OF_FAULT, fault.stop(run)).await {
        Ok(Ok(evidence)) if evidence.happened => Outcome::Installed(evidence.seen),
        Ok(Ok(evidence)) => Outcome::Indeterminate(evidence.seen),
        Ok(Err(error)) => Outcome::Indeterminate(format!("it can't be ended: {error:#}")),
        Err(_) => Outcome::Indeterminate(format!("it did not end within {} s", END_OF_FAULT.as_secs())),
    };
    let (word, why) = match &outcome {
        Outcome::Installed(why) => ("installed", why),
        Outcome::Skipped(why) => ("skipped", why),
        Outcome::Indeterminate(why) => ("indeterminate", why),
    };
    run.record.fault(&step.nemesis, with(told, word, why));
    Done {
        step,
        targets,
        began,
        ended: now(),
        isolated,
        outcome,
    }
}

fn with(mut told: serde_json::Value, outcome: &str, why: &str) -> serde_json::Value {
    told["outcome"] = outcome.into();
    told["why"] = why.into();
    told
}

/// Lifts everything, starts everyone, and waits until all have applied the same.
async fn make_whole(run: &Arc<Run>) -> Result<()> {
    run.net.heal().await?;
    run.cluster.clocks().heal()?;
    run.cluster.disks().heal();
    for id in run.cluster.replicas() {
        run.cluster.resume(id)?;
    }
    // Whatever only lives in memory must not be what makes the last reads right.
    let restarts = run.cluster.replicas().into_iter().map(|id| async move {
        if matches!(run.cluster.state(id), State::Up) {
            run.cluster.terminate(id).await?;
        }
        if run.cluster.pid(id).is_none() {
            run.cluster.start(id).await?;
        }
        anyhow::Ok(())
    });
    for restarted in futures::future::join_all(restarts).await {
        restarted.context("restarting everyone at the end")?;
    }
    run.cluster.settled(CONVERGE).await?;
    Ok(())
}
