//! TLS listeners: from a TCP connection to a stream that tonic can serve, with who is at the other end.
//!
//! What never lives here: gRPC services, and the decision whether a peer is still welcome ([`Admit`] asks
//! `control`). Invariants: a handshake has a deadline, only so many are under way, and no source has all of
//! them; connections are bounded in all and per source; a connection that is cancelled fails at its next read
//! or write, at once, whoever waits on it; everything that counts a connection is given back when the
//! connection is dropped.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use palyra_pki::PeerIdentity;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

/// How long an accept loop pauses when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// TCP's own sign of life, behind that of HTTP/2.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);
/// Accepted connections that wait for the server to take them.
const BACKLOG: usize = 64;

/// Who is at the other end of a connection. Handlers find it as `Arc<Peer>` in a request's extensions.
#[derive(Debug)]
pub(crate) struct Peer {
    /// From the verified certificate; nothing on the enrol listener.
    pub(crate) identity: Option<PeerIdentity>,
    /// The address that it came from.
    pub(crate) source: SocketAddr,
    /// Unique in this process.
    pub(crate) id: u64,
    /// Its number in `control`'s registry of connections; not set when it was not entered, so that no
    /// revocation would find it and nothing that lasts may begin on it.
    pub(crate) guard: OnceLock<u64>,
    /// `tls-server-end-point` of the certificate that was shown to it; only on the enrol listener.
    pub(crate) end_point: Option<[u8; 32]>,
    /// Ends the connection at once.
    pub(crate) cancel: CancellationToken,
}

/// TLS for one connection: the configuration and, on the enrol listener, the hash of the certificate in it.
pub(crate) type Handshake = Arc<dyn Fn() -> (Arc<ServerConfig>, Option<[u8; 32]>) + Send + Sync>;

/// Ends when the connection must be closed, with what has to outlive its socket. Dropped after the socket, too.
pub(crate) type Closed = BoxFuture<'static, Held>;

/// What tells others, by being dropped, that a socket is closed.
pub(crate) type Held = Box<dyn Send>;

/// Decides about a connection whose certificate is good, and registers it. The error is logged.
pub(crate) type Admit = Arc<dyn Fn(&Arc<Peer>) -> Result<Closed, String> + Send + Sync>;

/// Bounds of a listener.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections in all.
    pub(crate) connections: usize,
    /// Connections from one address.
    pub(crate) per_source: usize,
    /// Handshakes under way.
    pub(crate) handshakes: usize,
    /// Time for one handshake.
    pub(crate) handshake: Duration,
}

/// A listener that is bound and not served yet.
pub(crate) struct Listener {
    name: &'static str,
    socket: TcpListener,
    handshake: Handshake,
    admit: Admit,
    limits: Limits,
    slots: Arc<Slots>,
    stop: Stop,
}

/// How a listener ends.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop {
    /// No new connections; what is under way may end.
    pub(crate) gently: CancellationToken,
    /// Every connection fails at once.
    pub(crate) now: CancellationToken,
}

/// Where [`Listener::start`] delivers connections.
pub(crate) type Incoming = ReceiverStream<io::Result<Connection>>;

impl Listener {
    /// Takes a bound socket. `name` is for logs.
    pub(crate) fn new(
        name: &'static str,
        socket: TcpListener,
        limits: Limits,
        handshake: Handshake,
        admit: Admit,
        stop: Stop,
    ) -> Listener {
        let slots = Arc::new(Slots {
            limits,
            taken: Mutex::new(Taken::default()),
        });
        Listener {
            name,
            socket,
            handshake,
            admit,
            limits,
            slots,
            stop,
        }
    }

    /// The connections, and the work of accepting them, which goes on until the listener is told to stop.
    pub(crate) fn start(self) -> (Incoming, impl Future<Output = ()> + Send) {
        let (deliver, incoming) = mpsc::channel(BACKLOG);
        let stop = self.stop.gently.clone();
        let accepting = async move {
            stop.run_until_cancelled_owned(self.accept_all(deliver)).await;
        };
        (ReceiverStream::new(incoming), accepting)
    }

