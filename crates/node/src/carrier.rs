//! What carries the sessions: QUIC, a gRPC stream, or gRPC polls.
//!
//! QUIC is tried first where a replica offers it. Where its datagrams do not get through, gRPC takes over, and the
//! reason is kept for the owner and the operator; QUIC is tried again beside the session that goes on, so that a
//! network without UDP costs a probe now and then and no session.
//!
//! Invariants: a fallback always has a reason; QUIC is only held against a replica when gRPC to the same one worked: a
//! replica that is gone says nothing about the network.

use std::collections::BTreeMap;
use std::time::Duration;

use palyra_client::{ConnectError, Connection};
use tokio::time::{Instant, timeout};

use crate::home::KnownReplica;
use crate::link::Link;
use crate::session::End;
use crate::{Error, Kind, Result};

/// How long QUIC is tried alone, before gRPC is tried beside it.
const ALONE: Duration = Duration::from_millis(500);
/// How long QUIC is not tried again to a replica where it failed, at first and at most.
const FIRST: Duration = Duration::from_secs(60);
const LAST: Duration = Duration::from_secs(30 * 60);
/// Streams that broke before anything came through, in a row, until polls are used.
const BROKEN_STREAMS: u32 = 3;
/// How long polls are used before a stream is tried again.
const POLLS: Duration = Duration::from_secs(300);

/// What the owner wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// QUIC, and gRPC where QUIC does not get through.
    #[default]
    Auto,
    /// QUIC and nothing else.
    Quic,
    /// gRPC and nothing else.
    Grpc,
}

impl Choice {
    /// From `auto`, `quic` or `grpc`.
    ///
    /// # Errors
    /// Another word.
    pub fn parse(text: &str) -> Result<Choice> {
        match text {
            "auto" => Ok(Choice::Auto),
            "quic" => Ok(Choice::Quic),
            "grpc" => Ok(Choice::Grpc),
            other => {
                let shown: String = other.chars().take(32).collect();
                let message = format!("{shown:?} is no transport; there are auto, quic and grpc");
                let next = "correct `transport` in node.toml, or the --transport option";
                Err(Error::new(Kind::Usage, "N0701", message, next))
            }
        }
    }
}

/// QUIC to one replica, where it failed.
#[derive(Debug, Clone)]
struct Blocked {
    why: String,
    pause: Duration,
    until: Instant,
}

/// What is known about the ways to the replicas.
#[derive(Debug, Default)]
pub(crate) struct Carrier {
    choice: Choice,
    /// By QUIC address.
    blocked: BTreeMap<String, Blocked>,
    broken: u32,
    poll_until: Option<Instant>,
}

/// How to reach a replica now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Way {
    /// QUIC, and gRPC if it does not get through.
    Either,
    /// QUIC, whatever comes of it.
    Quic,
    /// gRPC, with the reason if QUIC would be preferred.
    Grpc(String),
}

impl Carrier {
    pub(crate) fn new(choice: Choice) -> Carrier {
        Carrier {
            choice,
            ..Carrier::default()
        }
    }

    /// How to reach this replica.
    pub(crate) fn way(&self, replica: &KnownReplica, now: Instant) -> Way {
        if self.choice == Choice::Grpc {
            return Way::Grpc(String::new());
        }
        if self.choice == Choice::Quic {
            return Way::Quic;
        }
        if self.poll_until.is_some_and(|until| until > now) {
            return Way::Grpc("streams break on their way to the replicas".to_owned());
        }
        if replica.quic_addr.is_empty() {
            return Way::Grpc(format!("replica {} offers no QUIC", replica.replica_id));
        }
        match self.blocked.get(&replica.quic_addr) {
            Some(blocked) if blocked.until > now => Way::Grpc(blocked.why.clone()),
            _ => Way::Either,
        }
    }

    /// QUIC failed where gRPC works. Answers the reason in the words of a fallback.
    pub(crate) fn failed(&mut self, quic_addr: &str, why: &str, now: Instant) -> String {
        let before = self.blocked.get(quic_addr).map(|blocked| blocked.pause);
        let pause = before.map_or(FIRST, |pause| (pause * 2).min(LAST));
        let why = format!("QUIC to {quic_addr}: {why}");
        let blocked = Blocked {
            why: why.clone(),
            pause,
            until: now + pause,
        };
        self.blocked.insert(quic_addr.to_owned(), blocked);
        why
    }

    /// QUIC works.
    pub(crate) fn works(&mut self, quic_addr: &str) {
        self.blocked.remove(quic_addr);
    }

    /// Whether it is time to try QUIC again, beside a session over gRPC.
    pub(crate) fn is_probe_due(&self, replica: &KnownReplica, now: Instant) -> bool {
        self.choice == Choice::Auto
            && !replica.quic_addr.is_empty()
            && self
                .blocked
                .get(&replica.quic_addr)
                .is_some_and(|blocked| blocked.until <= now)
    }

    /// Until when to poll; `None` for a stream.
    pub(crate) fn poll_until(&self) -> Option<Instant> {
        self.poll_until.filter(|until| *until > Instant::now())
    }

    /// A session on a stream of gRPC ended.
    pub(crate) fn stream_ended(&mut self, end: &End) {
        if !matches!(end, End::Lost { no_stream: true, .. }) {
            self.broken = 0;
            return;
        }
        self.broken += 1;
        if self.broken >= BROKEN_STREAMS && self.choice != Choice::Quic {
            self.poll_until = Some(Instant::now() + POLLS);
            // The one stream that is tried then decides alone.
            self.broken = BROKEN_STREAMS - 1;
        }
    }
}

/// A connection, and why it is none of QUIC when that was tried.
pub(crate) struct Dialled {
    pub(crate) connection: Connection,
    pub(crate) quic_failed: Option<String>,
}

impl Dialled {
    fn plainly(connection: Connection) -> Dialled {
        Dialled {
            connection,
            quic_failed: None,
        }
    }
}

/// Connects to a replica. Whatever happens, it takes no longer than QUIC's and gRPC's own limits together.
pub(crate) async fn dial(
    link: &mut dyn Link,
    replica: &KnownReplica,
    way: &Way,
) -> std::result::Result<Dialled, ConnectError> {
    match way {
        Way::Grpc(_) => link.dial(&replica.node_addr).await.map(Dialled::plainly),
        Way::Quic => link.dial_quic(&replica.quic_addr).await.map(Dialled::plainly),
        Way::Either => {
            let mut quic = link.dial_quic(&replica.quic_addr);
            let failed = match timeout(ALONE, &mut quic).await {
                Ok(Ok(connection)) => return Ok(Dialled::plainly(connection)),
                Ok(Err(error)) => error,
                Err(_) => {
                    // It may be slow, or not get through at all: who answers by gRPC meanwhile waits for it.
                    let mut grpc = link.dial(&replica.node_addr);
                    let mut waiting = None;
                    let failed = loop {
                        tokio::select! {
                            dialled = &mut quic => match dialled {
                                Ok(connection) => return Ok(Dialled::plainly(connection)),
                                Err(error) => break error,
                            },
                            dialled = &mut grpc, if waiting.is_none() => waiting = Some(dialled),
                        }
                    };
                    let connection = match waiting {
                        Some(dialled) => dialled?,
                        None => grpc.await?,
                    };
                    return Ok(Dialled {
                        connection,
                        quic_failed: Some(failed.cause),
                    });
                }
            };
            let connection = link.dial(&replica.node_addr).await?;
            Ok(Dialled {
                connection,
                quic_failed: Some(failed.cause),
            })
        }
    }
}

#[cfg(test)]
#[path = "carrier_tests.rs"]
mod tests;
