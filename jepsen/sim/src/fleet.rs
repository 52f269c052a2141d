//! The commands of the workload: a cluster's genesis, a few paired devices, and registers kept in nodes'
//! labels.
//!
//! Real commands through the real state machine. Certificates are stand-ins: the state machine records and
//! compares their bytes, and only the edges, which are left out here, look inside of them.

use std::collections::BTreeMap;

use bytes::Bytes;
use palyra_platform as platform;
use palyra_state::cluster::{self, Addresses};
use palyra_state::identity::NewCertificate;
use palyra_state::{Actor, Command, Digest, Envelope, Fingerprint, Id, Read, nodes, pairing};

/// Name of the only operator.
const OPERATOR: &str = "root";
const YEAR_MS: u64 = 365 * 24 * 3600 * 1000;

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
        authority: 1,
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

/// The commands that pair a device, in order.
pub(crate) fn pair(device_id: Id) -> Vec<Envelope> {
    let (code_id, attempt_id, pairing_id) = (fresh(), fresh(), fresh());
    let replica = Actor::Replica { id: 1 };
    let source = "10.1.0.1".to_owned();
    let subject = format!("node/{device_id}");
    let mint = pairing::MintCode {
        code_id,
        method: pairing::Method::Pin.into(),
        sealed: Bytes::from_static(b"sealed"),
        ttl_ms: 0,
        device_name: String::new(),
    };
    let begin = pairing::BeginAttempt {
        attempt_id,
        code_id: Some(code_id),
        code_number: 0,
        device_id,
        source: source.clone(),
        method: pairing::Method::Pin.into(),
    };
    let prove = pairing::Prove {
        pairing_id,
        attempt_id: Some(attempt_id),
        code_id,
        device_id,
        device_name: format!("sim-{}", device_id.to_string().to_lowercase()),
        csr_der: Bytes::from_static(b"csr"),
        csr_spki: certificate(&subject).spki,
        sas: "123456".into(),
        source,
        served_by: 1,
        fetch_token_hash: Digest::of(b"token"),
    };
    let approve = pairing::Approve {
        pairing_id,
        certificate: certificate(&subject),
        sas: String::new(),
        reason: String::new(),
    };
    vec![
        envelope(operator(), mint),
        envelope(replica.clone(), begin),
        envelope(replica, prove),
        envelope(operator(), approve),
    ]
}

/// Sets the register of a device: its node registers with another label.
pub(crate) fn write(device_id: Id, value: u64) -> Envelope {
    let register = nodes::Register {
        device_id,
        platform: "sim/x".into(),
        agent_version: "1".into(),
        capabilities: Vec::new(),
        labels: BTreeMap::from([("value".to_owned(), value.to_string())]),
    };
    let fingerprint = certificate(&format!("node/{device_id}")).fingerprint();
    envelope(
        Actor::Node {
            device_id,
            fingerprint,
        },
        register,
    )
}

/// What the register holds; 0 at first.
pub(crate) fn value(state: &dyn Read, device_id: Id) -> u64 {
    nodes::node(state, device_id)
        .and_then(|node| node.labels.get("value").and_then(|text| text.parse().ok()))
        .unwrap_or(0)
}
