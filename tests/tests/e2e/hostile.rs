//! Nodes that don't behave: they get a stable code, and nobody else notices.

use palyra_client::{ConnectOptions, connect};
use palyra_pki::tls::SeenServer;
use palyra_pki::{Credential, KeyPair};
use palyra_proto::dispatch::v1::{GetRequest, ListRequest};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::fleet_service_client::FleetServiceClient;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::node_service_client::NodeServiceClient;
use palyra_proto::node::v1::server_message::Body as Said;
use palyra_proto::pairing::v1 as pairing;
use palyra_proto::pairing::v1::enrol_service_client::EnrolServiceClient;
use palyra_tests::cluster::{Cluster, eventually};
use palyra_tests::node::{Puppet, dial, forged, identity, refusal, registration};
use tonic::transport::Channel;
use tonic::{Code, Request};

use crate::dispatch::{invoke, request};

fn queued(device_id: &str) -> palyra_proto::dispatch::v1::InvokeRequest {
    let mut request = request(device_id, "echo", "{\"n\":1}");
    request.wait_ms = 0;
    request
}

#[allow(clippy::too_many_lines)] // one story
pub(crate) async fn results_late_foreign_or_twice(cluster: &mut Cluster) {
    let (mine, theirs) = (
        cluster.pair_node("puppet-a").await,
        cluster.pair_node("puppet-b").await,
    );
    let mut a = Puppet::attach(&mine, &cluster.node_addr(1), vec![])
        .await
        .unwrap();
    let mut b = Puppet::attach(&theirs, &cluster.node_addr(2), vec![])
        .await
        .unwrap();
    let first = invoke(cluster, 3, queued(&a.device_id)).await;
    assert_eq!(a.assigned().await.dispatch_id, first.id);

    let foreign = b.report(b.result(&first.id, "\"stolen\"")).await;
    assert_eq!((foreign.accepted, foreign.error_code.as_str()), (false, "E0608"));
    let mut stale = a.result(&first.id, "1");
    stale.epoch -= 1;
    let stale = a.report(stale).await;
    assert_eq!((stale.accepted, stale.error_code.as_str()), (false, "E0609"));
    let bad = a.report(a.result(&first.id, "{")).await;
    assert!(!bad.accepted && !bad.error_code.is_empty(), "no JSON: {bad:?}");
    let large = a
        .report(a.result(&first.id, &format!("\"{}\"", "x".repeat(512 * 1024))))
        .await;
    assert_eq!((large.accepted, large.error_code.as_str()), (false, "E0603"));

    let good = a.result(&first.id, "\"mine\"");
    let accepted = a.report(good.clone()).await;
    assert!(accepted.accepted, "{accepted:?}");
    let again = a.report(good).await;
    assert!(
        again.accepted,
        "the same request id is answered, not applied again: {again:?}"
    );
    let twice = a.report(a.result(&first.id, "\"changed\"")).await;
    assert_eq!((twice.accepted, twice.error_code.as_str()), (false, "E0606"));
    let unknown = a.report(a.result("01JD7ZA1B2C3D4E5F6G7H8J9K0", "1")).await;
    assert_eq!((unknown.accepted, unknown.error_code.as_str()), (false, "E0605"));

    let mut short = queued(&a.device_id);
    short.timeout_ms = 200;
    let late = invoke(cluster, 2, short).await;
    let ended = cluster
        .client()
        .wait_dispatch(&late.id, 20_000)
        .await
        .unwrap()
        .dispatch
        .unwrap();
    assert_eq!(ended.state, "timed_out");
    // Noted once, so that people hear of it and the node forgets it; its end stays.
    let noted = a.report(a.result(&late.id, "1")).await;
    assert!(noted.accepted && noted.late, "{noted:?}");
    let again = a.report(a.result(&late.id, "2")).await;
    assert_eq!((again.accepted, again.error_code.as_str()), (false, "E0607"));
    let shown = cluster.palyra(&["job", "get", &late.id]).ok();
    assert!(
        shown.out.contains("timed_out") && shown.out.contains("the node said: succeeded"),
        "{}",
        shown.out
    );
    let get = GetRequest {
        id: first.id,
        ..Default::default()
    };
    let kept = cluster
        .client()
        .get_dispatch(get)
        .await
        .unwrap()
        .dispatch
        .unwrap();
    assert_eq!(
        (kept.state.as_str(), &kept.result[..]),
        ("succeeded", &b"\"mine\""[..])
    );
}

