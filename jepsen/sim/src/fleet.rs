//! The commands of the workload: a cluster's genesis and its replicas, paired devices, registers kept in nodes'
//! labels, sessions, dispatches, revocations.
//!
//! Real commands through the real state machine. Certificates are stand-ins: the state machine records and
//! compares their bytes, and only the edges, which are left out here, look inside of them.

use std::collections::BTreeMap;

use bytes::Bytes;
use palyra_control::Challenge;
use palyra_pki::{PeerIdentity, Role};
use palyra_platform as platform;
use palyra_state::cluster::{self, Addresses};
use palyra_state::fleet::{self as workers, Evidence, Policy, TrustedCapability};
use palyra_state::identity::{self, NewCertificate};
use palyra_state::nodes::{Capability, Effect};
use palyra_state::{
    Actor, Command, Digest, Envelope, Fingerprint, Id, Read, approvals, dispatch, leases, nodes, pairing,
};

use crate::papers::{CLUSTER, Papers};

/// A capability that may be run again.
pub(crate) const AGAIN: &str = "echo";
/// A capability that must not be run twice.
pub(crate) const ONCE: &str = "pay";
/// The tool that workers have, who vouches for it, and what it speaks.
const TOOL: &str = "sum";
const AUTHORITY: &str = "ops";
const ABI: &str = "0.2.0";
/// Name of the only operator.
const OPERATOR: &str = "root";
const YEAR_MS: u64 = 365 * 24 * 3600 * 1000;
/// Where pairing machines come from.
const SOURCE: &str = "10.1.0.1";

/// A fresh id that carries the world's time.
pub(crate) fn fresh() -> Id {
    Id::from_bytes(platform::new_ulid_bytes())
}

fn certificate(subject: &str) -> NewCertificate {
    let now = crate::world::EPOCH_MS;
    NewCertificate {
        der: Bytes::from(format!("certificate of {subject}")),
        spki: Fingerprint::of(format!("key of {subject}").as_bytes()),
        serial: Bytes::copy_from_slice(&Digest::of(subject.as_bytes()).to_bytes()[..16]),
        // Long before: a clock that is wrong by a day shuts nobody out.
        not_before: now - 3 * 24 * 3_600_000,
        not_after: now + YEAR_MS,
        // The root's: a replica's authority goes with the replica.
        authority: 0,
        authority_number: 0,
    }
}

fn operator() -> Actor {
    let subject = format!("operator/{OPERATOR}");
    Actor::Operator {
        name: OPERATOR.into(),
        fingerprint: certificate(&subject).fingerprint(),
    }
}

fn addresses(replica: u64) -> Addresses {
    let at = |port: u16| format!("10.0.0.{replica}:{port}");
    Addresses {
        peer: at(7444),
        node: at(7441),
        enrol: at(7442),
        http: at(7440),
        metrics: at(7445),
        quic: at(7443),
    }
}

fn envelope(actor: Actor, command: impl Into<Command>) -> Envelope {
    Envelope::new(fresh(), actor, command)
}

/// The operator as TLS shows it.
pub(crate) fn operator_peer(papers: &Papers) -> PeerIdentity {
    papers.peer(
        Role::Operator,
        OPERATOR,
        &certificate(&format!("operator/{OPERATOR}")),
    )
}

/// A device as TLS shows it, with the certificate that `by` signed.
pub(crate) fn node_peer(papers: &Papers, device_id: Id, by: u64) -> PeerIdentity {
    papers.peer(
        Role::Node,
        &device_id.to_string(),
        &node_certificate(device_id, by),
    )
}

/// The first entry of a cluster.
pub(crate) fn genesis(papers: &Papers) -> Envelope {
    let genesis = cluster::Genesis {
        cluster_id: CLUSTER,
        trust_domain: papers.domain().to_string(),
        root_cert_der: papers.root_der().into(),
        root_key_sealed: papers.root_key_sealed().into(),
        replica_name: "r1".into(),
        addresses: addresses(1),
        authority_cert_der: papers.authority(1).into(),
        replica_certificate: certificate("replica/1"),
        operator_name: OPERATOR.into(),
        operator_certificate: certificate(&format!("operator/{OPERATOR}")),
    };
    envelope(Actor::System, genesis)
}

