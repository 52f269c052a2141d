//! Leases under faults: thousands of competing ones, replicas that are killed and frozen, workers that sleep longer
//! than their
//! leases and go on writing.
//!
//! What never lives here: what a worker does (`worker`), and what is right (`judge`, `resource`). The order of a
//! run: a cluster,
//! workers that attest, all slots leased and nothing else to do (what renewals cost), then competing runs under
//! faults, then the
//! rest of them in peace, then the judgement.

mod faults;
mod judge;
mod load;
mod proof;
mod resource;
mod tally;
mod worker;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use palyra_client::Client;
use palyra_pki::tls::SharedTrust;
use palyra_proto::common::v1::Page;
use palyra_proto::run::v1::ListLeasesRequest;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::cluster::{Cluster, Place, settings};
use crate::presence::{end_of_journal, since};
use crate::report::Report;
use crate::sim::Identity;
use crate::sim::pair::pair;
use crate::spread;
use crate::{Keep, say};
use judge::Verdict;
use load::{Kind, Load};
use proof::Signer;
use resource::Resource;
use worker::{Shared, Worker};

/// From a deadline that passed without a word to the free slot: an election, and the sweep of the new leader.
const FREE_BOUND: Duration = Duration::from_secs(10);
/// Log entries a second that live leases may cost by their renewals, whatever their number: three replicas, four
/// batches each.
const RENEWAL_ENTRIES: f64 = 15.0;
/// For all workers to be admitted, and for the last runs to end.
const PATIENCE: Duration = Duration::from_secs(180);

/// Arguments of `palyra-bench lease`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long competing runs are started under faults, in seconds
    #[arg(long, default_value = "60", value_parser = parse_seconds)]
    time: u64,
    /// How many workers
    #[arg(long, default_value = "30", value_parser = clap::value_parser!(u32).range(1..=5_000))]
    workers: u32,
    /// Slots of each
    #[arg(long, default_value = "4", value_parser = clap::value_parser!(u32).range(1..=64))]
    slots: u32,
    /// How many runs are started at most
    #[arg(long, default_value = "3000")]
    runs: u64,
    /// Of the leases, in seconds
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u64).range(2..=60))]
    ttl: u64,
    /// Longest time that a run holds its slot, in milliseconds
    #[arg(long, default_value = "2500")]
    hold: u64,
    /// How long all slots are held with nothing but renewals, in seconds; 0: that is not measured
    #[arg(long, default_value = "15")]
    quiet: u64,
    /// Kill replicas (SIGKILL), and hand the leadership over
    #[arg(long)]
    kill: bool,
    /// Freeze replicas (SIGSTOP) for longer than an election, and have workers sleep longer than their leases
    #[arg(long)]
    pause: bool,
}

fn parse_seconds(text: &str) -> Result<u64, String> {
    let number = text.strip_suffix('s').unwrap_or(text);
    number
        .parse()
        .ok()
        .filter(|seconds| (1..=86_400).contains(seconds))
        .ok_or_else(|| format!("{text:?} is no number of seconds"))
}

/// A run under way.
struct Run {
    cluster: Cluster,
    client: Client,
    shared: Arc<Shared>,
    report: Report,
    ttl_ms: u64,
}

/// Runs it.
pub(crate) async fn run(args: Args, keep: Keep) -> Result<Report> {
    let limits =
        settings("[limits]\nconnections = 20000\nconnections_per_source = 20000\nhandshakes = 1024\n")?;
    let cluster = Cluster::start(None, Place::loopback()?, limits).await?;
    let client = cluster.client()?;
    let mut report = Report::new("lease");
    for (name, value) in [
        ("workers", u64::from(args.workers)),
        ("slots_each", u64::from(args.slots)),
        ("ttl_seconds", args.ttl),
    ] {
        report.fact(name, value);
    }
    let ttl_ms = args.ttl * 1_000;
    proof::allow(&client, args.workers, args.slots, ttl_ms.max(30_000)).await?;
    let cursor = end_of_journal(&client).await?;
    let shared = Arc::new(Shared {
        addresses: cluster.node_addresses(),
        resource: Resource::default(),
        tally: tally::Tally::default(),
        pauses: AtomicBool::new(false),
        ready: AtomicU64::new(0),
        ttl: Duration::from_secs(args.ttl),
    });
    let workers = workers(&cluster, &args, &shared).await?;
    let mut run = Run {
        cluster,
        client,
        shared,
        report,
        ttl_ms,
    };
    run.admitted(args.workers).await?;
    load::permit(&run.client).await?;
    if args.quiet > 0 {
        run.quiet(&args).await?;
    }
    run.compete(&args).await?;
    let rows = since(&run.client, cursor, "").await?;
    let verdict = judge::judge(&rows, &run.deadlines().await?);
    drop(workers);
    run.judged(&verdict);
    let Run { cluster, report, .. } = run;
    keep.end(cluster).await?;
    Ok(report)
}

