//! How machines become nodes, and how they don't.

use std::time::Duration;

use palyra_client::{ConnectOptions, connect};
use palyra_node::PairMethod;
use palyra_pki::tls::SeenServer;
use palyra_proto::cluster::v1::JoinRequest;
use palyra_proto::pairing::v1::{
    ApproveRequest, BeginPinRequest, FetchRequest, FinishPinRequest, ListCodesRequest, MintPinRequest,
    MintTicketRequest, ProveTicketRequest, RejectRequest, RevokeCodeRequest,
};
use palyra_tests::cluster::Cluster;
use palyra_tests::node::{Heard, by_pin, identity, pair_folder, refusal};
use prost::Message as _;
use prost::bytes::{Buf, BufMut};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Request, Status};
use zeroize::Zeroizing;

const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(300);

pub(crate) async fn a_pin_pairs_across_three_replicas(cluster: &mut Cluster) {
    let (pin, code) = cluster.mint(1).await;
    let ui = Heard::default();
    let dir = cluster.path().join("by-pin");
    // The first address is nobody's: the node goes to the next one.
    let endpoints = ["127.0.0.1:1".to_owned(), cluster.enrol_addr(2)];
    let approve = async {
        let request = cluster.request_of("by-pin", 3).await;
        assert_eq!((request.method.as_str(), request.served_by), ("pin", 2));
        assert_eq!(request.sas, ui.sas().await, "both screens show the same digits");
        let client = cluster.client_at(3);
        let other = if request.sas == "000 000" {
            "000 001"
        } else {
            "000 000"
        };
        let wrong = ApproveRequest {
            id: request.id.clone(),
            sas: other.to_owned(),
            ..Default::default()
        };
        assert_eq!(client.approve(wrong).await.unwrap_err().code, "E0416");
        let sas = request.sas.clone();
        client
            .approve(ApproveRequest {
                id: request.id,
                sas,
                ..Default::default()
            })
            .await
            .unwrap();
    };
    let (paired, ()) = tokio::join!(
        pair_folder(&dir, by_pin(&pin, code, &endpoints), LONG, &ui),
        approve
    );
    let paired = paired.unwrap();
    let (device_id, credential) = identity(&dir);
    assert_eq!(device_id, paired.device_id);
    assert_eq!(credential.identity().unwrap().id.id(), device_id);
    assert_eq!(credential.endpoints.len(), 3, "the node knows all replicas");
    let used = pair_folder(
        &cluster.path().join("late"),
        by_pin(&pin, code, &endpoints),
        LONG,
        &Heard::default(),
    )
    .await;
    assert_eq!(used.unwrap_err().code, "E0402");
}

pub(crate) async fn a_ticket_pairs(cluster: &mut Cluster) {
    let minted = cluster
        .client_at(2)
        .mint_ticket(MintTicketRequest::default())
        .await
        .unwrap();
    let method = || PairMethod::Ticket(Zeroizing::new(minted.ticket.clone()));
    let ui = Heard::default();
    let dir = cluster.path().join("by-ticket");
    let approve = async {
        let request = cluster.request_of("by-ticket", 1).await;
        assert_eq!(
            (request.method.as_str(), request.sas.clone()),
            ("ticket", ui.sas().await)
        );
        cluster
            .client_at(1)
            .approve(ApproveRequest {
                id: request.id,
                ..Default::default()
            })
            .await
            .unwrap();
    };
    let (paired, ()) = tokio::join!(pair_folder(&dir, method(), LONG, &ui), approve);
    paired.unwrap();
    let again = pair_folder(&cluster.path().join("late"), method(), LONG, &Heard::default())
        .await
        .unwrap_err();
    assert_eq!(again.code, "E0402", "{again}");
    let mut bent = minted.ticket.clone();
    let last = if bent.pop() == Some('A') { 'B' } else { 'A' };
    bent.push(last);
    let damaged = PairMethod::Ticket(Zeroizing::new(bent));
    let error = pair_folder(&cluster.path().join("late"), damaged, LONG, &Heard::default())
        .await
        .unwrap_err();
    assert_eq!((error.code.as_str(), error.exit_code()), ("N0205", 2));
}

