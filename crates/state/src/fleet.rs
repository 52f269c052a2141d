//! The worker fleet: which nodes run other people's work, how they proved themselves, and what they are held
//! to.
//!
//! A worker is a paired node that has attested; its id is the device id. What never lives here: what a worker
//! runs (that is `leases`) and whether it is connected (that is `nodes`; this follows it). Invariants: a
//! worker's lifecycle is what [`lifecycle::of`] makes of the facts in its record, and every change of it is a
//! row of the journal and allowed by [`lifecycle::allowed`]; without a policy nobody is admitted; an
//! attestation is accepted once, over the nonce that was open; a quarantine ends by an attestation that an
//! operator asked for, and by nothing else.

mod follow;
pub mod lifecycle;
mod policy;
mod rules;
pub mod statement;
mod store;
mod sweeps;
mod verify;

pub(crate) use follow::{
    fail, forget, free_slot, note_clean, note_unclean, on_attach, on_detach, on_revoked, reconciled,
    take_slot,
};
pub(crate) use rules::apply;
pub(crate) use store::{due_at, ready_place, slots_of};

use bytes::Bytes;

use crate::ids::{Digest, Id};

pub use lifecycle::Lifecycle;
pub use policy::{Change, Policy, TrustedCapability, TrustedKey, diff, normal};
pub use statement::{ClaimedCapability, EgressBinding, HardwareQuote, Statement};
pub use store::{
    Snapshot, by_lifecycle, candidates, due, max_ttl, may_take, min_evidence, next_due, policy, snapshot,
    totals, unchecked, worker, workers, workers_by_prefix,
};
pub use sweeps::unmet;
pub use verify::severity;

/// How strongly a statement is backed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Evidence {
    /// Nothing is claimed.
    None = 0,
    /// The worker says so, and signs it.
    SelfReported = 1,
    /// The supervisor that starts the tools computed the digests itself, and the policy names its build.
    Supervisor = 2,
    /// A provider that the policy names vouches for the digests.
    Hardware = 3,
}

impl Evidence {
    /// Stable text form; empty for `None`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Evidence::None => "",
            Evidence::SelfReported => "self-reported",
            Evidence::Supervisor => "supervisor",
            Evidence::Hardware => "hardware",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Evidence> {
        [
            Evidence::None,
            Evidence::SelfReported,
            Evidence::Supervisor,
            Evidence::Hardware,
        ]
        .into_iter()
        .find(|level| level.as_str() == text)
    }
}

