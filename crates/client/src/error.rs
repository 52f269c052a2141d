//! What can go wrong for a caller of the control plane, as one typed value.
//!
//! What never lives here: printing, and process exit (the command line does both).
//! Invariants: a class is taken from the server's typed detail or from the gRPC code, never guessed from the
//! words of a message; a mutation that may have been applied is never reported as refused.

use std::fmt;

use palyra_proto::common::v1::ErrorDetail;
use prost::Message as _;
use tonic::{Code, Status};

use crate::connect::{ConnectError, ConnectErrorKind};

/// The trailer in which servers send [`ErrorDetail`].
pub const ERROR_TRAILER: &str = "palyra-error-bin";

/// No replica could be reached.
pub const E_UNREACHABLE: &str = "E9001";
/// Replicas were reached, but none answered before the deadline.
pub const E_NO_ANSWER: &str = "E9002";
/// A mutation was sent and its outcome is not known.
pub const E_UNKNOWN_OUTCOME: &str = "E9003";
/// The server is not the cluster that this side trusts.
pub const E_NOT_THIS_CLUSTER: &str = "E9004";
/// The server refused this side's certificate.
pub const E_CERTIFICATE_REFUSED: &str = "E9005";
/// The server doesn't know the call: it is older or newer than this binary.
pub const E_UNSUPPORTED: &str = "E9006";
/// The server answered without saying why.
pub const E_UNEXPLAINED: &str = "E9007";
/// A feed told rows twice or out of order.
pub const E_OUT_OF_ORDER: &str = "E1074";
/// Something on this machine is missing or unreadable: a context, a credential, a file.
pub const E_LOCAL: &str = "E9010";

/// What kind of failure it is. Exit codes and retries follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// The thing named does not exist.
    NotFound,
    /// It collides with something that exists.
    Conflict,
    /// The state does not allow it now.
    Precondition,
    /// The caller may not do this.
    Denied,
    /// The request itself is wrong.
    Invalid,
    /// A limit is reached.
    Exhausted,
    /// It was valid once.
    Expired,
    /// No quorum, or nobody answers in time; a retry is safe.
    Unavailable,
    /// The outcome of a mutation is unknown.
    Unknown,
    /// The replica is too far behind to answer.
    Stale,
    /// A defect.
    Internal,
    /// No replica can be reached at all.
    Unreachable,
    /// The server doesn't know the call.
    Unsupported,
}

impl Class {
    /// The stable text form, as in `ErrorDetail.class`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Class::NotFound => "not_found",
            Class::Conflict => "conflict",
            Class::Precondition => "precondition",
            Class::Denied => "denied",
            Class::Invalid => "invalid",
            Class::Exhausted => "exhausted",
            Class::Expired => "expired",
            Class::Unavailable => "unavailable",
            Class::Unknown => "unknown",
            Class::Stale => "stale",
            Class::Internal => "internal",
            Class::Unreachable => "unreachable",
            Class::Unsupported => "unsupported",
        }
    }

    /// From the text form. `unauthenticated` is a kind of denial to a caller; a class that this binary
    /// doesn't know counts as internal.
    #[must_use]
    pub fn parse(text: &str) -> Class {
        const ALL: [Class; 13] = [
            Class::NotFound,
            Class::Conflict,
            Class::Precondition,
            Class::Denied,
            Class::Invalid,
            Class::Exhausted,
            Class::Expired,
            Class::Unavailable,
            Class::Unknown,
            Class::Stale,
            Class::Internal,
            Class::Unreachable,
            Class::Unsupported,
        ];
        if text == "unauthenticated" {
            return Class::Denied;
        }
        ALL.into_iter()
            .find(|class| class.as_str() == text)
            .unwrap_or(Class::Internal)
    }

    /// The exit code of a command that ends with this class.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Class::Internal => 1,
            Class::Invalid => 2,
            Class::Denied => 3,
            Class::Unreachable => 4,
            Class::Unsupported => 5,
            Class::Exhausted => 6,
            Class::Precondition | Class::Expired => 7,
            Class::NotFound => 8,
            Class::Unavailable => 9,
            Class::Stale => 10,
            Class::Conflict => 11,
            Class::Unknown => 13,
        }
    }
}

/// One endpoint that was tried, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// `host:port`.
    pub endpoint: String,
    /// What happened, for a human.
    pub cause: String,
}

/// A failed call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// Stable code, `E0403`; `docs/errors` has a page for each.
    pub code: String,
    /// The thing and the cause.
    pub message: String,
    /// What to do now; may be empty.
    pub next: String,
    /// What kind of failure.
    pub class: Class,
    /// The same request may be sent again as it is.
    pub retryable: bool,
    /// The outcome is unknown: ask again with the same request id.
    pub unknown: bool,
    /// How it came about. Apart, so that a result stays small.
    pub trail: Box<Trail>,
}

