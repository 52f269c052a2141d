//! The agent on this machine: pairing, running, and its life as a background process.
//!
//! What never lives here: what the agent does (`palyra_node`). Invariant: a secret given on the command line
//! can come from a file instead, for other users of a machine can see the command lines of its processes.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use palyra_client::Class;
use palyra_node::pair::PairMethod;
use palyra_node::run::WorkerConfig;
use palyra_node::service::{self, AgentStatus, ServiceStatus, StartConfig};
use palyra_node::{PairConfig, PairEvent, PairUi, Paired, RunConfig};
use serde::Serialize;
use zeroize::Zeroizing;

use super::parse_label;
use crate::failure::{Failure, Result};
use crate::output::time::{Moment, parse_duration, span};
use crate::output::{Out, note, table};
use crate::pairing::grouped;
use crate::session::Global;

/// How long a pairing waits for the operator when nothing is asked for.
const PAIR_WAIT: Duration = Duration::from_secs(30 * 60);
/// How long the agent may take to start, or to end.
const SERVICE_WAIT: Duration = Duration::from_secs(15);
/// What the node says when it is paired already.
const PAIRED_ALREADY: &str = "N0105";

/// Which agent is meant.
#[derive(Debug, Clone, Args)]
pub(crate) struct Folder {
    /// The node's data folder; without it ~/.local/share/palyra/node
    #[arg(long, value_name = "DIR", env = "PALYRA_NODE_DIR")]
    data_dir: Option<PathBuf>,
}

impl Folder {
    /// The folder, absolute, so that a background process finds it from anywhere.
    pub(crate) fn dir(&self) -> PathBuf {
        let dir = self
            .data_dir
            .clone()
            .unwrap_or_else(palyra_node::home::default_dir);
        std::path::absolute(&dir).unwrap_or(dir)
    }
}

/// What proves that this machine was invited.
#[derive(Debug, Args)]
pub(crate) struct Proof {
    /// The eight digits of `palyra pairing code`; blanks and dashes do not matter
    #[arg(long, value_name = "DIGITS", requires = "enrol")]
    #[arg(conflicts_with_all = ["pin_file", "ticket", "ticket_file"])]
    pin: Option<String>,
    /// A file with the digits
    #[arg(long, value_name = "FILE", requires = "enrol", conflicts_with_all = ["ticket", "ticket_file"])]
    pin_file: Option<PathBuf>,
    /// The code's number (C3 or 3), when several are open
    #[arg(long, value_name = "NUMBER", value_parser = parse_code)]
    #[arg(default_value = "0", hide_default_value = true)]
    code: u32,
    /// Where replicas enrol machines
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    enrol: Vec<String>,
    /// The text of `palyra pairing ticket`
    #[arg(long, value_name = "TEXT", conflicts_with = "ticket_file")]
    ticket: Option<String>,
    /// A file with the ticket
    #[arg(long, value_name = "FILE")]
    ticket_file: Option<PathBuf>,
}

fn parse_code(text: &str) -> std::result::Result<u32, String> {
    let digits = text.strip_prefix(['C', 'c']).unwrap_or(text);
    digits
        .parse()
        .map_err(|_| format!("{text:?} is no number of a code: write C3 or 3"))
}

impl Proof {
    /// What was given; nothing when nothing was.
    fn method(self) -> Result<Option<PairMethod>> {
        let pin = secret(self.pin, self.pin_file.as_deref())?;
        if let Some(pin) = pin {
            return Ok(Some(PairMethod::Pin {
                pin,
                code: self.code,
                endpoints: self.enrol,
            }));
        }
        Ok(secret(self.ticket, self.ticket_file.as_deref())?.map(PairMethod::Ticket))
    }
}

fn secret(given: Option<String>, file: Option<&Path>) -> Result<Option<Zeroizing<String>>> {
    match (given, file) {
        (Some(text), _) => Ok(Some(Zeroizing::new(text))),
        (None, Some(path)) => {
            let text = std::fs::read_to_string(path).map_err(|error| Failure::file("read", path, &error))?;
            Ok(Some(Zeroizing::new(Zeroizing::new(text).trim().to_owned())))
        }
        (None, None) => Ok(None),
    }
}

/// `palyra node pair`.
#[derive(Debug, Args)]
pub(crate) struct Pair {
    #[command(flatten)]
    folder: Folder,
    #[command(flatten)]
    proof: Proof,
    /// What this machine is called; without it its host name
    #[arg(long)]
    name: Option<String>,
    /// Pair again although this folder has an identity: the machine gets a new device id
    #[arg(long)]
    replace: bool,
}

