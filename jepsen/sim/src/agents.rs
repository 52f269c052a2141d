//! Nodes and the operators who give them work: sessions, dispatches, results, across replicas that come and go.
//!
//! A node attaches at one replica, runs what that replica's state binds to its session, and reports through any. It
//! may forget what it holds; then work that must not run twice has to end without it. Never here: sockets and streams,
//! which live in the server; what a node sees is the state of the replica that it is attached to.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use palyra_platform as platform;
use palyra_state::dispatch::{self, Dispatch, Effect, State};
use palyra_state::{Actor, Code, Id, Reply, clock, nodes};

use crate::chance;
use crate::cluster::{Answer, Cluster, Phase};
use crate::fleet;
use crate::history::{Asked, Deed, Outcome};

/// Dispatches that the sweeper ends at a time.
const SWEEP: usize = 16;

/// What a node knows of a dispatch that it has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begun {
    /// Its result waits to be accepted.
    Held,
    /// It is over, one way or another.
    Over,
    /// The node has lost what it knew, all but that it had begun.
    Forgotten,
}

/// A node.
struct Agent {
    cluster: Rc<Cluster>,
    device: Id,
    at: u64,
    /// Of the live session; 0 when there is none.
    epoch: u64,
    /// Of the session before.
    last_epoch: u64,
    begun: BTreeMap<Id, Begun>,
}

/// A node's life, until the run is over.
pub(crate) async fn agent(cluster: Rc<Cluster>, device: Id) {
    let at = cluster.any_member();
    let mut agent = Agent {
        cluster,
        device,
        at,
        epoch: 0,
        last_epoch: 0,
        begun: BTreeMap::new(),
    };
    while agent.cluster.phase.get() != Phase::Over {
        if agent.epoch == 0 {
            agent.attach().await;
        } else {
            agent.work().await;
        }
        platform::sleep(Duration::from_millis(chance::between(20, 150))).await;
    }
}

impl Agent {
    fn actor(&self) -> Actor {
        fleet::node(self.device, 0)
    }

    async fn attach(&mut self) {
        self.at = self.cluster.any_member();
        if chance::percent(15) {
            for begun in self.begun.values_mut().filter(|begun| **begun == Begun::Held) {
                *begun = Begun::Forgotten;
            }
        }
        let held: Vec<Id> = self
            .begun
            .iter()
            .filter(|(_, begun)| **begun == Begun::Held)
            .map(|(id, _)| *id)
            .collect();
        let device = self.device;
        let envelope = fleet::attach(self.actor(), device, self.at, held);
        let mut attached = None;
        self.cluster
            .ask_noted(self.at, envelope, |answer| {
                if let Some(Ok(Reply::Attached(reply))) = &answer.reply {
                    attached = Some(*reply);
                }
                let epoch = attached.map_or(0, |reply| reply.epoch);
                Asked::Command {
                    deed: Deed::Attach { device, epoch },
                    request: answer.request,
                }
            })
            .await;
        let Some(attached) = attached else { return };
        self.epoch = attached.epoch;
        let reached = [
            (attached.rebound, "dispatch-rebound"),
            (attached.assigned, "dispatch-moved"),
            (attached.lost, "dispatch-lost"),
        ];
        for (_, name) in reached.iter().filter(|(count, _)| *count > 0) {
            self.cluster.world.reach(name);
        }
    }

    /// Ends the session from the node's side: it attaches again, perhaps elsewhere.
    fn leave(&mut self) {
        self.last_epoch = std::mem::take(&mut self.epoch);
    }

    /// What the replica's own state binds to this session; `None` when the connection, or the session, is gone.
    async fn given(&self) -> Option<Vec<Dispatch>> {
        let (device, epoch) = (self.device, self.epoch);
        let look = move |view: &palyra_replica::View| {
            let session = nodes::node(view, device).and_then(|node| node.session);
            let open = dispatch::open_of_device(view, device, None, 64);
            (view.index(), session.map_or(0, |session| session.epoch), open)
        };
        let (index, session, open) = self.cluster.look(self.at, look).await?;
        if index < epoch {
            // It has not come to our attach yet.
            return Some(Vec::new());
        }
        (session == epoch).then(|| open.into_iter().filter(|found| found.epoch == epoch).collect())
    }

    async fn work(&mut self) {
        let Some(given) = self.given().await else {
            return self.leave();
        };
        for found in given {
            if self.epoch == 0 {
                return;
            }
            // What is begun and not reported is held, should the session end now.
            if self.begin(&found) && chance::percent(60) {
                self.report(&found).await;
            }
        }
        if self.epoch != 0 && chance::percent(6) {
            if chance::percent(30) {
                let lost = fleet::lose(self.at, self.device, self.epoch);
                if counted(&self.cluster.ask(self.at, lost).await) > 0 {
                    self.cluster.world.reach("node-suspect");
                    // Long enough away for whoever sweeps, now and then.
                    platform::sleep(Duration::from_millis(chance::between(0, 2_500))).await;
                }
            } else if chance::percent(50) {
                let detach = fleet::detach(self.actor(), self.device, self.epoch);
                // Whatever becomes of it: the next attach ends the session as well.
                drop(self.cluster.ask(self.at, detach).await);
            }
            self.leave();
        }
    }

    /// Runs a dispatch unless that was done before. True when there is a result to report.
    fn begin(&mut self, found: &Dispatch) -> bool {
        match self.begun.get(&found.id) {
            Some(Begun::Over) => return false,
            Some(Begun::Forgotten) if found.effect() == Effect::Once => {
                self.cluster.problem(format!(
                    "{} must not run twice, and was given again in epoch {}",
                    found.id, found.epoch
                ));
            }
            _ => {}
        }
        self.begun.insert(found.id, Begun::Held);
        true
    }

