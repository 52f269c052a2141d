//! Revocation to the end: with a replica that sleeps, with one that is dead, and what is forgotten afterwards.

use std::time::Duration;

use palyra_client::{Enforced, Event, Step};
use palyra_proto::journal::v1::{Cursor, Row, StreamEventsRequest, TailRequest};
use palyra_proto::node::v1::node_service_client::NodeServiceClient;
use palyra_proto::node::v1::{Attach, NodeEventsRequest, PollRequest, RevokeDeviceRequest};
use palyra_tests::cluster::Cluster;
use palyra_tests::node::{dial, identity, registration};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::dispatch::{request, working_node};
use crate::faults::caught_up;

/// A bound on what must happen, far beyond what it takes.
const SOON: Duration = Duration::from_secs(60);

/// The rows after `after`, as one replica of those that run has them.
async fn rows_after(cluster: &Cluster, after: Cursor) -> Vec<Row> {
    let request = TailRequest {
        after: Some(after),
        ..TailRequest::default()
    };
    let mut feed = cluster.client().follow(request, Some(SOON));
    let mut rows = Vec::new();
    loop {
        match feed.next().await.unwrap() {
            Step::Rows(more) => rows.extend(more),
            Step::End => return rows,
            Step::Gap(first) => panic!("rows before {first:?} are gone"),
            Step::Lost { .. } | Step::Moved { .. } => {}
        }
    }
}

async fn a_follower(cluster: &Cluster) -> u64 {
    let status = cluster.client().status().await.unwrap();
    let ids = status.replicas.iter().map(|replica| replica.id);
    ids.filter(|id| *id != status.leader_id).max().unwrap()
}

#[allow(clippy::too_many_lines)] // one story
pub(crate) async fn a_woken_replica_serves_no_revoked_request(cluster: &mut Cluster) {
    let dir = cluster.pair_node("dozer").await;
    let (device_id, credential) = identity(&dir);
    let paused = a_follower(cluster).await;
    let channel = dial(&credential, &cluster.node_addr(paused)).await.unwrap();
    let mut client = NodeServiceClient::new(channel);
    client.register(registration(&device_id)).await.unwrap();

    // The connection is open, and what is said on it now lies in the sockets' buffers.
    cluster.freeze(paused);
    let mut buffered = JoinSet::new();
    for number in 0..20 {
        let mut client = client.clone();
        let mut register = registration(&device_id);
        register.agent_version = format!("too late {number}");
        buffered.spawn(async move { client.register(register).await.map(drop) });
    }
    let (mut polling, mut reading) = (client.clone(), client.clone());
    let poll = PollRequest {
        device_id: device_id.clone(),
        attach: Some(Attach::default()),
        ..PollRequest::default()
    };
    buffered.spawn(async move { polling.poll(poll).await.map(drop) });
    let events = NodeEventsRequest {
        device_id: device_id.clone(),
        events: Some(StreamEventsRequest::default()),
    };
    buffered.spawn(async move { reading.stream_events(events).await.map(drop) });

    let operator = cluster.client();
    let revoke = RevokeDeviceRequest {
        device_id: device_id.clone(),
        reason: "stolen".to_owned(),
        wait_ms: 1,
        ..RevokeDeviceRequest::default()
    };
    operator.revoke_device(revoke).await.unwrap();
    let mut progress = operator.revocation(&device_id, SOON);
    let mut told = Vec::new();
    while let Some(next) = timeout(SOON, progress.next()).await.unwrap().unwrap() {
        if let Enforced::Progress(now) = next {
            told.push(now);
        }
    }
    let at_paused = |progress: &palyra_proto::node::v1::WatchRevocationResponse| {
        let mut replicas = progress.replicas.iter();
        replicas
            .find(|replica| replica.replica_id == paused)
            .cloned()
            .unwrap()
    };
    assert!(
        told.iter().any(|progress| {
            let replica = at_paused(progress);
            replica.state == "pending" && replica.lapses_in_ms > 0
        }),
        "{told:?}"
    );
    let last = told.last().unwrap();
    assert!(last.complete, "{last:?}");
    assert_eq!(at_paused(last).state, "lapsed");
    // The client may have given up by its pings meanwhile; what it wrote lies in the replica's socket all the same.
    cluster.thaw(paused);
    let mut refused = 0;
    while let Some(outcome) = timeout(SOON, buffered.join_next()).await.unwrap() {
        let outcome = outcome.unwrap();
        assert!(outcome.is_err(), "a revoked request was served");
        refused += 1;
    }
    assert_eq!(refused, 22);
    caught_up(cluster).await;
    let after = Cursor {
        index: last.index,
        ordinal: u32::MAX,
    };
    let actor = format!("node/{device_id}");
    let rows = rows_after(cluster, after).await;
    assert!(
        rows.iter()
            .all(|row| row.actor != actor && row.subject != device_id),
        "nothing of it was committed: {rows:?}"
    );
}

