//! What a node says and hears, whatever carries it: the one layer under gRPC and QUIC.
//!
//! What never lives here: sockets, tonic, quinn, and decisions (those are `palyra-control`'s). Invariants: a call
//! first asks `control` who the caller is, by the certificate of the connection, and only then looks at the request;
//! a call answers a message or a [`palyra_control::Error`], and each transport has one place that puts that error on
//! its wire.
//!
//! To add a unary call: declare it in `proto/node.proto`, write it here as a method `call(self, from, request)`, add
//! one line to `grpc/node.rs` and one to the table in `quic/calls.rs`. A call that answers with a stream returns
//! [`Answers`], as [`NodePlane::stream_events`] does. A new message of the session's stream is one arm in
//! `session::take`, or in [`NodePlane::server_message`], and works on both transports.

mod session;
mod worker;

use std::pin::Pin;

use futures::Stream;
use palyra_control::{
    AttachRequest, Caller, Completion, Control, Error, Event, Outbound, Registration, Renewal, ResultAnswer,
    Transport,
};
use palyra_pki::{PeerIdentity, Role};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::server_message::Body;
use palyra_proto::quic::v1 as quic;
use palyra_state::nodes::{Capability, Effect};

use crate::{convert, events};

pub(crate) use session::Broken;

/// What a call that answers with many messages answers. An error is the last of them.
pub(crate) type Answers<A> = Pin<Box<dyn Stream<Item = Result<A, Error>> + Send>>;

/// Who calls, and on which connection.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// From the certificate of the connection.
    pub(crate) peer: PeerIdentity,
    /// The connection's number in `control`'s registry; nothing when it was not entered, so that no revocation would
    /// find it and nothing that lasts may begin on it.
    pub(crate) connection: Option<u64>,
    /// How a session on it would be carried.
    pub(crate) transport: Transport,
}

/// The calls of nodes, in front of a control plane. Cheap to clone.
#[derive(Clone)]
pub(crate) struct NodePlane {
    control: Control,
}

impl NodePlane {
    /// The calls in front of `control`.
    pub(crate) fn new(control: Control) -> NodePlane {
        NodePlane { control }
    }

    fn admit(&self, from: &Origin, device_id: &str) -> Result<Caller, Error> {
        self.control.admit_node_as(&from.peer, device_id)
    }

