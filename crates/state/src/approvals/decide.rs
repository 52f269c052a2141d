//! How approvals open, and how they end.

use super::queries::may_decide;
use super::store::{live_of, put_approval, standing, standing_of};
use super::{
    Approval, ApprovalState, Decide, Grant, GrantState, Prompt, Risk, Scope, Subject, Withdraw, approval,
    approval_status, grant, grants, policy, totals,
};
use crate::actor::Actor;
use crate::ids::Id;
use crate::reject::{Code, Reject};
use crate::reply::Reply;
use crate::txn::Txn;
use crate::{check, limits};

/// Writes a new approval that waits.
pub(super) fn open(txn: &mut Txn<'_>, subject: Subject, subject_id: Id, new: Approval) {
    let new = Approval {
        subject: subject as i32,
        subject_id,
        state: ApprovalState::Pending as i32,
        requested_at: txn.now,
        covered: u64::from(subject == Subject::Grant),
        ..new
    };
    put_approval(txn, None, &new);
    txn.emit(
        "approval.opened",
        new.id,
        [
            ("subject", subject.as_str().to_owned()),
            ("subject_id", new.subject_id.to_string()),
            ("title", new.prompt.title.clone()),
            ("risk", new.prompt.risk().as_str().to_owned()),
            ("requested_by", new.requested_by.clone()),
            ("tool", new.tool.clone()),
            ("session", new.session.clone()),
            ("expires_at", new.expires_at.to_string()),
        ],
    );
}

/// Refuses to open another approval of a grant when too many wait, or are kept.
pub(super) fn check_room(txn: &Txn<'_>) -> Result<(), Reject> {
    let sums = totals(txn);
    if sums.pending >= limits::APPROVALS_PENDING {
        return Err(Reject::new(
            Code::TooManyApprovals,
            [&sums.pending, &"wait for a person"],
        ));
    }
    if sums.approvals >= limits::APPROVALS {
        return Err(Reject::new(
            Code::TooManyApprovals,
            [&sums.approvals, &"are kept because something rests on them"],
        ));
    }
    Ok(())
}

/// A decision of earlier that covers what this operator asks for now. Of those that could, the one that lasts
/// longest.
pub(super) fn covering(
    txn: &Txn<'_>,
    asker: &str,
    tool: &str,
    session: &str,
    risk: Risk,
) -> Option<Approval> {
    let four_eyes = policy(txn).four_eyes;
    let covers = |known: &Approval| may_decide(txn, known) && !(four_eyes && known.decided_by == asker);
    let sessions = [Some(""), Some(session).filter(|session| !session.is_empty())];
    let risks = risk as u32..=Risk::Critical as u32;
    sessions
        .into_iter()
        .flatten()
        .flat_map(|session| risks.clone().map(move |risk| (session, risk)))
        .filter_map(|(session, risk)| {
            let known = standing(txn, asker, tool, session, risk, txn.now);
            known.into_iter().find(covers)
        })
        .max_by_key(|known| (known.valid_until, known.id))
}

/// The approval, if it can be decided now.
fn waiting(txn: &Txn<'_>, id: Id) -> Result<Approval, Reject> {
    let found = approval(txn, id).ok_or_else(|| Reject::new(Code::NoSuchApproval, [&id]))?;
    match (found.state(), approval_status(&found, txn.now)) {
        (_, ApprovalState::Pending) => Ok(found),
        (ApprovalState::Pending, _) => Err(Reject::new(Code::ApprovalExpired, [&id, &found.expires_at])),
        (state, _) => Err(Reject::new(Code::ApprovalDecided, [&id, &state.as_str()])),
    }
}

/// Nobody allows what they asked for, while four eyes are required.
pub(super) fn check_four_eyes(txn: &Txn<'_>, found: &Approval) -> Result<(), Reject> {
    let own = matches!(txn.actor, Actor::Operator { .. }) && found.requested_by == txn.actor.to_string();
    if own && policy(txn).four_eyes {
        return Err(Reject::new(Code::FourEyes, [&found.requested_by, &found.id]));
    }
    Ok(())
}

