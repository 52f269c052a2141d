//! Runs and leases where a script would be too long: the bounds of fields, selection, renewals in thousands,
//! and what is forgotten.
#![allow(clippy::unwrap_used)]

mod kit;

use std::collections::BTreeMap;

use bytes::Bytes;
use kit::{World, commands, operator, replica};
use palyra_state::dispatch::{Effect, Failure};
use palyra_state::leases::{self, LeaseRef, LeaseState, Manifest, ManifestEntry, Outcome, RunState, Waits};
use palyra_state::{Actor, Command, Digest, Id, Reply, fleet, invariants, limits, tables};

/// Starts a run of `lint`, which `root` may.
fn start(world: &mut World, name: &str) -> leases::StartRun {
    kit::fleet::grant(world, name, "lint");
    leases::StartRun {
        run_id: world.id(name),
        tool: "lint".to_owned(),
        params: Bytes::from_static(b"{}"),
        ..leases::StartRun::default()
    }
}

fn started(world: &mut World, name: &str) -> Id {
    let start = start(world, name);
    world.accept(operator("root"), start);
    world.id(name)
}

fn lease_of(world: &World, run_id: Id) -> leases::Lease {
    let run = leases::run(&world.state, run_id).unwrap();
    leases::lease(&world.state, run.lease_id.unwrap()).unwrap()
}

fn state_of(world: &World, run_id: Id) -> RunState {
    leases::run(&world.state, run_id).unwrap().state()
}

/// A world with the worker `w`, that runs `run` under a lease.
fn stage(slots: u32) -> (World, Actor, leases::Lease) {
    let mut world = World::born();
    kit::fleet::policy(&mut world, slots);
    let node = kit::fleet::ready(&mut world, "w", &[&format!("slots {slots}")]);
    let run_id = started(&mut world, "run");
    let lease = lease_of(&world, run_id);
    let accept = leases::Accept {
        lease_id: lease.id,
        fence: lease.fence,
        epoch: lease.epoch,
    };
    world.accept(node.clone(), accept);
    let lease = lease_of(&world, run_id);
    assert_eq!(lease.state(), LeaseState::Active);
    (world, node, lease)
}

fn file(path: &str, size: u64) -> ManifestEntry {
    ManifestEntry {
        path: path.to_owned(),
        digest: Digest::of(path.as_bytes()),
        size,
        stored: false,
        executable: false,
    }
}

/// Makes a command with a field of this size.
type Make = fn(&mut World, &leases::Lease, usize) -> Command;

fn finish(lease: &leases::Lease, change: impl FnOnce(&mut leases::Finish)) -> Command {
    let mut finish = leases::Finish {
        lease_id: lease.id,
        fence: lease.fence,
        outcome: Outcome::Failed as i32,
        ..leases::Finish::default()
    };
    change(&mut finish);
    finish.into()
}

fn begin(world: &mut World, change: impl FnOnce(&mut leases::StartRun)) -> Command {
    let mut start = start(world, "other");
    change(&mut start);
    start.into()
}

/// Fields of operators' commands, then of the worker's: name, limit, code for more.
const ASKED: &[(&str, usize, &str, Make)] = &[
    ("parameters", limits::RUN_PARAMS, "E0906", |world, _, size| {
        begin(world, |start| start.params = vec![b'x'; size].into())
    }),
    ("input files", limits::MANIFEST, "E0853", |world, _, size| {
        let entries = (0..size).map(|at| file(&format!("{at:04}"), 1)).collect();
        begin(world, |start| start.inputs = Some(Manifest { entries }))
    }),
    ("a path", limits::PATH_MAX, "E0853", |world, _, size| {
        let entries = vec![file(&"x".repeat(size), 1)];
        begin(world, |start| start.inputs = Some(Manifest { entries }))
    }),
    (
        "a kept file",
        limits::ARTIFACT_MAX as usize,
        "E0853",
        |world, _, size| {
            let mut entry = file("a", size as u64);
            entry.stored = true;
            begin(world, |start| {
                start.inputs = Some(Manifest { entries: vec![entry] })
            })
        },
    ),
    ("a lease's life", 60_000, "E0867", |world, _, size| {
        begin(world, |start| start.ttl_ms = size as u64)
    }),
    (
        "a timeout",
        limits::RUN_TIMEOUT_MAX as usize,
        "E0867",
        |world, _, size| begin(world, |start| start.timeout_ms = size as u64),
    ),
    (
        "attempts",
        limits::RUN_ATTEMPTS_MAX as usize,
        "E0906",
        |world, _, size| begin(world, |start| start.max_attempts = size as u32),
    ),
    ("labels", limits::LABELS, "E0907", |world, _, size| {
        let labels = (0..size).map(|at| (format!("l{at}"), String::new())).collect();
        begin(world, |start| start.labels = labels)
    }),
    ("a reason", limits::REASON_MAX, "E0906", |_, lease, size| {
        leases::RevokeLease {
            lease_id: lease.id,
            reason: "x".repeat(size),
        }
        .into()
    }),
    (
        "a cancel's reason",
        limits::REASON_MAX,
        "E0906",
        |_, lease, size| {
            leases::CancelRun {
                run_id: lease.run_id,
                reason: "x".repeat(size),
            }
            .into()
        },
    ),
];