/// A worker.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Worker {
    /// The device id.
    #[prost(message, required, tag = "1")]
    pub id: Id,
    /// Where it stands: what `lifecycle::of` makes of the rest.
    #[prost(enumeration = "Lifecycle", tag = "2")]
    pub lifecycle: i32,
    /// Since when.
    #[prost(uint64, tag = "3")]
    pub lifecycle_since: u64,
    /// Why, in a short stable word or two.
    #[prost(string, tag = "4")]
    pub lifecycle_reason: String,
    /// Actor of the entry that changed it.
    #[prost(string, tag = "5")]
    pub lifecycle_actor: String,
    /// When it first asked for a challenge.
    #[prost(uint64, tag = "6")]
    pub registered_at: u64,
    /// The newest statement that was accepted.
    #[prost(message, optional, tag = "7")]
    pub attested: Option<Attested>,
    /// The nonce that a statement may be over now.
    #[prost(message, optional, tag = "8")]
    pub challenge: Option<Challenge>,
    /// Why nothing may be given to it until an operator asks for an attestation and it passes.
    #[prost(message, optional, tag = "9")]
    pub quarantine: Option<Hold>,
    /// Why nothing new is given to it.
    #[prost(message, optional, tag = "10")]
    pub drain: Option<Hold>,
    /// The cleanup that failed.
    #[prost(message, optional, tag = "11")]
    pub failure: Option<Hold>,
    /// Epoch of the session in which it was reconciled with the ledger; work is given in that session only.
    #[prost(uint64, tag = "12")]
    pub reconciled_epoch: u64,
    /// Since when it has no session; 0 while it has one.
    #[prost(uint64, tag = "13")]
    pub away_since: u64,
    /// Leases that ended and of which no cleanup was reported; nothing is given to it while there is one.
    #[prost(message, repeated, tag = "14")]
    pub unclean: Vec<Id>,
    /// Slots that are taken.
    #[prost(uint32, tag = "15")]
    pub slots_used: u32,
    /// Fence of the newest lease that it got: the older, the sooner it gets the next.
    #[prost(uint64, tag = "16")]
    pub last_fence: u64,
    /// An operator wants it to attest again: since when; 0: nobody does.
    #[prost(uint64, tag = "17")]
    pub reverify_at: u64,
    /// Actor who asked.
    #[prost(string, tag = "18")]
    pub reverify_by: String,
    /// The newest statement that was refused, until one is accepted.
    #[prost(message, optional, tag = "19")]
    pub refusal: Option<Refusal>,
    /// When time alone changes something of it; 0: never. In `WORKERS_DUE`.
    #[prost(uint64, tag = "20")]
    pub due_at: u64,
    /// Its heartbeats stopped while it held leases: they are lost, and so is it until it is reconciled.
    #[prost(bool, tag = "21")]
    pub orphaned: bool,
    /// An operator wants the cleanup tried again; since when; 0: nobody does.
    #[prost(uint64, tag = "22")]
    pub cleanup_at: u64,
    /// Its device was revoked or removed.
    #[prost(bool, tag = "23")]
    pub barred: bool,
    /// When it counts as lost unless it attaches; 0: it has a session, or it counts as lost already.
    #[prost(uint64, tag = "24")]
    pub lost_at: u64,
    /// The nonce of the newest statement that was judged: another statement over it is a replay.
    #[prost(message, optional, tag = "25")]
    pub last_nonce: Option<Digest>,
}

/// A statement that was accepted.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Attested {
    /// The statement as it was signed.
    #[prost(bytes = "bytes", tag = "1")]
    pub statement: Bytes,
    /// SubjectPublicKeyInfo of the signer.
    #[prost(bytes = "bytes", tag = "2")]
    pub public_key: Bytes,
    /// The signature.
    #[prost(bytes = "bytes", tag = "3")]
    pub signature: Bytes,
    /// What it proved.
    #[prost(enumeration = "Evidence", tag = "4")]
    pub evidence: i32,
    /// When it was accepted.
    #[prost(uint64, tag = "5")]
    pub accepted_at: u64,
    /// Log index of that.
    #[prost(uint64, tag = "6")]
    pub index: u64,
    /// Version of the policy that it was last checked against; 0: it is void (expired, or the worker is
    /// quarantined or barred, or showed another statement that was refused). While it is not 0 the worker is
    /// admitted, and in `WORKERS_CHECKED`.
    #[prost(uint64, tag = "7")]
    pub policy_version: u64,
    /// First moment at which it is not good any more: the statement's end, or that of its egress binding.
    #[prost(uint64, tag = "8")]
    pub expires_at: u64,
    /// Slots that it may be given: what it declared, at most the policy's.
    #[prost(uint32, tag = "9")]
    pub slots: u32,
    /// Tools that it may be given: the names, in order.
    #[prost(string, repeated, tag = "10")]
    pub tools: Vec<String>,
}

/// A nonce.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Challenge {
    /// 32 random bytes, made by the replica that asked.
    #[prost(message, required, tag = "1")]
    pub nonce: Digest,
    /// First moment at which it is not good any more.
    #[prost(uint64, tag = "2")]
    pub expires_at: u64,
    /// Session that it was asked for in.
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
}

/// Why work is held back.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Hold {
    /// Since when.
    #[prost(uint64, tag = "1")]
    pub at: u64,
    /// Actor.
    #[prost(string, tag = "2")]
    pub by: String,
    /// `operator`, `digest_drift`, `scope_violation`, `cleanup`.
    #[prost(string, tag = "3")]
    pub cause: String,
    /// In words.
    #[prost(string, tag = "4")]
    pub reason: String,
    /// Of a drain: when what runs is ended.
    #[prost(uint64, tag = "5")]
    pub until: u64,
    /// Of a failure or violation: the lease.
    #[prost(message, optional, tag = "6")]
    pub lease_id: Option<Id>,
    /// Of a drain: what ran was ended at once.
    #[prost(bool, tag = "7")]
    pub forced: bool,
    /// Of a drain: what ran was ended, at once or at the deadline.
    #[prost(bool, tag = "8")]
    pub over: bool,
}

