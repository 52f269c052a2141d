//! Golden samples of approvals and grants. A new field must be filled in here: the literals name every field.

use std::collections::BTreeMap;

use palyra_state::approvals::{
    Approval, ApprovalState, CreateGrant, Decide, Expire, Grant, GrantOfRun, GrantState, Policy, Prompt,
    PromptOption, RevokeGrant, Risk, Scope, SetPolicy, Subject, Totals, Withdraw,
};
use palyra_state::{Accepted, Actor, Answer, Command, Envelope, Reply, Seen, decode, reply, tables};

use super::kit::fingerprint;
use super::records::{add, id, text};

#[allow(clippy::too_many_lines, reason = "one list")]
pub(super) fn records(all: &mut BTreeMap<String, Vec<u8>>) {
    let approval = Approval {
        id: id(1),
        subject: Subject::Grant as i32,
        subject_id: id(2),
        prompt: Prompt {
            title: text("anna asks to run resize"),
            risk: Risk::High as i32,
            summary: text("thumbnails"),
            options: vec![PromptOption {
                id: text("allow-session"),
                label: text("Allow"),
                allow: true,
                scope: Scope::Session as i32,
            }],
        },
        state: ApprovalState::Allowed as i32,
        requested_by: text("operator/anna"),
        requested_at: 3,
        expires_at: 4,
        decided_by: text("operator/bob"),
        decided_at: 5,
        reason: text("go"),
        scope: Scope::Session as i32,
        valid_until: 6,
        session: text("monday"),
        tool: text("resize"),
        covered: 7,
        standing: true,
        over_at: 8,
    };
    add(all, "record.approval", &approval);
    let grant = Grant {
        id: id(2),
        run_id: id(3),
        tool: text("resize"),
        session: text("monday"),
        requested_by: text("anna"),
        approval_id: id(1),
        state: GrantState::Revoked as i32,
        created_at: 4,
        expires_at: 5,
        ended_by: text("operator/bob"),
        reason: text("no"),
        covered: true,
        used_at: 6,
        ended_at: 7,
    };
    add(all, "record.grant", &grant);
    add(all, "record.approval_policy", &policy());
    add(all, "record.grant_of_run", &GrantOfRun { grant_id: id(2) });
    let totals = Totals {
        pending: 1,
        approvals: 2,
        grants: 3,
    };
    add(all, "record.approval_totals", &totals);
    let created = reply::GrantCreated {
        grant_id: id(2),
        state: GrantState::Active as i32,
        approval_id: id(1),
        expires_at: 3,
    };
    let answer = Some(Answer::Reply(Accepted {
        reply: Some(Reply::GrantCreated(created)),
    }));
    let seen = Seen {
        command: text("command"),
        index: 1,
        answer,
        age: 0,
    };
    add(all, "reply.grant_created", &seen);
}

fn policy() -> Policy {
    Policy {
        four_eyes: true,
        timeout: 1,
        max_timebox: 2,
        set_at: 3,
        set_by: text("operator/root"),
    }
}

/// One envelope for each command.
pub(super) fn commands(samples: &mut BTreeMap<String, Vec<u8>>) {
    let all: [Command; 6] = [
        CreateGrant {
            grant_id: id(2),
            run_id: id(3),
            tool: text("resize"),
            session: text("monday"),
            ttl_ms: 1,
            summary: text("thumbnails"),
            risk: Risk::High as i32,
            approval_id: id(1),
        }
        .into(),
        RevokeGrant {
            grant_id: id(2),
            reason: text("no"),
            cancel_run: true,
        }
        .into(),
        Decide {
            approval_id: id(1),
            allow: true,
            scope: Scope::Timeboxed as i32,
            ttl_ms: 1,
            reason: text("go"),
        }
        .into(),
        Withdraw {
            approval_id: id(1),
            reason: text("enough"),
        }
        .into(),
        Expire {
            approvals: vec![id(1)],
            grants: vec![id(2)],
        }
        .into(),
        SetPolicy { policy: policy() }.into(),
    ];
    for (at, command) in (600..).zip(all) {
        let actor = Actor::Operator {
            name: text("alice"),
            fingerprint: fingerprint("alice"),
        };
        let envelope = Envelope {
            request_id: id(at),
            actor,
            command,
        };
        let bytes = envelope.encode();
        assert_eq!(decode(&bytes), Ok(envelope.clone()));
        samples.insert(format!("command.{}", envelope.command.name()), bytes);
    }
}

/// Numbers of enums, and keys.
pub(super) fn shapes(samples: &mut BTreeMap<String, Vec<u8>>) {
    fn numbers<E: TryFrom<i32> + std::fmt::Debug>() -> Vec<u8> {
        let known = |number: i32| E::try_from(number).ok().map(|it| format!("{it:?}={number} "));
        (0..64).filter_map(known).collect::<String>().into_bytes()
    }
    let enums = [
        ("approval_subject", numbers::<Subject>()),
        ("approval_state", numbers::<ApprovalState>()),
        ("approval_risk", numbers::<Risk>()),
        ("approval_scope", numbers::<Scope>()),
        ("grant_state", numbers::<GrantState>()),
    ];
    samples.extend(enums.map(|(name, numbers)| (format!("enum.{name}"), numbers)));
    let covers = (
        tables::Text("operator/anna"),
        tables::Text("resize"),
        tables::Text("monday"),
        2u32,
    );
    let key = tables::APPROVALS_STANDING.key((covers, (258u64, id(1))));
    samples.insert("key.approval_standing".to_owned(), key);
    let key = tables::GRANTS_LIVE_OF.key((tables::Text("anna"), id(1)));
    samples.insert("key.grant_live_of".to_owned(), key);
}
