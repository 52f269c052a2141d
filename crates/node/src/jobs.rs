//! The dispatches that this node holds, across sessions: what runs, what is finished and not accepted yet.
//!
//! What never lives here: streams and files. Messages come in, messages to send come out.
//!
//! Invariants: a dispatch that is held is never begun again, however often it is delivered; its result is
//! sent again in every session until it is accepted or finally refused; every message carries the epoch of
//! the session it goes out in; what is held is bounded, in number and in bytes, and never more than an attach
//! may name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::capability::Effect;
use crate::ledger::{Ledger, MAX_HELD, StoredResult};
use crate::output::Output;
use crate::service::AgentStatus;
use crate::work::{Event, Outcome, Stop, Task, Worker, deadline_in};

/// A result is sent again when its answer takes longer than this.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A result that should be tried again is, after this long.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The most bytes of input that running and waiting dispatches hold.
const MAX_INPUT: usize = 64 << 20;
/// What a program writes goes out that often at most.
const OUTPUT_EVERY: Duration = Duration::from_millis(200);
/// The longest name of this machine that is told.
const HOST_MAX: usize = 64;
/// Refusals of the request rather than of the result: bound to another session, request id too old, ahead.
const OF_THE_REQUEST: [&str; 3] = ["E0609", "E0901", "E0902"];
/// The result is there already: an earlier try of it arrived.
const ARRIVED_BEFORE: &str = "E0606";

enum State {
    Running(Running),
    Finished {
        result: Arc<StoredResult>,
        again_at: Instant,
    },
}

struct Running {
    stop: watch::Sender<Option<Stop>>,
    attempt: u32,
    /// What the person at the machine is asked, while it waits for them.
    waiting: Option<String>,
    input: usize,
    output: Arc<Output>,
    /// When what it wrote goes out; nothing while nothing waits.
    output_at: Option<Instant>,
    /// When something of it went out last.
    output_sent: Option<Instant>,
}

impl Running {
    /// Something was written: it goes out soon, and not too often.
    fn schedule(&mut self, now: Instant) {
        let soonest = self.output_sent.map_or(now, |sent| sent + OUTPUT_EVERY);
        self.output_at = Some(self.output_at.unwrap_or(soonest.max(now)));
    }

    /// What goes out of what it wrote.
    fn written(&mut self, epoch: u64, now: Instant) -> Vec<Body> {
        let (lines, progress, more) = self.output.take();
        self.output_sent = Some(now);
        self.output_at = more.then_some(now + OUTPUT_EVERY);
        let attempt = self.attempt;
        let lines = lines.map(|lines| {
            Body::LogLines(wire::LogLines {
                epoch,
                attempt,
                ..lines
            })
        });
        let progress = progress.map(|said| {
            Body::Progress(wire::Progress {
                epoch,
                attempt,
                ..said
            })
        });
        lines.into_iter().chain(progress).collect()
    }

    /// All that has not gone out yet, in as many messages as it takes: what is kept is bounded.
    fn rest(&mut self, epoch: u64) -> Vec<Body> {
        let now = Instant::now();
        let mut bodies = self.written(epoch, now);
        while self.output_at.is_some() {
            bodies.extend(self.written(epoch, now));
        }
        bodies
    }
}

/// The table.
pub(crate) struct Jobs {
    worker: Arc<Worker>,
    ledger: Arc<Mutex<Ledger>>,
    held: BTreeMap<String, State>,
    tasks: JoinSet<()>,
    epoch: u64,
    stopping: bool,
    /// This machine, as it calls itself.
    host: String,
}

impl Jobs {
    /// Begins with what an earlier agent owed.
    pub(crate) fn new(worker: Arc<Worker>, ledger: Arc<Mutex<Ledger>>) -> Self {
        let owed = ledger.lock().unwrap_or_else(PoisonError::into_inner).results();
        let finished = |result: Arc<StoredResult>| {
            (
                result.id.clone(),
                State::Finished {
                    result,
                    again_at: Instant::now(),
                },
            )
        };
        let held = owed.into_iter().map(finished).collect();
        Self {
            worker,
            ledger,
            held,
            tasks: JoinSet::new(),
            epoch: 0,
            stopping: false,
            host: host_name(),
        }
    }