/// A statement that was refused.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Refusal {
    /// When.
    #[prost(uint64, tag = "1")]
    pub at: u64,
    /// The code and what it names.
    #[prost(message, optional, tag = "2")]
    pub reject: Option<crate::reject::Reject>,
    /// How bad it is.
    #[prost(enumeration = "Severity", tag = "3")]
    pub severity: i32,
}

/// How bad a refused statement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Severity {
    /// Happens to honest workers: a clock, an old nonce.
    Low = 0,
    /// A version or capability that is not trusted.
    Medium = 1,
    /// What runs is not what may run.
    High = 2,
    /// Somebody forged or replayed something.
    Critical = 3,
}

impl Severity {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Low => "low",
            Severity::Medium => "medium",
            Severity::High => "high",
            Severity::Critical => "critical",
        }
    }
}

/// Counters of the fleet; there is one.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Totals {
    /// Workers by lifecycle, in the order of the numbers of [`Lifecycle`].
    #[prost(uint64, repeated, tag = "1")]
    pub by_lifecycle: Vec<u64>,
    /// Slots of workers that are available or busy.
    #[prost(uint64, tag = "2")]
    pub slots: u64,
    /// Slots that are taken, of all workers.
    #[prost(uint64, tag = "3")]
    pub slots_used: u64,
    /// Workers whose statement counts: those that `Policy::max_workers` bounds.
    #[prost(uint64, tag = "4")]
    pub admitted: u64,
}

/// What is asked about the fleet.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// The one thing that is asked.
    #[prost(oneof = "Action", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12")]
    pub action: Option<Action>,
}

/// One thing to ask about the fleet.
#[derive(Clone, PartialEq, prost::Oneof)]
#[expect(clippy::large_enum_variant, reason = "one is in memory at a time")]
pub enum Action {
    /// See [`SetPolicy`].
    #[prost(message, tag = "1")]
    SetPolicy(SetPolicy),
    /// See [`OpenChallenge`].
    #[prost(message, tag = "2")]
    OpenChallenge(OpenChallenge),
    /// See [`Attest`].
    #[prost(message, tag = "3")]
    Attest(Attest),
    /// See [`Quarantine`].
    #[prost(message, tag = "4")]
    Quarantine(Quarantine),
    /// See [`Reverify`].
    #[prost(message, tag = "5")]
    Reverify(Reverify),
    /// See [`Release`].
    #[prost(message, tag = "6")]
    Release(Release),
    /// See [`Drain`].
    #[prost(message, tag = "7")]
    Drain(Drain),
    /// See [`Cleanup`].
    #[prost(message, tag = "8")]
    Cleanup(Cleanup),
    /// See [`Violate`].
    #[prost(message, tag = "9")]
    Violate(Violate),
    /// See [`Lapse`].
    #[prost(message, tag = "10")]
    Lapse(Lapse),
    /// See [`Recheck`].
    #[prost(message, tag = "11")]
    Recheck(Recheck),
    /// See [`Reap`].
    #[prost(message, tag = "12")]
    Reap(Reap),
}

/// Replaces the policy. Workers are checked against it by `Recheck`; until then nothing new is given to them.
/// Actor: admin. Reply: `PolicySet`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SetPolicy {
    /// The new one; version, time and actor are set by apply.
    #[prost(message, required, tag = "1")]
    pub policy: Policy,
    /// The version that it replaces; another one is a conflict.
    #[prost(uint64, tag = "2")]
    pub expected_version: u64,
    /// Why.
    #[prost(string, tag = "3")]
    pub reason: String,
}

