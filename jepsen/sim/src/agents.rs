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
use palyra_jepsen_check::Kind;
use palyra_jepsen_check::history::Pending;
use palyra_platform::{self as platform, Instant};
use palyra_state::{Cursor, Envelope, Id, Read, dispatch, journal};
use serde_json::{Value, json};

use crate::chance;
use crate::cluster::{Answer, Cluster, Phase};
use crate::fleet;
use crate::history::{Asked, Deed, Outcome};
use crate::line::{Broken, Line};
use crate::tape::{kind, told};

/// Code of the refusal of a result from a session that is over.
const STALE: &str = "E0609";

/// What a node knows of an attempt that it has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begun {
    /// Its result waits to be accepted.
    Held,
    /// It is over, one way or another.
    Over,
    /// The node has lost what it knew, all but that it had begun.
    Forgotten,
}

/// The newest attempt of a dispatch that a node has begun.
#[derive(Clone, Copy, Debug)]
struct Work {
    attempt: u32,
    begun: Begun,
    /// How it ends.
    outcome: &'static str,
}

/// A node.
struct Agent {
    cluster: Rc<Cluster>,
    device: Id,
    line: Option<Line>,
    /// Of the session before.
    last_epoch: u64,
    works: BTreeMap<Id, Work>,
    /// Results that were sent and not answered.
    sent: BTreeMap<Id, Sent>,
    sequence: u64,
    beats_at: Instant,
}

/// A result.
#[derive(Clone, Copy)]
struct Result {
    dispatch: Id,
    attempt: u32,
    epoch: u64,
    outcome: &'static str,
    /// It is sent in the name of a session that its node knows to be over.
    stale: bool,
}

/// A result that is on its way: since when, under which request.
struct Sent {
    result: Result,
    invoked: u64,
    request: Id,
    pending: Pending,
}

