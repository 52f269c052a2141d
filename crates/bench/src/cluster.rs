//! A cluster of real `palyrad` processes, each with its own folder and addresses, and its first operator.
//!
//! What never lives here: load, and measuring. Invariants: processes end with this one, even when it is killed;
//! a replica counts as started when it says so; a folder that was given stays, one that was not is removed.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use palyra_client::{Client, ConnectOptions, Contexts, Endpoints};
use palyra_proto::cluster::v1::StatusResponse;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{Instant, sleep, timeout};

mod agent;

pub(crate) use agent::Agent;

/// For a replica to say that it serves: a large log is replayed before.
const READY: Duration = Duration::from_secs(120);
/// Entries that a replica may be behind the others and still count as caught up, under load.
const BEHIND: u64 = 200;
const POLL: Duration = Duration::from_millis(50);
/// Written when the birth is complete; a folder without it is of no use.
const COMPLETE: &str = "complete";

/// Where a replica runs.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// The address of its listeners.
    pub(crate) host: String,
    /// The first of its ports.
    pub(crate) base_port: u16,
    /// What its commands are run by: nothing, or for instance `ip netns exec NAME`.
    pub(crate) prefix: Vec<String>,
}

impl Place {
    /// Three replicas on loopback, at ports that are free now.
    pub(crate) fn loopback() -> Result<Vec<Place>> {
        let base = free_ports()?;
        Ok((0..3).map(|at| Place::local(base + 10 * at)).collect())
    }

    fn local(base_port: u16) -> Place {
        Place {
            host: "127.0.0.1".to_owned(),
            base_port,
            prefix: Vec::new(),
        }
    }

    fn address(&self, offset: u16) -> String {
        format!("{}:{}", self.host, self.base_port + offset)
    }
}

/// Settings of `palyrad.toml` that a run needs to be other than they are by default, as TOML.
pub(crate) type Settings = toml::Table;

/// Reads settings that stand in the code.
pub(crate) fn settings(text: &str) -> Result<Settings> {
    text.parse().context("settings of the bench are no TOML")
}

/// The processes and their folders.
pub(crate) struct Cluster {
    dir: PathBuf,
    temporary: Option<tempfile::TempDir>,
    programs: PathBuf,
    places: Vec<Place>,
    settings: Settings,
    running: BTreeMap<u64, Child>,
    _watchdog: WatchDog,
}

impl Cluster {
    /// Starts the cluster in `dir`, which is born when the folder is new; without one, a new cluster in a folder
    /// that goes when this value goes.
    pub(crate) async fn start(dir: Option<&Path>, places: Vec<Place>, settings: Settings) -> Result<Cluster> {
        let temporary = match dir {
            Some(_) => None,
            None => Some(tempfile::Builder::new().prefix("palyra-bench-").tempdir()?),
        };
        let dir = match (&temporary, dir) {
            (Some(temporary), _) => temporary.path().to_path_buf(),
            (None, given) => std::path::absolute(given.unwrap_or(Path::new(".")))?,
        };
        std::fs::create_dir_all(dir.join("logs"))
            .with_context(|| format!("cannot make {}", dir.display()))?;
        let watchdog = watch_over(&dir)?;
        let born = dir.join(COMPLETE).exists();
        let places = if born { places_of(&dir, places)? } else { places };
        let mut cluster = Cluster {
            programs: programs()?,
            temporary,
            places,
            settings,
            running: BTreeMap::new(),
            _watchdog: watchdog,
            dir,
        };
        if born {
            for id in cluster.ids() {
                cluster.configure(id)?;
                cluster.start_replica(id).await?;
            }
        } else {
            cluster.birth().await?;
        }
        cluster.settled(Duration::from_secs(60)).await?;
        Ok(cluster)
    }

