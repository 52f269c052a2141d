//! Samples of records and replies. A new field must be filled in here: the literals name every field.

use std::collections::BTreeMap;

use bytes::Bytes;
use palyra_state::{
    Answer, Class, Code, Cursor, Digest, Id, Meta, Reject, Requester, Row, Seen, access, ca, cluster,
    dispatch, identity, nodes, pairing, tables,
};
use prost::Message;

use crate::kit::{self, fingerprint, id_at, key};
use crate::lives;
use crate::replies::replies;

/// A name and the bytes of a sample, which must read back as itself.
pub(crate) fn add<M: Message + Default + PartialEq + Clone + std::fmt::Debug>(
    all: &mut BTreeMap<String, Vec<u8>>,
    name: &str,
    sample: &M,
) {
    let bytes = sample.encode_to_vec();
    assert_eq!(M::decode(bytes.as_slice()).unwrap(), *sample, "{name}");
    assert!(all.insert(name.to_owned(), bytes).is_none(), "{name} twice");
}

pub(crate) fn id(number: u64) -> Id {
    id_at(kit::T0, number)
}

pub(crate) fn text(text: &str) -> String {
    text.to_owned()
}

/// A sample of every record and every reply, with no field at its default.
pub(crate) fn records() -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    cluster_records(&mut all);
    identity_records(&mut all);
    pairing_records(&mut all);
    node_records(&mut all);
    dispatch_records(&mut all);
    bookkeeping_records(&mut all);
    ca_records(&mut all);
    replies(&mut all);
    all
}

#[allow(clippy::too_many_lines)] // one list
fn cluster_records(all: &mut BTreeMap<String, Vec<u8>>) {
    let born = cluster::Cluster {
        cluster_id: id(1),
        trust_domain: text("palyra.test.internal"),
        root_cert_der: Bytes::from_static(b"root"),
        root_key_sealed: Bytes::from_static(b"sealed"),
        created_at: 1,
        feature_level: 2,
        next_replica_id: 3,
    };
    add(all, "record.cluster", &born);
    let replica = cluster::Replica {
        id: 1,
        name: text("r1"),
        status: cluster::ReplicaStatus::Voter as i32,
        addresses: cluster::Addresses {
            peer: text("a:1"),
            node: text("a:2"),
            enrol: text("a:3"),
            http: text("a:4"),
            metrics: text("a:5"),
            quic: String::new(),
        },
        authority_cert_der: Bytes::from_static(b"authority"),
        certificate: fingerprint("r1"),
        joined_at: 2,
        removed_at: 3,
        feature_level: 0,
        max_staleness_ms: 0,
        certificate_not_after: 0,
    };
    add(all, "record.replica", &replica);
    let on_quic = cluster::Replica {
        addresses: cluster::Addresses {
            quic: text("a:6"),
            ..replica.addresses.clone()
        },
        ..replica.clone()
    };
    add(all, "record.replica.with_quic", &on_quic);
    let replica = cluster::Replica {
        feature_level: 2,
        ..replica
    };
    add(all, "record.replica.with_level", &replica);
    let replica = cluster::Replica {
        max_staleness_ms: 5,
        ..replica
    };
    add(all, "record.replica.with_staleness", &replica);
    let replica = cluster::Replica {
        certificate_not_after: 6,
        ..replica
    };
    add(all, "record.replica.with_certificate", &replica);
    let token = cluster::JoinToken {
        id: id(2),
        secret_key_sealed: Bytes::from_static(b"sealed"),
        name: text("r2"),
        expires_at: 4,
        used_by: 2,
        issued_by: text("operator/root"),
        created_at: 5,
    };
    add(all, "record.join_token", &token);
    let operator = access::Operator {
        name: text("alice"),
        role: access::Role::Admin as i32,
        status: access::OperatorStatus::Removed as i32,
        created_at: 1,
        created_by: text("operator/root"),
        removed_at: 2,
    };
    add(all, "record.operator", &operator);
}

