//! What workers prove, and the policy that all of them meet: digests that the harness made up for those that it
//! plays, and those that real ones measure.

use anyhow::{Context, Result};
use palyra_client::{Client, new_ulid};
use palyra_pki::attestation::{public_key, sign_statement};
use palyra_pki::{Credential, KeyPair, sha256};
use palyra_proto::worker::v1 as wire;
use palyra_state::Id;
use prost::Message as _;
use serde_json::Value;

/// What the runs ask for.
pub(super) const TOOL: &str = "jepsen.hold";
/// Who vouches for it.
pub(super) const AUTHORITY: &str = "jepsen";
const WIT_ABI: &str = "0.2.0";

fn digest(of: &str) -> [u8; 32] {
    sha256(format!("jepsen {of}").as_bytes())
}

/// What a played worker signs with.
pub(super) struct Signer {
    key: KeyPair,
    worker: Id,
    slots: u32,
}

impl Signer {
    /// The key of a paired device.
    pub(super) fn of(credential: &Credential, slots: u32) -> Result<Signer> {
        let key = credential.key_pair().context("a machine's key")?;
        let identity = credential.identity().context("a machine's certificate")?;
        Ok(Signer {
            worker: Id::parse(identity.id.id()).context("a machine's id")?,
            key,
            slots,
        })
    }

    /// The answer to a challenge.
    pub(super) fn attest(&self, challenge: &wire::Challenge) -> wire::Attest {
        let statement = wire::Statement {
            cluster_id: challenge.cluster_id.clone(),
            worker_id: self.worker.to_bytes().to_vec().into(),
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

/// Has the cluster admit the workers of a run.
pub(super) async fn allow(client: &Client, measured: &Value, workers: u32, slots: u32) -> Result<()> {
    let present = client.worker_policy().await?.policy.unwrap_or_default();
    let both = |name: &str| {
        let made_up = hex::encode(digest(name));
        let real = measured[name].as_str().map(str::to_owned);
        std::iter::once(made_up).chain(real).collect::<Vec<String>>()
    };
    let policy = wire::FleetPolicy {
        images: both("image"),
        builds: both("build"),
        artifacts: both("artifact"),
        supervisors: measured["supervisor"]
            .as_str()
            .map(str::to_owned)
            .into_iter()
            .collect(),
        sdk_protocol_min: 1,
        sdk_protocol_max: 1,
        wit_abis: vec![WIT_ABI.to_owned()],
        capabilities: vec![wire::TrustedCapability {
            name: TOOL.to_owned(),
            authorities: vec![AUTHORITY.to_owned()],
            min_evidence: "self-reported".to_owned(),
        }],
        max_lease_ttl_ms: 60_000,
        heartbeat_timeout_ms: 10_000,
        max_workers: workers,
        leases_per_worker: slots,
        max_attestation_life_ms: 86_400_000,
        ..wire::FleetPolicy::default()
    };
    let request = wire::SetPolicyRequest {
        request_id: new_ulid(),
        policy: Some(policy),
        expected_version: present.version,
        reason: "jepsen".to_owned(),
        dry_run: false,
    };
    client
        .set_worker_policy(request)
        .await
        .context("the policy of workers")?;
    Ok(())
}