#[allow(clippy::too_many_lines)] // one story
pub(crate) async fn a_device_is_revoked_removed_and_purged(cluster: &mut Cluster) {
    let dir = cluster.pair_node("passing").await;
    let (device_id, credential) = identity(&dir);
    let refused = cluster.palyra(&["device", "remove", "passing"]);
    assert_eq!(refused.code, 7, "{}", refused.err);
    assert!(refused.err.contains("E0322"), "it is trusted: {}", refused.err);
    let dead = a_follower(cluster).await;
    cluster.kill(dead);
    let revoke = [
        "device",
        "revoke",
        "passing",
        "--reason",
        "sold",
        "--timeout",
        "2s",
        "-o",
        "json",
    ];
    let partial = cluster.palyra(&revoke);
    assert_eq!(partial.code, 12, "{}{}", partial.out, partial.err);
    assert_eq!(partial.field("pending"), serde_json::json!([dead]));
    let pending = format!("r{dead} pending: unreachable; its authority lapses in ");
    assert!(partial.err.contains(&pending), "{}", partial.err);
    // Whichever replica is asked now, it takes the wait up where it is.
    let rest = cluster
        .palyra(&["device", "revocation", &device_id, "-o", "json"])
        .ok();
    assert_eq!(rest.field("pending"), serde_json::json!([]));
    assert!(rest.err.contains("3/3 replicas enforced"), "{}", rest.err);

    let removed = cluster
        .palyra(&["device", "remove", &device_id, "-o", "json"])
        .ok();
    assert_eq!(
        removed.field("revoked_index"),
        rest.field("revoked_index"),
        "of the revocation"
    );
    let known =
        |cluster: &Cluster, arguments: &[&str]| cluster.palyra(arguments).ok().out.contains(&device_id);
    assert!(
        !known(cluster, &["device", "ls", "-o", "json"]),
        "it is forgotten"
    );
    assert!(!known(cluster, &["node", "ls", "-o", "json"]));
    assert!(known(
        cluster,
        &["device", "ls", "--status", "removed", "-o", "json"]
    ));
    assert!(known(cluster, &["device", "ls", "--all", "-o", "json"]));
    cluster.start_replica(dead);
    caught_up(cluster).await;
    for id in 1..=3 {
        let channel = dial(&credential, &cluster.node_addr(id)).await.unwrap();
        let status = NodeServiceClient::new(channel)
            .register(registration(&device_id))
            .await
            .unwrap_err();
        assert!(status.message().contains("E0302"), "replica {id}: {status}");
    }
    assert_eq!(
        cluster.palyra(&["device", "purge", &device_id]).code,
        2,
        "unconfirmed"
    );
    let early = cluster.palyra(&["device", "purge", &device_id, "--yes"]);
    assert_eq!(
        (early.code, early.err.contains("E0324")),
        (7, true),
        "{}",
        early.err
    );
    let _ = cluster
        .palyra(&[
            "device",
            "purge",
            &device_id,
            "--yes",
            "--force",
            "--reason",
            "a mistake",
        ])
        .ok();
    assert!(!known(cluster, &["device", "ls", "--all", "-o", "json"]));
    let rows = cluster.palyra(&["journal", "tail", "--action", "identity.device_", "-o", "jsonl"]);
    assert!(
        rows.ok().out.contains("identity.device_purged"),
        "it is written down"
    );
}

pub(crate) async fn a_feed_hops_between_replicas(cluster: &mut Cluster) {
    const HOPS: usize = 40;
    let (_dir, device_id, _agent) = working_node(cluster, "busy").await;
    let worker = cluster.client();
    let load = tokio::spawn(async move {
        loop {
            // Some fail while a leader is elected; what counts is what the journal says.
            let _ = worker.invoke(request(&device_id, "echo", "1")).await;
        }
    });
    let mut events = cluster.client().events(StreamEventsRequest::default(), None);
    let begun = loop {
        if let Event::CaughtUp { .. } = timeout(SOON, events.next()).await.unwrap().unwrap() {
            break events.cursor().unwrap();
        }
    };
    let leader = cluster.client().status().await.unwrap().leader_id;
    let (mut seen, mut hops) = (Vec::new(), 0);
    while hops < HOPS {
        match timeout(SOON, events.next()).await.unwrap().unwrap() {
            Event::Rows(rows) => {
                seen.extend(rows);
                events.leave("on to the next");
                hops += 1;
                match hops {
                    10 => cluster.kill(leader),
                    20 => cluster.start_replica(leader),
                    30 => drop(cluster.palyra(&["cluster", "transfer-leader"])),
                    _ => {}
                }
            }
            Event::Gap { first, .. } => panic!("rows before {first:?} are gone"),
            Event::CaughtUp { .. } | Event::Lost { .. } | Event::Moved { .. } => {}
        }
    }
    load.abort();
    let last = seen.last().and_then(|row: &Row| row.cursor).unwrap();
    let mut journal = rows_after(cluster, begun).await;
    journal.retain(|row| {
        let cursor = row.cursor.unwrap();
        (cursor.index, cursor.ordinal) <= (last.index, last.ordinal)
    });
    assert!(seen.len() >= HOPS);
    assert_eq!(seen, journal, "every row once, in order, as the journal has it");
    println!("  {hops} hops, {} rows", seen.len());
    caught_up(cluster).await;
}
