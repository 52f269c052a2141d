//! Dispatches: one invocation of one capability on one node.
//!
//! Payload and result lie beside the record, so that a change of state does not write them again.
//! Invariants: a dispatch ends exactly once; only its node, in the epoch that it is bound to, may end it with
//! a result; `once` work is never delivered in two epochs; every open dispatch is in the device's queue and
//! the deadline index, no ended one is.

mod rules;
mod store;

pub(crate) use rules::{apply, cancel_all, on_attach, on_gone};
pub(crate) use store::forget_finished;
pub use store::{by_state, due, list, list_of_device, next_deadline, open_of_device, payload, result};

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
}

impl State {
    /// All of them.
    pub const ALL: [State; 9] = [
        State::Queued,
        State::Dispatched,
        State::AwaitingLocalMediation,
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
        self >= State::Succeeded
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
    #[prost(oneof = "Action", tags = "1, 2, 3, 4, 5, 6")]
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
}

impl Outcome {
    /// From the text form: `succeeded`, `failed`, `rejected`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Outcome> {
        match text {
            "succeeded" => Some(Outcome::Succeeded),
            "failed" => Some(Outcome::Failed),
            "rejected" => Some(Outcome::Rejected),
            _ => None,
        }
    }
}

/// Ends a dispatch with the node's outcome. Actor: that node. Reply: `Done`.
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

/// Takes an open dispatch back. Actor: operator. Reply: `Done`.
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
    tables::QUEUE_LENGTHS.get(r, device_id).unwrap_or_default().open
}

/// How many dispatches of a device have not ended.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct QueueLength {
    /// Not ended.
    #[prost(uint32, tag = "1")]
    pub open: u32,
}
