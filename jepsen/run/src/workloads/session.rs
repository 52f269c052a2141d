//! One session of a machine that the harness plays: attach, what is said and heard, and why it ended.
//!
//! Never here: what is done in it. Invariants: the first message is Attach; nothing waits without a limit.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use palyra_client::error::{Class, Error, Failure};
use palyra_client::{ConnectErrorKind, ConnectOptions, Connection, Incoming, QuicOptions, connect, quic};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message::Body as Heard;
use rustls::ClientConfig;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};

use super::fleet::Machine;
use crate::cluster::Cluster;

/// For a connection, and for the answer to Attach.
pub(super) const CALL: Duration = Duration::from_millis(3_500);
const OUTGOING: usize = 256;
/// A replica that is not heard for so many intervals of heartbeats is given up.
const SILENT: u32 = 3;

/// How a machine reaches a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// TCP.
    Grpc,
    /// UDP.
    Quic,
}

/// Why there is no session, or none any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Nobody answers.
    Lost(String),
    /// The device or its certificate is revoked.
    Revoked(String),
    /// The replica refuses, for another reason than that.
    Refused(String),
    /// The machine must register first.
    Unregistered,
    /// Somebody attached as the same device.
    Superseded,
}

impl End {
    /// Of a call that failed.
    pub(super) fn of(failure: &Failure) -> End {
        match failure {
            Failure::Lost { cause, refused: true } => End::of_refusal(cause),
            Failure::Lost { cause, .. } => End::Lost(cause.clone()),
            Failure::Answered(error) => End::of_error(error),
        }
    }

    /// Of a certificate that was not taken. TLS says of a revoked one nothing, and of one that is over by a clock that
    /// jumped that it is over: only a connection over QUIC is closed as revoked.
    fn of_refusal(cause: &str) -> End {
        if cause.contains("(revoked)") {
            End::Revoked(cause.to_owned())
        } else {
            End::Refused(cause.to_owned())
        }
    }

    fn of_error(error: &Error) -> End {
        let why = format!("{} {}", error.code, error.message);
        match error.code.as_str() {
            "E0302" | "E0304" => End::Revoked(why),
            "E0501" => End::Unregistered,
            _ if matches!(error.class, Class::Unreachable) => End::Lost(why),
            _ => End::Refused(why),
        }
    }

    fn of_goodbye(goodbye: &wire::Goodbye) -> End {
        match goodbye.code.as_str() {
            "revoked" => End::Revoked("goodbye".to_owned()),
            "superseded" => End::Superseded,
            code => End::Lost(format!("goodbye {code}")),
        }
    }

    /// The word of the history: `revoked`, or another.
    pub(super) fn word(&self) -> String {
        match self {
            End::Revoked(_) => "revoked".to_owned(),
            End::Lost(why) | End::Refused(why) => why.clone(),
            End::Unregistered => "unregistered".to_owned(),
            End::Superseded => "superseded".to_owned(),
        }
    }
}

/// A machine's certificate, ready for both ways.
#[derive(Clone)]
pub(super) struct Papers {
    /// Its device id.
    pub(super) device: String,
    tcp: Arc<ClientConfig>,
    udp: Arc<ClientConfig>,
}

impl Papers {
    /// Of a paired machine.
    pub(super) fn of(machine: &Machine) -> Result<Papers> {
        let unusable = "a machine's credential can't be used";
        let (own, trust) = machine.credential.for_tls().context(unusable)?;
        let udp = quic::mutual(Arc::clone(&trust), own, None).context(unusable)?;
        Ok(Papers {
            device: machine.device_id.clone(),
            tcp: Arc::clone(machine.identity.tls()),
            udp,
        })
    }

    /// Connects to a replica.
    pub(super) async fn connect(&self, cluster: &Cluster, at: u64, way: Way) -> Result<Connection, End> {
        let late = |_| End::Lost("no connection in time".to_owned());
        let connected = match way {
            Way::Grpc => {
                let address = cluster.node_address(at);
                let options = ConnectOptions::default();
                let made = timeout(CALL, connect::connect(&address, &self.tcp, &options)).await;
                made.map_err(late)?.map(Connection::Grpc)
            }
            Way::Quic => {
                let address = cluster.quic_address(at);
                let options = QuicOptions::default();
                let made = timeout(CALL, quic::connect(&address, &self.udp, &options)).await;
                made.map_err(late)?.map(Connection::Quic)
            }
        };
        connected.map_err(|error| match error.kind {
            ConnectErrorKind::Refused => End::of_refusal(&error.cause),
            ConnectErrorKind::Unreachable | ConnectErrorKind::WrongServer => End::Lost(error.cause),
        })
    }