    /// What to name in an attach.
    pub(crate) fn held(&self) -> Vec<String> {
        self.held.keys().cloned().collect()
    }

    /// The attempt of each that [`Jobs::held`] names.
    pub(crate) fn held_attempts(&self) -> Vec<u32> {
        let attempt = |state: &State| match state {
            State::Running(running) => running.attempt,
            State::Finished { result, .. } => result.attempt,
        };
        self.held.values().map(attempt).collect()
    }

    /// A new session: everything held belongs to it now. Answers what to send.
    pub(crate) fn attached(&mut self, epoch: u64) -> Vec<Body> {
        self.epoch = epoch;
        let now = Instant::now();
        let again_at = now + ANSWER_WITHIN;
        let mut send = Vec::new();
        for (id, state) in &mut self.held {
            match state {
                State::Running(running) => {
                    if let Some(prompt) = &running.waiting {
                        send.push(mediation(id, epoch, Some((prompt, &self.host))));
                    }
                    // The replica of this session may have heard nothing of it.
                    if running.output.rewind() {
                        running.schedule(now);
                    }
                }
                State::Finished {
                    result,
                    again_at: again,
                } => {
                    *again = again_at;
                    send.push(report(result, epoch));
                }
            }
        }
        send
    }

    /// A dispatch is delivered, perhaps not for the first time. Answers what to send.
    pub(crate) fn assign(&mut self, assignment: wire::Assignment) -> Vec<Body> {
        let id = assignment.dispatch_id.clone();
        let ack = Body::Ack(wire::Ack {
            dispatch_id: id.clone(),
            epoch: assignment.epoch,
        });
        if let Some(known) = self.known(&id, assignment.attempt) {
            return std::iter::once(ack).chain(known).collect();
        }
        if self.stopping {
            // Not acknowledged and not held: the next session's attach decides about it.
            return Vec::new();
        }
        let input = assignment.payload.len();
        if let Some(refusal) = self.refuse(&assignment.capability, input) {
            // Not held: nothing was begun, and if this is lost, the next attach decides anew.
            let result = refusal.into_result(&id).map(|mut result| {
                result.attempt = assignment.attempt;
                result
            });
            return std::iter::once(ack)
                .chain(result.map(|result| report(&result, self.epoch)))
                .collect();
        }
        let (stop, stopped) = watch::channel(None);
        let output = self.worker.output(&id);
        let task = Task {
            attempt: assignment.attempt,
            output: Arc::clone(&output),
            id: id.clone(),
            capability: assignment.capability,
            payload: assignment.payload.to_vec(),
            effect: if assignment.effect == Effect::Idempotent.as_str() {
                Effect::Idempotent
            } else {
                Effect::Once
            },
            deadline: deadline_in(assignment.remaining_ms),
            deadline_at_ms: assignment.deadline_at_ms,
        };
        let running = State::Running(Running {
            stop,
            attempt: assignment.attempt,
            waiting: None,
            input,
            output,
            output_at: None,
            output_sent: None,
        });
        self.held.insert(id, running);
        self.tasks.spawn(Arc::clone(&self.worker).perform(task, stopped));
        vec![ack]
    }

    /// What to send about a delivery of a dispatch that is held. Nothing when it has to begin: what is held is the
    /// failure of an earlier attempt, and another one is wanted.
    fn known(&mut self, id: &str, attempt: u32) -> Option<Vec<Body>> {
        let epoch = self.epoch;
        match self.held.get_mut(id)? {
            // What runs is what is wanted, whatever number it has now: the control plane had taken it for lost.
            State::Running(running) => {
                running.attempt = running.attempt.max(attempt);
                Some(Vec::new())
            }
            State::Finished { result, .. } if attempt > result.attempt && result.outcome != "succeeded" => {
                self.held.remove(id);
                None
            }
            State::Finished { result, .. } => {
                if attempt > result.attempt {
                    Arc::make_mut(result).attempt = attempt;
                }
                Some(vec![report(result, epoch)])
            }
        }
    }

