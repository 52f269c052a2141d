//! The life of a simulated node: which replica, when, and again, until it is revoked or the run ends.
//!
//! What never lives here: what happens in a session. Invariants: the same rules as the agent's route: the replica
//! that served last comes first, after a failure it comes last, and the pause before a try is drawn from zero to a
//! ceiling that doubles from 100 ms to 5 s; only the first attach of all is throttled, so that what is measured
//! after a fault is what a fleet does that nobody holds back.

use std::sync::Arc;
use std::time::Duration;

use palyra_client::{
    ConnectError, ConnectErrorKind, ConnectOptions, Connection, QuicOptions, connect, fill_random, quic,
};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::Identity;
use super::board::Board;
use super::session::{End, Pace, Session, register};
use crate::cluster::Cluster;

const FIRST_MS: u64 = 100;
const LAST_MS: u64 = 5_000;
/// A session that lived this long was a good one.
const STEADY: Duration = Duration::from_secs(5);
/// A generator that shares its cores with what it measures is late; it must not give up for that.
const CONNECT: Duration = Duration::from_secs(20);
/// First attaches that are under way at one time.
const RAMP: usize = 48;

/// How nodes reach replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Transport {
    /// gRPC over TCP.
    Grpc,
    /// QUIC over UDP.
    Quic,
}

impl Transport {
    /// The replicas' addresses for it.
    pub(crate) fn addresses(self, cluster: &Cluster) -> Vec<String> {
        match self {
            Transport::Grpc => cluster.node_addresses(),
            Transport::Quic => cluster.quic_addresses(),
        }
    }
}

/// What the nodes of a fleet share.
pub(crate) struct Shared {
    /// Where they are.
    pub(crate) board: Board,
    /// The replicas' addresses for nodes.
    pub(crate) addresses: Vec<String>,
    /// How they are reached.
    pub(crate) transport: Transport,
    ramp: Semaphore,
}

/// The nodes of a fleet; they end when this is dropped.
pub(crate) struct Fleet {
    /// What they share.
    pub(crate) shared: Arc<Shared>,
    /// Their device ids, by seat.
    pub(crate) device_ids: Vec<String>,
    _nodes: JoinSet<()>,
}

impl Fleet {
    /// Starts a fleet, spread over the replicas, and waits until all are attached.
    pub(crate) async fn start(
        identities: Vec<Identity>,
        addresses: Vec<String>,
        transport: Transport,
        within: Duration,
    ) -> anyhow::Result<Fleet> {
        let shared = Arc::new(Shared {
            board: Board::new(identities.len()),
            addresses,
            transport,
            ramp: Semaphore::new(RAMP),
        });
        let count = identities.len();
        let device_ids = identities
            .iter()
            .map(|identity| identity.device_id.clone())
            .collect();
        let mut nodes = JoinSet::new();
        for (seat, identity) in identities.into_iter().enumerate() {
            nodes.spawn(live(seat, identity, Arc::clone(&shared)));
        }
        shared.board.await_attached(count, within).await?;
        Ok(Fleet {
            shared,
            device_ids,
            _nodes: nodes,
        })
    }

    /// Where its nodes are.
    pub(crate) fn board(&self) -> &Board {
        &self.shared.board
    }
}

async fn live(seat: usize, identity: Identity, shared: Arc<Shared>) {
    let mut route = Route::new(seat, shared.addresses.len());
    // The first try of each takes its turn, and the permit goes with the attach.
    let mut turn = shared.ramp.acquire().await.ok();
    let mut registered = false;
    loop {
        sleep(route.pause()).await;
        let address = &shared.addresses[route.first()];
        let end = match one_session(&identity, address, &shared, &mut registered).await {
            Ok(session) => {
                turn = None;
                shared.board.attached(seat, session.replica);
                let since = Instant::now();
                let end = session.live(share(seat)).await;
                shared.board.ended(seat);
                route.ended(since.elapsed());
                end
            }
            Err(end) => {
                route.failed();
                end
            }
        };
        match end {
            // The next try registers.
            End::Unregistered => registered = false,
            End::Lost(kind) => shared.board.trouble(&kind),
            End::Moved(pace) => route.told = Some(pace),
            End::Revoked(_) => break,
            End::Superseded => {
                shared.board.trouble("superseded");
                break;
            }
        }
    }
    drop(turn);
}

/// Connects and attaches; registers when the cluster does not know the node.
async fn one_session(
    identity: &Identity,
    address: &str,
    shared: &Shared,
    registered: &mut bool,
) -> Result<Session, End> {
    let connection = dial(identity, address, shared.transport).await?;
    match Session::attach(&connection, &identity.device_id).await {
        Err(End::Unregistered) if !*registered => {
            register(&connection, &identity.device_id).await?;
            *registered = true;
            Session::attach(&connection, &identity.device_id).await
        }
        other => other,
    }
}

