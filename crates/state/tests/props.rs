//! Random histories: invariants after each entry, and one log makes one state.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "kit/history.rs"]
mod history;
mod kit;

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};

use history::{Step, command, fleet, step};
use kit::{World, id_at};
use palyra_state::{
    Code, Envelope, MemRead, Position, Reject, Reply, Row, apply, decode, invariants, journal, state_hash,
};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use prost::Message as _;

/// Commands that are done again rather than remembered: doing them again does nothing.
const SWEEPS: [&str; 13] = [
    "approvals.expire",
    "fleet.lapse",
    "fleet.recheck",
    "fleet.reap",
    "nodes.detach",
    "nodes.detach_many",
    "nodes.lapse",
    "nodes.detach_replica",
    "dispatch.expire",
    "dispatch.wake",
    "pairing.expire",
    "leases.expire",
    "leases.renew",
];

/// Plays a history on a fresh cluster; every step is checked by `World::apply`.
fn play(steps: &[Step]) -> World {
    let mut world = fleet();
    world.effective.clear(); // what the fleet took says nothing about histories
    let mut sent: Vec<(Envelope, Result<Reply, Reject>)> = Vec::new();
    for step in steps {
        world.advance(step.wait);
        if step.back {
            world.at -= 20_000; // the next leader's clock is behind
        }
        if step.again && !sent.is_empty() {
            let back = usize::from(step.two) * 4 % sent.len();
            let (envelope, answer) = &sent[sent.len() - 1 - back];
            send_again(&mut world, envelope, answer);
            continue;
        }
        let (actor, command) = command(&mut world, step);
        let request_id = id_at(world.at, (3 << 40) + world.index);
        let envelope = Envelope::new(request_id, actor, command);
        let applied = world.apply(&envelope);
        assert!(!applied.duplicate, "an answer to what was never asked");
        sent.push((envelope, applied.reply));
    }
    world
}

/// A retry gets the very same answer, or is refused because it was forgotten; it never has an effect.
fn send_again(world: &mut World, envelope: &Envelope, answer: &Result<Reply, Reject>) {
    let again = world.apply(envelope);
    let name = envelope.command.name();
    if again.duplicate {
        assert_eq!(again.reply, *answer, "a retry of {name} was answered otherwise");
    } else if answer.is_ok() && !SWEEPS.contains(&name) {
        let refusal = again.reply.as_ref().map_err(Reject::kind);
        assert_eq!(refusal, Err(Code::RequestTooOld), "{name} was applied again");
    }
    let next = world.apply(envelope);
    assert!(
        !again.duplicate || next.duplicate,
        "an answer was forgotten at once"
    );
}

/// Applies a log to a state.
fn replay(state: &mut MemRead, log: &[(u64, Vec<u8>)], from: u64) {
    for ((at, bytes), index) in log.iter().zip(from..) {
        let envelope = decode(bytes).unwrap();
        let applied = apply(state, Position { term: 1, index }, *at, &envelope, bytes);
        state.absorb(&applied.writes);
    }
}

