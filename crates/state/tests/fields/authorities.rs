//! Fields of the commands about authorities.

use palyra_state::{ca, limits};

use crate::kit::{commands, operator};
use crate::{Field, by_replica, bytes, root, text};

pub(crate) const CA: &[Field] = &[
    ("a root", limits::CERTIFICATE_MAX, "E0906", |_, size| {
        root(ca::BeginRoot {
            der: bytes(size),
            ..commands::begin_root("2")
        })
    }),
    ("a root's key", limits::SEALED_MAX, "E0906", |_, size| {
        root(ca::BeginRoot {
            key_sealed: bytes(size),
            ..commands::begin_root("2")
        })
    }),
    ("why a root comes", limits::REASON_MAX, "E0906", |_, size| {
        root(ca::BeginRoot {
            reason: text(size),
            ..commands::begin_root("2")
        })
    }),
    ("why a root goes", limits::REASON_MAX, "E0906", |stage, size| {
        stage.world.accept(operator("root"), commands::begin_root("2"));
        root(ca::RevertRoot {
            from: ca::Phase::Distribute as i32,
            reason: text(size),
        })
    }),
    (
        "a rotated authority",
        limits::CERTIFICATE_MAX,
        "E0906",
        |_, size| {
            by_replica(ca::RotateAuthority {
                der: bytes(size),
                ..commands::rotate_authority(1, 2, 1)
            })
        },
    ),
    (
        "a certified authority",
        limits::CERTIFICATE_MAX,
        "E0906",
        |stage, size| {
            stage.world.accept(operator("root"), commands::begin_root("2"));
            by_replica(ca::CertifyAuthority {
                der: bytes(size),
                ..commands::certify(1, 1, 2)
            })
        },
    ),
    ("why an authority goes", limits::REASON_MAX, "E0906", |_, size| {
        root(ca::AskRotation {
            replica_id: 1,
            reason: text(size),
        })
    }),
    ("an acknowledgement", limits::ACK_BATCH, "E0907", |stage, size| {
        let device = stage.world.id("n1");
        by_replica(ca::Acknowledge {
            generation: 1,
            devices: vec![device; size],
            operators: Vec::new(),
        })
    }),
    (
        "a list of revoked ones",
        limits::CRL_MAX,
        "E0906",
        |stage, size| {
            let mut publish = commands::crl(1, 1, 1, stage.world.at);
            publish.crl.der = bytes(size);
            by_replica(publish)
        },
    ),
];
