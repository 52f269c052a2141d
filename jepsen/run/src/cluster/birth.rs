//! How a cluster is born: the first replica makes it, the others join by token, each is started with this run's
//! settings.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use palyra_proto::cluster::v1::{MintJoinTokenRequest, StatusResponse};
use tokio::time::{Instant, sleep, timeout};

use super::launch::prefixed;
use super::{Cluster, Member, State};
use crate::net::Seat;

/// For a call of the operator while the cluster is well.
const CALL: Duration = Duration::from_secs(20);
/// For a replica to be admitted; its program tries several times.
const JOIN: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(50);

impl Cluster {
    /// Makes a cluster of `count` voters.
    ///
    /// # Errors
    /// When a step fails, with what its program said.
    pub async fn birth(&self, count: u64) -> Result<()> {
        self.enlist(1).await?;
        let folder = self.folder(1);
        let (host, port) = (self.host(1), self.port(1, 0).to_string());
        let init: [&str; 8] = [
            "cluster",
            "init",
            "--data-dir",
            text(&folder)?,
            "--name",
            "r1",
            "--context",
            "local",
        ];
        let at = ["--listen-host", &host, "--base-port", &port];
        self.palyra(&[&init[..], &at[..]].concat()).await?;
        self.configure(1)?;
        self.start(1).await?;
        for id in 2..=count {
            self.join(id).await?;
        }
        self.settled(Duration::from_secs(60)).await?;
        Ok(())
    }

    /// Has a replica join that was never a member, and starts it. Its id must be the one that the cluster gives next.
    ///
    /// # Errors
    /// When a step fails. One that joined and does not start is a member all the same.
    pub async fn join(&self, id: u64) -> Result<()> {
        let name = format!("r{id}");
        let members: Vec<u64> = self.replicas();
        self.enlist(id).await?;
        let client = self.client(&members, CALL)?;
        let request = MintJoinTokenRequest {
            name: name.clone(),
            ..Default::default()
        };
        let joined = async {
            let token = client.mint_join_token(request).await?.token;
            self.join_with(id, &name, &token).await?;
            self.configure(id)
        };
        let joined = timeout(JOIN, joined)
            .await
            .unwrap_or_else(|_| Err(anyhow!("not within {} s", JOIN.as_secs())));
        if joined.is_err() {
            // Who never starts is never promoted, whatever the cluster thinks.
            self.strike_out(id)?;
        }
        joined.with_context(|| format!("{name} does not join"))?;
        self.start(id).await
    }

    async fn join_with(&self, id: u64, name: &str, token: &str) -> Result<()> {
        let file = self.data.join(format!("{name}.token"));
        std::fs::write(&file, token)?;
        let folder = self.folder(id);
        let (host, port) = (self.host(id), self.port(id, 0).to_string());
        let what = [
            "join",
            "--token-file",
            text(&file)?,
            "--data-dir",
            text(&folder)?,
            "--name",
            name,
        ];
        let at = ["--listen-host", &host, "--base-port", &port];
        let palyrad = self.programs.palyrad.clone();
        let answer = self
            .run(&palyrad, &self.prefix(id), &[&what[..], &at[..]].concat())
            .await;
        std::fs::remove_file(&file)?;
        answer.map(|_| ())
    }

    /// Gives a replica its seat, without a folder yet.
    async fn enlist(&self, id: u64) -> Result<()> {
        ensure!(
            id < 200,
            "r{id}: a run has at most 199 replicas, removed ones included"
        );
        self.net.attach(Seat::Replica(id)).await?;
        let mut launch = super::Launch::default();
        self.clocks.equip(id, &mut launch)?;
        self.disks.make(id, &self.disk_folder(id))?;
        let member = Member {
            state: State::Down,
            child: None,
            pid: None,
            starts: 0,
            launch,
            may_end: 0,
        };
        self.members().insert(id, member);
        Ok(())
    }

    /// Marks a replica as removed; its process must have been ended.
    ///
    /// # Errors
    /// When there is no such replica.
    pub fn strike_out(&self, id: u64) -> Result<()> {
        self.with(id, |member| member.state = State::Removed)
    }

    /// Takes [`Cluster::strike_out`] back.
    ///
    /// # Errors
    /// When there is no such replica.
    pub fn reinstate(&self, id: u64) -> Result<()> {
        self.with(id, |member| member.state = State::Down)
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
        // The harness looks at it from its own seat.
        let listen = config
            .entry("listen")
            .or_insert_with(|| toml::Table::new().into());
        if let Some(listen) = listen.as_table_mut() {
            listen.insert("metrics".to_owned(), self.address(id, 5).into());
        }
        // The rest of the folder is the product's to make durable; this is the harness's.
        crate::disk::write_durably(&path, &config.to_string())
    }

