//! Calls and feeds over servers that fail in each way, with real TLS: what is asked again, where, and with
//! which request id; and what a caller is told when nobody answers.
#![allow(clippy::unwrap_used)]

mod replica;

use std::time::Duration;

use palyra_client::{Class, Client, ConnectOptions, Endpoints, Event, Step};
use palyra_proto::access::v1::RemoveOperatorRequest;
use palyra_proto::journal::v1::{Cursor, StreamEventsRequest, TailRequest};
use replica::{Behaviour, Cluster, Replica};

fn client(cluster: &Cluster, replicas: &[&Replica]) -> Client {
    let endpoints = Endpoints::new(replicas.iter().map(|replica| replica.address.as_str())).unwrap();
    // In their order, however slow this machine is.
    let options = ConnectOptions {
        beside: Duration::from_secs(60),
        ..ConnectOptions::default()
    };
    Client::new(&cluster.credential(), Some(endpoints), options).unwrap()
}

fn request() -> RemoveOperatorRequest {
    RemoveOperatorRequest {
        name: "anna".to_owned(),
        ..RemoveOperatorRequest::default()
    }
}

#[tokio::test]
async fn what_one_replica_cannot_do_another_does_with_the_same_request_id() {
    let cluster = Cluster::new();
    for behaviour in [Behaviour::NoLeader, Behaviour::Unknown, Behaviour::BreaksOff] {
        let first = cluster.start(1, behaviour).await;
        let second = cluster.start(2, Behaviour::Works).await;
        let answer = client(&cluster, &[&first, &second])
            .remove_operator(request())
            .await
            .unwrap();
        assert_eq!(answer.write.unwrap().served_by, 2, "{behaviour:?}");
        let (asked_first, asked_second) = (first.asked(), second.asked());
        assert_eq!(asked_first.len(), 1, "{behaviour:?}");
        assert_eq!(asked_first, asked_second, "{behaviour:?}: the request id stays");
        assert!(palyra_client::ids::is_ulid(&asked_first[0]));
    }
}

#[tokio::test]
async fn a_refusal_is_final() {
    let cluster = Cluster::new();
    let first = cluster.start(1, Behaviour::Refuses).await;
    let second = cluster.start(2, Behaviour::Works).await;
    let error = client(&cluster, &[&first, &second])
        .remove_operator(request())
        .await
        .unwrap_err();
    assert_eq!((error.class, error.code.as_str()), (Class::NotFound, "E0203"));
    assert_eq!(error.trail.request_id, first.asked()[0]);
    assert!(second.asked().is_empty(), "nobody else is asked");
}

#[tokio::test]
async fn the_replica_that_answered_is_asked_first_the_next_time() {
    let cluster = Cluster::new();
    let first = cluster.start(1, Behaviour::NoLeader).await;
    let second = cluster.start(2, Behaviour::Works).await;
    let client = client(&cluster, &[&first, &second]);
    for _ in 0..3 {
        client.remove_operator(request()).await.unwrap();
    }
    assert_eq!((first.asked().len(), second.asked().len()), (1, 3));
}

#[tokio::test]
async fn a_mutation_without_an_answer_is_unknown_and_names_its_request() {
    let cluster = Cluster::new();
    let silent = cluster.start(1, Behaviour::Silent).await;
    let client = client(&cluster, &[&silent]).with_timeout(Duration::from_millis(300));
    let error = client.remove_operator(request()).await.unwrap_err();
    assert_eq!((error.class, error.exit_code()), (Class::Unknown, 13));
    assert_eq!(error.trail.request_id, silent.asked()[0]);
    let error = client.whoami().await.unwrap_err();
    assert_eq!(
        (error.class, error.exit_code()),
        (Class::Unavailable, 9),
        "a read changes nothing"
    );
}

#[tokio::test]
async fn no_leader_until_the_deadline_is_unavailable() {
    let cluster = Cluster::new();
    let replica = cluster.start(1, Behaviour::NoLeader).await;
    let client = client(&cluster, &[&replica]).with_timeout(Duration::from_millis(300));
    let error = client.remove_operator(request()).await.unwrap_err();
    assert_eq!((error.class, error.exit_code()), (Class::Unavailable, 9));
    let asked = replica.asked();
    assert!(
        asked.len() > 1 && asked.iter().all(|id| *id == asked[0]),
        "asked again with the same id: {asked:?}"
    );
}

#[tokio::test]
async fn a_replica_that_accepts_and_says_nothing_is_not_waited_for() {
    let cluster = Cluster::new();
    // Like a stopped process: the kernel completes the connection, nobody answers the handshake.
    let frozen = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = frozen.local_addr().unwrap().to_string();
    let second = cluster.start(2, Behaviour::Works).await;
    let endpoints = Endpoints::new([address.as_str(), second.address.as_str()]).unwrap();
    let options = ConnectOptions {
        // Whoever waits for the first connection alone is out of time before it is given up.
        connect_timeout: Duration::from_secs(3_600),
        beside: Duration::from_millis(10),
        ..ConnectOptions::default()
    };
    let client = Client::new(&cluster.credential(), Some(endpoints), options).unwrap();
    client.remove_operator(request()).await.unwrap();
    assert_eq!(second.asked().len(), 1);
}

