//! The commands about authorities, as scripts write them.

use palyra_state::{Command, ca};

use super::Args;
use crate::kit::commands;

fn phase(args: &Args<'_>) -> i32 {
    let phase = match args.text("from").as_str() {
        "distribute" => ca::Phase::Distribute,
        "issue" => ca::Phase::Issue,
        _ => ca::Phase::Idle,
    };
    phase as i32
}

pub(crate) fn command(args: &mut Args<'_>, name: &str) -> Command {
    let (replica_id, number) = (args.number("replica"), args.number("number") as u32);
    let (root, reason) = (args.number("root") as u32, args.text("reason"));
    match name {
        "ca.begin_root" => commands::begin_root(&args.text("root")).into(),
        "ca.advance_root" => ca::AdvanceRoot {
            from: phase(args),
            force: args.has("force").is_some(),
            reason,
        }
        .into(),
        "ca.revert_root" => ca::RevertRoot {
            from: phase(args),
            reason,
        }
        .into(),
        "ca.certify_authority" => commands::certify(replica_id, number, root).into(),
        "ca.rotate_authority" => commands::rotate_authority(replica_id, number, root).into(),
        "ca.ask_rotation" => ca::AskRotation { replica_id, reason }.into(),
        "ca.retire_authority" => ca::RetireAuthority { replica_id, number }.into(),
        "ca.acknowledge" => {
            let operators = args.text("operators");
            let operators = operators.split(',').filter(|name| !name.is_empty());
            let operators = operators.map(str::to_owned).collect();
            ca::Acknowledge {
                generation: args.number("generation"),
                devices: args.ids("devices"),
                operators,
            }
            .into()
        }
        "ca.replica_ready" => ca::ReplicaReady {
            replica_id,
            step: args.number("step"),
        }
        .into(),
        "ca.publish_crl" => commands::crl(replica_id, number, args.number("crl"), args.world.at).into(),
        _ => panic!("no such command: {name}"),
    }
}
