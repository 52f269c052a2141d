//! Builders of commands, with names for ids and sensible fields.

use std::collections::BTreeMap;

use bytes::Bytes;
use palyra_state::cluster::{self, Addresses};
use palyra_state::nodes::{Capability, Effect};
use palyra_state::{Command, Digest, Id, access, ca, dispatch, identity, nodes, pairing};

use super::{World, certificate, key};

pub fn addresses(name: &str) -> Addresses {
    Addresses {
        peer: format!("{name}:7444"),
        node: format!("{name}:7441"),
        enrol: format!("{name}:7442"),
        http: String::new(),
        metrics: format!("{name}:7445"),
        quic: String::new(),
    }
}

pub fn genesis(world: &mut World) -> cluster::Genesis {
    // The certificates of genesis are the root's, for no replica exists before it.
    let by_root = |name: &str| identity::NewCertificate {
        authority: 0,
        ..certificate(name)
    };
    cluster::Genesis {
        cluster_id: world.id("cluster"),
        trust_domain: "palyra.test.internal".to_owned(),
        root_cert_der: Bytes::from_static(b"root"),
        root_key_sealed: Bytes::from_static(b"sealed"),
        replica_name: "r1".to_owned(),
        addresses: addresses("r1"),
        authority_cert_der: Bytes::from_static(b"authority of r1"),
        replica_certificate: by_root("r1"),
        operator_name: "root".to_owned(),
        operator_certificate: by_root("root"),
    }
}

pub fn begin_root(name: &str) -> ca::BeginRoot {
    ca::BeginRoot {
        der: Bytes::from(format!("root {name}")),
        key_sealed: Bytes::from(format!("sealed key of root {name}")),
        reason: String::new(),
    }
}

pub fn advance_root(from: ca::Phase) -> ca::AdvanceRoot {
    ca::AdvanceRoot {
        from: from as i32,
        force: false,
        reason: String::new(),
    }
}

pub fn certify(replica_id: u64, number: u32, root: u32) -> ca::CertifyAuthority {
    ca::CertifyAuthority {
        replica_id,
        number,
        root,
        der: Bytes::from(format!("authority {number} of {replica_id} by root {root}")),
    }
}

pub fn rotate_authority(replica_id: u64, number: u32, root: u32) -> ca::RotateAuthority {
    ca::RotateAuthority {
        replica_id,
        number,
        root,
        der: Bytes::from(format!("authority {number} of {replica_id} by root {root}")),
    }
}

pub fn crl(replica_id: u64, number: u32, crl_number: u64, now: u64) -> ca::PublishCrl {
    ca::PublishCrl {
        crl: ca::Crl {
            replica_id,
            number,
            der: Bytes::from(format!("list {crl_number} of {replica_id}/{number}")),
            crl_number,
            this_update: now,
            next_update: now + 86_400_000,
            entries: 1,
            left_out: 0,
        },
    }
}

pub fn mint_token(world: &mut World, token: &str, name: &str) -> cluster::MintJoinToken {
    cluster::MintJoinToken {
        token_id: world.id(token),
        secret_key_sealed: Bytes::from_static(b"sealed"),
        name: name.to_owned(),
        ttl_ms: 0,
    }
}

pub fn allocate(world: &mut World, token: &str, name: &str) -> cluster::AllocateReplica {
    cluster::AllocateReplica {
        token_id: world.id(token),
        name: name.to_owned(),
        addresses: addresses(name),
    }
}

pub fn admit(id: u64, name: &str) -> cluster::AdmitReplica {
    cluster::AdmitReplica {
        replica_id: id,
        authority_cert_der: Bytes::from(format!("authority of {name}")),
        certificate: certificate(name),
        root: 0,
    }
}

pub fn announce(replica_id: u64, shown: &identity::NewCertificate) -> cluster::AnnounceCertificate {
    cluster::AnnounceCertificate {
        replica_id,
        certificate: shown.fingerprint(),
        not_after: shown.not_after,
    }
}

pub fn add_operator(name: &str, role: access::Role) -> access::AddOperator {
    access::AddOperator {
        name: name.to_owned(),
        role: role as i32,
        certificate: certificate(name),
    }
}

pub fn mint(world: &mut World, code: &str, method: &str) -> pairing::MintCode {
    let method = if method == "pin" {
        pairing::Method::Pin
    } else {
        pairing::Method::Ticket
    };
    pairing::MintCode {
        code_id: world.id(code),
        method: method as i32,
        sealed: Bytes::from_static(b"sealed"),
        ttl_ms: 0,
        device_name: String::new(),
    }
}

pub fn begin(world: &mut World, attempt: &str, code: &str, device: &str) -> pairing::BeginAttempt {
    let code_id = world.id(code);
    let method = pairing::code(&world.state, code_id).map_or(0, |code| code.method);
    pairing::BeginAttempt {
        attempt_id: world.id(attempt),
        code_id: Some(code_id),
        code_number: 0,
        device_id: world.id(device),
        source: "192.0.2.7".to_owned(),
        method,
    }
}