#[tokio::test]
async fn another_cluster_is_told_at_once_and_gets_no_request() {
    let (cluster, other) = (Cluster::new(), Cluster::new());
    let replica = other.start(1, Behaviour::Works).await;
    let error = client(&cluster, &[&replica])
        .remove_operator(request())
        .await
        .unwrap_err();
    assert_eq!((error.class, error.code.as_str()), (Class::Denied, "E9004"));
    assert!(replica.asked().is_empty());
}

#[tokio::test]
async fn a_feed_goes_on_at_another_replica_without_loss_or_double() {
    let cluster = Cluster::new();
    let first = cluster.start(1, Behaviour::BreaksOff).await;
    let second = cluster.start(2, Behaviour::Works).await;
    let client = client(&cluster, &[&first, &second]);
    let mut feed = client.follow(
        TailRequest {
            follow: true,
            ..TailRequest::default()
        },
        None,
    );
    let mut seen = Vec::new();
    let mut moved = 0;
    while seen.len() < 6 {
        match feed.next().await.unwrap() {
            Step::Rows(rows) => seen.extend(
                rows.into_iter()
                    .filter_map(|row| row.cursor)
                    .map(|cursor| cursor.index),
            ),
            Step::Moved { endpoint, .. } => {
                assert_eq!(endpoint, second.address);
                moved += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, [1, 2, 3, 4, 5, 6], "the first breaks off behind 3");
    assert_eq!(moved, 1);
    assert_eq!(feed.cursor(), Some(Cursor { index: 6, ordinal: 0 }));
}

#[tokio::test]
async fn an_outage_is_told_once_and_the_feed_comes_back_behind_its_last_row() {
    let cluster = Cluster::new();
    let first = cluster.start(1, Behaviour::BreaksOff).await;
    let client = client(&cluster, &[&first]);
    let follow = TailRequest {
        follow: true,
        ..TailRequest::default()
    };
    let mut feed = client.follow(follow, None);
    assert!(matches!(feed.next().await.unwrap(), Step::Rows(rows) if rows.len() == 3));
    drop(first);
    assert!(matches!(feed.next().await.unwrap(), Step::Lost { .. }));
    let second = cluster.start(2, Behaviour::Works).await;
    client.pool().learn(std::slice::from_ref(&second.address));
    let moved = feed.next().await.unwrap();
    assert!(
        matches!(&moved, Step::Moved { endpoint, .. } if *endpoint == second.address),
        "{moved:?}"
    );
    let Step::Rows(rows) = feed.next().await.unwrap() else {
        panic!("no rows")
    };
    let indexes: Vec<u64> = rows
        .iter()
        .filter_map(|row| row.cursor)
        .map(|cursor| cursor.index)
        .collect();
    assert_eq!(indexes, [4, 5, 6]);
}

#[tokio::test]
async fn a_replica_that_ends_each_stream_is_not_hammered_and_patience_still_ends() {
    let cluster = Cluster::new();
    let replica = cluster.start(1, Behaviour::EndsStreams).await;
    let client = client(&cluster, &[&replica]);
    let mut feed = client.follow(TailRequest::default(), Some(Duration::from_millis(300)));
    let error = loop {
        match feed.next().await {
            Ok(step) => assert!(matches!(step, Step::Moved { .. }), "{step:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.class, Class::Unavailable);
    // Pauses double: a handful, where a loop without them makes hundreds.
    let asked = replica.asked().len();
    assert!((1..50).contains(&asked), "{asked} times");
}

#[tokio::test]
async fn events_go_on_at_another_replica_and_come_once() {
    let cluster = Cluster::new();
    let first = cluster.start(1, Behaviour::BreaksOff).await;
    let second = cluster.start(2, Behaviour::Works).await;
    let client = client(&cluster, &[&first, &second]);
    let mut events = client.events(StreamEventsRequest::default(), None);
    let (mut seen, mut moved) = (Vec::new(), 0);
    while seen.len() < 6 {
        match events.next().await.unwrap() {
            Event::Rows(rows) => seen.extend(rows.iter().filter_map(|row| row.cursor).map(|at| at.index)),
            Event::Moved { endpoint, .. } => {
                assert_eq!(endpoint, second.address);
                moved += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        (seen, moved),
        (vec![1, 2, 3, 4, 5, 6], 1),
        "the first breaks off behind 3"
    );
    assert_eq!(events.cursor(), Some(Cursor { index: 6, ordinal: 0 }));
    events.leave("enough of it");
    assert_eq!(events.endpoint(), None);
}
