//! The agent as a background process: start, stop, status. What starts it with the machine is in `unit`.
//!
//! What never lives here: the agent itself (see `run`).
//!
//! Invariants: only a process that holds the folder's lock and whose start time is the recorded one is ever
//! signalled; `start` answers only when the agent answers, and shows why when it ends instead.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use crate::home::open_append;
use crate::lock::{FolderLock, owner};
use crate::socket::{self, Answer, Question};
use crate::{Error, Home, Kind, Result};

pub use crate::unit::{Installed, Removed, Scope, install, uninstall};

/// A log that is longer is put aside, at start and by the running agent; three old ones are kept.
const LOG_LIMIT: u64 = 8 << 20;
const OLD_LOGS: u32 = 3;
/// With which options the agent was started last.
const STARTED: &str = "run/started.json";
/// How long an agent that answers may take to be connected, or to end because it is revoked, before it is left
/// to itself.
const SETTLE: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(50);
const TAIL: usize = 1500;

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
    /// Its address, or the one that is being tried.
    pub endpoint: String,
    /// The session's epoch; 0 when none.
    pub epoch: u64,
    /// `quic`, `stream` or `poll`.
    pub transport: String,
    /// Why the session is not on QUIC; empty when it is, or when the owner does not want it to be.
    #[serde(default)]
    pub fallback: String,
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
    /// How many renewals of the certificate were taken, as the cluster counts them.
    #[serde(default)]
    pub renewals: u64,
    /// When the last one brought a certificate (Unix ms); 0 when none did since the agent's start.
    #[serde(default)]
    pub renewed_at_ms: u64,
    /// Why the certificate was not renewed, empty when it was.
    #[serde(default)]
    pub certificate_problem: String,
    /// The last failure, empty when none.
    pub last_error: String,
    /// What there is of a worker: whether it is admitted, how many leases it holds; empty when it is none.
    #[serde(default)]
    pub worker: String,
}

/// The state of the background process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Whether an agent holds this folder.
    pub running: bool,
    /// What it says; absent when none runs or it doesn't answer.
    pub agent: Option<AgentStatus>,
    /// Where its output goes.
    pub log_file: PathBuf,
    /// What starts it with the machine: a unit's path, or absent.
    pub installed: Option<PathBuf>,
}

/// Starts the agent in the background and answers when it does and is connected; after three seconds also when it
/// is not.
///
/// Errors: one runs already, no identity, or the agent ended at once: the message has the end of its log.
pub async fn start(config: StartConfig) -> Result<AgentStatus> {
    let home = Home::open(&config.data_dir)?;
    if FolderLock::agent(&home)?.is_none() {
        let pid = owner(&home)?.map_or_else(String::new, |pid| format!(" as process {pid}"));
        let message = format!("an agent runs in {} already{pid}", home.dir().display());
        return Err(Error::new(
            Kind::Conflict,
            "N0107",
            message,
            "see it with: palyra node status",
        ));
    }
    let options: Vec<String> = config
        .extra_args
        .iter()
        .map(|option| option.to_string_lossy().into_owned())
        .collect();
    home.write_json(STARTED, &options, 0o600)?;
    let log_path = home.log_file();
    rotate(&log_path)?;
    let log = open_append(&log_path)?;
    let begins_at = log.metadata().map(|meta| meta.len()).unwrap_or(0);
    let mut child = spawn(&config, &home, log)?;
    let until = Instant::now() + config.wait;
    let mut settled_at = None;
    while Instant::now() < until {
        if let Ok(Answer::Status(status)) = socket::ask(&home, &Question::Status).await {
            let settled_at = *settled_at.get_or_insert_with(|| until.min(Instant::now() + SETTLE));
            if status.state == "connected" || Instant::now() + LOOK_EVERY >= settled_at {
                return Ok(*status);
            }
        }
        let ended = child
            .try_wait()
            .map_err(|error| Error::io("watch", &config.program, &error))?;
        if let Some(status) = ended {
            let message = format!(
                "the agent ended at once ({status}): {}",
                tail(&log_path, begins_at)
            );
            return Err(Error::new(
                kind_of(status.code()),
                "N0109",
                message,
                "correct this, then: palyra node start",
            ));
        }
        sleep(LOOK_EVERY).await;
    }
    let message = format!(
        "the agent (process {}) did not answer in time",
        child.id().unwrap_or(0)
    );
    Err(Error::new(
        Kind::Unknown,
        "N0108",
        message,
        format!("see its log: {}", log_path.display()),
    ))
}