pub(crate) async fn messages_in_anothers_name(cluster: &mut Cluster) {
    let (mine, theirs) = (cluster.pair_node("liar").await, cluster.pair_node("victim").await);
    let address = cluster.node_addr(3);
    let mut victim = Puppet::attach(&theirs, &cluster.node_addr(1), vec![])
        .await
        .unwrap();
    let mut liar = Puppet::attach(&mine, &address, vec![]).await.unwrap();
    liar.say_as(
        &victim.device_id,
        Body::Heartbeat(wire::Heartbeat { sequence: 1 }),
    )
    .await;
    let status = loop {
        match liar.hear().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without saying why"),
            Err(status) => break status,
        }
    };
    assert_eq!(refusal(&status).0, "E0310", "{status}");
    for claimed in [victim.device_id.as_str(), "no ulid", ""] {
        let status = liar.client.register(registration(claimed)).await.unwrap_err();
        assert!(!refusal(&status).0.is_empty(), "{claimed:?}: {status}");
    }
    let first = wire::NodeMessage {
        device_id: liar.device_id.clone(),
        body: Some(Body::Heartbeat(wire::Heartbeat { sequence: 1 })),
    };
    let status = liar
        .client
        .session(tokio_stream::iter([first]))
        .await
        .unwrap_err();
    assert_eq!(
        refusal(&status).0,
        "E1041",
        "the first message must be Attach: {status}"
    );
    // The victim's session is what it was.
    let done = invoke(cluster, 2, queued(&victim.device_id)).await;
    assert_eq!(victim.assigned().await.dispatch_id, done.id);
    assert!(victim.report(victim.result(&done.id, "1")).await.accepted);
    // A second session of the same device ends the first, and says so.
    let _second = Puppet::attach(&theirs, &cluster.node_addr(2), vec![])
        .await
        .unwrap();
    let goodbye = loop {
        match victim.hear().await.unwrap() {
            Some(Said::Goodbye(goodbye)) => break goodbye,
            Some(_) => {}
            None => panic!("no goodbye"),
        }
    };
    assert_eq!(goodbye.code, "superseded");
}

pub(crate) async fn certificates_for_their_role_only(cluster: &mut Cluster) {
    let dir = cluster.pair_node("climber").await;
    let (device_id, node) = identity(&dir);
    let operator = cluster.operator();
    let channel = dial(&operator, &cluster.node_addr(1)).await.unwrap();
    let status = NodeServiceClient::new(channel)
        .register(registration(&device_id))
        .await
        .unwrap_err();
    assert_eq!(refusal(&status).0, "E1001", "an operator is no node: {status}");
    let channel = dial(&node, &cluster.node_addr(1)).await.unwrap();
    let list = wire::ListNodesRequest::default();
    let status = FleetServiceClient::new(channel)
        .list_nodes(list)
        .await
        .unwrap_err();
    assert_eq!(refusal(&status).0, "E1001", "a node is no operator: {status}");
    // The port between replicas doesn't even complete a handshake with either.
    for credential in [&node, &operator] {
        let peers = format!("127.0.0.1:{}", cluster.port(1, 4));
        let refused = match dial(credential, &peers).await {
            Err(_) => true,
            // In TLS 1.3 the client learns of it with the first answer.
            Ok(channel) => FleetServiceClient::new(channel)
                .list_nodes(list_nodes())
                .await
                .is_err(),
        };
        assert!(refused);
    }
}

fn list_nodes() -> Request<wire::ListNodesRequest> {
    Request::new(wire::ListNodesRequest::default())
}

pub(crate) async fn another_clusters_certificate(cluster: &mut Cluster) {
    let dir = cluster.pair_node("original").await;
    let (device_id, real) = identity(&dir);
    let credential = forged(&device_id, &real);
    for id in 1..=3 {
        let words = match dial(&credential, &cluster.node_addr(id)).await {
            Err(error) => error.to_string(),
            Ok(channel) => {
                let called = NodeServiceClient::new(channel)
                    .register(registration(&device_id))
                    .await;
                refusal(&called.unwrap_err()).1
            }
        };
        assert!(words.contains("another cluster"), "at replica {id}: {words}");
    }
    Puppet::attach(&dir, &cluster.node_addr(1), vec![]).await.unwrap();
}

