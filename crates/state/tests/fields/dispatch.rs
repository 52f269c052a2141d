//! The fields of commands about dispatches.

use palyra_state::dispatch::Outcome;
use palyra_state::{Actor, Command, dispatch, limits};

use super::kit::commands;
use super::{Field, Stage, by_replica, bytes, root, text};

fn complete(stage: &mut Stage, change: impl FnOnce(&mut dispatch::Complete)) -> (Actor, Command) {
    let mut complete = commands::complete(&mut stage.world, "d", stage.epoch, Outcome::Failed);
    change(&mut complete);
    (stage.node.clone(), complete.into())
}

fn mediation(stage: &mut Stage, change: impl FnOnce(&mut dispatch::AwaitMediation)) -> (Actor, Command) {
    let mut command = dispatch::AwaitMediation {
        dispatch_id: stage.world.id("d"),
        epoch: stage.epoch,
        ..dispatch::AwaitMediation::default()
    };
    change(&mut command);
    (stage.node.clone(), command.into())
}

pub(super) const DISPATCH: &[Field] = &[
    ("a payload", limits::PAYLOAD, "E0603", |stage, size| {
        root(dispatch::Submit {
            payload: bytes(size),
            ..commands::submit(&mut stage.world, "d2", "n1", "echo")
        })
    }),
    (
        "a deadline",
        limits::DEADLINE_MAX as usize,
        "E0612",
        |stage, size| {
            root(dispatch::Submit {
                timeout_ms: size as u64,
                ..commands::submit(&mut stage.world, "d2", "n1", "echo")
            })
        },
    ),
    ("a result", limits::PAYLOAD, "E0603", |stage, size| {
        complete(stage, |command| command.result = bytes(size))
    }),
    ("an error's code", limits::REASON_MAX, "E0906", |stage, size| {
        complete(stage, |command| command.error.as_mut().unwrap().code = text(size))
    }),
    (
        "an error's message",
        limits::ERROR_MESSAGE_MAX,
        "E0906",
        |stage, size| {
            complete(stage, |command| {
                command.error.as_mut().unwrap().message = text(size)
            })
        },
    ),
    (
        "the last lines of a log",
        limits::LOG_TAIL,
        "E0907",
        |stage, size| complete(stage, |command| command.log_tail = bytes(size)),
    ),
    (
        "what a person is asked",
        limits::REASON_MAX,
        "E0906",
        |stage, size| mediation(stage, |command| command.prompt = text(size)),
    ),
    ("a person's machine", limits::NAME_MAX, "E0906", |stage, size| {
        mediation(stage, |command| command.host = text(size))
    }),
    (
        "dispatches to try again",
        limits::EXPIRE_BATCH,
        "E0907",
        |stage, size| {
            let ids = vec![stage.world.id("d"); size];
            by_replica(dispatch::Wake { ids })
        },
    ),
    (
        "why a dispatch is taken back",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            let dispatch_id = stage.world.id("d");
            root(dispatch::Cancel {
                dispatch_id,
                reason: text(size),
            })
        },
    ),
    (
        "dispatches to expire",
        limits::EXPIRE_BATCH,
        "E0907",
        |stage, size| {
            let ids = vec![stage.world.id("d"); size];
            by_replica(dispatch::Expire { ids })
        },
    ),
];
