//! Sessions: who is let in, who is put out, and what it costs.

use std::time::Duration;

use palyra_control::{AttachRequest, End, Error, Inbound, Limits, Outbound, Timings, Transport};
use palyra_pki::ca::HostNames;
use palyra_pki::{KeyPair, PeerIdentity, Role, SpiffeId};
use palyra_state::Code;
use palyra_state::nodes::{self, NodeStatus};

use crate::support::{Cluster, Machine, fresh_id, goodbye, next, quick, soon, succeeded};

fn code(error: &Error) -> Option<Code> {
    if let Error::Rejected(reject) = error {
        Some(reject.kind())
    } else {
        None
    }
}

/// Waits until the state says that a node has no session.
async fn detached(cluster: &Cluster, node: &Machine) {
    let mut applied = cluster.replica.applied();
    soon(async {
        while nodes::node(&cluster.replica.view(), node.device_id)
            .unwrap()
            .session
            .is_some()
        {
            applied.changed().await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_heartbeat_makes_no_entry() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    let outgoing = session.outgoing();
    let device = node.device_id.to_string();
    let settled = cluster.last_log();
    for sequence in 1..=50 {
        session
            .receive(node.peer(), &device, Inbound::Heartbeat { sequence })
            .await
            .unwrap();
        assert_eq!(next(&outgoing).await, Some(Outbound::Heartbeat { sequence }));
    }
    assert!(
        cluster.last_log() <= settled + 1,
        "only the pairing's completion may still have been under way"
    );
    let last = cluster.last_log();
    session
        .receive(node.peer(), &device, Inbound::Heartbeat { sequence: 51 })
        .await
        .unwrap();
    assert_eq!(cluster.last_log(), last);
}

#[tokio::test]
async fn the_newest_session_wins() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let first = node.attach(&cluster, &[]).await.unwrap();
    let second = node.attach(&cluster, &[]).await.unwrap();
    assert!(second.attached().epoch > first.attached().epoch);
    assert_eq!(next(&first.outgoing()).await, Some(goodbye(End::Superseded)));
    assert_eq!(next(&first.outgoing()).await, None);
    let device = node.device_id.to_string();
    let error = first
        .receive(node.peer(), &device, Inbound::Heartbeat { sequence: 1 })
        .await
        .unwrap_err();
    assert_eq!(error.code(), "E1040");
    second
        .receive(node.peer(), &device, Inbound::Heartbeat { sequence: 1 })
        .await
        .unwrap();
    drop(first);
    let state = nodes::node(&cluster.replica.view(), node.device_id).unwrap();
    assert_eq!(
        state.session.unwrap().epoch,
        second.attached().epoch,
        "the old one's end detaches nothing"
    );
}

#[tokio::test]
async fn a_session_that_ends_is_detached() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    drop(session);
    detached(&cluster, &node).await;
    let state = nodes::node(&cluster.replica.view(), node.device_id).unwrap();
    assert_eq!(state.status_reason, "disconnected");
}

#[tokio::test]
async fn silence_ends_a_session() {
    let timings = Timings {
        heartbeat_interval: Duration::from_millis(20),
        heartbeat_timeout: Duration::from_millis(60),
        ..quick()
    };
    let cluster = Cluster::found_with(timings, Limits::default()).await;
    let node = cluster.node("m").await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    assert_eq!(next(&session.outgoing()).await, Some(goodbye(End::Silent)));
    detached(&cluster, &node).await;
}

#[tokio::test]
async fn a_reader_that_stalls_is_closed_and_blocks_nobody() {
    let limits = Limits {
        outbound: 4,
        ..Limits::default()
    };
    let cluster = Cluster::found_with(quick(), limits).await;
    let node = cluster.node("m").await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    let operator = cluster.operator();
    for _ in 0..6 {
        cluster
            .control
            .invoke(&operator, node.invoke("echo", "{}"))
            .await
            .unwrap();
    }
    detached(&cluster, &node).await;
    assert_eq!(next(&session.outgoing()).await, Some(goodbye(End::SlowReader)));
}

#[tokio::test]
async fn a_revoked_device_is_put_out_and_stays_out() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let idle = cluster.control.accept(node.peer(), "192.0.2.1").unwrap();
    let session = node.attach(&cluster, &[]).await.unwrap();
    let outgoing = session.outgoing();
    let device = node.device_id.to_string();

    // The server's part: close what must be closed, then let go of it.
    let closer = palyra_platform::spawn(async move {
        let end = idle.closed().await;
        drop(idle);
        end
    });
    let reader = palyra_platform::spawn(async move {
        let last = outgoing.next().await;
        drop(session);
        last
    });
    let revoked = soon(
        cluster
            .control
            .revoke_device(&cluster.operator(), "", "m", "stolen", 0),
    )
    .await
    .unwrap();
    assert_eq!((revoked.enforced, revoked.pending), (vec![1], vec![]));
    assert_eq!(soon(closer).await.unwrap(), End::Revoked);
    assert_eq!(soon(reader).await.unwrap(), Some(goodbye(End::Revoked)));
    assert_eq!(
        (
            cluster.control.session_count(),
            cluster.control.connection_count()
        ),
        (0, 0)
    );

    for refused in [
        cluster.control.admit_node(node.peer()).unwrap_err(),
        cluster
            .control
            .accept(node.peer(), "192.0.2.1")
            .unwrap_err()
            .error,
        node.attach(&cluster, &[]).await.unwrap_err(),
        cluster
            .control
            .report(node.peer(), &device, succeeded(node.device_id, 1))
            .await
            .unwrap_err(),
    ] {
        assert_eq!(code(&refused), Some(Code::DeviceRevoked), "{refused:?}");
    }
    let again = soon(
        cluster
            .control
            .revoke_device(&cluster.operator(), "", &device, "", 0),
    )
    .await
    .unwrap();
    assert_eq!(
        again.index, revoked.index,
        "revoking it again answers the first time's index"
    );
}