const SAID: &[(&str, usize, &str, Make)] = &[
    ("a result", limits::RUN_RESULT, "E0906", |_, lease, size| {
        finish(lease, |finish| finish.result = vec![b'x'; size].into())
    }),
    ("the last lines", limits::LOG_TAIL, "E0906", |_, lease, size| {
        finish(lease, |finish| finish.log_tail = vec![b'x'; size].into())
    }),
    (
        "an error's code",
        limits::REASON_MAX,
        "E0906",
        |_, lease, size| {
            let code = "x".repeat(size);
            finish(lease, |finish| {
                finish.error = Some(Failure {
                    code,
                    message: String::new(),
                });
            })
        },
    ),
    ("usage", limits::RUN_USAGE, "E0907", |_, lease, size| {
        let usage = (0..size).map(|at| (format!("u{at}"), 1)).collect();
        finish(lease, |finish| finish.usage = usage)
    }),
    ("a sandbox", limits::RUN_USAGE, "E0907", |_, lease, size| {
        finish(lease, |finish| {
            finish.sandbox = vec!["landlock:7".to_owned(); size]
        })
    }),
    (
        "a cleanup's message",
        limits::ERROR_MESSAGE_MAX,
        "E0906",
        |_, lease, size| {
            leases::Cleaned {
                lease_id: lease.id,
                fence: lease.fence,
                ok: true,
                message: "x".repeat(size),
                ..leases::Cleaned::default()
            }
            .into()
        },
    ),
];

#[test]
fn a_field_at_its_limit_is_accepted_and_one_above_is_refused() {
    for (by_worker, fields) in [(false, ASKED), (true, SAID)] {
        for (name, limit, code, make) in fields {
            for over in [0, 1] {
                let (mut world, node, lease) = stage(1);
                let command = make(&mut world, &lease, limit + over);
                let actor = if by_worker { node } else { operator("root") };
                let reply = world.run(actor, command).reply;
                match (over, reply) {
                    (0, reply) => assert!(reply.is_ok(), "{name}: {reply:?}"),
                    (_, Ok(reply)) => panic!("{name} of {} was accepted: {reply:?}", limit + 1),
                    (_, Err(reject)) => assert_eq!(reject.code(), *code, "{name}: {reject}"),
                }
            }
        }
    }
}

#[test]
fn lists_of_a_batch_are_bounded() {
    let (mut world, node, lease) = stage(1);
    let wish = LeaseRef {
        lease_id: lease.id,
        fence: lease.fence,
        worker_id: lease.worker_id,
        epoch: lease.epoch,
    };
    let leases = vec![wish; limits::RENEW_BATCH + 1];
    world.refuse("E0907", replica(1), leases::Renew { leases });
    let expire = leases::Expire {
        leases: vec![lease.id; limits::EXPIRE_BATCH + 1],
        runs: Vec::new(),
    };
    world.refuse("E0907", Actor::System, expire);
    let held = leases::Held {
        lease_id: lease.id,
        ..leases::Held::default()
    };
    let report = leases::Reconcile {
        worker_id: lease.worker_id,
        epoch: lease.epoch,
        held: vec![held; limits::LEASES_HELD + 1],
    };
    world.refuse("E0907", node, report);
}

