//! `palyra grant`: permission to run one run.

mod view;

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use palyra_client::{Client, new_ulid};
use palyra_proto::approval::v1::{
    CreateGrantRequest, GetGrantRequest, GrantInfo, ListGrantsRequest, RevokeGrantRequest,
};
use tokio::time::Instant;

use crate::approval::{WAIT, of_grant, verdict, wait_for_decision};
use crate::failure::{Failure, Result};
use crate::output::time::{millis, parse_limit};
use crate::output::{Out, Source, confirm, note};
use crate::pages::{ALL, Limit};
use crate::session::{Global, required_reason};
use crate::watch::watch;
use view::GrantView;

/// What stands for a run id that is made here.
const NEW: &str = "new";

/// What can be done about grants.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Asks for permission to run a tool once; a decision of earlier may cover it, otherwise a person decides
    #[command(
        visible_alias = "ask",
        after_help = "Example:\n  palyra grant create --run new --tool resize --summary \"thumbnails of May\"\n  \
                      palyra grant create --run new --tool resize --session may --risk high --wait\n\n\
                      With --wait the exit code tells the decision: 0 active, 6 denied, 7 expired or withdrawn,\n\
                      13 still open."
    )]
    Create(Create),
    /// Lists grants
    #[command(after_help = "Example:\n  palyra grant ls --state active\n  palyra grant ls -w")]
    Ls(List),
    /// Shows one grant
    #[command(visible_alias = "get", after_help = "Example:\n  palyra grant show 01J9ZM")]
    Show {
        /// Grant id, or the beginning of one
        id: String,
    },
    /// Takes a grant back: nothing starts with it any more
    #[command(
        after_help = "Example:\n  palyra grant revoke 01J9ZM --reason \"wrong tool\"\n  \
                            palyra grant revoke 01J9ZM --reason \"stop it\" --cancel-run --yes"
    )]
    Revoke {
        /// Grant id, or the beginning of one
        id: String,
        /// Why; kept in the journal
        #[arg(long)]
        reason: String,
        /// Cancel the run that it started, too
        #[arg(long)]
        cancel_run: bool,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
}

/// How much is at stake.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Risk {
    /// Little
    Low,
    /// Something
    Medium,
    /// Much
    High,
    /// Everything
    Critical,
}

impl Risk {
    fn as_str(self) -> &'static str {
        match self {
            Risk::Low => "low",
            Risk::Medium => "medium",
            Risk::High => "high",
            Risk::Critical => "critical",
        }
    }
}

/// What is asked for.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The run's id, a ULID; `new` makes one
    #[arg(long, value_name = "ID", value_parser = parse_run)]
    run: String,
    /// The tool
    #[arg(long)]
    tool: String,
    /// A name for what belongs together: a decision may cover all of it
    #[arg(long, default_value = "", hide_default_value = true)]
    session: String,
    /// How long the run may be started, at most 7d; without it an hour
    #[arg(long, value_parser = parse_limit, value_name = "DURATION")]
    ttl: Option<Duration>,
    /// What will happen, for the person who decides
    #[arg(long, default_value = "", hide_default_value = true)]
    summary: String,
    /// How much is at stake
    #[arg(long, value_enum, default_value = "medium")]
    risk: Risk,
    /// Wait until somebody has decided (--timeout, 10m without it)
    #[arg(long)]
    wait: bool,
}

fn parse_run(text: &str) -> std::result::Result<String, String> {
    let upper = text.to_ascii_uppercase();
    if text == NEW {
        Ok(new_ulid())
    } else if palyra_client::ids::is_ulid(&upper) {
        Ok(upper)
    } else {
        Err(format!("{text:?} is no ULID (26 characters); `new` makes one"))
    }
}

/// What is listed.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only grants in this state: pending, active, used, denied, revoked, expired
    #[arg(long, value_name = "STATE", default_value = "", hide_default_value = true)]
    state: String,
    /// Print what changes, until interrupted
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    limit: Limit,
}