pub(super) fn decide(txn: &mut Txn<'_>, command: &Decide) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let found = waiting(txn, command.approval_id)?;
    if found.subject() != Subject::Grant {
        return Err(Reject::new(Code::ApprovalOfPairing, [&found.id]));
    }
    let Some(asked) = grant(txn, found.subject_id).filter(|asked| asked.state() == GrantState::Pending)
    else {
        return Err(Reject::new(Code::NoSuchGrant, [&found.subject_id]));
    };
    if !command.allow {
        let found = end(txn, found, ApprovalState::Denied, &command.reason);
        grants::end(txn, asked, GrantState::Denied, &found.reason);
        return Ok(Reply::done());
    }
    check_four_eyes(txn, &found)?;
    let valid_until = validity(txn, command, &found)?;
    let standing = valid_until != 0;
    if standing && standing_of(txn, &found.requested_by).len() >= limits::STANDING {
        return Err(Reject::new(
            Code::TooManyGrants,
            [
                &found.requested_by,
                &limits::STANDING,
                &"decisions that stand for it",
            ],
        ));
    }
    let allowed = Approval {
        scope: command.scope,
        valid_until,
        standing,
        over_at: asked.expires_at.max(valid_until),
        ..found.clone()
    };
    close(txn, &found, allowed, ApprovalState::Allowed, &command.reason);
    grants::activate(txn, asked);
    Ok(Reply::done())
}

/// First moment at which a decision covers nothing more; 0 of one that covers only what was asked.
fn validity(txn: &Txn<'_>, command: &Decide, found: &Approval) -> Result<u64, Reject> {
    let scope = command.scope();
    if scope == Scope::Once {
        return Ok(0);
    }
    if scope == Scope::Session && found.session.is_empty() {
        return Err(check::invalid("the scope", &"the grant names no session"));
    }
    let longest = policy(txn).max_timebox;
    let ttl = match command.ttl_ms {
        0 => limits::TIMEBOX.min(longest),
        asked => asked,
    };
    if ttl == 0 || ttl > longest {
        return Err(Reject::new(Code::DecisionTtl, [&ttl, &longest]));
    }
    Ok(txn.now + ttl)
}

/// Ends an approval of which nothing was allowed, or nothing is any more.
pub(super) fn end(txn: &mut Txn<'_>, found: Approval, state: ApprovalState, reason: &str) -> Approval {
    let ended = Approval {
        standing: false,
        over_at: txn.now,
        ..found.clone()
    };
    close(txn, &found, ended, state, reason)
}

/// Writes an approval that waits no more, or stands no more, and says so.
pub(super) fn close(
    txn: &mut Txn<'_>,
    before: &Approval,
    after: Approval,
    state: ApprovalState,
    reason: &str,
) -> Approval {
    let mut after = after;
    after.set_state(state);
    // Who decided stays on record when the decision is taken back; the journal has who did that.
    if before.state() == ApprovalState::Pending {
        after.decided_by = txn.actor.to_string();
        after.decided_at = txn.now;
        after.reason = reason.to_owned();
    }
    put_approval(txn, Some(before), &after);
    let action = match state {
        ApprovalState::Expired => "approval.expired",
        ApprovalState::Withdrawn => "approval.withdrawn",
        ApprovalState::Pending | ApprovalState::Allowed | ApprovalState::Denied => "approval.decided",
    };
    let allowed = state == ApprovalState::Allowed;
    let until = (after.valid_until != 0 && allowed).then(|| after.valid_until.to_string());
    txn.emit(
        action,
        after.id,
        [
            ("subject", after.subject().as_str().to_owned()),
            ("subject_id", after.subject_id.to_string()),
            ("state", state.as_str().to_owned()),
            (
                "scope",
                if allowed {
                    after.scope().as_str().to_owned()
                } else {
                    String::new()
                },
            ),
            ("valid_until", until.unwrap_or_default()),
            ("requested_by", after.requested_by.clone()),
            ("tool", after.tool.clone()),
            ("reason", reason.to_owned()),
        ],
    );
    after
}

