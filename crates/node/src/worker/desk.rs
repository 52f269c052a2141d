//! What this worker holds of leases, and what it has to say and hear about them, across sessions.
//!
//! ```text
//! attach → Report → Reconciled → (Challenge → Attest) → offers, renewals, results, cleanups
//! ```
//!
//! What never lives here: streams and processes. Messages come in, messages to send come out.
//!
//! Invariants: nothing but the Report is said in a session before it was reconciled; what is asked is asked again, under
//! the same request id, until it is answered; a lease is held until nothing of it is left and the control plane knows; a
//! lease is renewed by the clock of when the renewal was sent; an unknown lease that is to end is clean: there is a record
//! of every other.

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
use super::lease::{self, Ears, Reply, Said, Shared, Task};
use super::place::Place;
use super::proof::Proof;
use super::spec::boot_ms;
use super::store::Record;
use super::{timing, tools};
use crate::link::Link;
use crate::output::Output;
use crate::work::Event;

/// What was asked is asked again when its answer takes longer than this.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// What was not decided is asked again after this long.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// What a tool writes goes out that often at most.
const OUTPUT_EVERY: Duration = Duration::from_millis(200);

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

/// A lease, as the session sees it.
struct Held {
    fence: u64,
    ttl_ms: u64,
    run_ends_ms: u64,
    state: &'static str,
    message: String,
    /// When it is to be renewed; nothing when it is not.
    renew_at: Option<Instant>,
    kill_at: watch::Sender<u64>,
    stop: watch::Sender<Option<String>>,
    clean: watch::Sender<u64>,
    output: Arc<Output>,
    output_at: Option<Instant>,
    output_sent: Option<Instant>,
}

impl Held {
    /// What is to go out of what its tool wrote.
    fn written(&mut self, lease_id: &str, now: Instant) -> Vec<Body> {
        let (lines, progress, more) = self.output.take();
        self.output_sent = Some(now);
        self.output_at = more.then_some(now + OUTPUT_EVERY);
        let (fence, lease_id) = (self.fence, lease_id.to_owned());
        let lines = lines.map(|lines| {
            let (first, lines) = (lines.first, lines.lines);
            Body::Log(wire::RunLog {
                lease_id: lease_id.clone(),
                fence,
                first,
                lines,
            })
        });
        let progress = progress.map(|said| {
            let (percent, message) = (said.percent, said.message);
            Body::Progress(wire::RunProgress {
                lease_id: lease_id.clone(),
                fence,
                percent,
                message,
            })
        });
        lines.into_iter().chain(progress).collect()
    }

