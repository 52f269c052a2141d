//! One TLS connection to one replica, as a gRPC channel.
//!
//! What never lives here: choosing among replicas, retries, deadlines of calls (see [`crate::pool`]).
//! Invariants: who the server is comes from its certificate's URI name and chain, never from DNS; a channel
//! is one connection and never reconnects behind its owner's back, so a failed call always means that this
//! connection ended.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use palyra_pki::tls::{self, ALPN_H2, Clock, SeenServer, SharedIdentity, SharedTrust};
use palyra_pki::{ChainError, SpiffeId};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

/// How long the server's first word is waited for. One that says nothing at first is spoken to all the same.
const FIRST_WORD: Duration = Duration::from_millis(500);

/// How connections are made and watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectOptions {
    /// For name lookup, TCP and TLS together.
    pub connect_timeout: Duration,
    /// How long one connection is waited for alone, before another replica is tried beside it: what a machine
    /// that hangs costs a command.
    pub beside: Duration,
    /// How often an HTTP/2 ping is sent.
    pub keepalive_interval: Duration,
    /// How long its answer may take before the connection counts as broken.
    pub keepalive_timeout: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            beside: Duration::from_millis(200),
            keepalive_interval: Duration::from_secs(2),
            keepalive_timeout: Duration::from_secs(3),
        }
    }
}

/// Why there is no connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectErrorKind {
    /// Nobody answers there, or not with TLS.
    Unreachable,
    /// Somebody answers who is not the replica that is trusted.
    WrongServer,
    /// The server refused this side's certificate.
    Refused,
}

/// A connection that was not made. Nothing was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectError {
    /// `host:port` that was tried.
    pub address: String,
    /// Which kind of failure.
    pub kind: ConnectErrorKind,
    /// The cause, for a human.
    pub cause: String,
    /// Why the server's certificate was refused, when that was it.
    pub chain: Option<ChainError>,
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.address, self.cause)
    }
}

impl std::error::Error for ConnectError {}

/// The wall clock of this machine, for certificate checks.
#[must_use]
pub fn wall_clock() -> Clock {
    Clock::new(crate::ids::wall_ms)
}

/// TLS towards a replica of a known cluster, presenting `identity`. With `expected`, only that replica will
/// do.
///
/// # Errors
/// When the identity can't be used.
pub fn mutual(
    trust: Arc<SharedTrust>,
    identity: Arc<SharedIdentity>,
    expected: Option<SpiffeId>,
) -> Result<Arc<ClientConfig>, ChainError> {
    tls::client_verified(trust, expected, Some(identity), &wall_clock(), &[ALPN_H2])
}

/// TLS towards the enrol listener of a cluster whose bundle is known; nothing is presented.
///
/// # Errors
/// When the configuration can't be made.
pub fn enrol_trusted(trust: Arc<SharedTrust>) -> Result<Arc<ClientConfig>, ChainError> {
    tls::client_verified(trust, None, None, &wall_clock(), &[ALPN_H2])
}

/// As [`enrol_trusted`]; the server's certificate is then in `seen`. For recovery, which is bound to it.
///
/// # Errors
/// When the configuration can't be made.
pub fn enrol_trusted_recording(
    trust: Arc<SharedTrust>,
    seen: Arc<SeenServer>,
) -> Result<Arc<ClientConfig>, ChainError> {
    tls::client_verified_recording(trust, seen, &wall_clock(), &[ALPN_H2])
}

/// TLS towards the enrol listener of a cluster that is known by the pin of its root only.
///
/// # Errors
/// When the configuration can't be made.
pub fn enrol_pinned(
    pin: [u8; 32],
    cluster_id: &str,
    seen: Arc<SeenServer>,
) -> Result<Arc<ClientConfig>, ChainError> {
    tls::client_pinned(pin, cluster_id, seen, &wall_clock(), &[ALPN_H2])
}

/// TLS towards ANY server, whose certificate is recorded: for PIN pairing only, see
/// [`tls::client_unverified_for_pin_pairing`].
///
/// # Errors
/// When the configuration can't be made.
pub fn enrol_recording(seen: Arc<SeenServer>) -> Result<Arc<ClientConfig>, ChainError> {
    tls::client_unverified_for_pin_pairing(seen, &wall_clock(), &[ALPN_H2])
}

