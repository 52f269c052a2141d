//! Holds the layering of docs/ARCHITECTURE.md: who may depend on whom, who owns which library, under which licences.
//!
//! It reads `cargo metadata` and nothing else, so that an edge between crates cannot appear unnoticed.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

/// Our crates, and the crates of ours that each may depend on, not counting dev-dependencies.
const LAYERS: &[(&str, &[&str])] = &[
    ("palyra-fault", &[]),
    ("palyra-proto", &[]),
    ("palyra-state", &["palyra-fault"]),
    ("palyra-pki", &[]),
    ("palyra-platform", &["palyra-fault"]),
    ("palyra-storage", &["palyra-fault", "palyra-platform"]),
    ("palyra-quic", &["palyra-proto"]),
    (
        "palyra-replica",
        &[
            "palyra-fault",
            "palyra-state",
            "palyra-storage",
            "palyra-platform",
            "palyra-proto",
            "palyra-pki",
        ],
    ),
    (
        "palyra-control",
        &[
            "palyra-fault",
            "palyra-state",
            "palyra-replica",
            "palyra-platform",
            "palyra-pki",
        ],
    ),
    (
        "palyra-server",
        &[
            "palyra-fault",
            "palyra-control",
            "palyra-state",
            "palyra-proto",
            "palyra-pki",
            "palyra-replica",
            "palyra-platform",
            "palyra-storage",
            "palyra-quic",
        ],
    ),
    ("palyra-client", &["palyra-proto", "palyra-pki", "palyra-quic"]),
    (
        "palyra-node",
        &["palyra-client", "palyra-state", "palyra-pki", "palyra-proto"],
    ),
    (
        "palyra-cli",
        &[
            "palyra-client",
            "palyra-node",
            "palyra-state",
            "palyra-pki",
            "palyra-proto",
        ],
    ),
    (
        "palyra-bench",
        &["palyra-client", "palyra-state", "palyra-pki", "palyra-proto"],
    ),
];

/// Members outside of the product: they may depend on anything, and nothing of the product may depend on them.
const OUTSIDE: &[&str] = &[
    "palyra-tests",
    "palyra-jepsen",
    "palyra-jepsen-check",
    "palyra-jepsen-faultfs",
    "palyra-jepsen-sim",
    "palyra-jepsen-skew",
    "palyra-jepsen-switch",
];

/// Members that know nothing of ours: a checker that shared code with what it judges would share its mistakes.
const STRANGERS: &[&str] = &[
    "palyra-jepsen-check",
    "palyra-jepsen-faultfs",
    "palyra-jepsen-skew",
    "palyra-jepsen-switch",
];

/// Libraries that one crate owns: only the crates named may depend on them, also for tests.
const OWNERS: &[(&str, &[&str])] = &[
    ("rocksdb", &["palyra-storage"]),
    ("openraft", &["palyra-replica", "palyra-jepsen-sim"]),
    ("bincode", &["palyra-replica"]),
    // The bench's are etcd's certificates, which are none of ours.
    ("rcgen", &["palyra-pki", "palyra-bench"]),
    ("etcd-client", &["palyra-bench"]),
    ("opaque-ke", &["palyra-pki"]),
    ("axum", &["palyra-server"]),
    ("quinn", &["palyra-quic", "palyra-server", "palyra-client"]),
];

/// What the pure crates must never see, directly.
const BANNED: &[(&str, &[&str])] = &[
    (
        "palyra-state",
        &[
            "tokio",
            "tonic",
            "rand",
            "getrandom",
            "tracing",
            "rocksdb",
            "futures",
        ],
    ),
    ("palyra-pki", &["tokio", "tonic", "tracing"]),
    ("palyra-platform", &["tonic", "rocksdb", "openraft"]),
    ("palyra-control", &["tonic", "quinn", "axum", "hyper", "rocksdb"]),
];

/// Licences that agree with Apache-2.0 in a binary, as SPDX terms; any one side of an `OR` is enough.
const LICENCES: &[&str] = &[
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT",
    "MIT-0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "OpenSSL",
    "Unlicense",
    "BSL-1.0",
    "0BSD",
];

