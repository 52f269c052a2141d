//! The dispatches that this node holds, across sessions: what runs, what is finished and not accepted yet.
//!
//! What never lives here: streams and files. Messages come in, messages to send come out.
//!
//! Invariants: a dispatch that is held is never begun again, however often it is delivered; its result is
//! sent again in every session until it is accepted or finally refused; every message carries the epoch of
//! the session it goes out in.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use palyra_client::new_ulid;
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::capability::Effect;
use crate::ledger::{Ledger, MAX_HELD, StoredResult};
use crate::service::AgentStatus;
use crate::work::{Event, Outcome, Stop, Task, Worker, deadline_in};

/// A result is sent again when its answer takes longer than this.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A result that should be tried again is, after this long.
const RETRY_AFTER: Duration = Duration::from_secs(1);

enum State {
    Running {
        stop: watch::Sender<Option<Stop>>,
        waiting: bool,
    },
    Finished {
        result: Arc<StoredResult>,
        again_at: Instant,
    },
}

/// The table.
pub(crate) struct Jobs {
    worker: Arc<Worker>,
    ledger: Arc<Mutex<Ledger>>,
    held: BTreeMap<String, State>,
    tasks: JoinSet<()>,
    epoch: u64,
    stopping: bool,
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
        }
    }

    /// What to name in an attach.
    pub(crate) fn held(&self) -> Vec<String> {
        self.held.keys().cloned().collect()
    }

    /// A new session: everything held belongs to it now. Answers what to send.
    pub(crate) fn attached(&mut self, epoch: u64) -> Vec<Body> {
        self.epoch = epoch;
        let again_at = Instant::now() + ANSWER_WITHIN;
        let mut send = Vec::new();
        for (id, state) in &mut self.held {
            match state {
                State::Running { waiting: true, .. } => send.push(mediation(id, epoch, true)),
                State::Running { waiting: false, .. } => {}
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
        match self.held.get(&id) {
            Some(State::Running { .. }) => return vec![ack],
            Some(State::Finished { result, .. }) => return vec![ack, report(result, self.epoch)],
            None => {}
        }
        if self.stopping {
            // Not acknowledged and not held: the next session's attach decides about it.
            return Vec::new();
        }
        if let Some(refusal) = self.refuse(&assignment.capability) {
            return match refusal.into_result(&id) {
                Some(result) => vec![ack, self.finish(Arc::new(result))],
                None => vec![ack],
            };
        }
        let (stop, stopped) = watch::channel(None);
        let task = Task {
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
        self.held.insert(id, State::Running { stop, waiting: false });
        self.tasks.spawn(Arc::clone(&self.worker).perform(task, stopped));
        vec![ack]
    }

    fn refuse(&self, capability: &str) -> Option<Outcome> {
        if self.worker.capability(capability).is_none() {
            let message = format!("this node has no capability {capability}");
            return Some(Outcome::rejected("unknown_capability", message));
        }
        (self.held.len() >= MAX_HELD).then(|| {
            Outcome::rejected(
                "node_full",
                format!("this node holds {MAX_HELD} dispatches already"),
            )
        })
    }

    /// Something happened to running work. Answers what to send when there is a session.
    pub(crate) fn event(&mut self, event: Event) -> Option<Body> {
        while self.tasks.try_join_next().is_some() {}
        match event {
            Event::Finished(result) => Some(self.finish(result)),
            Event::Gone(id) => {
                self.held.remove(&id);
                None
            }
            Event::Waiting { id, waiting } => {
                if let Some(State::Running { waiting: known, .. }) = self.held.get_mut(&id) {
                    *known = waiting;
                }
                Some(mediation(&id, self.epoch, waiting))
            }
        }
    }

    fn finish(&mut self, result: Arc<StoredResult>) -> Body {
        let body = report(&result, self.epoch);
        let state = State::Finished {
            result: Arc::clone(&result),
            again_at: Instant::now() + ANSWER_WITHIN,
        };
        self.held.insert(result.id.clone(), state);
        body
    }

    /// The control plane's word about a result.
    pub(crate) fn answered(&mut self, answer: &wire::ResultAnswer) {
        let Some(State::Finished { again_at, .. }) = self.held.get_mut(&answer.dispatch_id) else {
            return;
        };
        if !answer.accepted && answer.retry {
            *again_at = Instant::now() + RETRY_AFTER;
            return;
        }
        if !answer.accepted {
            let (dispatch, code, why) = (&answer.dispatch_id, &answer.error_code, &answer.error_message);
            tracing::warn!(%dispatch, %code, %why, "the control plane refused a result for good");
        }
        self.held.remove(&answer.dispatch_id);
        let (ledger, id) = (Arc::clone(&self.ledger), answer.dispatch_id.clone());
        // Another dispatch may be in the middle of a slow sync; a session must not wait for that.
        tokio::task::spawn_blocking(move || {
            if let Err(error) = ledger.lock().unwrap_or_else(PoisonError::into_inner).forget(&id) {
                tracing::warn!(dispatch = %id, %error, "the ledger was not updated");
            }
        });
    }

    /// The control plane doesn't want a dispatch any more. A result that is there already is still reported,
    /// so that the control plane says itself whether it wants it.
    pub(crate) fn cancel(&mut self, cancel: &wire::CancelDispatch) {
        if let Some(State::Running { stop, .. }) = self.held.get(&cancel.dispatch_id) {
            tracing::info!(dispatch = %cancel.dispatch_id, reason = %cancel.reason, "cancelled");
            stop.send_replace(Some(Stop::Cancelled));
        }
    }

    /// Results whose answer is overdue.
    pub(crate) fn overdue(&mut self, now: Instant) -> Vec<Body> {
        let epoch = self.epoch;
        let mut send = Vec::new();
        for state in self.held.values_mut() {
            if let State::Finished { result, again_at } = state
                && *again_at <= now
            {
                *again_at = now + ANSWER_WITHIN;
                send.push(report(result, epoch));
            }
        }
        send
    }

    /// When [`Jobs::overdue`] will have something; `None` when nothing is owed.
    pub(crate) fn next_overdue(&self) -> Option<Instant> {
        let due = |state: &State| match state {
            State::Finished { again_at, .. } => Some(*again_at),
            State::Running { .. } => None,
        };
        self.held.values().filter_map(due).min()
    }

    /// Nothing new begins from here on.
    pub(crate) fn begin_stop(&mut self) {
        self.stopping = true;
    }

    /// Whether work is going on.
    pub(crate) fn is_busy(&self) -> bool {
        self.held
            .values()
            .any(|state| matches!(state, State::Running { .. }))
    }

    /// Ends what still runs and waits until its results are on disk.
    pub(crate) async fn abort(&mut self) {
        for state in self.held.values() {
            if let State::Running { stop, .. } = state {
                stop.send_replace(Some(Stop::Agent));
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
        status.running = ids(|state| matches!(state, State::Running { waiting: false, .. }));
        status.mediation = ids(|state| matches!(state, State::Running { waiting: true, .. }));
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
    })
}

fn mediation(id: &str, epoch: u64, waiting: bool) -> Body {
    Body::Mediation(wire::Mediation {
        request_id: new_ulid(),
        dispatch_id: id.to_owned(),
        epoch,
        waiting,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio::sync::mpsc;

    use super::*;
    use crate::capability;
    use crate::mediation::Desk;

    struct Bench {
        jobs: Jobs,
        events: mpsc::UnboundedReceiver<Event>,
        desk: Arc<Desk>,
        dir: tempfile::TempDir,
    }

    fn bench_in(dir: tempfile::TempDir, file: &str) -> Bench {
        let path = dir.path().join("caps.toml");
        std::fs::write(&path, file).unwrap();
        let capabilities = capability::load(&[path]).unwrap();
        let ledger = Arc::new(Mutex::new(Ledger::open(dir.path()).unwrap().0));
        let desk = Arc::new(Desk::default());
        let (_, status) = watch::channel(AgentStatus::default());
        let (sender, events) = mpsc::unbounded_channel();
        let home = dir.path().to_path_buf();
        let worker = Worker::new(
            capabilities,
            Arc::clone(&ledger),
            Arc::clone(&desk),
            home,
            status,
            sender,
        );
        Bench {
            jobs: Jobs::new(worker, ledger),
            events,
            desk,
            dir,
        }
    }

    fn bench(file: &str) -> Bench {
        bench_in(tempfile::tempdir().unwrap(), file)
    }

    fn assignment(id: &str, capability: &str) -> wire::Assignment {
        wire::Assignment {
            dispatch_id: id.to_owned(),
            epoch: 7,
            capability: capability.to_owned(),
            payload: "{\"x\":1}".into(),
            effect: "once".to_owned(),
            remaining_ms: 20_000,
            ..wire::Assignment::default()
        }
    }

    fn entry(name: &str, script: &str, more: &str) -> String {
        format!(
            "[[capability]]\nname = \"{name}\"\nprogram = \"/bin/sh\"\neffect = \"once\"\n\
             args = ['-c', '{script}']\n{more}\n"
        )
    }

    async fn result_of(bench: &mut Bench) -> wire::Result {
        loop {
            let event = bench.events.recv().await.unwrap();
            if let Some(Body::Result(result)) = bench.jobs.event(event) {
                return result;
            }
        }
    }

    fn runs(path: &Path) -> usize {
        std::fs::read_to_string(path).unwrap_or_default().lines().count()
    }

    #[tokio::test]
    async fn a_redelivered_dispatch_runs_once_and_its_result_is_sent_until_it_is_accepted() {
        let mut bench = bench(&entry("count", "echo x >> runs; echo 1", ""));
        bench.jobs.attached(7);
        assert_eq!(bench.jobs.assign(assignment("A", "count")).len(), 1);
        assert_eq!(
            bench.jobs.assign(assignment("A", "count")).len(),
            1,
            "only acknowledged"
        );
        let first = result_of(&mut bench).await;
        assert_eq!(
            (first.outcome.as_str(), first.epoch, &first.payload[..]),
            ("succeeded", 7, &b"1"[..])
        );
        let again = bench.jobs.assign(assignment("A", "count"));
        assert!(matches!(&again[1], Body::Result(result) if result.request_id == first.request_id));
        let next_session = bench.jobs.attached(9);
        assert!(
            matches!(&next_session[0], Body::Result(r) if r.epoch == 9 && r.request_id == first.request_id)
        );
        assert_eq!(runs(&bench.dir.path().join("runs")), 1);
        let retry = wire::ResultAnswer {
            dispatch_id: "A".to_owned(),
            retry: true,
            ..Default::default()
        };
        bench.jobs.answered(&retry);
        assert_eq!(bench.jobs.held(), ["A"]);
        assert_eq!(bench.jobs.overdue(Instant::now() + RETRY_AFTER).len(), 1);
        bench.jobs.answered(&wire::ResultAnswer {
            accepted: true,
            ..retry
        });
        assert!(bench.jobs.held().is_empty() && bench.jobs.next_overdue().is_none());
    }

    #[tokio::test]
    async fn a_result_survives_the_agent_and_a_begun_once_is_not_run_again() {
        let mut first =
            bench(&(entry("quick", "echo 1", "") + &entry("slow", "echo x >> runs; sleep 100", "")));
        first.jobs.assign(assignment("A", "quick"));
        result_of(&mut first).await;
        first.jobs.assign(assignment("B", "slow"));
        let marker = first.dir.path().join("runs");
        while runs(&marker) == 0 {
            tokio::task::yield_now().await;
        }
        // A crash: nothing is told to stop, the ledger is read anew.
        let copy = tempfile::tempdir().unwrap();
        std::fs::copy(
            first.dir.path().join("ledger.log"),
            copy.path().join("ledger.log"),
        )
        .unwrap();
        let mut second = bench_in(copy, &entry("slow", "echo x >> runs", ""));
        assert_eq!(second.jobs.held(), ["A", "B"]);
        let sent = second.jobs.attached(9);
        assert!(
            matches!(&sent[1], Body::Result(r) if r.error_code == "agent_restarted" && r.outcome == "failed")
        );
        second.jobs.assign(assignment("B", "slow"));
        assert_eq!(runs(&second.dir.path().join("runs")), 0);
        first.jobs.abort().await;
    }

    #[tokio::test]
    async fn cancelling_ends_the_run_and_reports_nothing() {
        let mut bench = bench(&entry("slow", "echo x >> runs; sleep 100", ""));
        bench.jobs.assign(assignment("A", "slow"));
        while runs(&bench.dir.path().join("runs")) == 0 {
            tokio::task::yield_now().await;
        }
        bench.jobs.cancel(&wire::CancelDispatch {
            dispatch_id: "A".to_owned(),
            reason: "operator".to_owned(),
        });
        let event = bench.events.recv().await.unwrap();
        assert_eq!(event, Event::Gone("A".to_owned()));
        assert_eq!(bench.jobs.event(event), None);
        assert!(bench.jobs.held().is_empty());
        assert!(
            bench_in(bench.dir, "").jobs.held().is_empty(),
            "nor after a restart"
        );
    }

    #[tokio::test]
    async fn the_person_at_the_machine_decides() {
        let mut bench = bench(&entry("ask", "echo x >> runs; echo 1", "local_mediation = true"));
        for (id, allow) in [("A", true), ("B", false)] {
            bench.jobs.assign(assignment(id, "ask"));
            let event = bench.events.recv().await.unwrap();
            let asked = bench.jobs.event(event).unwrap();
            assert!(matches!(
                asked,
                Body::Mediation(wire::Mediation { waiting: true, .. })
            ));
            assert!(matches!(bench.jobs.attached(3).last().unwrap(), Body::Mediation(m) if m.epoch == 3));
            bench.desk.decide(id, allow).unwrap();
            let result = result_of(&mut bench).await;
            assert_eq!(result.outcome, if allow { "succeeded" } else { "rejected" });
        }
        assert_eq!(runs(&bench.dir.path().join("runs")), 1);
    }

    #[tokio::test]
    async fn nobody_at_the_machine_means_no() {
        let mut bench = bench(&entry("ask", "echo 1", "local_mediation = true"));
        bench.jobs.assign(wire::Assignment {
            remaining_ms: 50,
            ..assignment("A", "ask")
        });
        let result = result_of(&mut bench).await;
        assert_eq!(
            (result.outcome.as_str(), result.error_code.as_str()),
            ("rejected", "mediation_timeout")
        );
        assert!(bench.desk.list().is_empty());
    }

    #[tokio::test]
    async fn concurrency_is_the_owners_and_the_wait_is_within_the_deadline() {
        let mut bench = bench(&entry("one", "sleep 1; echo 1", "concurrency = 1"));
        bench.jobs.assign(assignment("A", "one"));
        bench.jobs.assign(wire::Assignment {
            remaining_ms: 100,
            ..assignment("B", "one")
        });
        let first = result_of(&mut bench).await;
        assert_eq!(
            (first.dispatch_id.as_str(), first.error_code.as_str()),
            ("B", "timeout")
        );
        assert_eq!(result_of(&mut bench).await.dispatch_id, "A");
    }

    #[tokio::test]
    async fn an_unknown_capability_is_rejected_and_a_stopping_agent_takes_nothing() {
        let mut bench = bench("");
        let sent = bench.jobs.assign(assignment("A", "nope"));
        assert!(matches!(&sent[1], Body::Result(r) if r.error_code == "unknown_capability"));
        bench.jobs.begin_stop();
        assert!(bench.jobs.assign(assignment("B", "echo")).is_empty());
        assert_eq!(bench.jobs.held(), ["A"]);
    }

    #[tokio::test]
    async fn a_stopped_once_is_owned_up_to() {
        let mut bench = bench(&entry("slow", "echo x >> runs; exec sleep 100", ""));
        bench.jobs.assign(assignment("A", "slow"));
        while runs(&bench.dir.path().join("runs")) == 0 {
            tokio::task::yield_now().await;
        }
        bench.jobs.begin_stop();
        bench.jobs.abort().await;
        assert_eq!(result_of(&mut bench).await.error_code, "agent_stopped");
    }
}
