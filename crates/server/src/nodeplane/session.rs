//! A node's session on one stream: one task takes the node's messages in, the answers give ours out.
//!
//! What never lives here: what a message means (`control::sessions`), and how messages are framed. Invariants: the
//! first message is Attach and the only one; the session is dropped, and so ended, as soon as either direction is
//! over; a reader that stalls holds back nobody but itself, since nothing here buffers for it.

use std::sync::{Arc, Mutex, PoisonError};

use futures::{Stream, StreamExt, stream};
use palyra_control::{AttachRequest, Inbound, Outgoing, Output, Session};
use palyra_control::{Error, Refusal};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Answers, NodePlane, Origin, completion, worker};
use crate::convert;

/// How a node's half of a stream breaks off.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The node sent what can't be taken; it is told.
    Refused(Error),
    /// The connection or the stream is gone.
    Lost,
}

/// Why the stream ends with an error, if it does; written by the reading task, read at the end of the answers.
type LastWord = Arc<Mutex<Option<Error>>>;

impl NodePlane {
    /// `Session`: attaches by the stream's first message and starts both directions.
    pub(crate) async fn session<S>(
        self,
        from: Origin,
        mut inbound: S,
    ) -> Result<Answers<wire::ServerMessage>, Error>
    where
        S: Stream<Item = Result<wire::NodeMessage, Broken>> + Send + Unpin + 'static,
    {
        // Before the first message is waited for: a stranger may not even hold a stream open.
        self.control.admit_node(&from.peer)?;
        let connection = from.connection.ok_or(Error::Busy {
            what: "connections that it has not entered",
        })?;
        let (attach, trust_generation) = self.first_message(&from, &mut inbound, connection).await?;
        let device_id = attach.device_id.clone();
        let session = self.control.attach(&from.peer, attach).await?;
        self.control
            .node_trusts(&from.peer, &device_id, trust_generation)?;
        let attached = session.attached();
        let first = wire::ServerMessage {
            body: Some(server_message::Body::Attached(wire::Attached {
                epoch: attached.epoch,
                replica_id: attached.replica_id,
                heartbeat_interval_ms: u64::try_from(attached.heartbeat_interval.as_millis())
                    .unwrap_or(u64::MAX),
                endpoints: convert::node_endpoints(self.control.endpoints()),
                certificate: attached.certificate.map(convert::certificate_times),
            })),
        };
        let outgoing = session.outgoing();
        let over = CancellationToken::new();
        let last_word = LastWord::default();
        let reader = Reader {
            from,
            session,
            last_word: Arc::clone(&last_word),
        };
        tokio::spawn(reader.run(inbound, over.clone()));
        let rest = self.outgoing(outgoing, last_word, over.drop_guard());
        Ok(Box::pin(stream::once(async move { Ok(first) }).chain(rest)))
    }

    async fn first_message<S>(
        &self,
        from: &Origin,
        inbound: &mut S,
        connection: u64,
    ) -> Result<(AttachRequest, u64), Error>
    where
        S: Stream<Item = Result<wire::NodeMessage, Broken>> + Send + Unpin,
    {
        let protocol = |cause| Error::from(Refusal::Protocol { cause });
        let message = tokio::time::timeout(self.control.timings().heartbeat_timeout, inbound.next())
            .await
            .map_err(|_| protocol("no message came in time"))?
            .ok_or_else(|| protocol("the stream ended before its first message"))?
            .map_err(|broken| match broken {
                Broken::Refused(error) => error,
                Broken::Lost => protocol("the stream broke before its first message"),
            })?;
        let Some(Body::Attach(attach)) = message.body else {
            return Err(protocol("the first message of a session must be Attach"));
        };
        let request = AttachRequest {
            device_id: message.device_id,
            held: attach.held,
            held_attempts: attach.held_attempts,
            transport: from.transport,
            fallback: attach.fallback,
            connection,
        };
        Ok((request, attach.trust_generation))
    }

    /// The messages after the first. When they are dropped, so is the guard, and the reading task ends.
    fn outgoing(
        self,
        outgoing: Outgoing,
        last_word: LastWord,
        guard: DropGuard,
    ) -> impl Stream<Item = Result<wire::ServerMessage, Error>> + Send {
        stream::unfold(Some((self, outgoing, last_word, guard)), |state| async move {
            let (plane, outgoing, last_word, guard) = state?;
            match outgoing.next().await {
                Some(message) => {
                    let message = plane.server_message(message);
                    Some((Ok(message), Some((plane, outgoing, last_word, guard))))
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
    from: Origin,
    session: Session,
    last_word: LastWord,
}

impl Reader {
    async fn run<S>(self, mut inbound: S, over: CancellationToken)
    where
        S: Stream<Item = Result<wire::NodeMessage, Broken>> + Send + Unpin,
    {
        loop {
            let message = match over.run_until_cancelled(inbound.next()).await {
                Some(Some(Ok(message))) => message,
                // The answers are not wanted any more, the node has said all that it will, or it is gone: the session
                // ends by being dropped.
                None | Some(None | Some(Err(Broken::Lost))) => return,
                Some(Some(Err(Broken::Refused(error)))) => return self.end(error),
            };
            let Some(received) = over.run_until_cancelled(self.take(message)).await else {
                return;
            };
            if let Err(error) = received {
                return self.end(error);
            }
        }
    }

    async fn take(&self, message: wire::NodeMessage) -> Result<(), Error> {
        let protocol = |cause| Error::from(Refusal::Protocol { cause });
        let inbound = match message.body {
            Some(Body::Heartbeat(heartbeat)) => Inbound::Heartbeat {
                sequence: heartbeat.sequence,
            },
            Some(Body::Ack(ack)) => Inbound::Ack {
                dispatch_id: ack.dispatch_id,
                epoch: ack.epoch,
            },
            Some(Body::Result(result)) => Inbound::Result(completion(result)),
            Some(Body::Mediation(mediation)) => Inbound::Mediation {
                dispatch_id: mediation.dispatch_id,
                epoch: mediation.epoch,
                waiting: mediation.waiting,
                request_id: mediation.request_id,
                prompt: mediation.prompt,
                host: mediation.host,
            },
            Some(Body::Leave(_)) => Inbound::Leave,
            Some(Body::TrustAck(ack)) => {
                return self
                    .session
                    .trusts(&self.from.peer, &message.device_id, ack.generation);
            }
            Some(Body::Progress(progress)) => Inbound::Output(Output {
                dispatch_id: progress.dispatch_id,
                epoch: progress.epoch,
                attempt: progress.attempt,
                first: 0,
                lines: Vec::new(),
                progress: Some((progress.percent, progress.message)),
            }),
            Some(Body::LogLines(lines)) => Inbound::Output(Output {
                dispatch_id: lines.dispatch_id,
                epoch: lines.epoch,
                attempt: lines.attempt,
                first: lines.first,
                lines: lines.lines,
                progress: None,
            }),
            Some(Body::Attach(_)) => return Err(protocol("a session is attached once")),
            Some(Body::Worker(message)) => Inbound::Worker(worker::inbound(message)?),
            None => return Err(protocol("a message without a body")),
        };
        self.session
            .receive(&self.from.peer, &message.device_id, inbound)
            .await
    }

    /// Ends the session for a message that had no place in it; the node hears a goodbye and then why.
    fn end(&self, error: Error) {
        *self.last_word.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        self.session.refuse();
    }
}