    async fn report(&mut self, found: &Dispatch) {
        if found.state() == State::Dispatched && chance::percent(10) {
            let mediate = fleet::await_mediation(self.actor(), found.id, self.epoch);
            drop(self.cluster.ask(self.at, mediate).await);
        }
        if self.last_epoch != 0 && chance::percent(20) {
            self.complete(found.id, self.last_epoch, true).await;
        }
        self.complete(found.id, self.epoch, false).await;
    }

    async fn complete(&mut self, id: Id, epoch: u64, stale: bool) {
        let at = if chance::percent(80) {
            self.at
        } else {
            self.cluster.any_member()
        };
        let result = id.to_bytes().to_vec();
        let envelope = fleet::complete(self.actor(), id, epoch, &result);
        let answer = self
            .cluster
            .ask_noted(at, envelope, |answer| Asked::Command {
                deed: match &answer.reply {
                    // Noted beside an end that had come before it: no result of the dispatch.
                    Some(Ok(Reply::Late(_))) => Deed::Plain("late"),
                    _ => Deed::Complete {
                        dispatch: id,
                        epoch,
                        result,
                        stale,
                    },
                },
                request: answer.request,
            })
            .await;
        if let Some(Ok(Reply::Late(_))) = &answer.reply {
            self.cluster.world.reach("late-result-noted");
        }
        match (&answer.outcome, &answer.reply) {
            (Outcome::Ok(_), _) if !stale => {
                self.begun.insert(id, Begun::Over);
            }
            (Outcome::Refused, Some(Err(reject))) if reject.kind() == Code::EpochStale => {
                if stale {
                    self.cluster.world.reach("stale-epoch-refused");
                } else {
                    self.leave();
                }
            }
            (Outcome::Refused, Some(Err(_))) if !stale => {
                self.begun.insert(id, Begun::Over);
            }
            _ => {}
        }
    }
}

/// An operator who gives nodes work, looks for it at another replica, and sometimes takes it back.
pub(crate) async fn operator(cluster: Rc<Cluster>, devices: Vec<Id>) {
    while cluster.phase.get() == Phase::Faults {
        platform::sleep(Duration::from_millis(chance::between(20, 250))).await;
        let device = devices[usize::try_from(chance::below(devices.len() as u64)).unwrap_or(0)];
        let id = fleet::fresh();
        let capability = if chance::percent(50) {
            fleet::ONCE
        } else {
            fleet::AGAIN
        };
        // Now and then so much that a snapshot takes several chunks.
        let bytes = if chance::percent(15) { 120_000 } else { 40 };
        let timeout_ms = chance::between(1_500, 12_000);
        let at = cluster.any_member();
        let envelope = fleet::submit(id, device, capability, bytes, timeout_ms);
        let answer = cluster
            .ask_noted(at, envelope, |answer| Asked::Command {
                deed: Deed::Submit { dispatch: id },
                request: answer.request,
            })
            .await;
        if answer.outcome.index().is_none() {
            continue;
        }
        if chance::percent(30) {
            let at = cluster.any_member();
            let found = cluster
                .read(at, move |view| dispatch::dispatch(view, id).is_some())
                .await;
            if matches!(found, Some((_, false))) {
                cluster.problem(format!("{id} was accepted, and r{at} does not know it"));
            }
        }
        if chance::percent(10) {
            let cancel = fleet::cancel(id);
            cluster
                .ask_noted(cluster.any_member(), cancel, |answer| Asked::Command {
                    deed: Deed::Plain("cancel"),
                    request: answer.request,
                })
                .await;
        }
    }
}

/// How much a batch changed.
fn counted(answer: &Answer) -> u32 {
    match &answer.reply {
        Some(Ok(Reply::Counted(counted))) => counted.count,
        _ => 0,
    }
}

/// What the leader's reconciler does in production: ends dispatches whose deadline has passed, and gives up nodes that
/// are late.
pub(crate) async fn sweeper(cluster: Rc<Cluster>) {
    while cluster.phase.get() != Phase::Over {
        platform::sleep(Duration::from_millis(500)).await;
        let at = cluster.any_member();
        // A moment that an entry stamped: the state's own clock moves with entries only.
        let look =
            |view: &palyra_replica::View| dispatch::due(view, clock(view).max(platform::wall_ms()), SWEEP);
        let due = cluster.look(at, look).await.unwrap_or_default();
        if !due.is_empty() && counted(&cluster.ask(at, fleet::expire(due)).await) > 0 {
            cluster.world.reach("dispatch-timed-out");
        }
        let late =
            |view: &palyra_replica::View| nodes::due(view, clock(view).max(platform::wall_ms()), SWEEP);
        let late = cluster.look(at, late).await.unwrap_or_default();
        if !late.is_empty() && counted(&cluster.ask(at, fleet::lapse(late)).await) > 0 {
            cluster.world.reach("node-given-up");
        }
    }
}

/// Waits until nothing is open any more: work that nobody ends would hold its queue for ever. Virtual time.
pub(crate) async fn drained(cluster: &Cluster, limit: Duration) -> bool {
    let end = platform::now() + limit;
    while platform::now() < end {
        let at = cluster.any_member();
        if let Some((_, 0)) = cluster.read(at, |view| dispatch::totals(view).open).await {
            return true;
        }
        platform::sleep(Duration::from_millis(250)).await;
    }
    false
}
