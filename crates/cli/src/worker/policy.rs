//! `palyra worker policy`: what workers are held to, as a file that people keep.
//!
//! What never lives here: what a policy allows (the cluster's state machine). Invariants: what `show -o toml`
//! prints, `set -f`
//! reads back to the same; a change is shown, field by field, before it is made, and is made to what was shown or
//! not at all.

mod file;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use palyra_client::{Class, Client, new_ulid, wall_ms};
use palyra_proto::worker::v1::{
    FleetPolicy, PolicyChange, SetPolicyRequest, SetPolicyResponse, TrustedCapability, TrustedKey,
};
use serde::Serialize;

use crate::failure::{Failure, Result};
use crate::output::time::{Moment, span};
use crate::output::{Format, Source, confirm, note};
use crate::session::Global;
use file::{File, TEMPLATE, read, to_toml};
pub(super) use file::{Measured, that_admits};

/// What can be done about the policy.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Shows the policy; `-o toml` prints what `set -f` reads
    #[command(
        after_help = "Example:\n  palyra worker policy show -o toml > policy.toml\n  \
                            palyra worker policy show --template > policy.toml"
    )]
    Show {
        /// Print a file to begin with instead: it admits nobody until digests and tools are written into it
        #[arg(long)]
        template: bool,
    },
    /// Shows what a file would change, asks, and replaces the policy
    #[command(
        after_help = "Example:\n  palyra worker policy set -f policy.toml --dry-run\n  \
                            palyra worker policy set -f policy.toml --expect-version 3 --yes"
    )]
    Set(Set),
}

