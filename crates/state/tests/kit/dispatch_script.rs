//! The commands about dispatches, as scripts write them.

use bytes::Bytes;
use palyra_state::{Command, dispatch};

use super::Args;
use crate::kit::commands;

pub(crate) fn command(args: &mut Args<'_>, name: &str) -> Command {
    let id = args.id("id");
    let epoch = args.number("epoch");
    match name {
        "dispatch.submit" => dispatch::Submit {
            timeout_ms: args.number("timeout"),
            priority: dispatch::Priority::parse(&args.text("priority")).expect(args.line) as i32,
            max_attempts: args.number("attempts") as u32,
            payload: Bytes::from(vec![
                b' ';
                args.has("size").map_or(2, |size| size.parse().unwrap())
            ]),
            ..commands::submit(
                args.world,
                &args.text("id"),
                &args.text("device"),
                &args.text("capability"),
            )
        }
        .into(),
        "dispatch.complete" => {
            let outcome = dispatch::Outcome::parse(&args.text("outcome")).expect(args.line);
            let mut made = commands::complete(args.world, &args.text("id"), epoch, outcome);
            made.attempt = args.number("attempt") as u32;
            if let (Some(code), Some(error)) = (args.has("code"), made.error.as_mut()) {
                error.code = code;
            }
            made.into()
        }
        "dispatch.await_mediation" => dispatch::AwaitMediation {
            dispatch_id: id,
            epoch,
            prompt: args.text("prompt"),
            host: args.text("host"),
        }
        .into(),
        "dispatch.resume_from_mediation" => dispatch::ResumeFromMediation {
            dispatch_id: id,
            epoch,
        }
        .into(),
        "dispatch.cancel" => dispatch::Cancel {
            dispatch_id: id,
            reason: args.text("reason"),
        }
        .into(),
        "dispatch.expire" => dispatch::Expire { ids: args.ids("ids") }.into(),
        "dispatch.wake" => dispatch::Wake { ids: args.ids("ids") }.into(),
        _ => panic!("no such command: {name}"),
    }
}
