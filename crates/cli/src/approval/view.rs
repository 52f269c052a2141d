//! Approvals as they are printed.

use palyra_client::wall_ms;
use palyra_proto::approval::v1::ApprovalInfo;
use serde::Serialize;

use crate::output::Record;
use crate::output::table::{Column, column, text, wide};
use crate::output::time::Moment;

/// The state of one that somebody has to decide.
pub(crate) const PENDING: &str = "pending";

/// An approval.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ApprovalView {
    pub(crate) id: String,
    pub(crate) subject: String,
    pub(crate) subject_id: String,
    pub(crate) state: String,
    pub(crate) title: String,
    risk: String,
    summary: String,
    options: Vec<OptionView>,
    tool: String,
    session: String,
    requested_by: String,
    requested_at: Moment,
    expires_at: Moment,
    decided_by: String,
    decided_at: Moment,
    reason: String,
    scope: String,
    valid_until: Moment,
    standing: bool,
    covered: u64,
}

/// Something that can be chosen.
#[derive(Debug, Clone, Serialize)]
struct OptionView {
    id: String,
    label: String,
    decision: String,
    scope: String,
}

impl From<ApprovalInfo> for ApprovalView {
    fn from(info: ApprovalInfo) -> ApprovalView {
        let prompt = info.prompt.unwrap_or_default();
        let options = prompt.options.into_iter().map(|option| OptionView {
            id: option.id,
            label: option.label,
            decision: option.decision,
            scope: option.scope,
        });
        ApprovalView {
            id: info.id,
            subject: info.subject,
            subject_id: info.subject_id,
            state: info.state,
            title: prompt.title,
            risk: prompt.risk,
            summary: prompt.summary,
            options: options.collect(),
            tool: info.tool,
            session: info.session,
            requested_by: info.requested_by,
            requested_at: Moment(info.requested_at_ms),
            expires_at: Moment(info.expires_at_ms),
            decided_by: info.decided_by,
            decided_at: Moment(info.decided_at_ms),
            reason: info.reason,
            scope: info.scope,
            valid_until: Moment(info.valid_until_ms),
            standing: info.standing,
            covered: info.covered,
        }
    }
}

impl ApprovalView {
    /// Whether somebody has to decide it.
    pub(crate) fn waits(&self) -> bool {
        self.state == PENDING
    }

    /// What to type to allow it.
    pub(crate) fn command(&self) -> String {
        let digits = if self.subject == "pairing" {
            " --sas DIGITS"
        } else {
            ""
        };
        format!("palyra approval decide {} --allow{digits}", self.id)
    }

    /// What an option is, as it is typed.
    fn choice(&self, option: &OptionView) -> String {
        let flags = match (option.decision.as_str(), option.scope.as_str()) {
            ("deny", _) => "--deny --reason \"...\"".to_owned(),
            (_, "once") => format!(
                "--allow{}",
                if self.subject == "pairing" {
                    " --sas DIGITS"
                } else {
                    ""
                }
            ),
            (_, scope) => format!("--allow --scope {scope} --ttl 1h"),
        };
        format!("{} ({flags})", option.label)
    }

    /// All of it, for people.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let now = wall_ms();
        let choices = self.options.iter().map(|option| self.choice(option));
        let decided = if self.decided_by.is_empty() {
            String::new()
        } else {
            format!("{} by {}", self.decided_at.told(now), self.decided_by)
        };
        let good = match (self.scope.as_str(), self.standing) {
            ("session" | "timeboxed", true) => format!("until {}", self.valid_until.told(now)),
            ("session" | "timeboxed", false) => "no more".to_owned(),
            _ => String::new(),
        };
        let mut facts = vec![
            ("approval", self.id.clone()),
            ("state", self.state.clone()),
            ("asked", self.title.clone()),
            ("risk", self.risk.clone()),
            ("summary", self.summary.clone()),
            ("by", self.requested_by.clone()),
            ("tool", self.tool.clone()),
            ("session", self.session.clone()),
            (
                if self.subject == "pairing" {
                    "pairing"
                } else {
                    "grant"
                },
                self.subject_id.clone(),
            ),
            ("since", self.requested_at.told(now)),
            (
                "expires",
                if self.waits() {
                    self.expires_at.told(now)
                } else {
                    String::new()
                },
            ),
            ("decided", decided),
            ("reason", self.reason.clone()),
            ("scope", self.scope.clone()),
            ("covers more", good),
            (
                "grants on it",
                if self.covered > 0 {
                    self.covered.to_string()
                } else {
                    String::new()
                },
            ),
        ];
        if self.waits() {
            facts.extend(choices.map(|choice| ("choose", choice)));
            facts.push(("next", self.command()));
        }
        facts
    }

    /// What a decision came to, for people.
    pub(crate) fn decided(&self) -> Vec<(&'static str, String)> {
        let (now, scope) = (wall_ms(), self.scope.as_str());
        let covers = match scope {
            "session" | "timeboxed" => format!("{scope}, until {}", self.valid_until.told(now)),
            scope => scope.to_owned(),
        };
        let next = match (self.subject.as_str(), self.state.as_str()) {
            ("grant", "allowed") => format!("palyra grant show {}", self.subject_id),
            ("pairing", "allowed") => "palyra node ls".to_owned(),
            _ => String::new(),
        };
        vec![
            ("approval", self.id.clone()),
            ("state", self.state.clone()),
            ("asked", self.title.clone()),
            ("scope", covers),
            (
                if self.subject == "pairing" {
                    "pairing"
                } else {
                    "grant"
                },
                self.subject_id.clone(),
            ),
            ("next", next),
        ]
    }
}

impl Record for ApprovalView {
    const COLUMNS: &'static [Column] = &[
        column("APPROVAL"),
        column("SUBJECT"),
        column("STATE"),
        column("RISK"),
        text("ASKED"),
        text("BY"),
        column("SINCE"),
        column("EXPIRES"),
        wide("SCOPE"),
        wide("DECIDED BY"),
        wide("SUBJECT ID"),
        wide("REASON"),
    ];

    fn key(&self) -> String {
        self.id.clone()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        let expires = if self.waits() {
            self.expires_at.told(now_ms)
        } else {
            "-".to_owned()
        };
        vec![
            self.id.clone(),
            self.subject.clone(),
            self.state.clone(),
            self.risk.clone(),
            self.title.clone(),
            self.requested_by.clone(),
            self.requested_at.told(now_ms),
            expires,
            self.scope.clone(),
            self.decided_by.clone(),
            self.subject_id.clone(),
            self.reason.clone(),
        ]
    }
}
