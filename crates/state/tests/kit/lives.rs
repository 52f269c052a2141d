//! Random histories of certificates: renewals, copies, recoveries, rotations.

use bytes::Bytes;
use palyra_state::{Actor, Command, Id, cluster, identity};

use super::Step;
use crate::kit::{World, certificate, operator, replica};

/// The next renewal of a device; now and then that of a copy, which is behind.
pub(super) fn renewal(
    world: &World,
    device_id: Id,
    certificate: identity::NewCertificate,
    chance: u8,
) -> identity::RenewCertificate {
    let counter = identity::device(&world.state, device_id).map_or(0, |device| device.counter);
    identity::RenewCertificate {
        device_id,
        certificate,
        counter: counter + u64::from(!chance.is_multiple_of(4)),
        source: format!("192.0.2.{}", chance % 3),
    }
}

/// What operators ask of certificates, and devices that come back.
pub(super) fn command(world: &mut World, step: &Step) -> (Actor, Command) {
    // Where there is a suspicion, something can be done about it.
    let suspected = |world: &mut World, name: &String| {
        let id = world.id(name);
        identity::device(&world.state, id).is_some_and(|device| device.suspicion.is_some())
    };
    let name = (0..5)
        .map(|at| format!("n{}", (step.two + at) % 5))
        .find(|name| step.one > 1 && suspected(world, name))
        .unwrap_or_else(|| format!("n{}", step.two));
    let device_id = world.id(&name);
    let root = operator("root");
    let device = identity::device(&world.state, device_id).unwrap_or_default();
    match step.actor % 8 {
        _ if step.one > 1 && device.suspicion.is_some() => {
            let clear = identity::ClearClone {
                device_id,
                reason: "one machine".to_owned(),
            };
            (root, clear.into())
        }
        0 | 1 => {
            let rotate = identity::RotateDevice {
                device_id,
                reason: "spring".to_owned(),
                deadline_ms: u64::from(step.one) * 1_000,
            };
            (root, rotate.into())
        }
        3 => {
            let recovery_ms = u64::from(step.one) * 80_000_000;
            (root, identity::SetPolicy { recovery_ms }.into())
        }
        4 => (
            shown_operator(world, "op1"),
            identity::ConfirmCertificate {}.into(),
        ),
        5 => {
            let announce = cluster::AnnounceCertificate {
                replica_id: 1,
                certificate: crate::kit::fingerprint(&format!("r1 {}", world.index)),
                not_after: world.at + 3_000_000,
            };
            (replica(1), announce.into())
        }
        _ => {
            let Actor::Node { fingerprint, .. } = shown(world, &name) else {
                unreachable!("it is one");
            };
            let recover = identity::RecoverDevice {
                device_id,
                certificate: identity::NewCertificate {
                    der: Bytes::from(format!("certificate {}", world.index)),
                    not_after: world.at + 3_000_000,
                    ..certificate(&format!("key {name} {}", step.one))
                },
                counter: device.counter + u64::from(step.one != 0),
                source: format!("192.0.2.{}", step.one),
                shown: fingerprint,
            };
            (replica(1), recover.into())
        }
    }
}

/// An operator with the newest certificate that it has.
pub(super) fn shown_operator(world: &World, name: &str) -> Actor {
    let newest = identity::certificates_of(&world.state, identity::CertificateKind::Operator, name).pop();
    match newest {
        Some(found) => Actor::Operator {
            name: name.to_owned(),
            fingerprint: found.fingerprint,
        },
        None => operator(name),
    }
}

/// A node with the newest certificate that it has.
pub(super) fn shown(world: &mut World, name: &str) -> Actor {
    let device_id = world.id(name);
    let newest = identity::certificates_of(
        &world.state,
        identity::CertificateKind::Node,
        &device_id.to_string(),
    )
    .pop();
    let fingerprint = newest.map_or_else(|| crate::kit::fingerprint(name), |found| found.fingerprint);
    Actor::Node {
        device_id,
        fingerprint,
    }
}
