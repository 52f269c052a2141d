//! What workers are held to: the record, its checks, and what differs between two of them.
//!
//! What never lives here: how a statement is held against it (`verify`).

use bytes::Bytes;

use super::Evidence;
use crate::ids::Digest;

/// What workers are held to; there is one. Without one nobody is admitted.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Policy {
    /// Counts changes, from 1.
    #[prost(uint64, tag = "1")]
    pub version: u64,
    /// When it was set.
    #[prost(uint64, tag = "2")]
    pub set_at: u64,
    /// Actor who set it.
    #[prost(string, tag = "3")]
    pub set_by: String,
    /// SHA-256 of images that may run; an empty list allows none. Sorted, as the lists below are.
    #[prost(message, repeated, tag = "4")]
    pub images: Vec<Digest>,
    /// SHA-256 of worker programs.
    #[prost(message, repeated, tag = "5")]
    pub builds: Vec<Digest>,
    /// SHA-256 of sets of tools.
    #[prost(message, repeated, tag = "6")]
    pub artifacts: Vec<Digest>,
    /// SHA-256 of supervisors whose digests are believed.
    #[prost(message, repeated, tag = "7")]
    pub supervisors: Vec<Digest>,
    /// Name of the proxy that every worker must be bound to; empty: no binding is required, but one that is shown is checked.
    #[prost(string, tag = "8")]
    pub required_egress: String,
    /// Proxies whose bindings are believed.
    #[prost(message, repeated, tag = "9")]
    pub egress_proxies: Vec<TrustedKey>,
    /// Lowest version of the SDK's protocol.
    #[prost(uint32, tag = "10")]
    pub sdk_protocol_min: u32,
    /// Highest version of the SDK's protocol.
    #[prost(uint32, tag = "11")]
    pub sdk_protocol_max: u32,
    /// Versions of the WIT ABI.
    #[prost(string, repeated, tag = "12")]
    pub wit_abis: Vec<String>,
    /// Tools that may be offered.
    #[prost(message, repeated, tag = "13")]
    pub capabilities: Vec<TrustedCapability>,
    /// Longest life of a lease between two renewals, in milliseconds.
    #[prost(uint64, tag = "14")]
    pub max_lease_ttl: u64,
    /// How long a worker's session may be away before it is orphaned, in milliseconds.
    #[prost(uint64, tag = "15")]
    pub heartbeat_timeout: u64,
    /// Workers that may be admitted.
    #[prost(uint32, tag = "16")]
    pub max_workers: u32,
    /// Slots of one worker.
    #[prost(uint32, tag = "17")]
    pub leases_per_worker: u32,
    /// Hardware, or test, providers whose quotes are believed.
    #[prost(message, repeated, tag = "18")]
    pub hardware_providers: Vec<TrustedKey>,
    /// Longest life of a statement, in milliseconds.
    #[prost(uint64, tag = "19")]
    pub max_attestation_life: u64,
}

/// Somebody whose signature is believed.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TrustedKey {
    /// Short name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// SubjectPublicKeyInfo DER of a P-256 key.
    #[prost(bytes = "bytes", tag = "2")]
    pub public_key: Bytes,
}

/// A tool that may be offered.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TrustedCapability {
    /// Name of the tool.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Who may vouch for it.
    #[prost(string, repeated, tag = "2")]
    pub authorities: Vec<String>,
    /// Least evidence of a worker that is given it.
    #[prost(enumeration = "Evidence", tag = "3")]
    pub min_evidence: i32,
}

impl Policy {
    /// What is said of a tool.
    #[must_use]
    pub fn capability(&self, name: &str) -> Option<&TrustedCapability> {
        self.capabilities.iter().find(|known| known.name == name)
    }

    /// The proxy with this name.
    #[must_use]
    pub fn proxy(&self, name: &str) -> Option<&TrustedKey> {
        self.egress_proxies.iter().find(|known| known.name == name)
    }

    /// The provider with this name.
    #[must_use]
    pub fn provider(&self, name: &str) -> Option<&TrustedKey> {
        self.hardware_providers.iter().find(|known| known.name == name)
    }
}
