//! Carries out one assignment: waits for a slot, asks the person at the machine, notes the start, runs, keeps
//! the result.
//!
//! What never lives here: sessions (see `jobs` and `session`): work goes on while the node is between two
//! replicas.
//!
//! Invariants: the start of a `once` dispatch is durable before its program exists; a result is durable
//! before anybody hears of it; the deadline bounds everything, the wait for a slot and for the person too.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use palyra_client::{new_ulid, wall_ms};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::capability::{Action, Capability, Effect, Program};
use crate::ledger::{Ledger, Refused, StoredResult};
use crate::mediation::{Desk, Pending};
use crate::output::Output;
use crate::service::AgentStatus;
use crate::{builtin, exec, lock};

/// The longest message of a failure, in bytes.
const MESSAGE_MAX: usize = 4_000;
/// How much of an input the person at the machine is shown, in bytes.
const SHOWN: usize = 4096;

/// Why a run ends before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The control plane doesn't want it any more.
    Cancelled,
    /// The agent stops.
    Agent,
}

/// What came of an assignment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// With the answer: JSON.
    Succeeded(Vec<u8>),
    /// It ran, or could not be run.
    Failed {
        /// Stable.
        code: String,
        /// For people.
        message: String,
    },
    /// It was not run, on purpose.
    Rejected {
        /// Stable.
        code: String,
        /// For people.
        message: String,
    },
    /// It was stopped, or not begun, because it was taken back.
    Cancelled {
        /// Stable.
        code: String,
        /// For people.
        message: String,
    },
    /// The agent stopped before it began; whoever comes next may run it.
    NotBegun,
}

impl Outcome {
    pub(crate) fn failed(code: &str, message: impl Into<String>) -> Self {
        Self::Failed {
            code: code.to_owned(),
            message: message.into(),
        }
    }

    pub(crate) fn rejected(code: &str, message: impl Into<String>) -> Self {
        Self::Rejected {
            code: code.to_owned(),
            message: message.into(),
        }
    }

    pub(crate) fn cancelled(code: &str, message: impl Into<String>) -> Self {
        Self::Cancelled {
            code: code.to_owned(),
            message: message.into(),
        }
    }

    /// The result to report; `None` when there is none to report.
    pub(crate) fn into_result(self, id: &str) -> Option<StoredResult> {
        let (outcome, payload, error_code, error_message) = match self {
            // Every way to succeed checked that it is JSON, and so UTF-8.
            Self::Succeeded(bytes) => (
                "succeeded",
                String::from_utf8_lossy(&bytes).into_owned(),
                String::new(),
                String::new(),
            ),
            Self::Failed { code, message } => ("failed", String::new(), code, message),
            Self::Rejected { code, message } => ("rejected", String::new(), code, message),
            Self::Cancelled { code, message } => ("cancelled", String::new(), code, message),
            Self::NotBegun => return None,
        };
        Some(StoredResult {
            id: id.to_owned(),
            request_id: new_ulid(),
            outcome: outcome.to_owned(),
            payload,
            error_code,
            // Control characters are refused: a line break of stderr would lose the result.
            error_message: plain(&error_message, MESSAGE_MAX),
            log_tail: String::new(),
            attempt: 0,
        })
    }
}

/// One dispatch to carry out.
#[derive(Clone)]
pub(crate) struct Task {
    pub(crate) id: String,
    pub(crate) capability: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) effect: Effect,
    pub(crate) deadline: Instant,
    pub(crate) deadline_at_ms: u64,
    pub(crate) attempt: u32,
    pub(crate) output: Arc<Output>,
}

/// What the rest of the agent hears of running work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// The result is kept and can be reported.
    Finished(Arc<StoredResult>),
    /// There is nothing to report.
    Gone(String),
    /// The dispatch waits for the person at the machine, or doesn't any more.
    Waiting {
        /// The dispatch.
        id: String,
        /// What they are asked, while it waits.
        waiting: Option<String>,
    },
    /// Its program wrote something.
    Output(String),
}

struct Slot {
    capability: Capability,
    permits: Arc<Semaphore>,
}

/// Everything that running work needs; shared by all of it.
pub(crate) struct Worker {
    slots: BTreeMap<String, Slot>,
    ledger: Arc<Mutex<Ledger>>,
    desk: Arc<Desk>,
    home: PathBuf,
    status: watch::Receiver<AgentStatus>,
    events: mpsc::UnboundedSender<Event>,
}

impl Worker {
    /// Makes a worker for these capabilities. Events are unbounded in type, but at most four per held
    /// dispatch.
    pub(crate) fn new(
        capabilities: Vec<Capability>,
        ledger: Arc<Mutex<Ledger>>,
        desk: Arc<Desk>,
        home: PathBuf,
        status: watch::Receiver<AgentStatus>,
        events: mpsc::UnboundedSender<Event>,
    ) -> Arc<Self> {
        let slot = |capability: Capability| {
            let permits = Arc::new(Semaphore::new(capability.concurrency as usize));
            (capability.name.clone(), Slot { capability, permits })
        };
        let slots = capabilities.into_iter().map(slot).collect();
        Arc::new(Self {
            slots,
            ledger,
            desk,
            home,
            status,
            events,
        })
    }

