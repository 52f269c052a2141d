//! A real agent, `palyra node run`, and the log that its programs write: what ran, and how often.
//!
//! Invariants: the programs note their dispatch before anything else, so that a run that was cut off counts as one.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use palyra_client::Client;
use palyra_proto::node::v1::{GetNodeRequest, NodeInfo};
use palyra_proto::pairing::v1::{ApproveRequest, ListRequestsRequest, MintTicketRequest};
use tokio::time::{Instant, sleep};

use crate::cluster::{Agent, Cluster, write_private};

/// For an agent to be paired and online.
const ONLINE: Duration = Duration::from_secs(60);

/// A program takes a moment, so that faults find some of them running.
const PROGRAM: &str = "#!/bin/sh\nprintf '%s\\n' \"$PALYRA_DISPATCH_ID\" >>\"$BENCH_LOG\"\nsleep 0.2\ncat\n";

/// The two capabilities.
pub(super) const CAPABILITIES: [&str; 2] = ["bench.once", "bench.idempotent"];

/// An agent with its folder.
pub(super) struct Machine {
    /// How it is called here and in the cluster.
    pub(super) name: String,
    /// Its device id.
    pub(super) device_id: String,
    /// Told by its owner's configuration.
    pub(super) transport: &'static str,
    log: PathBuf,
    agent: Agent,
}

impl Machine {
    /// Pairs an agent by ticket and waits until it is online.
    pub(super) async fn start(
        cluster: &Cluster,
        client: &Client,
        transport: &'static str,
    ) -> Result<Machine> {
        let name = format!("agent-{transport}");
        let folder = cluster.dir().join(&name);
        let (log, program) = (folder.join("runs"), folder.join("program"));
        std::fs::create_dir_all(&folder)?;
        std::fs::write(&log, "")?;
        std::fs::write(&program, PROGRAM)?;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
        let capabilities = folder.join("capabilities.toml");
        std::fs::write(&capabilities, capabilities_of(&program))?;
        let data = folder.join("data");
        let minted = client.mint_ticket(MintTicketRequest::default()).await?;
        let ticket = folder.join("ticket");
        write_private(&ticket, minted.ticket.as_bytes()).await?;
        let shown = |path: &Path| path.display().to_string();
        let (data, capabilities, ticket) = (shown(&data), shown(&capabilities), shown(&ticket));
        let run = [
            "node",
            "run",
            "--data-dir",
            &data,
            "--name",
            &name,
            "--ticket-file",
            &ticket,
        ];
        let offer = ["--capabilities", &capabilities, "--transport", transport];
        let arguments = [&run[..], &offer[..]].concat();
        let mut agent = Agent::start(cluster, &name, &arguments, &[("BENCH_LOG", &log)])?;
        approve(client, &name, &mut agent).await?;
        let node = online(client, &name).await?;
        Ok(Machine {
            device_id: node.device_id,
            transport,
            name,
            log,
            agent,
        })
    }

    /// Insists that the agent still runs.
    pub(super) fn check(&mut self) -> Result<()> {
        self.agent.check(&self.name)
    }

    /// How often each dispatch was begun by a program.
    pub(super) fn runs(&self) -> Result<BTreeMap<String, u32>> {
        let text =
            std::fs::read_to_string(&self.log).with_context(|| format!("no {}", self.log.display()))?;
        Ok(count(&text))
    }
}

fn count(log: &str) -> BTreeMap<String, u32> {
    let mut runs = BTreeMap::new();
    for line in log.lines().filter(|line| !line.is_empty()) {
        *runs.entry(line.to_owned()).or_default() += 1;
    }
    runs
}

fn capabilities_of(program: &Path) -> String {
    let effects = ["once", "idempotent"];
    let entries = CAPABILITIES.iter().zip(effects).map(|(name, effect)| {
        format!(
            "[[capability]]\nname = \"{name}\"\nprogram = {:?}\ntimeout = \"30s\"\neffect = \"{effect}\"\n\
             concurrency = 32\nenv = [\"BENCH_LOG\"]\n",
            program.display().to_string()
        )
    });
    entries.collect()
}

async fn approve(client: &Client, name: &str, agent: &mut Agent) -> Result<()> {
    let until = Instant::now() + ONLINE;
    loop {
        agent.check(name)?;
        let list = ListRequestsRequest {
            status: "pending_approval".to_owned(),
            ..Default::default()
        };
        let listed = client.list_requests(list).await?.requests;
        if let Some(request) = listed.into_iter().find(|request| request.device_name == name) {
            let approve = ApproveRequest {
                id: request.id,
                ..Default::default()
            };
            client.approve(approve).await?;
            return Ok(());
        }
        ensure!(
            Instant::now() < until,
            "{name} does not ask to be paired; see logs/{name}.log"
        );
        sleep(Duration::from_millis(100)).await;
    }
}

async fn online(client: &Client, name: &str) -> Result<NodeInfo> {
    let until = Instant::now() + ONLINE;
    loop {
        if let Ok(node) = node(client, name).await
            && node.status == "online"
        {
            return Ok(node);
        }
        ensure!(
            Instant::now() < until,
            "{name} does not come online; see logs/{name}.log"
        );
        sleep(Duration::from_millis(100)).await;
    }
}

/// A node by name or id.
pub(super) async fn node(client: &Client, name: &str) -> Result<NodeInfo> {
    let request = GetNodeRequest {
        device_id: name.to_owned(),
        ..Default::default()
    };
    let found = client.get_node(request).await?.node;
    found.ok_or_else(|| anyhow!("the answer holds no node {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_counted_by_dispatch() {
        let runs = count("a\nb\na\n\n");
        assert_eq!((runs["a"], runs["b"], runs.len()), (2, 1, 2));
    }

    #[test]
    fn capabilities_name_the_program_and_both_effects() {
        let table: toml::Table = capabilities_of(Path::new("/x/pro\"gram")).parse().unwrap();
        let all = table["capability"].as_array().unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0]["effect"].as_str(), Some("once"));
        assert_eq!(all[1]["program"].as_str(), Some("/x/pro\"gram"));
    }
}
