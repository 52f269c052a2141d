//! The commands of the workload: a cluster's genesis and its replicas, paired devices, registers kept in nodes'
//! labels, sessions, dispatches, revocations.
//!
//! Real commands through the real state machine. Certificates are stand-ins: the state machine records and
//! compares their bytes, and only the edges, which are left out here, look inside of them.

use std::collections::BTreeMap;

use bytes::Bytes;
use palyra_platform as platform;
use palyra_state::cluster::{self, Addresses};
use palyra_state::identity::{self, NewCertificate};
use palyra_state::nodes::{Capability, Effect};
use palyra_state::{Actor, Command, Digest, Envelope, Fingerprint, Id, Read, dispatch, nodes, pairing};

/// A capability that may be run again.
pub(crate) const AGAIN: &str = "echo";
/// A capability that must not be run twice.
pub(crate) const ONCE: &str = "pay";
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
        not_before: now - 3_600_000,
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

/// The first entry of a cluster.
pub(crate) fn genesis(cluster_id: Id) -> Envelope {
    let genesis = cluster::Genesis {
        cluster_id,
        trust_domain: "sim.internal".into(),
        root_cert_der: Bytes::from_static(b"root"),
        root_key_sealed: Bytes::from_static(b"sealed"),
        replica_name: "r1".into(),
        addresses: addresses(1),
        authority_cert_der: Bytes::from_static(b"authority"),
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
pub(crate) fn admit(replica_id: u64) -> Envelope {
    let admit = cluster::AdmitReplica {
        replica_id,
        authority_cert_der: Bytes::from_static(b"authority"),
        certificate: certificate(&format!("replica/{replica_id}")),
        root: 0,
    };
    envelope(Actor::System, admit)
}

/// Records that a replica has a vote.
pub(crate) fn voter(replica_id: u64) -> Envelope {
    let status = cluster::SetReplicaStatus {
        replica_id,
        status: cluster::ReplicaStatus::Voter.into(),
    };
    envelope(Actor::System, status)
}

/// Removes a replica for good.
pub(crate) fn remove(replica_id: u64) -> Envelope {
    envelope(operator(), cluster::RemoveReplica { replica_id })
}

/// Opens a code.
pub(crate) fn mint(code_id: Id) -> Envelope {
    let mint = pairing::MintCode {
        code_id,
        method: pairing::Method::Pin.into(),
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

/// Says that a device proved a code; it asks for a certificate under `pairing_id`.
pub(crate) fn prove(served_by: u64, attempt_id: Id, code_id: Id, device_id: Id, pairing_id: Id) -> Envelope {
    let prove = pairing::Prove {
        pairing_id,
        attempt_id: Some(attempt_id),
        code_id,
        device_id,
        device_name: format!("sim-{}", device_id.to_string().to_lowercase()),
        csr_der: Bytes::from_static(b"csr"),
        csr_spki: certificate(&format!("node/{device_id}")).spki,
        sas: "123456".into(),
        source: SOURCE.into(),
        served_by,
        fetch_token_hash: Digest::of(b"token"),
    };
    envelope(Actor::Replica { id: served_by }, prove)
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

/// The commands that pair a device, in order.
pub(crate) fn pair(device_id: Id) -> Vec<Envelope> {
    let (code_id, attempt_id, pairing_id) = (fresh(), fresh(), fresh());
    vec![
        mint(code_id),
        begin(1, attempt_id, code_id, device_id),
        prove(1, attempt_id, code_id, device_id, pairing_id),
        approve(pairing_id, device_id, 0),
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
    let register = nodes::Register {
        device_id,
        platform: "sim/x".into(),
        agent_version: "1".into(),
        capabilities: vec![
            capability(AGAIN, Effect::Idempotent),
            capability(ONCE, Effect::Once),
        ],
        labels: BTreeMap::from([("value".to_owned(), value.to_string())]),
        ..nodes::Register::default()
    };
    envelope(actor, register)
}

/// Begins a session at a replica; the node has begun or finished `held`.
pub(crate) fn attach(actor: Actor, device_id: Id, replica_id: u64, held: Vec<Id>) -> Envelope {
    let attach = nodes::Attach {
        device_id,
        replica_id,
        transport: "stream".into(),
        held,
        ..nodes::Attach::default()
    };
    envelope(actor, attach)
}

/// Ends a session.
pub(crate) fn detach(actor: Actor, device_id: Id, epoch: u64) -> Envelope {
    let detach = nodes::Detach {
        device_id,
        epoch,
        reason: "disconnected".into(),
    };
    envelope(actor, detach)
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

/// Says that a replica lost a node: it is suspect, offline soon, and gone not much later.
pub(crate) fn lose(replica_id: u64, device_id: Id, epoch: u64) -> Envelope {
    let ended = nodes::Ended {
        device_id,
        epoch,
        reason: "silent".into(),
        how: nodes::How::Lost as i32,
        silent_for: 100,
    };
    let detach = nodes::DetachMany {
        ends: vec![ended],
        suspect_for: 150,
        lost_after: 400,
    };
    envelope(Actor::Replica { id: replica_id }, detach)
}

/// Moves nodes that are late to their next status.
pub(crate) fn lapse(ids: Vec<Id>) -> Envelope {
    envelope(Actor::System, nodes::Lapse { ids, lost_after: 400 })
}

/// Ends dispatches whose time is over.
pub(crate) fn expire(ids: Vec<Id>) -> Envelope {
    envelope(Actor::System, dispatch::Expire { ids })
}

/// Says that a person must act first.
pub(crate) fn await_mediation(actor: Actor, dispatch_id: Id, epoch: u64) -> Envelope {
    let wait = dispatch::AwaitMediation {
        dispatch_id,
        epoch,
        ..dispatch::AwaitMediation::default()
    };
    envelope(actor, wait)
}

/// Reports a result.
pub(crate) fn complete(actor: Actor, dispatch_id: Id, epoch: u64, result: &[u8]) -> Envelope {
    let complete = dispatch::Complete {
        dispatch_id,
        epoch,
        outcome: dispatch::Outcome::Succeeded.into(),
        result: Bytes::copy_from_slice(result),
        error: None,
        ..dispatch::Complete::default()
    };
    envelope(actor, complete)
}

/// Revokes a device.
pub(crate) fn revoke(device_id: Id) -> Envelope {
    let revoke = identity::RevokeDevice {
        device_id,
        reason: "lost".into(),
    };
    envelope(operator(), revoke)
}

/// What the register holds; 0 at first.
pub(crate) fn value(state: &dyn Read, device_id: Id) -> u64 {
    nodes::node(state, device_id)
        .and_then(|node| node.labels.get("value").and_then(|text| text.parse().ok()))
        .unwrap_or(0)
}