    /// Where a run tells what it writes.
    pub(crate) fn output(&self, id: &str) -> Arc<Output> {
        Arc::new(Output::new(id, self.events.clone()))
    }

    /// The capability of that name.
    pub(crate) fn capability(&self, name: &str) -> Option<&Capability> {
        self.slots.get(name).map(|slot| &slot.capability)
    }

    /// Carries it out; ends with exactly one of [`Event::Finished`] and [`Event::Gone`].
    pub(crate) async fn perform(self: Arc<Self>, task: Task, mut stop: watch::Receiver<Option<Stop>>) {
        let outcome = self.attempt(&task, &mut stop).await;
        let event = match outcome.into_result(&task.id) {
            Some(mut result) => {
                result.attempt = task.attempt;
                result.log_tail = task.output.tail();
                Event::Finished(self.keep(result).await)
            }
            None => {
                let (id, attempt) = (task.id.clone(), task.attempt);
                if let Err(error) = self.with_ledger(move |ledger| ledger.forget(&id, attempt)).await {
                    tracing::warn!(dispatch = %task.id, %error, "the ledger was not updated");
                }
                Event::Gone(task.id.clone())
            }
        };
        // Nobody listens only when the agent is gone.
        let _ = self.events.send(event);
    }

    async fn keep(self: &Arc<Self>, result: StoredResult) -> Arc<StoredResult> {
        let copy = Arc::new(result.clone());
        match self.with_ledger(move |ledger| ledger.finish(result)).await {
            Ok(kept) => kept,
            Err(error) => {
                // Reporting it now is the best that can be done; after a restart it would be gone.
                tracing::error!(dispatch = %copy.id, %error, "the result could not be written to the ledger");
                copy
            }
        }
    }

    async fn with_ledger<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&mut Ledger) -> std::io::Result<T> + Send + 'static,
    ) -> std::io::Result<T> {
        let ledger = Arc::clone(&self.ledger);
        let joined = tokio::task::spawn_blocking(move || {
            work(&mut ledger.lock().unwrap_or_else(PoisonError::into_inner))
        });
        joined.await.map_err(std::io::Error::other)?
    }

    async fn attempt(self: &Arc<Self>, task: &Task, stop: &mut watch::Receiver<Option<Stop>>) -> Outcome {
        let Some(slot) = self.slots.get(&task.capability) else {
            return Outcome::rejected(
                "unknown_capability",
                format!("this node has no capability {}", task.capability),
            );
        };
        let acquired = tokio::select! {
            biased;
            reason = stopped(stop) => return not_begun(reason),
            () = sleep_until(task.deadline) => {
                return Outcome::failed("deadline", "the deadline passed in the wait for a free slot");
            }
            permit = Arc::clone(&slot.permits).acquire_owned() => permit,
        };
        let Ok(_permit) = acquired else {
            return Outcome::NotBegun;
        };
        if slot.capability.local_mediation
            && let Some(outcome) = self.mediate(task, &slot.capability, stop).await
        {
            return outcome;
        }
        let (id, attempt, effect) = (task.id.clone(), task.attempt, effect_of(task, &slot.capability));
        match self
            .with_ledger(move |ledger| Ok(ledger.begin(&id, attempt, effect)))
            .await
        {
            Ok(Ok(())) => {}
            Ok(Err(Refused::Full)) => {
                return Outcome::rejected(
                    "node_full",
                    "too many results wait for the control plane on this node",
                );
            }
            Ok(Err(Refused::Io(error))) | Err(error) => {
                return Outcome::failed(
                    "ledger_unwritable",
                    format!("not begun, the node's ledger fails: {error}"),
                );
            }
        }
        self.execute(task, &slot.capability, stop).await
    }

    /// Asks the person at the machine. `None` when they allow it.
    async fn mediate(
        &self,
        task: &Task,
        capability: &Capability,
        stop: &mut watch::Receiver<Option<Stop>>,
    ) -> Option<Outcome> {
        let asked = self.desk.ask(Pending {
            id: task.id.clone(),
            capability: capability.name.clone(),
            description: capability.description.clone(),
            payload: excerpt(&task.payload),
            since_ms: wall_ms(),
            deadline_at_ms: task.deadline_at_ms,
        });
        let prompt = match capability.description.as_str() {
            "" => format!("run {}?", capability.name),
            description => format!("run {} ({description})?", capability.name),
        };
        let _ = self.events.send(Event::Waiting {
            id: task.id.clone(),
            waiting: Some(prompt),
        });
        let outcome = tokio::select! {
            biased;
            reason = stopped(stop) => Some(not_begun(reason)),
            verdict = asked => match verdict {
                Ok(true) => None,
                Ok(false) => Some(Outcome::rejected("denied_locally", "the person at the machine said no")),
                Err(_) => Some(Outcome::rejected("mediation_unavailable", "nobody can be asked here")),
            },
            () = sleep_until(task.deadline) => {
                Some(Outcome::rejected("mediation_timeout", "nobody decided before the deadline"))
            }
        };
        self.desk.withdraw(&task.id);
        let _ = self.events.send(Event::Waiting {
            id: task.id.clone(),
            waiting: None,
        });
        outcome
    }

    async fn execute(
        self: &Arc<Self>,
        task: &Task,
        capability: &Capability,
        stop: &mut watch::Receiver<Option<Stop>>,
    ) -> Outcome {
        let outcome = match &capability.action {
            Action::Builtin(builtin) => {
                let status = self.status.borrow().clone();
                builtin::run(*builtin, &task.payload, &self.home, &status)
            }
            Action::Program(program) => self.run_program(task, capability, program, stop).await,
        };
        match outcome {
            // Nothing happened that matters, or it may happen again: the next agent runs it anew.
            Outcome::Failed { code, .. }
                if code == "agent_stopped" && effect_of(task, capability) != Effect::Once =>
            {
                Outcome::NotBegun
            }
            other => other,
        }
    }

    async fn run_program(
        self: &Arc<Self>,
        task: &Task,
        capability: &Capability,
        program: &Program,
        stop: &mut watch::Receiver<Option<Stop>>,
    ) -> Outcome {
        let device_id = self.status.borrow().device_id.clone();
        let environment = [
            ("PALYRA_DISPATCH_ID", task.id.as_str()),
            ("PALYRA_CAPABILITY", capability.name.as_str()),
            ("PALYRA_DEVICE_ID", device_id.as_str()),
        ];
        let run = exec::Run {
            program,
            home: &self.home,
            input: &task.payload,
            deadline: task.deadline,
            timeout: capability.timeout,
            grace: capability.grace,
            output: Arc::clone(&task.output),
            max_output: capability.max_output,
            extra_env: &environment,
        };
        let (ledger, id) = (Arc::clone(&self.ledger), task.id.clone());
        let note = move |pid| {
            let Some(process) = lock::identify(pid) else {
                return;
            };
            // Not waited for: another dispatch may be in the middle of a slow sync.
            tokio::task::spawn_blocking(move || {
                let mut ledger = ledger.lock().unwrap_or_else(PoisonError::into_inner);
                if let Err(error) = ledger.process(&id, process) {
                    tracing::warn!(dispatch = %id, %error, "the process was not noted in the ledger");
                }
            });
        };
        exec::run(run, stop, note).await
    }
}

