//! The commands about operators, as scripts write them.

use palyra_state::{Command, access};

use super::Args;

pub(crate) fn command(args: &mut Args<'_>, name: &str) -> Command {
    let role = access::Role::parse(&args.text("role")).unwrap_or(access::Role::Viewer) as i32;
    let operator = args.text("name");
    match name {
        "access.add_operator" => access::AddOperator {
            name: operator,
            role,
            certificate: args.certificate(),
        }
        .into(),
        "access.remove_operator" => access::RemoveOperator {
            name: operator,
            reason: args.text("reason"),
        }
        .into(),
        "access.set_role" => access::SetRole { name: operator, role }.into(),
        _ => panic!("no such command: {name}"),
    }
}
