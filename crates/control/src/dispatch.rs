//! Dispatches: submit, wait, look, cancel, and what nodes report.
//!
//! What never lives here: delivery (`feed` and `sessions`) and deadlines (`reconcile`).
//! Invariants: accepted means committed; a wait is answered from the state and never from memory; payloads
//! and results are JSON before they reach the log.

use std::time::Duration;

use bytes::Bytes;
use palyra_state::dispatch::{
    self as records, AwaitMediation, Cancel, Complete, Dispatch, Failure, Outcome, ResumeFromMediation,
    State, Submit,
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
    /// `succeeded`, `failed` or `rejected`.
    pub outcome: String,
    /// The result, JSON; may be empty unless it succeeded.
    pub payload: Bytes,
    /// Short and stable, when it failed.
    pub error_code: String,
    /// For people, when it failed.
    pub error_message: String,
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
        let device_id = self.resolve_device(&invoke.device).await?;
        let dispatch_id = self.fresh_id();
        let submit = Submit {
            dispatch_id,
            device_id,
            capability: invoke.capability,
            payload: invoke.payload,
            timeout_ms: invoke.timeout_ms,
        };
        let written = self.propose(request_id, caller.actor(), submit).await?;
        let Reply::Submitted(submitted) = written.reply else {
            return Err(self.odd_reply("dispatch.submit"));
        };
        self.applied(written.index).await?;
        // Submitted and committed: from here on only the view of it can be missing, when it was forgotten
        // long ago.
        let seen = view_of(&self.replica().view(), submitted.dispatch_id)?;
        let duplicate = submitted.dispatch_id != dispatch_id;
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

    /// Waits until a dispatch has ended, or `wait_ms` (at most 300,000) are over; answers it as it is then.
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is no such dispatch; [`Error::Busy`]; [`Error::Stale`] as soon as this
    /// replica is cut off, for it would not hear of the end.
    pub async fn wait_dispatch(&self, id: &str, wait_ms: u64) -> Result<(DispatchView, ReadInfo), Error> {
        self.barrier().await?;
        let id = selector::dispatch_id(&self.replica().view(), id)?;
        self.wait_submitted(id, wait_ms).await
    }

    /// As [`Control::wait_dispatch`], for a dispatch that this replica is known to have applied.
    ///
    /// # Errors
    /// As [`Control::wait_dispatch`].
    pub async fn wait_submitted(&self, id: Id, wait_ms: u64) -> Result<(DispatchView, ReadInfo), Error> {
        let wait = bounded_wait(wait_ms, Duration::ZERO, DISPATCH_WAIT_MAX);
        let seen = self.waiters().until(id, wait, || {
            let view = self.replica().view();
            let found = records::dispatch(&view, id);
            let over = found.is_none_or(|dispatch| dispatch.state().is_terminal());
            (view, over || self.check_fresh().is_err())
        });
        let view = seen.await?;
        let seen = view_of(&view, id)?;
        if !seen.record.state().is_terminal() {
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
            items: items.into_iter().map(bare).collect(),
            next,
            read: info,
        })
    }

    /// Takes an open dispatch back.
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
        self.applied(written.index).await?;
        Ok((view_of(&self.replica().view(), dispatch_id)?, written.info))
    }

    /// Commits what a node reports. The caller has been admitted as node.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no JSON or no outcome; what the state machine refuses: foreign, late,
    /// twice, of another session.
    pub async fn complete(&self, caller: &Caller, completion: Completion) -> Result<WriteInfo, Error> {
        let request_id = self.request_id(&completion.request_id)?;
        let dispatch_id = selector::parse_id("dispatch_id", &completion.dispatch_id)?;
        let outcome = Outcome::parse(&completion.outcome).ok_or_else(|| {
            let shown: String = completion.outcome.chars().take(32).collect();
            Error::invalid(
                "outcome",
                format!("{shown:?} is no outcome"),
                "send succeeded, failed or rejected",
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
        };
        Ok(self.propose(request_id, caller.actor(), complete).await?.info)
    }

    /// Commits that a person must act, or has acted.
    pub(crate) async fn mediate(
        &self,
        caller: &Caller,
        request_id: &str,
        dispatch_id: &str,
        epoch: u64,
        waiting: bool,
    ) -> Result<(), Error> {
        let request_id = self.request_id(request_id)?;
        let dispatch_id = selector::parse_id("dispatch_id", dispatch_id)?;
        if waiting {
            self.propose(request_id, caller.actor(), AwaitMediation { dispatch_id, epoch })
                .await?;
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

fn bad_state(text: &str) -> Error {
    let names: Vec<&str> = State::ALL.iter().map(|state| state.as_str()).collect();
    let shown: String = text.chars().take(32).collect();
    Error::invalid(
        "state",
        format!("{shown:?} is no state"),
        format!("use one of {}", names.join(", ")),
    )
}

fn view_of(view: &dyn Read, id: Id) -> Result<DispatchView, Error> {
    let record = records::dispatch(view, id).ok_or_else(|| Reject::new(Code::NoSuchDispatch, [&id]))?;
    let payload = records::payload(view, id).unwrap_or_default();
    let result = records::result(view, id).unwrap_or_default();
    Ok(DispatchView {
        record,
        payload,
        result,
    })
}

fn bare(record: Dispatch) -> DispatchView {
    DispatchView {
        record,
        payload: Bytes::new(),
        result: Bytes::new(),
    }
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
