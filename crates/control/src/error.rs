//! What can go wrong between a caller and the state: one type, one code each, one next step each.
//!
//! What never lives here: the mapping to gRPC and HTTP (the server's), and the state machine's own refusals,
//! which pass through as [`Error::Rejected`]. Invariants: each variant says whether the same request may be
//! sent again as it is; messages hold no secrets; a source that helps only us goes to the log and not to the
//! caller.

use std::fmt;

use palyra_state::Reject;

use crate::events::FeedRefusal;
use crate::pace::{Pace, SessionRefusal};
use crate::workers::WorkerRefusal;

/// Why a request was not done, or is not known to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// The state machine refused; nothing changed.
    Rejected(Reject),
    /// The control plane refused before it asked the state machine; nothing changed.
    Refused(Refusal),
    /// No leader can be reached; nothing changed.
    Unavailable {
        /// The replica that is believed to lead, if any.
        leader_hint: Option<u64>,
    },
    /// It may or may not have been done. The same request id, sent again to any replica, gives the answer.
    Unknown {
        /// The request id to send again.
        request_id: String,
    },
    /// This replica has not heard from a quorum for too long to answer for the cluster.
    Stale {
        /// Milliseconds since it last did.
        age_ms: u64,
    },
    /// A field of the request is wrong.
    Invalid {
        /// Which one.
        field: &'static str,
        /// What is wrong with it.
        cause: String,
        /// What would be right.
        next: String,
    },
    /// A queue of this replica is full; nothing changed.
    Busy {
        /// Which one.
        what: &'static str,
    },
    /// A fault of ours. The source is for the log only.
    Internal(String),
}

/// What kind of trouble it is, for exit codes and status codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// There is no such thing.
    NotFound,
    /// Something else stands in its place.
    Conflict,
    /// The thing is not in the state for it.
    Precondition,
    /// The caller may not.
    Denied,
    /// The caller did not show who it is.
    Unauthenticated,
    /// The request is malformed.
    Invalid,
    /// A limit is reached.
    Exhausted,
    /// Its time has passed.
    Expired,
    /// Try again.
    Unavailable,
    /// It may have been done.
    Unknown,
    /// The replica is cut off.
    Stale,
    /// A fault of ours.
    Internal,
}

impl Class {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Class::NotFound => "not_found",
            Class::Conflict => "conflict",
            Class::Precondition => "precondition",
            Class::Denied => "denied",
            Class::Unauthenticated => "unauthenticated",
            Class::Invalid => "invalid",
            Class::Exhausted => "exhausted",
            Class::Expired => "expired",
            Class::Unavailable => "unavailable",
            Class::Unknown => "unknown",
            Class::Stale => "stale",
            Class::Internal => "internal",
        }
    }

    /// From the text form, as the state machine spells it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Class> {
        const ALL: [Class; 12] = [
            Class::NotFound,
            Class::Conflict,
            Class::Precondition,
            Class::Denied,
            Class::Unauthenticated,
            Class::Invalid,
            Class::Exhausted,
            Class::Expired,
            Class::Unavailable,
            Class::Unknown,
            Class::Stale,
            Class::Internal,
        ];
        ALL.into_iter().find(|class| class.as_str() == text)
    }
}

/// A refusal of the control plane, before the state machine was asked. Closed: each has a page in
/// `docs/errors`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// A certificate of a role that has no business here.
    WrongRole {
        /// The role in the certificate.
        found: String,
        /// The role that is welcome.
        expected: &'static str,
    },
    /// A certificate whose time has not come.
    NotYetValid {
        /// Begin of validity.
        not_before_ms: u64,
        /// This replica's clock.
        now_ms: u64,
    },
    /// A certificate of another cluster.
    OtherCluster {
        /// Its trust domain.
        found: String,
        /// Ours.
        expected: String,
    },
    /// A selector that names nothing.
    NotFound {
        /// What kind of thing.
        kind: &'static str,
        /// What was asked for.
        selector: String,
    },
    /// A selector that names several things.
    Ambiguous {
        /// What kind of thing.
        kind: &'static str,
        /// What was asked for.
        selector: String,
        /// Some of what it names.
        matches: Vec<String>,
    },
    /// A half-done pairing exchange that this replica does not hold for this connection.
    UnknownExchange,
    /// The proof of a PIN is wrong.
    WrongPin,
    /// The proof of a ticket is wrong.
    WrongTicket,
    /// A server nonce that was not given to this connection, was used, or is too old.
    UnknownNonce,
    /// The CSR is not the one that the exchange began with.
    OtherCsr,
    /// The token that fetches a pairing's outcome is wrong, or there is no such pairing.
    WrongFetchToken,
    /// A secret that was shown once cannot be shown again.
    ShownOnce {
        /// What holds the secret.
        what: String,
    },
    /// The proof of a join token is wrong.
    WrongJoinProof,
    /// Removing the replica would leave no room for another failure, or no majority.
    WouldLoseMajority {
        /// The replica.
        replica_id: u64,
        /// Voters left.
        voters_left: u64,
        /// Those of them that answer.
        alive: u64,
    },
    /// The session is over.
    SessionEnded {
        /// Why, as in its goodbye.
        code: &'static str,
    },
    /// A message that has no place in the stream.
    Protocol {
        /// What was wrong.
        cause: &'static str,
    },
    /// The authority of this replica cannot sign.
    Signing {
        /// Why.
        cause: String,
    },
    /// The feed is not read on here.
    Feed(FeedRefusal),
    /// A session is not begun, or not as it was meant to be.
    Session(SessionRefusal),
    /// What a worker says is not taken in.
    Worker(WorkerRefusal),
}

