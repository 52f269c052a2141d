//! The answering side: a tonic service over [`PeerService`]. The listener and its TLS acceptor are the
//! server's.

use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use palyra_platform as platform;
use palyra_proto::peer::v1::Body;
use palyra_proto::peer::v1::peer_server::{Peer, PeerServer};
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{MESSAGE_MAX, REFUSAL};
use crate::peer::{Bodies, PeerError, Refusal};
use crate::service::PeerService;

/// Which replica a connection's certificate names. The listener inserts it into the extensions of each
/// request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerReplica(pub u64);

/// Implements `palyra.peer.v1.Peer`.
pub struct PeerEndpoint {
    service: PeerService,
}

/// The gRPC service to mount on the peer listener.
#[must_use]
pub fn peer_server(service: PeerService) -> PeerServer<PeerEndpoint> {
    PeerServer::new(PeerEndpoint { service })
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX)
}

fn caller<T>(request: &Request<T>) -> Result<u64, Status> {
    let peer = request.extensions().get::<PeerReplica>();
    peer.map(|peer| peer.0)
        .ok_or_else(|| Status::unauthenticated("only replicas of the cluster speak on this port"))
}

fn status(error: PeerError) -> Status {
    let PeerError::Refused { refusal, message } = error else {
        return Status::unavailable(error.to_string());
    };
    let code = match refusal {
        Refusal::WrongCluster | Refusal::WrongReplica => Code::FailedPrecondition,
        Refusal::Impostor | Refusal::Removed => Code::PermissionDenied,
        Refusal::Malformed => Code::InvalidArgument,
        Refusal::Stopped => Code::Unavailable,
        Refusal::Unsupported => Code::Unimplemented,
    };
    let mut status = Status::new(code, message);
    status
        .metadata_mut()
        .insert(REFUSAL, MetadataValue::from_static(refusal.as_str()));
    status
}

fn bodies(from: u64, stream: Streaming<Body>) -> Bodies {
    let lost = move |status: Status| PeerError::Lost(format!("replica {from}: {}", status.message()));
    stream
        .map(move |message| message.map(|message| message.body).map_err(lost))
        .boxed()
}

fn messages(bodies: Bodies) -> BoxStream<'static, Result<Body, Status>> {
    bodies
        .map(|body| body.map(|body| Body { body }).map_err(status))
        .boxed()
}

fn reply(result: Result<Bytes, PeerError>) -> Result<Response<Body>, Status> {
    result.map(|body| Response::new(Body { body })).map_err(status)
}

#[tonic::async_trait]
impl Peer for PeerEndpoint {
    async fn invoke(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let from = caller(&request)?;
        reply(self.service.handle_call(from, request.into_inner().body).await)
    }

    type AppendStream = BoxStream<'static, Result<Body, Status>>;

    async fn append(
        &self,
        request: Request<Streaming<Body>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let from = caller(&request)?;
        let answers = self
            .service
            .handle_append(from, bodies(from, request.into_inner()));
        Ok(Response::new(messages(answers)))
    }

    type ForwardStream = BoxStream<'static, Result<Body, Status>>;

    async fn forward(
        &self,
        request: Request<Streaming<Body>>,
    ) -> Result<Response<Self::ForwardStream>, Status> {
        let from = caller(&request)?;
        let answers = self
            .service
            .handle_forward(from, bodies(from, request.into_inner()));
        Ok(Response::new(messages(answers)))
    }

    async fn snapshot(&self, request: Request<Streaming<Body>>) -> Result<Response<Body>, Status> {
        let from = caller(&request)?;
        let (service, frames) = (self.service.clone(), bodies(from, request.into_inner()));
        // A task of its own: when the connection breaks, what was received must still be cleared away.
        let received = platform::spawn(async move { service.handle_snapshot(from, frames).await });
        reply(
            received
                .await
                .unwrap_or_else(|ended| Err(PeerError::Lost(ended.to_string()))),
        )
    }
}
