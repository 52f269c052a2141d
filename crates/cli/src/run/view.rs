//! A run as it is printed, and what its end means for the exit code.

use std::collections::BTreeMap;

use palyra_client::wall_ms;
use palyra_proto::run::v1::{Limits, Manifest, RunAttempt, RunInfo};
use serde::Serialize;
use serde_json::Value;

use crate::failure::{Failure, Result, UNKNOWN};
use crate::job::embedded;
use crate::lease::view::ScopeView;
use crate::output::Record;
use crate::output::table::{Column, column, text, wide};
use crate::output::time::{Moment, span};

/// A run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RunView {
    pub(crate) id: String,
    tool: String,
    grant_id: String,
    pub(crate) state: String,
    requested_by: String,
    effect: String,
    attempt: u32,
    max_attempts: u32,
    submitted_at: Moment,
    deadline_at: Moment,
    ended_at: Moment,
    ttl_ms: u64,
    lease_id: String,
    worker_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    worker_name: String,
    fence: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    params: Option<Value>,
    inputs: Vec<FileView>,
    outputs: Vec<FileView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<ScopeView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<LimitsView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) result: Option<Value>,
    exit_code: Option<i32>,
    error_code: String,
    error_message: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    log_tail: String,
    attempts: Vec<AttemptView>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing: Vec<String>,
    waits_for: String,
    min_evidence: String,
    labels: BTreeMap<String, String>,
    usage: BTreeMap<String, u64>,
    sandbox: Vec<String>,
    fence_past_at: Moment,
    reason: String,
}

#[derive(Debug, Clone, Serialize)]
struct FileView {
    path: String,
    digest: String,
    size: u64,
    stored: bool,
    executable: bool,
}

#[derive(Debug, Clone, Serialize)]
struct LimitsView {
    memory_bytes: u64,
    processes: u32,
    disk_bytes: u64,
    cpu_percent: u32,
    open_files: u32,
    network: bool,
}

/// An attempt that did not end its run.
#[derive(Debug, Clone, Serialize)]
struct AttemptView {
    number: u32,
    lease_id: String,
    worker_id: String,
    fence: u64,
    leased_at: Moment,
    ended_at: Moment,
    why: String,
}

fn files(manifest: Option<Manifest>) -> Vec<FileView> {
    let entries = manifest.unwrap_or_default().entries.into_iter();
    entries
        .map(|entry| FileView {
            path: entry.path,
            digest: hex::encode(&entry.digest),
            size: entry.size,
            stored: entry.stored,
            executable: entry.executable,
        })
        .collect()
}

fn told_files(files: &[FileView]) -> String {
    let told = |file: &FileView| {
        let kept = if file.stored {
            ""
        } else {
            ", not kept in the cluster"
        };
        let digest = file.digest.get(..16).unwrap_or(&file.digest);
        format!("{} ({} bytes, sha256 {digest}…{kept})", file.path, file.size)
    };
    files.iter().map(told).collect::<Vec<_>>().join("\n")
}

impl From<Limits> for LimitsView {
    fn from(limits: Limits) -> LimitsView {
        LimitsView {
            memory_bytes: limits.memory_bytes,
            processes: limits.processes,
            disk_bytes: limits.disk_bytes,
            cpu_percent: limits.cpu_percent,
            open_files: limits.open_files,
            network: limits.network,
        }
    }
}

impl From<RunAttempt> for AttemptView {
    fn from(attempt: RunAttempt) -> AttemptView {
        AttemptView {
            number: attempt.number,
            lease_id: attempt.lease_id,
            worker_id: attempt.worker_id,
            fence: attempt.fence,
            leased_at: Moment(attempt.leased_at_ms),
            ended_at: Moment(attempt.ended_at_ms),
            why: attempt.why,
        }
    }
}

impl From<RunInfo> for RunView {
    fn from(info: RunInfo) -> RunView {
        RunView {
            id: info.id,
            tool: info.tool,
            grant_id: info.grant_id,
            state: info.state,
            requested_by: info.requested_by,
            effect: info.effect,
            attempt: info.attempt,
            max_attempts: info.max_attempts,
            submitted_at: Moment(info.submitted_at_ms),
            deadline_at: Moment(info.deadline_at_ms),
            ended_at: Moment(info.ended_at_ms),
            ttl_ms: info.ttl_ms,
            lease_id: info.lease_id,
            worker_id: info.worker_id,
            worker_name: info.worker_name,
            fence: info.fence,
            params: embedded(&info.params),
            inputs: files(info.inputs),
            outputs: files(info.outputs),
            scope: info.scope.map(ScopeView::from),
            limits: info.limits.map(LimitsView::from),
            result: embedded(&info.result),
            exit_code: info.has_exit_code.then_some(info.exit_code),
            error_code: info.error_code,
            error_message: info.error_message,
            log_tail: String::from_utf8_lossy(&info.log_tail).into_owned(),
            attempts: info.attempts.into_iter().map(AttemptView::from).collect(),
            missing: info.missing,
            waits_for: info.waits_for,
            min_evidence: info.min_evidence,
            labels: info.labels.into_iter().collect(),
            usage: info.usage.into_iter().collect(),
            sandbox: info.sandbox,
            fence_past_at: Moment(info.fence_past_at_ms),
            reason: info.reason,
        }
    }
}

