//! The one mapping from the control plane's errors to gRPC.
//!
//! Invariants: every class has one gRPC code; the message is `E0403: thing and cause; next step`; the
//! machine-readable detail travels in the trailer `palyra-error-bin`; the source of an internal error goes to
//! the log only.

use bytes::Bytes;
use palyra_control::{Class, Error};
use palyra_proto::common::v1::ErrorDetail;
use prost::Message as _;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

/// Where the encoded `ErrorDetail` travels.
pub(crate) const TRAILER: &str = "palyra-error-bin";
/// Longest message in a status; a trailer must fit the peer's header limit.
const MESSAGE_MAX: usize = 2048;

/// The status for an error, as replica `served_by` answers it.
pub(crate) fn status(error: &Error, served_by: u64) -> Status {
    if let Error::Internal(source) = error {
        tracing::error!(source, "internal error");
    }
    let detail = detail(error, served_by);
    let text = if detail.next.is_empty() {
        format!("{}: {}", detail.code, detail.message)
    } else {
        format!("{}: {}; {}", detail.code, detail.message, detail.next)
    };
    let mut metadata = MetadataMap::new();
    metadata.insert_bin(TRAILER, MetadataValue::from_bytes(&detail.encode_to_vec()));
    Status::with_details_and_metadata(code(error.class()), cut(&text), Bytes::new(), metadata)
}

/// What gRPC itself refuses before a handler sees it, as the error that it is for the caller; nothing when
/// the status is one of ours already, or about the connection.
pub(crate) fn framing(status: &Status) -> Option<Error> {
    if status.metadata().contains_key(TRAILER) {
        return None;
    }
    match status.code() {
        Code::OutOfRange if status.message().contains("message length too large") => {
            let next = "send less: a payload may have 512 KiB, and lists have pages";
            Some(Error::invalid(
                "request",
                "the message is larger than this listener takes",
                next,
            ))
        }
        Code::Internal if status.message().contains("failed to decode Protobuf message") => {
            let next = "send a message of this release's proto files, whole";
            Some(Error::invalid("request", cut(status.message()), next))
        }
        _ => None,
    }
}

/// The machine-readable part.
pub(crate) fn detail(error: &Error, served_by: u64) -> ErrorDetail {
    let leader_id = match error {
        Error::Unavailable { leader_hint } => leader_hint.unwrap_or(0),
        _ => 0,
    };
    let pace = error.pace();
    ErrorDetail {
        code: error.code(),
        message: cut(&error.to_string()),
        next: cut(&error.next()),
        retryable: error.is_retryable(),
        unknown: error.is_unknown(),
        leader_id,
        served_by,
        class: wire_class(error.class()).to_owned(),
        retry_after_ms: pace.map_or(0, |pace| crate::convert::millis(pace.after)),
        spread_ms: pace.map_or(0, |pace| crate::convert::millis(pace.spread)),
    }
}

fn code(class: Class) -> Code {
    match class {
        Class::NotFound => Code::NotFound,
        Class::Conflict => Code::AlreadyExists,
        Class::Precondition | Class::Expired => Code::FailedPrecondition,
        Class::Denied => Code::PermissionDenied,
        Class::Unauthenticated => Code::Unauthenticated,
        Class::Invalid => Code::InvalidArgument,
        Class::Exhausted => Code::ResourceExhausted,
        Class::Unavailable | Class::Stale => Code::Unavailable,
        Class::Unknown => Code::Unknown,
        Class::Internal => Code::Internal,
    }
}

/// The wire's list of classes has no word of its own for a certificate that is refused.
fn wire_class(class: Class) -> &'static str {
    match class {
        Class::Unauthenticated => Class::Denied.as_str(),
        other => other.as_str(),
    }
}

