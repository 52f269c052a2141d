//! When to come back: what a replica tells those that it sends away, so that thousands do not come in one instant.
//!
//! Invariant: the earliest moment and the width are apart, so that each node draws its own within the width.

use std::fmt;
use std::time::Duration;

use crate::error::{Class, Error, Refusal};

/// When to come back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pace {
    /// Not before so long.
    pub after: Duration,
    /// And up to so much later, at random.
    pub spread: Duration,
}

impl Pace {
    /// At once, but not all together.
    #[must_use]
    pub fn spread_over(spread: Duration) -> Pace {
        Pace {
            after: Duration::ZERO,
            spread,
        }
    }
}

/// Why a session is not begun, or by what replicas differ that serve them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionRefusal {
    /// This replica is about to stop and takes no sessions.
    Draining {
        /// When to come back.
        pace: Pace,
    },
    /// More nodes wait to be attached than this replica can serve in time.
    TooManyAttaches {
        /// How many.
        waiting: usize,
        /// When to come back.
        pace: Pace,
    },
    /// Replicas differ in a duration that must be the same everywhere. A warning, not an answer.
    StalenessDiffers {
        /// Which has which.
        values: String,
    },
}

impl SessionRefusal {
    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            SessionRefusal::Draining { .. } => "E1050",
            SessionRefusal::TooManyAttaches { .. } => "E1051",
            SessionRefusal::StalenessDiffers { .. } => "E1052",
        }
    }

    /// What kind of trouble it is.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            SessionRefusal::Draining { .. } => Class::Unavailable,
            SessionRefusal::TooManyAttaches { .. } => Class::Exhausted,
            SessionRefusal::StalenessDiffers { .. } => Class::Precondition,
        }
    }

    /// When to come back, if the same may be asked again.
    #[must_use]
    pub fn pace(&self) -> Option<Pace> {
        match self {
            SessionRefusal::Draining { pace } | SessionRefusal::TooManyAttaches { pace, .. } => Some(*pace),
            SessionRefusal::StalenessDiffers { .. } => None,
        }
    }

    /// What to do now.
    #[must_use]
    pub fn next(&self) -> String {
        match self {
            SessionRefusal::Draining { .. } => "connect to another replica".to_owned(),
            SessionRefusal::TooManyAttaches { pace, .. } => {
                let wait = pace.after.as_millis();
                format!("come back in {wait} ms, here or at another replica")
            }
            SessionRefusal::StalenessDiffers { .. } => {
                "set timers.max_staleness to one value in every palyrad.toml, and restart".to_owned()
            }
        }
    }
}

impl fmt::Display for SessionRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionRefusal::Draining { .. } => {
                f.write_str("this replica is about to stop and takes no sessions")
            }
            SessionRefusal::TooManyAttaches { waiting, .. } => {
                let cause = "nodes wait to be attached here, more than can be served in time";
                write!(f, "{waiting} {cause}")
            }
            SessionRefusal::StalenessDiffers { values } => {
                write!(f, "max_staleness is not the same on all replicas: {values}")
            }
        }
    }
}

impl From<SessionRefusal> for Error {
    fn from(refusal: SessionRefusal) -> Error {
        Refusal::Session(refusal).into()
    }
}
