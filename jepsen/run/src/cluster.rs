//! The replicas of a run: real processes of the real binary, each with its folder, its configuration and its seat in
//! the network, and their first operator.
//!
//! Never here: faults as a nemesis means them, which know when and whom; here is only what can be done to one replica.
//! Invariants: a replica counts as started when it says that it serves; a process that ends without having been told
//! to is noticed, written down and started again, as a service manager does, and judged unless somebody said that it
//! might end.

mod birth;
mod launch;
mod metrics;
mod removed;
mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use palyra_client::{Client, ConnectOptions, Contexts, Endpoints};
use palyra_pki::Credential;
use tokio::process::Child;

use crate::clock::Clocks;
use crate::disk::Disks;
use crate::door::{Door, Identity};
use crate::net::{Net, Seat};

pub(crate) use birth::merge;
pub use launch::{Launch, Programs, prefixed};
pub use metrics::Metrics;
pub use watch::{Leader, Leaders, follow_leaders, mind};

/// First of a replica's six ports.
const BASE_PORT: u16 = 7440;
/// For an orderly end: the daemon's own limit is 8 s.
const ORDERLY: Duration = Duration::from_secs(20);

/// What a replica is doing, as far as the harness has a hand in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It was never started, or has been stopped on purpose.
    Down,
    /// It runs.
    Up,
    /// It is stopped where it stands.
    Paused,
    /// It ended by itself.
    Ended,
    /// It is no member any more.
    Removed,
}

/// One replica.
struct Member {
    state: State,
    child: Option<Child>,
    pid: Option<u32>,
    /// How often it was started.
    starts: u32,
    launch: Launch,
    /// Set while a fault is at work that may end it.
    may_end: u32,
}

/// An end that nobody asked for.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Nanoseconds since the run began.
    pub time: u64,
    /// Of which replica.
    pub replica: u64,
    /// How, and its last words.
    pub how: String,
    /// Whether a fault was at work that may end a process.
    pub allowed: bool,
}

/// The replicas of a run.
pub struct Cluster {
    /// Folders of data; see [`crate::disk`].
    data: PathBuf,
    logs: PathBuf,
    programs: Programs,
    settings: toml::Table,
    net: Net,
    clocks: Clocks,
    disks: Disks,
    /// Loopback only: the first port of r1.
    loopback: Option<u16>,
    members: Mutex<BTreeMap<u64, Member>>,
    /// One start or stop of a replica at a time.
    turns: Mutex<BTreeMap<u64, std::sync::Arc<tokio::sync::Mutex<()>>>>,
    ended: Mutex<Vec<Ended>>,
}

/// What a cluster is made of.
pub struct Parts {
    /// Where data folders are made.
    pub data: PathBuf,
    /// Where logs go.
    pub logs: PathBuf,
    /// The binaries.
    pub programs: Programs,
    /// Settings of `palyrad.toml` that differ from the defaults.
    pub settings: toml::Table,
    /// The network.
    pub net: Net,
    /// Their clocks.
    pub clocks: Clocks,
    /// What data folders are on.
    pub disks: Disks,
}

impl Cluster {
    /// No replica yet; see [`Cluster::birth`].
    ///
    /// # Errors
    /// When no ports are free on loopback.
    pub fn new(parts: Parts) -> Result<Cluster> {
        let loopback = if parts.net.is_there() {
            None
        } else {
            Some(birth::free_ports()?)
        };
        Ok(Cluster {
            data: parts.data,
            logs: parts.logs,
            programs: parts.programs,
            settings: parts.settings,
            net: parts.net,
            clocks: parts.clocks,
            disks: parts.disks,
            loopback,
            members: Mutex::default(),
            turns: Mutex::default(),
            ended: Mutex::default(),
        })
    }

