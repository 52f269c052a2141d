//! Where a worker stands: one word, made of the facts in its record, and the table of the changes that there may be.

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
    /// Its session is away, or it has not been reconciled, or it has not said that it is clean: nothing new is given to it.
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