/// The commands that make another replica known, in order, and the token that they use; its id is in the answer to the
/// second.
pub(crate) fn invite(name: &str) -> [Envelope; 2] {
    let token_id = fresh();
    let mint = cluster::MintJoinToken {
        token_id,
        secret_key_sealed: Bytes::from_static(b"sealed"),
        name: name.into(),
        ttl_ms: 0,
    };
    let allocate = cluster::AllocateReplica {
        token_id,
        name: name.into(),
        addresses: addresses(9),
    };
    [envelope(operator(), mint), envelope(Actor::System, allocate)]
}

/// Records a new replica's certificates.
pub(crate) fn admit(replica_id: u64, papers: &Papers) -> Envelope {
    let admit = cluster::AdmitReplica {
        replica_id,
        authority_cert_der: papers.authority(replica_id).into(),
        certificate: certificate(&format!("replica/{replica_id}")),
        root: 0,
    };
    envelope(Actor::System, admit)
}

/// Removes a replica for good.
pub(crate) fn remove(replica_id: u64) -> Envelope {
    envelope(operator(), cluster::RemoveReplica { replica_id })
}

/// Opens a code.
pub(crate) fn mint(code_id: Id, method: pairing::Method) -> Envelope {
    let mint = pairing::MintCode {
        code_id,
        method: method.into(),
        sealed: Bytes::from_static(b"sealed"),
        ttl_ms: 0,
        device_name: String::new(),
    };
    envelope(operator(), mint)
}

/// Counts an attempt of a device at a code.
pub(crate) fn begin(served_by: u64, attempt_id: Id, code_id: Id, device_id: Id) -> Envelope {
    let begin = pairing::BeginAttempt {
        attempt_id,
        code_id: Some(code_id),
        code_number: 0,
        device_id,
        source: SOURCE.into(),
        method: pairing::Method::Pin.into(),
    };
    envelope(Actor::Replica { id: served_by }, begin)
}

/// Says that a device proved a code; it asks for a certificate under `pairing_id`. A ticket needs no attempt.
pub(crate) fn prove(
    served_by: u64,
    attempt_id: Option<Id>,
    code_id: Id,
    device_id: Id,
    pairing_id: Id,
) -> Envelope {
    let prove = proof(served_by, attempt_id, code_id, device_id, pairing_id);
    envelope(Actor::Replica { id: served_by }, prove)
}

fn proof(
    served_by: u64,
    attempt_id: Option<Id>,
    code_id: Id,
    device_id: Id,
    pairing_id: Id,
) -> pairing::Prove {
    pairing::Prove {
        pairing_id,
        attempt_id,
        code_id,
        device_id,
        device_name: format!("sim-{}", device_id.to_string().to_lowercase()),
        csr_der: Bytes::from_static(b"csr"),
        csr_spki: certificate(&format!("node/{device_id}")).spki,
        sas: "123456".into(),
        source: SOURCE.into(),
        served_by,
        fetch_token_hash: Digest::of(b"token"),
    }
}

/// Takes a code back.
pub(crate) fn close(code_id: Id) -> Envelope {
    let close = pairing::RevokeCode {
        code_id,
        reason: String::new(),
    };
    envelope(operator(), close)
}

/// Refuses a machine.
pub(crate) fn reject(pairing_id: Id) -> Envelope {
    let reject = pairing::Reject {
        pairing_id,
        reason: String::new(),
    };
    envelope(operator(), reject)
}

