//! How runs begin.

use super::files::{check_limits, check_manifest, check_scope};
use super::store::put_run;
use super::{Run, RunState, StartRun, artifacts, run, select, totals};
use crate::actor::Actor;
use crate::dispatch::Effect;
use crate::reject::{Code, Reject};
use crate::reply::{Reply, RunStarted};
use crate::tables::{self, Blob};
use crate::txn::Txn;
use crate::{approvals, check, fleet, limits};

pub(super) fn start(txn: &mut Txn<'_>, command: &StartRun) -> Result<Reply, Reject> {
    let Actor::Operator { name, .. } = txn.actor else {
        return Err(Reject::new(Code::NotAllowed, [txn.actor, &"leases.start_run"]));
    };
    let id = command.run_id;
    check::id("the run id", id)?;
    if run(txn, id).is_some() {
        return Err(Reject::new(Code::RunExists, [&id]));
    }
    check_asked(command)?;
    let mut new = opened(txn, command)?;
    check_open(txn, &new)?;
    let grant = approvals::use_grant(txn, id, &command.tool, name)?;
    new.grant_id = grant.id;
    if !artifacts::missing(txn, &new).is_empty() {
        new.set_state(RunState::AwaitingInput);
    }
    let params = Blob {
        bytes: command.params.clone(),
    };
    txn.put(&tables::RUN_PARAMS, id, &params);
    put_run(txn, None, &new);
    txn.emit(
        "run.submitted",
        id,
        [
            ("tool", new.tool.clone()),
            ("grant", grant.id.to_string()),
            ("state", new.state().as_str().to_owned()),
            ("effect", new.effect().as_str().to_owned()),
            ("deadline_at", new.deadline_at.to_string()),
        ],
    );
    select::place(txn, id);
    let state = run(txn, id).map_or(new.state, |run| run.state);
    Ok(Reply::RunStarted(RunStarted {
        run_id: id,
        state,
        deadline_at: new.deadline_at,
    }))
}

/// What can be said of the request alone.
fn check_asked(command: &StartRun) -> Result<(), Reject> {
    if !check::is_short_name(&command.tool) {
        let cause = format_args!("{} is no name of a tool", check::quoted(&command.tool));
        return Err(check::invalid("the tool", &cause));
    }
    let size = command.params.len();
    if size > limits::RUN_PARAMS {
        let cause = format_args!("they have {size} bytes; the limit is {}", limits::RUN_PARAMS);
        return Err(check::invalid("the parameters", &cause));
    }
    if let Some(inputs) = &command.inputs {
        check_manifest("input", inputs)?;
    }
    if let Some(scope) = &command.scope {
        check_scope(scope)?;
    }
    if let Some(wanted) = &command.limits {
        check_limits(wanted)?;
    }
    if command.max_attempts > limits::RUN_ATTEMPTS_MAX {
        let cause = format_args!(
            "they are {}; the limit is {}",
            command.max_attempts,
            limits::RUN_ATTEMPTS_MAX
        );
        return Err(check::invalid("the attempts", &cause));
    }
    check::count("the list of labels", command.labels.len(), limits::LABELS)?;
    for (name, value) in &command.labels {
        check::filled("a label's name", name, limits::NAME_MAX)?;
        check::text("a label's value", value, limits::NAME_MAX)?;
    }
    Ok(())
}

/// The time that was asked for, or the usual one, within a range.
fn time(what: &str, asked: u64, usual: u64, least: u64, most: u64) -> Result<u64, Reject> {
    match asked {
        0 => Ok(usual.min(most)),
        asked if (least..=most).contains(&asked) => Ok(asked),
        asked => Err(Reject::new(Code::BadRunTime, [&what, &asked, &least, &most])),
    }
}

fn opened(txn: &Txn<'_>, command: &StartRun) -> Result<Run, Reject> {
    let longest = fleet::max_ttl(txn).min(limits::LEASE_TTL_MAX);
    let ttl = time(
        "lease's life",
        command.ttl_ms,
        limits::LEASE_TTL,
        limits::LEASE_TTL_MIN.min(longest),
        longest,
    )?;
    let timeout = time(
        "timeout",
        command.timeout_ms,
        limits::RUN_TIMEOUT,
        limits::LEASE_TTL_MIN,
        limits::RUN_TIMEOUT_MAX,
    )?;
    let attempts = match (command.max_attempts, command.effect()) {
        (0, Effect::Once) => 1,
        (0, Effect::Idempotent) => limits::RUN_ATTEMPTS,
        (asked, _) => asked,
    };
    Ok(Run {
        id: command.run_id,
        tool: command.tool.clone(),
        state: RunState::Queued as i32,
        requested_by: txn.actor.to_string(),
        effect: command.effect,
        max_attempts: attempts,
        submitted_at: txn.now,
        deadline_at: txn.now + timeout,
        ttl,
        inputs: command.inputs.clone(),
        scope: command.scope.clone(),
        limits: command.limits,
        min_evidence: command.min_evidence,
        labels: command.labels.clone(),
        order: txn.index,
        params_size: command.params.len() as u32,
        ..Run::default()
    })
}

fn check_open(txn: &Txn<'_>, new: &Run) -> Result<(), Reject> {
    let sums = totals(txn);
    let open = sums.open_runs();
    if open >= limits::RUNS_OPEN {
        return Err(Reject::new(Code::TooManyRuns, [&open, &limits::RUNS_OPEN]));
    }
    if sums.open_bytes + new.weight() > limits::RUNS_OPEN_BYTES {
        return Err(Reject::new(
            Code::RunsFull,
            [&sums.open_bytes, &limits::RUNS_OPEN_BYTES],
        ));
    }
    Ok(())
}
