//! Three replicas: how they come, and that it does not matter which of them is asked.

use std::time::Duration;

use palyra_control::{End, Error, Inbound, Outbound, Refusal, Timings};
use palyra_platform as platform;
use palyra_replica::Role;
use palyra_state::dispatch::State;
use palyra_state::nodes::{self, NodeStatus};
use palyra_state::{Code, cluster};

use crate::support::{Cluster, Joining, goodbye, next, quick, soon, source, succeeded, until};

fn code(error: &Error) -> Option<Code> {
    if let Error::Rejected(reject) = error {
        Some(reject.kind())
    } else {
        None
    }
}

/// Short enough for a test, long enough for a machine that is busy with others.
fn hasty() -> Timings {
    Timings {
        max_staleness: Duration::from_secs(3),
        replica_lost_after: Duration::from_secs(2),
        ..quick()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_replica_serves_any_node_and_any_operator() {
    let (one, two, three) = Cluster::of_three(quick()).await;
    let status = three.control.cluster_status().await.unwrap();
    assert_eq!((status.voters, status.failures_tolerated), (3, 1));
    assert!(
        status.replicas.iter().all(|replica| replica.reachable),
        "{status:?}"
    );

    // Paired at one, attached at two, invoked and awaited at three.
    let node = one.node("edge-1").await;
    until(&two.replica, |view| nodes::node(view, node.device_id).is_some()).await;
    let session = node.attach_at(&two.control, &[]).await.unwrap();
    let outgoing = session.outgoing();
    until(&three.replica, |view| nodes::node(view, node.device_id).is_some()).await;
    let operator = three
        .control
        .admit_operator(&one.admin, palyra_state::access::Role::Admin)
        .unwrap();
    let (submitted, _) = three
        .control
        .invoke(&operator, node.invoke("pay", "{}"))
        .await
        .unwrap();
    assert_eq!(
        (submitted.record.state(), submitted.record.replica_id),
        (State::Dispatched, 2)
    );
    let id = submitted.record.id;
    let control = three.control.clone();
    let waiting = platform::spawn(async move { control.wait_dispatch(&id.to_string(), 20_000, "").await });
    let Some(Outbound::Assignment(assignment)) = next(&outgoing).await else {
        panic!("no assignment")
    };
    let device = node.device_id.to_string();
    session
        .receive(
            node.peer(),
            &device,
            Inbound::Result(succeeded(id, assignment.epoch)),
        )
        .await
        .unwrap();
    let (ended, _) = soon(waiting).await.unwrap().unwrap();
    assert_eq!(ended.record.state(), State::Succeeded);

    // Revoked at one, while two holds the session and three an idle connection.
    let idle = three.control.accept(node.peer(), "192.0.2.1").unwrap();
    platform::spawn(async move {
        idle.closed().await;
        drop(idle);
    })
    .detach();
    let reader = platform::spawn(async move {
        let mut last = None;
        while let Some(message) = outgoing.next().await {
            last = Some(message);
        }
        drop(session);
        last
    });
    let revoked = soon(one.control.revoke_device(&one.operator(), "", "edge-1", "", 0))
        .await
        .unwrap();
    assert_eq!((revoked.enforced, revoked.pending), (vec![1, 2, 3], vec![]));
    assert_eq!(soon(reader).await.unwrap(), Some(goodbye(End::Revoked)));
    for control in [&one.control, &two.control, &three.control] {
        assert_eq!(
            code(&control.admit_node(node.peer()).unwrap_err()),
            Some(Code::DeviceRevoked)
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_cut_off_serves_nobody_and_loses_its_sessions() {
    let (one, _two, three) = Cluster::of_three(hasty()).await;
    let node = one.node("m").await;
    until(&three.replica, |view| nodes::node(view, node.device_id).is_some()).await;
    let session = node.attach_at(&three.control, &[]).await.unwrap();
    let (queued, _) = one
        .control
        .invoke(&one.operator(), node.invoke("pay", "{}"))
        .await
        .unwrap();
    let id = queued.record.id.to_string();
    assert!(matches!(
        next(&session.outgoing()).await,
        Some(Outbound::Assignment(_))
    ));
    let control = three.control.clone();
    let waiting = platform::spawn(async move { control.wait_dispatch(&id, 300_000, "").await });
    one.bus.isolate(3);
    assert_eq!(next(&session.outgoing()).await, Some(goodbye(End::Stale)));
    assert!(matches!(
        three.control.admit_node(node.peer()),
        Err(Error::Stale { .. })
    ));
    let waited = soon(waiting).await.unwrap().unwrap_err();
    assert!(
        waited.is_retryable(),
        "who waits there is sent to another replica: {waited:?}"
    );
    until(&one.replica, |view| {
        nodes::node(view, node.device_id).unwrap().status() == NodeStatus::Suspect
    })
    .await;
    let reason = nodes::node(&one.replica.view(), node.device_id)
        .unwrap()
        .status_reason;
    assert_eq!(reason, "replica_lost");

    // What nobody can serve any more is enforced, also where nobody answers.
    let revoked = soon(one.control.revoke_device(&one.operator(), "", "m", "", 15_000))
        .await
        .unwrap();
    assert_eq!((revoked.enforced, revoked.pending), (vec![1, 2, 3], vec![]));
    drop(session);
    one.bus.heal();
    until(&three.replica, |view| view.index() >= revoked.index).await;
    assert!(
        three.control.admit_node(node.peer()).is_err(),
        "and it stays out when the replica is back"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_is_handed_over_from_anywhere() {
    let (one, two, _three) = Cluster::of_three(quick()).await;
    let leader = soon(one.control.transfer_leader(2)).await.unwrap();
    assert_eq!(leader, 2);
    assert_eq!(two.replica.status().role, Role::Leader);
    let error = soon(one.control.transfer_leader(9)).await.unwrap_err();
    assert!(matches!(error, Error::Invalid { field: "to", .. }), "{error:?}");
    let leader = soon(two.control.transfer_leader(1)).await.unwrap();
    assert_eq!(leader, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_removed_for_good() {
    let (one, two, three) = Cluster::of_three(hasty()).await;
    let node = one.node("m").await;
    let error = one
        .control
        .remove_replica(&one.operator(), "", 3, false)
        .await
        .unwrap_err();
    assert_eq!(error.code(), "E1031", "two voters are left, and none may fail");
    one.control
        .remove_replica(&one.operator(), "", 3, true)
        .await
        .unwrap();
    let voters = one.replica.status().members.voters;
    assert!(
        !voters.contains(&3),
        "when that is answered it may be stopped: {voters:?}"
    );
    let status = one.control.cluster_status().await.unwrap();
    assert_eq!((status.voters, status.replicas.len()), (2, 2));
    // It may still serve nodes until it is stale: a revocation waits for that.
    let revoked = soon(one.control.revoke_device(&one.operator(), "", "m", "", 15_000))
        .await
        .unwrap();
    assert_eq!((revoked.enforced, revoked.pending), (vec![1, 2, 3], vec![]));
    // Because it has carried it out, too, or because it serves nobody any more.
    assert!(three.control.admit_node(node.peer()).is_err());
    drop((two, three));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_on_which_the_group_could_not_decide_is_not_begun() {
    let (one, two, three) = Cluster::of_three(quick()).await;
    let operator = one.operator();
    one.bus.isolate(3);
    // Of the two that would be left, one answers.
    let refused = soon(one.control.remove_replica(&operator, "", 2, true)).await;
    let Error::Refused(refusal) = refused.unwrap_err() else {
        panic!("another error")
    };
    assert!(matches!(
        refusal,
        Refusal::WouldLoseMajority {
            alive: 1,
            voters_left: 2,
            ..
        }
    ));
    assert_eq!(one.replica.status().members.voters.len(), 3);
    one.bus.heal();
    drop((two, three));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_removed_hands_over_first() {
    let (one, two, three) = Cluster::of_three(hasty()).await;
    soon(two.control.remove_replica(&one.operator(), "", 1, true))
        .await
        .unwrap();
    let leader = two.replica.leader();
    assert!(leader.is_some_and(|leader| leader != 1), "{leader:?}");
    assert!(!two.replica.status().members.voters.contains(&1));
    drop((one, three));
}

#[tokio::test]
async fn a_join_token_is_good_for_one_replica_of_its_name() {
    let cluster = Cluster::found().await;
    let control = &cluster.control;
    let minted = control
        .mint_join_token(&cluster.operator(), "", "r2", 0)
        .await
        .unwrap();
    let asked = Joining::new(&minted.token);
    let mut wrong = asked.message("r2");
    wrong.peer_addr = "203.0.113.1:7444".to_owned();
    let before = cluster.last_log();
    let error = control.join(&source(1), wrong).await.unwrap_err();
    assert_eq!(error.code(), "E1030", "the proof covers the addresses");
    assert_eq!(cluster.last_log(), before, "no entry");
    let error = control.join(&source(1), asked.message("r3")).await.unwrap_err();
    assert_eq!(code(&error), Some(Code::JoinTokenName));
    let joined = control.join(&source(1), asked.message("r2")).await.unwrap();
    assert_eq!(joined.replica_id, 2);
    let error = control
        .join(&source(1), Joining::new(&minted.token).message("r2"))
        .await
        .unwrap_err();
    assert_eq!(code(&error), Some(Code::JoinTokenUsed));
    let known = cluster::replicas(&cluster.replica.view());
    assert_eq!(known.len(), 2, "no partial effect");
    let again = control.join(&source(2), asked.message("r2")).await.unwrap();
    assert_eq!(
        (again.replica_id, again.authority_certificate),
        (joined.replica_id, joined.authority_certificate),
        "who lost the answer gets it again"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_at_two_replicas_at_once_is_one_replica() {
    let (one, two, _three) = Cluster::of_three(quick()).await;
    for name in ["r4", "r5", "r6"] {
        let minted = one
            .control
            .mint_join_token(&one.operator(), "", name, 0)
            .await
            .unwrap();
        let asked = Joining::new(&minted.token);
        let (here, there) = (source(1), source(2));
        let (first, second) = tokio::join!(
            one.control.join(&here, asked.message(name)),
            two.control.join(&there, asked.message(name))
        );
        let (first, second) = (first.unwrap(), second.unwrap());
        assert_eq!(first.replica_id, second.replica_id, "{name}");
        assert_eq!(
            first.authority_certificate, second.authority_certificate,
            "{name}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_outlives_the_leader() {
    let (one, two, three) = Cluster::of_three(quick()).await;
    let node = one.node("m").await;
    until(&two.replica, |view| nodes::node(view, node.device_id).is_some()).await;
    let session = node.attach_at(&two.control, &[]).await.unwrap();
    until(&three.replica, |view| {
        nodes::node(view, node.device_id).unwrap().session.is_some()
    })
    .await;
    let operator = three
        .control
        .admit_operator(&one.admin, palyra_state::access::Role::Admin)
        .unwrap();
    let (submitted, _) = three
        .control
        .invoke(&operator, node.invoke("pay", "{}"))
        .await
        .unwrap();
    let id = submitted.record.id;
    let control = three.control.clone();
    let waiting = platform::spawn(async move { control.wait_dispatch(&id.to_string(), 60_000, "").await });
    let Some(Outbound::Assignment(assignment)) = next(&session.outgoing()).await else {
        panic!("nothing")
    };
    one.bus.isolate(1);
    let device = node.device_id.to_string();
    // The agent's part: the same report, under the same request id, until it is accepted.
    let completion = succeeded(id, assignment.epoch);
    soon(async {
        loop {
            match two.control.report(node.peer(), &device, completion.clone()).await {
                Ok(answer) if answer.accepted => return,
                Ok(answer) => assert!(answer.retry, "{answer:?}"),
                Err(error) => assert!(error.is_retryable(), "{error:?}"),
            }
        }
    })
    .await;
    let (ended, _) = soon(waiting).await.unwrap().unwrap();
    assert_eq!(ended.record.state(), State::Succeeded);
}
