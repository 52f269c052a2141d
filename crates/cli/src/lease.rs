//! `palyra lease`: which slot of which worker is bound to which run, and until when.

pub(crate) mod view;

use clap::{Args, Subcommand};
use palyra_client::Client;
use palyra_proto::run::v1::{GetLeaseRequest, ListLeasesRequest, RevokeLeaseRequest};

use crate::failure::Result;
use crate::output::{Out, Source, confirm};
use crate::pages::{ALL, Limit};
use crate::session::{Global, required_reason};
use crate::watch::watch;
use view::LeaseView;

/// What can be done about leases.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Lists leases: the live ones, unless other ones are asked for
    #[command(after_help = "Example:\n  palyra lease ls --worker web-1\n  palyra lease ls --state all -w")]
    Ls(List),
    /// Shows one lease
    #[command(visible_alias = "show", after_help = "Example:\n  palyra lease get 01J9ZM")]
    Get {
        /// Lease id, or the beginning of one
        id: String,
    },
    /// Ends a lease: nothing of it is accepted any more, and its slot is given again once the worker is clean
    #[command(after_help = "Example:\n  palyra lease revoke 01J9ZM --reason \"hangs\" --yes")]
    Revoke {
        /// Lease id, or the beginning of one
        id: String,
        /// Why; kept in the journal
        #[arg(long)]
        reason: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

/// What is listed.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only leases of this worker
    #[arg(
        long,
        visible_alias = "node",
        value_name = "WORKER",
        default_value = "",
        hide_default_value = true
    )]
    worker: String,
    /// Only leases in this state: granted, active, ending, ended, live, all
    #[arg(long, value_name = "STATE", default_value = "", hide_default_value = true)]
    state: String,
    /// Print what changes, until interrupted
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    limit: Limit,
}

/// Does what was asked about leases.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    let session = global.open()?;
    let (client, out) = (&session.client, global.out());
    match verb {
        Verb::Ls(list) if list.watch => {
            let fetch = async |client: Client| leases(&client, &list, ALL).await;
            watch(client, out, list.limit.count(), fetch).await?;
        }
        Verb::Ls(list) => {
            let (items, source) = leases(client, &list, list.limit).await?;
            out.list(&items, source)?;
        }
        Verb::Get { id } => get(client, out, id).await?,
        Verb::Revoke { id, reason, yes } => revoke(global, client, id, reason, yes).await?,
    }
    session.close().await;
    Ok(())
}

async fn leases(client: &Client, list: &List, limit: Limit) -> Result<(Vec<LeaseView>, Source)> {
    limit
        .newest(async |page| {
            let request = ListLeasesRequest {
                worker_id: list.worker.clone(),
                state: list.state.clone(),
                page: Some(page),
                read: None,
            };
            let answer = client.list_leases(request).await?;
            Ok((
                answer.leases.into_iter().map(LeaseView::from).collect(),
                answer.page,
                answer.read.into(),
            ))
        })
        .await
}

async fn find(client: &Client, id: String) -> Result<(LeaseView, Source)> {
    let answer = client.get_lease(GetLeaseRequest { id, read: None }).await?;
    Ok((
        LeaseView::from(answer.lease.unwrap_or_default()),
        answer.read.into(),
    ))
}

async fn get(client: &Client, out: Out, id: String) -> Result {
    let (view, source) = find(client, id).await?;
    out.one(&view, source, &view.facts())
}

async fn revoke(global: &Global, client: &Client, id: String, reason: String, yes: bool) -> Result {
    required_reason(&reason)?;
    let (lease, _) = find(client, id).await?;
    if !yes && lease.state != "ended" {
        let what = format!(
            "lease {} of {} ends: run {} ({}) is stopped there",
            lease.id,
            lease.worker(),
            lease.run_id,
            lease.tool
        );
        confirm(
            &what,
            &format!("palyra lease revoke {} --reason ... --yes", lease.id),
        )?;
    }
    let request = RevokeLeaseRequest {
        request_id: global.request_id(),
        id: lease.id,
        reason,
    };
    let answer = client.revoke_lease(request).await?;
    let view = LeaseView::from(answer.lease.unwrap_or_default());
    global.out().one(&view, answer.write.into(), &view.facts())
}
