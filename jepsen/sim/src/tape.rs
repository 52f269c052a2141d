//! The history of a run in the form of `palyra_jepsen_check`, on the clock of the simulation: what the shared checkers
//! judge. Each module that plays a part of a workload writes its operations here, in the words of the workload's module
//! there.
//!
//! Never here: `history`, which has each command in the one order in which the simulation runs. Invariants: an
//! operation goes in before it is sent and ends after its answer was heard; each has a process of its own.

use palyra_jepsen_check::Kind;
use palyra_jepsen_check::history::{Answer as Told, Pending};
use palyra_state::journal::{self, Row};
use palyra_state::{Cursor, Envelope, Id, MemRead};
use serde_json::{Value, json};

use crate::cluster::{Answer, Cluster};
use crate::history::{Asked, Deed, Outcome};

/// How an operation ended, in the words of the shared history.
pub(crate) fn kind(outcome: &Outcome) -> Kind {
    match outcome {
        Outcome::Ok(_) | Outcome::Told | Outcome::Quiet(_) => Kind::Ok,
        Outcome::Refused => Kind::Fail,
        Outcome::Unknown => Kind::Info,
    }
}

/// An answer that says no more than this.
pub(crate) fn told(value: Value) -> Told {
    Told {
        value,
        ..Told::default()
    }
}

/// A cursor.
pub(crate) fn place(cursor: Cursor) -> Value {
    json!([cursor.index, cursor.ordinal])
}

/// A row of the journal.
pub(crate) fn row(row: &Row) -> Value {
    json!({
        "index": row.index,
        "ordinal": row.ordinal,
        "at_ms": row.at_ms,
        "actor": row.actor,
        "action": row.action,
        "subject": row.subject,
        "request": row.request_id.to_string(),
        "detail": row.detail,
        "prev": row.prev_hash.to_string(),
        "hash": row.hash.to_string(),
    })
}

impl Cluster {
    /// A call, under a process of its own.
    pub(crate) fn invoke(&self, f: &str, value: Value, at: Option<u64>, request: Option<Id>) -> Pending {
        let (node, request) = (at.map(|at| format!("r{at}")), request.map(|id| id.to_string()));
        self.world.note(&format!("{f} {value} {node:?}"));
        let now = self.world.elapsed_ns();
        let mut tape = self.tape.borrow_mut();
        let process = tape.process();
        tape.invoke(now, process, f, value, node, request)
    }

    /// It has ended.
    pub(crate) fn complete(&self, pending: &Pending, kind: Kind, answer: Told) {
        self.world.note(&format!(
            "{:?} {kind:?} {} {:?}",
            pending, answer.value, answer.error
        ));
        self.complete_unsaid(pending, kind, answer);
    }

    /// It has ended, with so much to say that the trace has had it in another form or not at all.
    pub(crate) fn complete_unsaid(&self, pending: &Pending, kind: Kind, answer: Told) {
        let now = self.world.elapsed_ns();
        self.tape.borrow_mut().complete(now, pending, kind, answer);
    }

    /// Something that took no time.
    pub(crate) fn happened(&self, f: &str, value: Value) {
        let call = self.invoke(f, value.clone(), None, None);
        self.complete_unsaid(&call, Kind::Ok, told(value));
    }

    /// A command as clients send it, in both histories: `value` is what is asked, and `more` adds what its answer says.
    pub(crate) async fn send(
        &self,
        at: u64,
        envelope: Envelope,
        deed: Deed,
        (f, value): (&str, Value),
        more: impl FnOnce(&Answer) -> Value,
    ) -> Answer {
        let call = self.invoke(f, value.clone(), Some(at), Some(envelope.request_id));
        let answer = self
            .ask_noted(at, envelope, |answer| Asked::Command {
                deed,
                request: answer.request,
            })
            .await;
        self.sent(&call, value, &answer, more);
        answer
    }

    /// What became of a command.
    pub(crate) fn sent(
        &self,
        call: &Pending,
        mut value: Value,
        answer: &Answer,
        more: impl FnOnce(&Answer) -> Value,
    ) {
        let kind = kind(&answer.outcome);
        if kind == Kind::Ok {
            merge(&mut value, more(answer));
        }
        if answer.again {
            value["duplicate"] = true.into();
        }
        if matches!(answer.outcome, Outcome::Quiet(_)) {
            value["quiet"] = true.into();
        }
        let refused = answer.reply.as_ref().and_then(|reply| reply.as_ref().err());
        let answer = Told {
            value,
            rev: answer.outcome.index(),
            error: refused.map(ToString::to_string),
            ..Told::default()
        };
        self.complete(call, kind, answer);
    }

    /// The journal as the replicas have it at the end. Where states are equal byte for byte one of them is read from
    /// its first row, and the others from its last.
    pub(crate) fn close_journal(&self, states: &[(u64, MemRead)], are_equal: bool) {
        let mut last = None;
        for (id, state) in states {
            let rows = match last {
                Some(_) if are_equal => Vec::new(),
                _ => journal::last_rows(state, usize::MAX),
            };
            let after = last.filter(|_| are_equal).map(place);
            let call = self.invoke("rows", json!({"after": after}), Some(*id), None);
            self.world
                .note(&format!("r{id} has {} rows after {after:?}", rows.len()));
            last = rows.last().map(Row::cursor).or(last);
            let rows: Vec<Value> = rows.iter().map(row).collect();
            let value = json!({"after": after, "rows": rows, "end": true});
            self.complete_unsaid(&call, Kind::Ok, told(value));
        }
    }
}

/// Adds the fields of one object to another.
fn merge(value: &mut Value, more: Value) {
    if let (Some(value), Value::Object(more)) = (value.as_object_mut(), more) {
        value.extend(more);
    }
}