pub(crate) async fn a_reader_that_stalls_holds_up_nobody(cluster: &mut Cluster) {
    let (stalled, lively) = (
        cluster.pair_node("stalled").await,
        cluster.pair_node("lively").await,
    );
    let asleep = Puppet::attach(&stalled, &cluster.node_addr(1), vec![])
        .await
        .unwrap();
    let mut awake = Puppet::attach(&lively, &cluster.node_addr(1), vec![])
        .await
        .unwrap();
    let client = cluster.client_at(2);
    let payload = format!("\"{}\"", "x".repeat(400 * 1024));
    for _ in 0..12 {
        let mut large = request(&asleep.device_id, "echo", &payload);
        (large.wait_ms, large.timeout_ms) = (0, 600_000);
        client.invoke(large).await.unwrap();
    }
    let sent = invoke(cluster, 3, queued(&awake.device_id)).await;
    assert_eq!(awake.assigned().await.dispatch_id, sent.id);
    assert!(awake.report(awake.result(&sent.id, "1")).await.accepted);
    let ended = client
        .wait_dispatch(&sent.id, 5_000)
        .await
        .unwrap()
        .dispatch
        .unwrap();
    assert_eq!(ended.state, "succeeded");
    // All that while the other's work has stood still: nobody waited for it.
    let list = ListRequest {
        device_id: asleep.device_id.clone(),
        ..Default::default()
    };
    let held = client.list_dispatches(list).await.unwrap().dispatches;
    assert_eq!(held.len(), 12);
    assert!(
        held.iter()
            .all(|dispatch| ["queued", "dispatched"].contains(&dispatch.state.as_str())),
        "{held:?}"
    );
}

async fn enrol(cluster: &Cluster) -> EnrolServiceClient<Channel> {
    let tls = connect::enrol_recording(SeenServer::new()).unwrap();
    let options = ConnectOptions::default();
    EnrolServiceClient::new(
        connect::connect(&cluster.enrol_addr(2), &tls, &options)
            .await
            .unwrap(),
    )
}

pub(crate) async fn pairing_messages_out_of_order(cluster: &mut Cluster) {
    let mut client = enrol(cluster).await;
    let finish = pairing::FinishPinRequest {
        attempt_id: palyra_client::new_ulid(),
        ke3: vec![0; 64].into(),
        csr: vec![0; 100].into(),
        proof: vec![0; 32].into(),
        device_name: "x".to_owned(),
        request_id: palyra_client::new_ulid(),
    };
    let status = client.finish_pin(finish.clone()).await.unwrap_err();
    assert_eq!(refusal(&status).0, "E1020", "nothing was begun: {status}");
    let (_pin, code_number) = cluster.mint(1).await;
    let begin = pairing::BeginPinRequest {
        code_number,
        device_id: palyra_client::new_ulid(),
        ke1: vec![1; 95].into(),
        csr_sha256: vec![0; 32].into(),
        node_nonce: vec![0; 32].into(),
    };
    for (name, begin) in [
        ("truncated", begin.clone()),
        (
            "no ULID",
            pairing::BeginPinRequest {
                device_id: "x".to_owned(),
                ke1: vec![1; 96].into(),
                ..begin.clone()
            },
        ),
        (
            "short nonce",
            pairing::BeginPinRequest {
                node_nonce: vec![0; 31].into(),
                ..begin.clone()
            },
        ),
    ] {
        let status = client.begin_pin(begin).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name}: {status}");
    }
    let oversized = pairing::BeginPinRequest {
        ke1: vec![1; 4 << 20].into(),
        ..begin
    };
    assert!(client.begin_pin(oversized).await.is_err());
}

pub(crate) async fn a_nonce_on_another_connection(cluster: &mut Cluster) {
    let mut first = enrol(cluster).await;
    let nonce = first
        .hello(pairing::HelloRequest {})
        .await
        .unwrap()
        .into_inner()
        .server_nonce;
    let ticket = pairing::ProveTicketRequest {
        ticket_id: palyra_client::new_ulid(),
        device_id: palyra_client::new_ulid(),
        csr: KeyPair::generate(&mut palyra_client::fill_random)
            .unwrap()
            .make_csr()
            .unwrap()
            .into(),
        node_nonce: vec![0; 32].into(),
        server_nonce: nonce,
        proof: vec![0; 32].into(),
        device_name: "x".to_owned(),
        request_id: palyra_client::new_ulid(),
    };
    let status = enrol(cluster).await.prove_ticket(ticket).await.unwrap_err();
    assert_eq!(refusal(&status).0, "E1023", "{status}");
    // Whoever asks for an outcome with a wrong token learns nothing, and the listener goes on.
    let fetch = pairing::FetchRequest {
        pairing_id: palyra_client::new_ulid(),
        fetch_token: vec![0; 32].into(),
        wait_ms: 0,
    };
    let status = enrol(cluster).await.fetch(fetch).await.unwrap_err();
    assert_eq!(refusal(&status).0, "E1026", "{status}");
    eventually("the listener to serve on", async || {
        enrol(cluster).await.hello(pairing::HelloRequest {}).await.ok()
    })
    .await;
}

