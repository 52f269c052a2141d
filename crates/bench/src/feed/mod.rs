//! A reader of the feed that hops from replica to replica under load: every row once, in order.
//!
//! What never lives here: trust in the client library. It promises order by itself, so each hop begins anew with
//! nothing but the last cursor, and what was told is compared with the journal afterwards, row by row, by hash.

mod compare;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use palyra_client::{Client, Event, fill_random, wall_ms};
use palyra_pki::tls::SharedTrust;
use palyra_proto::journal::v1::{Cursor, Row, StreamEventsRequest};
use serde_json::json;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, Place, Settings};
use crate::load::{self, Job};
use crate::presence::{end_of_journal, since};
use crate::report::Report;
use crate::sim::Identity;
use crate::sim::node::{Fleet, Transport};
use crate::sim::pair::pair;
use crate::spread::{self, Spread};
use crate::{Keep, say};
use compare::{Mark, compare};

/// Nodes that are dispatched to.
const NODES: usize = 12;
/// The most rows that one hop waits for before it goes on.
const ROWS_PER_HOP: u64 = 16;
/// A hop that is told nothing for so long goes on.
const QUIET: Duration = Duration::from_secs(3);
const WHOLE: Duration = Duration::from_secs(60);
/// For the dispatches, and for the feed behind an outage.
const WAIT: Duration = Duration::from_secs(20);

/// Arguments of `palyra-bench feed`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How often the reader leaves a replica for another one
    #[arg(long, default_value = "200", value_parser = clap::value_parser!(u32).range(3..=100_000))]
    hops: u32,
    /// On how many of the hops the replica that is read from is killed instead
    #[arg(long, default_value = "10")]
    kills: u32,
    /// Dispatches a second meanwhile; each makes three rows
    #[arg(long, default_value = "20", value_parser = clap::value_parser!(u32).range(1..=500))]
    rate: u32,
}

/// Runs it.
pub(crate) async fn run(args: Args, keep: Keep) -> Result<Report> {
    let mut cluster = Cluster::start(None, Place::loopback()?, Settings::new()).await?;
    let fleet = fleet(&cluster, &cluster.dir().join("nodes.jsonl")).await?;
    let client = cluster.client()?;
    let start = end_of_journal(&client).await?;
    let stop = CancellationToken::new();
    let loading = {
        let (client, stop, rate) = (cluster.client()?, stop.clone(), f64::from(args.rate));
        let devices = fleet.device_ids.clone();
        tokio::spawn(async move {
            load::until(&client, &stop, rate, WAIT, |number| Some(job(&devices, number))).await
        })
    };
    let began = Instant::now();
    let mut reader = Reader {
        cursor: start,
        told: Vec::new(),
        delay: Spread::new(),
        killed: Vec::new(),
        moved: 0,
    };
    reader.hops(&mut cluster, &args).await?;
    stop.cancel();
    let done = loading.await.context("the load has panicked")?;
    let end = end_of_journal(&client).await?.context("the journal is empty")?;
    reader.finish(&client, end).await?;
    let mut report = Report::new("feed");
    report.fact("hops", args.hops);
    report.fact("of_them_kills", args.kills);
    report.fact("seconds", began.elapsed().as_secs_f64());
    report.fact("rows_told", reader.told.len());
    report.fact("moves_by_the_client", reader.moved);
    let succeeded = done.iter().filter(|done| done.state() == "succeeded").count();
    report.fact("dispatches", done.len());
    report.fact("dispatches_succeeded", succeeded);
    tell_comparison(&mut report, &cluster, &reader, start, end).await?;
    let columns: Vec<&str> = [&["what"][..], &spread::COLUMNS[..]].concat();
    let name = json!("leader's clock to reader, hops included");
    report.row("delay", &columns, [vec![name], reader.delay.cells()].concat());
    drop(fleet);
    keep.end(cluster).await?;
    Ok(report)
}

/// The journal of each replica against what the reader was told.
async fn tell_comparison(
    report: &mut Report,
    cluster: &Cluster,
    reader: &Reader,
    start: Option<Cursor>,
    end: Cursor,
) -> Result<()> {
    let columns = [
        "replica",
        "rows",
        "missing",
        "repeated",
        "out_of_order",
        "foreign",
    ];
    for id in cluster.ids() {
        let rows = since(&cluster.client_of(&[id])?, start, "").await?;
        let marks = rows.iter().map(Mark::of);
        let journal: Vec<Mark> = marks.filter(|mark| mark.place <= place(&end)).collect();
        let found = compare(&reader.told, &journal);
        let counts = [found.missing, found.repeated, found.out_of_order, found.foreign];
        let mut row = vec![json!(format!("replica {id}")), json!(journal.len())];
        row.extend(counts.map(|count| json!(count)));
        report.row("compared_with_the_journal", &columns, row);
        let wrong: usize = counts.iter().sum();
        let text = format!("the feed is the journal of replica {id}: every row once, in order");
        let told = format!("{wrong} of {} rows are wrong", journal.len());
        report.promise(&text, wrong == 0, told);
    }
    Ok(())
}