#[tokio::test]
async fn a_connection_that_does_not_close_is_named_as_pending() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let stuck = cluster.control.accept(node.peer(), "192.0.2.1").unwrap();
    let revoked = soon(
        cluster
            .control
            .revoke_device(&cluster.operator(), "", "m", "", 50),
    )
    .await
    .unwrap();
    assert_eq!((revoked.enforced, revoked.pending), (vec![], vec![1]));
    drop(stuck);
    let later = soon(cluster.control.revoke_device(&cluster.operator(), "", "m", "", 0))
        .await
        .unwrap();
    assert_eq!(
        (later.index, later.enforced),
        (revoked.index, vec![1]),
        "the name still finds it"
    );
}

#[tokio::test]
async fn certificates_of_others_are_refused() {
    let cluster = Cluster::found().await;
    let elsewhere = Cluster::found().await;
    let node = cluster.node("m").await;
    assert_eq!(
        elsewhere.control.admit_node(node.peer()).unwrap_err().code(),
        "E1003",
        "another cluster"
    );
    assert_eq!(
        cluster.control.admit_node(&cluster.admin).unwrap_err().code(),
        "E1001",
        "an operator is no node"
    );
    let role = palyra_state::access::Role::Viewer;
    let refused = cluster.control.admit_operator(node.peer(), role).unwrap_err();
    assert_eq!(refused.code(), "E1001", "a node is no operator");

    // Signed by the very root, and never recorded.
    let key = KeyPair::generate(&mut palyra_platform::fill_random).unwrap();
    let csr = key.make_csr().unwrap();
    let id = SpiffeId::new(cluster.domain.clone(), Role::Node, &node.device_id.to_string()).unwrap();
    let now = palyra_platform::wall_ms();
    let names = HostNames::default();
    let forged = cluster
        .root
        .issue_from_csr(&csr, &id, 60_000, &names, now, &mut palyra_platform::fill_random)
        .unwrap();
    let forged = PeerIdentity::from_der(&forged.der).unwrap();
    assert_eq!(
        code(&cluster.control.admit_node(&forged).unwrap_err()),
        Some(Code::CertificateUnknown)
    );

    let mut expired = node.peer().clone();
    expired.not_after_ms = now - 1;
    assert_eq!(
        code(&cluster.control.admit_node(&expired).unwrap_err()),
        Some(Code::CertificateExpired)
    );
}

