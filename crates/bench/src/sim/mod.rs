//! Simulated nodes: real identities, real pairing, real mutual TLS and real sessions, without a machine each.
//!
//! What never lives here: what a workload does with them. What is simulated is the machine: the agent's folder,
//! its programs and its ledger; what the cluster sees of a node is what it sees of an agent.

pub(crate) mod board;
pub(crate) mod cache;
pub(crate) mod node;
pub(crate) mod pair;
pub(crate) mod session;
pub(crate) mod watched;

use std::sync::Arc;

use anyhow::{Context, Result};
use palyra_client::{connect, quic};
use palyra_pki::Credential;
use palyra_pki::tls::SharedTrust;
use rustls::ClientConfig;

/// A node's identity, ready for connections. Nodes of one cluster share what they trust.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// Its device id.
    pub(crate) device_id: String,
    /// TLS over TCP that presents its certificate.
    pub(crate) tls: Arc<ClientConfig>,
    /// The same for QUIC.
    pub(crate) quic: Arc<ClientConfig>,
}

impl Identity {
    /// Loads a credential.
    pub(crate) fn load(credential: &Credential, trust: &Arc<SharedTrust>) -> Result<Identity> {
        let unusable = "a node's credential can't be used";
        let (own, _) = credential.for_tls().context(unusable)?;
        let peer = credential.identity().context(unusable)?;
        Ok(Identity {
            device_id: peer.id.id().to_owned(),
            quic: quic::mutual(Arc::clone(trust), Arc::clone(&own), None).context(unusable)?,
            tls: connect::mutual(Arc::clone(trust), own, None).context(unusable)?,
        })
    }
}