    async fn birth(&mut self) -> Result<()> {
        ensure!(
            !self.folder(1).exists(),
            "{} holds a cluster whose birth did not finish; remove the folder and run this again",
            self.dir.display()
        );
        let first = self.places[0].clone();
        let (folder, port) = (text(&self.folder(1)), first.base_port.to_string());
        let init = [
            "cluster",
            "init",
            "--data-dir",
            &folder,
            "--name",
            "r1",
            "--context",
            "local",
        ];
        let at = ["--listen-host", &first.host, "--base-port", &port];
        self.palyra(&[&init[..], &at[..]].concat()).await?;
        self.configure(1)?;
        self.start_replica(1).await?;
        for id in 2..=self.places.len() as u64 {
            let name = format!("r{id}");
            let client = self.client_of(&[1])?;
            let request = palyra_proto::cluster::v1::MintJoinTokenRequest {
                name: name.clone(),
                ..Default::default()
            };
            let minted = client.mint_join_token(request).await?;
            let token = self.dir.join(format!("{name}.token"));
            std::fs::write(&token, minted.token)?;
            let place = self.places[index(id)].clone();
            let (file, folder) = (text(&token), text(&self.folder(id)));
            let port = place.base_port.to_string();
            let join = [
                "join",
                "--token-file",
                &file,
                "--data-dir",
                &folder,
                "--name",
                &name,
            ];
            let at = ["--listen-host", &place.host, "--base-port", &port];
            self.run("palyrad", &place.prefix, &[&join[..], &at[..]].concat())
                .await?;
            std::fs::remove_file(&token)?;
            self.configure(id)?;
            self.start_replica(id).await?;
        }
        let all = self.node_addresses().join(",");
        self.palyra(&["context", "add", "local", "--endpoints", &all])
            .await?;
        self.settled(Duration::from_secs(60)).await?;
        std::fs::write(self.dir.join(COMPLETE), "")?;
        Ok(())
    }

    /// Puts this run's settings into a replica's configuration.
    fn configure(&self, id: u64) -> Result<()> {
        let path = self.folder(id).join("palyrad.toml");
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut config: toml::Table = text
            .parse()
            .with_context(|| format!("{} is no TOML", path.display()))?;
        merge(&mut config, &self.settings);
        std::fs::write(&path, config.to_string())?;
        Ok(())
    }

    /// Starts a replica and waits until it says that it serves.
    pub(crate) async fn start_replica(&mut self, id: u64) -> Result<()> {
        let place = &self.places[index(id)];
        let config = self.folder(id).join("palyrad.toml");
        let log = |ending: &str| self.dir.join(format!("logs/r{id}.{ending}"));
        let errors = std::fs::File::options()
            .append(true)
            .create(true)
            .open(log("err"))?;
        let mut command = prefixed(&self.programs.join("palyrad"), &place.prefix);
        command.args(["run", "--config"]).arg(&config);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .kill_on_drop(true);
        let mut child = command
            .spawn()
            .with_context(|| format!("replica {id} does not start"))?;
        if let Some(pid) = child.id() {
            std::fs::write(self.dir.join(format!("r{id}.pid")), pid.to_string())?;
        }
        let output = child
            .stdout
            .take()
            .ok_or_else(|| anyhow!("replica {id} has no output"))?;
        let mut lines = BufReader::new(output).lines();
        let ready = async {
            while let Some(line) = lines.next_line().await? {
                if line.starts_with("palyrad ready") {
                    return Ok(true);
                }
            }
            anyhow::Ok(false)
        };
        let served = timeout(READY, ready).await;
        if !matches!(served, Ok(Ok(true))) {
            let said = std::fs::read_to_string(log("err")).unwrap_or_default();
            let last = said.lines().last().unwrap_or("nothing").to_owned();
            bail!(
                "replica {id} does not serve; it said: {last}; see {}",
                log("err").display()
            );
        }
        // It says no more, but a pipe without a reader would end it if it did.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        self.running.insert(id, child);
        Ok(())
    }

    /// Kills a replica with SIGKILL. Answers when that was.
    pub(crate) async fn kill(&mut self, id: u64) -> Result<Instant> {
        let mut child = self
            .running
            .remove(&id)
            .ok_or_else(|| anyhow!("replica {id} does not run"))?;
        let at = Instant::now();
        child.kill().await?;
        Ok(at)
    }

