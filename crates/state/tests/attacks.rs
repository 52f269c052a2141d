//! The attack table against apply: what each attack is refused with, and that none leaves a worker admitted.
//!
//! `cargo test -p palyra-state --test attacks -- --nocapture` prints the table as it came out.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod kit;

use std::collections::BTreeSet;

use kit::attack::{self, Attack, Shown};
use kit::{World, commands, operator, workers};
use palyra_state::{Actor, Applied, Code, fleet, identity, invariants, nodes};

/// A cluster with a policy, and a worker in a session that has not attested.
fn world() -> World {
    let mut world = World::born();
    workers::pair(&mut world, "n1");
    let policy = workers::set_policy(&world, attack::policy());
    workers::ask(&mut world, policy);
    world
}

fn honest(world: &mut World) -> Shown {
    let at = workers::situation(world, "n1");
    attack::forge(&at, &attack::key("n1"), &[])
}

fn show(world: &mut World, shown: Shown) -> Applied {
    let (node, attest) = (world.node("n1"), workers::attest(world, "n1", shown));
    world.run(node, attest)
}

/// What was prepared for the statement that is the attack.
struct Stage {
    /// Who shows it.
    node: Actor,
    /// In which session; nothing: the present one.
    epoch: Option<u64>,
    /// Whether a challenge is opened for it.
    open: bool,
    /// The statement, if it was made before.
    kept: Option<Shown>,
}

/// Plays an attack; what came of the statement that is the attack.
fn play(world: &mut World, attack: &Attack) -> Applied {
    let mut stage = Stage {
        node: world.node("n1"),
        epoch: None,
        open: true,
        kept: None,
    };
    for step in &attack.before {
        match step.split(' ').next().unwrap() {
            "policy" | "admitted" | "quarantined" | "as" => circumstances(world, &mut stage, step),
            _ => earlier(world, &mut stage, step),
        }
    }
    if stage.open {
        workers::challenged(world, "n1");
    }
    let at = workers::situation(world, "n1");
    let shown = stage
        .kept
        .unwrap_or_else(|| attack::forge(&at, &attack::key("n1"), &attack.steps));
    let mut attest = workers::attest(world, "n1", shown);
    attest.epoch = stage.epoch.unwrap_or(attest.epoch);
    world.run(stage.node, attest)
}

/// Steps about what holds around the statement.
fn circumstances(world: &mut World, stage: &mut Stage, step: &str) {
    let mut words = step.split(' ');
    match (words.next().unwrap(), words.next().unwrap_or_default()) {
        ("policy", "none") => *world = without_policy(),
        ("policy", _) => {
            let policy = workers::set_policy(world, attack::policy_after(step).unwrap());
            workers::ask(world, policy);
        }
        ("admitted", _) => assert_eq!(workers::attests(world, "n1", &[]).refusal, None),
        ("as", name) => stage.node = workers::pair(world, name),
        ("quarantined", how) => {
            quarantine(world, how == "reverify");
            stage.open = how == "reverify";
        }
        _ => panic!("no such step: {step}"),
    }
}

/// Steps about a statement, or a challenge, before the one that is shown.
fn earlier(world: &mut World, stage: &mut Stage, step: &str) {
    let mut words = step.split(' ');
    let (word, how) = (words.next().unwrap(), words.next().unwrap_or_default());
    stage.open = false;
    match (word, how) {
        // A worker that was judged once, and that nobody asked again.
        ("challenge", "none") => {
            workers::attests(world, "n1", &["sdk 9"]);
            return;
        }
        ("stranger", _) => return,
        _ => {}
    }
    workers::challenged(world, "n1");
    stage.kept = Some(honest(world));
    match (word, how) {
        ("challenge", _) => stage.open = true,
        ("refused", _) => {
            let at = workers::situation(world, "n1");
            let bad = attack::forge(&at, &attack::key("n1"), &["image other"]);
            assert!(workers::outcome(&show(world, bad)).refusal.is_some());
        }
        ("replay", _) => {
            let first = stage.kept.clone().unwrap();
            assert_eq!(workers::outcome(&show(world, first)).refusal, None);
            stage.open = how == "open";
        }
        ("session", _) => {
            stage.epoch = (how == "old").then(|| workers::epoch(world, "n1"));
            let attach = commands::attach(world, "n1", 1, &[]);
            world.accept(stage.node.clone(), attach);
        }
        ("late", _) => world.advance(how.trim_end_matches('s').parse::<u64>().unwrap() * 1_000),
        ("revoked", _) => {
            let revoke = commands::revoke(world, "n1");
            workers::ask(world, revoke);
        }
        _ => panic!("no such step: {step}"),
    }
}

