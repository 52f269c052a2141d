//! The dialling side: one connection per peer and lane, kept alive, dialled again when an address changes.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{BoxStream, Stream, StreamExt};
use hyper_util::rt::TokioIo;
use palyra_platform as platform;
use palyra_proto::peer::v1::Body;
use palyra_proto::peer::v1::peer_client::PeerClient;
use rustls::pki_types::ServerName;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

use super::{AddressBook, MESSAGE_MAX, REFUSAL};
use crate::peer::{Bodies, Lane, Method, PeerError, PeerTransport, Refusal};

/// How long dialling and the TLS handshake may take.
const CONNECT: Duration = Duration::from_secs(1);
/// A connection is asked for a sign of life as often, and given up when there is none for as long.
const KEEPALIVE: Duration = Duration::from_secs(2);
/// Flow-control window of one stream: more than one full batch of entries.
const STREAM_WINDOW: u32 = 2 * 1024 * 1024;
/// Flow-control window of a connection.
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;
/// DNS names are not looked at: the verifier in the configuration compares SPIFFE ids.
const SERVER_NAME: &str = "replica.palyra.internal";

/// The TLS configuration for dialling a replica: presents our certificate, accepts none but `replica/<id>`'s,
/// and offers `h2`. Asked for at each connection, so that a renewed certificate is used from the next one on.
pub type TlsFor = Arc<dyn Fn(u64) -> Result<Arc<rustls::ClientConfig>, String> + Send + Sync>;

type Tls = tokio_rustls::client::TlsStream<Socket>;
#[allow(clippy::disallowed_types)]
// The one place that dials.
type Socket = tokio::net::TcpStream;

/// Carries the peer protocol over gRPC and mutual TLS.
pub struct GrpcTransport {
    book: Arc<AddressBook>,
    tls: TlsFor,
    pool: Mutex<BTreeMap<(u64, Lane), (String, Channel)>>,
}

impl GrpcTransport {
    /// A transport that finds peers in `book` and secures connections as `tls` says.
    #[must_use]
    pub fn new(book: Arc<AddressBook>, tls: TlsFor) -> Arc<GrpcTransport> {
        Arc::new(GrpcTransport {
            book,
            tls,
            pool: Mutex::default(),
        })
    }

    fn client(&self, to: u64, lane: Lane) -> Result<PeerClient<Channel>, PeerError> {
        let unknown = || PeerError::Unreachable(format!("the address of replica {to} is not known"));
        let address = self.book.get(to).ok_or_else(unknown)?;
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let pooled = pool.get(&(to, lane)).filter(|(dialled, _)| *dialled == address);
        let channel = match pooled {
            Some((_, channel)) => channel.clone(),
            None => {
                let channel = self.dial(to, &address)?;
                pool.insert((to, lane), (address, channel.clone()));
                channel
            }
        };
        Ok(PeerClient::new(channel)
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX))
    }

    /// A connection that is made when it is first used, and again after it broke.
    fn dial(&self, to: u64, address: &str) -> Result<Channel, PeerError> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| PeerError::Unreachable(format!("`{address}` of replica {to}: {error}")))?
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let tls = self.tls.clone();
        let address = address.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let (tls, address) = (tls.clone(), address.clone());
            async move {
                let connected = platform::timeout(CONNECT, connect(to, &address, &tls)).await;
                let stream = connected.unwrap_or_else(|_| {
                    Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("{address} does not answer"),
                    ))
                })?;
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        });
        Ok(endpoint.connect_with_connector_lazy(connector))
    }
}

#[allow(clippy::disallowed_types)]
async fn connect(to: u64, address: &str, tls: &TlsFor) -> io::Result<Tls> {
    let config = tls(to).map_err(io::Error::other)?;
    let socket = Socket::connect(address).await?;
    socket.set_nodelay(true)?;
    let name = ServerName::try_from(SERVER_NAME).map_err(io::Error::other)?;
    tokio_rustls::TlsConnector::from(config)
        .connect(name, socket)
        .await
}

/// What a status means for who asked: whether the request can have had an effect.
fn failure(to: u64, status: &Status) -> PeerError {
    let refusal = status
        .metadata()
        .get(REFUSAL)
        .and_then(|value| value.to_str().ok())
        .and_then(parse_refusal);
    if let Some(refusal) = refusal {
        return PeerError::Refused {
            refusal,
            message: status.message().to_owned(),
        };
    }
    let mut cause: Option<&(dyn Error + 'static)> = status.source();
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return PeerError::Unreachable(format!("replica {to}: {}", root_cause(error)));
        }
        cause = error.source();
    }
    match status.code() {
        Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented => PeerError::Refused {
            refusal: Refusal::Unsupported,
            message: status.message().to_owned(),
        },
        _ => PeerError::Lost(format!("replica {to}: {status}")),
    }
}

fn root_cause<'e>(error: &'e (dyn Error + 'static)) -> &'e (dyn Error + 'static) {
    let mut last = error;
    while let Some(next) = last.source() {
        last = next;
    }
    last
}

fn parse_refusal(text: &str) -> Option<Refusal> {
    [
        Refusal::WrongCluster,
        Refusal::WrongReplica,
        Refusal::Impostor,
        Refusal::Malformed,
        Refusal::Stopped,
        Refusal::Unsupported,
        Refusal::Removed,
    ]
    .into_iter()
    .find(|refusal| refusal.as_str() == text)
}

/// Bodies as messages. A named type: the compiler cannot prove that a mapped stream outlives tonic's future.
struct Outgoing(BoxStream<'static, Bytes>);

impl Stream for Outgoing {
    type Item = Body;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Body>> {
        self.0
            .poll_next_unpin(cx)
            .map(|body| body.map(|body| Body { body }))
    }
}

impl PeerTransport for GrpcTransport {
    fn call(
        &self,
        to: u64,
        _method: Method,
        body: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let client = self.client(to, Lane::Call);
        Box::pin(async move {
            let mut client = client?;
            match platform::timeout(timeout, client.invoke(Body { body })).await {
                Ok(Ok(answer)) => Ok(answer.into_inner().body),
                Ok(Err(status)) => Err(failure(to, &status)),
                Err(_) => Err(PeerError::Timeout(timeout)),
            }
        })
    }

    fn stream(
        &self,
        to: u64,
        lane: Lane,
        requests: BoxStream<'static, Bytes>,
    ) -> BoxFuture<'static, Result<Bodies, PeerError>> {
        let client = self.client(to, lane);
        let requests = Outgoing(requests);
        Box::pin(async move {
            let mut client = client?;
            let answers = match lane {
                Lane::Forward => client.forward(requests).await,
                _ => client.append(requests).await,
            };
            let answers = answers.map_err(|status| failure(to, &status))?.into_inner();
            let bodies = answers.map(move |answer| match answer {
                Ok(Body { body }) => Ok(body),
                Err(status) => Err(failure(to, &status)),
            });
            Ok(bodies.boxed())
        })
    }

    fn snapshot(
        &self,
        to: u64,
        frames: BoxStream<'static, Bytes>,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let client = self.client(to, Lane::Snapshot);
        let frames = Outgoing(frames);
        Box::pin(async move {
            let answer = client?.snapshot(frames).await;
            answer
                .map(|answer| answer.into_inner().body)
                .map_err(|status| failure(to, &status))
        })
    }
}
