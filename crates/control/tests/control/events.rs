//! The feed: who sees what, from where, at which replica, and how it ends.

use std::time::Duration;

use palyra_control::{End, Error, Event, Events, EventsRequest, Limits, Timings};
use palyra_state::{Cursor, Row};

use crate::support::{Cluster, Machine, quick, soon, until};

async fn next(events: &mut Events) -> Event {
    soon(events.next()).await.unwrap().unwrap()
}

/// Everything up to now, as far as the reader sees it.
async fn caught_up(events: &mut Events) -> Vec<Row> {
    let mut seen = Vec::new();
    loop {
        match next(events).await {
            Event::Rows { rows, .. } => seen.extend(rows),
            Event::CaughtUp { .. } => return seen,
            Event::Heartbeat { .. } => {}
            Event::Gap { .. } => panic!("nothing was trimmed"),
        }
    }
}

fn from_first() -> EventsRequest {
    EventsRequest {
        from_first: true,
        ..EventsRequest::default()
    }
}

async fn of_node(cluster: &Cluster, node: &Machine, request: EventsRequest) -> Result<Events, Error> {
    let device = node.device_id.to_string();
    soon(cluster.control.node_events(node.peer(), &device, request)).await
}

#[tokio::test]
async fn a_node_reads_its_own_and_is_woken_by_nothing_else() {
    let cluster = Cluster::found().await;
    let (one, two) = (cluster.node("one").await, cluster.node("two").await);
    let mut events = of_node(&cluster, &one, from_first()).await.unwrap();
    let seen = caught_up(&mut events).await;
    let own = one.device_id.to_string();
    assert!(seen.iter().any(|row| row.action == "node.registered"), "{seen:?}");
    for row in &seen {
        let mine = row.subject == own || row.detail("device") == own;
        assert!(mine || row.action.starts_with("cluster."), "{row:?}");
        assert!(!row.actor.starts_with("operator/"), "{row:?}");
    }
    // Another's rows lie between: they are passed over, and its own come at once.
    let _other = two.attach(&cluster, &[]).await.unwrap();
    let session = one.attach(&cluster, &[]).await.unwrap();
    let Event::Rows { rows, cursor } = next(&mut events).await else {
        panic!("no rows")
    };
    assert_eq!(rows[0].action, "node.attached");
    assert_eq!(rows[0].subject, own);
    assert_eq!(cursor, rows.last().unwrap().cursor());
    drop(session);
    let refused = of_node(
        &cluster,
        &one,
        EventsRequest {
            device: two.device_id.to_string(),
            ..from_first()
        },
    )
    .await
    .unwrap_err();
    assert_eq!(refused.code(), "E1014");
}

#[tokio::test]
async fn an_operator_reads_what_the_journal_holds_whichever_replica_is_asked() {
    let (one, two, three) = Cluster::of_three(quick()).await;
    let node = one.node("m").await;
    let device = node.device_id.to_string();
    let last = palyra_state::meta(&one.replica.view()).journal_last;
    let mut feeds = Vec::new();
    for (control, replica) in [
        (&one.control, &one.replica),
        (&two.control, &two.replica),
        (&three.control, &three.replica),
    ] {
        until(replica, |view| view.index() >= last.index).await;
        let mut events = control.operator_events(&one.admin, from_first()).await.unwrap();
        let rows = caught_up(&mut events).await;
        feeds.push(
            rows.into_iter()
                .filter(|row| row.cursor() <= last)
                .collect::<Vec<_>>(),
        );
    }
    assert!(feeds[0].len() > 5);
    assert_eq!(feeds[0], feeds[1]);
    assert_eq!(feeds[0], feeds[2]);
    let about = EventsRequest {
        device,
        ..from_first()
    };
    let mut events = two.control.operator_events(&one.admin, about).await.unwrap();
    let rows = caught_up(&mut events).await;
    assert!(
        rows.iter().any(|row| row.action == "pairing.approved"),
        "{rows:?}"
    );
    assert!(!rows.iter().any(|row| row.action.starts_with("cluster.")));
}

#[tokio::test]
async fn a_quiet_reader_learns_how_far_the_feed_is() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let quiet = EventsRequest {
        action_prefix: "access.".to_owned(),
        heartbeat_ms: 1_000,
        ..EventsRequest::default()
    };
    let mut events = cluster
        .control
        .operator_events(&cluster.admin, quiet)
        .await
        .unwrap();
    assert_eq!(caught_up(&mut events).await, []);
    let session = node.attach(&cluster, &[]).await.unwrap();
    let attached = palyra_state::meta(&cluster.replica.view()).journal_last;
    let heard = loop {
        if let Event::Heartbeat { cursor } = next(&mut events).await
            && cursor >= attached
        {
            break cursor;
        }
    };
    assert!(
        heard >= attached,
        "resuming there, it does not look through others' rows"
    );
    drop(session);
}

