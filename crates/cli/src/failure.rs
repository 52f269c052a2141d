//! How a command ends when it did not do what was asked: what is printed on standard error, and the exit
//! code.
//!
//! What never lives here: deciding what went wrong. Exit codes come from typed classes, never from words.
//! Exit codes: 0 ok, 1 internal, 2 usage, 3 auth, 4 unreachable, 5 unsupported, 6 policy, 7 precondition,
//! 8 not found, 9 no quorum, 10 stale, 11 conflict, 12 partial, 13 unknown outcome, 14 a check found
//! problems.

use std::fmt;
use std::io::Write;

use palyra_client::{Class, Error, Trail};
use serde::Serialize;

use crate::output::{Format, table};

/// Some of the targets failed, or are not known to have succeeded yet.
pub(crate) const PARTIAL: u8 = 12;
/// It may have been done or not.
pub(crate) const UNKNOWN: u8 = 13;
/// A check found problems.
pub(crate) const PROBLEMS: u8 = 14;

/// The result of a command.
pub(crate) type Result<T = ()> = std::result::Result<T, Failure>;

/// Why a command ends without having done what was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Something went wrong and must be told.
    Told(Box<Told>),
    /// The answer is on standard output already, and the exit code says the rest.
    Silent(u8),
}

/// What is told.
#[derive(Debug)]
pub(crate) struct Told {
    code: String,
    message: String,
    next: String,
    class: &'static str,
    exit: u8,
    retryable: bool,
    trail: Trail,
}

impl Failure {
    /// Something on this machine is wrong or missing.
    pub(crate) fn local(class: Class, message: impl fmt::Display, next: impl fmt::Display) -> Failure {
        Error::local(class, message.to_string(), next.to_string()).into()
    }

    /// Arguments that make no sense together.
    pub(crate) fn usage(message: impl fmt::Display, next: impl fmt::Display) -> Failure {
        Failure::local(Class::Invalid, message, next)
    }

    /// A failed file operation.
    pub(crate) fn file(what: &str, path: &std::path::Path, error: &std::io::Error) -> Failure {
        let class = match error.kind() {
            std::io::ErrorKind::NotFound => Class::NotFound,
            std::io::ErrorKind::PermissionDenied => Class::Denied,
            _ => Class::Internal,
        };
        let next = "check the path, its owner, and the room on the disk";
        Failure::local(class, format!("cannot {what} {}: {error}", path.display()), next)
    }

    /// The process's exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Failure::Told(told) => told.exit,
            Failure::Silent(code) => *code,
        }
    }

    /// Whether the same question may be answered later.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self, Failure::Told(told) if told.retryable)
    }

    /// What went wrong, in one line.
    pub(crate) fn words(&self) -> &str {
        match self {
            Failure::Told(told) => &told.message,
            Failure::Silent(_) => "",
        }
    }

    /// The same failure with another next step, when it is of an unknown outcome: how to look again.
    pub(crate) fn look_again(mut self, command: impl FnOnce(&str) -> String) -> Failure {
        if let Failure::Told(told) = &mut self
            && told.exit == UNKNOWN
        {
            told.next = command(&told.trail.request_id);
        }
        self
    }

    /// Tells it on standard error, in the form that was asked for.
    pub(crate) fn tell(&self, format: Format) {
        let Failure::Told(told) = self else { return };
        // Messages quote what nodes and servers say.
        let text = if format.is_table() {
            table::harmless(&told.to_text())
        } else {
            table::harmless_json(told.to_json())
        };
        // Nothing can be done when standard error is closed.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

impl Told {
    fn to_text(&self) -> String {
        let mut text = format!("error[{}]: {}\n", self.code, self.message);
        if !self.next.is_empty() {
            text += &format!("  next: {}\n", self.next);
        }
        let mut reference = Vec::new();
        if !self.trail.request_id.is_empty() {
            reference.push(format!("request {}", self.trail.request_id));
        }
        if self.trail.served_by != 0 {
            reference.push(format!("replica {}", self.trail.served_by));
        }
        if self.code.starts_with('E') {
            reference.push(format!("docs/errors/{}.md", self.code));
        }
        if !reference.is_empty() {
            text += &format!("  ref: {}\n", reference.join(", "));
        }
        text
    }

    fn to_json(&self) -> String {
        let attempts = self.trail.attempts.iter().map(|attempt| Attempt {
            endpoint: &attempt.endpoint,
            cause: &attempt.cause,
        });
        let error = ErrorObject {
            code: &self.code,
            message: &self.message,
            next: &self.next,
            class: self.class,
            exit_code: self.exit,
            request_id: Some(self.trail.request_id.as_str()).filter(|id| !id.is_empty()),
            served_by: Some(self.trail.served_by).filter(|id| *id != 0),
            leader_id: Some(self.trail.leader_id).filter(|id| *id != 0),
            attempts: attempts.collect(),
        };
        serde_json::to_string(&Envelope { error }).map_or_else(|_| self.to_text(), |text| text + "\n")
    }
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: ErrorObject<'a>,
}

#[derive(Serialize)]
struct ErrorObject<'a> {
    code: &'a str,
    message: &'a str,
    next: &'a str,
    class: &'a str,
    exit_code: u8,
    request_id: Option<&'a str>,
    served_by: Option<u64>,
    leader_id: Option<u64>,
    attempts: Vec<Attempt<'a>>,
}

