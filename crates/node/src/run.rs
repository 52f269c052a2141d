//! `palyra node run`: the agent as a process: folder, lock, configuration, socket, signals.
//!
//! What never lives here: logging setup (the binary's) and the agent's loop (see `agent`).
//!
//! Invariants: everything that can be wrong with folder, identity and configuration is found before the first
//! connection; programs that an earlier agent left are ended before anything begins.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use palyra_proto::node::v1 as wire;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::agent::{Agent, Shutdown};
use crate::builtin::platform;
use crate::capability::{self, Capability};
use crate::carrier::{Carrier, Choice};
use crate::home::{Home, NodeConfig, NodeRecord, open_append};
use crate::jobs::Jobs;
use crate::ledger::{Ledger, Started};
use crate::link::{Link, TlsLink};
use crate::lock::{FolderLock, is_group_left, owner, record_owner};
use crate::lost_after::lost_after;
use crate::mediation::Desk;
use crate::route::Route;
use crate::service::{AgentStatus, rotate};
use crate::work::Worker;
use crate::worker;
use crate::{Error, Kind, Result, socket};

/// How often, and how far apart, the folder is tried that somebody holds who is no agent.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// How often the length of the log is looked at.
const LOG_LOOK: Duration = Duration::from_secs(30);
/// The most labels of a node.
const LABELS_MAX: usize = 32;
/// The most dispatches that the control plane gives to one node at a time.
const MAX_HELD_AT_ONCE: u32 = 256;
/// The longest name or value of a label, in bytes.
const LABEL_MAX: usize = 128;

/// How to run the agent.
#[derive(Debug, Clone, Default)]
pub struct RunConfig {
    /// The node's data folder; see [`crate::home::default_dir`].
    pub data_dir: PathBuf,
    /// Capability files in addition to those that `node.toml` names.
    pub capabilities: Vec<PathBuf>,
    /// Labels in addition to those of `node.toml`; these win.
    pub labels: BTreeMap<String, String>,
    /// How long the node may be away before it counts as gone, as text; wins over `node.toml`.
    pub lost_after: Option<String>,
    /// What carries the sessions: `auto`, `quic` or `grpc`; what `node.toml` says when absent.
    pub transport: Option<String>,
    /// Be a worker: with what `[worker]` of `node.toml` says, or this file.
    pub worker: Option<WorkerConfig>,
    /// Started by [`crate::service::start`]: become the leader of a session of its own, so that the
    /// terminal's end is not the agent's.
    pub detached: bool,
}

/// Where the description of a worker is.
#[derive(Debug, Clone, Default)]
pub struct WorkerConfig {
    /// A file of its own; absent: `[worker]` of `node.toml`.
    pub file: Option<PathBuf>,
    /// How wardens are started; absent: this program.
    pub warden: Option<worker::supervise::Program>,
}

/// Why the agent ended without a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RunEnd {
    /// SIGTERM, SIGINT or SIGHUP.
    Stopped,
}

/// Runs the agent until SIGTERM, SIGINT or SIGHUP.
///
/// Errors: no identity, an agent that runs already in this folder, a broken configuration, revocation or a
/// dead certificate (exit code 3), another agent with the same identity (exit code 11).
pub async fn run(config: RunConfig) -> Result<RunEnd> {
    if config.detached {
        // Fails only for a process that leads its group already, which is as good.
        let _ = nix::unistd::setsid();
    }
    let home = Home::open(&config.data_dir)?;
    let _lock = take_folder(&home).await?;
    record_owner(&home)?;
    let stop = stop_on_signals()?;
    let desk = Arc::new(Desk::default());
    let (agent, status) = assemble(&home, &config, Arc::clone(&desk), stop)?;
    let answering = tokio::spawn(socket::serve(socket::bind(&home)?, status, desk));
    // Its output is the log file; in front, or under systemd, it is somebody else's.
    let log = config
        .detached
        .then(|| tokio::spawn(keep_log_short(home.log_file())));
    tracing::info!(device = %agent.device_id, folder = %home.dir().display(), "the agent runs");
    let ended = Box::pin(agent.run()).await;
    answering.abort();
    if let Some(log) = log {
        log.abort();
    }
    home.remove("run/agent.sock")?;
    home.remove("run/agent.pid")?;
    ended.map(|()| RunEnd::Stopped)
}

/// Takes the folder. `status` and `stop` see whether it is held by holding it for an instant, and an agent that
/// is being started must not give up for that.
async fn take_folder(home: &Home) -> Result<FolderLock> {
    for _ in 0..LOCK_TRIES {
        if let Some(lock) = FolderLock::agent(home)? {
            return Ok(lock);
        }
        if owner(home)?.is_some() {
            break;
        }
        tokio::time::sleep(LOCK_PAUSE).await;
    }
    Err(already_running(home))
}

