//! How `palyrad` ends when it can't go on: an exit code for the supervisor, a stable code with a page in
//! `docs/errors`, and a sentence.

use std::fmt;
use std::process::ExitCode;

/// What kind of end it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// A fault of ours, or of the machine.
    Internal,
    /// The command line or configuration is wrong.
    Usage,
    /// A key, token or certificate is refused.
    Auth,
    /// No replica of the cluster can be reached.
    Unreachable,
    /// The data are of a newer release.
    Unsupported,
    /// A file of the data folder, or what the cluster has, is not as it must be.
    Precondition,
    /// Somebody else has it already.
    Conflict,
    /// A check found problems.
    Problems,
    /// An address can't be listened on.
    Address,
    /// The data folder is in use by another process.
    InUse,
    /// The data folder is of another cluster or replica.
    Foreign,
    /// The database is damaged or can't be opened.
    Damaged,
    /// The replica was removed from its cluster.
    Removed,
}

impl Code {
    /// The exit code, as in the documentation.
    fn exit(self) -> u8 {
        match self {
            Code::Internal => 1,
            Code::Usage => 2,
            Code::Auth => 3,
            Code::Unreachable => 4,
            Code::Unsupported => 5,
            Code::Precondition
            | Code::Address
            | Code::InUse
            | Code::Foreign
            | Code::Damaged
            | Code::Removed => 7,
            Code::Conflict => 11,
            Code::Problems => 14,
        }
    }

    /// The stable code.
    fn as_str(self) -> &'static str {
        match self {
            Code::Internal => "E9100",
            Code::Usage => "E9101",
            Code::Auth => "E9102",
            Code::Unreachable => "E9103",
            Code::Unsupported => "E9104",
            Code::Precondition => "E9105",
            Code::Conflict => "E9106",
            Code::Problems => "E9107",
            Code::Address => "E9108",
            Code::InUse => "E9109",
            Code::Foreign => "E9110",
            Code::Damaged => "E9111",
            Code::Removed => "E9112",
        }
    }
}

/// Why the process ends.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    code: Code,
    message: String,
}

impl Failure {
    /// Ends with `code`; the message names the thing, the cause and the next step.
    pub(crate) fn new(code: Code, message: impl fmt::Display) -> Failure {
        Failure {
            code,
            message: message.to_string(),
        }
    }

    /// For the process.
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code.exit())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.message)
    }
}

impl From<crate::config::ConfigError> for Failure {
    fn from(error: crate::config::ConfigError) -> Failure {
        Failure::new(Code::Usage, error)
    }
}

impl From<crate::files::FilesError> for Failure {
    fn from(error: crate::files::FilesError) -> Failure {
        Failure::new(Code::Precondition, error)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::new(Code::Internal, format!("{error:#}"))
    }
}
