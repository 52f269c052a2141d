//! Rules of identity.

use super::Action;
use crate::reject::Reject;
use crate::reply::Reply;
use crate::txn::Txn;

pub(crate) fn apply(_txn: &mut Txn<'_>, _action: &Action) -> Result<Reply, Reject> {
    Ok(Reply::done())
}

/// Whether an actor is who it says, and still let in, at `now`.
///
/// # Errors
/// The refusal, of the class `Denied`.
pub fn is_valid(_r: &dyn crate::Read, _actor: &crate::Actor, _now: u64) -> Result<(), Reject> {
    Ok(())
}