/// Opens a challenge; the one before it is void. Makes the node a worker. Actor: that node. Reply:
/// `Challenged`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct OpenChallenge {
    /// The worker.
    #[prost(message, required, tag = "1")]
    pub worker_id: Id,
    /// Session that it asks in.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// 32 random bytes, made by the replica.
    #[prost(message, required, tag = "3")]
    pub nonce: Digest,
}

/// Shows a statement. What is wrong with it is no refusal of the entry but its outcome, so that the journal
/// has it: only what cannot be an attestation at all is refused. Actor: that node. Reply: `Attestation`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Attest {
    /// The worker.
    #[prost(message, required, tag = "1")]
    pub worker_id: Id,
    /// Session that it attests in.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// The statement, encoded.
    #[prost(bytes = "bytes", tag = "3")]
    pub statement: Bytes,
    /// SubjectPublicKeyInfo of the signer.
    #[prost(bytes = "bytes", tag = "4")]
    pub public_key: Bytes,
    /// ECDSA P-256 with SHA-256, ASN.1, over the label and the statement.
    #[prost(bytes = "bytes", tag = "5")]
    pub signature: Bytes,
}

/// Gives it nothing any more and ends its leases. Actor: operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Quarantine {
    /// The worker.
    #[prost(message, required, tag = "1")]
    pub worker_id: Id,
    /// Why.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Wants it to attest again: the next statement that passes lifts a quarantine. Actor: operator. Reply:
/// `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reverify {
    /// The worker.
    #[prost(message, required, tag = "1")]
    pub worker_id: Id,
    /// Why.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Takes a drain back. Actor: operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Release {
    /// The worker.
    #[prost(message, required, tag = "1")]
    pub worker_id: Id,
    /// Why.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Gives it nothing new; ends what runs at the deadline, or at once. Again: sets the deadline anew. Actor:
/// operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Drain {
    /// The worker.
    #[prost(message, required, tag = "1")]
    pub worker_id: Id,
    /// Why.
    #[prost(string, tag = "2")]
    pub reason: String,
    /// From now; 0: `limits::DRAIN`.
    #[prost(uint64, tag = "3")]
    pub deadline_ms: u64,
    /// At once.
    #[prost(bool, tag = "4")]
    pub force: bool,
}

/// Wants a failed cleanup tried again, or takes the operator's word that the worker is clean. Actor:
/// operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cleanup {
    /// The worker.
    #[prost(message, required, tag = "1")]
    pub worker_id: Id,
    /// Why.
    #[prost(string, tag = "2")]
    pub reason: String,
    /// It is clean: the operator looked.
    #[prost(bool, tag = "3")]
    pub force: bool,
}

/// Tells of a violation of scope by what ran under a lease: the worker is quarantined and the lease ends.
/// Actor: that node. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Violate {
    /// The worker.
    #[prost(message, required, tag = "1")]
    pub worker_id: Id,
    /// The lease.
    #[prost(message, required, tag = "2")]
    pub lease_id: Id,
    /// Its fence.
    #[prost(uint64, tag = "3")]
    pub fence: u64,
    /// `scope`, `disk`, `escape`, `manifest`.
    #[prost(string, tag = "4")]
    pub kind: String,
    /// In words.
    #[prost(string, tag = "5")]
    pub message: String,
}

/// Does what is due for those of the list: away too long, statement expired, drain over. Others are left
/// alone. Actor: system or a replica. Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Lapse {
    /// At most `limits::LAPSE_BATCH`.
    #[prost(message, repeated, tag = "1")]
    pub ids: Vec<Id>,
}

/// Checks accepted statements of those of the list against the present policy: who does not meet it is
/// quarantined for `digest_drift`. Actor: system or a replica. Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Recheck {
    /// At most `limits::RECHECK_BATCH`.
    #[prost(message, repeated, tag = "1")]
    pub ids: Vec<Id>,
}

/// Forgets workers that have been away for so long and hold nothing, at most `limits::LAPSE_BATCH`. Actor:
/// operator, system or a replica. Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reap {
    /// In milliseconds; 0: `limits::REAP_AFTER`.
    #[prost(uint64, tag = "1")]
    pub older_than_ms: u64,
}
