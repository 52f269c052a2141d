//! A node agent as a process.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use tokio::process::{Child, Command};

use super::Cluster;

/// A process that ends with this one; used for node agents.
pub(crate) struct Agent(Child);

impl Agent {
    /// Starts a program with a log file.
    pub(crate) fn start<S: AsRef<OsStr>>(
        cluster: &Cluster,
        name: &str,
        arguments: &[S],
        environment: &[(&str, &Path)],
    ) -> Result<Agent> {
        let log = cluster.dir().join(format!("logs/{name}.log"));
        let file = std::fs::File::options().append(true).create(true).open(log)?;
        let mut command = Command::new(cluster.program("palyra"));
        command.args(arguments).envs(environment.iter().copied());
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .kill_on_drop(true);
        let child = command.spawn().context("palyra does not start")?;
        if let Some(pid) = child.id() {
            std::fs::write(cluster.dir().join(format!("{name}.pid")), pid.to_string())?;
        }
        Ok(Agent(child))
    }

    /// Insists that it still runs.
    pub(crate) fn check(&mut self, name: &str) -> Result<()> {
        match self.0.try_wait()? {
            Some(status) => bail!("the agent of {name} has ended with {status}; see logs/{name}.log"),
            None => Ok(()),
        }
    }
}
