//! Every list, queue and payload has a limit, and reaching it is a refusal or a forgetting, never growth.
#![allow(clippy::unwrap_used)]

mod kit;

use std::collections::BTreeMap;

use bytes::Bytes;
use kit::{World, certificate, commands, id_at, operator, replica};
use palyra_state::access::{self, AddOperator};
use palyra_state::identity::{self, NewCertificate};
use palyra_state::journal::{self, Rows};
use palyra_state::pairing::{self, CodeStatus};
use palyra_state::{
    Actor, Command, Envelope, Meta, cluster, dispatch, invariants, limits, meta, nodes, tables,
};
use prost::Message;

#[test]
fn codes_open_at_one_time() {
    let mut world = World::born();
    for number in 0..limits::CODES_OPEN {
        let mint = commands::mint(&mut world, &format!("c{number}"), "pin");
        world.accept(operator("root"), mint);
    }
    let mint = commands::mint(&mut world, "one-more", "pin");
    world.refuse("E0410", operator("root"), mint.clone());
    // When their time has passed they make room by themselves.
    world.advance(limits::CODE_TTL);
    world.accept(operator("root"), mint);
    assert_eq!(pairing::open_codes(&world.state, world.at).len(), 1);
}

#[test]
fn closed_codes_are_forgotten_oldest_first() {
    let mut world = World::born();
    world.checked = false;
    for number in 0..limits::CODES + 40 {
        let mint = commands::mint(&mut world, &format!("c{number}"), "pin");
        let code_id = mint.code_id;
        world.accept(operator("root"), mint);
        world.accept(
            operator("root"),
            pairing::RevokeCode {
                code_id,
                reason: String::new(),
            },
        );
    }
    assert_eq!(pairing::codes(&world.state).len() as u64, limits::CODES);
    let oldest = world.id("c0");
    assert!(pairing::code(&world.state, oldest).is_none());
    assert_eq!(invariants::check(&world.state), []);
}

#[test]
fn requests_that_wait_and_requests_that_are_kept() {
    let mut world = World::born();
    world.checked = false;
    let ask = |world: &mut World, number: u64| {
        let (code, device) = (format!("c{number}"), format!("n{number}"));
        let mint = commands::mint(world, &code, "ticket");
        world.accept(operator("root"), mint);
        commands::prove(world, &format!("p{number}"), &code, None, &device)
    };
    for number in 0..limits::REQUESTS_PENDING {
        let prove = ask(&mut world, number);
        world.accept(replica(1), prove);
    }
    let prove = ask(&mut world, 9_999);
    world.refuse("E0417", replica(1), prove);
    // Those that nobody decided make room by themselves.
    world.advance(limits::REQUEST_TTL);
    for number in 10_000..10_000 + limits::REQUESTS {
        let prove = ask(&mut world, number);
        let pairing_id = prove.pairing_id;
        world.accept(replica(1), prove);
        world.accept(
            operator("root"),
            pairing::Reject {
                pairing_id,
                reason: String::new(),
            },
        );
    }
    assert_eq!(
        pairing::requests(&world.state, None, usize::MAX).len() as u64,
        limits::REQUESTS
    );
    assert_eq!(invariants::check(&world.state), []);
}

#[test]
fn a_right_proof_gives_its_attempt_back() {
    let mut world = World::born();
    let mint = commands::mint(&mut world, "c1", "pin");
    let code_id = mint.code_id;
    world.accept(operator("root"), mint);
    let begin = commands::begin(&mut world, "a1", "c1", "n1");
    world.accept(replica(1), begin);
    assert_eq!(pairing::failures(&world.state, world.at), 1);
    let prove = commands::prove(&mut world, "p1", "c1", Some("a1"), "n1");
    world.accept(replica(1), prove);
    assert_eq!(pairing::failures(&world.state, world.at), 0);
    let code = pairing::code(&world.state, code_id).unwrap();
    assert_eq!((code.status(), code.attempts.len()), (CodeStatus::Used, 0));
}

