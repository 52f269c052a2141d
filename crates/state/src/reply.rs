//! What an accepted command produced. Stored with the request id, so that a retry gets the same answer; hence
//! no secrets here, and nothing that a retry could not use.

use crate::ids::{Fingerprint, Id};
use crate::reject::Reject;
use crate::{approvals, dispatch, fleet, leases, pairing};

/// What an accepted command produced.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Reply {
    /// Nothing but the fact.
    #[prost(message, tag = "1")]
    Done(Done),
    /// A join token.
    #[prost(message, tag = "2")]
    TokenMinted(TokenMinted),
    /// A replica id.
    #[prost(message, tag = "3")]
    ReplicaAllocated(ReplicaAllocated),
    /// A pairing code.
    #[prost(message, tag = "4")]
    CodeMinted(CodeMinted),
    /// An attempt was counted.
    #[prost(message, tag = "5")]
    Attempt(AttemptCounted),
    /// A pairing request waits for an operator.
    #[prost(message, tag = "6")]
    Proved(Proved),
    /// A certificate was issued.
    #[prost(message, tag = "7")]
    Approved(Approved),
    /// A device is revoked.
    #[prost(message, tag = "8")]
    Revoked(Revoked),
    /// A node is registered.
    #[prost(message, tag = "9")]
    Registered(Registered),
    /// A session began.
    #[prost(message, tag = "10")]
    Attached(Attached),
    /// A dispatch was accepted.
    #[prost(message, tag = "11")]
    Submitted(Submitted),
    /// A batch was worked off.
    #[prost(message, tag = "12")]
    Counted(Counted),
    /// What became of a renewal or recovery.
    #[prost(message, tag = "13")]
    Renewed(Renewed),
    /// A device is asked to change its certificate.
    #[prost(message, tag = "14")]
    RotationRequested(RotationRequested),
    /// A result came after the end of its dispatch, and was noted.
    #[prost(message, tag = "19")]
    Late(Late),
    /// The fleet's policy was replaced.
    #[prost(message, tag = "25")]
    PolicySet(PolicySet),
    /// A challenge is open.
    #[prost(message, tag = "26")]
    Challenged(Challenged),
    /// What became of a statement.
    #[prost(message, tag = "27")]
    Attestation(Attestation),
    /// A run was accepted.
    #[prost(message, tag = "30")]
    RunStarted(RunStarted),
    /// A piece of a file arrived.
    #[prost(message, tag = "31")]
    ArtifactReceived(ArtifactReceived),
    /// What became of renewals.
    #[prost(message, tag = "32")]
    LeasesRenewed(LeasesRenewed),
    /// What a worker has and what the ledger has were compared.
    #[prost(message, tag = "33")]
    Reconciled(Reconciled),
    /// A grant was asked for.
    #[prost(message, tag = "35")]
    GrantCreated(GrantCreated),
}

impl Reply {
    /// [`Reply::Done`].
    #[must_use]
    pub fn done() -> Reply {
        Reply::Done(Done {})
    }
}

/// Nothing but the fact.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Done {}

/// A join token.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct TokenMinted {
    /// Its id.
    #[prost(message, required, tag = "1")]
    pub token_id: Id,
    /// First moment at which it is not good any more.
    #[prost(uint64, tag = "2")]
    pub expires_at: u64,
}

/// A replica id.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct ReplicaAllocated {
    /// The id.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
}

/// A pairing code.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct CodeMinted {
    /// Its id.
    #[prost(message, required, tag = "1")]
    pub code_id: Id,
    /// Its number.
    #[prost(uint32, tag = "2")]
    pub number: u32,
    /// First moment at which it is not good any more.
    #[prost(uint64, tag = "3")]
    pub expires_at: u64,
}

/// What became of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum AttemptOutcome {
    /// Refused: the code is burned.
    Burned = 0,
    /// Counted; the exchange may go on.
    Granted = 1,
    /// Its proof was wrong; the code is still open.
    Failed = 2,
}

