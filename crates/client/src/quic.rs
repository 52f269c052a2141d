//! One QUIC connection to one replica, and the calls of a node on it.
//!
//! What never lives here: which calls there are (see [`crate::plane`]), choosing a replica, fallbacks. Invariants: who
//! the server is comes from its certificate's URI name and chain, as with gRPC; a connection counts as made only when
//! the replica has answered on it, so that a network that lets only the first datagrams through is noticed; a call
//! whose stream broke is reported as lost, never as refused.

mod socket;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use palyra_pki::tls::{self, ALPN_NODE, SharedIdentity, SharedTrust};
use palyra_pki::{ChainError, SpiffeId};
use palyra_proto::quic::v1 as wire;
use palyra_quic::close::Close;
use palyra_quic::frame::Item;
use palyra_quic::{Broken, Reader, VERSION, Writer, method, settings};
use prost::Message;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, ConnectionError, Endpoint, EndpointConfig, TokioRuntime, TransportErrorCode};
use rustls::AlertDescription;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::connect::{ConnectError, ConnectErrorKind, wall_clock};
use crate::error::{Failure, from_detail};
use crate::plane::Answer;
use socket::Socket;

/// The largest message of a replica that is taken: an assignment with a payload of 512 KiB, and room.
const MESSAGE: usize = 2 << 20;
/// How long the last words of a connection may take.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// The code of a TLS alert in CONNECTION_CLOSE is behind this.
const ALERTS: u64 = 0x100;

/// How connections are made and watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuicOptions {
    /// For name lookup, handshake and the first answer together.
    pub connect_timeout: Duration,
    /// How often a sign of life is given when there is nothing else to say.
    pub keepalive: Duration,
    /// Without a sign of the replica for this long, the connection counts as broken.
    pub idle: Duration,
}

impl Default for QuicOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            keepalive: Duration::from_secs(1),
            idle: Duration::from_secs(6),
        }
    }
}

/// TLS of QUIC towards a replica of a known cluster, presenting `identity`. With `expected`, only that replica will do.
///
/// # Errors
/// When the identity can't be used.
pub fn mutual(
    trust: Arc<SharedTrust>,
    identity: Arc<SharedIdentity>,
    expected: Option<SpiffeId>,
) -> Result<Arc<rustls::ClientConfig>, ChainError> {
    tls::client_verified(trust, expected, Some(identity), &wall_clock(), &[ALPN_NODE])
}

/// One connection. Cheap to clone; closed when the last clone and the last stream of it are dropped.
#[derive(Clone)]
pub struct QuicConnection(Arc<Inner>);

struct Inner {
    connection: quinn::Connection,
    endpoint: Endpoint,
    watch: AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.watch.abort();
        self.connection.close(Close::Done.code(), b"");
    }
}

impl fmt::Debug for QuicConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QuicConnection({})", self.0.connection.remote_address())
    }
}

/// Connects to `address` (`host:port`, UDP), and asks the replica whether it serves.
///
/// # Errors
/// When there is no connection, or no answer on it in time.
pub async fn connect(
    address: &str,
    tls: &Arc<rustls::ClientConfig>,
    options: &QuicOptions,
) -> Result<QuicConnection, ConnectError> {
    let fail = |kind, cause| ConnectError {
        address: address.to_owned(),
        kind,
        cause,
        chain: None,
    };
    let made = timeout(options.connect_timeout, open(address, tls, options)).await;
    let made = made.unwrap_or_else(|_| {
        let waited = options.connect_timeout.as_millis();
        Err((
            ConnectErrorKind::Unreachable,
            format!("no answer over UDP within {waited} ms"),
        ))
    });
    made.map_err(|(kind, cause)| fail(kind, cause))
}

type Why = (ConnectErrorKind, String);

