//! The agent's outer loop: connect to a replica, serve a session there, go to the next when it ends.
//!
//! What never lives here: the session itself (see `session`, `poll`), signals and files of the process (see
//! `run`).
//!
//! Invariants: work goes on while there is no session; a lost session is followed by a try at another replica
//! within the route's pause; only revocation, another agent with the same identity, a certificate that is beyond
//! recovery and the owner end the loop; the owner's order to stop is heard at any time.

use std::time::Duration;

use palyra_client::{ConnectErrorKind, Connection, wall_ms};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::carrier::{Carrier, Dialled, Way};
use crate::home::{KnownReplica, NodeRecord};
use crate::jobs::Jobs;
use crate::link::Link;
use crate::recover::Outcome;
use crate::route::Route;
use crate::service::AgentStatus;
use crate::session::{End, known, register};
use crate::work::Event;
use crate::worker::desk::{self, Desk};
use crate::{Home, Result, carrier, poll, session};

/// The server shows a chain that ends in no root that this node trusts.
const UNKNOWN_ROOT: &str = "N0901";
/// How long running work may go on after the agent was told to stop.
const GRACE: Duration = Duration::from_secs(5);
/// Another agent with this identity takes over again and again. Once may be ourselves: an attach that was given
/// up at a replica that hung is committed when that replica wakes up.
const SUPERSEDED_AGAIN: Duration = Duration::from_secs(60);

/// The order to stop, and what is left of the time to do it in.
pub(crate) struct Shutdown {
    asked: watch::Receiver<bool>,
    until: Option<Instant>,
}

impl Shutdown {
    pub(crate) fn new(asked: watch::Receiver<bool>) -> Self {
        Self { asked, until: None }
    }

    /// Completes when the agent is told to stop; after that, when its time is over. Safe to cancel.
    pub(crate) async fn changes(&mut self) {
        match self.until {
            Some(until) => sleep_until(until).await,
            None => {
                if self.asked.wait_for(|asked| *asked).await.is_err() {
                    std::future::pending::<()>().await;
                }
                self.until = Some(Instant::now() + GRACE);
            }
        }
    }

    fn is_asked(&self) -> bool {
        self.until.is_some() || *self.asked.borrow()
    }

    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| until <= Instant::now())
    }
}

/// All that lives from one session to the next.
pub(crate) struct Agent {
    pub(crate) device_id: String,
    pub(crate) registration: wire::RegisterRequest,
    pub(crate) registered: bool,
    pub(crate) jobs: Jobs,
    pub(crate) events: mpsc::UnboundedReceiver<Event>,
    pub(crate) link: Box<dyn Link>,
    pub(crate) route: Route,
    pub(crate) status: watch::Sender<AgentStatus>,
    pub(crate) shutdown: Shutdown,
    pub(crate) home: Home,
    pub(crate) record: NodeRecord,
    pub(crate) superseded_at: Option<Instant>,
    pub(crate) carrier: Carrier,
    /// Why the connection is none of QUIC; empty when it is, or when nobody wants it to be.
    pub(crate) fallback: String,
    /// What there is of leases, when this node is a worker.
    pub(crate) desk: Option<Desk>,
}

impl Agent {
    /// Serves sessions until the agent is stopped. What still runs then is ended and its results are on disk.
    ///
    /// Errors: the ends that a new session would not change.
    pub(crate) async fn run(mut self) -> Result<()> {
        let ended = self.serve().await;
        self.status
            .send_modify(|status| status.state = "stopping".to_owned());
        self.jobs.begin_stop();
        self.jobs.abort().await;
        if let Some(desk) = self.desk.take() {
            desk.abort().await;
        }
        ended
    }

    async fn serve(&mut self) -> Result<()> {
        loop {
            if !self.wait_before_next().await {
                return Ok(());
            }
            let Some(replica) = self.route.replica() else {
                return Err(no_replica(&self.home));
            };
            let end = match self.connect(&replica).await {
                Ok(connection) => self.converse(&replica, connection).await,
                Err(end) => end,
            };
            self.disconnected(&replica, &end);
            match end {
                End::Stopped => return Ok(()),
                End::Again => {}
                end => {
                    let credential = matches!(end, End::CredentialRefused(_) | End::Revoked(_));
                    if credential && self.link.refused() {
                        continue;
                    }
                    if matches!(end, End::CredentialRefused(_)) {
                        if self.recover().await? {
                            continue;
                        }
                    } else if let Some(error) = self.is_final(&end) {
                        return Err(error);
                    }
                    if end == End::Unregistered {
                        self.registered = false;
                    }
                    match end {
                        End::Move { pace, .. } => self.route.sent_away(Instant::now(), pace),
                        _ => self.route.failed(Instant::now()),
                    }
                }
            }
        }
    }

