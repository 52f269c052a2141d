//! Where approvals and grants lie: the records, and the indexes that follow them.
//!
//! Only [`put_approval`], [`put_grant`] and the forgetting write, so that no index can lag behind its record:
//! each key of an index is a function of the record alone.

use std::ops::ControlFlow;

use super::{
    Approval, ApprovalState, Grant, GrantOfRun, GrantState, Scope, Subject, Totals, approval, grant, totals,
};
use crate::ids::Id;
use crate::limits;
use crate::read::Read;
use crate::tables::{self, Key, Present, Table, Text};
use crate::txn::Txn;

/// Writes an approval over what it was, or a new one.
pub(super) fn put_approval(txn: &mut Txn<'_>, before: Option<&Approval>, after: &Approval) {
    txn.put(&tables::APPROVALS, after.id, after);
    let by_state = |it: &Approval| (it.state as u32, it.id);
    move_row(
        txn,
        &tables::APPROVALS_BY_STATE,
        before.map(by_state),
        Some(by_state(after)),
    );
    move_row(
        txn,
        &tables::APPROVALS_DUE,
        before.and_then(approval_due),
        approval_due(after),
    );
    let ended = |it: &Approval| (it.over_at != 0).then_some((it.over_at, it.id));
    move_row(
        txn,
        &tables::APPROVALS_ENDED,
        before.and_then(ended),
        ended(after),
    );
    move_row(
        txn,
        &tables::APPROVALS_STANDING,
        before.and_then(standing_key),
        standing_key(after),
    );
    let waits = |it: &Approval| u64::from(it.state() == ApprovalState::Pending);
    let (waited, waits) = (before.map_or(0, waits), waits(after));
    change_totals(txn, |sums| {
        sums.approvals += u64::from(before.is_none());
        sums.pending = (sums.pending + waits).saturating_sub(waited);
    });
}

/// Writes a grant over what it was, or a new one.
pub(super) fn put_grant(txn: &mut Txn<'_>, before: Option<&Grant>, after: &Grant) {
    txn.put(&tables::GRANTS, after.id, after);
    let by_state = |it: &Grant| (it.state as u32, it.id);
    move_row(
        txn,
        &tables::GRANTS_BY_STATE,
        before.map(by_state),
        Some(by_state(after)),
    );
    move_row(
        txn,
        &tables::GRANTS_DUE,
        before.and_then(grant_due),
        grant_due(after),
    );
    move_row(
        txn,
        &tables::GRANTS_LIVE_OF,
        before.and_then(live_key),
        live_key(after),
    );
    let ended = |it: &Grant| (it.ended_at != 0).then_some((it.ended_at, it.id));
    move_row(txn, &tables::GRANTS_ENDED, before.and_then(ended), ended(after));
    if before.is_none() {
        txn.put(
            &tables::GRANTS_OF_RUNS,
            after.run_id,
            &GrantOfRun { grant_id: after.id },
        );
        change_totals(txn, |sums| sums.grants += 1);
    }
}

/// When time alone changes something of an approval.
pub(crate) fn approval_due(it: &Approval) -> Option<(u64, Id)> {
    if it.state() == ApprovalState::Pending {
        // That of a pairing ends with its request, which has an end of its own.
        (it.subject() == Subject::Grant).then_some((it.expires_at, it.id))
    } else {
        it.standing.then_some((it.valid_until, it.id))
    }
}

/// When time alone changes something of a grant.
pub(crate) fn grant_due(it: &Grant) -> Option<(u64, Id)> {
    is_live(it).then_some((it.expires_at, it.id))
}

/// The key of a decision that stands.
pub(crate) fn standing_key(it: &Approval) -> Option<impl Key + PartialEq + use<'_>> {
    let session = if it.scope() == Scope::Session {
        it.session.as_str()
    } else {
        ""
    };
    it.standing.then(|| {
        (
            standing_prefix(&it.requested_by, &it.tool, session, it.prompt.risk as u32),
            (u64::MAX - it.valid_until, it.id),
        )
    })
}

/// What the keys of decisions begin with that cover the same.
type StandingPrefix<'a> = (Text<'a>, Text<'a>, Text<'a>, u32);

fn standing_prefix<'a>(asker: &'a str, tool: &'a str, session: &'a str, risk: u32) -> StandingPrefix<'a> {
    (Text(asker), Text(tool), Text(session), risk)
}

pub(crate) fn live_key(it: &Grant) -> Option<impl Key + PartialEq + use<'_>> {
    is_live(it).then(|| (Text(&it.requested_by), it.id))
}

/// Whether a grant is written as one that may start its run, or may become one.
pub(super) fn is_live(it: &Grant) -> bool {
    matches!(it.state(), GrantState::Pending | GrantState::Active)
}