/// Puts the log aside whenever it has grown long, and goes on in a new one.
async fn keep_log_short(path: PathBuf) {
    loop {
        tokio::time::sleep(LOG_LOOK).await;
        let log = match rotate(&path) {
            Ok(true) => open_append(&path),
            Ok(false) => continue,
            Err(error) => Err(error),
        };
        let redirected = log.and_then(|log| {
            let failed = |error: nix::Error| Error::io("write to", &path, &error.into());
            nix::unistd::dup2_stdout(&log).map_err(failed)?;
            nix::unistd::dup2_stderr(&log).map_err(failed)
        });
        if let Err(error) = redirected {
            tracing::warn!(%error, "the log could not be put aside");
        }
    }
}

fn already_running(home: &Home) -> Error {
    let message = format!("an agent runs in {} already", home.dir().display());
    Error::new(
        Kind::Conflict,
        "N0107",
        message,
        "see it with `palyra node status`, stop it with `palyra node stop`",
    )
}

fn assemble(
    home: &Home,
    config: &RunConfig,
    desk: Arc<Desk>,
    stop: watch::Receiver<bool>,
) -> Result<(Agent, watch::Receiver<AgentStatus>)> {
    let Some(record) = home.record()? else {
        let message = format!("{} holds no identity", home.dir().display());
        return Err(Error::new(
            Kind::Precondition,
            "N0101",
            message,
            "pair this machine first: palyra node pair",
        ));
    };
    let owners = home.config()?;
    let files: Vec<PathBuf> = owners
        .capabilities
        .iter()
        .chain(&config.capabilities)
        .cloned()
        .collect();
    let capabilities = capability::load(&files)?;
    let choice = choice(&owners, config)?;
    let link = TlsLink::open(home)?;
    if link.device_id() != record.device_id {
        let message = format!(
            "the certificate is {}'s, the folder {}'s",
            link.device_id(),
            record.device_id
        );
        return Err(Error::new(
            Kind::Precondition,
            "N0104",
            message,
            "pair again: palyra node pair --replace",
        ));
    }
    let (ledger, left) = Ledger::open(&home.ledger_dir())?;
    end_leftovers(&left);
    let ledger = Arc::new(Mutex::new(ledger));
    let (status, status_receiver) = watch::channel(first_status(&record, &capabilities, &link));
    let (events, event_receiver) = mpsc::unbounded_channel();
    let registration = registration(&record, &owners, config, &capabilities)?;
    let (dir, device_id) = (home.dir().to_path_buf(), record.device_id.clone());
    let worker = Worker::new(
        capabilities,
        Arc::clone(&ledger),
        desk,
        dir,
        status_receiver.clone(),
        events,
    );
    let agent = Agent {
        device_id: record.device_id.clone(),
        registration,
        registered: false,
        jobs: Jobs::new(worker, ledger),
        events: event_receiver,
        link: Box::new(link),
        route: Route::new(record.replicas.clone()),
        status,
        shutdown: Shutdown::new(stop),
        home: home.clone(),
        record,
        superseded_at: None,
        carrier: Carrier::new(choice),
        fallback: String::new(),
        desk: worker::desk_of(home, &owners, config.worker.as_ref(), &device_id)?,
    };
    Ok((agent, status_receiver))
}

fn first_status(record: &NodeRecord, capabilities: &[Capability], link: &TlsLink) -> AgentStatus {
    let (fingerprint, not_after_ms) = link.describe();
    AgentStatus {
        pid: std::process::id(),
        device_id: record.device_id.clone(),
        name: record.name.clone(),
        state: "connecting".to_owned(),
        capabilities: capabilities
            .iter()
            .map(|capability| capability.name.clone())
            .collect(),
        fingerprint,
        not_after_ms,
        ..AgentStatus::default()
    }
}

