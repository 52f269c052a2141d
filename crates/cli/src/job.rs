//! `palyra job`: what was asked of nodes, and what came of it.

mod logs;
mod view;

use std::collections::BTreeMap;
use std::time::Duration;

use clap::{Args, Subcommand};
use palyra_client::{Client, MAX_WAIT_MS};
use palyra_proto::dispatch::v1::{CancelRequest, DispatchInfo, GetRequest, ListRequest};
use palyra_proto::node::v1::ListDevicesRequest;
use tokio::time::Instant;

use crate::failure::Result;
use crate::output::time::millis;
use crate::output::{Out, Source};
use crate::pages::{ALL, Limit};
use crate::session::Global;
use crate::watch::watch;

use logs::told;
pub(crate) use logs::{Seen, follow, show, tell};
pub(crate) use view::{JobView, embedded};

/// How long `cancel --wait` waits when nothing is said: the node has a minute for its answer.
const CANCEL_WAIT: Duration = Duration::from_secs(90);
/// How much longer than its wait an answer may take.
const ANSWER_GRACE: Duration = Duration::from_secs(1);

/// What can be done about jobs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Lists jobs
    #[command(after_help = "Example:\n  palyra job ls --state queued\n  \
                      palyra job ls --node 01J9ZKWM3V3BQ0YH5B7RF4X2CN -w")]
    Ls(List),
    /// Shows a job with its input and result
    #[command(
        after_help = "Example:\n  palyra job get 01J9ZM --wait\n\nWith --wait the exit code tells the end, as \
                            that of palyra node invoke does."
    )]
    Get {
        /// Job id, or the beginning of one
        id: String,
        /// Wait until it ended (--timeout, 30s without it)
        #[arg(long)]
        wait: bool,
    },
    /// Waits until a job has ended
    #[command(
        after_help = "Example:\n  palyra job wait 01J9ZM --timeout 5m\n\nThe exit code tells the end, as that of \
                            palyra node invoke does."
    )]
    Wait {
        /// Job id, or the beginning of one
        id: String,
    },
    /// Shows what the program of a job has written, and how far it says that it is
    #[command(
        after_help = "Example:\n  palyra job logs -f 01J9ZM\n\nLines come from the replica that the node is connected \
                            to, and only it has them: after its end a job keeps the last 4 KiB."
    )]
    Logs {
        /// Job id, or the beginning of one
        id: String,
        /// Go on until the job has ended
        #[arg(short, long)]
        follow: bool,
    },
    /// Cancels a job that has not ended
    #[command(
        after_help = "Example:\n  palyra job cancel 01J9ZM --reason \"wrong node\" --wait\n\n\
                      One that waits ends at once. The program of one that runs gets SIGTERM, then SIGKILL;\n\
                      until the node has said what became of it, for a minute at most, the job is `cancelling`."
    )]
    Cancel {
        /// Wait until it has ended (--timeout, 90s without it)
        #[arg(long)]
        wait: bool,
        /// Job id, or the beginning of one
        id: String,
        /// Why; kept in the journal and told to the node
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
    },
}

/// What is listed.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only jobs of this node
    #[arg(
        long,
        visible_alias = "device",
        value_name = "NODE",
        default_value = "",
        hide_default_value = true
    )]
    node: String,
    /// Only jobs in this state: queued, dispatched, awaiting_local_mediation, cancelling, succeeded, failed,
    /// timed_out, rejected, cancelled, session_lost
    #[arg(long, value_name = "STATE", default_value = "", hide_default_value = true)]
    state: String,
    /// Print what changes, until interrupted
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    limit: Limit,
}