    async fn accept_all(self, deliver: mpsc::Sender<io::Result<Connection>>) {
        let handshakes = Arc::new(Semaphore::new(self.limits.handshakes));
        let refused = Throttle::default();
        loop {
            let Ok(permit) = Arc::clone(&handshakes).acquire_owned().await else {
                return;
            };
            let (tcp, source) = match self.socket.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    if refused.now() {
                        tracing::warn!(listener = self.name, %error, "no connection could be accepted");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let slot = match Slots::take(&self.slots, source.ip()) {
                Ok(slot) => slot,
                Err(full) => {
                    if refused.now() {
                        tracing::warn!(listener = self.name, %source, full, "connection refused");
                    }
                    continue;
                }
            };
            let pending = Pending {
                name: self.name,
                tcp,
                source,
                slot,
                limit: self.limits.handshake,
                tls: (self.handshake)(),
                admit: Arc::clone(&self.admit),
                cancel: self.stop.now.child_token(),
            };
            let deliver = deliver.clone();
            tokio::spawn(async move {
                let finished = pending.finish().await;
                drop(permit);
                if let Some(connection) = finished {
                    // The server is gone when nobody takes it: the connection closes with the process.
                    let _ = deliver.send(Ok(connection)).await;
                }
            });
        }
    }
}

/// A connection in its handshake.
struct Pending {
    name: &'static str,
    tcp: TcpStream,
    source: SocketAddr,
    slot: Slot,
    limit: Duration,
    tls: (Arc<ServerConfig>, Option<[u8; 32]>),
    admit: Admit,
    cancel: CancellationToken,
}

impl Pending {
    async fn finish(self) -> Option<Connection> {
        let Pending {
            name,
            tcp,
            source,
            mut slot,
            limit,
            tls: (config, end_point),
            admit,
            cancel,
        } = self;
        if let Err(error) = set_options(&tcp) {
            tracing::debug!(listener = name, %source, %error, "socket options refused");
        }
        let tls = match tokio::time::timeout(limit, TlsAcceptor::from(config).accept(tcp)).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => {
                tracing::debug!(listener = name, %source, %error, "TLS handshake failed");
                return None;
            }
            Err(_) => {
                tracing::debug!(listener = name, %source, "TLS handshake took too long");
                return None;
            }
        };
        slot.shook_hands();
        let shown = tls
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| chain.first());
        let identity = match shown.map(|leaf| PeerIdentity::from_der(leaf)).transpose() {
            Ok(identity) => identity,
            Err(error) => {
                tracing::debug!(listener = name, %source, %error, "certificate refused");
                return None;
            }
        };
        let peer = Arc::new(Peer {
            identity,
            source,
            id: next_id(),
            guard: OnceLock::new(),
            end_point,
            cancel: cancel.clone(),
        });
        match admit(&peer) {
            Ok(closed) => Some(Connection {
                tls,
                cancelled: Box::pin(cancel.cancelled_owned()),
                peer,
                closed,
                held: None,
                _slot: slot,
            }),
            Err(reason) => {
                let who = peer
                    .identity
                    .as_ref()
                    .map(|identity| identity.id.to_string())
                    .unwrap_or_default();
                tracing::info!(listener = name, %source, who, reason, "connection refused");
                None
            }
        }
    }
}

fn set_options(tcp: &TcpStream) -> std::io::Result<()> {
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(TCP_KEEPALIVE)
        .with_interval(TCP_KEEPALIVE / 3);
    tcp.set_nodelay(true)?;
    socket2::SockRef::from(tcp).set_tcp_keepalive(&keepalive)
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A live connection.
pub(crate) struct Connection {
    tls: TlsStream<TcpStream>,
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    peer: Arc<Peer>,
    closed: Closed,
    held: Option<Held>,
    _slot: Slot,
}

impl Connection {
    /// An error once the connection is cancelled; else the task is woken when that happens.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let aborted = || {
            Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "closed by the control plane",
            ))
        };
        if self.cancelled.as_mut().poll(cx).is_ready() {
            return aborted();
        }
        if let Poll::Ready(held) = self.closed.as_mut().poll(cx) {
            self.held = Some(held);
            // It is not polled again: from here on the token answers.
            self.peer.cancel.cancel();
            return aborted();
        }
        Ok(())
    }
}

impl Connected for Connection {
    type ConnectInfo = Arc<Peer>;

    fn connect_info(&self) -> Arc<Peer> {
        Arc::clone(&self.peer)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.tls).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}

#[derive(Default)]
struct Taken {
    total: usize,
    by_source: HashMap<IpAddr, Mine>,
}

/// What one source has.
#[derive(Default)]
struct Mine {
    connections: usize,
    handshakes: usize,
}

/// Counts a listener's connections.
struct Slots {
    limits: Limits,
    taken: Mutex<Taken>,
}

impl Slots {
    fn lock(&self) -> std::sync::MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, source: IpAddr) -> Result<Slot, &'static str> {
        let mut taken = self.lock();
        if taken.total >= self.limits.connections {
            return Err("the listener has as many connections as limits.connections allows");
        }
        let (total, found) = (taken.total, taken.by_source.get(&source));
        let (connections, handshakes) = found.map_or((0, 0), |mine| (mine.connections, mine.handshakes));
        if connections >= self.limits.per_source {
            return Err("the source has as many connections as limits.connections_per_source allows");
        }
        // A quarter is left to others, or one source that never finishes a handshake shuts everybody out.
        if handshakes >= self.limits.handshakes - self.limits.handshakes / 4 {
            return Err("the source has three quarters of limits.handshakes under way");
        }
        taken.total = total + 1;
        let mine = taken.by_source.entry(source).or_default();
        mine.connections += 1;
        mine.handshakes += 1;
        Ok(Slot {
            slots: Arc::clone(self),
            source,
            shaking_hands: true,
        })
    }
}

/// One connection's place; given back on drop.
struct Slot {
    slots: Arc<Slots>,
    source: IpAddr,
    shaking_hands: bool,
}

impl Slot {
    /// The handshake is done; the connection goes on.
    fn shook_hands(&mut self) {
        if std::mem::take(&mut self.shaking_hands)
            && let Some(mine) = self.slots.lock().by_source.get_mut(&self.source)
        {
            mine.handshakes -= 1;
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shook_hands();
        let mut taken = self.slots.lock();
        taken.total -= 1;
        if let Some(mine) = taken.by_source.get_mut(&self.source) {
            mine.connections -= 1;
            if mine.connections == 0 {
                taken.by_source.remove(&self.source);
            }
        }
    }
}

/// Lets one message a second pass, so that a flood of refusals is no flood of log lines.
#[derive(Default)]
pub(crate) struct Throttle(AtomicU64);

impl Throttle {
    /// Whether this one passes.
    pub(crate) fn now(&self) -> bool {
        let second = palyra_platform::boot_ms() / 1000 + 1;
        self.0.swap(second, Ordering::Relaxed) != second
    }
}

#[cfg(test)]
mod tests;