fn registration(
    record: &NodeRecord,
    owners: &NodeConfig,
    config: &RunConfig,
    capabilities: &[Capability],
) -> Result<wire::RegisterRequest> {
    let away = config.lost_after.as_deref().or(owners.lost_after.as_deref());
    Ok(wire::RegisterRequest {
        request_id: String::new(),
        device_id: record.device_id.clone(),
        platform: platform(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        capabilities: capabilities.iter().map(announce).collect(),
        labels: labels(owners, config)?,
        lost_after_ms: lost_after(away)?,
        max_concurrency: limit("concurrency", owners.concurrency, MAX_HELD_AT_ONCE)?,
        queue_limit: limit("queue_limit", owners.queue_limit, capability::MAX_QUEUE)?,
    })
}

/// A limit from `node.toml`; 0 when it is absent.
fn limit(name: &str, asked: Option<u32>, most: u32) -> Result<u32> {
    match asked {
        None => Ok(0),
        Some(asked) if (1..=most).contains(&asked) => Ok(asked),
        Some(asked) => Err(Error::new(
            Kind::Usage,
            "N0610",
            format!("`{name} = {asked}` in node.toml must be between 1 and {most}"),
            "correct the file, then: palyra node restart",
        )),
    }
}

/// What carries the sessions, by the option or the file.
fn choice(owners: &NodeConfig, config: &RunConfig) -> Result<Choice> {
    let wanted = config.transport.as_ref().or(owners.transport.as_ref());
    wanted.map_or(Ok(Choice::Auto), |text| Choice::parse(text))
}

fn labels(owners: &NodeConfig, config: &RunConfig) -> Result<BTreeMap<String, String>> {
    let mut labels = owners.labels.clone();
    labels.extend(config.labels.clone());
    let long = |text: &String| text.len() > LABEL_MAX || text.chars().any(char::is_control);
    let bad = labels
        .iter()
        .find(|(name, value)| name.is_empty() || long(name) || long(value));
    let why = match bad {
        Some((name, _)) => {
            format!("the label {name:?} and its value must be one line of at most {LABEL_MAX} bytes")
        }
        None if labels.len() > LABELS_MAX => {
            format!("{} labels; at most {LABELS_MAX} are allowed", labels.len())
        }
        None => return Ok(labels),
    };
    Err(Error::new(
        Kind::Usage,
        "N0305",
        why,
        "correct `labels` in node.toml, or the --label option",
    ))
}

/// How a capability is told to the control plane: without the program and its arguments, which are the
/// owner's.
fn announce(capability: &Capability) -> wire::Capability {
    wire::Capability {
        name: capability.name.clone(),
        effect: capability.effect.as_str().to_owned(),
        timeout_ms: u64::try_from(capability.timeout.as_millis()).unwrap_or(u64::MAX),
        max_concurrency: capability.concurrency,
        local_mediation: capability.local_mediation,
        description: capability.description.clone(),
        queue_limit: capability.queue_limit,
        max_attempts: capability.retry.attempts,
        backoff_ms: u64::try_from(capability.retry.backoff.as_millis()).unwrap_or(u64::MAX),
        retry_on: capability.retry.on.clone(),
    }
}

/// Ends the process groups of an earlier agent that died: two runs of one dispatch must not overlap.
fn end_leftovers(left: &[Started]) {
    for started in left.iter().filter(|started| is_group_left(started)) {
        tracing::warn!(
            pid = started.pid,
            "a program of an earlier agent still runs; it is ended"
        );
        if let Ok(group) = i32::try_from(started.pid) {
            // It may end on its own in between.
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
    }
}

fn stop_on_signals() -> Result<watch::Receiver<bool>> {
    let failed = |error: std::io::Error| {
        Error::new(
            Kind::Internal,
            "N0001",
            format!("signals cannot be handled: {error}"),
            "",
        )
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    // The terminal is gone: what runs is ended in order, and its results are kept. Unless `nohup` started us.
    let ignored = std::fs::read_to_string("/proc/self/status").is_ok_and(|status| ignores_hangup(&status));
    let mut hangup = (!ignored)
        .then(|| signal(SignalKind::hangup()).map_err(failed))
        .transpose()?;
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        let hung_up = async {
            match hangup.as_mut() {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hung_up => {}
        }
        tracing::info!("asked to stop");
        stop.send_replace(true);
        // Held until the agent is gone: a receiver must not mistake a closed channel for the order.
        stop.closed().await;
    });
    Ok(stopped)
}

/// Whether SIGHUP is ignored, by the mask in `/proc/self/status`. Its lowest bit is signal 1, SIGHUP.
fn ignores_hangup(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::identify;
    use crate::testing::Fifo;

    #[test]
    fn nohup_is_found_in_the_mask() {
        assert!(ignores_hangup(
            "Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\t0\n"
        ));
        assert!(!ignores_hangup("Name:\tx\nSigIgn:\t0000000000001000\n"));
        assert!(!ignores_hangup(""));
    }

    #[tokio::test]
    async fn children_of_a_program_that_is_gone_are_ended_too() {
        use std::os::unix::process::CommandExt;
        // Whoever else has a group of that id is left alone.
        for (mark, ours) in [("ANOTHER", false), ("PALYRA_DISPATCH_ID", true)] {
            let mut held = Fifo::new();
            let (path, gate) = (held.path(), held.gate());
            let script = format!("exec 3>{path}; echo up >&3; sleep 1000 & read line <{gate}");
            let mut command = std::process::Command::new("/bin/sh");
            command.args(["-c", &script]).env(mark, "x").process_group(0);
            let mut program = command.spawn().unwrap();
            held.opened().await;
            let started = identify(program.id()).unwrap();
            held.open_gate().await;
            program.wait().unwrap();
            assert_eq!(is_group_left(&started), ours);
            if ours {
                end_leftovers(&[started]);
            } else {
                killpg(Pid::from_raw(program.id().cast_signed()), Signal::SIGKILL).unwrap();
            }
            held.released().await;
        }
    }

    #[tokio::test]
    async fn a_look_at_the_folder_does_not_keep_an_agent_from_starting() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::create(dir.path()).unwrap();
        let look = FolderLock::agent(&home).unwrap().unwrap();
        let (taken, ()) = tokio::join!(take_folder(&home), async {
            tokio::task::yield_now().await;
            drop(look);
        });
        let _lock = taken.unwrap();
        record_owner(&home).unwrap();
        assert_eq!(take_folder(&home).await.err().unwrap().code, "N0107");
    }
}
