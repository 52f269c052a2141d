//! Dispatches: submit, wait, look, cancel, and what nodes report.
//!
//! What never lives here: delivery (`feed` and `sessions`) and deadlines (`reconcile`).
//! Invariants: accepted means committed; a wait is answered from the state and never from memory; payloads
//! and results are JSON before they reach the log.

use std::time::Duration;

use bytes::Bytes;
use palyra_state::dispatch::{
    self as records, AwaitMediation, Cancel, Complete, Dispatch, Failure, Outcome, Priority,
    ResumeFromMediation, State, Submit,
};
use palyra_state::{Code, Id, Read, Reject, Reply, limits};

use crate::caller::Caller;
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo, bounded_wait};
use crate::error::Error;
use crate::limits::DISPATCH_WAIT_MAX;
use crate::selector;

/// What an operator wants done.
#[derive(Debug, Clone)]
pub struct Invoke {
    /// A ULID, the same for each try; empty for a fresh one.
    pub request_id: String,
    /// A device id, or a prefix or name that names one.
    pub device: String,
    /// The capability.
    pub capability: String,
    /// Its input, JSON.
    pub payload: Bytes,
    /// Deadline, counted from acceptance; 0: 30 s.
    pub timeout_ms: u64,
    /// `low`, `normal` or `high`; empty for `normal`.
    pub priority: String,
    /// Most attempts, fewer than the capability declares; 0: as declared.
    pub max_attempts: u32,
}

/// A dispatch with what lies beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct DispatchView {
    /// The record.
    pub record: Dispatch,
    /// Its input; empty in lists.
    pub payload: Bytes,
    /// Its result; empty in lists and while there is none.
    pub result: Bytes,
    /// What its program wrote last; empty in lists and until it has ended.
    pub log_tail: Bytes,
    /// The name of its device.
    pub device_name: String,
    /// What it waits for, in words; empty when it does not wait.
    pub waits_for: String,
}

/// What a node reports at the end of a dispatch.
#[derive(Debug, Clone)]
pub struct Completion {
    /// A ULID, the same for each try; empty for a fresh one.
    pub request_id: String,
    /// The dispatch.
    pub dispatch_id: String,
    /// The session in which the node has it.
    pub epoch: u64,
    /// `succeeded`, `failed`, `rejected` or `cancelled`.
    pub outcome: String,
    /// The result, JSON; may be empty unless it succeeded.
    pub payload: Bytes,
    /// Short and stable, when it failed.
    pub error_code: String,
    /// For people, when it failed.
    pub error_message: String,
    /// The last lines that the program wrote.
    pub log_tail: Bytes,
    /// The attempt that it is of; 0: the present one.
    pub attempt: u32,
}

/// Which dispatches to list.
#[derive(Debug, Clone, Default)]
pub struct DispatchFilter {
    /// Of this device, by id, prefix or name; empty: all.
    pub device: String,
    /// In this state; empty: all.
    pub state: String,
    /// From the one after this id on.
    pub after: String,
    /// How many; 0: 500.
    pub limit: u32,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Page<T> {
    /// What was found.
    pub items: Vec<T>,
    /// Where the next page begins; empty when nothing follows.
    pub next: String,
    /// How fresh it is.
    pub read: ReadInfo,
}

impl Control {
    /// Submits a dispatch. The caller has been admitted as operator.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no JSON or no device, and what the state machine refuses.
    pub async fn invoke(&self, caller: &Caller, invoke: Invoke) -> Result<(DispatchView, WriteInfo), Error> {
        let request_id = self.request_id(&invoke.request_id)?;
        check_size(invoke.payload.len())?;
        crate::json::check("payload", &invoke.payload)?;
        let priority = Priority::parse(&invoke.priority).ok_or_else(|| bad_priority(&invoke.priority))?;
        let device_id = self.resolve_device(&invoke.device).await?;
        let dispatch_id = self.fresh_id();
        let submit = Submit {
            dispatch_id,
            device_id,
            capability: invoke.capability,
            payload: invoke.payload,
            timeout_ms: invoke.timeout_ms,
            priority: priority as i32,
            max_attempts: invoke.max_attempts,
        };
        let written = self.propose(request_id, caller.actor(), submit).await?;
        let Reply::Submitted(submitted) = written.reply else {
            return Err(self.odd_reply("dispatch.submit"));
        };
        self.applied(written.receipt).await?;
        // Submitted and committed: from here on only the view of it can be missing, when it was forgotten
        // long ago.
        let seen = view_of(&self.replica().view(), submitted.dispatch_id)?;
        let duplicate = written.info.duplicate || submitted.dispatch_id != dispatch_id;
        Ok((
            seen,
            WriteInfo {
                duplicate,
                ..written.info
            },
        ))
    }

