//! Wire forms of what runs are made of: files, scope, limits.

use palyra_control::Error;
use palyra_proto::run::v1 as wire;
use palyra_state::Digest;
use palyra_state::leases::{Limits, Manifest, ManifestEntry, Scope};

/// A list of files, from the wire.
pub(crate) fn manifest(manifest: wire::Manifest) -> Result<Manifest, Error> {
    let entries: Result<Vec<ManifestEntry>, Error> = manifest
        .entries
        .into_iter()
        .map(|entry| {
            let digest = Digest::from_slice(&entry.digest).ok_or_else(|| {
                let cause = format!("a digest of {} bytes", entry.digest.len());
                Error::invalid(
                    "manifest.digest",
                    cause,
                    "send the SHA-256 of each file: 32 bytes",
                )
            })?;
            Ok(ManifestEntry {
                path: entry.path,
                digest,
                size: entry.size,
                stored: entry.stored,
                executable: entry.executable,
            })
        })
        .collect();
    Ok(Manifest { entries: entries? })
}

/// A list of files, to the wire.
pub(crate) fn manifest_wire(manifest: Manifest) -> wire::Manifest {
    let entries = manifest.entries.into_iter().map(|entry| wire::ManifestEntry {
        path: entry.path,
        digest: entry.digest.to_bytes().to_vec().into(),
        size: entry.size,
        stored: entry.stored,
        executable: entry.executable,
    });
    wire::Manifest {
        entries: entries.collect(),
    }
}

/// A scope, to the wire.
pub(crate) fn scope(scope: Scope) -> wire::WorkspaceScope {
    wire::WorkspaceScope {
        root: scope.root,
        allowed: scope.allowed,
        read_only: scope.read_only,
    }
}

/// Limits, to the wire.
pub(crate) fn limits(limits: Limits) -> wire::Limits {
    wire::Limits {
        memory_bytes: limits.memory_bytes,
        processes: limits.processes,
        disk_bytes: limits.disk_bytes,
        cpu_percent: limits.cpu_percent,
        open_files: limits.open_files,
        network: limits.network,
    }
}
