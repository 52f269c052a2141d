//! The listener against clients of quinn itself: every fault, every limit, and peers that do not behave.

use std::net::{Ipv4Addr, SocketAddr};

use bytes::{BufMut, BytesMut};
use palyra_control::{ControlConfig, Keys, Limits as ControlLimits, Timings, found};
use palyra_pki::ca::HostNames;
use palyra_pki::seal::Purpose;
use palyra_pki::tls::{ALPN_NODE, Clock, SharedIdentity, SharedTrust, client_verified};
use palyra_pki::{
    Authority, IssuedCert, Kek, KeyPair, PeerIdentity, Role, Root, SpiffeId, TrustBundle, TrustDomain,
};
use palyra_proto::common::v1::ErrorDetail;
use palyra_proto::quic::v1 as wire;
use palyra_proto::quic::v1::frame::Kind;
use palyra_quic::frame::Item;
use palyra_quic::{DEFAULT_MAX_FRAME_BYTES, Reader, VERSION, Writer, method};
use palyra_replica::testing::Bus;
use palyra_replica::{Replica, ReplicaConfig};
use palyra_state::cluster::{Addresses, Genesis};
use palyra_state::identity::NewCertificate;
use palyra_state::{Actor, Envelope, Fingerprint, Id};
use palyra_storage::{Disk, MemEngine};
use prost::Message;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectionError, RecvStream, SendStream};

use super::*;

/// No test waits longer for what must come. Only a failing one takes it.
const SOON: Duration = Duration::from_secs(60);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what).await.expect("nothing came")
}

fn rng(out: &mut [u8]) {
    palyra_platform::fill_random(out);
}

fn recorded(issued: &IssuedCert, authority: u64) -> NewCertificate {
    NewCertificate {
        der: issued.der.clone().into(),
        spki: Fingerprint::from_bytes(issued.spki_sha256),
        serial: issued.serial.as_bytes()[..16].to_vec().into(),
        not_before: issued.not_before_ms,
        not_after: issued.not_after_ms,
        authority,
        authority_number: 0,
    }
}

fn limits() -> Limits {
    Limits {
        connections: 64,
        per_identity: 16,
        per_source: 32,
        streams: 4,
        handshakes: 16,
        retry_above: 16,
        handshake: Duration::from_secs(5),
        idle: Duration::from_secs(30),
        keepalive: Duration::from_secs(10),
        message: 1 << 20,
    }
}

/// A replica's listener, and the identity of an operator who is known to it.
struct Fixture {
    address: SocketAddr,
    control: Control,
    meter: Arc<Meter>,
    stop: Stop,
    operator: Arc<SharedIdentity>,
    operator_peer: PeerIdentity,
    trust: Arc<SharedTrust>,
    serving: tokio::task::JoinHandle<()>,
    _bus: Arc<Bus>,
}

/// What a cluster of one is made of.
struct Made {
    genesis: Genesis,
    keys: Keys,
    domain: TrustDomain,
    trust: TrustBundle,
    operator: Arc<SharedIdentity>,
    operator_peer: PeerIdentity,
}