    /// The device that a selector names. What is no full id is looked up in a linearizable view.
    pub(crate) async fn resolve_device(&self, device: &str) -> Result<Id, Error> {
        if let Some(id) = Id::parse(device) {
            return Ok(id);
        }
        self.barrier().await?;
        selector::device(&self.replica().view(), device)
    }

    /// Waits until a dispatch has ended, or `wait_ms` (at most 300,000) are over; answers it as it is then. With a
    /// `known` state it also waits no longer than until it is in another one.
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is no such dispatch; [`Error::Busy`]; [`Error::Stale`] as soon as this
    /// replica is cut off, for it would not hear of the end.
    pub async fn wait_dispatch(
        &self,
        id: &str,
        wait_ms: u64,
        known: &str,
    ) -> Result<(DispatchView, ReadInfo), Error> {
        let known = match known {
            "" => None,
            text => Some(State::parse(text).ok_or_else(|| bad_state(text))?),
        };
        self.barrier().await?;
        let id = selector::dispatch_id(&self.replica().view(), id)?;
        self.wait_for(id, wait_ms, known).await
    }

    /// As [`Control::wait_dispatch`], for a dispatch that this replica is known to have applied.
    ///
    /// # Errors
    /// As [`Control::wait_dispatch`].
    pub async fn wait_submitted(&self, id: Id, wait_ms: u64) -> Result<(DispatchView, ReadInfo), Error> {
        self.wait_for(id, wait_ms, None).await
    }

    async fn wait_for(
        &self,
        id: Id,
        wait_ms: u64,
        known: Option<State>,
    ) -> Result<(DispatchView, ReadInfo), Error> {
        let moved = |state: State| state.is_terminal() || known.is_some_and(|known| known != state);
        let wait = bounded_wait(wait_ms, Duration::ZERO, DISPATCH_WAIT_MAX);
        let seen = self.waiters().until(id, wait, || {
            let view = self.replica().view();
            let found = records::dispatch(&view, id);
            let over = found.is_none_or(|dispatch| moved(dispatch.state()));
            (view, over || self.check_fresh().is_err())
        });
        let view = seen.await?;
        let seen = view_of(&view, id)?;
        if !moved(seen.record.state()) {
            self.check_fresh()?;
        }
        Ok((seen, self.read_info(view.index())))
    }

    /// One dispatch, by id or prefix.
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is no such dispatch, and what a read can say.
    pub async fn get_dispatch(&self, read: ReadOptions, id: &str) -> Result<(DispatchView, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        let id = selector::dispatch_id(&view, id)?;
        Ok((view_of(&view, id)?, info))
    }

