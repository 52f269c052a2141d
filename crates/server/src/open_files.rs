//! How many files this process may have open, and whether that suits its limits: each connection is one.
//!
//! Invariant: nothing here fails; a replica with too few serves as many nodes as it can, and says so at its start.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::LimitsSection;

/// Files beside connections: the database, its logs, listeners, other replicas.
const OTHERS: u64 = 1_024;

/// Raises the limit as far as it goes without privileges, and warns when that is less than the connections need.
pub(crate) fn provide(limits: &LimitsSection) {
    let (soft, hard) = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok(limit) => limit,
        Err(error) => return tracing::warn!(%error, "the limit of open files cannot be read"),
    };
    let has = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(error) => {
            tracing::warn!(%error, soft, hard, "the limit of open files cannot be raised");
            soft
        }
    };
    if let Some(warning) = shortage(limits, has) {
        tracing::warn!("{warning}");
    }
}

/// What to say when `has` open files are too few.
fn shortage(limits: &LimitsSection, has: u64) -> Option<String> {
    let connections = limits.connections.get().max(limits.sessions.get());
    let needs = connections.saturating_add(OTHERS);
    (has < needs).then(|| {
        format!(
            "this process may have {has} files open, and limits.connections and limits.sessions want {needs}: beyond \
             that nodes are not accepted; raise LimitNOFILE= of the unit (or ulimit -n), or lower the limits"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_names_both_numbers() {
        let limits = LimitsSection::default();
        let said = shortage(&limits, 1_024).unwrap();
        assert!(
            said.contains(" 1024 files") && said.contains("LimitNOFILE"),
            "{said}"
        );
        assert_eq!(shortage(&limits, 1 << 20), None);
    }
}