fn metadata() -> Metadata {
    MetadataCommand::new().exec().unwrap()
}

fn members(metadata: &Metadata) -> BTreeMap<String, &Package> {
    metadata
        .workspace_packages()
        .into_iter()
        .map(|package| (package.name.to_string(), package))
        .collect()
}

#[test]
fn every_member_stands_in_the_table() {
    let metadata = metadata();
    let known: BTreeSet<String> = LAYERS
        .iter()
        .map(|(name, _)| *name)
        .chain(OUTSIDE.iter().copied())
        .map(String::from)
        .collect();
    let found: BTreeSet<String> = members(&metadata).into_keys().collect();
    assert_eq!(
        known, found,
        "a member is missing from the table of layers, or the table names one too many"
    );
}

#[test]
fn dependencies_follow_the_layers() {
    let metadata = metadata();
    let members = members(&metadata);
    for (name, allowed) in LAYERS {
        for dependency in &members[*name].dependencies {
            let ours = dependency.name.starts_with("palyra-");
            if !ours || dependency.kind == DependencyKind::Development {
                continue;
            }
            assert!(
                allowed.contains(&dependency.name.as_str()),
                "{name} must not depend on {}: see the table of layers in docs/ARCHITECTURE.md",
                dependency.name
            );
        }
    }
    for (name, package) in &members {
        for dependency in &package.dependencies {
            let outside = OUTSIDE.contains(&dependency.name.as_str());
            assert!(
                !outside || OUTSIDE.contains(&name.as_str()),
                "{name} depends on {}, on which nothing of the product may depend",
                dependency.name
            );
            let ours = dependency.name.starts_with("palyra-");
            assert!(
                !ours || !STRANGERS.contains(&name.as_str()),
                "{name} must know nothing of ours, and depends on {}",
                dependency.name
            );
        }
    }
}

#[test]
fn libraries_stay_with_their_owners() {
    let metadata = metadata();
    for (name, package) in &members(&metadata) {
        for dependency in &package.dependencies {
            for (library, owners) in OWNERS {
                let foreign = dependency.name == *library && !owners.contains(&name.as_str());
                assert!(!foreign, "{name} names {library}, which belongs to {owners:?}");
            }
            for (pure, banned) in BANNED {
                let seen = name == pure
                    && banned.contains(&dependency.name.as_str())
                    && dependency.kind != DependencyKind::Development;
                assert!(!seen, "{pure} must not depend on {}", dependency.name);
            }
        }
    }
}

#[test]
fn pre_releases_and_frozen_formats_are_pinned_exactly() {
    let metadata = metadata();
    for (name, package) in &members(&metadata) {
        for dependency in &package.dependencies {
            if ["openraft", "bincode", "rocksdb", "gungraun"].contains(&dependency.name.as_str()) {
                let exact = dependency.req.to_string().starts_with('=');
                assert!(
                    exact,
                    "{name} must pin {} exactly, not {}",
                    dependency.name, dependency.req
                );
            }
        }
    }
}

/// Whether one side of every `OR` in an SPDX expression (no nesting beyond parentheses around `OR`) is allowed. Some
/// authors write it as `/` or in lower case.
fn licence_allowed(expression: &str) -> bool {
    let flat = expression.replace('/', " OR ").replace(" or ", " OR ");
    flat.split(" AND ").all(|part| {
        part.trim_matches(|c| "() ".contains(c))
            .split(" OR ")
            .any(|term| LICENCES.contains(&term.trim_matches(|c| "() ".contains(c))))
    })
}

#[test]
fn licences_agree_with_ours() {
    assert!(licence_allowed("MIT OR GPL-3.0") && licence_allowed("MIT or GPL-3.0"));
    assert!(licence_allowed("ISC AND (Apache-2.0 OR ISC)"));
    assert!(!licence_allowed("MIT AND GPL-3.0"));
    for package in metadata().packages {
        let licence = package.license.clone().unwrap_or_default();
        assert!(
            licence_allowed(&licence),
            "{} has the licence \"{licence}\"",
            package.name
        );
    }
}
