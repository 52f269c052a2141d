//! Golden samples of dispatches: their commands, and what these and a record got later.

use std::collections::BTreeMap;

use palyra_state::{Command, Envelope, dispatch, nodes};

use super::kit::{World, commands};
use super::records::text;

/// Fields that came after the command, each in a line of its own.
pub(super) fn fields(samples: &mut BTreeMap<String, Envelope>) {
    let mut world = World::new();
    let base = samples["command.dispatch.expire"].clone();
    let register = commands::register(&mut world, "n1");
    let dispatch_id = world.id("d1");
    let later: [(&str, Command); 5] = [
        (
            "nodes.register.with_limits",
            commands::limited(register, [2, 3], [4, 5]).into(),
        ),
        (
            "nodes.attach.with_attempts",
            nodes::Attach {
                held_attempts: vec![1, 2],
                ..commands::attach(&mut world, "n1", 1, &["d1", "d2"])
            }
            .into(),
        ),
        (
            "dispatch.submit.with_priority",
            dispatch::Submit {
                priority: dispatch::Priority::High as i32,
                max_attempts: 2,
                ..commands::submit(&mut world, "d1", "n1", "echo")
            }
            .into(),
        ),
        (
            "dispatch.complete.with_log",
            dispatch::Complete {
                log_tail: bytes::Bytes::from_static(b"the end"),
                attempt: 2,
                ..commands::complete(&mut world, "d1", 7, dispatch::Outcome::Cancelled)
            }
            .into(),
        ),
        (
            "dispatch.await_mediation.with_prompt",
            dispatch::AwaitMediation {
                dispatch_id,
                epoch: 7,
                prompt: text("unlock?"),
                host: text("cam.local"),
            }
            .into(),
        ),
    ];
    for (name, command) in later {
        let envelope = Envelope::new(base.request_id, base.actor.clone(), command);
        samples.insert(format!("command.{name}"), envelope);
    }
}

pub(super) fn with_story(dispatch: dispatch::Dispatch) -> dispatch::Dispatch {
    dispatch::Dispatch {
        priority: dispatch::Priority::High as i32,
        order: 9,
        not_before: 10,
        retry: Some(dispatch::Retry {
            max_attempts: 3,
            backoff_ms: 500,
            on: vec![text("timeout")],
        }),
        attempts: vec![dispatch::Attempt {
            number: 1,
            epoch: 2,
            replica_id: 3,
            assigned_at: 4,
            ended_at: 5,
            why: text("timeout"),
            message: text("too slow"),
        }],
        mediation: Some(dispatch::Mediation {
            since: 11,
            prompt: text("unlock?"),
            host: text("cam.local"),
        }),
        late: Some(dispatch::Late {
            at: 12,
            outcome: dispatch::Outcome::Failed as i32,
            code: text("exit_status"),
            size: 13,
            digest: palyra_state::Digest::of(b"late"),
        }),
        tail_size: 14,
        cancel: Some(dispatch::CancelAsked {
            at: 15,
            by: text("operator/root"),
        }),
        assigned_at: 16,
        reported: true,
        ..dispatch
    }
}

pub(super) fn dispatch_commands(world: &mut World) -> Vec<Command> {
    let dispatch_id = world.id("d1");
    let submit = commands::submit(world, "d1", "n1", "echo");
    vec![
        dispatch::Submit {
            timeout_ms: 1,
            ..submit
        }
        .into(),
        commands::complete(world, "d1", 7, dispatch::Outcome::Failed).into(),
        dispatch::AwaitMediation {
            dispatch_id,
            epoch: 7,
            ..dispatch::AwaitMediation::default()
        }
        .into(),
        dispatch::ResumeFromMediation {
            dispatch_id,
            epoch: 7,
        }
        .into(),
        dispatch::Cancel {
            dispatch_id,
            reason: text("no"),
        }
        .into(),
        dispatch::Expire {
            ids: vec![dispatch_id],
        }
        .into(),
    ]
}
