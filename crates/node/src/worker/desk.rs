//! What this worker holds of leases, and what it has to say and hear about them, across sessions.
//!
//! ```text
//! attach → Report → Reconciled → (Challenge → Attest) → offers, renewals, results, cleanups
//! ```
//!
//! What never lives here: streams and processes. Messages come in, messages to send come out.
//!
//! Invariants: nothing but the Report is said in a session before it was reconciled; what is asked is asked
//! again, under the same request id, until it is answered; a lease is held until nothing of it is left and
//! the control plane knows; a lease is renewed by the clock of when the renewal was sent; an unknown lease
//! that is to end is clean: there is a record of every other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use palyra_client::new_ulid;
use palyra_proto::node::v1::node_message::Body as Outer;
use palyra_proto::worker::v1 as wire;
use palyra_proto::worker::v1::worker_message::Body;
use palyra_proto::worker::v1::worker_order::Body as Order;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::attest::Provider;
use super::lease::{self, Ears, Reply, Said, Shared};
use super::place::Place;
use super::proof::Proof;
use super::store::Record;
use super::tools;
use crate::link::Link;
use crate::output::Output;
use crate::work::Event;

/// What was asked is asked again when its answer takes longer than this.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// What was not decided is asked again after this long.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// What a tool writes goes out that often at most.
const OUTPUT_EVERY: Duration = Duration::from_millis(200);

mod held;
mod leases;

use held::Held;

enum Phase {
    /// There is no session.
    Away,
    /// What is held was told, and what is to be done about it is waited for.
    Reporting {
        request_id: String,
        again_at: Instant,
    },
    Ready,
}

struct Call {
    lease_id: String,
    body: Body,
    answer: Option<oneshot::Sender<Reply>>,
    again_at: Instant,
}

/// The table of a worker.
pub(crate) struct Desk {
    shared: Arc<Shared>,
    said: mpsc::UnboundedReceiver<Said>,
    lines: mpsc::UnboundedReceiver<Event>,
    write: mpsc::UnboundedSender<Event>,
    held: BTreeMap<String, Held>,
    calls: BTreeMap<String, Call>,
    tasks: JoinSet<()>,
    phase: Phase,
    pub(super) proof: Proof,
    sequence: u64,
    /// When renewals were sent that were not answered yet.
    sent: BTreeMap<u64, u64>,
    stopping: bool,
    /// What is measured was measured for the next statement, and is not in one yet.
    fresh: bool,
    measuring: bool,
    /// A challenge that waits for the measurement.
    challenge: Option<wire::Challenge>,
}

impl Desk {
    /// Begins with what an earlier life left: everything of it is ended and removed before anything is said.
    ///
    /// Errors: records that are damaged.
    pub(crate) fn open(
        shared: Arc<Shared>,
        said: mpsc::UnboundedReceiver<Said>,
        provider: Option<Arc<Provider>>,
    ) -> crate::Result<Self> {
        let left = shared.store.all()?;
        let (write, lines) = mpsc::unbounded_channel();
        let mut desk = Self {
            shared,
            said,
            lines,
            write,
            held: BTreeMap::new(),
            calls: BTreeMap::new(),
            tasks: JoinSet::new(),
            phase: Phase::Away,
            proof: Proof::new(provider),
            sequence: 0,
            sent: BTreeMap::new(),
            stopping: false,
            // The start measured.
            fresh: true,
            measuring: false,
            challenge: None,
        };
        for record in left.into_values() {
            desk.resume(record)?;
        }
        Ok(desk)
    }

