//! How `palyrad` ends when it can't go on: an exit code and a sentence.

use std::fmt;
use std::process::ExitCode;

/// Exit codes of design and documentation; the supervisor of a replica reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Code {
    /// A fault of ours, or of the machine.
    Internal = 1,
    /// The command line or configuration is wrong.
    Usage = 2,
    /// A key, token or certificate is refused.
    Auth = 3,
    /// No replica of the cluster can be reached.
    Unreachable = 4,
    /// The data are of a newer release.
    Unsupported = 5,
    /// The data folder, the port or the disk is not as it must be.
    Precondition = 7,
    /// Somebody else has it already.
    Conflict = 11,
    /// A check found problems.
    Problems = 14,
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
        ExitCode::from(self.code as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
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
