//! The cluster itself: its identity, its replicas, and the tokens by which others join.
//!
//! What never lives here: Raft membership (openraft's own) and plain keys (the root key arrives sealed).
//! Invariants: a cluster is born once; a replica id is given once and never again; a join token admits one
//! replica; a removed replica stays removed; the feature level never falls.

mod rules;

pub(crate) use rules::apply;

use bytes::Bytes;

use crate::identity::NewCertificate;
use crate::ids::{Fingerprint, Id};
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::{limits, tables};

/// The cluster's identity; there is one.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cluster {
    /// Given at genesis.
    #[prost(message, required, tag = "1")]
    pub cluster_id: Id,
    /// Authority part of every SPIFFE id in the cluster.
    #[prost(string, tag = "2")]
    pub trust_domain: String,
    /// Root certificate, DER.
    #[prost(bytes = "bytes", tag = "3")]
    pub root_cert_der: Bytes,
    /// Root key, sealed under the cluster's KEK.
    #[prost(bytes = "bytes", tag = "4")]
    pub root_key_sealed: Bytes,
    /// Time of genesis.
    #[prost(uint64, tag = "5")]
    pub created_at: u64,
    /// What every replica understands.
    #[prost(uint32, tag = "6")]
    pub feature_level: u32,
    /// The id that the next replica gets.
    #[prost(uint64, tag = "7")]
    pub next_replica_id: u64,
}

/// Where a replica can be reached; each is `host:port`, empty when it does not listen.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Addresses {
    /// Replica to replica.
    #[prost(string, tag = "1")]
    pub peer: String,
    /// gRPC for nodes and operators.
    #[prost(string, tag = "2")]
    pub node: String,
    /// Enrolment of nodes and replicas.
    #[prost(string, tag = "3")]
    pub enrol: String,
    /// HTTPS API.
    #[prost(string, tag = "4")]
    pub http: String,
    /// Metrics and health.
    #[prost(string, tag = "5")]
    pub metrics: String,
    /// QUIC for nodes, UDP.
    #[prost(string, tag = "6")]
    pub quic: String,
}

/// Where a replica stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum ReplicaStatus {
    /// Has an id, but no certificate yet.
    Allocated = 0,
    /// Has its certificates; not in the Raft group yet.
    Joining = 1,
    /// In the group without a vote.
    Learner = 2,
    /// In the group with a vote.
    Voter = 3,
    /// Gone for good.
    Removed = 4,
}

impl ReplicaStatus {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            ReplicaStatus::Allocated => "allocated",
            ReplicaStatus::Joining => "joining",
            ReplicaStatus::Learner => "learner",
            ReplicaStatus::Voter => "voter",
            ReplicaStatus::Removed => "removed",
        }
    }
}

/// A `palyrad` process of the group.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Replica {
    /// Never reused.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Unique among replicas that are not removed.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Where it stands.
    #[prost(enumeration = "ReplicaStatus", tag = "3")]
    pub status: i32,
    /// Where it can be reached.
    #[prost(message, required, tag = "4")]
    pub addresses: Addresses,
    /// Certificate of its issuing authority, DER; empty until admitted.
    #[prost(bytes = "bytes", tag = "5")]
    pub authority_cert_der: Bytes,
    /// The certificate that it shows; zero until admitted.
    #[prost(message, required, tag = "6")]
    pub certificate: Fingerprint,
    /// When its id was given.
    #[prost(uint64, tag = "7")]
    pub joined_at: u64,
    /// When it was removed; 0 when it was not.
    #[prost(uint64, tag = "8")]
    pub removed_at: u64,
    /// Feature level that its binary understands, as it said last; 0 when it said none: see
    /// [`Replica::understands`].
    #[prost(uint32, tag = "9")]
    pub feature_level: u32,
    /// The `max_staleness` by which it serves nodes, as it said last, in milliseconds; 0 when it said none.
    #[prost(uint64, tag = "20")]
    pub max_staleness_ms: u64,
    /// End of the certificate that it says it shows; 0 when it said nothing since it was admitted.
    #[prost(uint64, tag = "40")]
    pub certificate_not_after: u64,
}

impl Replica {
    /// The feature level that it understands.
    #[must_use]
    pub fn understands(&self) -> u32 {
        self.feature_level.max(limits::FIRST_FEATURE_LEVEL)
    }