    /// Dispatches by id, oldest first, without payloads and results.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad filter, and what a read can say.
    pub async fn list_dispatches(
        &self,
        read: ReadOptions,
        filter: &DispatchFilter,
    ) -> Result<Page<DispatchView>, Error> {
        let (view, info) = self.read(read).await?;
        let state = match filter.state.as_str() {
            "" => None,
            text => Some(State::parse(text).ok_or_else(|| bad_state(text))?),
        };
        let device = if filter.device.is_empty() {
            None
        } else {
            Some(selector::device(&view, &filter.device)?)
        };
        let limit = page_size(filter.limit);
        let mut after = page_start(&filter.after)?;
        let mut items: Vec<Dispatch> = Vec::new();
        loop {
            let page = match (device, state) {
                (Some(device), _) => records::list_of_device(&view, device, after, limit),
                (None, Some(state)) => records::by_state(&view, state, after, limit),
                (None, None) => records::list(&view, after, limit),
            };
            let Some(last) = page.last() else { break };
            after = Some(last.id);
            items.extend(
                page.into_iter()
                    .filter(|found| state.is_none_or(|state| found.state() == state)),
            );
            if items.len() > limit {
                break;
            }
        }
        let next = next_page(&mut items, limit, |dispatch| dispatch.id.to_string());
        Ok(Page {
            items: items.into_iter().map(|record| bare(&view, record)).collect(),
            next,
            read: info,
        })
    }

    /// Takes an open dispatch back. One that is with its node is not over with this answer: wait for its end.
    ///
    /// # Errors
    /// What the state machine refuses: it has ended, or there is none.
    pub async fn cancel_dispatch(
        &self,
        caller: &Caller,
        request_id: &str,
        id: &str,
        reason: &str,
    ) -> Result<(DispatchView, WriteInfo), Error> {
        let request_id = self.request_id(request_id)?;
        let dispatch_id = match Id::parse(id) {
            Some(id) => id,
            None => {
                self.barrier().await?;
                selector::dispatch_id(&self.replica().view(), id)?
            }
        };
        let cancel = Cancel {
            dispatch_id,
            reason: reason.to_owned(),
        };
        let written = self.propose(request_id, caller.actor(), cancel).await?;
        self.applied(written.receipt).await?;
        Ok((view_of(&self.replica().view(), dispatch_id)?, written.info))
    }

    /// Commits what a node reports. The caller has been admitted as node. `true` when it came too late and was only
    /// noted.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no JSON or no outcome; what the state machine refuses: foreign, twice, of
    /// another session, of another attempt.
    pub async fn complete(&self, caller: &Caller, completion: Completion) -> Result<bool, Error> {
        let request_id = self.request_id(&completion.request_id)?;
        let dispatch_id = selector::parse_id("dispatch_id", &completion.dispatch_id)?;
        let outcome = Outcome::parse(&completion.outcome).ok_or_else(|| {
            let shown: String = completion.outcome.chars().take(32).collect();
            Error::invalid(
                "outcome",
                format!("{shown:?} is no outcome"),
                "send succeeded, failed, rejected or cancelled",
            )
        })?;
        check_size(completion.payload.len())?;
        if outcome == Outcome::Succeeded || !completion.payload.is_empty() {
            crate::json::check("payload", &completion.payload)?;
        }
        let error = (outcome != Outcome::Succeeded).then_some(Failure {
            code: completion.error_code,
            message: completion.error_message,
        });
        let complete = Complete {
            dispatch_id,
            epoch: completion.epoch,
            outcome: outcome as i32,
            result: completion.payload,
            error,
            log_tail: completion.log_tail,
            attempt: completion.attempt,
        };
        let written = self.propose(request_id, caller.actor(), complete).await?;
        Ok(matches!(written.reply, Reply::Late(_)))
    }

