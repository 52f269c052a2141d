//! Workers beyond the attack table: what the documents say is what the code does, and the lifecycle is a
//! function of facts.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::type_complexity)]

mod kit;

use std::path::Path;

use kit::{World, attack, commands, operator, replica, workers};
use palyra_state::fleet::lifecycle::{TRANSITIONS, allowed, of};
use palyra_state::fleet::{Attested, Hold, Lifecycle, Policy, Statement, Worker, diff};
use palyra_state::{Actor, Id, fleet, leases, limits};
use prost::Message as _;

fn document(path: &str) -> String {
    let path = Path::new(".").join("../../docs").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn the_document_has_the_table_of_transitions() {
    let text = document("workers.md");
    let table = text.split("| from | to |\n|---|---|\n").nth(1).unwrap();
    let rows: Vec<&str> = table.lines().take_while(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), TRANSITIONS.len());
    for (row, (from, to)) in rows.iter().zip(TRANSITIONS) {
        let names: Vec<&str> = to.iter().map(|state| state.as_str()).collect();
        assert_eq!(*row, format!("| {} | {} |", from.as_str(), names.join(" ")));
    }
}

#[test]
fn every_lifecycle_can_be_left_and_reached_and_none_follows_itself() {
    for state in Lifecycle::ALL {
        assert!(!allowed(state, state));
        assert!(
            Lifecycle::ALL.iter().any(|other| allowed(state, *other)),
            "{state:?}"
        );
        assert!(
            Lifecycle::ALL.iter().any(|other| allowed(*other, state)),
            "{state:?}"
        );
        assert_eq!(Lifecycle::parse(state.as_str()), Some(state));
    }
}

/// A worker that is available at 10 under version 1.
fn ready() -> Worker {
    Worker {
        reconciled_epoch: 7,
        attested: Some(Attested {
            policy_version: 1,
            expires_at: 100,
            slots: 1,
            ..Attested::default()
        }),
        ..Worker::default()
    }
}

/// Each fact outweighs all that come after it.
#[test]
fn the_first_fact_that_holds_is_the_word() {
    let hold = || {
        Some(Hold {
            cause: "operator".to_owned(),
            ..Hold::default()
        })
    };
    let facts: [(Lifecycle, &dyn Fn(&mut Worker)); 10] = [
        (Lifecycle::Failed, &|worker| worker.failure = hold()),
        (Lifecycle::Quarantined, &|worker| worker.quarantine = hold()),
        (Lifecycle::Offline, &|worker| worker.barred = true),
        (Lifecycle::Orphaned, &|worker| worker.orphaned = true),
        (Lifecycle::Draining, &|worker| worker.drain = hold()),
        (Lifecycle::Offline, &|worker| {
            (worker.away_since, worker.lost_at) = (5, 0)
        }),
        (Lifecycle::Degraded, &|worker| worker.unclean = vec![Id::ZERO]),
        (Lifecycle::Registered, &|worker| worker.attested = None),
        (Lifecycle::Busy, &|worker| worker.slots_used = 1),
        (Lifecycle::Available, &|_| {}),
    ];
    for first in 0..facts.len() {
        let mut worker = ready();
        for (_, fact) in &facts[first..] {
            fact(&mut worker);
        }
        assert_eq!(of(&worker, 10, 1).0, facts[first].0, "from fact {first} on");
    }
}

#[test]
fn time_and_a_new_policy_take_a_statement_from_a_worker() {
    let worker = ready();
    assert_eq!(of(&worker, 99, 1), (Lifecycle::Available, "ready"));
    assert_eq!(of(&worker, 100, 1), (Lifecycle::Registered, "statement_expired"));
    assert_eq!(of(&worker, 99, 2), (Lifecycle::Registered, "policy_changed"));
    let away = Worker {
        away_since: 5,
        lost_at: 20,
        ..ready()
    };
    assert_eq!(
        of(&away, 99, 1),
        (Lifecycle::Degraded, "away"),
        "until somebody says so"
    );
}