    /// Tells a replica to stop, and waits until it has.
    pub(crate) async fn terminate(&mut self, id: u64) -> Result<()> {
        let mut child = self
            .running
            .remove(&id)
            .ok_or_else(|| anyhow!("replica {id} does not run"))?;
        let pid = child
            .id()
            .ok_or_else(|| anyhow!("replica {id} has ended by itself"))?;
        nix::sys::signal::kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGTERM)?;
        let ended = timeout(Duration::from_secs(30), child.wait()).await;
        let status =
            ended.with_context(|| format!("replica {id} does not stop within 30 s of SIGTERM"))??;
        ensure!(
            status.success(),
            "replica {id} stopped with {status}; see {}",
            self.dir.join("logs").display()
        );
        Ok(())
    }

    /// Stops every replica and starts it again, so that nothing that was done before is in its memory.
    pub(crate) async fn restart_all(&mut self) -> Result<()> {
        for id in self.ids() {
            self.terminate(id).await?;
        }
        for id in self.ids() {
            self.start_replica(id).await?;
        }
        self.settled(Duration::from_secs(120)).await?;
        Ok(())
    }

    /// Waits until all replicas are voters, can be reached, agree on a leader and are caught up.
    pub(crate) async fn settled(&self, within: Duration) -> Result<StatusResponse> {
        let client = self.client()?.with_timeout(Duration::from_secs(5));
        let until = Instant::now() + within;
        loop {
            let last = match client.status().await {
                Ok(status) if is_settled(&status, self.running.len()) => return Ok(status),
                Ok(status) => describe(&status),
                Err(error) => error.to_string(),
            };
            ensure!(
                Instant::now() < until,
                "the cluster is not whole within {} s: {last}; see {}",
                within.as_secs(),
                self.dir.join("logs").display()
            );
            sleep(POLL).await;
        }
    }

    /// Runs a command of `palyra` as the first operator.
    pub(crate) async fn palyra(&self, arguments: &[&str]) -> Result<String> {
        let prefix = self.places[0].prefix.clone();
        self.run("palyra", &prefix, arguments).await
    }

    async fn run(&self, program: &str, prefix: &[String], arguments: &[&str]) -> Result<String> {
        let mut command = prefixed(&self.programs.join(program), prefix);
        command
            .args(arguments)
            .env("PALYRA_HOME", self.operator_home())
            .kill_on_drop(true);
        let output = command
            .output()
            .await
            .with_context(|| format!("{program} does not start"))?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ensure!(
            output.status.success(),
            "{program} {} failed: {}",
            arguments.join(" "),
            said(&output.stderr).trim()
        );
        Ok(said(&output.stdout))
    }

    /// A client of all replicas, as the first operator.
    pub(crate) fn client(&self) -> Result<Client> {
        self.client_of(&self.ids())
    }

    /// A client of some replicas, as the first operator.
    pub(crate) fn client_of(&self, ids: &[u64]) -> Result<Client> {
        let home = self.operator_home();
        let contexts = Contexts::load(&home)?;
        let credential = contexts.select(None)?.1.credential(&home)?;
        let addresses = ids.iter().map(|id| self.node_address(*id));
        let endpoints = Endpoints::new(addresses.collect::<Vec<_>>())?;
        Ok(Client::new(
            &credential,
            Some(endpoints),
            ConnectOptions::default(),
        )?)
    }

    /// All ids.
    pub(crate) fn ids(&self) -> Vec<u64> {
        (1..=self.places.len() as u64).collect()
    }

    /// Process ids of the replicas that run.
    pub(crate) fn pids(&self) -> Vec<(u64, u32)> {
        let pid = |(id, child): (&u64, &Child)| Some((*id, child.id()?));
        self.running.iter().filter_map(pid).collect()
    }

    /// Where a replica serves nodes and operators.
    pub(crate) fn node_address(&self, id: u64) -> String {
        self.places[index(id)].address(1)
    }

    /// The same of all.
    pub(crate) fn node_addresses(&self) -> Vec<String> {
        self.ids().into_iter().map(|id| self.node_address(id)).collect()
    }

    /// Where a replica serves nodes over QUIC.
    pub(crate) fn quic_address(&self, id: u64) -> String {
        self.places[index(id)].address(3)
    }

    /// The same of all.
    pub(crate) fn quic_addresses(&self) -> Vec<String> {
        self.ids().into_iter().map(|id| self.quic_address(id)).collect()
    }

    /// Where a replica enrols machines.
    pub(crate) fn enrol_address(&self, id: u64) -> String {
        self.places[index(id)].address(2)
    }

    /// The folder of everything.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A program of this build.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// Has the folder stay. Answers where it is.
    pub(crate) fn keep(&mut self) -> PathBuf {
        if let Some(temporary) = self.temporary.take() {
            let _ = temporary.keep();
        }
        self.dir.clone()
    }

    /// Ends the replicas in good order.
    pub(crate) async fn stop(mut self) -> Result<()> {
        for id in self.running.keys().copied().collect::<Vec<_>>() {
            self.terminate(id).await?;
        }
        Ok(())
    }

    fn folder(&self, id: u64) -> PathBuf {
        self.dir.join(format!("r{id}"))
    }

    fn operator_home(&self) -> PathBuf {
        self.dir.join("operator")
    }
}

