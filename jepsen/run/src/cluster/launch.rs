//! How a replica's process is started, and how its binary is found.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::{Cluster, State};

/// For a replica to say that it serves: it replays its log before, on a machine that does many things.
const READY: Duration = Duration::from_secs(60);

/// How a replica is started, besides what its configuration says.
#[derive(Clone, Debug, Default)]
pub struct Launch {
    /// Environment, for preloaded libraries and the like.
    pub environment: BTreeMap<String, OsString>,
    /// Another binary than the run's.
    pub palyrad: Option<PathBuf>,
    /// What it is run by, after its namespace was entered: `setarch -R`, `unshare --time`.
    pub wrap: Vec<String>,
}

/// The binaries of a run.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The daemon.
    pub palyrad: PathBuf,
    /// The command line, which is also the node agent.
    pub palyra: PathBuf,
}

impl Programs {
    /// In a folder, or next to this program, or where `PALYRA_BIN` says.
    ///
    /// # Errors
    /// When they are not there, with where they were looked for.
    pub fn find(given: Option<&Path>) -> Result<Programs> {
        let variable = std::env::var_os("PALYRA_BIN").filter(|folder| !folder.is_empty());
        let folders: Vec<PathBuf> = match given.map(Path::to_path_buf).or(variable.map(PathBuf::from)) {
            Some(folder) => vec![folder],
            None => {
                let own = std::env::current_exe().context("where is this program?")?;
                // A test's program is one folder further down.
                own.ancestors().skip(1).take(2).map(Path::to_path_buf).collect()
            }
        };
        for folder in &folders {
            let programs = Programs {
                palyrad: folder.join("palyrad"),
                palyra: folder.join("palyra"),
            };
            if programs.palyrad.is_file() && programs.palyra.is_file() {
                return Ok(programs);
            }
        }
        let first = folders
            .first()
            .map(|folder| folder.display().to_string())
            .unwrap_or_default();
        bail!(
            "palyrad and palyra are not in {first}: cargo build --workspace --bins, \
             or name their folder: --binary DIR"
        )
    }
}

impl Cluster {
    /// Starts a replica that does not run, and waits until it says that it serves.
    ///
    /// # Errors
    /// When it runs, or does not serve in time: with its last words.
    pub async fn start(&self, id: u64) -> Result<()> {
        let turn = self.turn(id);
        let _mine = turn.lock().await;
        ensure!(self.state(id) != State::Removed, "r{id} is no member any more");
        ensure!(self.pid(id).is_none(), "r{id} runs already");
        let launch = self.with(id, |member| member.launch.clone())?;
        let mut child = self.spawn(id, &launch)?;
        let pid = child.id();
        let output = child
            .stdout
            .take()
            .with_context(|| format!("r{id} has no output"))?;
        let mut lines = BufReader::new(output).lines();
        self.with(id, |member| {
            member.child = Some(child);
            member.pid = pid;
            member.state = State::Up;
            member.starts += 1;
        })?;
        let ready = async {
            while let Some(line) = lines.next_line().await? {
                if line.starts_with("palyrad ready") {
                    return Ok(true);
                }
            }
            anyhow::Ok(false)
        };
        let served = tokio::time::timeout(READY, ready).await;
        // It says no more, but a pipe without a reader would end it if it did.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        match served {
            Ok(Ok(true)) => Ok(()),
            Ok(_) => bail!("r{id} ended before it served; it said: {}", self.last_words(id)),
            Err(_) => bail!(
                "r{id} does not serve after {} s; it said: {}",
                READY.as_secs(),
                self.last_words(id)
            ),
        }
    }

    pub(super) fn spawn(&self, id: u64, launch: &Launch) -> Result<Child> {
        let log = std::fs::File::options()
            .append(true)
            .create(true)
            .open(self.log_file(id))
            .with_context(|| format!("cannot write {}", self.log_file(id).display()))?;
        let program = launch.palyrad.as_ref().unwrap_or(&self.programs.palyrad);
        let mut words = self.prefix(id);
        words.extend(launch.wrap.iter().cloned());
        let mut command = prefixed(program, &words);
        command
            .args(["run", "--config"])
            .arg(self.folder(id).join("palyrad.toml"));
        command.envs(&launch.environment);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true);
        command
            .spawn()
            .with_context(|| format!("r{id} does not start ({})", program.display()))
    }

    /// The end of its log, for messages.
    #[must_use]
    pub fn last_words(&self, id: u64) -> String {
        let log = self.log(id);
        let lines: Vec<&str> = log.lines().rev().take(2).collect();
        let words = lines.into_iter().rev().collect::<Vec<_>>().join(" | ");
        if words.is_empty() {
            "nothing".to_owned()
        } else {
            words.chars().take(600).collect()
        }
    }
}

/// A command that is run by something, such as `nsenter`.
#[must_use]
pub fn prefixed(program: &Path, prefix: &[String]) -> Command {
    // If this process ends in a way that no destructor sees, the kernel ends its children: outside of a process
    // namespace there is nothing else that would.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .args(prefix)
        .arg(program);
    command
}
