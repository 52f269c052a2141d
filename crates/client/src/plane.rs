//! The calls of a node, whatever carries them: one connection to one replica, over gRPC or QUIC.
//!
//! What never lives here: choosing a replica or a transport, retries, deadlines. Invariants: who uses a [`Connection`]
//! sees messages and [`Failure`]s only, and can't tell the transports apart but by [`Connection::transport`].
//!
//! To add a unary call: one method here that names it on each transport, as [`Connection::renew`] does. A call that
//! answers with a stream returns an [`Incoming`].

use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_service_client::NodeServiceClient;
use palyra_quic::method;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use crate::error::{Failure, classify};
use crate::quic::{QuicConnection, QuicIncoming};

/// What one try of a call comes to.
pub type Answer<A> = Result<A, Failure>;

/// One connection to one replica, for the calls of a node. Cheap to clone; it never connects anew by itself.
#[derive(Debug, Clone)]
pub enum Connection {
    /// Over HTTP/2.
    Grpc(Channel),
    /// Over UDP.
    Quic(QuicConnection),
}

/// The messages that a call answers with, one by one.
#[derive(Debug)]
pub enum Incoming<A> {
    /// Over HTTP/2.
    Grpc(Streaming<A>),
    /// Over UDP.
    Quic(QuicIncoming),
}

impl<A: Message + Default> Incoming<A> {
    /// The next message; nothing after the last. Safe to cancel.
    ///
    /// # Errors
    /// Why the stream broke off.
    pub async fn message(&mut self) -> Answer<Option<A>> {
        match self {
            Incoming::Grpc(stream) => stream.message().await.map_err(|status| classify(&status)),
            Incoming::Quic(stream) => stream.message().await,
        }
    }
}

fn grpc(channel: &Channel) -> NodeServiceClient<Channel> {
    NodeServiceClient::new(channel.clone())
}

fn answer<A>(answered: Result<Response<A>, Status>) -> Answer<A> {
    answered
        .map(Response::into_inner)
        .map_err(|status| classify(&status))
}

impl Connection {
    /// Closes it; over QUIC, waits a moment for the replica to hear of it, which TCP sees to by itself.
    pub async fn close(self) {
        if let Connection::Quic(quic) = self {
            quic.close().await;
        }
    }

    /// What a session on it is called: `stream` or `quic`.
    #[must_use]
    pub fn transport(&self) -> &'static str {
        match self {
            Connection::Grpc(_) => "stream",
            Connection::Quic(_) => "quic",
        }
    }

    /// Registers what the node is and can.
    ///
    /// # Errors
    /// The replica's refusal, or a broken connection; so with each call here.
    pub async fn register(&self, request: wire::RegisterRequest) -> Answer<wire::RegisterResponse> {
        match self {
            Connection::Grpc(channel) => answer(grpc(channel).register(request).await),
            Connection::Quic(quic) => quic.unary(method::REGISTER, &request).await,
        }
    }

    /// Opens a session that sends what `messages` yields. The first must be there already, and be Attach.
    ///
    /// # Errors
    /// As with each call here.
    pub async fn session(
        &self,
        messages: mpsc::Receiver<wire::NodeMessage>,
    ) -> Answer<Incoming<wire::ServerMessage>> {
        match self {
            Connection::Grpc(channel) => {
                let opened = grpc(channel).session(ReceiverStream::new(messages)).await;
                answer(opened).map(Incoming::Grpc)
            }
            Connection::Quic(quic) => quic.stream(method::SESSION, messages).await.map(Incoming::Quic),
        }
    }

    /// Attaches without a stream, or waits for messages: the fallback where streams do not pass, over gRPC only.
    ///
    /// # Errors
    /// As with each call here.
    pub async fn poll(&self, request: wire::PollRequest) -> Answer<wire::PollResponse> {
        match self {
            Connection::Grpc(channel) => answer(grpc(channel).poll(request).await),
            Connection::Quic(_) => Err(Failure::Lost {
                cause: "there is no polling over QUIC".to_owned(),
                refused: false,
            }),
        }
    }

    /// Tells a result outside of a stream.
    ///
    /// # Errors
    /// As with each call here.
    pub async fn report(&self, request: wire::ReportRequest) -> Answer<wire::ReportResponse> {
        match self {
            Connection::Grpc(channel) => answer(grpc(channel).report(request).await),
            Connection::Quic(quic) => quic.unary(method::REPORT, &request).await,
        }
    }

    /// Opens the feed: what happens to the node, and what every node must know of the cluster.
    ///
    /// # Errors
    /// As with each call here.
    pub async fn events(
        &self,
        request: wire::NodeEventsRequest,
    ) -> Answer<Incoming<wire::NodeEventsResponse>> {
        match self {
            Connection::Grpc(channel) => {
                let opened = grpc(channel).stream_events(request).await;
                answer(opened).map(Incoming::Grpc)
            }
            Connection::Quic(quic) => {
                let opened = quic.many(method::STREAM_EVENTS, &request).await;
                opened.map(Incoming::Quic)
            }
        }
    }

    /// Asks for a new certificate.
    ///
    /// # Errors
    /// As with each call here.
    pub async fn renew(&self, request: wire::RenewRequest) -> Answer<wire::RenewResponse> {
        match self {
            Connection::Grpc(channel) => answer(grpc(channel).renew(request).await),
            Connection::Quic(quic) => quic.unary(method::RENEW, &request).await,
        }
    }
}
