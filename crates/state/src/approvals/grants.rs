//! Grants: asked for, used once, taken back.

use super::store::{count_live, forget, is_live, live_of, put_approval, put_grant, standing_of};
use super::{
    Approval, ApprovalState, CreateGrant, Grant, GrantState, RevokeGrant, Subject, approval, decide, grant,
    grant_of_run, grant_status, policy,
};
use crate::actor::Actor;
use crate::ids::Id;
use crate::reject::{Code, Reject};
use crate::reply::{GrantCreated, Reply};
use crate::txn::Txn;
use crate::{check, leases, limits};

pub(super) fn create(txn: &mut Txn<'_>, command: &CreateGrant) -> Result<Reply, Reject> {
    let Actor::Operator { name, .. } = txn.actor else {
        return Err(Reject::new(
            Code::NotAllowed,
            [txn.actor, &"approvals.create_grant"],
        ));
    };
    let ttl = check_fields(txn, command)?;
    check_run(txn, command.run_id)?;
    if count_live(txn, name) >= limits::GRANTS_LIVE {
        let what = "grants that are pending or active";
        return Err(Reject::new(
            Code::TooManyGrants,
            [name, &limits::GRANTS_LIVE, &what],
        ));
    }
    forget(txn);
    if super::totals(txn).grants >= limits::APPROVALS {
        let what = "grants are kept because they are pending or active";
        return Err(Reject::new(Code::TooManyApprovals, [&limits::APPROVALS, &what]));
    }
    let mut new = Grant {
        id: command.grant_id,
        run_id: command.run_id,
        tool: command.tool.clone(),
        session: command.session.clone(),
        requested_by: name.clone(),
        approval_id: command.approval_id,
        created_at: txn.now,
        expires_at: txn.now + ttl,
        ..Grant::default()
    };
    let asker = txn.actor.to_string();
    let known = decide::covering(txn, &asker, &command.tool, &command.session, command.risk());
    match known {
        Some(known) => cover(txn, &mut new, &known),
        None => ask(txn, &new, command)?,
    }
    put_grant(txn, None, &new);
    say_created(txn, &new);
    Ok(Reply::GrantCreated(GrantCreated {
        grant_id: new.id,
        state: new.state,
        approval_id: new.approval_id,
        expires_at: new.expires_at,
    }))
}

/// How long the grant may be used.
fn check_fields(txn: &Txn<'_>, command: &CreateGrant) -> Result<u64, Reject> {
    check::id("the grant id", command.grant_id)?;
    check::id("the run id", command.run_id)?;
    check::id("the approval id", command.approval_id)?;
    if !check::is_short_name(&command.tool) {
        let cause = format!("{} is no name of a tool", check::quoted(&command.tool));
        return Err(check::invalid("the tool", &cause));
    }
    check::text("the session", &command.session, limits::NAME_MAX)?;
    check::text("the summary", &command.summary, limits::SUMMARY_MAX)?;
    if grant(txn, command.grant_id).is_some() {
        return Err(check::invalid("the grant id", &"it exists already"));
    }
    if approval(txn, command.approval_id).is_some() {
        return Err(check::invalid("the approval id", &"it exists already"));
    }
    let ttl = match command.ttl_ms {
        0 => limits::GRANT_TTL,
        asked => asked,
    };
    if ttl > limits::GRANT_TTL_MAX {
        return Err(Reject::new(Code::GrantTtl, [&ttl, &limits::GRANT_TTL_MAX]));
    }
    Ok(ttl)
}

/// A run has one grant, unless that can start nothing any more and never did.
fn check_run(txn: &mut Txn<'_>, run_id: Id) -> Result<(), Reject> {
    let taken = |grant_id: Id, state: GrantState| {
        Err(Reject::new(
            Code::RunHasGrant,
            [&run_id, &grant_id, &state.as_str()],
        ))
    };
    if let Some(run) = leases::run(txn, run_id) {
        return taken(run.grant_id, GrantState::Used);
    }
    let Some(known) = grant_of_run(txn, run_id) else {
        return Ok(());
    };
    if known.used_at != 0 {
        return taken(known.id, known.state());
    }
    match grant_status(txn, &known, txn.now) {
        state @ (GrantState::Pending | GrantState::Active | GrantState::Used) => taken(known.id, state),
        GrantState::Denied | GrantState::Revoked | GrantState::Expired if !is_live(&known) => Ok(()),
        // The clock or the removal of who decided has ended it, and nobody has written that down yet.
        state => {
            let reason = "another grant of its run took its place";
            if known.state() == GrantState::Pending {
                end_approval_of(txn, &known, ApprovalState::Expired, reason);
            }
            end(txn, known, state, reason);
            Ok(())
        }
    }
}