/// Few enough for every run; `PROPTEST_CASES=5000` looks further. A failure prints the line that replays it.
fn config() -> ProptestConfig {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("PROPTEST_RNG_SEED").unwrap_or_else(|| RandomState::new().build_hasher().finish());
    eprintln!("replay: PROPTEST_RNG_SEED={seed} cargo test -p palyra-state --test props");
    ProptestConfig {
        cases: number("PROPTEST_CASES").map_or(96, |cases| cases as u32),
        rng_seed: RngSeed::Fixed(seed),
        max_shrink_iters: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn invariants_hold_after_every_entry(steps in prop::collection::vec(step(), 1..240)) {
        let world = play(&steps);
        prop_assert!(invariants::check(&world.state).is_empty());
    }

    #[test]
    fn one_log_makes_one_state(
        steps in prop::collection::vec(step(), 1..120),
        cut in any::<prop::sample::Index>(),
    ) {
        let world = play(&steps);
        let mut straight = MemRead::new();
        replay(&mut straight, &world.log, 1);
        prop_assert_eq!(state_hash(&straight), state_hash(&world.state));
        prop_assert_eq!(&straight, &world.state);

        // A snapshot anywhere, and the rest of the log on top of it.
        let cut = cut.index(world.log.len());
        let mut early = MemRead::new();
        replay(&mut early, &world.log[..cut], 1);
        let mut restored = MemRead::new();
        let rows = early.iter().map(|(key, value)| (key.to_vec(), Some(value.to_vec().into())));
        restored.absorb(&rows.collect());
        replay(&mut restored, &world.log[cut..], cut as u64 + 1);
        prop_assert_eq!(&restored, &world.state);
    }

    #[test]
    fn a_changed_byte_breaks_the_journal(
        steps in prop::collection::vec(step(), 20..80),
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let world = play(&steps);
        let tag = palyra_state::tables::JOURNAL.key(())[0];
        let rows: Vec<(Vec<u8>, Vec<u8>)> = world
            .state
            .iter()
            .filter(|(key, _)| key[0] == tag)
            .map(|(key, value)| (key.to_vec(), value.to_vec()))
            .collect();
        let (key, mut value) = rows[at.index(rows.len())].clone();
        let original = Row::decode(value.as_slice()).unwrap();
        let byte = at.index(value.len());
        value[byte] ^= 1 << bit;
        // An unknown field is no change of the row.
        prop_assume!(Row::decode(value.as_slice()).as_ref() != Ok(&original));
        let mut state = world.state.clone();
        state.absorb(&BTreeMap::from([(key, Some(value.into()))]));
        prop_assert!(journal::verify_all(&state).is_err());
    }
}

/// Every command there is, save genesis.
const COMMANDS: &[&str] = &[
    "access.add_operator",
    "access.remove_operator",
    "access.set_role",
    "approvals.create_grant",
    "approvals.decide",
    "approvals.expire",
    "approvals.revoke_grant",
    "approvals.set_policy",
    "approvals.withdraw",
    "ca.acknowledge",
    "ca.advance_root",
    "ca.ask_rotation",
    "ca.begin_root",
    "ca.certify_authority",
    "ca.publish_crl",
    "ca.replica_ready",
    "ca.retire_authority",
    "ca.revert_root",
    "ca.rotate_authority",
    "cluster.admit_replica",
    "cluster.allocate_replica",
    "cluster.mint_join_token",
    "cluster.raise_feature_level",
    "cluster.announce_certificate",
    "cluster.remove_replica",
    "cluster.set_replica_status",
    "cluster.update_replica_addresses",
    "dispatch.await_mediation",
    "dispatch.cancel",
    "dispatch.complete",
    "dispatch.expire",
    "dispatch.resume_from_mediation",
    "dispatch.submit",
    "dispatch.wake",
    "fleet.attest",
    "fleet.drain",
    "fleet.lapse",
    "fleet.open_challenge",
    "fleet.quarantine",
    "fleet.reap",
    "fleet.recheck",
    "fleet.release",
    "fleet.reverify",
    "fleet.set_policy",
    "identity.purge_device",
    "identity.remove_device",
    "identity.clear_clone",
    "identity.confirm_certificate",
    "identity.recover_device",
    "identity.renew_certificate",
    "identity.renew_operator_certificate",
    "identity.revoke_device",
    "identity.rotate_device",
    "identity.set_policy",
    "identity.revoke_operator_certificate",
    "leases.accept",
    "leases.cancel_run",
    "leases.cleaned",
    "leases.expire",
    "leases.finish",
    "leases.put_artifact",
    "leases.reconcile",
    "leases.renew",
    "leases.revoke_lease",
    "leases.start_run",
    "nodes.attach",
    "nodes.detach",
    "nodes.detach_many",
    "nodes.detach_replica",
    "nodes.lapse",
    "nodes.register",
    "pairing.approve",
    "pairing.begin_attempt",
    "pairing.expire",
    "pairing.fail_attempt",
    "pairing.mark_completed",
    "pairing.mint_code",
    "pairing.prove",
    "pairing.reject",
    "pairing.revoke_code",
];

/// Journal rows that need more than their command to come about.
const ROWS: &[&str] = &[
    "approval.expired",
    "approval.lapsed",
    "approval.opened",
    "grant.activated",
    "grant.denied",
    "grant.expired",
    "grant.revoked",
    "identity.certificate_in_use",
    "identity.clone_suspected",
    "identity.rotation_completed",
    "pairing.code_burned",
    "pairing.code_expired",
    "pairing.proof_failed",
    "pairing.request_expired",
    "node.session_superseded",
    "node.detached",
    "node.offline",
    "node.gone",
    "dispatch.assigned",
    "dispatch.rebound",
    "dispatch.attempt_ended",
    "dispatch.cancelling",
    "dispatch.ready",
    "dispatch.result_late",
    "dispatch.finished succeeded",
    "dispatch.finished failed",
    "dispatch.finished rejected",
    "dispatch.finished timed_out",
    "dispatch.finished cancelled",
    "dispatch.finished session_lost",
    "ca.root_retired",
    "worker.attested",
    "worker.attestation_refused",
    "worker.lifecycle",
    "worker.lost",
    "worker.drained",
    "worker.quarantine_lifted",
    "worker.rechecked",
    "worker.statement_expired",
    "cluster.replica_level",
    "cluster.replica_moved",
    "cluster.replica_staleness",
];

/// The histories would prove little if most of their commands were refused, or had no effect.
#[test]
fn histories_reach_every_command_and_every_end() {
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..64 {
        let steps = prop::collection::vec(step(), 240)
            .new_tree(&mut runner)
            .unwrap()
            .current();
        let world = play(&steps);
        for (name, count) in world.effective {
            *seen.entry(name.to_owned()).or_default() += count;
        }
        for row in journal::last_rows(&world.state, usize::MAX) {
            let name = match row.action.as_str() {
                "dispatch.finished" | "run.finished" => format!("{} {}", row.action, row.detail("state")),
                _ => row.action,
            };
            *seen.entry(name).or_default() += 1;
        }
    }
    let wanted = COMMANDS.iter().chain(ROWS);
    let missing: Vec<_> = wanted.filter(|name| !seen.contains_key(**name)).collect();
    assert!(
        missing.is_empty(),
        "never happened: {missing:?}\nhappened: {seen:#?}"
    );
}
