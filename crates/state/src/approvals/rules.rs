//! What each command does.

use super::{Action, Expire, Policy, SetPolicy, decide, grants, policy};
use crate::reject::Reject;
use crate::reply::{Counted, Reply};
use crate::txn::Txn;
use crate::{check, limits, tables};

pub(crate) fn apply(txn: &mut Txn<'_>, action: &Action) -> Result<Reply, Reject> {
    match action {
        Action::CreateGrant(command) => grants::create(txn, command),
        Action::RevokeGrant(command) => grants::revoke(txn, command),
        Action::Decide(command) => decide::decide(txn, command),
        Action::Withdraw(command) => decide::withdraw(txn, command),
        Action::Expire(command) => expire(txn, command),
        Action::SetPolicy(command) => set_policy(txn, command),
    }
}

fn expire(txn: &mut Txn<'_>, command: &Expire) -> Result<Reply, Reject> {
    check::count("the approvals", command.approvals.len(), limits::EXPIRE_BATCH)?;
    check::count("the grants", command.grants.len(), limits::EXPIRE_BATCH)?;
    let mut count = 0;
    for id in &command.approvals {
        count += u32::from(decide::expire(txn, *id));
    }
    for id in &command.grants {
        count += u32::from(grants::expire(txn, *id));
    }
    Ok(Reply::Counted(Counted { count }))
}

fn set_policy(txn: &mut Txn<'_>, command: &SetPolicy) -> Result<Reply, Reject> {
    let asked = &command.policy;
    if !(limits::APPROVAL_TIMEOUT_MIN..=limits::GRANT_TTL_MAX).contains(&asked.timeout) {
        let (least, most) = (limits::APPROVAL_TIMEOUT_MIN, limits::GRANT_TTL_MAX);
        let cause = format!("{} ms is not between {least} and {most}", asked.timeout);
        return Err(check::invalid("the timeout", &cause));
    }
    if asked.max_timebox > limits::GRANT_TTL_MAX {
        let cause = format!(
            "{} ms is over the limit of {}",
            asked.max_timebox,
            limits::GRANT_TTL_MAX
        );
        return Err(check::invalid("the longest validity", &cause));
    }
    let before = policy(txn);
    let after = Policy {
        set_at: before.set_at,
        set_by: before.set_by.clone(),
        ..asked.clone()
    };
    if after == before {
        return Ok(Reply::done());
    }
    let set = Policy {
        set_at: txn.now,
        set_by: txn.actor.to_string(),
        ..after
    };
    txn.put(&tables::APPROVAL_POLICY, (), &set);
    txn.emit(
        "approval.policy_changed",
        "approvals",
        [
            ("four_eyes", set.four_eyes.to_string()),
            ("timeout", set.timeout.to_string()),
            ("max_timebox", set.max_timebox.to_string()),
            ("four_eyes_before", before.four_eyes.to_string()),
            ("timeout_before", before.timeout.to_string()),
            ("max_timebox_before", before.max_timebox.to_string()),
        ],
    );
    Ok(Reply::done())
}