/// A node's life, until the run is over.
pub(crate) async fn agent(cluster: Rc<Cluster>, device: Id) {
    let mut agent = Agent {
        cluster,
        device,
        line: None,
        last_epoch: 0,
        works: BTreeMap::new(),
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
            for work in self.works.values_mut().filter(|work| work.begun == Begun::Held) {
                work.begun = Begun::Forgotten;
            }
        }
        let held: Vec<(Id, Work)> = self
            .works
            .iter()
            .filter(|(_, work)| work.begun == Begun::Held)
            .map(|(id, work)| (*id, *work))
            .collect();
        let peer = fleet::node_peer(&self.cluster.papers, self.device, 0);
        let invoked = self.cluster.history.borrow_mut().tick();
        let named: Vec<(Id, u32)> = held.iter().map(|(id, work)| (*id, work.attempt)).collect();
        let Some(line) = Line::open(&self.cluster, at, peer, self.device, &named).await else {
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
        // What was on its way when the session ended is said again, mostly.
        for (dispatch, work) in held {
            if chance::percent(60) {
                self.report(Result {
                    dispatch,
                    attempt: work.attempt,
                    epoch,
                    outcome: work.outcome,
                    stale: false,
                });
            }
        }
    }

    /// Ends the session from the node's side: it attaches again, perhaps elsewhere. What was not answered is unknown.
    fn leave(&mut self) {
        if let Some(line) = self.line.take() {
            self.last_epoch = line.epoch();
            for (_, sent) in std::mem::take(&mut self.sent) {
                self.judged(line.at, &sent, Outcome::Unknown);
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
                dispatch_id: dispatch,
                confirm: Some((epoch, attempt)),
                ..
            })) => self.report(Result {
                dispatch,
                attempt,
                epoch,
                outcome: "cancelled",
                stale: false,
            }),
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
        let (dispatch, attempt, epoch) = (found.dispatch_id, found.attempt, found.epoch);
        if self.line.as_ref().is_none_or(|line| line.epoch() != epoch) {
            return self.cluster.problem(format!(
                "dispatch.epochs: {} was given {dispatch} of epoch {epoch} in another session",
                self.device
            ));
        }
        let heard = json!({
            "job": dispatch.to_string(),
            "attempt": attempt,
            "epoch": epoch,
            "device": self.device.to_string(),
        });
        self.cluster.happened("deliver", heard);
        if self
            .works
            .get(&dispatch)
            .is_some_and(|work| work.attempt >= attempt)
        {
            return;
        }
        if attempt > 1 {
            self.cluster.world.reach("dispatch-attempted-again");
        }
        let outcome = if chance::percent(10) {
            "failed"
        } else {
            "succeeded"
        };
        // What is begun and not reported is held, should the session end now.
        let work = Work {
            attempt,
            begun: Begun::Held,
            outcome,
        };
        self.works.insert(dispatch, work);
        if !chance::percent(75) {
            return;
        }
        if chance::percent(10)
            && let Some(line) = &self.line
        {
            line.say(Inbound::Mediation {
                dispatch_id: dispatch.to_string(),
                epoch,
                waiting: true,
                request_id: String::new(),
                prompt: String::new(),
                host: String::new(),
            });
        }
        let stale = self.last_epoch != 0 && chance::percent(20);
        self.report(Result {
            dispatch,
            attempt,
            epoch: if stale { self.last_epoch } else { epoch },
            outcome,
            stale,
        });
    }

    fn report(&mut self, result: Result) {
        let Some(line) = &self.line else { return };
        if self.sent.contains_key(&result.dispatch) {
            // Answers name the dispatch only, and come in any order: one at a time.
            return;
        }
        let request = fleet::fresh();
        let invoked = self.cluster.history.borrow_mut().tick();
        let failed = result.outcome == "failed";
        let completion = Completion {
            request_id: request.to_string(),
            dispatch_id: result.dispatch.to_string(),
            epoch: result.epoch,
            outcome: result.outcome.to_owned(),
            payload: result_of(result.dispatch).into(),
            error_code: if failed { "program_failed" } else { "" }.to_owned(),
            error_message: String::new(),
            log_tail: Bytes::new(),
            attempt: result.attempt,
        };
        let value = self.told(&result);
        let pending = self
            .cluster
            .invoke("complete", value, Some(line.at), Some(request));
        let sent = Sent {
            result,
            invoked,
            request,
            pending,
        };
        let was_said = line.say(Inbound::Result(completion));
        self.sent.insert(result.dispatch, sent);
        if !was_said {
            self.leave();
        }
    }

    /// What became of a result.
    fn answered(&mut self, answer: &ResultAnswer) {
        let (id, at) = (answer.dispatch_id, self.line.as_ref().map_or(0, |line| line.at));
        let Some(sent) = self.sent.remove(&id) else { return };
        let result = sent.result;
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
        let over = !result.stale && outcome != Outcome::Unknown && answer.error_code != STALE;
        if answer.late {
            // Noted beside an end that had come before it: no result of the dispatch.
            let (deed, request) = (Deed::Plain("late"), sent.request);
            let asked = Asked::Command { deed, request };
            self.cluster.record(at, asked, Outcome::Unknown, sent.invoked);
            let value = self.told(&result);
            self.cluster.complete(&sent.pending, Kind::Fail, told(value));
        } else {
            self.judged(at, &sent, outcome);
        }
        if over {
            if let Some(work) = self.works.get_mut(&id)
                && work.attempt == result.attempt
            {
                work.begun = Begun::Over;
            }
        } else if result.stale {
            // Now in earnest.
            let epoch = self.line.as_ref().map_or(0, Line::epoch);
            self.report(Result {
                epoch,
                stale: false,
                ..result
            });
        }
    }

    fn judged(&self, at: u64, sent: &Sent, outcome: Outcome) {
        let result = sent.result;
        let deed = if result.outcome == "succeeded" {
            Deed::Complete {
                dispatch: result.dispatch,
                epoch: result.epoch,
                result: result_of(result.dispatch),
                stale: result.stale,
            }
        } else {
            Deed::Plain(result.outcome)
        };
        let request = sent.request;
        let kind = kind(&outcome);
        self.cluster
            .record(at, Asked::Command { deed, request }, outcome, sent.invoked);
        self.cluster
            .complete(&sent.pending, kind, told(self.told(&result)));
    }

    /// As the history has it.
    fn told(&self, result: &Result) -> Value {
        json!({
            "job": result.dispatch.to_string(),
            "attempt": result.attempt,
            "epoch": result.epoch,
            "device": self.device.to_string(),
            "outcome": result.outcome,
        })
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
        let envelope = fleet::submit(id, device, capability, bytes, timeout_ms);
        let answer = submit(&cluster, envelope, id, device, capability).await;
        if answer.outcome.index().is_none() {
            continue;
        }
        if chance::percent(30) {
            let at = cluster.any_member();
            let found = cluster
                .read(at, move |view| dispatch::dispatch(view, id).is_some())
                .await;
            if matches!(found, Some((_, false))) {
                cluster.problem(format!(
                    "dispatch.none-vanish: {id} was accepted, and r{at} does not know it"
                ));
            }
        }
        if chance::percent(10) {
            cancel(&cluster, id).await;
        }
    }
}