    /// `node.health`: whether this replica serves nodes. Costs no quorum.
    #[expect(
        clippy::unused_async,
        reason = "as every call, for the tables of the transports"
    )]
    pub(crate) async fn health(
        self,
        from: Origin,
        _: quic::HealthRequest,
    ) -> Result<quic::HealthResponse, Error> {
        let admitted = match from.peer.id.role() {
            Role::Operator => self.control.admit_operator_local(&from.peer),
            _ => self.control.admit_node(&from.peer),
        };
        let serving = match admitted {
            Ok(_) => !self.control.is_draining(),
            Err(Error::Stale { .. }) => false,
            Err(error) => return Err(error),
        };
        Ok(quic::HealthResponse {
            replica_id: self.control.replica_id(),
            version: palyra_quic::VERSION,
            max_frame_bytes: u32::try_from(palyra_quic::DEFAULT_MAX_FRAME_BYTES).unwrap_or(u32::MAX),
            serving,
        })
    }

    /// `Register`: what the node is and can.
    pub(crate) async fn register(
        self,
        from: Origin,
        request: wire::RegisterRequest,
    ) -> Result<wire::RegisterResponse, Error> {
        let caller = self.admit(&from, &request.device_id)?;
        let capabilities: Result<Vec<Capability>, Error> =
            request.capabilities.into_iter().map(capability).collect();
        let registration = Registration {
            request_id: request.request_id,
            platform: request.platform,
            agent_version: request.agent_version,
            capabilities: capabilities?,
            labels: request.labels.into_iter().collect(),
            lost_after_ms: request.lost_after_ms,
            max_concurrency: request.max_concurrency,
            queue_limit: request.queue_limit,
        };
        let registered = self.control.register(&caller, registration).await?;
        Ok(wire::RegisterResponse {
            generation: registered.generation,
            endpoints: convert::node_endpoints(registered.endpoints),
            write: convert::write_info(registered.write),
        })
    }

    /// `Poll`: attach, or wait for messages.
    pub(crate) async fn poll(
        self,
        from: Origin,
        request: wire::PollRequest,
    ) -> Result<wire::PollResponse, Error> {
        let attach = request.attach.map(|attach| AttachRequest {
            device_id: request.device_id.clone(),
            held: attach.held,
            held_attempts: attach.held_attempts,
            transport: Transport::Poll,
            fallback: attach.fallback,
            // Polls of one session may come on many connections; none of them is the session's own.
            connection: 0,
        });
        let (epoch, wait_ms) = (request.epoch, request.wait_ms.into());
        if request.leave {
            self.control.leave(&from.peer, &request.device_id, epoch)?;
            let messages = Vec::new();
            return Ok(wire::PollResponse { epoch, messages });
        }
        let answer = self
            .control
            .poll(&from.peer, &request.device_id, epoch, attach, wait_ms)
            .await?;
        // A newer bundle waits for the next poll, which says what came of it.
        let holds = request.trust_generation;
        self.control.node_trusts(&from.peer, &request.device_id, holds)?;
        let messages = answer.messages.into_iter();
        Ok(wire::PollResponse {
            epoch: answer.epoch,
            messages: messages.map(|message| self.server_message(message)).collect(),
        })
    }

    /// `Report`: a result outside of a stream.
    pub(crate) async fn report(
        self,
        from: Origin,
        request: wire::ReportRequest,
    ) -> Result<wire::ReportResponse, Error> {
        let completion = completion(request.result.unwrap_or_default());
        let answer = self
            .control
            .report(&from.peer, &request.device_id, completion)
            .await?;
        Ok(wire::ReportResponse {
            answer: Some(result_answer(answer)),
        })
    }

    /// `Renew`: a new certificate for a fresh key.
    pub(crate) async fn renew(
        self,
        from: Origin,
        request: wire::RenewRequest,
    ) -> Result<wire::RenewResponse, Error> {
        let caller = self.admit(&from, &request.device_id)?;
        let renewal = Renewal {
            request_id: request.request_id,
            csr: request.csr,
            counter: request.counter,
            connection: from.connection.unwrap_or_default(),
        };
        let renewed = self.control.renew(&caller, renewal).await?;
        Ok(wire::RenewResponse {
            chain: convert::chain(renewed.chain),
            write: convert::write_info(renewed.write),
            counter: renewed.counter,
            times: Some(convert::certificate_times(renewed.times)),
        })
    }

    /// `StreamEvents`: the feed, as far as it is the node's, with where the replicas are when that may be news.
    pub(crate) async fn stream_events(
        self,
        from: Origin,
        request: wire::NodeEventsRequest,
    ) -> Result<Answers<wire::NodeEventsResponse>, Error> {
        let ask = events::request(request.events.unwrap_or_default(), from.connection);
        let feed = self
            .control
            .node_events(&from.peer, &request.device_id, ask)
            .await?;
        let control = self.control;
        Ok(events::stream(feed, move |event| {
            let news = match &event {
                Event::CaughtUp { .. } => true,
                Event::Rows { rows, .. } => rows.iter().any(|row| row.action.starts_with("cluster.")),
                Event::Heartbeat { .. } | Event::Gap { .. } => false,
            };
            let endpoints = if news { control.endpoints() } else { Vec::new() };
            wire::NodeEventsResponse {
                event: Some(events::event(event, control.cluster_id().to_string())),
                endpoints: convert::node_endpoints(endpoints),
            }
        }))
    }

    /// The wire form of a message to a node.
    fn server_message(&self, message: Outbound) -> wire::ServerMessage {
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
            Outbound::Cancel {
                dispatch_id,
                reason,
                confirm,
            } => {
                let (epoch, attempt) = confirm.unwrap_or_default();
                Body::Cancel(wire::CancelDispatch {
                    dispatch_id: dispatch_id.to_string(),
                    reason,
                    epoch,
                    attempt,
                })
            }
            Outbound::Trust(update) => Body::TrustUpdate(wire::TrustUpdate {
                generation: update.generation,
                roots: convert::chain(update.roots),
            }),
            Outbound::Rotate {
                index,
                reason,
                deadline_at_ms,
            } => Body::Rotate(wire::RotateCertificate {
                index,
                reason,
                deadline_at_ms,
            }),
            Outbound::Worker(message) => Body::Worker(worker::order(*message)),
            Outbound::Goodbye { end, pace } => Body::Goodbye(wire::Goodbye {
                retry_after_ms: convert::millis(pace.after),
                spread_ms: convert::millis(pace.spread),
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
        queue_limit: capability.queue_limit,
        max_attempts: capability.max_attempts,
        backoff_ms: capability.backoff_ms,
        retry_on: capability.retry_on,
    })
}

/// A node's result as `control` takes it.
fn completion(result: wire::Result) -> Completion {
    Completion {
        request_id: result.request_id,
        dispatch_id: result.dispatch_id,
        epoch: result.epoch,
        outcome: result.outcome,
        payload: result.payload,
        error_code: result.error_code,
        error_message: result.error_message,
        log_tail: result.log_tail,
        attempt: result.attempt,
    }
}

fn result_answer(answer: ResultAnswer) -> wire::ResultAnswer {
    wire::ResultAnswer {
        dispatch_id: answer.dispatch_id.to_string(),
        accepted: answer.accepted,
        error_code: answer.error_code,
        error_message: answer.error_message,
        retry: answer.retry,
        late: answer.late,
    }
}