#[test]
fn certificates_of_a_device() {
    let mut world = World::born();
    let node = world.pair("n1");
    let device_id = world.id("n1");
    let renew = |number: usize| identity::RenewCertificate {
        device_id,
        certificate: NewCertificate {
            der: Bytes::from(format!("certificate {number}")),
            spki: kit::key(&format!("{number}")),
            not_after: kit::T0 + 86_400_000,
            ..certificate("n1")
        },
        counter: number as u64,
        source: String::new(),
    };
    for number in 1..limits::CERTIFICATES {
        world.accept(node.clone(), renew(number));
    }
    world.refuse("E0308", node.clone(), renew(99));
    // An expired one makes room, and its key is let go.
    world.advance(86_400_000);
    world.accept(node, NewNotAfter(renew(99)).later());
    let subject = device_id.to_string();
    let kept = identity::certificates_of(&world.state, identity::CertificateKind::Node, &subject);
    assert_eq!(kept.len(), limits::CERTIFICATES);
    let owned =
        |number: &usize| identity::device_of_key(&world.state, kit::key(&number.to_string())).is_some();
    assert_eq!(
        (1..limits::CERTIFICATES).filter(owned).count(),
        limits::CERTIFICATES - 2
    );
    assert_eq!(
        identity::device_of_key(&world.state, kit::key("99")),
        Some(device_id)
    );
}

/// A renewal that is valid for two days more.
struct NewNotAfter(identity::RenewCertificate);

impl NewNotAfter {
    fn later(mut self) -> identity::RenewCertificate {
        self.0.certificate.not_after += 2 * 86_400_000;
        self.0
    }
}

#[test]
fn a_queue_and_everything_that_empties_it() {
    let mut world = World::born();
    let node = world.pair("n1");
    let register = commands::register(&mut world, "n1");
    world.accept(node.clone(), commands::limited(register, [0, 0], [0, 0]));
    world.checked = false;
    for number in 0..limits::OPEN_PER_DEVICE {
        let mut submit = commands::submit(&mut world, &format!("d{number}"), "n1", "echo");
        submit.timeout_ms = u64::from(number + 1) * 1_000;
        world.accept(operator("root"), submit);
    }
    let one_more = commands::submit(&mut world, "one-more", "n1", "echo");
    world.refuse("E0604", operator("root"), one_more);
    let attach = commands::attach(&mut world, "n1", 1, &[]);
    let applied = world.accept(node.clone(), attach);
    assert_eq!(
        applied.rows.len(),
        1 + limits::BOUND_PER_DEVICE as usize,
        "the rest waits"
    );
    // Deadlines come in order, in batches.
    world.advance(300_000);
    let due = dispatch::due(&world.state, world.at, limits::EXPIRE_BATCH);
    assert_eq!(due.len(), limits::EXPIRE_BATCH);
    assert_eq!(dispatch::next_deadline(&world.state), Some(kit::T0 + 1_000));
    world.accept(Actor::System, dispatch::Expire { ids: due });
    // What waits and is too late is not given to the node: the free slots find the 44 others.
    assert_eq!(dispatch::due(&world.state, world.at, 1_000), []);
    let device_id = world.id("n1");
    assert_eq!(
        dispatch::queue_length(&world.state, device_id).bound,
        limits::BOUND_PER_DEVICE
    );
    let revoke = commands::revoke(&mut world, "n1");
    world.accept(operator("root"), revoke);
    assert_eq!(dispatch::totals(&world.state).open, 0);
    assert_eq!(invariants::check(&world.state), []);
}

#[test]
fn ended_dispatches_are_forgotten_oldest_first() {
    let mut world = World::born();
    world.pair("n1");
    world.checked = false;
    for number in 0..limits::FINISHED + 20 {
        world.advance(1);
        let submit = commands::submit(&mut world, &format!("d{number}"), "n1", "echo");
        let dispatch_id = submit.dispatch_id;
        world.accept(operator("root"), submit);
        world.accept(
            operator("root"),
            dispatch::Cancel {
                dispatch_id,
                reason: String::new(),
            },
        );
    }
    assert_eq!(dispatch::totals(&world.state).finished, limits::FINISHED);
    let oldest = world.id("d0");
    assert!(dispatch::dispatch(&world.state, oldest).is_none());
    assert!(dispatch::payload(&world.state, oldest).is_none());
    assert_eq!(invariants::check(&world.state), []);
}

