//! The pure parts: settings over settings, and when a cluster is whole.

use super::*;
use palyra_proto::cluster::v1::ReplicaStatus;

#[test]
fn settings_are_laid_over_what_is_there() {
    let mut config = settings("[replica]\nid = 1\n[limits]\nconnections = 5\nstreams = 7").unwrap();
    merge(
        &mut config,
        &settings("[limits]\nconnections = 9\n[timers]\nheartbeat = \"2s\"").unwrap(),
    );
    assert_eq!(config["replica"]["id"].as_integer(), Some(1));
    assert_eq!(config["limits"]["connections"].as_integer(), Some(9));
    assert_eq!(config["limits"]["streams"].as_integer(), Some(7));
    assert_eq!(config["timers"]["heartbeat"].as_str(), Some("2s"));
}

#[test]
fn a_cluster_is_whole_when_every_replica_votes_and_follows() {
    let replica = |applied_index, reachable| ReplicaStatus {
        status: "voter".to_owned(),
        applied_index,
        reachable,
        ..Default::default()
    };
    let status = |replicas: Vec<ReplicaStatus>| StatusResponse {
        leader_id: 1,
        voters: 3,
        replicas,
        ..Default::default()
    };
    let whole = status(vec![replica(900, true), replica(1000, true), replica(990, true)]);
    assert!(is_settled(&whole, 3));
    assert!(!is_settled(
        &status(vec![replica(1000, true), replica(700, true), replica(990, true)]),
        3
    ));
    let one_down = status(vec![replica(1000, true), replica(0, false), replica(990, true)]);
    assert!(!is_settled(&one_down, 3));
    assert!(is_settled(&one_down, 2));
    assert!(!is_settled(
        &StatusResponse {
            leader_id: 0,
            ..whole
        },
        3
    ));
}