/// One connection, in everything but the patience as the agent makes it.
pub(crate) async fn dial(
    identity: &Identity,
    address: &str,
    transport: Transport,
) -> Result<Connection, End> {
    let connected = match transport {
        Transport::Grpc => {
            let options = ConnectOptions {
                connect_timeout: CONNECT,
                ..ConnectOptions::default()
            };
            connect(address, &identity.tls, &options)
                .await
                .map(Connection::Grpc)
        }
        Transport::Quic => {
            let options = QuicOptions {
                connect_timeout: CONNECT,
                ..QuicOptions::default()
            };
            let connected = quic::connect(address, &identity.quic, &options).await;
            connected.map(Connection::Quic)
        }
    };
    connected.map_err(|error: ConnectError| match error.kind {
        ConnectErrorKind::Refused => End::Revoked(error.cause),
        _ => End::Lost(error.cause),
    })
}

/// Which replica is next, and after which pause.
#[derive(Debug)]
struct Route {
    order: Vec<usize>,
    failures: u32,
    flaps: u32,
    told: Option<Pace>,
}

impl Route {
    /// Seats are dealt to the replicas in turn; the others follow in random order.
    fn new(seat: usize, replicas: usize) -> Route {
        let first = seat % replicas;
        let mut order: Vec<usize> = (0..replicas).filter(|replica| *replica != first).collect();
        if below(2) == 1 {
            order.reverse();
        }
        order.insert(0, first);
        Route {
            order,
            failures: 0,
            flaps: 0,
            told: None,
        }
    }

    fn first(&self) -> usize {
        self.order[0]
    }

    /// A session ended that lived so long.
    fn ended(&mut self, lived: Duration) {
        self.flaps = if lived >= STEADY {
            0
        } else {
            self.flaps.saturating_add(1)
        };
        self.failures = self.flaps.max(1);
        self.order.rotate_left(1);
    }

    /// No session came of it.
    fn failed(&mut self) {
        self.failures = self.failures.saturating_add(1);
        self.order.rotate_left(1);
    }

    fn ceiling_ms(&self) -> u64 {
        match self.failures {
            0 => 0,
            failures => FIRST_MS.saturating_mul(1 << (failures - 1).min(10)).min(LAST_MS),
        }
    }

    /// What the server said counts once; otherwise the pause is drawn.
    fn pause(&mut self) -> Duration {
        let ms = match self.told.take() {
            Some(pace) => pace
                .after_ms
                .saturating_add(below(pace.spread_ms.saturating_add(1))),
            None => below(self.ceiling_ms() + 1),
        };
        Duration::from_millis(ms)
    }
}

/// A number below `bound`.
fn below(bound: u64) -> u64 {
    let mut bytes = [0u8; 8];
    fill_random(&mut bytes);
    u64::from_le_bytes(bytes).checked_rem(bound).unwrap_or(0)
}

/// Seats spread evenly over 0 to 1, neighbours far apart.
#[expect(
    clippy::cast_precision_loss,
    reason = "a phase needs no more than a few digits"
)]
fn share(seat: usize) -> f64 {
    (seat as f64 * 0.618_033_988_749).fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_dealt_evenly_and_failures_go_round() {
        let mut firsts = [0; 3];
        for seat in 0..30 {
            firsts[Route::new(seat, 3).first()] += 1;
        }
        assert_eq!(firsts, [10, 10, 10]);
        let mut route = Route::new(4, 3);
        let mut seen = vec![route.first()];
        for _ in 0..3 {
            route.failed();
            seen.push(route.first());
        }
        assert_eq!(seen[0], seen[3]);
        seen.truncate(3);
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2]);
    }

    #[test]
    fn pauses_grow_with_failures_in_a_row_and_a_good_session_ends_the_row() {
        let mut route = Route::new(0, 3);
        assert_eq!(route.ceiling_ms(), 0);
        let mut ceilings = Vec::new();
        for _ in 0..8 {
            route.failed();
            ceilings.push(route.ceiling_ms());
        }
        assert_eq!(ceilings, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        route.ended(STEADY);
        assert_eq!(route.ceiling_ms(), 100);
        route.ended(Duration::ZERO);
        route.ended(Duration::ZERO);
        assert_eq!(route.ceiling_ms(), 200);
    }

    #[test]
    fn what_the_server_says_of_when_to_come_counts_once() {
        let mut route = Route::new(0, 3);
        route.told = Some(Pace {
            after_ms: 40_000,
            spread_ms: 10,
        });
        let pause = route.pause();
        assert!(
            pause >= Duration::from_secs(40) && pause <= Duration::from_millis(40_010),
            "{pause:?}"
        );
        assert_eq!(route.pause(), Duration::ZERO);
    }

    #[test]
    fn phases_are_spread() {
        let mut tenths = [0; 10];
        for seat in 0..1000 {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 9")]
            let tenth = (share(seat) * 10.0) as usize;
            tenths[tenth] += 1;
        }
        assert!(
            tenths.iter().all(|count| (90..=110).contains(count)),
            "{tenths:?}"
        );
    }
}
