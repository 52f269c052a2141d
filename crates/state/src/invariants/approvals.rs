//! Rules about approvals and grants, and the indexes that follow them.

use std::collections::{BTreeMap, BTreeSet};

use super::{Findings, all, keys};
use crate::access::{self, OperatorStatus, Role};
use crate::actor::Actor;
use crate::approvals::{
    self, Approval, ApprovalState, Grant, GrantState, Scope, Subject, Totals, approval_due, grant_due,
    live_key, standing_key,
};
use crate::command::Envelope;
use crate::ids::Id;
use crate::pairing::{self, RequestStatus};
use crate::read::Read;
use crate::tables::Key;
use crate::{limits, meta, tables};

/// Keys that an index should have.
type Keys = BTreeSet<Vec<u8>>;

/// The bytes of a key behind its table's tag.
fn bytes(key: &impl Key) -> Vec<u8> {
    let mut out = Vec::new();
    key.write(&mut out);
    out
}

pub(super) fn check(r: &dyn Read, findings: &mut Findings) {
    let (asked, given) = (all(r, &tables::APPROVALS), all(r, &tables::GRANTS));
    for approval in &asked {
        check_approval(r, approval, findings);
    }
    for grant in &given {
        check_grant(r, grant, findings);
    }
    indexes(r, &asked, &given, findings);
    counts(r, &asked, &given, findings);
    pairings(r, &asked, findings);
}

fn check_approval(r: &dyn Read, it: &Approval, findings: &mut Findings) {
    let shown = || format!("{it:?}");
    let waits = it.state() == ApprovalState::Pending;
    let bare = it.decided_at == 0 && it.over_at == 0 && it.decided_by.is_empty();
    findings.expect("an approval that waits was not decided", waits == bare, shown);
    let may_stand = it.state() == ApprovalState::Allowed && it.scope() != Scope::Once && it.valid_until != 0;
    findings.expect(
        "only what was allowed for longer stands",
        !it.standing || may_stand,
        shown,
    );
    let policy = approvals::policy(r);
    let own = it.decided_by == it.requested_by && it.decided_at > policy.set_at;
    let broken = policy.four_eyes && own && it.state() == ApprovalState::Allowed;
    findings.expect("nobody allows what they asked for", !broken, shown);
}

fn check_grant(r: &dyn Read, it: &Grant, findings: &mut Findings) {
    let shown = || format!("{it:?}");
    let live = matches!(it.state(), GrantState::Pending | GrantState::Active);
    findings.expect("a grant is live or has ended", live == (it.ended_at == 0), shown);
    let used = it.state() == GrantState::Used;
    let may_have = used || it.state() == GrantState::Revoked;
    findings.expect(
        "what was used says when",
        (!used || it.used_at != 0) && (it.used_at == 0 || may_have),
        shown,
    );
    if !live {
        return;
    }
    let named = approvals::grant_of_run(r, it.run_id).map(|named| named.id);
    findings.equal("a run has one grant that is live", "grant", named, Some(it.id));
    let holder = access::operator(r, &it.requested_by);
    let may = holder
        .is_some_and(|known| known.status() == OperatorStatus::Active && known.role() >= Role::Operator);
    findings.expect("who holds a live grant may use it", may, shown);
    let resting_on = approvals::approval(r, it.approval_id);
    if it.state() == GrantState::Pending {
        let waits = resting_on.is_some_and(|known| {
            known.state() == ApprovalState::Pending && known.subject_id == it.id && known.tool == it.tool
        });
        findings.expect("a pending grant waits for its approval", waits, shown);
        return;
    }
    // What the clock has ended may outlive its approval until somebody writes it down.
    if meta::clock(r) >= it.expires_at {
        return;
    }
    let rests = resting_on.is_some_and(|known| rests_on(it, &known));
    findings.expect("an active grant rests on what allows it", rests, shown);
}