    fn resume(&mut self, mut record: Record) -> crate::Result<()> {
        let place = Place::left(&self.shared.base, &record.lease_id, record.groups.clone());
        match place.clean() {
            Ok((files, bytes)) => {
                record.clean = true;
                record.removed_files += files;
                record.removed_bytes += bytes;
                record.unclean = String::new();
            }
            Err(why) => (record.clean, record.unclean) = (false, why.to_string()),
        }
        self.shared.store.put(&record)?;
        let state = match (&record.finish, record.clean) {
            (_, false) => "unclean",
            (Some(_), true) => "finished",
            (None, true) => "cleaned",
        };
        tracing::warn!(
            lease = record.lease_id,
            state,
            why = record.unclean,
            "an earlier life left a lease"
        );
        let (mut held, mut ears) = self.hold(&record.lease_id, record.fence, 0, 0);
        held.state = state;
        held.message.clone_from(&record.unclean);
        self.held.insert(record.lease_id.clone(), held);
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let lease_id = record.lease_id.clone();
            lease::owed(&shared, &mut record).await;
            lease::clean(&shared, record, &mut ears.clean).await;
            let _ = shared.said.send(Said::Gone(lease_id));
        });
        Ok(())
    }

    fn hold(&self, lease_id: &str, fence: u64, ttl_ms: u64, run_ends_ms: u64) -> (Held, Ears) {
        let (kill_at, kill_at_heard) = watch::channel(0);
        let (stop, stop_heard) = watch::channel(None);
        let (clean, clean_heard) = watch::channel(0);
        let held = Held {
            fence,
            ttl_ms,
            run_ends_ms,
            state: "running",
            message: String::new(),
            renew_at: None,
            kill_at,
            stop,
            clean,
            output: Arc::new(Output::new(lease_id, self.write.clone())),
            output_at: None,
            output_sent: None,
        };
        let ears = Ears {
            kill_at: kill_at_heard,
            stop: stop_heard,
            clean: clean_heard,
        };
        (held, ears)
    }

    /// In words, for the status.
    pub(crate) fn describe(&self) -> String {
        let leases = self.held.len();
        format!(
            "{}, {leases} lease{}",
            self.proof.describe(),
            if leases == 1 { "" } else { "s" }
        )
    }

    /// A new session. Answers what to send.
    pub(crate) fn attached(&mut self) -> Vec<Outer> {
        self.sent.clear();
        let again_at = Instant::now() + ANSWER_WITHIN;
        self.phase = Phase::Reporting {
            request_id: new_ulid(),
            again_at,
        };
        outer(self.report())
    }

    fn report(&self) -> Vec<Body> {
        let Phase::Reporting { request_id, .. } = &self.phase else {
            return Vec::new();
        };
        let held = self.held.iter().map(|(id, held)| wire::HeldLease {
            lease_id: id.clone(),
            fence: held.fence,
            state: held.state.to_owned(),
            message: held.message.clone(),
        });
        vec![Body::Report(wire::Report {
            request_id: request_id.clone(),
            held: held.collect(),
        })]
    }

    /// The session ended. What runs goes on until its deadline.
    pub(crate) fn detached(&mut self) {
        self.phase = Phase::Away;
        self.challenge = None;
        self.proof.detached();
    }

    /// The server said something.
    pub(crate) fn hear(&mut self, order: wire::WorkerOrder, link: &dyn Link) -> Vec<Outer> {
        let bodies = match order.body {
            Some(Order::Reconciled(reconciled)) => self.reconciled(reconciled),
            Some(Order::Challenge(challenge)) => self.challenged(&challenge, link),
            Some(Order::Attested(answer)) => {
                self.proof.answered(&answer);
                Vec::new()
            }
            Some(Order::Offer(offer)) => self.offered(offer),
            Some(Order::Renewed(renewed)) => {
                self.renewed(&renewed);
                Vec::new()
            }
            Some(Order::Answer(answer)) => self.answered(answer),
            Some(Order::Chunk(chunk)) => {
                self.reply(&chunk.request_id.clone(), Reply::Chunk(chunk));
                Vec::new()
            }
            Some(Order::End(end)) => self.end(&end),
            Some(Order::Cleanup(ask)) => {
                tracing::info!(reason = ask.reason, "an operator asks for the cleanup again");
                self.held
                    .values()
                    .for_each(|held| held.clean.send_modify(|count| *count += 1));
                Vec::new()
            }
            // Of a newer release.
            None => Vec::new(),
        };
        outer(bodies)
    }

    fn ask(
        &mut self,
        lease_id: &str,
        request_id: String,
        body: Body,
        answer: Option<oneshot::Sender<Reply>>,
    ) {
        let (lease_id, again_at) = (lease_id.to_owned(), Instant::now() + ANSWER_WITHIN);
        self.calls.insert(
            request_id,
            Call {
                lease_id,
                body,
                answer,
                again_at,
            },
        );
    }

    fn answered(&mut self, answer: wire::Answer) -> Vec<Body> {
        let soon = Instant::now() + RETRY_AFTER;
        if let Phase::Reporting { request_id, again_at } = &mut self.phase
            && *request_id == answer.request_id
        {
            tracing::warn!(
                code = answer.code,
                answer.message,
                "what is held was not taken; it is told again"
            );
            *again_at = if answer.retry {
                soon
            } else {
                Instant::now() + ANSWER_WITHIN
            };
            return Vec::new();
        }
        if self.proof.not_now(&answer) {
            return Vec::new();
        }
        if answer.retry {
            if let Some(call) = self.calls.get_mut(&answer.request_id) {
                call.again_at = soon;
            }
            return Vec::new();
        }
        self.reply(&answer.request_id.clone(), Reply::Answer(answer));
        Vec::new()
    }

    fn reply(&mut self, request_id: &str, reply: Reply) {
        let call = self.calls.remove(request_id);
        if let Some(Call {
            lease_id,
            body: Body::Finish(_),
            ..
        }) = &call
            && let Some(held) = self.held.get_mut(lease_id)
        {
            // Over, one way or the other: there is nothing to renew.
            held.renew_at = None;
        }
        if let Some(answer) = call.and_then(|call| call.answer) {
            // A task that was stopped does not listen any more.
            let _ = answer.send(reply);
        }
    }

    /// Waits for what is to be sent next. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Vec<Outer> {
        let due = self.next_due();
        let bodies = tokio::select! {
            Some(said) = self.said.recv() => self.take(said),
            Some(event) = self.lines.recv() => { self.wrote(&event); Vec::new() }
            () = until(due) => self.due(Instant::now()),
        };
        outer(bodies)
    }

    fn next_due(&self) -> Option<Instant> {
        let of_calls = self.calls.values().map(|call| call.again_at);
        let of_held = self
            .held
            .values()
            .flat_map(|held| [held.renew_at, held.output_at])
            .flatten();
        match &self.phase {
            Phase::Away => None,
            Phase::Reporting { again_at, .. } => Some(*again_at),
            Phase::Ready => of_calls.chain(of_held).chain(self.proof.next()).min(),
        }
    }

    fn due(&mut self, now: Instant) -> Vec<Body> {
        if let Phase::Reporting { again_at, .. } = &mut self.phase {
            *again_at = now + ANSWER_WITHIN;
            return self.report();
        }
        if !matches!(self.phase, Phase::Ready) {
            return Vec::new();
        }
        let mut bodies = self.renewals(now);
        bodies.extend(self.proof.due(now));
        for call in self.calls.values_mut().filter(|call| call.again_at <= now) {
            call.again_at = now + ANSWER_WITHIN;
            bodies.push(call.body.clone());
        }
        for (id, held) in &mut self.held {
            if held.output_at.is_some_and(|at| at <= now) {
                bodies.extend(held.written(id, now));
            }
        }
        bodies
    }

    fn wrote(&mut self, event: &Event) {
        if let Event::Output(id) = event
            && let Some(held) = self.held.get_mut(id)
        {
            let now = Instant::now();
            let soonest = held.output_sent.map_or(now, |sent| sent + OUTPUT_EVERY);
            held.output_at = Some(held.output_at.unwrap_or(soonest.max(now)));
        }
    }

    fn take(&mut self, said: Said) -> Vec<Body> {
        match said {
            Said::Call {
                lease_id,
                request_id,
                body,
                answer,
            } => {
                let (body, mut bodies) = (*body, Vec::new());
                if let (Body::Finish(_), Some(held)) = (&body, self.held.get_mut(&lease_id)) {
                    bodies = held.rest(&lease_id);
                }
                bodies.push(body.clone());
                self.ask(&lease_id, request_id, body, Some(answer));
                return if matches!(self.phase, Phase::Ready) {
                    bodies
                } else {
                    Vec::new()
                };
            }
            Said::State {
                lease_id,
                state,
                message,
            } => {
                if let Some(held) = self.held.get_mut(&lease_id) {
                    (held.state, held.message) = (state, message);
                    if matches!(state, "cleaned" | "unclean") {
                        held.renew_at = None;
                    }
                }
            }
            Said::Accepted(lease_id) => {
                if let Some(held) = self.held.get_mut(&lease_id) {
                    held.renew_at = Some(Instant::now());
                }
            }
            Said::Gone(lease_id) => {
                self.held.remove(&lease_id);
                self.calls
                    .retain(|_, call| call.lease_id != lease_id || call.answer.is_none());
                while self.tasks.try_join_next().is_some() {}
            }
            Said::Drifted(why) => self.measure_again(&why),
            Said::Measured(measured) => match *measured {
                Ok(measured) => {
                    *self
                        .shared
                        .measured
                        .lock()
                        .unwrap_or_else(std::sync::PoisonError::into_inner) = measured;
                    (self.measuring, self.fresh) = (false, true);
                    if self.challenge.is_none() {
                        self.proof.ask_now();
                    }
                }
                Err(why) => {
                    self.measuring = false;
                    tracing::error!(
                        code = "N1003",
                        why,
                        "the tools cannot be digested; no run can be begun"
                    );
                }
            },
        }
        Vec::new()
    }

    /// What there is now is told, whatever the control plane thinks of it.
    fn measure_again(&mut self, why: &str) {
        tracing::error!(
            why,
            "what would be run is not what was attested; it is attested anew"
        );
        self.measure();
    }

    /// Each statement is of what is there now: what was measured before another one is measured again.
    fn challenged(&mut self, challenge: &wire::Challenge, link: &dyn Link) -> Vec<Body> {
        if std::mem::take(&mut self.fresh) {
            return self.proof.challenged(&self.shared, challenge, link);
        }
        self.challenge = Some(challenge.clone());
        self.measure();
        Vec::new()
    }

    /// The statement that waited for a measurement, once it is there.
    pub(crate) fn statement(&mut self, link: &dyn Link) -> Vec<Outer> {
        if !self.fresh {
            return Vec::new();
        }
        let Some(challenge) = self.challenge.take() else {
            return Vec::new();
        };
        outer(self.challenged(&challenge, link))
    }

    fn measure(&mut self) {
        if std::mem::replace(&mut self.measuring, true) {
            return;
        }
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn_blocking(move || {
            let measured = tools::measure(&shared.config).map_err(|error| error.to_string());
            let _ = shared.said.send(Said::Measured(Box::new(measured)));
        });
    }

    /// The worker is to stop: what runs is ended, and its results are told.
    pub(crate) fn begin_stop(&mut self) {
        self.stopping = true;
        for held in self.held.values().filter(|held| held.state == "running") {
            stop(&held.stop, "worker_stopped");
        }
    }

    /// The end: what runs is ended at once, for wardens follow their supervisor.
    pub(crate) async fn abort(mut self) {
        self.tasks.shutdown().await;
    }

    /// Whether something is under way that a stop should wait for.
    pub(crate) fn is_busy(&self) -> bool {
        self.held.values().any(|held| held.state != "unclean")
    }
}

/// [`Desk::next`] of a worker; never completes for a node that is none. Safe to cancel.
pub(crate) async fn next(desk: &mut Option<Desk>) -> Vec<Outer> {
    match desk {
        Some(desk) => desk.next().await,
        None => std::future::pending().await,
    }
}

/// Tells the task of a lease that it is to end, and why. The first word counts.
fn stop(sender: &watch::Sender<Option<String>>, why: &str) {
    sender.send_if_modified(|stop| {
        let first = stop.is_none();
        stop.get_or_insert_with(|| why.to_owned());
        first
    });
}

/// A name that is a file's as well.
fn plain_id(id: &str) -> bool {
    palyra_client::ids::is_ulid(id)
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

fn outer(bodies: Vec<Body>) -> Vec<Outer> {
    bodies
        .into_iter()
        .map(|body| Outer::Worker(wire::WorkerMessage { body: Some(body) }))
        .collect()
}
