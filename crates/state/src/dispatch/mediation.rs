//! Dispatches that wait for a person at the machine, and go on when they have agreed. A refusal is a result like any
//! other.

use super::rules::own;
use super::store::update;
use super::{AwaitMediation, Mediation, ResumeFromMediation, State};
use crate::reject::Reject;
use crate::reply::Reply;
use crate::txn::Txn;
use crate::{check, limits};

pub(super) fn begin(txn: &mut Txn<'_>, command: &AwaitMediation) -> Result<Reply, Reject> {
    let found = own(txn, command.dispatch_id, command.epoch)?;
    check::text("what the person is asked", &command.prompt, limits::REASON_MAX)?;
    check::text("the name of the machine", &command.host, limits::NAME_MAX)?;
    if found.state() != State::Dispatched {
        return Ok(Reply::done());
    }
    let mut waits = found.clone();
    waits.set_state(State::AwaitingLocalMediation);
    waits.mediation = Some(Mediation {
        since: txn.now,
        prompt: command.prompt.clone(),
        host: command.host.clone(),
    });
    update(txn, &found, &waits);
    txn.emit(
        "dispatch.awaiting_local_mediation",
        found.id,
        [
            ("device", found.device_id.to_string()),
            ("epoch", found.epoch.to_string()),
            ("host", command.host.clone()),
            ("prompt", command.prompt.clone()),
        ],
    );
    Ok(Reply::done())
}

pub(super) fn end(txn: &mut Txn<'_>, command: &ResumeFromMediation) -> Result<Reply, Reject> {
    let found = own(txn, command.dispatch_id, command.epoch)?;
    if found.state() != State::AwaitingLocalMediation {
        return Ok(Reply::done());
    }
    let mut goes_on = found.clone();
    goes_on.set_state(State::Dispatched);
    goes_on.mediation = None;
    update(txn, &found, &goes_on);
    txn.emit(
        "dispatch.resumed",
        found.id,
        [
            ("device", found.device_id.to_string()),
            ("epoch", found.epoch.to_string()),
        ],
    );
    Ok(Reply::done())
}