    /// Commits that a person must act, with what they are asked and at which machine; or that they have acted.
    pub(crate) async fn mediate(
        &self,
        caller: &Caller,
        request_id: &str,
        dispatch_id: &str,
        epoch: u64,
        asked: Option<(String, String)>,
    ) -> Result<(), Error> {
        let request_id = self.request_id(request_id)?;
        let dispatch_id = selector::parse_id("dispatch_id", dispatch_id)?;
        if let Some((prompt, host)) = asked {
            let wait = AwaitMediation {
                dispatch_id,
                epoch,
                prompt,
                host,
            };
            self.propose(request_id, caller.actor(), wait).await?;
        } else {
            self.propose(
                request_id,
                caller.actor(),
                ResumeFromMediation { dispatch_id, epoch },
            )
            .await?;
        }
        Ok(())
    }
}

fn check_size(size: usize) -> Result<(), Error> {
    if size > limits::PAYLOAD {
        return Err(Reject::new(Code::PayloadTooLarge, [&size, &limits::PAYLOAD]).into());
    }
    Ok(())
}

fn bad_priority(text: &str) -> Error {
    let shown: String = text.chars().take(32).collect();
    Error::invalid(
        "priority",
        format!("{shown:?} is no priority"),
        "use low, normal or high",
    )
}

fn bad_state(text: &str) -> Error {
    let names: Vec<&str> = State::ALL.iter().map(|state| state.as_str()).collect();
    let shown: String = text.chars().take(32).collect();
    Error::invalid(
        "state",
        format!("{shown:?} is no state"),
        format!("use one of {}", names.join(", ")),
    )
}

pub(crate) fn view_of(view: &dyn Read, id: Id) -> Result<DispatchView, Error> {
    let record = records::dispatch(view, id).ok_or_else(|| Reject::new(Code::NoSuchDispatch, [&id]))?;
    Ok(DispatchView {
        payload: records::payload(view, id).unwrap_or_default(),
        result: records::result(view, id).unwrap_or_default(),
        log_tail: records::log_tail(view, id).unwrap_or_default(),
        ..bare(view, record)
    })
}

fn bare(view: &dyn Read, record: Dispatch) -> DispatchView {
    let device = palyra_state::identity::device(view, record.device_id);
    DispatchView {
        payload: Bytes::new(),
        result: Bytes::new(),
        log_tail: Bytes::new(),
        device_name: device.map(|device| device.name).unwrap_or_default(),
        waits_for: waits_for(view, &record),
        record,
    }
}

/// Why a dispatch is not with its node yet. No place in the queue and no time: both would be guesses, for others may
/// be more urgent, and nobody knows how long a program takes.
fn waits_for(view: &dyn Read, record: &Dispatch) -> String {
    if record.state() != State::Queued {
        return String::new();
    }
    if record.not_before != 0 {
        return "its next attempt".to_owned();
    }
    let Some(node) = palyra_state::nodes::node(view, record.device_id) else {
        return String::new();
    };
    if node.session.is_none() {
        return "the node, which has no session".to_owned();
    }
    let (load, queue) = (
        records::load(view, record.device_id, &record.capability),
        records::queue_length(view, record.device_id),
    );
    let slots = records::capability_slots(&node, &record.capability);
    if load.bound >= slots {
        let waiting = load.waiting;
        return format!(
            "one of {slots} slots of {}, all taken; {waiting} wait",
            record.capability
        );
    }
    let (slots, waiting) = (records::device_slots(&node), queue.open - queue.bound);
    format!("one of {slots} slots of the node, all taken; {waiting} wait")
}

/// How many entries a page has.
pub(crate) fn page_size(asked: u32) -> usize {
    match asked as usize {
        0 => limits::PAGE,
        asked => asked.min(limits::PAGE_MAX),
    }
}

/// The id that a page begins after.
pub(crate) fn page_start(after: &str) -> Result<Option<Id>, Error> {
    if after.is_empty() {
        Ok(None)
    } else {
        selector::parse_id("after", after).map(Some)
    }
}

/// Cuts a page that was read one entry or more too far, and says where the next begins.
pub(crate) fn next_page<T>(items: &mut Vec<T>, limit: usize, key: impl Fn(&T) -> String) -> String {
    if items.len() <= limit {
        return String::new();
    }
    items.truncate(limit);
    items.last().map(key).unwrap_or_default()
}