fn spawn(config: &StartConfig, home: &Home, log: File) -> Result<Child> {
    let errors = log
        .try_clone()
        .map_err(|error| Error::io("open", &home.log_file(), &error))?;
    let mut command = Command::new(&config.program);
    command
        .args(["node", "run", "--data-dir"])
        .arg(home.dir())
        .arg("--detached")
        .args(&config.extra_args)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .kill_on_drop(false);
    command
        .spawn()
        .map_err(|error| Error::io("start", &config.program, &error))
}

fn kind_of(code: Option<i32>) -> Kind {
    match code {
        Some(2) => Kind::Usage,
        Some(3) => Kind::Auth,
        Some(7) => Kind::Precondition,
        Some(11) => Kind::Conflict,
        _ => Kind::Internal,
    }
}

/// Puts a long log aside: `agent.log.1` is the youngest of the old ones. Answers whether it did.
pub(crate) fn rotate(log: &Path) -> Result<bool> {
    let length = std::fs::metadata(log).map(|meta| meta.len()).unwrap_or(0);
    if length < LOG_LIMIT {
        return Ok(false);
    }
    let old = |number: u32| log.with_extension(format!("log.{number}"));
    for number in (1..OLD_LOGS).rev() {
        if old(number).exists() {
            std::fs::rename(old(number), old(number + 1))
                .map_err(|error| Error::io("rename", &old(number), &error))?;
        }
    }
    std::fs::rename(log, old(1)).map_err(|error| Error::io("rename", log, &error))?;
    Ok(true)
}

/// The end of what was written to the log since `from`.
fn tail(log: &Path, from: u64) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let new = bytes
        .get(usize::try_from(from).unwrap_or(0)..)
        .unwrap_or_default();
    let text = String::from_utf8_lossy(&new[new.len().saturating_sub(TAIL)..]);
    let text = text.trim();
    if text.is_empty() {
        "it wrote nothing".to_owned()
    } else {
        text.to_owned()
    }
}

/// Ends the agent: SIGTERM, and SIGKILL after `wait`. Answers its process id, or `None` when none ran. Never
/// signals a process that isn't this folder's agent.
///
/// Errors: somebody holds the folder but can't be told to be its agent.
pub async fn stop(data_dir: &Path, wait: Duration) -> Result<Option<u32>> {
    let home = Home::open(data_dir)?;
    let Some(pid) = owner(&home)? else {
        if FolderLock::agent(&home)?.is_some() {
            return Ok(None);
        }
        let message = format!(
            "a process holds {} and is not its recorded agent",
            home.dir().display()
        );
        return Err(Error::new(
            Kind::Conflict,
            "N0110",
            message,
            "is a pairing going on? Otherwise find it: fuser",
        ));
    };
    send(pid, Signal::SIGTERM)?;
    if released(&home, wait).await? {
        return Ok(Some(pid));
    }
    // Asked anew: in the meantime the process id may have become somebody else's.
    if owner(&home)? == Some(pid) {
        tracing::warn!(pid, "the agent did not end in time and is killed");
        send(pid, Signal::SIGKILL)?;
    }
    if released(&home, Duration::from_secs(5)).await? {
        return Ok(Some(pid));
    }
    Err(Error::new(
        Kind::Internal,
        "N0111",
        format!("process {pid} does not end"),
        "is its disk hanging? see: dmesg",
    ))
}

fn send(pid: u32, signal: Signal) -> Result<()> {
    let failed = |why: String| {
        Error::new(
            Kind::Internal,
            "N0001",
            format!("cannot signal process {pid}: {why}"),
            "",
        )
    };
    let target = i32::try_from(pid).map_err(|error| failed(error.to_string()))?;
    match kill(Pid::from_raw(target), signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(error) => Err(failed(error.to_string())),
    }
}