/// Pairs the workers, and lets them live.
async fn workers(cluster: &Cluster, args: &Args, shared: &Arc<Shared>) -> Result<JoinSet<()>> {
    let count = usize::try_from(args.workers)?;
    say(&format!(
        "pairing {count} workers with the cluster in {}",
        cluster.dir().display()
    ));
    let credentials = pair(cluster, &cluster.dir().join("nodes.jsonl"), count).await?;
    let mut set = JoinSet::new();
    let mut trust = None;
    for (seat, credential) in credentials.iter().enumerate() {
        let trust = match &trust {
            Some(trust) => trust,
            None => trust.insert(SharedTrust::new(credential.trust()?)),
        };
        let identity = Identity::load(credential, trust)?;
        let worker = Worker::new(identity, Signer::of(credential, args.slots)?, seat);
        set.spawn(worker.live(Arc::clone(shared)));
    }
    Ok(set)
}

impl Run {
    /// Waits until all workers may be given work.
    async fn admitted(&self, wanted: u32) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let ready = self.shared.ready.load(Ordering::Relaxed);
            let counted = match self.client.fleet_totals().await {
                Ok(fleet) => fleet.workers.get("available").copied().unwrap_or(0),
                Err(_) => 0,
            };
            if ready >= u64::from(wanted) && counted >= u64::from(wanted) {
                return Ok(());
            }
            if Instant::now() > until {
                let troubles = self.shared.tally.troubles();
                bail!("{ready} of {wanted} workers were admitted, {counted} are available: {troubles:?}");
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    async fn applied(&self) -> Result<u64> {
        let status = self.client.status().await?;
        let applied = status.replicas.iter().map(|replica| replica.applied_index);
        Ok(applied.max().unwrap_or(0))
    }

    /// All slots leased, and nothing but renewals: what they cost the log.
    async fn quiet(&mut self, args: &Args) -> Result<()> {
        let slots = u64::from(args.workers) * u64::from(args.slots);
        let hold = args.quiet * 1_000 + 60_000;
        let kind = Kind {
            // Between a fifth of it and all of it.
            hold_ms: hold * 5,
            ttl_ms: self.ttl_ms,
            timeout_ms: hold * 6,
        };
        say(&format!("leasing {slots} slots"));
        let load = Load::begin(&self.client, slots, kind);
        let until = Instant::now() + PATIENCE;
        while self.client.fleet_totals().await?.leases < slots {
            if Instant::now() > until {
                bail!("not all of {slots} slots were leased in time");
            }
            sleep(Duration::from_millis(200)).await;
        }
        load.end().await?;
        sleep(Duration::from_secs(3)).await;
        say(&format!("measuring {} s of nothing but renewals", args.quiet));
        let (first, wishes) = (
            self.applied().await?,
            self.shared.tally.wishes.load(Ordering::Relaxed),
        );
        let began = Instant::now();
        sleep(Duration::from_secs(args.quiet)).await;
        let seconds = began.elapsed().as_secs_f64();
        let entries = self.applied().await? - first;
        let wishes = self.shared.tally.wishes.load(Ordering::Relaxed) - wishes;
        let live = self.client.fleet_totals().await?.leases;
        #[expect(clippy::cast_precision_loss, reason = "counts of a minute")]
        let (entries_per_s, renewals_per_s) = (entries as f64 / seconds, wishes as f64 / seconds);
        self.report.row(
            "renewals",
            &["live_leases", "renewals_per_s", "log_entries_per_s"],
            vec![json!(live), json!(renewals_per_s), json!(entries_per_s)],
        );
        self.report.promise(
            &format!("live leases cost at most {RENEWAL_ENTRIES} log entries a second"),
            entries_per_s <= RENEWAL_ENTRIES,
            format!("{live} leases, {renewals_per_s:.1} renewals and {entries_per_s:.1} entries a second"),
        );
        self.cancel_all().await
    }

    /// Takes back what is left, so that slots are free.
    async fn cancel_all(&self) -> Result<()> {
        let request = palyra_proto::run::v1::ListRunsRequest {
            page: Some(Page {
                after: String::new(),
                limit: 1_000,
            }),
            ..Default::default()
        };
        loop {
            let fleet = self.client.fleet_totals().await?;
            if fleet.leases == 0 {
                return Ok(());
            }
            let mut request = request.clone();
            loop {
                let page = self.client.list_runs(request.clone()).await?;
                let open = |state: &str| matches!(state, "queued" | "leased" | "running" | "fenced");
                for run in page.runs.iter().filter(|run| open(&run.state)) {
                    let cancel = palyra_proto::run::v1::CancelRunRequest {
                        request_id: palyra_client::new_ulid(),
                        id: run.id.clone(),
                        reason: "measured".to_owned(),
                    };
                    // It may have ended meanwhile.
                    let _ = self.client.cancel_run(cancel).await;
                }
                let next = page.page.unwrap_or_default().next;
                if next.is_empty() {
                    break;
                }
                request.page = Some(Page {
                    after: next,
                    limit: 1_000,
                });
            }
            sleep(Duration::from_millis(500)).await;
        }
    }

    /// Competing runs under faults, and the rest of them in peace.
    async fn compete(&mut self, args: &Args) -> Result<()> {
        let kind = Kind {
            hold_ms: args.hold,
            ttl_ms: self.ttl_ms,
            timeout_ms: 600_000,
        };
        say(&format!(
            "up to {} competing runs for {} s under faults",
            args.runs, args.time
        ));
        self.shared.pauses.store(args.pause, Ordering::Relaxed);
        let load = Load::begin(&self.client, args.runs, kind);
        let until = Instant::now() + Duration::from_secs(args.time);
        self.faults(args.kill, args.pause, until).await?;
        self.shared.pauses.store(false, Ordering::Relaxed);
        let started = load.end().await?;
        self.report.fact("runs_started", started);
        say("waiting for the last runs");
        let until = Instant::now() + PATIENCE;
        loop {
            let fleet = self.client.fleet_totals().await?;
            let ended = ["succeeded", "failed", "refused", "cancelled", "timed_out", "lost"];
            let open: u64 = fleet
                .runs
                .iter()
                .filter(|(state, _)| !ended.contains(&state.as_str()))
                .map(|(_, count)| count)
                .sum();
            if open == 0 && fleet.leases == 0 {
                return Ok(());
            }
            if Instant::now() > until {
                let text = format!("{open} runs and {} leases", fleet.leases);
                self.report.promise("every run comes to its end", false, text);
                return Ok(());
            }
            sleep(Duration::from_millis(300)).await;
        }
    }

    /// Deadlines of the leases that the cluster still keeps.
    async fn deadlines(&self) -> Result<BTreeMap<String, u64>> {
        let mut deadlines = BTreeMap::new();
        let mut after = String::new();
        loop {
            let request = ListLeasesRequest {
                state: "all".to_owned(),
                page: Some(Page { after, limit: 1_000 }),
                ..ListLeasesRequest::default()
            };
            let page = self.client.list_leases(request).await?;
            deadlines.extend(
                page.leases
                    .into_iter()
                    .map(|lease| (lease.id, lease.deadline_at_ms)),
            );
            after = page.page.unwrap_or_default().next;
            if after.is_empty() {
                return Ok(deadlines);
            }
        }
    }

    fn judged(&mut self, verdict: &Verdict) {
        let tally = &self.shared.tally;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        for (name, value) in [
            ("leases_granted", verdict.granted),
            ("leases_ended_at_their_deadline", verdict.passed),
            ("renewals_answered", load(&tally.renewals)),
            ("answers_not_decided", load(&tally.retries)),
            ("workers_paused", load(&tally.pauses)),
        ] {
            self.report.fact(name, value);
        }
        for (reason, count) in &verdict.reasons {
            let row = vec![json!(reason), json!(count)];
            self.report.row("ends_of_leases", &["reason", "leases"], row);
        }
        for (state, count) in &verdict.runs {
            self.report.row(
                "ends_of_runs",
                &["state", "runs"],
                vec![json!(state), json!(count)],
            );
        }
        for ((what, code), count) in tally.refusals() {
            let row = vec![json!(what), json!(code), json!(count)];
            self.report
                .row("refusals_by_the_control_plane", &["said", "code", "count"], row);
        }
        let counts = self.shared.resource.counts();
        for (what, count) in [
            ("taken", counts.taken),
            ("taken late, nobody had passed the fence", counts.late),
            ("refused, behind a newer fence", counts.stale),
        ] {
            self.report.row(
                "writes_to_the_resource",
                &["write", "count"],
                vec![json!(what), json!(count)],
            );
        }
        let columns = [&["what"][..], &spread::COLUMNS[..]].concat();
        let row = [
            vec![json!("from the deadline to the free slot")],
            verdict.freed.cells(),
        ]
        .concat();
        self.report.row("slots", &columns, row);
        for (kind, count) in tally.troubles() {
            self.report.row(
                "troubles_of_workers",
                &["kind", "count"],
                vec![json!(kind), json!(count)],
            );
        }
        self.promises(verdict);
    }

    fn promises(&mut self, verdict: &Verdict) {
        let all = format!("{} leases", verdict.granted);
        self.none(
            "never two live leases of one slot or one run, by the log",
            &verdict.double,
            &all,
        );
        let (overlaps, times) = self.shared.resource.overlaps();
        let text = format!("{times} times of holding");
        self.none(
            "never two holders of one slot or one run, by their own clocks",
            &overlaps,
            &text,
        );
        self.none("fences rise", &verdict.fences, &all);
        self.none(
            "no lease ends before its deadline, but by a word of its worker",
            &verdict.early,
            &all,
        );
        self.none("no run ends twice", &verdict.twice, "all runs");
        let taken = self.shared.tally.taken();
        let stale: Vec<String> = taken
            .iter()
            .filter(|(lease, _)| verdict.was_stale(lease))
            .map(|(lease, _)| format!("lease {lease}"))
            .collect();
        let tried = self.shared.tally.stale.load(Ordering::Relaxed);
        let text = format!("{tried} results under leases that were over were reported");
        self.none(
            "the control plane takes no result under a lease that has ended",
            &stale,
            &text,
        );
        let back = self.shared.resource.went_back();
        self.report.promise(
            "the resource takes no write behind a newer fence",
            back == 0,
            format!("{} were tried", self.shared.resource.counts().stale),
        );
        let longest = verdict.freed.max_ms().unwrap_or(0.0);
        self.report.promise(
            &format!("a slot is free within its lease and {} s", FREE_BOUND.as_secs()),
            longest <= FREE_BOUND.as_secs_f64() * 1_000.0,
            format!("the longest was {longest:.0} ms after the deadline"),
        );
        let lost: u64 = ["lost", "timed_out", "refused", "failed"]
            .iter()
            .filter_map(|state| verdict.runs.get(*state))
            .sum();
        self.report.promise(
            "no run is lost that may be tried again",
            lost == 0,
            format!("{lost} runs"),
        );
    }

    fn none(&mut self, text: &str, found: &[String], of: &str) {
        let told = match found {
            [] => format!("none of {of}"),
            [first, ..] => format!("{} times, first {first}", found.len()),
        };
        self.report.promise(text, found.is_empty(), told);
    }
}