/// A decision of earlier covers it, and it does not outlive that.
fn cover(txn: &mut Txn<'_>, new: &mut Grant, known: &Approval) {
    new.approval_id = known.id;
    new.covered = true;
    new.set_state(GrantState::Active);
    new.expires_at = new.expires_at.min(known.valid_until);
    let counted = Approval {
        covered: known.covered + 1,
        ..known.clone()
    };
    put_approval(txn, Some(known), &counted);
}

/// Opens an approval for it.
fn ask(txn: &mut Txn<'_>, new: &Grant, command: &CreateGrant) -> Result<(), Reject> {
    decide::check_room(txn)?;
    let rules = policy(txn);
    let title = format!("{} asks to run {}", new.requested_by, new.tool);
    let approval = Approval {
        id: new.approval_id,
        prompt: decide::grant_prompt(
            title,
            command.risk(),
            &command.summary,
            !new.session.is_empty(),
            rules.max_timebox,
        ),
        requested_by: txn.actor.to_string(),
        expires_at: new.expires_at.min(txn.now + rules.timeout),
        session: new.session.clone(),
        tool: new.tool.clone(),
        ..Approval::default()
    };
    decide::open(txn, Subject::Grant, new.id, approval);
    Ok(())
}

fn say_created(txn: &mut Txn<'_>, new: &Grant) {
    txn.emit(
        "grant.created",
        new.id,
        [
            ("run", new.run_id.to_string()),
            ("tool", new.tool.clone()),
            ("session", new.session.clone()),
            ("operator", new.requested_by.clone()),
            ("approval", new.approval_id.to_string()),
            ("state", new.state().as_str().to_owned()),
            ("expires_at", new.expires_at.to_string()),
            ("covered", new.covered.to_string()),
        ],
    );
}

/// Its approval was allowed.
pub(super) fn activate(txn: &mut Txn<'_>, before: Grant) {
    let mut after = before.clone();
    after.set_state(GrantState::Active);
    put_grant(txn, Some(&before), &after);
    say(txn, "grant.activated", &after, "");
}

/// Uses the grant of a run, for this tool and by this operator; names what stands against it otherwise.
pub(crate) fn use_grant(txn: &mut Txn<'_>, run_id: Id, tool: &str, operator: &str) -> Result<Grant, Reject> {
    let found = grant_of_run(txn, run_id).ok_or_else(|| Reject::new(Code::NoGrant, [&run_id]))?;
    let id = found.id;
    if found.requested_by != operator {
        return Err(Reject::new(
            Code::GrantForeign,
            [&id, &found.requested_by, &operator],
        ));
    }
    if found.tool != tool {
        return Err(Reject::new(Code::GrantTool, [&id, &found.tool, &tool]));
    }
    let status = grant_status(txn, &found, txn.now);
    if status != GrantState::Active {
        return Err(refusal(txn, &found, status));
    }
    let mut used = found.clone();
    used.set_state(GrantState::Used);
    used.used_at = txn.now;
    used.ended_at = txn.now;
    put_grant(txn, Some(&found), &used);
    say(txn, "grant.used", &used, "");
    Ok(used)
}

/// Why a grant that is not active starts nothing.
fn refusal(txn: &Txn<'_>, found: &Grant, status: GrantState) -> Reject {
    let id = found.id;
    let resting_on = approval(txn, found.approval_id);
    match status {
        GrantState::Pending | GrantState::Active => {
            Reject::new(Code::GrantPending, [&id, &found.approval_id])
        }
        GrantState::Expired => {
            let waited = found.state() != GrantState::Active;
            let end = resting_on.filter(|_| waited).map(|known| known.expires_at);
            let end = end.map_or(found.expires_at, |end| end.min(found.expires_at));
            Reject::new(Code::GrantExpired, [&id, &end])
        }
        GrantState::Used => Reject::new(Code::GrantUsed, [&id, &found.run_id]),
        GrantState::Denied => Reject::new(Code::GrantDenied, [&id, &found.ended_by, &worded(found)]),
        GrantState::Revoked if is_live(found) => {
            let by = resting_on.map_or_else(String::new, |known| known.decided_by);
            Reject::new(Code::DecisionVoid, [&id, &by])
        }
        GrantState::Revoked => Reject::new(Code::GrantRevoked, [&id, &found.ended_by, &worded(found)]),
    }
}