    /// Serves one session.
    async fn converse(&mut self, replica: &KnownReplica, connection: Connection) -> End {
        let by_stream = matches!(connection, Connection::Grpc(_));
        let end = match self.carrier.poll_until() {
            Some(until) if by_stream => return poll::run(self, connection, until).await,
            _ => session::run(self, connection.clone(), replica).await,
        };
        if by_stream {
            self.carrier.stream_ended(&end);
        }
        if end == End::Stopped {
            connection.close().await;
        }
        end
    }

    /// The failure that ends the agent.
    fn is_final(&mut self, end: &End) -> Option<crate::Error> {
        if matches!(end, End::Superseded(_)) {
            let before = self.superseded_at.replace(Instant::now());
            if before.is_none_or(|at| at.elapsed() > SUPERSEDED_AGAIN) {
                // Two machines with one folder have one counter: the second to renew is found out.
                self.link.ask("another session of this node took over");
                return None;
            }
        }
        session::final_error(end)
    }

    /// No replica takes the certificate: asks for a new one where that does not matter. False when nobody could be
    /// asked.
    ///
    /// Errors: when no replica will ever give one.
    async fn recover(&mut self) -> Result<bool> {
        self.status
            .send_modify(|status| status.state = "recovering".to_owned());
        let enrol = self.route.replicas().iter();
        let enrol = enrol.map(|replica| replica.enrol_addr.clone());
        let asked = self
            .link
            .recover(enrol.filter(|address| !address.is_empty()).collect());
        let outcome = tokio::select! {
            outcome = asked => outcome,
            () = self.shutdown.changes() => return Ok(false),
        };
        let done = match outcome {
            Outcome::Done => self.link.renewed(Ok(())),
            Outcome::Later(error) => self.link.renewed(Err(error)),
            Outcome::Never(error) => return Err(error),
        };
        if done {
            tracing::warn!("the certificate was over; this node has recovered with a new one");
        }
        self.tell_health();
        Ok(done)
    }

    fn tell_health(&self) {
        let health = self.link.health();
        self.status.send_if_modified(|status| {
            let before = (
                status.renewals,
                status.renewed_at_ms,
                status.certificate_problem.clone(),
            );
            status.renewals = health.counter;
            status.renewed_at_ms = health.renewed_at_ms.max(status.renewed_at_ms);
            status.certificate_problem = health.problem;
            before
                != (
                    status.renewals,
                    status.renewed_at_ms,
                    status.certificate_problem.clone(),
                )
        });
    }

    /// Waits as the route says, with work going on. False when the agent is to stop.
    async fn wait_before_next(&mut self) -> bool {
        let until = Instant::now() + self.route.pause();
        loop {
            self.publish();
            if self.shutdown.is_asked() {
                return false;
            }
            tokio::select! {
                () = sleep_until(until) => return true,
                // Whatever it says is in the table, and goes out with the next session.
                Some(event) = self.events.recv() => { self.jobs.event(event); }
                _ = desk::next(&mut self.desk) => {}
                () = self.shutdown.changes() => {}
            }
        }
    }

    async fn connect(&mut self, replica: &KnownReplica) -> std::result::Result<Connection, End> {
        let way = self.carrier.way(replica, Instant::now());
        self.status.send_modify(|status| {
            status.state = "connecting".to_owned();
            status.endpoint = address_of(replica, way == Way::Quic);
        });
        let dialled = tokio::select! {
            dialled = carrier::dial(self.link.as_mut(), replica, &way) => dialled,
            () = self.shutdown.changes() => return Err(End::Stopped),
        };
        let Dialled {
            connection,
            quic_failed,
        } = dialled.map_err(|error| match error.kind {
            ConnectErrorKind::Refused => End::CredentialRefused(error.to_string()),
            ConnectErrorKind::WrongServer => End::lost(wrong_server(&error)),
            ConnectErrorKind::Unreachable => End::lost(error.to_string()),
        })?;
        self.fallback = match (quic_failed, way) {
            (Some(why), _) => {
                let why = self.carrier.failed(&replica.quic_addr, &why, Instant::now());
                tracing::warn!(why, "falling back to gRPC");
                why
            }
            (None, Way::Grpc(why)) => why,
            (None, Way::Either | Way::Quic) => {
                self.carrier.works(&replica.quic_addr);
                String::new()
            }
        };
        let over_quic = matches!(connection, Connection::Quic(_));
        self.status
            .send_modify(|status| status.endpoint = address_of(replica, over_quic));
        if !self.registered {
            register(self, &connection).await?;
        }
        Ok(connection)
    }

