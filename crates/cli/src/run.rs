//! `palyra run`: one execution of one tool on a worker, with files in and out.
//!
//! Invariant: a file that is written here has the digest that its manifest names.

mod files;
mod grants;
mod start;
mod view;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use palyra_client::{Client, MAX_WAIT_MS};
use palyra_proto::dispatch::v1::{DispatchInfo, LogsRequest, LogsResponse};
use palyra_proto::run::v1::{CancelRunRequest, GetRunRequest, ListRunsRequest, RunInfo, RunLogsRequest};
use tokio::time::Instant;

use crate::failure::Result;
use crate::job::{is_over, show};
use crate::output::time::millis;
use crate::output::{Out, Source};
use crate::pages::{ALL, Limit};
use crate::session::Global;
use crate::watch::watch;
use view::RunView;

/// How long a wait lasts when nothing is said: a little more than a run may take by itself.
const WAIT: Duration = Duration::from_secs(630);
/// How much longer than its wait an answer may take.
const ANSWER_GRACE: Duration = Duration::from_secs(1);

/// What can be done about runs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Starts a tool on a worker: asks for a grant, sends files, waits, takes files back
    #[command(
        after_help = "Example:\n  palyra run start --tool csv.sum --input orders.csv --output-dir results\n  \
                            palyra run start --tool csv.sum --params '{\"column\":2}' --input data=data --effect \
                            idempotent --follow\n  palyra run start --tool deploy --grant 01J9ZM --no-wait\n\n\
                            --timeout is the deadline of the run, 10m without it.\nExit codes: 0 succeeded, 1 \
                            failed, 3 the grant was denied, 6 refused, 7 cancelled or never given to a worker, \
                            13 timed out, lost or still running"
    )]
    Start(Box<start::Start>),
    /// Lists runs
    #[command(after_help = "Example:\n  palyra run ls --state running --worker web-1\n  palyra run ls -w")]
    Ls(List),
    /// Shows a run with its parameters, files and result
    #[command(
        visible_alias = "show",
        after_help = "Example:\n  palyra run get 01J9ZM -o json"
    )]
    Get {
        /// Run id, or the beginning of one
        id: String,
    },
    /// Waits until a run has ended
    #[command(
        after_help = "Example:\n  palyra run wait 01J9ZM --timeout 5m\n\nThe exit code tells the end: 0 succeeded, \
                            1 failed, 6 refused, 7 cancelled or never given to a worker, 13 timed out, lost or \
                            still running"
    )]
    Wait {
        /// Run id, or the beginning of one
        id: String,
    },
    /// Shows what the program of a run has written, and how far it says that it is
    #[command(
        after_help = "Example:\n  palyra run logs -f 01J9ZM\n\nLines come from the replica that the worker is \
                            connected to, and only it has them: after its end a run keeps the last 4 KiB."
    )]
    Logs {
        /// Run id, or the beginning of one
        id: String,
        /// Go on until the run has ended
        #[arg(short, long)]
        follow: bool,
    },
    /// Takes a run back; what runs is killed
    #[command(after_help = "Example:\n  palyra run cancel 01J9ZM --reason \"wrong input\" --wait")]
    Cancel {
        /// Run id, or the beginning of one
        id: String,
        /// Why; kept in the journal and told to the worker
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
        /// Wait until it has ended (--timeout, 90s without it)
        #[arg(long)]
        wait: bool,
    },
    /// Writes the output files of a run into a folder, and checks them
    #[command(after_help = "Example:\n  palyra run fetch 01J9ZM --output-dir results")]
    Fetch {
        /// Run id, or the beginning of one
        id: String,
        /// Where to; made when it is not there
        #[arg(long, value_name = "FOLDER")]
        output_dir: PathBuf,
        /// Replace files that are there
        #[arg(long)]
        overwrite: bool,
    },
}

/// What is listed.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only runs whose present or last lease is on this worker
    #[arg(long, value_name = "WORKER", default_value = "", hide_default_value = true)]
    worker: String,
    /// Only runs in this state: `awaiting_input`, queued, leased, running, fenced, succeeded, failed, refused,
    /// cancelling, cancelled, `timed_out`, lost
    #[arg(long, value_name = "STATE", default_value = "", hide_default_value = true)]
    state: String,
    /// Print what changes, until interrupted
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    limit: Limit,
}

