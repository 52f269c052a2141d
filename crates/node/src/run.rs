//! `palyra node run`: the agent as a process: folder, lock, configuration, socket, signals.
//!
//! What never lives here: logging setup (the binary's) and the agent's loop (see `agent`).
//!
//! Invariants: everything that can be wrong with folder, identity and configuration is found before the first
//! connection; programs that an earlier agent left are ended before anything begins.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use palyra_proto::node::v1 as wire;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::agent::{Agent, Shutdown};
use crate::builtin::platform;
use crate::capability::{self, Capability};
use crate::home::{Home, NodeConfig, NodeRecord};
use crate::jobs::Jobs;
use crate::ledger::{Ledger, Started};
use crate::link::{Link, TlsLink};
use crate::lock::{FolderLock, is_alive, record_owner};
use crate::mediation::Desk;
use crate::route::Route;
use crate::service::AgentStatus;
use crate::work::Worker;
use crate::{Error, Kind, Result, socket};

/// The most labels of a node.
const LABELS_MAX: usize = 32;
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
    /// Started by [`crate::service::start`]: become the leader of a session of its own, so that the
    /// terminal's end is not the agent's.
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
/// Errors: no identity, an agent that runs already in this folder, a broken configuration, revocation or a
/// dead certificate (exit code 3), another agent with the same identity (exit code 11).
pub async fn run(config: RunConfig) -> Result<RunEnd> {
    if config.detached {
        // Fails only for a process that leads its group already, which is as good.
        let _ = nix::unistd::setsid();
    }
    let home = Home::open(&config.data_dir)?;
    let _lock = FolderLock::agent(&home)?.ok_or_else(|| already_running(&home))?;
    record_owner(&home)?;
    let stop = stop_on_signals()?;
    let desk = Arc::new(Desk::default());
    let (agent, status) = assemble(&home, &config, Arc::clone(&desk), stop)?;
    let answering = tokio::spawn(socket::serve(socket::bind(&home)?, status, desk));
    tracing::info!(device = %agent.device_id, folder = %home.dir().display(), "the agent runs");
    let ended = Box::pin(agent.run()).await;
    answering.abort();
    home.remove("run/agent.sock")?;
    home.remove("run/agent.pid")?;
    ended.map(|()| RunEnd::Stopped)
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
    let registration = registration(&record, labels(&owners, config)?, &capabilities);
    let dir = home.dir().to_path_buf();
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
    labels: BTreeMap<String, String>,
    capabilities: &[Capability],
) -> wire::RegisterRequest {
    wire::RegisterRequest {
        request_id: String::new(),
        device_id: record.device_id.clone(),
        platform: platform(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        capabilities: capabilities.iter().map(announce).collect(),
        labels,
    }
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
    }
}

/// Ends the process groups of an earlier agent that died: two runs of one dispatch must not overlap.
fn end_leftovers(left: &[Started]) {
    for started in left.iter().filter(|started| is_alive(started)) {
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
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("asked to stop");
        stop.send_replace(true);
        // Held until the agent is gone: a receiver must not mistake a closed channel for the order.
        stop.closed().await;
    });
    Ok(stopped)
}
