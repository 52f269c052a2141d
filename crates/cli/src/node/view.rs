//! Nodes as they are printed.

use std::collections::BTreeMap;

use palyra_client::wall_ms;
use palyra_proto::node::v1::{Capability, Condition, NodeInfo};
use serde::Serialize;

use crate::output::Record;
use crate::output::table::{Column, column, text, wide};
use crate::output::time::{Moment, span};

/// A node.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct NodeView {
    device_id: String,
    name: String,
    status: String,
    status_since: Moment,
    status_reason: String,
    platform: String,
    agent_version: String,
    labels: BTreeMap<String, String>,
    capabilities: Vec<CapabilityView>,
    open_dispatches: u64,
    bound_dispatches: u64,
    waiting_dispatches: u64,
    max_concurrency: u32,
    queue_limit: u32,
    session_epoch: u64,
    session_replica: u64,
    transport: String,
    transport_fallback: String,
    registered_at: Moment,
    generation: u64,
    last_seen: SeenView,
    conditions: Vec<ConditionView>,
    /// `null` for as long as it takes, 0 as the cluster has it.
    lost_after_ms: Option<u64>,
    due_at: Moment,
}

/// When a node was last heard, and who says so.
#[derive(Debug, Clone, Serialize)]
struct SeenView {
    /// live, record, unknown, never
    source: String,
    age_ms: Option<u64>,
    replica: u64,
    unreachable_ms: u64,
}

impl SeenView {
    fn told(&self) -> String {
        let silent = |replica| match self.unreachable_ms {
            0 => format!("unknown: r{replica} does not say"),
            ms => format!("unknown: r{replica} unreachable for {}", span(ms)),
        };
        match (self.age_ms, self.source.as_str()) {
            (Some(ms), _) if ms < 1_000 => "now".to_owned(),
            (Some(ms), _) => format!("{} ago", span(ms / 1_000 * 1_000)),
            (None, "unknown") => silent(self.replica),
            (None, _) => "never".to_owned(),
        }
    }
}

#[derive(Debug, Clone, Serialize)]
struct ConditionView {
    r#type: String,
    status: String,
    reason: String,
    message: String,
    since: Moment,
}

impl ConditionView {
    fn told(&self, now: u64) -> String {
        let message = if self.message.is_empty() {
            String::new()
        } else {
            format!(", {}", self.message)
        };
        let since = span(now.saturating_sub(self.since.0));
        format!(
            "{}={} ({}{message}) for {since}",
            self.r#type, self.status, self.reason
        )
    }
}

#[derive(Debug, Clone, Serialize)]
struct CapabilityView {
    name: String,
    effect: String,
    timeout_ms: u64,
    max_concurrency: u32,
    queue_limit: u32,
    max_attempts: u32,
    backoff_ms: u64,
    retry_on: Vec<String>,
    local_mediation: bool,
    description: String,
}

impl From<Capability> for CapabilityView {
    fn from(capability: Capability) -> CapabilityView {
        CapabilityView {
            name: capability.name,
            effect: capability.effect,
            timeout_ms: capability.timeout_ms,
            max_concurrency: capability.max_concurrency,
            queue_limit: capability.queue_limit,
            max_attempts: capability.max_attempts,
            backoff_ms: capability.backoff_ms,
            retry_on: capability.retry_on,
            local_mediation: capability.local_mediation,
            description: capability.description,
        }
    }
}

impl CapabilityView {
    fn told(&self) -> String {
        let mut words = vec![
            self.effect.clone(),
            span(self.timeout_ms),
            format!("{} at once", self.max_concurrency),
        ];
        if self.queue_limit > 0 {
            words.push(format!("{} may wait", self.queue_limit));
        }
        if self.max_attempts > 1 {
            let on = if self.retry_on.is_empty() {
                String::new()
            } else {
                format!(" after {}", self.retry_on.join(", "))
            };
            let backoff = span(self.backoff_ms);
            words.push(format!(
                "{} attempts{on}, {backoff} apart at first",
                self.max_attempts
            ));
        }
        if self.local_mediation {
            words.push("asks the person at the machine".to_owned());
        }
        let description = if self.description.is_empty() {
            String::new()
        } else {
            format!(": {}", self.description)
        };
        format!("{} ({}){description}", self.name, words.join(", "))
    }
}

