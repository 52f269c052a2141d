//! Dispatches: delivery, waiting, results that are wanted and results that are not.

use std::time::Duration;

use bytes::Bytes;
use palyra_control::{Completion, Error, Inbound, Invoke, Outbound};
use palyra_state::Code;
use palyra_state::dispatch::State;

use crate::support::{Cluster, fresh_id, next, soon, succeeded};

fn code(error: &Error) -> Option<Code> {
    if let Error::Rejected(reject) = error {
        Some(reject.kind())
    } else {
        None
    }
}

#[tokio::test]
async fn a_dispatch_is_delivered_answered_and_awaited() {
    let cluster = Cluster::found().await;
    let node = cluster.node("edge-1").await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    let outgoing = session.outgoing();
    let operator = cluster.operator();

    // By name, and waited for by somebody who came before the result.
    let invoke = Invoke {
        device: "edge-1".to_owned(),
        ..node.invoke("echo", "{\"a\":1}")
    };
    let (submitted, _) = cluster.control.invoke(&operator, invoke).await.unwrap();
    assert_eq!(submitted.record.state(), State::Dispatched);
    let id = submitted.record.id;
    let control = cluster.control.clone();
    let waiting =
        palyra_platform::spawn(async move { control.wait_dispatch(&id.to_string(), 20_000, "").await });

    let Some(Outbound::Assignment(assignment)) = next(&outgoing).await else {
        panic!("no assignment")
    };
    assert_eq!(assignment.dispatch_id, id);
    assert_eq!(assignment.epoch, session.attached().epoch);
    assert_eq!(&assignment.payload[..], b"{\"a\":1}");
    let completion = succeeded(id, assignment.epoch);
    let device = node.device_id.to_string();
    session
        .receive(node.peer(), &device, Inbound::Result(completion.clone()))
        .await
        .unwrap();
    let Some(Outbound::Result(answer)) = next(&outgoing).await else {
        panic!("no answer")
    };
    assert!(answer.accepted, "{answer:?}");
    let (ended, _) = soon(waiting).await.unwrap().unwrap();
    assert_eq!(ended.record.state(), State::Succeeded);
    assert_eq!(&ended.result[..], b"{\"ok\":true}");

    // The same report again is the same report; another one is too late.
    let again = cluster
        .control
        .report(node.peer(), &device, completion)
        .await
        .unwrap();
    assert!(again.accepted, "{again:?}");
    let other = cluster
        .control
        .report(node.peer(), &device, succeeded(id, assignment.epoch))
        .await
        .unwrap();
    assert!(!other.accepted && !other.retry, "{other:?}");
}

#[tokio::test]
async fn what_was_queued_before_the_session_is_delivered_once() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let operator = cluster.operator();
    let mut ids = Vec::new();
    for _ in 0..3 {
        let (queued, _) = cluster
            .control
            .invoke(&operator, node.invoke("pay", "{}"))
            .await
            .unwrap();
        assert_eq!(queued.record.state(), State::Queued);
        ids.push(queued.record.id);
    }
    let session = node.attach(&cluster, &[]).await.unwrap();
    let outgoing = session.outgoing();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let Some(Outbound::Assignment(assignment)) = next(&outgoing).await else {
            panic!("no assignment")
        };
        seen.push(assignment.dispatch_id);
    }
    seen.sort();
    ids.sort();
    assert_eq!(seen, ids);
    // Whatever else the attach caused has been carried out by the time the next dispatch arrives.
    let (last, _) = cluster
        .control
        .invoke(&operator, node.invoke("pay", "{}"))
        .await
        .unwrap();
    let Some(Outbound::Assignment(assignment)) = next(&outgoing).await else {
        panic!("no assignment")
    };
    assert_eq!(
        assignment.dispatch_id, last.record.id,
        "nothing is delivered twice"
    );
}