fn without_policy() -> World {
    let mut world = World::born();
    workers::pair(&mut world, "n1");
    world
}

fn quarantine(world: &mut World, reverify: bool) {
    let (worker_id, reason) = (world.id("n1"), "looks odd".to_owned());
    workers::ask(
        world,
        fleet::Quarantine {
            worker_id,
            reason: reason.clone(),
        },
    );
    if reverify {
        workers::ask(world, fleet::Reverify { worker_id, reason });
    } else {
        let (node, open) = (world.node("n1"), workers::challenge(world, "n1"));
        world.refuse("E0803", node, open);
    }
}

/// What came of an attack: severity, code, and the action of the journal's row.
fn judged(applied: &Applied) -> (String, String, String) {
    let refused = applied
        .rows
        .iter()
        .find(|row| row.action == "worker.attestation_refused");
    match (&applied.reply, refused) {
        (Err(reject), None) => {
            let severity = fleet::severity(reject.kind()).as_str().to_owned();
            (severity, reject.code(), String::new())
        }
        (Ok(_), Some(row)) => {
            let outcome = workers::outcome(applied);
            let refusal = outcome.refusal.clone().unwrap();
            assert_eq!(
                row.detail("code"),
                refusal.code(),
                "the row and the answer differ"
            );
            assert_eq!(row.detail("severity"), outcome.severity().as_str());
            assert_eq!(row.detail("message"), refusal.message());
            (
                row.detail("severity").to_owned(),
                refusal.code(),
                row.action.clone(),
            )
        }
        other => panic!("neither refused nor in the journal: {other:?}"),
    }
}

#[test]
fn every_attack_is_refused_as_the_table_says() {
    let table = attack::table();
    assert!(table.len() >= 40, "{} attacks", table.len());
    println!(
        "{:28} {:8} {:5} {:28} lifecycle",
        "attack", "severity", "code", "journal"
    );
    let mut wrong = Vec::new();
    for attack in &table {
        let mut world = world();
        let applied = play(&mut world, attack);
        let (severity, code, journal) = judged(&applied);
        // Whatever it reports now, nothing is given to it.
        let (node, report) = (world.node("n1"), workers::reconcile(&mut world, "n1", Vec::new()));
        let reported = world.run(node, report);
        assert!(
            reported.reply.is_ok() || attack.name == "device-was-revoked",
            "{reported:?}"
        );
        let id = world.id("n1");
        let found = fleet::worker(&world.state, id);
        let state = found.as_ref().map_or("-", |worker| worker.lifecycle().as_str());
        println!("{:28} {severity:8} {code} {:28} {state}", attack.name, journal);
        if (severity.as_str(), code.as_str(), journal.as_str())
            != (attack.severity, attack.code, attack.journal)
        {
            wrong.push(format!("{}: {severity} {code} {journal}", attack.name));
        }
        assert!(
            !workers::is_admitted(&mut world, "n1"),
            "{} leaves the worker admitted",
            attack.name
        );
        assert!(
            fleet::candidates(&world.state, "echo", 1).is_empty(),
            "{}",
            attack.name
        );
        let recorded = found.and_then(|worker| worker.refusal);
        assert_eq!(
            recorded.is_some() && applied.reply.is_ok(),
            !journal.is_empty(),
            "{}",
            attack.name
        );
    }
    assert!(wrong.is_empty(), "came out otherwise: {wrong:#?}");
}

#[test]
fn names_are_unique_and_every_code_of_a_statement_is_hit() {
    let table = attack::table();
    let names: BTreeSet<&str> = table.iter().map(|attack| attack.name).collect();
    assert_eq!(names.len(), table.len());
    let hit: BTreeSet<&str> = table.iter().map(|attack| attack.code).collect();
    let judging = (Code::NoPolicy as i32..=Code::EvidenceTooLow as i32)
        .chain([Code::TooManyWorkers as i32])
        .map(|number| format!("E{number:04}"));
    let missing: Vec<String> = judging.filter(|code| !hit.contains(code.as_str())).collect();
    assert!(missing.is_empty(), "no attack meets {missing:?}");
}

