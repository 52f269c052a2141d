//! Workers as they are printed.
//!
//! Invariant: a level of evidence is never told without what it is worth.

use std::collections::BTreeMap;

use palyra_client::wall_ms;
use palyra_proto::worker::v1::{
    AttestationInfo, ClaimedCapability, GetFleetResponse, HoldInfo, RefusalInfo, WorkerInfo,
};
use serde::Serialize;

use crate::lease::view::LeaseView;
use crate::output::Record;
use crate::output::table::{Column, column, text, wide};
use crate::output::time::{Moment, span};

/// A worker.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct WorkerView {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) lifecycle: String,
    lifecycle_since: Moment,
    lifecycle_reason: String,
    lifecycle_actor: String,
    registered_at: Moment,
    slots: u32,
    pub(crate) slots_used: u32,
    evidence: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) attestation: Option<AttestationView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quarantine: Option<HoldView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) drain: Option<HoldView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<HoldView>,
    session_epoch: u64,
    session_replica: u64,
    reconciled: bool,
    unclean: Vec<String>,
    pub(crate) leases: Vec<LeaseView>,
    due_at: Moment,
    reverify_asked: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) refusal: Option<RefusalView>,
}

/// The newest statement that was accepted.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct AttestationView {
    pub(crate) evidence: String,
    image: String,
    build: String,
    artifact: String,
    supervisor: String,
    egress_proxy: String,
    capabilities: Vec<CapabilityView>,
    sdk_protocol: u32,
    wit_abi: String,
    issued_at: Moment,
    pub(crate) expires_at: Moment,
    accepted_at: Moment,
    pub(crate) policy_version: u64,
    hardware_provider: String,
    index: u64,
}

#[derive(Debug, Clone, Serialize)]
struct CapabilityView {
    name: String,
    authority: String,
}

/// Why work is held back.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct HoldView {
    at: Moment,
    by: String,
    cause: String,
    reason: String,
    pub(crate) until: Moment,
    #[serde(skip_serializing_if = "String::is_empty")]
    lease_id: String,
    pub(crate) forced: bool,
}

/// The newest statement that was refused.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RefusalView {
    at: Moment,
    pub(crate) code: String,
    pub(crate) message: String,
    severity: String,
}

/// What a level of evidence is worth, in words.
pub(crate) fn worth(evidence: &str, provider: &str) -> String {
    match evidence {
        "self-reported" => "self-reported: nobody but the worker vouches for these digests".to_owned(),
        "supervisor" => {
            "supervisor: the program that starts the tools computed these digests itself; nothing outside of \
                         that machine vouches for that program"
                .to_owned()
        }
        "hardware" => format!(
            "hardware: provider {provider} vouches for these digests; as good as what keeps that provider's key"
        ),
        _ => "none: it has not proved anything".to_owned(),
    }
}

impl From<ClaimedCapability> for CapabilityView {
    fn from(claimed: ClaimedCapability) -> CapabilityView {
        CapabilityView {
            name: claimed.name,
            authority: claimed.authority,
        }
    }
}

impl From<AttestationInfo> for AttestationView {
    fn from(info: AttestationInfo) -> AttestationView {
        AttestationView {
            evidence: info.evidence,
            image: info.image,
            build: info.build,
            artifact: info.artifact,
            supervisor: info.supervisor,
            egress_proxy: info.egress_proxy,
            capabilities: info.capabilities.into_iter().map(CapabilityView::from).collect(),
            sdk_protocol: info.sdk_protocol,
            wit_abi: info.wit_abi,
            issued_at: Moment(info.issued_at_ms),
            expires_at: Moment(info.expires_at_ms),
            accepted_at: Moment(info.accepted_at_ms),
            policy_version: info.policy_version,
            hardware_provider: info.hardware_provider,
            index: info.index,
        }
    }
}

impl AttestationView {
    /// All of it, for people.
    pub(crate) fn facts(&self, now: u64) -> Vec<(&'static str, String)> {
        let tools: Vec<String> = self
            .capabilities
            .iter()
            .map(|tool| format!("{} (vouched for by {})", tool.name, tool.authority))
            .collect();
        vec![
            ("evidence", worth(&self.evidence, &self.hardware_provider)),
            ("image", self.image.clone()),
            ("build", self.build.clone()),
            ("artifact", self.artifact.clone()),
            ("supervisor", self.supervisor.clone()),
            ("egress", self.egress_proxy.clone()),
            ("tools", tools.join("\n")),
            (
                "versions",
                format!("SDK protocol {}, WIT ABI {}", self.sdk_protocol, self.wit_abi),
            ),
            (
                "accepted",
                format!(
                    "{} at index {}, against policy {}",
                    self.accepted_at.told(now),
                    self.index,
                    self.policy_version
                ),
            ),
            (
                "good until",
                format!(
                    "{} (issued {})",
                    self.expires_at.told(now),
                    self.issued_at.told(now)
                ),
            ),
        ]
    }
}

