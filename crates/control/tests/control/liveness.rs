//! Where nodes stand: suspect, offline, gone and back; who may say so, and what it costs.

use std::time::Duration;

use palyra_control::{End, Inbound, LastSeen, Limits, ReadOptions, Session, Timings};
use palyra_platform as platform;
use palyra_replica::Replica;
use palyra_state::cluster::UpdateReplicaAddresses;
use palyra_state::nodes::{self, ConditionKind, NodeStatus, Truth};
use palyra_state::{Actor, Code, Envelope, Row, journal};

use crate::support::{Cluster, Machine, addresses, fresh_id, goodbye, next, quick, soon, until};

fn hasty() -> Timings {
    Timings {
        suspect_for: Duration::from_millis(300),
        lost_after: Some(Duration::from_millis(300)),
        ..quick()
    }
}

async fn becomes(replica: &Replica, node: &Machine, status: NodeStatus) {
    until(replica, |view| {
        nodes::node(view, node.device_id).is_some_and(|node| node.status() == status)
    })
    .await;
}

/// The rows about nodes that are not good news.
fn losses(replica: &Replica) -> Vec<Row> {
    let mut rows = journal::last_rows(&replica.view(), usize::MAX);
    rows.retain(|row| ["node.detached", "node.offline", "node.gone"].contains(&row.action.as_str()));
    rows
}

#[tokio::test]
async fn a_lost_node_is_suspect_then_offline_then_gone_and_comes_back() {
    let cluster = Cluster::found_with(hasty(), Limits::default()).await;
    let node = cluster.node("m").await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    let (bound, _) = cluster
        .control
        .invoke(&cluster.operator(), node.invoke("pay", "{}"))
        .await
        .unwrap();
    drop(session);
    becomes(&cluster.replica, &node, NodeStatus::Gone).await;
    let rows = losses(&cluster.replica);
    let told: Vec<(&str, &str)> = rows
        .iter()
        .map(|row| (row.action.as_str(), row.detail("reason")))
        .collect();
    assert_eq!(
        told,
        [
            ("node.detached", "disconnected"),
            ("node.offline", "disconnected"),
            ("node.gone", "lost_after")
        ]
    );
    assert_eq!(rows[0].detail("status"), "suspect");
    let record = nodes::node(&cluster.replica.view(), node.device_id).unwrap();
    assert!(record.last_seen_at != 0 && record.due_at == 0);
    let dispatch = palyra_state::dispatch::dispatch(&cluster.replica.view(), bound.record.id).unwrap();
    assert_eq!(dispatch.state().as_str(), "session_lost");
    let refused = cluster
        .control
        .invoke(&cluster.operator(), node.invoke("echo", "{}"))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::NodeGone.to_string());
    let _session = node.attach(&cluster, &[]).await.unwrap();
    let record = nodes::node(&cluster.replica.view(), node.device_id).unwrap();
    let truths: Vec<(ConditionKind, Truth)> = record
        .conditions
        .iter()
        .map(|condition| (condition.kind(), condition.truth()))
        .collect();
    assert_eq!(record.status(), NodeStatus::Online);
    assert!(
        truths.iter().all(|(_, truth)| *truth == Truth::True),
        "{truths:?}"
    );
}

#[tokio::test]
async fn a_node_that_says_that_it_goes_is_offline_at_once() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    let device = node.device_id.to_string();
    session
        .receive(node.peer(), &device, Inbound::Leave)
        .await
        .unwrap();
    assert_eq!(next(&session.outgoing()).await, Some(goodbye(End::Left)));
    becomes(&cluster.replica, &node, NodeStatus::Offline).await;
    let rows = losses(&cluster.replica);
    assert_eq!((rows.len(), rows[0].detail("status")), (1, "offline"));
}

#[tokio::test]
async fn a_node_that_is_sent_away_is_late_only_after_its_time() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let _session = node.attach(&cluster, &[]).await.unwrap();
    soon(cluster.control.shutdown()).await;
    let record = nodes::node(&cluster.replica.view(), node.device_id).unwrap();
    assert_eq!((record.status(), record.session), (NodeStatus::Online, None));
    assert!(record.due_at > record.status_since);
}