fn make(cluster_id: Id) -> Made {
    let name = cluster_id.to_string();
    let domain = TrustDomain::for_cluster(&name).unwrap();
    let (now, none) = (palyra_platform::wall_ms(), HostNames::default());
    let root = Root::create(&name, &domain, now, &mut rng).unwrap();
    let key = KeyPair::generate(&mut rng).unwrap();
    let signed = root
        .sign_authority(&key.make_csr().unwrap(), 1, now, &mut rng)
        .unwrap();
    let authority = Authority::new(signed.der.clone(), key).unwrap();
    let operator_key = KeyPair::generate(&mut rng).unwrap();
    let id = SpiffeId::new(domain.clone(), Role::Operator, "root").unwrap();
    let csr = operator_key.make_csr().unwrap();
    let operator = authority
        .issue_from_csr(&csr, &id, 3_600_000, &none, now, &mut rng)
        .unwrap();
    let replica_id = SpiffeId::replica(domain.clone(), 1).unwrap();
    let csr = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
    let replica = root
        .issue_from_csr(&csr, &replica_id, 3_600_000, &none, now, &mut rng)
        .unwrap();
    let kek = Kek::generate(&mut rng);
    let sealed = kek
        .seal(Purpose::RootKey, name.as_bytes(), root.key().to_pkcs8(), &mut rng)
        .unwrap();
    let genesis = Genesis {
        cluster_id,
        trust_domain: domain.to_string(),
        root_cert_der: root.der().to_vec().into(),
        root_key_sealed: sealed.into(),
        replica_name: "r1".to_owned(),
        addresses: Addresses {
            peer: "127.0.0.1:7444".to_owned(),
            node: "127.0.0.1:7441".to_owned(),
            enrol: "127.0.0.1:7442".to_owned(),
            ..Addresses::default()
        },
        authority_cert_der: signed.der.into(),
        replica_certificate: recorded(&replica, 0),
        operator_name: "root".to_owned(),
        operator_certificate: recorded(&operator, 1),
    };
    let chain = vec![operator.der.clone(), authority.der().to_vec()];
    Made {
        genesis,
        trust: TrustBundle::new(&name, domain.clone(), vec![root.der().to_vec()]).unwrap(),
        keys: Keys { authority, kek },
        domain,
        operator: SharedIdentity::new(chain, &operator_key).unwrap(),
        operator_peer: PeerIdentity::from_der(&operator.der).unwrap(),
    }
}

impl Fixture {
    async fn new(limits: Limits) -> Fixture {
        let cluster_id = Id::from_bytes(palyra_platform::new_ulid_bytes());
        let made = make(cluster_id);
        let own = Authority::new(
            made.keys.authority.der().to_vec(),
            KeyPair::from_pkcs8(made.keys.authority.key().to_pkcs8()).unwrap(),
        )
        .unwrap();
        let names = HostNames::from_hosts(["127.0.0.1"]);
        let tls = Tls::new(Arc::new(own), made.trust.clone(), 1, names).unwrap();
        let bus = Bus::new();
        let engine = Arc::new(MemEngine::open(&Disk::new("r1")).unwrap());
        let replica = Replica::open(ReplicaConfig::new(1, cluster_id), engine, bus.transport(1))
            .await
            .unwrap();
        let config = ControlConfig {
            replica_id: 1,
            cluster_id,
            trust_domain: made.domain,
            version: "test".to_owned(),
            timings: Timings::default(),
            limits: ControlLimits::default(),
        };
        let control = Control::start(config, replica.clone(), made.keys);
        bus.attach(1, replica.peer_service());
        replica.start();
        let id = Id::from_bytes(palyra_platform::new_ulid_bytes());
        found(&replica, Envelope::new(id, Actor::System, made.genesis))
            .await
            .unwrap();
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = socket.local_addr().unwrap();
        let (meter, stop) = (Arc::new(Meter::default()), Stop::default());
        let shared = Arc::new(Shared {
            control: control.clone(),
            plane: NodePlane::new(control.clone()),
            slots: Slots::new(limits),
            limits,
            meter: Arc::clone(&meter),
            stop: stop.clone(),
            refused: Throttle::default(),
        });
        let serving = tokio::spawn(run(endpoint(&tls.quic, socket, &limits).unwrap(), shared));
        Fixture {
            address,
            control,
            meter,
            stop,
            operator: made.operator,
            operator_peer: made.operator_peer,
            trust: SharedTrust::new(made.trust),
            serving,
            _bus: bus,
        }
    }