    fn refuse(&self, capability: &str, input: usize) -> Option<Outcome> {
        if self.worker.capability(capability).is_none() {
            let message = format!("this node has no capability {capability}");
            return Some(Outcome::rejected("unknown_capability", message));
        }
        let full = |what: String| Some(Outcome::rejected("node_full", format!("this node holds {what}")));
        if self.held.len() >= MAX_HELD {
            return full(format!("{MAX_HELD} dispatches already"));
        }
        let inputs = self.held.values().map(|state| match state {
            State::Running(running) => running.input,
            State::Finished { .. } => 0,
        });
        if inputs.sum::<usize>() + input > MAX_INPUT {
            return full(format!("inputs of {} MiB already", MAX_INPUT >> 20));
        }
        None
    }

    /// Something happened to running work. Answers what to send when there is a session.
    pub(crate) fn event(&mut self, event: Event) -> Vec<Body> {
        while self.tasks.try_join_next().is_some() {}
        match event {
            Event::Finished(result) => self.finish(result),
            Event::Gone(id) => {
                self.held.remove(&id);
                Vec::new()
            }
            Event::Waiting { id, waiting } => {
                let asked = waiting.as_deref().map(|prompt| (prompt, self.host.as_str()));
                let body = mediation(&id, self.epoch, asked);
                if let Some(State::Running(running)) = self.held.get_mut(&id) {
                    running.waiting = waiting;
                }
                vec![body]
            }
            Event::Output(id) => {
                if let Some(State::Running(running)) = self.held.get_mut(&id) {
                    running.schedule(Instant::now());
                }
                Vec::new()
            }
        }
    }

    fn finish(&mut self, mut result: Arc<StoredResult>) -> Vec<Body> {
        let mut bodies = Vec::new();
        if let Some(State::Running(running)) = self.held.get_mut(&result.id) {
            // It may have become a later attempt while it ran.
            if running.attempt > result.attempt {
                Arc::make_mut(&mut result).attempt = running.attempt;
            }
            // Whoever watches stops at the result: the last lines go before it.
            bodies = running.rest(self.epoch);
        }
        bodies.push(report(&result, self.epoch));
        let state = State::Finished {
            result: Arc::clone(&result),
            again_at: Instant::now() + ANSWER_WITHIN,
        };
        self.held.insert(result.id.clone(), state);
        bodies
    }

    /// The control plane's word about a result.
    pub(crate) fn answered(&mut self, answer: &wire::ResultAnswer) {
        let Some(State::Finished { result, again_at }) = self.held.get_mut(&answer.dispatch_id) else {
            return;
        };
        let code = answer.error_code.as_str();
        let of_the_request = OF_THE_REQUEST.contains(&code);
        if !answer.accepted && (answer.retry || of_the_request) {
            *again_at = Instant::now() + RETRY_AFTER;
            if of_the_request {
                // Such a refusal is remembered under the request id and would be the answer to every further
                // try. Without one, the server makes it; a result is accepted once all the same.
                Arc::make_mut(result).request_id.clear();
            }
            return;
        }
        if answer.late {
            let dispatch = &answer.dispatch_id;
            tracing::warn!(%dispatch, "the result came after the end of its dispatch and was noted");
        }
        if !answer.accepted && code != ARRIVED_BEFORE {
            let (dispatch, why) = (&answer.dispatch_id, &answer.error_message);
            tracing::warn!(%dispatch, %code, %why, "the control plane refused a result for good");
        }
        let attempt = result.attempt;
        self.held.remove(&answer.dispatch_id);
        let (ledger, id) = (Arc::clone(&self.ledger), answer.dispatch_id.clone());
        // Another dispatch may be in the middle of a slow sync; a session must not wait for that.
        tokio::task::spawn_blocking(move || {
            let mut ledger = ledger.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = ledger.forget(&id, attempt) {
                tracing::warn!(dispatch = %id, %error, "the ledger was not updated");
            }
        });
    }

