//! Random histories: invariants after each entry, and one log makes one state.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "kit/history.rs"]
mod history;
mod kit;

use std::collections::BTreeMap;

use history::{Step, command, fleet, step};
use kit::{World, id_at};
use palyra_state::{Envelope, MemRead, Position, Row, apply, decode, invariants, journal, state_hash};
use proptest::prelude::*;
use prost::Message as _;

/// Plays a history on a fresh cluster; every step is checked by `World::apply`.
fn play(steps: &[Step]) -> World {
    let mut world = fleet();
    let mut sent: Vec<Envelope> = Vec::new();
    for step in steps {
        world.advance(step.wait);
        if step.back {
            world.at -= 20_000; // the next leader's clock is behind
        }
        let envelope = match sent.last() {
            Some(last) if step.again => last.clone(),
            _ => {
                let (actor, command) = command(&mut world, step);
                Envelope {
                    request_id: id_at(world.at, (3 << 40) + world.index),
                    actor,
                    command,
                }
            }
        };
        let first = world.apply(&envelope);
        if step.again {
            let second = world.apply(&envelope);
            if first.duplicate {
                assert!(second.duplicate, "an answer was forgotten at once");
                assert_eq!(first.reply, second.reply, "a retry was answered otherwise");
            }
        }
        sent.push(envelope);
    }
    world
}

/// Applies a log to a state.
fn replay(state: &mut MemRead, log: &[(u64, Vec<u8>)], from: u64) {
    for ((at, bytes), index) in log.iter().zip(from..) {
        let envelope = decode(bytes).unwrap();
        let applied = apply(state, Position { term: 1, index }, *at, &envelope, bytes);
        state.absorb(&applied.writes);
    }
}

/// Few enough for every run; `PROPTEST_CASES=5000` looks further.
fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(96);
    ProptestConfig {
        cases,
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
        prop_assert_eq!(state_hash(&restored), state_hash(&world.state));
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
        let Ok(changed) = Row::decode(value.as_slice()) else { return Ok(()) };
        prop_assume!(changed != original); // an unknown field is no change of the row
        let mut state = world.state.clone();
        state.absorb(&BTreeMap::from([(key, Some(value.into()))]));
        prop_assert!(journal::verify_all(&state).is_err());
    }
}

/// The histories would prove little if most of their commands were refused.
#[test]
fn histories_reach_what_they_are_for() {
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..24 {
        let steps = prop::collection::vec(step(), 150)
            .new_tree(&mut runner)
            .unwrap()
            .current();
        let world = play(&steps);
        for row in journal::last_rows(&world.state, usize::MAX) {
            *seen.entry(row.action.clone()).or_default() += 1;
            if row.action == "dispatch.finished" {
                *seen
                    .entry(format!("dispatch.finished {}", row.detail("state")))
                    .or_default() += 1;
            }
        }
    }
    let wanted = [
        "pairing.approved",
        "pairing.rejected",
        "pairing.attempt",
        "pairing.code_burned",
        "pairing.code_expired",
        "node.attached",
        "node.session_superseded",
        "node.detached",
        "dispatch.assigned",
        "dispatch.rebound",
        "dispatch.finished succeeded",
        "dispatch.finished timed_out",
        "dispatch.finished cancelled",
        "dispatch.finished session_lost",
        "dispatch.awaiting_local_mediation",
        "identity.device_revoked",
        "identity.certificate_renewed",
        "access.operator_removed",
        "cluster.replica_admitted",
        "cluster.replica_removed",
    ];
    let missing: Vec<_> = wanted
        .iter()
        .filter(|action| !seen.contains_key(**action))
        .collect();
    assert!(
        missing.is_empty(),
        "never happened: {missing:?}\nhappened: {seen:#?}"
    );
}
