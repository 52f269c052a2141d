//! Remembered requests: a retry of a request that was decided gets the same answer and has no second effect.
//!
//! A request is known by (actor, request id). Requests are forgotten in the order of their age, and what is
//! not above something forgotten is refused, never applied again: forgetting cannot make a request run twice.
//! The age is the time of the decision, so that a client whose clock is behind is answered as well, or the
//! time in the id where that is later, so that one whose clock was ahead is not shut out by its own ids. The
//! floor is kept per actor, so that nobody's ids can shut others out, and it comes from what was forgotten
//! rather than from the clock, so that a replica whose clock ran ahead cannot either.

use std::ops::ControlFlow;

use crate::command::Envelope;
use crate::ids::Id;
use crate::limits;
use crate::meta::Meta;
use crate::reject::{Code, Reject};
use crate::reply::Reply;
use crate::tables::{REQUESTERS, REQUESTS_BY_AGE, REQUESTS_SEEN};
use crate::txn::Txn;

/// What was answered to a request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Seen {
    /// Name of the command.
    #[prost(string, tag = "1")]
    pub command: String,
    /// Log index of the entry that decided it.
    #[prost(uint64, tag = "2")]
    pub index: u64,
    /// The answer.
    #[prost(oneof = "Answer", tags = "3, 4")]
    pub answer: Option<Answer>,
    /// Time of the state when it was decided, or the time in its id when that is later.
    #[prost(uint64, tag = "5")]
    pub age: u64,
}

/// Reply or refusal.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Answer {
    /// It was refused.
    #[prost(message, tag = "3")]
    Reject(Reject),
    /// It was accepted.
    #[prost(message, tag = "4")]
    Reply(Accepted),
}

/// An accepted request's reply.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Accepted {
    /// The reply.
    #[prost(
        oneof = "Reply",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 19, 25, 26, 27, 30, 31, 32, 33, 35"
    )]
    pub reply: Option<Reply>,
}

/// What is remembered of one actor's requests.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Requester {
    /// How many are remembered.
    #[prost(uint64, tag = "1")]
    pub remembered: u64,
    /// The largest id that was forgotten; what is not above it is refused.
    #[prost(message, required, tag = "2")]
    pub floor: Id,
}

/// What is known about a request before it is decided.
pub(crate) enum Known {
    /// Nothing: decide it.
    New,
    /// It was decided.
    Decided(Result<Reply, Reject>),
    /// Its id cannot be used.
    Unusable(Reject),
}

/// Whether requests of this command are remembered. Sweeps are not: doing one again does nothing. Renewals are not,
/// either: there are too
/// many, and one that is done again moves a deadline that its worker does not count on.
fn remembers(command: &str) -> bool {
    !matches!(
        command,
        "nodes.detach"
            | "nodes.detach_replica"
            | "dispatch.expire"
            | "pairing.expire"
            | "approvals.expire"
            | "fleet.lapse"
            | "fleet.recheck"
            | "leases.expire"
            | "leases.renew"
    )
}

/// Whether a refusal is remembered. A report from an ended session is not: the node attaches again and sends
/// it anew, under the same id, from its new session.
fn is_final(answer: &Result<Reply, Reject>) -> bool {
    !matches!(answer, Err(reject) if matches!(reject.kind(), Code::EpochStale | Code::SessionStale))
}

/// Looks a request up.
pub(crate) fn look_up(txn: &Txn<'_>, envelope: &Envelope) -> Known {
    let (id, command) = (envelope.request_id, envelope.command.name());
    if !remembers(command) {
        return Known::New;
    }
    // Planted: a retry is another request.
    if palyra_fault::planted("retry-applied-again") {
        return Known::New;
    }
    let requester = envelope.actor.dedup_key();
    if let Some(seen) = REQUESTS_SEEN.get(txn, (requester, id)) {
        if seen.command != command {
            return Known::Unusable(Reject::new(Code::RequestReused, [&id, &seen.command]));
        }
        return Known::Decided(seen.into_answer());
    }
    let floor = REQUESTERS.get(txn, requester).unwrap_or_default().floor;
    if id <= floor {
        return Known::Unusable(Reject::new(Code::RequestTooOld, [&id]));
    }
    if id.time_ms() > txn.now.saturating_add(limits::REQUEST_AHEAD_MAX) {
        return Known::Unusable(Reject::new(Code::RequestAhead, [&id]));
    }
    Known::New
}