/// Two nodes at each of three replicas.
async fn spread(cluster: &Cluster, others: [&crate::support::Member; 2]) -> Vec<(Machine, Session)> {
    let mut held = Vec::new();
    for (at, control) in [&cluster.control, &others[0].control, &others[1].control]
        .into_iter()
        .enumerate()
    {
        for number in 0..2 {
            let node = cluster.node(&format!("n{at}-{number}")).await;
            for other in others {
                until(&other.replica, |view| nodes::node(view, node.device_id).is_some()).await;
            }
            let session = node.attach_at(control, &[]).await.unwrap();
            held.push((node, session));
        }
    }
    held
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_node_is_given_up_because_the_leader_changed() {
    let (one, two, three) = Cluster::of_three(hasty()).await;
    let held = spread(&one, [&two, &three]).await;
    let before = losses(&one.replica).len();
    for round in 0..12u64 {
        let to = round % 3 + 1;
        let control = [&one.control, &two.control, &three.control][usize::try_from(to - 1).unwrap()];
        // It may lead already.
        drop(soon(control.transfer_leader(to)).await);
        // A leader acts in passes: give each a few of them.
        let mut applied = one.replica.applied();
        drop(platform::timeout(Duration::from_millis(700), applied.wait_for(|_| false)).await);
    }
    let rows = losses(&one.replica);
    assert_eq!(rows.len(), before, "false transitions: {rows:#?}");
    for (node, _) in &held {
        let record = nodes::node(&one.replica.view(), node.device_id).unwrap();
        assert_eq!(record.status(), NodeStatus::Online);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_replica_costs_one_entry_and_its_nodes_are_suspect_first() {
    let timings = Timings {
        max_staleness: Duration::from_secs(1),
        replica_lost_after: Duration::from_secs(2),
        suspect_for: Duration::from_secs(60),
        ..quick()
    };
    let (one, two, three) = Cluster::of_three(timings).await;
    soon(one.control.transfer_leader(1)).await.ok();
    let held = spread(&one, [&two, &three]).await;
    let read = ReadOptions {
        local: true,
        min_index: 0,
    };
    let last = &held[5].0;
    let id = last.device_id.to_string();
    let (seen, _) = one.control.get_node(read, &id).await.unwrap();
    assert!(
        matches!(seen.last_seen, LastSeen::Live { replica: 3, .. }),
        "asked at another replica: {:?}",
        seen.last_seen
    );
    one.bus.isolate(3);
    let (seen, _) = soon(one.control.get_node(read, &id)).await.unwrap();
    assert!(
        matches!(seen.last_seen, LastSeen::Unknown { replica: 3, .. }),
        "{:?}",
        seen.last_seen
    );
    becomes(&one.replica, last, NodeStatus::Suspect).await;
    becomes(&one.replica, &held[4].0, NodeStatus::Suspect).await;
    let rows = losses(&one.replica);
    let indexes: std::collections::BTreeSet<u64> = rows.iter().map(|row| row.index).collect();
    assert_eq!((rows.len(), indexes.len()), (2, 1), "{rows:#?}");
    assert_eq!(rows[0].detail("reason"), "replica_lost");
    let (seen, _) = soon(one.control.get_node(read, &id)).await.unwrap();
    assert!(
        matches!(seen.last_seen, LastSeen::Recorded { .. }),
        "{:?}",
        seen.last_seen
    );
    // It comes back elsewhere, and is online at once.
    let _again = last.attach_at(&two.control, &[]).await.unwrap();
    becomes(&one.replica, last, NodeStatus::Online).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_longer_staleness_counts_once_it_is_on_record_and_differences_are_said() {
    let timings = Timings {
        max_staleness: Duration::from_secs(30),
        ..quick()
    };
    let (one, _two, _three) = Cluster::of_three(timings).await;
    let status = one.control.cluster_status().await.unwrap();
    let values: Vec<u64> = status
        .replicas
        .iter()
        .map(|replica| replica.max_staleness_ms)
        .collect();
    assert_eq!(values, [5_000; 3], "a revocation would not wait for more");
    assert!(status.warnings.is_empty());
    for (replica_id, max_staleness_ms) in [(1, 30_000), (2, 8_000)] {
        let announce = UpdateReplicaAddresses {
            replica_id,
            addresses: addresses(),
            feature_level: 0,
            max_staleness_ms,
        };
        let envelope = Envelope::new(fresh_id(), Actor::Replica { id: replica_id }, announce);
        one.replica.propose(envelope).await.unwrap().reply.unwrap();
    }
    let status = soon(async {
        loop {
            let status = one.control.cluster_status().await.unwrap();
            if status
                .replicas
                .iter()
                .map(|replica| replica.max_staleness_ms)
                .eq([30_000, 8_000, 5_000])
            {
                return status;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(status.warnings.len(), 1);
    assert!(status.warnings[0].starts_with("E1052: "), "{:?}", status.warnings);
}

#[tokio::test]
async fn attaches_wait_for_their_turn_and_hold_up_nobody() {
    let limits = Limits {
        attaches: 1,
        attach_queue: 3,
        ..Limits::default()
    };
    let cluster = Cluster::found_with(quick(), limits).await;
    let first = cluster.node("first").await;
    let session = first.attach(&cluster, &[]).await.unwrap();
    let mut nodes = Vec::new();
    for number in 0..4 {
        nodes.push(cluster.node(&format!("n{number}")).await);
    }
    let all = futures::future::join_all(nodes.iter().map(|node| node.attach(&cluster, &[])));
    let outgoing = session.outgoing();
    let device = first.device_id.to_string();
    let beats = async {
        for sequence in 1..=20 {
            let beat = Inbound::Heartbeat { sequence };
            session.receive(first.peer(), &device, beat).await.unwrap();
            assert!(next(&outgoing).await.is_some());
        }
    };
    let (attached, ()) = Box::pin(soon(async { tokio::join!(all, beats) })).await;
    assert!(attached.iter().all(Result::is_ok), "{attached:?}");
    let epochs: Vec<u64> = attached
        .iter()
        .map(|session| session.as_ref().unwrap().attached().epoch)
        .collect();
    assert!(epochs.is_sorted(), "in the order in which they came: {epochs:?}");
    let status = cluster.control.cluster_status().await.unwrap();
    assert_eq!(status.replicas[0].attaches_waiting, 0);
}