impl From<HoldInfo> for HoldView {
    fn from(info: HoldInfo) -> HoldView {
        HoldView {
            at: Moment(info.at_ms),
            by: info.by,
            cause: info.cause,
            reason: info.reason,
            until: Moment(info.until_ms),
            lease_id: info.subject,
            forced: info.forced,
        }
    }
}

impl HoldView {
    fn told(&self, now: u64) -> String {
        let mut told = format!("{} {} by {}", self.cause, self.at.told(now), self.by);
        if !self.lease_id.is_empty() {
            told = format!("{told}, lease {}", self.lease_id);
        }
        if !self.reason.is_empty() {
            told = format!("{told}: {}", self.reason);
        }
        told
    }

    fn told_drain(&self, now: u64) -> String {
        let end = if self.forced {
            "what ran was ended".to_owned()
        } else {
            format!("what runs is ended {}", self.until.told(now))
        };
        format!("{}; {end}", self.told(now))
    }
}

impl From<RefusalInfo> for RefusalView {
    fn from(info: RefusalInfo) -> RefusalView {
        RefusalView {
            at: Moment(info.at_ms),
            code: info.code,
            message: info.message,
            severity: info.severity,
        }
    }
}

impl RefusalView {
    /// One line.
    pub(crate) fn told(&self, now: u64) -> String {
        format!(
            "{} {} ({}): {}",
            self.code,
            self.at.told(now),
            self.severity,
            self.message
        )
    }
}

impl From<WorkerInfo> for WorkerView {
    fn from(info: WorkerInfo) -> WorkerView {
        WorkerView {
            id: info.id,
            name: info.name,
            lifecycle: info.lifecycle,
            lifecycle_since: Moment(info.lifecycle_since_ms),
            lifecycle_reason: info.lifecycle_reason,
            lifecycle_actor: info.lifecycle_actor,
            registered_at: Moment(info.registered_at_ms),
            slots: info.slots,
            slots_used: info.slots_used,
            evidence: info.evidence,
            attestation: info.attestation.map(AttestationView::from),
            quarantine: info.quarantine.map(HoldView::from),
            drain: info.drain.map(HoldView::from),
            failure: info.failure.map(HoldView::from),
            session_epoch: info.session_epoch,
            session_replica: info.session_replica,
            reconciled: info.reconciled,
            unclean: info.unclean,
            leases: info.leases.into_iter().map(LeaseView::from).collect(),
            due_at: Moment(info.due_at_ms),
            reverify_asked: info.reverify_asked,
            refusal: info.refusal.map(RefusalView::from),
        }
    }
}

impl WorkerView {
    /// What it is called: its name, or its id when it has none.
    pub(crate) fn called(&self) -> &str {
        if self.name.is_empty() {
            &self.id
        } else {
            &self.name
        }
    }

    /// What an operator can do when it gets no work; empty when it does.
    fn to_do(&self) -> String {
        let id = self.called();
        match self.lifecycle.as_str() {
            "failed" => format!("look at it, then: palyra worker cleanup {id}"),
            "quarantined" => format!("when the cause is gone: palyra worker reverify {id} --reason ..."),
            "draining" => format!("palyra worker release {id}"),
            "registered" if self.refusal.is_some() => {
                format!("its statement is refused: palyra worker attest {id}")
            }
            "registered" => {
                "it has no good statement yet; is there a policy? palyra worker policy show".to_owned()
            }
            "degraded" if !self.unclean.is_empty() => {
                format!("it has not said that it is clean: palyra worker cleanup {id}")
            }
            _ => String::new(),
        }
    }

    fn told_session(&self) -> String {
        let reconciled = if self.reconciled {
            ""
        } else {
            "; not reconciled in it yet"
        };
        match self.session_epoch {
            0 => "none".to_owned(),
            epoch => format!("epoch {epoch} at r{}{reconciled}", self.session_replica),
        }
    }

    /// All of it, for people.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let now = wall_ms();
        let since = span(now.saturating_sub(self.lifecycle_since.0));
        let mut state = format!("{} for {since}", self.lifecycle);
        if !self.lifecycle_reason.is_empty() {
            state = format!("{state} ({}, by {})", self.lifecycle_reason, self.lifecycle_actor);
        }
        let hold = |hold: &Option<HoldView>| hold.as_ref().map(|hold| hold.told(now)).unwrap_or_default();
        let leases: Vec<String> = self.leases.iter().map(|lease| lease.line(now)).collect();
        let mut facts = vec![
            ("worker", self.id.clone()),
            ("name", self.name.clone()),
            ("lifecycle", state),
            ("to do", self.to_do()),
            ("slots", format!("{} of {} taken", self.slots_used, self.slots)),
            ("session", self.told_session()),
            ("quarantine", hold(&self.quarantine)),
            (
                "drain",
                self.drain
                    .as_ref()
                    .map(|drain| drain.told_drain(now))
                    .unwrap_or_default(),
            ),
            ("failure", hold(&self.failure)),
            ("not clean", self.unclean.join("\n")),
            (
                "reverify",
                if self.reverify_asked { "asked for" } else { "" }.to_owned(),
            ),
            (
                "refused",
                self.refusal
                    .as_ref()
                    .map(|refusal| refusal.told(now))
                    .unwrap_or_default(),
            ),
        ];
        match &self.attestation {
            Some(attestation) => facts.extend(attestation.facts(now)),
            None => facts.push(("evidence", worth("", ""))),
        }
        facts.push(("leases", leases.join("\n")));
        facts.push(("registered", self.registered_at.told(now)));
        if self.due_at.0 != 0 {
            facts.push(("due", self.due_at.told(now)));
        }
        facts
    }
}

