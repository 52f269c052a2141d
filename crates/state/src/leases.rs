//! Runs, and the leases that bind workers to them.
//!
//! A run is one execution of one tool, permitted by one grant. A lease gives one slot of one worker to one
//! attempt of a run until an absolute moment of the log's time, which renewals move and a change of leader
//! does not. Its fence, a number that rises with every lease, goes with each message of the attempt. What
//! never lives here: who may be given work (that is `fleet`). Invariants: a slot has at most one lease that
//! has not ended; a run has at most one lease that has not ended; fences strictly rise; nothing is accepted
//! under another fence than that of the run's present lease, nor after its end; a lease that is not reported
//! clean keeps its slot and its run until its deadline has passed; a run ends once; every lease that has not
//! ended is in the deadline index under its deadline, no other is.

mod artifacts;
mod ends;
mod files;
mod queries;
mod reconcile;
mod rules;
mod runs;
mod select;
mod start;
mod store;
mod worker;

pub use artifacts::missing;
pub(crate) use ends::{cancel_by_grant, end_all};
pub use queries::{
    Waits, artifact, artifact_chunk, due, ended_of, is_held, lease, leases, leases_between, leases_of_run,
    live, live_of, log_tail, next_due, offers, params, result, run, runs, runs_between, runs_in_state,
    runs_of_worker, to_end, totals, waits_for,
};
pub(crate) use rules::apply;
pub use runs::{Artifact, Attempt, Cleanup, Limits, Manifest, ManifestEntry, Run, RunState, Scope};
pub(crate) use select::{fill, next_for};
pub(crate) use store::{forget, queue_key};
pub(crate) use worker::vouch;

use std::collections::BTreeMap;

use crate::dispatch::{Effect, Failure};
use crate::fleet::Evidence;
use crate::ids::{Digest, Id};
use bytes::Bytes;

/// Where a lease stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum LeaseState {
    /// Given; the worker has not taken it.
    Granted = 0,
    /// The worker has taken it.
    Active = 1,
    /// Nothing of the run is accepted any more: the worker cleans up, and until it says so, or the deadline
    /// has passed, the slot is taken.
    Ending = 2,
    /// Over; the slot is free.
    Ended = 3,
}

impl LeaseState {
    /// All of them.
    pub const ALL: [LeaseState; 4] = [
        LeaseState::Granted,
        LeaseState::Active,
        LeaseState::Ending,
        LeaseState::Ended,
    ];

    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            LeaseState::Granted => "granted",
            LeaseState::Active => "active",
            LeaseState::Ending => "ending",
            LeaseState::Ended => "ended",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<LeaseState> {
        LeaseState::ALL.into_iter().find(|state| state.as_str() == text)
    }
}

/// Why a lease ended, or began to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum EndReason {
    /// It has not.
    None = 0,
    /// The worker reported the run's result.
    Finished = 1,
    /// Its deadline passed without a renewal.
    Expired = 2,
    /// An operator revoked it.
    Revoked = 3,
    /// The run was cancelled.
    Cancelled = 4,
    /// The worker was away too long.
    WorkerLost = 5,
    /// The worker came back without it.
    WorkerRestarted = 6,
    /// The worker was quarantined.
    Quarantined = 7,
    /// The worker was drained.
    Drained = 8,
    /// The worker's device was revoked.
    DeviceRevoked = 9,
    /// The run's deadline passed.
    RunDeadline = 10,
}

impl EndReason {
    /// Stable text form; empty for `None`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            EndReason::None => "",
            EndReason::Finished => "finished",
            EndReason::Expired => "expired",
            EndReason::Revoked => "revoked",
            EndReason::Cancelled => "cancelled",
            EndReason::WorkerLost => "worker_lost",
            EndReason::WorkerRestarted => "worker_restarted",
            EndReason::Quarantined => "quarantined",
            EndReason::Drained => "drained",
            EndReason::DeviceRevoked => "device_revoked",
            EndReason::RunDeadline => "run_deadline",
        }
    }
}

