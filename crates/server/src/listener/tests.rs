//! A listener under real TLS: who gets in, who is cut, and that the others notice nothing.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt as _;
use hyper_util::rt::TokioIo;
use palyra_pki::ca::HostNames;
use palyra_pki::tls::{ALPN_H2, Clock, SharedIdentity, SharedTrust, client_verified};
use palyra_pki::{Authority, KeyPair, Role, Root, SpiffeId, TrustBundle, TrustDomain};
use rustls_pki_types::ServerName;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::{Admit, Held, Limits, Listener, Peer, Stop};
use crate::serve::{Http2, serve};
use crate::status::TRAILER;
use crate::tls::Tls;

const CLUSTER: &str = "01JD7Z8QK3M5N7P9R1S3T5V7X9";
const DEVICE: &str = "01JD7ZB2C4D6E8F0G1H3J5K7M9";

struct Fixture {
    tls: Arc<Tls>,
    authority: Arc<Authority>,
    bundle: TrustBundle,
    address: SocketAddr,
    peers: Arc<Mutex<Vec<Arc<Peer>>>>,
    stop: Stop,
}

fn limits() -> Limits {
    Limits {
        connections: 8,
        per_source: 8,
        handshakes: 8,
        handshake: Duration::from_secs(5),
    }
}

async fn fixture(limits: Limits) -> Fixture {
    let rng = &mut palyra_platform::fill_random;
    let domain = TrustDomain::for_cluster(CLUSTER).unwrap();
    let now = palyra_platform::wall_ms();
    let root = Root::create(CLUSTER, &domain, now, rng).unwrap();
    let key = KeyPair::generate(rng).unwrap();
    let issued = root
        .sign_authority(&key.make_csr().unwrap(), 1, now, rng)
        .unwrap();
    let authority = Arc::new(Authority::new(issued.der, key).unwrap());
    let bundle = TrustBundle::new(CLUSTER, domain, vec![root.der().to_vec()]).unwrap();
    let tls = Arc::new(Tls::new(Arc::clone(&authority), bundle.clone(), 1, HostNames::default()).unwrap());
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let peers = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&peers);
    let admit: Admit = Arc::new(move |peer| {
        seen.lock().unwrap().push(Arc::clone(peer));
        Ok(Box::pin(std::future::pending()))
    });
    let config = Arc::clone(&tls.node);
    let stop = Stop::default();
    let handshake = Arc::new(move || (Arc::clone(&config), None));
    let listener = Listener::new("test", socket, limits, handshake, admit, stop.clone());
    let (_reporter, health) = tonic_health::server::health_reporter();
    let http2 = Http2 {
        streams: 16,
        window: 1 << 20,
        keepalive: Duration::from_secs(10),
        keepalive_timeout: Duration::from_secs(10),
    };
    let routes = Routes::new(health.max_decoding_message_size(64 * 1024));
    tokio::spawn(serve(listener, routes, http2, 1, stop.gently.clone()));
    Fixture {
        tls,
        authority,
        bundle,
        address,
        peers,
        stop,
    }
}

impl Fixture {
    fn identity(&self, role: Role, id: &str) -> Arc<SharedIdentity> {
        let rng = &mut palyra_platform::fill_random;
        let key = KeyPair::generate(rng).unwrap();
        let id = SpiffeId::new(self.bundle.trust_domain().clone(), role, id).unwrap();
        let now = palyra_platform::wall_ms();
        let csr = key.make_csr().unwrap();
        let leaf = self
            .authority
            .issue_from_csr(&csr, &id, 3_600_000, &HostNames::default(), now, rng)
            .unwrap();
        SharedIdentity::new(vec![leaf.der, self.authority.der().to_vec()], &key).unwrap()
    }

    /// A channel; TLS errors come out of the first call, as they do for real clients with TLS 1.3.
    async fn channel(&self, identity: Option<Arc<SharedIdentity>>) -> Channel {
        let clock = Clock::new(palyra_platform::wall_ms);
        let trust = SharedTrust::new(self.bundle.clone());
        let config = client_verified(trust, None, identity, &clock, &[ALPN_H2]).unwrap();
        let tcp = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::IpAddress(self.address.ip().into());
        let tls = TlsConnector::from(config).connect(name, tcp).await.unwrap();
        let mut once = Some(TokioIo::new(tls));
        let connector = tower::service_fn(move |_: Uri| {
            let io = once
                .take()
                .ok_or_else(|| std::io::Error::other("one connection only"));
            async move { io }
        });
        Endpoint::from_static("http://test").connect_with_connector_lazy(connector)
    }

    async fn node(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel(Some(self.identity(Role::Node, DEVICE))).await)
    }
}

fn whole_server() -> HealthCheckRequest {
    HealthCheckRequest {
        service: String::new(),
    }
}

#[tokio::test]
async fn a_cancelled_connection_fails_at_once_and_the_others_go_on() {
    let fixture = fixture(limits()).await;
    let mut doomed = fixture.node().await;
    let mut stream = doomed.watch(whole_server()).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    let mut other = fixture.node().await;
    other.check(whole_server()).await.unwrap();
    let peer = Arc::clone(&fixture.peers.lock().unwrap()[0]);
    assert_eq!(peer.identity.as_ref().unwrap().id.id(), DEVICE);
    peer.cancel.cancel();
    let cut = tokio::time::timeout(Duration::from_secs(5), stream.message())
        .await
        .unwrap();
    assert!(cut.is_err(), "{cut:?}");
    other.check(whole_server()).await.unwrap();
}