pub fn fail(world: &mut World, attempt: &str, code: &str) -> pairing::FailAttempt {
    pairing::FailAttempt {
        attempt_id: world.id(attempt),
        code_id: world.id(code),
        source: "192.0.2.7".to_owned(),
    }
}

pub fn prove(
    world: &mut World,
    pairing: &str,
    code: &str,
    attempt: Option<&str>,
    device: &str,
) -> pairing::Prove {
    pairing::Prove {
        pairing_id: world.id(pairing),
        attempt_id: attempt.map(|name| world.id(name)),
        code_id: world.id(code),
        device_id: world.id(device),
        device_name: device.to_owned(),
        csr_der: Bytes::from(format!("csr of {device}")),
        csr_spki: key(device),
        sas: "123456".to_owned(),
        source: "192.0.2.7".to_owned(),
        served_by: 1,
        fetch_token_hash: Digest::of(pairing.as_bytes()),
    }
}

pub fn approve(world: &mut World, pairing: &str, device: &str) -> pairing::Approve {
    pairing::Approve {
        pairing_id: world.id(pairing),
        certificate: certificate(device),
        sas: String::new(),
        reason: String::new(),
    }
}

pub fn capability(name: &str, effect: Effect) -> Capability {
    Capability {
        name: name.to_owned(),
        effect: effect as i32,
        timeout_ms: 10_000,
        max_concurrency: 1,
        ..Capability::default()
    }
}

pub fn register(world: &mut World, device: &str) -> nodes::Register {
    nodes::Register {
        device_id: world.id(device),
        platform: "linux/x86_64".to_owned(),
        agent_version: "0.1.0".to_owned(),
        capabilities: vec![
            capability("echo", Effect::Idempotent),
            capability("pay", Effect::Once),
        ],
        labels: BTreeMap::from([("site".to_owned(), "lab".to_owned())]),
        ..nodes::Register::default()
    }
}

pub fn attach(world: &mut World, device: &str, replica_id: u64, held: &[&str]) -> nodes::Attach {
    nodes::Attach {
        device_id: world.id(device),
        replica_id,
        transport: "stream".to_owned(),
        held: held.iter().map(|name| world.id(name)).collect(),
        held_attempts: Vec::new(),
        fallback: String::new(),
    }
}

pub fn detach(world: &mut World, device: &str, epoch: u64) -> nodes::Detach {
    nodes::Detach {
        device_id: world.id(device),
        epoch,
        reason: "disconnected".to_owned(),
    }
}

pub fn submit(world: &mut World, dispatch: &str, device: &str, capability: &str) -> dispatch::Submit {
    dispatch::Submit {
        dispatch_id: world.id(dispatch),
        device_id: world.id(device),
        capability: capability.to_owned(),
        payload: Bytes::from_static(b"{}"),
        ..dispatch::Submit::default()
    }
}

pub fn complete(
    world: &mut World,
    dispatch: &str,
    epoch: u64,
    outcome: dispatch::Outcome,
) -> dispatch::Complete {
    let failed = outcome != dispatch::Outcome::Succeeded;
    dispatch::Complete {
        dispatch_id: world.id(dispatch),
        epoch,
        outcome: outcome as i32,
        result: Bytes::from_static(b"{\"ok\":true}"),
        error: failed.then(|| dispatch::Failure {
            code: "exit_status".to_owned(),
            message: "exit 1".to_owned(),
        }),
        ..dispatch::Complete::default()
    }
}

/// The same registration with other limits: slots of the node, of each capability, and places in their queues.
pub fn limited(mut register: nodes::Register, slots: [u32; 2], queues: [u32; 2]) -> nodes::Register {
    [register.max_concurrency, register.queue_limit] = [slots[0], queues[0]];
    for capability in &mut register.capabilities {
        [capability.max_concurrency, capability.queue_limit] = [slots[1], queues[1]];
    }
    register
}

pub fn revoke(world: &mut World, device: &str) -> identity::RevokeDevice {
    identity::RevokeDevice {
        device_id: world.id(device),
        reason: "lost".to_owned(),
    }
}

/// Removes a device that is revoked, or purges one that was removed, if there is any; otherwise names `other`.
pub fn end_of_some(world: &World, other: Id, remove: bool, chance: u8) -> Command {
    if remove {
        let revoked = |device: &identity::Device| device.revoked_index != 0;
        let found = identity::devices(&world.state, None, 100)
            .into_iter()
            .find(revoked);
        let remove = identity::RemoveDevice {
            device_id: found.map_or(other, |device| device.id),
            reason: "sold".to_owned(),
            // Rare as well: mostly of what is revoked.
            revoke: chance == 0,
        };
        return remove.into();
    }
    let banned = identity::bans(&world.state, None, 1).pop();
    let purge = identity::PurgeDevice {
        device_id: banned.map_or(other, |ban| ban.id),
        reason: String::new(),
        force: chance > 1,
    };
    purge.into()
}
