//! Leases, for operators: look, and revoke.

use palyra_state::leases::{self as records, Lease, LeaseState, RevokeLease, Scope};
use palyra_state::{Code, Id, Read, Reject};

use super::runs::device_name;
use crate::caller::Caller;
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo};
use crate::dispatch::{Page, next_page, page_size};
use crate::error::Error;
use crate::selector;

/// A lease with what lies beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct LeaseView {
    /// The record.
    pub record: Lease,
    /// The name of its worker.
    pub worker_name: String,
    /// Where its run may read and write.
    pub scope: Option<Scope>,
}

/// Which leases to list.
#[derive(Debug, Clone, Default)]
pub struct LeaseFilter {
    /// Of this worker, by id, prefix or name; empty: all.
    pub worker: String,
    /// `granted`, `active`, `ending`, `ended`, `live` or `all`; empty: live.
    pub state: String,
    /// From the one after this id on.
    pub after: String,
    /// How many; 0: 500.
    pub limit: u32,
}

impl Control {
    /// One lease, by id or prefix.
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is no such lease, and what a read can say.
    pub async fn get_lease(&self, read: ReadOptions, id: &str) -> Result<(LeaseView, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        let id = selector::lease_id(&view, id)?;
        Ok((lease_view(&view, id)?, info))
    }

    /// Leases by id.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad filter, and what a read can say.
    pub async fn list_leases(
        &self,
        read: ReadOptions,
        filter: &LeaseFilter,
    ) -> Result<Page<LeaseView>, Error> {
        let (view, info) = self.read(read).await?;
        let wanted = wanted(&filter.state)?;
        let worker = if filter.worker.is_empty() {
            None
        } else {
            Some(selector::device(&view, &filter.worker)?)
        };
        let limit = page_size(filter.limit);
        let mut after = crate::dispatch::page_start(&filter.after)?;
        let mut items: Vec<Lease> = Vec::new();
        while items.len() <= limit {
            let page = records::leases(&view, after, limit + 1);
            let Some(last) = page.last() else { break };
            after = Some(last.id);
            items.extend(page.into_iter().filter(|lease| {
                worker.is_none_or(|worker| lease.worker_id == worker) && wanted.contains(&lease.state())
            }));
        }
        let next = next_page(&mut items, limit, |lease| lease.id.to_string());
        Ok(Page {
            items: items
                .into_iter()
                .map(|record| with_names(&view, record))
                .collect(),
            next,
            read: info,
        })
    }

    /// Ends a lease. The caller has been admitted as operator.
    ///
    /// # Errors
    /// What the state machine refuses: it is over, or there is none.
    pub async fn revoke_lease(
        &self,
        caller: &Caller,
        request_id: &str,
        id: &str,
        reason: &str,
    ) -> Result<(LeaseView, WriteInfo), Error> {
        let request_id = self.request_id(request_id)?;
        let lease_id = match Id::parse(id) {
            Some(id) => id,
            None => {
                self.barrier().await?;
                selector::lease_id(&self.replica().view(), id)?
            }
        };
        let revoke = RevokeLease {
            lease_id,
            reason: reason.to_owned(),
        };
        let written = self.propose(request_id, caller.actor(), revoke).await?;
        self.applied(written.receipt).await?;
        Ok((lease_view(&self.replica().view(), lease_id)?, written.info))
    }
}

fn wanted(state: &str) -> Result<Vec<LeaseState>, Error> {
    let one = LeaseState::parse(state).map(|state| vec![state]);
    match (one, state) {
        (Some(one), _) => Ok(one),
        (None, "" | "live") => Ok(vec![LeaseState::Granted, LeaseState::Active, LeaseState::Ending]),
        (None, "all") => Ok(LeaseState::ALL.to_vec()),
        (None, other) => {
            let shown: String = other.chars().take(32).collect();
            Err(Error::invalid(
                "state",
                format!("{shown:?} is no state"),
                "use granted, active, ending, ended, live or all",
            ))
        }
    }
}

pub(super) fn lease_view(view: &dyn Read, id: Id) -> Result<LeaseView, Error> {
    let record = records::lease(view, id).ok_or_else(|| Reject::new(Code::NoSuchLease, [&id]))?;
    Ok(with_names(view, record))
}

pub(super) fn with_names(view: &dyn Read, record: Lease) -> LeaseView {
    LeaseView {
        worker_name: device_name(view, record.worker_id),
        scope: records::run(view, record.run_id).and_then(|run| run.scope),
        record,
    }
}
