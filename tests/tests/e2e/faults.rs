//! What breaks: replicas are killed, devices revoked.

use std::time::Instant;

use palyra_proto::node::v1::node_service_client::NodeServiceClient;
use palyra_proto::node::v1::{GetDeviceRequest, RevokeDeviceRequest};
use palyra_tests::cluster::{Cluster, eventually};
use palyra_tests::node::{dial, identity, refusal, registration};

use crate::dispatch::{capabilities, invoke, request, working_node};

pub(crate) async fn a_node_survives_each_replica_in_turn(cluster: &mut Cluster) {
    let (dir, device_id, _agent) = working_node(cluster, "wanderer").await;
    for round in 1..=3u64 {
        let holder = cluster.online(&device_id).await.session_replica;
        cluster.kill(holder);
        let begun = Instant::now();
        eventually("the node at another replica", async || {
            let status = palyra_node::service::status(&dir).await.ok()?.agent?;
            (status.state == "connected" && status.replica_id != holder).then_some(())
        })
        .await;
        println!("  node moved in {} ms", begun.elapsed().as_millis());
        let done = cluster
            .client()
            .invoke(request(&device_id, "notes.append", &round.to_string()))
            .await
            .unwrap();
        assert_eq!(done.dispatch.unwrap().state, "succeeded");
        cluster.start_replica(holder);
        caught_up(cluster).await;
    }
    let notes = std::fs::read_to_string(dir.join("notes")).unwrap();
    assert_eq!(notes, "1\n2\n3\n", "each once, none lost");
}

pub(crate) async fn caught_up(cluster: &Cluster) {
    cluster
        .becomes("all replicas at one index", |status| {
            let newest = status
                .replicas
                .iter()
                .map(|replica| replica.applied_index)
                .max()
                .unwrap_or(0);
            status.voters == 3
                && status
                    .replicas
                    .iter()
                    .filter(|replica| replica.status == "voter")
                    .all(|replica| replica.reachable && replica.applied_index == newest)
        })
        .await;
}

pub(crate) async fn work_goes_on_after_the_leader_is_killed(cluster: &mut Cluster) {
    let (dir, device_id, _agent) = working_node(cluster, "steady").await;
    let leader = cluster.client().status().await.unwrap().leader_id;
    cluster.kill(leader);
    let begun = Instant::now();
    // Idempotent: one that is bound to the dead replica's session moves to the next, where `once` ends as lost.
    let again = request(&device_id, "echo", "\"after\"");
    let done = cluster.client().invoke(again).await.unwrap().dispatch.unwrap();
    assert_eq!(
        (done.state.as_str(), &done.result[..]),
        ("succeeded", &b"\"after\""[..]),
        "{done:?}"
    );
    // `cluster/measure failover` is where this time is held to a limit.
    println!(
        "  from SIGKILL of the leader to a result: {} ms",
        begun.elapsed().as_millis()
    );
    let once = cluster
        .client()
        .invoke(request(&device_id, "notes.append", "\"once\""))
        .await
        .unwrap();
    assert_eq!(once.dispatch.unwrap().state, "succeeded");
    assert_eq!(std::fs::read_to_string(dir.join("notes")).unwrap(), "\"once\"\n");
    cluster.start_replica(leader);
    caught_up(cluster).await;
    let done = invoke(cluster, leader, request(&device_id, "echo", "1")).await;
    assert_eq!(done.state, "succeeded", "the restarted replica serves");
}

pub(crate) async fn a_frozen_replica_is_left(cluster: &mut Cluster) {
    let (dir, device_id, _agent) = working_node(cluster, "patient").await;
    let holder = cluster.online(&device_id).await.session_replica;
    cluster.freeze(holder);
    let begun = Instant::now();
    eventually("the node at another replica", async || {
        let status = palyra_node::service::status(&dir).await.ok()?.agent?;
        (status.state == "connected" && status.replica_id != holder).then_some(())
    })
    .await;
    println!(
        "  node left a frozen replica in {} ms",
        begun.elapsed().as_millis()
    );
    let done = cluster
        .client()
        .invoke(request(&device_id, "notes.append", "1"))
        .await
        .unwrap();
    assert_eq!(done.dispatch.unwrap().state, "succeeded");
    cluster.thaw(holder);
    caught_up(cluster).await;
    // What wakes up has been left: it must not take the session back, nor end the new one.
    let done = invoke(cluster, holder, request(&device_id, "notes.append", "2")).await;
    assert_eq!(done.state, "succeeded", "{done:?}");
    assert_eq!(std::fs::read_to_string(dir.join("notes")).unwrap(), "1\n2\n");
}

pub(crate) async fn a_revoked_device_is_out_everywhere(cluster: &mut Cluster) {
    let (dir, device_id, mut agent) = working_node(cluster, "leaver").await;
    let mut slow = request(&device_id, "slow", "{}");
    slow.wait_ms = 0;
    let open = invoke(cluster, 1, slow).await;
    let reason = "the machine was sold".to_owned();
    let revoke = RevokeDeviceRequest {
        device_id: device_id.clone(),
        reason,
        ..Default::default()
    };
    let revoked = cluster.client_at(2).revoke_device(revoke).await.unwrap();
    assert_eq!(
        (revoked.enforced.len(), revoked.pending.len()),
        (3, 0),
        "{revoked:?}"
    );
    assert_eq!(
        agent.ended().await,
        3,
        "{}",
        std::fs::read_to_string(&agent.log).unwrap()
    );
    assert!(std::fs::read_to_string(&agent.log).unwrap().contains("revoked"));
    let ended = cluster
        .client()
        .wait_dispatch(&open.id, 5_000)
        .await
        .unwrap()
        .dispatch
        .unwrap();
    assert!(
        !["queued", "dispatched", "succeeded"].contains(&ended.state.as_str()),
        "{ended:?}"
    );
    let (_, credential) = identity(&dir);
    for id in 1..=3 {
        let channel = dial(&credential, &cluster.node_addr(id)).await.unwrap();
        let status = NodeServiceClient::new(channel)
            .register(registration(&device_id))
            .await
            .unwrap_err();
        assert!(
            ["E0302", "E0304"].contains(&refusal(&status).0.as_str()),
            "at replica {id}: {status}"
        );
    }
    let mut back = cluster.start_node(&dir, Some(&capabilities(cluster)));
    assert_eq!(back.ended().await, 3);
    let device = cluster
        .client()
        .get_device(GetDeviceRequest {
            device_id,
            ..Default::default()
        })
        .await
        .unwrap();
    let device = device.device.unwrap();
    assert_eq!(
        (device.status.as_str(), device.reason.as_str()),
        ("revoked", "the machine was sold")
    );
}
