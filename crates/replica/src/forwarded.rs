//! The other end of a courier's stream (see [`crate::courier`]): commands of another replica, taken as leader, each
//! answered when it is decided, in whatever order that comes to be.
//!
//! Invariants: a message that is not for us, or not from whom it says, ends the stream before anything in it was
//! taken; so many commands of one stream are worked on at a time, and no further message is read before some of them
//! are decided.

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, FuturesUnordered, StreamExt};
use palyra_proto::peer::v1 as wire;
use prost::Message;

use crate::courier::FRAME_COMMANDS;
use crate::peer::{Bodies, PeerError};
use crate::service::{PeerService, malformed};

/// Commands of one stream that are worked on at a time.
const AT_WORK: usize = 4_096;

type Work = BoxFuture<'static, Result<wire::ForwardAnswer, PeerError>>;

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
                Some(first) = self.work.next() => return Some(self.answers(first)),
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
                let response = service.propose(wire::ProposeRequest { envelope }).await?;
                Ok(wire::ForwardAnswer {
                    number,
                    response: Some(response),
                })
            };
            self.work.push(work.boxed());
        }
        Ok(())
    }

    /// A message of one answer, and of those that are there as well.
    fn answers(&mut self, first: Result<wire::ForwardAnswer, PeerError>) -> Result<Bytes, PeerError> {
        let mut answers = vec![first?];
        while answers.len() < FRAME_COMMANDS
            && let Some(Some(next)) = self.work.next().now_or_never()
        {
            answers.push(next?);
        }
        Ok(wire::ForwardReply { answers }.encode_to_vec().into())
    }
}

async fn read(bodies: &mut Option<Bodies>) -> Option<Result<Bytes, PeerError>> {
    bodies.as_mut()?.next().await
}
