//! The same group over sockets, mutual TLS and RocksDB, in real time: what a bus cannot show.
#![allow(clippy::unwrap_used, clippy::disallowed_types, clippy::disallowed_methods)]

mod kit;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use kit::{CLUSTER, genesis, get, set, until};
use palyra_pki::ca::{HostNames, Root};
use palyra_pki::identity::PeerIdentity;
use palyra_pki::tls::{Clock, SharedIdentity, SharedTrust, client_verified, server_mutual};
use palyra_pki::{Entropy, KeyPair, Role, SpiffeId, TrustBundle, TrustDomain};
use palyra_platform as platform;
use palyra_replica::transport::{AddressBook, GrpcTransport, PeerReplica, TlsFor, peer_server};
use palyra_replica::{Lane, Method, PeerError, PeerTransport, Refusal, Replica, ReplicaConfig};
use palyra_state::{Actor, Command, Envelope, Id};
use palyra_storage::{Options, RocksEngine};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::server::Connected;

struct Os;

impl Entropy for Os {
    fn fill(&mut self, out: &mut [u8]) {
        platform::fill_random(out);
    }
}

/// A cluster's certificates.
struct Pki {
    root: Root,
    domain: TrustDomain,
    trust: Arc<SharedTrust>,
    clock: Clock,
}

impl Pki {
    fn new() -> Pki {
        let id = Id::from_bytes(CLUSTER.to_be_bytes()).to_string();
        let domain = TrustDomain::for_cluster(&id).unwrap();
        let root = Root::create(&id, &domain, platform::wall_ms(), &mut Os).unwrap();
        let bundle = TrustBundle::new(&id, domain.clone(), vec![root.der().to_vec()]).unwrap();
        Pki {
            root,
            domain,
            trust: SharedTrust::new(bundle),
            clock: Clock::new(platform::wall_ms),
        }
    }

    fn identity(&self, id: u64) -> Arc<SharedIdentity> {
        let key = KeyPair::generate(&mut Os).unwrap();
        let name = SpiffeId::replica(self.domain.clone(), id).unwrap();
        let hosts = HostNames::from_hosts(["127.0.0.1"]);
        let day = 24 * 3600 * 1000;
        let csr = key.make_csr().unwrap();
        let leaf = self
            .root
            .issue_from_csr(&csr, &name, day, &hosts, platform::wall_ms(), &mut Os)
            .unwrap();
        SharedIdentity::new(vec![leaf.der], &key).unwrap()
    }

    fn dialler(&self, identity: Arc<SharedIdentity>) -> TlsFor {
        let (domain, trust, clock) = (self.domain.clone(), self.trust.clone(), self.clock.clone());
        Arc::new(move |to| {
            let expected = SpiffeId::replica(domain.clone(), to).unwrap();
            client_verified(
                trust.clone(),
                Some(expected),
                Some(identity.clone()),
                &clock,
                &[b"h2"],
            )
            .map_err(|error| error.to_string())
        })
    }
}

/// A connection that knows whose it is.
struct Connection(tokio_rustls::server::TlsStream<TcpStream>, PeerReplica);

impl Connected for Connection {
    type ConnectInfo = PeerReplica;

    fn connect_info(&self) -> PeerReplica {
        self.1
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

async fn accept(pki: &Pki, identity: Arc<SharedIdentity>, listener: TcpListener, replica: Replica) {
    let config = server_mutual(
        identity,
        pki.trust.clone(),
        &[Role::Replica],
        &pki.clock,
        &[b"h2"],
    )
    .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(config);
    let incoming = futures::stream::unfold((listener, acceptor), |(listener, acceptor)| async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let Ok(tls) = acceptor.accept(socket).await else {
                continue;
            };
            let certificate = tls.get_ref().1.peer_certificates().unwrap()[0].clone();
            let peer = PeerIdentity::from_der(&certificate)
                .unwrap()
                .id
                .replica_id()
                .unwrap();
            let connection = Connection(tls, PeerReplica(peer));
            return Some((Ok::<_, std::io::Error>(connection), (listener, acceptor)));
        }
    });
    let server = tonic::transport::Server::builder().add_service(peer_server(replica.peer_service()));
    server.serve_with_incoming(incoming).await.unwrap();
}