pub(crate) async fn a_pairing_goes_on_after_an_interruption(cluster: &mut Cluster) {
    let (pin, code) = cluster.mint(3).await;
    let dir = cluster.path().join("slow");
    let ui = Heard::default();
    let first = pair_folder(&dir, by_pin(&pin, code, &[cluster.enrol_addr(1)]), SHORT, &ui)
        .await
        .unwrap_err();
    assert_eq!((first.code.as_str(), first.exit_code()), ("N0210", 7), "{first}");
    let request = cluster.request_of("slow", 2).await;
    cluster
        .client_at(2)
        .approve(ApproveRequest {
            id: request.id,
            ..Default::default()
        })
        .await
        .unwrap();
    let again = Heard::default();
    pair_folder(&dir, PairMethod::Resume, LONG, &again).await.unwrap();
    assert_eq!(again.sas().await, ui.sas().await);
    let twice = pair_folder(&dir, PairMethod::Resume, LONG, &Heard::default())
        .await
        .unwrap_err();
    assert_eq!(twice.code, "N0105", "{twice}");
}

pub(crate) async fn a_rejected_machine_hears_why(cluster: &mut Cluster) {
    let (pin, code) = cluster.mint(1).await;
    let ui = Heard::default();
    let dir = cluster.path().join("unwanted");
    let reject = async {
        let request = cluster.request_of("unwanted", 1).await;
        let reject = RejectRequest {
            id: request.id,
            reason: "not ours".to_owned(),
            ..Default::default()
        };
        cluster.client_at(2).reject(reject).await.unwrap();
    };
    let method = by_pin(&pin, code, &[cluster.enrol_addr(3)]);
    let (refused, ()) = tokio::join!(pair_folder(&dir, method, LONG, &ui), reject);
    let error = refused.unwrap_err();
    assert!(
        error.exit_code() == 6 && error.message.contains("not ours"),
        "{error}"
    );
}

pub(crate) async fn wrong_pins_burn_the_code(cluster: &mut Cluster) {
    let (pin, code) = cluster.mint(1).await;
    let digits: String = pin.chars().filter(char::is_ascii_digit).collect();
    let wrong = if digits == "00000000" {
        "00000001"
    } else {
        "00000000"
    };
    let dir = cluster.path().join("guesser");
    for attempt in 0..5u64 {
        // At one replica after the other: the count is the cluster's.
        let method = by_pin(wrong, code, &[cluster.enrol_addr(1 + attempt % 3)]);
        let error = pair_folder(&dir, method, LONG, &Heard::default())
            .await
            .unwrap_err();
        assert_eq!(
            (error.code.as_str(), error.exit_code()),
            ("N0202", 3),
            "attempt {attempt}: {error}"
        );
        let left = if attempt == 4 {
            "burnt".to_owned()
        } else {
            format!("{} tries", 4 - attempt)
        };
        assert!(error.message.contains(&left), "attempt {attempt}: {error}");
    }
    let right = by_pin(&pin, code, &[cluster.enrol_addr(1)]);
    let error = pair_folder(&dir, right, LONG, &Heard::default())
        .await
        .unwrap_err();
    assert_eq!(error.code, "E0403", "the right PIN comes too late: {error}");
    let listed = cluster
        .client()
        .list_codes(ListCodesRequest {
            all: true,
            ..Default::default()
        })
        .await
        .unwrap();
    let burned = listed.codes.iter().find(|listed| listed.number == code).unwrap();
    assert_eq!((burned.status.as_str(), burned.attempts), ("burned", 5));
}

pub(crate) async fn one_code_pairs_one_of_two_machines(cluster: &mut Cluster) {
    let (pin, code) = cluster.mint(1).await;
    let (left, right) = (cluster.path().join("left"), cluster.path().join("right"));
    let (ui_left, ui_right) = (Heard::default(), Heard::default());
    let at = |id| by_pin(&pin, code, &[cluster.enrol_addr(id)]);
    let (one, other) = tokio::join!(
        pair_folder(&left, at(2), SHORT, &ui_left),
        pair_folder(&right, at(3), SHORT, &ui_right)
    );
    // The winner waits for the operator (N0210), the other is told that the code is used.
    let mut codes = [one.unwrap_err().code, other.unwrap_err().code];
    codes.sort();
    assert_eq!(codes, ["E0402", "N0210"]);
}

pub(crate) async fn expired_and_revoked_codes_are_refused(cluster: &mut Cluster) {
    let client = cluster.client();
    let short = MintPinRequest {
        ttl_ms: 29_999,
        ..Default::default()
    };
    assert_eq!(client.mint_pin(short).await.unwrap_err().code, "E0411");
    let (pin, code) = cluster.mint(2).await;
    let revoke = RevokeCodeRequest {
        code: code.to_string(),
        reason: "typed into a chat".to_owned(),
        ..Default::default()
    };
    client.revoke_code(revoke).await.unwrap();
    let dir = cluster.path().join("late");
    let method = by_pin(&pin, code, &[cluster.enrol_addr(1)]);
    assert_eq!(
        pair_folder(&dir, method, LONG, &Heard::default())
            .await
            .unwrap_err()
            .code,
        "E0405"
    );
    let unknown = by_pin(&pin, 9_999, &[cluster.enrol_addr(1)]);
    assert_eq!(
        pair_folder(&dir, unknown, LONG, &Heard::default())
            .await
            .unwrap_err()
            .code,
        "E0401"
    );
    let form = by_pin("1234", 0, &[cluster.enrol_addr(1)]);
    assert_eq!(
        pair_folder(&dir, form, LONG, &Heard::default())
            .await
            .unwrap_err()
            .exit_code(),
        2
    );
}