/// Connects to `address` (`host:port`). The channel is this one connection.
///
/// # Errors
/// When there is no connection; nothing was sent then.
pub async fn connect(
    address: &str,
    tls: &Arc<ClientConfig>,
    options: &ConnectOptions,
) -> Result<Channel, ConnectError> {
    let fail = |kind, cause: String| ConnectError {
        address: address.to_owned(),
        kind,
        cause,
        chain: None,
    };
    let opened = tokio::time::timeout(options.connect_timeout, open(address, tls)).await;
    let stream = opened.map_err(|_| {
        let waited = options.connect_timeout.as_millis();
        fail(
            ConnectErrorKind::Unreachable,
            format!("no TLS connection within {waited} ms"),
        )
    })??;
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| fail(ConnectErrorKind::Unreachable, format!("not an address: {error}")))?
        .http2_keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout)
        .keep_alive_while_idle(true);
    let slot = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
    let once = tower::service_fn(move |_| {
        let taken = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ended = || std::io::Error::new(std::io::ErrorKind::NotConnected, "the connection ended");
        std::future::ready(taken.ok_or_else(ended))
    });
    endpoint
        .connect_with_connector(once)
        .await
        .map_err(|error| fail(ConnectErrorKind::Unreachable, format!("no HTTP/2: {error}")))
}

async fn open(
    address: &str,
    tls: &Arc<ClientConfig>,
) -> Result<BufReader<TlsStream<TcpStream>>, ConnectError> {
    let fail = |kind, cause: String| ConnectError {
        address: address.to_owned(),
        kind,
        cause,
        chain: None,
    };
    let tcp = TcpStream::connect(address)
        .await
        .map_err(|error| fail(ConnectErrorKind::Unreachable, plain_io(&error)))?;
    // Requests are small and answered one by one: waiting to fill a segment only adds latency.
    tcp.set_nodelay(true)
        .map_err(|error| fail(ConnectErrorKind::Unreachable, plain_io(&error)))?;
    let name = server_name(address).ok_or_else(|| {
        fail(
            ConnectErrorKind::Unreachable,
            "not an address: expected host:port".to_owned(),
        )
    })?;
    let stream = TlsConnector::from(Arc::clone(tls)).connect(name, tcp).await;
    let mut stream = BufReader::new(stream.map_err(|error| handshake_error(address, &error))?);
    // In TLS 1.3 the server looks at our certificate after we are done, and a refusal would come to whichever
    // call is under way then, stripped of its reason by HTTP/2. Our servers speak first: their settings, or
    // why they don't.
    match tokio::time::timeout(FIRST_WORD, stream.fill_buf()).await {
        Ok(Ok([])) => Err(fail(
            ConnectErrorKind::Unreachable,
            "the connection ended early".to_owned(),
        )),
        Ok(Err(error)) => Err(handshake_error(address, &error)),
        Ok(Ok(_)) | Err(_) => Ok(stream),
    }
}

/// What goes into SNI. Nothing is verified against it.
fn server_name(address: &str) -> Option<ServerName<'static>> {
    let (host, _port) = address.rsplit_once(':')?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned()).ok()
}

fn handshake_error(address: &str, error: &std::io::Error) -> ConnectError {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let chain = tls.and_then(tls::chain_error).cloned();
    let (kind, cause) = match (&chain, tls.and_then(tls::explain_alert)) {
        (Some(chain), _) => (ConnectErrorKind::WrongServer, chain.to_string()),
        (None, Some(words)) => (ConnectErrorKind::Refused, words.to_owned()),
        (None, None) => (
            ConnectErrorKind::Unreachable,
            format!("no TLS: {}", plain_io(error)),
        ),
    };
    ConnectError {
        address: address.to_owned(),
        kind,
        cause,
        chain,
    }
}

/// What a failed read or write means, for a human.
pub(crate) fn plain_io(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        std::io::ErrorKind::ConnectionReset => "the connection was reset".to_owned(),
        std::io::ErrorKind::UnexpectedEof => "the connection ended early".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_closed_port_is_unreachable_and_says_so() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let tls = enrol_recording(SeenServer::new()).unwrap();
        let error = connect(&address, &tls, &ConnectOptions::default())
            .await
            .unwrap_err();
        assert_eq!(error.kind, ConnectErrorKind::Unreachable);
        assert!(error.cause.contains("refused"), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_is_given_up() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let tls = enrol_recording(SeenServer::new()).unwrap();
        let options = ConnectOptions {
            connect_timeout: Duration::from_millis(50),
            ..ConnectOptions::default()
        };
        let error = connect(&address, &tls, &options).await.unwrap_err();
        assert!(error.cause.contains("within 50 ms"), "{error}");
    }

    #[test]
    fn names_and_addresses_become_server_names() {
        for address in ["localhost:1", "127.0.0.1:1", "[::1]:1", "r1.example:7441"] {
            assert!(server_name(address).is_some(), "{address}");
        }
        assert!(server_name("no-port").is_none());
    }
}
