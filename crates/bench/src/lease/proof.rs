//! What simulated workers prove, and the policy that they meet.
//!
//! What never lives here: measuring. A simulated worker has no machine: it says digests that the bench made up, at
//! the level
//! `self-reported`, and the policy of the bench's cluster allows them.

use anyhow::{Context, Result};
use palyra_client::{Client, new_ulid};
use palyra_pki::attestation::{public_key, sign_statement};
use palyra_pki::{Credential, KeyPair, sha256};
use palyra_proto::worker::v1 as wire;
use palyra_state::Id;
use prost::Message as _;

/// What the runs of the bench ask for.
pub(crate) const TOOL: &str = "bench.hold";
const AUTHORITY: &str = "bench";
const WIT_ABI: &str = "0.2.0";

fn digest(of: &str) -> [u8; 32] {
    sha256(format!("palyra-bench {of}").as_bytes())
}

/// What a worker signs with.
pub(crate) struct Signer {
    key: KeyPair,
    worker_id: Id,
    slots: u32,
}

impl Signer {
    /// The key of a paired device.
    pub(crate) fn of(credential: &Credential, slots: u32) -> Result<Signer> {
        let key = credential.key_pair().context("the key of a node")?;
        let identity = credential.identity().context("the certificate of a node")?;
        Ok(Signer {
            worker_id: Id::parse(identity.id.id()).context("the id of a node")?,
            key,
            slots,
        })
    }

    /// The answer to a challenge.
    pub(crate) fn attest(&self, challenge: &wire::Challenge) -> wire::Attest {
        let statement = wire::Statement {
            cluster_id: challenge.cluster_id.clone(),
            worker_id: self.worker_id.to_bytes().to_vec().into(),
            nonce: challenge.nonce.clone(),
            image: digest("image").to_vec().into(),
            build: digest("build").to_vec().into(),
            artifact: digest("artifact").to_vec().into(),
            evidence: 1,
            capabilities: vec![wire::ClaimedCapability {
                name: TOOL.to_owned(),
                authority: AUTHORITY.to_owned(),
            }],
            sdk_protocol: 1,
            wit_abi: WIT_ABI.to_owned(),
            issued_at_ms: challenge.now_ms,
            expires_at_ms: challenge.now_ms + challenge.max_life_ms.max(1),
            slots: self.slots,
            ..wire::Statement::default()
        };
        let bytes = statement.encode_to_vec();
        // A key that cannot sign shows an empty signature, which is refused.
        let signature = sign_statement(&self.key, &bytes).unwrap_or_default();
        wire::Attest {
            request_id: new_ulid(),
            statement: bytes.into(),
            public_key: public_key(&self.key).into(),
            signature: signature.into(),
        }
    }
}

/// Has the cluster admit simulated workers.
pub(crate) async fn allow(client: &Client, workers: u32, slots: u32, max_ttl_ms: u64) -> Result<()> {
    let present = client.worker_policy().await?.policy.unwrap_or_default();
    let one = |name: &str| {
        vec![
            digest(name)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>(),
        ]
    };
    let policy = wire::FleetPolicy {
        images: one("image"),
        builds: one("build"),
        artifacts: one("artifact"),
        sdk_protocol_min: 1,
        sdk_protocol_max: 1,
        wit_abis: vec![WIT_ABI.to_owned()],
        capabilities: vec![wire::TrustedCapability {
            name: TOOL.to_owned(),
            authorities: vec![AUTHORITY.to_owned()],
            min_evidence: "self-reported".to_owned(),
        }],
        max_lease_ttl_ms: max_ttl_ms,
        heartbeat_timeout_ms: 30_000,
        max_workers: workers,
        leases_per_worker: slots,
        max_attestation_life_ms: 86_400_000,
        ..wire::FleetPolicy::default()
    };
    let request = wire::SetPolicyRequest {
        request_id: new_ulid(),
        policy: Some(policy),
        expected_version: present.version,
        reason: "palyra-bench lease".to_owned(),
        dry_run: false,
    };
    client.set_worker_policy(request).await.context("the policy")?;
    Ok(())
}
