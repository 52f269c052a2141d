//! Runs, for operators: start, files in and out, look, wait, cancel.
//!
//! What never lives here: grants (`approvals`), and who gets a run (`apply`). Invariants: accepted means
//! committed; a wait is answered from the state; parameters are JSON before they reach the log; a piece of a
//! file is bounded.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use palyra_state::dispatch::Effect;
use palyra_state::fleet::Evidence;
use palyra_state::leases::{
    self, CancelRun, Limits, Manifest, PutArtifact, Run, RunState, Scope, StartRun, Waits,
};
use palyra_state::{Code, Digest, Id, Read, Reject, Reply, identity, limits};

use super::delivery::piece;
use super::session::digest_of;
use crate::caller::Caller;
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo, bounded_wait};
use crate::dispatch::{Page, next_page, page_size, page_start};
use crate::error::Error;
use crate::limits::DISPATCH_WAIT_MAX;
use crate::selector;

/// What an operator wants run.
#[derive(Debug, Clone, Default)]
pub struct Start {
    /// A ULID, the same for each try; empty for a fresh one.
    pub request_id: String,
    /// The run, as its grant names it.
    pub run_id: String,
    /// The tool.
    pub tool: String,
    /// Its input, JSON.
    pub params: Bytes,
    /// Input files.
    pub inputs: Option<Manifest>,
    /// Where it may read and write.
    pub scope: Option<Scope>,
    /// What it may use.
    pub limits: Option<Limits>,
    /// `once` or `idempotent`; empty: once.
    pub effect: String,
    /// Attempts in all; 0: as the effect has it.
    pub max_attempts: u32,
    /// Of its leases; 0: 30 s.
    pub ttl_ms: u64,
    /// Of the run; 0: 10 min.
    pub timeout_ms: u64,
    /// `self-reported`, `supervisor` or `hardware`; empty: as the policy has it.
    pub min_evidence: String,
    /// Of the worker's node.
    pub labels: BTreeMap<String, String>,
}

/// A run with what lies beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct RunView {
    /// The record.
    pub record: Run,
    /// Its input; empty in lists.
    pub params: Bytes,
    /// Its result; empty in lists and while there is none.
    pub result: Bytes,
    /// What its program wrote last; empty in lists and until it has ended.
    pub log_tail: Bytes,
    /// The name of its worker.
    pub worker_name: String,
    /// Input files that have not arrived.
    pub missing: Vec<Digest>,
    /// What it waits for, in words; empty when it does not wait.
    pub waits_for: String,
    /// While a lease of it must run out: when it has.
    pub fence_past_at: u64,
}

/// Which runs to list.
#[derive(Debug, Clone, Default)]
pub struct RunFilter {
    /// In this state; empty: all.
    pub state: String,
    /// Of this worker, by id, prefix or name; empty: all.
    pub worker: String,
    /// From the one after this id on.
    pub after: String,
    /// How many; 0: 500.
    pub limit: u32,
}

/// A piece of an input file.
#[derive(Debug, Clone, Default)]
pub struct Put {
    /// A ULID, the same for each try; empty for a fresh one.
    pub request_id: String,
    /// The run.
    pub run_id: String,
    /// SHA-256 of the whole file.
    pub digest: Bytes,
    /// Its size.
    pub size: u64,
    /// Where the piece begins.
    pub offset: u64,
    /// The piece.
    pub chunk: Bytes,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct PieceTaken {
    /// Bytes of the file that have arrived.
    pub received: u64,
    /// All of it.
    pub complete: bool,
    /// The run, as it is then.
    pub run: RunView,
    /// The entry.
    pub write: WriteInfo,
}

/// A piece of a file that is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePiece {
    /// Of the whole file.
    pub size: u64,
    /// Where it begins.
    pub offset: u64,
    /// The piece.
    pub chunk: Bytes,
}

