//! Dispatches at depth: slots, priorities, attempts, what programs write, and what comes too late.

use bytes::Bytes;
use palyra_control::{Completion, Inbound, Invoke, Outbound, Output, ReadOptions};
use palyra_state::dispatch::State;
use palyra_state::nodes::{Capability, Effect};

use crate::support::{Cluster, fresh_id, next, soon, succeeded};

/// One slot, and three attempts.
fn patient_echo() -> Capability {
    Capability {
        name: "echo".to_owned(),
        effect: Effect::Idempotent as i32,
        max_concurrency: 1,
        max_attempts: 3,
        backoff_ms: 20,
        ..Capability::default()
    }
}

#[tokio::test]
async fn slots_are_filled_in_order_and_a_cancel_of_what_waits_is_immediate() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    node.register_with(&cluster, vec![patient_echo()]).await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    let outgoing = session.outgoing();
    let operator = cluster.operator();
    let mut ids = Vec::new();
    for priority in ["normal", "low", "normal", "high"] {
        let invoke = Invoke {
            priority: priority.to_owned(),
            ..node.invoke("echo", "{}")
        };
        let (sent, _) = cluster.control.invoke(&operator, invoke).await.unwrap();
        ids.push(sent.record.id);
        let waits = sent.waits_for;
        assert!(
            waits.is_empty() || waits.contains("one of 1 slots of echo"),
            "{waits}"
        );
    }
    let cancelled = ids.remove(2);
    let (taken, _) = cluster
        .control
        .cancel_dispatch(&operator, "", &cancelled.to_string(), "")
        .await
        .unwrap();
    assert_eq!(taken.record.state(), State::Cancelled);
    let device = node.device_id.to_string();
    for expected in [ids[0], ids[2], ids[1]] {
        let Some(Outbound::Assignment(assignment)) = next(&outgoing).await else {
            panic!("no assignment")
        };
        assert_eq!(assignment.dispatch_id, expected);
        let completion = succeeded(expected, assignment.epoch);
        let answer = cluster.control.report(node.peer(), &device, completion).await;
        assert!(answer.unwrap().accepted);
    }
}

#[tokio::test]
async fn a_failure_that_may_pass_is_tried_again_in_the_same_session() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    node.register_with(&cluster, vec![patient_echo()]).await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    let outgoing = session.outgoing();
    let (sent, _) = cluster
        .control
        .invoke(&cluster.operator(), node.invoke("echo", "{}"))
        .await
        .unwrap();
    let device = node.device_id.to_string();
    for attempt in 1..=3 {
        let Some(Outbound::Assignment(assignment)) = next(&outgoing).await else {
            panic!("no assignment")
        };
        assert_eq!(
            (assignment.dispatch_id, assignment.attempt),
            (sent.record.id, attempt)
        );
        let failed = Completion {
            outcome: "failed".to_owned(),
            payload: Bytes::new(),
            error_code: "temporary_failure".to_owned(),
            attempt,
            ..succeeded(sent.record.id, assignment.epoch)
        };
        let answer = cluster.control.report(node.peer(), &device, failed.clone()).await;
        assert!(answer.unwrap().accepted);
        // The same report again, after its attempt is over.
        let again = Completion {
            request_id: fresh_id().to_string(),
            ..failed
        };
        let answer = cluster.control.report(node.peer(), &device, again).await.unwrap();
        assert!(!answer.accepted, "{answer:?}");
    }
    let id = sent.record.id.to_string();
    let (ended, _) = soon(cluster.control.wait_dispatch(&id, 20_000, ""))
        .await
        .unwrap();
    assert_eq!(ended.record.state(), State::Failed);
    let whys: Vec<&str> = ended.record.attempts.iter().map(|one| one.why.as_str()).collect();
    assert_eq!(whys, ["temporary_failure", "temporary_failure"]);
}

#[tokio::test]
async fn what_a_program_writes_reaches_who_asks_and_survives_the_session() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let first = node.attach(&cluster, &[]).await.unwrap();
    let (sent, _) = cluster
        .control
        .invoke(&cluster.operator(), node.invoke("echo", "{}"))
        .await
        .unwrap();
    let id = sent.record.id;
    let device = node.device_id.to_string();
    let written = |epoch, first, lines: &[&str]| {
        Inbound::Output(Output {
            dispatch_id: id.to_string(),
            epoch,
            attempt: 1,
            first,
            lines: lines.iter().map(|line| (*line).to_owned()).collect(),
            progress: Some((Some(50), "half".to_owned())),
        })
    };
    let control = cluster.control.clone();
    let waiting = palyra_platform::spawn(async move { control.logs(&id.to_string(), (0, 0), 20_000).await });
    let epoch = first.attached().epoch;
    first
        .receive(node.peer(), &device, written(epoch, 1, &["one", "two"]))
        .await
        .unwrap();
    let logs = soon(waiting).await.unwrap().unwrap();
    let texts: Vec<&str> = logs.lines.iter().map(|line| line.text.as_str()).collect();
    assert_eq!((texts, logs.replica_id), (vec!["one", "two"], 1));
    assert_eq!(logs.progress.and_then(|progress| progress.percent), Some(50));
    drop(first);
    let second = node.attach(&cluster, &[id]).await.unwrap();
    let epoch = second.attached().epoch;
    // What the node says again, and a line that was dropped; nothing of a session that is over.
    let again = written(epoch, 2, &["two", "three"]);
    second.receive(node.peer(), &device, again).await.unwrap();
    second
        .receive(node.peer(), &device, written(epoch, 5, &["five"]))
        .await
        .unwrap();
    second
        .receive(node.peer(), &device, written(epoch - 1, 6, &["nobody's"]))
        .await
        .unwrap();
    let logs = soon(cluster.control.logs(&id.to_string(), (1, 2), 0))
        .await
        .unwrap();
    let numbers: Vec<u64> = logs.lines.iter().map(|line| line.line).collect();
    assert_eq!(numbers, [3, 5]);
}

#[tokio::test]
async fn a_result_after_the_end_is_noted_once() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    let invoke = Invoke {
        timeout_ms: 50,
        ..node.invoke("pay", "{}")
    };
    let (sent, _) = cluster.control.invoke(&cluster.operator(), invoke).await.unwrap();
    let id = sent.record.id;
    let (ended, _) = soon(cluster.control.wait_dispatch(&id.to_string(), 20_000, ""))
        .await
        .unwrap();
    assert_eq!(ended.record.state(), State::TimedOut);
    let device = node.device_id.to_string();
    let epoch = session.attached().epoch;
    let late = cluster
        .control
        .report(node.peer(), &device, succeeded(id, epoch))
        .await
        .unwrap();
    assert!(late.accepted && late.late, "the node forgets it: {late:?}");
    let again = cluster
        .control
        .report(node.peer(), &device, succeeded(id, epoch))
        .await
        .unwrap();
    assert!(!again.accepted && !again.retry, "{again:?}");
    let (seen, _) = cluster
        .control
        .get_dispatch(ReadOptions::default(), &id.to_string())
        .await
        .unwrap();
    assert_eq!(seen.record.state(), State::TimedOut, "the end stays");
    assert!(seen.record.late.is_some() && seen.result.is_empty());
}