#[tokio::test]
async fn foreign_and_stale_results_are_refused() {
    let cluster = Cluster::found().await;
    let (node, other) = (cluster.node("one").await, cluster.node("two").await);
    let session = node.attach(&cluster, &[]).await.unwrap();
    let epoch = session.attached().epoch;
    let operator = cluster.operator();
    let (submitted, _) = cluster
        .control
        .invoke(&operator, node.invoke("pay", "{}"))
        .await
        .unwrap();
    let id = submitted.record.id;
    let control = &cluster.control;
    let foreign = control
        .report(other.peer(), &other.device_id.to_string(), succeeded(id, epoch))
        .await
        .unwrap();
    assert!(!foreign.accepted && !foreign.retry);
    let device = node.device_id.to_string();
    let stale = control
        .report(node.peer(), &device, succeeded(id, epoch - 1))
        .await
        .unwrap();
    assert!(
        !stale.accepted && stale.retry,
        "the node attaches again and reports it anew: {stale:?}"
    );
    let unknown = control
        .report(node.peer(), &device, succeeded(fresh_id(), epoch))
        .await
        .unwrap();
    assert!(!unknown.accepted);
    let claim = control
        .report(node.peer(), &other.device_id.to_string(), succeeded(id, epoch))
        .await
        .unwrap_err();
    assert_eq!(
        code(&claim),
        Some(Code::NotYours),
        "the message's device must be the certificate's"
    );
}

#[tokio::test]
async fn bad_requests_leave_no_trace() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let operator = cluster.operator();
    let before = cluster.last_log();
    let control = &cluster.control;
    let big = Invoke {
        payload: Bytes::from(vec![b' '; 512 * 1024 + 1]),
        ..node.invoke("echo", "")
    };
    assert_eq!(
        code(&control.invoke(&operator, big).await.unwrap_err()),
        Some(Code::PayloadTooLarge)
    );
    for payload in ["", "{", "nul", "[1,]"] {
        let error = control
            .invoke(&operator, node.invoke("echo", payload))
            .await
            .unwrap_err();
        assert!(
            matches!(error, Error::Invalid { field: "payload", .. }),
            "{payload:?}: {error:?}"
        );
    }
    let nobody = Invoke {
        device: "nobody".to_owned(),
        ..node.invoke("echo", "{}")
    };
    assert_eq!(
        control.invoke(&operator, nobody).await.unwrap_err().code(),
        "E1016"
    );
    assert_eq!(cluster.last_log(), before, "no entry");
    let unknown = control
        .invoke(&operator, node.invoke("sing", "{}"))
        .await
        .unwrap_err();
    assert_eq!(code(&unknown), Some(Code::NoSuchCapability));
}

#[tokio::test]
async fn a_cancelled_dispatch_is_called_off_at_the_node() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    let outgoing = session.outgoing();
    let operator = cluster.operator();
    let (submitted, _) = cluster
        .control
        .invoke(&operator, node.invoke("echo", "{}"))
        .await
        .unwrap();
    assert!(matches!(next(&outgoing).await, Some(Outbound::Assignment(_))));
    let id = submitted.record.id.to_string();
    let (ended, _) = cluster
        .control
        .cancel_dispatch(&operator, "", &id, "changed my mind")
        .await
        .unwrap();
    assert_eq!(ended.record.state(), State::Cancelling, "its program may run");
    let Some(Outbound::Cancel {
        dispatch_id,
        reason,
        confirm,
    }) = next(&outgoing).await
    else {
        panic!("not called off")
    };
    assert_eq!(
        (dispatch_id, reason.as_str(), confirm),
        (
            submitted.record.id,
            "changed my mind",
            Some((session.attached().epoch, 1))
        )
    );
    let stopped = Completion {
        outcome: "cancelled".to_owned(),
        payload: Bytes::new(),
        error_code: "stopped".to_owned(),
        error_message: "ended by SIGTERM after 0.3 s".to_owned(),
        ..succeeded(dispatch_id, session.attached().epoch)
    };
    let device = node.device_id.to_string();
    let answer = cluster
        .control
        .report(node.peer(), &device, stopped)
        .await
        .unwrap();
    assert!(answer.accepted && !answer.late, "{answer:?}");
    let (ended, _) = soon(cluster.control.wait_dispatch(&id, 20_000, ""))
        .await
        .unwrap();
    assert_eq!(ended.record.state(), State::Cancelled);
    assert_eq!(ended.record.reason, "changed my mind");
    assert_eq!(
        ended.record.error.map(|error| error.message).unwrap_or_default(),
        "ended by SIGTERM after 0.3 s"
    );
}

