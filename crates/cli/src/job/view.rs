//! A dispatch as it is printed, and what its end means for the exit code.

use std::collections::BTreeMap;

use palyra_client::wall_ms;
use palyra_proto::dispatch::v1::{AttemptInfo, DispatchInfo, LateInfo, MediationInfo};
use serde::Serialize;
use serde_json::Value;

use crate::failure::{Failure, Result, UNKNOWN};
use crate::output::Record;
use crate::output::table::{Column, column, text, wide};
use crate::output::time::{Moment, span};

/// A dispatch.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct JobView {
    pub(crate) id: String,
    pub(crate) device_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    device_name: String,
    capability: String,
    pub(crate) state: String,
    effect: String,
    attempt: u32,
    epoch: u64,
    replica_id: u64,
    submitted_at: Moment,
    submitted_by: String,
    deadline_at: Moment,
    ended_at: Moment,
    #[serde(skip_serializing_if = "Option::is_none")]
    input: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) result: Option<Value>,
    error_code: String,
    error_message: String,
    priority: String,
    max_attempts: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    attempts: Vec<AttemptView>,
    #[serde(skip_serializing_if = "String::is_empty")]
    waits_for: String,
    not_before: Moment,
    #[serde(skip_serializing_if = "Option::is_none")]
    mediation: Option<MediationView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cancel: Option<CancelView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    late: Option<LateView>,
    #[serde(skip_serializing_if = "String::is_empty")]
    log_tail: String,
}

/// An attempt that did not end its job.
#[derive(Debug, Clone, Serialize)]
struct AttemptView {
    number: u32,
    replica_id: u64,
    epoch: u64,
    assigned_at: Moment,
    ended_at: Moment,
    why: String,
    message: String,
}

/// Who has to act.
#[derive(Debug, Clone, Serialize)]
struct MediationView {
    since: Moment,
    host: String,
    device: String,
    prompt: String,
    command: String,
}

/// Who wanted it back.
#[derive(Debug, Clone, Serialize)]
struct CancelView {
    asked_at: Moment,
    asked_by: String,
    reason: String,
}

/// What came after the end.
#[derive(Debug, Clone, Serialize)]
struct LateView {
    at: Moment,
    outcome: String,
    error_code: String,
    size: u32,
    digest: String,
}

/// JSON as it is; text when it is none; nothing when it is empty.
pub(crate) fn embedded(bytes: &[u8]) -> Option<Value> {
    if bytes.is_empty() {
        return None;
    }
    Some(
        serde_json::from_slice(bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(bytes).into_owned())),
    )
}

impl From<DispatchInfo> for JobView {
    fn from(info: DispatchInfo) -> JobView {
        JobView {
            id: info.id,
            device_id: info.device_id,
            device_name: String::new(),
            capability: info.capability,
            state: info.state,
            effect: info.effect,
            attempt: info.attempt,
            epoch: info.epoch,
            replica_id: info.replica_id,
            submitted_at: Moment(info.submitted_at_ms),
            submitted_by: info.submitted_by,
            deadline_at: Moment(info.deadline_at_ms),
            ended_at: Moment(info.ended_at_ms),
            input: embedded(&info.payload),
            result: embedded(&info.result),
            error_code: info.error_code,
            error_message: info.error_message,
            priority: info.priority,
            max_attempts: info.max_attempts,
            attempts: info.attempts.into_iter().map(AttemptView::from).collect(),
            waits_for: info.waits_for,
            not_before: Moment(info.not_before_ms),
            mediation: info.mediation.map(MediationView::from),
            cancel: (info.cancel_asked_at_ms != 0).then_some(CancelView {
                asked_at: Moment(info.cancel_asked_at_ms),
                asked_by: info.cancel_asked_by,
                reason: info.cancel_reason,
            }),
            late: info.late.map(LateView::from),
            log_tail: String::from_utf8_lossy(&info.log_tail).into_owned(),
        }
    }
}

impl From<AttemptInfo> for AttemptView {
    fn from(info: AttemptInfo) -> AttemptView {
        AttemptView {
            number: info.number,
            replica_id: info.replica_id,
            epoch: info.epoch,
            assigned_at: Moment(info.assigned_at_ms),
            ended_at: Moment(info.ended_at_ms),
            why: info.why,
            message: info.message,
        }
    }
}

impl From<MediationInfo> for MediationView {
    fn from(info: MediationInfo) -> MediationView {
        MediationView {
            since: Moment(info.since_ms),
            host: info.host,
            device: info.device,
            prompt: info.prompt,
            command: info.command,
        }
    }
}