/// An attempt was counted.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AttemptCounted {
    /// What became of it.
    #[prost(enumeration = "AttemptOutcome", tag = "1")]
    pub outcome: i32,
    /// The code that it is for.
    #[prost(message, required, tag = "2")]
    pub code_id: Id,
    /// The code's number.
    #[prost(uint32, tag = "3")]
    pub code_number: u32,
    /// PIN or ticket.
    #[prost(enumeration = "pairing::Method", tag = "4")]
    pub method: i32,
    /// Attempts left after this one.
    #[prost(uint32, tag = "5")]
    pub tries_left: u32,
    /// The attempt, as it was first named.
    #[prost(message, required, tag = "6")]
    pub attempt_id: Id,
}

/// A pairing request waits for an operator.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Proved {
    /// The request.
    #[prost(message, required, tag = "1")]
    pub pairing_id: Id,
    /// First moment at which it can be decided no more.
    #[prost(uint64, tag = "2")]
    pub expires_at: u64,
}

/// A certificate was issued.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Approved {
    /// The device.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// Its certificate.
    #[prost(message, required, tag = "2")]
    pub fingerprint: Fingerprint,
}

/// A device is revoked.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Revoked {
    /// Log index of the entry that did it, now or earlier.
    #[prost(uint64, tag = "1")]
    pub index: u64,
    /// It was revoked before.
    #[prost(bool, tag = "2")]
    pub already: bool,
    /// How many dispatches this ended.
    #[prost(uint32, tag = "3")]
    pub cancelled: u32,
}

/// A node is registered.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Registered {
    /// Its generation.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
    /// Whether anything changed.
    #[prost(bool, tag = "2")]
    pub changed: bool,
}

/// A session began.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Attached {
    /// Its epoch.
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    /// Dispatches to deliver in it.
    #[prost(uint32, tag = "2")]
    pub assigned: u32,
    /// Dispatches that the node holds and may finish in it.
    #[prost(uint32, tag = "3")]
    pub rebound: u32,
    /// Dispatches that ended because the node does not hold them.
    #[prost(uint32, tag = "4")]
    pub lost: u32,
}

/// A dispatch was accepted.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Submitted {
    /// Its id, as it was first named.
    #[prost(message, required, tag = "1")]
    pub dispatch_id: Id,
    /// `queued` or `dispatched`.
    #[prost(enumeration = "dispatch::State", tag = "2")]
    pub state: i32,
    /// Session that it is bound to; 0 when it is queued.
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    /// Replica that holds that session; 0 when it is queued.
    #[prost(uint64, tag = "4")]
    pub replica_id: u64,
    /// First moment at which it is too late.
    #[prost(uint64, tag = "5")]
    pub deadline_at: u64,
}

/// A result came after the end of its dispatch, and was noted.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Late {
    /// How the dispatch had ended.
    #[prost(enumeration = "dispatch::State", tag = "1")]
    pub state: i32,
}

/// A batch was worked off.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Counted {
    /// How many were changed.
    #[prost(uint32, tag = "1")]
    pub count: u32,
}

/// What became of a renewal or recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum RenewalOutcome {
    /// A certificate was recorded.
    Issued = 0,
    /// The same request as before: this is the certificate of that time.
    Repeated = 1,
    /// Refused: the counter was used before, with another key.
    CloneSuspected = 2,
}

/// What became of a renewal or recovery.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Renewed {
    /// What became of it.
    #[prost(enumeration = "RenewalOutcome", tag = "1")]
    pub outcome: i32,
    /// The certificate; zero when it was refused.
    #[prost(message, required, tag = "2")]
    pub fingerprint: Fingerprint,
    /// The device's counter from now on.
    #[prost(uint64, tag = "3")]
    pub counter: u64,
}

/// A device is asked to change its certificate.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct RotationRequested {
    /// Log index of the entry that asked, now or earlier.
    #[prost(uint64, tag = "1")]
    pub index: u64,
    /// An earlier request is open: this one changed nothing.
    #[prost(bool, tag = "2")]
    pub already: bool,
    /// After which it is overdue.
    #[prost(uint64, tag = "3")]
    pub deadline_at: u64,
}