    /// A client that offers `alpn`.
    fn client(&self, alpn: &[u8]) -> Endpoint {
        let clock = Clock::new(palyra_platform::wall_ms);
        let identity = Some(Arc::clone(&self.operator));
        let tls = client_verified(Arc::clone(&self.trust), None, identity, &clock, &[alpn]).unwrap();
        let crypto = QuicClientConfig::try_from(tls).unwrap();
        let mut endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
        endpoint
    }

    async fn connect(&self) -> (Endpoint, quinn::Connection) {
        let endpoint = self.client(ALPN_NODE);
        let connection = soon(endpoint.connect(self.address, "r1").unwrap()).await.unwrap();
        (endpoint, connection)
    }
}

fn header(method: &str) -> wire::Header {
    wire::Header {
        version: VERSION,
        method: method.to_owned(),
        deadline_ms: 0,
    }
}

fn framed(kind: Kind) -> Vec<u8> {
    let bytes = wire::Frame { kind: Some(kind) }.encode_to_vec();
    let mut framed = BytesMut::new();
    framed.put_u32(u32::try_from(bytes.len()).unwrap());
    framed.put(bytes.as_slice());
    framed.to_vec()
}

async fn status(receive: RecvStream) -> Option<ErrorDetail> {
    let mut reader = Reader::new(receive, 1 << 20);
    loop {
        match soon(reader.next()).await.unwrap().expect("no status came") {
            Item::Status(status) => return status.error,
            Item::Message(_) => {}
            Item::Header(_) => panic!("an answer has no header"),
        }
    }
}

/// The code of the refusal that these bytes get on a stream of their own.
async fn code_of(connection: &quinn::Connection, bytes: &[u8]) -> String {
    let (mut send, receive) = soon(connection.open_bi()).await.unwrap();
    // The answer may be there before all is written.
    let _ = send.write_all(bytes).await;
    let _ = send.finish();
    status(receive).await.map_or_else(String::new, |error| error.code)
}

async fn health(connection: &quinn::Connection) -> String {
    let mut call = framed(Kind::Header(header(method::HEALTH)));
    call.extend(framed(Kind::Message(Vec::new().into())));
    code_of(connection, &call).await
}

