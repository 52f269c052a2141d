//! Histories of approvals and grants: few tools, few runs, few operators, so that they meet.

use palyra_state::approvals::{
    self, ApprovalState, CreateGrant, Decide, Expire, GrantState, Policy, RevokeGrant, SetPolicy, Withdraw,
};
use palyra_state::{Actor, Command};

use super::Step;
use super::lives::shown_operator;
use crate::kit::{World, id_at, operator};

pub(crate) fn command(world: &mut World, step: &Step) -> (Actor, Command) {
    let names = ["root", "op1", "op2", "op3"];
    let asker = shown_operator(world, names[usize::from(step.one) % 4]);
    let decider = shown_operator(world, names[usize::from(step.two) % 4]);
    let waiting = approvals::approvals_by_state(&world.state, ApprovalState::Pending, None, 100);
    let of_grants: Vec<_> = waiting
        .iter()
        .filter(|it| it.subject() == approvals::Subject::Grant)
        .collect();
    let picked = of_grants.get(usize::from(step.two) % of_grants.len().max(1));
    let picked = picked.map_or(id_at(world.at, 1), |it| it.id);
    match step.actor % 16 {
        0..6 => (asker, create(world, step).into()),
        6..11 => {
            let decide = Decide {
                approval_id: picked,
                allow: step.one != 5,
                scope: if step.one == 5 {
                    0
                } else {
                    i32::from(step.actor / 16 % 3)
                },
                ttl_ms: u64::from(step.one) * 20_000,
                reason: String::new(),
            };
            (decider, decide.into())
        }
        11 | 12 => (decider, revoke(world, step).into()),
        13 => {
            let allowed = approvals::approvals_by_state(&world.state, ApprovalState::Allowed, None, 500);
            let standing = allowed.iter().find(|it| it.standing);
            let withdraw = Withdraw {
                approval_id: standing.map_or(picked, |it| it.id),
                reason: "enough".to_owned(),
            };
            (decider, withdraw.into())
        }
        14 => {
            let mut due = approvals::due_approvals(&world.state, world.at, 100);
            due.push(picked);
            let expire = Expire {
                approvals: due,
                grants: approvals::due_grants(&world.state, world.at, 100),
            };
            (Actor::System, expire.into())
        }
        _ => {
            let policy = Policy {
                four_eyes: step.one.is_multiple_of(2),
                timeout: u64::from(step.one + 1) * 60_000,
                max_timebox: u64::from(step.two) * 600_000,
                ..Policy::default()
            };
            (operator("root"), SetPolicy { policy }.into())
        }
    }
}

fn create(world: &World, step: &Step) -> CreateGrant {
    // Runs meet too, now and then.
    let run = if step.two == 4 {
        u64::from(step.one)
    } else {
        100 + world.index
    };
    CreateGrant {
        grant_id: id_at(world.at, (5 << 40) + world.index),
        run_id: id_at(0, (6 << 40) + run),
        tool: ["resize", "convert"][usize::from(step.two) % 2].to_owned(),
        session: ["", "monday"][usize::from(step.actor / 16) % 2].to_owned(),
        ttl_ms: u64::from(step.one) * 300_000,
        summary: String::new(),
        risk: i32::from(step.two % 4),
        approval_id: id_at(world.at, (7 << 40) + world.index),
    }
}

fn revoke(world: &World, step: &Step) -> RevokeGrant {
    let live = approvals::grants(&world.state, None, 500);
    let wanted = [GrantState::Pending, GrantState::Active, GrantState::Used];
    let wanted = wanted[usize::from(step.one) % 3];
    let found = live.iter().rfind(|it| it.state() == wanted);
    RevokeGrant {
        grant_id: found.map_or(id_at(world.at, 1), |it| it.id),
        reason: String::new(),
        cancel_run: step.two == 0,
    }
}