fn rests_on(it: &Grant, known: &Approval) -> bool {
    let for_it = known.state() == ApprovalState::Allowed
        && known.subject() == Subject::Grant
        && known.tool == it.tool
        && known.requested_by == format!("operator/{}", it.requested_by);
    let covers = match known.scope() {
        Scope::Once => false,
        Scope::Session => known.session == it.session && !it.session.is_empty(),
        Scope::Timeboxed => true,
    };
    for_it
        && if it.covered {
            covers && it.expires_at <= known.valid_until
        } else {
            known.subject_id == it.id
        }
}

fn indexes(r: &dyn Read, asked: &[Approval], given: &[Grant], findings: &mut Findings) {
    const RULE: &str = "indexes of approvals and grants follow their records";
    let of = |them: &mut dyn Iterator<Item = Option<Vec<u8>>>| -> Keys { them.flatten().collect() };
    let state_of = |state: i32, id: Id| Some(bytes(&(state as u32, id)));
    let over = |at: u64, id: Id| (at != 0).then(|| bytes(&(at, id)));
    let expected = [
        (
            "approvals by state",
            keys(r, &tables::APPROVALS_BY_STATE),
            of(&mut asked.iter().map(|it| state_of(it.state, it.id))),
        ),
        (
            "approvals due",
            keys(r, &tables::APPROVALS_DUE),
            of(&mut asked.iter().map(|it| approval_due(it).map(|key| bytes(&key)))),
        ),
        (
            "standing",
            keys(r, &tables::APPROVALS_STANDING),
            of(&mut asked.iter().map(|it| standing_key(it).map(|key| bytes(&key)))),
        ),
        (
            "approvals ended",
            keys(r, &tables::APPROVALS_ENDED),
            of(&mut asked.iter().map(|it| over(it.over_at, it.id))),
        ),
        (
            "grants by state",
            keys(r, &tables::GRANTS_BY_STATE),
            of(&mut given.iter().map(|it| state_of(it.state, it.id))),
        ),
        (
            "grants due",
            keys(r, &tables::GRANTS_DUE),
            of(&mut given.iter().map(|it| grant_due(it).map(|key| bytes(&key)))),
        ),
        (
            "live grants",
            keys(r, &tables::GRANTS_LIVE_OF),
            of(&mut given.iter().map(|it| live_key(it).map(|key| bytes(&key)))),
        ),
        (
            "grants ended",
            keys(r, &tables::GRANTS_ENDED),
            of(&mut given.iter().map(|it| over(it.ended_at, it.id))),
        ),
    ];
    for (table, is, should) in expected {
        let is: Keys = is.into_iter().collect();
        findings.expect(RULE, is == should, || {
            format!("{table}: {} rows instead of {}", is.len(), should.len())
        });
    }
    let named: BTreeSet<Id> = all(r, &tables::GRANTS_OF_RUNS)
        .iter()
        .map(|it| it.grant_id)
        .collect();
    let runs: BTreeSet<Id> = given.iter().map(|it| it.run_id).collect();
    let known = named.iter().all(|id| approvals::grant(r, *id).is_some());
    findings.expect(RULE, known && named.len() <= runs.len(), || {
        "a run names a grant that is not there".to_owned()
    });
}

fn counts(r: &dyn Read, asked: &[Approval], given: &[Grant], findings: &mut Findings) {
    let waiting = asked.iter().filter(|it| it.state() == ApprovalState::Pending);
    let expected = Totals {
        pending: waiting.count() as u64,
        approvals: asked.len() as u64,
        grants: given.len() as u64,
    };
    findings.equal("approvals are counted", "totals", approvals::totals(r), expected);
    // Pairing requests are never turned away for the sake of grants.
    let beside = limits::REQUESTS_PENDING;
    let bounded = expected.pending <= limits::APPROVALS_PENDING + beside
        && expected.approvals <= limits::APPROVALS + beside
        && expected.grants <= limits::APPROVALS;
    findings.expect("approvals are bounded", bounded, || format!("{expected:?}"));
    let (mut live, mut standing) = (BTreeMap::<&str, usize>::new(), BTreeMap::<&str, usize>::new());
    for it in given.iter().filter(|it| it.ended_at == 0) {
        *live.entry(&it.requested_by).or_default() += 1;
    }
    for it in asked.iter().filter(|it| it.standing) {
        *standing.entry(&it.requested_by).or_default() += 1;
    }
    let bounded = live.values().all(|count| *count <= limits::GRANTS_LIVE)
        && standing.values().all(|count| *count <= limits::STANDING);
    findings.expect("what removing an operator ends is bounded", bounded, || {
        format!("{live:?} {standing:?}")
    });
    let mut runs = BTreeSet::new();
    for it in given.iter().filter(|it| it.used_at != 0) {
        findings.expect("a run is started by one grant", runs.insert(it.run_id), || {
            it.run_id.to_string()
        });
    }
}