#[test]
fn join_tokens_and_replicas() {
    let mut world = World::born();
    for number in 0..limits::JOIN_TOKENS {
        let mint = commands::mint_token(&mut world, &format!("t{number}"), &format!("r{}", number + 2));
        world.accept(operator("root"), mint);
    }
    let mint = commands::mint_token(&mut world, "one-more", "rx");
    world.refuse("E0114", operator("root"), mint.clone());
    for number in 0..limits::REPLICAS - 1 {
        let allocate = commands::allocate(&mut world, &format!("t{number}"), &format!("r{}", number + 2));
        world.accept(replica(1), allocate);
    }
    // A used token makes room for another, but there is no room for its replica.
    world.accept(operator("root"), mint);
    let allocate = commands::allocate(&mut world, "one-more", "rx");
    world.refuse("E0113", replica(1), allocate);
    assert_eq!(cluster::replicas(&world.state).len(), limits::REPLICAS);
}

#[test]
fn a_lost_replica_is_detached_in_batches_that_spare_those_who_came_back() {
    let mut world = World::born();
    let mut newest = 0;
    for number in 0..7 {
        let name = format!("n{number}");
        let node = world.pair(&name);
        let attach = commands::attach(&mut world, &name, 1, &[]);
        world.accept(node, attach);
        newest = world.index;
    }
    let node = world.node("n0");
    let attach = commands::attach(&mut world, "n0", 1, &[]);
    world.accept(node, attach);
    let batch = nodes::DetachReplica {
        replica_id: 1,
        limit: 4,
        up_to_epoch: newest,
        reason: "lost".to_owned(),
        suspect_for: 0,
        silent_for: 0,
    };
    world.accept(Actor::System, batch.clone());
    assert_eq!(nodes::totals(&world.state).online, 3);
    world.accept(Actor::System, batch);
    let back = world.id("n0");
    assert_eq!(nodes::sessions_of(&world.state, 1, None, 10), [back]);
}

#[test]
fn batches_of_ends_and_of_late_nodes_have_an_end() {
    let mut world = World::born();
    let device_id = world.id("n1");
    let ended = nodes::Ended {
        device_id,
        epoch: 1,
        reason: "silent".to_owned(),
        how: nodes::How::Lost as i32,
        silent_for: 0,
    };
    let many = |count| nodes::DetachMany {
        ends: vec![ended.clone(); count],
        suspect_for: 0,
        lost_after: 0,
    };
    world.accept(replica(1), many(limits::DETACH_BATCH));
    world.refuse("E0907", replica(1), many(limits::DETACH_BATCH + 1));
    let late = |count| nodes::Lapse {
        ids: vec![device_id; count],
        lost_after: 0,
    };
    world.accept(Actor::System, late(limits::LAPSE_BATCH));
    world.refuse("E0907", Actor::System, late(limits::LAPSE_BATCH + 1));
    let long = nodes::Ended {
        reason: "x".repeat(limits::REASON_MAX + 1),
        ..ended.clone()
    };
    let long = nodes::DetachMany {
        ends: vec![long],
        suspect_for: 0,
        lost_after: 0,
    };
    world.refuse("E0906", replica(1), long);
}

/// What waits for nodes that are gone ends a queue or a few at a time, and never many in one entry.
#[test]
fn one_entry_does_not_end_the_queues_of_many_nodes() {
    let mut world = World::born();
    let names: Vec<String> = (0..3).map(|number| format!("n{number}")).collect();
    for name in &names {
        let node = world.pair(name);
        let attach = commands::attach(&mut world, name, 1, &[]);
        world.accept(node, attach);
        for number in 0..200 {
            let mut submit = commands::submit(&mut world, &format!("d-{name}-{number}"), name, "echo");
            submit.timeout_ms = limits::DEADLINE_MAX;
            world.checked = false;
            world.accept(operator("root"), submit);
        }
    }
    world.checked = true;
    let lost = nodes::DetachReplica {
        replica_id: 1,
        limit: 0,
        up_to_epoch: 0,
        reason: "lost".to_owned(),
        suspect_for: 1_000,
        silent_for: 0,
    };
    world.accept(Actor::System, lost);
    let lapse = |world: &World| nodes::Lapse {
        ids: nodes::due(&world.state, world.at, limits::LAPSE_BATCH),
        lost_after: 1_000,
    };
    world.advance(1_000);
    let late = lapse(&world);
    world.accept(Actor::System, late);
    world.advance(1_000);
    for left in [1, 0] {
        let late = lapse(&world);
        world.accept(Actor::System, late);
        assert_eq!(nodes::due(&world.state, world.at, 10).len(), left);
        assert_eq!(dispatch::totals(&world.state).open, left as u64 * 200);
    }
    assert_eq!(nodes::next_due(&world.state), None);
    assert_eq!(nodes::totals(&world.state).gone, 3);
}