/// Each attack changes something that makes a difference: the honest statement, in the same world, is accepted.
#[test]
fn honest_statements_of_all_levels_pass() {
    for (steps, evidence) in [
        (&[][..], fleet::Evidence::Supervisor),
        (&["evidence 3", "quote good"], fleet::Evidence::Hardware),
        (
            &["evidence 3", "supervisor none", "quote good"],
            fleet::Evidence::Hardware,
        ),
        (
            &["evidence 3", "quote good", "tools add vault"],
            fleet::Evidence::Hardware,
        ),
        (&["issued +20s"], fleet::Evidence::Supervisor),
    ] {
        let mut world = world();
        let outcome = workers::attests(&mut world, "n1", steps);
        assert_eq!(outcome.refusal, None, "{steps:?}");
        assert_eq!(outcome.evidence(), evidence);
        assert!(workers::is_admitted(&mut world, "n1"));
    }
}

/// What is not required may be left out, and a level that is enough for a tool is enough.
#[test]
fn a_policy_that_wants_less_admits_less() {
    let mut world = world();
    let mut easy = attack::policy_after("policy open-egress").unwrap();
    easy.capabilities[0].min_evidence = fleet::Evidence::SelfReported as i32;
    let set = workers::set_policy(&world, easy);
    workers::ask(&mut world, set);
    let outcome = workers::attests(
        &mut world,
        "n1",
        &["egress none", "evidence 1", "supervisor none"],
    );
    assert_eq!(outcome.refusal, None);
    assert_eq!(outcome.evidence(), fleet::Evidence::SelfReported);
}

/// A changed byte anywhere in what is shown breaks it; nobody's key but the worker's makes it whole again.
#[test]
fn no_byte_of_a_statement_can_be_changed() {
    let mut fresh = world();
    fresh.checked = false;
    workers::challenged(&mut fresh, "n1");
    let whole = honest(&mut fresh);
    for at in 0..whole.statement.len() {
        let mut world = fresh.clone();
        let mut changed = whole.statement.to_vec();
        changed[at] ^= 1;
        let shown = Shown {
            statement: changed.into(),
            ..whole.clone()
        };
        let outcome = workers::outcome(&show(&mut world, shown));
        assert!(outcome.refusal.is_some(), "byte {at}");
        assert!(!workers::is_admitted(&mut world, "n1"));
    }
    assert_eq!(workers::outcome(&show(&mut fresh, whole)).refusal, None);
}

#[test]
fn a_worker_that_drifted_is_quarantined_until_somebody_asks_and_it_passes() {
    let mut world = world();
    workers::attests(&mut world, "n1", &[]);
    let outcome = workers::attests(&mut world, "n1", &["build other"]);
    assert!(outcome.quarantined);
    let id = world.id("n1");
    let held = fleet::worker(&world.state, id).unwrap();
    assert_eq!(held.quarantine.unwrap().cause, "digest_drift");
    // By itself it comes back by nothing.
    let (node, open) = (world.node("n1"), workers::challenge(&mut world, "n1"));
    world.refuse("E0803", node.clone(), open);
    let attach = commands::attach(&mut world, "n1", 1, &[]);
    world.accept(node, attach);
    let release = fleet::Release {
        worker_id: id,
        reason: String::new(),
    };
    world.refuse("E0808", operator("root"), release);
    assert_eq!(
        fleet::worker(&world.state, id).unwrap().lifecycle(),
        fleet::Lifecycle::Quarantined
    );
    let reason = "rebuilt".to_owned();
    workers::ask(
        &mut world,
        fleet::Reverify {
            worker_id: id,
            reason,
        },
    );
    // Failing leaves it, and the request stands.
    assert!(
        workers::attests(&mut world, "n1", &["build other"])
            .refusal
            .is_some()
    );
    assert!(fleet::worker(&world.state, id).unwrap().quarantine.is_some());
    let lifted = workers::attests(&mut world, "n1", &[]);
    assert_eq!(lifted.refusal, None);
    assert!(fleet::worker(&world.state, id).unwrap().quarantine.is_none());
}

