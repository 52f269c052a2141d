//! `palyra approval`: what waits for a person, and what people decided.

mod policy;
pub(crate) mod view;

use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use palyra_client::{Client, MAX_WAIT_MS};
use palyra_proto::approval::v1::{
    ApprovalInfo, DecideRequest, GetApprovalRequest, ListApprovalsRequest, WithdrawRequest,
};
use tokio::time::Instant;

use crate::failure::{Failure, Result, UNKNOWN};
use crate::output::time::{millis, parse_limit};
use crate::output::{Out, Source, confirm, interactive, note, table};
use crate::pages::{ALL, Limit};
use crate::pairing;
use crate::session::{Global, required_reason};
use crate::watch::watch;
use view::ApprovalView;

/// How long a wait for a person is when nothing is said.
pub(crate) const WAIT: Duration = Duration::from_secs(600);
/// How much longer than its wait an answer may take.
const ANSWER_GRACE: Duration = Duration::from_secs(1);

/// What can be done about approvals.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Lists what waits for a person: grants that were asked for, and machines that ask to be paired
    #[command(
        after_help = "Example:\n  palyra approval ls -w\n  palyra approval ls --state all --subject grant"
    )]
    Ls(List),
    /// Shows one: who asks for what, how much is at stake, and what can be chosen
    #[command(visible_alias = "get", after_help = "Example:\n  palyra approval show 01J9ZM")]
    Show {
        /// Approval id, or the beginning of one
        id: String,
    },
    /// Allows or denies one; for a machine that asks to be paired as `palyra pairing approve` and `reject` do
    #[command(
        group = ArgGroup::new("decision").required(true),
        after_help = "Example:\n  palyra approval decide 01J9ZM --allow --reason \"as agreed\"\n  \
                      palyra approval decide 01J9ZM --allow --scope timeboxed --ttl 8h\n  \
                      palyra approval decide 01J9ZM --deny --reason \"not on a Friday\"\n  \
                      palyra approval decide 01J9ZK --allow --sas 123456"
    )]
    Decide(Decide),
    /// Waits until somebody has decided
    #[command(after_help = "Example:\n  palyra approval wait 01J9ZM --timeout 10m\n\n\
                            Exit codes: 0 allowed, 6 denied, 7 expired or withdrawn, 13 still open")]
    Wait {
        /// Approval id, or the beginning of one
        id: String,
    },
    /// Takes back what waits, or a decision that stands, with the grants on it that were not used
    #[command(
        after_help = "Example:\n  palyra approval withdraw 01J9ZM --reason \"the change is over\" --yes"
    )]
    Withdraw {
        /// Approval id, or the beginning of one
        id: String,
        /// Why; kept in the journal
        #[arg(long)]
        reason: String,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
    /// What approvals are held to: four eyes, and for how long
    #[command(subcommand)]
    Policy(policy::Verb),
}

/// What is listed.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only approvals in this state: pending, allowed, denied, expired, withdrawn, all; without it pending
    #[arg(long, value_name = "STATE", default_value = "", hide_default_value = true)]
    state: String,
    /// Only approvals of these: pairing, grant
    #[arg(long, value_name = "SUBJECT", default_value = "", hide_default_value = true)]
    subject: String,
    /// Print what changes, until interrupted
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    limit: Limit,
}

/// What a decision covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scope {
    /// What was asked, and nothing else
    Once,
    /// What the same operator asks for the same tool in the same session, for a time
    Session,
    /// What the same operator asks for the same tool, for a time
    Timeboxed,
}

impl Scope {
    fn as_str(self) -> &'static str {
        match self {
            Scope::Once => "once",
            Scope::Session => "session",
            Scope::Timeboxed => "timeboxed",
        }
    }
}