fn index(id: u64) -> usize {
    usize::try_from(id).unwrap_or(usize::MAX) - 1
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn prefixed(program: &Path, prefix: &[String]) -> Command {
    match prefix.split_first() {
        None => Command::new(program),
        Some((first, rest)) => {
            let mut command = Command::new(first);
            command.args(rest).arg(program);
            command
        }
    }
}

fn is_settled(status: &StatusResponse, running: usize) -> bool {
    let reachable: Vec<_> = status
        .replicas
        .iter()
        .filter(|replica| replica.reachable)
        .collect();
    let newest = reachable
        .iter()
        .map(|replica| replica.applied_index)
        .max()
        .unwrap_or(0);
    status.leader_id != 0
        && usize::try_from(status.voters).is_ok_and(|voters| voters >= running)
        && reachable.len() == running
        && reachable.iter().all(|replica| replica.status == "voter")
        && reachable
            .iter()
            .all(|replica| replica.applied_index + BEHIND >= newest)
}

fn describe(status: &StatusResponse) -> String {
    let replicas: Vec<String> = status
        .replicas
        .iter()
        .map(|replica| format!("{} {} at {}", replica.name, replica.role, replica.applied_index))
        .collect();
    format!("leader {}, {}", status.leader_id, replicas.join(", "))
}

fn merge(into: &mut toml::Table, from: &toml::Table) {
    for (key, value) in from {
        match (into.get_mut(key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(more)) => merge(inner, more),
            _ => {
                into.insert(key.clone(), value.clone());
            }
        }
    }
}

/// The addresses of a cluster that was born earlier: its configurations hold them.
fn places_of(dir: &Path, places: Vec<Place>) -> Result<Vec<Place>> {
    let mut found = Vec::new();
    for (at, place) in places.into_iter().enumerate() {
        let path = dir.join(format!("r{}/palyrad.toml", at + 1));
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let config: toml::Table = text.parse()?;
        let listen = config.get("listen").and_then(toml::Value::as_table);
        let get = |key: &str| listen.and_then(|listen| listen.get(key));
        let port = get("base_port").and_then(toml::Value::as_integer);
        let host = get("host").and_then(toml::Value::as_str);
        found.push(Place {
            base_port: port
                .and_then(|port| u16::try_from(port).ok())
                .unwrap_or(place.base_port),
            host: host.map_or_else(|| place.host.clone(), str::to_owned),
            ..place
        });
    }
    Ok(found)
}

/// The folder of `palyrad` and `palyra`: `PALYRA_BIN`, or that of this program.
fn programs() -> Result<PathBuf> {
    let given = std::env::var_os("PALYRA_BIN")
        .filter(|folder| !folder.is_empty())
        .map(PathBuf::from);
    let own = std::env::current_exe().context("where is this program?")?;
    let mut candidates: Vec<PathBuf> = given.into_iter().collect();
    if candidates.is_empty() {
        // A test's executable is one folder further down.
        candidates.extend(own.ancestors().skip(1).take(2).map(Path::to_path_buf));
    }
    let found = candidates.iter().find(|folder| {
        ["palyrad", "palyra"]
            .iter()
            .all(|program| folder.join(program).is_file())
    });
    found.cloned().ok_or_else(|| {
        anyhow!(
            "palyrad and palyra are not in {}; cargo build --workspace --bins, or set PALYRA_BIN",
            candidates.first().map(|folder| text(folder)).unwrap_or_default()
        )
    })
}

/// Held, it keeps the shell of [`watch_over`] waiting.
pub(crate) type WatchDog = (Child, ChildStdin);

/// A shell that kills the processes of a folder's `*.pid` files when this process is gone: its standard input ends
/// then.
pub(crate) fn watch_over(dir: &Path) -> Result<WatchDog> {
    let script = "cat >/dev/null; for file in \"$1\"/*.pid; do [ -f \"$file\" ] || continue; pid=$(cat \"$file\"); \
                  case $(readlink \"/proc/$pid/exe\") in */palyra|*/palyrad|*/etcd) kill -9 \"$pid\";; esac; done";
    let mut command = Command::new("setsid");
    command.args(["sh", "-c", script, "sh"]).arg(dir.as_os_str());
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().context("setsid (of util-linux) does not start")?;
    let alive = child
        .stdin
        .take()
        .ok_or_else(|| anyhow!("the watchdog has no input"))?;
    Ok((child, alive))
}

/// A base such that the ports of three replicas are free now.
fn free_ports() -> Result<u16> {
    let seed = u16::try_from(std::process::id() % 500).unwrap_or(0);
    let free = |base: &u16| {
        let mut ports = (0..30u16).filter(|port| port % 10 < 6).map(|port| base + port);
        ports.all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok())
    };
    let bases = (0..500u16).map(|step| 12_000 + (seed + step * 7) % 500 * 30);
    bases
        .into_iter()
        .find(free)
        .ok_or_else(|| anyhow!("no thirty ports in a row are free between 12000 and 27000"))
}

/// Writes a file that only its owner reads, whole or not at all.
pub(crate) async fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut options = tokio::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .await?;
    file.write_all(bytes).await?;
    file.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests;
