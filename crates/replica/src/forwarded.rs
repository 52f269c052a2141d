//! The other end of a courier's stream (see [`crate::courier`]): commands of another replica, taken as leader, each
//! answered when it is decided, in whatever order that comes to be.
//!
//! Invariants: a message that is not for us, or not from whom it says, ends the stream before anything in it was
//! taken; a command that is refused is answered like any other, and harms none beside it; so many commands of one
//! stream are worked on at a time, and no further message is read before some of them are decided.

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, FuturesUnordered, StreamExt};
use palyra_proto::peer::v1 as wire;
use prost::Message;
use wire::propose_response::Outcome;

use crate::courier::FRAME_COMMANDS;
use crate::peer::{Bodies, PeerError, Refusal};
use crate::service::{PeerService, malformed};

/// Commands of one stream that are worked on at a time.
const AT_WORK: usize = 4_096;

type Work = BoxFuture<'static, wire::ForwardAnswer>;

/// One stream.
struct Desk {
    service: PeerService,
    from: u64,
    /// Nothing once the other side has sent its last.
    bodies: Option<Bodies>,
    work: FuturesUnordered<Work>,
}

/// Answers a stream of commands of the replica `from`.
pub(crate) fn serve(service: PeerService, from: u64, bodies: Bodies) -> Bodies {
    let desk = Desk {
        service,
        from,
        bodies: Some(bodies),
        work: FuturesUnordered::new(),
    };
    stream::unfold(Some(desk), |desk| async move {
        let mut desk = desk?;
        match desk.next().await? {
            Ok(body) => Some((Ok(body), Some(desk))),
            Err(error) => Some((Err(error), None)),
        }
    })
    .boxed()
}

impl Desk {
    /// The next message of answers; nothing when the last was given.
    async fn next(&mut self) -> Option<Result<Bytes, PeerError>> {
        loop {
            let reads = self.work.len() < AT_WORK;
            tokio::select! {
                biased;
                Some(first) = self.work.next() => return Some(Ok(self.answers(first))),
                body = read(&mut self.bodies), if reads && self.bodies.is_some() => match body {
                    Some(body) => if let Err(error) = body.and_then(|body| self.take(body)) {
                        return Some(Err(error));
                    },
                    None => self.bodies = None,
                },
                else => return None,
            }
        }
    }

    /// Takes all commands of a message on.
    fn take(&mut self, body: Bytes) -> Result<(), PeerError> {
        let message = wire::ForwardRequest::decode(body).map_err(malformed)?;
        self.service.check(self.from, message.origin.as_ref())?;
        let admitted = self.service.admits(self.from);
        if message.commands.len() > FRAME_COMMANDS {
            return Err(malformed(format_args!(
                "{} commands in one message, the limit is {FRAME_COMMANDS}",
                message.commands.len()
            )));
        }
        for command in message.commands {
            let service = self.service.clone();
            let (number, envelope) = (command.number, command.envelope);
            let work = async move {
                let outcome = if admitted {
                    decide(&service, envelope).await
                } else {
                    Outcome::NotLeader(0)
                };
                let response = wire::ProposeResponse {
                    outcome: Some(outcome),
                };
                wire::ForwardAnswer {
                    number,
                    response: Some(response),
                }
            };
            self.work.push(work.boxed());
        }
        Ok(())
    }

    /// A message of one answer, and of those that are there as well.
    fn answers(&mut self, first: wire::ForwardAnswer) -> Bytes {
        let mut answers = vec![first];
        while answers.len() < FRAME_COMMANDS
            && let Some(Some(next)) = self.work.next().now_or_never()
        {
            answers.push(next);
        }
        wire::ForwardReply { answers }.encode_to_vec().into()
    }
}

/// What becomes of one command.
async fn decide(service: &PeerService, envelope: Bytes) -> Outcome {
    match service.propose(wire::ProposeRequest { envelope }).await {
        Ok(response) => response.outcome.unwrap_or(Outcome::Unknown(wire::Blank {})),
        // Of a newer replica, which has to wait until this one leads no more.
        Err(PeerError::Refused {
            refusal: Refusal::Malformed,
            ..
        }) => Outcome::NotLeader(0),
        Err(_) => Outcome::Unknown(wire::Blank {}),
    }
}

async fn read(bodies: &mut Option<Bodies>) -> Option<Result<Bytes, PeerError>> {
    bodies.as_mut()?.next().await
}
