//! The agent: keeps one session with the control plane, on whichever replica is there, until it is told to stop.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::{Error, Kind, Result};

/// How to run the agent.
#[derive(Debug, Clone, Default)]
pub struct RunConfig {
    /// The node's data folder; see [`crate::home::default_dir`].
    pub data_dir: PathBuf,
    /// Capability files in addition to those that `node.toml` names.
    pub capabilities: Vec<PathBuf>,
    /// Labels in addition to those of `node.toml`; these win.
    pub labels: BTreeMap<String, String>,
    /// Started by [`crate::service::start`]: become the leader of a session of its own.
    pub detached: bool,
}

/// Why the agent ended without a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RunEnd {
    /// SIGTERM or SIGINT.
    Stopped,
}

/// Runs the agent until SIGTERM or SIGINT.
///
/// Errors: no identity, an agent that runs already in this folder, a broken configuration, revocation (exit code 3),
/// another agent with the same identity (exit code 11).
pub async fn run(config: RunConfig) -> Result<RunEnd> {
    let _ = config;
    Err(Error::new(Kind::Internal, "N0001", "not here yet", ""))
}
