//! What a worker says of itself, byte by byte: the message that is signed, and what signs it.

use bytes::Bytes;
use prost::Message as _;

/// In front of a statement when it is signed.
pub const STATEMENT_LABEL: &[u8] = b"palyra worker attestation v1\0";
/// In front of a binding when it is signed.
pub const EGRESS_LABEL: &[u8] = b"palyra egress binding v1\0";
/// In front of a quote when it is signed.
pub const QUOTE_LABEL: &[u8] = b"palyra hardware quote v1\0";

/// What a worker says of itself; `palyra.worker.v1.Statement` on the wire.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Statement {
    /// The cluster, 16 bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub cluster_id: Bytes,
    /// The worker, 16 bytes.
    #[prost(bytes = "bytes", tag = "2")]
    pub worker_id: Bytes,
    /// Of the open challenge, 32 bytes.
    #[prost(bytes = "bytes", tag = "3")]
    pub nonce: Bytes,
    /// SHA-256 of the image, or of the root that it runs from.
    #[prost(bytes = "bytes", tag = "4")]
    pub image: Bytes,
    /// SHA-256 of the worker program.
    #[prost(bytes = "bytes", tag = "5")]
    pub build: Bytes,
    /// SHA-256 over the tools that it offers.
    #[prost(bytes = "bytes", tag = "6")]
    pub artifact: Bytes,
    /// SHA-256 of the program that computed the digests; empty for self-reported ones.
    #[prost(bytes = "bytes", tag = "7")]
    pub supervisor: Bytes,
    /// What it claims.
    #[prost(uint32, tag = "8")]
    pub evidence: u32,
    /// What binds it to an egress proxy.
    #[prost(message, optional, tag = "9")]
    pub egress: Option<EgressBinding>,
    /// Tools that it offers, by name.
    #[prost(message, repeated, tag = "10")]
    pub capabilities: Vec<ClaimedCapability>,
    /// Version of the SDK's protocol.
    #[prost(uint32, tag = "11")]
    pub sdk_protocol: u32,
    /// Version of the WIT ABI.
    #[prost(string, tag = "12")]
    pub wit_abi: String,
    /// When it was made, in the cluster's time.
    #[prost(uint64, tag = "13")]
    pub issued_at: u64,
    /// First moment at which it is not good any more.
    #[prost(uint64, tag = "14")]
    pub expires_at: u64,
    /// Leases that it can hold at a time.
    #[prost(uint32, tag = "15")]
    pub slots: u32,
    /// What a provider vouches for.
    #[prost(message, optional, tag = "16")]
    pub quote: Option<HardwareQuote>,
}

/// A tool that is offered.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ClaimedCapability {
    /// The tool.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Who vouches for it.
    #[prost(string, tag = "2")]
    pub authority: String,
}

/// By an egress proxy, for one worker: what it sends goes through this proxy.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct EgressBinding {
    /// Name of the proxy.
    #[prost(string, tag = "1")]
    pub proxy: String,
    /// The worker, 16 bytes.
    #[prost(bytes = "bytes", tag = "2")]
    pub worker_id: Bytes,
    /// First moment at which it is good.
    #[prost(uint64, tag = "3")]
    pub not_before: u64,
    /// First moment at which it is not good any more.
    #[prost(uint64, tag = "4")]
    pub expires_at: u64,
    /// Over the label and the message without it.
    #[prost(bytes = "bytes", tag = "5")]
    pub signature: Bytes,
}

/// By hardware, or a test provider.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct HardwareQuote {
    /// Name of the provider.
    #[prost(string, tag = "1")]
    pub provider: String,
    /// The statement's.
    #[prost(bytes = "bytes", tag = "2")]
    pub nonce: Bytes,
    /// Image, build, artifact: 96 bytes.
    #[prost(bytes = "bytes", tag = "3")]
    pub digests: Bytes,
    /// Over the label and the message without it.
    #[prost(bytes = "bytes", tag = "4")]
    pub signature: Bytes,
}

impl EgressBinding {
    /// What is signed behind [`EGRESS_LABEL`]: the message without its signature.
    #[must_use]
    pub fn signed_bytes(&self) -> Vec<u8> {
        let mut unsigned = self.clone();
        unsigned.signature = Bytes::new();
        unsigned.encode_to_vec()
    }
}

impl HardwareQuote {
    /// What is signed behind [`QUOTE_LABEL`]: the message without its signature.
    #[must_use]
    pub fn signed_bytes(&self) -> Vec<u8> {
        let mut unsigned = self.clone();
        unsigned.signature = Bytes::new();
        unsigned.encode_to_vec()
    }
}
