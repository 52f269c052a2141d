//! What goes wrong on a node, said so that its owner can act: the thing, the cause, the next command.
//!
//! Codes that begin with `N` are made here; others (`E…`) come from the control plane and are passed on
//! unchanged.

use std::fmt;

use palyra_client::Class;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The sort of failure, which decides the exit code of the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A defect, or a machine that doesn't do what it must (a full disk, no `/proc`).
    Internal,
    /// The caller or the owner's configuration asks for something that makes no sense.
    Usage,
    /// Wrong secret, no credential, or a revoked one.
    Auth,
    /// No replica could be reached.
    Unreachable,
    /// The control plane speaks another protocol, or this machine lacks what is needed.
    Unsupported,
    /// Refused by policy or by a person.
    Policy,
    /// Something must be done first, or was done already.
    Precondition,
    /// The named thing does not exist.
    NotFound,
    /// The replicas have no quorum.
    NoQuorum,
    /// Somebody else holds what is asked for.
    Conflict,
    /// It may have happened or not.
    Unknown,
}

/// A failure: the stable code, the thing and the cause, and what to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The sort of failure.
    pub kind: Kind,
    /// Stable: `N0101` (made by the node) or `E0403` (by the control plane).
    pub code: String,
    /// The thing and the cause, one sentence.
    pub message: String,
    /// What to do now, often a command. Empty when nothing helps.
    pub next: String,
}

impl Error {
    /// Makes a failure of this node.
    pub fn new(kind: Kind, code: &str, message: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            kind,
            code: code.to_owned(),
            message: message.into(),
            next: next.into(),
        }
    }

    /// The exit code of the command that failed: 1 internal, 2 usage, 3 auth, 4 unreachable, 5 unsupported, 6
    /// policy, 7 precondition, 8 not found, 9 no quorum, 11 conflict, 13 unknown outcome.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Internal => 1,
            Kind::Usage => 2,
            Kind::Auth => 3,
            Kind::Unreachable => 4,
            Kind::Unsupported => 5,
            Kind::Policy => 6,
            Kind::Precondition => 7,
            Kind::NotFound => 8,
            Kind::NoQuorum => 9,
            Kind::Conflict => 11,
            Kind::Unknown => 13,
        }
    }

    /// A failed file operation: names the path and what the system says.
    pub(crate) fn io(what: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        let next = match error.kind() {
            std::io::ErrorKind::StorageFull => "free some space on this disk and try again",
            std::io::ErrorKind::PermissionDenied => {
                "check who owns the folder, or choose another with --data-dir"
            }
            _ => "",
        };
        Self::new(
            Kind::Internal,
            "N0001",
            format!("cannot {what} {}: {error}", path.display()),
            next,
        )
    }
}

impl From<palyra_client::Error> for Error {
    fn from(error: palyra_client::Error) -> Self {
        let kind = match error.class {
            Class::NotFound => Kind::NotFound,
            Class::Conflict => Kind::Conflict,
            Class::Precondition | Class::Expired => Kind::Precondition,
            Class::Denied => Kind::Auth,
            Class::Invalid => Kind::Usage,
            Class::Exhausted => Kind::Policy,
            Class::Unavailable | Class::Stale => Kind::NoQuorum,
            Class::Unknown => Kind::Unknown,
            Class::Unreachable => Kind::Unreachable,
            Class::Unsupported => Kind::Unsupported,
            Class::Internal => Kind::Internal,
        };
        Self {
            kind,
            code: error.code,
            message: error.message,
            next: error.next,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)?;
        if self.next.is_empty() {
            Ok(())
        } else {
            write!(f, ". Next: {}", self.next)
        }
    }
}

impl std::error::Error for Error {}