    /// The control plane doesn't want a dispatch any more. A result that is there already is still reported,
    /// so that the control plane says itself whether it wants it. Answers what to send.
    pub(crate) fn cancel(&mut self, cancel: &wire::CancelDispatch) -> Vec<Body> {
        let id = &cancel.dispatch_id;
        match self.held.get(id) {
            Some(State::Running(running)) => {
                tracing::info!(dispatch = %id, reason = %cancel.reason, "cancelled");
                running.stop.send_replace(Some(Stop::Cancelled));
                Vec::new()
            }
            Some(State::Finished { .. }) => Vec::new(),
            // It waits for our word, and we have nothing of it. When this is lost, the next attach says the same.
            None if cancel.epoch != 0 => {
                let outcome = Outcome::cancelled("not_begun", "it had not begun on this node");
                let result = outcome.into_result(id).map(|mut result| {
                    result.attempt = cancel.attempt;
                    report(&result, self.epoch)
                });
                result.into_iter().collect()
            }
            None => Vec::new(),
        }
    }

    /// Results whose answer is overdue, and what programs have written.
    pub(crate) fn overdue(&mut self, now: Instant) -> Vec<Body> {
        let epoch = self.epoch;
        let mut send = Vec::new();
        for state in self.held.values_mut() {
            match state {
                State::Finished { result, again_at } if *again_at <= now => {
                    *again_at = now + ANSWER_WITHIN;
                    send.push(report(result, epoch));
                }
                State::Running(running) if running.output_at.is_some_and(|at| at <= now) => {
                    send.extend(running.written(epoch, now));
                }
                State::Finished { .. } | State::Running(_) => {}
            }
        }
        send
    }

    /// When [`Jobs::overdue`] will have something; `None` when nothing is owed.
    pub(crate) fn next_overdue(&self) -> Option<Instant> {
        let due = |state: &State| match state {
            State::Finished { again_at, .. } => Some(*again_at),
            State::Running(running) => running.output_at,
        };
        self.held.values().filter_map(due).min()
    }

    /// Nothing new begins from here on.
    pub(crate) fn begin_stop(&mut self) {
        self.stopping = true;
    }

    /// Whether work is going on.
    pub(crate) fn is_busy(&self) -> bool {
        self.held.values().any(|state| matches!(state, State::Running(_)))
    }

    /// Ends what still runs and waits until its results are on disk.
    pub(crate) async fn abort(&mut self) {
        for state in self.held.values() {
            if let State::Running(running) = state {
                running.stop.send_replace(Some(Stop::Agent));
            }
        }
        while self.tasks.join_next().await.is_some() {}
    }

    /// Puts what is held into the status.
    pub(crate) fn describe(&self, status: &mut AgentStatus) {
        let ids = |wanted: fn(&State) -> bool| {
            self.held
                .iter()
                .filter(|(_, state)| wanted(state))
                .map(|(id, _)| id.clone())
                .collect()
        };
        status.running = ids(|state| matches!(state, State::Running(one) if one.waiting.is_none()));
        status.mediation = ids(|state| matches!(state, State::Running(one) if one.waiting.is_some()));
        status.unreported = ids(|state| matches!(state, State::Finished { .. }));
    }
}

fn report(result: &StoredResult, epoch: u64) -> Body {
    Body::Result(wire::Result {
        request_id: result.request_id.clone(),
        dispatch_id: result.id.clone(),
        epoch,
        outcome: result.outcome.clone(),
        payload: result.payload.clone().into_bytes().into(),
        error_code: result.error_code.clone(),
        error_message: result.error_message.clone(),
        log_tail: result.log_tail.clone().into_bytes().into(),
        attempt: result.attempt,
    })
}

/// `asked`: the question, and the machine that it is asked at.
fn mediation(id: &str, epoch: u64, asked: Option<(&str, &str)>) -> Body {
    let (prompt, host) = asked.unwrap_or_default();
    Body::Mediation(wire::Mediation {
        // The server makes one: it is sent once, and this machine's clock may be wrong.
        request_id: String::new(),
        dispatch_id: id.to_owned(),
        epoch,
        waiting: asked.is_some(),
        prompt: prompt.to_owned(),
        host: host.to_owned(),
    })
}

/// What this machine calls itself; empty where nobody says.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    name.chars().filter(|c| !c.is_control()).take(HOST_MAX).collect()
}

#[cfg(test)]
#[path = "jobs_tests.rs"]
mod tests;
