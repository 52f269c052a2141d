//! Dispatches: one invocation of one capability on one node.
//!
//! Payload and result lie beside the record, so that a change of state does not write them again.
//! Invariants: a dispatch ends exactly once; only its node, in the epoch that it is bound to, may end it with
//! a result; `once` work is never delivered in two epochs; every open dispatch is in the device's queue and
//! the deadline index, no ended one is; a node is given no more at a time than it has slots (`slots`).

mod mediation;
mod moves;
mod rules;
mod slots;
mod store;
mod story;

pub(crate) use moves::{cancel_all, on_attach, on_gone};
pub(crate) use rules::apply;
pub(crate) use slots::fill;
pub use slots::{capability_queue, capability_slots, device_queue, device_slots, load, next_runnable};
pub use store::{
    ahead_of, by_state, due, due_again, list, list_of_device, log_tail, next_deadline, open_of_device,
    payload, queue_length, result,
};
pub(crate) use store::{forget_finished, waiting_key};
pub use story::{ANY_FAILURE, Attempt, CancelAsked, Late, Mediation, Priority, Retry, SESSION_LOST};

use crate::ids::Id;
use crate::read::Read;
use crate::tables;
use bytes::Bytes;

pub use crate::nodes::Effect;

/// Where a dispatch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum State {
    /// Waits for a session.
    Queued = 0,
    /// Bound to a session.
    Dispatched = 1,
    /// Waits for the person at the machine.
    AwaitingLocalMediation = 2,
    /// Ended with a result.
    Succeeded = 3,
    /// Ended with an error.
    Failed = 4,
    /// The deadline came first.
    TimedOut = 5,
    /// The node refused it.
    Rejected = 6,
    /// An operator, or a revocation, took it back.
    Cancelled = 7,
    /// A `once` dispatch whose session ended: it is not known whether it ran.
    SessionLost = 8,
    /// Bound, and wanted back: the node has to say what became of it.
    Cancelling = 9,
}

impl State {
    /// All of them.
    pub const ALL: [State; 10] = [
        State::Queued,
        State::Dispatched,
        State::AwaitingLocalMediation,
        State::Cancelling,
        State::Succeeded,
        State::Failed,
        State::TimedOut,
        State::Rejected,
        State::Cancelled,
        State::SessionLost,
    ];

    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            State::Queued => "queued",
            State::Dispatched => "dispatched",
            State::AwaitingLocalMediation => "awaiting_local_mediation",
            State::Cancelling => "cancelling",
            State::Succeeded => "succeeded",
            State::Failed => "failed",
            State::TimedOut => "timed_out",
            State::Rejected => "rejected",
            State::Cancelled => "cancelled",
            State::SessionLost => "session_lost",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<State> {
        State::ALL.into_iter().find(|state| state.as_str() == text)
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        !self.is_bound() && self != State::Queued
    }

    /// Whether it is with its node, and takes a slot there.
    #[must_use]
    pub fn is_bound(self) -> bool {
        matches!(
            self,
            State::Dispatched | State::AwaitingLocalMediation | State::Cancelling
        )
    }
}