/// `palyra node run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    folder: Folder,
    #[command(flatten)]
    proof: Proof,
    /// What this machine is called when it is paired now; without it its host name
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    offer: Offer,
    /// Started by `palyra node start`
    #[arg(long, hide = true)]
    detached: bool,
}

impl Run {
    /// The folder of the node.
    pub(crate) fn dir(&self) -> PathBuf {
        self.folder.dir()
    }
}

/// What the agent offers.
#[derive(Debug, Args)]
pub(crate) struct Offer {
    /// A file that declares capabilities; may be repeated
    #[arg(long, value_name = "FILE")]
    capabilities: Vec<PathBuf>,
    /// A label, for operators to select by; may be repeated
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Away for longer, this node is gone and nothing waits for it: 24h, 30d, never
    #[arg(long, value_name = "TIME", value_parser = parse_away)]
    lost_after: Option<String>,
    /// What carries the sessions: auto (QUIC, and gRPC where UDP does not get through), quic or grpc
    #[arg(long, value_name = "TRANSPORT", value_parser = ["auto", "quic", "grpc"])]
    transport: Option<String>,
}

/// Checks the text, which the agent gets as it is.
fn parse_away(text: &str) -> std::result::Result<String, String> {
    palyra_node::parse_lost_after(text).map(|_| text.to_owned())
}

impl Offer {
    /// The same options for another command line.
    fn arguments(&self) -> Vec<OsString> {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let files = self
            .capabilities
            .iter()
            .flat_map(|path| ["--capabilities".into(), absolute(path).into()]);
        let labels = self
            .labels
            .iter()
            .flat_map(|(key, value)| ["--label".into(), format!("{key}={value}").into()]);
        let away = self.lost_after.iter();
        let away = away.flat_map(|text| ["--lost-after".into(), OsString::from(text)]);
        let transport = self
            .transport
            .iter()
            .flat_map(|transport| ["--transport".into(), transport.into()]);
        files.chain(labels).chain(away).chain(transport).collect()
    }
}

/// `palyra node start` and `restart`.
#[derive(Debug, Args)]
pub(crate) struct Start {
    #[command(flatten)]
    folder: Folder,
    #[command(flatten)]
    offer: Offer,
}

/// `palyra node install`.
#[derive(Debug, Args)]
pub(crate) struct Install {
    #[command(flatten)]
    folder: Folder,
    #[command(flatten)]
    offer: Offer,
    /// For the machine instead of for you; needs root
    #[arg(long)]
    system: bool,
    /// How long the agent may take to start
    #[arg(long, value_parser = parse_duration, value_name = "DURATION", default_value = "15s")]
    start_timeout: Duration,
}

/// Tells a pairing's progress to the person at the machine.
struct Teller;

impl PairUi for Teller {
    fn event(&self, event: PairEvent) {
        match event {
            PairEvent::Trying { endpoint } => note(&format!("asking {endpoint}")),
            PairEvent::Failed { endpoint, why } => note(&format!("{endpoint}: {why}; trying another")),
            PairEvent::Resumed => note("going on with the pairing that was begun here before"),
            PairEvent::Proved {
                sas,
                device_id,
                pairing_id,
                key_fingerprint,
                expires_at_ms,
            } => {
                let sas: String = sas.chars().filter(char::is_ascii_digit).collect();
                let left = span(expires_at_ms.saturating_sub(palyra_client::wall_ms()));
                note(&table::facts(&[
                    ("check digits:", grouped(&sas)),
                    ("device:", device_id),
                    ("key:", key_fingerprint),
                    (
                        "next:",
                        format!(
                            "an operator compares the digits: palyra pairing approve {pairing_id} --sas {sas}"
                        ),
                    ),
                    ("", format!("waiting; the request lapses in {left}")),
                ]));
            }
            PairEvent::Approved => note("approved"),
            _ => {}
        }
    }
}

#[derive(Serialize)]
struct PairedView {
    device_id: String,
    cluster_id: String,
    certificate_fingerprint: String,
    certificate_not_after: Moment,
}

fn print_paired(out: Out, paired: Paired) -> Result {
    let view = PairedView {
        device_id: paired.device_id,
        cluster_id: paired.cluster_id,
        certificate_fingerprint: paired.fingerprint,
        certificate_not_after: Moment(paired.not_after_ms),
    };
    let facts = [
        ("paired", view.device_id.clone()),
        ("cluster", view.cluster_id.clone()),
        ("certificate", view.certificate_fingerprint.clone()),
        ("next", "palyra node start".to_owned()),
    ];
    out.plain(&view, &table::facts(&facts))
}