fn identity_records(all: &mut BTreeMap<String, Vec<u8>>) {
    let device = identity::Device {
        id: id(3),
        status: identity::DeviceStatus::Revoked as i32,
        name: text("press"),
        paired_at: 1,
        paired_by: text("operator/root"),
        revoked_at: 2,
        revoked_by: text("operator/root"),
        reason: text("lost"),
        spki: key("n1"),
        revoked_index: 3,
        ..identity::Device::default()
    };
    add(all, "record.device", &device);
    let certificate = identity::Certificate {
        fingerprint: fingerprint("n1"),
        serial: Bytes::from_static(&[1, 2]),
        kind: identity::CertificateKind::Operator as i32,
        subject: text("alice"),
        der: Bytes::from_static(b"der"),
        not_before: 1,
        not_after: 2,
        authority: 3,
        status: identity::CertificateStatus::Superseded as i32,
        issued_at: 4,
        pairing_id: Some(id(4)),
        spki: key("n1"),
        ..identity::Certificate::default()
    };
    add(all, "record.certificate", &certificate);
    let by_second = identity::Certificate {
        authority_number: 2,
        ..certificate.clone()
    };
    add(all, "record.certificate.of_authority_2", &by_second);
    let ban = identity::Ban {
        id: id(3),
        name: text("press"),
        reason: text("lost"),
        revoked_at: 1,
        revoked_by: text("operator/root"),
        revoked_index: 2,
        removed_at: 3,
        removed_by: text("operator/alice"),
        keys: vec![key("n1"), key("n2")],
        expires_at: 4,
    };
    add(all, "record.ban", &ban);
    lives::records(all, &device, &certificate);
    add(all, "record.key_owner", &identity::KeyOwner { device_id: id(3) });
}

fn pairing_records(all: &mut BTreeMap<String, Vec<u8>>) {
    let attempt = pairing::Attempt {
        id: id(5),
        at: 1,
        failed: true,
        device_id: id(3),
    };
    let code = pairing::Code {
        id: id(6),
        number: 7,
        method: pairing::Method::Ticket as i32,
        sealed: Bytes::from_static(b"sealed"),
        created_at: 1,
        expires_at: 2,
        issued_by: text("operator/root"),
        attempts: vec![attempt],
        status: pairing::CodeStatus::Burned as i32,
        device_name: text("press"),
        closed_at: 3,
        request_id: Some(id(7)),
    };
    add(all, "record.code", &code);
    let request = pairing::Request {
        id: id(7),
        code_id: id(6),
        device_id: id(3),
        device_name: text("press"),
        csr_der: Bytes::from_static(b"csr"),
        csr_spki: key("n1"),
        sas: text("123456"),
        source: text("192.0.2.7"),
        method: pairing::Method::Ticket as i32,
        served_by: 1,
        fetch_token_hash: Digest::of(b"token"),
        status: pairing::RequestStatus::Completed as i32,
        decided_by: text("operator/root"),
        decided_at: 1,
        reason: text("mine"),
        certificate: Some(fingerprint("n1")),
        created_at: 2,
        expires_at: 3,
    };
    add(all, "record.pairing_request", &request);
    add(
        all,
        "record.pairing_pending",
        &pairing::Pending { pairing_id: id(7) },
    );
    let totals = pairing::Totals {
        next_number: 1,
        codes: 2,
        requests: 3,
        pending: 4,
        failures: vec![attempt],
    };
    add(all, "record.pairing_totals", &totals);
}

