//! The record of a run, and what belongs to it.

use std::collections::BTreeMap;

use crate::dispatch::{Effect, Failure};
use crate::fleet::Evidence;
use crate::ids::{Digest, Id};

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum RunState {
    /// Input files have not arrived.
    AwaitingInput = 0,
    /// Waits for a worker.
    Queued = 1,
    /// Leased; the worker has not begun.
    Leased = 2,
    /// The worker has begun.
    Running = 3,
    /// Its lease ended without a result; it waits until the fence is past.
    Fenced = 4,
    /// Ended with a result.
    Succeeded = 5,
    /// Ended with an error.
    Failed = 6,
    /// The worker did not begin, and no other is tried.
    Refused = 7,
    /// Taken back; its lease has not ended.
    Cancelling = 8,
    /// Taken back.
    Cancelled = 9,
    /// The deadline came first.
    TimedOut = 10,
    /// Its lease ended without a result, and it may not be run again: it is not known whether it ran.
    Lost = 11,
}

impl RunState {
    /// All of them, in the order of their numbers.
    pub const ALL: [RunState; 12] = [
        RunState::AwaitingInput,
        RunState::Queued,
        RunState::Leased,
        RunState::Running,
        RunState::Fenced,
        RunState::Succeeded,
        RunState::Failed,
        RunState::Refused,
        RunState::Cancelling,
        RunState::Cancelled,
        RunState::TimedOut,
        RunState::Lost,
    ];

    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            RunState::AwaitingInput => "awaiting_input",
            RunState::Queued => "queued",
            RunState::Leased => "leased",
            RunState::Running => "running",
            RunState::Fenced => "fenced",
            RunState::Succeeded => "succeeded",
            RunState::Failed => "failed",
            RunState::Refused => "refused",
            RunState::Cancelling => "cancelling",
            RunState::Cancelled => "cancelled",
            RunState::TimedOut => "timed_out",
            RunState::Lost => "lost",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<RunState> {
        RunState::ALL.into_iter().find(|state| state.as_str() == text)
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            RunState::Succeeded
                | RunState::Failed
                | RunState::Refused
                | RunState::Cancelled
                | RunState::TimedOut
                | RunState::Lost
        )
    }
}

/// Where a run may read and write, on the worker. Paths are relative, without `..`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Scope {
    /// A workspace that the worker's configuration names; empty: a fresh folder.
    #[prost(string, tag = "1")]
    pub root: String,
    /// What it may read and write.
    #[prost(string, repeated, tag = "2")]
    pub allowed: Vec<String>,
    /// What it may read only.
    #[prost(string, repeated, tag = "3")]
    pub read_only: Vec<String>,
}

/// What a run may use.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Limits {
    /// Memory in bytes; 0: as the worker has it.
    #[prost(uint64, tag = "1")]
    pub memory_bytes: u64,
    /// Processes and threads.
    #[prost(uint32, tag = "2")]
    pub processes: u32,
    /// Bytes of everything that it writes.
    #[prost(uint64, tag = "3")]
    pub disk_bytes: u64,
    /// 100 is one core.
    #[prost(uint32, tag = "4")]
    pub cpu_percent: u32,
    /// Open files of one process.
    #[prost(uint32, tag = "5")]
    pub open_files: u32,
    /// Whether it may use the network.
    #[prost(bool, tag = "6")]
    pub network: bool,
}

/// Files by path.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Manifest {
    /// At most `limits::MANIFEST`.
    #[prost(message, repeated, tag = "1")]
    pub entries: Vec<ManifestEntry>,
}

/// A file.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ManifestEntry {
    /// Relative, without `..`.
    #[prost(string, tag = "1")]
    pub path: String,
    /// SHA-256.
    #[prost(message, required, tag = "2")]
    pub digest: Digest,
    /// Bytes.
    #[prost(uint64, tag = "3")]
    pub size: u64,
    /// Its bytes are kept with the run; an input that is not must lie in the workspace.
    #[prost(bool, tag = "4")]
    pub stored: bool,
    /// It may be executed.
    #[prost(bool, tag = "5")]
    pub executable: bool,
}

/// What was said of a cleanup.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Cleanup {
    /// When.
    #[prost(uint64, tag = "1")]
    pub at: u64,
    /// Nothing is left.
    #[prost(bool, tag = "2")]
    pub ok: bool,
    /// What is left, and why.
    #[prost(string, tag = "3")]
    pub message: String,
    /// How many files were removed.
    #[prost(uint64, tag = "4")]
    pub removed_files: u64,
    /// Their bytes.
    #[prost(uint64, tag = "5")]
    pub removed_bytes: u64,
    /// The worker, or the operator who vouched.
    #[prost(string, tag = "6")]
    pub by: String,
}

