//! One session with one replica, over one bidirectional stream.
//!
//! What never lives here: which replica (see `agent`), what the work is (see `jobs`), the fallback without
//! streams (see `poll`).
//!
//! Invariants: the first message is Attach with everything held; a side that hears nothing for three
//! heartbeat intervals gives the session up; nothing in here waits without a limit, so that a server that
//! stops reading is noticed too.

use std::time::Duration;

use palyra_client::error::Failure;
use palyra_client::{Connection, Error as ClientError, Incoming, new_ulid};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message::Body as Heard;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use crate::agent::{Agent, Shutdown};
use crate::feed::Feed;
use crate::home::KnownReplica;
use crate::link::Dialling;
use crate::route::Pace;
use crate::worker::desk::{self, Desk};
use crate::{Error, Result};

/// For register, and for the answer to Attach: an election may pass in between.
pub(crate) const CALL: Duration = Duration::from_secs(10);
/// Messages that wait for the transport. It is waited for room, at most three intervals.
const OUTGOING: usize = 64;
const SILENT_INTERVALS: u32 = 3;
/// How long the goodbye of the replica is waited for when the agent stops.
pub(crate) const LAST_WORD: Duration = Duration::from_secs(1);

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// The connection broke, the server went silent, or it refuses for now. Try another.
    Lost {
        /// For people.
        why: String,
        /// The stream itself failed before anything came through it, though the connection works.
        no_stream: bool,
    },
    /// The node must register first.
    Unregistered,
    /// The server asks to be left, and says when to come to another, or to it again.
    Move {
        /// For people.
        why: String,
        /// When.
        pace: Pace,
    },
    /// It was as good as any: begin another one at once, with the certificate and the transport of now.
    Again,
    /// Another agent with this identity took over.
    Superseded(String),
    /// The device or its certificate is revoked.
    Revoked(String),
    /// The server refuses this certificate: for instance because it is over.
    CredentialRefused(String),
    /// The agent was told to stop.
    Stopped,
}

impl End {
    pub(crate) fn lost(why: impl Into<String>) -> Self {
        Self::Lost {
            why: why.into(),
            no_stream: false,
        }
    }

    /// What a failed call says about the session.
    pub(crate) fn of_failure(failure: Failure) -> Self {
        match failure {
            Failure::Answered(error) => Self::of_refusal(&error),
            Failure::Lost { cause, refused: true } => Self::CredentialRefused(cause),
            Failure::Lost {
                cause,
                refused: false,
            } => Self::lost(cause),
        }
    }

    fn of_refusal(error: &ClientError) -> Self {
        match error.code.as_str() {
            // Device revoked, certificate revoked.
            "E0302" | "E0304" => Self::Revoked(error.to_string()),
            // Certificate expired, or replaced by a newer one.
            "E0305" | "E0312" => Self::CredentialRefused(error.to_string()),
            // Node not registered.
            "E0501" => Self::Unregistered,
            // An old or strange server without the stream: the fallback may still work.
            _ if error.class == palyra_client::Class::Unsupported => Self::Lost {
                why: error.to_string(),
                no_stream: true,
            },
            _ if error.trail.retry_after_ms + error.trail.spread_ms > 0 => Self::Move {
                why: error.to_string(),
                pace: Pace::told(error.trail.retry_after_ms, error.trail.spread_ms),
            },
            _ => Self::lost(error.to_string()),
        }
    }

    pub(crate) fn of_goodbye(goodbye: &wire::Goodbye) -> Self {
        let words = format!("{}: {}", goodbye.code, goodbye.message);
        match goodbye.code.as_str() {
            "superseded" => Self::Superseded(words),
            "revoked" => Self::Revoked(words),
            "draining" | "stale" | "lost" => Self::Move {
                why: words,
                pace: Pace::told(goodbye.retry_after_ms, goodbye.spread_ms),
            },
            "certificate_superseded" => Self::CredentialRefused(words),
            _ => Self::lost(words),
        }
    }
}