impl Refusal {
    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Refusal::WrongRole { .. } => "E1001",
            Refusal::NotYetValid { .. } => "E1002",
            Refusal::OtherCluster { .. } => "E1003",
            Refusal::NotFound { .. } => "E1016",
            Refusal::Ambiguous { .. } => "E1017",
            Refusal::UnknownExchange => "E1020",
            Refusal::WrongPin => "E1021",
            Refusal::WrongTicket => "E1022",
            Refusal::UnknownNonce => "E1023",
            Refusal::ShownOnce { .. } => "E1024",
            Refusal::OtherCsr => "E1025",
            Refusal::WrongFetchToken => "E1026",
            Refusal::WrongJoinProof => "E1030",
            Refusal::WouldLoseMajority { .. } => "E1031",
            Refusal::Signing { .. } => "E1032",
            Refusal::SessionEnded { .. } => "E1040",
            Refusal::Protocol { .. } => "E1041",
            Refusal::Feed(refusal) => refusal.code(),
            Refusal::Session(refusal) => refusal.code(),
            Refusal::Worker(refusal) => refusal.code(),
        }
    }

    /// What kind of trouble it is.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Refusal::WrongRole { .. }
            | Refusal::WrongPin
            | Refusal::WrongTicket
            | Refusal::WrongFetchToken
            | Refusal::WrongJoinProof => Class::Denied,
            Refusal::NotYetValid { .. } | Refusal::OtherCluster { .. } => Class::Unauthenticated,
            Refusal::NotFound { .. } => Class::NotFound,
            Refusal::Ambiguous { .. } | Refusal::ShownOnce { .. } => Class::Conflict,
            Refusal::UnknownExchange | Refusal::UnknownNonce => Class::Expired,
            Refusal::OtherCsr | Refusal::Protocol { .. } => Class::Invalid,
            Refusal::WouldLoseMajority { .. } | Refusal::SessionEnded { .. } | Refusal::Signing { .. } => {
                Class::Precondition
            }
            Refusal::Session(refusal) => refusal.class(),
            Refusal::Worker(refusal) => refusal.class(),
            Refusal::Feed(refusal) => refusal.class(),
        }
    }

    /// Whether the same request may be sent again as it is.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Refusal::Feed(refusal) => refusal.is_retryable(),
            Refusal::Session(refusal) => refusal.pace().is_some(),
            _ => false,
        }
    }

    /// What to do now.
    #[must_use]
    pub fn next(&self) -> String {
        match self {
            Refusal::WrongRole { expected, .. } => format!("use the credential of an {expected}"),
            Refusal::OtherCluster { .. } => "use the credential of this cluster: palyra context".to_owned(),
            Refusal::NotYetValid { .. } => "check the clocks of both machines".to_owned(),
            Refusal::NotFound { kind, .. } => format!("see what there is: palyra {} ls", verb(kind)),
            Refusal::Ambiguous { .. } => "give more characters of the id".to_owned(),
            Refusal::UnknownExchange | Refusal::UnknownNonce => {
                "begin the pairing again, on one connection".to_owned()
            }
            Refusal::WrongPin => {
                "check the PIN with the operator and try again; five wrong ones burn it".to_owned()
            }
            Refusal::WrongTicket => "ask the operator for a new ticket: palyra pairing ticket".to_owned(),
            Refusal::OtherCsr => "send the signing request whose SHA-256 the exchange began with".to_owned(),
            Refusal::WrongFetchToken => {
                "begin the pairing again with a new code: palyra pairing code".to_owned()
            }
            Refusal::ShownOnce { .. } => "revoke it and make another under a new request id".to_owned(),
            Refusal::WrongJoinProof => "mint another token: palyra cluster join-token --name NAME".to_owned(),
            Refusal::WouldLoseMajority {
                voters_left, alive, ..
            } if *alive <= voters_left / 2 => {
                "bring another voter back first: palyra cluster status shows them".to_owned()
            }
            Refusal::WouldLoseMajority { .. } => {
                "let another replica join first, or repeat with --force".to_owned()
            }
            Refusal::SessionEnded { .. } => "connect again, to any replica".to_owned(),
            Refusal::Protocol { .. } => {
                "attach first, then send one message at a time; update the agent".to_owned()
            }
            Refusal::Signing { .. } => "ask another replica, and see palyra cluster status".to_owned(),
            Refusal::Feed(refusal) => refusal.next(),
            Refusal::Session(refusal) => refusal.next(),
            Refusal::Worker(refusal) => refusal.next(),
        }
    }
}

