//! What is left of removed devices is bounded, is never pushed out, and goes when it is of no use any more.
#![allow(clippy::unwrap_used)]

mod kit;

use std::collections::BTreeMap;

use kit::{World, certificate, operator};
use palyra_state::identity::{self, NewCertificate};
use palyra_state::{Actor, limits, nodes, tables};
use prost::Message;

#[test]
fn removed_devices_are_bounded_and_none_is_pushed_out() {
    let mut world = World::born();
    world.pair("n1");
    world.pair("n2");
    let remove = |world: &mut World, device: &str| identity::RemoveDevice {
        device_id: world.id(device),
        reason: String::new(),
        revoke: true,
    };
    let first = remove(&mut world, "n1");
    world.accept(operator("root"), first.clone());
    // Pretend that the table is full.
    world.checked = false;
    let sums = nodes::Totals {
        bans: limits::BANS,
        ..nodes::totals(&world.state)
    };
    let full = BTreeMap::from([(tables::NODE_TOTALS.key(()), Some(sums.encode_to_vec().into()))]);
    world.state.absorb(&full);
    let second = remove(&mut world, "n2");
    world.refuse("E0321", operator("root"), second);
    world.accept(operator("root"), first);
    assert!(
        identity::device(&world.state, world.names["n2"]).is_some_and(|device| device.revoked_at == 0),
        "what is not removed is not revoked either"
    );
}

#[test]
fn certificates_of_removed_devices_are_forgotten_once_they_have_expired() {
    let mut world = World::born();
    for name in ["n1", "n2", "n3", "n4", "n5", "n6"] {
        world.pair(name);
    }
    let remove = |world: &mut World, device: &str| {
        let device_id = world.id(device);
        let command = identity::RemoveDevice {
            device_id,
            reason: String::new(),
            revoke: true,
        };
        world.accept(operator("root"), command);
        device_id
    };
    let removed: Vec<_> = ["n1", "n2", "n3", "n4", "n5"]
        .map(|name| remove(&mut world, name))
        .into();
    let renew = identity::RenewOperatorCertificate {
        name: "root".to_owned(),
        certificate: NewCertificate {
            not_after: u64::MAX,
            ..certificate("root2")
        },
    };
    world.accept(operator("root"), renew);
    let held = |world: &World| {
        let of = |id: &palyra_state::Id| {
            identity::certificates_of(&world.state, identity::CertificateKind::Node, &id.to_string()).len()
        };
        removed.iter().map(of).sum::<usize>()
    };
    assert_eq!(held(&world), 5, "foreign consumers must still be told of them");
    let ends = removed.iter().filter_map(|id| identity::ban(&world.state, *id));
    let last = ends.map(|ban| ban.expires_at).max().unwrap();
    world.advance(last - world.at);
    let root = Actor::Operator {
        name: "root".to_owned(),
        fingerprint: kit::fingerprint("root2"),
    };
    let device_id = world.id("n6");
    let command = identity::RemoveDevice {
        device_id,
        reason: String::new(),
        revoke: true,
    };
    world.accept(root, command);
    assert_eq!(held(&world), 5 - limits::BANS_SWEPT);
}
