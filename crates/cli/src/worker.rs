//! `palyra worker`: nodes that run other people's work, as operators see and hold them.
//!
//! What never lives here: what a worker may do (the cluster's policy). Invariant: what ends leases says first
//! which, and is
//! confirmed.

mod act;
mod policy;
mod proof;
pub(crate) mod run;
mod view;

use clap::{Args, Subcommand};
use palyra_client::Client;
use palyra_proto::worker::v1::{GetWorkerRequest, ListWorkersRequest, WorkerInfo};

use crate::failure::Result;
use crate::output::{Out, Source, note};
use crate::pages::{ALL, Limit};
use crate::session::Global;
use crate::watch::watch;
use view::{FleetView, WorkerView};

/// What can be done about workers.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Lists workers
    #[command(after_help = "Example:\n  palyra worker ls --lifecycle available\n  palyra worker ls -w")]
    Ls(List),
    /// Shows one worker: what it proved, what it holds, why it gets no work
    #[command(
        visible_alias = "show",
        after_help = "Example:\n  palyra worker describe web-1"
    )]
    Describe {
        /// Device id, name, or the beginning of an id
        worker: String,
    },
    /// Counts workers, slots, leases and runs of one moment
    #[command(after_help = "Example:\n  palyra worker fleet -o json")]
    Fleet,
    /// On this machine: runs the agent as a worker, in the foreground; pairs first when it is told how
    #[command(after_help = "Example:\n  palyra worker run --config worker.toml\n  \
                            palyra worker run --config worker.toml --digests\n\n\
                            Without --config it is what [worker] of node.toml says, and then `palyra node start`\n\
                            runs it in the background as well.")]
    Run(Box<run::Run>),
    /// Holds one lease's deadline: started by `palyra worker run`, by nobody else
    #[command(hide = true, after_help = "Example:\n  palyra worker warden")]
    Warden(run::Warden),
    /// Shows what a worker proved, at which level, and verifies its signature on this machine
    #[command(
        after_help = "Example:\n  palyra worker attest web-1\n\nExit code 14: the signature is bad, or what the \
                            replica tells is not what was signed."
    )]
    Attest(proof::Attest),
    /// Shows or sets what workers are held to
    #[command(subcommand)]
    Policy(policy::Verb),
    /// Has a worker attest again; passing lifts a quarantine
    #[command(
        after_help = "Example:\n  palyra worker reverify web-1 --reason \"tools put back\" --wait\n\nExit code 14: \
                            its statement was refused; 12: it has not attested yet."
    )]
    Reverify(act::Reverify),
    /// Gives it nothing any more and ends its leases, until it was reverified
    #[command(after_help = "Example:\n  palyra worker quarantine web-1 --reason \"odd traffic\" --yes")]
    Quarantine(act::Quarantine),
    /// Takes a drain back
    #[command(after_help = "Example:\n  palyra worker release web-1")]
    Release(act::Target),
    /// Gives it nothing new; what runs may end until a deadline
    #[command(
        after_help = "Example:\n  palyra worker drain web-1 --deadline 10m --wait\n  \
                            palyra worker drain web-1 --force --reason \"on fire\" --yes\n\nExit code 12: the wait \
                            ended before the worker was empty."
    )]
    Drain(act::Drain),
    /// After a cleanup that failed: has it tried again, or vouches that the worker is clean
    #[command(after_help = "Example:\n  palyra worker cleanup web-1 --wait\n  \
                            palyra worker cleanup web-1 --force --reason \"reinstalled\" --yes")]
    Cleanup(act::Cleanup),
    /// Ends what is due now, and forgets workers that have long been offline
    #[command(after_help = "Example:\n  palyra worker reap --older-than 7d")]
    Reap(act::Reap),
    /// Keys of egress proxies, and what binds workers to them
    #[command(subcommand)]
    Egress(proof::Egress),
}

/// What is listed.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only workers there: registered, available, busy, degraded, draining, quarantined, orphaned, offline, failed
    #[arg(
        long,
        visible_alias = "state",
        value_name = "LIFECYCLE",
        default_value = "",
        hide_default_value = true
    )]
    lifecycle: String,
    /// Print what changes, until interrupted
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    limit: Limit,
}

/// Does what was asked about workers.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    let verb = match verb {
        Verb::Run(run) => return run::run(global, *run).await,
        Verb::Policy(policy::Verb::Show { template: true }) => return policy::template(global),
        Verb::Egress(proof::Egress::Keygen { name, out }) => return proof::keygen(global, &name, &out),
        Verb::Egress(proof::Egress::Bind(bind)) => return proof::bind(global, bind).await,
        verb => verb,
    };
    let session = global.open()?;
    let (client, out) = (&session.client, global.out());
    match verb {
        Verb::Ls(list) => ls(client, out, &list).await?,
        Verb::Describe { worker } => {
            let (info, source) = find(client, worker).await?;
            let view = WorkerView::from(info);
            out.one(&view, source, &view.facts())?;
        }
        Verb::Fleet => {
            let answer = client.fleet_totals().await?;
            let source = answer.read.into();
            let view = FleetView::from(answer);
            out.one(&view, source, &view.facts())?;
        }
        Verb::Attest(ask) => proof::attest(global, client, ask).await?,
        Verb::Policy(verb) => policy::run(global, client, verb).await?,
        Verb::Reverify(ask) => act::reverify(global, client, ask).await?,
        Verb::Quarantine(ask) => act::quarantine(global, client, ask).await?,
        Verb::Release(ask) => act::release(global, client, ask).await?,
        Verb::Drain(ask) => act::drain(global, client, ask).await?,
        Verb::Cleanup(ask) => act::cleanup(global, client, ask).await?,
        Verb::Reap(ask) => act::reap(global, client, ask).await?,
        // Done above, or in `main`.
        Verb::Egress(_) | Verb::Run(_) | Verb::Warden(_) => {}
    }
    session.close().await;
    Ok(())
}

async fn ls(client: &Client, out: Out, list: &List) -> Result {
    if list.watch {
        let fetch = async |client: Client| workers(&client, list, ALL).await;
        return watch(client, out, list.limit.count(), fetch).await;
    }
    let (items, source) = workers(client, list, list.limit).await?;
    out.list(&items, source)?;
    if items.is_empty() && out.format.is_table() {
        note(if list.lifecycle.is_empty() {
            "there are no workers yet; on a paired machine: palyra worker run"
        } else {
            "no worker is there: palyra worker ls"
        });
    }
    Ok(())
}

async fn workers(client: &Client, list: &List, limit: Limit) -> Result<(Vec<WorkerView>, Source)> {
    limit
        .all(async |page| {
            let request = ListWorkersRequest {
                lifecycle: list.lifecycle.clone(),
                page: Some(page),
                read: None,
            };
            let answer = client.list_workers(request).await?;
            Ok((
                answer.workers.into_iter().map(WorkerView::from).collect(),
                answer.page,
                answer.read.into(),
            ))
        })
        .await
}

/// One worker, by whatever names it.
async fn find(client: &Client, worker: String) -> Result<(WorkerInfo, Source)> {
    let request = GetWorkerRequest {
        id: worker,
        read: None,
    };
    let answer = client.get_worker(request).await?;
    Ok((answer.worker.unwrap_or_default(), answer.read.into()))
}