async fn open(
    address: &str,
    tls: &Arc<rustls::ClientConfig>,
    options: &QuicOptions,
) -> Result<QuicConnection, Why> {
    let unreachable = |cause: String| (ConnectErrorKind::Unreachable, cause);
    let mut found = tokio::net::lookup_host(address)
        .await
        .map_err(|error| unreachable(error.to_string()))?;
    let peer = found
        .next()
        .ok_or_else(|| unreachable("the name has no address".to_owned()))?;
    let socket = Socket::towards(peer).map_err(|error| unreachable(format!("no UDP socket: {error}")))?;
    let crypto =
        QuicClientConfig::try_from(Arc::clone(tls)).map_err(|error| unreachable(error.to_string()))?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    // The replica opens no calls here.
    config.transport_config(settings::transport(0, options.idle, options.keepalive));
    let (shared, runtime) = (Arc::clone(&socket), Arc::new(TokioRuntime));
    let endpoint = Endpoint::new_with_abstract_socket(EndpointConfig::default(), None, shared, runtime)
        .map_err(|error| unreachable(format!("no UDP socket: {error}")))?;
    let (host, _port) = address.rsplit_once(':').unwrap_or((address, ""));
    let name = host.trim_start_matches('[').trim_end_matches(']');
    let connecting = endpoint
        .connect_with(config, peer, name)
        .map_err(|error| unreachable(error.to_string()))?;
    let connection = tokio::select! {
        connected = connecting => connected.map_err(|error| explain(&error))?,
        () = socket.refused() => return Err(unreachable("nobody listens on this UDP port".to_owned())),
    };
    let connection = QuicConnection::new(connection, endpoint, socket);
    // In TLS 1.3 the server looks at our certificate after we are done; a first answer is worth more than a handshake.
    match connection.health().await {
        Ok(_) | Err(Failure::Answered(_)) => Ok(connection),
        Err(Failure::Lost { cause, refused: true }) => Err((ConnectErrorKind::Refused, cause)),
        Err(Failure::Lost { cause, .. }) => Err(unreachable(cause)),
    }
}

impl QuicConnection {
    fn new(connection: quinn::Connection, endpoint: Endpoint, socket: Arc<Socket>) -> QuicConnection {
        let watched = connection.clone();
        let watch = tokio::spawn(async move {
            tokio::select! {
                _ = watched.closed() => {}
                () = socket.refused() => watched.close(Close::Done.code(), b"the port is closed"),
            }
        });
        QuicConnection(Arc::new(Inner {
            connection,
            endpoint,
            watch: watch.abort_handle(),
        }))
    }

    /// Asks whether the replica serves nodes.
    ///
    /// # Errors
    /// The replica's refusal, or a broken connection.
    pub async fn health(&self) -> Answer<wire::HealthResponse> {
        self.unary(method::HEALTH, &wire::HealthRequest {}).await
    }

    /// Closes the connection, and waits a moment for the replica to hear of it.
    pub async fn close(&self) {
        self.0.connection.close(Close::Done.code(), b"");
        // Whoever is gone already answers to nothing.
        let _ = timeout(LAST_WORDS, self.0.endpoint.wait_idle()).await;
    }

    /// Goes on from another local address, as a machine does that changes networks.
    ///
    /// # Errors
    /// When there is no such socket.
    pub fn rebind(&self, socket: std::net::UdpSocket) -> std::io::Result<()> {
        self.0.endpoint.rebind(socket)
    }

    async fn begin(&self, method: &str) -> Answer<(Writer, Reader)> {
        let opened = self.0.connection.open_bi().await;
        let (send, receive) = opened.map_err(|error| lost(&error))?;
        let mut writer = Writer::new(send);
        let header = wire::Header {
            version: VERSION,
            method: method.to_owned(),
            deadline_ms: 0,
        };
        let begun = writer.header(header).await;
        begun.map_err(|broken| self.broken(broken))?;
        Ok((writer, Reader::new(receive, MESSAGE)))
    }

    /// A call with one request and one answer.
    pub(crate) async fn unary<A: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Answer<A> {
        let (mut writer, reader) = self.begin(method).await?;
        // A refusal may come before the request is through; then it is what counts.
        if let Ok(()) = writer.message(request).await {
            writer.finish();
        }
        let mut answers = QuicIncoming::new(self, reader, None);
        let answer = answers.message().await?;
        let answer = answer.ok_or_else(|| odd("the replica ended the call without an answer"))?;
        match answers.message::<A>().await? {
            None => Ok(answer),
            Some(_) => Err(odd("the replica answered twice")),
        }
    }

    /// A call with one request and many answers.
    pub(crate) async fn many(&self, method: &str, request: &impl Message) -> Answer<QuicIncoming> {
        let (mut writer, reader) = self.begin(method).await?;
        if let Ok(()) = writer.message(request).await {
            writer.finish();
        }
        Ok(QuicIncoming::new(self, reader, None))
    }

