//! Samples of replies. A new field must be filled in here: the literals name every field.

use std::collections::BTreeMap;

use palyra_state::{Accepted, Answer, Reply, Seen, dispatch, pairing, reply};

use crate::kit::fingerprint;
use crate::records::{add, id, text};

#[allow(clippy::too_many_lines)] // one list
pub(crate) fn replies(all: &mut BTreeMap<String, Vec<u8>>) {
    let (id, fingerprint) = (id(11), fingerprint("n1"));
    let method = pairing::Method::Ticket as i32;
    let state = dispatch::State::Dispatched as i32;
    let attempt = reply::AttemptCounted {
        outcome: reply::AttemptOutcome::Granted as i32,
        code_id: id,
        code_number: 1,
        method,
        tries_left: 2,
        attempt_id: id,
    };
    let submitted = reply::Submitted {
        dispatch_id: id,
        state,
        epoch: 1,
        replica_id: 2,
        deadline_at: 3,
    };
    let list = [
        ("done", Reply::done()),
        ("late", Reply::Late(reply::Late { state })),
        (
            "token_minted",
            Reply::TokenMinted(reply::TokenMinted {
                token_id: id,
                expires_at: 1,
            }),
        ),
        (
            "replica_allocated",
            Reply::ReplicaAllocated(reply::ReplicaAllocated { replica_id: 1 }),
        ),
        (
            "code_minted",
            Reply::CodeMinted(reply::CodeMinted {
                code_id: id,
                number: 1,
                expires_at: 2,
            }),
        ),
        ("attempt", Reply::Attempt(attempt)),
        (
            "proved",
            Reply::Proved(reply::Proved {
                pairing_id: id,
                expires_at: 1,
            }),
        ),
        (
            "approved",
            Reply::Approved(reply::Approved {
                device_id: id,
                fingerprint,
            }),
        ),
        (
            "revoked",
            Reply::Revoked(reply::Revoked {
                index: 1,
                already: true,
                cancelled: 2,
            }),
        ),
        (
            "registered",
            Reply::Registered(reply::Registered {
                generation: 1,
                changed: true,
            }),
        ),
        (
            "attached",
            Reply::Attached(reply::Attached {
                epoch: 1,
                assigned: 2,
                rebound: 3,
                lost: 4,
            }),
        ),
        ("submitted", Reply::Submitted(submitted)),
        ("counted", Reply::Counted(reply::Counted { count: 1 })),
        (
            "renewed",
            Reply::Renewed(reply::Renewed {
                outcome: reply::RenewalOutcome::CloneSuspected as i32,
                fingerprint,
                counter: 3,
            }),
        ),
        (
            "rotation_requested",
            Reply::RotationRequested(reply::RotationRequested {
                index: 1,
                already: true,
                deadline_at: 3,
            }),
        ),
    ];
    for (name, reply) in list.into_iter().chain(super::leases::replies()) {
        let answer = Some(Answer::Reply(Accepted { reply: Some(reply) }));
        add(
            all,
            &format!("reply.{name}"),
            &Seen {
                command: text("command"),
                index: 1,
                answer,
                age: 0,
            },
        );
    }
}