/// Submits a dispatch under a request of its own, which is its key.
pub(crate) async fn submit(
    cluster: &Cluster,
    envelope: Envelope,
    dispatch: Id,
    device: Id,
    capability: &str,
) -> Answer {
    let effect = if capability == fleet::ONCE {
        "once"
    } else {
        "idempotent"
    };
    let value = json!({"device": device.to_string(), "effect": effect});
    let job = json!({"job": dispatch.to_string()});
    let deed = Deed::Plain("submit");
    cluster
        .send(cluster.any_member(), envelope, deed, ("submit", value), |_| job)
        .await
}

/// Takes a dispatch back, and says what that did to it.
async fn cancel(cluster: &Cluster, id: Id) {
    let (envelope, at) = (fleet::cancel(id), cluster.any_member());
    let request = envelope.request_id;
    let value = json!({"job": id.to_string()});
    let call = cluster.invoke("cancel", value.clone(), Some(at), Some(request));
    let answer = cluster
        .ask_noted(at, envelope, |answer| Asked::Command {
            deed: Deed::Plain("cancel"),
            request: answer.request,
        })
        .await;
    let mut state = None;
    if kind(&answer.outcome) == Kind::Ok {
        state = cluster.read(at, move |view| cancelled(view, id, request)).await;
    }
    cluster.sent(&call, value, &answer, |_| match state {
        Some((_, state)) => json!({"state": state}),
        None => json!({}),
    });
}

/// What a cancellation did: its own entry says so, for by now the dispatch may have moved on. Without one it is as it
/// is.
fn cancelled(view: &dyn Read, id: Id, request: Id) -> &'static str {
    let submitted = dispatch::dispatch(view, id);
    let from = submitted.as_ref().map_or(0, |found| found.order);
    let after = Cursor {
        index: from,
        ordinal: 0,
    };
    let rows = match journal::rows_after(view, after, usize::MAX) {
        journal::Rows::Rows(rows) => rows,
        journal::Rows::Gap { .. } => Vec::new(),
    };
    let own = rows.iter().find(|row| row.request_id == request);
    match own.map(|row| row.action.as_str()) {
        Some("dispatch.finished") => "cancelled",
        Some("dispatch.cancelling") => "cancelling",
        _ => submitted.map_or("", |found| found.state().as_str()),
    }
}

/// What became of each dispatch, as the history says it at its end.
pub(crate) fn close(cluster: &Cluster, state: &dyn Read) {
    let submitted: Vec<Id> = {
        let tape = cluster.tape.borrow();
        let events = tape.history().events.iter();
        let accepted = events.filter(|event| event.f == "submit" && event.kind == Kind::Ok);
        accepted
            .filter_map(|event| Id::parse(event.value["job"].as_str()?))
            .collect()
    };
    for id in submitted {
        let value = json!({"job": id.to_string()});
        let call = cluster.invoke("job", value, None, None);
        let (kind, value) = match dispatch::dispatch(state, id) {
            Some(found) => (
                Kind::Ok,
                json!({"job": id.to_string(), "state": found.state().as_str()}),
            ),
            None => (Kind::Fail, json!({"job": id.to_string()})),
        };
        cluster.complete(&call, kind, told(value));
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