/// At most [`MESSAGE_MAX`] bytes of a text.
fn cut(text: &str) -> String {
    let mut end = text.len().min(MESSAGE_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use palyra_control::Refusal;

    fn decoded(status: &Status) -> ErrorDetail {
        let bytes = status.metadata().get_bin(TRAILER).unwrap().to_bytes().unwrap();
        ErrorDetail::decode(bytes).unwrap()
    }

    /// One error of each class with the gRPC code that it must have.
    fn one_of_each() -> Vec<(Error, Code, &'static str)> {
        let invalid = Error::Invalid {
            field: "device_id",
            cause: "it is no ULID".into(),
            next: "send one".into(),
        };
        vec![
            (Error::not_found("node", "x"), Code::NotFound, "not_found"),
            (
                Refusal::ShownOnce {
                    what: "code C1".into(),
                }
                .into(),
                Code::AlreadyExists,
                "conflict",
            ),
            (
                Refusal::Signing { cause: "over".into() }.into(),
                Code::FailedPrecondition,
                "precondition",
            ),
            (Refusal::UnknownNonce.into(), Code::FailedPrecondition, "expired"),
            (Refusal::WrongJoinProof.into(), Code::PermissionDenied, "denied"),
            (
                Refusal::NotYetValid {
                    not_before_ms: 2,
                    now_ms: 1,
                }
                .into(),
                Code::Unauthenticated,
                "denied",
            ),
            (invalid, Code::InvalidArgument, "invalid"),
            (
                Error::Busy { what: "sessions" },
                Code::ResourceExhausted,
                "exhausted",
            ),
            (
                Error::Unavailable { leader_hint: Some(3) },
                Code::Unavailable,
                "unavailable",
            ),
            (
                Error::Unknown {
                    request_id: "R".into(),
                },
                Code::Unknown,
                "unknown",
            ),
            (Error::Stale { age_ms: 7000 }, Code::Unavailable, "stale"),
            (
                Error::Internal("the secret source".into()),
                Code::Internal,
                "internal",
            ),
        ]
    }

    #[test]
    fn every_class_has_its_code_and_word() {
        let mut classes: Vec<Class> = Vec::new();
        for (error, expected, word) in one_of_each() {
            let status = status(&error, 2);
            let detail = decoded(&status);
            assert_eq!(status.code(), expected, "{error:?}");
            assert_eq!((detail.class.as_str(), detail.served_by), (word, 2), "{error:?}");
            assert_eq!(detail.code, error.code());
            assert!(
                status.message().starts_with(&format!("{}: ", detail.code)),
                "{}",
                status.message()
            );
            assert!(!detail.message.is_empty() && !detail.next.is_empty(), "{error:?}");
            classes.push(error.class());
        }
        classes.sort_unstable();
        classes.dedup();
        assert_eq!(classes.len(), 12, "a class is missing from the list above");
    }

    #[test]
    fn retries_and_unknown_outcomes_are_marked() {
        for (error, _, word) in one_of_each() {
            let detail = decoded(&status(&error, 1));
            assert_eq!(
                detail.retryable,
                matches!(word, "unavailable" | "unknown" | "stale" | "exhausted"),
                "{word}"
            );
            assert_eq!(detail.unknown, word == "unknown");
        }
        assert_eq!(
            decoded(&status(&Error::Unavailable { leader_hint: Some(3) }, 1)).leader_id,
            3
        );
    }

    #[test]
    fn the_source_of_an_internal_error_stays_inside() {
        let status = status(&Error::Internal("the secret source".into()), 1);
        assert!(!status.message().contains("secret") && !decoded(&status).message.contains("secret"));
    }

    #[test]
    fn what_grpc_refuses_by_itself_gets_a_code_too() {
        let large =
            Status::out_of_range("Error, decoded message length too large: found 9 bytes, the limit is: 8");
        let broken = Status::internal("failed to decode Protobuf message: invalid wire type value: 7");
        for refused in [large, broken] {
            let error = framing(&refused).unwrap();
            assert_eq!(decoded(&status(&error, 3)).code, "E1014", "{error:?}");
        }
        assert_eq!(framing(&Status::internal("h2 protocol error")), None);
        assert_eq!(
            framing(&status(
                &Error::Internal("failed to decode Protobuf message".into()),
                1
            )),
            None
        );
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let error = Error::not_found("node", "ä".repeat(5000));
        assert!(decoded(&status(&error, 1)).message.len() <= MESSAGE_MAX);
    }
}