    /// Admitted and not removed: it may act.
    #[must_use]
    pub fn is_member(&self) -> bool {
        matches!(
            self.status(),
            ReplicaStatus::Joining | ReplicaStatus::Learner | ReplicaStatus::Voter
        )
    }
}

/// Lets one replica join.
#[derive(Clone, PartialEq, prost::Message)]
pub struct JoinToken {
    /// Names the token; not secret.
    #[prost(message, required, tag = "1")]
    pub id: Id,
    /// The secret's key, sealed under the cluster's KEK.
    #[prost(bytes = "bytes", tag = "2")]
    pub secret_key_sealed: Bytes,
    /// The only replica name that it is good for.
    #[prost(string, tag = "3")]
    pub name: String,
    /// First moment at which it is not good any more.
    #[prost(uint64, tag = "4")]
    pub expires_at: u64,
    /// Replica id that it was used for; 0 while it is not used.
    #[prost(uint64, tag = "5")]
    pub used_by: u64,
    /// Actor who minted it.
    #[prost(string, tag = "6")]
    pub issued_by: String,
    /// When it was minted.
    #[prost(uint64, tag = "7")]
    pub created_at: u64,
}

/// What is asked of the cluster.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// The one thing that is asked.
    #[prost(oneof = "Action", tags = "1, 2, 3, 4, 5, 6, 7, 8, 20")]
    pub action: Option<Action>,
}

/// One thing to ask of the cluster.
#[derive(Clone, PartialEq, prost::Oneof)]
#[expect(clippy::large_enum_variant, reason = "one is in memory at a time")]
pub enum Action {
    /// See [`Genesis`].
    #[prost(message, tag = "1")]
    Genesis(Genesis),
    /// See [`MintJoinToken`].
    #[prost(message, tag = "2")]
    MintJoinToken(MintJoinToken),
    /// See [`AllocateReplica`].
    #[prost(message, tag = "3")]
    AllocateReplica(AllocateReplica),
    /// See [`AdmitReplica`].
    #[prost(message, tag = "4")]
    AdmitReplica(AdmitReplica),
    /// See [`SetReplicaStatus`].
    #[prost(message, tag = "5")]
    SetReplicaStatus(SetReplicaStatus),
    /// See [`UpdateReplicaAddresses`].
    #[prost(message, tag = "6")]
    UpdateReplicaAddresses(UpdateReplicaAddresses),
    /// See [`RemoveReplica`].
    #[prost(message, tag = "7")]
    RemoveReplica(RemoveReplica),
    /// See [`RaiseFeatureLevel`].
    #[prost(message, tag = "8")]
    RaiseFeatureLevel(RaiseFeatureLevel),
    /// See [`AnnounceCertificate`].
    #[prost(message, tag = "20")]
    AnnounceCertificate(AnnounceCertificate),
}

/// Says which certificate a replica shows now. Actor: that replica. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AnnounceCertificate {
    /// The replica.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
    /// SHA-256 of the certificate's DER.
    #[prost(message, required, tag = "2")]
    pub certificate: Fingerprint,
    /// Valid until, exclusive.
    #[prost(uint64, tag = "3")]
    pub not_after: u64,
}

/// The birth of a cluster: replica 1, and the first operator, an admin. Actor: system. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Genesis {
    /// The new cluster's id.
    #[prost(message, required, tag = "1")]
    pub cluster_id: Id,
    /// Its trust domain.
    #[prost(string, tag = "2")]
    pub trust_domain: String,
    /// Root certificate, DER.
    #[prost(bytes = "bytes", tag = "3")]
    pub root_cert_der: Bytes,
    /// Root key, sealed.
    #[prost(bytes = "bytes", tag = "4")]
    pub root_key_sealed: Bytes,
    /// Name of replica 1.
    #[prost(string, tag = "5")]
    pub replica_name: String,
    /// Where replica 1 can be reached.
    #[prost(message, required, tag = "6")]
    pub addresses: Addresses,
    /// Replica 1's issuing authority, DER.
    #[prost(bytes = "bytes", tag = "7")]
    pub authority_cert_der: Bytes,
    /// Replica 1's certificate.
    #[prost(message, required, tag = "8")]
    pub replica_certificate: NewCertificate,
    /// Name of the first operator.
    #[prost(string, tag = "9")]
    pub operator_name: String,
    /// The first operator's certificate.
    #[prost(message, required, tag = "10")]
    pub operator_certificate: NewCertificate,
}

