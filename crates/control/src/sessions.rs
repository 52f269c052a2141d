//! Sessions of nodes: attach, messages in, messages out, end.
//!
//! What never lives here: streams (the server's) and the rules of who may finish which dispatch (`apply`).
//! Invariants: each message is admitted anew; a heartbeat makes no log entry; when a session ends for a
//! reason that the state does not know yet, this replica tells it, again and again, until it is committed or
//! superseded.

use std::sync::Arc;
use std::time::Duration;

use palyra_pki::PeerIdentity;
use palyra_platform as platform;
use palyra_state::nodes::{self, Attach};
use palyra_state::{Id, Reply, dispatch};
use tokio::sync::Semaphore;

use crate::caller::Caller;
use crate::certificates::CertificateTimes;
use crate::control::Control;
use crate::dispatch::Completion;
use crate::error::{Error, Refusal};
use crate::outbox::{Assignment, End, Outbound, ResultAnswer, Taken, Waiting};
use crate::outputs::Output;
use crate::registry::{Entry, Transport};
use crate::workers::messages::FromWorker;

/// What a node says when it attaches.
#[derive(Debug, Clone)]
pub struct AttachRequest {
    /// The device that it says it is.
    pub device_id: String,
    /// Dispatches that it has begun, or has finished without an accepted result; ULIDs.
    pub held: Vec<String>,
    /// The attempt of each, in the same order; one that is missing or 0 is the present one.
    pub held_attempts: Vec<u32>,
    /// How it receives.
    pub transport: Transport,
    /// Why it is not on the transport that the node would rather use; empty when it is. Cut to what a record takes.
    pub fallback: String,
    /// The connection that carries the session, from [`crate::ConnectionGuard::id`]; 0 when there is none to
    /// close.
    pub connection: u64,
}

/// What a node says in a session.
#[derive(Debug, Clone)]
pub enum Inbound {
    /// It lives.
    Heartbeat {
        /// Counts from the node's start.
        sequence: u64,
    },
    /// A dispatch arrived.
    Ack {
        /// The dispatch.
        dispatch_id: String,
        /// The session in which it arrived.
        epoch: u64,
    },
    /// A dispatch ended.
    Result(Completion),
    /// It goes, and says so: nobody needs to wait for it.
    Leave,
    /// A person must act, or has acted.
    Mediation {
        /// The dispatch.
        dispatch_id: String,
        /// The session in which the node has it.
        epoch: u64,
        /// Must act; otherwise has acted.
        waiting: bool,
        /// A ULID, the same for each try; empty for a fresh one.
        request_id: String,
        /// What they are asked.
        prompt: String,
        /// Their machine, as it calls itself.
        host: String,
    },
    /// What a running program wrote, or how far it is.
    Output(Output),
    /// What it says as a worker.
    Worker(FromWorker),
}

/// What a node is told when it has attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// The session.
    pub epoch: u64,
    /// The replica that holds it.
    pub replica_id: u64,
    /// How often to send a heartbeat.
    pub heartbeat_interval: Duration,
    /// The times of the certificate that it attached with.
    pub certificate: Option<CertificateTimes>,
}

/// A live session, owned by who serves its stream. Dropping it ends the session.
#[derive(Debug)]
pub struct Session {
    pub(crate) control: Control,
    pub(crate) entry: Arc<Entry>,
    pub(crate) results: Arc<Semaphore>,
}

/// The reading half of a session's messages; any number of clones compete for them.
#[derive(Debug, Clone)]
pub struct Outgoing {
    control: Control,
    entry: Arc<Entry>,
}

impl Control {
    /// Begins a session. The one before it, on whichever replica, ends as `superseded`.
    ///
    /// # Errors
    /// What admission and the state machine refuse; [`Error::Busy`]; [`Error::Unknown`], after which the node
    /// just attaches again.
    pub async fn attach(&self, peer: &PeerIdentity, request: AttachRequest) -> Result<Session, Error> {
        let caller = self.admit_node_as(peer, &request.device_id)?;
        let Caller::Node { device_id, .. } = caller else {
            return Err(Error::Internal(
                "a node's admission answered another caller".to_owned(),
            ));
        };
        let held = parse_held(&request.held)?;
        self.check_not_draining()?;
        let entry = self
            .registry()
            .enter(device_id, peer, request.transport, request.connection)?;
        let results = Arc::new(Semaphore::new(self.limits().results_in_flight));
        let session = Session {
            control: self.clone(),
            entry,
            results,
        };
        let _working = session.entry.work();
        let _turn = self.admission().turn(device_id).await?;
        // From here on a revocation and a stop find the entry; what came before is seen by these checks.
        self.admit_node(peer)?;
        self.check_not_draining()?;
        let attach = Attach {
            device_id,
            replica_id: self.replica_id(),
            transport: request.transport.as_str().to_owned(),
            held: held.clone(),
            held_attempts: request.held_attempts.clone(),
            fallback: one_line(&request.fallback),
        };
        let written = self.propose(self.fresh_id(), caller.actor(), attach).await?;
        let Reply::Attached(attached) = written.reply else {
            return Err(self.odd_reply("nodes.attach"));
        };
        let attempts = request.held_attempts.into_iter().chain(std::iter::repeat(0));
        session.entry.holds(held.iter().copied().zip(attempts));
        self.registry().set_epoch(&session.entry, attached.epoch);
        self.applied(written.receipt).await?;
        self.settle_attach(&session.entry, &held)?;
        self.still_fresh(&session.entry)?;
        Ok(session)
    }

