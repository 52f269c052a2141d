//! Reading approvals and grants, and what the clock and the operators of now make of them.

use std::ops::ControlFlow;

use super::{Approval, ApprovalState, Grant, GrantState, Policy, Totals};
use crate::access::{self, OperatorStatus, Role};
use crate::ids::Id;
use crate::limits;
use crate::read::Read;
use crate::tables::{self, Present, Table};

/// The approval with this id.
#[must_use]
pub fn approval(r: &dyn Read, id: Id) -> Option<Approval> {
    tables::APPROVALS.get(r, id)
}

/// The grant with this id.
#[must_use]
pub fn grant(r: &dyn Read, id: Id) -> Option<Grant> {
    tables::GRANTS.get(r, id)
}

/// The grant that a run has, or had last.
#[must_use]
pub fn grant_of_run(r: &dyn Read, run_id: Id) -> Option<Grant> {
    tables::GRANTS_OF_RUNS
        .get(r, run_id)
        .and_then(|named| grant(r, named.grant_id))
}

/// Counters of approvals and grants.
#[must_use]
pub fn totals(r: &dyn Read) -> Totals {
    tables::APPROVAL_TOTALS.get(r, ()).unwrap_or_default()
}

/// What approvals are held to.
#[must_use]
pub fn policy(r: &dyn Read) -> Policy {
    tables::APPROVAL_POLICY.get(r, ()).unwrap_or(Policy {
        four_eyes: false,
        timeout: limits::APPROVAL_TIMEOUT,
        max_timebox: limits::TIMEBOX_MAX,
        set_at: 0,
        set_by: String::new(),
    })
}

/// Approvals by id, from the one after `after` on, at most `limit`.
#[must_use]
pub fn approvals(r: &dyn Read, after: Option<Id>, limit: usize) -> Vec<Approval> {
    tables::APPROVALS.page(r, (), after, limit)
}

/// Approvals that are written as in this state, by id.
#[must_use]
pub fn approvals_by_state(
    r: &dyn Read,
    state: ApprovalState,
    after: Option<Id>,
    limit: usize,
) -> Vec<Approval> {
    let ids = tables::APPROVALS_BY_STATE.ids(r, state as u32, after, limit);
    ids.into_iter().filter_map(|id| approval(r, id)).collect()
}

/// Approvals whose id begins with `prefix` (text form, either case), at most `limit`.
#[must_use]
pub fn approvals_by_prefix(r: &dyn Read, prefix: &str, limit: usize) -> Vec<Approval> {
    let Some((first, last)) = Id::prefix_range(prefix) else {
        return Vec::new();
    };
    tables::APPROVALS.between(r, first, last, limit)
}

/// Grants by id, from the one after `after` on, at most `limit`.
#[must_use]
pub fn grants(r: &dyn Read, after: Option<Id>, limit: usize) -> Vec<Grant> {
    tables::GRANTS.page(r, (), after, limit)
}

/// Grants that are written as in this state, by id.
#[must_use]
pub fn grants_by_state(r: &dyn Read, state: GrantState, after: Option<Id>, limit: usize) -> Vec<Grant> {
    let ids = tables::GRANTS_BY_STATE.ids(r, state as u32, after, limit);
    ids.into_iter().filter_map(|id| grant(r, id)).collect()
}

/// Grants whose id begins with `prefix` (text form, either case), at most `limit`.
#[must_use]
pub fn grants_by_prefix(r: &dyn Read, prefix: &str, limit: usize) -> Vec<Grant> {
    let Some((first, last)) = Id::prefix_range(prefix) else {
        return Vec::new();
    };
    tables::GRANTS.between(r, first, last, limit)
}

/// Where an approval stands at `now`: one that waits may be expired.
#[must_use]
pub fn approval_status(approval: &Approval, now: u64) -> ApprovalState {
    match approval.state() {
        ApprovalState::Pending if now >= approval.expires_at => ApprovalState::Expired,
        state => state,
    }
}

/// Where a grant stands at `now`: one that waits or is active may be expired, and one that rests on the
/// decision of somebody who may not decide any more is as good as revoked.
#[must_use]
pub fn grant_status(r: &dyn Read, grant: &Grant, now: u64) -> GrantState {
    let resting_on = approval(r, grant.approval_id);
    let waits = |known: &Approval| approval_status(known, now) == ApprovalState::Pending;
    let holds = |known: &Approval| known.state() == ApprovalState::Allowed && may_decide(r, known);
    match grant.state() {
        GrantState::Pending | GrantState::Active if now >= grant.expires_at => GrantState::Expired,
        GrantState::Pending if !resting_on.as_ref().is_some_and(waits) => GrantState::Expired,
        GrantState::Active if !resting_on.as_ref().is_some_and(holds) => GrantState::Revoked,
        state => state,
    }
}

/// Whether who decided this approval has been let in since then without a break, and could decide it now.
pub(super) fn may_decide(r: &dyn Read, approval: &Approval) -> bool {
    let name = approval.decided_by.strip_prefix("operator/");
    name.and_then(|name| access::operator(r, name))
        .is_some_and(|known| {
            known.status() == OperatorStatus::Active
                && known.role() >= Role::Operator
                && known.created_at <= approval.decided_at
        })
}

/// Approvals that wait, and decisions that stand, whose time has passed at `now`, earliest first, at most
/// `limit`: for the sweeper.
#[must_use]
pub fn due_approvals(r: &dyn Read, now: u64, limit: usize) -> Vec<Id> {
    ids_until(r, &tables::APPROVALS_DUE, now, limit)
}

/// Grants that wait or are active and whose time has passed at `now`, earliest first, at most `limit`: for
/// the sweeper.
#[must_use]
pub fn due_grants(r: &dyn Read, now: u64, limit: usize) -> Vec<Id> {
    ids_until(r, &tables::GRANTS_DUE, now, limit)
}

/// When the sweeper has to look next.
#[must_use]
pub fn next_due(r: &dyn Read) -> Option<u64> {
    let first = |table: &Table<Present>| {
        let mut first = None;
        table.visit(r, (), None, &mut |key, _| {
            first = key.first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
            ControlFlow::Break(())
        });
        first
    };
    [first(&tables::APPROVALS_DUE), first(&tables::GRANTS_DUE)]
        .into_iter()
        .flatten()
        .min()
}

/// The ids in an index by time whose time has come at `now`, earliest first.
pub(super) fn ids_until(r: &dyn Read, table: &Table<Present>, now: u64, limit: usize) -> Vec<Id> {
    let mut found = Vec::new();
    table.visit(r, (), None, &mut |key, _| {
        let time = key
            .first_chunk()
            .map_or(u64::MAX, |bytes| u64::from_be_bytes(*bytes));
        if time > now || found.len() >= limit {
            return ControlFlow::Break(());
        }
        found.extend(Id::from_slice(&key[8..]));
        ControlFlow::Continue(())
    });
    found
}
