//! Workers: from the first report to a lease that is cleaned up, and what goes wrong on the way.

use std::time::Duration;

use bytes::Bytes;
use palyra_control::{Control, FromWorker, LeaseName, Limits, Outbound, Start, Statement, Timings, ToWorker};
use palyra_state::fleet::{self, Lifecycle};
use palyra_state::leases::{self, LeaseState, RunState};
use palyra_state::{Id, Read};

use crate::hands::{Hand, cleaned, finish, held, policy};
use crate::support::{Cluster, quick, soon, until};

fn lifecycle(view: &dyn Read, id: Id) -> Lifecycle {
    fleet::worker(view, id).unwrap().lifecycle()
}

async fn run_ends(control: &Control, id: Id) -> RunState {
    let waited = soon(control.wait_run(&id.to_string(), 20_000, "")).await.unwrap();
    waited.0.record.state()
}

#[tokio::test]
async fn from_report_to_cleanup() {
    let cluster = Cluster::found().await;
    cluster.hold_workers_to(policy()).await;
    let mut hand = Hand::ready(&cluster, "w", 2).await;
    assert_eq!(
        lifecycle(&cluster.replica.view(), hand.id()),
        Lifecycle::Available
    );
    let run = cluster.run(Start::default()).await;
    let offer = hand.offered().await;
    assert_eq!(
        (offer.run_id, offer.attempt, &offer.params[..]),
        (run.record.id, 1, &b"{\"n\":1}"[..])
    );
    assert!(offer.remaining_ms <= offer.ttl_ms && offer.ttl_ms == 30_000);
    let lease = crate::hands::named(&offer);
    hand.accepted(Statement::Accept(lease.clone())).await;

    let before = cluster.lease_of(&run);
    let renewed = hand.renew(std::slice::from_ref(&lease)).await;
    assert!(renewed[0].renewed, "{renewed:?}");
    let after = cluster.lease_of(&run);
    assert_eq!((before.renewals, after.renewals), (0, 1));
    assert!(after.deadline_at >= before.deadline_at);

    // What it writes is read elsewhere than in the log.
    let entries = cluster.last_log();
    let output = FromWorker::Output {
        lease: lease.clone(),
        first: 1,
        lines: vec!["one".to_owned(), "two".to_owned()],
        progress: Some((Some(50), "half".to_owned())),
    };
    hand.send(output).await.unwrap();
    let id = run.record.id.to_string();
    let logs = cluster.control.run_logs(&id, (0, 0), 20_000);
    let logs = soon(logs).await.unwrap();
    assert_eq!(logs.lines.len(), 2);
    assert_eq!((logs.progress.unwrap().percent, logs.replica_id), (Some(50), 1));
    assert_eq!(cluster.last_log(), entries);

    hand.finishes(&lease).await;
    assert_eq!(
        run_ends(&cluster.control, run.record.id).await,
        RunState::Succeeded
    );
    let view = cluster.replica.view();
    let ended = leases::lease(&view, Id::parse(&lease.id).unwrap()).unwrap();
    assert_eq!(ended.state(), LeaseState::Ended);
    assert_eq!(lifecycle(&view, hand.id()), Lifecycle::Available);
    let (seen, _) = cluster
        .control
        .get_run(Default::default(), &run.record.id.to_string()[..12])
        .await
        .unwrap();
    assert_eq!(
        (&seen.result[..], seen.worker_name.as_str()),
        (&b"{\"sum\":1}"[..], "w")
    );
}

#[tokio::test]
async fn nothing_is_given_or_taken_before_the_report_and_the_statement() {
    let cluster = Cluster::found().await;
    cluster.hold_workers_to(policy()).await;
    let run = cluster.run(Start::default()).await;
    let machine = cluster.node("w").await;
    let mut hand = Hand::attach(machine, &cluster.control).await;
    let lease = LeaseName {
        id: run.record.id.to_string(),
        fence: 1,
    };
    hand.says(Statement::Accept(lease.clone())).await.unwrap();
    let early = hand.answer().await;
    assert_eq!((early.code.as_str(), early.retry), ("E1080", true));
    let renewed = hand.renew(std::slice::from_ref(&lease)).await;
    assert!(!renewed[0].renewed && renewed[0].retry, "{renewed:?}");

    hand.report(Vec::new()).await;
    let challenge = hand.challenged().await;
    // Whoever asks and was asked a moment ago has a challenge: another would make it void.
    hand.says(Statement::AskChallenge).await.unwrap();
    let mut wrong = hand.statement(&challenge, 1);
    wrong.build = Bytes::from(vec![9; 32]);
    hand.says(hand.signed(&wrong)).await.unwrap();
    let ToWorker::Attested(answer) = hand.told().await else {
        panic!("no answer")
    };
    assert!(!answer.admitted && answer.code.starts_with("E08"), "{answer:?}");
    assert_eq!(cluster.lease_count(), 0);
    hand.says(Statement::AskChallenge).await.unwrap();
    hand.attest(1).await;
    assert_eq!(hand.offered().await.run_id, run.record.id);
}