#[tokio::test]
async fn a_node_can_live_from_poll_to_poll() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let device = node.device_id.to_string();
    let attach = AttachRequest {
        device_id: device.clone(),
        held: Vec::new(),
        held_attempts: Vec::new(),
        transport: Transport::Poll,
        fallback: String::new(),
        connection: 0,
    };
    let control = &cluster.control;
    let first = soon(control.poll(node.peer(), &device, 0, Some(attach), 1))
        .await
        .unwrap();
    assert!(first.messages.is_empty());
    let waiting = {
        let (control, peer, device) = (control.clone(), node.peer().clone(), device.clone());
        palyra_platform::spawn(async move { control.poll(&peer, &device, first.epoch, None, 20_000).await })
    };
    let (submitted, _) = control
        .invoke(&cluster.operator(), node.invoke("echo", "{}"))
        .await
        .unwrap();
    let answer = soon(waiting).await.unwrap().unwrap();
    let [Outbound::Assignment(assignment)] = answer.messages.as_slice() else {
        panic!("{answer:?}")
    };
    assert_eq!(assignment.dispatch_id, submitted.record.id);
    let done = control
        .report(
            node.peer(),
            &device,
            succeeded(assignment.dispatch_id, first.epoch),
        )
        .await
        .unwrap();
    assert!(done.accepted);
    let error = soon(control.poll(node.peer(), &device, first.epoch + 1, None, 1))
        .await
        .unwrap_err();
    assert_eq!(error.code(), "E1040", "a session that is not there");
}

#[tokio::test]
async fn a_node_that_waits_for_us_is_not_silent() {
    let timings = Timings {
        heartbeat_interval: Duration::from_millis(10),
        heartbeat_timeout: Duration::from_millis(20),
        ..quick()
    };
    let cluster = Cluster::found_with(timings, Limits::default()).await;
    let node = cluster.node("m").await;
    let device = node.device_id.to_string();
    let attach = AttachRequest {
        device_id: device.clone(),
        held: Vec::new(),
        held_attempts: Vec::new(),
        transport: Transport::Poll,
        fallback: String::new(),
        connection: 0,
    };
    let answer = soon(cluster.control.poll(node.peer(), &device, 0, Some(attach), 500));
    assert_eq!(answer.await.unwrap().messages, vec![], "no goodbye");
}

#[tokio::test]
async fn a_stream_that_is_not_read_to_its_goodbye_loses_its_connection() {
    let timings = Timings {
        stall_timeout: Duration::from_millis(50),
        ..quick()
    };
    let cluster = Cluster::found_with(timings, Limits::default()).await;
    let node = cluster.node("m").await;
    let connection = cluster.control.accept(node.peer(), "192.0.2.1").unwrap();
    let attach = AttachRequest {
        device_id: node.device_id.to_string(),
        held: Vec::new(),
        held_attempts: Vec::new(),
        transport: Transport::Stream,
        fallback: String::new(),
        connection: connection.id(),
    };
    let unread = soon(cluster.control.attach(node.peer(), attach)).await.unwrap();
    let newer = node.attach(&cluster, &[]).await.unwrap();
    assert_eq!(soon(connection.closed()).await, End::SlowReader);
    drop(unread);
    let device = node.device_id.to_string();
    let alive = newer
        .receive(node.peer(), &device, Inbound::Heartbeat { sequence: 1 })
        .await;
    assert_eq!(alive, Ok(()), "the newer session is on another connection");
}