/// Registers what this node is and can.
pub(crate) async fn register(agent: &mut Agent, connection: &Connection) -> std::result::Result<(), End> {
    // Without a request id: to register twice does nothing, and an id of ours would carry the time of a clock
    // that may be wrong.
    let request = agent.registration.clone();
    let answer = unless_stopped(&mut agent.shutdown, timeout(CALL, connection.register(request))).await?;
    let answer = answer.map_err(|_| End::lost("no answer to Register in time"))?;
    let answer = answer.map_err(|failure| match End::of_failure(failure) {
        End::Unregistered => End::lost("it does not know this node, and does not register it"),
        end => end,
    })?;
    agent.learn(&answer.endpoints);
    agent.registered = true;
    Ok(())
}

/// Waits for an answer, but not when the agent is told to stop.
pub(crate) async fn unless_stopped<T>(
    shutdown: &mut Shutdown,
    answer: impl Future<Output = T>,
) -> std::result::Result<T, End> {
    tokio::select! {
        answer = answer => Ok(answer),
        () = shutdown.changes() => Err(End::Stopped),
    }
}

/// The stream as this side holds it.
struct Wire {
    device_id: String,
    send: mpsc::Sender<wire::NodeMessage>,
    patience: Duration,
}

impl Wire {
    async fn send(&self, bodies: impl IntoIterator<Item = Body>) -> std::result::Result<(), End> {
        for body in bodies {
            let message = wire::NodeMessage {
                device_id: self.device_id.clone(),
                body: Some(body),
            };
            match timeout(self.patience, self.send.send(message)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(End::lost("the stream ended")),
                Err(_) => return Err(End::lost("the server stopped reading")),
            }
        }
        Ok(())
    }
}

impl Wire {
    /// Says that this node goes, so that nobody waits for it, and sees to it that the word is out.
    async fn leave(self, mut stream: Stream) {
        if self.send([Body::Leave(wire::Leave {})]).await.is_err() {
            return;
        }
        let goodbye = async {
            while let Ok(Some(message)) = stream.message().await {
                if matches!(message.body, Some(Heard::Goodbye(_))) {
                    return;
                }
            }
        };
        // Without an answer the replica finds out by itself, a little later.
        drop(timeout(LAST_WORD, goodbye).await);
    }
}

/// Runs a session over `connection` until it ends.
pub(crate) async fn run(agent: &mut Agent, connection: Connection, replica: &KnownReplica) -> End {
    match attach(agent, &connection).await {
        Ok((wire, stream, attached)) => {
            let interval = Duration::from_millis(attached.heartbeat_interval_ms.clamp(50, 60_000));
            let line = Line { connection, replica };
            converse(agent, line, wire, stream, attached.epoch, interval).await
        }
        Err(end) => end,
    }
}

type Stream = Incoming<wire::ServerMessage>;

async fn attach(
    agent: &mut Agent,
    connection: &Connection,
) -> std::result::Result<(Wire, Stream, wire::Attached), End> {
    let no_stream = |why: String| End::Lost { why, no_stream: true };
    let (send, receive) = mpsc::channel(OUTGOING);
    let wire = Wire {
        device_id: agent.device_id.clone(),
        send,
        patience: CALL,
    };
    wire.send([Body::Attach(wire::Attach {
        request_id: new_ulid(),
        held: agent.jobs.held(),
        trust_generation: agent.link.trust_generation(),
        held_attempts: agent.jobs.held_attempts(),
        fallback: agent.fallback.clone(),
    })])
    .await?;
    let opened = timeout(CALL, connection.session(receive));
    let mut stream = match unless_stopped(&mut agent.shutdown, opened).await? {
        Ok(Ok(stream)) => stream,
        Ok(Err(failure)) => return Err(before_attached(failure)),
        Err(_) => return Err(no_stream("no session stream in time".to_owned())),
    };
    let first = timeout(CALL, stream.message());
    match unless_stopped(&mut agent.shutdown, first).await? {
        Ok(Ok(Some(wire::ServerMessage {
            body: Some(Heard::Attached(attached)),
        }))) => {
            agent.attached(&attached, connection.transport());
            Ok((wire, stream, attached))
        }
        Ok(Ok(Some(wire::ServerMessage {
            body: Some(Heard::Goodbye(goodbye)),
        }))) => {
            agent.learn(&goodbye.endpoints);
            Err(End::of_goodbye(&goodbye))
        }
        Ok(Ok(Some(_))) => Err(End::lost("the server's first message was not Attached")),
        Ok(Ok(None)) => Err(no_stream("the stream ended before Attached".to_owned())),
        Ok(Err(failure)) => Err(before_attached(failure)),
        Err(_) => Err(no_stream("no answer to Attach in time".to_owned())),
    }
}

