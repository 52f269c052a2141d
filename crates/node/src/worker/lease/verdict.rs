//! What the end of an execution means for its run, and what a scope means for its folders.
//!
//! What never lives here: files and processes. Invariant: a lease that somebody else ended, or that ran out,
//! has no result.

use std::path::PathBuf;

use palyra_proto::run::v1::WorkspaceScope;

use super::folder;
use crate::worker::execute::{Ended, How};

/// Why a lease does not come to its result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trouble {
    pub(super) outcome: &'static str,
    pub(super) code: String,
    pub(super) message: String,
}

impl Trouble {
    pub(super) fn refused(code: &str, message: impl Into<String>) -> Self {
        Self {
            outcome: "refused",
            code: code.to_owned(),
            message: message.into(),
        }
    }
}

/// Whoever ended the lease does not wait for its result; only the worker's own stop is one.
pub(super) fn stopped(why: &str, message: &str) -> Trouble {
    let code = if why == "worker_stopped" { why } else { "lost" };
    Trouble {
        outcome: "failed",
        code: code.to_owned(),
        message: message.to_owned(),
    }
}

/// What a run may write, and what it may read only, of its workspace or working folder.
pub(super) fn paths(scope: &WorkspaceScope) -> Result<(Vec<PathBuf>, Vec<PathBuf>), Trouble> {
    let all = |paths: &[String]| -> Result<Vec<PathBuf>, Trouble> {
        paths
            .iter()
            .map(|path| folder::relative(path).map_err(|why| Trouble::refused("scope", why)))
            .collect()
    };
    let mut allowed = all(&scope.allowed)?;
    if scope.root.is_empty() {
        // The results of a fresh folder go nowhere else.
        allowed.extend(["in", "out"].map(PathBuf::from).into_iter().filter(|path| {
            path.as_os_str() == "out"
                || (scope.allowed.is_empty() && !scope.read_only.iter().any(|one| one == "in"))
        }));
        allowed.sort();
        allowed.dedup();
    }
    Ok((allowed, all(&scope.read_only)?))
}

pub(super) fn trimmed(mut stdout: Vec<u8>) -> Vec<u8> {
    let length = stdout.trim_ascii_end().len();
    stdout.truncate(length);
    stdout
}

/// What an end means; the code is empty for a success.
pub(super) fn verdict(ended: &Ended, out_of_memory: bool) -> Trouble {
    let failed = |code: &str, message: String| Trouble {
        outcome: "failed",
        code: code.to_owned(),
        message,
    };
    match &ended.how {
        How::Refused { code, .. } if code == "lease_over" => stopped("lost", ""),
        How::Refused { code, message } if code == "program_not_started" => failed(code, message.clone()),
        How::Refused { code, message } => Trouble::refused(code, message.clone()),
        How::Lost => failed(
            "warden_lost",
            "the warden ended without a word; what it did is not known".to_owned(),
        ),
        How::Killed { why, message } => match why.as_str() {
            "deadline" | "supervisor" => stopped("lost", message),
            "stopped" => stopped(message, "it was stopped while it ran"),
            "disk" => failed("disk_exceeded", message.clone()),
            "result" => failed("output_too_large", message.clone()),
            _ => failed("timeout", message.clone()),
        },
        How::Exited(_) if out_of_memory => {
            failed("memory_exceeded", "it used more memory than it may".to_owned())
        }
        How::Exited(0) if crate::exec::is_json(&trimmed(ended.stdout.clone())) => Trouble {
            outcome: "succeeded",
            code: String::new(),
            message: String::new(),
        },
        How::Exited(0) => failed(
            "output_not_json",
            "it ended well, but its output is not one JSON value".to_owned(),
        ),
        How::Exited(75) => failed("temporary_failure", "exit code 75: try again later".to_owned()),
        How::Exited(code) if *code < 0 => failed("program_failed", format!("ended by signal {}", -code)),
        How::Exited(code) => failed("program_failed", format!("exit code {code}")),
    }
}