#[allow(clippy::too_many_lines)] // one list
fn node_records(all: &mut BTreeMap<String, Vec<u8>>) {
    let node = nodes::Node {
        device_id: id(3),
        platform: text("linux/x86_64"),
        agent_version: text("0.1.0"),
        capabilities: vec![nodes::Capability {
            name: text("echo"),
            effect: nodes::Effect::Idempotent as i32,
            timeout_ms: 1,
            max_concurrency: 2,
            local_mediation: true,
            description: text("says it again"),
            ..nodes::Capability::default()
        }],
        labels: BTreeMap::from([(text("a"), text("1")), (text("b"), text("2"))]),
        registered_at: 1,
        generation: 2,
        session: Some(nodes::Session {
            epoch: 3,
            replica_id: 1,
            attached_at: 4,
            transport: text("stream"),
            fallback: String::new(),
        }),
        status: nodes::NodeStatus::Online as i32,
        status_since: 5,
        status_reason: text("attached"),
        last_epoch: 3,
        ..nodes::Node::default()
    };
    add(all, "record.node", &node);
    let lost = nodes::Node {
        session: None,
        status: nodes::NodeStatus::Suspect as i32,
        lost_after: 6,
        conditions: vec![nodes::Condition {
            kind: nodes::ConditionKind::Connected as i32,
            truth: nodes::Truth::False as i32,
            reason: text("silent"),
            message: text("for 7 s"),
            since: 7,
        }],
        last_seen_at: 8,
        due_at: 9,
        ..node.clone()
    };
    add(all, "record.node.suspect", &lost);
    add(all, "record.session_count", &nodes::SessionCount { sessions: 1 });
    let mut limited = node.clone();
    [limited.max_concurrency, limited.queue_limit] = [4, 5];
    limited.capabilities[0] = nodes::Capability {
        queue_limit: 6,
        max_attempts: 7,
        backoff_ms: 8,
        retry_on: vec![text("timeout")],
        ..limited.capabilities[0].clone()
    };
    add(all, "record.node.with_limits", &limited);
    let fallen_back = nodes::Node {
        session: node.session.clone().map(|session| nodes::Session {
            fallback: text("UDP is blocked"),
            ..session
        }),
        ..node.clone()
    };
    add(all, "record.node.fallen_back", &fallen_back);
    add(
        all,
        "record.node_totals",
        &nodes::Totals {
            nodes: 1,
            online: 2,
            devices: 3,
            ..nodes::Totals::default()
        },
    );
    let totals = nodes::Totals {
        suspect: 4,
        gone: 5,
        ..nodes::Totals::default()
    };
    add(all, "record.node_totals.suspect", &totals);
    let totals = nodes::Totals {
        bans: 6,
        ..nodes::Totals::default()
    };
    add(all, "record.node_totals.bans", &totals);
}

fn dispatch_records(all: &mut BTreeMap<String, Vec<u8>>) {
    let dispatch = dispatch::Dispatch {
        id: id(8),
        device_id: id(3),
        capability: text("echo"),
        effect: nodes::Effect::Idempotent as i32,
        state: dispatch::State::SessionLost as i32,
        epoch: 1,
        replica_id: 2,
        attempt: 3,
        submitted_at: 4,
        deadline_at: 5,
        submitted_by: text("operator/root"),
        ended_at: 6,
        error: Some(dispatch::Failure {
            code: text("exit_status"),
            message: text("exit 1"),
        }),
        reason: text("revoked"),
        payload_size: 7,
        result_size: 8,
        ..dispatch::Dispatch::default()
    };
    add(all, "record.dispatch", &dispatch);
    add(
        all,
        "record.dispatch.with_story",
        &super::later::with_story(dispatch),
    );
    let totals = dispatch::Totals {
        open: 1,
        open_bytes: 2,
        finished: 3,
        finished_bytes: 4,
        finished_oldest: 0,
    };
    add(all, "record.dispatch_totals", &totals);
    let totals = dispatch::Totals {
        finished_oldest: 5,
        ..totals
    };
    add(all, "record.dispatch_totals.with_oldest", &totals);
    add(
        all,
        "record.queue_length",
        &dispatch::QueueLength { open: 1, bound: 0 },
    );
    let length = dispatch::QueueLength { open: 2, bound: 1 };
    add(all, "record.queue_length.with_bound", &length);
    add(all, "record.load", &dispatch::Load { bound: 1, waiting: 2 });
    add(
        all,
        "record.blob",
        &tables::Blob {
            bytes: Bytes::from_static(b"bytes"),
        },
    );
    add(all, "record.present", &tables::Present {});
}

