//! Sessions of many nodes: what they cost while nothing happens, and what a lost replica or leader does to them.
//!
//! What never lives here: how nodes behave (`sim`). The order of a run: pair (or take from the folder), restart the
//! replicas so that pairing has left nothing in their memory, measure them without sessions, attach all nodes,
//! measure the quiet time, dispatch to some, then one fault after the other (`faults`).

mod faults;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use palyra_client::Client;
use palyra_pki::tls::SharedTrust;
use palyra_proto::cluster::v1::StatusResponse;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::cluster::{Cluster, Place, Settings, settings};
use crate::load::{self, Job};
use crate::report::Report;
use crate::sim::Identity;
use crate::sim::node::{Fleet, Transport};
use crate::sim::pair::pair;
use crate::spread::{self, Spread};
use crate::usage::{self, Usage};
use crate::{Keep, say};

/// A healthy fleet of any size may cost at most so many log entries a second.
const ENTRIES_PER_SECOND: f64 = 5.0;
/// Before figures are taken: what a start leaves to be done is over by then.
const SETTLE: Duration = Duration::from_secs(5);
/// For all nodes to attach: thousands of handshakes on the cores that the replicas share with the generator.
const ATTACH: Duration = Duration::from_secs(900);
/// Nodes that are dispatched to, and how often a second.
const REACHED: usize = 200;
const REACHED_PER_SECOND: f64 = 20.0;

/// Arguments of `palyra-bench fleet`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many nodes
    #[arg(long, default_value = "1000", value_parser = clap::value_parser!(u32).range(3..=50_000))]
    nodes: u32,
    /// How long the quiet time is measured, in seconds
    #[arg(long, default_value = "60", value_parser = clap::value_parser!(u64).range(1..=3_600))]
    steady: u64,
    /// A folder for the cluster and the nodes' credentials, so that the next run need not pair (credentials last a day)
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// How nodes reach replicas
    #[arg(long, value_enum, default_value = "grpc")]
    transport: Transport,
    /// The servers' heartbeat interval, in seconds; without it palyrad's own
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=600))]
    heartbeat: Option<u64>,
    /// Only cost and reach; no faults
    #[arg(long)]
    no_faults: bool,
}

impl Args {
    /// What the replicas have to allow: every node comes from one address here.
    fn settings(&self) -> Result<Settings> {
        let connections = u64::from(self.nodes) * 2 + 1_000;
        let quic = connections.min(100_000);
        let mut text = format!(
            "[limits]\nconnections = {connections}\nconnections_per_source = {connections}\nhandshakes = 1024\n\
             [quic]\nconnections = {quic}\nper_source = {quic}\n"
        );
        if let Some(seconds) = self.heartbeat {
            let timeout = seconds * 7 / 2 + 1;
            text += &format!("[timers]\nheartbeat = \"{seconds}s\"\nheartbeat_timeout = \"{timeout}s\"\n");
        }
        settings(&text)
    }
}

/// A run under way.
struct Run {
    cluster: Cluster,
    client: Client,
    fleet: Fleet,
    /// Device ids of all nodes.
    ours: BTreeSet<String>,
    report: Report,
}

/// Runs it.
pub(crate) async fn run(args: Args, keep: Keep) -> Result<Report> {
    let nodes = usize::try_from(args.nodes)?;
    let mut report = Report::new("fleet");
    report.fact("nodes", args.nodes);
    report.fact("transport", format!("{:?}", args.transport).to_lowercase());
    report.fact("open_files_allowed", usage::allow_files(u64::from(args.nodes))?);
    let (cluster, identities) = prepare(&args, nodes, &mut report).await?;
    let client = cluster.client()?;
    let bare = usages(&cluster)?;
    let before = client.status().await?;
    say(&format!("attaching {nodes} nodes"));
    let began = Instant::now();
    let addresses = args.transport.addresses(&cluster);
    let fleet = Fleet::start(identities, addresses, args.transport, ATTACH).await?;
    report.fact("attach_seconds", began.elapsed().as_secs_f64());
    let after = client.status().await?;
    report.fact("attach_entries", applied(&after) - applied(&before));
    let ours = fleet.device_ids.iter().cloned().collect();
    let mut run = Run {
        cluster,
        client,
        fleet,
        ours,
        report,
    };
    run.steady(args.steady, &bare).await?;
    run.reach().await?;
    if !args.no_faults {
        run.faults().await?;
    }
    let troubles = run.fleet.board().take_troubles();
    for (kind, count) in troubles {
        run.report.row(
            "troubles_of_nodes",
            &["kind", "count"],
            vec![json!(kind), json!(count)],
        );
    }
    run.report
        .note("generator and replicas share this machine's cores; the generator's own share is in the table");
    let Run {
        cluster,
        fleet,
        report,
        ..
    } = run;
    drop(fleet);
    keep.end(cluster).await?;
    Ok(report)
}