fn worded(found: &Grant) -> &str {
    if found.reason.is_empty() {
        "no reason was given"
    } else {
        &found.reason
    }
}

pub(super) fn revoke(txn: &mut Txn<'_>, command: &RevokeGrant) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.grant_id;
    let found = grant(txn, id).ok_or_else(|| Reject::new(Code::NoSuchGrant, [&id]))?;
    let (run_id, was_used) = (found.run_id, found.used_at != 0);
    match found.state() {
        state @ (GrantState::Denied | GrantState::Expired) => return Err(refusal(txn, &found, state)),
        GrantState::Revoked => {}
        GrantState::Pending => {
            end_approval_of(txn, &found, ApprovalState::Withdrawn, &command.reason);
            end(txn, found, GrantState::Revoked, &command.reason);
        }
        GrantState::Active | GrantState::Used => end(txn, found, GrantState::Revoked, &command.reason),
    }
    if command.cancel_run && was_used {
        leases::cancel_by_grant(txn, run_id, &command.reason);
    }
    Ok(Reply::done())
}

/// Ends the approval that a pending grant waits for.
fn end_approval_of(txn: &mut Txn<'_>, found: &Grant, state: ApprovalState, reason: &str) {
    let waits = |known: &Approval| known.state() == ApprovalState::Pending;
    if let Some(known) = approval(txn, found.approval_id).filter(waits) {
        decide::end(txn, known, state, reason);
    }
}

/// Writes a grant that starts nothing any more, and says so.
pub(super) fn end(txn: &mut Txn<'_>, before: Grant, state: GrantState, reason: &str) {
    let mut after = before.clone();
    after.set_state(state);
    after.ended_by = txn.actor.to_string();
    after.reason = reason.to_owned();
    if after.ended_at == 0 {
        after.ended_at = txn.now;
    }
    put_grant(txn, Some(&before), &after);
    let action = match state {
        GrantState::Denied => "grant.denied",
        GrantState::Expired => "grant.expired",
        GrantState::Pending | GrantState::Active | GrantState::Used | GrantState::Revoked => "grant.revoked",
    };
    say(txn, action, &after, reason);
}

fn say(txn: &mut Txn<'_>, action: &'static str, it: &Grant, reason: &str) {
    txn.emit(
        action,
        it.id,
        [
            ("run", it.run_id.to_string()),
            ("tool", it.tool.clone()),
            ("operator", it.requested_by.clone()),
            ("approval", it.approval_id.to_string()),
            ("reason", reason.to_owned()),
        ],
    );
}

/// Ends a grant whose time has passed; says whether it had.
pub(super) fn expire(txn: &mut Txn<'_>, id: Id) -> bool {
    let due = |found: &Grant| is_live(found) && txn.now >= found.expires_at;
    let Some(found) = grant(txn, id).filter(due) else {
        return false;
    };
    let reason = match found.state() {
        GrantState::Pending => "nobody decided in time",
        _ => "nobody started its run in time",
    };
    end_approval_of(txn, &found, ApprovalState::Expired, reason);
    end(txn, found, GrantState::Expired, reason);
    true
}

/// The operator was removed, or lost the role: what it asked for and did not use is taken back, and nothing
/// stands for it any more. What it decided for others loses its force by that alone (see `grant_status`).
pub(crate) fn operator_gone(txn: &mut Txn<'_>, name: &str, reason: &str) {
    for found in live_of(txn, name) {
        end_approval_of(txn, &found, ApprovalState::Withdrawn, reason);
        end(txn, found, GrantState::Revoked, reason);
    }
    let asker = format!("operator/{name}");
    for known in standing_of(txn, &asker) {
        decide::end(txn, known, ApprovalState::Withdrawn, reason);
    }
}
