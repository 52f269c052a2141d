//! One call on one stream: header, messages, status. The table of calls is in [`answer`].
//!
//! What never lives here: what a call does. Invariants: the last frame is a status, whatever happened, unless the
//! stream or the connection is gone; a first frame that does not come holds its place for a bounded time.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use palyra_control::{Error, Refusal};
use palyra_proto::node::v1 as node;
use palyra_proto::quic::v1 as wire;
use palyra_quic::frame::Item;
use palyra_quic::{Broken, Fault, Reader, VERSION, Writer, method};
use prost::Message;
use quinn::{RecvStream, SendStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{Limits, Meter};
use crate::nodeplane::{self, Answers, NodePlane, Origin};
use crate::status;

/// The largest request of a call that has no large ones.
const SMALL: usize = 64 * 1024;
/// How long a call's only request may take to come, whole.
const REQUEST: Duration = Duration::from_secs(30);
/// How long the words for a refused call may take to be written.
const REFUSAL: Duration = Duration::from_secs(5);
/// How long the end of a call may take to be acknowledged.
const DELIVERY: Duration = Duration::from_secs(5);
/// The most of an unknown method's name that is repeated.
const NAME: usize = 64;

/// What answers the calls of one connection.
pub(super) struct Callee {
    pub(super) plane: NodePlane,
    pub(super) from: Origin,
    pub(super) replica_id: u64,
    pub(super) limits: Limits,
    pub(super) meter: Arc<Meter>,
    /// Calls that may have large messages in their hands.
    pub(super) large: Arc<Semaphore>,
}

/// Why a call ends without success.
enum Ended {
    /// The framing refused it.
    Fault(Fault),
    /// The control plane refused it.
    Error(Error),
    /// Nobody is there to be told.
    Gone,
}

impl From<Error> for Ended {
    fn from(error: Error) -> Ended {
        Ended::Error(error)
    }
}

impl From<Fault> for Ended {
    fn from(fault: Fault) -> Ended {
        Ended::Fault(fault)
    }
}

impl From<Broken> for Ended {
    fn from(broken: Broken) -> Ended {
        match broken {
            Broken::Fault(fault) => Ended::Fault(fault),
            Broken::Stream | Broken::Connection(_) => Ended::Gone,
        }
    }
}

/// Serves one call.
pub(super) async fn serve(callee: Arc<Callee>, send: SendStream, receive: RecvStream) {
    Meter::count(&callee.meter.calls);
    let mut writer = Writer::new(send);
    let reader = Reader::new(receive, SMALL);
    let ended = call(&callee, reader, &mut writer).await;
    let error = match ended {
        Ok(()) => None,
        Err(Ended::Gone) => return,
        Err(Ended::Fault(fault)) => {
            Meter::count(&callee.meter.faults);
            Some(fault.detail(callee.replica_id))
        }
        Err(Ended::Error(error)) => {
            if let Error::Internal(source) = &error {
                tracing::error!(source, "internal error");
            }
            Some(status::detail(&error, callee.replica_id))
        }
    };
    // Who does not read it has gone.
    let _ = writer.status(wire::Status { error }).await;
    // A connection that closes drops what is not acknowledged yet, so the call lasts until it is.
    let _ = timeout(DELIVERY, writer.delivered()).await;
}

/// Tells a caller that it has too many calls under way.
pub(super) async fn refuse(callee: Arc<Callee>, send: SendStream, receive: RecvStream, limit: usize) {
    Meter::count(&callee.meter.faults);
    Reader::new(receive, SMALL).stop();
    let error = Some(Fault::TooManyStreams { limit }.detail(callee.replica_id));
    let mut writer = Writer::new(send);
    // Who does not read it is told by the place that it keeps taken.
    let _ = timeout(REFUSAL, writer.status(wire::Status { error })).await;
}

async fn call(callee: &Callee, mut reader: Reader, writer: &mut Writer) -> Result<(), Ended> {
    let overdue = |what| Fault::Overdue { what };
    let first = timeout(callee.limits.handshake, reader.next()).await;
    let header = match first.map_err(|_| overdue("the header"))?? {
        Some(Item::Header(header)) => header,
        Some(_) => {
            let cause = "the first frame of a call must be its header";
            return Err(Fault::Malformed { cause }.into());
        }
        None => {
            return Err(Fault::Malformed {
                cause: "a call without a header",
            }
            .into());
        }
    };
    if header.version != VERSION {
        return Err(Fault::WrongVersion {
            asked: header.version,
        }
        .into());
    }
    let answer = answer(callee, &header.method, reader, writer);
    match header.deadline_ms {
        0 => answer.await,
        ms => timeout(Duration::from_millis(ms), answer)
            .await
            .map_err(|_| overdue("the answer"))?,
    }
}

/// The table of calls.
async fn answer(callee: &Callee, name: &str, reader: Reader, writer: &mut Writer) -> Result<(), Ended> {
    match name {
        method::HEALTH => unary(callee, SMALL, reader, writer, NodePlane::health).await,
        method::RENEW => unary(callee, SMALL, reader, writer, NodePlane::renew).await,
        method::REGISTER => large(callee, reader, writer, NodePlane::register).await,
        method::REPORT => large(callee, reader, writer, NodePlane::report).await,
        method::STREAM_EVENTS => many(callee, reader, writer, NodePlane::stream_events).await,
        method::SESSION => session(callee, reader, writer).await,
        unknown => Err(Fault::UnknownMethod {
            method: unknown.chars().take(NAME).collect(),
        }
        .into()),
    }
}

/// The request of a call that has one.
async fn only_request<Q: Message + Default>(reader: &mut Reader) -> Result<Q, Ended> {
    let request = timeout(REQUEST, reader.next()).await;
    let request = request.map_err(|_| Fault::Overdue { what: "the request" })??;
    let Some(Item::Message(bytes)) = request else {
        let cause = "a call with one request needs one message after its header";
        return Err(Fault::Malformed { cause }.into());
    };
    let request = Q::decode(bytes).map_err(|_| Fault::Malformed {
        cause: "the request is no protobuf message of the type that this call takes",
    })?;
    Ok(request)
}

/// A call with one request and one answer.
async fn unary<Q, A, F>(
    callee: &Callee,
    limit: usize,
    mut reader: Reader,
    writer: &mut Writer,
    call: impl FnOnce(NodePlane, Origin, Q) -> F + Send,
) -> Result<(), Ended>
where
    Q: Message + Default,
    A: Message,
    F: Future<Output = Result<A, Error>> + Send,
{
    reader.limit(limit);
    let request = only_request(&mut reader).await?;
    let answer = tokio::select! {
        answer = call(callee.plane.clone(), callee.from.clone(), request) => answer?,
        () = writer.unwanted() => return Err(Ended::Gone),
    };
    Ok(writer.message(&answer).await?)
}

/// The same, for a call whose request may be large.
async fn large<Q, A, F>(
    callee: &Callee,
    reader: Reader,
    writer: &mut Writer,
    call: impl FnOnce(NodePlane, Origin, Q) -> F + Send,
) -> Result<(), Ended>
where
    Q: Message + Default,
    A: Message,
    F: Future<Output = Result<A, Error>> + Send,
{
    let _place = place(callee)?;
    unary(callee, callee.limits.message, reader, writer, call).await
}

/// A call with one request and many answers.
async fn many<Q, A, F>(
    callee: &Callee,
    mut reader: Reader,
    writer: &mut Writer,
    call: impl FnOnce(NodePlane, Origin, Q) -> F + Send,
) -> Result<(), Ended>
where
    Q: Message + Default,
    A: Message,
    F: Future<Output = Result<Answers<A>, Error>> + Send,
{
    let request = only_request(&mut reader).await?;
    let answers = tokio::select! {
        answers = call(callee.plane.clone(), callee.from.clone(), request) => answers?,
        () = writer.unwanted() => return Err(Ended::Gone),
    };
    stream_out(answers, writer).await
}

/// A place among the calls of this connection that may have large messages.
fn place(callee: &Callee) -> Result<tokio::sync::SemaphorePermit<'_>, Fault> {
    callee.large.try_acquire().map_err(|_| Fault::TooManyStreams {
        limit: super::connection::LARGE,
    })
}