/// Does what was asked about runs.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    let session = global.open()?;
    let (client, out) = (&session.client, global.out());
    match verb {
        Verb::Start(ask) => {
            let done = start::run(global, client, *ask).await;
            session.close().await;
            return done;
        }
        Verb::Ls(list) if list.watch => {
            let fetch = async |client: Client| runs(&client, &list, ALL).await;
            watch(client, out, list.limit.count(), fetch).await?;
        }
        Verb::Ls(list) => {
            let (items, source) = runs(client, &list, list.limit).await?;
            out.list(&items, source)?;
        }
        Verb::Get { id } => {
            let (info, source) = find(client, id).await?;
            let view = RunView::from(info);
            out.one(&view, source, &view.facts())?;
        }
        Verb::Wait { id } => wait(global, client, out, id).await?,
        Verb::Logs { id, follow } => {
            let ask = async |request| logs(client, request).await;
            show(global, ask, "run", &id, follow).await?;
        }
        Verb::Cancel { id, reason, wait } => cancel(global, client, id, reason, wait).await?,
        Verb::Fetch {
            id,
            output_dir,
            overwrite,
        } => {
            let (info, _) = find(client, id).await?;
            let fetched = files::download(client, &info, &output_dir, overwrite).await?;
            out.plain(&fetched, &fetched.told())?;
        }
    }
    session.close().await;
    Ok(())
}

async fn runs(client: &Client, list: &List, limit: Limit) -> Result<(Vec<RunView>, Source)> {
    limit
        .newest(async |page| {
            let request = ListRunsRequest {
                worker_id: list.worker.clone(),
                state: list.state.clone(),
                page: Some(page),
                read: None,
            };
            let answer = client.list_runs(request).await?;
            Ok((
                answer.runs.into_iter().map(RunView::from).collect(),
                answer.page,
                answer.read.into(),
            ))
        })
        .await
}

/// One run, by its id or the beginning of it.
async fn find(client: &Client, id: String) -> Result<(RunInfo, Source)> {
    let answer = client.get_run(GetRunRequest { id, read: None }).await?;
    Ok((answer.run.unwrap_or_default(), answer.read.into()))
}

async fn wait(global: &Global, client: &Client, out: Out, id: String) -> Result {
    let (info, source) = find(client, id).await?;
    let until = Instant::now() + global.timeout.unwrap_or(WAIT);
    let (info, source) = wait_for_end(client, info, source, until).await?;
    let view = RunView::from(info);
    out.one(&view, source, &view.facts())?;
    view.verdict()
}

/// Waits until a run ended or the time is up; answers what it is then.
async fn wait_for_end(
    client: &Client,
    mut run: RunInfo,
    mut source: Source,
    until: Instant,
) -> Result<(RunInfo, Source)> {
    while !is_over(&run.state) {
        let left = millis(until.saturating_duration_since(Instant::now()));
        if left == 0 {
            break;
        }
        let wait_ms = u32::try_from(left.min(MAX_WAIT_MS.into())).unwrap_or(MAX_WAIT_MS);
        // A cluster that cannot answer must not hold us longer than we were asked to wait.
        let asked = client.wait_run(&run.id, &run.state, wait_ms);
        let Ok(answer) = tokio::time::timeout_at(until + ANSWER_GRACE, asked).await else {
            break;
        };
        let answer = answer?;
        source = answer.read.into();
        run = answer.run.unwrap_or(run);
    }
    Ok((run, source))
}

/// What a run's program wrote, in the form that lines of dispatches have.
async fn logs(client: &Client, request: LogsRequest) -> Result<LogsResponse> {
    let answer = client
        .run_logs(RunLogsRequest {
            id: request.id,
            attempt: request.attempt,
            line: request.line,
            wait_ms: request.wait_ms,
        })
        .await?;
    let run = answer.run.unwrap_or_default();
    Ok(LogsResponse {
        dispatch: Some(DispatchInfo {
            id: run.id,
            state: run.state,
            attempt: run.attempt,
            log_tail: run.log_tail,
            ..DispatchInfo::default()
        }),
        lines: answer.lines,
        progress: answer.progress,
        replica_id: answer.replica_id,
    })
}

/// How long `cancel --wait` waits when nothing is said: a lease that nobody ends is over by then.
const CANCEL_WAIT: Duration = Duration::from_secs(90);

async fn cancel(global: &Global, client: &Client, id: String, reason: String, wait: bool) -> Result {
    let request = CancelRunRequest {
        request_id: global.request_id(),
        id,
        reason,
    };
    let answer = client.cancel_run(request).await?;
    let mut run = answer.run.unwrap_or_default();
    let mut source = Source::from(answer.write);
    if wait {
        let until = Instant::now() + global.timeout.unwrap_or(CANCEL_WAIT);
        (run, source) = wait_for_end(client, run, source, until).await?;
    }
    let view = RunView::from(run);
    global.out().one(&view, source, &view.facts())?;
    if wait { view.cancel_verdict() } else { Ok(()) }
}
