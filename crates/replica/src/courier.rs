//! Commands on their way to the leader: one stream to each replica that is taken for it, and as many commands in one
//! message as there are.
//!
//! What never lives here: who leads, retries, deadlines; who gives up waits no longer, and the answer falls to the
//! ground. Invariants: what was put into the stream and is not answered when it ends is told as lost, and nothing else
//! is: whatever was never put into it happened nowhere. A courier ends with its stream; the next command sends another.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use palyra_platform as platform;
use palyra_proto::peer::v1 as wire;
use prost::Message;
use tokio::sync::{mpsc, oneshot};

use crate::links::Links;
use crate::peer::{Bodies, Lane, PeerError};

/// Commands in one message.
pub(crate) const FRAME_COMMANDS: usize = 256;
/// Bytes of commands after which a message takes no further one.
const FRAME_BYTES: usize = 1024 * 1024;
/// Messages that wait for the transport; while they do, commands gather for the next.
const FRAMES: usize = 2;
/// For a stream to open.
const OPEN: Duration = Duration::from_secs(2);
/// A stream that nobody used for as long is given up.
const IDLE: Duration = Duration::from_secs(30);

/// What became of one command.
type Outcome = Result<wire::ProposeResponse, PeerError>;

/// One command, and who waits for its answer.
struct Parcel {
    envelope: Bytes,
    answer: oneshot::Sender<Outcome>,
}

/// The couriers of a replica.
pub(crate) struct Couriers {
    links: Arc<Links>,
    queues: Mutex<BTreeMap<u64, mpsc::UnboundedSender<Parcel>>>,
}

impl Couriers {
    pub(crate) fn new(links: Arc<Links>) -> Couriers {
        Couriers {
            links,
            queues: Mutex::default(),
        }
    }

    /// Has a command carried to the replica `to`, and waits for the answer without a limit of its own.
    pub(crate) async fn deliver(&self, to: u64, envelope: Bytes) -> Outcome {
        let (answer, outcome) = oneshot::channel();
        self.hand_over(to, Parcel { envelope, answer });
        outcome
            .await
            .unwrap_or_else(|_| Err(PeerError::Lost(format!("the stream to replica {to} is gone"))))
    }

    fn hand_over(&self, to: u64, parcel: Parcel) {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let parcel = match queues.get(&to) {
            Some(queue) => match queue.send(parcel) {
                Ok(()) => return,
                Err(mpsc::error::SendError(back)) => back,
            },
            None => parcel,
        };
        let (queue, parcels) = mpsc::unbounded_channel();
        platform::spawn(run(Arc::clone(&self.links), to, parcels)).detach();
        // It is there until its courier has seen it.
        let _ = queue.send(parcel);
        queues.insert(to, queue);
    }
}

/// What is under way on a stream that is open.
struct Road {
    to: u64,
    links: Arc<Links>,
    /// What waits for the next message.
    waiting: Vec<Parcel>,
    /// What was sent and is not answered.
    sent: BTreeMap<u64, oneshot::Sender<Outcome>>,
    next: u64,
}

/// One courier: opens its stream, and ends with it.
async fn run(links: Arc<Links>, to: u64, mut parcels: mpsc::UnboundedReceiver<Parcel>) {
    let (frames, outgoing) = mpsc::channel(FRAMES);
    let outgoing = futures::stream::unfold(outgoing, |mut frames| async move {
        frames.recv().await.map(|frame| (frame, frames))
    });
    let opening = links.transport.stream(to, Lane::Forward, outgoing.boxed());
    let opened = match platform::timeout(OPEN, opening).await {
        Ok(opened) => opened,
        Err(_) => Err(PeerError::Unreachable(format!("replica {to} does not answer"))),
    };
    let why = match opened {
        Ok(mut answers) => {
            let mut road = Road {
                to,
                links,
                waiting: Vec::new(),
                sent: BTreeMap::new(),
                next: 0,
            };
            let why = road.go(&mut parcels, &frames, &mut answers).await;
            for (_, answer) in std::mem::take(&mut road.sent) {
                let _ = answer.send(Err(PeerError::Lost(why.clone())));
            }
            let unsent = PeerError::Unreachable(why);
            refuse(road.waiting, &unsent);
            unsent
        }
        Err(error) => error,
    };
    parcels.close();
    let mut left = Vec::new();
    while let Ok(parcel) = parcels.try_recv() {
        left.push(parcel);
    }
    refuse(left, &why);
}