/// How the policy is set.
#[derive(Debug, Args)]
pub(crate) struct Set {
    /// The file; - for standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Show what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// The version that it replaces; without it the present one
    #[arg(long, value_name = "VERSION")]
    expect_version: Option<u64>,
    /// Why; kept in the journal
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// The policy as it is printed.
#[derive(Debug, Serialize)]
struct PolicyView {
    version: u64,
    set_at: Moment,
    set_by: String,
    #[serde(flatten)]
    rules: File,
}

#[derive(Debug, Serialize)]
struct ChangeView {
    field: String,
    before: String,
    after: String,
}

/// What a change of the policy was, or would be.
#[derive(Debug, Serialize)]
struct SetView {
    version: u64,
    dry_run: bool,
    changes: Vec<ChangeView>,
    /// Workers whose statement the new policy does not allow.
    affected: u64,
}

/// Does what was asked about the policy.
pub(crate) async fn run(global: &Global, client: &Client, verb: Verb) -> Result {
    match verb {
        Verb::Show { .. } => show(global, client).await,
        Verb::Set(ask) => set(global, client, ask).await,
    }
}

/// The file to begin with.
pub(crate) fn template(global: &Global) -> Result {
    global.out().write(TEMPLATE)
}

async fn present(client: &Client) -> Result<(FleetPolicy, Source)> {
    let answer = client.worker_policy().await?;
    Ok((answer.policy.unwrap_or_default(), answer.read.into()))
}

async fn show(global: &Global, client: &Client) -> Result {
    let (policy, source) = present(client).await?;
    let out = global.out();
    if policy.version == 0 && (out.format.is_table() || out.format == Format::Toml) {
        let next =
            "palyra worker policy show --template > policy.toml, and palyra worker policy set -f policy.toml";
        let message = "no policy was ever set: nobody is admitted";
        return Err(Failure::local(Class::NotFound, message, next));
    }
    if out.format == Format::Toml {
        let head = format!(
            "# version {}, set {} by {}\n",
            policy.version,
            Moment(policy.set_at_ms).rfc3339().unwrap_or_default(),
            policy.set_by
        );
        return out.write(&(head + &to_toml(&File::from(&policy))?));
    }
    let facts = facts(&policy);
    let view = PolicyView {
        version: policy.version,
        set_at: Moment(policy.set_at_ms),
        set_by: policy.set_by.clone(),
        rules: File::from(&policy),
    };
    out.one(&view, source, &facts)
}

/// Tools, who vouches for them, and from which level on.
fn tools(policy: &FleetPolicy) -> Vec<String> {
    let told = |tool: &TrustedCapability| {
        let by = tool.authorities.join(" or ");
        format!(
            "{}: vouched for by {by}, from {} on",
            tool.name, tool.min_evidence
        )
    };
    policy.capabilities.iter().map(told).collect()
}

/// All of it, for people.
fn facts(policy: &FleetPolicy) -> Vec<(&'static str, String)> {
    let set = Moment(policy.set_at_ms).told(wall_ms());
    let list = |list: &[String]| {
        if list.is_empty() {
            "none: nobody is admitted".to_owned()
        } else {
            list.join("\n")
        }
    };
    let keys = |keys: &[TrustedKey]| {
        keys.iter()
            .map(|key| key.name.clone())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let mut facts = vec![
        (
            "policy",
            format!("version {}, set {set} by {}", policy.version, policy.set_by),
        ),
        ("images", list(&policy.images)),
        ("builds", list(&policy.builds)),
        ("artifacts", list(&policy.artifacts)),
        ("supervisors", policy.supervisors.join("\n")),
        ("tools", list(&tools(policy))),
        (
            "versions",
            format!(
                "SDK protocol {} to {}, WIT ABI {}",
                policy.sdk_protocol_min,
                policy.sdk_protocol_max,
                policy.wit_abis.join(", ")
            ),
        ),
        (
            "egress",
            match policy.required_egress.as_str() {
                "" => "no binding is required".to_owned(),
                proxy => format!("every worker is bound to {proxy}"),
            },
        ),
        ("proxies", keys(&policy.egress_proxies)),
        ("providers", keys(&policy.hardware_providers)),
    ];
    facts.extend(bounds(policy));
    facts
}

/// How much there may be, and for how long.
fn bounds(policy: &FleetPolicy) -> [(&'static str, String); 3] {
    [
        (
            "leases",
            format!(
                "{} a worker, {} at most between renewals",
                policy.leases_per_worker,
                span(policy.max_lease_ttl_ms)
            ),
        ),
        (
            "workers",
            format!(
                "{} at most; orphaned after {} away",
                policy.max_workers,
                span(policy.heartbeat_timeout_ms)
            ),
        ),
        (
            "statements",
            format!("good for {} at most", span(policy.max_attestation_life_ms)),
        ),
    ]
}

async fn set(global: &Global, client: &Client, ask: Set) -> Result {
    let policy = read(&ask.file)?;
    let expected_version = match ask.expect_version {
        Some(version) => version,
        None => present(client).await?.0.version,
    };
    let request = |request_id, dry_run| SetPolicyRequest {
        request_id,
        policy: Some(policy.clone()),
        expected_version,
        reason: ask.reason.clone(),
        dry_run,
    };
    let would = client.set_worker_policy(request(new_ulid(), true)).await?;
    if ask.dry_run {
        return print(global, would, expected_version, true);
    }
    let changes: Vec<ChangeView> = would.changes.iter().map(ChangeView::from).collect();
    for change in &changes {
        note(&change.told());
    }
    if changes.is_empty() {
        note("nothing changes: the policy is that already");
        let mut same = would;
        if let Some(policy) = &mut same.policy {
            policy.version = expected_version;
        }
        return print(global, same, expected_version, true);
    }
    let affected = quarantines(would.affected, "are quarantined");
    let what = format!("the policy goes from version {expected_version} on; {affected}");
    if ask.yes {
        note(&what);
    } else {
        let again = format!(
            "palyra worker policy set -f {} --expect-version {expected_version} --yes",
            ask.file.display()
        );
        confirm(&what, &again)?;
    }
    let done = client
        .set_worker_policy(request(global.request_id(), false))
        .await?;
    print(global, done, expected_version, false)
}

impl From<&PolicyChange> for ChangeView {
    fn from(change: &PolicyChange) -> ChangeView {
        ChangeView {
            field: change.field.clone(),
            before: change.before.clone(),
            after: change.after.clone(),
        }
    }
}

impl ChangeView {
    /// `field: before → after`.
    fn told(&self) -> String {
        let or_none = |text: &str| if text.is_empty() { "(none)" } else { text }.to_owned();
        format!(
            "  {}: {} → {}",
            self.field,
            or_none(&self.before),
            or_none(&self.after)
        )
    }
}

fn quarantines(affected: u64, words: &str) -> String {
    match affected {
        0 => "no worker's statement fails it".to_owned(),
        1 => format!(
            "1 worker's statement fails it: with its leases it {}",
            words.replace("are", "is")
        ),
        count => format!("the statements of {count} workers fail it: with their leases they {words}"),
    }
}

fn print(global: &Global, answer: SetPolicyResponse, before: u64, dry_run: bool) -> Result {
    let view = SetView {
        version: answer.policy.as_ref().map_or(before, |policy| policy.version),
        dry_run,
        changes: answer.changes.iter().map(ChangeView::from).collect(),
        affected: answer.affected,
    };
    let changes: Vec<String> = view.changes.iter().map(ChangeView::told).collect();
    let state = if dry_run {
        format!("version {before}; nothing was changed")
    } else {
        format!("version {}", view.version)
    };
    let words = if dry_run {
        "would be quarantined"
    } else {
        "are quarantined"
    };
    let facts = [
        ("policy", state),
        (
            if dry_run { "would change" } else { "changed" },
            if changes.is_empty() {
                "nothing".to_owned()
            } else {
                changes.join("\n")
            },
        ),
        ("workers", quarantines(view.affected, words)),
    ];
    global.out().one(&view, answer.write.into(), &facts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_with_its_blast_radius() {
        let change = ChangeView {
            field: "max_workers".to_owned(),
            before: String::new(),
            after: "9".to_owned(),
        };
        assert_eq!(change.told(), "  max_workers: (none) → 9");
        assert_eq!(
            quarantines(1, "are quarantined"),
            "1 worker's statement fails it: with its leases it is quarantined"
        );
        assert!(quarantines(3, "would be quarantined").starts_with("the statements of 3 workers"));
    }
}
