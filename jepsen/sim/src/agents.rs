//! Nodes and the operators who give them work: sessions, dispatches, results, across replicas that come and go.
//!
//! A node attaches at one replica through the real control plane, runs what it is given there, and reports. It may
//! forget what it holds; then work that must not run twice has to end without it. What ends the dispatches of a node
//! that does not come back is the leader's own doing. Never here: the line between them.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use palyra_control::{Assignment, Completion, Inbound, Outbound, ResultAnswer};
use palyra_platform::{self as platform, Instant};
use palyra_state::{Id, dispatch};

use crate::chance;
use crate::cluster::{Cluster, Phase};
use crate::fleet;
use crate::history::{Asked, Deed, Outcome};
use crate::line::{Broken, Line};

/// Code of the refusal of a result from a session that is over.
const STALE: &str = "E0609";

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
    line: Option<Line>,
    /// Of the session before.
    last_epoch: u64,
    begun: BTreeMap<Id, Begun>,
    /// Results that were sent and not answered: when, and under which request.
    sent: BTreeMap<Id, Sent>,
    sequence: u64,
    beats_at: Instant,
}

/// A result that is on its way.
struct Sent {
    invoked: u64,
    request: Id,
    epoch: u64,
    outcome: &'static str,
    stale: bool,
}

/// A node's life, until the run is over.
pub(crate) async fn agent(cluster: Rc<Cluster>, device: Id) {
    let mut agent = Agent {
        cluster,
        device,
        line: None,
        last_epoch: 0,
        begun: BTreeMap::new(),
        sent: BTreeMap::new(),
        sequence: 0,
        beats_at: platform::now(),
    };
    while agent.cluster.phase.get() != Phase::Over {
        if agent.line.is_none() {
            agent.attach().await;
            platform::sleep(Duration::from_millis(chance::between(20, 150))).await;
        } else {
            agent.work().await;
        }
    }
    agent.leave();
}

impl Agent {
    async fn attach(&mut self) {
        let at = self.cluster.any_member();
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
        let peer = fleet::node_peer(&self.cluster.papers, self.device, 0);
        let invoked = self.cluster.history.borrow_mut().tick();
        let Some(line) = Line::open(&self.cluster, at, peer, self.device, &held).await else {
            return;
        };
        let (device, epoch) = (self.device, line.epoch());
        let attached = Asked::Command {
            deed: Deed::Attach { device, epoch },
            // Nobody is told under which request a session was begun.
            request: Id::ZERO,
        };
        self.cluster.record(at, attached, Outcome::Ok(epoch), invoked);
        self.line = Some(line);
    }

    /// Ends the session from the node's side: it attaches again, perhaps elsewhere. What was not answered is unknown.
    fn leave(&mut self) {
        if let Some(line) = self.line.take() {
            self.last_epoch = line.epoch();
            for (id, sent) in std::mem::take(&mut self.sent) {
                self.judged(line.at, id, &sent, Outcome::Unknown);
            }
        }
    }

    /// A while of a session: what comes is begun and mostly reported; now and then something is wrong with the line.
    async fn work(&mut self) {
        let patience = Duration::from_millis(chance::between(20, 120));
        let Some(line) = &mut self.line else { return };
        match line.hear(patience).await {
            Err(Broken) => return self.leave(),
            Ok(Some(Outbound::Assignment(found))) => self.given(&found),
            Ok(Some(Outbound::Result(answer))) => self.answered(&answer),
            // A cancelled dispatch is over when its node says so.
            Ok(Some(Outbound::Cancel {
                dispatch_id,
                confirm: Some((epoch, _)),
                ..
            })) => self.report(dispatch_id, epoch, "cancelled", false),
            Ok(_) => {}
        }
        self.beat();
        if chance::percent(2) {
            self.trouble().await;
        }
    }

    fn beat(&mut self) {
        let Some(line) = &self.line else { return };
        if platform::now() < self.beats_at {
            return;
        }
        self.beats_at = platform::now() + line.attached.heartbeat_interval;
        self.sequence += 1;
        let sequence = self.sequence;
        if !line.say(Inbound::Heartbeat { sequence }) {
            self.leave();
        }
    }

    async fn trouble(&mut self) {
        let Some(line) = &self.line else { return };
        match chance::below(3) {
            // Longer than the silence that ends a session, now and then; and this node is as cut off as its line.
            0 => line.hold(chance::between(100, 4_000)),
            // It says that it goes.
            1 => drop(line.say(Inbound::Leave)),
            // It is gone, and perhaps for so long that it is given up.
            _ => {
                self.leave();
                platform::sleep(Duration::from_millis(chance::between(0, 2_500))).await;
            }
        }
    }

