//! The agent as a background process: start, stop, status, and the unit file that starts it with the machine.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Error, Kind, Result};

/// How to start the agent.
#[derive(Debug, Clone)]
pub struct StartConfig {
    /// The node's data folder.
    pub data_dir: PathBuf,
    /// The binary to execute; usually `std::env::current_exe()`.
    pub program: PathBuf,
    /// Further arguments for `node run`, such as `--capabilities FILE`.
    pub extra_args: Vec<OsString>,
    /// How long to wait until the agent answers on its socket.
    pub wait: Duration,
}

/// The arguments with which [`start`] and the unit execute the binary: `node run --data-dir D [--detached] …`.
pub fn run_arguments(data_dir: &Path, detached: bool, extra: &[OsString]) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["node".into(), "run".into(), "--data-dir".into(), data_dir.into()];
    if detached {
        arguments.push("--detached".into());
    }
    arguments.extend_from_slice(extra);
    arguments
}

/// What the agent says about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The process id.
    pub pid: u32,
    /// Since its start.
    pub uptime_ms: u64,
    /// The node's id.
    pub device_id: String,
    /// The node's name.
    pub name: String,
    /// `connected`, `connecting`, `stopping`.
    pub state: String,
    /// The replica that holds the session; 0 when none.
    pub replica_id: u64,
    /// Its address.
    pub endpoint: String,
    /// The session's epoch; 0 when none.
    pub epoch: u64,
    /// `stream` or `poll`.
    pub transport: String,
    /// When the replica last said anything (Unix ms); 0 when it never did.
    pub last_heard_at_ms: u64,
    /// Dispatches that run or wait for a slot.
    pub running: Vec<String>,
    /// Dispatches that wait for the person at the machine.
    pub mediation: Vec<String>,
    /// Results that the control plane hasn't accepted yet.
    pub unreported: Vec<String>,
    /// Capabilities on offer.
    pub capabilities: Vec<String>,
    /// Hex SHA-256 of the certificate in use.
    pub fingerprint: String,
    /// End of its validity (Unix ms).
    pub not_after_ms: u64,
    /// The last failure, empty when none.
    pub last_error: String,
}

/// The state of the background process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Whether a process of this folder is alive.
    pub running: bool,
    /// What it says; absent when it isn't alive or doesn't answer.
    pub agent: Option<AgentStatus>,
    /// Where its output goes.
    pub log_file: PathBuf,
    /// What starts it with the machine: a unit's path, or absent.
    pub installed: Option<PathBuf>,
}

/// Who the unit is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// systemd's user instance.
    User,
    /// The machine; needs root.
    System,
}

/// What [`install`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// The file that was written.
    pub path: PathBuf,
    /// True for a systemd unit, false for a plain start marker because systemd isn't there.
    pub systemd: bool,
    /// What to type next.
    pub next: String,
}

/// Starts the agent in the background and answers when it does. Refuses when one runs already.
pub async fn start(config: StartConfig) -> Result<AgentStatus> {
    Err(Error::new(Kind::Internal, "N0001", config.data_dir.display().to_string(), ""))
}

/// Ends the agent: SIGTERM, and SIGKILL after `wait`. Answers its process id, or `None` when none ran. Never signals a
/// process that isn't this folder's agent.
pub async fn stop(data_dir: &Path, wait: Duration) -> Result<Option<u32>> {
    let _ = wait;
    Err(Error::new(Kind::Internal, "N0001", data_dir.display().to_string(), ""))
}

/// [`stop`], then [`start`].
pub async fn restart(config: StartConfig, stop_wait: Duration) -> Result<AgentStatus> {
    stop(&config.data_dir, stop_wait).await?;
    start(config).await
}

/// Asks for the state of the agent.
pub async fn status(data_dir: &Path) -> Result<ServiceStatus> {
    Err(Error::new(Kind::Internal, "N0001", data_dir.display().to_string(), ""))
}

/// Has the agent started with the machine: a systemd unit where systemd runs, else a start marker in the folder.
pub fn install(config: &StartConfig, scope: Scope) -> Result<Installed> {
    let _ = scope;
    Err(Error::new(Kind::Internal, "N0001", config.data_dir.display().to_string(), ""))
}

/// Removes what [`install`] wrote, and nothing else. Answers what was removed.
pub fn uninstall(data_dir: &Path) -> Result<Option<PathBuf>> {
    Err(Error::new(Kind::Internal, "N0001", data_dir.display().to_string(), ""))
}