    /// Waits until all replicas that run are voters, can be reached, agree on a leader and have applied what was
    /// applied anywhere when this began.
    ///
    /// # Errors
    /// When that is not so within that time, with what is missing.
    pub async fn settled(&self, within: Duration) -> Result<StatusResponse> {
        let client = self.client_of_all(Duration::from_secs(3))?;
        let until = Instant::now() + within;
        let mut wanted = None;
        loop {
            let last = match client.status().await {
                Ok(status) => {
                    let newest = status.replicas.iter().map(|replica| replica.applied_index).max();
                    let wanted = *wanted.get_or_insert(newest.unwrap_or(0));
                    match unsettled(&status, &self.replicas(), wanted) {
                        None => return Ok(status),
                        Some(why) => why,
                    }
                }
                Err(error) => error.to_string(),
            };
            ensure!(
                Instant::now() < until,
                "the cluster is not whole within {} s: {last}",
                within.as_secs()
            );
            sleep(POLL).await;
        }
    }

    /// Runs a command of `palyra` as the first operator, from the clients' seat. Answers what it printed.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub async fn palyra(&self, arguments: &[&str]) -> Result<String> {
        let program = self.programs.palyra.clone();
        self.run(&program, &[], arguments).await
    }

    async fn run(&self, program: &Path, prefix: &[String], arguments: &[&str]) -> Result<String> {
        let mut command = prefixed(program, prefix);
        command
            .args(arguments)
            .env("PALYRA_HOME", self.operator_home())
            .kill_on_drop(true);
        let output = command
            .output()
            .await
            .with_context(|| format!("{} does not start", program.display()))?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        ensure!(
            output.status.success(),
            "{} {} failed: {}",
            program.file_name().unwrap_or_default().display(),
            arguments.first().unwrap_or(&""),
            said(&output.stderr)
        );
        Ok(said(&output.stdout))
    }
}

/// What is missing.
fn unsettled(status: &StatusResponse, members: &[u64], wanted: u64) -> Option<String> {
    if status.leader_id == 0 {
        return Some("there is no leader".to_owned());
    }
    for id in members {
        let Some(replica) = status.replicas.iter().find(|replica| replica.id == *id) else {
            return Some(format!("r{id} is no member"));
        };
        if !replica.reachable {
            return Some(format!("r{id} can't be reached"));
        }
        if replica.status != "voter" {
            return Some(format!("r{id} is {}", replica.status));
        }
        if replica.applied_index < wanted {
            return Some(format!("r{id} has applied {} of {wanted}", replica.applied_index));
        }
    }
    None
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}

/// Puts one table's keys into another, table by table.
pub(crate) fn merge(into: &mut toml::Table, from: &toml::Table) {
    for (key, value) in from {
        match (into.get_mut(key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(more)) => merge(inner, more),
            _ => {
                into.insert(key.clone(), value.clone());
            }
        }
    }
}

/// A base such that the ports of nine replicas on loopback are free now.
pub(super) fn free_ports() -> Result<u16> {
    let seed = u16::try_from(std::process::id() % 500).unwrap_or(0);
    let free = |base: &u16| {
        let mut ports = (0..90u16).filter(|port| port % 10 < 6).map(|port| base + port);
        ports.all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok())
    };
    (0..200u16)
        .map(|step| 12_000 + (seed + step * 7) % 200 * 90)
        .find(free)
        .ok_or_else(|| anyhow!("no ninety ports in a row are free between 12000 and 30000"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use palyra_proto::cluster::v1::ReplicaStatus;

    #[test]
    fn what_is_missing_is_named() {
        let replica = |id, status: &str, applied_index| ReplicaStatus {
            id,
            status: status.to_owned(),
            reachable: true,
            applied_index,
            ..Default::default()
        };
        let mut status = StatusResponse {
            leader_id: 1,
            replicas: vec![replica(1, "voter", 9), replica(2, "voter", 8)],
            ..Default::default()
        };
        let says =
            |status: &StatusResponse, members: &[u64]| unsettled(status, members, 9).unwrap_or_default();
        assert_eq!(says(&status, &[1, 2]), "r2 has applied 8 of 9");
        assert_eq!(says(&status, &[1]), "");
        assert_eq!(says(&status, &[3]), "r3 is no member");
        status.replicas[1] = replica(2, "learner", 9);
        assert_eq!(says(&status, &[2]), "r2 is learner");
        status.leader_id = 0;
        assert_eq!(says(&status, &[1]), "there is no leader");
    }

    #[test]
    fn settings_are_merged_by_table() {
        let mut config: toml::Table = "[raft]\nheartbeat = \"100ms\"\n[log]\nlevel = \"info\""
            .parse()
            .unwrap();
        merge(&mut config, &"[raft]\nsnapshot_entries = 200".parse().unwrap());
        assert_eq!(config["raft"]["heartbeat"].as_str(), Some("100ms"));
        assert_eq!(config["raft"]["snapshot_entries"].as_integer(), Some(200));
    }
}