/// What is known around a failed call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trail {
    /// Where the leader is believed to be; 0 when unknown.
    pub leader_id: u64,
    /// The replica asks not to be tried again before so many milliseconds.
    pub retry_after_ms: u64,
    /// And up to so many later, at random.
    pub spread_ms: u64,
    /// The replica that answered; 0 when none did.
    pub served_by: u64,
    /// The request id of the mutation; empty when it was none.
    pub request_id: String,
    /// What was tried before this was the answer, oldest first.
    pub attempts: Vec<Attempt>,
}

impl Error {
    /// An error made on this side.
    #[must_use]
    pub fn new(class: Class, code: &str, message: impl Into<String>) -> Error {
        Error {
            code: code.to_owned(),
            message: message.into(),
            next: String::new(),
            class,
            retryable: false,
            unknown: false,
            trail: Box::default(),
        }
    }

    /// Something on this machine is missing, unreadable or wrong.
    #[must_use]
    pub fn local(class: Class, message: impl Into<String>, next: impl Into<String>) -> Error {
        Error::new(class, E_LOCAL, message).with_next(next)
    }

    /// The same, with what to do now.
    #[must_use]
    pub fn with_next(mut self, next: impl Into<String>) -> Error {
        self.next = next.into();
        self
    }

    /// The exit code of a command that ends with this error.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        self.class.exit_code()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {}", self.code, self.message)
    }
}

impl std::error::Error for Error {}

/// What one try of a call came to, when it failed.
#[derive(Debug)]
pub enum Failure {
    /// A replica answered, and the answer is typed.
    Answered(Error),
    /// The connection broke, or time ran out, after the request may have left.
    Lost {
        /// What happened, for a human.
        cause: String,
        /// The server refused this side's certificate: other replicas will do the same.
        refused: bool,
    },
}

/// Sorts a gRPC status into an answer or a lost connection.
#[must_use]
pub fn classify(status: &Status) -> Failure {
    if let Some(detail) = detail_of(status) {
        return Failure::Answered(from_detail(detail));
    }
    if let Some(source) = std::error::Error::source(status) {
        let refusal = refusal_in(source);
        let cause = refusal.map_or_else(|| describe(source), str::to_owned);
        return Failure::Lost {
            cause,
            refused: refusal.is_some(),
        };
    }
    match status.code() {
        // Without a detail, these come from the transport of either side and say nothing about the outcome.
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Unknown | Code::Aborted => {
            Failure::Lost {
                cause: plain(status),
                refused: false,
            }
        }
        _ => Failure::Answered(from_code(status)),
    }
}

fn detail_of(status: &Status) -> Option<ErrorDetail> {
    let bytes = status.metadata().get_bin(ERROR_TRAILER)?.to_bytes().ok()?;
    ErrorDetail::decode(bytes).ok()
}

pub(crate) fn from_detail(detail: ErrorDetail) -> Error {
    Error {
        class: Class::parse(&detail.class),
        code: detail.code,
        message: detail.message,
        next: detail.next,
        retryable: detail.retryable,
        unknown: detail.unknown,
        trail: Box::new(Trail {
            leader_id: detail.leader_id,
            retry_after_ms: detail.retry_after_ms,
            spread_ms: detail.spread_ms,
            served_by: detail.served_by,
            ..Trail::default()
        }),
    }
}

fn from_code(status: &Status) -> Error {
    let (class, code) = match status.code() {
        Code::Unauthenticated | Code::PermissionDenied => (Class::Denied, E_UNEXPLAINED),
        Code::Unimplemented => (Class::Unsupported, E_UNSUPPORTED),
        Code::NotFound => (Class::NotFound, E_UNEXPLAINED),
        Code::AlreadyExists => (Class::Conflict, E_UNEXPLAINED),
        Code::FailedPrecondition => (Class::Precondition, E_UNEXPLAINED),
        Code::InvalidArgument | Code::OutOfRange => (Class::Invalid, E_UNEXPLAINED),
        Code::ResourceExhausted => (Class::Exhausted, E_UNEXPLAINED),
        _ => (Class::Internal, E_UNEXPLAINED),
    };
    let error = Error::new(class, code, plain(status));
    if class == Class::Unsupported {
        return error
            .with_next("compare `palyra version` with the replica's version in `palyra cluster status`");
    }
    error
}

fn plain(status: &Status) -> String {
    if status.message().is_empty() {
        return format!("the server answered {:?}", status.code());
    }
    format!("the server answered {:?}: {}", status.code(), status.message())
}

