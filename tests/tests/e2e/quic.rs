//! Nodes over QUIC: an agent that has nothing else, one whose datagrams get lost, and a client by hand.

use std::net::UdpSocket;
use std::path::Path;

use palyra_client::error::Failure;
use palyra_client::{Connection, QuicConnection, QuicOptions, new_ulid, quic};
use palyra_pki::{Credential, KeyPair};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message::Body as Said;
use palyra_tests::cluster::{Cluster, eventually};
use palyra_tests::node::{identity, registration};
use tokio::sync::mpsc;

const QUIC_PORT: u16 = 3;

fn quic_addr(cluster: &Cluster, id: u64) -> String {
    format!("127.0.0.1:{}", cluster.port(id, QUIC_PORT))
}

async fn dial(credential: &Credential, address: &str) -> Result<QuicConnection, palyra_client::ConnectError> {
    let (identity, trust) = credential.for_tls().unwrap();
    let tls = quic::mutual(trust, identity, None).unwrap();
    quic::connect(address, &tls, &QuicOptions::default()).await
}

fn prefer(dir: &Path, transport: &str) {
    std::fs::write(dir.join("node.toml"), format!("transport = \"{transport}\"\n")).unwrap();
}

fn refusal<A>(answer: Result<A, Failure>) -> String {
    match answer {
        Ok(_) => "it was answered".to_owned(),
        Err(Failure::Answered(error)) => error.code,
        Err(Failure::Lost { cause, .. }) => format!("lost: {cause}"),
    }
}

/// The newest row of an attach of this node, as the journal shows it.
fn attach_row(cluster: &Cluster, device_id: &str) -> String {
    let rows = cluster
        .palyra(&["journal", "tail", "--last", "200", "-o", "json"])
        .ok()
        .out;
    let page: serde_json::Value = serde_json::from_str(&rows).unwrap();
    let mut newest_first = page["items"].as_array().unwrap().iter().rev();
    newest_first
        .find(|row| row["action"] == "node.attached" && row["subject"] == device_id)
        .unwrap_or_else(|| panic!("no row in {rows}"))
        .to_string()
}

pub(crate) async fn a_node_lives_on_quic_alone(cluster: &mut Cluster) {
    let dir = cluster.pair_node("udp-only").await;
    let (device_id, credential) = identity(&dir);
    prefer(&dir, "quic");
    let mut agent = cluster.start_node(&dir, None);
    let node = cluster.online(&device_id).await;
    assert_eq!(
        (node.transport.as_str(), node.transport_fallback.as_str()),
        ("quic", "")
    );
    assert!(attach_row(cluster, &device_id).contains("quic"));
    let echoed = cluster
        .palyra(&[
            "node",
            "invoke",
            "udp-only",
            "echo",
            "--input",
            "{\"a\":1}",
            "--wait",
            "-o",
            "json",
        ])
        .ok();
    assert!(echoed.out.contains("succeeded"), "{}", echoed.out);
    // The largest payload passes both ways, in several frames.
    let large = format!("\"{}\"", "x".repeat(512 * 1024 - 2));
    let file = cluster.path().join("large.json");
    std::fs::write(&file, &large).unwrap();
    let input = format!("@{}", file.display());
    let echoed = cluster
        .palyra(&[
            "node", "invoke", "udp-only", "echo", "--input", &input, "--wait", "-o", "json",
        ])
        .ok();
    assert!(echoed.out.contains("xxxxxxxx") && echoed.out.contains("succeeded"));

    // By hand, beside the agent, at each replica: a renewal, and then a revocation that closes the connection.
    let mut open = Vec::new();
    for id in 1..=3 {
        open.push(dial(&credential, &quic_addr(cluster, id)).await.unwrap());
    }
    let key = KeyPair::generate(&mut palyra_client::fill_random).unwrap();
    let by_hand = Connection::Quic(open[0].clone());
    let renewed = by_hand.renew(wire::RenewRequest {
        request_id: new_ulid(),
        device_id: device_id.clone(),
        csr: key.make_csr().unwrap().into(),
        counter: 1,
    });
    assert_eq!(renewed.await.unwrap().chain.len(), 2);
    let revoked = cluster.palyra(&["device", "revoke", &device_id, "--reason", "lost", "-o", "json"]);
    assert_eq!(revoked.code, 0, "{}{}", revoked.out, revoked.err);
    for connection in &open {
        let answer = refusal(connection.health().await);
        assert!(
            answer.contains("revoked"),
            "the connection was open still: {answer}"
        );
    }
    assert_eq!(
        agent.ended().await,
        3,
        "{}",
        std::fs::read_to_string(&agent.log).unwrap()
    );
    for id in 1..=3 {
        let again = dial(&credential, &quic_addr(cluster, id)).await.unwrap();
        let answer = Connection::Quic(again).register(registration(&device_id)).await;
        assert_eq!(refusal(answer), "E0302");
    }
}

