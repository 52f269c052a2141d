//! Nodes as they are printed.

use std::collections::BTreeMap;

use palyra_client::wall_ms;
use palyra_proto::node::v1::{Capability, NodeInfo};
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
    session_epoch: u64,
    session_replica: u64,
    transport: String,
    registered_at: Moment,
    generation: u64,
}

#[derive(Debug, Clone, Serialize)]
struct CapabilityView {
    name: String,
    effect: String,
    timeout_ms: u64,
    max_concurrency: u32,
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
            session_epoch: info.session_epoch,
            session_replica: info.session_replica,
            transport: info.transport,
            registered_at: Moment(info.registered_at_ms),
            generation: info.generation,
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
        let capabilities: Vec<String> = self.capabilities.iter().map(CapabilityView::told).collect();
        vec![
            ("node", self.device_id.clone()),
            ("name", self.name.clone()),
            ("status", since + &reason),
            ("platform", self.platform.clone()),
            ("agent", self.agent_version.clone()),
            ("labels", self.told_labels()),
            ("session", session),
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
    const COLUMNS: &'static [Column] = &[
        column("NODE"),
        text("NAME"),
        column("STATUS"),
        column("SINCE"),
        column("REPLICA"),
        column("OPEN"),
        wide("PLATFORM"),
        wide("AGENT"),
        wide("CAPABILITIES"),
        wide("LABELS"),
        wide("EPOCH"),
        wide("REASON"),
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
            self.told_replica(),
            self.open_dispatches.to_string(),
            self.platform.clone(),
            self.agent_version.clone(),
            self.capabilities
                .iter()
                .map(|capability| capability.name.clone())
                .collect::<Vec<_>>()
                .join(","),
            self.told_labels(),
            self.session_epoch.to_string(),
            self.status_reason.clone(),
        ]
    }
}