/// Why a dispatch failed or was refused, in the node's words.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Failure {
    /// Short and stable, such as `exit_status`.
    #[prost(string, tag = "1")]
    pub code: String,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// One invocation.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Dispatch {
    /// Names it.
    #[prost(message, required, tag = "1")]
    pub id: Id,
    /// The node.
    #[prost(message, required, tag = "2")]
    pub device_id: Id,
    /// The capability.
    #[prost(string, tag = "3")]
    pub capability: String,
    /// As the capability declared it at submission.
    #[prost(enumeration = "Effect", tag = "4")]
    pub effect: i32,
    /// Where it stands.
    #[prost(enumeration = "State", tag = "5")]
    pub state: i32,
    /// Session that it is bound to; 0 while it is queued.
    #[prost(uint64, tag = "6")]
    pub epoch: u64,
    /// Replica that holds that session; 0 while it is queued.
    #[prost(uint64, tag = "7")]
    pub replica_id: u64,
    /// How often it was delivered.
    #[prost(uint32, tag = "8")]
    pub attempt: u32,
    /// When it was accepted.
    #[prost(uint64, tag = "9")]
    pub submitted_at: u64,
    /// First moment at which it is too late.
    #[prost(uint64, tag = "10")]
    pub deadline_at: u64,
    /// Actor who submitted it.
    #[prost(string, tag = "11")]
    pub submitted_by: String,
    /// When it ended; 0 while it is open.
    #[prost(uint64, tag = "12")]
    pub ended_at: u64,
    /// Why it failed or was refused.
    #[prost(message, optional, tag = "13")]
    pub error: Option<Failure>,
    /// Why it was cancelled.
    #[prost(string, tag = "14")]
    pub reason: String,
    /// Size of the payload in bytes.
    #[prost(uint32, tag = "15")]
    pub payload_size: u32,
    /// Size of the result in bytes.
    #[prost(uint32, tag = "16")]
    pub result_size: u32,
    /// How urgent it is.
    #[prost(enumeration = "Priority", tag = "17")]
    pub priority: i32,
    /// Log index at which it was accepted: the order within a class.
    #[prost(uint64, tag = "18")]
    pub order: u64,
    /// While it waits for its next attempt: the first moment for it; 0 when it may run at once.
    #[prost(uint64, tag = "19")]
    pub not_before: u64,
    /// When it is run again; absent for `once` work.
    #[prost(message, optional, tag = "20")]
    pub retry: Option<Retry>,
    /// Earlier attempts, oldest first, at most `limits::ATTEMPTS_KEPT`.
    #[prost(message, repeated, tag = "21")]
    pub attempts: Vec<Attempt>,
    /// Who has to act, while somebody has to.
    #[prost(message, optional, tag = "22")]
    pub mediation: Option<Mediation>,
    /// A result that came after the end.
    #[prost(message, optional, tag = "23")]
    pub late: Option<Late>,
    /// Bytes of the last lines that the program wrote.
    #[prost(uint32, tag = "24")]
    pub tail_size: u32,
    /// Who wanted it back while it was with its node.
    #[prost(message, optional, tag = "25")]
    pub cancel: Option<CancelAsked>,
    /// When the present attempt was bound.
    #[prost(uint64, tag = "26")]
    pub assigned_at: u64,
    /// The node itself said how it ended.
    #[prost(bool, tag = "27")]
    pub reported: bool,
}

/// Counters of dispatches; there is one.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Totals {
    /// Those that have not ended.
    #[prost(uint64, tag = "1")]
    pub open: u64,
    /// Their payload bytes.
    #[prost(uint64, tag = "2")]
    pub open_bytes: u64,
    /// Ended ones that are kept.
    #[prost(uint64, tag = "3")]
    pub finished: u64,
    /// Their payload and result bytes.
    #[prost(uint64, tag = "4")]
    pub finished_bytes: u64,
    /// None of them ended earlier: where forgetting looks for the oldest.
    #[prost(uint64, tag = "5")]
    pub finished_oldest: u64,
}

/// What is asked about dispatches.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// The one thing that is asked.
    #[prost(oneof = "Action", tags = "1, 2, 3, 4, 5, 6, 7")]
    pub action: Option<Action>,
}

/// One thing to ask about dispatches.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Action {
    /// See [`Submit`].
    #[prost(message, tag = "1")]
    Submit(Submit),
    /// See [`Complete`].
    #[prost(message, tag = "2")]
    Complete(Complete),
    /// See [`AwaitMediation`].
    #[prost(message, tag = "3")]
    AwaitMediation(AwaitMediation),
    /// See [`ResumeFromMediation`].
    #[prost(message, tag = "4")]
    ResumeFromMediation(ResumeFromMediation),
    /// See [`Cancel`].
    #[prost(message, tag = "5")]
    Cancel(Cancel),
    /// See [`Expire`].
    #[prost(message, tag = "6")]
    Expire(Expire),
    /// See [`Wake`].
    #[prost(message, tag = "7")]
    Wake(Wake),
}

/// Asks a node to do something; bound to its live session, or queued. Actor: operator. Reply: `Submitted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Submit {
    /// The dispatch's id.
    #[prost(message, required, tag = "1")]
    pub dispatch_id: Id,
    /// The node.
    #[prost(message, required, tag = "2")]
    pub device_id: Id,
    /// The capability.
    #[prost(string, tag = "3")]
    pub capability: String,
    /// At most `limits::PAYLOAD` bytes.
    #[prost(bytes = "bytes", tag = "4")]
    pub payload: Bytes,
    /// Deadline, counted from acceptance; 0: 30 s; at most 24 h.
    #[prost(uint64, tag = "5")]
    pub timeout_ms: u64,
    /// How urgent it is.
    #[prost(enumeration = "Priority", tag = "6")]
    pub priority: i32,
    /// Most attempts, of those that the capability declares; 0: as declared. `once` work has one.
    #[prost(uint32, tag = "7")]
    pub max_attempts: u32,
}