/// The bytes of the document are those of the record, and of what signs.
#[test]
fn the_document_has_the_test_vector() {
    let text = document("protocol/attestation.md");
    let hex = text.split("```\n").nth(1).unwrap().replace('\n', "");
    let bytes: Vec<u8> = (0..hex.len() / 2)
        .map(|at| u8::from_str_radix(&hex[at * 2..at * 2 + 2], 16).unwrap())
        .collect();
    let golden = include_str!("golden.txt");
    assert!(golden.contains(&format!("record.worker_statement {hex}\n")));
    let statement = Statement::decode(bytes.as_slice()).unwrap();
    assert_eq!(statement.encode_to_vec(), bytes);
    assert_eq!((statement.evidence, statement.slots), (3, 2));
}

#[test]
fn a_policy_is_kept_in_order_and_what_changed_is_told_entry_by_entry() {
    let mut world = World::born();
    let mut policy = attack::policy();
    policy.images = vec![attack::digest("b"), attack::digest("a")];
    policy.heartbeat_timeout = 0;
    let set = workers::set_policy(&world, policy);
    workers::ask(&mut world, set);
    let kept = fleet::policy(&world.state).unwrap();
    assert!(kept.images.is_sorted());
    assert_eq!(kept.heartbeat_timeout, limits::HEARTBEAT_TIMEOUT);

    let mut next = kept.clone();
    let gone = next.images.remove(0);
    next.capabilities[0].authorities.push("vendor".to_owned());
    next.max_workers = 7;
    let changes = diff(Some(&kept), &next);
    let told: Vec<(&str, &str, &str)> = changes
        .iter()
        .map(|change| {
            (
                change.field.as_str(),
                change.before.as_str(),
                change.after.as_str(),
            )
        })
        .collect();
    let gone = gone.to_string();
    assert_eq!(
        told,
        [
            (
                "capabilities.echo",
                "supervisor by ops",
                "supervisor by ops vendor"
            ),
            ("max_workers", "100", "7"),
            ("images", gone.as_str(), ""),
        ]
    );
    assert_eq!(diff(Some(&kept), &kept), []);
    // The same again is no new version.
    let again = workers::set_policy(&world, kept);
    let applied = workers::ask(&mut world, again);
    assert!(applied.rows.is_empty());
}

#[test]
fn a_policy_that_cannot_be_meant_is_refused() {
    let breaks: [(&str, fn(&mut Policy)); 12] = [
        ("images names something twice", |policy| {
            policy.images.push(policy.images[0])
        }),
        ("a digest that is none", |policy| {
            policy.builds.push(Default::default())
        }),
        ("no version of the WIT ABI", |policy| {
            policy.wit_abis.push("0.2 ".to_owned())
        }),
        ("egress_proxies names something twice", |policy| {
            policy.egress_proxies.push(policy.egress_proxies[0].clone());
        }),
        ("is no P-256 key", |policy| {
            policy.egress_proxies[0].public_key = vec![1; 91].into()
        }),
        ("which egress_proxies does not name", |policy| {
            policy.required_egress = "x".to_owned()
        }),
        ("is no name for a tool", |policy| {
            policy.capabilities[0].name = "rm -rf".to_owned()
        }),
        ("needs 1 to 16 authorities", |policy| {
            policy.capabilities[0].authorities.clear()
        }),
        ("no name for an authority", |policy| {
            policy.capabilities[0].authorities[0].clear()
        }),
        ("has no least evidence", |policy| {
            policy.capabilities[0].min_evidence = 0
        }),
        ("sdk_protocol_min must be", |policy| policy.sdk_protocol_min = 4),
        ("leases_per_worker is 0", |policy| policy.leases_per_worker = 0),
    ];
    for (cause, change) in breaks {
        let mut world = World::born();
        let mut policy = attack::policy();
        change(&mut policy);
        let set = workers::set_policy(&world, policy);
        let refused = world.run(operator("root"), set).reply.unwrap_err();
        assert_eq!(refused.code(), "E0807");
        assert!(refused.message().contains(cause), "{refused}");
    }
}