/// A slot of a worker, bound to an attempt of a run for a time.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Lease {
    /// Names it: made by apply from the entry's request id and the fence.
    #[prost(message, required, tag = "1")]
    pub id: Id,
    /// The run.
    #[prost(message, required, tag = "2")]
    pub run_id: Id,
    /// Which attempt of it, from 1.
    #[prost(uint32, tag = "3")]
    pub attempt: u32,
    /// The worker.
    #[prost(message, required, tag = "4")]
    pub worker_id: Id,
    /// Which of its slots, from 0.
    #[prost(uint32, tag = "5")]
    pub slot: u32,
    /// Rises with every lease of the cluster; at least the log index that granted it.
    #[prost(uint64, tag = "6")]
    pub fence: u64,
    /// Where it stands.
    #[prost(enumeration = "LeaseState", tag = "7")]
    pub state: i32,
    /// What a renewal adds to the time of its entry, in milliseconds.
    #[prost(uint64, tag = "8")]
    pub ttl: u64,
    /// When it was granted.
    #[prost(uint64, tag = "9")]
    pub granted_at: u64,
    /// First moment at which it is over unless it is renewed; never later than the run's deadline and its own
    /// ttl.
    #[prost(uint64, tag = "10")]
    pub deadline_at: u64,
    /// When it was renewed; 0: never.
    #[prost(uint64, tag = "11")]
    pub renewed_at: u64,
    /// How often.
    #[prost(uint64, tag = "12")]
    pub renewals: u64,
    /// Session of the worker that it was granted or last reconciled in.
    #[prost(uint64, tag = "13")]
    pub epoch: u64,
    /// Replica that holds that session.
    #[prost(uint64, tag = "14")]
    pub replica_id: u64,
    /// Why it ended, or began to.
    #[prost(enumeration = "EndReason", tag = "15")]
    pub end_reason: i32,
    /// Actor of that.
    #[prost(string, tag = "16")]
    pub ended_by: String,
    /// When it began to end; 0: it has not.
    #[prost(uint64, tag = "17")]
    pub ending_at: u64,
    /// When it ended; 0: it has not.
    #[prost(uint64, tag = "18")]
    pub ended_at: u64,
    /// What the worker, or an operator who vouched, said of the cleanup.
    #[prost(message, optional, tag = "19")]
    pub cleanup: Option<Cleanup>,
    /// The tool.
    #[prost(string, tag = "20")]
    pub tool: String,
    /// When the worker took it; 0: it has not, and so nothing of it was run.
    #[prost(uint64, tag = "21")]
    pub accepted_at: u64,
    /// The run's deadline, which no renewal passes.
    #[prost(uint64, tag = "22")]
    pub run_deadline_at: u64,
}

impl Lease {
    /// Whether what is said under it may count: it was granted or taken, and has not begun to end.
    #[must_use]
    pub fn is_live(&self) -> bool {
        matches!(self.state(), LeaseState::Granted | LeaseState::Active)
    }

    /// Whether its slot is free.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state() == LeaseState::Ended
    }
}

/// Counters of runs and leases; there is one.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Totals {
    /// Leases that have not ended.
    #[prost(uint64, tag = "1")]
    pub live: u64,
    /// Ended ones that are kept.
    #[prost(uint64, tag = "2")]
    pub ended: u64,
    /// The newest fence.
    #[prost(uint64, tag = "3")]
    pub last_fence: u64,
    /// Runs by state, in the order of the numbers of [`RunState`].
    #[prost(uint64, repeated, tag = "4")]
    pub runs: Vec<u64>,
    /// Bytes of files that are kept.
    #[prost(uint64, tag = "5")]
    pub artifact_bytes: u64,
    /// Bytes of runs that have not ended: see [`Run::weight`].
    #[prost(uint64, tag = "6")]
    pub open_bytes: u64,
    /// Bytes of ended runs that are kept.
    #[prost(uint64, tag = "7")]
    pub ended_bytes: u64,
    /// Of `artifact_bytes`, those of runs that have not ended.
    #[prost(uint64, tag = "8")]
    pub open_artifact_bytes: u64,
    /// No ended run that is kept ended before this: where the search for what may be forgotten begins.
    #[prost(uint64, tag = "9")]
    pub ended_oldest: u64,
}

/// What is asked about runs and leases.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// The one thing that is asked.
    #[prost(oneof = "Action", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10")]
    pub action: Option<Action>,
}

/// One thing to ask about runs and leases.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Action {
    /// See [`StartRun`].
    #[prost(message, tag = "1")]
    StartRun(StartRun),
    /// See [`PutArtifact`].
    #[prost(message, tag = "2")]
    PutArtifact(PutArtifact),
    /// See [`CancelRun`].
    #[prost(message, tag = "3")]
    CancelRun(CancelRun),
    /// See [`Accept`].
    #[prost(message, tag = "4")]
    Accept(Accept),
    /// See [`Renew`].
    #[prost(message, tag = "5")]
    Renew(Renew),
    /// See [`Finish`].
    #[prost(message, tag = "6")]
    Finish(Finish),
    /// See [`Cleaned`].
    #[prost(message, tag = "7")]
    Cleaned(Cleaned),
    /// See [`RevokeLease`].
    #[prost(message, tag = "8")]
    RevokeLease(RevokeLease),
    /// See [`Expire`].
    #[prost(message, tag = "9")]
    Expire(Expire),
    /// See [`Reconcile`].
    #[prost(message, tag = "10")]
    Reconcile(Reconcile),
}