impl From<LateInfo> for LateView {
    fn from(info: LateInfo) -> LateView {
        LateView {
            at: Moment(info.at_ms),
            outcome: info.outcome,
            error_code: info.error_code,
            size: info.size,
            digest: info.digest,
        }
    }
}

impl JobView {
    /// How long it took, or has taken until now.
    fn took(&self, now_ms: u64) -> String {
        let end = if self.ended_at.0 == 0 {
            now_ms
        } else {
            self.ended_at.0
        };
        span(end.saturating_sub(self.submitted_at.0))
    }

    /// One line: what became of it on the node that was called so.
    pub(crate) fn summary(&self, node: &str) -> String {
        let took = self.took(wall_ms());
        format!(
            "{} {} after {took} on {node} (job {})",
            self.capability, self.state, self.id
        )
    }

    /// Adds the name of its node, where it is known.
    pub(crate) fn named(mut self, names: &BTreeMap<String, String>) -> JobView {
        self.device_name = names.get(&self.device_id).cloned().unwrap_or_default();
        self
    }

    /// All of it, for people.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let now = wall_ms();
        let pretty = |value: &Option<Value>| {
            value
                .as_ref()
                .and_then(|value| serde_json::to_string_pretty(value).ok())
                .unwrap_or_default()
        };
        let error = match (self.error_code.is_empty(), self.error_message.is_empty()) {
            (true, true) => String::new(),
            _ => format!("{} {}", self.error_code, self.error_message)
                .trim()
                .to_owned(),
        };
        let bound = if self.replica_id == 0 {
            String::new()
        } else {
            format!(
                "session {} at r{}, attempt {}",
                self.epoch, self.replica_id, self.attempt
            )
        };
        vec![
            ("job", self.id.clone()),
            ("node", self.device_id.clone()),
            ("capability", format!("{} ({})", self.capability, self.effect)),
            ("state", self.state.clone()),
            ("priority", self.told_priority()),
            ("bound to", bound),
            ("waits for", self.told_wait(now)),
            (
                "to do",
                self.mediation
                    .as_ref()
                    .map(|waits| waits.command.clone())
                    .unwrap_or_default(),
            ),
            (
                "submitted",
                format!("{} by {}", self.submitted_at.told(now), self.submitted_by),
            ),
            (
                "deadline",
                if self.ended_at.0 == 0 {
                    self.deadline_at.told(now)
                } else {
                    String::new()
                },
            ),
            ("took", self.took(now)),
            ("attempts", self.told_attempts(now)),
            ("cancel", self.told_cancel(now)),
            ("error", error),
            ("late", self.told_late(now)),
            ("note", self.caveat().to_owned()),
            ("input", pretty(&self.input)),
            ("result", pretty(&self.result)),
            ("log", self.log_tail.clone()),
        ]
    }

    fn told_priority(&self) -> String {
        match self.priority.as_str() {
            "normal" => String::new(),
            other => other.to_owned(),
        }
    }

    /// What it waits for: a slot, its node, its next attempt, or somebody at the machine.
    fn told_wait(&self, now: u64) -> String {
        if let Some(waits) = &self.mediation {
            return format!(
                "the person at {} (node {}) since {}: {}",
                waits.host,
                waits.device,
                waits.since.told(now),
                waits.prompt
            );
        }
        if self.not_before.0 != 0 {
            return format!("{}, not before {}", self.waits_for, self.not_before.told(now));
        }
        self.waits_for.clone()
    }

    fn told_attempts(&self, now: u64) -> String {
        let told = |one: &AttemptView| {
            let message = if one.message.is_empty() {
                String::new()
            } else {
                format!(": {}", one.message)
            };
            format!(
                "{} at r{} ended {}, {}{message}",
                one.number,
                one.replica_id,
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

    fn told_cancel(&self, now: u64) -> String {
        self.cancel.as_ref().map_or_else(String::new, |cancel| {
            let reason = if cancel.reason.is_empty() {
                String::new()
            } else {
                format!(": {}", cancel.reason)
            };
            format!(
                "asked for {} by {}{reason}",
                cancel.asked_at.told(now),
                cancel.asked_by
            )
        })
    }

    fn told_late(&self, now: u64) -> String {
        self.late.as_ref().map_or_else(String::new, |late| {
            let what = format!("{} {}", late.outcome, late.error_code);
            format!(
                "after its end, {}, the node said: {}; {} bytes, sha256 {}",
                late.at.told(now),
                what.trim(),
                late.size,
                late.digest
            )
        })
    }

    /// What the exit code of `cancel --wait` says: whether it is cancelled.
    ///
    /// Errors: it had ended otherwise before that reached it; or it is not known yet.
    pub(crate) fn cancel_verdict(&self) -> Result {
        match self.state.as_str() {
            "cancelled" if self.error_code == "cancel_unconfirmed" => Err(Failure::Silent(UNKNOWN)),
            "cancelled" => Ok(()),
            "cancelling" => Err(Failure::Silent(UNKNOWN)),
            _ => Err(Failure::Silent(7)),
        }
    }

    /// What is not said by the state: whether its program has run.
    pub(crate) fn caveat(&self) -> &'static str {
        match self.state.as_str() {
            "timed_out" if self.attempt == 0 => "it was never handed to the node: its program has not run",
            "timed_out" | "session_lost" if self.late.is_some() => {
                "its node said later what became of it: see late"
            }
            "timed_out" | "session_lost" => "whether its program ran, and how far, is not known",
            "cancelled" if self.error_code == "cancel_unconfirmed" => {
                "whether its program was stopped, and how far it ran, is not known"
            }
            _ => "",
        }
    }

    /// What the exit code says of its end. Whether the program of a dispatch that timed out or lost its
    /// session has run is not known, unless it was never handed out.
    ///
    /// Errors: for every state but `succeeded`.
    pub(crate) fn verdict(&self) -> Result {
        match self.state.as_str() {
            "succeeded" => Ok(()),
            "timed_out" if self.attempt == 0 => Err(Failure::Silent(7)),
            "rejected" => Err(Failure::Silent(6)),
            "cancelled" => Err(Failure::Silent(7)),
            "failed" => Err(Failure::Silent(1)),
            _ => Err(Failure::Silent(UNKNOWN)),
        }
    }
}

impl Record for JobView {
    const COLUMNS: &'static [Column] = &[
        column("JOB"),
        text("NODE"),
        text("CAPABILITY"),
        column("STATE"),
        column("SUBMITTED"),
        column("TOOK"),
        wide("DEVICE"),
        wide("BY"),
        wide("EFFECT"),
        wide("ATTEMPT"),
        wide("PRIORITY"),
        wide("WAITS FOR"),
        wide("REPLICA"),
        wide("ERROR"),
    ];

    fn key(&self) -> String {
        self.id.clone()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        vec![
            self.id.clone(),
            if self.device_name.is_empty() {
                self.device_id.clone()
            } else {
                self.device_name.clone()
            },
            self.capability.clone(),
            self.state.clone(),
            self.submitted_at.told(now_ms),
            self.took(now_ms),
            self.device_id.clone(),
            self.submitted_by.clone(),
            self.effect.clone(),
            self.attempt.to_string(),
            self.priority.clone(),
            self.told_wait(now_ms),
            if self.replica_id == 0 {
                String::new()
            } else {
                format!("r{}", self.replica_id)
            },
            format!("{} {}", self.error_code, self.error_message)
                .trim()
                .to_owned(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(state: &str, result: &'static [u8]) -> JobView {
        JobView::from(DispatchInfo {
            state: state.to_owned(),
            result: result.into(),
            ..DispatchInfo::default()
        })
    }

    #[test]
    fn results_are_json_in_json() {
        let value = serde_json::to_value(job("succeeded", b"{\"matches\": 3}")).unwrap();
        assert_eq!(value["result"]["matches"], 3);
        assert_eq!(value.get("input"), None);
        let value = serde_json::to_value(job("failed", b"not json")).unwrap();
        assert_eq!(value["result"], "not json");
    }

    #[test]
    fn only_success_is_exit_code_zero() {
        let code = |state: &str| {
            job(state, b"")
                .verdict()
                .map_or_else(|failure| failure.exit_code(), |()| 0)
        };
        let states = [
            "succeeded",
            "failed",
            "rejected",
            "cancelled",
            "timed_out",
            "session_lost",
            "queued",
        ];
        assert_eq!(states.map(code), [0, 1, 6, 7, 7, 13, 13]);
        let handed_out = DispatchInfo {
            state: "timed_out".to_owned(),
            attempt: 1,
            ..DispatchInfo::default()
        };
        let handed_out = JobView::from(handed_out);
        assert_eq!(handed_out.verdict().unwrap_err().exit_code(), 13);
        assert!(handed_out.caveat().contains("not known"));
        assert!(job("timed_out", b"").caveat().contains("has not run"));
    }
}
