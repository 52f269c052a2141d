//! What a worker says in its node's session, and what it is told.
//!
//! What never lives here: the wire (the server's), and what becomes of a message (`session`). Invariant:
//! whatever has a request id is answered with it, once for each time that it is sent.

use bytes::Bytes;
use palyra_state::leases::{Limits, Manifest, Scope};
use palyra_state::reply::MustEnd;
use palyra_state::{Digest, Id};

/// A lease, as a worker names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseName {
    /// A ULID.
    pub id: String,
    /// The fence that the worker has.
    pub fence: u64,
}

/// A lease that a worker has something of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldLease {
    /// The lease.
    pub lease: LeaseName,
    /// `running`, `finished`, `cleaned` or `unclean`.
    pub state: String,
    /// In words.
    pub message: String,
}

/// How a worker ended a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Finished {
    /// `succeeded`, `failed`, `refused` or `cancelled`.
    pub outcome: String,
    /// Of the program, if it was started; the negative signal when one ended it.
    pub exit_code: Option<i32>,
    /// JSON; may be empty unless it succeeded.
    pub result: Bytes,
    /// Output files.
    pub outputs: Option<Manifest>,
    /// Short and stable, when it did not succeed.
    pub error_code: String,
    /// For people, when it did not succeed.
    pub error_message: String,
    /// The last lines that the program wrote.
    pub log_tail: Bytes,
    /// What it used.
    pub usage: std::collections::BTreeMap<String, u64>,
    /// What held it.
    pub sandbox: Vec<String>,
}

/// What is left after a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CleanedUp {
    /// Nothing.
    pub ok: bool,
    /// What, and why.
    pub message: String,
    /// How many files were removed.
    pub removed_files: u64,
    /// Their bytes.
    pub removed_bytes: u64,
}

/// What a worker says that is committed, and answered under its request id.
#[derive(Debug, Clone)]
pub enum Statement {
    /// What it has of leases. First in each session.
    Report {
        /// All of it.
        held: Vec<HeldLease>,
    },
    /// It wants to attest.
    AskChallenge,
    /// It attests.
    Attest {
        /// The statement, encoded.
        statement: Bytes,
        /// SubjectPublicKeyInfo of the signer.
        public_key: Bytes,
        /// Over the statement.
        signature: Bytes,
    },
    /// It takes a lease.
    Accept(LeaseName),
    /// A run ended.
    Finish(LeaseName, Box<Finished>),
    /// It has cleaned up.
    Cleaned(LeaseName, CleanedUp),
    /// What ran left its scope.
    Violation {
        /// The lease.
        lease: LeaseName,
        /// `scope`, `disk`, `escape` or `manifest`.
        kind: String,
        /// In words.
        message: String,
    },
    /// A piece of an output file.
    Put {
        /// The lease.
        lease: LeaseName,
        /// SHA-256 of the whole file.
        digest: Bytes,
        /// Its size.
        size: u64,
        /// Where the piece begins.
        offset: u64,
        /// The piece.
        chunk: Bytes,
    },
}

/// What a worker says.
#[derive(Debug, Clone)]
pub enum FromWorker {
    /// To be committed.
    Says {
        /// A ULID, the same for each try.
        request_id: String,
        /// What it says.
        statement: Statement,
    },
    /// It wants its leases longer.
    Renew {
        /// Names the answer.
        sequence: u64,
        /// Which leases.
        leases: Vec<LeaseName>,
    },
    /// It wants a piece of a file of a run that it has leased.
    Get {
        /// Names the answer.
        request_id: String,
        /// The lease.
        lease: LeaseName,
        /// SHA-256 of the whole file.
        digest: Bytes,
        /// Where the piece begins.
        offset: u64,
    },
    /// What a running program wrote, or how far it is.
    Output {
        /// The lease.
        lease: LeaseName,
        /// Number of the first line.
        first: u64,
        /// Lines.
        lines: Vec<String>,
        /// How far it is: percent, and words.
        progress: Option<(Option<u32>, String)>,
    },
}

