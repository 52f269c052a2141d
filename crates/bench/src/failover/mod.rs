//! Real agents under steady dispatch through kills of replicas and leader transfers.
//!
//! What never lives here: forgiveness. Lost is a dispatch that was accepted and has no end; duplicated is a `once`
//! program that its own log shows twice. Invariants: latency counts from the schedule; what the operator's client did
//! not learn is asked for again under the same request id until it is known.

mod agent;
mod tally;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use palyra_client::{Client, wall_ms};
use serde_json::json;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, Place, Settings};
use crate::load::{self, Done, Job};
use crate::presence::{Seen, about_nodes, end_of_journal, since};
use crate::report::Report;
use crate::spread::{self, Spread};
use crate::{Keep, say};
use agent::{CAPABILITIES, Machine, node};
use tally::{Kill, Tally, reconnects};

/// The deadline of each dispatch.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long the operator's client waits at a replica for the end.
const WAIT: Duration = Duration::from_secs(20);
/// How long a killed replica is away.
const AWAY: Duration = Duration::from_millis(1_500);
/// Between a cluster that is whole again and the next fault.
const BREATH: Duration = Duration::from_millis(500);
const WHOLE: Duration = Duration::from_secs(60);
/// How long a new leader is looked for before the transfer is asked for again.
const LOOK: Duration = Duration::from_secs(2);

/// Arguments of `palyra-bench failover`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many times a replica is killed: in turn every other time, and the one that holds an agent's session
    #[arg(long, default_value = "50")]
    kills: u32,
    /// How many times the leadership is handed over
    #[arg(long, default_value = "50")]
    transfers: u32,
    /// Dispatches a second, of each kind, to each agent
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..=50))]
    rate: u32,
}

/// The transports whose agents take part.
const TRANSPORTS: [&str; 2] = ["quic", "grpc"];

/// Runs it.
pub(crate) async fn run(args: Args, keep: Keep) -> Result<Report> {
    let mut cluster = Cluster::start(None, Place::loopback()?, Settings::new()).await?;
    let client = cluster.client()?;
    let cursor = end_of_journal(&client).await?;
    let mut machines = Vec::new();
    for transport in TRANSPORTS {
        machines.push(Machine::start(&cluster, &client, transport).await?);
    }
    let stop = CancellationToken::new();
    let mut loads = tokio::task::JoinSet::new();
    for machine in &machines {
        for capability in CAPABILITIES {
            let (client, stop, rate) = (cluster.client()?, stop.clone(), f64::from(args.rate));
            let (device_id, transport) = (machine.device_id.clone(), machine.transport);
            loads.spawn(async move {
                let job = |number| Some(job(&device_id, capability, number));
                (
                    transport,
                    capability,
                    load::until(&client, &stop, rate, WAIT, job).await,
                )
            });
        }
    }
    let began = Instant::now();
    let faults = Faults {
        client: &client,
        machines: &mut machines,
        kills: Vec::new(),
        elected: Spread::new(),
    };
    let (kills, elected) = faults.all(&mut cluster, &args).await?;
    stop.cancel();
    say("waiting for the last dispatches");
    let done = loads.join_all().await;
    let mut report = Report::new("failover");
    report.fact("seconds", began.elapsed().as_secs_f64());
    report.fact("kills", args.kills);
    report.fact("transfers", args.transfers);
    report.fact("dispatches_per_s_of_each_kind", args.rate);
    let columns: Vec<&str> = [&["what"][..], &spread::COLUMNS[..]].concat();
    let cells = [vec![json!("leader transfer")], elected.cells()].concat();
    report.row("control", &columns, cells);
    judge(&mut report, &machines, done)?;
    let rows = about_nodes(&since(&client, cursor, "node.").await?);
    tell_reconnects(&mut report, &machines, &rows, &kills);
    report
        .note("a killed replica is away for 1.5 s and the time that its start takes; programs run for 0.2 s");
    drop(machines);
    keep.end(cluster).await?;
    Ok(report)
}

/// How each agent came back after the kills.
fn tell_reconnects(report: &mut Report, machines: &[Machine], rows: &[Seen], kills: &[Kill]) {
    for machine in machines {
        let own: Vec<_> = rows
            .iter()
            .filter(|row| row.device_id == machine.device_id)
            .cloned()
            .collect();
        let found = reconnects(&own, kills);
        let columns = [
            &["transport", "kills_of_its_replica", "never_back"][..],
            &spread::COLUMNS[..],
            &["moved_without_need"][..],
        ];
        let mut row = vec![
            json!(machine.transport),
            json!(found.struck),
            json!(found.never_back),
        ];
        row.extend(found.took.cells());
        row.push(json!(found.needless));
        report.row("reconnects", &columns.concat(), row);
        let text = format!("the {} agent is back after each kill", machine.transport);
        let told = format!("{} of {}", found.took.count(), found.struck);
        report.promise(&text, found.never_back == 0, told);
    }
}

