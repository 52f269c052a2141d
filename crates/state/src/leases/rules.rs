//! What each command does.

use super::Action;
use crate::check;
use crate::reject::Reject;
use crate::reply::Reply;
use crate::txn::Txn;

pub(crate) fn apply(_txn: &mut Txn<'_>, _action: &Action) -> Result<Reply, Reject> {
    Err(check::invalid("the command", &"this binary does not serve it"))
}