/// A call that has begun and does not go on.
async fn stalled(connection: &quinn::Connection) -> (SendStream, RecvStream) {
    let (mut send, receive) = soon(connection.open_bi()).await.unwrap();
    send.write_all(&framed(Kind::Header(header(method::HEALTH))))
        .await
        .unwrap();
    (send, receive)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_fault_has_its_code_and_touches_no_other_call() {
    let fixture = Fixture::new(limits()).await;
    let (_endpoint, connection) = fixture.connect().await;
    let over = u32::try_from(DEFAULT_MAX_FRAME_BYTES + 1)
        .unwrap()
        .to_be_bytes()
        .to_vec();
    let begun = framed(Kind::Header(header(method::HEALTH)));
    let with = |more: Vec<u8>| [begun.clone(), more].concat();
    let later = wire::Header {
        version: 2,
        ..header(method::HEALTH)
    };
    let large = framed(Kind::Part(vec![0; 65 * 1024].into()));
    let node_call = [
        framed(Kind::Header(header(method::REGISTER))),
        framed(Kind::Message(Vec::new().into())),
    ]
    .concat();
    let cases = [
        ("a frame over the limit", over, "E1060"),
        ("garbage", vec![0, 0, 0, 2, 0xff, 0xff], "E1061"),
        ("no header", framed(Kind::Message(Vec::new().into())), "E1061"),
        ("nothing at all", Vec::new(), "E1061"),
        ("half a frame", vec![0, 0, 0, 9, 1], "E1061"),
        ("a second header", with(begun.clone()), "E1061"),
        (
            "a request of another type",
            with(framed(Kind::Message(vec![0xff; 9].into()))),
            "E1061",
        ),
        (
            "an unknown method",
            framed(Kind::Header(header("node.dance"))),
            "E1062",
        ),
        ("another version", framed(Kind::Header(later)), "E1063"),
        (
            "too long a message",
            with([large.clone(), large].concat()),
            "E1066",
        ),
        ("an operator in a node's call", node_call, "E1001"),
        ("all is well", with(framed(Kind::Message(Vec::new().into()))), ""),
    ];
    let faults = cases
        .iter()
        .filter(|(_, _, code)| code.starts_with("E106"))
        .count();
    for (what, bytes, expected) in cases {
        assert_eq!(code_of(&connection, &bytes).await, expected, "{what}");
        assert_eq!(health(&connection).await, "", "after {what}");
    }
    assert_eq!(fixture.meter.faults.load(Ordering::Relaxed), faults as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_too_many_is_told_so_and_the_next_is_served() {
    let fixture = Fixture::new(limits()).await;
    let (_endpoint, connection) = fixture.connect().await;
    let mut under_way = Vec::new();
    for _ in 0..limits().streams {
        under_way.push(stalled(&connection).await);
    }
    assert_eq!(health(&connection).await, "E1064");
    let (mut send, receive) = under_way.pop().unwrap();
    send.write_all(&framed(Kind::Message(Vec::new().into())))
        .await
        .unwrap();
    assert!(status(receive).await.is_none());
    // Its place is free once the listener has seen its end.
    soon(async { while health(&connection).await == "E1064" {} }).await;
    // Another connection is not concerned.
    let (_endpoint, other) = fixture.connect().await;
    assert_eq!(health(&other).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_passes_ends_the_call() {
    let fixture = Fixture::new(limits()).await;
    let (_endpoint, connection) = fixture.connect().await;
    let hurried = wire::Header {
        deadline_ms: 1,
        ..header(method::HEALTH)
    };
    let (mut send, receive) = connection.open_bi().await.unwrap();
    send.write_all(&framed(Kind::Header(hurried))).await.unwrap();
    let refused = status(receive).await.unwrap();
    assert_eq!((refused.code.as_str(), refused.unknown), ("E1067", true));
}

async fn closed_by(connection: &quinn::Connection) -> (Close, String) {
    match soon(connection.closed()).await {
        ConnectionError::ApplicationClosed(closed) => {
            let reason = String::from_utf8(closed.reason.to_vec()).unwrap();
            (Close::of_code(closed.error_code), reason)
        }
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_bounded_per_source_and_identity() {
    let fixture = Fixture::new(Limits {
        per_source: 2,
        ..limits()
    })
    .await;
    let (first, second) = (fixture.connect().await, fixture.connect().await);
    assert_eq!(health(&first.1).await + &health(&second.1).await, "");
    let third = fixture.connect().await;
    let (close, reason) = closed_by(&third.1).await;
    assert_eq!(close, Close::Busy);
    assert!(reason.starts_with("E1065: this source"), "{reason}");
    assert_eq!(health(&first.1).await, "", "who is in stays");

    let fixture = Fixture::new(Limits {
        per_identity: 1,
        ..limits()
    })
    .await;
    let old = fixture.connect().await;
    assert_eq!(health(&old.1).await, "");
    let new = fixture.connect().await;
    assert_eq!(closed_by(&old.1).await.0, Close::Replaced);
    assert_eq!(health(&new.1).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn under_load_an_address_is_proved_first() {
    let fixture = Fixture::new(Limits {
        retry_above: 0,
        ..limits()
    })
    .await;
    let (_endpoint, connection) = fixture.connect().await;
    assert_eq!(health(&connection).await, "");
    assert_eq!(fixture.meter.retries.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_another_version_is_told_by_the_handshake() {
    let fixture = Fixture::new(limits()).await;
    let endpoint = fixture.client(b"palyra-node/2");
    let refused = soon(endpoint.connect(fixture.address, "r1").unwrap())
        .await
        .unwrap_err();
    let ConnectionError::ConnectionClosed(closed) = refused else {
        panic!("{refused}")
    };
    // 0x100 and the TLS alert no_application_protocol.
    assert_eq!(u64::from(closed.error_code), 0x100 + 120);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_survives_a_change_of_its_address() {
    let fixture = Fixture::new(limits()).await;
    let (endpoint, connection) = fixture.connect().await;
    let (send, receive) = stalled(&connection).await;
    let before = endpoint.local_addr().unwrap();
    endpoint
        .rebind(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap())
        .unwrap();
    assert_ne!(endpoint.local_addr().unwrap(), before);
    // A call that was under way goes on, and another is served.
    let mut writer = Writer::new(send);
    writer.message(&wire::HealthRequest {}).await.unwrap();
    assert!(status(receive).await.is_none());
    assert_eq!(health(&connection).await, "");
    assert_eq!(fixture.meter.accepted.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_removed_loses_the_connection_and_its_calls() {
    let fixture = Fixture::new(limits()).await;
    let admin = fixture
        .control
        .admit_operator(&fixture.operator_peer, palyra_state::access::Role::Admin)
        .unwrap();
    let csr = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
    fixture
        .control
        .add_operator(&admin, "", "other", "admin", &csr, 0)
        .await
        .unwrap();
    let (_endpoint, connection) = fixture.connect().await;
    let _under_way = stalled(&connection).await;
    assert_eq!(health(&connection).await, "");
    fixture
        .control
        .remove_operator(&admin, "", "root", "left")
        .await
        .unwrap();
    assert_eq!(closed_by(&connection).await.0, Close::Revoked);
    // It may come in again to be told why, and no further.
    let (_endpoint, connection) = fixture.connect().await;
    assert_eq!(health(&connection).await, "E0304");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_lets_calls_end_and_says_why_it_closes() {
    let fixture = Fixture::new(limits()).await;
    let (_endpoint, connection) = fixture.connect().await;
    let (send, receive) = stalled(&connection).await;
    assert_eq!(health(&connection).await, "");
    fixture.stop.gently.cancel();
    let mut writer = Writer::new(send);
    writer.message(&wire::HealthRequest {}).await.unwrap();
    assert!(status(receive).await.is_none(), "it was under way");
    assert_eq!(closed_by(&connection).await.0, Close::Draining);
    soon(fixture.serving).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_peers_hold_back_nobody() {
    let fixture = Fixture::new(limits()).await;
    // Datagrams that are none of QUIC, and first datagrams of handshakes that never go on.
    let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut half_open = [0u8; 1200];
    for round in 0..200u32 {
        rng(&mut half_open);
        stranger.send_to(&half_open[..64], fixture.address).unwrap();
        half_open[0] = 0xc0 | (half_open[0] & 0x0f);
        half_open[1..5].copy_from_slice(&1u32.to_be_bytes());
        half_open[5] = 8;
        half_open[14] = 0;
        half_open[6..10].copy_from_slice(&round.to_be_bytes());
        stranger.send_to(&half_open, fixture.address).unwrap();
    }
    // One that opens every call that it may, and sends a frame byte by byte, without an end.
    let (_hostile_endpoint, hostile) = fixture.connect().await;
    let mut slow = Vec::new();
    for _ in 0..limits().streams {
        let (mut send, receive) = soon(hostile.open_bi()).await.unwrap();
        send.write_all(&u32::try_from(DEFAULT_MAX_FRAME_BYTES).unwrap().to_be_bytes()[..3])
            .await
            .unwrap();
        slow.push((send, receive));
    }
    let (_endpoint, connection) = fixture.connect().await;
    for _ in 0..50 {
        for (send, _) in &mut slow {
            // Once its length is known, it is refused for a call of small messages.
            let _ = send.write_all(&[0]).await;
        }
        assert_eq!(health(&connection).await, "");
    }
    for (_, receive) in slow {
        assert_eq!(status(receive).await.unwrap().code, "E1066");
    }
    assert_eq!(health(&connection).await, "");
}