    /// Runs what it is given unless that was done before, and reports it, most of the time.
    fn given(&mut self, found: &Assignment) {
        if self.line.as_ref().is_none_or(|line| line.epoch() != found.epoch) {
            return self.cluster.problem(format!(
                "dispatch.epochs: {} was given {} of epoch {} in another session",
                self.device, found.dispatch_id, found.epoch
            ));
        }
        match self.begun.get(&found.dispatch_id) {
            Some(Begun::Over) => return,
            Some(Begun::Forgotten) if found.effect == "once" => {
                self.cluster.problem(format!(
                    "{} must not run twice, and was given again in epoch {}",
                    found.dispatch_id, found.epoch
                ));
            }
            _ => {}
        }
        // What is begun and not reported is held, should the session end now.
        self.begun.insert(found.dispatch_id, Begun::Held);
        if !chance::percent(75) {
            return;
        }
        if chance::percent(10)
            && let Some(line) = &self.line
        {
            line.say(Inbound::Mediation {
                dispatch_id: found.dispatch_id.to_string(),
                epoch: found.epoch,
                waiting: true,
                request_id: String::new(),
                prompt: String::new(),
                host: String::new(),
            });
        }
        if self.last_epoch != 0 && chance::percent(20) {
            self.report(found.dispatch_id, self.last_epoch, "succeeded", true);
        } else {
            self.report(found.dispatch_id, found.epoch, "succeeded", false);
        }
    }

    fn report(&mut self, id: Id, epoch: u64, outcome: &'static str, stale: bool) {
        let Some(line) = &self.line else { return };
        if self.sent.contains_key(&id) {
            // Answers name the dispatch only, and come in any order: one at a time.
            return;
        }
        let request = fleet::fresh();
        let invoked = self.cluster.history.borrow_mut().tick();
        let completion = Completion {
            request_id: request.to_string(),
            dispatch_id: id.to_string(),
            epoch,
            outcome: outcome.to_owned(),
            payload: result_of(id).into(),
            error_code: String::new(),
            error_message: String::new(),
            log_tail: Bytes::new(),
            attempt: 0,
        };
        let sent = Sent {
            invoked,
            request,
            epoch,
            outcome,
            stale,
        };
        let was_said = line.say(Inbound::Result(completion));
        self.sent.insert(id, sent);
        if !was_said {
            self.leave();
        }
    }

    /// What became of a result.
    fn answered(&mut self, answer: &ResultAnswer) {
        let (id, at) = (answer.dispatch_id, self.line.as_ref().map_or(0, |line| line.at));
        let Some(sent) = self.sent.remove(&id) else { return };
        let outcome = if answer.accepted {
            Outcome::Told
        } else if answer.retry && answer.error_code != STALE {
            Outcome::Unknown
        } else {
            Outcome::Refused
        };
        if answer.late {
            self.cluster.world.reach("late-result-noted");
        }
        if answer.error_code == STALE {
            self.cluster.world.reach("stale-epoch-refused");
        }
        let over = !sent.stale && outcome != Outcome::Unknown && answer.error_code != STALE;
        if answer.late {
            // Noted beside an end that had come before it: no result of the dispatch.
            let (deed, request) = (Deed::Plain("late"), sent.request);
            self.cluster.record(
                at,
                Asked::Command { deed, request },
                Outcome::Unknown,
                sent.invoked,
            );
        } else {
            self.judged(at, id, &sent, outcome);
        }
        if over {
            self.begun.insert(id, Begun::Over);
        } else if sent.stale {
            // Now in earnest.
            let epoch = self.line.as_ref().map_or(0, Line::epoch);
            self.report(id, epoch, "succeeded", false);
        }
    }

    fn judged(&self, at: u64, id: Id, sent: &Sent, outcome: Outcome) {
        let deed = if sent.outcome == "succeeded" {
            Deed::Complete {
                dispatch: id,
                epoch: sent.epoch,
                result: result_of(id),
                stale: sent.stale,
            }
        } else {
            Deed::Plain(sent.outcome)
        };
        let request = sent.request;
        self.cluster
            .record(at, Asked::Command { deed, request }, outcome, sent.invoked);
    }
}

/// What every run of a dispatch results in.
fn result_of(id: Id) -> Vec<u8> {
    format!("{{\"of\":\"{id}\"}}").into_bytes()
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
