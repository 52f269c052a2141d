//! Grants as they are printed.

use palyra_client::wall_ms;
use palyra_proto::approval::v1::GrantInfo;
use serde::Serialize;

use crate::output::Record;
use crate::output::table::{Column, column, text, wide};
use crate::output::time::Moment;

/// A grant.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct GrantView {
    pub(crate) id: String,
    pub(crate) run_id: String,
    tool: String,
    session: String,
    pub(crate) state: String,
    requested_by: String,
    approval_id: String,
    covered: bool,
    created_at: Moment,
    expires_at: Moment,
    used_at: Moment,
    ended_at: Moment,
    ended_by: String,
    reason: String,
}

impl From<GrantInfo> for GrantView {
    fn from(info: GrantInfo) -> GrantView {
        GrantView {
            id: info.id,
            run_id: info.run_id,
            tool: info.tool,
            session: info.session,
            state: info.state,
            requested_by: info.requested_by,
            approval_id: info.approval_id,
            covered: info.covered,
            created_at: Moment(info.created_at_ms),
            expires_at: Moment(info.expires_at_ms),
            used_at: Moment(info.used_at_ms),
            ended_at: Moment(info.ended_at_ms),
            ended_by: info.ended_by,
            reason: info.reason,
        }
    }
}

impl GrantView {
    /// What to type now.
    fn next(&self) -> String {
        match self.state.as_str() {
            "pending" => format!("palyra approval decide {} --allow", self.approval_id),
            "active" => format!("palyra run start --grant {} --tool {}", self.id, self.tool),
            "used" => format!("palyra run get {}", self.run_id),
            _ => String::new(),
        }
    }

    /// What asking for it came to, for people.
    pub(crate) fn asked(&self) -> Vec<(&'static str, String)> {
        let approval = if self.covered {
            format!("{}, a decision of earlier that covers it", self.approval_id)
        } else {
            self.approval_id.clone()
        };
        vec![
            ("grant", self.id.clone()),
            ("state", self.state.clone()),
            ("run", self.run_id.clone()),
            ("tool", self.tool.clone()),
            ("approval", approval),
            ("expires", self.expires_at.told(wall_ms())),
            ("next", self.next()),
        ]
    }

    /// All of it, for people.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let now = wall_ms();
        let when = |moment: Moment| {
            if moment.0 == 0 {
                String::new()
            } else {
                moment.told(now)
            }
        };
        let ended = match self.ended_by.as_str() {
            "" => String::new(),
            by => format!("{} by {by}", self.ended_at.told(now)),
        };
        vec![
            ("grant", self.id.clone()),
            ("state", self.state.clone()),
            ("run", self.run_id.clone()),
            ("tool", self.tool.clone()),
            ("session", self.session.clone()),
            ("for", self.requested_by.clone()),
            ("approval", self.approval_id.clone()),
            (
                "covered",
                if self.covered {
                    "by a decision of earlier"
                } else {
                    ""
                }
                .to_owned(),
            ),
            ("asked", self.created_at.told(now)),
            ("expires", self.expires_at.told(now)),
            ("used", when(self.used_at)),
            ("ended", ended),
            ("reason", self.reason.clone()),
            ("next", self.next()),
        ]
    }
}

impl Record for GrantView {
    const COLUMNS: &'static [Column] = &[
        column("GRANT"),
        text("TOOL"),
        column("STATE"),
        text("FOR"),
        column("RUN"),
        column("ASKED"),
        column("EXPIRES"),
        wide("SESSION"),
        wide("APPROVAL"),
        wide("COVERED"),
        wide("ENDED BY"),
        wide("REASON"),
    ];

    fn key(&self) -> String {
        self.id.clone()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        let live = matches!(self.state.as_str(), "pending" | "active");
        vec![
            self.id.clone(),
            self.tool.clone(),
            self.state.clone(),
            self.requested_by.clone(),
            self.run_id.clone(),
            self.created_at.told(now_ms),
            if live {
                self.expires_at.told(now_ms)
            } else {
                "-".to_owned()
            },
            self.session.clone(),
            self.approval_id.clone(),
            if self.covered { "yes" } else { "no" }.to_owned(),
            self.ended_by.clone(),
            self.reason.clone(),
        ]
    }
}
