//! Random histories of the authorities.

use palyra_state::{Actor, Command, ca, cluster};

use super::Step;
use crate::kit::{World, commands, operator, replica};

/// The authorities: mostly what brings a rotation forward, now and then something else.
pub(super) fn command(world: &mut World, step: &Step) -> (Actor, Command) {
    let state = ca::ca(&world.state);
    let root = operator("root");
    let members = cluster::replicas(&world.state).into_iter();
    let members: Vec<u64> = members.filter(|one| one.is_member()).map(|one| one.id).collect();
    let one = members[usize::from(step.one) % members.len()];
    match (step.actor >> 1) % 16 {
        0..3 => rotation_command(world, step, &state),
        3..6 => {
            let behind = |id: &&u64| ca::replica_step(&world.state, **id) < state.step;
            let replica_id = *members.iter().find(behind).unwrap_or(&one);
            let step = state.step;
            (replica(replica_id), ca::ReplicaReady { replica_id, step }.into())
        }
        6..9 => {
            let devices = (0..5).map(|at| world.id(&format!("n{at}"))).collect();
            let operators = ["root", "op1", "op2", "op3"].map(str::to_owned).to_vec();
            let generation = state.generation.saturating_sub(u64::from(step.one == 5));
            let ack = ca::Acknowledge {
                generation,
                devices,
                operators,
            };
            (replica(one), ack.into())
        }
        9..12 => {
            let wants = |found: &ca::Authority| {
                let missing = state
                    .trusted()
                    .into_iter()
                    .find(|root| found.under(*root).is_none());
                missing.map(|root| commands::certify(found.replica_id, found.number, root))
            };
            let found = ca::authorities(&world.state).iter().find_map(wants);
            let certify = found.unwrap_or_else(|| commands::certify(one, 1, state.issuing));
            (Actor::System, certify.into())
        }
        12 if step.two > 2 => {
            let ask = ca::AskRotation {
                replica_id: u64::from(step.one),
                reason: String::new(),
            };
            (root, ask.into())
        }
        12 | 13 => {
            let active = ca::active_authority(&world.state, one).unwrap_or_default();
            let rotate = commands::rotate_authority(one, active.number + 1, state.issuing);
            (replica(one), rotate.into())
        }
        14 => {
            let old = |found: &ca::Authority| found.status() == ca::AuthorityStatus::Retiring;
            let found = ca::authorities(&world.state)
                .into_iter()
                .find(old)
                .unwrap_or_default();
            let retire = ca::RetireAuthority {
                replica_id: found.replica_id,
                number: found.number,
            };
            (Actor::System, retire.into())
        }
        _ => {
            let active = ca::active_authority(&world.state, one).unwrap_or_default();
            let crl = commands::crl(one, active.number, world.index, world.at);
            (replica(one), crl.into())
        }
    }
}

fn rotation_command(world: &World, step: &Step, state: &ca::Ca) -> (Actor, Command) {
    let root = operator("root");
    if state.phase() == ca::Phase::Idle {
        return (root, commands::begin_root(&world.index.to_string()).into());
    }
    if step.one == 0 {
        let from = state.phase;
        let reason = String::new();
        return (root, ca::RevertRoot { from, reason }.into());
    }
    let advance = ca::AdvanceRoot {
        force: step.two > 2,
        reason: "due".to_owned(),
        ..commands::advance_root(state.phase())
    };
    (root, advance.into())
}