    /// With the epoch known, sees whether the session still is the device's, delivers what is bound to it, and
    /// calls off what the node holds and nobody wants any more.
    fn settle_attach(&self, entry: &Arc<Entry>, held: &[Id]) -> Result<(), Error> {
        let view = self.replica().view();
        let current = nodes::node(&view, entry.device_id)
            .and_then(|node| node.session)
            .map(|session| session.epoch);
        if current != Some(entry.epoch()) {
            self.end_session(entry, End::Superseded);
        }
        if let Some(end) = entry.outbox.end() {
            return Err(Refusal::SessionEnded { code: end.as_str() }.into());
        }
        self.deliver_bound(entry, &view);
        self.call_off_ended(entry, held, &view);
        self.tell_rotation(entry, &view);
        Ok(())
    }

    /// After the work as before it: this process may have been stopped in between, and a session that begins now would
    /// be served by what it knew then.
    fn still_fresh(&self, entry: &Arc<Entry>) -> Result<(), Error> {
        self.check_fresh()
            .inspect_err(|_| self.end_session(entry, End::Stale))
    }

    /// Delivers every open dispatch that is bound to a session and not with its node yet.
    pub(crate) fn deliver_bound(&self, entry: &Arc<Entry>, view: &dyn palyra_state::Read) {
        let mut after = None;
        loop {
            let page = dispatch::open_of_device(view, entry.device_id, after, palyra_state::limits::PAGE);
            let Some(last) = page.last() else { return };
            after = Some(last.id);
            for open in page.iter().filter(|open| open.epoch == entry.epoch()) {
                if !self.pass_on(entry, open) {
                    return;
                }
            }
        }
    }

    /// Ends a session. Its reader gets a goodbye, the state is told unless it knows, and the entry goes when
    /// both are done.
    pub(crate) fn end_session(&self, entry: &Arc<Entry>, end: End) {
        if !entry.outbox.close(end) {
            return;
        }
        tracing::info!(device = %entry.device_id, epoch = entry.epoch(), %end, "session ends");
        let hopeless = matches!(
            end,
            End::SlowReader | End::Silent | End::Revoked | End::Expired | End::Replaced
        );
        if hopeless && entry.connection != 0 {
            self.connections().close(entry.connection, end);
        }
        // Whether its stream is read to the goodbye.
        self.registry()
            .look_again(entry, platform::now() + self.timings().stall_timeout);
        self.settle_end(entry, end);
    }

    /// Sees to it that the state knows of the end, and that the entry goes once its owner has let go of it
    /// too, so that "closed" means closed.
    fn settle_end(&self, entry: &Arc<Entry>, end: End) {
        if entry.epoch() == 0 {
            // While the attach is under way nobody knows whether the state will have the session: who waits
            // for it asks again.
            if entry.is_released() {
                self.registry().settle(entry);
            }
            return;
        }
        if end.is_settled() {
            self.registry().settle(entry);
            return;
        }
        if !entry.begin_detach() {
            // Who detaches it sees afterwards whether it is let go of; here the order was the other way round.
            self.registry().remove_when_over(entry);
            return;
        }
        self.ends().tell(Arc::clone(entry), end);
    }
}

/// A node's reason as it goes into a record and a row: one line of a length that fits. Whatever it says, it may attach.
fn one_line(text: &str) -> String {
    let mut line = String::new();
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if line.len() + c.len_utf8() > palyra_state::limits::REASON_MAX {
            break;
        }
        line.push(c);
    }
    line
}