/// The fleet's policy was replaced.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct PolicySet {
    /// Its version.
    #[prost(uint64, tag = "1")]
    pub version: u64,
}

/// A challenge is open.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Challenged {
    /// The nonce, as it was first proposed.
    #[prost(message, required, tag = "1")]
    pub nonce: Fingerprint,
    /// First moment at which it is not good any more.
    #[prost(uint64, tag = "2")]
    pub expires_at: u64,
    /// The state's time.
    #[prost(uint64, tag = "3")]
    pub now: u64,
}

/// What became of a statement.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Attestation {
    /// Why it was refused; absent when it was accepted.
    #[prost(message, optional, tag = "1")]
    pub refusal: Option<Reject>,
    /// How bad the refusal is.
    #[prost(enumeration = "fleet::Severity", tag = "2")]
    pub severity: i32,
    /// What it proved.
    #[prost(enumeration = "fleet::Evidence", tag = "3")]
    pub evidence: i32,
    /// First moment at which it is not good any more.
    #[prost(uint64, tag = "4")]
    pub expires_at: u64,
    /// The worker was quarantined for it.
    #[prost(bool, tag = "5")]
    pub quarantined: bool,
    /// The state's time.
    #[prost(uint64, tag = "6")]
    pub now: u64,
}

/// A run was accepted.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct RunStarted {
    /// The run.
    #[prost(message, required, tag = "1")]
    pub run_id: Id,
    /// `awaiting_input`, `queued` or `leased`.
    #[prost(enumeration = "leases::RunState", tag = "2")]
    pub state: i32,
    /// First moment at which it is too late.
    #[prost(uint64, tag = "3")]
    pub deadline_at: u64,
}

/// A piece of a file arrived.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ArtifactReceived {
    /// Bytes of the file that have arrived.
    #[prost(uint64, tag = "1")]
    pub received: u64,
    /// All of it, with the right digest.
    #[prost(bool, tag = "2")]
    pub complete: bool,
    /// All of it has arrived and has another digest: it was dropped.
    #[prost(message, optional, tag = "3")]
    pub refusal: Option<Reject>,
}

/// What became of one renewal.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Renewal {
    /// The lease.
    #[prost(message, required, tag = "1")]
    pub lease_id: Id,
    /// Its new deadline; 0: it was not renewed.
    #[prost(uint64, tag = "2")]
    pub deadline_at: u64,
    /// Why not.
    #[prost(message, optional, tag = "3")]
    pub refusal: Option<Reject>,
}

/// What became of renewals, in the order of the command.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeasesRenewed {
    /// One for each.
    #[prost(message, repeated, tag = "1")]
    pub renewals: Vec<Renewal>,
}

/// A lease that a worker must end.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MustEnd {
    /// The lease.
    #[prost(message, required, tag = "1")]
    pub lease_id: Id,
    /// The fence that the worker has.
    #[prost(uint64, tag = "2")]
    pub fence: u64,
    /// Why.
    #[prost(string, tag = "3")]
    pub reason: String,
}

/// What a worker has and what the ledger has were compared.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reconciled {
    /// Leases that are live and the worker's own.
    #[prost(message, repeated, tag = "1")]
    pub keep: Vec<Id>,
    /// Leases that it must end.
    #[prost(message, repeated, tag = "2")]
    pub end: Vec<MustEnd>,
}

/// A grant was asked for.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct GrantCreated {
    /// The grant, as it was first named.
    #[prost(message, required, tag = "1")]
    pub grant_id: Id,
    /// `pending` or `active`.
    #[prost(enumeration = "approvals::GrantState", tag = "2")]
    pub state: i32,
    /// The approval that it rests on.
    #[prost(message, required, tag = "3")]
    pub approval_id: Id,
    /// First moment at which it starts nothing any more.
    #[prost(uint64, tag = "4")]
    pub expires_at: u64,
}