impl Record for WorkerView {
    const COLUMNS: &'static [Column] = &[
        column("WORKER"),
        text("NAME"),
        column("LIFECYCLE"),
        column("SINCE"),
        column("SLOTS"),
        column("EVIDENCE"),
        column("GOOD UNTIL"),
        text("REASON"),
        text("TOOLS"),
        wide("REPLICA"),
        wide("EPOCH"),
        wide("POLICY"),
        wide("ACTOR"),
        wide("TO DO"),
    ];

    fn key(&self) -> String {
        self.id.clone()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        let attested = self.attestation.as_ref();
        let tools = attested.map(|attested| {
            let names = attested.capabilities.iter().map(|tool| tool.name.clone());
            names.collect::<Vec<_>>().join(",")
        });
        vec![
            self.id.clone(),
            self.name.clone(),
            self.lifecycle.clone(),
            self.lifecycle_since.told(now_ms),
            format!("{}/{}", self.slots_used, self.slots),
            self.evidence.clone(),
            attested.map_or_else(|| "-".to_owned(), |attested| attested.expires_at.told(now_ms)),
            self.lifecycle_reason.clone(),
            tools.unwrap_or_default(),
            match self.session_replica {
                0 => String::new(),
                replica => format!("r{replica}"),
            },
            self.session_epoch.to_string(),
            attested.map_or_else(String::new, |attested| attested.policy_version.to_string()),
            self.lifecycle_actor.clone(),
            self.to_do(),
        ]
    }
}

/// Counts of the whole fleet.
#[derive(Debug, Serialize)]
pub(crate) struct FleetView {
    workers: BTreeMap<String, u64>,
    slots: u64,
    slots_used: u64,
    leases: u64,
    runs: BTreeMap<String, u64>,
    policy_version: u64,
    artifact_bytes: u64,
}

impl From<GetFleetResponse> for FleetView {
    fn from(answer: GetFleetResponse) -> FleetView {
        FleetView {
            workers: answer.workers.into_iter().collect(),
            slots: answer.slots,
            slots_used: answer.slots_used,
            leases: answer.leases,
            runs: answer.runs.into_iter().collect(),
            policy_version: answer.policy_version,
            artifact_bytes: answer.artifact_bytes,
        }
    }
}

impl FleetView {
    /// All of it, for people.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let counts = |counts: &BTreeMap<String, u64>| {
            let some = counts.iter().filter(|(_, count)| **count > 0);
            let told: Vec<String> = some.map(|(word, count)| format!("{count} {word}")).collect();
            if told.is_empty() {
                "none".to_owned()
            } else {
                told.join(", ")
            }
        };
        let policy = match self.policy_version {
            0 => "never set: nobody is admitted; palyra worker policy show --template".to_owned(),
            version => format!("version {version}"),
        };
        vec![
            ("workers", counts(&self.workers)),
            ("slots", format!("{} of {} taken", self.slots_used, self.slots)),
            ("leases", format!("{} live", self.leases)),
            ("runs", counts(&self.runs)),
            ("policy", policy),
            ("files", format!("{} bytes kept", self.artifact_bytes)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evidence_is_told_with_what_it_is_worth() {
        assert_eq!(
            worth("self-reported", ""),
            "self-reported: nobody but the worker vouches for these digests"
        );
        assert!(worth("hardware", "tpm").contains("provider tpm vouches"));
        assert!(worth("", "").starts_with("none"));
    }

    #[test]
    fn a_worker_without_work_says_what_to_do() {
        let worker = |lifecycle: &str| WorkerInfo {
            id: "01J".to_owned(),
            name: "w1".to_owned(),
            lifecycle: lifecycle.to_owned(),
            ..WorkerInfo::default()
        };
        let to_do = |info: WorkerInfo| WorkerView::from(info).to_do();
        assert!(to_do(worker("failed")).contains("palyra worker cleanup w1"));
        assert!(to_do(worker("quarantined")).contains("palyra worker reverify w1"));
        assert_eq!(to_do(worker("available")), "");
        let unclean = WorkerInfo {
            unclean: vec!["01K".to_owned()],
            ..worker("degraded")
        };
        assert!(to_do(unclean).contains("cleanup"));
    }

    #[test]
    fn a_fleet_without_a_policy_says_so() {
        let view = FleetView::from(GetFleetResponse {
            workers: [("available".to_owned(), 2), ("failed".to_owned(), 0)].into(),
            ..GetFleetResponse::default()
        });
        let facts = view.facts();
        assert_eq!(facts[0].1, "2 available");
        assert!(facts[4].1.starts_with("never set"), "{facts:?}");
    }
}