#[tokio::test]
async fn a_stale_fence_is_refused_on_every_message() {
    let cluster = Cluster::found().await;
    cluster.hold_workers_to(policy()).await;
    let mut hand = Hand::ready(&cluster, "w", 1).await;
    cluster.run(Start::default()).await;
    let lease = hand.takes().await;
    let stale = LeaseName {
        fence: lease.fence - 1,
        ..lease.clone()
    };
    let violation = Statement::Violation {
        lease: stale.clone(),
        kind: "scope".to_owned(),
        message: String::new(),
    };
    let put = Statement::Put {
        lease: stale.clone(),
        digest: Bytes::from(vec![1; 32]),
        size: 1,
        offset: 0,
        chunk: Bytes::from_static(b"x"),
    };
    for said in [
        Statement::Accept(stale.clone()),
        finish(&stale),
        cleaned(&stale, true),
        put,
    ] {
        let shown = format!("{said:?}");
        assert_eq!(hand.refused(said).await, "E0860", "{shown}");
    }
    assert_eq!(hand.refused(violation).await, "E0810");
    let renewed = hand.renew(std::slice::from_ref(&stale)).await;
    assert_eq!((renewed[0].code.as_str(), renewed[0].retry), ("E0860", false));
    let get = FromWorker::Get {
        request_id: "g".to_owned(),
        lease: stale.clone(),
        digest: Bytes::from(vec![1; 32]),
        offset: 0,
    };
    hand.send(get).await.unwrap();
    let ToWorker::Chunk(chunk) = hand.told().await else {
        panic!("no chunk")
    };
    assert_eq!((chunk.code.as_str(), chunk.request_id.as_str()), ("E0860", "g"));
    let output = FromWorker::Output {
        lease: stale,
        first: 1,
        lines: vec!["late".to_owned()],
        progress: None,
    };
    hand.send(output).await.unwrap();
    hand.finishes(&lease).await;
    let run = cluster
        .control
        .list_runs(Default::default(), &Default::default())
        .await;
    let run = run.unwrap().items[0].record.id.to_string();
    let logs = cluster.control.run_logs(&run, (0, 0), 0).await.unwrap();
    assert!(logs.lines.is_empty(), "{logs:?}");
}