/// Becomes a node.
pub(crate) async fn pair(global: &Global, pair: Pair) -> Result {
    // Without a secret an interrupted pairing is gone on with.
    let method = pair.proof.method()?.unwrap_or(PairMethod::Resume);
    let wait = global.timeout.unwrap_or(PAIR_WAIT);
    let config = PairConfig {
        data_dir: pair.folder.dir(),
        name: pair.name,
        method,
        wait,
        replace: pair.replace,
    };
    print_paired(global.out(), palyra_node::pair(config, &Teller).await?)
}

/// Runs the agent until it is told to stop, after pairing when that is asked for and not done yet.
pub(crate) async fn run(global: &Global, run: Run, worker: Option<WorkerConfig>) -> Result {
    log_to_stderr();
    let data_dir = run.folder.dir();
    if let Some(method) = run.proof.method()? {
        let wait = global.timeout.unwrap_or(PAIR_WAIT);
        let config = PairConfig {
            data_dir: data_dir.clone(),
            name: run.name,
            method,
            wait,
            replace: false,
        };
        match palyra_node::pair(config, &Teller).await {
            Ok(paired) => print_paired(global.out(), paired)?,
            Err(error) if error.code == PAIRED_ALREADY => {
                note("paired already; running with the identity that is here")
            }
            Err(error) => return Err(error.into()),
        }
    }
    let labels: BTreeMap<String, String> = run.offer.labels.into_iter().collect();
    let config = RunConfig {
        data_dir,
        capabilities: run.offer.capabilities,
        labels,
        lost_after: run.offer.lost_after,
        transport: run.offer.transport,
        worker,
        detached: run.detached,
    };
    palyra_node::run(config).await?;
    Ok(())
}

/// The agent's log: one line an event, by `PALYRA_LOG` or at info.
fn log_to_stderr() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("PALYRA_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let logging = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Or a line that can't be written, as on a full disk, would be a panic of whoever logged it.
        .log_internal_errors(false)
        .with_ansi(false);
    // A second call finds logging set up already, which is as good.
    let _ = logging.try_init();
}

fn start_config(folder: &Folder, offer: &Offer, wait: Duration) -> Result<StartConfig> {
    let program = std::env::current_exe().map_err(|error| {
        Failure::local(
            Class::Internal,
            format!("cannot tell where this program is: {error}"),
            "",
        )
    })?;
    Ok(StartConfig {
        data_dir: folder.dir(),
        program,
        extra_args: offer.arguments(),
        wait,
    })
}

fn print_started(out: Out, agent: &AgentStatus) -> Result {
    let facts = [
        ("running", format!("process {}", agent.pid)),
        ("device", agent.device_id.clone()),
        ("state", agent.state.clone()),
        ("next", "palyra node status".to_owned()),
    ];
    out.plain(agent, &table::facts(&facts))
}

/// Starts the agent in the background.
pub(crate) async fn start(global: &Global, start: Start) -> Result {
    let config = start_config(
        &start.folder,
        &start.offer,
        global.timeout.unwrap_or(SERVICE_WAIT),
    )?;
    print_started(global.out(), &service::start(config).await?)
}

/// Ends the agent and starts it again.
pub(crate) async fn restart(global: &Global, start: Start) -> Result {
    let wait = global.timeout.unwrap_or(SERVICE_WAIT);
    let config = start_config(&start.folder, &start.offer, wait)?;
    print_started(global.out(), &service::restart(config, wait).await?)
}

#[derive(Serialize)]
struct Stopped {
    stopped: bool,
    pid: Option<u32>,
}

/// Ends the agent.
pub(crate) async fn stop(global: &Global, folder: Folder) -> Result {
    let pid = service::stop(&folder.dir(), global.timeout.unwrap_or(SERVICE_WAIT)).await?;
    let text = pid.map_or_else(
        || "no agent was running\n".to_owned(),
        |pid| format!("stopped: process {pid}\n"),
    );
    global.out().plain(
        &Stopped {
            stopped: pid.is_some(),
            pid,
        },
        &text,
    )
}

/// Tells what the agent does. Exit code 7 when none runs.
pub(crate) async fn status(out: Out, folder: Folder) -> Result {
    let status = service::status(&folder.dir()).await?;
    out.plain(&status, &table::facts(&status_facts(&status)))?;
    if status.running {
        Ok(())
    } else {
        Err(Failure::Silent(7))
    }
}

