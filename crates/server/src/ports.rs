//! The three TLS listeners of a replica: who gets in where, and what is served there.
//!
//! Invariants: a connection of a node or operator is entered in `control`'s registry before anything is
//! served on it; one whose certificate the registry refuses stays entered, is told why on each call and closed soon; a
//! replica that was removed from the cluster is no peer.

use std::future::Future;
use std::net::UdpSocket;
use std::sync::Arc;

use palyra_control::{Control, Unwelcome};
use palyra_replica::transport::{AddressBook, GrpcTransport, PeerReplica, TlsFor, peer_server};
use palyra_replica::{PeerTransport, Replica};
use palyra_state::cluster::{self, ReplicaStatus};
use tokio::net::TcpListener;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Status};

use crate::config::{Addresses, Config, resolve};
use crate::exit::{Code, Failure};
use crate::grpc::Gateway;
use crate::health;
use crate::listener::{Admit, Closed, Held, Limits, Listener, Peer, Stop};
use crate::serve::{self, Http2};
use crate::tls::Tls;

/// Bytes that may be under way on one stream of a node or operator.
const WINDOW: u32 = 1 << 20;
/// Bytes that may be under way on one stream between replicas.
const PEER_WINDOW: u32 = 8 << 20;
/// Strangers have few streams.
const ENROL_STREAMS: u32 = 8;
/// Of the connections that a source may have, strangers get one in so many.
const ENROL_SHARE: usize = 16;

/// The sockets of a replica, bound.
pub(crate) struct Sockets {
    /// Nodes and operators.
    pub(crate) node: TcpListener,
    /// Enrolment.
    pub(crate) enrol: TcpListener,
    /// Other replicas.
    pub(crate) peers: TcpListener,
    /// Metrics and health.
    pub(crate) metrics: TcpListener,
    /// Nodes over QUIC, if they are served.
    pub(crate) quic: Option<UdpSocket>,
}

impl Sockets {
    /// Binds all of them, or says which can't be had.
    pub(crate) async fn bind(addresses: &Addresses) -> Result<Sockets, Failure> {
        Ok(Sockets {
            node: bind("node", &addresses.node).await?,
            enrol: bind("enrol", &addresses.enrol).await?,
            peers: bind("peers", &addresses.peers).await?,
            metrics: bind("metrics", &addresses.metrics).await?,
            quic: bind_udp("quic", &addresses.quic)?,
        })
    }
}

async fn bind(name: &str, address: &str) -> Result<TcpListener, Failure> {
    let bound = match resolve(address) {
        Ok(resolved) => TcpListener::bind(resolved).await,
        Err(error) => Err(error),
    };
    bound.map_err(|error| unbound(name, address, 't', &error))
}

fn bind_udp(name: &str, address: &str) -> Result<Option<UdpSocket>, Failure> {
    if address.is_empty() {
        return Ok(None);
    }
    let bound = resolve(address).and_then(UdpSocket::bind);
    bound
        .map(Some)
        .map_err(|error| unbound(name, address, 'u', &error))
}

/// Why a port can't be had; `protocol` is what `ss` calls it, `t` or `u`.
fn unbound(name: &str, address: &str, protocol: char, error: &std::io::Error) -> Failure {
    let port = address.rsplit_once(':').map_or(address, |(_, port)| port);
    let next = match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            format!("`ss -l{protocol}np 'sport = :{port}'` shows who has it; stop that, or set listen.{name}")
        }
        std::io::ErrorKind::AddrNotAvailable => {
            format!("set listen.{name} to an address of this machine")
        }
        _ => format!("see listen.{name} and listen.host in the configuration"),
    };
    let what = format!("{address} (listen.{name}) can't be listened on");
    Failure::new(Code::Address, format!("{what}: {error}; {next}"))
}

fn limits(config: &Config) -> Limits {
    Limits {
        connections: config.limits.connections.len(),
        per_source: config.limits.connections_per_source.len(),
        handshakes: config.limits.handshakes.len(),
        handshake: config.timers.handshake.get(),
    }
}

fn http2(config: &Config, streams: u32, window: u32) -> Http2 {
    Http2 {
        streams,
        window,
        keepalive: config.timers.keepalive.get(),
        keepalive_timeout: config.timers.keepalive_timeout.get(),
    }
}

fn streams(config: &Config) -> u32 {
    u32::try_from(config.limits.streams_per_connection.get()).unwrap_or(u32::MAX)
}

/// The listener for nodes and operators.
pub(crate) fn serve_node(
    config: &Config,
    tls: &Arc<Tls>,
    socket: TcpListener,
    control: &Control,
    stop: &Stop,
) -> Result<impl Future<Output = anyhow::Result<()>> + use<>, Failure> {
    let gateway = Gateway::new(control.clone());
    let (routes, reporter) = gateway.node_routes(config.limits.message.get())?;
    let reporting = stop
        .gently
        .clone()
        .run_until_cancelled_owned(health::report(reporter, control.clone()));
    let server = Arc::clone(&tls.node);
    let handshake = Arc::new(move || (Arc::clone(&server), None));
    let admit = admit_caller(control.clone());
    let listener = Listener::new("node", socket, limits(config), handshake, admit, stop.clone());
    let http2 = http2(config, streams(config), WINDOW);
    let (id, stop) = (config.replica.id, stop.gently.clone());
    Ok(async move {
        let (served, _) = tokio::join!(serve::serve(listener, routes, http2, id, stop), reporting);
        Ok(served?)
    })
}