impl RunView {
    fn worker(&self) -> &str {
        if self.worker_name.is_empty() {
            &self.worker_id
        } else {
            &self.worker_name
        }
    }

    fn took(&self, now_ms: u64) -> String {
        let end = match self.ended_at.0 {
            0 => now_ms,
            at => at,
        };
        span(end.saturating_sub(self.submitted_at.0))
    }

    /// One line: what became of it.
    pub(crate) fn summary(&self) -> String {
        let on = match self.worker() {
            "" => String::new(),
            worker => format!(" on {worker}"),
        };
        format!(
            "{} {} after {}{on} (run {})",
            self.tool,
            self.state,
            self.took(wall_ms()),
            self.id
        )
    }

    fn told_error(&self) -> String {
        let code = match self.exit_code {
            Some(code) if code < 0 => format!("ended by signal {}", -code),
            Some(code) if code > 0 => format!("exit code {code}"),
            _ => String::new(),
        };
        let words = [&self.error_code, &self.error_message, &code];
        let words: Vec<&str> = words
            .into_iter()
            .filter(|word| !word.is_empty())
            .map(String::as_str)
            .collect();
        words.join(" ")
    }

    fn told_wait(&self, now: u64) -> String {
        if self.fence_past_at.0 != 0 && self.state == "fenced" {
            return format!(
                "the end of its last lease, {} at the latest",
                self.fence_past_at.told(now)
            );
        }
        self.waits_for.clone()
    }

    fn told_attempts(&self, now: u64) -> String {
        let told = |one: &AttemptView| {
            format!(
                "{} on {} under fence {} ended {}: {}",
                one.number,
                one.worker_id,
                one.fence,
                one.ended_at.told(now),
                one.why
            )
        };
        let mut lines: Vec<String> = self.attempts.iter().map(told).collect();
        if !lines.is_empty() {
            lines.push(format!("{} of at most {}", self.attempt, self.max_attempts));
        }
        lines.join("\n")
    }

    fn told_lease(&self) -> String {
        if self.lease_id.is_empty() {
            return String::new();
        }
        format!("{} on {}, fence {}", self.lease_id, self.worker(), self.fence)
    }

    fn told_limits(&self) -> String {
        let Some(limits) = &self.limits else {
            return String::new();
        };
        let numbers = [
            (limits.memory_bytes, "bytes of memory"),
            (limits.processes.into(), "processes"),
            (limits.disk_bytes, "bytes on disk"),
            (limits.cpu_percent.into(), "% of a core"),
            (limits.open_files.into(), "open files"),
        ];
        let mut told: Vec<String> = numbers
            .iter()
            .filter(|(number, _)| *number > 0)
            .map(|(number, unit)| format!("{number} {unit}"))
            .collect();
        told.push(if limits.network { "network" } else { "no network" }.to_owned());
        told.join(", ")
    }

