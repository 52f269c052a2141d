//! Why the feed is not read on here.

use std::fmt;

use crate::error::Class;

/// A refusal of the feed. Each has a page in `docs/errors`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedRefusal {
    /// This replica has not got so far, and cannot ask how far the cluster is.
    NotYet {
        /// The reader's cursor.
        cursor: String,
        /// What this replica has applied.
        applied: u64,
    },
    /// The cluster has never got so far.
    Beyond {
        /// The reader's cursor.
        cursor: String,
        /// What the cluster has.
        applied: u64,
    },
    /// The cursor is of another cluster.
    Elsewhere {
        /// The cluster that the reader names.
        found: String,
        /// This one.
        expected: String,
    },
    /// The reader did not read for too long.
    Stalled,
}

impl FeedRefusal {
    pub(crate) fn code(&self) -> &'static str {
        match self {
            FeedRefusal::NotYet { .. } => "E1070",
            FeedRefusal::Beyond { .. } => "E1071",
            FeedRefusal::Elsewhere { .. } => "E1072",
            FeedRefusal::Stalled => "E1073",
        }
    }

    pub(crate) fn class(&self) -> Class {
        match self {
            FeedRefusal::NotYet { .. } => Class::Unavailable,
            FeedRefusal::Beyond { .. } => Class::Precondition,
            FeedRefusal::Elsewhere { .. } => Class::Invalid,
            FeedRefusal::Stalled => Class::Exhausted,
        }
    }

    pub(crate) fn is_retryable(&self) -> bool {
        matches!(self, FeedRefusal::NotYet { .. } | FeedRefusal::Stalled)
    }

    pub(crate) fn next(&self) -> String {
        match self {
            FeedRefusal::NotYet { .. } => "ask another replica, or this one again in a moment".to_owned(),
            FeedRefusal::Beyond { .. } => {
                "list anew, and follow from that list's index: palyra journal tail".to_owned()
            }
            FeedRefusal::Elsewhere { .. } => {
                "use the context of the cursor's cluster: palyra context ls".to_owned()
            }
            FeedRefusal::Stalled => {
                "read faster, or with a filter, and go on from the last cursor".to_owned()
            }
        }
    }
}

impl fmt::Display for FeedRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FeedRefusal::NotYet { cursor, applied } => {
                write!(
                    f,
                    "cursor {cursor} is not there yet: this replica has applied {applied}"
                )
            }
            FeedRefusal::Beyond { cursor, applied } => {
                write!(
                    f,
                    "cursor {cursor} is beyond the end of this cluster's log at {applied}"
                )
            }
            FeedRefusal::Elsewhere { found, expected } => {
                write!(f, "the cursor is of cluster {found}, this is {expected}")
            }
            FeedRefusal::Stalled => f.write_str("the reader of the feed did not read for too long"),
        }
    }
}
