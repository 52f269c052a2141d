//! `NodeService`: what a paired node says and hears. The stream's two directions are in [`super::session`].

use std::pin::Pin;

use futures::Stream;
use palyra_control::AttachRequest;
use palyra_control::Completion;
use palyra_control::Error;
use palyra_control::Registration;
use palyra_control::Transport;
use palyra_control::{Outbound, ResultAnswer};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_service_server::NodeService;
use palyra_proto::node::v1::server_message::Body;
use palyra_state::nodes::{Capability, Effect};
use tonic::{Request, Response, Status, Streaming};

use super::{Gateway, convert, identity};

#[tonic::async_trait]
impl NodeService for Gateway {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<wire::ServerMessage, Status>> + Send>>;

    async fn register(
        &self,
        request: Request<wire::RegisterRequest>,
    ) -> Result<Response<wire::RegisterResponse>, Status> {
        let caller = self.node(&request, &request.get_ref().device_id)?;
        let register = request.into_inner();
        let capabilities: Result<Vec<Capability>, Error> =
            register.capabilities.into_iter().map(capability).collect();
        let registration = Registration {
            request_id: register.request_id,
            platform: register.platform,
            agent_version: register.agent_version,
            capabilities: capabilities.map_err(|error| self.fail(error))?,
            labels: register.labels.into_iter().collect(),
        };
        let registered = self
            .control
            .register(&caller, registration)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RegisterResponse {
            generation: registered.generation,
            endpoints: convert::node_endpoints(registered.endpoints),
            write: convert::write_info(registered.write),
        }))
    }

    async fn session(
        &self,
        request: Request<Streaming<wire::NodeMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.open_session(request).await.map(Response::new)
    }

    async fn poll(
        &self,
        request: Request<wire::PollRequest>,
    ) -> Result<Response<wire::PollResponse>, Status> {
        let peer = identity(&request)?;
        let poll = request.into_inner();
        let attach = poll.attach.map(|attach| AttachRequest {
            device_id: poll.device_id.clone(),
            held: attach.held,
            transport: Transport::Poll,
            // Polls of one session may come on many connections; none of them is the session's own.
            connection: 0,
        });
        let answer = self
            .control
            .poll(&peer, &poll.device_id, poll.epoch, attach, poll.wait_ms.into())
            .await
            .map_err(|error| self.fail(error))?;
        let messages = answer
            .messages
            .into_iter()
            .map(|message| self.server_message(message))
            .collect();
        Ok(Response::new(wire::PollResponse {
            epoch: answer.epoch,
            messages,
        }))
    }

    async fn report(
        &self,
        request: Request<wire::ReportRequest>,
    ) -> Result<Response<wire::ReportResponse>, Status> {
        let peer = identity(&request)?;
        let report = request.into_inner();
        let completion = completion(report.result.unwrap_or_default());
        let answer = self
            .control
            .report(&peer, &report.device_id, completion)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ReportResponse {
            answer: Some(result_answer(answer)),
        }))
    }

    async fn renew(
        &self,
        request: Request<wire::RenewRequest>,
    ) -> Result<Response<wire::RenewResponse>, Status> {
        let caller = self.node(&request, &request.get_ref().device_id)?;
        let renew = request.into_inner();
        let (chain, write) = self
            .control
            .renew(&caller, &renew.request_id, &renew.csr)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RenewResponse {
            chain: convert::chain(chain),
            write: convert::write_info(write),
        }))
    }
}

impl Gateway {
    /// The wire form of a message to a node.
    pub(super) fn server_message(&self, message: Outbound) -> wire::ServerMessage {
        let body = match message {
            Outbound::Assignment(assignment) => Body::Assignment(wire::Assignment {
                dispatch_id: assignment.dispatch_id.to_string(),
                epoch: assignment.epoch,
                capability: assignment.capability,
                payload: assignment.payload,
                effect: assignment.effect.to_owned(),
                deadline_at_ms: assignment.deadline_at_ms,
                remaining_ms: assignment.remaining_ms,
                attempt: assignment.attempt,
            }),
            Outbound::Heartbeat { sequence } => Body::Heartbeat(wire::HeartbeatAnswer { sequence }),
            Outbound::Result(answer) => Body::Result(result_answer(answer)),
            Outbound::Cancel { dispatch_id, reason } => Body::Cancel(wire::CancelDispatch {
                dispatch_id: dispatch_id.to_string(),
                reason,
            }),
            Outbound::Goodbye { end } => Body::Goodbye(wire::Goodbye {
                code: end.as_str().to_owned(),
                message: end.message().to_owned(),
                endpoints: convert::node_endpoints(self.control.endpoints()),
            }),
        };
        wire::ServerMessage { body: Some(body) }
    }
}

fn capability(capability: wire::Capability) -> Result<Capability, Error> {
    let effect = Effect::parse(&capability.effect).ok_or_else(|| {
        let shown: String = capability.effect.chars().take(32).collect();
        Error::invalid(
            "capabilities.effect",
            format!("{shown:?} is no effect"),
            "send idempotent or once",
        )
    })?;
    Ok(Capability {
        name: capability.name,
        effect: effect as i32,
        timeout_ms: capability.timeout_ms,
        max_concurrency: capability.max_concurrency,
        local_mediation: capability.local_mediation,
        description: capability.description,
    })
}

/// A node's result as `control` takes it.
pub(super) fn completion(result: wire::Result) -> Completion {
    Completion {
        request_id: result.request_id,
        dispatch_id: result.dispatch_id,
        epoch: result.epoch,
        outcome: result.outcome,
        payload: result.payload,
        error_code: result.error_code,
        error_message: result.error_message,
    }
}

fn result_answer(answer: ResultAnswer) -> wire::ResultAnswer {
    wire::ResultAnswer {
        dispatch_id: answer.dispatch_id.to_string(),
        accepted: answer.accepted,
        error_code: answer.error_code,
        error_message: answer.error_message,
        retry: answer.retry,
    }
}