    /// All of it, for people.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let now = wall_ms();
        let pretty = |value: &Option<Value>| {
            let text = value
                .as_ref()
                .and_then(|value| serde_json::to_string_pretty(value).ok());
            text.unwrap_or_default()
        };
        let pairs = |map: &BTreeMap<String, String>| {
            let told: Vec<String> = map.iter().map(|(key, value)| format!("{key}={value}")).collect();
            told.join(",")
        };
        let usage: Vec<String> = self
            .usage
            .iter()
            .map(|(what, count)| format!("{what} {count}"))
            .collect();
        let deadline = match self.ended_at.0 {
            0 => self.deadline_at.told(now),
            _ => String::new(),
        };
        vec![
            ("run", self.id.clone()),
            ("tool", format!("{} ({})", self.tool, self.effect)),
            ("state", self.state.clone()),
            ("waits for", self.told_wait(now)),
            ("missing", self.missing.join("\n")),
            ("lease", self.told_lease()),
            (
                "submitted",
                format!("{} by {}", self.submitted_at.told(now), self.requested_by),
            ),
            ("grant", self.grant_id.clone()),
            ("deadline", deadline),
            ("took", self.took(now)),
            ("attempts", self.told_attempts(now)),
            ("error", self.told_error()),
            ("note", self.caveat().to_owned()),
            ("reason", self.reason.clone()),
            (
                "scope",
                self.scope.as_ref().map(ScopeView::told).unwrap_or_default(),
            ),
            ("limits", self.told_limits()),
            ("evidence", self.min_evidence.clone()),
            ("labels", pairs(&self.labels)),
            ("usage", usage.join(", ")),
            ("held by", self.sandbox.join(" ")),
            ("inputs", told_files(&self.inputs)),
            ("params", pretty(&self.params)),
            ("outputs", told_files(&self.outputs)),
            ("result", pretty(&self.result)),
            ("log", self.log_tail.clone()),
        ]
    }

    /// What is not said by the state: whether its program has run.
    pub(crate) fn caveat(&self) -> &'static str {
        match self.state.as_str() {
            "timed_out" | "cancelled" if self.attempt == 0 => {
                "it was never given to a worker: its program has not run"
            }
            "timed_out" | "lost" => "how far its program ran is not known",
            _ => "",
        }
    }

    /// What the exit code says of its end.
    ///
    /// Errors: for every state but `succeeded`.
    pub(crate) fn verdict(&self) -> Result {
        match self.state.as_str() {
            "succeeded" => Ok(()),
            "failed" => Err(Failure::Silent(1)),
            "refused" => Err(Failure::Silent(6)),
            "cancelled" => Err(Failure::Silent(7)),
            "timed_out" if self.attempt == 0 => Err(Failure::Silent(7)),
            _ => Err(Failure::Silent(UNKNOWN)),
        }
    }

    /// What the exit code of `cancel --wait` says: whether it is cancelled.
    ///
    /// Errors: it ended otherwise before that reached it; or it is not known yet.
    pub(crate) fn cancel_verdict(&self) -> Result {
        match self.state.as_str() {
            "cancelled" => Ok(()),
            "cancelling" => Err(Failure::Silent(UNKNOWN)),
            _ => Err(Failure::Silent(7)),
        }
    }
}

impl Record for RunView {
    const COLUMNS: &'static [Column] = &[
        column("RUN"),
        text("TOOL"),
        column("STATE"),
        text("WORKER"),
        column("ATTEMPT"),
        column("SUBMITTED"),
        column("TOOK"),
        text("WAITS FOR"),
        wide("BY"),
        wide("FENCE"),
        wide("LEASE"),
        wide("EFFECT"),
        wide("GRANT"),
        wide("ERROR"),
    ];

    fn key(&self) -> String {
        self.id.clone()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        vec![
            self.id.clone(),
            self.tool.clone(),
            self.state.clone(),
            self.worker().to_owned(),
            format!("{}/{}", self.attempt, self.max_attempts),
            self.submitted_at.told(now_ms),
            self.took(now_ms),
            self.told_wait(now_ms),
            self.requested_by.clone(),
            self.fence.to_string(),
            self.lease_id.clone(),
            self.effect.clone(),
            self.grant_id.clone(),
            self.told_error(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(state: &str, attempt: u32) -> RunView {
        RunView::from(RunInfo {
            state: state.to_owned(),
            attempt,
            ..RunInfo::default()
        })
    }

    #[test]
    fn only_success_is_exit_code_zero() {
        let code = |state: &str, attempt| {
            let verdict = run(state, attempt).verdict();
            verdict.map_or_else(|failure| failure.exit_code(), |()| 0)
        };
        let ends = [
            ("succeeded", 1, 0),
            ("failed", 1, 1),
            ("refused", 1, 6),
            ("cancelled", 1, 7),
            ("timed_out", 0, 7),
            ("timed_out", 1, 13),
            ("lost", 1, 13),
            ("running", 1, 13),
        ];
        for (state, attempt, expected) in ends {
            assert_eq!(code(state, attempt), expected, "{state} {attempt}");
        }
    }

    #[test]
    fn a_signal_is_told_as_one() {
        let view = RunView::from(RunInfo {
            has_exit_code: true,
            exit_code: -9,
            error_code: "killed".to_owned(),
            ..RunInfo::default()
        });
        assert_eq!(view.told_error(), "killed ended by signal 9");
        assert_eq!(run("lost", 1).caveat(), "how far its program ran is not known");
    }
}
