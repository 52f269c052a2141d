//! Real machines of the fleet: `palyra node run` and `palyra worker run` in their own namespaces, started again
//! when they die.
//!
//! Never here: machines that the harness only plays ([`crate::workloads::fleet`]), and what agents are asked to
//! do. Invariants: an agent that ends is started again after a moment, as a service manager does, until the run is
//! over; what it says goes to a log.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use palyra_client::Client;
use palyra_node::{PairConfig, PairEvent, PairMethod, PairUi, pair};
use palyra_proto::pairing::v1::{ApproveRequest, MintTicketRequest};
use tokio::process::Child;
use tokio::sync::mpsc;
use tokio::time::sleep;
use zeroize::Zeroizing;

use crate::cluster::{Cluster, prefixed, signal};
use crate::net::Seat;
use crate::run::Run;

/// From an agent's end to its next start.
const AGAIN: Duration = Duration::from_millis(700);
/// For the pairing of a machine while the cluster is well.
const PAIRING: Duration = Duration::from_secs(30);

/// The agents of a run. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Machines(Arc<Mutex<BTreeMap<u64, Agent>>>);

/// One agent.
#[derive(Debug, Default)]
struct Agent {
    pid: Option<u32>,
    paused: bool,
    starts: u64,
}

/// A paired machine with a folder of its own.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its place in the network: `h1` is 1.
    pub number: u64,
    /// Its data folder.
    pub folder: PathBuf,
    /// Its device id.
    pub device: String,
}

impl Machines {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Agent>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number that no machine has.
    fn reserve(&self) -> u64 {
        let mut agents = self.lock();
        let number = agents.keys().max().copied().unwrap_or(0) + 1;
        agents.insert(number, Agent::default());
        number
    }

    /// Numbers of the machines whose agents are looked after.
    #[must_use]
    pub fn numbers(&self) -> Vec<u64> {
        self.lock().keys().copied().collect()
    }

    /// How often an agent was started.
    #[must_use]
    pub fn starts(&self, number: u64) -> u64 {
        self.lock().get(&number).map_or(0, |agent| agent.starts)
    }

    /// Sends an agent a signal. Answers its process id.
    ///
    /// # Errors
    /// When it does not run.
    pub fn signal(&self, number: u64, what: Signal) -> Result<u32> {
        let mut agents = self.lock();
        let agent = agents
            .get_mut(&number)
            .with_context(|| format!("h{number} has no agent"))?;
        let pid = agent
            .pid
            .with_context(|| format!("the agent of h{number} does not run"))?;
        signal(pid, what)?;
        agent.paused = match what {
            Signal::SIGSTOP => true,
            Signal::SIGCONT => false,
            _ => agent.paused,
        };
        Ok(pid)
    }

    /// Has every agent go on that stands still.
    pub fn resume_all(&self) {
        for number in self.numbers() {
            let paused = self.lock().get(&number).is_some_and(|agent| agent.paused);
            if paused {
                // It may have ended meanwhile.
                drop(self.signal(number, Signal::SIGCONT));
            }
        }
    }

    fn note(&self, number: u64, pid: Option<u32>) {
        if let Some(agent) = self.lock().get_mut(&number) {
            agent.pid = pid;
            agent.paused = false;
            agent.starts += u64::from(pid.is_some());
        }
    }

    /// Runs an agent in its place, and again whenever it ends, until the end of the run.
    ///
    /// # Errors
    /// When it can't be started the first time.
    pub fn keep(&self, run: &Arc<Run>, machine: &Machine, arguments: &[&str]) -> Result<()> {
        let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
        let mut child = start(&run.cluster, machine, &arguments)?;
        self.note(machine.number, child.id());
        let (all, run, machine) = (self.clone(), Arc::clone(run), machine.clone());
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = child.wait() => {},
                    () = run.stop.cancelled() => {},
                }
                all.note(machine.number, None);
                sleep(AGAIN).await;
                if run.stop.is_cancelled() {
                    return;
                }
                match start(&run.cluster, &machine, &arguments) {
                    Ok(next) => child = next,
                    Err(_) => return,
                }
                all.note(machine.number, child.id());
            }
        });
        Ok(())
    }
}

fn start(cluster: &Cluster, machine: &Machine, arguments: &[String]) -> Result<Child> {
    let path = cluster.logs().join(format!("h{}.log", machine.number));
    let log = std::fs::File::options()
        .append(true)
        .create(true)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    let prefix = if cluster.net().is_there() {
        Seat::Host(machine.number).prefix()
    } else {
        Vec::new()
    };
    let mut command = prefixed(&cluster.programs().palyra, &prefix);
    command.args(arguments).arg("--data-dir").arg(&machine.folder);
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true);
    command
        .spawn()
        .with_context(|| format!("the agent of h{} does not start", machine.number))
}

/// Says which request an operator has to approve.
struct Approver(mpsc::UnboundedSender<String>);

impl PairUi for Approver {
    fn event(&self, event: PairEvent) {
        if let PairEvent::Proved { pairing_id, .. } = event {
            // Whoever no longer listens has given up on it.
            drop(self.0.send(pairing_id));
        }
    }
}

/// Pairs a machine by the product's own library, while nothing is harmed, and gives it the next seat.
///
/// # Errors
/// When a step fails.
pub async fn enlist(run: &Run) -> Result<Machine> {
    let cluster = &run.cluster;
    let number = run.machines.reserve();
    let name = format!("h{number}");
    cluster.net().attach(Seat::Host(number)).await?;
    let operator = cluster.client_of_all(PAIRING)?;
    let request = MintTicketRequest {
        device_name: name.clone(),
        ..Default::default()
    };
    let minted = operator.mint_ticket(request).await.context("minting a ticket")?;
    let folder = cluster.data().join(format!("h{number}"));
    let (tell, told) = mpsc::unbounded_channel();
    let config = PairConfig {
        data_dir: folder.clone(),
        name: Some(name.clone()),
        method: PairMethod::Ticket(Zeroizing::new(minted.ticket)),
        wait: PAIRING,
        replace: false,
    };
    // The library's future stays on one thread.
    let here = tokio::runtime::Handle::current();
    let pairing = tokio::task::spawn_blocking(move || here.block_on(pair(config, &Approver(tell))));
    approve(&operator, told).await?;
    let paired = pairing.await.context("the pairing panicked")?;
    let paired = match paired {
        Ok(paired) => paired,
        Err(error) => bail!("pairing {name}: {error}"),
    };
    Ok(Machine {
        number,
        folder,
        device: paired.device_id,
    })
}

async fn approve(operator: &Client, mut told: mpsc::UnboundedReceiver<String>) -> Result<()> {
    let Some(id) = told.recv().await else {
        return Ok(());
    };
    let request = ApproveRequest {
        id,
        ..Default::default()
    };
    operator
        .approve(request)
        .await
        .context("the approval of a machine")?;
    Ok(())
}

/// A path as text.
///
/// # Errors
/// When it is none.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
