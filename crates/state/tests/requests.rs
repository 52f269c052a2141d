//! Remembered requests: a retry is answered, and what was forgotten is never applied again.
#![allow(clippy::unwrap_used)]

mod kit;

use kit::{World, commands, id_at, operator, replica};
use palyra_state::{Actor, Envelope, Id, access, invariants, limits, meta, pairing, tables};
use prost::Message as _;

const HOUR: u64 = 3_600_000;

fn mint(world: &mut World, request_id: Id, code: &str) -> palyra_state::Applied {
    let command = commands::mint(world, code, "ticket");
    world.apply(&Envelope::new(request_id, operator("root"), command))
}

#[test]
fn a_retry_gets_the_answer_of_the_first_time_refusals_included() {
    let mut world = World::born();
    let (one, two) = (id_at(world.at, 1), id_at(world.at, 2));
    let first = mint(&mut world, one, "c1");
    world.advance(59 * 60_000);
    let again = mint(&mut world, one, "c2");
    assert!(again.duplicate && again.rows.is_empty());
    assert_eq!(first.reply, again.reply);
    let refused = mint(&mut world, two, "c1");
    assert_eq!(refused.reply.clone().unwrap_err().code(), "E0906");
    let again = mint(&mut world, two, "c3");
    assert!(again.duplicate);
    assert_eq!(again.reply, refused.reply);
}

#[test]
fn what_was_forgotten_is_refused_and_not_applied_again() {
    let mut world = World::born();
    let old = id_at(world.at, 1);
    mint(&mut world, old, "c1").reply.unwrap();
    world.advance(2 * HOUR);
    // The next request forgets it; the one after that meets the floor.
    let fresh = id_at(world.at, 2);
    mint(&mut world, fresh, "c2").reply.unwrap();
    let late = mint(&mut world, old, "c3");
    assert_eq!(late.reply.unwrap_err().code(), "E0901");
    assert_eq!(pairing::codes(&world.state).len(), 2);
}

#[test]
fn another_command_under_a_used_id_is_refused() {
    let mut world = World::born();
    let id = id_at(world.at, 1);
    mint(&mut world, id, "c1").reply.unwrap();
    let other = access::SetRole {
        name: "root".to_owned(),
        role: 0,
    };
    let applied = world.apply(&Envelope::new(id, operator("root"), other));
    assert_eq!(applied.reply.unwrap_err().code(), "E0903");
}

#[test]
fn the_same_id_of_another_actor_is_another_request() {
    let mut world = World::born();
    world.accept(
        operator("root"),
        commands::add_operator("alice", access::Role::Admin),
    );
    let id = id_at(world.at, 1);
    mint(&mut world, id, "c1").reply.unwrap();
    let command = commands::mint(&mut world, "c2", "ticket");
    let applied = world.apply(&Envelope::new(id, operator("alice"), command));
    assert!(!applied.duplicate && applied.reply.is_ok());
}

#[test]
fn an_id_far_ahead_of_the_clock_is_refused() {
    let mut world = World::born();
    let ahead = id_at(world.at + limits::REQUEST_AHEAD_MAX + 1, 1);
    assert_eq!(mint(&mut world, ahead, "c1").reply.unwrap_err().code(), "E0902");
    let within = id_at(world.at + limits::REQUEST_AHEAD_MAX, 1);
    mint(&mut world, within, "c1").reply.unwrap();
}

#[test]
fn a_leader_with_a_clock_ahead_shuts_nobody_out() {
    let mut world = World::born();
    world.advance(5 * HOUR);
    world.accept(
        replica(1),
        pairing::Expire {
            codes: Vec::new(),
            requests: Vec::new(),
        },
    );
    world.at -= 5 * HOUR;
    for number in 0..10 {
        let id = id_at(world.at + number, number);
        let applied = mint(&mut world, id, &format!("c{number}"));
        assert!(applied.reply.is_ok(), "{:?}", applied.reply);
    }
    assert_eq!(
        meta(&world.state).clock,
        world.at + 5 * HOUR,
        "the clock never goes back"
    );
}

#[test]
fn a_retry_is_answered_whatever_the_clocks_say() {
    // A client whose clock is behind, then ahead; a leader whose clock was ahead.
    for (client, leader) in [(-3 * HOUR as i64, 0), (5 * HOUR as i64, 0), (0, 5 * HOUR)] {
        let mut world = World::born();
        world.advance(4 * HOUR);
        let at = world.at.checked_add_signed(client).unwrap();
        let first = mint(&mut world, id_at(at, 1), "c1");
        first.reply.as_ref().unwrap();
        world.at += leader;
        let other = id_at(world.at - leader, 2);
        mint(&mut world, other, "c2").reply.unwrap();
        world.at -= leader;
        for (number, code) in [(3, "c3"), (4, "c4"), (5, "c5")] {
            let id = id_at(world.at, number);
            let one = mint(&mut world, id, code);
            assert!(one.reply.is_ok());
            let again = mint(&mut world, id, code);
            assert!(again.duplicate, "{client} {leader}");
            assert_eq!(again.reply, one.reply);
        }
        // Five hours ahead is over an hour ago, for a leader whose clock jumped.
        if leader == 0 {
            world.advance(59 * 60_000);
            let again = mint(&mut world, id_at(at, 1), "c1");
            assert!(again.duplicate, "{client} {leader}");
            assert_eq!(again.reply, first.reply);
        }
    }
}