fn move_row<K: Key + PartialEq>(
    txn: &mut Txn<'_>,
    table: &Table<Present>,
    before: Option<K>,
    after: Option<K>,
) {
    if before == after {
        return;
    }
    if let Some(before) = before {
        txn.delete(table, before);
    }
    if let Some(after) = after {
        txn.mark(table, after);
    }
}

fn change_totals(txn: &mut Txn<'_>, change: impl FnOnce(&mut Totals)) {
    let mut sums = totals(txn);
    let before = sums;
    change(&mut sums);
    if sums != before {
        txn.put(&tables::APPROVAL_TOTALS, (), &sums);
    }
}

/// Grants of an operator that are pending or active, by id.
pub(super) fn live_of(r: &dyn Read, operator: &str) -> Vec<Grant> {
    let ids = tables::GRANTS_LIVE_OF.ids(r, Text(operator), None, usize::MAX);
    ids.into_iter().filter_map(|id| grant(r, id)).collect()
}

/// How many there are.
pub(super) fn count_live(r: &dyn Read, operator: &str) -> usize {
    let limit = limits::GRANTS_LIVE;
    tables::GRANTS_LIVE_OF.ids(r, Text(operator), None, limit).len()
}

/// Decisions that stand for an asker.
pub(super) fn standing_of(r: &dyn Read, asker: &str) -> Vec<Approval> {
    let mut ids = Vec::new();
    tables::APPROVALS_STANDING.visit(r, Text(asker), None, &mut |key, _| {
        ids.extend(key.last_chunk::<16>().map(|bytes| Id::from_bytes(*bytes)));
        ControlFlow::Continue(())
    });
    ids.into_iter().filter_map(|id| approval(r, id)).collect()
}

/// Decisions that stand for this asker, tool, session (or none) and risk and are good at `now`, those that
/// last longest first.
pub(super) fn standing(
    r: &dyn Read,
    asker: &str,
    tool: &str,
    session: &str,
    risk: u32,
    now: u64,
) -> Vec<Approval> {
    let mut found = Vec::new();
    let prefix = standing_prefix(asker, tool, session, risk);
    tables::APPROVALS_STANDING.visit(r, prefix, None, &mut |key, _| {
        let Some(known) = key
            .last_chunk::<16>()
            .and_then(|bytes| approval(r, Id::from_bytes(*bytes)))
        else {
            return ControlFlow::Continue(());
        };
        if known.valid_until <= now {
            return ControlFlow::Break(());
        }
        found.push(known);
        ControlFlow::Continue(())
    });
    found
}

/// Forgets the oldest approvals and grants on which nothing can rest any more, when there is no room for
/// others.
pub(super) fn forget(txn: &mut Txn<'_>) {
    let sums = totals(txn);
    if sums.approvals >= limits::APPROVALS {
        for id in ended(txn, &tables::APPROVALS_ENDED) {
            if let Some(old) = approval(txn, id) {
                forget_approval(txn, &old);
            }
        }
    }
    if sums.grants >= limits::APPROVALS {
        for id in ended(txn, &tables::GRANTS_ENDED) {
            if let Some(old) = grant(txn, id) {
                forget_grant(txn, &old);
            }
        }
    }
}

/// The first few whose time has passed.
fn ended(txn: &Txn<'_>, table: &Table<Present>) -> Vec<Id> {
    super::queries::ids_until(txn, table, txn.now, limits::APPROVALS_FORGET)
}

fn forget_approval(txn: &mut Txn<'_>, old: &Approval) {
    txn.delete(&tables::APPROVALS, old.id);
    txn.delete(&tables::APPROVALS_BY_STATE, (old.state as u32, old.id));
    txn.delete(&tables::APPROVALS_ENDED, (old.over_at, old.id));
    if let Some(due) = approval_due(old) {
        txn.delete(&tables::APPROVALS_DUE, due);
    }
    if let Some(key) = standing_key(old) {
        txn.delete(&tables::APPROVALS_STANDING, key);
    }
    change_totals(txn, |sums| sums.approvals -= 1);
}

fn forget_grant(txn: &mut Txn<'_>, old: &Grant) {
    txn.delete(&tables::GRANTS, old.id);
    txn.delete(&tables::GRANTS_BY_STATE, (old.state as u32, old.id));
    txn.delete(&tables::GRANTS_ENDED, (old.ended_at, old.id));
    let named = tables::GRANTS_OF_RUNS.get(txn, old.run_id);
    if named.is_some_and(|named| named.grant_id == old.id) {
        txn.delete(&tables::GRANTS_OF_RUNS, old.run_id);
    }
    change_totals(txn, |sums| sums.grants -= 1);
}