/// Does what was asked about jobs.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    let session = global.open()?;
    let (client, out) = (&session.client, global.out());
    match verb {
        Verb::Ls(list) if list.watch => {
            let fetch = async |client: Client| jobs(&client, &list, ALL).await;
            watch(client, out, list.limit.count(), fetch).await?;
        }
        Verb::Ls(list) => {
            let (items, source) = jobs(client, &list, list.limit).await?;
            out.list(&items, source)?;
        }
        Verb::Get { id, wait } => get(global, client, out, id, wait).await?,
        Verb::Wait { id } => get(global, client, out, id, true).await?,
        Verb::Logs { id, follow } => {
            let ask = async |request| Ok(client.dispatch_logs(request).await?);
            show(global, ask, "job", &id, follow).await?;
        }
        Verb::Cancel { id, reason, wait } => {
            let request = CancelRequest {
                request_id: global.request_id(),
                id,
                reason,
            };
            let answer = client.cancel_dispatch(request).await?;
            let mut dispatch = answer.dispatch.unwrap_or_default();
            let mut source = Source::from(answer.write);
            if wait && !is_over(&dispatch.state) {
                let until = Instant::now() + global.timeout.unwrap_or(CANCEL_WAIT);
                (dispatch, source) = wait_for_end(client, dispatch, source, until).await?;
            }
            let view = JobView::from(dispatch);
            out.one(&view, source, &view.facts())?;
            if wait {
                view.cancel_verdict()?;
            }
        }
    }
    session.close().await;
    Ok(())
}

/// The names of devices by their ids. Of more than a page of them, people know ids anyway.
async fn names(client: &Client) -> Result<BTreeMap<String, String>> {
    let answer = client.list_devices(ListDevicesRequest::default()).await?;
    Ok(answer
        .devices
        .into_iter()
        .map(|device| (device.id, device.name))
        .collect())
}

async fn jobs(client: &Client, list: &List, limit: Limit) -> Result<(Vec<JobView>, Source)> {
    let (jobs, source) = bare_jobs(client, list, limit).await?;
    let names = if jobs.is_empty() {
        BTreeMap::new()
    } else {
        names(client).await?
    };
    Ok((jobs.into_iter().map(|job| job.named(&names)).collect(), source))
}

async fn bare_jobs(client: &Client, list: &List, limit: Limit) -> Result<(Vec<JobView>, Source)> {
    limit
        .newest(async |page| {
            let request = ListRequest {
                device_id: list.node.clone(),
                state: list.state.clone(),
                page: Some(page),
                read: None,
            };
            let answer = client.list_dispatches(request).await?;
            Ok((
                answer.dispatches.into_iter().map(JobView::from).collect(),
                answer.page,
                answer.read.into(),
            ))
        })
        .await
}

async fn get(global: &Global, client: &Client, out: Out, id: String, wait: bool) -> Result {
    let answer = client.get_dispatch(GetRequest { id, read: None }).await?;
    let mut dispatch = answer.dispatch.unwrap_or_default();
    let mut source: Source = answer.read.into();
    if wait && !is_over(&dispatch.state) {
        let until = Instant::now() + global.timeout.unwrap_or(Duration::from_secs(30));
        (dispatch, source) = wait_for_end(client, dispatch, source, until).await?;
    }
    let view = JobView::from(dispatch);
    out.one(&view, source, &view.facts())?;
    if wait { view.verdict() } else { Ok(()) }
}

/// Waits until a dispatch ended or the time is up; answers what it is then.
pub(crate) async fn wait_for_end(
    client: &Client,
    mut dispatch: DispatchInfo,
    mut source: Source,
    until: Instant,
) -> Result<(DispatchInfo, Source)> {
    told(&dispatch);
    while !is_over(&dispatch.state) {
        let left = millis(until.saturating_duration_since(Instant::now()));
        if left == 0 {
            break;
        }
        let wait_ms = u32::try_from(left.min(MAX_WAIT_MS.into())).unwrap_or(MAX_WAIT_MS);
        // A cluster that cannot answer must not hold us longer than we were asked to wait.
        let asked = client.wait_dispatch_change(&dispatch.id, &dispatch.state, wait_ms);
        let Ok(answer) = tokio::time::timeout_at(until + ANSWER_GRACE, asked).await else {
            break;
        };
        let answer = answer?;
        let changed = answer.dispatch.unwrap_or_else(|| dispatch.clone());
        source = answer.read.into();
        if changed.state != dispatch.state {
            told(&changed);
        }
        dispatch = changed;
    }
    Ok((dispatch, source))
}

/// Whether a dispatch, or a run, in this state changes no more.
pub(crate) fn is_over(state: &str) -> bool {
    !matches!(
        state,
        "queued"
            | "dispatched"
            | "awaiting_local_mediation"
            | "cancelling"
            // Of a run.
            | "awaiting_input"
            | "leased"
            | "running"
            | "fenced"
    )
}
