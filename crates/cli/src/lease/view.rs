//! Leases as they are printed.

use palyra_client::wall_ms;
use palyra_proto::run::v1::{CleanupInfo, LeaseInfo, WorkspaceScope};
use serde::Serialize;

use crate::output::Record;
use crate::output::table::{Column, column, text, wide};
use crate::output::time::{Moment, span};

/// A lease.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LeaseView {
    pub(crate) id: String,
    pub(crate) run_id: String,
    attempt: u32,
    pub(crate) tool: String,
    worker_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    worker_name: String,
    slot: u32,
    pub(crate) fence: u64,
    pub(crate) state: String,
    granted_at: Moment,
    deadline_at: Moment,
    ttl_ms: u64,
    renewals: u64,
    renewed_at: Moment,
    ended_at: Moment,
    end_reason: String,
    ended_by: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cleanup: Option<CleanupView>,
    epoch: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<ScopeView>,
}

#[derive(Debug, Clone, Serialize)]
struct CleanupView {
    at: Moment,
    ok: bool,
    message: String,
    removed_files: u64,
    removed_bytes: u64,
    by: String,
}

/// Where a run may read and write.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ScopeView {
    root: String,
    allowed: Vec<String>,
    read_only: Vec<String>,
}

impl From<WorkspaceScope> for ScopeView {
    fn from(scope: WorkspaceScope) -> ScopeView {
        ScopeView {
            root: scope.root,
            allowed: scope.allowed,
            read_only: scope.read_only,
        }
    }
}

impl ScopeView {
    /// In words.
    pub(crate) fn told(&self) -> String {
        let root = match self.root.as_str() {
            "" => "a fresh folder",
            root => root,
        };
        let mut told = root.to_owned();
        if !self.allowed.is_empty() {
            told = format!("{told}; may write {}", self.allowed.join(", "));
        }
        if !self.read_only.is_empty() {
            told = format!("{told}; may read {}", self.read_only.join(", "));
        }
        told
    }
}

impl From<CleanupInfo> for CleanupView {
    fn from(info: CleanupInfo) -> CleanupView {
        CleanupView {
            at: Moment(info.at_ms),
            ok: info.ok,
            message: info.message,
            removed_files: info.removed_files,
            removed_bytes: info.removed_bytes,
            by: info.by,
        }
    }
}

impl CleanupView {
    fn told(&self, now: u64) -> String {
        let at = self.at.told(now);
        match (self.ok, self.by.as_str()) {
            (true, "worker") => format!(
                "clean {at}: {} files, {} bytes removed",
                self.removed_files, self.removed_bytes
            ),
            (true, by) => format!("vouched for {at} by {by}: {}", self.message),
            (false, _) => format!("failed {at}: {}", self.message),
        }
    }
}

impl From<LeaseInfo> for LeaseView {
    fn from(info: LeaseInfo) -> LeaseView {
        LeaseView {
            id: info.id,
            run_id: info.run_id,
            attempt: info.attempt,
            tool: info.tool,
            worker_id: info.worker_id,
            worker_name: info.worker_name,
            slot: info.slot,
            fence: info.fence,
            state: info.state,
            granted_at: Moment(info.granted_at_ms),
            deadline_at: Moment(info.deadline_at_ms),
            ttl_ms: info.ttl_ms,
            renewals: info.renewals,
            renewed_at: Moment(info.renewed_at_ms),
            ended_at: Moment(info.ended_at_ms),
            end_reason: info.end_reason,
            ended_by: info.ended_by,
            cleanup: info.cleanup.map(CleanupView::from),
            epoch: info.epoch,
            scope: info.scope.map(ScopeView::from),
        }
    }
}

impl LeaseView {
    /// What its worker is called.
    pub(crate) fn worker(&self) -> &str {
        if self.worker_name.is_empty() {
            &self.worker_id
        } else {
            &self.worker_name
        }
    }

    /// One line.
    pub(crate) fn line(&self, now: u64) -> String {
        format!(
            "{} slot {} fence {} {}: run {} ({}), {}",
            self.id,
            self.slot,
            self.fence,
            self.state,
            self.run_id,
            self.tool,
            self.told_deadline(now)
        )
    }

    fn told_deadline(&self, now: u64) -> String {
        if self.state == "ended" {
            format!("ended {}", self.ended_at.told(now))
        } else {
            format!("until {}", self.deadline_at.told(now))
        }
    }

    fn told_end(&self, now: u64) -> String {
        if self.end_reason.is_empty() {
            return String::new();
        }
        let when = match self.ended_at.0 {
            0 => "its slot is taken until the worker is clean or its deadline has passed".to_owned(),
            _ => self.ended_at.told(now),
        };
        format!("{} by {}; {when}", self.end_reason, self.ended_by)
    }

    /// All of it, for people.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let now = wall_ms();
        let renewed = match self.renewals {
            0 => "never".to_owned(),
            count => format!("{count} times, last {}", self.renewed_at.told(now)),
        };
        vec![
            ("lease", self.id.clone()),
            ("state", self.state.clone()),
            (
                "run",
                format!("{} ({}), attempt {}", self.run_id, self.tool, self.attempt),
            ),
            ("worker", format!("{} slot {}", self.worker(), self.slot)),
            ("fence", self.fence.to_string()),
            (
                "deadline",
                match self.state.as_str() {
                    "ended" => String::new(),
                    _ => format!("{}, {} a renewal", self.deadline_at.told(now), span(self.ttl_ms)),
                },
            ),
            (
                "granted",
                format!("{} in session {}", self.granted_at.told(now), self.epoch),
            ),
            ("renewed", renewed),
            ("end", self.told_end(now)),
            (
                "cleanup",
                self.cleanup
                    .as_ref()
                    .map(|cleanup| cleanup.told(now))
                    .unwrap_or_default(),
            ),
            (
                "scope",
                self.scope.as_ref().map(ScopeView::told).unwrap_or_default(),
            ),
        ]
    }
}

impl Record for LeaseView {
    const COLUMNS: &'static [Column] = &[
        column("LEASE"),
        text("WORKER"),
        column("SLOT"),
        column("FENCE"),
        column("STATE"),
        column("RUN"),
        text("TOOL"),
        column("DEADLINE"),
        column("END"),
        wide("ATTEMPT"),
        wide("GRANTED"),
        wide("RENEWALS"),
        wide("CLEANUP"),
        wide("EPOCH"),
    ];

    fn key(&self) -> String {
        self.id.clone()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        vec![
            self.id.clone(),
            self.worker().to_owned(),
            self.slot.to_string(),
            self.fence.to_string(),
            self.state.clone(),
            self.run_id.clone(),
            self.tool.clone(),
            self.told_deadline(now_ms),
            self.end_reason.clone(),
            self.attempt.to_string(),
            self.granted_at.told(now_ms),
            self.renewals.to_string(),
            self.cleanup
                .as_ref()
                .map(|cleanup| cleanup.told(now_ms))
                .unwrap_or_default(),
            self.epoch.to_string(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_without_a_cleanup_says_that_the_slot_is_taken() {
        let lease = |ended_at_ms| {
            LeaseView::from(LeaseInfo {
                end_reason: "revoked".to_owned(),
                ended_by: "op:anna".to_owned(),
                ended_at_ms,
                ..LeaseInfo::default()
            })
        };
        assert!(lease(0).told_end(9).contains("its slot is taken"));
        assert_eq!(lease(5).told_end(5), "revoked by op:anna; now");
    }
}