fn lifecycle(world: &mut World, name: &str) -> Lifecycle {
    let id = world.id(name);
    fleet::worker(&world.state, id).unwrap().lifecycle()
}

/// A worker with a lease of a run that it has begun.
fn leased() -> (World, Actor, leases::Lease) {
    let mut world = World::born();
    let node = workers::ready(&mut world, "n1");
    assert_eq!(lifecycle(&mut world, "n1"), Lifecycle::Available);
    kit::fleet::grant(&mut world, "run", "echo");
    let start = leases::StartRun {
        run_id: world.id("run"),
        tool: "echo".to_owned(),
        ..leases::StartRun::default()
    };
    let run_id = start.run_id;
    workers::ask(&mut world, start);
    let lease_id = leases::run(&world.state, run_id).unwrap().lease_id.unwrap();
    let lease = leases::lease(&world.state, lease_id).unwrap();
    let accept = leases::Accept {
        lease_id,
        fence: lease.fence,
        epoch: lease.epoch,
    };
    world.accept(node.clone(), accept);
    (world, node, lease)
}

fn violate(world: &mut World, lease: &leases::Lease) -> fleet::Violate {
    fleet::Violate {
        worker_id: world.id("n1"),
        lease_id: lease.id,
        fence: lease.fence,
        kind: "scope".to_owned(),
        message: "it read /etc/shadow".to_owned(),
    }
}

fn cleaned(lease: &leases::Lease, ok: bool) -> leases::Cleaned {
    leases::Cleaned {
        lease_id: lease.id,
        fence: lease.fence,
        ok,
        ..leases::Cleaned::default()
    }
}

#[test]
fn a_violation_quarantines_under_a_live_fence_and_changes_nothing_under_another() {
    let (mut world, node, lease) = leased();
    let mut stale = violate(&mut world, &lease);
    stale.fence -= 1;
    world.refuse("E0810", node.clone(), stale);
    let told = violate(&mut world, &lease);
    world.accept(node.clone(), told.clone());
    assert_eq!(lifecycle(&mut world, "n1"), Lifecycle::Quarantined);
    let hold = fleet::worker(&world.state, told.worker_id)
        .unwrap()
        .quarantine
        .unwrap();
    assert_eq!(
        (hold.cause.as_str(), hold.lease_id),
        ("scope_violation", Some(lease.id))
    );
    let ending = leases::lease(&world.state, lease.id).unwrap();
    assert_eq!(ending.end_reason(), leases::EndReason::Quarantined);
    world.accept(node.clone(), cleaned(&lease, true));
    world.refuse("E0810", node, told);
    assert_eq!(lifecycle(&mut world, "n1"), Lifecycle::Quarantined);
}

#[test]
fn a_worker_that_is_lost_with_a_lease_is_orphaned_until_it_is_reconciled() {
    let (mut world, node, lease) = leased();
    let epoch = workers::epoch(&mut world, "n1");
    let detach = commands::detach(&mut world, "n1", epoch);
    world.accept(replica(1), detach);
    assert_eq!(lifecycle(&mut world, "n1"), Lifecycle::Degraded);
    world.advance(limits::HEARTBEAT_TIMEOUT);
    let ids = fleet::due(&world.state, world.at, 10);
    world.accept(Actor::System, fleet::Lapse { ids });
    assert_eq!(lifecycle(&mut world, "n1"), Lifecycle::Orphaned);
    let lost = leases::lease(&world.state, lease.id).unwrap();
    assert_eq!(lost.end_reason(), leases::EndReason::WorkerLost);
    let attach = commands::attach(&mut world, "n1", 1, &[]);
    world.accept(node.clone(), attach);
    assert_eq!(
        lifecycle(&mut world, "n1"),
        Lifecycle::Orphaned,
        "a session alone is no account"
    );
    let clean = leases::Held {
        lease_id: lease.id,
        fence: lease.fence,
        state: leases::HeldState::Cleaned as i32,
        message: String::new(),
    };
    let report = workers::reconcile(&mut world, "n1", vec![clean]);
    world.accept(node, report);
    assert_eq!(lifecycle(&mut world, "n1"), Lifecycle::Available);
    assert_eq!(fleet::snapshot(&world.state).slots_used, 0);
}