    /// A call that sends what `messages` yields, and is answered with many.
    pub(crate) async fn stream<M: Message + 'static>(
        &self,
        method: &str,
        mut messages: mpsc::Receiver<M>,
    ) -> Answer<QuicIncoming> {
        let (mut writer, reader) = self.begin(method).await?;
        let sending = tokio::spawn(async move {
            while let Some(message) = messages.recv().await {
                // Who reads the answers finds out why.
                if writer.message(&message).await.is_err() {
                    return;
                }
            }
            writer.finish();
        });
        Ok(QuicIncoming::new(self, reader, Some(sending.abort_handle())))
    }

    fn broken(&self, broken: Broken) -> Failure {
        match broken {
            Broken::Fault(fault) => odd(&fault.to_string()),
            Broken::Connection(error) => lost(&error),
            // A stream that is given up usually is one of a connection that is.
            Broken::Stream => match self.0.connection.close_reason() {
                Some(error) => lost(&error),
                None => odd("the replica gave the call up"),
            },
        }
    }
}

/// The messages that a call answers with.
#[derive(Debug)]
pub struct QuicIncoming {
    connection: QuicConnection,
    reader: Reader,
    sending: Option<AbortHandle>,
    is_over: bool,
}

impl Drop for QuicIncoming {
    fn drop(&mut self) {
        if let Some(sending) = self.sending.take() {
            sending.abort();
        }
    }
}

impl QuicIncoming {
    fn new(connection: &QuicConnection, reader: Reader, sending: Option<AbortHandle>) -> QuicIncoming {
        QuicIncoming {
            connection: connection.clone(),
            reader,
            sending,
            is_over: false,
        }
    }

    /// The next message; nothing after the last. Safe to cancel.
    pub(crate) async fn message<A: Message + Default>(&mut self) -> Answer<Option<A>> {
        if self.is_over {
            return Ok(None);
        }
        let item = self.reader.next().await;
        match item.map_err(|broken| self.connection.broken(broken))? {
            Some(Item::Message(bytes)) => {
                let message = A::decode(bytes).map_err(|_| odd("an answer is no message of this call"))?;
                Ok(Some(message))
            }
            Some(Item::Status(status)) => {
                self.is_over = true;
                match status.error {
                    Some(detail) => Err(Failure::Answered(from_detail(detail))),
                    None => Ok(None),
                }
            }
            Some(Item::Header(_)) => Err(odd("an answer has a header")),
            None => Err(odd("the stream ended without a status")),
        }
    }
}

fn odd(cause: &str) -> Failure {
    Failure::Lost {
        cause: cause.to_owned(),
        refused: false,
    }
}

/// What the end of a connection says about a call on it.
fn lost(error: &ConnectionError) -> Failure {
    let (kind, cause) = explain(error);
    Failure::Lost {
        cause,
        refused: kind == ConnectErrorKind::Refused,
    }
}

/// The end of a connection, for a human.
fn explain(error: &ConnectionError) -> Why {
    use ConnectErrorKind::{Refused, Unreachable, WrongServer};
    match error {
        ConnectionError::ApplicationClosed(closed) => {
            let (close, reason) = (
                Close::of_code(closed.error_code),
                String::from_utf8_lossy(&closed.reason),
            );
            let kind = if matches!(close, Close::Revoked | Close::Expired) {
                Refused
            } else {
                Unreachable
            };
            (
                kind,
                format!("the replica closed the connection ({}): {reason}", close.as_str()),
            )
        }
        ConnectionError::ConnectionClosed(closed) => match alert(closed.error_code) {
            Some(AlertDescription::NoApplicationProtocol) => (
                Unreachable,
                "E1063: the replica speaks another version of the node protocol".to_owned(),
            ),
            Some(alert) => {
                let received = rustls::Error::AlertReceived(alert);
                match tls::explain_alert(&received) {
                    Some(words) => (Refused, words.to_owned()),
                    None => (Unreachable, format!("no TLS: {received}")),
                }
            }
            None if closed.error_code == TransportErrorCode::CONNECTION_REFUSED => (
                Unreachable,
                "the replica takes no more QUIC connections now".to_owned(),
            ),
            None => (
                Unreachable,
                format!("the replica closed the connection: {closed}"),
            ),
        },
        // An alert that this side gives: the server is not who it should be.
        ConnectionError::TransportError(own) if alert(own.code).is_some() => {
            (WrongServer, own.reason.clone())
        }
        ConnectionError::TimedOut => (Unreachable, "the replica went silent".to_owned()),
        ConnectionError::LocallyClosed => {
            (Unreachable, "nobody listens on this UDP port any more".to_owned())
        }
        ConnectionError::Reset => (
            Unreachable,
            "the replica does not know the connection: it was restarted".to_owned(),
        ),
        other => (Unreachable, other.to_string()),
    }
}

fn alert(code: TransportErrorCode) -> Option<AlertDescription> {
    let code = u64::from(code).checked_sub(ALERTS)?;
    Some(AlertDescription::from(u8::try_from(code).ok()?))
}