fn ca_records(all: &mut BTreeMap<String, Vec<u8>>) {
    let state = ca::Ca {
        generation: 1,
        step: 2,
        phase: ca::Phase::Issue as i32,
        issuing: 3,
        other: 4,
        next_root: 5,
        phase_since: 6,
        begun_by: text("operator/root"),
        devices: 7,
        devices_acked: 8,
    };
    add(all, "record.ca", &state);
    let root = ca::Root {
        number: 1,
        der: Bytes::from_static(b"root"),
        key_sealed: Bytes::from_static(b"sealed"),
        added_at: 2,
        added_by: text("operator/root"),
        retired_at: 3,
        revoked_index: 4,
    };
    add(all, "record.root", &root);
    let authority = ca::Authority {
        replica_id: 1,
        number: 2,
        status: ca::AuthorityStatus::Retiring as i32,
        certificates: vec![ca::AuthorityCertificate {
            root: 3,
            der: Bytes::from_static(b"authority"),
        }],
        created_at: 4,
        since: 5,
        last_not_after: 6,
        rotation_asked_at: 7,
        issued: 8,
        revoked_index: 9,
    };
    add(all, "record.authority", &authority);
    add(all, "record.ack", &ca::Ack { number: 1, at: 2 });
    let crl = ca::Crl {
        replica_id: 1,
        number: 2,
        der: Bytes::from_static(b"list"),
        crl_number: 3,
        this_update: 4,
        next_update: 5,
        entries: 6,
        left_out: 7,
    };
    add(all, "record.crl", &crl);
    let revoked = ca::RevokedCertificate {
        serial: Bytes::from_static(&[1, 2]),
        revoked_at: 1,
        not_after: 2,
        fingerprint: fingerprint("n1"),
        subject: text("alice"),
    };
    add(all, "record.revoked_certificate", &revoked);
}

fn bookkeeping_records(all: &mut BTreeMap<String, Vec<u8>>) {
    let meta = Meta {
        clock: 1,
        index: 2,
        term: 3,
        state_hash: Digest::of(b"state"),
        journal_rows: 4,
        journal_first: Cursor { index: 5, ordinal: 6 },
        journal_last: Cursor { index: 7, ordinal: 8 },
        journal_head: Digest::of(b"head"),
        requests_seen: 9,
        journal_trimmed: Cursor {
            index: 10,
            ordinal: 11,
        },
        journal_trimmed_hash: Digest::of(b"trimmed"),
        requests_oldest: 0,
    };
    add(all, "record.meta", &meta);
    let meta = Meta {
        requests_oldest: 12,
        ..meta
    };
    add(all, "record.meta.with_oldest", &meta);
    let row = Row {
        index: 1,
        ordinal: 2,
        at_ms: 3,
        actor: text("operator/root"),
        action: text("pairing.approved"),
        subject: text("subject"),
        request_id: id(9),
        detail: BTreeMap::from([(text("a"), text("1")), (text("b"), text("2"))]),
        prev_hash: Digest::of(b"prev"),
        hash: Digest::of(b"hash"),
    };
    add(all, "record.journal_row", &row);
    add(
        all,
        "record.requester",
        &Requester {
            remembered: 1,
            floor: id(10),
        },
    );
    let reject = Reject::new(Code::CodeUsed, [&"C7"]);
    assert_eq!(reject.class(), Class::Conflict);
    let refused = Seen {
        command: text("pairing.prove"),
        index: 1,
        answer: Some(Answer::Reject(reject)),
        age: 0,
    };
    add(all, "record.seen_refused", &refused);
    let refused = Seen { age: 2, ..refused };
    add(all, "record.seen_refused.with_age", &refused);
}