    /// A session is there.
    pub(crate) fn attached(&mut self, attached: &wire::Attached, transport: &str) {
        self.route.served(Instant::now());
        if let Err(error) = self.link.served() {
            tracing::warn!(%error, "the renewed certificate could not be put in place");
        }
        self.learn(&attached.endpoints);
        if let Some(times) = &attached.certificate {
            self.link.told(times);
        }
        let (fingerprint, not_after_ms) = self.link.describe();
        let (epoch, replica_id) = (attached.epoch, attached.replica_id);
        let fallback = self.fallback.clone();
        self.status.send_modify(|status| {
            status.state = "connected".to_owned();
            status.epoch = epoch;
            status.replica_id = replica_id;
            status.transport = transport.to_owned();
            status.fallback = fallback;
            status.last_heard_at_ms = wall_ms();
            status.fingerprint = fingerprint;
            status.not_after_ms = not_after_ms;
            status.last_error = String::new();
        });
        tracing::info!(
            replica = replica_id,
            epoch,
            transport,
            fallback = self.fallback,
            "connected"
        );
    }

    fn disconnected(&mut self, replica: &KnownReplica, end: &End) {
        let address = &replica.node_addr;
        let words = match end {
            End::Stopped | End::Again => String::new(),
            End::Unregistered => "not registered yet".to_owned(),
            End::Lost { why, .. } | End::Move { why, .. } => why.clone(),
            End::Superseded(why) | End::Revoked(why) | End::CredentialRefused(why) => why.clone(),
        };
        if let Some(desk) = &mut self.desk {
            desk.detached();
        }
        if !words.is_empty() {
            tracing::warn!(replica = address, why = words, "the session ended");
        }
        self.status.send_modify(|status| {
            status.state = "connecting".to_owned();
            status.epoch = 0;
            status.replica_id = 0;
            if !words.is_empty() {
                status.last_error = format!("{address}: {words}");
            }
        });
    }

    /// The cluster says whom to trust from now on. Acknowledged once it is on disk; in use with the next connection.
    pub(crate) fn trust(&mut self, update: wire::TrustUpdate) -> Vec<Body> {
        let generation = update.generation;
        let roots = update.roots.iter().map(|root| root.to_vec()).collect();
        match self.link.trust(generation, roots) {
            Ok(()) => vec![Body::TrustAck(wire::TrustAck { generation })],
            Err(error) => {
                tracing::error!(%error, generation, "the cluster's trust bundle is not in place; it comes again");
                self.status
                    .send_modify(|status| status.last_error = error.to_string());
                Vec::new()
            }
        }
    }

    /// The server said something.
    pub(crate) fn heard(&self) {
        self.status
            .send_modify(|status| status.last_heard_at_ms = wall_ms());
    }

    /// Puts what is held into the status, when it changed.
    pub(crate) fn publish(&self) {
        self.tell_health();
        self.status.send_if_modified(|status| {
            let before = (
                status.running.len(),
                status.mediation.len(),
                status.unreported.len(),
            );
            self.jobs.describe(status);
            let worker = self.desk.as_ref().map(Desk::describe).unwrap_or_default();
            let other = std::mem::replace(&mut status.worker, worker) != status.worker;
            other
                || before
                    != (
                        status.running.len(),
                        status.mediation.len(),
                        status.unreported.len(),
                    )
        });
    }

    /// These are the replicas now.
    pub(crate) fn learn(&mut self, endpoints: &[wire::NodeEndpoint]) {
        if !self.route.learn(known(endpoints)) {
            return;
        }
        let mut replicas: Vec<KnownReplica> = self.route.replicas().to_vec();
        replicas.sort_by_key(|replica| replica.replica_id);
        self.record.replicas = replicas;
        if let Err(error) = self.home.set_record(&self.record) {
            tracing::warn!(%error, "the list of replicas could not be stored");
        }
    }

    /// Whether the agent was told to stop and nothing holds it back.
    pub(crate) fn may_stop(&mut self) -> bool {
        if !self.shutdown.is_asked() {
            return false;
        }
        self.jobs.begin_stop();
        let leases = self.desk.as_mut().is_some_and(|desk| {
            desk.begin_stop();
            desk.is_busy()
        });
        self.shutdown.is_over() || (!leases && !self.jobs.is_busy() && self.jobs.next_overdue().is_none())
    }
}

/// A replica that shows a certificate under a root that is not known here: a stranger, or the cluster's root was
/// rotated while this node was away.
fn wrong_server(error: &palyra_client::ConnectError) -> String {
    match &error.chain {
        Some(palyra_pki::ChainError::UnknownIssuer { .. }) => format!(
            "{UNKNOWN_ROOT}: {error}; if the cluster's root was rotated while this node was away, pair it again: \
             palyra node pair --replace"
        ),
        _ => error.to_string(),
    }
}

/// Where a replica is reached.
fn address_of(replica: &KnownReplica, over_quic: bool) -> String {
    if over_quic {
        format!("{}/udp", replica.quic_addr)
    } else {
        replica.node_addr.clone()
    }
}

fn no_replica(home: &Home) -> crate::Error {
    let path = home.dir().join("identity/node.json");
    let message = format!("{} names no replica", path.display());
    crate::Error::new(
        crate::Kind::Precondition,
        "N0104",
        message,
        "pair again: palyra node pair --replace",
    )
}

#[cfg(test)]
#[path = "agent_tests.rs"]
mod tests;