/// A cluster whose processes know the nodes and hold nothing else, and the nodes' identities.
async fn prepare(args: &Args, nodes: usize, report: &mut Report) -> Result<(Cluster, Vec<Identity>)> {
    let mut cluster = Cluster::start(args.dir.as_deref(), Place::loopback()?, args.settings()?).await?;
    say(&format!("a cluster of three runs in {}", cluster.dir().display()));
    let began = Instant::now();
    let file = cluster.dir().join("nodes.jsonl");
    let credentials = pair(&cluster, &file, nodes).await?;
    report.fact("pair_seconds", began.elapsed().as_secs_f64());
    let mut trust = None;
    let mut identities = Vec::with_capacity(nodes);
    for credential in &credentials {
        let trust = match &trust {
            Some(trust) => trust,
            None => trust.insert(SharedTrust::new(credential.trust()?)),
        };
        identities.push(Identity::load(credential, trust)?);
    }
    cluster.restart_all().await?;
    sleep(SETTLE).await;
    Ok((cluster, identities))
}

/// The newest index that any replica has applied.
fn applied(status: &StatusResponse) -> u64 {
    status
        .replicas
        .iter()
        .map(|replica| replica.applied_index)
        .max()
        .unwrap_or(0)
}

/// What each replica uses now.
fn usages(cluster: &Cluster) -> Result<Vec<(u64, Usage)>> {
    cluster
        .pids()
        .into_iter()
        .map(|(id, pid)| Ok((id, Usage::of(pid)?)))
        .collect()
}

impl Run {
    /// The quiet time: entries, processor time, memory.
    async fn steady(&mut self, seconds: u64, bare: &[(u64, Usage)]) -> Result<()> {
        sleep(SETTLE).await;
        say(&format!("measuring {seconds} s in which nothing happens"));
        let (before, own) = (usages(&self.cluster)?, Usage::own()?);
        let first = applied(&self.client.status().await?);
        let began = Instant::now();
        sleep(Duration::from_secs(seconds)).await;
        let wall = began.elapsed();
        let (after, own_after) = (usages(&self.cluster)?, Usage::own()?);
        let status = self.client.status().await?;
        let entries = applied(&status) - first;
        #[expect(clippy::cast_precision_loss, reason = "fewer entries than an f64 has digits")]
        let rate = entries as f64 / wall.as_secs_f64();
        for ((id, before), (_, after)) in before.iter().zip(&after) {
            let cells = usage::cells(&format!("replica {id}"), before, after, wall);
            self.report.row("cost", &usage::COLUMNS, cells);
        }
        let cells = usage::cells("generator", &own, &own_after, wall);
        self.report.row("cost", &usage::COLUMNS, cells);
        self.memory(bare, &after);
        self.report.fact("steady_seconds", wall.as_secs_f64());
        self.report.fact("steady_entries", entries);
        self.report.fact("steady_entries_per_s", rate);
        let text = format!("a quiet fleet costs at most {ENTRIES_PER_SECOND} log entries a second");
        self.report
            .promise(&text, rate <= ENTRIES_PER_SECOND, format!("{rate:.2} a second"));
        let fleet = status.fleet.unwrap_or_default();
        let all = self.fleet.device_ids.len();
        self.report.promise(
            "every node is online",
            self.fleet.board().count() == all && fleet.online >= all as u64,
            format!(
                "{} attached, {} online for the cluster",
                self.fleet.board().count(),
                fleet.online
            ),
        );
        Ok(())
    }

    /// What a session costs a replica in memory: what it has more than without sessions, over their number.
    fn memory(&mut self, bare: &[(u64, Usage)], now: &[(u64, Usage)]) {
        let columns = [
            "replica",
            "sessions",
            "resident_kib_per_session",
            "anonymous_kib_per_session",
        ];
        for ((id, bare), (_, now)) in bare.iter().zip(now) {
            let sessions = self.fleet.board().at(*id).len() as u64;
            let each = |now: u64, bare: u64| {
                #[expect(clippy::cast_precision_loss, reason = "KiB of a process")]
                (sessions > 0).then(|| now.saturating_sub(bare) as f64 / sessions as f64)
            };
            let row = vec![
                json!(format!("replica {id}")),
                json!(sessions),
                json!(each(now.resident_kib, bare.resident_kib)),
                json!(each(now.anonymous_kib, bare.anonymous_kib)),
            ];
            self.report.row("memory", &columns, row);
        }
    }

    /// Dispatches to some nodes: their sessions are real.
    async fn reach(&mut self) -> Result<()> {
        let all = &self.fleet.device_ids;
        let step = (all.len() / REACHED).max(1);
        let jobs: Vec<Job> = all
            .iter()
            .step_by(step)
            .take(REACHED)
            .map(|device_id| Job {
                device_id: device_id.clone(),
                capability: "echo".to_owned(),
                payload: "{\"bench\":true}".to_owned(),
                deadline: Duration::from_secs(30),
            })
            .collect();
        let wanted = jobs.len();
        let done = load::run(&self.client, jobs, REACHED_PER_SECOND, Duration::from_secs(30)).await;
        let succeeded = done.iter().filter(|done| done.state() == "succeeded").count();
        let took: Spread = done.iter().map(|done| done.took).collect();
        let columns: Vec<&str> = [&["what"][..], &spread::COLUMNS[..]].concat();
        let cells = [vec![json!("dispatch to one of the nodes and back")], took.cells()].concat();
        self.report.row("reach", &columns, cells);
        let found = format!("{succeeded} of {wanted} succeeded");
        self.report
            .promise("every node that is asked answers", succeeded == wanted, found);
        Ok(())
    }
}
