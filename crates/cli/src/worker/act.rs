//! What operators do to workers, with what it ends said first.
//!
//! Invariants: what ends leases has a reason, names them, and is confirmed; a monitor that ends early says what is
//! left.

use std::time::Duration;

use clap::Args;
use palyra_client::{Client, wall_ms};
use palyra_proto::worker::v1::{DrainRequest, ReapRequest, WorkerInfo, WorkerRequest, WorkerResponse};
use serde::Serialize;
use tokio::time::{Instant, timeout_at};

use super::find;
use super::view::WorkerView;
use crate::failure::{Failure, PARTIAL, PROBLEMS, Result};
use crate::output::time::{Moment, millis, parse_duration, parse_limit, span};
use crate::output::{Source, confirm, note};
use crate::session::{Global, required_reason};
use crate::watch::{after, changed};

/// How long a wait lasts beside what the cluster itself gives a worker.
const GRACE: Duration = Duration::from_secs(120);
/// How long `reverify --wait` and `cleanup --wait` wait when nothing is said.
const WAIT: Duration = Duration::from_secs(60);
/// How long after a question that no replica could answer it is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// Runs that are named before an operator confirms that they end.
const NAMED: usize = 5;

/// A worker, and why.
#[derive(Debug, Args)]
pub(crate) struct Target {
    /// Device id, name, or the beginning of an id
    worker: String,
    /// Why; kept in the journal
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
}

