//! When to come back: what a replica tells those that it sends away, so that thousands do not come in one instant.
//!
//! Invariant: the earliest moment and the width are apart, so that each node draws its own within the width.

use std::time::Duration;

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