#[tokio::test]
async fn without_a_certificate_or_with_another_role_nobody_gets_in() {
    let fixture = fixture(limits()).await;
    for identity in [None, Some(fixture.identity(Role::Replica, "2"))] {
        let refused = HealthClient::new(fixture.channel(identity).await)
            .check(whole_server())
            .await;
        assert!(refused.is_err(), "{refused:?}");
    }
    assert!(fixture.peers.lock().unwrap().is_empty(), "nobody was admitted");
    fixture.node().await.check(whole_server()).await.unwrap();
}

#[tokio::test]
async fn a_message_over_the_limit_is_refused_and_the_connection_stays() {
    let fixture = fixture(limits()).await;
    let mut client = fixture.node().await;
    let refused = client
        .check(HealthCheckRequest {
            service: "x".repeat(100_000),
        })
        .await
        .unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused:?}");
    assert!(
        refused.message().starts_with("E1014: ") && refused.metadata().contains_key(TRAILER),
        "{refused:?}"
    );
    client.check(whole_server()).await.unwrap();
    assert_eq!(fixture.peers.lock().unwrap().len(), 1, "on the same connection");
}

#[tokio::test]
async fn a_source_gets_so_many_connections_and_a_dropped_one_makes_room() {
    let fixture = fixture(Limits {
        per_source: 1,
        ..limits()
    })
    .await;
    let mut first = fixture.node().await;
    first.check(whole_server()).await.unwrap();
    let mut refused = TcpStream::connect(fixture.address).await.unwrap();
    assert_eq!(
        refused.read(&mut [0; 1]).await.unwrap_or(0),
        0,
        "closed without a word"
    );
    drop(first);
    // The server notices the end of the first connection in its own time.
    for _ in 0..100 {
        let mut next = TcpStream::connect(fixture.address).await.unwrap();
        let read = tokio::time::timeout(Duration::from_millis(50), next.read(&mut [0; 1])).await;
        if read.is_err() {
            return;
        }
    }
    panic!("the dropped connection's place was not given back");
}

#[tokio::test]
async fn one_source_cannot_have_all_handshakes() {
    let fixture = fixture(Limits {
        handshakes: 4,
        handshake: Duration::from_secs(60),
        ..limits()
    })
    .await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(TcpStream::connect(fixture.address).await.unwrap());
    }
    let mut refused = TcpStream::connect(fixture.address).await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(20), refused.read(&mut [0; 1])).await;
    assert_eq!(read.unwrap().unwrap_or(0), 0, "closed without a word");
    // A handshake that is over, however it ended, makes room for the next.
    drop(silent.pop());
    for _ in 0..100 {
        let mut next = TcpStream::connect(fixture.address).await.unwrap();
        let read = tokio::time::timeout(Duration::from_millis(50), next.read(&mut [0; 1])).await;
        if read.is_err() {
            return;
        }
    }
    panic!("the place was not given back");
}

#[tokio::test]
async fn what_a_closed_connection_holds_outlives_its_socket() {
    let fixture = fixture(limits()).await;
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let token = Arc::new(());
    let held = Arc::downgrade(&token);
    let token = Mutex::new(Some(token));
    let admit: Admit = Arc::new(move |_| {
        let token = token.lock().unwrap().take();
        Ok(Box::pin(async move { Box::new(token) as Held }))
    });
    let config = Arc::clone(&fixture.tls.node);
    let handshake = Arc::new(move || (Arc::clone(&config), None));
    let listener = Listener::new("test", socket, limits(), handshake, admit, Stop::default());
    let (mut incoming, accepting) = listener.start();
    tokio::spawn(accepting);
    let client = Fixture { address, ..fixture };
    let node = tokio::spawn(async move { client.node().await });
    let mut connection = incoming.next().await.unwrap().unwrap();
    let read = connection.read(&mut [0; 1]).await;
    assert!(read.is_err(), "it must be closed: {read:?}");
    assert!(held.upgrade().is_some(), "the socket is open still");
    drop(connection);
    assert!(held.upgrade().is_none());
    node.await.unwrap();
}

#[tokio::test]
async fn a_handshake_that_takes_too_long_is_cut() {
    let fixture = fixture(Limits {
        handshake: Duration::from_millis(100),
        ..limits()
    })
    .await;
    let mut silent = TcpStream::connect(fixture.address).await.unwrap();
    let cut = tokio::time::timeout(Duration::from_secs(5), silent.read(&mut [0; 1]))
        .await
        .unwrap();
    assert_eq!(cut.unwrap_or(0), 0);
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_to_who_comes_next() {
    let fixture = fixture(limits()).await;
    let before = (fixture.tls.identity.certificate(), fixture.tls.enrol().end_point);
    let mut old = fixture.node().await;
    old.check(whole_server()).await.unwrap();
    fixture.tls.renew().unwrap();
    assert_ne!(fixture.tls.identity.certificate(), before.0);
    assert_ne!(fixture.tls.enrol().end_point, before.1);
    old.check(whole_server()).await.unwrap();
    fixture.node().await.check(whole_server()).await.unwrap();
}

#[tokio::test]
async fn a_stop_lets_streams_go_on_until_everything_ends_at_once() {
    let fixture = fixture(limits()).await;
    let mut client = fixture.node().await;
    let mut stream = client.watch(whole_server()).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    fixture.stop.gently.cancel();
    let still = tokio::time::timeout(Duration::from_millis(200), stream.message()).await;
    assert!(
        still.is_err(),
        "a stream that is under way may end by itself: {still:?}"
    );
    fixture.stop.now.cancel();
    let cut = tokio::time::timeout(Duration::from_secs(5), stream.message())
        .await
        .unwrap();
    assert!(cut.is_err(), "{cut:?}");
}