fn verb(kind: &str) -> &str {
    match kind {
        "dispatch" => "job",
        "pairing request" | "pairing code" => "pairing",
        other => other,
    }
}

fn without(f: &mut fmt::Formatter<'_>, replica_id: u64, voters_left: u64, alive: u64) -> fmt::Result {
    write!(f, "without replica {replica_id} ")?;
    if alive <= voters_left / 2 {
        write!(f, "{alive} of {voters_left} voters answer, which is no majority")
    } else {
        write!(f, "there are {voters_left} voters, and none may fail then")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::WrongRole { found, expected } => {
                write!(
                    f,
                    "a {found} certificate is not accepted here, an {expected}'s is"
                )
            }
            Refusal::NotYetValid {
                not_before_ms,
                now_ms,
            } => {
                write!(
                    f,
                    "the certificate is valid from {not_before_ms} ms on, and it is {now_ms} ms here"
                )
            }
            Refusal::OtherCluster { found, expected } => {
                write!(
                    f,
                    "the certificate is of trust domain {found}, this is {expected}"
                )
            }
            Refusal::NotFound { kind, selector } => write!(f, "no {kind} {selector:?}"),
            Refusal::Ambiguous {
                kind,
                selector,
                matches,
            } => {
                write!(
                    f,
                    "{selector:?} names more than one {kind}: {}",
                    matches.join(", ")
                )
            }
            Refusal::UnknownExchange => {
                f.write_str("this replica holds no such pairing exchange for this connection")
            }
            Refusal::WrongPin => f.write_str("the proof of the PIN is wrong"),
            Refusal::WrongTicket => f.write_str("the proof of the ticket is wrong"),
            Refusal::UnknownNonce => {
                f.write_str("the server nonce was not given to this connection, was used, or is too old")
            }
            Refusal::OtherCsr => {
                f.write_str("the signing request is not the one that the exchange began with")
            }
            Refusal::WrongFetchToken => f.write_str("there is no such pairing, or the fetch token is wrong"),
            Refusal::ShownOnce { what } => {
                write!(
                    f,
                    "{what} was made by an earlier request with this id, and its secret is shown only once"
                )
            }
            Refusal::WrongJoinProof => f.write_str("the proof of the join token is wrong"),
            Refusal::WouldLoseMajority {
                replica_id,
                voters_left,
                alive,
            } => without(f, *replica_id, *voters_left, *alive),
            Refusal::SessionEnded { code } => write!(f, "the session is over: {code}"),
            Refusal::Protocol { cause } => f.write_str(cause),
            Refusal::Signing { cause } => write!(f, "this replica cannot sign the certificate: {cause}"),
            Refusal::Feed(refusal) => refusal.fmt(f),
            Refusal::Session(refusal) => refusal.fmt(f),
            Refusal::Worker(refusal) => refusal.fmt(f),
        }
    }
}

impl Error {
    /// [`Error::Invalid`].
    #[must_use]
    pub fn invalid(field: &'static str, cause: impl Into<String>, next: impl Into<String>) -> Error {
        Error::Invalid {
            field,
            cause: cause.into(),
            next: next.into(),
        }
    }

    /// [`Error::Refused`] because a selector names nothing.
    #[must_use]
    pub fn not_found(kind: &'static str, selector: impl fmt::Display) -> Error {
        Error::Refused(Refusal::NotFound {
            kind,
            selector: selector.to_string(),
        })
    }