fn job(device_id: &str, capability: &str, number: usize) -> Job {
    Job {
        device_id: device_id.to_owned(),
        capability: capability.to_owned(),
        payload: format!("{{\"number\":{number}}}"),
        deadline: DEADLINE,
    }
}

/// Tables and promises of the dispatches.
fn judge(report: &mut Report, machines: &[Machine], done: Vec<(&str, &str, Vec<Done>)>) -> Result<()> {
    let runs: BTreeMap<&str, _> = machines
        .iter()
        .map(|machine| Ok((machine.transport, machine.runs()?)))
        .collect::<Result<_>>()?;
    let (mut lost, mut duplicated, mut phantoms, mut submitted) = (0, 0, 0, 0);
    let columns = [
        &["transport", "capability"][..],
        &Tally::COLUMNS[..],
        &spread::COLUMNS[..],
    ]
    .concat();
    for (transport, capability, done) in &done {
        let tally = Tally::of(done, &runs[transport], capability.ends_with("once"));
        let mut row = vec![json!(transport), json!(capability)];
        row.extend(tally.cells());
        row.extend(tally.took.cells());
        report.row("dispatches", &columns, row);
        for (code, count) in &tally.refusals {
            report.row(
                "not_accepted",
                &["transport", "capability", "why", "count"],
                vec![json!(transport), json!(capability), json!(code), json!(count)],
            );
        }
        lost += tally.lost;
        duplicated += tally.duplicated;
        phantoms += tally.phantoms;
        submitted += tally.submitted;
    }
    let of = |count: u64| format!("{count} of {submitted}");
    report.promise(
        "every dispatch that was accepted came to an end",
        lost == 0,
        of(lost),
    );
    report.promise("no `once` program ran twice", duplicated == 0, of(duplicated));
    report.promise("what succeeded has run", phantoms == 0, of(phantoms));
    Ok(())
}

/// The faults of a run.
struct Faults<'a> {
    client: &'a Client,
    machines: &'a mut [Machine],
    kills: Vec<Kill>,
    elected: Spread,
}

impl Faults<'_> {
    async fn all(mut self, cluster: &mut Cluster, args: &Args) -> Result<(Vec<Kill>, Spread)> {
        for round in 0..args.kills {
            let victim = self.victim(cluster, round).await?;
            say(&format!("kill {} of {}: replica {victim}", round + 1, args.kills));
            let at_ms = wall_ms();
            cluster.kill(victim).await?;
            self.kills.push(Kill {
                replica: victim,
                at_ms,
            });
            sleep(AWAY).await;
            cluster.start_replica(victim).await?;
            self.pause(cluster).await?;
        }
        for round in 0..args.transfers {
            let leader = cluster.settled(WHOLE).await?.leader_id;
            let others: Vec<u64> = cluster.ids().into_iter().filter(|id| *id != leader).collect();
            let to = others[usize::try_from(round)? % others.len()];
            say(&format!(
                "transfer {} of {}: from {leader} to {to}",
                round + 1,
                args.transfers
            ));
            let began = Instant::now();
            self.hand_over(to).await?;
            self.elected.record(began.elapsed());
            self.pause(cluster).await?;
        }
        Ok((self.kills, self.elected))
    }

    /// Every other time in turn, and otherwise the replica of an agent.
    async fn victim(&self, cluster: &Cluster, round: u32) -> Result<u64> {
        let turn = usize::try_from(round / 2)?;
        let in_turn = cluster.ids()[turn % cluster.ids().len()];
        if round.is_multiple_of(2) {
            return Ok(in_turn);
        }
        let machine = &self.machines[turn % self.machines.len()];
        let replica = node(self.client, &machine.device_id).await?.session_replica;
        Ok(if replica == 0 { in_turn } else { replica })
    }

    /// Has a replica lead. The answer may be lost with the connection; what counts is who leads afterwards.
    async fn hand_over(&self, to: u64) -> Result<()> {
        let until = Instant::now() + WHOLE;
        loop {
            let asked = self.client.transfer_leader(to).await;
            let look = Instant::now() + LOOK;
            while Instant::now() < look {
                if self
                    .client
                    .status()
                    .await
                    .is_ok_and(|status| status.leader_id == to)
                {
                    return Ok(());
                }
                sleep(Duration::from_millis(20)).await;
            }
            ensure!(
                Instant::now() < until,
                "replica {to} does not lead {} s after it was asked to; the last answer: {asked:?}",
                WHOLE.as_secs()
            );
        }
    }

    async fn pause(&mut self, cluster: &Cluster) -> Result<()> {
        cluster.settled(WHOLE).await?;
        sleep(BREATH).await;
        self.machines.iter_mut().try_for_each(Machine::check)
    }
}