struct Node {
    replica: Replica,
    server: platform::Task<()>,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

async fn node(pki: &Arc<Pki>, book: &Arc<AddressBook>, id: u64) -> Node {
    let folder = tempfile::tempdir().unwrap();
    let engine = RocksEngine::open(folder.path(), Options::default()).unwrap();
    let identity = pki.identity(id);
    let transport = GrpcTransport::new(book.clone(), pki.dialler(identity.clone()));
    let config = ReplicaConfig::new(id, Id::from_bytes(CLUSTER.to_be_bytes()));
    let replica = Replica::open(config, Arc::new(engine), transport).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    book.set(id, address.to_string());
    let (pki, served) = (pki.clone(), replica.clone());
    let server = platform::spawn(async move { accept(&pki, identity, listener, served).await });
    replica.start();
    Node {
        replica,
        server,
        address,
        _folder: folder,
    }
}

fn envelope(serial: u64, command: impl Into<Command>) -> Envelope {
    let id = (u128::from(platform::wall_ms()) << 80) + u128::from(serial);
    Envelope::new(Id::from_bytes(id.to_be_bytes()), Actor::System, command)
}

async fn write(replica: &Replica, serial: u64, command: impl Into<Command>) -> u64 {
    let committed = replica.propose(envelope(serial, command)).await.unwrap();
    committed.reply.unwrap();
    committed.index
}

async fn leader(nodes: &BTreeMap<u64, Node>) -> u64 {
    loop {
        if let Some((id, _)) = nodes.iter().find(|(_, node)| node.replica.leads()) {
            return *id;
        }
        nodes
            .values()
            .next()
            .unwrap()
            .replica
            .changed(Duration::from_millis(50))
            .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_replicas_over_sockets_and_disks() {
    let pki = Arc::new(Pki::new());
    let book = AddressBook::new();
    let mut nodes = BTreeMap::new();
    for id in 1..=3 {
        nodes.insert(id, node(&pki, &book, id).await);
    }
    let first = nodes[&1].replica.clone();
    first.initialize().await.unwrap();
    write(&first, 1, genesis()).await;
    for id in [2, 3] {
        first.add_learner(id).await.unwrap();
        let target = first.status().last_log;
        until(&first, |status| {
            status
                .peers
                .iter()
                .any(|peer| peer.id == id && peer.matched.is_some_and(|at| at >= target))
        })
        .await;
        first.promote(id).await.unwrap();
    }
    for value in 1..=20 {
        let index = write(&nodes[&(value % 3 + 1)].replica, 10 + value, set(value)).await;
        let reader = &nodes[&((value + 1) % 3 + 1)].replica;
        assert!(reader.read_barrier().await.unwrap() >= index);
        assert_eq!(get(&reader.view()), value);
    }
    let gone = leader(&nodes).await;
    let dead = nodes.remove(&gone).unwrap();
    dead.server.abort();
    dead.replica.shutdown().await;
    let survivor = nodes.values().next().unwrap().replica.clone();
    let index = write(&survivor, 100, set(77)).await;
    for node in nodes.values() {
        assert!(node.replica.wait_applied(index, Duration::from_secs(10)).await);
        assert_eq!(get(&node.replica.view()), 77);
    }
    strangers_are_told_why(&pki, &book, &nodes, &dead).await;
}

/// What the other side of a real connection says reaches the caller as what it is.
async fn strangers_are_told_why(
    pki: &Pki,
    book: &Arc<AddressBook>,
    nodes: &BTreeMap<u64, Node>,
    dead: &Node,
) {
    let limit = Duration::from_secs(5);
    let to = *nodes.keys().next().unwrap();
    let transport = GrpcTransport::new(book.clone(), pki.dialler(pki.identity(9)));
    // A certificate of replica 9, a body that is none.
    let error = transport
        .call(to, Method::Vote, Bytes::from_static(b"\xff"), limit)
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            PeerError::Refused {
                refusal: Refusal::Malformed,
                ..
            }
        ),
        "{error:?}"
    );
    let requests = futures::stream::iter([Bytes::from_static(b"\xff")]).boxed();
    let mut answers = transport.stream(to, Lane::Replication, requests).await.unwrap();
    let error = answers.next().await.unwrap().unwrap_err();
    assert!(
        matches!(
            error,
            PeerError::Refused {
                refusal: Refusal::Malformed,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(answers.next().await.is_none());
    // Nobody listens there any more, and nobody ever did.
    book.set(20, dead.address.to_string());
    for id in [20, 21] {
        let error = transport
            .call(id, Method::Vote, Bytes::new(), limit)
            .await
            .unwrap_err();
        assert!(matches!(error, PeerError::Unreachable(_)), "{error:?}");
    }
    // The right address with another replica's certificate.
    book.set(22, nodes[&to].address.to_string());
    let error = transport
        .call(22, Method::Vote, Bytes::new(), limit)
        .await
        .unwrap_err();
    assert!(matches!(error, PeerError::Unreachable(_)), "{error:?}");
    // A certificate of another cluster.
    let stranger = Pki::new();
    let transport = GrpcTransport::new(book.clone(), stranger.dialler(stranger.identity(9)));
    let error = transport
        .call(to, Method::Vote, Bytes::new(), limit)
        .await
        .unwrap_err();
    assert!(matches!(error, PeerError::Unreachable(_)), "{error:?}");
}
