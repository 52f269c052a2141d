//! `palyra approval policy`: what approvals are held to.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use palyra_client::{Client, wall_ms};
use palyra_proto::approval::v1::{ApprovalPolicy, SetApprovalPolicyRequest};
use serde::Serialize;

use crate::failure::{Failure, Result};
use crate::output::time::{Moment, millis, parse_duration, parse_limit, span};
use crate::session::Global;

/// What can be done about the policy.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Shows what approvals are held to
    #[command(after_help = "Example:\n  palyra approval policy show")]
    Show,
    /// Changes it; what is not named stays
    #[command(after_help = "Example:\n  palyra approval policy set --four-eyes on\n  \
                            palyra approval policy set --wait-for 30m --max-timebox 8h\n\n\
                            With four eyes nobody allows what they asked for, nor a machine whose code they minted.\n\
                            What waits already keeps its time.")]
    Set(Set),
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    /// Required
    On,
    /// Not required
    Off,
}

/// What is changed.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Set {
    /// Nobody allows what they asked for
    #[arg(long, value_enum, value_name = "SWITCH")]
    four_eyes: Option<Switch>,
    /// How long a grant that was asked for waits for somebody: 1s to 7d
    #[arg(long, value_parser = parse_limit, value_name = "DURATION")]
    wait_for: Option<Duration>,
    /// Longest decision that covers more than what was asked, at most 7d; 0: there are none
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    max_timebox: Option<Duration>,
}

#[derive(Debug, Serialize)]
struct PolicyView {
    four_eyes: bool,
    timeout_ms: u64,
    max_timebox_ms: u64,
    set_at: Moment,
    set_by: String,
}

impl From<ApprovalPolicy> for PolicyView {
    fn from(policy: ApprovalPolicy) -> PolicyView {
        PolicyView {
            four_eyes: policy.four_eyes,
            timeout_ms: policy.timeout_ms,
            max_timebox_ms: policy.max_timebox_ms,
            set_at: Moment(policy.set_at_ms),
            set_by: policy.set_by,
        }
    }
}

impl PolicyView {
    fn four_eyes(&self) -> String {
        if self.four_eyes {
            "required: nobody allows what they asked for"
        } else {
            "not required"
        }
        .to_owned()
    }

    fn timebox(&self) -> String {
        match self.max_timebox_ms {
            0 => "none: each grant is decided for itself".to_owned(),
            longest => format!("at most {}", span(longest)),
        }
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let set = match self.set_by.as_str() {
            "" => "never; these are the defaults".to_owned(),
            by => format!("{} by {by}", self.set_at.told(wall_ms())),
        };
        vec![
            ("four eyes", self.four_eyes()),
            ("grants wait", span(self.timeout_ms)),
            ("decisions that stand", self.timebox()),
            ("set", set),
        ]
    }

    /// What differs from the policy before, for people.
    fn changed_from(&self, before: &PolicyView) -> Vec<(&'static str, String)> {
        let mut changed = before
            .facts()
            .into_iter()
            .zip(self.facts())
            .filter(|((name, old), (_, new))| *name != "set" && old != new)
            .map(|((name, old), (_, new))| (name, format!("{old} -> {new}")))
            .collect::<Vec<_>>();
        if changed.is_empty() {
            changed.push(("policy", "it was like that already".to_owned()));
        }
        changed
    }
}

pub(crate) async fn run(global: &Global, client: &Client, verb: Verb) -> Result {
    let answer = client.approval_policy().await?;
    let before = answer.policy.unwrap_or_default();
    let Verb::Set(set) = verb else {
        let view = PolicyView::from(before);
        return global.out().one(&view, answer.read.into(), &view.facts());
    };
    let policy = ApprovalPolicy {
        four_eyes: set
            .four_eyes
            .map_or(before.four_eyes, |switch| switch == Switch::On),
        timeout_ms: set.wait_for.map_or(before.timeout_ms, millis),
        max_timebox_ms: set.max_timebox.map_or(before.max_timebox_ms, millis),
        ..ApprovalPolicy::default()
    };
    let request = SetApprovalPolicyRequest {
        request_id: global.request_id(),
        policy: Some(policy),
    };
    let answer = client.set_approval_policy(request).await;
    let look = |_: &str| "palyra approval policy show".to_owned();
    let answer = answer.map_err(|error| Failure::from(error).look_again(look))?;
    let view = PolicyView::from(answer.policy.unwrap_or_default());
    let changed = view.changed_from(&before.into());
    global.out().one(&view, answer.write.into(), &changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_as_before_and_after() {
        let before = PolicyView::from(ApprovalPolicy {
            timeout_ms: 3_600_000,
            max_timebox_ms: 86_400_000,
            ..ApprovalPolicy::default()
        });
        let after = PolicyView::from(ApprovalPolicy {
            timeout_ms: 3_600_000,
            max_timebox_ms: 0,
            set_by: "operator/root".to_owned(),
            ..ApprovalPolicy::default()
        });
        let told = [(
            "decisions that stand",
            "at most 1d -> none: each grant is decided for itself".to_owned(),
        )];
        assert_eq!(after.changed_from(&before), told);
        assert_eq!(before.changed_from(&before)[0].0, "policy");
    }
}