/// A decision.
#[derive(Debug, Args)]
pub(crate) struct Decide {
    /// Approval id, or the beginning of one
    id: String,
    /// Let it happen
    #[arg(long, group = "decision")]
    allow: bool,
    /// Don't; takes a reason
    #[arg(long, group = "decision", requires = "reason")]
    deny: bool,
    /// What is allowed, beside what was asked
    #[arg(long, value_enum, value_name = "SCOPE", conflicts_with = "deny")]
    scope: Option<Scope>,
    /// How long that is good: at most as the policy says; without it an hour
    #[arg(long, value_parser = parse_limit, value_name = "DURATION", requires = "scope")]
    ttl: Option<Duration>,
    /// Why; kept in the journal
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    /// Of a machine: the six check digits on its screen
    #[arg(long, default_value = "", hide_default_value = true, conflicts_with = "deny")]
    sas: String,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

/// Does what was asked about approvals.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    let session = global.open()?;
    let (client, out) = (&session.client, global.out());
    match verb {
        Verb::Ls(list) => ls(client, out, list).await?,
        Verb::Show { id } => {
            let (view, source) = find(client, id).await?;
            out.one(&view, source, &view.facts())?;
        }
        Verb::Decide(decision) => decide(global, client, decision).await?,
        Verb::Wait { id } => {
            let (found, source) = get(client, id).await?;
            let until = Instant::now() + global.timeout.unwrap_or(WAIT);
            let (found, source) = wait_for_decision(client, found, source, until).await?;
            let view = ApprovalView::from(found);
            out.one(&view, source, &view.facts())?;
            verdict(&view.state)?;
        }
        Verb::Withdraw { id, reason, yes } => withdraw(global, client, id, reason, yes).await?,
        Verb::Policy(verb) => policy::run(global, client, verb).await?,
    }
    session.close().await;
    Ok(())
}

async fn approvals(client: &Client, list: &List, limit: Limit) -> Result<(Vec<ApprovalView>, Source)> {
    limit
        .newest(async |page| {
            let request = ListApprovalsRequest {
                state: list.state.clone(),
                subject: list.subject.clone(),
                page: Some(page),
                read: None,
            };
            let answer = client.list_approvals(request).await?;
            Ok((
                answer.approvals.into_iter().map(ApprovalView::from).collect(),
                answer.page,
                answer.read.into(),
            ))
        })
        .await
}

async fn ls(client: &Client, out: Out, list: List) -> Result {
    if list.watch {
        let fetch = async |client: Client| approvals(&client, &list, ALL).await;
        return watch(client, out, list.limit.count(), fetch).await;
    }
    let (items, source) = approvals(client, &list, list.limit).await?;
    out.list(&items, source)?;
    if let Some(first) = items
        .iter()
        .find(|item| item.waits())
        .filter(|_| out.format.is_table())
    {
        note(&format!(
            "look at what is asked: palyra approval show {}; then: {}",
            first.id,
            first.command()
        ));
    }
    Ok(())
}

async fn get(client: &Client, id: String) -> Result<(ApprovalInfo, Source)> {
    let answer = client.get_approval(GetApprovalRequest { id, read: None }).await?;
    Ok((answer.approval.unwrap_or_default(), answer.read.into()))
}

async fn find(client: &Client, id: String) -> Result<(ApprovalView, Source)> {
    let (found, source) = get(client, id).await?;
    Ok((found.into(), source))
}

async fn decide(global: &Global, client: &Client, decision: Decide) -> Result {
    if decision.deny {
        required_reason(&decision.reason)?;
    }
    let (view, _) = find(client, decision.id).await?;
    let digits = pairing::digits(&decision.sas)?;
    if decision.allow && !decision.yes && interactive() && view.waits() {
        if view.subject == "pairing" {
            if digits.is_empty() {
                pairing::compare(client, view.subject_id.clone()).await?;
            }
        } else {
            note(&table::facts(&view.facts()));
            let what = format!("{}: that is allowed", view.title);
            confirm(
                &what,
                &format!("palyra approval decide {} --allow --yes", view.id),
            )?;
        }
    }
    let word = if decision.allow { "allow" } else { "deny" };
    let id = view.id.clone();
    let again = move |request_id: &str| {
        format!(
            "palyra approval decide {id} --{word} --request-id {request_id}: it is answered, not repeated"
        )
    };
    let request = DecideRequest {
        request_id: global.request_id(),
        id: view.id,
        decision: word.to_owned(),
        scope: decision.scope.map_or("", Scope::as_str).to_owned(),
        ttl_ms: decision.ttl.map_or(0, millis),
        reason: decision.reason,
        sas: digits,
    };
    let answer = client.decide_approval(request).await;
    let answer = answer.map_err(|error| Failure::from(error).look_again(again))?;
    let view = ApprovalView::from(answer.approval.unwrap_or_default());
    global.out().one(&view, answer.write.into(), &view.decided())
}

