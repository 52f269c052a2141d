//! The commands about approvals and grants, as scripts write them.

use palyra_state::Command;
use palyra_state::approvals::{
    CreateGrant, Decide, Expire, Policy, RevokeGrant, Risk, Scope, SetPolicy, Withdraw,
};

use super::Args;

pub(crate) fn command(args: &mut Args<'_>, name: &str) -> Command {
    let reason = args.text("reason");
    match name {
        "approvals.create_grant" => CreateGrant {
            grant_id: args.id("grant"),
            run_id: args.id("run"),
            tool: args.text("tool"),
            session: args.text("session"),
            ttl_ms: args.number("ttl") * 1_000,
            summary: args.text("summary"),
            risk: Risk::parse(&args.text("risk")).unwrap_or(Risk::Medium) as i32,
            approval_id: args.id("approval"),
        }
        .into(),
        "approvals.decide" => Decide {
            approval_id: args.id("approval"),
            allow: args.text("say") == "allow",
            scope: Scope::parse(&args.text("scope")).unwrap_or(Scope::Once) as i32,
            ttl_ms: args.number("ttl") * 1_000,
            reason,
        }
        .into(),
        "approvals.withdraw" => Withdraw {
            approval_id: args.id("approval"),
            reason,
        }
        .into(),
        "approvals.revoke_grant" => RevokeGrant {
            grant_id: args.id("grant"),
            reason,
            cancel_run: args.has("cancel").is_some(),
        }
        .into(),
        "approvals.expire" => Expire {
            approvals: args.ids("approvals"),
            grants: args.ids("grants"),
        }
        .into(),
        "approvals.set_policy" => SetPolicy {
            policy: Policy {
                four_eyes: args.text("four_eyes") == "on",
                timeout: args.number("timeout") * 1_000,
                max_timebox: args.number("timebox") * 1_000,
                set_at: 0,
                set_by: String::new(),
            },
        }
        .into(),
        _ => panic!("no such command: {name}"),
    }
}