/// An earlier attempt.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Attempt {
    /// From 1.
    #[prost(uint32, tag = "1")]
    pub number: u32,
    /// Its lease.
    #[prost(message, required, tag = "2")]
    pub lease_id: Id,
    /// Its worker.
    #[prost(message, required, tag = "3")]
    pub worker_id: Id,
    /// Its fence.
    #[prost(uint64, tag = "4")]
    pub fence: u64,
    /// When it was leased.
    #[prost(uint64, tag = "5")]
    pub leased_at: u64,
    /// When it ended.
    #[prost(uint64, tag = "6")]
    pub ended_at: u64,
    /// The lease's end reason, or the error code.
    #[prost(string, tag = "7")]
    pub why: String,
}

/// One execution of one tool.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Run {
    /// Names it.
    #[prost(message, required, tag = "1")]
    pub id: Id,
    /// The tool.
    #[prost(string, tag = "2")]
    pub tool: String,
    /// The grant that permitted it.
    #[prost(message, required, tag = "3")]
    pub grant_id: Id,
    /// Where it stands.
    #[prost(enumeration = "RunState", tag = "4")]
    pub state: i32,
    /// Actor who started it.
    #[prost(string, tag = "5")]
    pub requested_by: String,
    /// What happens when it is run twice.
    #[prost(enumeration = "Effect", tag = "6")]
    pub effect: i32,
    /// The present attempt, or the last; 0: it was not leased yet.
    #[prost(uint32, tag = "7")]
    pub attempt: u32,
    /// Attempts in all.
    #[prost(uint32, tag = "8")]
    pub max_attempts: u32,
    /// When it was accepted.
    #[prost(uint64, tag = "9")]
    pub submitted_at: u64,
    /// First moment at which it is too late.
    #[prost(uint64, tag = "10")]
    pub deadline_at: u64,
    /// When it ended; 0: it has not.
    #[prost(uint64, tag = "11")]
    pub ended_at: u64,
    /// Of its leases, in milliseconds.
    #[prost(uint64, tag = "12")]
    pub ttl: u64,
    /// The lease of the present attempt, or the last.
    #[prost(message, optional, tag = "13")]
    pub lease_id: Option<Id>,
    /// Its worker.
    #[prost(message, optional, tag = "14")]
    pub worker_id: Option<Id>,
    /// Its fence; 0: it was not leased yet.
    #[prost(uint64, tag = "15")]
    pub fence: u64,
    /// Input files.
    #[prost(message, optional, tag = "16")]
    pub inputs: Option<Manifest>,
    /// Output files.
    #[prost(message, optional, tag = "17")]
    pub outputs: Option<Manifest>,
    /// Where it may read and write.
    #[prost(message, optional, tag = "18")]
    pub scope: Option<Scope>,
    /// What it may use.
    #[prost(message, optional, tag = "19")]
    pub limits: Option<Limits>,
    /// Exit code of the program.
    #[prost(int32, optional, tag = "20")]
    pub exit_code: Option<i32>,
    /// Why it failed or was refused.
    #[prost(message, optional, tag = "21")]
    pub error: Option<Failure>,
    /// Earlier attempts, oldest first.
    #[prost(message, repeated, tag = "22")]
    pub attempts: Vec<Attempt>,
    /// Least evidence of its worker, beside the policy's.
    #[prost(enumeration = "Evidence", tag = "23")]
    pub min_evidence: i32,
    /// Labels of the worker's node.
    #[prost(btree_map = "string, string", tag = "24")]
    pub labels: BTreeMap<String, String>,
    /// What it used.
    #[prost(btree_map = "string, uint64", tag = "25")]
    pub usage: BTreeMap<String, u64>,
    /// What held it.
    #[prost(string, repeated, tag = "26")]
    pub sandbox: Vec<String>,
    /// Why it was cancelled.
    #[prost(string, tag = "27")]
    pub reason: String,
    /// Actor who cancelled it.
    #[prost(string, tag = "28")]
    pub cancelled_by: String,
    /// Place in the queue: the log index of its acceptance.
    #[prost(uint64, tag = "29")]
    pub order: u64,
    /// Size of the parameters.
    #[prost(uint32, tag = "30")]
    pub params_size: u32,
    /// Size of the result.
    #[prost(uint32, tag = "31")]
    pub result_size: u32,
    /// Bytes of its files that are kept.
    #[prost(uint64, tag = "32")]
    pub artifact_bytes: u64,
    /// Attempts that count: those that a worker took or refused. An offer that was never taken is none.
    #[prost(uint32, tag = "33")]
    pub tried: u32,
    /// Size of the log's last lines.
    #[prost(uint32, tag = "34")]
    pub tail_size: u32,
}

/// A file that arrives, or has arrived.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Artifact {
    /// SHA-256 of the whole.
    #[prost(message, required, tag = "1")]
    pub digest: Digest,
    /// Bytes of the whole.
    #[prost(uint64, tag = "2")]
    pub size: u64,
    /// Bytes that have arrived.
    #[prost(uint64, tag = "3")]
    pub received: u64,
    /// Every byte has arrived, and the digest is right.
    #[prost(bool, tag = "4")]
    pub complete: bool,
    /// Fence of the lease that an output arrived under; 0: an input.
    #[prost(uint64, tag = "5")]
    pub fence: u64,
}