#[tokio::test]
#[allow(clippy::too_many_lines, reason = "one story")]
async fn files_go_in_and_out_in_pieces() {
    let cluster = Cluster::found().await;
    cluster.hold_workers_to(policy()).await;
    let hand = Hand::ready(&cluster, "w", 1).await;
    let input: Vec<u8> = (0..300_000u32).map(|at| at as u8).collect();
    let entry = |path: &str, bytes: &[u8]| leases::ManifestEntry {
        path: path.to_owned(),
        digest: palyra_state::Digest::of(bytes),
        size: bytes.len() as u64,
        stored: true,
        executable: false,
    };
    let inputs = leases::Manifest {
        entries: vec![entry("in.bin", &input)],
    };
    let digest: Bytes = inputs.entries[0].digest.to_bytes().to_vec().into();
    let run = cluster
        .run(Start {
            inputs: Some(inputs),
            ..Start::default()
        })
        .await;
    assert_eq!(run.record.state(), RunState::AwaitingInput);
    assert_eq!(run.missing.len(), 1);
    let chunk = palyra_state::limits::ARTIFACT_CHUNK;
    for (number, piece) in input.chunks(chunk).enumerate() {
        let put = palyra_control::Put {
            run_id: run.record.id.to_string(),
            digest: digest.clone(),
            size: input.len() as u64,
            offset: (number * chunk) as u64,
            chunk: piece.to_vec().into(),
            ..Default::default()
        };
        cluster
            .control
            .put_artifact(&cluster.operator(), put)
            .await
            .unwrap();
    }
    let lease = hand.takes().await;
    let mut got = Vec::new();
    while got.len() < input.len() {
        let get = FromWorker::Get {
            request_id: got.len().to_string(),
            lease: lease.clone(),
            digest: digest.clone(),
            offset: got.len() as u64,
        };
        hand.send(get).await.unwrap();
        let ToWorker::Chunk(piece) = hand.told().await else {
            panic!("no chunk")
        };
        assert_eq!(piece.code, "", "{}", piece.message);
        got.extend_from_slice(&piece.chunk);
    }
    assert!(got == input);
    // Another worker has no business with it.
    let other = Hand::ready(&cluster, "x", 1).await;
    let get = FromWorker::Get {
        request_id: String::new(),
        lease: lease.clone(),
        digest: digest.clone(),
        offset: 0,
    };
    other.send(get).await.unwrap();
    let ToWorker::Chunk(foreign) = other.told().await else {
        panic!("no chunk")
    };
    assert_eq!(foreign.code, "E0863");
    let out = b"{}";
    let put = Statement::Put {
        lease: lease.clone(),
        digest: palyra_state::Digest::of(out).to_bytes().to_vec().into(),
        size: 2,
        offset: 0,
        chunk: Bytes::from_static(out),
    };
    hand.accepted(put).await;
    let Statement::Finish(lease, mut finished) = finish(&lease) else {
        panic!("no finish")
    };
    finished.outputs = Some(leases::Manifest {
        entries: vec![entry("out.json", out)],
    });
    hand.accepted(Statement::Finish(lease.clone(), finished)).await;
    let control = &cluster.control;
    let output = palyra_state::Digest::of(out).to_bytes();
    let (id, digest, size) = control
        .find_artifact(Default::default(), &run.record.id.to_string(), &output)
        .await
        .unwrap();
    assert_eq!(size, 2);
    assert_eq!(&control.read_artifact(id, digest, 0).unwrap().chunk[..], out);
}

#[tokio::test]
async fn a_silent_worker_loses_its_lease_and_gets_nothing_until_it_is_clean() {
    let cluster = Cluster::found().await;
    cluster.hold_workers_to(policy()).await;
    let hand = Hand::ready(&cluster, "w", 1).await;
    let start = Start {
        ttl_ms: 1_000,
        effect: "idempotent".to_owned(),
        ..Start::default()
    };
    let run = cluster.run(start).await;
    let lease = hand.takes().await;
    // It renews nothing: the leader ends the lease, not before its time.
    let id = Id::parse(&lease.id).unwrap();
    until(&cluster.replica, |view| {
        leases::lease(view, id).is_some_and(|lease| lease.state() == LeaseState::Ended)
    })
    .await;
    let ended = cluster.lease_of(&run);
    assert!(ended.ended_at >= ended.deadline_at, "{ended:?}");
    let ToWorker::End(end) = hand.told().await else {
        panic!("it was not told")
    };
    assert_eq!(
        (end.lease_id, end.fence, end.reason.as_str()),
        (id, lease.fence, "expired")
    );
    assert_ne!(hand.refused(finish(&lease)).await, "");
    assert_eq!(lifecycle(&cluster.replica.view(), hand.id()), Lifecycle::Degraded);
    hand.accepted(cleaned(&lease, true)).await;
    let again = hand.offered().await;
    assert_eq!((again.run_id, again.attempt), (run.record.id, 2));
    assert!(again.fence > lease.fence);
}

#[tokio::test]
async fn a_returning_worker_is_reconciled_before_it_gets_work() {
    let cluster = Cluster::found().await;
    cluster.hold_workers_to(policy()).await;
    let hand = Hand::ready(&cluster, "w", 3).await;
    let kept = cluster.run(Start::default()).await;
    let lease = hand.takes().await;
    let start = Start {
        effect: "idempotent".to_owned(),
        ..Start::default()
    };
    let lost = cluster.run(start).await;
    let gone = hand.takes().await;
    let hand = hand.again(&cluster.control).await;
    // The first is held still, the second is not: nothing of it runs.
    let (keep, end) = hand.report(vec![held(&lease, "running")]).await;
    assert_eq!(keep, [Id::parse(&lease.id).unwrap()]);
    assert_eq!(end.len(), 1, "{end:?}");
    assert_eq!(end[0].lease_id.to_string(), gone.id);
    // Its statement is good still, so it is asked for nothing; work comes when it has cleaned up.
    hand.accepted(cleaned(&gone, true)).await;
    let again = hand.offered().await;
    assert_eq!((again.run_id, again.attempt), (lost.record.id, 2));
    hand.finishes(&lease).await;
    assert_eq!(
        run_ends(&cluster.control, kept.record.id).await,
        RunState::Succeeded
    );
}

