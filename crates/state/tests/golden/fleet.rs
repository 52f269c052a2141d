//! Golden samples of the fleet. A new field must be filled in here: the literals name every field.

use std::collections::BTreeMap;

use bytes::Bytes;
use palyra_state::fleet::{
    Attest, Attested, Challenge, ClaimedCapability, Cleanup, Drain, EgressBinding, Evidence, HardwareQuote,
    Hold, Lapse, Lifecycle, OpenChallenge, Policy, Quarantine, Reap, Recheck, Refusal, Release, Reverify,
    SetPolicy, Severity, Statement, Totals, TrustedCapability, TrustedKey, Violate, Worker,
};
use palyra_state::{
    Accepted, Actor, Answer, Code, Command, Digest, Envelope, Reject, Reply, Seen, decode, reply, tables,
};

use super::kit::fingerprint;
use super::records::{add, id, text};

fn digest(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

fn bytes(length: usize) -> Bytes {
    Bytes::from(vec![7; length])
}

fn hold(cause: &str) -> Hold {
    Hold {
        at: 1,
        by: text("operator/root"),
        cause: text(cause),
        reason: text("odd"),
        until: 2,
        lease_id: Some(id(9)),
        forced: true,
        over: true,
    }
}

fn policy() -> Policy {
    Policy {
        version: 1,
        set_at: 2,
        set_by: text("operator/root"),
        images: vec![digest("image")],
        builds: vec![digest("build")],
        artifacts: vec![digest("artifact")],
        supervisors: vec![digest("supervisor")],
        required_egress: text("egress-1"),
        egress_proxies: vec![TrustedKey {
            name: text("egress-1"),
            public_key: bytes(91),
        }],
        sdk_protocol_min: 3,
        sdk_protocol_max: 4,
        wit_abis: vec![text("0.2.0")],
        capabilities: vec![TrustedCapability {
            name: text("echo"),
            authorities: vec![text("ops")],
            min_evidence: Evidence::Supervisor as i32,
        }],
        max_lease_ttl: 5,
        heartbeat_timeout: 6,
        max_workers: 7,
        leases_per_worker: 8,
        hardware_providers: vec![TrustedKey {
            name: text("tp"),
            public_key: bytes(91),
        }],
        max_attestation_life: 9,
    }
}

/// The statement of `docs/protocol/attestation.md`.
pub(super) fn statement() -> Statement {
    Statement {
        cluster_id: bytes(16),
        worker_id: bytes(16),
        nonce: bytes(32),
        image: bytes(32),
        build: bytes(32),
        artifact: bytes(32),
        supervisor: bytes(32),
        evidence: Evidence::Hardware as u32,
        egress: Some(EgressBinding {
            proxy: text("egress-1"),
            worker_id: bytes(16),
            not_before: 1_000,
            expires_at: 300,
            signature: bytes(3),
        }),
        capabilities: vec![ClaimedCapability {
            name: text("echo"),
            authority: text("ops"),
        }],
        sdk_protocol: 2,
        wit_abi: text("0.2.0"),
        issued_at: 1_000,
        expires_at: 2_000,
        slots: 2,
        quote: Some(HardwareQuote {
            provider: text("tp"),
            nonce: bytes(32),
            digests: bytes(96),
            signature: bytes(3),
        }),
    }
}

pub(super) fn records(all: &mut BTreeMap<String, Vec<u8>>) {
    add(all, "record.worker_statement", &statement());
    add(all, "record.fleet_policy", &policy());
    let worker = Worker {
        id: id(1),
        lifecycle: Lifecycle::Failed as i32,
        lifecycle_since: 2,
        lifecycle_reason: text("cleanup"),
        lifecycle_actor: text("node/x"),
        registered_at: 3,
        attested: Some(Attested {
            statement: bytes(8),
            public_key: bytes(91),
            signature: bytes(70),
            evidence: Evidence::Supervisor as i32,
            accepted_at: 4,
            index: 5,
            policy_version: 6,
            expires_at: 7,
            slots: 8,
            tools: vec![text("echo")],
        }),
        challenge: Some(Challenge {
            nonce: digest("nonce"),
            expires_at: 9,
            epoch: 10,
        }),
        quarantine: Some(hold("digest_drift")),
        drain: Some(hold("operator")),
        failure: Some(hold("cleanup")),
        reconciled_epoch: 11,
        away_since: 12,
        unclean: vec![id(13)],
        slots_used: 14,
        last_fence: 15,
        reverify_at: 16,
        reverify_by: text("operator/root"),
        refusal: Some(Refusal {
            at: 17,
            reject: Some(Reject::new(Code::ImageNotAllowed, [&"w", &"i"])),
            severity: Severity::High as i32,
        }),
        due_at: 18,
        orphaned: true,
        cleanup_at: 19,
        barred: true,
        lost_at: 20,
        last_nonce: Some(digest("last")),
    };
    add(all, "record.worker", &worker);
    let totals = Totals {
        by_lifecycle: vec![1, 2, 3, 4, 5, 6, 7, 8, 9],
        slots: 10,
        slots_used: 11,
        admitted: 12,
    };
    add(all, "record.fleet_totals", &totals);
    replies(all);
}

/// Remembered answers.
fn replies(all: &mut BTreeMap<String, Vec<u8>>) {
    let attestation = reply::Attestation {
        refusal: Some(Reject::new(Code::ImageNotAllowed, [&"w", &"i"])),
        severity: Severity::High as i32,
        evidence: Evidence::Supervisor as i32,
        expires_at: 1,
        quarantined: true,
        now: 2,
    };
    let challenged = reply::Challenged {
        nonce: digest("nonce"),
        expires_at: 1,
        now: 2,
    };
    for (name, reply) in [
        ("policy_set", Reply::PolicySet(reply::PolicySet { version: 1 })),
        ("challenged", Reply::Challenged(challenged)),
        ("attestation", Reply::Attestation(attestation)),
    ] {
        let seen = Seen {
            command: text("command"),
            index: 1,
            answer: Some(Answer::Reply(Accepted { reply: Some(reply) })),
            age: 0,
        };
        add(all, &format!("reply.{name}"), &seen);
    }
}

/// One envelope for each command.
#[allow(clippy::too_many_lines)] // one list
pub(super) fn commands(samples: &mut BTreeMap<String, Vec<u8>>) {
    let (worker_id, reason) = (id(1), text("odd"));
    let asked: [Command; 6] = [
        SetPolicy {
            policy: policy(),
            expected_version: 1,
            reason: reason.clone(),
        }
        .into(),
        Quarantine {
            worker_id,
            reason: reason.clone(),
        }
        .into(),
        Reverify {
            worker_id,
            reason: reason.clone(),
        }
        .into(),
        Release {
            worker_id,
            reason: reason.clone(),
        }
        .into(),
        Drain {
            worker_id,
            reason: reason.clone(),
            deadline_ms: 2,
            force: true,
        }
        .into(),
        Cleanup {
            worker_id,
            reason,
            force: true,
        }
        .into(),
    ];
    let told: [Command; 6] = [
        OpenChallenge {
            worker_id,
            epoch: 2,
            nonce: digest("nonce"),
        }
        .into(),
        Attest {
            worker_id,
            epoch: 2,
            statement: bytes(8),
            public_key: bytes(91),
            signature: bytes(70),
        }
        .into(),
        Violate {
            worker_id,
            lease_id: id(2),
            fence: 3,
            kind: text("scope"),
            message: text("it read /etc/shadow"),
        }
        .into(),
        Lapse { ids: vec![worker_id] }.into(),
        Recheck { ids: vec![worker_id] }.into(),
        Reap { older_than_ms: 2 }.into(),
    ];
    let root = Actor::Operator {
        name: text("root"),
        fingerprint: fingerprint("root"),
    };
    for (at, command) in (700..).zip(asked.into_iter().chain(told)) {
        let envelope = Envelope::new(id(at), root.clone(), command);
        assert_eq!(decode(&envelope.encode()), Ok(envelope.clone()));
        samples.insert(format!("command.{}", envelope.command.name()), envelope.encode());
    }
}

/// The numbers of enums, and the layout of keys.
pub(super) fn shapes(samples: &mut BTreeMap<String, Vec<u8>>) {
    fn numbers<E: TryFrom<i32> + std::fmt::Debug>() -> Vec<u8> {
        let known = |number: i32| E::try_from(number).ok().map(|it| format!("{it:?}={number} "));
        (0..64).filter_map(known).collect::<String>().into_bytes()
    }
    let enums = [
        ("worker_lifecycle", numbers::<Lifecycle>()),
        ("worker_evidence", numbers::<Evidence>()),
        ("worker_severity", numbers::<Severity>()),
    ];
    samples.extend(enums.map(|(name, numbers)| (format!("enum.{name}"), numbers)));
    let place = (253u32, 2u32, (258u64, id(1)));
    let keys = [
        ("worker_due", tables::WORKERS_DUE.key((258u64, id(1)))),
        (
            "worker_by_lifecycle",
            tables::WORKERS_BY_LIFECYCLE.key((3u32, id(1))),
        ),
        ("worker_checked", tables::WORKERS_CHECKED.key((258u64, id(1)))),
        (
            "worker_ready",
            tables::WORKERS_READY.key((tables::Text("echo"), place)),
        ),
    ];
    samples.extend(keys.map(|(name, key)| (format!("key.{name}"), key)));
}
