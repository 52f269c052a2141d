//! A node's session on one stream: one task takes the node's messages in, the response body gives ours out.
//!
//! What never lives here: what a message means (`control::sessions`). Invariants: the first message is Attach
//! and the only one; the session is dropped, and so ended, as soon as either direction is over; a reader that
//! stalls holds back nobody but itself, since nothing here buffers for it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use futures::{Stream, StreamExt, stream};
use palyra_control::Transport;
use palyra_control::{AttachRequest, Inbound, Outgoing, Session};
use palyra_control::{Error, Refusal};
use palyra_pki::PeerIdentity;
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Status, Streaming};

use super::{Gateway, connection, convert, identity, node};

/// The response body of a session.
type Messages = Pin<Box<dyn Stream<Item = Result<wire::ServerMessage, Status>> + Send>>;

/// Why the stream ends with an error, if it does; written by the reading task, read at the end of the body.
type LastWord = Arc<Mutex<Option<Status>>>;

impl Gateway {
    /// Attaches by the stream's first message and starts both directions.
    pub(super) async fn open_session(
        &self,
        request: Request<Streaming<wire::NodeMessage>>,
    ) -> Result<Messages, Status> {
        let peer = identity(&request)?;
        // Before the first message is waited for: a stranger may not even hold a stream open.
        self.control.admit_node(&peer).map_err(|error| self.fail(error))?;
        let entered = connection(&request)?.guard.get().copied();
        let guard = entered.ok_or_else(|| {
            self.fail(Error::Busy {
                what: "connections that it has not entered",
            })
        })?;
        let mut inbound = request.into_inner();
        let attach = self.first_message(&mut inbound, guard).await?;
        let session = self
            .control
            .attach(&peer, attach)
            .await
            .map_err(|error| self.fail(error))?;
        let attached = session.attached();
        let first = wire::ServerMessage {
            body: Some(server_message::Body::Attached(wire::Attached {
                epoch: attached.epoch,
                replica_id: attached.replica_id,
                heartbeat_interval_ms: u64::try_from(attached.heartbeat_interval.as_millis())
                    .unwrap_or(u64::MAX),
                endpoints: convert::node_endpoints(self.control.endpoints()),
            })),
        };
        let outgoing = session.outgoing();
        let over = CancellationToken::new();
        let last_word = LastWord::default();
        let reader = Reader {
            gateway: self.clone(),
            peer,
            session,
            last_word: Arc::clone(&last_word),
        };
        tokio::spawn(reader.run(inbound, over.clone()));
        let rest = self.clone().outgoing(outgoing, last_word, over.drop_guard());
        Ok(Box::pin(stream::once(async move { Ok(first) }).chain(rest)))
    }

    async fn first_message(
        &self,
        inbound: &mut Streaming<wire::NodeMessage>,
        guard: u64,
    ) -> Result<AttachRequest, Status> {
        let protocol = |cause| self.fail(Refusal::Protocol { cause }.into());
        let message = tokio::time::timeout(self.control.timings().heartbeat_timeout, inbound.message())
            .await
            .map_err(|_| protocol("no message came in time"))?
            .map_err(|status| self.reworded(status))?
            .ok_or_else(|| protocol("the stream ended before its first message"))?;
        let Some(Body::Attach(attach)) = message.body else {
            return Err(protocol("the first message of a session must be Attach"));
        };
        Ok(AttachRequest {
            device_id: message.device_id,
            held: attach.held,
            transport: Transport::Stream,
            connection: guard,
        })
    }

    /// The messages after the first. When the body is dropped, so is the guard, and the reading task ends.
    fn outgoing(
        self,
        outgoing: Outgoing,
        last_word: LastWord,
        guard: DropGuard,
    ) -> impl Stream<Item = Result<wire::ServerMessage, Status>> + Send {
        stream::unfold(Some((self, outgoing, last_word, guard)), |state| async move {
            let (gateway, outgoing, last_word, guard) = state?;
            match outgoing.next().await {
                Some(message) => {
                    let message = gateway.server_message(message);
                    Some((Ok(message), Some((gateway, outgoing, last_word, guard))))
                }
                None => {
                    let word = last_word.lock().unwrap_or_else(PoisonError::into_inner).take()?;
                    Some((Err(word), None))
                }
            }
        })
    }
}

/// The reading direction; owns the session.
struct Reader {
    gateway: Gateway,
    peer: PeerIdentity,
    session: Session,
    last_word: LastWord,
}

impl Reader {
    async fn run(self, mut inbound: Streaming<wire::NodeMessage>, over: CancellationToken) {
        loop {
            let message = match over.run_until_cancelled(inbound.message()).await {
                Some(Ok(Some(message))) => message,
                // The body is gone, or the node has said all that it will: the session ends by being dropped.
                None | Some(Ok(None)) => return,
                Some(Err(status)) => return self.end(self.gateway.reworded(status)),
            };
            let Some(received) = over.run_until_cancelled(self.take(message)).await else {
                return;
            };
            if let Err(error) = received {
                let status = self.gateway.fail(error);
                return self.end(status);
            }
        }
    }

    async fn take(&self, message: wire::NodeMessage) -> Result<(), Error> {
        let inbound = match message.body {
            Some(Body::Heartbeat(heartbeat)) => Inbound::Heartbeat {
                sequence: heartbeat.sequence,
            },
            Some(Body::Ack(ack)) => Inbound::Ack {
                dispatch_id: ack.dispatch_id,
                epoch: ack.epoch,
            },
            Some(Body::Result(result)) => Inbound::Result(node::completion(result)),
            Some(Body::Mediation(mediation)) => Inbound::Mediation {
                dispatch_id: mediation.dispatch_id,
                epoch: mediation.epoch,
                waiting: mediation.waiting,
                request_id: mediation.request_id,
            },
            Some(Body::Attach(_)) => {
                return Err(Refusal::Protocol {
                    cause: "a session is attached once",
                }
                .into());
            }
            None => {
                return Err(Refusal::Protocol {
                    cause: "a message without a body",
                }
                .into());
            }
        };
        self.session
            .receive(&self.peer, &message.device_id, inbound)
            .await
    }

    /// Ends the session for a message that had no place in it; the node hears a goodbye and then why.
    fn end(&self, status: Status) {
        *self.last_word.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
        self.session.refuse();
    }
}