#[tokio::test]
async fn operators_decisions_reach_the_worker() {
    use palyra_control::WorkerAct;
    let cluster = Cluster::found().await;
    cluster.hold_workers_to(policy()).await;
    let hand = Hand::ready(&cluster, "w", 1).await;
    let (control, operator) = (&cluster.control, cluster.operator());
    cluster.run(Start::default()).await;
    let lease = hand.takes().await;
    let decided = control
        .decide_worker(&operator, "", "w", "strange", WorkerAct::Quarantine)
        .await;
    assert_eq!(decided.unwrap().0.record.lifecycle(), Lifecycle::Quarantined);
    let ToWorker::End(end) = hand.told().await else {
        panic!("it was not told")
    };
    assert_eq!(end.reason, "quarantined");
    hand.accepted(cleaned(&lease, true)).await;
    let decided = control
        .decide_worker(&operator, "", "w", "looked", WorkerAct::Reverify)
        .await;
    decided.unwrap();
    let challenge = hand.challenged().await;
    assert_eq!(challenge.reason, "reverify");
    let statement = hand.signed(&hand.statement(&challenge, 1));
    hand.says(statement).await.unwrap();
    assert!(matches!(hand.told().await, ToWorker::Attested(answer) if answer.admitted));
    assert_eq!(
        lifecycle(&cluster.replica.view(), hand.id()),
        Lifecycle::Available
    );

    // A cleanup that failed, and is asked for again.
    cluster.run(Start::default()).await;
    let lease = hand.takes().await;
    hand.accepted(finish(&lease)).await;
    hand.accepted(cleaned(&lease, false)).await;
    assert_eq!(lifecycle(&cluster.replica.view(), hand.id()), Lifecycle::Failed);
    let act = WorkerAct::Cleanup { force: false };
    control
        .decide_worker(&operator, "", "w", "again", act)
        .await
        .unwrap();
    assert!(matches!(hand.told().await, ToWorker::Cleanup { .. }));
    hand.accepted(cleaned(&lease, true)).await;
    assert_eq!(
        lifecycle(&cluster.replica.view(), hand.id()),
        Lifecycle::Available
    );

    // Another policy: what it allows no more is quarantined by the leader, and the difference was shown.
    let mut other = policy();
    other.builds = vec![palyra_state::Digest::of(b"newer")];
    let dry = palyra_control::SetPolicy {
        policy: other.clone(),
        expected_version: 1,
        dry_run: true,
        reason: "x".to_owned(),
        ..Default::default()
    };
    let dry = control.set_fleet_policy(&operator, dry).await.unwrap();
    assert_eq!(
        (dry.affected, dry.write, dry.changes.len()),
        (1, None, 2),
        "{dry:?}"
    );
    let set = cluster.hold_workers_to(other).await;
    assert_eq!(set.policy.version, 2);
    until(&cluster.replica, |view| {
        lifecycle(view, hand.id()) == Lifecycle::Quarantined
    })
    .await;
}

#[tokio::test]
async fn a_revoked_worker_is_out_and_its_leases_end() {
    let cluster = Cluster::found().await;
    cluster.hold_workers_to(policy()).await;
    let hand = Hand::ready(&cluster, "w", 1).await;
    cluster.run(Start::default()).await;
    let lease = hand.takes().await;
    let operator = cluster.operator();
    let outgoing = hand.outgoing.clone();
    let reading = palyra_platform::spawn(async move {
        while let Some(message) = outgoing.next().await {
            if matches!(message, Outbound::Goodbye { .. }) {
                return true;
            }
        }
        false
    });
    soon(cluster.control.revoke_device(&operator, "", "w", "", 1))
        .await
        .unwrap();
    assert!(soon(reading).await.unwrap(), "it was not told");
    assert!(hand.says(finish(&lease)).await.is_err());
    let found = leases::lease(&cluster.replica.view(), Id::parse(&lease.id).unwrap()).unwrap();
    assert!(!found.is_live(), "{found:?}");
    // Whoever proposes in its name at a replica that has not heard of it is refused by the log.
    let late = leases::Finish {
        lease_id: found.id,
        fence: found.fence,
        ..leases::Finish::default()
    };
    let actor = palyra_state::Actor::Node {
        device_id: hand.id(),
        fingerprint: palyra_state::Fingerprint::from_bytes(hand.machine.peer().fingerprint),
    };
    let envelope = palyra_state::Envelope::new(crate::support::fresh_id(), actor, late);
    let refused = cluster
        .replica
        .propose(envelope)
        .await
        .unwrap()
        .reply
        .unwrap_err();
    assert_eq!(refused.code(), "E0302", "{refused}");
}