    /// The stable code, with a page in `docs/errors`.
    #[must_use]
    pub fn code(&self) -> String {
        match self {
            Error::Rejected(reject) => reject.code(),
            Error::Refused(refusal) => refusal.code().to_owned(),
            Error::Stale { .. } => "E1010".to_owned(),
            Error::Unavailable { .. } => "E1011".to_owned(),
            Error::Unknown { .. } => "E1012".to_owned(),
            Error::Busy { .. } => "E1013".to_owned(),
            Error::Invalid { .. } => "E1014".to_owned(),
            Error::Internal(_) => "E1015".to_owned(),
        }
    }

    /// Whether the same request, as it is, may be sent again and may then be done. With [`Error::Unknown`] it
    /// must carry the same request id.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::Unavailable { .. } | Error::Unknown { .. } | Error::Stale { .. } | Error::Busy { .. } => {
                true
            }
            Error::Refused(refusal) => refusal.is_retryable(),
            Error::Rejected(_) | Error::Invalid { .. } | Error::Internal(_) => false,
        }
    }

    /// When to try again, if this replica knows better than the caller.
    #[must_use]
    pub fn pace(&self) -> Option<Pace> {
        match self {
            Error::Refused(Refusal::Session(refusal)) => refusal.pace(),
            _ => None,
        }
    }

    /// Whether the request may have been done.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        matches!(self, Error::Unknown { .. })
    }

    /// What kind of trouble it is.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Error::Rejected(reject) => Class::parse(reject.class().as_str()).unwrap_or(Class::Precondition),
            Error::Refused(refusal) => refusal.class(),
            Error::Unavailable { .. } => Class::Unavailable,
            Error::Unknown { .. } => Class::Unknown,
            Error::Stale { .. } => Class::Stale,
            Error::Invalid { .. } => Class::Invalid,
            Error::Busy { .. } => Class::Exhausted,
            Error::Internal(_) => Class::Internal,
        }
    }

    /// What the log says of it: also the source of an internal error, which no caller is told.
    #[must_use]
    pub fn for_log(&self) -> String {
        match self {
            Error::Internal(source) => source.clone(),
            other => other.to_string(),
        }
    }

    /// What to do now, for people; often a command.
    #[must_use]
    pub fn next(&self) -> String {
        match self {
            Error::Rejected(reject) => reject.next(),
            Error::Refused(refusal) => refusal.next(),
            Error::Unavailable { .. } => {
                "try again; palyra cluster status shows which replicas are up".to_owned()
            }
            Error::Unknown { request_id } => format!("repeat with --request-id {request_id}, at any replica"),
            Error::Stale { .. } => {
                "ask another replica; palyra cluster status shows which have a quorum".to_owned()
            }
            Error::Invalid { next, .. } => next.clone(),
            Error::Busy { .. } => "try again in a moment, or ask another replica".to_owned(),
            Error::Internal(_) => "see the log of the replica that answered".to_owned(),
        }
    }
}

impl fmt::Display for Error {
    /// The thing and the cause, for people. The source of an internal error is left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Rejected(reject) => write!(f, "{}", reject.message()),
            Error::Refused(refusal) => refusal.fmt(f),
            Error::Unavailable {
                leader_hint: Some(id),
            } => write!(f, "the leader, replica {id}, does not answer"),
            Error::Unavailable { leader_hint: None } => {
                f.write_str("the cluster has no leader at the moment")
            }
            Error::Unknown { request_id } => {
                write!(f, "it is not known whether request {request_id} was done")
            }
            Error::Stale { age_ms: u64::MAX } => {
                f.write_str("this replica has not heard from a quorum since it started")
            }
            Error::Stale { age_ms } => write!(f, "this replica last heard from a quorum {age_ms} ms ago"),
            Error::Invalid { field, cause, .. } => write!(f, "{field}: {cause}"),
            Error::Busy { what } => write!(f, "this replica has too many {what} at the moment"),
            Error::Internal(_) => f.write_str("something went wrong inside this replica"),
        }
    }
}

impl std::error::Error for Error {}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        Error::Refused(refusal)
    }
}

impl From<WorkerRefusal> for Error {
    fn from(refusal: WorkerRefusal) -> Error {
        Error::Refused(Refusal::Worker(refusal))
    }
}

impl From<Reject> for Error {
    fn from(reject: Reject) -> Error {
        Error::Rejected(reject)
    }
}

#[cfg(test)]
mod tests;
