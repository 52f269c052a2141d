//! Fields of the commands of the cluster.

use palyra_state::{cluster, limits};

use crate::kit::{commands, operator, replica};
use crate::{Field, by_replica, bytes, root, text};

pub(crate) const CLUSTER: &[Field] = &[
    ("a token's secret", limits::SEALED_MAX, "E0906", |stage, size| {
        root(cluster::MintJoinToken {
            secret_key_sealed: bytes(size),
            ..commands::mint_token(&mut stage.world, "t", "r2")
        })
    }),
    (
        "a replica's name",
        limits::SHORT_NAME_MAX,
        "E0906",
        |stage, size| root(commands::mint_token(&mut stage.world, "t", &text(size))),
    ),
    (
        "a token's life",
        limits::JOIN_TOKEN_TTL_MAX as usize,
        "E0411",
        |stage, size| {
            root(cluster::MintJoinToken {
                ttl_ms: size as u64,
                ..commands::mint_token(&mut stage.world, "t", "r2")
            })
        },
    ),
    ("an address", limits::REASON_MAX, "E0906", |_, size| {
        let mut addresses = commands::addresses("r1");
        addresses.metrics = text(size);
        by_replica(cluster::UpdateReplicaAddresses {
            replica_id: 1,
            addresses,
            feature_level: 0,
            max_staleness_ms: 0,
        })
    }),
    ("an authority", limits::CERTIFICATE_MAX, "E0906", |stage, size| {
        let mint = commands::mint_token(&mut stage.world, "t", "r2");
        stage.world.accept(operator("root"), mint);
        let allocate = commands::allocate(&mut stage.world, "t", "r2");
        stage.world.accept(replica(1), allocate);
        by_replica(cluster::AdmitReplica {
            authority_cert_der: bytes(size),
            ..commands::admit(2, "r2")
        })
    }),
];
