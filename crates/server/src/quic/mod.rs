//! The QUIC listener: the calls of `nodeplane` over UDP, for nodes.
//!
//! What lives here: the endpoint and its door (this file), who may have how many connections ([`slots`]), the life of
//! one connection ([`connection`]), and its calls ([`calls`]). What never does: what a call means, and the decision
//! whether a peer is still welcome (`control`'s). Invariants: the checks of a certificate are those of the gRPC
//! listener; a connection is entered in `control`'s registry before a call on it is looked at, and its guard is
//! dropped after it is closed; a datagram from an address that nobody has proved costs no more than a bounded
//! handshake; what one peer does not read or finish holds back nobody else.

mod calls;
mod connection;
mod slots;
#[cfg(test)]
mod tests;

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use palyra_control::Control;
use palyra_quic::close::Close;
use palyra_quic::settings;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Endpoint, EndpointConfig, Incoming, ServerConfig, TokioRuntime};
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::exit::{Code, Failure};
use crate::listener::{Stop, Throttle};
use crate::nodeplane::NodePlane;
use crate::tls::Tls;
use slots::{Slots, Verdict};

/// Handshakes whose first datagram has come and that nobody has looked at yet.
const BACKLOG: usize = 1024;
/// Datagrams of such handshakes, in bytes: of one, and of all.
const EARLY: u64 = 16 * 1024;
const EARLY_ALL: u64 = 4 * 1024 * 1024;
/// Streams that a connection may open beyond its limit, so that it can be told that it may not.
const SPARE: u32 = 8;
/// How long the last datagrams may take.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// What was counted since the start.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    open: AtomicU64,
    accepted: AtomicU64,
    retries: AtomicU64,
    refused: AtomicU64,
    calls: AtomicU64,
    faults: AtomicU64,
}

impl Meter {
    /// Connections that are open now.
    pub(crate) fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// The counters: name, help, value.
    pub(crate) fn counters(&self) -> [(&'static str, &'static str, u64); 5] {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            (
                "quic_connections_total",
                "QUIC connections whose handshake was done.",
                read(&self.accepted),
            ),
            (
                "quic_retries_total",
                "Handshakes that were asked for a proof of their address.",
                read(&self.retries),
            ),
            (
                "quic_refused_total",
                "QUIC connections that a limit or a failed handshake ended.",
                read(&self.refused),
            ),
            ("quic_calls_total", "Calls over QUIC.", read(&self.calls)),
            (
                "quic_faults_total",
                "Calls over QUIC that the framing refused.",
                read(&self.faults),
            ),
        ]
    }

    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Bounds of the listener.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections.
    pub(crate) connections: usize,
    /// Connections of one identity.
    pub(crate) per_identity: usize,
    /// Connections from one address.
    pub(crate) per_source: usize,
    /// Calls under way on one connection.
    pub(crate) streams: u32,
    /// Handshakes under way.
    pub(crate) handshakes: usize,
    /// Handshakes under way above which an address has to be proved.
    pub(crate) retry_above: usize,
    /// Time for one handshake, and for the first frame of a call.
    pub(crate) handshake: Duration,
    /// A connection without a sign of life ends after this.
    pub(crate) idle: Duration,
    /// How often this side gives one.
    pub(crate) keepalive: Duration,
    /// Largest message of a session or result.
    pub(crate) message: usize,
}

impl Limits {
    fn of(config: &Config) -> Limits {
        let (quic, timers) = (&config.quic, &config.timers);
        Limits {
            connections: quic.connections.len(),
            per_identity: quic.per_identity.len(),
            per_source: quic.per_source.len(),
            streams: u32::try_from(quic.streams.get()).unwrap_or(u32::MAX),
            handshakes: config.limits.handshakes.len(),
            retry_above: quic.retry_above.len(),
            handshake: timers.handshake.get(),
            idle: timers.keepalive.get() + timers.keepalive_timeout.get(),
            keepalive: timers.keepalive.get(),
            message: config.limits.message.get(),
        }
    }
}

/// What all connections share.
struct Shared {
    control: Control,
    plane: NodePlane,
    slots: Arc<Slots>,
    limits: Limits,
    meter: Arc<Meter>,
    stop: Stop,
    refused: Throttle,
}

/// The listener for nodes over QUIC, on a bound socket.
pub(crate) fn serve(
    config: &Config,
    tls: &Arc<Tls>,
    socket: UdpSocket,
    control: &Control,
    meter: &Arc<Meter>,
    stop: &Stop,
) -> Result<impl Future<Output = anyhow::Result<()>> + use<>, Failure> {
    let limits = Limits::of(config);
    let endpoint = endpoint(&tls.quic, socket, &limits)
        .map_err(|error| Failure::new(Code::Internal, format!("QUIC can't be served: {error:#}")))?;
    let shared = Arc::new(Shared {
        control: control.clone(),
        plane: NodePlane::new(control.clone()),
        slots: Slots::new(limits),
        limits,
        meter: Arc::clone(meter),
        stop: stop.clone(),
        refused: Throttle::default(),
    });
    Ok(async move {
        run(endpoint, shared).await;
        Ok(())
    })
}

fn endpoint(tls: &Arc<rustls::ServerConfig>, socket: UdpSocket, limits: &Limits) -> anyhow::Result<Endpoint> {
    let crypto = QuicServerConfig::try_from(Arc::clone(tls))?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    let streams = limits.streams.saturating_add(SPARE);
    config
        .transport_config(settings::transport(streams, limits.idle, limits.keepalive))
        // A node keeps its connection when its address changes: the keys say who it is, the address does not.
        .migration(true)
        .max_incoming(BACKLOG)
        .incoming_buffer_size(EARLY)
        .incoming_buffer_size_total(EARLY_ALL);
    let runtime = Arc::new(TokioRuntime);
    Ok(Endpoint::new(
        EndpointConfig::default(),
        Some(config),
        socket,
        runtime,
    )?)
}

/// Takes connections until the listener is told to stop, then lets their calls end.
async fn run(endpoint: Endpoint, shared: Arc<Shared>) {
    let tasks = TaskTracker::new();
    let accepting = async {
        while let Some(incoming) = endpoint.accept().await {
            at_the_door(&shared, &tasks, incoming);
        }
    };
    shared.stop.gently.run_until_cancelled(accepting).await;
    // What knocks from now on is refused by the endpoint itself.
    endpoint.set_server_config(None);
    tasks.close();
    shared.stop.now.run_until_cancelled(tasks.wait()).await;
    endpoint.close(Close::Draining.code(), b"the replica is about to stop");
    // Whoever is gone already answers to nothing.
    let _ = tokio::time::timeout(LAST_WORDS, endpoint.wait_idle()).await;
}

fn at_the_door(shared: &Arc<Shared>, tasks: &TaskTracker, incoming: Incoming) {
    let source = incoming.remote_address();
    match shared
        .slots
        .knock(source.ip(), incoming.remote_address_validated())
    {
        Verdict::Enter(handshake) => {
            tasks.spawn(connection::serve(Arc::clone(shared), incoming, handshake));
        }
        Verdict::Prove => {
            Meter::count(&shared.meter.retries);
            // It may be asked for: the address was not validated.
            let _ = incoming.retry();
        }
        Verdict::Full(why) => {
            Meter::count(&shared.meter.refused);
            if shared.refused.now() {
                tracing::warn!(listener = "quic", %source, why, "connection refused");
            }
            incoming.refuse();
        }
    }
}