#[tokio::test]
async fn polls_carry_no_work() {
    let cluster = Cluster::found().await;
    let machine = cluster.node("w").await;
    let request = palyra_control::AttachRequest {
        device_id: machine.device_id.to_string(),
        held: Vec::new(),
        held_attempts: Vec::new(),
        transport: palyra_control::Transport::Poll,
        fallback: String::new(),
        connection: 0,
    };
    let session = cluster.control.attach(machine.peer(), request).await.unwrap();
    let message = palyra_control::Inbound::Worker(FromWorker::Renew {
        sequence: 1,
        leases: Vec::new(),
    });
    let device = machine.device_id.to_string();
    let refused = session
        .receive(machine.peer(), &device, message)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), "E1081");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_leader_moves_no_deadline_and_loses_no_answer() {
    let timings = Timings {
        call_timeout: Duration::from_secs(2),
        ..quick()
    };
    let (one, two, three) = Cluster::of_three(timings).await;
    one.hold_workers_to(policy()).await;
    // The worker is at a replica that goes on living.
    let machine = one.node("w").await;
    until(&two.replica, |view| {
        palyra_state::nodes::node(view, machine.device_id).is_some()
    })
    .await;
    let mut hand = Hand::attach(machine, &two.control).await;
    hand.report(Vec::new()).await;
    hand.attest(2).await;
    let run = one.run(Start::default()).await;
    let lease = hand.takes().await;
    let id = Id::parse(&lease.id).unwrap();
    let before = leases::lease(&two.replica.view(), id).unwrap();
    one.bus.isolate(1);
    soon(async {
        while !two.replica.leads() && !three.replica.leads() {
            palyra_platform::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let after = leases::lease(&two.replica.view(), id).unwrap();
    assert_eq!(
        (after.deadline_at, after.fence),
        (before.deadline_at, before.fence)
    );
    let renewed = hand.renew(std::slice::from_ref(&lease)).await;
    assert!(renewed[0].renewed || renewed[0].retry, "{renewed:?}");
    hand.finishes(&lease).await;
    assert_eq!(run_ends(&two.control, run.record.id).await, RunState::Succeeded);
}

#[tokio::test]
async fn what_is_not_decided_is_no_refusal() {
    let timings = Timings {
        call_timeout: Duration::from_millis(300),
        ..quick()
    };
    let cluster = Cluster::found_with(timings, Limits::default()).await;
    cluster.hold_workers_to(policy()).await;
    let mut hand = Hand::ready(&cluster, "w", 8).await;
    let mut leases = Vec::new();
    for _ in 0..8 {
        cluster.run(Start::default()).await;
        leases.push(hand.takes().await);
    }
    // Many wishes of many messages are one entry; the newest of each lease is the one that is answered.
    let before = cluster.control.renewal_counts();
    for sequence in 100..120 {
        let leases = leases.clone();
        hand.send(FromWorker::Renew { sequence, leases }).await.unwrap();
    }
    let mut renewed = 0;
    while renewed < 8 {
        let ToWorker::Renewed { sequence, leases } = hand.told().await else {
            panic!("no answer")
        };
        assert!(leases.iter().all(|lease| lease.renewed), "{leases:?}");
        if sequence == 119 {
            renewed += leases.len();
        }
    }
    let after = cluster.control.renewal_counts();
    assert!(after.entries - before.entries <= 3, "{before:?} {after:?}");
    assert_eq!(after.refused, before.refused);
    // What is over is told at once, and costs nothing.
    hand.finishes(&leases[0]).await;
    let entries = cluster.control.renewal_counts().entries;
    let over = hand.renew(&leases[..1]).await;
    assert_eq!((over[0].renewed, over[0].retry), (false, false), "{over:?}");
    assert_eq!(cluster.control.renewal_counts().entries, entries);
}

impl Cluster {
    fn lease_count(&self) -> u64 {
        leases::totals(&self.replica.view()).live
    }
}