/// How the node ended a dispatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Outcome {
    /// With a result.
    Succeeded = 0,
    /// With an error.
    Failed = 1,
    /// It did not begin.
    Rejected = 2,
    /// It was stopped, or had not begun, because it was taken back.
    Cancelled = 3,
}

impl Outcome {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Succeeded => "succeeded",
            Outcome::Failed => "failed",
            Outcome::Rejected => "rejected",
            Outcome::Cancelled => "cancelled",
        }
    }

    /// From the text form: `succeeded`, `failed`, `rejected`, `cancelled`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Outcome> {
        let all = [
            Outcome::Succeeded,
            Outcome::Failed,
            Outcome::Rejected,
            Outcome::Cancelled,
        ];
        all.into_iter().find(|outcome| outcome.as_str() == text)
    }
}

/// Ends a dispatch with the node's outcome, or makes it wait for its next attempt. Of a dispatch that had ended
/// without one it is noted as late, once. Actor: that node. Reply: `Done`, or `Late`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Complete {
    /// The dispatch.
    #[prost(message, required, tag = "1")]
    pub dispatch_id: Id,
    /// Session in which the node has it.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// How it ended.
    #[prost(enumeration = "Outcome", tag = "3")]
    pub outcome: i32,
    /// At most `limits::PAYLOAD` bytes.
    #[prost(bytes = "bytes", tag = "4")]
    pub result: Bytes,
    /// Why it failed or was refused.
    #[prost(message, optional, tag = "5")]
    pub error: Option<Failure>,
    /// The last lines that the program wrote, at most `limits::LOG_TAIL` bytes.
    #[prost(bytes = "bytes", tag = "6")]
    pub log_tail: Bytes,
    /// The attempt that it is of; 0: the present one.
    #[prost(uint32, tag = "7")]
    pub attempt: u32,
}

/// Says that a person must act first. Actor: that node. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AwaitMediation {
    /// The dispatch.
    #[prost(message, required, tag = "1")]
    pub dispatch_id: Id,
    /// Session in which the node has it.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// What they are asked.
    #[prost(string, tag = "3")]
    pub prompt: String,
    /// Their machine, as it calls itself.
    #[prost(string, tag = "4")]
    pub host: String,
}

/// Says that the person agreed. Actor: that node. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ResumeFromMediation {
    /// The dispatch.
    #[prost(message, required, tag = "1")]
    pub dispatch_id: Id,
    /// Session in which the node has it.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
}

/// Takes an open dispatch back: at once while it waits. One that is with its node is `cancelling` until the node says
/// what became of it, or `limits::CANCEL_PATIENCE` is over. Actor: operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cancel {
    /// The dispatch.
    #[prost(message, required, tag = "1")]
    pub dispatch_id: Id,
    /// Why; may be empty.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Ends those of the list whose deadline has passed; others are left alone. Actor: system or a replica.
/// Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Expire {
    /// At most `limits::EXPIRE_BATCH`.
    #[prost(message, repeated, tag = "1")]
    pub ids: Vec<Id>,
}

/// Lets those of the list run whose wait for the next attempt is over; others are left alone. Actor: system or a
/// replica. Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Wake {
    /// At most `limits::EXPIRE_BATCH`.
    #[prost(message, repeated, tag = "1")]
    pub ids: Vec<Id>,
}

/// The dispatch with this id.
#[must_use]
pub fn dispatch(r: &dyn Read, id: Id) -> Option<Dispatch> {
    tables::DISPATCHES.get(r, id)
}

/// Counters of dispatches.
#[must_use]
pub fn totals(r: &dyn Read) -> Totals {
    tables::DISPATCH_TOTALS.get(r, ()).unwrap_or_default()
}

/// How many dispatches of this device have not ended.
#[must_use]
pub fn open_count(r: &dyn Read, device_id: Id) -> u32 {
    queue_length(r, device_id).open
}

/// How many dispatches of a device have not ended.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct QueueLength {
    /// Not ended.
    #[prost(uint32, tag = "1")]
    pub open: u32,
    /// Of these, with the node.
    #[prost(uint32, tag = "2")]
    pub bound: u32,
}

/// How many dispatches of one capability of a device have not ended.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Load {
    /// With the node.
    #[prost(uint32, tag = "1")]
    pub bound: u32,
    /// Waiting, for a slot or for their next attempt.
    #[prost(uint32, tag = "2")]
    pub waiting: u32,
}