pub(super) fn withdraw(txn: &mut Txn<'_>, command: &Withdraw) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.approval_id;
    let found = approval(txn, id).ok_or_else(|| Reject::new(Code::NoSuchApproval, [&id]))?;
    if found.subject() != Subject::Grant {
        return Err(Reject::new(Code::ApprovalOfPairing, [&id]));
    }
    match (found.state(), approval_status(&found, txn.now)) {
        (ApprovalState::Withdrawn, _) => Ok(Reply::done()),
        (_, ApprovalState::Pending) => {
            take_back(txn, found, &command.reason);
            Ok(Reply::done())
        }
        (ApprovalState::Pending, _) => Err(Reject::new(Code::ApprovalExpired, [&id, &found.expires_at])),
        (ApprovalState::Allowed, _) if found.standing || txn.now < found.over_at => {
            take_back(txn, found, &command.reason);
            Ok(Reply::done())
        }
        (state, _) => Err(Reject::new(Code::ApprovalDecided, [&id, &state.as_str()])),
    }
}

/// Withdraws an approval and revokes what rests on it and was not used.
pub(super) fn take_back(txn: &mut Txn<'_>, found: Approval, reason: &str) {
    let asker = found.requested_by.clone();
    let found = end(txn, found, ApprovalState::Withdrawn, reason);
    let asker = asker.strip_prefix("operator/").unwrap_or(&asker);
    let resting = |it: &Grant| it.approval_id == found.id;
    for it in live_of(txn, asker).into_iter().filter(resting) {
        grants::end(txn, it, GrantState::Revoked, reason);
    }
}

/// Ends what the clock has ended of an approval; says whether it had anything.
pub(super) fn expire(txn: &mut Txn<'_>, id: Id) -> bool {
    let Some(found) = approval(txn, id) else {
        return false;
    };
    if found.state() == ApprovalState::Pending && txn.now >= found.expires_at {
        if found.subject() == Subject::Pairing {
            // Ends with its request, in the entry that ends that.
            return false;
        }
        let found = end(txn, found, ApprovalState::Expired, "nobody decided in time");
        if let Some(asked) = grant(txn, found.subject_id).filter(|asked| asked.state() == GrantState::Pending)
        {
            grants::end(txn, asked, GrantState::Expired, &found.reason);
        }
        return true;
    }
    if found.standing && txn.now >= found.valid_until {
        let lapsed = Approval {
            standing: false,
            ..found.clone()
        };
        put_approval(txn, Some(&found), &lapsed);
        txn.emit(
            "approval.lapsed",
            id,
            [
                ("scope", found.scope().as_str().to_owned()),
                ("requested_by", found.requested_by.clone()),
                ("tool", found.tool.clone()),
                ("covered", found.covered.to_string()),
            ],
        );
        return true;
    }
    false
}

/// What can be chosen of a grant.
pub(super) fn grant_prompt(
    title: String,
    risk: Risk,
    summary: &str,
    has_session: bool,
    longest: u64,
) -> Prompt {
    let option = |id: &str, label: &str, allow, scope| super::PromptOption {
        id: id.to_owned(),
        label: label.to_owned(),
        allow,
        scope: scope as i32,
    };
    let mut options = vec![option("allow-once", "Allow this run", true, Scope::Once)];
    if has_session && longest > 0 {
        options.push(option(
            "allow-session",
            "Allow this tool in this session, for a time",
            true,
            Scope::Session,
        ));
    }
    if longest > 0 {
        options.push(option(
            "allow-timeboxed",
            "Allow this tool to this operator, for a time",
            true,
            Scope::Timeboxed,
        ));
    }
    options.push(option("deny", "Deny", false, Scope::Once));
    Prompt {
        title,
        risk: risk as i32,
        summary: summary.to_owned(),
        options,
    }
}