fn before_attached(failure: Failure) -> End {
    match failure {
        // No typed answer: something between the two sides broke the stream.
        Failure::Lost {
            cause,
            refused: false,
        } => End::Lost {
            why: cause,
            no_stream: true,
        },
        failure => End::of_failure(failure),
    }
}

async fn converse(
    agent: &mut Agent,
    line: Line<'_>,
    mut wire: Wire,
    mut stream: Stream,
    epoch: u64,
    interval: Duration,
) -> End {
    wire.patience = interval * SILENT_INTERVALS;
    let mut first = agent.jobs.attached(epoch);
    first.extend(agent.desk.iter_mut().flat_map(Desk::attached));
    if let Err(end) = wire.send(first).await {
        return end;
    }
    let mut heard_at = Instant::now();
    let mut sequence = 0;
    let mut beat_at = Instant::now();
    let (mut renewal, mut probe) = (Renewal::default(), Probe::default());
    let mut feed = Feed::open(&line.connection, &agent.device_id);
    loop {
        renewal.begin(agent, &line.connection);
        agent.publish();
        if agent.may_stop() {
            wire.leave(stream).await;
            return End::Stopped;
        }
        let due = agent.jobs.next_overdue().unwrap_or(beat_at + interval);
        let sent = tokio::select! {
            message = stream.message() => {
                heard_at = Instant::now();
                match hear(agent, message) {
                    Ok(bodies) => wire.send(bodies).await,
                    Err(end) => return end,
                }
            }
            Some(event) = agent.events.recv() => {
                let bodies = agent.jobs.event(event);
                wire.send(bodies).await
            }
            bodies = desk::next(&mut agent.desk) => wire.send(with_statement(agent, bodies)).await,
            () = sleep_until(beat_at) => {
                if heard_at.elapsed() > interval * SILENT_INTERVALS {
                    return End::lost("the server went silent");
                }
                probe.begin(agent, &line);
                beat_at = Instant::now() + interval;
                sequence += 1;
                wire.send([Body::Heartbeat(wire::Heartbeat { sequence })]).await
            }
            () = sleep_until(due) => {
                let bodies = agent.jobs.overdue(Instant::now());
                wire.send(bodies).await
            }
            outcome = renewal.ended() => {
                if agent.link.renewed(outcome) {
                    return End::Again;
                }
                Ok(())
            }
            endpoints = feed.endpoints() => {
                agent.learn(&endpoints);
                Ok(())
            }
            works = probe.ended() => {
                if works_now(agent, line.replica, works) {
                    return End::Again;
                }
                Ok(())
            }
            () = agent.shutdown.changes() => Ok(()),
        };
        if let Err(end) = sent {
            return end;
        }
    }
}

/// What the worker says, and its statement, when that waited for a measurement which is there now.
fn with_statement(agent: &mut Agent, mut bodies: Vec<Body>) -> Vec<Body> {
    if let Some(desk) = &mut agent.desk {
        bodies.extend(desk.statement(agent.link.as_ref()));
    }
    bodies
}

/// Takes one message of the server in. Answers what to send.
fn hear(
    agent: &mut Agent,
    message: std::result::Result<Option<wire::ServerMessage>, Failure>,
) -> std::result::Result<Vec<Body>, End> {
    let message = message.map_err(End::of_failure)?;
    let Some(message) = message else {
        return Err(End::lost("the server ended the stream"));
    };
    agent.heard();
    take(agent, message)
}