/// Which worker is quarantined.
#[derive(Debug, Args)]
pub(crate) struct Quarantine {
    /// Device id, name, or the beginning of an id
    worker: String,
    /// Why; kept in the journal
    #[arg(long)]
    reason: String,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// Which worker attests again.
#[derive(Debug, Args)]
pub(crate) struct Reverify {
    #[command(flatten)]
    target: Target,
    /// Wait until its statement passed or was refused (--timeout, 60s without it)
    #[arg(long)]
    wait: bool,
}

/// Which worker is drained.
#[derive(Debug, Args)]
pub(crate) struct Drain {
    #[command(flatten)]
    target: Target,
    /// How long what runs may go on; an hour without it
    #[arg(long, value_name = "DURATION", value_parser = parse_limit)]
    deadline: Option<Duration>,
    /// End what runs at once; needs a reason
    #[arg(long, conflicts_with = "deadline")]
    force: bool,
    /// Show what is left until nothing is
    #[arg(long)]
    wait: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// Which worker cleans again.
#[derive(Debug, Args)]
pub(crate) struct Cleanup {
    #[command(flatten)]
    target: Target,
    /// Vouch that it is clean: you looked; needs a reason
    #[arg(long)]
    force: bool,
    /// Wait until it is clean (--timeout, 60s without it)
    #[arg(long)]
    wait: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// What is reaped.
#[derive(Debug, Args)]
pub(crate) struct Reap {
    /// Forget workers that have been offline for longer; a day without it
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    older_than: Option<Duration>,
}

fn request(global: &Global, id: &str, reason: &str, force: bool) -> WorkerRequest {
    WorkerRequest {
        request_id: global.request_id(),
        id: id.to_owned(),
        reason: reason.to_owned(),
        force,
    }
}

fn print(global: &Global, answer: WorkerResponse) -> Result {
    let view = WorkerView::from(answer.worker.unwrap_or_default());
    global.out().one(&view, answer.write.into(), &view.facts())
}

/// What ends when the leases of a worker end.
fn ends(worker: &WorkerInfo) -> String {
    let live: Vec<String> = worker
        .leases
        .iter()
        .filter(|lease| lease.state != "ended")
        .map(|lease| format!("{} ({})", lease.run_id, lease.tool))
        .collect();
    let count = match live.len() {
        0 => return "no lease ends".to_owned(),
        1 => "1 lease ends".to_owned(),
        count => format!("{count} leases end"),
    };
    let more = match live.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let named: Vec<&str> = live.iter().take(NAMED).map(String::as_str).collect();
    format!("{count}: run {}{more}", named.join(", "))
}

fn called(worker: &WorkerInfo) -> &str {
    if worker.name.is_empty() {
        &worker.id
    } else {
        &worker.name
    }
}

/// Says what ends, and asks unless nothing does.
fn confirm_ends(worker: &WorkerInfo, done: &str, again: &str, yes: bool) -> Result {
    let ends = ends(worker);
    if worker.leases.iter().all(|lease| lease.state == "ended") {
        return Ok(());
    }
    let what = format!("{} is {done}: {ends}", called(worker));
    if yes {
        note(&what);
        return Ok(());
    }
    confirm(&what, again)
}

/// `palyra worker quarantine`.
pub(crate) async fn quarantine(global: &Global, client: &Client, ask: Quarantine) -> Result {
    required_reason(&ask.reason)?;
    let (worker, _) = find(client, ask.worker).await?;
    let again = format!("palyra worker quarantine {} --reason ... --yes", worker.id);
    confirm_ends(&worker, "quarantined", &again, ask.yes)?;
    let request = request(global, &worker.id, &ask.reason, false);
    print(global, client.quarantine_worker(request).await?)
}

/// `palyra worker reverify`.
pub(crate) async fn reverify(global: &Global, client: &Client, ask: Reverify) -> Result {
    let (before, _) = find(client, ask.target.worker).await?;
    let request = request(global, &before.id, &ask.target.reason, false);
    let answer = client.reverify_worker(request).await?;
    if !ask.wait {
        return print(global, answer);
    }
    let accepted = |worker: &WorkerInfo| worker.attestation.as_ref().map_or(0, |known| known.index);
    let refused = |worker: &WorkerInfo| worker.refusal.as_ref().map_or(0, |known| known.at_ms);
    let first = (accepted(&before), refused(&before));
    let over = |worker: &WorkerInfo| !worker.reverify_asked || refused(worker) > first.1;
    let until = Instant::now() + global.timeout.unwrap_or(WAIT);
    let (worker, source) = wait_until(client, answer, until, over).await?;
    let passed = !worker.reverify_asked && accepted(&worker) > first.0;
    let failed = refused(&worker) > first.1;
    finish(
        global,
        worker,
        source,
        match (passed, failed) {
            (true, _) => None,
            (false, true) => Some(PROBLEMS),
            (false, false) => Some(PARTIAL),
        },
    )
}

/// `palyra worker release`.
pub(crate) async fn release(global: &Global, client: &Client, ask: Target) -> Result {
    let request = request(global, &ask.worker, &ask.reason, false);
    print(global, client.release_worker(request).await?)
}

/// `palyra worker drain`.
pub(crate) async fn drain(global: &Global, client: &Client, ask: Drain) -> Result {
    if ask.force {
        required_reason(&ask.target.reason)?;
    }
    let (worker, _) = find(client, ask.target.worker).await?;
    if ask.force {
        let again = format!("palyra worker drain {} --force --reason ... --yes", worker.id);
        confirm_ends(&worker, "drained now", &again, ask.yes)?;
    }
    let request = DrainRequest {
        request_id: global.request_id(),
        id: worker.id,
        reason: ask.target.reason,
        deadline_ms: ask.deadline.map_or(0, millis),
        force: ask.force,
    };
    let answer = client.drain_worker(request).await?;
    if !ask.wait {
        return print(global, answer);
    }
    let deadline = answer
        .worker
        .as_ref()
        .and_then(|worker| worker.drain.as_ref())
        .map_or(0, |drain| drain.until_ms.saturating_sub(wall_ms()));
    let wait = global.timeout.unwrap_or(Duration::from_millis(deadline) + GRACE);
    let over = |worker: &WorkerInfo| worker.slots_used == 0 || worker.drain.is_none();
    let (worker, source) = wait_until(client, answer, Instant::now() + wait, over).await?;
    let (empty, held) = (worker.slots_used == 0, worker.drain.is_some());
    if !held {
        note("the drain was taken back while this waited");
    }
    finish(global, worker, source, (!empty || !held).then_some(PARTIAL))
}

/// `palyra worker cleanup`.
pub(crate) async fn cleanup(global: &Global, client: &Client, ask: Cleanup) -> Result {
    let (worker, _) = find(client, ask.target.worker).await?;
    if ask.force {
        required_reason(&ask.target.reason)?;
        let what = format!(
            "you vouch that nothing of {} is left on {}; it may get work again",
            left(&worker),
            called(&worker)
        );
        if !ask.yes {
            let again = format!("palyra worker cleanup {} --force --reason ... --yes", worker.id);
            confirm(&what, &again)?;
        }
    }
    let request = request(global, &worker.id, &ask.target.reason, ask.force);
    let answer = client.cleanup_worker(request).await?;
    if !ask.wait {
        return print(global, answer);
    }
    let clean = |worker: &WorkerInfo| worker.failure.is_none() && worker.unclean.is_empty();
    let until = Instant::now() + global.timeout.unwrap_or(WAIT);
    let (worker, source) = wait_until(client, answer, until, clean).await?;
    let done = clean(&worker);
    finish(global, worker, source, (!done).then_some(PARTIAL))
}

/// The leases that a worker is not clean of.
fn left(worker: &WorkerInfo) -> String {
    let failed = worker.failure.iter().map(|failure| failure.subject.clone());
    let mut leases: Vec<String> = failed.chain(worker.unclean.iter().cloned()).collect();
    leases.retain(|lease| !lease.is_empty());
    leases.sort();
    leases.dedup();
    if leases.is_empty() {
        "any lease".to_owned()
    } else {
        format!("lease {}", leases.join(", "))
    }
}

/// `palyra worker reap`.
pub(crate) async fn reap(global: &Global, client: &Client, ask: Reap) -> Result {
    let request = ReapRequest {
        request_id: global.request_id(),
        older_than_ms: ask.older_than.map_or(0, |older| millis(older).max(1)),
    };
    let answer = client.reap_workers(request).await?;
    let view = Reaped {
        leases: answer.leases,
        workers: answer.workers,
    };
    let facts = [
        ("leases ended", answer.leases.to_string()),
        ("workers forgotten", answer.workers.to_string()),
    ];
    global.out().one(&view, answer.write.into(), &facts)
}

#[derive(Serialize)]
struct Reaped {
    leases: u32,
    workers: u32,
}

/// Follows a worker until `over`, or until the time is up, and tells what changes on the way.
async fn wait_until(
    client: &Client,
    answer: WorkerResponse,
    until: Instant,
    over: impl Fn(&WorkerInfo) -> bool,
) -> Result<(WorkerInfo, Source)> {
    let mut source = Source::from(answer.write);
    let mut worker = answer.worker.unwrap_or_default();
    let mut index = source.index;
    let mut feed = client.events(after(index), None);
    let mut told = String::new();
    loop {
        // The leases are in no answer of a change.
        (worker, source) = loop {
            match find(&client.clone().at_least(index), worker.id.clone()).await {
                Ok(found) => break found,
                Err(failure) if failure.may_pass() && Instant::now() < until => {
                    note(&format!("{}; still watching", failure.words()));
                }
                Err(failure) => return Err(failure),
            }
            tokio::time::sleep(AGAIN).await;
        };
        let line = progress(&worker);
        if line != told {
            note(&line);
            told = line;
        }
        if over(&worker) {
            return Ok((worker, source));
        }
        match timeout_at(until, changed(&mut feed, &mut index)).await {
            Ok(news) => news?,
            Err(_) => return Ok((worker, source)),
        }
    }
}

/// `draining: 2 leases left (01J… running until in 20s), ended in 9m`.
fn progress(worker: &WorkerInfo) -> String {
    let now = wall_ms();
    let live = worker.leases.iter().filter(|lease| lease.state != "ended");
    let left: Vec<String> = live
        .map(|lease| format!("{} slot {} {}", lease.run_id, lease.slot, lease.state))
        .collect();
    let count = match left.len() {
        0 => "no lease left".to_owned(),
        1 => format!("1 lease left: {}", left[0]),
        count => format!("{count} leases left: {}", left.join(", ")),
    };
    let mut line = format!("{}: {count}", worker.lifecycle);
    if let Some(drain) = &worker.drain
        && !left.is_empty()
    {
        let time = match drain.until_ms.saturating_sub(now) {
            0 => "their time is up".to_owned(),
            ms => format!("{} left", span(ms.next_multiple_of(1_000))),
        };
        line = format!("{line}; {time}");
    }
    if let Some(refusal) = &worker.refusal {
        line = format!(
            "{line}; its statement was refused: {} {}",
            refusal.code, refusal.message
        );
    }
    if let Some(failure) = &worker.failure {
        let at = Moment(failure.at_ms).told(now);
        line = format!("{line}; its cleanup failed {at}: {}", failure.reason);
    }
    line
}

fn finish(global: &Global, worker: WorkerInfo, source: Source, exit: Option<u8>) -> Result {
    let view = WorkerView::from(worker);
    global.out().one(&view, source, &view.facts())?;
    exit.map_or(Ok(()), |code| Err(Failure::Silent(code)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use palyra_proto::run::v1::LeaseInfo;
    use palyra_proto::worker::v1::HoldInfo;

    fn worker(leases: usize) -> WorkerInfo {
        let lease = |number| LeaseInfo {
            run_id: format!("R{number}"),
            tool: "sum".to_owned(),
            state: "active".to_owned(),
            ..LeaseInfo::default()
        };
        let mut leases: Vec<LeaseInfo> = (0..leases).map(lease).collect();
        leases.push(LeaseInfo {
            state: "ended".to_owned(),
            ..LeaseInfo::default()
        });
        WorkerInfo {
            name: "w1".to_owned(),
            lifecycle: "draining".to_owned(),
            leases,
            ..WorkerInfo::default()
        }
    }

    #[test]
    fn what_ends_is_counted_and_named() {
        assert_eq!(ends(&worker(0)), "no lease ends");
        assert_eq!(ends(&worker(1)), "1 lease ends: run R0 (sum)");
        assert_eq!(ends(&worker(3)), "3 leases end: run R0 (sum), R1 (sum), R2 (sum)");
        assert!(ends(&worker(7)).ends_with("and 2 more"), "{}", ends(&worker(7)));
        assert!(
            confirm_ends(&worker(0), "quarantined", "", false).is_ok(),
            "nothing to ask"
        );
        // No terminal in a test: whoever is not asked is refused.
        assert_eq!(
            confirm_ends(&worker(1), "quarantined", "", false)
                .unwrap_err()
                .exit_code(),
            2
        );
        assert!(confirm_ends(&worker(1), "quarantined", "", true).is_ok());
    }

    #[test]
    fn a_drain_tells_what_is_left() {
        let mut drained = worker(1);
        drained.drain = Some(HoldInfo {
            until_ms: wall_ms() + 600_000,
            ..HoldInfo::default()
        });
        assert_eq!(
            progress(&drained),
            "draining: 1 lease left: R0 slot 0 active; 10m left"
        );
        drained.leases.clear();
        assert_eq!(progress(&drained), "draining: no lease left");
    }

    #[test]
    fn whoever_vouches_is_told_for_what() {
        let mut failed = worker(0);
        failed.failure = Some(HoldInfo {
            subject: "L2".to_owned(),
            ..HoldInfo::default()
        });
        failed.unclean = vec!["L2".to_owned(), "L1".to_owned()];
        assert_eq!(left(&failed), "lease L1, L2");
        assert_eq!(left(&worker(0)), "any lease");
    }
}