/// Does what was asked about grants.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    let session = global.open()?;
    let (client, out) = (&session.client, global.out());
    match verb {
        Verb::Create(ask) => create(global, client, ask).await?,
        Verb::Ls(list) => ls(client, out, list).await?,
        Verb::Show { id } => {
            let (found, source) = get(client, id).await?;
            let view = GrantView::from(found);
            out.one(&view, source, &view.facts())?;
        }
        Verb::Revoke {
            id,
            reason,
            cancel_run,
            yes,
        } => {
            required_reason(&reason)?;
            let view = GrantView::from(get(client, id).await?.0);
            if !yes && cancel_run {
                let what = format!("grant {} is revoked, and run {} cancelled", view.id, view.run_id);
                let again = format!("palyra grant revoke {} --reason ... --cancel-run --yes", view.id);
                confirm(&what, &again)?;
            }
            let request = RevokeGrantRequest {
                request_id: global.request_id(),
                id: view.id,
                reason,
                cancel_run,
            };
            let answer = client.revoke_grant(request).await?;
            let view = GrantView::from(answer.grant.unwrap_or_default());
            out.one(&view, answer.write.into(), &view.facts())?;
        }
    }
    session.close().await;
    Ok(())
}

async fn get(client: &Client, id: String) -> Result<(GrantInfo, Source)> {
    let answer = client.get_grant(GetGrantRequest { id, read: None }).await?;
    Ok((answer.grant.unwrap_or_default(), answer.read.into()))
}

async fn grants(client: &Client, list: &List, limit: Limit) -> Result<(Vec<GrantView>, Source)> {
    limit
        .newest(async |page| {
            let request = ListGrantsRequest {
                state: list.state.clone(),
                page: Some(page),
                read: None,
            };
            let answer = client.list_grants(request).await?;
            Ok((
                answer.grants.into_iter().map(GrantView::from).collect(),
                answer.page,
                answer.read.into(),
            ))
        })
        .await
}

async fn ls(client: &Client, out: Out, list: List) -> Result {
    if list.watch {
        let fetch = async |client: Client| grants(&client, &list, ALL).await;
        return watch(client, out, list.limit.count(), fetch).await;
    }
    let (items, source) = grants(client, &list, list.limit).await?;
    out.list(&items, source)
}

async fn create(global: &Global, client: &Client, ask: Create) -> Result {
    let request = CreateGrantRequest {
        request_id: global.request_id(),
        grant_id: new_ulid(),
        run_id: ask.run,
        tool: ask.tool,
        session: ask.session,
        ttl_ms: ask.ttl.map_or(0, millis),
        summary: ask.summary,
        risk: ask.risk.as_str().to_owned(),
    };
    let id = request.grant_id.clone();
    let look = move |_: &str| format!("palyra grant show {id}: it is there if it was asked for");
    let answer = client.create_grant(request).await;
    let answer = answer.map_err(|error| Failure::from(error).look_again(look))?;
    let (mut found, mut source) = (answer.grant.unwrap_or_default(), answer.write.into());
    if ask.wait && found.state == "pending" {
        note(&format!(
            "{} waits for a person: palyra approval decide {} --allow",
            found.id, found.approval_id
        ));
        let until = Instant::now() + global.timeout.unwrap_or(WAIT);
        let (approval, read) = of_grant(client, found.approval_id.clone()).await?;
        wait_for_decision(client, approval, read, until).await?;
        (found, source) = get(client, found.id).await?;
    }
    let view = GrantView::from(found);
    global.out().one(&view, source, &view.asked())?;
    if ask.wait { verdict(&view.state) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_named_or_new() {
        assert_ne!(parse_run("new").unwrap(), parse_run("new").unwrap());
        let id = "01ARZ3NDEKTSV4RRFFQ69G5FAV";
        assert_eq!(parse_run(&id.to_lowercase()).unwrap(), id);
        assert!(parse_run("mine").is_err());
    }
}