#[test]
fn names_prefixes_and_pages() {
    let mut world = World::born();
    for number in 0..5 {
        world.pair(&format!("n{number}"));
    }
    let all = identity::devices(&world.state, None, 100);
    assert_eq!(all.len(), 5);
    let rest = identity::devices(&world.state, Some(all[1].id), 2);
    assert_eq!(
        rest.iter().map(|device| device.id).collect::<Vec<_>>(),
        [all[2].id, all[3].id]
    );
    let text = all[3].id.to_string();
    let found = identity::devices_by_prefix(&world.state, &text.to_lowercase(), 10);
    assert_eq!(found.len(), 1);
    assert_eq!(
        identity::devices_by_prefix(&world.state, &text[..10], 10).len(),
        5
    );
    assert!(identity::devices_by_prefix(&world.state, "7Z", 10).is_empty());
}

/// The state with its bookkeeping changed: what takes very long to reach is pretended.
fn pretend(world: &mut World, change: impl FnOnce(&mut Meta)) {
    let mut known = meta(&world.state);
    change(&mut known);
    put(world, tables::META.key(()), &known);
}

fn put(world: &mut World, key: Vec<u8>, record: &impl Message) {
    let row = BTreeMap::from([(key, Some(record.encode_to_vec().into()))]);
    world.state.absorb(&row);
    world.checked = false;
}

#[test]
fn the_journal_is_trimmed_by_as_much_as_an_entry_brings() {
    let mut world = World::born();
    world.pair("n1");
    world.checked = false;
    for number in 0..limits::OPEN_PER_DEVICE {
        let submit = commands::submit(&mut world, &format!("d{number}"), "n1", "echo");
        world.accept(operator("root"), submit);
    }
    pretend(&mut world, |known| known.journal_rows = limits::JOURNAL_ROWS);
    let revoke = commands::revoke(&mut world, "n1");
    let applied = world.accept(operator("root"), revoke);
    assert!(applied.rows.len() > 1_000);
    let known = meta(&world.state);
    assert_eq!(known.journal_rows, limits::JOURNAL_ROWS);
    assert!(known.journal_trimmed > Default::default());
    // A node that comes and goes cannot make it grow.
    assert!(matches!(
        journal::rows_after(&world.state, Default::default(), 1),
        Rows::Gap { .. }
    ));
}

#[test]
fn bytes_that_wait_in_the_cluster_and_dispatches_without_any() {
    let mut world = World::born();
    world.pair("n1");
    let submit = commands::submit(&mut world, "d1", "n1", "echo");
    let size = submit.payload.len() as u64 + limits::DISPATCH_COST;
    let waiting = |open, open_bytes| dispatch::Totals {
        open,
        open_bytes,
        ..Default::default()
    };
    let full = limits::OPEN_BYTES - size + 1;
    for sums in [
        waiting(0, full),
        waiting(limits::OPEN_BYTES / limits::DISPATCH_COST, 0),
        waiting(1, full - limits::DISPATCH_COST),
    ] {
        put(&mut world, tables::DISPATCH_TOTALS.key(()), &sums);
        world.refuse("E0613", operator("root"), submit.clone());
    }
    put(&mut world, tables::DISPATCH_TOTALS.key(()), &waiting(0, full - 1));
    world.accept(operator("root"), submit);
}