fn pairings(r: &dyn Read, asked: &[Approval], findings: &mut Findings) {
    let of_pairing =
        |it: &&Approval| it.subject() == Subject::Pairing && it.state() == ApprovalState::Pending;
    let waiting: BTreeSet<Id> = asked.iter().filter(of_pairing).map(|it| it.id).collect();
    let pending = |it: &pairing::Request| it.status() == RequestStatus::PendingApproval;
    let requests: BTreeSet<Id> = all(r, &tables::PAIRINGS)
        .into_iter()
        .filter(pending)
        .map(|it| it.id)
        .collect();
    findings.equal(
        "a pairing request waits with its approval",
        "ids",
        waiting,
        requests,
    );
}

/// What one entry may do to approvals and grants.
pub(super) fn check_step(before: &dyn Read, after: &dyn Read, envelope: &Envelope, findings: &mut Findings) {
    let four_eyes = approvals::policy(before).four_eyes;
    for old in all(before, &tables::APPROVALS) {
        let Some(new) = approvals::approval(after, old.id) else {
            let over = old.over_at != 0 && old.over_at <= meta::clock(after);
            findings.expect("an approval is kept while something may rest on it", over, || {
                format!("{old:?}")
            });
            continue;
        };
        let (from, to) = (old.state(), new.state());
        let moved = match (from, to) {
            _ if from == to => true,
            (ApprovalState::Pending, _) => true,
            (ApprovalState::Allowed, ApprovalState::Withdrawn) => true,
            _ => false,
        };
        let kept = from == ApprovalState::Pending
            || (old.decided_by == new.decided_by
                && old.decided_at == new.decided_at
                && old.scope == new.scope);
        findings.expect("an approval is decided once", moved && kept, || {
            format!("{old:?} {new:?}")
        });
        if from == ApprovalState::Pending && to == ApprovalState::Allowed {
            let own = matches!(envelope.actor, Actor::Operator { .. })
                && envelope.actor.to_string() == new.requested_by;
            findings.expect("four eyes allowed it", !(four_eyes && own), || format!("{new:?}"));
            let in_time = meta::clock(after) < new.expires_at;
            findings.expect("it was allowed in time", in_time, || format!("{new:?}"));
        }
    }
    for old in all(before, &tables::GRANTS) {
        let Some(new) = approvals::grant(after, old.id) else {
            findings.expect("a live grant is kept", old.ended_at != 0, || format!("{old:?}"));
            continue;
        };
        grant_step(&old, &new, meta::clock(after), findings);
    }
}

fn grant_step(old: &Grant, new: &Grant, clock: u64, findings: &mut Findings) {
    use GrantState::{Active, Denied, Expired, Pending, Revoked, Used};
    let (from, to) = (old.state(), new.state());
    let moved = from == to
        || matches!(
            (from, to),
            (Pending, Active | Denied | Revoked | Expired)
                | (Active, Used | Revoked | Expired)
                | (Used, Revoked)
        );
    findings.expect("a grant goes one way", moved, || format!("{old:?} {new:?}"));
    let kept = old.used_at == 0 || old.used_at == new.used_at;
    findings.expect("a grant is used once", kept, || format!("{old:?} {new:?}"));
    let in_time = to != Used || from == Used || clock < old.expires_at;
    findings.expect("a grant is used in time", in_time, || format!("{old:?} {new:?}"));
}