    fn rest(&mut self, lease_id: &str) -> Vec<Body> {
        let now = Instant::now();
        let mut bodies = self.written(lease_id, now);
        while self.output_at.is_some() {
            bodies.extend(self.written(lease_id, now));
        }
        bodies
    }
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
        self.proof.detached();
    }

    /// The server said something.
    pub(crate) fn hear(&mut self, order: wire::WorkerOrder, link: &dyn Link) -> Vec<Outer> {
        let bodies = match order.body {
            Some(Order::Reconciled(reconciled)) => self.reconciled(reconciled),
            Some(Order::Challenge(challenge)) => self.proof.challenged(&self.shared, &challenge, link),
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

    fn reconciled(&mut self, reconciled: wire::Reconciled) -> Vec<Body> {
        if !matches!(&self.phase, Phase::Reporting { request_id, .. } if *request_id == reconciled.request_id)
        {
            return Vec::new();
        }
        self.phase = Phase::Ready;
        let mut bodies: Vec<Body> = reconciled.end.iter().flat_map(|end| self.end(end)).collect();
        for (id, held) in &mut self.held {
            let named = reconciled.keep.contains(id) || reconciled.end.iter().any(|end| end.lease_id == *id);
            if !named {
                stop(&held.stop, "unknown");
            }
            if held.renew_at.is_some() {
                held.renew_at = Some(Instant::now());
            }
            // The replica of this session may have heard nothing of it.
            if held.output.rewind() {
                held.output_at = Some(Instant::now());
            }
        }
        let again_at = Instant::now() + ANSWER_WITHIN;
        for call in self.calls.values_mut() {
            call.again_at = again_at;
            bodies.push(call.body.clone());
        }
        bodies.extend(self.renewals(Instant::now()));
        bodies.extend(self.proof.due(Instant::now()));
        bodies
    }

    fn offered(&mut self, offer: wire::LeaseOffer) -> Vec<Body> {
        if self.held.contains_key(&offer.lease_id) || !matches!(self.phase, Phase::Ready) {
            // Delivered again; or by a session that was not reconciled, which is a mistake and costs the lease its time.
            return Vec::new();
        }
        let busy = self
            .held
            .values()
            .filter(|held| matches!(held.state, "running" | "finished" | "unclean"))
            .count();
        let full = busy >= self.shared.config.slots as usize;
        if !plain_id(&offer.lease_id) || full || self.stopping {
            let code = if self.stopping { "worker_stopped" } else { "slots" };
            tracing::warn!(lease = offer.lease_id, code, "an offer is refused");
            return vec![self.refusal(&offer, code)];
        }
        tracing::info!(
            lease = offer.lease_id,
            run = offer.run_id,
            tool = offer.tool,
            fence = offer.fence,
            "offered"
        );
        let run_ends = boot_ms().saturating_add(if offer.run_remaining_ms == 0 {
            u64::MAX / 2
        } else {
            offer.run_remaining_ms
        });
        let (held, ears) = self.hold(&offer.lease_id, offer.fence, offer.ttl_ms, run_ends);
        let record = Record {
            lease_id: offer.lease_id.clone(),
            fence: offer.fence,
            run_id: offer.run_id.clone(),
            ..Record::default()
        };
        let output = Arc::clone(&held.output);
        self.held.insert(offer.lease_id.clone(), held);
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(
            Task {
                shared,
                offer,
                ears,
                output,
                record,
                violation: None,
            }
            .run(),
        );
        Vec::new()
    }

    /// Nothing of it is here, and nothing will be.
    fn refusal(&mut self, offer: &wire::LeaseOffer, code: &str) -> Body {
        let request_id = new_ulid();
        let body = Body::Finish(wire::LeaseFinish {
            request_id: request_id.clone(),
            lease_id: offer.lease_id.clone(),
            fence: offer.fence,
            outcome: "refused".to_owned(),
            error_code: code.to_owned(),
            error_message: "the worker has no room for it".to_owned(),
            ..wire::LeaseFinish::default()
        });
        self.ask(&offer.lease_id, request_id, body.clone(), None);
        body
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

    fn end(&mut self, end: &wire::LeaseEnd) -> Vec<Body> {
        if let Some(held) = self.held.get_mut(&end.lease_id) {
            if held.fence == end.fence || end.fence == 0 {
                tracing::info!(lease = end.lease_id, reason = end.reason, "the lease is over");
                held.renew_at = None;
                stop(&held.stop, &end.reason);
            }
            return Vec::new();
        }
        let told = self
            .calls
            .values()
            .any(|call| call.lease_id == end.lease_id && matches!(call.body, Body::Cleaned(_)));
        if told {
            return Vec::new();
        }
        let request_id = new_ulid();
        let body = Body::Cleaned(wire::LeaseCleaned {
            request_id: request_id.clone(),
            lease_id: end.lease_id.clone(),
            fence: end.fence,
            ok: true,
            ..wire::LeaseCleaned::default()
        });
        self.ask(&end.lease_id, request_id, body.clone(), None);
        vec![body]
    }

    fn renewed(&mut self, renewed: &wire::RenewAnswer) {
        let Some(sent_ms) = self.sent.remove(&renewed.sequence) else {
            return;
        };
        for lease in &renewed.leases {
            let Some(held) = self
                .held
                .get_mut(&lease.lease_id)
                .filter(|held| held.fence == lease.fence)
            else {
                continue;
            };
            if lease.renewed {
                let kill_at = timing::kill_at(sent_ms, held.ttl_ms, lease.remaining_ms, held.run_ends_ms);
                held.kill_at.send_if_modified(|at| {
                    let later = kill_at > *at;
                    *at = kill_at.max(*at);
                    later
                });
            } else if lease.retry {
                held.renew_at = held.renew_at.map(|at| at.min(Instant::now() + RETRY_AFTER));
            } else {
                tracing::warn!(
                    lease = lease.lease_id,
                    code = lease.code,
                    lease.message,
                    "the lease was not renewed"
                );
                held.renew_at = None;
                stop(&held.stop, "fenced");
            }
        }
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

    /// One message for all leases that are to be renewed about now.
    fn renewals(&mut self, now: Instant) -> Vec<Body> {
        let mut leases = Vec::new();
        for (id, held) in &mut self.held {
            let every = timing::renew_every(held.ttl_ms);
            if held.renew_at.is_some_and(|at| at <= now + every / 4) {
                held.renew_at = Some(now + every);
                leases.push((
                    held.renew_at,
                    wire::LeaseRef {
                        lease_id: id.clone(),
                        fence: held.fence,
                    },
                ));
            }
        }
        if leases.is_empty() {
            return Vec::new();
        }
        self.sequence += 1;
        self.sent.insert(self.sequence, boot_ms());
        // Answers that never came are of no use to anybody.
        while self.sent.len() > 1_024 {
            self.sent.pop_first();
        }
        let leases = leases.into_iter().map(|(_, lease)| lease).collect();
        vec![Body::Renew(wire::LeaseRenew {
            sequence: self.sequence,
            leases,
        })]
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
                let mut bodies = Vec::new();
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
                    self.proof.ask_now();
                }
                Err(why) => tracing::error!(why, "N1003: the tools cannot be digested; no run can be begun"),
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