#[test]
fn a_failed_cleanup_holds_a_worker_until_somebody_asks_and_it_is_clean() {
    let (mut world, node, lease) = leased();
    let revoke = leases::RevokeLease {
        lease_id: lease.id,
        reason: "stop".to_owned(),
    };
    workers::ask(&mut world, revoke);
    world.accept(node.clone(), cleaned(&lease, false));
    assert_eq!(lifecycle(&mut world, "n1"), Lifecycle::Failed);
    // A new statement proves what runs, not that nothing is left.
    assert_eq!(workers::attests(&mut world, "n1", &[]).refusal, None);
    assert_eq!(lifecycle(&mut world, "n1"), Lifecycle::Failed);
    let cleanup = fleet::Cleanup {
        worker_id: world.id("n1"),
        reason: "disk is back".to_owned(),
        force: false,
    };
    workers::ask(&mut world, cleanup.clone());
    assert_eq!(
        lifecycle(&mut world, "n1"),
        Lifecycle::Failed,
        "asking is not cleaning"
    );
    world.accept(node.clone(), cleaned(&lease, true));
    let after = lifecycle(&mut world, "n1");
    assert!(after != Lifecycle::Failed, "{after:?}");
    world.refuse("E0809", operator("root"), cleanup);
}

#[test]
fn an_operator_may_vouch_that_a_worker_is_clean() {
    let (mut world, node, lease) = leased();
    let revoke = leases::RevokeLease {
        lease_id: lease.id,
        reason: "stop".to_owned(),
    };
    workers::ask(&mut world, revoke);
    world.accept(node, cleaned(&lease, false));
    let worker_id = world.id("n1");
    let vouch = fleet::Cleanup {
        worker_id,
        reason: "wiped by hand".to_owned(),
        force: true,
    };
    let applied = workers::ask(&mut world, vouch);
    assert!(
        applied
            .rows
            .iter()
            .any(|row| row.action == "worker.cleanup_vouched")
    );
    let worker = fleet::worker(&world.state, worker_id).unwrap();
    assert!(worker.failure.is_none() && worker.unclean.is_empty());
    // Its lease is over before its deadline, and the deadline brings nothing back.
    let over = leases::lease(&world.state, lease.id).unwrap();
    assert_eq!(over.state(), leases::LeaseState::Ended);
    assert_eq!(over.cleanup.unwrap().by, "operator/root");
    assert_eq!((worker.slots_used, worker.lifecycle()), (0, Lifecycle::Available));
}

#[test]
fn a_drain_ends_what_runs_at_its_deadline_and_force_at_once() {
    for force in [false, true] {
        let (mut world, _, lease) = leased();
        let drain = fleet::Drain {
            worker_id: world.id("n1"),
            reason: "kernel".to_owned(),
            deadline_ms: 5_000,
            force,
        };
        workers::ask(&mut world, drain);
        assert_eq!(lifecycle(&mut world, "n1"), Lifecycle::Draining);
        let reason = |world: &World| leases::lease(&world.state, lease.id).unwrap().end_reason();
        if !force {
            assert_eq!(reason(&world), leases::EndReason::None);
            assert_eq!(fleet::next_due(&world.state), Some(world.at + 5_000));
            world.advance(5_000);
            let ids = fleet::due(&world.state, world.at, 10);
            world.accept(Actor::System, fleet::Lapse { ids });
        }
        assert_eq!(reason(&world), leases::EndReason::Drained);
    }
}
