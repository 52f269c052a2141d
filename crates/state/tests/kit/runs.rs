//! The part of a random history that is about runs and leases.

use bytes::Bytes;
use palyra_state::dispatch::{Effect, Failure};
use palyra_state::leases::{
    self, HeldState, Lease, LeaseState, Manifest, ManifestEntry, Outcome, Run, RunState,
};
use palyra_state::{Actor, Command, Digest, Id, approvals, fleet, nodes};

use super::Step;
use super::lives::shown;
use crate::kit::{World, id_at, operator, replica};

/// The tool that every honest worker offers.
const TOOL: &str = "lint";
/// The one file that runs have.
const FILE: &[u8] = b"file";

pub(super) fn command(world: &mut World, step: &Step) -> (Actor, Command) {
    let due = leases::due(&world.state, world.at);
    let live = leases::live(&world.state, None, 50);
    let pick = |state: LeaseState| {
        let found: Vec<&Lease> = live.iter().filter(|lease| lease.state() == state).collect();
        found
            .get(usize::from(step.two) % found.len().max(1))
            .copied()
            .cloned()
    };
    let some = live.get(usize::from(step.two) % live.len().max(1)).cloned();
    match (step.actor % 16, &some) {
        (0, _) => return (Actor::System, expire(due, &live)),
        (1, Some(lease)) => return cancel(lease.run_id),
        (2, Some(lease)) => return revoke(lease.id),
        _ => {}
    }
    if let Some(report) = report(world, step) {
        return report;
    }
    let (granted, active, ending) = (
        pick(LeaseState::Granted),
        pick(LeaseState::Active),
        pick(LeaseState::Ending),
    );
    // What is rare is sought first, so that leases come to their ends.
    let next = match (step.one, active, granted, ending) {
        (0, ..) => None,
        (1..=3, Some(lease), ..) => Some(progress(world, &lease, step)),
        (1..=3, None, Some(lease), _) => Some(accept(world, &lease, step)),
        (4, _, _, Some(lease)) => Some(cleaned(world, &lease, step)),
        (4, _, Some(lease), None) => Some(accept(world, &lease, step)),
        (1..=4, ..) => None,
        _ => Some(renew(&live, step)),
    };
    next.unwrap_or_else(|| begin(world, step))
}

/// Names every lease and run that is due, and some that are not.
fn expire(mut due: leases::Expire, live: &[Lease]) -> Command {
    due.leases.extend(live.iter().take(2).map(|lease| lease.id));
    due.into()
}

fn cancel(run_id: Id) -> (Actor, Command) {
    let reason = "not needed".to_owned();
    (operator("root"), leases::CancelRun { run_id, reason }.into())
}

fn revoke(lease_id: Id) -> (Actor, Command) {
    let reason = "too long".to_owned();
    (operator("root"), leases::RevokeLease { lease_id, reason }.into())
}

/// The actor that a worker is.
fn worker(world: &mut World, id: Id) -> Actor {
    let name = (0..5)
        .map(|number| format!("n{number}"))
        .find(|name| world.id(name) == id);
    shown(world, &name.unwrap_or_else(|| "n0".to_owned()))
}

/// What a worker holds, when it has not said so in its session; sometimes again.
fn report(world: &mut World, step: &Step) -> Option<(Actor, Command)> {
    let name = format!("n{}", step.two);
    let worker_id = world.id(&name);
    let session = nodes::node(&world.state, worker_id).and_then(|node| node.session)?;
    let known = fleet::worker(&world.state, worker_id).unwrap_or_default();
    if known.reconciled_epoch == session.epoch && step.actor % 16 != 3 {
        return None;
    }
    let mut held: Vec<(Id, u64)> = leases::live_of(&world.state, worker_id)
        .into_iter()
        .map(|lease| (lease.id, lease.fence))
        .collect();
    held.extend(known.unclean.iter().map(|id| {
        let fence = leases::lease(&world.state, *id).map_or(0, |lease| lease.fence);
        (*id, fence)
    }));
    let state = |at: usize| match (usize::from(step.kind) + at) % 8 {
        0..5 => Some(HeldState::Running),
        5 => Some(HeldState::Cleaned),
        6 if step.one == 5 => Some(HeldState::Unclean),
        _ => None,
    };
    let held = held
        .into_iter()
        .enumerate()
        .filter_map(|(at, (lease_id, fence))| {
            Some(leases::Held {
                lease_id,
                fence: fence + u64::from(step.actor == 77),
                state: state(at)? as i32,
                message: String::new(),
            })
        });
    let report = leases::Reconcile {
        worker_id,
        epoch: session.epoch,
        held: held.collect(),
    };
    Some((shown(world, &name), report.into()))
}

fn accept(world: &mut World, lease: &Lease, step: &Step) -> (Actor, Command) {
    let accept = leases::Accept {
        lease_id: lease.id,
        fence: lease.fence,
        epoch: lease.epoch - u64::from(step.actor == 99),
    };
    (worker(world, lease.worker_id), accept.into())
}

