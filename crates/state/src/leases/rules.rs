//! What each command does: which file has it.

use super::{Action, artifacts, ends, reconcile, start, worker};
use crate::reject::Reject;
use crate::reply::Reply;
use crate::txn::Txn;

pub(crate) fn apply(txn: &mut Txn<'_>, action: &Action) -> Result<Reply, Reject> {
    match action {
        Action::StartRun(command) => start::start(txn, command),
        Action::PutArtifact(command) => artifacts::put(txn, command),
        Action::CancelRun(command) => ends::cancel(txn, command),
        Action::Accept(command) => worker::accept(txn, command),
        Action::Renew(command) => worker::renew(txn, command),
        Action::Finish(command) => worker::finish(txn, command),
        Action::Cleaned(command) => worker::cleaned(txn, command),
        Action::RevokeLease(command) => ends::revoke(txn, command),
        Action::Expire(command) => ends::expire(txn, command),
        Action::Reconcile(command) => reconcile::reconcile(txn, command),
    }
}