pub(crate) async fn without_udp_a_node_falls_back_and_says_so(cluster: &mut Cluster) {
    let dir = cluster.pair_node("no-udp").await;
    let (device_id, _) = identity(&dir);
    // Datagrams go there and nothing comes back, as behind a firewall.
    let hole = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = hole.local_addr().unwrap().to_string();
    let file = dir.join("identity/node.json");
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for replica in record["replicas"].as_array_mut().unwrap() {
        replica["quic_addr"] = address.clone().into();
    }
    std::fs::write(&file, serde_json::to_vec(&record).unwrap()).unwrap();
    let agent = cluster.start_node(&dir, None);
    let node = cluster.online(&device_id).await;
    assert_eq!(node.transport, "stream");
    let why = format!("QUIC to {address}: no answer over UDP");
    assert!(
        node.transport_fallback.starts_with(&why),
        "{}",
        node.transport_fallback
    );
    assert!(attach_row(cluster, &device_id).contains(&why));
    let folder = dir.display().to_string();
    let told = cluster
        .palyra(&["node", "status", "--data-dir", &folder])
        .ok()
        .out;
    assert!(told.contains("over stream") && told.contains(&why), "{told}");
    let shown = cluster.palyra(&["node", "describe", "no-udp"]);
    assert!(shown.out.contains(&why), "{}{}", shown.out, shown.err);
    drop(agent);
}

pub(crate) async fn a_session_survives_a_change_of_address(cluster: &mut Cluster) {
    let dir = cluster.pair_node("roamer").await;
    let (device_id, credential) = identity(&dir);
    let quic = dial(&credential, &quic_addr(cluster, 2)).await.unwrap();
    let connection = Connection::Quic(quic.clone());
    connection.register(registration(&device_id)).await.unwrap();
    let (say, said) = mpsc::channel(4);
    let message = |body| wire::NodeMessage {
        device_id: device_id.clone(),
        body: Some(body),
    };
    say.send(message(Body::Attach(wire::Attach::default())))
        .await
        .unwrap();
    let mut heard = connection.session(said).await.unwrap();
    let first = heard.message().await.unwrap().unwrap().body;
    let Some(Said::Attached(attached)) = first else {
        panic!("{first:?}")
    };
    quic.rebind(UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap();
    say.send(message(Body::Heartbeat(wire::Heartbeat { sequence: 7 })))
        .await
        .unwrap();
    let answer = heard.message().await.unwrap().unwrap().body;
    assert_eq!(
        answer,
        Some(Said::Heartbeat(wire::HeartbeatAnswer { sequence: 7 }))
    );
    assert_eq!(cluster.online(&device_id).await.session_epoch, attached.epoch);
    drop((say, heard, connection, quic));
    let client = cluster.client();
    eventually("the end of the session", async || {
        let request = wire::GetNodeRequest {
            device_id: device_id.clone(),
            ..Default::default()
        };
        let node = client.get_node(request).await.ok()?.node?;
        (node.session_epoch == 0).then_some(())
    })
    .await;
}