/// An output, or the result.
fn progress(world: &mut World, lease: &Lease, step: &Step) -> (Actor, Command) {
    let actor = worker(world, lease.worker_id);
    if step.actor.is_multiple_of(4) {
        return (actor, piece(lease.run_id, step, Some(lease)));
    }
    let outcome = match step.kind % 5 {
        0 | 1 => Outcome::Succeeded,
        2 => Outcome::Failed,
        3 => Outcome::Refused,
        _ => Outcome::Cancelled,
    };
    let has_file = leases::artifact(&world.state, lease.run_id, Digest::of(FILE)).is_some();
    let finish = leases::Finish {
        lease_id: lease.id,
        fence: lease.fence - u64::from(step.actor == 98),
        outcome: outcome as i32,
        result: Bytes::from_static(b"{}"),
        outputs: has_file.then(manifest),
        error: (outcome == Outcome::Failed).then(|| Failure {
            code: "exit_status".to_owned(),
            message: "exit 1".to_owned(),
        }),
        ..leases::Finish::default()
    };
    (actor, finish.into())
}

fn cleaned(world: &mut World, lease: &Lease, step: &Step) -> (Actor, Command) {
    let cleaned = leases::Cleaned {
        lease_id: lease.id,
        fence: lease.fence,
        ok: step.actor % 8 != 5,
        ..leases::Cleaned::default()
    };
    (worker(world, lease.worker_id), cleaned.into())
}

fn renew(live: &[Lease], step: &Step) -> (Actor, Command) {
    let wish = |lease: &Lease| leases::LeaseRef {
        lease_id: lease.id,
        fence: lease.fence + u64::from(step.actor == 97),
        worker_id: lease.worker_id,
        epoch: lease.epoch,
    };
    let leases = live.iter().map(wish).collect();
    (replica(1), leases::Renew { leases }.into())
}

fn manifest() -> Manifest {
    let entry = ManifestEntry {
        path: "a".to_owned(),
        digest: Digest::of(FILE),
        size: FILE.len() as u64,
        stored: true,
        executable: false,
    };
    Manifest { entries: vec![entry] }
}

/// The whole file in one piece, or something that is not.
fn piece(run_id: Id, step: &Step, lease: Option<&Lease>) -> Command {
    let spoilt = step.kind.is_multiple_of(4);
    leases::PutArtifact {
        run_id,
        digest: Digest::of(FILE),
        size: FILE.len() as u64,
        offset: 0,
        chunk: Bytes::from_static(if spoilt { b"spoilt" } else { FILE }).slice(..FILE.len()),
        lease_id: lease.map(|lease| lease.id),
        fence: lease.map_or(0, |lease| lease.fence),
    }
    .into()
}

/// The next thing on the way to a run: its files, its start, its grant.
fn begin(world: &mut World, step: &Step) -> (Actor, Command) {
    let root = operator("root");
    let waiting: Vec<Run> = leases::runs_in_state(&world.state, RunState::AwaitingInput, None, 5);
    if let Some(run) = waiting.first() {
        return (root, piece(run.id, step, None));
    }
    let grants = tables_of_grants(world);
    let mine = |grant: &&approvals::Grant| grant.tool == TOOL && grant.requested_by == "root";
    let active = |grant: &&approvals::Grant| grant.state() == approvals::GrantState::Active && mine(grant);
    if let Some(grant) = grants.iter().rfind(active) {
        let start = leases::StartRun {
            run_id: grant.run_id,
            tool: TOOL.to_owned(),
            params: Bytes::from_static(b"{}"),
            inputs: step.two.is_multiple_of(2).then(manifest),
            effect: [Effect::Once, Effect::Idempotent][usize::from(step.kind % 2)] as i32,
            ttl_ms: 2_000,
            timeout_ms: [3_000, 60_000, 600_000][usize::from(step.actor) % 3],
            ..leases::StartRun::default()
        };
        return (root, start.into());
    }
    let pending = |grant: &&approvals::Grant| grant.state() == approvals::GrantState::Pending && mine(grant);
    if let Some(grant) = grants.iter().rfind(pending) {
        let decide = approvals::Decide {
            approval_id: grant.approval_id,
            allow: true,
            ..approvals::Decide::default()
        };
        return (root, decide.into());
    }
    let create = approvals::CreateGrant {
        grant_id: id_at(world.at, (5 << 40) + world.index),
        run_id: id_at(world.at, (6 << 40) + world.index),
        tool: TOOL.to_owned(),
        approval_id: id_at(world.at, (7 << 40) + world.index),
        ..approvals::CreateGrant::default()
    };
    (root, create.into())
}

fn tables_of_grants(world: &World) -> Vec<approvals::Grant> {
    palyra_state::tables::GRANTS.list(&world.state, (), 500)
}