/// Sends bytes as they are, and looks at no answer.
#[derive(Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = ();
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<()>, Status> {
        buffer.advance(buffer.remaining());
        Ok(Some(()))
    }
}

async fn call(channel: &Channel, method: &'static str, bytes: Vec<u8>) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client
        .ready()
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let path = method.parse().unwrap();
    client
        .unary(Request::new(bytes), path, Raw)
        .await
        .map(|answer| answer.into_inner())
}

/// One honest message of each call, with a code and a token that do not exist.
fn honest() -> Vec<(&'static str, Vec<u8>)> {
    let id = palyra_client::new_ulid;
    let begin = BeginPinRequest {
        code_number: 9_999,
        device_id: id(),
        ke1: vec![1; 96].into(),
        csr_sha256: vec![2; 32].into(),
        node_nonce: vec![3; 32].into(),
    };
    let finish = FinishPinRequest {
        attempt_id: id(),
        ke3: vec![4; 64].into(),
        csr: vec![5; 200].into(),
        proof: vec![6; 32].into(),
        device_name: "stranger".to_owned(),
        ..Default::default()
    };
    let prove = ProveTicketRequest {
        ticket_id: id(),
        device_id: id(),
        csr: vec![5; 200].into(),
        node_nonce: vec![3; 32].into(),
        server_nonce: vec![7; 32].into(),
        proof: vec![6; 32].into(),
        device_name: "stranger".to_owned(),
        ..Default::default()
    };
    let fetch = FetchRequest {
        pairing_id: id(),
        fetch_token: vec![8; 32].into(),
        wait_ms: 0,
    };
    let join = JoinRequest {
        token_id: id(),
        proof: vec![9; 32].into(),
        name: "r9".to_owned(),
        replica_csr: vec![5; 200].into(),
        authority_csr: vec![5; 200].into(),
        peer_addr: "127.0.0.1:1".to_owned(),
        node_addr: "127.0.0.1:1".to_owned(),
        enrol_addr: "127.0.0.1:1".to_owned(),
        ..Default::default()
    };
    vec![
        ("/palyra.pairing.v1.EnrolService/BeginPin", begin.encode_to_vec()),
        (
            "/palyra.pairing.v1.EnrolService/FinishPin",
            finish.encode_to_vec(),
        ),
        (
            "/palyra.pairing.v1.EnrolService/ProveTicket",
            prove.encode_to_vec(),
        ),
        ("/palyra.pairing.v1.EnrolService/Fetch", fetch.encode_to_vec()),
        ("/palyra.cluster.v1.JoinService/Join", join.encode_to_vec()),
    ]
}

pub(crate) async fn frames_that_are_no_messages_get_a_code(cluster: &mut Cluster) {
    let tls = connect::enrol_recording(SeenServer::new()).unwrap();
    let channel = connect::connect(&cluster.enrol_addr(3), &tls, &ConnectOptions::default())
        .await
        .unwrap();
    for (method, message) in honest() {
        let mut frames = vec![
            message.clone(),
            vec![0xff; 64],
            vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f],
        ];
        frames.extend((0..message.len()).step_by(7).map(|end| message[..end].to_vec()));
        frames.extend((0..message.len()).step_by(5).map(|at| {
            let mut bent = message.clone();
            bent[at] ^= 0x55;
            bent
        }));
        // A message of the right form, larger than strangers may send.
        frames.push([&message[..], &[0x7a, 0xa0, 0x8d, 0x06], &vec![0; 100_000]].concat());
        for (case, frame) in frames.into_iter().enumerate() {
            let status = call(&channel, method, frame).await.unwrap_err();
            let code = refusal(&status).0;
            assert!(
                code.len() == 5 && code.starts_with('E') && !["E1015", "E9007"].contains(&code.as_str()),
                "{method} case {case}: {code:?} {status:?}"
            );
        }
    }
    call(&channel, "/palyra.pairing.v1.EnrolService/Hello", vec![])
        .await
        .expect("the same connection is served on");
}