impl Seen {
    fn into_answer(self) -> Result<Reply, Reject> {
        match self.answer {
            Some(Answer::Reject(reject)) => Err(reject),
            Some(Answer::Reply(accepted)) => Ok(accepted.reply.unwrap_or_else(Reply::done)),
            None => Ok(Reply::done()),
        }
    }
}

/// Remembers an answer, and forgets a few old ones first.
pub(crate) fn remember(
    txn: &mut Txn<'_>,
    meta: &mut Meta,
    envelope: &Envelope,
    answer: &Result<Reply, Reject>,
) {
    let (id, command) = (envelope.request_id, envelope.command.name());
    if !remembers(command) || !is_final(answer) {
        return;
    }
    let requester = envelope.actor.dedup_key();
    forget_old(txn, meta, requester);
    let age = txn.now.max(id.time_ms());
    let answer = match answer {
        Ok(reply) => Answer::Reply(Accepted {
            reply: Some(reply.clone()),
        }),
        Err(reject) => Answer::Reject(reject.clone()),
    };
    let seen = Seen {
        command: command.to_owned(),
        index: txn.index,
        answer: Some(answer),
        age,
    };
    txn.put(&REQUESTS_SEEN, (requester, id), &seen);
    txn.mark(&REQUESTS_BY_AGE, (age, id, requester));
    let mut record = REQUESTERS.get(txn, requester).unwrap_or_default();
    record.remembered += 1;
    txn.put(&REQUESTERS, requester, &record);
    meta.requests_seen += 1;
    // Lower than what was forgotten when ids from far ahead had filled the table.
    meta.requests_oldest = meta.requests_oldest.min(age);
}

fn forget_old(txn: &mut Txn<'_>, meta: &mut Meta, requester: Id) {
    let before = txn.now.saturating_sub(limits::DEDUP_WINDOW);
    let mut oldest = Vec::new();
    let from = meta.requests_oldest.to_be_bytes();
    REQUESTS_BY_AGE.visit(txn, (), Some(&from), &mut |key, _| {
        oldest.extend(split(key));
        if oldest.len() < limits::DEDUP_EVICT {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    for (age, id, owner) in oldest {
        if age < before || meta.requests_seen >= limits::DEDUP_MAX {
            forget(txn, meta, owner, id);
            meta.requests_oldest = age;
        }
    }
    if REQUESTERS.get(txn, requester).unwrap_or_default().remembered >= limits::DEDUP_PER_ACTOR {
        for id in REQUESTS_SEEN.ids(txn, requester, None, 1) {
            forget(txn, meta, requester, id);
        }
    }
}

/// Age, request id and requester of a key of [`REQUESTS_BY_AGE`].
pub(crate) fn split(key: &[u8]) -> Option<(u64, Id, Id)> {
    let (age, rest) = key.split_first_chunk::<8>()?;
    let (id, requester) = rest.split_first_chunk::<16>()?;
    Some((
        u64::from_be_bytes(*age),
        Id::from_bytes(*id),
        Id::from_slice(requester)?,
    ))
}

fn forget(txn: &mut Txn<'_>, meta: &mut Meta, requester: Id, id: Id) {
    let Some(seen) = REQUESTS_SEEN.get(txn, (requester, id)) else {
        return;
    };
    txn.delete(&REQUESTS_SEEN, (requester, id));
    txn.delete(&REQUESTS_BY_AGE, (seen.age, id, requester));
    let mut record = REQUESTERS.get(txn, requester).unwrap_or_default();
    record.remembered = record.remembered.saturating_sub(1);
    record.floor = record.floor.max(id);
    txn.put(&REQUESTERS, requester, &record);
    meta.requests_seen = meta.requests_seen.saturating_sub(1);
}