/// Lets a device in. `by` tells certificates apart that two replicas signed for it at once.
pub(crate) fn approve(pairing_id: Id, device_id: Id, by: u64) -> Envelope {
    let approve = pairing::Approve {
        pairing_id,
        certificate: node_certificate(device_id, by),
        sas: String::new(),
        reason: String::new(),
    };
    envelope(operator(), approve)
}

fn node_certificate(device_id: Id, by: u64) -> NewCertificate {
    NewCertificate {
        der: Bytes::from(format!("certificate of node/{device_id} by {by}")),
        ..certificate(&format!("node/{device_id}"))
    }
}

/// The commands that pair a device, in order; of a worker with the hash of its identity's key.
pub(crate) fn pair(device_id: Id, key: Option<Fingerprint>) -> Vec<Envelope> {
    let (code_id, attempt_id, pairing_id) = (fresh(), fresh(), fresh());
    let spki = key.unwrap_or_else(|| certificate(&format!("node/{device_id}")).spki);
    let prove = Command::from(pairing::Prove {
        csr_spki: spki,
        ..proof(1, Some(attempt_id), code_id, device_id, pairing_id)
    });
    let approve = Command::from(pairing::Approve {
        pairing_id,
        certificate: NewCertificate {
            spki,
            ..node_certificate(device_id, 0)
        },
        sas: String::new(),
        reason: String::new(),
    });
    vec![
        mint(code_id, pairing::Method::Pin),
        begin(1, attempt_id, code_id, device_id),
        envelope(Actor::Replica { id: 1 }, prove),
        envelope(operator(), approve),
    ]
}

/// The fingerprint of the certificate that `by` signed for a device.
pub(crate) fn fingerprint(device_id: Id, by: u64) -> Fingerprint {
    node_certificate(device_id, by).fingerprint()
}

/// A device as it shows itself with the certificate that was signed by `by`.
pub(crate) fn node(device_id: Id, by: u64) -> Actor {
    Actor::Node {
        device_id,
        fingerprint: fingerprint(device_id, by),
    }
}

/// Sets the register of a device: its node registers with another label.
pub(crate) fn write(actor: Actor, device_id: Id, value: u64) -> Envelope {
    let capability = |name: &str, effect: Effect| Capability {
        name: name.into(),
        effect: effect.into(),
        // Few, so that dispatches wait for a slot.
        max_concurrency: 3,
        ..Capability::default()
    };
    let again = Capability {
        max_attempts: 3,
        backoff_ms: 100,
        retry_on: vec![
            dispatch::ANY_FAILURE.to_owned(),
            dispatch::SESSION_LOST.to_owned(),
        ],
        ..capability(AGAIN, Effect::Idempotent)
    };
    let register = nodes::Register {
        device_id,
        platform: "sim/x".into(),
        agent_version: "1".into(),
        capabilities: vec![again, capability(ONCE, Effect::Once)],
        labels: BTreeMap::from([("value".to_owned(), value.to_string())]),
        ..nodes::Register::default()
    };
    envelope(actor, register)
}

/// Asks a node to do something.
pub(crate) fn submit(
    dispatch_id: Id,
    device_id: Id,
    capability: &str,
    bytes: usize,
    timeout_ms: u64,
) -> Envelope {
    let submit = dispatch::Submit {
        dispatch_id,
        device_id,
        capability: capability.into(),
        payload: Bytes::from(vec![b'p'; bytes]),
        timeout_ms,
        priority: (dispatch_id.to_bytes()[15] % 3).into(),
        ..dispatch::Submit::default()
    };
    envelope(operator(), submit)
}

/// Takes a dispatch back.
pub(crate) fn cancel(dispatch_id: Id) -> Envelope {
    let cancel = dispatch::Cancel {
        dispatch_id,
        reason: String::new(),
    };
    envelope(operator(), cancel)
}