/// The session's stream.
async fn session(callee: &Callee, mut reader: Reader, writer: &mut Writer) -> Result<(), Ended> {
    let _place = place(callee)?;
    reader.limit(callee.limits.message);
    let fault = Arc::new(OnceLock::new());
    let messages = inbound::<node::NodeMessage>(reader, Arc::clone(&fault));
    let opened = tokio::select! {
        opened = callee.plane.clone().session(callee.from.clone(), messages) => opened,
        () = writer.unwanted() => return Err(Ended::Gone),
    };
    let ended = match opened {
        Ok(answers) => stream_out(answers, writer).await,
        Err(error) => Err(error.into()),
    };
    // The plane has its own words for a stream that brought nonsense; what the nonsense was is of more use.
    match (ended, fault.get()) {
        (Err(Ended::Error(_)), Some(fault)) => Err(fault.clone().into()),
        (ended, _) => ended,
    }
}

/// Writes a call's answers as they come.
async fn stream_out<A: Message>(mut answers: Answers<A>, writer: &mut Writer) -> Result<(), Ended> {
    loop {
        let next = tokio::select! {
            next = answers.next() => next,
            () = writer.unwanted() => return Err(Ended::Gone),
        };
        match next {
            Some(Ok(message)) => writer.message(&message).await?,
            Some(Err(error)) => return Err(error.into()),
            None => return Ok(()),
        }
    }
}

/// The messages of a stream that go on after the first. What breaks the framing is put into `fault`.
fn inbound<M: Message + Default>(
    reader: Reader,
    fault: Arc<OnceLock<Fault>>,
) -> impl Stream<Item = Result<M, nodeplane::Broken>> + Send + Unpin + use<M> {
    let refused = |fault: &OnceLock<Fault>, what: Fault| {
        // Set once: the first is the last.
        let _ = fault.set(what);
        let cause = "the stream brought what is no message of a session";
        nodeplane::Broken::Refused(Refusal::Protocol { cause }.into())
    };
    let messages = stream::unfold(Some((reader, fault)), move |state| async move {
        let (mut reader, fault) = state?;
        let message = match reader.next().await {
            Ok(Some(Item::Message(bytes))) => M::decode(bytes).map_err(|_| {
                let cause = "a message is no protobuf message of the type that this call takes";
                refused(&fault, Fault::Malformed { cause })
            }),
            Ok(Some(Item::Header(_) | Item::Status(_))) => {
                let cause = "only messages follow the header";
                Err(refused(&fault, Fault::Malformed { cause }))
            }
            Ok(None) => return None,
            Err(Broken::Fault(what)) => Err(refused(&fault, what)),
            Err(Broken::Stream | Broken::Connection(_)) => Err(nodeplane::Broken::Lost),
        };
        let next = message.is_ok().then_some((reader, fault));
        Some((message, next))
    });
    Box::pin(messages)
}