async fn released(home: &Home, wait: Duration) -> Result<bool> {
    let until = Instant::now() + wait;
    loop {
        if FolderLock::agent(home)?.is_some() {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        sleep(LOOK_EVERY).await;
    }
}

/// [`stop`], then [`start`]; without options of its own with those of the last start.
pub async fn restart(mut config: StartConfig, stop_wait: Duration) -> Result<AgentStatus> {
    stop(&config.data_dir, stop_wait).await?;
    if config.extra_args.is_empty() {
        let before: Option<Vec<String>> = Home::open(&config.data_dir)?.read_json(STARTED)?;
        config.extra_args = before
            .unwrap_or_default()
            .into_iter()
            .map(OsString::from)
            .collect();
    }
    start(config).await
}

/// Asks for the state of the agent.
///
/// Errors: no such folder. An agent that doesn't answer is no error: `running` is true and `agent` absent.
pub async fn status(data_dir: &Path) -> Result<ServiceStatus> {
    let home = Home::open(data_dir)?;
    let running = FolderLock::agent(&home)?.is_none();
    let agent = match socket::ask(&home, &Question::Status).await {
        Ok(Answer::Status(status)) if running => Some(*status),
        _ => None,
    };
    let installed = crate::unit::installed(&home)?.map(|unit| unit.path);
    Ok(ServiceStatus {
        running,
        agent,
        log_file: home.log_file(),
        installed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::script;

    fn config(home: &Home, program: PathBuf) -> StartConfig {
        let data_dir = home.dir().to_path_buf();
        StartConfig {
            data_dir,
            program,
            extra_args: vec![],
            wait: Duration::from_secs(60),
        }
    }

    #[tokio::test]
    async fn an_agent_that_ends_at_once_is_explained_by_its_log() {
        let (dir, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let home = Home::create(dir.path()).unwrap();
        std::fs::write(home.log_file(), "an old line\n").unwrap();
        let program = script(bin.path(), "program", "echo \"no luck: $*\" >&2; exit 7");
        let error = start(config(&home, program)).await.unwrap_err();
        assert_eq!((error.code.as_str(), error.exit_code()), ("N0109", 7));
        let arguments = format!("no luck: node run --data-dir {} --detached", home.dir().display());
        assert!(
            error.message.contains(&arguments) && !error.message.contains("old line"),
            "{error}"
        );
        assert_eq!(stop(home.dir(), Duration::from_secs(1)).await.unwrap(), None);
        let status = status(home.dir()).await.unwrap();
        assert!(!status.running && status.agent.is_none());
    }

    #[tokio::test]
    async fn a_restart_keeps_the_options_of_the_start() {
        let (dir, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let home = Home::create(dir.path()).unwrap();
        let program = script(bin.path(), "program", "echo \"with: $*\" >&2; exit 7");
        let with = |options: &[&str]| StartConfig {
            extra_args: options.iter().map(OsString::from).collect(),
            ..config(&home, program.clone())
        };
        start(with(&["--label", "a=b"])).await.unwrap_err();
        for (options, expected) in [(&[][..], "--label a=b"), (&["--label", "c=d"][..], "--label c=d")] {
            let error = restart(with(options), Duration::from_secs(1)).await.unwrap_err();
            assert!(error.message.contains(expected), "{error}");
        }
    }

    #[tokio::test]
    async fn a_foreign_holder_of_the_folder_is_not_signalled() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::create(dir.path()).unwrap();
        let _lock = FolderLock::agent(&home).unwrap().unwrap();
        // The lock is held, but the record names a process of another time.
        let mut other = crate::lock::identify(std::process::id()).unwrap();
        other.ticks += 1;
        home.write_json("run/agent.pid", &crate::lock::Owner(other), 0o644)
            .unwrap();
        assert_eq!(
            stop(home.dir(), Duration::from_secs(1)).await.unwrap_err().code,
            "N0110"
        );
        let error = start(config(&home, PathBuf::from("/bin/true")))
            .await
            .unwrap_err();
        assert_eq!((error.code.as_str(), error.exit_code()), ("N0107", 11));
    }

    #[test]
    fn long_logs_are_put_aside_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("agent.log");
        for round in 0..5 {
            let file = File::create(&log).unwrap();
            file.set_len(LOG_LIMIT + round).unwrap();
            assert!(rotate(&log).unwrap());
            assert!(!log.exists());
        }
        let mut left: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        std::fs::write(&log, "short").unwrap();
        assert!(!rotate(&log).unwrap() && log.exists());
        assert_eq!(left, ["agent.log.1", "agent.log.2", "agent.log.3"]);
        assert_eq!(
            std::fs::metadata(dir.path().join("agent.log.1")).unwrap().len(),
            LOG_LIMIT + 4
        );
    }
}