/// Makes a join token. Actor: admin. Reply: `TokenMinted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MintJoinToken {
    /// The token's id.
    #[prost(message, required, tag = "1")]
    pub token_id: Id,
    /// Key of the secret, sealed.
    #[prost(bytes = "bytes", tag = "2")]
    pub secret_key_sealed: Bytes,
    /// The replica's name.
    #[prost(string, tag = "3")]
    pub name: String,
    /// Life in milliseconds; 0: one hour.
    #[prost(uint64, tag = "4")]
    pub ttl_ms: u64,
}

/// Consumes a token and gives a replica id. Actor: the serving replica. Reply: `ReplicaAllocated`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AllocateReplica {
    /// The token that was proved.
    #[prost(message, required, tag = "1")]
    pub token_id: Id,
    /// The new replica's name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Where it can be reached.
    #[prost(message, required, tag = "3")]
    pub addresses: Addresses,
}

/// Records a new replica's certificates; it is `joining` from then on. Actor: the serving replica. Reply:
/// `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AdmitReplica {
    /// From `AllocateReplica`.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
    /// Its issuing authority, DER.
    #[prost(bytes = "bytes", tag = "2")]
    pub authority_cert_der: Bytes,
    /// Its own certificate.
    #[prost(message, required, tag = "3")]
    pub certificate: NewCertificate,
    /// The root that signed both; 0: the first.
    #[prost(uint32, tag = "10")]
    pub root: u32,
}

/// Records what became of a replica in the Raft group. Actor: system or a replica. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SetReplicaStatus {
    /// The replica.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
    /// `joining`, `learner` or `voter`.
    #[prost(enumeration = "ReplicaStatus", tag = "2")]
    pub status: i32,
}

/// Changes where a replica can be reached, and what it understands. Actor: that replica, system, or an admin.
/// Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateReplicaAddresses {
    /// The replica.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
    /// All its addresses.
    #[prost(message, required, tag = "2")]
    pub addresses: Addresses,
    /// Feature level that its binary understands; 0: as it was.
    #[prost(uint32, tag = "3")]
    pub feature_level: u32,
    /// Its `max_staleness`, in milliseconds; 0: as it was.
    #[prost(uint64, tag = "10")]
    pub max_staleness_ms: u64,
}

/// Removes a replica for good. Actor: admin. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RemoveReplica {
    /// The replica.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
}

/// Raises the feature level, to at most what every member understands. Actor: system or admin. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RaiseFeatureLevel {
    /// The new level.
    #[prost(uint32, tag = "1")]
    pub level: u32,
}

/// The cluster, once it is born.
#[must_use]
pub fn cluster(r: &dyn Read) -> Option<Cluster> {
    tables::CLUSTER.get(r, ())
}

/// Refuses a command that needs a higher feature level than the cluster has: replicas that do not understand it
/// would halt at its entry. Whoever proposes asks this first; apply asks it too.
///
/// # Errors
/// [`Code::FeatureMissing`].
pub fn check_level(r: &dyn Read, command: &crate::Command) -> Result<(), Reject> {
    let has = cluster(r).map_or(limits::FIRST_FEATURE_LEVEL, |born| born.feature_level);
    let needed = command.feature_level();
    if needed <= has {
        return Ok(());
    }
    Err(Reject::new(
        Code::FeatureMissing,
        [&command.name(), &needed, &has],
    ))
}

/// The feature level that every member understands, when it is above the cluster's: what the leader raises it to.
#[must_use]
pub fn next_feature_level(r: &dyn Read) -> Option<u32> {
    let has = cluster(r)?.feature_level;
    let members = replicas(r).into_iter().filter(Replica::is_member);
    let common = members.map(|member| member.understands()).min()?;
    (common > has).then_some(common)
}

/// The replica with this id.
#[must_use]
pub fn replica(r: &dyn Read, id: u64) -> Option<Replica> {
    tables::REPLICAS.get(r, id)
}

/// All replicas by id, removed ones too.
#[must_use]
pub fn replicas(r: &dyn Read) -> Vec<Replica> {
    tables::REPLICAS.list(r, (), usize::MAX)
}

/// The join token with this id.
#[must_use]
pub fn join_token(r: &dyn Read, id: Id) -> Option<JoinToken> {
    tables::JOIN_TOKENS.get(r, id)
}

/// All join tokens, oldest first.
#[must_use]
pub fn join_tokens(r: &dyn Read) -> Vec<JoinToken> {
    tables::JOIN_TOKENS.list(r, (), usize::MAX)
}