#[derive(Serialize)]
struct Attempt<'a> {
    endpoint: &'a str,
    cause: &'a str,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let exit = error.exit_code();
        let class = error.class.as_str();
        let Error {
            code,
            message,
            next,
            retryable,
            trail,
            ..
        } = error;
        let next = if exit == UNKNOWN && next.is_empty() && !trail.request_id.is_empty() {
            format!(
                "send the same command again with --request-id {}: it is answered, not repeated",
                trail.request_id
            )
        } else {
            next
        };
        Failure::Told(Box::new(Told {
            code,
            message,
            next,
            class,
            exit,
            retryable,
            trail: *trail,
        }))
    }
}

impl From<palyra_node::Error> for Failure {
    fn from(error: palyra_node::Error) -> Failure {
        let exit = error.exit_code();
        let class = match exit {
            2 => "invalid",
            3 => "denied",
            4 => "unreachable",
            5 => "unsupported",
            6 => "exhausted",
            7 => "precondition",
            8 => "not_found",
            9 => "unavailable",
            11 => "conflict",
            13 => "unknown",
            _ => "internal",
        };
        let (code, message, next) = (error.code, error.message, error.next);
        Failure::Told(Box::new(Told {
            code,
            message,
            next,
            class,
            exit,
            retryable: false,
            trail: Trail::default(),
        }))
    }
}

impl From<std::io::Error> for Failure {
    /// Writing to standard output failed. A reader that went away (`| head`) is no failure.
    fn from(error: std::io::Error) -> Failure {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Failure::Silent(0);
        }
        Failure::local(
            Class::Internal,
            format!("cannot write the answer: {error}"),
            "is there room where it goes?",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(error: Error) -> Box<Told> {
        match Failure::from(error) {
            Failure::Told(told) => told,
            Failure::Silent(code) => panic!("silent {code}"),
        }
    }

    #[test]
    fn text_names_code_cause_next_step_and_reference() {
        let mut error =
            Error::new(Class::NotFound, "E0403", "node web-1 is unknown").with_next("palyra node ls");
        error.trail.served_by = 2;
        let told = told(error);
        assert_eq!(
            told.to_text(),
            "error[E0403]: node web-1 is unknown\n  next: palyra node ls\n  \
             ref: replica 2, docs/errors/E0403.md\n"
        );
        assert_eq!(told.exit, 8);
    }

    #[test]
    fn an_unknown_outcome_prints_the_request_id_and_how_to_ask_again() {
        let mut error = Error::new(Class::Unknown, "E9003", "no answer came");
        error.trail.request_id = "01ARZ3NDEKTSV4RRFFQ69G5FAV".to_owned();
        let failure = Failure::from(error);
        assert_eq!(failure.exit_code(), 13);
        let Failure::Told(told) = failure else {
            panic!("silent")
        };
        let text = told.to_text();
        assert!(text.contains("--request-id 01ARZ3NDEKTSV4RRFFQ69G5FAV"), "{text}");
        assert!(text.contains("ref: request 01ARZ3NDEKTSV4RRFFQ69G5FAV"), "{text}");
    }

    #[test]
    fn json_is_one_object_with_stable_names() {
        let mut error = Error::new(Class::Unreachable, "E9001", "no replica");
        let attempt = palyra_client::Attempt {
            endpoint: "a:1".to_owned(),
            cause: "refused".to_owned(),
        };
        error.trail.attempts.push(attempt);
        let value: serde_json::Value = serde_json::from_str(&told(error).to_json()).unwrap();
        assert_eq!(value["error"]["code"], "E9001");
        assert_eq!(value["error"]["exit_code"], 4);
        assert_eq!(value["error"]["attempts"][0]["endpoint"], "a:1");
        assert_eq!(value["error"]["request_id"], serde_json::Value::Null);
    }

    #[test]
    fn every_class_has_its_exit_code() {
        let expected = [
            (Class::Internal, 1),
            (Class::Invalid, 2),
            (Class::Denied, 3),
            (Class::Unreachable, 4),
            (Class::Unsupported, 5),
            (Class::Exhausted, 6),
            (Class::Precondition, 7),
            (Class::Expired, 7),
            (Class::NotFound, 8),
            (Class::Unavailable, 9),
            (Class::Stale, 10),
            (Class::Conflict, 11),
            (Class::Unknown, 13),
        ];
        for (class, code) in expected {
            assert_eq!(
                Failure::from(Error::new(class, "E1", "x")).exit_code(),
                code,
                "{class:?}"
            );
        }
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        let gone = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert_eq!(Failure::from(gone).exit_code(), 0);
    }
}