/// What a worker is told.
#[derive(Debug, Clone, PartialEq)]
pub enum ToWorker {
    /// Attest, over this.
    Challenge(Challenge),
    /// What became of a statement.
    Attested(AttestAnswer),
    /// Run this.
    Offer(Box<Offer>),
    /// What became of renewals.
    Renewed {
        /// As asked.
        sequence: u64,
        /// One for each lease.
        leases: Vec<Renewed>,
    },
    /// What became of what it said.
    Answer(Answer),
    /// A lease is over.
    End(MustEnd),
    /// Try the cleanup again.
    Cleanup {
        /// Why.
        reason: String,
    },
    /// The ledger and the worker were compared.
    Reconciled {
        /// As asked.
        request_id: String,
        /// Leases that are its own still.
        keep: Vec<Id>,
        /// Leases that it must end.
        end: Vec<MustEnd>,
    },
    /// A piece of a file.
    Chunk(Chunk),
}

/// A challenge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// 32 bytes.
    pub nonce: Digest,
    /// How long it is open.
    pub expires_in_ms: u64,
    /// `first`, `expiring`, `reverify` or `policy`.
    pub reason: &'static str,
    /// The cluster's time.
    pub now_ms: u64,
    /// The cluster.
    pub cluster_id: Id,
    /// Longest life of a statement.
    pub max_life_ms: u64,
}

/// What became of a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttestAnswer {
    /// As sent.
    pub request_id: String,
    /// It is good.
    pub admitted: bool,
    /// Why not: the code.
    pub code: String,
    /// And in words.
    pub message: String,
    /// What to do.
    pub next: String,
    /// What it proved.
    pub evidence: &'static str,
    /// How long it is good for.
    pub expires_in_ms: u64,
}

/// A lease that is offered.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    /// The lease.
    pub lease_id: Id,
    /// The run.
    pub run_id: Id,
    /// Which attempt of it.
    pub attempt: u32,
    /// Goes with everything that is said of it.
    pub fence: u64,
    /// Which slot.
    pub slot: u32,
    /// What a renewal adds.
    pub ttl_ms: u64,
    /// Until it is over, as this replica has it.
    pub remaining_ms: u64,
    /// Until the run's deadline.
    pub run_remaining_ms: u64,
    /// What to run.
    pub tool: String,
    /// Its input, JSON.
    pub params: Bytes,
    /// Input files.
    pub inputs: Option<Manifest>,
    /// Where it may read and write.
    pub scope: Option<Scope>,
    /// What it may use.
    pub limits: Option<Limits>,
    /// `once` or `idempotent`.
    pub effect: &'static str,
}

/// What became of one renewal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewed {
    /// The lease, as it was named.
    pub lease: LeaseName,
    /// It has its whole time again, from before this renewal was committed.
    pub renewed: bool,
    /// Why not.
    pub code: String,
    /// In words.
    pub message: String,
    /// It was not decided: the lease may be the worker's still.
    pub retry: bool,
    /// Of one that was renewed: what is left of it now, by the cluster's time; never 0.
    pub remaining_ms: u64,
}

/// What became of what a worker said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// As sent.
    pub request_id: String,
    /// Committed.
    pub accepted: bool,
    /// Why not: the code.
    pub code: String,
    /// And in words.
    pub message: String,
    /// It was not decided: send the same again.
    pub retry: bool,
}

/// A piece of a file, or why there is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chunk {
    /// As asked.
    pub request_id: String,
    /// As asked.
    pub digest: Bytes,
    /// Of the whole file.
    pub size: u64,
    /// As asked.
    pub offset: u64,
    /// The piece.
    pub chunk: Bytes,
    /// Why there is none.
    pub code: String,
    /// In words.
    pub message: String,
}