/// What workers must prove, and how long their leases may be.
pub(crate) fn policy() -> Envelope {
    let policy = Policy {
        images: vec![Digest::of(b"image")],
        builds: vec![Digest::of(b"build")],
        artifacts: vec![Digest::of(b"artifact")],
        sdk_protocol_min: 1,
        sdk_protocol_max: 1,
        wit_abis: vec![ABI.to_owned()],
        capabilities: vec![TrustedCapability {
            name: TOOL.to_owned(),
            authorities: vec![AUTHORITY.to_owned()],
            min_evidence: Evidence::SelfReported as i32,
        }],
        max_lease_ttl: 5_000,
        heartbeat_timeout: 2_000,
        max_workers: 16,
        leases_per_worker: 8,
        max_attestation_life: 3_600_000,
        ..Policy::default()
    };
    let set = workers::SetPolicy {
        policy,
        expected_version: 0,
        reason: String::new(),
    };
    envelope(operator(), set)
}

/// What a worker says of itself over a challenge.
pub(crate) fn statement(worker: Id, challenge: &Challenge, slots: u32) -> workers::Statement {
    let bytes = |digest: Digest| Bytes::copy_from_slice(&digest.to_bytes());
    workers::Statement {
        cluster_id: Bytes::copy_from_slice(&challenge.cluster_id.to_bytes()),
        worker_id: Bytes::copy_from_slice(&worker.to_bytes()),
        nonce: bytes(challenge.nonce),
        image: bytes(Digest::of(b"image")),
        build: bytes(Digest::of(b"build")),
        artifact: bytes(Digest::of(b"artifact")),
        evidence: Evidence::SelfReported as u32,
        capabilities: vec![workers::ClaimedCapability {
            name: TOOL.to_owned(),
            authority: AUTHORITY.to_owned(),
        }],
        sdk_protocol: 1,
        wit_abi: ABI.to_owned(),
        issued_at: challenge.now_ms,
        expires_at: challenge.now_ms + challenge.max_life_ms,
        slots,
        ..workers::Statement::default()
    }
}

/// Asks for a run's grant.
pub(crate) fn grant(run_id: Id, approval_id: Id) -> Envelope {
    let create = approvals::CreateGrant {
        grant_id: fresh(),
        run_id,
        tool: TOOL.to_owned(),
        session: String::new(),
        ttl_ms: 0,
        summary: String::new(),
        risk: approvals::Risk::Low as i32,
        approval_id,
    };
    envelope(operator(), create)
}

/// Decides about it.
pub(crate) fn decide(approval_id: Id, allow: bool) -> Envelope {
    let decide = approvals::Decide {
        approval_id,
        allow,
        scope: approvals::Scope::Once as i32,
        ttl_ms: 0,
        reason: String::new(),
    };
    envelope(operator(), decide)
}

/// Starts a run; one that may be run `again` when its lease was lost has three attempts.
pub(crate) fn start(run_id: Id, again: bool, ttl_ms: u64, timeout_ms: u64) -> Envelope {
    let effect = if again { Effect::Idempotent } else { Effect::Once };
    let start = leases::StartRun {
        run_id,
        tool: TOOL.to_owned(),
        effect: effect as i32,
        max_attempts: if again { 3 } else { 1 },
        ttl_ms,
        timeout_ms,
        ..leases::StartRun::default()
    };
    envelope(operator(), start)
}

/// Takes a run back.
pub(crate) fn cancel_run(run_id: Id) -> Envelope {
    let cancel = leases::CancelRun {
        run_id,
        reason: String::new(),
    };
    envelope(operator(), cancel)
}

/// Revokes a device.
pub(crate) fn revoke(device_id: Id) -> Envelope {
    let revoke = identity::RevokeDevice {
        device_id,
        reason: "lost".into(),
    };
    envelope(operator(), revoke)
}

/// What the register holds, and its version; 0 at first, both.
pub(crate) fn register(state: &dyn Read, device_id: Id) -> (u64, u64) {
    let Some(node) = nodes::node(state, device_id) else {
        return (0, 0);
    };
    let value = node.labels.get("value").and_then(|text| text.parse().ok());
    (value.unwrap_or(0), node.generation)
}
