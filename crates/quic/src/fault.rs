//! What can be wrong with a call before anybody looks at what it asks: typed, with a code and a next step.

use std::fmt;

use palyra_proto::common::v1::ErrorDetail;

use crate::VERSION;

/// A refusal of the framing. Closed: each has a page in `docs/errors`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A frame whose length is over the limit.
    FrameTooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// Bytes that are no frame, or a frame that has no place there.
    Malformed {
        /// What is wrong with them.
        cause: &'static str,
    },
    /// A call that this side does not know.
    UnknownMethod {
        /// Its name, cut.
        method: String,
    },
    /// A version of the protocol that this side does not speak.
    WrongVersion {
        /// The version that was asked for.
        asked: u32,
    },
    /// More calls on one connection than it may have.
    TooManyStreams {
        /// The limit.
        limit: usize,
    },
    /// More connections than there may be.
    TooManyConnections {
        /// Of whom.
        of: &'static str,
    },
    /// A message that is over the limit, in one frame or in several.
    MessageTooLong {
        /// The limit.
        limit: usize,
    },
    /// The caller's deadline passed, or the call did not get on.
    Overdue {
        /// What was waited for.
        what: &'static str,
    },
}

impl Fault {
    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Fault::FrameTooLong { .. } => "E1060",
            Fault::Malformed { .. } => "E1061",
            Fault::UnknownMethod { .. } => "E1062",
            Fault::WrongVersion { .. } => "E1063",
            Fault::TooManyStreams { .. } => "E1064",
            Fault::TooManyConnections { .. } => "E1065",
            Fault::MessageTooLong { .. } => "E1066",
            Fault::Overdue { .. } => "E1067",
        }
    }

    /// What kind of trouble it is, as `ErrorDetail.class` spells it.
    #[must_use]
    pub fn class(&self) -> &'static str {
        match self {
            Fault::FrameTooLong { .. } | Fault::Malformed { .. } | Fault::MessageTooLong { .. } => "invalid",
            Fault::UnknownMethod { .. } | Fault::WrongVersion { .. } => "unsupported",
            Fault::TooManyStreams { .. } | Fault::TooManyConnections { .. } => "exhausted",
            Fault::Overdue { .. } => "unavailable",
        }
    }

    /// What to do now.
    #[must_use]
    pub fn next(&self) -> &'static str {
        match self {
            Fault::FrameTooLong { .. } => "split the message into parts, see docs/protocol/quic.md",
            Fault::Malformed { .. } => {
                "send frames as docs/protocol/quic.md has them, of this release's proto files"
            }
            Fault::UnknownMethod { .. } | Fault::WrongVersion { .. } => {
                "compare `palyra version` with the replica's in `palyra cluster status`, or use gRPC"
            }
            Fault::TooManyStreams { .. } => "wait for a call to end before the next is begun",
            Fault::TooManyConnections { .. } => {
                "use gRPC, or another replica; quic.connections, .per_source and .per_identity in palyrad.toml are the \
                 limits"
            }
            Fault::MessageTooLong { .. } => "send less: a payload may have 512 KiB",
            Fault::Overdue { .. } => "try again, or ask another replica",
        }
    }

    /// Whether the same call may be sent again as it is.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Fault::TooManyStreams { .. } | Fault::TooManyConnections { .. } | Fault::Overdue { .. }
        )
    }

    /// The machine-readable form, as replica `served_by` answers it.
    #[must_use]
    pub fn detail(&self, served_by: u64) -> ErrorDetail {
        ErrorDetail {
            code: self.code().to_owned(),
            message: self.to_string(),
            next: self.next().to_owned(),
            retryable: self.is_retryable(),
            // A call that was given up may have been done.
            unknown: matches!(self, Fault::Overdue { .. }),
            served_by,
            class: self.class().to_owned(),
            ..ErrorDetail::default()
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::FrameTooLong { bytes, limit } => {
                write!(f, "a frame of {bytes} bytes is too long: the limit is {limit}")
            }
            Fault::Malformed { cause } => f.write_str(cause),
            Fault::UnknownMethod { method } => write!(f, "there is no call {method:?}"),
            Fault::WrongVersion { asked } => write!(
                f,
                "version {asked} of the node protocol is not spoken here: it is {VERSION}"
            ),
            Fault::TooManyStreams { limit } => {
                write!(
                    f,
                    "{limit} calls are under way on this connection, which is all it may have"
                )
            }
            Fault::TooManyConnections { of } => {
                write!(f, "{of} has as many QUIC connections as it may have")
            }
            Fault::MessageTooLong { limit } => {
                write!(
                    f,
                    "the message is too long: the limit of this call is {limit} bytes"
                )
            }
            Fault::Overdue { what } => write!(f, "{what} did not come in time"),
        }
    }
}

impl std::error::Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_says_what_why_and_what_next() {
        let all = [
            Fault::FrameTooLong { bytes: 9, limit: 8 },
            Fault::Malformed { cause: "no frame" },
            Fault::UnknownMethod {
                method: "node.dance".to_owned(),
            },
            Fault::WrongVersion { asked: 2 },
            Fault::TooManyStreams { limit: 4 },
            Fault::TooManyConnections { of: "this source" },
            Fault::MessageTooLong { limit: 8 },
            Fault::Overdue { what: "the request" },
        ];
        let mut codes: Vec<&str> = all.iter().map(Fault::code).collect();
        codes.dedup();
        assert_eq!(codes.len(), all.len(), "each has a code of its own");
        for fault in all {
            let detail = fault.detail(3);
            assert_eq!((detail.code.as_str(), detail.served_by), (fault.code(), 3));
            assert!(!detail.message.is_empty() && !detail.next.is_empty() && !detail.class.is_empty());
        }
    }
}