    fn members(&self) -> MutexGuard<'_, BTreeMap<u64, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, id: u64, look: impl FnOnce(&mut Member) -> T) -> Result<T> {
        let mut members = self.members();
        let member = members
            .get_mut(&id)
            .with_context(|| format!("there is no replica r{id}"))?;
        Ok(look(member))
    }

    fn turn(&self, id: u64) -> std::sync::Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        std::sync::Arc::clone(turns.entry(id).or_default())
    }

    /// The replicas that are members, in any state but removed.
    #[must_use]
    pub fn replicas(&self) -> Vec<u64> {
        let members = self.members();
        let present = members
            .iter()
            .filter(|(_, member)| member.state != State::Removed);
        present.map(|(id, _)| *id).collect()
    }

    /// What a replica is doing.
    #[must_use]
    pub fn state(&self, id: u64) -> State {
        self.members()
            .get(&id)
            .map_or(State::Removed, |member| member.state)
    }

    /// The replicas that run and are not paused.
    #[must_use]
    pub fn up(&self) -> Vec<u64> {
        let members = self.members();
        let up = members.iter().filter(|(_, member)| member.state == State::Up);
        up.map(|(id, _)| *id).collect()
    }

    /// Its process id, while it runs or is paused.
    #[must_use]
    pub fn pid(&self, id: u64) -> Option<u32> {
        self.members().get(&id)?.pid
    }

    /// How often it was started.
    #[must_use]
    pub fn starts(&self, id: u64) -> u32 {
        self.members().get(&id).map_or(0, |member| member.starts)
    }

    /// Its data folder, in the folder of its disk: a new replica's folder must not be there, so it can't be a mount.
    #[must_use]
    pub fn folder(&self, id: u64) -> PathBuf {
        self.disk_folder(id).join("data")
    }

    /// The folder that its disk is, or would be, mounted on.
    #[must_use]
    pub fn disk_folder(&self, id: u64) -> PathBuf {
        self.data.join(format!("r{id}"))
    }

    /// The folder that all data folders are in.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// What it logged, whole.
    #[must_use]
    pub fn log(&self, id: u64) -> String {
        let bytes = std::fs::read(self.log_file(id)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The file that it logs to.
    #[must_use]
    pub fn log_file(&self, id: u64) -> PathBuf {
        self.logs.join(format!("r{id}.log"))
    }

    /// The folder of logs.
    #[must_use]
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// The disks below the data folders.
    #[must_use]
    pub fn disks(&self) -> &Disks {
        &self.disks
    }

    /// The binaries.
    #[must_use]
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// Changes how a replica is started the next time: environment, binary.
    ///
    /// # Errors
    /// When there is no such replica.
    pub fn launch(&self, id: u64, change: impl FnOnce(&mut Launch)) -> Result<()> {
        self.with(id, |member| change(&mut member.launch))
    }

    /// Says that a fault is at work that may end a replica, until [`Cluster::must_live`].
    ///
    /// # Errors
    /// When there is no such replica.
    pub fn may_end(&self, id: u64) -> Result<()> {
        self.with(id, |member| member.may_end += 1)
    }

    /// Takes it back.
    ///
    /// # Errors
    /// When there is no such replica.
    pub fn must_live(&self, id: u64) -> Result<()> {
        self.with(id, |member| member.may_end = member.may_end.saturating_sub(1))
    }

    /// Ends that nobody asked for, so far.
    #[must_use]
    pub fn ended(&self) -> Vec<Ended> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Kills a replica with SIGKILL and waits until it is gone. Answers the process id that it had.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn kill(&self, id: u64) -> Result<u32> {
        let turn = self.turn(id);
        let _mine = turn.lock().await;
        let (child, pid) = self.take(id)?;
        let mut child = child;
        // It may be stopped; SIGKILL ends it all the same.
        child
            .start_kill()
            .with_context(|| format!("r{id} can't be killed"))?;
        // A process that waits for its disk ends only when it has its answer.
        self.disks.let_go(id);
        child.wait().await?;
        Ok(pid)
    }

    /// Tells a replica to stop and waits until it has.
    ///
    /// # Errors
    /// When it does not run, or does not end in good order.
    pub async fn terminate(&self, id: u64) -> Result<()> {
        let turn = self.turn(id);
        let _mine = turn.lock().await;
        let (mut child, pid) = self.take(id)?;
        signal(pid, Signal::SIGTERM)?;
        let ended = tokio::time::timeout(ORDERLY, child.wait()).await;
        let Ok(status) = ended else {
            child.start_kill()?;
            self.disks.let_go(id);
            child.wait().await?;
            return Err(anyhow!(
                "r{id} did not stop within {} s of SIGTERM",
                ORDERLY.as_secs()
            ));
        };
        let status = status?;
        ensure!(
            status.success(),
            "r{id} stopped with {status}; see {}",
            self.log_file(id).display()
        );
        Ok(())
    }

    fn take(&self, id: u64) -> Result<(Child, u32)> {
        self.with(id, |member| {
            let pid = member.pid.take();
            // Removed is for good; what has ended is nobody else's to start from here on.
            if member.state != State::Removed {
                member.state = State::Down;
            }
            member.child.take().zip(pid)
        })?
        .with_context(|| format!("r{id} does not run"))
    }

    /// Stops a replica where it stands; its connections stay open.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pause(&self, id: u64) -> Result<u32> {
        self.with(id, |member| {
            let pid = member.pid.filter(|_| member.state == State::Up);
            let pid = pid.with_context(|| format!("r{id} does not run"))?;
            signal(pid, Signal::SIGSTOP)?;
            member.state = State::Paused;
            Ok(pid)
        })?
    }

    /// Has a paused replica go on. Nothing happens to one that is not paused.
    ///
    /// # Errors
    /// When the signal can't be sent.
    pub fn resume(&self, id: u64) -> Result<()> {
        self.with(id, |member| {
            if let Some(pid) = member.pid.filter(|_| member.state == State::Paused) {
                signal(pid, Signal::SIGCONT)?;
                member.state = State::Up;
            }
            Ok(())
        })?
    }

    /// Whether the kernel has it stopped.
    #[must_use]
    pub fn is_stopped(&self, id: u64) -> bool {
        let Some(pid) = self.pid(id) else { return false };
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name in parentheses may hold anything; the state comes after it.
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('T'))
    }

    /// The first operator's credential.
    ///
    /// # Errors
    /// Before the cluster is born.
    pub fn operator(&self) -> Result<Credential> {
        let home = self.operator_home();
        let contexts = Contexts::load(&home)?;
        Ok(contexts.select(None)?.1.credential(&home)?)
    }

    /// The folder of the first operator's contexts: `PALYRA_HOME`.
    #[must_use]
    pub fn operator_home(&self) -> PathBuf {
        self.data.join("operator")
    }

    /// The product's client, as the first operator, of some replicas: for what a nemesis or a preparation does. What
    /// goes into a history goes through [`Cluster::door`].
    ///
    /// # Errors
    /// Before the cluster is born.
    pub fn client(&self, ids: &[u64], within: Duration) -> Result<Client> {
        let endpoints = Endpoints::new(ids.iter().map(|id| self.node_address(*id)).collect::<Vec<_>>())?;
        let client = Client::new(&self.operator()?, Some(endpoints), ConnectOptions::default())?;
        Ok(client.with_timeout(within))
    }

    /// A client of all members.
    ///
    /// # Errors
    /// Before the cluster is born.
    pub fn client_of_all(&self, within: Duration) -> Result<Client> {
        self.client(&self.replicas(), within)
    }

    /// One way into one replica, as somebody.
    #[must_use]
    pub fn door(&self, id: u64, identity: &Identity) -> Door {
        Door::new(&self.node_address(id), identity)
    }

    fn host(&self, id: u64) -> String {
        match self.loopback {
            Some(_) => "127.0.0.1".to_owned(),
            None => Seat::Replica(id).address(),
        }
    }

    fn port(&self, id: u64, offset: u16) -> u16 {
        let at = u16::try_from(id.saturating_sub(1)).unwrap_or(0);
        self.loopback.map_or(BASE_PORT, |base| base + 10 * at) + offset
    }

    fn address(&self, id: u64, offset: u16) -> String {
        format!("{}:{}", self.host(id), self.port(id, offset))
    }

    /// Where nodes and operators reach it.
    #[must_use]
    pub fn node_address(&self, id: u64) -> String {
        self.address(id, 1)
    }

    /// Where machines enrol at it.
    #[must_use]
    pub fn enrol_address(&self, id: u64) -> String {
        self.address(id, 2)
    }

    /// Where nodes reach it over QUIC.
    #[must_use]
    pub fn quic_address(&self, id: u64) -> String {
        self.address(id, 3)
    }

    /// Its page of metrics, as it is now.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub async fn metrics(&self, id: u64) -> Result<Metrics> {
        metrics::fetch(&self.address(id, 5))
            .await
            .with_context(|| format!("r{id} tells no metrics"))
    }

    /// The replicas' clocks.
    #[must_use]
    pub fn clocks(&self) -> &Clocks {
        &self.clocks
    }

    /// The network.
    #[must_use]
    pub fn net(&self) -> &Net {
        &self.net
    }

    /// What its commands are run by to be in its place.
    #[must_use]
    pub fn prefix(&self, id: u64) -> Vec<String> {
        match self.loopback {
            Some(_) => Vec::new(),
            None => Seat::Replica(id).prefix(),
        }
    }
}

/// Sends a signal to a process of this run.
///
/// # Errors
/// When there is no such process.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    nix::sys::signal::kill(Pid::from_raw(i32::try_from(pid)?), signal)
        .with_context(|| format!("{signal} to process {pid}"))
}