/// A fault that honest workers have, a clock or a slow answer, costs nothing that they had.
#[test]
fn a_low_fault_leaves_the_older_statement_alone() {
    let mut world = world();
    workers::attests(&mut world, "n1", &[]);
    assert!(
        workers::attests(&mut world, "n1", &["issued +40s"])
            .refusal
            .is_some()
    );
    assert!(workers::is_admitted(&mut world, "n1"));
    assert!(workers::attests(&mut world, "n1", &["sdk 9"]).refusal.is_some());
    assert!(!workers::is_admitted(&mut world, "n1"));
}

#[test]
fn a_new_policy_is_held_against_what_was_accepted() {
    let mut world = world();
    for name in ["n2", "n3"] {
        workers::pair(&mut world, name);
        workers::attests(&mut world, name, &[]);
    }
    workers::attests(&mut world, "n1", &["image image-2"]);
    let mut policy = attack::policy();
    policy.images.push(attack::digest("image-2"));
    let set = workers::set_policy(&world, policy.clone());
    workers::ask(&mut world, set);
    assert_eq!(fleet::unchecked(&world.state, 10).len(), 2);
    policy.images.remove(0);
    policy.leases_per_worker = 1;
    assert_eq!(fleet::unmet(&world.state, world.at, &policy), 2);
    let set = workers::set_policy(&world, policy);
    workers::ask(&mut world, set);
    let ids = fleet::unchecked(&world.state, 10);
    world.accept(Actor::System, fleet::Recheck { ids });
    for name in ["n2", "n3"] {
        let id = world.id(name);
        let held = fleet::worker(&world.state, id).unwrap().quarantine.unwrap();
        assert_eq!(held.cause, "digest_drift");
        assert!(held.reason.contains("E0830"), "{}", held.reason);
    }
    assert_eq!(fleet::unchecked(&world.state, 10), []);
    assert_eq!(
        fleet::snapshot(&world.state).admitted,
        0,
        "n1 was refused from the beginning"
    );
}

#[test]
fn time_takes_a_statement_a_binding_and_a_session() {
    let mut world = world();
    workers::attests(&mut world, "n1", &["expires +10m"]);
    let id = world.id("n1");
    assert_eq!(fleet::next_due(&world.state), Some(world.at + 600_000));
    world.advance(600_000);
    let ids = fleet::due(&world.state, world.at, 10);
    assert_eq!(ids, [id]);
    let applied = world.accept(Actor::System, fleet::Lapse { ids });
    assert_eq!(applied.rows[0].action, "worker.statement_expired");
    assert!(!workers::is_admitted(&mut world, "n1"));
    // The binding of an honest statement ends after twelve hours, and with it what rests on it.
    let outcome = workers::attests(&mut world, "n1", &["expires +1d"]);
    assert_eq!(outcome.expires_at, world.at + 12 * 3_600_000);
    let epoch = workers::epoch(&mut world, "n1");
    let detach = commands::detach(&mut world, "n1", epoch);
    world.accept(kit::replica(1), detach);
    world.advance(15_000);
    world.accept(Actor::System, fleet::Lapse { ids: vec![id] });
    let lost = fleet::worker(&world.state, id).unwrap();
    assert_eq!(lost.lifecycle(), fleet::Lifecycle::Offline, "it held nothing");
    world.advance(86_400_000);
    world.accept(Actor::System, fleet::Reap { older_than_ms: 0 });
    assert!(fleet::worker(&world.state, id).is_none());
    assert_eq!(invariants::check(&world.state), []);
}

#[test]
fn a_removed_device_takes_its_worker_along_and_a_quarantine_is_not_reaped() {
    let mut world = world();
    workers::attests(&mut world, "n1", &[]);
    quarantine(&mut world, false);
    let (id, node) = (world.id("n1"), world.node("n1"));
    let epoch = workers::epoch(&mut world, "n1");
    world.accept(
        node,
        nodes::Detach {
            device_id: id,
            epoch,
            reason: "off".to_owned(),
        },
    );
    world.advance(5 * 86_400_000);
    world.accept(Actor::System, fleet::Reap { older_than_ms: 1 });
    assert!(
        fleet::worker(&world.state, id).is_some(),
        "forgetting it would lift the quarantine"
    );
    let remove = identity::RemoveDevice {
        device_id: id,
        reason: "sold".to_owned(),
        revoke: true,
    };
    workers::ask(&mut world, remove);
    assert!(fleet::worker(&world.state, id).is_none());
}