/// The same for both transports.
pub(crate) fn take(agent: &mut Agent, message: wire::ServerMessage) -> std::result::Result<Vec<Body>, End> {
    match message.body {
        Some(Heard::Assignment(assignment)) => return Ok(agent.jobs.assign(assignment)),
        Some(Heard::Result(answer)) => agent.jobs.answered(&answer),
        Some(Heard::Cancel(cancel)) => return Ok(agent.jobs.cancel(&cancel)),
        Some(Heard::TrustUpdate(update)) => return Ok(agent.trust(update)),
        Some(Heard::Goodbye(goodbye)) => {
            agent.learn(&goodbye.endpoints);
            return Err(End::of_goodbye(&goodbye));
        }
        Some(Heard::Attached(attached)) => agent.learn(&attached.endpoints),
        Some(Heard::Rotate(rotate)) => agent.link.ask(&format!("an operator: {}", rotate.reason)),
        // A heartbeat's answer is a sign of life; what this release doesn't know is none of its business.
        Some(Heard::Worker(order)) => {
            if let Some(desk) = &mut agent.desk {
                return Ok(desk.hear(order, agent.link.as_ref()));
            }
        }
        Some(Heard::Heartbeat(_)) | None => {}
    }
    Ok(Vec::new())
}

/// The connection that carries a session, and to whom.
struct Line<'a> {
    connection: Connection,
    replica: &'a KnownReplica,
}

/// A try of QUIC beside a session that had to do without, if one is under way.
#[derive(Default)]
struct Probe(Option<Dialling>);

impl Probe {
    /// Begins one when it is due.
    fn begin(&mut self, agent: &mut Agent, line: &Line<'_>) {
        let without = matches!(line.connection, Connection::Grpc(_));
        if without && self.0.is_none() && agent.carrier.is_probe_due(line.replica, Instant::now()) {
            self.0 = Some(agent.link.dial_quic(&line.replica.quic_addr));
        }
    }

    /// Completes when it ends, with why QUIC does not work, if so; never when there is none. Safe to cancel.
    async fn ended(&mut self) -> std::result::Result<(), String> {
        let dialled = match self.0.as_mut() {
            Some(under_way) => under_way.await,
            None => std::future::pending().await,
        };
        self.0 = None;
        dialled.map(drop).map_err(|error| error.cause)
    }
}

/// Takes the outcome of a probe in. Answers whether to connect anew, over QUIC.
fn works_now(agent: &mut Agent, replica: &KnownReplica, works: std::result::Result<(), String>) -> bool {
    match works {
        Ok(()) => {
            tracing::info!(address = replica.quic_addr, "QUIC gets through again");
            agent.carrier.works(&replica.quic_addr);
            true
        }
        Err(why) => {
            agent.carrier.failed(&replica.quic_addr, &why, Instant::now());
            false
        }
    }
}

/// A renewal under way, if there is one.
#[derive(Default)]
pub(crate) struct Renewal(Option<futures::future::BoxFuture<'static, Result<()>>>);

impl Renewal {
    /// Begins one when it is due.
    pub(crate) fn begin(&mut self, agent: &mut Agent, connection: &Connection) {
        if self.0.is_none() && agent.link.renew_due() {
            tracing::info!("asking for a new certificate");
            self.0 = Some(agent.link.renew(connection.clone()));
        }
    }

    /// Completes when it ends; never when there is none. Safe to cancel.
    pub(crate) async fn ended(&mut self) -> Result<()> {
        let outcome = match self.0.as_mut() {
            Some(under_way) => under_way.await,
            None => std::future::pending::<Result<()>>().await,
        };
        self.0 = None;
        outcome
    }
}

/// What the wire calls a replica, in the form that is stored.
pub(crate) fn known(endpoints: &[wire::NodeEndpoint]) -> Vec<KnownReplica> {
    let known = endpoints.iter().map(|endpoint| KnownReplica {
        replica_id: endpoint.replica_id,
        node_addr: endpoint.node_addr.clone(),
        enrol_addr: endpoint.enrol_addr.clone(),
        quic_addr: endpoint.quic_addr.clone(),
    });
    known.collect()
}

/// The failure that the agent ends with, when an end is final. A certificate that is refused is not: see
/// `recover`.
pub(crate) fn final_error(end: &End) -> Option<Error> {
    use crate::Kind::{Auth, Conflict};
    match end {
        End::Revoked(words) => Some(Error::new(
            Auth,
            "N0501",
            format!("this node was revoked ({words})"),
            "the agent ends; talk to the operator, pairing again needs a new PIN or ticket and --replace",
        )),
        End::Superseded(words) => Some(Error::new(
            Conflict,
            "N0502",
            format!("another agent with this node's identity took over ({words})"),
            "is the data folder copied to another machine? Pair each machine: palyra node pair",
        )),
        _ => None,
    }
}