/// The innermost words of a chain of errors: the outer ones only say "transport error".
fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut current = Some(error);
    let mut words = String::new();
    while let Some(inner) = current {
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            return crate::connect::plain_io(io);
        }
        words = inner.to_string();
        current = inner.source();
    }
    // HTTP/2 quotes the error below it without handing it out. The words are for people: no class follows.
    if words.contains("close_notify") {
        return "the connection ended early".to_owned();
    }
    if words.is_empty() || words.contains("broken pipe") {
        return "the connection broke".to_owned();
    }
    words
}

/// What a TLS alert in a chain of errors says about this side's certificate, if there is one.
fn refusal_in(error: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    let mut current = Some(error);
    while let Some(inner) = current {
        let tls = inner.downcast_ref::<rustls::Error>().or_else(|| {
            let io = inner.downcast_ref::<std::io::Error>()?;
            io.get_ref()?.downcast_ref::<rustls::Error>()
        });
        if let Some(words) = tls.and_then(palyra_pki::tls::explain_alert) {
            return Some(words);
        }
        current = inner.source();
    }
    None
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Error {
        let message = format!("{}: {}", error.address, error.cause);
        match error.kind {
            ConnectErrorKind::Unreachable => Error::new(Class::Unreachable, E_UNREACHABLE, message)
                .with_next("is the replica running, and is the address right? see `palyra context show`"),
            ConnectErrorKind::WrongServer => Error::new(Class::Denied, E_NOT_THIS_CLUSTER, message)
                .with_next("check the address, and which cluster the context is for: `palyra context show`"),
            ConnectErrorKind::Refused => Error::new(Class::Denied, E_CERTIFICATE_REFUSED, message)
                .with_next("get a valid certificate: `palyra whoami` tells which one is used"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::metadata::{MetadataMap, MetadataValue};

    fn status_with(detail: &ErrorDetail) -> Status {
        let mut metadata = MetadataMap::new();
        metadata.insert_bin(ERROR_TRAILER, MetadataValue::from_bytes(&detail.encode_to_vec()));
        Status::with_metadata(Code::FailedPrecondition, "words", metadata)
    }

    #[test]
    fn the_typed_detail_decides_not_the_grpc_code() {
        let detail = ErrorDetail {
            code: "E0403".to_owned(),
            message: "node X is unknown".to_owned(),
            next: "palyra node ls".to_owned(),
            class: "not_found".to_owned(),
            served_by: 2,
            leader_id: 3,
            ..ErrorDetail::default()
        };
        let Failure::Answered(error) = classify(&status_with(&detail)) else {
            panic!("not answered")
        };
        assert_eq!((error.class, error.exit_code()), (Class::NotFound, 8));
        assert_eq!(
            (error.code.as_str(), error.trail.served_by, error.trail.leader_id),
            ("E0403", 2, 3)
        );
        assert_eq!(error.next, "palyra node ls");
    }

    #[test]
    fn a_status_without_detail_is_lost_when_the_transport_may_have_made_it() {
        for code in [
            Code::Unavailable,
            Code::Cancelled,
            Code::DeadlineExceeded,
            Code::Unknown,
        ] {
            assert!(
                matches!(
                    classify(&Status::new(code, "x")),
                    Failure::Lost { refused: false, .. }
                ),
                "{code:?}"
            );
        }
        let Failure::Answered(error) = classify(&Status::unimplemented("no")) else {
            panic!("not answered")
        };
        assert_eq!(error.exit_code(), 5);
        let Failure::Answered(error) = classify(&Status::permission_denied("no")) else {
            panic!("not answered")
        };
        assert_eq!(error.exit_code(), 3);
    }

    #[test]
    fn an_alert_about_our_certificate_is_found_deep_in_the_chain() {
        let alert = rustls::Error::AlertReceived(rustls::AlertDescription::UnknownCA);
        let io = std::io::Error::new(std::io::ErrorKind::InvalidData, alert);
        let Failure::Lost { cause, refused } = classify(&Status::from_error(Box::new(io))) else {
            panic!("answered")
        };
        assert!(refused, "{cause}");
        assert!(cause.contains("another cluster"), "{cause}");
    }

    #[test]
    fn a_killed_server_is_told_in_plain_words() {
        let io = std::io::Error::new(
            std::io::ErrorKind::UnexpectedEof,
            "peer closed: https://docs.rs/rustls",
        );
        let Failure::Lost { cause, .. } = classify(&Status::from_error(Box::new(io))) else {
            panic!("answered")
        };
        assert_eq!(cause, "the connection ended early");
    }

    #[test]
    fn classes_read_back_and_unknown_words_are_internal() {
        for class in [
            Class::NotFound,
            Class::Conflict,
            Class::Stale,
            Class::Unknown,
            Class::Unreachable,
        ] {
            assert_eq!(Class::parse(class.as_str()), class);
        }
        assert_eq!(Class::parse("unauthenticated"), Class::Denied);
        assert_eq!(Class::parse("something newer"), Class::Internal);
    }
}