#[test]
fn a_clock_that_was_ahead_and_is_set_right_shuts_its_owner_out_of_nothing() {
    let mut world = World::born();
    let ahead = id_at(world.at + 20 * HOUR, 1);
    mint(&mut world, ahead, "c1").reply.unwrap();
    world.advance(3 * HOUR);
    for number in 2..8 {
        let id = id_at(world.at, number);
        mint(&mut world, id, &format!("c{number}")).reply.unwrap();
    }
    // It is forgotten once an hour has passed since its own time.
    world.advance(19 * HOUR);
    for number in 10..16 {
        let id = id_at(world.at, number);
        mint(&mut world, id, &format!("c{number}")).reply.unwrap();
    }
    assert_eq!(mint(&mut world, ahead, "c1").reply.unwrap_err().code(), "E0901");
}

#[test]
fn an_actor_that_is_shut_out_leaves_no_trace_but_the_hash() {
    let mut world = World::born();
    let before = world.state.clone();
    let stranger = Actor::Operator {
        name: "mallory".to_owned(),
        fingerprint: kit::fingerprint("mallory"),
    };
    let command = commands::mint(&mut world, "c1", "pin");
    let applied = world.run(stranger, command);
    assert_eq!(applied.reply.unwrap_err().code(), "E0303");
    let written: Vec<_> = applied.writes.keys().collect();
    assert_eq!(written, [&tables::META.key(())]);
    assert_eq!(before.len(), world.state.len());
}

#[test]
fn one_actor_cannot_push_out_what_is_remembered_of_another() {
    let mut world = World::born();
    let node = world.pair("n1");
    let kept = id_at(world.at, 1);
    mint(&mut world, kept, "c1").reply.unwrap();
    world.checked = false;
    let register = commands::register(&mut world, "n1");
    let first = id_at(world.at, 1 << 30);
    for number in 0..limits::DEDUP_PER_ACTOR + 10 {
        let id = id_at(world.at, (1 << 30) + number);
        world
            .apply(&Envelope::new(id, node.clone(), register.clone()))
            .reply
            .unwrap();
    }
    let replay = world.apply(&Envelope::new(first, node, register));
    assert_eq!(replay.reply.unwrap_err().code(), "E0901");
    assert!(mint(&mut world, kept, "c2").duplicate);
    assert_eq!(invariants::check(&world.state), []);
}

#[test]
fn sweeps_are_not_remembered() {
    let mut world = World::born();
    let before = meta(&world.state).requests_seen;
    for _ in 0..5 {
        world.accept(Actor::System, palyra_state::dispatch::Expire { ids: Vec::new() });
    }
    assert_eq!(meta(&world.state).requests_seen, before);
}

#[test]
fn forgetting_finds_the_oldest_also_below_what_was_forgotten() {
    let mut world = World::born();
    world.checked = false;
    let pretend = |world: &mut World, seen: u64| {
        let mut known = meta(&world.state);
        known.requests_seen = seen;
        let row = [(tables::META.key(()), Some(known.encode_to_vec().into()))];
        world.state.absorb(&row.into());
    };
    let alice = operator("alice");
    let add = commands::add_operator("alice", access::Role::Admin);
    world.accept(operator("root"), add);
    let by_alice = |world: &mut World, id: Id, code: &str| {
        let command = commands::mint(world, code, "ticket");
        world.apply(&Envelope::new(id, alice.clone(), command))
    };
    let ahead: Vec<Id> = (0..4).map(|at| id_at(world.at + 20 * HOUR, at)).collect();
    for (number, id) in ahead.iter().enumerate() {
        mint(&mut world, *id, &format!("a{number}")).reply.unwrap();
    }
    // The table is so full that the two before them and two from far ahead have to go.
    pretend(&mut world, limits::DEDUP_MAX + 3);
    let (now, next) = (id_at(world.at, 50), id_at(world.at, 51));
    by_alice(&mut world, now, "b0").reply.unwrap();
    pretend(&mut world, limits::DEDUP_MAX);
    let kept = |world: &World, id: Id| {
        let mut world = world.clone();
        mint(&mut world, id, "again").duplicate || by_alice(&mut world, id, "again").duplicate
    };
    assert!(!kept(&world, ahead[1]) && kept(&world, ahead[2]) && kept(&world, now));
    // What came since is older than they were, and goes before those that are left.
    by_alice(&mut world, next, "b1").reply.unwrap();
    assert!(!kept(&world, now) && kept(&world, ahead[2]) && kept(&world, next));
}