/// Starts the run of a grant: at once when its input files are there and a worker is free, else it waits.
/// Uses the grant. Actor: operator, who asked for the grant. Reply: `RunStarted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StartRun {
    /// The run, as the grant names it.
    #[prost(message, required, tag = "1")]
    pub run_id: Id,
    /// The tool, as the grant names it.
    #[prost(string, tag = "2")]
    pub tool: String,
    /// JSON for the program's standard input, at most `limits::RUN_PARAMS` bytes.
    #[prost(bytes = "bytes", tag = "3")]
    pub params: Bytes,
    /// Its input files.
    #[prost(message, optional, tag = "4")]
    pub inputs: Option<Manifest>,
    /// Where it may read and write.
    #[prost(message, optional, tag = "5")]
    pub scope: Option<Scope>,
    /// What it may use.
    #[prost(message, optional, tag = "6")]
    pub limits: Option<Limits>,
    /// What happens when it is run twice.
    #[prost(enumeration = "Effect", tag = "7")]
    pub effect: i32,
    /// Attempts in all; 0: 1 for `once`, `limits::RUN_ATTEMPTS` for `idempotent`.
    #[prost(uint32, tag = "8")]
    pub max_attempts: u32,
    /// Of the lease between two renewals; 0: `limits::LEASE_TTL`. At most the policy's.
    #[prost(uint64, tag = "9")]
    pub ttl_ms: u64,
    /// Of the run, from acceptance; 0: `limits::RUN_TIMEOUT`.
    #[prost(uint64, tag = "10")]
    pub timeout_ms: u64,
    /// Least evidence of the worker, beside the policy's.
    #[prost(enumeration = "Evidence", tag = "11")]
    pub min_evidence: i32,
    /// Labels of the worker's node, all of which must match.
    #[prost(btree_map = "string, string", tag = "12")]
    pub labels: BTreeMap<String, String>,
}

/// One piece of a file: of an input by the run's operator, of an output by the worker, under its fence.
/// Pieces come in order, each but the last `limits::ARTIFACT_CHUNK` long; one that is there is not written
/// again. The last one completes the file; what has another digest is dropped, which is no refusal of the
/// entry but its outcome: otherwise the wrong pieces would stay. Actor: the run's operator, or the worker.
/// Reply: `ArtifactReceived`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PutArtifact {
    /// The run.
    #[prost(message, required, tag = "1")]
    pub run_id: Id,
    /// SHA-256 of the whole file.
    #[prost(message, required, tag = "2")]
    pub digest: Digest,
    /// Its size.
    #[prost(uint64, tag = "3")]
    pub size: u64,
    /// Where the piece begins: a multiple of `limits::ARTIFACT_CHUNK`.
    #[prost(uint64, tag = "4")]
    pub offset: u64,
    /// The piece.
    #[prost(bytes = "bytes", tag = "5")]
    pub chunk: Bytes,
    /// The lease of the worker; absent: an operator's input.
    #[prost(message, optional, tag = "6")]
    pub lease_id: Option<Id>,
    /// Its fence.
    #[prost(uint64, tag = "7")]
    pub fence: u64,
}

/// Takes a run back: at once while it waits. One that is leased is `cancelling` until the worker is clean or
/// the lease's deadline passes. Actor: operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CancelRun {
    /// The run.
    #[prost(message, required, tag = "1")]
    pub run_id: Id,
    /// Why; may be empty.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// The worker has the lease. It begins only when this was accepted: of a lease that was never accepted
/// nothing was run. Actor: that worker. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Accept {
    /// The lease.
    #[prost(message, required, tag = "1")]
    pub lease_id: Id,
    /// Its fence.
    #[prost(uint64, tag = "2")]
    pub fence: u64,
    /// The worker's session.
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
}

/// A lease and its fence.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct LeaseRef {
    /// The lease.
    #[prost(message, required, tag = "1")]
    pub lease_id: Id,
    /// Its fence.
    #[prost(uint64, tag = "2")]
    pub fence: u64,
    /// The worker that asked, as its replica verified.
    #[prost(message, required, tag = "3")]
    pub worker_id: Id,
    /// Session that it asked in.
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
}

/// Moves deadlines to `now + ttl`. What a replica has gathered of its workers' wishes goes in one entry.
/// Those that are not live any more are left alone and named in the reply. Actor: a replica. Reply:
/// `LeasesRenewed`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Renew {
    /// At most `limits::RENEW_BATCH`.
    #[prost(message, repeated, tag = "1")]
    pub leases: Vec<LeaseRef>,
}