fn refuse(parcels: Vec<Parcel>, why: &PeerError) {
    for parcel in parcels {
        // Who gave up waits no longer.
        let _ = parcel.answer.send(Err(why.clone()));
    }
}

impl Road {
    /// Carries until the stream ends, or nobody uses it. Answers why.
    async fn go(
        &mut self,
        parcels: &mut mpsc::UnboundedReceiver<Parcel>,
        frames: &mpsc::Sender<Bytes>,
        answers: &mut Bodies,
    ) -> String {
        let mut last_used = platform::now();
        loop {
            let room = FRAME_COMMANDS.saturating_sub(self.waiting.len());
            tokio::select! {
                biased;
                body = answers.next() => match body {
                    Some(Ok(body)) => if let Err(why) = self.settle(body) { return why },
                    Some(Err(error)) => return error.to_string(),
                    None => return format!("replica {} ended the stream", self.to),
                },
                permit = frames.reserve(), if !self.waiting.is_empty() => match permit {
                    Ok(permit) => {
                        let (frame, sent) = next_frame(&self.links, self.to, &mut self.waiting, &mut self.next);
                        // From here on they may arrive.
                        if !sent.is_empty() {
                            self.sent.extend(sent);
                            permit.send(frame);
                        }
                    }
                    Err(_) => return format!("the stream to replica {} is over", self.to),
                },
                count = parcels.recv_many(&mut self.waiting, room), if room > 0 => {
                    if count == 0 {
                        return "the replica has stopped".to_owned();
                    }
                    last_used = platform::now();
                }
                () = platform::sleep(IDLE) => {
                    self.sent.retain(|_, answer| !answer.is_closed());
                    if self.sent.is_empty() && last_used.elapsed() >= IDLE {
                        return "nobody used the stream".to_owned();
                    }
                }
            }
        }
    }

    /// Gives answers to those who wait for them.
    fn settle(&mut self, body: Bytes) -> Result<(), String> {
        let reply = wire::ForwardReply::decode(body)
            .map_err(|error| format!("the answer of replica {} cannot be understood: {error}", self.to))?;
        for answer in reply.answers {
            let waiter = self.sent.remove(&answer.number);
            if let (Some(waiter), Some(response)) = (waiter, answer.response) {
                let _ = waiter.send(Ok(response));
            }
        }
        Ok(())
    }
}

type Sent = Vec<(u64, oneshot::Sender<Outcome>)>;

/// A message of what waits, as much as goes into one, without what nobody waits for any more.
fn next_frame(links: &Links, to: u64, waiting: &mut Vec<Parcel>, next: &mut u64) -> (Bytes, Sent) {
    let mut bytes = 0;
    let fits = waiting.iter().take_while(|parcel| {
        let fits = bytes < FRAME_BYTES;
        bytes += parcel.envelope.len();
        fits
    });
    let count = fits.count();
    let mut request = wire::ForwardRequest {
        origin: Some(links.origin(to)),
        commands: Vec::with_capacity(count),
    };
    let mut sent = Vec::with_capacity(count);
    for parcel in waiting.drain(..count).filter(|parcel| !parcel.answer.is_closed()) {
        *next += 1;
        request.commands.push(wire::Forwarded {
            number: *next,
            envelope: parcel.envelope,
        });
        sent.push((*next, parcel.answer));
    }
    (request.encode_to_vec().into(), sent)
}