fn status_facts(status: &ServiceStatus) -> Vec<(&'static str, String)> {
    let mut facts = vec![(
        "agent",
        if status.running { "running" } else { "stopped" }.to_owned(),
    )];
    if let Some(agent) = &status.agent {
        let session = if agent.replica_id == 0 {
            agent.state.clone()
        } else {
            format!(
                "{} to replica {} ({}) over {}",
                agent.state, agent.replica_id, agent.endpoint, agent.transport
            )
        };
        facts.extend([
            ("process", format!("{}, up {}", agent.pid, span(agent.uptime_ms))),
            ("device", agent.device_id.clone()),
            ("name", agent.name.clone()),
            ("session", session),
            ("fallback", agent.fallback.clone()),
            (
                "heard",
                Moment(agent.last_heard_at_ms).told(palyra_client::wall_ms()),
            ),
            ("running", agent.running.join(" ")),
            ("asking here", agent.mediation.join(" ")),
            ("unreported", agent.unreported.join(" ")),
            ("worker", agent.worker.clone()),
            ("capabilities", agent.capabilities.join(" ")),
            (
                "certificate",
                format!("{} ends {}", agent.fingerprint, told_end(agent.not_after_ms)),
            ),
            ("renewals", renewals(agent)),
            ("certificate problem", agent.certificate_problem.clone()),
            ("last error", agent.last_error.clone()),
        ]);
    }
    facts.push(("log", status.log_file.display().to_string()));
    facts.push((
        "installed",
        status
            .installed
            .as_ref()
            .map(|path| path.display().to_string())
            .unwrap_or_default(),
    ));
    facts
}

fn renewals(agent: &AgentStatus) -> String {
    match (agent.renewals, agent.renewed_at_ms) {
        (0, 0) => String::new(),
        (count, 0) => format!("{count}, none since the agent's start"),
        (count, at_ms) => format!("{count}, the last {}", told_end(at_ms)),
    }
}

fn told_end(at_ms: u64) -> String {
    Moment(at_ms).told(palyra_client::wall_ms())
}

#[derive(Serialize)]
struct InstalledView {
    path: PathBuf,
    systemd: bool,
    next: String,
}

/// Has the agent started with the machine.
pub(crate) fn install(global: &Global, install: Install) -> Result {
    let config = start_config(&install.folder, &install.offer, install.start_timeout)?;
    let scope = if install.system {
        service::Scope::System
    } else {
        service::Scope::User
    };
    let done = service::install(&config, scope)?;
    let view = InstalledView {
        path: done.path,
        systemd: done.systemd,
        next: done.next,
    };
    let facts = [
        ("installed", view.path.display().to_string()),
        ("next", view.next.clone()),
    ];
    global.out().plain(&view, &table::facts(&facts))
}

#[derive(Serialize)]
struct Uninstalled {
    removed: Option<PathBuf>,
    next: String,
}

/// Undoes install.
pub(crate) fn uninstall(out: Out, folder: &Folder) -> Result {
    let Some(done) = service::uninstall(&folder.dir())? else {
        let nothing = Uninstalled {
            removed: None,
            next: String::new(),
        };
        return out.plain(&nothing, "nothing was installed\n");
    };
    let facts = [
        ("removed", done.path.display().to_string()),
        ("next", done.next.clone()),
    ];
    let view = Uninstalled {
        removed: Some(done.path),
        next: done.next,
    };
    out.plain(&view, &table::facts(&facts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_numbers_with_or_without_their_letter() {
        assert_eq!(parse_code("C3"), Ok(3));
        assert_eq!(parse_code("12"), Ok(12));
        assert!(parse_code("X").is_err());
    }

    #[test]
    fn a_started_agent_gets_the_same_options_with_absolute_paths() {
        let offer = Offer {
            capabilities: vec![PathBuf::from("c.toml")],
            labels: vec![("a".into(), "b".into())],
            lost_after: Some("never".to_owned()),
            transport: Some("grpc".to_owned()),
        };
        let arguments = offer.arguments();
        assert_eq!(arguments[0], "--capabilities");
        assert!(Path::new(&arguments[1]).is_absolute());
        assert_eq!(
            arguments[2..],
            ["--label", "a=b", "--lost-after", "never", "--transport", "grpc"]
        );
    }

    #[test]
    fn secrets_can_come_from_a_file() {
        let file = std::env::temp_dir().join(format!("palyra-secret-{}", std::process::id()));
        std::fs::write(&file, "1234 5678\n").unwrap();
        assert_eq!(secret(None, Some(&file)).unwrap().unwrap().as_str(), "1234 5678");
        std::fs::remove_file(&file).unwrap();
        assert!(secret(None, Some(&file)).is_err());
        assert!(secret(None, None).unwrap().is_none());
    }
}