/// Ends the run with the worker's outcome; the lease is `ending`. Actor: that worker. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Finish {
    /// The lease.
    #[prost(message, required, tag = "1")]
    pub lease_id: Id,
    /// Its fence.
    #[prost(uint64, tag = "2")]
    pub fence: u64,
    /// How it ended.
    #[prost(enumeration = "Outcome", tag = "3")]
    pub outcome: i32,
    /// Of the program; the negative signal when one ended it; absent: it was not started.
    #[prost(int32, optional, tag = "4")]
    pub exit_code: Option<i32>,
    /// JSON, at most `limits::RUN_RESULT` bytes.
    #[prost(bytes = "bytes", tag = "5")]
    pub result: Bytes,
    /// Its output files; those that are `stored` have arrived.
    #[prost(message, optional, tag = "6")]
    pub outputs: Option<Manifest>,
    /// Why it failed or was refused.
    #[prost(message, optional, tag = "7")]
    pub error: Option<Failure>,
    /// The last lines that the program wrote, at most `limits::LOG_TAIL` bytes.
    #[prost(bytes = "bytes", tag = "8")]
    pub log_tail: Bytes,
    /// What it used: `cpu_ms`, `max_rss_bytes`, `wall_ms`.
    #[prost(btree_map = "string, uint64", tag = "9")]
    pub usage: BTreeMap<String, u64>,
    /// What held it.
    #[prost(string, repeated, tag = "10")]
    pub sandbox: Vec<String>,
}

/// How a worker ended a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Outcome {
    /// With a result.
    Succeeded = 0,
    /// With an error.
    Failed = 1,
    /// The worker did not begin.
    Refused = 2,
    /// It was stopped.
    Cancelled = 3,
}

impl Outcome {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Succeeded => "succeeded",
            Outcome::Failed => "failed",
            Outcome::Refused => "refused",
            Outcome::Cancelled => "cancelled",
        }
    }

    /// From the text form: `succeeded`, `failed`, `refused`, `cancelled`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Outcome> {
        match text {
            "succeeded" => Some(Outcome::Succeeded),
            "failed" => Some(Outcome::Failed),
            "refused" => Some(Outcome::Refused),
            "cancelled" => Some(Outcome::Cancelled),
            _ => None,
        }
    }
}

/// What the worker says of the cleanup after a lease, also of one that has ended; `ok` frees the slot,
/// otherwise the worker is failed. Actor: that worker. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cleaned {
    /// The lease.
    #[prost(message, required, tag = "1")]
    pub lease_id: Id,
    /// Its fence.
    #[prost(uint64, tag = "2")]
    pub fence: u64,
    /// Nothing of the run is left.
    #[prost(bool, tag = "3")]
    pub ok: bool,
    /// What is left, and why.
    #[prost(string, tag = "4")]
    pub message: String,
    /// How many files were removed.
    #[prost(uint64, tag = "5")]
    pub removed_files: u64,
    /// Their bytes.
    #[prost(uint64, tag = "6")]
    pub removed_bytes: u64,
}

/// Ends a lease: nothing of it is accepted any more. Actor: operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RevokeLease {
    /// The lease.
    #[prost(message, required, tag = "1")]
    pub lease_id: Id,
    /// Why.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Ends those leases and runs of the lists whose deadline has passed; others are left alone. Actor: system or
/// a replica. Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Expire {
    /// At most `limits::EXPIRE_BATCH`.
    #[prost(message, repeated, tag = "1")]
    pub leases: Vec<Id>,
    /// At most `limits::EXPIRE_BATCH`.
    #[prost(message, repeated, tag = "2")]
    pub runs: Vec<Id>,
}

/// What a worker has of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum HeldState {
    /// The program runs.
    Running = 0,
    /// It ended; the result was not accepted yet.
    Finished = 1,
    /// Nothing of it is left.
    Cleaned = 2,
    /// Something of it is left that could not be removed.
    Unclean = 3,
}

/// A lease that a worker has something of.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Held {
    /// The lease.
    #[prost(message, required, tag = "1")]
    pub lease_id: Id,
    /// Its fence.
    #[prost(uint64, tag = "2")]
    pub fence: u64,
    /// What it has.
    #[prost(enumeration = "HeldState", tag = "3")]
    pub state: i32,
    /// In words.
    #[prost(string, tag = "4")]
    pub message: String,
}

/// What a worker has of leases, at the beginning of a session: the ledger keeps those that are live and held,
/// ends those that are live and not held (`worker_restarted`: nothing of them runs), and names those that the
/// worker must end. From then on it may be given work. Actor: that worker. Reply: `Reconciled`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reconcile {
    /// The worker.
    #[prost(message, required, tag = "1")]
    pub worker_id: Id,
    /// The session.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// At most `limits::LEASES_HELD`.
    #[prost(message, repeated, tag = "3")]
    pub held: Vec<Held>,
}