async fn withdraw(global: &Global, client: &Client, id: String, reason: String, yes: bool) -> Result {
    required_reason(&reason)?;
    let (view, _) = find(client, id).await?;
    if !yes {
        let what = format!(
            "{}: the approval is taken back, with grants on it that were not used",
            view.title
        );
        let again = format!("palyra approval withdraw {} --reason ... --yes", view.id);
        confirm(&what, &again)?;
    }
    let request = WithdrawRequest {
        request_id: global.request_id(),
        id: view.id,
        reason,
    };
    let answer = client.withdraw_approval(request).await?;
    let view = ApprovalView::from(answer.approval.unwrap_or_default());
    global.out().one(&view, answer.write.into(), &view.decided())
}

/// Waits until an approval is decided or over, or the time is up; answers what it is then.
pub(crate) async fn wait_for_decision(
    client: &Client,
    mut found: ApprovalInfo,
    mut source: Source,
    until: Instant,
) -> Result<(ApprovalInfo, Source)> {
    while found.state == view::PENDING {
        let left = millis(until.saturating_duration_since(Instant::now()));
        if left == 0 {
            break;
        }
        let wait_ms = u32::try_from(left.min(MAX_WAIT_MS.into())).unwrap_or(MAX_WAIT_MS);
        // A cluster that cannot answer must not hold us longer than we were asked to wait.
        let asked = client.wait_approval(&found.id, wait_ms);
        let Ok(answer) = tokio::time::timeout_at(until + ANSWER_GRACE, asked).await else {
            break;
        };
        let answer = answer?;
        source = answer.read.into();
        found = answer.approval.unwrap_or(found);
    }
    Ok((found, source))
}

/// What the exit code says of a decision.
pub(crate) fn verdict(state: &str) -> Result {
    match state {
        "allowed" | "active" | "used" => Ok(()),
        "denied" => Err(Failure::Silent(6)),
        "pending" => Err(Failure::Silent(UNKNOWN)),
        _ => Err(Failure::Silent(7)),
    }
}

/// The approval of a grant, for the one who has asked.
pub(crate) async fn of_grant(client: &Client, id: String) -> Result<(ApprovalInfo, Source)> {
    get(client, id).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn decision(words: &str) -> Option<Decide> {
        let words = format!("palyra approval decide 01J9ZM {words}");
        match Cli::try_parse_from(words.split_whitespace()).ok()?.command {
            Command::Approval(Verb::Decide(decision)) => Some(decision),
            _ => None,
        }
    }

    #[test]
    fn a_decision_says_one_thing() {
        assert!(decision("").is_none(), "neither");
        assert!(decision("--allow --deny --reason x").is_none(), "both");
        assert!(decision("--deny").is_none(), "a denial takes a reason");
        assert!(decision("--deny --reason x --scope once").is_none());
        assert!(decision("--allow --ttl 1h").is_none(), "of what?");
        let timeboxed = decision("--allow --scope timeboxed --ttl 90m").unwrap();
        assert_eq!(timeboxed.ttl, Some(Duration::from_secs(5_400)));
        assert_eq!(timeboxed.scope, Some(Scope::Timeboxed));
    }

    #[test]
    fn the_exit_code_tells_the_decision() {
        let code = |state| verdict(state).map_or_else(|failure| failure.exit_code(), |()| 0);
        let states = ["allowed", "active", "denied", "expired", "withdrawn", "pending"];
        assert_eq!(states.map(code), [0, 0, 6, 7, 7, 13]);
    }
}