/// What ten thousand leases cost is bounded by what one entry of 1,024 renewals is: two keys each, no row, no
/// memory of the request.
#[test]
fn a_thousand_renewals_are_one_small_entry() {
    let mut world = World::born();
    world.checked = false;
    kit::fleet::policy(&mut world, limits::SLOTS_PER_WORKER);
    let slots = format!("slots {}", limits::SLOTS_PER_WORKER);
    for number in 0..16 {
        kit::fleet::ready(&mut world, &format!("w{number}"), &[&slots]);
    }
    for number in 0..limits::RENEW_BATCH {
        started(&mut world, &format!("run-{number}"));
    }
    let live = leases::live(&world.state, None, usize::MAX);
    assert_eq!(live.len(), limits::RENEW_BATCH, "every slot is taken");
    let wishes = live.iter().map(|lease| LeaseRef {
        lease_id: lease.id,
        fence: lease.fence,
        worker_id: lease.worker_id,
        epoch: lease.epoch,
    });
    let renew = leases::Renew {
        leases: wishes.collect(),
    };
    let size = palyra_state::Envelope::new(kit::id_at(0, 1), replica(1), renew.clone())
        .encode()
        .len();
    assert!(size < limits::ENVELOPE_MAX / 8, "{size} bytes");
    world.advance(5_000);
    let applied = world.accept(replica(1), renew);
    assert!(applied.rows.is_empty(), "renewals are not in the journal");
    // The lease, its place among the deadlines before and after, and what every entry writes of itself.
    assert_eq!(applied.writes.len(), 3 * limits::RENEW_BATCH + 1);
    let Ok(Reply::LeasesRenewed(answer)) = applied.reply else {
        panic!("{:?}", applied.reply);
    };
    let at = world.at;
    assert!(
        answer
            .renewals
            .iter()
            .all(|renewal| renewal.deadline_at == at + limits::LEASE_TTL)
    );
    assert_eq!(invariants::check(&world.state), Vec::new());
}

#[test]
fn the_worker_with_most_evidence_then_least_load_then_longest_rest_is_asked_first() {
    let mut world = World::born();
    kit::fleet::policy(&mut world, 2);
    kit::fleet::lax(&mut world);
    kit::fleet::ready(&mut world, "weak", &["evidence 1", "supervisor none"]);
    kit::fleet::ready(&mut world, "one", &[]);
    kit::fleet::ready(&mut world, "two", &[]);
    let mut given = Vec::new();
    for number in 0..6 {
        let run_id = started(&mut world, &format!("run-{number}"));
        let lease = lease_of(&world, run_id);
        let name = world
            .names
            .iter()
            .find(|(_, id)| **id == lease.worker_id)
            .unwrap()
            .0
            .clone();
        given.push(format!("{name}/{}", lease.slot));
    }
    assert_eq!(given, ["one/0", "two/0", "one/1", "two/1", "weak/0", "weak/1"]);
    let late = started(&mut world, "late");
    let run = leases::run(&world.state, late).unwrap();
    assert_eq!(
        leases::waits_for(&world.state, &run),
        Waits::Worker {
            ahead: 0,
            free: 0,
            trusted: true
        }
    );
}

/// More demands than a search looks at: none is out of sight for ever.
#[test]
fn no_demand_waits_for_ever() {
    let mut world = World::born();
    world.checked = false;
    kit::fleet::policy(&mut world, 1);
    for number in 0..(2 * limits::SELECTION) {
        let mut start = start(&mut world, &format!("run-{number}"));
        start.labels = BTreeMap::from([("rack".to_owned(), format!("{number}"))]);
        start.timeout_ms = limits::RUN_TIMEOUT_MAX;
        world.accept(operator("root"), start);
    }
    let mut wanted = start(&mut world, "wanted");
    wanted.labels = BTreeMap::from([("site".to_owned(), "lab".to_owned())]);
    wanted.timeout_ms = limits::RUN_TIMEOUT_MAX;
    let run_id = wanted.run_id;
    world.accept(operator("root"), wanted);
    kit::fleet::ready(&mut world, "w", &["slots 1"]);
    for _ in 0..40 {
        if state_of(&world, run_id) == RunState::Leased {
            return;
        }
        kit::fleet::attach(&mut world, "w", Vec::new());
    }
    panic!("{:?}", leases::run(&world.state, run_id));
}

#[test]
fn a_run_waits_for_its_labels_and_gets_them_with_a_registration() {
    let mut world = World::born();
    kit::fleet::policy(&mut world, 1);
    let node = kit::fleet::ready(&mut world, "w", &["slots 1"]);
    let mut wanted = start(&mut world, "run");
    wanted.labels = BTreeMap::from([("site".to_owned(), "moon".to_owned())]);
    let run_id = wanted.run_id;
    world.accept(operator("root"), wanted);
    assert_eq!(state_of(&world, run_id), RunState::Queued);
    let mut register = commands::register(&mut world, "w");
    register.labels.insert("site".to_owned(), "moon".to_owned());
    world.accept(node, register);
    assert_eq!(state_of(&world, run_id), RunState::Leased);
}