fn job(devices: &[String], number: usize) -> Job {
    Job {
        device_id: devices[number % devices.len()].clone(),
        capability: "echo".to_owned(),
        payload: format!("{{\"number\":{number}}}"),
        deadline: Duration::from_secs(60),
    }
}

async fn fleet(cluster: &Cluster, file: &Path) -> Result<Fleet> {
    let credentials = pair(cluster, file, NODES).await?;
    let trust = SharedTrust::new(credentials.first().context("no node was paired")?.trust()?);
    let loaded = credentials
        .iter()
        .map(|credential| Identity::load(credential, &trust));
    let identities = loaded.collect::<Result<Vec<_>>>()?;
    Fleet::start(identities, cluster.node_addresses(), Transport::Grpc, WHOLE).await
}

fn place(cursor: &Cursor) -> (u64, u32) {
    (cursor.index, cursor.ordinal)
}

/// What the reader has, from hop to hop: a cursor, and what it was told.
struct Reader {
    cursor: Option<Cursor>,
    told: Vec<Mark>,
    delay: Spread,
    /// The replica that was killed, and the hop at which it comes back.
    killed: Vec<(u64, u32)>,
    moved: u64,
}

impl Reader {
    async fn hops(&mut self, cluster: &mut Cluster, args: &Args) -> Result<()> {
        let every = args.hops.checked_div(args.kills).unwrap_or(u32::MAX).max(1);
        for hop in 0..args.hops {
            if let Some((id, _)) = self.killed.pop_if(|(_, back)| *back <= hop) {
                cluster.start_replica(id).await?;
                cluster.settled(WHOLE).await?;
            }
            let up: Vec<u64> = cluster.pids().into_iter().map(|(id, _)| id).collect();
            let from = up[usize::try_from(hop)? % up.len()];
            let kill = hop % every == every - 1 && self.killed.is_empty();
            if hop % 50 == 0 {
                say(&format!("hop {hop} of {}", args.hops));
            }
            if kill {
                // Over all replicas: the client has to go on elsewhere by itself, from the middle of a stream.
                let ordered: Vec<u64> = std::iter::once(from)
                    .chain(up.into_iter().filter(|id| *id != from))
                    .collect();
                let mut events = self.open(&cluster.client_of(&ordered)?);
                self.read(&mut events, 1).await?;
                let endpoint = events.endpoint().map(str::to_owned);
                let read_from = cluster
                    .ids()
                    .into_iter()
                    .find(|id| endpoint == Some(cluster.node_address(*id)));
                let victim = read_from.unwrap_or(from);
                cluster.kill(victim).await?;
                self.killed.push((victim, hop + 3));
                self.read(&mut events, ROWS_PER_HOP).await?;
            } else {
                let mut events = self.open(&cluster.client_of(&[from])?);
                self.read(&mut events, 1 + random() % ROWS_PER_HOP).await?;
            }
        }
        for (id, _) in std::mem::take(&mut self.killed) {
            cluster.start_replica(id).await?;
        }
        cluster.settled(WHOLE).await?;
        Ok(())
    }

    /// A new feed that knows the cursor and nothing else.
    fn open(&self, client: &Client) -> palyra_client::Events {
        let request = StreamEventsRequest {
            after: self.cursor,
            ..Default::default()
        };
        client.events(request, Some(WAIT))
    }

    /// Reads at least so many rows, or until nothing comes.
    async fn read(&mut self, events: &mut palyra_client::Events, wanted: u64) -> Result<()> {
        let mut got = 0;
        let mut until = Instant::now() + QUIET;
        while got < wanted {
            match timeout_at(until, events.next()).await {
                Err(_) => break,
                Ok(event) => match event? {
                    Event::Rows(rows) => {
                        got += rows.len() as u64;
                        self.take(&rows);
                        until = Instant::now() + QUIET;
                    }
                    Event::Moved { .. } => {
                        self.moved += 1;
                        until = Instant::now() + QUIET;
                    }
                    // An outage is over when the feed goes on, however long that takes.
                    Event::Lost { .. } => until = Instant::now() + WAIT,
                    Event::CaughtUp { .. } => {}
                    Event::Gap { first, .. } => {
                        bail!("rows before {first:?} were trimmed: a shorter run is needed")
                    }
                },
            }
        }
        self.cursor = events.cursor();
        Ok(())
    }

    fn take(&mut self, rows: &[Row]) {
        let now = wall_ms();
        for row in rows {
            self.told.push(Mark::of(row));
            self.delay
                .record(Duration::from_millis(now.saturating_sub(row.at_ms)));
        }
    }

    /// Reads what is left of the journal up to `end`.
    async fn finish(&mut self, client: &Client, end: Cursor) -> Result<()> {
        let mut events = self.open(client);
        let until = Instant::now() + WHOLE;
        while self.told.last().is_none_or(|last| last.place < place(&end)) {
            if Instant::now() > until {
                bail!("the feed does not come to {end:?}, where the journal ends");
            }
            self.read(&mut events, 1).await?;
        }
        self.told.retain(|mark| mark.place <= place(&end));
        Ok(())
    }
}

fn random() -> u64 {
    let mut bytes = [0u8; 8];
    fill_random(&mut bytes);
    u64::from_le_bytes(bytes)
}
