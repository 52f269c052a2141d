//! `palyra-bench write`: a small change to a node's record, replicated and on the disks of a quorum before it is
//! answered; beside etcd's put of as many bytes.
//!
//! What never lives here: rounds and ratios (see [`crate::versus`]). Invariants: connections are spread over all
//! replicas, so that two of three writes are forwarded to the leader, on both sides alike; each write changes
//! something, so that none can be answered without the log.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use palyra_client::error::Failure;
use palyra_client::{ConnectOptions, Connection, connect};
use palyra_proto::node::v1 as wire;

use crate::cluster::{Cluster, Place, Settings};
use crate::report::Report;
use crate::sim::Identity;
use crate::sim::pair::pair;
use crate::versus::drive::{self, round};
use crate::versus::etcd::Etcd;
use crate::versus::machine::Machine;
use crate::versus::{Compared, Shape, Side, Target, tell_all, tell_round};
use crate::{Keep, say};

/// What we want to be.
const WANTED: Target = Target { rate: 3.0, p99: 0.5 };
/// Labels that a write carries.
const LABELS: usize = 4;

/// Arguments of `palyra-bench write`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A peer that gets the same load
    #[arg(long, value_enum)]
    against: Option<Peer>,
    /// Bytes of a record, and of etcd's value
    #[arg(long, default_value = "256", value_parser = clap::value_parser!(u32).range(64..=512))]
    bytes: u32,
    #[command(flatten)]
    shape: Shape,
}

/// Whom we compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Peer {
    /// Three members with TLS, of the `etcd` on the path.
    Etcd,
}

/// Runs it.
pub(crate) async fn run(args: Args, keep: Keep) -> Result<Report> {
    let mut report = Report::new("write");
    let cluster = Cluster::start(None, Place::loopback()?, Settings::new()).await?;
    let most = args.shape.clients.iter().copied().max().unwrap_or(1);
    let nodes = usize::try_from(args.shape.connections_of(most))?;
    say(&format!("pairing {nodes} nodes"));
    let credentials = pair(&cluster, &cluster.dir().join("nodes.jsonl"), nodes).await?;
    let etcd = match args.against {
        Some(Peer::Etcd) => Some(Etcd::start(cluster.dir()).await?),
        None => None,
    };
    let machine = Machine::measure(cluster.dir()).await?;
    let trust = credentials
        .first()
        .ok_or_else(|| anyhow!("no nodes"))?
        .for_tls()?
        .1;
    let identities = credentials
        .iter()
        .map(|one| Identity::load(one, &trust))
        .collect::<Result<Vec<_>>>()?;
    let mut compared = Vec::new();
    for clients in args.shape.clients.clone() {
        compared.push(compare(&args, clients, &cluster, &identities, etcd.as_ref()).await?);
    }
    tell_all(&mut report, &compared, "write", WANTED);
    args.shape.draw("write", &compared)?;
    let one = compared.iter().find(|one| one.clients == 1);
    let one_client = one.map(|one| one.ours.figures().p50_us);
    machine.tell(&mut report, one_client);
    if let Some(etcd) = etcd {
        report.fact("peer_version", format!("etcd {}", etcd.version()));
        etcd.stop().await?;
    }
    keep.end(cluster).await?;
    Ok(report)
}

/// All rounds with so many clients.
async fn compare(
    args: &Args,
    clients: u32,
    cluster: &Cluster,
    identities: &[Identity],
    etcd: Option<&Etcd>,
) -> Result<Compared> {
    let connections = args.shape.connections_of(clients);
    let mut ours = our_clients(args, clients, connections, cluster, identities).await?;
    let mut theirs = match etcd {
        Some(etcd) => Some(their_clients(args, clients, connections, etcd).await?),
        None => None,
    };
    let mut compared = Compared {
        clients,
        ours: Side::default(),
        peer: etcd.map(|_| Side::default()),
    };
    for _ in 0..args.shape.rounds {
        let (back, done) = round(ours, args.shape.times(), args.shape.rate).await?;
        ours = back;
        tell_round("palyra", &done)?;
        compared.ours.add(done);
        if let (Some(running), Some(side)) = (theirs.take(), &mut compared.peer) {
            let (back, done) = round(running, args.shape.times(), args.shape.rate).await?;
            theirs = Some(back);
            tell_round("etcd", &done)?;
            side.add(done);
        }
    }
    Ok(compared)
}

/// A node that changes its registration again and again.
struct Writer {
    connection: Connection,
    device_id: String,
    name: String,
    bytes: usize,
    turn: u64,
}

impl drive::Client for Writer {
    async fn once(&mut self) -> Result<()> {
        self.turn += 1;
        let each = self.bytes / LABELS;
        let labels = (0..LABELS).map(|label| {
            let value = format!("{}-{}-", self.name, self.turn);
            let key = format!("bench{label}");
            let rest = each.saturating_sub(key.len() + value.len());
            (key, value + &"x".repeat(rest))
        });
        let request = wire::RegisterRequest {
            device_id: self.device_id.clone(),
            platform: "bench".to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            labels: labels.collect(),
            ..Default::default()
        };
        let answer = self.connection.register(request).await;
        answer.map(|_| ()).map_err(|failure| match failure {
            Failure::Answered(error) => anyhow!("{error}"),
            Failure::Lost { cause, .. } => anyhow!("the connection is lost: {cause}"),
        })
    }
}

async fn our_clients(
    args: &Args,
    clients: u32,
    connections: u32,
    cluster: &Cluster,
    identities: &[Identity],
) -> Result<Vec<Writer>> {
    let addresses = cluster.node_addresses();
    let options = ConnectOptions {
        connect_timeout: Duration::from_secs(20),
        ..ConnectOptions::default()
    };
    let mut open = Vec::new();
    for (identity, address) in identities
        .iter()
        .zip(addresses.iter().cycle())
        .take(usize::try_from(connections)?)
    {
        let channel = connect::connect(address, &identity.tls, &options)
            .await
            .context("a node's connection")?;
        open.push((Connection::Grpc(channel), identity.device_id.clone()));
    }
    let writers = (0..clients)
        .zip(open.iter().cycle())
        .map(|(number, (connection, device_id))| Writer {
            connection: connection.clone(),
            device_id: device_id.clone(),
            name: format!("c{number}"),
            bytes: usize::try_from(args.bytes).unwrap_or(256),
            turn: 0,
        });
    Ok(writers.collect())
}

/// A client of etcd that puts a value under a key of its own.
struct Putter {
    client: etcd_client::KvClient,
    key: String,
    bytes: usize,
    turn: u64,
}

impl drive::Client for Putter {
    async fn once(&mut self) -> Result<()> {
        self.turn += 1;
        let value = format!("{:0>1$}", self.turn, self.bytes);
        self.client.put(self.key.as_str(), value, None).await?;
        Ok(())
    }
}

async fn their_clients(args: &Args, clients: u32, connections: u32, etcd: &Etcd) -> Result<Vec<Putter>> {
    let mut open = Vec::new();
    for number in 1..=connections {
        open.push(etcd.client(u16::try_from(number)?).await?.kv_client());
    }
    let putters = (0..clients)
        .zip(open.iter().cycle())
        .map(|(number, client)| Putter {
            client: client.clone(),
            key: format!("nodes/{number:016}"),
            bytes: usize::try_from(args.bytes).unwrap_or(256),
            turn: 0,
        });
    Ok(putters.collect())
}