/// A worker that is quarantined while it works loses its leases, and gets none before it is trusted and
/// clean.
#[test]
fn who_is_not_trusted_gets_nothing() {
    let (mut world, node, lease) = stage(2);
    let quarantine = fleet::Quarantine {
        worker_id: lease.worker_id,
        reason: "odd".to_owned(),
    };
    world.accept(operator("root"), quarantine);
    assert_eq!(lease_of(&world, lease.run_id).state(), LeaseState::Ending);
    let waits = started(&mut world, "waits");
    assert_eq!(state_of(&world, waits), RunState::Queued);
    world.refuse("E0861", node.clone(), finish(&lease, |_| {}));
    let cleaned = leases::Cleaned {
        lease_id: lease.id,
        fence: lease.fence,
        ok: true,
        ..leases::Cleaned::default()
    };
    world.accept(node, cleaned);
    assert_eq!(
        state_of(&world, lease.run_id),
        RunState::Lost,
        "it had begun, and runs once"
    );
    assert_eq!(state_of(&world, waits), RunState::Queued);
}

/// Files of ended runs go when room is needed, the oldest first; a run whose lease has not ended stays.
#[test]
fn ended_runs_make_room_for_files() {
    let (mut world, node, lease) = stage(1);
    world.checked = false;
    // As large as all that may be kept, but a little: most of it of one run that has ended.
    let size = limits::ARTIFACT_CHUNK as u64;
    let held = Manifest {
        entries: vec![ManifestEntry {
            stored: true,
            size,
            digest: Digest::of(&vec![1; size as usize]),
            ..file("a", size)
        }],
    };
    let put = leases::PutArtifact {
        run_id: lease.run_id,
        digest: held.entries[0].digest,
        size,
        offset: 0,
        chunk: vec![1; size as usize].into(),
        lease_id: Some(lease.id),
        fence: lease.fence,
    };
    world.accept(node.clone(), put.clone());
    world.accept(
        node.clone(),
        finish(&lease, |finish| {
            finish.outcome = Outcome::Succeeded as i32;
            finish.outputs = Some(held.clone());
        }),
    );
    let fill = |world: &mut World| {
        let mut sums = leases::totals(&world.state);
        sums.artifact_bytes = limits::ARTIFACT_BYTES;
        let bytes = prost::Message::encode_to_vec(&sums);
        world.state.absorb(&BTreeMap::from([(
            tables::LEASE_TOTALS.key(()),
            Some(bytes.into()),
        )]));
    };
    let mut other = start(&mut world, "other");
    other.inputs = Some(held);
    let run_id = other.run_id;
    world.accept(operator("root"), other);
    fill(&mut world);
    let input = leases::PutArtifact {
        run_id,
        lease_id: None,
        fence: 0,
        ..put
    };
    world.refuse("E0858", operator("root"), input.clone());
    assert!(
        leases::run(&world.state, lease.run_id).is_some(),
        "its lease has not ended"
    );
    let cleaned = leases::Cleaned {
        lease_id: lease.id,
        fence: lease.fence,
        ok: true,
        ..leases::Cleaned::default()
    };
    world.accept(node, cleaned);
    fill(&mut world);
    world.accept(operator("root"), input);
    assert_eq!(leases::run(&world.state, lease.run_id), None);
    assert_eq!(leases::lease(&world.state, lease.id), None);
    assert_eq!(
        state_of(&world, run_id),
        RunState::Leased,
        "it has its file, and the slot is free"
    );
}

/// Attempts end, and offers are not made for ever.
#[test]
fn offers_that_nobody_takes_come_to_an_end() {
    let mut world = World::born();
    kit::fleet::policy(&mut world, 1);
    let node = kit::fleet::ready(&mut world, "w", &["slots 1"]);
    let mut start = start(&mut world, "run");
    start.effect = Effect::Idempotent as i32;
    start.ttl_ms = 1_000;
    start.timeout_ms = limits::RUN_TIMEOUT_MAX;
    let run_id = start.run_id;
    world.accept(operator("root"), start);
    for _ in 0..limits::RUN_ATTEMPTS_MAX {
        let lease = lease_of(&world, run_id);
        world.advance(1_000);
        let due = leases::due(&world.state, world.at);
        assert_eq!(due.leases, [lease.id]);
        world.accept(Actor::System, due);
        let end = leases::to_end(&world.state, lease.worker_id);
        assert_eq!((end.len(), end[0].reason.as_str()), (1, "unclean"));
        let cleaned = leases::Cleaned {
            lease_id: lease.id,
            fence: lease.fence,
            ok: true,
            ..leases::Cleaned::default()
        };
        world.accept(node.clone(), cleaned);
    }
    let run = leases::run(&world.state, run_id).unwrap();
    assert_eq!(
        (run.state(), run.error.unwrap().code.as_str()),
        (RunState::Refused, "not_begun")
    );
    assert_eq!(run.attempts.len(), limits::RUN_ATTEMPTS_MAX as usize);
    assert_eq!(leases::next_due(&world.state), None);
}
