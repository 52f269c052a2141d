//! Rules of cluster.

use super::Action;
use crate::reject::Reject;
use crate::reply::Reply;
use crate::txn::Txn;

pub(crate) fn apply(_txn: &mut Txn<'_>, _action: &Action) -> Result<Reply, Reject> {
    Ok(Reply::done())
}