impl Control {
    /// Starts the run of a grant. The caller has been admitted as operator.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no JSON, no id or no word; what the state machine refuses: no grant, another's,
    /// used.
    pub async fn start_run(&self, caller: &Caller, start: Start) -> Result<(RunView, WriteInfo), Error> {
        let request_id = self.request_id(&start.request_id)?;
        if start.params.len() > limits::RUN_PARAMS {
            return Err(
                Reject::new(Code::PayloadTooLarge, [&start.params.len(), &limits::RUN_PARAMS]).into(),
            );
        }
        if !start.params.is_empty() {
            crate::json::check("params", &start.params)?;
        }
        let effect = match start.effect.as_str() {
            "" => Effect::Once,
            text => Effect::parse(text)
                .ok_or_else(|| bad_word("effect", text, "use once or idempotent".to_owned()))?,
        };
        let min_evidence = Evidence::parse(&start.min_evidence).ok_or_else(|| {
            let next = "use self-reported, supervisor or hardware".to_owned();
            bad_word("min_evidence", &start.min_evidence, next)
        })?;
        let run_id = selector::parse_id("run_id", &start.run_id)?;
        let command = StartRun {
            run_id,
            tool: start.tool,
            params: start.params,
            inputs: start.inputs,
            scope: start.scope,
            limits: start.limits,
            effect: effect as i32,
            max_attempts: start.max_attempts,
            ttl_ms: start.ttl_ms,
            timeout_ms: start.timeout_ms,
            min_evidence: min_evidence as i32,
            labels: start.labels,
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        let Reply::RunStarted(started) = written.reply else {
            return Err(self.odd_reply("leases.start_run"));
        };
        self.applied(written.receipt).await?;
        Ok((run_view(&self.replica().view(), started.run_id)?, written.info))
    }

    /// Takes a piece of an input file. The caller has been admitted as operator.
    ///
    /// # Errors
    /// What the state machine refuses: no such file, out of order, another's run, a file that has another digest.
    pub async fn put_artifact(&self, caller: &Caller, put: Put) -> Result<PieceTaken, Error> {
        let request_id = self.request_id(&put.request_id)?;
        if put.chunk.len() > limits::ARTIFACT_CHUNK {
            let next = format!("send pieces of {} bytes", limits::ARTIFACT_CHUNK);
            return Err(Error::invalid(
                "chunk",
                format!("it has {} bytes", put.chunk.len()),
                next,
            ));
        }
        let run_id = self.find_run(&put.run_id).await?;
        let command = PutArtifact {
            run_id,
            digest: digest_of(&put.digest)?,
            size: put.size,
            offset: put.offset,
            chunk: put.chunk,
            lease_id: None,
            fence: 0,
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        let Reply::ArtifactReceived(received) = written.reply else {
            return Err(self.odd_reply("leases.put_artifact"));
        };
        if let Some(refusal) = received.refusal {
            return Err(refusal.into());
        }
        self.applied(written.receipt).await?;
        Ok(PieceTaken {
            received: received.received,
            complete: received.complete,
            run: run_view(&self.replica().view(), run_id)?,
            write: written.info,
        })
    }

    /// Which run and file a reader means, and how large the file is: what [`Control::read_artifact`] takes.
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is no such run or file, or it has not arrived; what a read can say.
    pub async fn find_artifact(
        &self,
        read: ReadOptions,
        run: &str,
        digest: &[u8],
    ) -> Result<(Id, Digest, u64), Error> {
        let (view, _) = self.read(read).await?;
        let run_id = selector::run_id(&view, run)?;
        let digest = digest_of(digest)?;
        let (size, _) = piece(&view, run_id, digest, 0)?;
        Ok((run_id, digest, size))
    }

    /// One piece of a file of a run, as this replica has it.
    ///
    /// # Errors
    /// [`Error::Rejected`] when the run was forgotten meanwhile.
    pub fn read_artifact(&self, run_id: Id, digest: Digest, offset: u64) -> Result<FilePiece, Error> {
        let (size, chunk) = piece(&self.replica().view(), run_id, digest, offset)?;
        Ok(FilePiece { size, offset, chunk })
    }

    /// One run, by id or prefix.
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is no such run, and what a read can say.
    pub async fn get_run(&self, read: ReadOptions, id: &str) -> Result<(RunView, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        let id = selector::run_id(&view, id)?;
        Ok((run_view(&view, id)?, info))
    }

    /// Runs by id, without parameters and results.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad filter, and what a read can say.
    pub async fn list_runs(&self, read: ReadOptions, filter: &RunFilter) -> Result<Page<RunView>, Error> {
        let (view, info) = self.read(read).await?;
        let state = match filter.state.as_str() {
            "" => None,
            text => Some(RunState::parse(text).ok_or_else(|| bad_state(text))?),
        };
        let limit = page_size(filter.limit);
        let after = page_start(&filter.after)?;
        let mut items = if filter.worker.is_empty() {
            match state {
                Some(state) => leases::runs_in_state(&view, state, after, limit + 1),
                None => leases::runs(&view, after, limit + 1),
            }
        } else {
            let worker = selector::device(&view, &filter.worker)?;
            let kept = limits::RUNS_ENDED as usize;
            let mut found = leases::runs_of_worker(&view, worker, kept);
            found.retain(|run| after.is_none_or(|after| run.id > after));
            found.retain(|run| state.is_none_or(|state| run.state() == state));
            found.sort_by_key(|run| run.id);
            found
        };
        let next = next_page(&mut items, limit, |run| run.id.to_string());
        Ok(Page {
            items: items.into_iter().map(|record| bare(&view, record)).collect(),
            next,
            read: info,
        })
    }

    /// Waits until a run has ended, or, with a `known` state, until it is in another one; `wait_ms` (at most
    /// 300,000) at most. Answers it as it is then.
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is no such run; [`Error::Busy`]; [`Error::Stale`] as soon as this replica is cut
    /// off.
    pub async fn wait_run(&self, id: &str, wait_ms: u64, known: &str) -> Result<(RunView, ReadInfo), Error> {
        let known = match known {
            "" => None,
            text => Some(RunState::parse(text).ok_or_else(|| bad_state(text))?),
        };
        self.barrier().await?;
        let id = selector::run_id(&self.replica().view(), id)?;
        let moved = |state: RunState| match known {
            Some(known) => known != state || state.is_terminal(),
            None => state.is_terminal(),
        };
        let wait = bounded_wait(wait_ms, Duration::ZERO, DISPATCH_WAIT_MAX);
        let seen = self.waiters().until(id, wait, || {
            let view = self.replica().view();
            let over = leases::run(&view, id).is_none_or(|run| moved(run.state()));
            (view, over || self.check_fresh().is_err())
        });
        let view = seen.await?;
        let seen = run_view(&view, id)?;
        if !moved(seen.record.state()) {
            self.check_fresh()?;
        }
        Ok((seen, self.read_info(view.index())))
    }

    /// Takes a run back. One that is leased is not over with this answer: wait for its end.
    ///
    /// # Errors
    /// What the state machine refuses: it has ended, or there is none.
    pub async fn cancel_run(
        &self,
        caller: &Caller,
        request_id: &str,
        id: &str,
        reason: &str,
    ) -> Result<(RunView, WriteInfo), Error> {
        let request_id = self.request_id(request_id)?;
        let run_id = self.find_run(id).await?;
        let cancel = CancelRun {
            run_id,
            reason: reason.to_owned(),
        };
        let written = self.propose(request_id, caller.actor(), cancel).await?;
        self.applied(written.receipt).await?;
        Ok((run_view(&self.replica().view(), run_id)?, written.info))
    }

    /// The run that a selector names. What is no full id, or is not known here, is looked up in a linearizable
    /// view.
    pub(super) async fn find_run(&self, id: &str) -> Result<Id, Error> {
        let known = Id::parse(id).filter(|id| leases::run(&self.replica().view(), *id).is_some());
        if let Some(id) = known {
            return Ok(id);
        }
        self.barrier().await?;
        selector::run_id(&self.replica().view(), id)
    }
}

fn bad_word(field: &'static str, text: &str, next: String) -> Error {
    let shown: String = text.chars().take(32).collect();
    Error::invalid(field, format!("{shown:?} is none"), next)
}

fn bad_state(text: &str) -> Error {
    let names: Vec<&str> = RunState::ALL.iter().map(|state| state.as_str()).collect();
    bad_word("state", text, format!("use one of {}", names.join(", ")))
}

pub(super) fn run_view(view: &dyn Read, id: Id) -> Result<RunView, Error> {
    let record = leases::run(view, id).ok_or_else(|| Reject::new(Code::NoSuchRun, [&id]))?;
    Ok(RunView {
        params: leases::params(view, id).unwrap_or_default(),
        result: leases::result(view, id).unwrap_or_default(),
        log_tail: leases::log_tail(view, id).unwrap_or_default(),
        ..bare(view, record)
    })
}

fn bare(view: &dyn Read, record: Run) -> RunView {
    let waits = leases::waits_for(view, &record);
    let (mut missing, mut fence_past_at) = (Vec::new(), 0);
    let waits_for = match waits {
        Waits::Nothing => String::new(),
        Waits::Input(digests) => {
            let text = format!("{} of its input files", digests.len());
            missing = digests;
            text
        }
        Waits::Worker { trusted: false, .. } => format!(
            "a policy that trusts the tool {}: palyra worker policy show",
            record.tool
        ),
        Waits::Worker { ahead, free: 0, .. } => {
            format!(
                "a worker that offers {}: none is free; {ahead} runs are before it",
                record.tool
            )
        }
        Waits::Worker { ahead, free, .. } => format!(
            "a worker that fits: {free} free ones offer {}, without its labels or evidence; {ahead} runs are before it",
            record.tool
        ),
        Waits::Fence { until } => {
            fence_past_at = until;
            "its last worker, which is to clean up; at the latest until its lease has run out".to_owned()
        }
    };
    RunView {
        params: Bytes::new(),
        result: Bytes::new(),
        log_tail: Bytes::new(),
        worker_name: record
            .worker_id
            .map(|id| device_name(view, id))
            .unwrap_or_default(),
        missing,
        waits_for,
        fence_past_at,
        record,
    }
}

/// The name of a worker's device; empty when it was removed.
pub(super) fn device_name(view: &dyn Read, id: Id) -> String {
    identity::device(view, id)
        .map(|device| device.name)
        .unwrap_or_default()
}