pub(crate) async fn a_node_without_streams_polls(cluster: &mut Cluster) {
    let dir = cluster.pair_node("poller").await;
    let (device_id, credential) = identity(&dir);
    let mut client = NodeServiceClient::new(dial(&credential, &cluster.node_addr(2)).await.unwrap());
    client.register(registration(&device_id)).await.unwrap();
    let attach = wire::Attach {
        request_id: palyra_client::new_ulid(),
        held: vec![],
        ..wire::Attach::default()
    };
    let poll = |epoch: u64, attach: Option<wire::Attach>| wire::PollRequest {
        device_id: device_id.clone(),
        epoch,
        // Attaching waits for work as well; there is none yet.
        wait_ms: if attach.is_some() { 0 } else { 5_000 },
        attach,
        leave: false,
        ..wire::PollRequest::default()
    };
    let epoch = client
        .poll(poll(0, Some(attach)))
        .await
        .unwrap()
        .into_inner()
        .epoch;
    assert_ne!(epoch, 0);
    let mut second = client.clone();
    let (sent, polled) = tokio::join!(
        invoke(cluster, 1, queued(&device_id)),
        second.poll(poll(epoch, None))
    );
    let mut messages = polled.unwrap().into_inner().messages;
    if messages.is_empty() {
        messages = client
            .poll(poll(epoch, None))
            .await
            .unwrap()
            .into_inner()
            .messages;
    }
    let Some(Said::Assignment(assignment)) = messages.remove(0).body else {
        panic!("no assignment")
    };
    assert_eq!(
        (assignment.dispatch_id.as_str(), assignment.epoch),
        (sent.id.as_str(), epoch)
    );
    let result = palyra_tests::node::succeeded(&sent.id, epoch, "[true]");
    let report = wire::ReportRequest {
        device_id: device_id.clone(),
        result: Some(result),
    };
    let answer = client.report(report).await.unwrap().into_inner().answer.unwrap();
    assert!(answer.accepted, "{answer:?}");
    let ended = cluster
        .client()
        .wait_dispatch(&sent.id, 5_000)
        .await
        .unwrap()
        .dispatch
        .unwrap();
    assert_eq!(
        (ended.state.as_str(), &ended.result[..]),
        ("succeeded", &b"[true]"[..])
    );
    let stale = client.poll(poll(epoch - 1, None)).await.unwrap_err();
    assert!(!refusal(&stale).0.is_empty(), "{stale}");
}

/// Both work until the new one is first used; then the old one is refused, by every replica.
pub(crate) async fn a_renewed_certificate_works_beside_the_old(cluster: &mut Cluster) {
    let dir = cluster.pair_node("renewer").await;
    let (device_id, old) = identity(&dir);
    let mut client = NodeServiceClient::new(dial(&old, &cluster.node_addr(1)).await.unwrap());
    let key = KeyPair::generate(&mut palyra_client::fill_random).unwrap();
    let renew = |device_id: &str, csr: Vec<u8>| wire::RenewRequest {
        request_id: palyra_client::new_ulid(),
        device_id: device_id.to_owned(),
        csr: csr.into(),
        counter: 1,
    };
    let csr = key.make_csr().unwrap();
    for (name, request) in [
        ("no CSR", renew(&device_id, vec![1, 2, 3])),
        ("another device", renew("01JD7ZA1B2C3D4E5F6G7H8J9K0", csr.clone())),
    ] {
        let status = client.renew(request).await.unwrap_err();
        assert!(!refusal(&status).0.is_empty(), "{name}: {status}");
    }
    let chain = client
        .renew(renew(&device_id, csr))
        .await
        .unwrap()
        .into_inner()
        .chain;
    let chain: Vec<Vec<u8>> = chain.iter().map(|der| der.to_vec()).collect();
    let new = Credential::new(&old.trust().unwrap(), old.endpoints.clone(), &chain, &key).unwrap();
    assert_eq!(new.identity().unwrap().id.id(), device_id);
    for (credential, at) in [(&old, 3), (&new, 2), (&new, 1)] {
        let channel = dial(credential, &cluster.node_addr(at)).await.unwrap();
        let registered = eventually("the certificate to be known", async || {
            let mut client = NodeServiceClient::new(channel.clone());
            client.register(registration(&device_id)).await.ok()
        });
        registered.await;
    }
    for at in 1..=3 {
        let channel = dial(&old, &cluster.node_addr(at)).await.unwrap();
        eventually("the old certificate to be refused", async || {
            let mut client = NodeServiceClient::new(channel.clone());
            let refused = client.register(registration(&device_id)).await.err()?;
            (refusal(&refused).0 == "E0312").then_some(())
        })
        .await;
    }
}
