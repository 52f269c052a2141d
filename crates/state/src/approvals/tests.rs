//! What a run's start finds of its grant: each reason against it has a code of its own.

use super::store::{put_approval, put_grant};
use super::{Approval, ApprovalState, Grant, GrantState, Scope, Subject, approval, grant, use_grant};
use crate::access::{Operator, Role};
use crate::actor::Actor;
use crate::ids::{Fingerprint, Id};
use crate::read::MemRead;
use crate::reject::{Code, Reject};
use crate::tables;
use crate::txn::Txn;

const NOW: u64 = 1_000;

fn id(number: u8) -> Id {
    Id::from_bytes([number; 16])
}

/// A state in which bob has allowed anna's grant 1 for run 2, by approval 3, until 2,000.
fn state() -> MemRead {
    let actor = Actor::System;
    let base = MemRead::new();
    let mut txn = Txn::new(&base, 1, NOW, &actor, id(9));
    for name in ["anna", "bob"] {
        let operator = Operator {
            name: name.to_owned(),
            role: Role::Operator as i32,
            created_at: 1,
            ..Operator::default()
        };
        txn.put(&tables::OPERATORS, name, &operator);
    }
    let allowed = Approval {
        id: id(3),
        subject: Subject::Grant as i32,
        subject_id: id(1),
        state: ApprovalState::Allowed as i32,
        requested_by: "operator/anna".to_owned(),
        requested_at: 500,
        expires_at: 1_500,
        decided_by: "operator/bob".to_owned(),
        decided_at: 600,
        scope: Scope::Once as i32,
        tool: "resize".to_owned(),
        over_at: 2_000,
        ..Approval::default()
    };
    put_approval(&mut txn, None, &allowed);
    let active = Grant {
        id: id(1),
        run_id: id(2),
        tool: "resize".to_owned(),
        requested_by: "anna".to_owned(),
        approval_id: id(3),
        state: GrantState::Active as i32,
        created_at: 500,
        expires_at: 2_000,
        ..Grant::default()
    };
    put_grant(&mut txn, None, &active);
    let mut state = MemRead::new();
    state.absorb(txn.writes());
    state
}

/// Uses the grant of run 2 at `now`, after `change` was done to the state.
fn used_at(now: u64, change: impl FnOnce(&mut Txn<'_>)) -> Result<Grant, Reject> {
    let base = state();
    let actor = Actor::Operator {
        name: "anna".to_owned(),
        fingerprint: Fingerprint::of(b"anna"),
    };
    let mut txn = Txn::new(&base, 2, now, &actor, id(8));
    change(&mut txn);
    use_grant(&mut txn, id(2), "resize", "anna")
}

fn change_grant(txn: &mut Txn<'_>, change: impl FnOnce(&mut Grant)) {
    let before = grant(txn, id(1)).unwrap_or_default();
    let mut after = before.clone();
    change(&mut after);
    put_grant(txn, Some(&before), &after);
}

fn change_approval(txn: &mut Txn<'_>, change: impl FnOnce(&mut Approval)) {
    let before = approval(txn, id(3)).unwrap_or_default();
    let mut after = before.clone();
    change(&mut after);
    put_approval(txn, Some(&before), &after);
}

fn change_bob(txn: &mut Txn<'_>, change: impl FnOnce(&mut Operator)) {
    let mut bob = tables::OPERATORS.get(txn, "bob").unwrap_or_default();
    change(&mut bob);
    txn.put(&tables::OPERATORS, "bob", &bob);
}

fn ended(txn: &mut Txn<'_>, state: GrantState) {
    change_grant(txn, |it| {
        it.set_state(state);
        it.ended_at = 700;
    });
}

#[test]
fn a_grant_starts_its_run_once() {
    let base = state();
    let actor = Actor::System;
    let mut txn = Txn::new(&base, 2, NOW, &actor, id(8));
    let used = use_grant(&mut txn, id(2), "resize", "anna").map(|it| (it.id, it.used_at, it.state()));
    assert_eq!(used, Ok((id(1), NOW, GrantState::Used)));
    let again = use_grant(&mut txn, id(2), "resize", "anna").map_err(|refusal| refusal.kind());
    assert_eq!(again.map(drop), Err(Code::GrantUsed));
}

#[test]
fn each_reason_against_a_start_has_its_code() {
    type Change = fn(&mut Txn<'_>);
    let revoked: Change = |txn| ended(txn, GrantState::Revoked);
    let cases: [(Code, u64, Change); 10] = [
        (Code::NoGrant, NOW, |txn| {
            txn.delete(&tables::GRANTS_OF_RUNS, id(2))
        }),
        (Code::GrantForeign, NOW, |txn| {
            change_grant(txn, |it| it.requested_by = "bob".to_owned())
        }),
        (Code::GrantTool, NOW, |txn| {
            change_grant(txn, |it| it.tool = "other".to_owned())
        }),
        (Code::GrantPending, NOW, |txn| {
            change_grant(txn, |it| it.set_state(GrantState::Pending));
            change_approval(txn, |it| it.set_state(ApprovalState::Pending));
        }),
        // The approval's time is over before the grant's, and nobody has written it down.
        (Code::GrantExpired, 1_500, |txn| {
            change_grant(txn, |it| it.set_state(GrantState::Pending));
            change_approval(txn, |it| it.set_state(ApprovalState::Pending));
        }),
        (Code::GrantExpired, 2_000, |_| {}),
        (Code::GrantDenied, NOW, |txn| ended(txn, GrantState::Denied)),
        (Code::GrantRevoked, NOW, revoked),
        (Code::DecisionVoid, NOW, |txn| {
            change_bob(txn, |it| it.set_role(Role::Viewer))
        }),
        // Removed and let in again since: nobody knows whether that is the same person.
        (Code::DecisionVoid, NOW, |txn| {
            change_bob(txn, |it| it.created_at = 601)
        }),
    ];
    for (code, now, change) in cases {
        let refused = used_at(now, change).map(drop).map_err(|refusal| refusal.kind());
        assert_eq!(refused, Err(code), "at {now}");
    }
    assert!(used_at(1_999, |_| {}).is_ok(), "until the last moment");
}