impl From<NodeInfo> for NodeView {
    fn from(info: NodeInfo) -> NodeView {
        NodeView {
            device_id: info.device_id,
            name: info.name,
            status: info.status,
            status_since: Moment(info.status_since_ms),
            status_reason: info.status_reason,
            platform: info.platform,
            agent_version: info.agent_version,
            labels: info.labels.into_iter().collect(),
            capabilities: info.capabilities.into_iter().map(CapabilityView::from).collect(),
            open_dispatches: info.open_dispatches,
            bound_dispatches: info.bound_dispatches,
            waiting_dispatches: info.waiting_dispatches,
            max_concurrency: info.max_concurrency,
            queue_limit: info.queue_limit,
            session_epoch: info.session_epoch,
            session_replica: info.session_replica,
            transport: info.transport,
            transport_fallback: info.transport_fallback,
            registered_at: Moment(info.registered_at_ms),
            generation: info.generation,
            last_seen: SeenView {
                source: info.last_seen_source,
                age_ms: info.last_seen_known.then_some(info.last_seen_age_ms),
                replica: info.last_seen_replica,
                unreachable_ms: info.last_seen_unreachable_ms,
            },
            conditions: info.conditions.into_iter().map(ConditionView::from).collect(),
            lost_after_ms: Some(info.lost_after_ms).filter(|ms| *ms != u64::MAX),
            due_at: Moment(info.due_at_ms),
        }
    }
}

impl From<Condition> for ConditionView {
    fn from(condition: Condition) -> ConditionView {
        ConditionView {
            r#type: condition.r#type,
            status: condition.status,
            reason: condition.reason,
            message: condition.message,
            since: Moment(condition.since_ms),
        }
    }
}

impl NodeView {
    fn told_labels(&self) -> String {
        self.labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect::<Vec<_>>()
            .join(",")
    }

    fn told_replica(&self) -> String {
        if self.session_replica == 0 {
            String::new()
        } else {
            format!("r{}", self.session_replica)
        }
    }

    fn told_lost_after(&self, now: u64) -> String {
        let wait = match self.lost_after_ms {
            None => "never".to_owned(),
            Some(0) => "as the cluster has it".to_owned(),
            Some(ms) => span(ms),
        };
        let next = match self.status.as_str() {
            "suspect" | "online" => "offline",
            _ => "gone",
        };
        match self.due_at.0 {
            0 => wait,
            at => format!(
                "{wait}; {next} in {}",
                span(at.saturating_sub(now) / 1_000 * 1_000)
            ),
        }
    }

    /// All of it, for people.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let now = wall_ms();
        let since = format!(
            "{} for {}",
            self.status,
            span(now.saturating_sub(self.status_since.0))
        );
        let reason = if self.status_reason.is_empty() {
            String::new()
        } else {
            format!(" ({})", self.status_reason)
        };
        let session = if self.session_epoch == 0 {
            String::new()
        } else {
            format!(
                "epoch {} at {} over {}",
                self.session_epoch,
                self.told_replica(),
                self.transport
            )
        };
        let conditions: Vec<String> = self.conditions.iter().map(|known| known.told(now)).collect();
        let capabilities: Vec<String> = self.capabilities.iter().map(CapabilityView::told).collect();
        vec![
            ("node", self.device_id.clone()),
            ("name", self.name.clone()),
            ("status", since + &reason),
            ("last seen", self.last_seen.told()),
            ("conditions", conditions.join("\n")),
            ("lost after", self.told_lost_after(now)),
            ("platform", self.platform.clone()),
            ("agent", self.agent_version.clone()),
            ("labels", self.told_labels()),
            ("session", session),
            ("fallback", self.transport_fallback.clone()),
            ("open jobs", self.open_dispatches.to_string()),
            (
                "registered",
                format!("{}, generation {}", self.registered_at.told(now), self.generation),
            ),
            ("capabilities", capabilities.join("\n")),
        ]
    }
}

impl Record for NodeView {
    const RESTLESS: &'static [&'static str] = &["last_seen"];
    const COLUMNS: &'static [Column] = &[
        column("NODE"),
        text("NAME"),
        column("STATUS"),
        column("SINCE"),
        text("SEEN"),
        column("REPLICA"),
        column("TRANSPORT"),
        column("OPEN"),
        text("REASON"),
        wide("PLATFORM"),
        wide("AGENT"),
        wide("CAPABILITIES"),
        wide("LABELS"),
        wide("EPOCH"),
        wide("TRANSPORT"),
    ];

    fn key(&self) -> String {
        self.device_id.clone()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        vec![
            self.device_id.clone(),
            self.name.clone(),
            self.status.clone(),
            self.status_since.told(now_ms),
            self.last_seen.told(),
            self.told_replica(),
            self.transport.clone(),
            self.open_dispatches.to_string(),
            self.status_reason.clone(),
            self.platform.clone(),
            self.agent_version.clone(),
            self.capabilities
                .iter()
                .map(|capability| capability.name.clone())
                .collect::<Vec<_>>()
                .join(","),
            self.told_labels(),
            self.session_epoch.to_string(),
            self.transport.clone(),
        ]
    }
}