fn parse_held(held: &[String]) -> Result<Vec<Id>, Error> {
    if held.len() > palyra_state::limits::OPEN_PER_DEVICE as usize {
        let limit = palyra_state::limits::OPEN_PER_DEVICE;
        return Err(Error::invalid(
            "held",
            format!("{} entries", held.len()),
            format!("send at most {limit}"),
        ));
    }
    held.iter()
        .map(|text| crate::selector::parse_id("held", text))
        .collect()
}

impl Session {
    /// What to tell the node first.
    #[must_use]
    pub fn attached(&self) -> Attached {
        Attached {
            epoch: self.entry.epoch(),
            replica_id: self.control.replica_id(),
            heartbeat_interval: self.control.timings().heartbeat_interval,
            certificate: self.control.session_times(&self.entry),
        }
    }

    /// The messages for the node.
    #[must_use]
    pub fn outgoing(&self) -> Outgoing {
        Outgoing {
            control: self.control.clone(),
            entry: Arc::clone(&self.entry),
        }
    }

    /// The node says which generation of the trust bundle it holds; see [`Control::node_trusts`].
    ///
    /// # Errors
    /// What admission refuses.
    pub fn trusts(&self, peer: &PeerIdentity, device_id: &str, generation: u64) -> Result<(), Error> {
        self.control.node_trusts(peer, device_id, generation)
    }

    /// Takes a message of the node in. Results are committed in the background, a bounded number at a time;
    /// their answers come through [`Outgoing`].
    ///
    /// # Errors
    /// What ends the stream: a caller that is not admitted any more, another device's message, a session that
    /// is over, a malformed message.
    pub async fn receive(&self, peer: &PeerIdentity, device_id: &str, message: Inbound) -> Result<(), Error> {
        // What a replica that was stopped finds in its socket is not taken in, and the goodbye says why.
        self.control.still_fresh(&self.entry)?;
        let caller = self.control.admit_node_as(peer, device_id)?;
        if let Some(end) = self.entry.outbox.end() {
            return Err(Refusal::SessionEnded { code: end.as_str() }.into());
        }
        // What is taken in may wait for a commit; the node is not silent meanwhile.
        let _working = self.entry.work();
        match message {
            Inbound::Heartbeat { sequence } => self.answer(Waiting::Heartbeat(sequence)),
            // The delivery is known by the record; an acknowledgement is a sign of life and nothing more.
            Inbound::Ack { .. } => {}
            Inbound::Leave => self.control.end_session(&self.entry, End::Left),
            Inbound::Result(completion) => self.complete(caller, completion).await?,
            Inbound::Mediation {
                dispatch_id,
                epoch,
                waiting,
                request_id,
                prompt,
                host,
            } => {
                let asked = waiting.then_some((prompt, host));
                let outcome = self
                    .control
                    .mediate(&caller, &request_id, &dispatch_id, epoch, asked)
                    .await;
                if let Err(error) = outcome {
                    // The node cannot do anything about it; the dispatch shows the state that was reached.
                    tracing::debug!(dispatch_id, cause = %error, "mediation refused");
                }
            }
            Inbound::Output(output) => self.control.take_output(&self.entry, output)?,
            Inbound::Worker(message) => self.hear_worker(caller, message).await?,
        }
        Ok(())
    }

    async fn complete(&self, caller: Caller, completion: Completion) -> Result<(), Error> {
        let closed = || Refusal::SessionEnded {
            code: End::Disconnected.as_str(),
        };
        let permit = Arc::clone(&self.results)
            .acquire_owned()
            .await
            .map_err(|_| closed())?;
        let dispatch_id = crate::selector::parse_id("dispatch_id", &completion.dispatch_id)?;
        let (control, entry) = (self.control.clone(), Arc::clone(&self.entry));
        // A replica that stops waits for it.
        let counted = Arc::clone(self.control.committing()).try_acquire_owned().ok();
        platform::spawn(async move {
            let outcome = control.complete(&caller, completion).await;
            let answer = result_answer(dispatch_id, &outcome);
            if !entry.outbox.put(Waiting::Result(answer)) {
                control.end_session(&entry, End::SlowReader);
            }
            drop((permit, counted));
        })
        .detach();
        Ok(())
    }

    fn answer(&self, message: Waiting) {
        if !self.entry.outbox.put(message) {
            self.control.end_session(&self.entry, End::SlowReader);
        }
    }

    /// Whether the session is over.
    pub(crate) fn has_ended(&self) -> bool {
        self.entry.outbox.end().is_some()
    }

    /// Ends the session because the node broke the protocol; the goodbye says so.
    pub fn refuse(&self) {
        self.control.end_session(&self.entry, End::Protocol);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.entry.release();
        match self.entry.outbox.end() {
            None => self.control.end_session(&self.entry, End::Disconnected),
            Some(end) => self.control.settle_end(&self.entry, end),
        }
    }
}

