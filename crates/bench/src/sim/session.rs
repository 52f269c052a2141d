//! One session of a simulated node: attach, heartbeats at the server's interval, `echo`, and its end.
//!
//! What never lives here: which replica, and what comes after the end (see `node`). Invariants: as the agent's: the
//! first message is Attach; a side that hears nothing for three intervals gives the session up; nothing waits
//! without a limit.

use std::time::Duration;

use palyra_client::error::Failure;
use palyra_client::{Connection, Incoming, new_ulid};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message::Body as Heard;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

/// For the answer to Register and to Attach.
const CALL: Duration = Duration::from_secs(30);
const OUTGOING: usize = 8;
const SILENT_INTERVALS: u32 = 3;

/// When to come again: not before `after_ms`, and up to `spread_ms` later at random.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pace {
    /// Not before.
    pub(crate) after_ms: u64,
    /// Up to so much later.
    pub(crate) spread_ms: u64,
}

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// Try another replica; the text is the kind of trouble.
    Lost(String),
    /// The node must register first.
    Unregistered,
    /// The server sends the node away, and says when to come, here or elsewhere.
    Moved(Pace),
    /// The device is revoked, or its certificate is refused.
    Revoked(String),
    /// Somebody else has this node's identity.
    Superseded,
}

impl End {
    pub(crate) fn of(failure: Failure) -> End {
        match failure {
            Failure::Lost { cause, refused: true } => End::Revoked(cause),
            Failure::Lost { cause, .. } => End::Lost(cause),
            Failure::Answered(error) => match error.code.as_str() {
                "E0501" => End::Unregistered,
                "E0302" | "E0304" => End::Revoked(error.code.clone()),
                _ if error.trail.retry_after_ms + error.trail.spread_ms > 0 => End::Moved(Pace {
                    after_ms: error.trail.retry_after_ms,
                    spread_ms: error.trail.spread_ms,
                }),
                code => End::Lost(format!("{code} {}", error.message)),
            },
        }
    }

    pub(crate) fn of_goodbye(goodbye: &wire::Goodbye) -> End {
        match goodbye.code.as_str() {
            "revoked" => End::Revoked("goodbye".to_owned()),
            "superseded" => End::Superseded,
            "draining" | "stale" | "lost" => End::Moved(Pace {
                after_ms: goodbye.retry_after_ms,
                spread_ms: goodbye.spread_ms,
            }),
            code => End::Lost(format!("goodbye {code}")),
        }
    }
}

/// Registers `echo` and `note` (a `once` capability that does nothing).
pub(crate) async fn register(connection: &Connection, device_id: &str) -> Result<(), End> {
    let capability = |name: &str, effect: &str| wire::Capability {
        name: name.to_owned(),
        effect: effect.to_owned(),
        timeout_ms: 30_000,
        max_concurrency: 64,
        ..Default::default()
    };
    let request = wire::RegisterRequest {
        device_id: device_id.to_owned(),
        platform: "bench/simulated".to_owned(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        capabilities: vec![capability("echo", "idempotent"), capability("note", "once")],
        ..Default::default()
    };
    match timeout(CALL, connection.register(request)).await {
        Ok(answer) => answer.map(|_| ()).map_err(End::of),
        Err(_) => Err(End::Lost("no answer to Register".to_owned())),
    }
}

/// An attached session.
pub(crate) struct Session {
    device_id: String,
    say: mpsc::Sender<wire::NodeMessage>,
    heard: Incoming<wire::ServerMessage>,
    interval: Duration,
    /// The replica that holds it.
    pub(crate) replica: u64,
}

impl Session {
    /// Attaches over a connection.
    pub(crate) async fn attach(connection: &Connection, device_id: &str) -> Result<Session, End> {
        let (say, said) = mpsc::channel(OUTGOING);
        let attach = wire::Attach {
            request_id: new_ulid(),
            ..Default::default()
        };
        let first = message(device_id, Body::Attach(attach));
        say.try_send(first)
            .map_err(|_| End::Lost("the stream is full".to_owned()))?;
        let opened = async {
            let mut heard = connection.session(said).await.map_err(End::of)?;
            let first = heard.message().await.map_err(End::of)?;
            Ok((heard, first.and_then(|message| message.body)))
        };
        let opened = timeout(CALL, opened).await;
        let (heard, first) = opened.map_err(|_| End::Lost("no answer to Attach".to_owned()))??;
        match first {
            Some(Heard::Attached(attached)) => Ok(Session {
                device_id: device_id.to_owned(),
                say,
                heard,
                interval: Duration::from_millis(attached.heartbeat_interval_ms.clamp(50, 600_000)),
                replica: attached.replica_id,
            }),
            Some(Heard::Goodbye(goodbye)) => Err(End::of_goodbye(&goodbye)),
            _ => Err(End::Lost("the first message was not Attached".to_owned())),
        }
    }

    /// Lives until the session ends. `phase` (0 to 1) is where in the interval its heartbeats fall, so that a
    /// fleet that attached at one moment does not beat as one.
    pub(crate) async fn live(mut self, phase: f64) -> End {
        let mut beat_at = Instant::now() + self.interval.mul_f64(phase);
        let mut heard_at = Instant::now();
        let mut sequence = 0;
        loop {
            tokio::select! {
                heard = self.heard.message() => {
                    heard_at = Instant::now();
                    let body = match heard {
                        Ok(Some(message)) => message.body,
                        Ok(None) => return End::Lost("the server ended the stream".to_owned()),
                        Err(failure) => return End::of(failure),
                    };
                    if let Err(end) = self.take(body).await {
                        return end;
                    }
                }
                () = sleep_until(beat_at) => {
                    if heard_at.elapsed() > self.interval * SILENT_INTERVALS {
                        return End::Lost("the server went silent".to_owned());
                    }
                    beat_at += self.interval;
                    sequence += 1;
                    if let Err(end) = self.say(Body::Heartbeat(wire::Heartbeat { sequence })).await {
                        return end;
                    }
                }
            }
        }
    }

    async fn take(&mut self, body: Option<Heard>) -> Result<(), End> {
        match body {
            Some(Heard::Assignment(assignment)) => {
                let (dispatch_id, epoch) = (assignment.dispatch_id, assignment.epoch);
                let ack = wire::Ack {
                    dispatch_id: dispatch_id.clone(),
                    epoch,
                };
                self.say(Body::Ack(ack)).await?;
                let result = wire::Result {
                    request_id: new_ulid(),
                    dispatch_id,
                    epoch,
                    outcome: "succeeded".to_owned(),
                    payload: assignment.payload,
                    ..Default::default()
                };
                self.say(Body::Result(result)).await
            }
            Some(Heard::Goodbye(goodbye)) => Err(End::of_goodbye(&goodbye)),
            _ => Ok(()),
        }
    }

    async fn say(&self, body: Body) -> Result<(), End> {
        let sent = timeout(
            self.interval * SILENT_INTERVALS,
            self.say.send(message(&self.device_id, body)),
        )
        .await;
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Lost("the stream ended".to_owned())),
            Err(_) => Err(End::Lost("the server stopped reading".to_owned())),
        }
    }
}

fn message(device_id: &str, body: Body) -> wire::NodeMessage {
    wire::NodeMessage {
        device_id: device_id.to_owned(),
        body: Some(body),
    }
}
