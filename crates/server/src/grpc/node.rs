//! `NodeService`: the calls of [`crate::nodeplane`] over gRPC.
//!
//! What never lives here: what a call does.

use std::pin::Pin;

use futures::{Stream, StreamExt};
use palyra_control::{Error, Transport};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_service_server::NodeService;
use tonic::{Request, Response, Status, Streaming};

use super::{Gateway, connection, identity};
use crate::nodeplane::{Answers, Broken, NodePlane, Origin};
use crate::status;

/// The response body of a call that answers with a stream.
type Body<A> = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;

#[tonic::async_trait]
impl NodeService for Gateway {
    type SessionStream = Body<wire::ServerMessage>;
    type StreamEventsStream = Body<wire::NodeEventsResponse>;

    async fn register(
        &self,
        request: Request<wire::RegisterRequest>,
    ) -> Result<Response<wire::RegisterResponse>, Status> {
        self.unary(request, NodePlane::register).await
    }

    async fn session(
        &self,
        request: Request<Streaming<wire::NodeMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let from = origin(&request)?;
        let inbound = request.into_inner().map(|message| message.map_err(broken));
        let answers = self.nodes.clone().session(from, inbound).await;
        self.stream(answers)
    }

    async fn poll(
        &self,
        request: Request<wire::PollRequest>,
    ) -> Result<Response<wire::PollResponse>, Status> {
        self.unary(request, NodePlane::poll).await
    }

    async fn report(
        &self,
        request: Request<wire::ReportRequest>,
    ) -> Result<Response<wire::ReportResponse>, Status> {
        self.unary(request, NodePlane::report).await
    }

    async fn stream_events(
        &self,
        request: Request<wire::NodeEventsRequest>,
    ) -> Result<Response<Self::StreamEventsStream>, Status> {
        let from = origin(&request)?;
        let answers = self.nodes.clone().stream_events(from, request.into_inner()).await;
        self.stream(answers)
    }

    async fn renew(
        &self,
        request: Request<wire::RenewRequest>,
    ) -> Result<Response<wire::RenewResponse>, Status> {
        self.unary(request, NodePlane::renew).await
    }
}

impl Gateway {
    /// A call with one answer.
    async fn unary<Q, A, F>(
        &self,
        request: Request<Q>,
        call: impl FnOnce(NodePlane, Origin, Q) -> F + Send,
    ) -> Result<Response<A>, Status>
    where
        Q: Send,
        F: Future<Output = Result<A, Error>> + Send,
    {
        let from = origin(&request)?;
        let answer = call(self.nodes.clone(), from, request.into_inner()).await;
        answer.map(Response::new).map_err(|error| self.fail(error))
    }

    /// A call with many answers.
    fn stream<A: 'static>(&self, answers: Result<Answers<A>, Error>) -> Result<Response<Body<A>>, Status> {
        let gateway = self.clone();
        let answers = answers.map_err(|error| self.fail(error))?;
        let body = answers.map(move |answer| answer.map_err(|error| gateway.fail(error)));
        Ok(Response::new(Box::pin(body)))
    }
}

/// Who calls, and on which connection.
fn origin<T>(request: &Request<T>) -> Result<Origin, Status> {
    Ok(Origin {
        peer: identity(request)?,
        connection: connection(request)?.guard.get().copied(),
        transport: Transport::Stream,
    })
}

/// A status of gRPC itself in our words, where it is about the node's message.
fn broken(status: Status) -> Broken {
    status::framing(&status).map_or(Broken::Lost, Broken::Refused)
}
