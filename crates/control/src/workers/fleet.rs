//! Workers, for operators: look, quarantine, reverify, drain, release, clean, reap.
//!
//! What never lives here: what follows from a decision (`apply`). Invariant: a selector names exactly one worker.

use std::time::Duration;

use palyra_state::fleet::{self as records, Lifecycle, Snapshot, Worker};
use palyra_state::leases::{self, RunState, Totals};
use palyra_state::{Code, Command, Id, Read, Reject, Reply, nodes};

use super::leases::{LeaseView, with_names};
use super::runs::device_name;
use crate::caller::{Caller, millis};
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo};
use crate::dispatch::{Page, next_page, page_size, page_start};
use crate::error::Error;
use crate::selector;

/// A worker with what lies beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerView {
    /// The record.
    pub record: Worker,
    /// Name of its device.
    pub name: String,
    /// Its node's session: epoch and replica; 0 when there is none.
    pub session: (u64, u64),
    /// Its leases that have not ended; only of one worker.
    pub leases: Vec<LeaseView>,
}

/// The fleet at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct FleetView {
    /// Workers and slots.
    pub workers: Snapshot,
    /// Leases and runs.
    pub leases: Totals,
}

/// What an operator decides of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerAct {
    /// Gives it nothing any more and ends its leases.
    Quarantine,
    /// Wants it to attest again.
    Reverify,
    /// Takes a drain back.
    Release,
    /// Gives it nothing new; ends what runs at the deadline, or at once.
    Drain {
        /// From now; zero: an hour.
        deadline: Duration,
        /// At once.
        force: bool,
    },
    /// Has it clean up again.
    Cleanup {
        /// Takes the operator's word that it is clean.
        force: bool,
    },
}

/// What a reap came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reaped {
    /// Leases and runs that were ended, because they were due.
    pub leases: usize,
    /// Workers that were forgotten.
    pub workers: u64,
    /// The entry.
    pub write: WriteInfo,
}

impl Control {
    /// Workers by id; `lifecycle` may be empty.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad lifecycle or page, and what a read can say.
    pub async fn list_workers(
        &self,
        read: ReadOptions,
        lifecycle: &str,
        after: &str,
        limit: u32,
    ) -> Result<Page<WorkerView>, Error> {
        let (view, info) = self.read(read).await?;
        let wanted = match lifecycle {
            "" => None,
            text => Some(Lifecycle::parse(text).ok_or_else(|| bad_lifecycle(text))?),
        };
        let (limit, after) = (page_size(limit), page_start(after)?);
        let mut items = match wanted {
            Some(state) => records::by_lifecycle(&view, state, after, limit + 1),
            None => records::workers(&view, after, limit + 1),
        };
        let next = next_page(&mut items, limit, |worker| worker.id.to_string());
        Ok(Page {
            items: items.into_iter().map(|record| bare(&view, record)).collect(),
            next,
            read: info,
        })
    }

    /// One worker, by id, prefix or name.
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is none, and what a read can say.
    pub async fn get_worker(
        &self,
        read: ReadOptions,
        selector: &str,
    ) -> Result<(WorkerView, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        let id = selector::worker(&view, selector)?;
        Ok((worker_view(&view, id)?, info))
    }

    /// Counts of the whole fleet.
    ///
    /// # Errors
    /// What a read can say.
    pub async fn fleet(&self, read: ReadOptions) -> Result<(FleetView, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        let mut leases = leases::totals(&view);
        leases.runs.resize(RunState::ALL.len(), 0);
        let fleet = FleetView {
            workers: records::snapshot(&view),
            leases,
        };
        Ok((fleet, info))
    }

    /// Carries out what an operator decides of a worker. The caller has been admitted as operator.
    ///
    /// # Errors
    /// What the state machine refuses: no such worker, nothing to take back, no reason.
    pub async fn decide_worker(
        &self,
        caller: &Caller,
        request_id: &str,
        selector: &str,
        reason: &str,
        act: WorkerAct,
    ) -> Result<(WorkerView, WriteInfo), Error> {
        let request_id = self.request_id(request_id)?;
        let worker_id = match Id::parse(selector) {
            Some(id) => id,
            None => {
                self.barrier().await?;
                selector::worker(&self.replica().view(), selector)?
            }
        };
        let command = command(worker_id, reason.to_owned(), act);
        let written = self.propose(request_id, caller.actor(), command).await?;
        self.applied(written.receipt).await?;
        Ok((worker_view(&self.replica().view(), worker_id)?, written.info))
    }

    /// Ends what is due now, and forgets workers that have been away for `older_than_ms` (0: a day) and hold
    /// nothing. The caller has been admitted as operator.
    ///
    /// # Errors
    /// What the state machine refuses.
    pub async fn reap_workers(
        &self,
        caller: &Caller,
        request_id: &str,
        older_than_ms: u64,
    ) -> Result<Reaped, Error> {
        let request_id = self.request_id(request_id)?;
        self.barrier().await?;
        // What has run out holds slots of those that are to go.
        let leases = self.expire_leases().await?;
        let reap = records::Reap { older_than_ms };
        let written = self.propose(request_id, caller.actor(), reap).await?;
        let Reply::Counted(counted) = written.reply else {
            return Err(self.odd_reply("fleet.reap"));
        };
        self.applied(written.receipt).await?;
        Ok(Reaped {
            leases,
            workers: counted.count.into(),
            write: written.info,
        })
    }
}

fn command(worker_id: Id, reason: String, act: WorkerAct) -> Command {
    match act {
        WorkerAct::Quarantine => records::Quarantine { worker_id, reason }.into(),
        WorkerAct::Reverify => records::Reverify { worker_id, reason }.into(),
        WorkerAct::Release => records::Release { worker_id, reason }.into(),
        WorkerAct::Drain { deadline, force } => {
            let deadline_ms = millis(deadline);
            records::Drain {
                worker_id,
                reason,
                deadline_ms,
                force,
            }
            .into()
        }
        WorkerAct::Cleanup { force } => records::Cleanup {
            worker_id,
            reason,
            force,
        }
        .into(),
    }
}

fn bad_lifecycle(text: &str) -> Error {
    let names: Vec<&str> = Lifecycle::ALL.iter().map(|state| state.as_str()).collect();
    let shown: String = text.chars().take(32).collect();
    Error::invalid(
        "lifecycle",
        format!("{shown:?} is none"),
        format!("use one of {}", names.join(", ")),
    )
}

fn worker_view(view: &dyn Read, id: Id) -> Result<WorkerView, Error> {
    let record = records::worker(view, id).ok_or_else(|| Reject::new(Code::NoSuchWorker, [&id]))?;
    let leases = leases::live_of(view, id);
    Ok(WorkerView {
        leases: leases.into_iter().map(|lease| with_names(view, lease)).collect(),
        ..bare(view, record)
    })
}

fn bare(view: &dyn Read, record: Worker) -> WorkerView {
    let session = nodes::node(view, record.id).and_then(|node| node.session);
    WorkerView {
        name: device_name(view, record.id),
        session: session.map_or((0, 0), |session| (session.epoch, session.replica_id)),
        leases: Vec::new(),
        record,
    }
}
