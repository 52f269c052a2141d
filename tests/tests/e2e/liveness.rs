//! Where nodes stand while their replicas stop or die and their agents go, hang or come back.

use palyra_proto::node::v1::{GetNodeRequest, NodeInfo};
use palyra_tests::cluster::{Cluster, eventually};

use crate::dispatch::{invoke, request, working_node};
use crate::faults::caught_up;

/// A node as one replica shows it, when it is as wanted.
async fn node_at(
    cluster: &Cluster,
    at: u64,
    device_id: &str,
    what: &str,
    wanted: impl Fn(&NodeInfo) -> bool,
) -> NodeInfo {
    let client = cluster.client_at(at);
    eventually(what, async || {
        let request = GetNodeRequest {
            device_id: device_id.to_owned(),
            ..Default::default()
        };
        client.get_node(request).await.ok()?.node.filter(&wanted)
    })
    .await
}

/// What the journal says of a node, oldest first: the action, and the status that it led to.
fn story(cluster: &Cluster, device_id: &str) -> Vec<(String, String)> {
    let answer = cluster
        .palyra(&["journal", "tail", "--last", "400", "-o", "json"])
        .ok();
    let answer: serde_json::Value = serde_json::from_str(&answer.out).unwrap();
    let rows = answer["items"].as_array().expect("a list has items");
    rows.iter()
        .filter(|row| row["subject"] == device_id)
        .map(|row| {
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            (text(&row["action"]), text(&row["detail"]["status"]))
        })
        .filter(|(action, _)| action.starts_with("node."))
        .collect()
}

pub(crate) async fn a_replica_that_stops_moves_its_nodes(cluster: &mut Cluster) {
    let (_dir, device_id, _agent) = working_node(cluster, "mover").await;
    let holder = cluster.online(&device_id).await.session_replica;
    cluster.terminate(holder);
    let other = holder % 3 + 1;
    let moved = node_at(
        cluster,
        other,
        &device_id,
        "the node at another replica",
        |node| node.session_replica != 0 && node.session_replica != holder,
    )
    .await;
    assert_eq!(moved.status, "online");
    assert_eq!(moved.last_seen_source, "live", "{moved:?}");
    let told = story(cluster, &device_id);
    assert!(
        told.iter()
            .all(|(action, status)| status != "suspect" && action != "node.offline"),
        "{told:?}"
    );
    let done = invoke(cluster, other, request(&device_id, "notes.append", "1")).await;
    assert_eq!(done.state, "succeeded");
    cluster.start_replica(holder);
    caught_up(cluster).await;
}

pub(crate) async fn a_lost_node_is_suspect_and_comes_back_elsewhere(cluster: &mut Cluster) {
    let (_dir, device_id, agent) = working_node(cluster, "sleeper").await;
    let holder = cluster.online(&device_id).await.session_replica;
    let other = holder % 3 + 1;
    // It does not notice that its replica dies; the cluster does.
    agent.freeze();
    cluster.kill(holder);
    let lost = node_at(cluster, other, &device_id, "the node to be suspect", |node| {
        node.status == "suspect"
    })
    .await;
    assert_eq!(lost.status_reason, "replica_lost");
    assert_eq!(lost.last_seen_source, "record");
    assert!(
        lost.last_seen_at_ms != 0 && lost.due_at_ms > lost.status_since_ms,
        "{lost:?}"
    );
    let listed = cluster
        .palyra(&["node", "ls", "--status", "suspect", "-o", "json"])
        .ok();
    assert!(listed.out.contains(&device_id), "{}", listed.out);
    agent.thaw();
    let back = node_at(cluster, other, &device_id, "the node to be back", |node| {
        node.status == "online" && node.session_replica != 0
    })
    .await;
    assert_ne!(back.session_replica, holder);
    let told = story(cluster, &device_id);
    assert!(
        told.iter().all(|(action, _)| action != "node.offline"),
        "{told:?}"
    );
    cluster.start_replica(holder);
    caught_up(cluster).await;
}

pub(crate) async fn an_agent_that_stops_is_offline_at_once(cluster: &mut Cluster) {
    let (_dir, device_id, mut agent) = working_node(cluster, "leaver-by-word").await;
    agent.terminate();
    assert_eq!(agent.ended().await, 0);
    let gone = node_at(cluster, 1, &device_id, "the node to be offline", |node| {
        node.status == "offline"
    })
    .await;
    assert_eq!(
        (gone.status_reason.as_str(), gone.last_seen_source.as_str()),
        ("left", "record")
    );
    let shown = cluster.palyra(&["node", "describe", &device_id]).ok();
    for told in ["offline for", "(left)", "Connected=False", "gone in"] {
        assert!(shown.out.contains(told), "{told:?} is missing: {}", shown.out);
    }
}