#[tokio::test]
async fn what_ended_while_its_node_was_away_is_called_off_when_it_comes_back() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let operator = cluster.operator();
    let first = node.attach(&cluster, &[]).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..2 {
        let (sent, _) = cluster
            .control
            .invoke(&operator, node.invoke("pay", "{}"))
            .await
            .unwrap();
        assert!(matches!(
            next(&first.outgoing()).await,
            Some(Outbound::Assignment(_))
        ));
        ids.push(sent.record.id);
    }
    drop(first);
    let [cancelled, open] = ids.as_slice() else {
        unreachable!()
    };
    let asked = cluster
        .control
        .cancel_dispatch(&operator, "", &cancelled.to_string(), "too late")
        .await
        .unwrap();
    assert_eq!(asked.0.record.state(), State::Cancelling, "its node is away");
    let second = node
        .attach(&cluster, &[*open, *cancelled, fresh_id()])
        .await
        .unwrap();
    let Some(Outbound::Cancel {
        dispatch_id, reason, ..
    }) = next(&second.outgoing()).await
    else {
        panic!("not called off")
    };
    assert_eq!((dispatch_id, reason.as_str()), (*cancelled, "too late"));
    drop(second);
    // It comes back and has it no more: that is what was wanted.
    let _third = node.attach(&cluster, &[*open]).await.unwrap();
    let (ended, _) = soon(cluster.control.wait_dispatch(&cancelled.to_string(), 20_000, ""))
        .await
        .unwrap();
    assert_eq!(ended.record.state(), State::Cancelled);
}

#[tokio::test]
async fn the_deadline_ends_what_nobody_answers() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let operator = cluster.operator();
    let invoke = Invoke {
        timeout_ms: 50,
        ..node.invoke("echo", "{}")
    };
    let (submitted, _) = cluster.control.invoke(&operator, invoke).await.unwrap();
    let id = submitted.record.id.to_string();
    let (ended, _) = soon(cluster.control.wait_dispatch(&id, 20_000, ""))
        .await
        .unwrap();
    assert_eq!(ended.record.state(), State::TimedOut);
}

#[tokio::test]
async fn a_request_id_submits_once() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let operator = cluster.operator();
    let invoke = Invoke {
        request_id: fresh_id().to_string(),
        ..node.invoke("pay", "{}")
    };
    let (first, write) = cluster.control.invoke(&operator, invoke.clone()).await.unwrap();
    assert!(!write.duplicate);
    let (again, write) = cluster.control.invoke(&operator, invoke).await.unwrap();
    assert!(write.duplicate);
    assert_eq!(first.record.id, again.record.id);
}

#[tokio::test]
async fn a_wait_that_ends_first_answers_what_there_is() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let (queued, _) = cluster
        .control
        .invoke(&cluster.operator(), node.invoke("echo", "{}"))
        .await
        .unwrap();
    let id = queued.record.id.to_string();
    let (seen, _) = soon(cluster.control.wait_dispatch(&id, 1, "")).await.unwrap();
    assert_eq!(seen.record.state(), State::Queued);
    let (seen, _) = palyra_platform::timeout(
        Duration::from_secs(10),
        cluster.control.wait_dispatch(&id[..15], 0, ""),
    )
    .await
    .unwrap()
    .unwrap();
    assert_eq!(seen.record.id, queued.record.id, "a prefix will do");
}

#[tokio::test]
async fn what_a_node_holds_survives_its_session_and_other_once_work_is_lost() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let operator = cluster.operator();
    let first = node.attach(&cluster, &[]).await.unwrap();
    let outgoing = first.outgoing();
    let mut ids = Vec::new();
    for capability in ["pay", "pay", "echo"] {
        let (sent, _) = cluster
            .control
            .invoke(&operator, node.invoke(capability, "{}"))
            .await
            .unwrap();
        assert!(matches!(next(&outgoing).await, Some(Outbound::Assignment(_))));
        ids.push(sent.record.id);
    }
    let [held, lost, again] = ids.as_slice() else {
        unreachable!()
    };
    drop(first);
    let second = node.attach(&cluster, &[*held]).await.unwrap();
    let epoch = second.attached().epoch;
    let Some(Outbound::Assignment(assignment)) = next(&second.outgoing()).await else {
        panic!("nothing")
    };
    assert_eq!(
        (assignment.dispatch_id, assignment.attempt),
        (*again, 2),
        "idempotent work is delivered again"
    );
    let device = node.device_id.to_string();
    let kept = cluster
        .control
        .report(node.peer(), &device, succeeded(*held, epoch))
        .await
        .unwrap();
    assert!(kept.accepted, "{kept:?}");
    let (gone, _) = soon(cluster.control.wait_dispatch(&lost.to_string(), 20_000, ""))
        .await
        .unwrap();
    assert_eq!(gone.record.state(), State::SessionLost);
}
