//! Where a worker stands: one word, made of the facts in its record, and the table of the changes that there
//! may be.
//!
//! What never lives here: who changes the facts (`rules`, `follow`) and who writes the word down (`store`).
//! Invariants: the word depends on nothing but the record, the time and the policy's version; each change
//! that comes about is in the table.

use super::{Hold, Worker};

/// Where a worker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Lifecycle {
    /// Known; it has not attested, or its statement has expired or is not checked against the present policy.
    Registered = 0,
    /// It may be given work, and has a free slot.
    Available = 1,
    /// It may be given work, and every slot is taken.
    Busy = 2,
    /// Its session is away, or it has not been reconciled, or it has not said that it is clean: nothing new
    /// is given to it.
    Degraded = 3,
    /// An operator wants it empty.
    Draining = 4,
    /// It is not trusted.
    Quarantined = 5,
    /// It was away too long while it held leases.
    Orphaned = 6,
    /// It was away too long, and held nothing; or its device is revoked.
    Offline = 7,
    /// A cleanup failed.
    Failed = 8,
}

impl Lifecycle {
    /// All of them, in the order of their numbers.
    pub const ALL: [Lifecycle; 9] = [
        Lifecycle::Registered,
        Lifecycle::Available,
        Lifecycle::Busy,
        Lifecycle::Degraded,
        Lifecycle::Draining,
        Lifecycle::Quarantined,
        Lifecycle::Orphaned,
        Lifecycle::Offline,
        Lifecycle::Failed,
    ];

    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Lifecycle::Registered => "registered",
            Lifecycle::Available => "available",
            Lifecycle::Busy => "busy",
            Lifecycle::Degraded => "degraded",
            Lifecycle::Draining => "draining",
            Lifecycle::Quarantined => "quarantined",
            Lifecycle::Orphaned => "orphaned",
            Lifecycle::Offline => "offline",
            Lifecycle::Failed => "failed",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Lifecycle> {
        Lifecycle::ALL.into_iter().find(|state| state.as_str() == text)
    }
}

/// Where a worker stands at `now`, under this version of the policy: the first that holds of failed,
/// quarantined, offline because its device is revoked, orphaned, draining, offline, degraded, registered,
/// busy, available. The second is why, in a stable word.
#[must_use]
pub fn of(worker: &Worker, now: u64, policy_version: u64) -> (Lifecycle, &'static str) {
    let hold = |hold: &Hold| match hold.cause.as_str() {
        "digest_drift" => "digest_drift",
        "scope_violation" => "scope_violation",
        "cleanup" => "cleanup",
        _ => "operator",
    };
    if let Some(failure) = &worker.failure {
        (Lifecycle::Failed, hold(failure))
    } else if let Some(quarantine) = &worker.quarantine {
        (Lifecycle::Quarantined, hold(quarantine))
    } else if worker.barred {
        (Lifecycle::Offline, "device_revoked")
    } else if worker.orphaned {
        (Lifecycle::Orphaned, "lost_with_leases")
    } else if let Some(drain) = &worker.drain {
        (Lifecycle::Draining, hold(drain))
    } else if worker.away_since != 0 && worker.lost_at == 0 {
        (Lifecycle::Offline, "lost")
    } else if worker.away_since != 0 {
        (Lifecycle::Degraded, "away")
    } else if worker.reconciled_epoch == 0 {
        (Lifecycle::Degraded, "not_reconciled")
    // Planted: a worker that never said that it is clean is given work.
    } else if !worker.unclean.is_empty() && !palyra_fault::planted("unclean-given-work") {
        (Lifecycle::Degraded, "unclean")
    } else {
        by_statement(worker, now, policy_version)
    }
}

fn by_statement(worker: &Worker, now: u64, policy_version: u64) -> (Lifecycle, &'static str) {
    let Some(attested) = &worker.attested else {
        return (Lifecycle::Registered, "not_attested");
    };
    if now >= attested.expires_at {
        (Lifecycle::Registered, "statement_expired")
    } else if attested.policy_version == 0 {
        (Lifecycle::Registered, "statement_void")
    } else if attested.policy_version != policy_version {
        (Lifecycle::Registered, "policy_changed")
    } else if worker.slots_used >= attested.slots {
        (Lifecycle::Busy, "slots_taken")
    } else {
        (Lifecycle::Available, "ready")
    }
}

/// The changes that there may be, from each to which. `docs/workers.md` has the same table, and a test
/// compares both.
///
/// What is missing cannot come about: a quarantine ends by an accepted statement, in a session, so neither
/// offline nor registered follows it; who comes back is degraded until it is reconciled; who is lost was
/// degraded, for its session had ended.
pub const TRANSITIONS: [(Lifecycle, &[Lifecycle]); 9] = {
    use Lifecycle::{
        Available, Busy, Degraded, Draining, Failed, Offline, Orphaned, Quarantined, Registered,
    };
    [
        (
            Registered,
            &[Available, Busy, Degraded, Draining, Quarantined, Offline, Failed],
        ),
        (
            Available,
            &[Registered, Busy, Degraded, Draining, Quarantined, Offline, Failed],
        ),
        (
            Busy,
            &[
                Registered,
                Available,
                Degraded,
                Draining,
                Quarantined,
                Offline,
                Failed,
            ],
        ),
        (
            Degraded,
            &[
                Registered,
                Available,
                Busy,
                Draining,
                Quarantined,
                Orphaned,
                Offline,
                Failed,
            ],
        ),
        (
            Draining,
            &[
                Registered,
                Available,
                Busy,
                Degraded,
                Quarantined,
                Orphaned,
                Offline,
                Failed,
            ],
        ),
        (
            Quarantined,
            &[Available, Busy, Degraded, Draining, Orphaned, Failed],
        ),
        (
            Orphaned,
            &[
                Registered,
                Available,
                Busy,
                Degraded,
                Draining,
                Quarantined,
                Offline,
                Failed,
            ],
        ),
        (Offline, &[Degraded, Draining, Quarantined, Failed]),
        (
            Failed,
            &[
                Registered,
                Available,
                Busy,
                Degraded,
                Draining,
                Quarantined,
                Orphaned,
                Offline,
            ],
        ),
    ]
};

/// Whether a worker may go from one to the other.
#[must_use]
pub fn allowed(from: Lifecycle, to: Lifecycle) -> bool {
    TRANSITIONS
        .iter()
        .any(|(known, follow)| *known == from && follow.contains(&to))
}