/// The stricter of what the control plane and the owner say.
fn effect_of(task: &Task, capability: &Capability) -> Effect {
    if task.effect == Effect::Once {
        Effect::Once
    } else {
        capability.effect
    }
}

fn not_begun(reason: Stop) -> Outcome {
    match reason {
        Stop::Cancelled => Outcome::cancelled("not_begun", "it was taken back before it began here"),
        Stop::Agent => Outcome::NotBegun,
    }
}

/// What the person sees. Who is asked must know that there is more.
fn excerpt(payload: &[u8]) -> String {
    match payload.split_at_checked(SHOWN) {
        Some((shown, rest)) if !rest.is_empty() => {
            format!(
                "{}… and {} bytes more",
                String::from_utf8_lossy(shown),
                rest.len()
            )
        }
        _ => String::from_utf8_lossy(payload).into_owned(),
    }
}

/// Waits until the run is to end.
pub(crate) async fn stopped(stop: &mut watch::Receiver<Option<Stop>>) -> Stop {
    loop {
        if let Some(reason) = *stop.borrow_and_update() {
            return reason;
        }
        if stop.changed().await.is_err() {
            // Whoever could stop the run is gone; the deadline still ends it.
            std::future::pending::<()>().await;
        }
    }
}

/// Makes a text of a program's or the system's fit for a message: one line of at most `max` bytes.
pub(crate) fn plain(text: &str, max: usize) -> String {
    let mut plain = String::with_capacity(text.len().min(max));
    for symbol in text.chars() {
        let symbol = if symbol.is_control() { ' ' } else { symbol };
        if plain.len() + symbol.len_utf8() > max {
            break;
        }
        plain.push(symbol);
    }
    plain
}

/// How long from now, at most a day: a clock that lies must not make a deadline that never comes.
pub(crate) fn deadline_in(remaining_ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(remaining_ms.min(24 * 3_600_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_line_and_bounded() {
        let result = Outcome::failed("c", format!("a\nb\t\u{1b}[31m{}", "ü".repeat(5000))).into_result("A");
        let message = result.unwrap().error_message;
        assert!(
            message.starts_with("a b  [31mü") && message.len() <= MESSAGE_MAX,
            "{}",
            message.len()
        );
        assert!(!message.chars().any(char::is_control));
    }

    #[test]
    fn an_input_that_is_cut_says_so() {
        assert_eq!(excerpt(b"{}"), "{}");
        assert_eq!(excerpt(&[b'x'; SHOWN]).len(), SHOWN);
        assert!(excerpt(&[b'x'; SHOWN + 7]).ends_with("x… and 7 bytes more"));
    }
}
