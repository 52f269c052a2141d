//! What each command does.

use super::{Action, EndReason};
use crate::check;
use crate::ids::Id;
use crate::read::Read;
use crate::reject::Reject;
use crate::reply::Reply;
use crate::tables;
use crate::txn::Txn;

pub(crate) fn apply(_txn: &mut Txn<'_>, _action: &Action) -> Result<Reply, Reject> {
    Err(check::invalid("the command", &"this binary does not serve it"))
}

/// Whether a slot of this worker is taken.
pub fn is_held(r: &dyn Read, worker_id: Id) -> bool {
    !tables::SLOTS.list(r, worker_id, 1).is_empty()
}

/// Begins the end of all leases of a worker that have not begun to end; says how many.
#[allow(dead_code)]
pub(crate) fn end_all(_txn: &mut Txn<'_>, _worker_id: Id, _reason: EndReason) -> u32 {
    0
}

/// Gives a worker what is queued, as far as it has free slots.
#[allow(dead_code)]
pub(crate) fn fill(_txn: &mut Txn<'_>, _worker_id: Id) {}

/// Takes the run of a grant back, if it has not ended.
#[allow(dead_code)]
pub(crate) fn cancel_by_grant(_txn: &mut Txn<'_>, _run_id: Id, _reason: &str) {}