fn admit_caller(control: Control) -> Admit {
    Arc::new(move |peer: &Arc<Peer>| {
        let identity = peer.identity.as_ref().ok_or("no certificate")?;
        let guard = match control.accept(identity, &peer.source.to_string()) {
            Ok(guard) => {
                // Set once: a connection is admitted once. One that is refused carries nothing that lasts.
                let _ = peer.guard.set(guard.id());
                guard
            }
            Err(unwelcome) => {
                let Unwelcome { error, stays } = *unwelcome;
                let who = &identity.id;
                tracing::info!(%who, source = %peer.source, %error, "connection will be refused");
                stays.ok_or_else(|| error.to_string())?
            }
        };
        let closed: Closed = Box::pin(async move {
            guard.closed().await;
            Box::new(guard) as Held
        });
        Ok(closed)
    })
}

/// The enrolment listener.
pub(crate) fn serve_enrol(
    config: &Config,
    tls: &Arc<Tls>,
    socket: TcpListener,
    control: &Control,
    stop: &Stop,
) -> impl Future<Output = anyhow::Result<()>> + use<> {
    let routes = Gateway::new(control.clone()).enrol_routes();
    let server = Arc::clone(tls);
    let handshake = Arc::new(move || {
        let enrol = server.enrol();
        (enrol.config, Some(enrol.end_point))
    });
    let all = limits(config);
    let limits = Limits {
        per_source: (all.per_source / ENROL_SHARE).max(4),
        ..all
    };
    let admit: Admit = Arc::new(|_: &Arc<Peer>| Ok(Box::pin(std::future::pending()) as Closed));
    let listener = Listener::new("enrol", socket, limits, handshake, admit, stop.clone());
    let http2 = http2(config, ENROL_STREAMS, u32::from(u16::MAX));
    let (id, stop) = (config.replica.id, stop.gently.clone());
    async move { Ok(serve::serve(listener, routes, http2, id, stop).await?) }
}

fn admit_replica(replica: Replica) -> Admit {
    Arc::new(move |peer: &Arc<Peer>| {
        let identity = peer.identity.as_ref().ok_or("no certificate")?;
        let id: u64 = identity
            .id
            .id()
            .parse()
            .map_err(|_| "the certificate names no replica")?;
        // What this replica has not heard of yet may be new: Raft itself asks for cluster, sender and
        // addressee.
        match cluster::replica(&replica.view(), id).map(|record| record.status()) {
            Some(ReplicaStatus::Removed) => Err(format!("replica {id} was removed from the cluster")),
            _ => Ok(Box::pin(std::future::pending())),
        }
    })
}

/// The listener for other replicas.
pub(crate) fn serve_peers(
    config: &Config,
    tls: &Arc<Tls>,
    socket: TcpListener,
    replica: &Replica,
    stop: &Stop,
) -> impl Future<Output = anyhow::Result<()>> + use<> {
    let service = InterceptedService::new(peer_server(replica.peer_service()), name_replica);
    let server = Arc::clone(&tls.peers);
    let handshake = Arc::new(move || (Arc::clone(&server), None));
    let admit = admit_replica(replica.clone());
    let listener = Listener::new("peers", socket, limits(config), handshake, admit, stop.clone());
    let http2 = http2(config, streams(config), PEER_WINDOW);
    let (id, stop) = (config.replica.id, stop.gently.clone());
    async move { Ok(serve::serve(listener, Routes::new(service), http2, id, stop).await?) }
}

/// Says which replica a request comes from, by the certificate of its connection.
fn name_replica(mut request: Request<()>) -> Result<Request<()>, Status> {
    let peer = request
        .extensions()
        .get::<Arc<Peer>>()
        .and_then(|peer| peer.identity.as_ref());
    let id = peer.and_then(|identity| identity.id.id().parse().ok());
    let id = id.ok_or_else(|| Status::unauthenticated("only replicas of the cluster speak on this port"))?;
    request.extensions_mut().insert(PeerReplica(id));
    Ok(request)
}

/// The connections to other replicas: each must show the certificate of exactly that replica.
pub(crate) fn transport(tls: &Arc<Tls>, book: &Arc<AddressBook>) -> Arc<dyn PeerTransport> {
    let tls = Arc::clone(tls);
    let tls_for: TlsFor = Arc::new(move |id| tls.client_of(id).map_err(|error| format!("{error:#}")));
    GrpcTransport::new(Arc::clone(book), tls_for)
}