#[test]
fn bytes_of_ended_dispatches_are_forgotten_at_once() {
    let mut world = World::born();
    world.pair("n1");
    world.checked = false;
    let cancel = |world: &mut World, number: u64| {
        world.advance(1);
        let mut submit = commands::submit(world, &format!("d{number}"), "n1", "echo");
        submit.payload = Bytes::from(vec![b' '; 1_000]);
        let dispatch_id = submit.dispatch_id;
        world.accept(operator("root"), submit);
        let reason = String::new();
        world.accept(operator("root"), dispatch::Cancel { dispatch_id, reason });
        dispatch_id
    };
    let ids: Vec<_> = (0..200).map(|number| cancel(&mut world, number)).collect();
    // As if some of them had been large: 150 have to go, and one more to make room for the next.
    let sums = dispatch::Totals {
        finished_bytes: limits::FINISHED_BYTES + 149_500,
        ..dispatch::totals(&world.state)
    };
    put(&mut world, tables::DISPATCH_TOTALS.key(()), &sums);
    cancel(&mut world, 200);
    let kept = |id| dispatch::dispatch(&world.state, id).is_some();
    let gone = ids.iter().take_while(|id| !kept(**id)).count();
    assert_eq!(gone, 151);
    assert!(ids[gone..].iter().all(|id| kept(*id)));
    let sums = dispatch::totals(&world.state);
    assert_eq!(sums.finished, 201 - 151);
    assert!(sums.finished_bytes <= limits::FINISHED_BYTES);
}

#[test]
fn requests_that_are_remembered_in_all() {
    let mut world = World::born();
    let kept = id_at(world.at, 1);
    let mint = commands::mint(&mut world, "c1", "ticket");
    let first = Envelope::new(kept, operator("root"), mint);
    world.apply(&first).reply.unwrap();
    pretend(&mut world, |known| known.requests_seen = limits::DEDUP_MAX);
    let next = commands::mint(&mut world, "c2", "ticket");
    world.accept(operator("root"), next);
    assert_eq!(meta(&world.state).requests_seen, limits::DEDUP_MAX);
    // The oldest gave way, and is refused rather than applied again. Genesis went before it.
    let more = commands::mint(&mut world, "c3", "ticket");
    world.accept(operator("root"), more);
    let again = world.apply(&first);
    assert_eq!(again.reply.unwrap_err().code(), "E0901");
}

#[test]
fn what_is_refused_for_its_length_is_not_remembered_in_full() {
    let mut world = World::born();
    let node = world.pair("n1");
    let long = "\u{1b}[31m".repeat(40_000);
    let mut register = commands::register(&mut world, "n1");
    register.capabilities[0].name = long.clone();
    let add = AddOperator {
        name: long.clone(),
        ..commands::add_operator("x", access::Role::Viewer)
    };
    let set = access::SetRole { name: long, role: 0 };
    let asked: [(Actor, Command); 3] = [
        (node, register.into()),
        (operator("root"), add.into()),
        (operator("root"), set.into()),
    ];
    for (actor, command) in asked {
        let applied = world.run(actor, command);
        let reject = applied.reply.unwrap_err();
        assert!(reject.message().len() < 1_000, "{reject}");
        assert!(!reject.message().contains(char::is_control), "{reject}");
        let written: usize = applied.writes.values().flatten().map(Bytes::len).sum();
        assert!(written < 2_000, "{written} bytes for {reject}");
    }
}

#[test]
fn a_stranger_cannot_fill_a_journal_row() {
    let mut world = World::born();
    let mint = commands::mint(&mut world, "c1", "pin");
    world.accept(operator("root"), mint);
    let begin = commands::begin(&mut world, "a1", "c1", "n1");
    let stranger = Actor::Anonymous {
        source: "x".repeat(100_000),
    };
    let applied = world.accept(stranger, begin);
    assert_eq!(applied.rows[0].actor.len(), limits::DETAIL_VALUE);
}

#[test]
fn a_command_of_a_later_level_is_refused_until_the_cluster_has_it() {
    let mut world = World::born();
    // The first level is every command's of this version: pretend that the cluster is older than that.
    let mut born = cluster::cluster(&world.state).unwrap();
    born.feature_level = limits::FIRST_FEATURE_LEVEL - 1;
    put(&mut world, tables::CLUSTER.key(()), &born);
    let mint = commands::mint(&mut world, "c1", "pin");
    assert!(cluster::check_level(&world.state, &mint.clone().into()).is_err());
    world.refuse("E0115", operator("root"), mint.clone());
    assert!(pairing::codes(&world.state).is_empty());
    assert_eq!(
        cluster::next_feature_level(&world.state),
        Some(limits::FIRST_FEATURE_LEVEL)
    );
    born.feature_level = limits::FIRST_FEATURE_LEVEL;
    put(&mut world, tables::CLUSTER.key(()), &born);
    assert_eq!(cluster::next_feature_level(&world.state), None);
    world.accept(operator("root"), mint);
}