#[tokio::test]
async fn cursors_from_elsewhere_and_from_the_future_are_told_apart() {
    let cluster = Cluster::found().await;
    let open = async |request: EventsRequest| {
        let opened = cluster.control.operator_events(&cluster.admin, request).await;
        opened
            .map(drop)
            .map_err(|error| (error.code(), error.is_retryable()))
    };
    let index = cluster.last_log();
    let at = |index: u64| {
        Some(Cursor {
            index,
            ordinal: u32::MAX,
        })
    };
    let here = EventsRequest {
        after: at(index),
        cluster_id: cluster.control.cluster_id().to_string(),
        ..EventsRequest::default()
    };
    assert_eq!(open(here.clone()).await, Ok(()));
    let elsewhere = EventsRequest {
        cluster_id: "01ARZ3NDEKTSV4RRFFQ69G5FAV".to_owned(),
        ..here.clone()
    };
    assert_eq!(open(elsewhere).await, Err(("E1072".to_owned(), false)));
    let future = EventsRequest {
        after: at(index + 1_000),
        ..here
    };
    assert_eq!(
        open(future).await,
        Err(("E1071".to_owned(), false)),
        "the leader says that there is no such place"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_cut_off_sends_its_readers_away() {
    let timings = Timings {
        max_staleness: Duration::from_secs(1),
        call_timeout: Duration::from_millis(500),
        ..quick()
    };
    let (one, _two, three) = Cluster::of_three(timings).await;
    let node = one.node("m").await;
    until(&three.replica, |view| {
        palyra_state::nodes::node(view, node.device_id).is_some()
    })
    .await;
    let mut operator = three
        .control
        .operator_events(&one.admin, EventsRequest::default())
        .await
        .unwrap();
    let device = node.device_id.to_string();
    let mut own = three
        .control
        .node_events(node.peer(), &device, EventsRequest::default())
        .await
        .unwrap();
    caught_up(&mut operator).await;
    caught_up(&mut own).await;
    one.bus.isolate(3);
    for events in [&mut operator, &mut own] {
        let error = loop {
            match soon(events.next()).await.unwrap() {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(
            matches!(error, Error::Stale { .. }) && error.is_retryable(),
            "{error:?}"
        );
        assert!(soon(events.next()).await.is_none(), "and nothing after it");
    }
    // What the others have told meanwhile is not here, and here nobody knows whether it is true.
    let seen_elsewhere = EventsRequest {
        after: Some(Cursor {
            index: one.last_log() + 1,
            ordinal: 0,
        }),
        ..EventsRequest::default()
    };
    let error = three
        .control
        .operator_events(&one.admin, seen_elsewhere)
        .await
        .unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
}

#[tokio::test]
async fn a_revoked_reader_is_put_out() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let mut events = of_node(&cluster, &node, EventsRequest::default()).await.unwrap();
    caught_up(&mut events).await;
    soon(cluster.control.revoke_device(&cluster.operator(), "", "m", "", 0))
        .await
        .unwrap();
    let error = soon(events.next()).await.unwrap().unwrap_err();
    assert_eq!(error.code(), "E0302", "not even the row that says so");
    assert_eq!(cluster.control.reader_count(), 1);
    drop(events);
    assert_eq!(cluster.control.reader_count(), 0);
}

#[tokio::test]
async fn a_reader_that_stalls_is_closed_and_readers_are_bounded() {
    let limits = Limits {
        readers_per_identity: 2,
        ..Limits::default()
    };
    let timings = Timings {
        stall_timeout: Duration::from_millis(200),
        ..quick()
    };
    let cluster = Cluster::found_with(timings, limits).await;
    let carries = cluster.control.accept(&cluster.admin, "192.0.2.9").unwrap();
    let open = || {
        let request = EventsRequest {
            connection: carries.id(),
            ..EventsRequest::default()
        };
        cluster.control.operator_events(&cluster.admin, request)
    };
    let (mut slow, quick) = (open().await.unwrap(), open().await.unwrap());
    assert_eq!(open().await.unwrap_err().code(), "E1013");
    drop(quick);
    assert!(open().await.is_ok());
    assert!(matches!(next(&mut slow).await, Event::CaughtUp { .. }));
    // It was handed something, does not come back for more, and does not notice either that it is closed.
    assert_eq!(soon(carries.closed()).await, End::SlowReader);
    let error = soon(slow.next()).await.unwrap().unwrap_err();
    assert_eq!((error.code().as_str(), error.is_retryable()), ("E1073", true));
}

#[tokio::test]
async fn a_viewer_sees_every_row_but_no_addresses_and_reads_until_it_is_removed() {
    let cluster = Cluster::found().await;
    cluster.node("m").await;
    let viewer = crate::operators::add(&cluster, "vera", "viewer").await;
    let mut whole = cluster
        .control
        .operator_events(&cluster.admin, from_first())
        .await
        .unwrap();
    let mut seen = cluster
        .control
        .operator_events(&viewer, from_first())
        .await
        .unwrap();
    let (whole, rows) = (caught_up(&mut whole).await, caught_up(&mut seen).await);
    let cursors = |rows: &[Row]| rows.iter().map(Row::cursor).collect::<Vec<_>>();
    assert_eq!(cursors(&whole), cursors(&rows), "every row");
    let proved = |rows: &[Row]| {
        let mut rows = rows.iter();
        rows.find(|row| row.action == "pairing.proved").unwrap().clone()
    };
    assert_eq!(proved(&whole).detail("source"), "192.0.2.1");
    assert_eq!(proved(&rows).detail("source"), "");
    assert_eq!(
        proved(&rows).hash,
        palyra_state::Digest::ZERO,
        "it would not match"
    );
    soon(
        cluster
            .control
            .remove_operator(&cluster.operator(), "", "vera", "left"),
    )
    .await
    .unwrap();
    let error = soon(seen.next()).await.unwrap().unwrap_err();
    assert!(["E0207", "E0304"].contains(&error.code().as_str()), "{error:?}");
}