#[tokio::test]
async fn one_device_cannot_fill_the_registry() {
    let limits = Limits {
        sessions_per_device: 2,
        ..Limits::default()
    };
    let cluster = Cluster::found_with(quick(), limits).await;
    let (node, other) = (cluster.node("m").await, cluster.node("o").await);
    let first = node.attach(&cluster, &[]).await.unwrap();
    let _second = node.attach(&cluster, &[]).await.unwrap();
    assert!(matches!(
        node.attach(&cluster, &[]).await,
        Err(Error::Busy { .. })
    ));
    let _other = other.attach(&cluster, &[]).await.unwrap();
    let last = next(&first.outgoing()).await;
    assert_eq!(last, Some(goodbye(End::Superseded)));
    drop(first);
    node.attach(&cluster, &[]).await.unwrap();
}

#[tokio::test]
async fn an_idle_cluster_writes_nothing() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let _session = node.attach(&cluster, &[]).await.unwrap();
    // The pairing's completion is noted in the background.
    let mut applied = cluster.replica.applied();
    let quiet = Duration::from_millis(1_500);
    while palyra_platform::timeout(quiet, applied.changed()).await.is_ok() {}
    let before = cluster.last_log();
    // Three passes of the reconcilers and many of the watch over sessions.
    assert!(palyra_platform::timeout(quiet, applied.changed()).await.is_err());
    assert_eq!(cluster.last_log(), before);
}

#[tokio::test]
async fn a_session_that_nobody_holds_is_detached() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    // An attach that was committed after its caller had gone, or by an earlier run of this process.
    let caller = cluster.control.admit_node(node.peer()).unwrap();
    let attach = nodes::Attach {
        device_id: node.device_id,
        replica_id: 1,
        transport: "stream".to_owned(),
        held: Vec::new(),
        held_attempts: Vec::new(),
        fallback: String::new(),
    };
    let envelope = palyra_state::Envelope::new(fresh_id(), caller.actor(), attach);
    cluster.replica.propose(envelope).await.unwrap().reply.unwrap();
    detached(&cluster, &node).await;
}

#[tokio::test]
async fn what_is_full_says_so() {
    let limits = Limits {
        connections: 1,
        sessions: 1,
        ..Limits::default()
    };
    let cluster = Cluster::found_with(quick(), limits).await;
    let (one, two) = (cluster.node("one").await, cluster.node("two").await);
    let held = cluster.control.accept(one.peer(), "192.0.2.1").unwrap();
    let refused = cluster.control.accept(two.peer(), "192.0.2.1").unwrap_err();
    assert!(refused.stays.is_none(), "nothing keeps it");
    let busy = refused.error;
    assert!(matches!(busy, Error::Busy { .. }) && busy.is_retryable());
    drop(held);
    cluster.control.accept(two.peer(), "192.0.2.1").unwrap();
    let _session = one.attach(&cluster, &[]).await.unwrap();
    assert!(matches!(two.attach(&cluster, &[]).await, Err(Error::Busy { .. })));
}

#[tokio::test]
async fn a_replica_that_stops_says_goodbye_and_tells_the_state() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    let control = cluster.control.clone();
    let stopping = palyra_platform::spawn(async move { control.shutdown().await });
    assert_eq!(next(&session.outgoing()).await, Some(goodbye(End::Draining)));
    soon(stopping).await.unwrap();
    let state = nodes::node(&cluster.replica.view(), node.device_id).unwrap();
    assert_eq!(
        (state.status(), state.status_reason.as_str()),
        (NodeStatus::Online, "draining"),
        "it was sent to another replica, and is not late yet"
    );
    let late = node.attach(&cluster, &[]).await.unwrap_err();
    assert_eq!(
        (late.code().as_str(), late.is_retryable()),
        ("E1050", true),
        "{late:?}"
    );
    assert!(late.pace().is_some_and(|pace| !pace.spread.is_zero()));
}
