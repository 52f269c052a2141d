//! The part of a random history that is about dispatches.

use bytes::Bytes;
use palyra_state::{Actor, Command, Id, dispatch, nodes};

use super::{Step, shown};
use crate::kit::{World, id_at, operator};

fn waits(found: &dispatch::Dispatch) -> bool {
    found.state() == dispatch::State::AwaitingLocalMediation
}

/// Whether a node has a session, and something in it that is `wanted`.
fn is_busy(world: &mut World, name: &str, wanted: fn(&dispatch::Dispatch) -> bool) -> bool {
    let device = world.id(name);
    let online = nodes::node(&world.state, device).is_some_and(|node| node.session.is_some());
    online
        && dispatch::open_of_device(&world.state, device, None, 100)
            .iter()
            .any(wanted)
}

pub(super) fn command(world: &mut World, step: &Step) -> (Actor, Command) {
    let ready = dispatch::due_again(&world.state, world.at, 50);
    if !ready.is_empty() && step.one > 2 {
        return (Actor::System, dispatch::Wake { ids: ready }.into());
    }
    // A report makes sense where something is under way.
    let wanted: fn(&dispatch::Dispatch) -> bool = match step.kind % 10 {
        4..7 => |found| found.state().is_bound(),
        7 => waits,
        _ => |_| false,
    };
    let name = (0..5)
        .map(|at| format!("n{}", (step.two + at) % 5))
        .find(|name| is_busy(world, name, wanted))
        .unwrap_or_else(|| format!("n{}", step.two));
    let device = world.id(&name);
    let open = dispatch::open_of_device(&world.state, device, None, 100);
    let picked = match step.kind % 10 {
        4..8 if open.iter().any(wanted) => {
            let mut wanted = open.iter().filter(|found| wanted(found));
            let first = wanted.clone().next();
            wanted.nth(usize::from(step.one)).or(first)
        }
        _ => open.get(usize::from(step.one) % open.len().max(1)),
    };
    let (dispatch_id, epoch) = picked.map_or((id_at(world.at, 1), 0), |found| (found.id, found.epoch));
    let node = shown(world, &name);
    match step.kind % 10 {
        0..4 => (operator("root"), submit(world, step, device).into()),
        4..6 => (node, complete(step, dispatch_id, epoch).into()),
        6 => {
            let wait = dispatch::AwaitMediation {
                dispatch_id,
                epoch,
                prompt: "now?".to_owned(),
                host: name,
            };
            (node, wait.into())
        }
        7 => (node, dispatch::ResumeFromMediation { dispatch_id, epoch }.into()),
        8 => (
            operator("root"),
            dispatch::Cancel {
                dispatch_id,
                reason: String::new(),
            }
            .into(),
        ),
        _ => {
            let ids = dispatch::due(&world.state, world.at, 50);
            (Actor::System, dispatch::Expire { ids }.into())
        }
    }
}

fn submit(world: &World, step: &Step, device_id: Id) -> dispatch::Submit {
    let capability = if step.one.is_multiple_of(2) { "echo" } else { "pay" };
    dispatch::Submit {
        dispatch_id: id_at(world.at, (2 << 40) + world.index),
        device_id,
        capability: capability.to_owned(),
        payload: Bytes::from(vec![b'x'; usize::from(step.actor)]),
        timeout_ms: u64::from(step.actor) * 1_000,
        priority: i32::from(step.actor % 3),
        max_attempts: u32::from(step.actor.is_multiple_of(4)),
    }
}

fn complete(step: &Step, dispatch_id: Id, epoch: u64) -> dispatch::Complete {
    let outcome = [0, 1, 1, 2, 3, 1][usize::from(step.one)];
    let error = (outcome != 0).then(|| dispatch::Failure {
        code: ["exit_status", "timeout"][usize::from(!step.actor.is_multiple_of(4))].to_owned(),
        message: String::new(),
    });
    dispatch::Complete {
        dispatch_id,
        // Now and then from an older session.
        epoch: epoch.saturating_sub(u64::from(step.actor.is_multiple_of(8))),
        outcome,
        result: Bytes::from(vec![b'y'; usize::from(step.actor)]),
        error,
        log_tail: Bytes::from(vec![b'z'; usize::from(step.actor / 4)]),
        attempt: u32::from(step.actor % 32 == 7),
    }
}