    /// Registers capabilities.
    pub(super) async fn register(
        &self,
        connection: &Connection,
        capabilities: Vec<wire::Capability>,
    ) -> Result<(), End> {
        let request = wire::RegisterRequest {
            request_id: palyra_client::new_ulid(),
            device_id: self.device.clone(),
            platform: "jepsen".to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            capabilities,
            ..Default::default()
        };
        match timeout(CALL, connection.register(request)).await {
            Ok(answer) => answer.map(|_| ()).map_err(|failure| End::of(&failure)),
            Err(_) => Err(End::Lost("no answer to Register".to_owned())),
        }
    }
}

/// An attached session.
pub(super) struct Session {
    device: String,
    say: mpsc::Sender<wire::NodeMessage>,
    heard: Incoming<wire::ServerMessage>,
    /// Of heartbeats.
    pub(super) interval: Duration,
    /// Its epoch.
    pub(super) epoch: u64,
    last: Instant,
}

impl Session {
    /// Attaches.
    pub(super) async fn attach(
        connection: &Connection,
        device: &str,
        attach: wire::Attach,
    ) -> Result<Session, End> {
        let (say, said) = mpsc::channel(OUTGOING);
        let full = |_| End::Lost("the stream is full".to_owned());
        say.try_send(message(device, Body::Attach(attach)))
            .map_err(full)?;
        let until = Instant::now() + CALL;
        let late = |_| End::Lost("no answer to Attach".to_owned());
        let opened = timeout_at(until, connection.session(said)).await.map_err(late)?;
        let mut heard = opened.map_err(|failure| End::of(&failure))?;
        let first = timeout_at(until, heard.message()).await.map_err(late)?;
        match first
            .map_err(|failure| End::of(&failure))?
            .and_then(|message| message.body)
        {
            Some(Heard::Attached(attached)) => Ok(Session {
                device: device.to_owned(),
                say,
                heard,
                interval: Duration::from_millis(attached.heartbeat_interval_ms.clamp(50, 60_000)),
                epoch: attached.epoch,
                last: Instant::now(),
            }),
            Some(Heard::Goodbye(goodbye)) => Err(End::of_goodbye(&goodbye)),
            _ => Err(End::Lost("the first message was not Attached".to_owned())),
        }
    }

    /// The next message, or nothing after `within`. Safe to cancel.
    pub(super) async fn next(&mut self, within: Duration) -> Result<Option<Heard>, End> {
        match timeout(within, self.heard.message()).await {
            Err(_) if self.last.elapsed() > self.interval * SILENT => {
                Err(End::Lost("the replica went silent".to_owned()))
            }
            Err(_) => Ok(None),
            Ok(Ok(Some(message))) => {
                self.last = Instant::now();
                match message.body {
                    Some(Heard::Goodbye(goodbye)) => Err(End::of_goodbye(&goodbye)),
                    body => Ok(body),
                }
            }
            Ok(Ok(None)) => Err(End::Lost("the replica ended the stream".to_owned())),
            Ok(Err(failure)) => Err(End::of(&failure)),
        }
    }

    /// Says something.
    pub(super) async fn say(&self, body: Body) -> Result<(), End> {
        match timeout(CALL, self.say.send(message(&self.device, body))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Lost("the stream ended".to_owned())),
            Err(_) => Err(End::Lost("the replica stopped reading".to_owned())),
        }
    }

    /// Gives a sign of life.
    pub(super) async fn beat(&self, sequence: u64) -> Result<(), End> {
        self.say(Body::Heartbeat(wire::Heartbeat { sequence })).await
    }
}

fn message(device: &str, body: Body) -> wire::NodeMessage {
    wire::NodeMessage {
        device_id: device.to_owned(),
        body: Some(body),
    }
}