impl Outgoing {
    /// The next message for the node; `None` after the goodbye. Safe to cancel.
    pub async fn next(&self) -> Option<Outbound> {
        loop {
            let taken = self.entry.outbox.take().await;
            match self.control.unpack(&self.entry, taken) {
                Unpacked::Message(message @ Outbound::Goodbye { .. }) => return Some(message),
                Unpacked::Message(message) => {
                    if self.control.still_fresh(&self.entry).is_ok() {
                        return Some(message);
                    }
                    // What it was stays bound to the session; the goodbye comes next.
                }
                Unpacked::Nothing => {}
                Unpacked::Over => return None,
            }
        }
    }
}

pub(crate) enum Unpacked {
    Message(Outbound),
    /// What waited is not wanted any more.
    Nothing,
    Over,
}

impl Control {
    /// Turns what waited into a message; an assignment is read from the state now.
    pub(crate) fn unpack(&self, entry: &Entry, taken: Taken) -> Unpacked {
        match taken {
            Taken::Over => Unpacked::Over,
            Taken::Goodbye(end) => Unpacked::Message(Outbound::Goodbye {
                end,
                pace: end.pace(),
            }),
            Taken::Message(Waiting::Heartbeat(sequence)) => {
                Unpacked::Message(Outbound::Heartbeat { sequence })
            }
            Taken::Message(Waiting::Result(answer)) => Unpacked::Message(Outbound::Result(answer)),
            Taken::Message(Waiting::Trust) => Unpacked::Message(Outbound::Trust(self.trust_update())),
            Taken::Message(Waiting::Cancel {
                dispatch_id,
                reason,
                confirm,
            }) => Unpacked::Message(Outbound::Cancel {
                dispatch_id,
                reason,
                confirm,
            }),
            Taken::Message(Waiting::Rotate {
                index,
                reason,
                deadline_at_ms,
            }) => Unpacked::Message(Outbound::Rotate {
                index,
                reason,
                deadline_at_ms,
            }),
            Taken::Message(Waiting::Worker(message)) => Unpacked::Message(Outbound::Worker(message)),
            Taken::Message(Waiting::Chunk(ask)) => {
                Unpacked::Message(Outbound::Worker(Box::new(self.chunk(entry, *ask))))
            }
            Taken::Message(Waiting::Offer(id)) => match self.lease_offer(entry, id) {
                Some(offer) => Unpacked::Message(Outbound::Worker(Box::new(offer))),
                None => Unpacked::Nothing,
            },
            Taken::Message(Waiting::Assign(id)) => match self.assignment(entry, id) {
                Some(assignment) => Unpacked::Message(Outbound::Assignment(assignment)),
                None => Unpacked::Nothing,
            },
        }
    }

    fn assignment(&self, entry: &Entry, id: Id) -> Option<Assignment> {
        let view = self.replica().view();
        let open = dispatch::dispatch(&view, id)?;
        // What is wanted back already is told apart from it.
        let wanted = !open.state().is_terminal() && open.state() != dispatch::State::Cancelling;
        if !wanted || open.epoch != entry.epoch() {
            return None;
        }
        Some(Assignment {
            dispatch_id: id,
            epoch: open.epoch,
            effect: open.effect().as_str(),
            capability: open.capability,
            payload: dispatch::payload(&view, id)?,
            deadline_at_ms: open.deadline_at,
            remaining_ms: open.deadline_at.saturating_sub(self.now_ms(&view)),
            attempt: open.attempt,
        })
    }
}

/// What to tell the node about a result.
pub(crate) fn result_answer(dispatch_id: Id, outcome: &Result<bool, Error>) -> ResultAnswer {
    let error = outcome.as_ref().err();
    ResultAnswer {
        dispatch_id,
        accepted: error.is_none(),
        error_code: error.map(Error::code).unwrap_or_default(),
        error_message: error.map(ToString::to_string).unwrap_or_default(),
        retry: error.is_some_and(|error| error.is_retryable() || is_rebinding(error)),
        late: matches!(outcome, Ok(true)),
    }
}

/// The node held the result while its session, or the certificate of it, changed; it attaches again, names it as
/// held, and reports it anew.
fn is_rebinding(error: &Error) -> bool {
    use palyra_state::Code::{CertificateSuperseded, EpochStale};
    matches!(error, Error::Rejected(reject) if matches!(reject.kind(), EpochStale | CertificateSuperseded))
}
