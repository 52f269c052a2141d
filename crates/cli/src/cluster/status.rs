//! `palyra cluster status`: the cluster and its replicas, once or as they change.
//!
//! Raft roles and reachability make no journal rows, so the watch asks once a second and prints what differs.

use std::time::Duration;

use palyra_client::wall_ms;
use palyra_proto::cluster::v1::{ReplicaStatus, StatusResponse};
use serde::Serialize;

use crate::failure::Result;
use crate::output::table::{Column, Style, column, draw, facts, wide};
use crate::output::time::{Moment, span};
use crate::output::{Format, Out, Record, Source, note};
use crate::session::{Global, Session};
use crate::watch::{after, changed};

/// How often a watch asks.
const EVERY: Duration = Duration::from_secs(1);
/// How long an answer is waited for before a watch says that there is none.
const ASK: Duration = Duration::from_secs(5);
/// The skew between two clocks from which people are told.
const SKEW_MS: u64 = 500;

/// The cluster as it is printed.
#[derive(Debug, Clone, Serialize)]
struct StatusView {
    cluster_id: String,
    trust_domain: String,
    leader_id: u64,
    term: u64,
    feature_level: u32,
    voters: u32,
    failures_tolerated: u32,
    fleet: FleetView,
    replicas: Vec<ReplicaView>,
    warnings: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
struct FleetView {
    nodes: u64,
    online: u64,
    suspect: u64,
    gone: u64,
    pending_approvals: u64,
    open_dispatches: u64,
}

impl FleetView {
    /// Those that people look for when something is wrong; nothing when there are none.
    fn others(&self) -> String {
        let told = |count: u64, what| (count > 0).then(|| format!(", {count} {what}"));
        [told(self.suspect, "suspect"), told(self.gone, "gone")]
            .into_iter()
            .flatten()
            .collect()
    }
}

#[derive(Debug, Clone, Serialize)]
struct ReplicaView {
    id: u64,
    name: String,
    status: String,
    role: String,
    reachable: bool,
    node_addr: String,
    quic_addr: String,
    enrol_addr: String,
    peer_addr: String,
    metrics_addr: String,
    last_log_index: u64,
    applied_index: u64,
    /// How many entries of the log it has not applied, measured by the longest log that is known.
    lag: u64,
    snapshot_index: u64,
    contact_age_ms: u64,
    clock_skew_ms: u64,
    sessions: u64,
    version: String,
    state_hash: String,
    certificate_not_after: Moment,
    max_staleness_ms: u64,
    draining: bool,
    attaches_waiting: u64,
}

impl From<ReplicaStatus> for ReplicaView {
    fn from(replica: ReplicaStatus) -> ReplicaView {
        ReplicaView {
            id: replica.id,
            name: replica.name,
            status: replica.status,
            role: replica.role,
            reachable: replica.reachable,
            node_addr: replica.node_addr,
            quic_addr: replica.quic_addr,
            enrol_addr: replica.enrol_addr,
            peer_addr: replica.peer_addr,
            metrics_addr: replica.metrics_addr,
            last_log_index: replica.last_log_index,
            applied_index: replica.applied_index,
            lag: 0,
            snapshot_index: replica.snapshot_index,
            contact_age_ms: replica.contact_age_ms,
            clock_skew_ms: replica.clock_skew_ms,
            sessions: replica.sessions,
            version: replica.version,
            state_hash: replica.state_hash,
            certificate_not_after: Moment(replica.certificate_not_after_ms),
            max_staleness_ms: replica.max_staleness_ms,
            draining: replica.draining,
            attaches_waiting: replica.attaches_waiting,
        }
    }
}

impl From<StatusResponse> for StatusView {
    fn from(answer: StatusResponse) -> StatusView {
        let fleet = answer.fleet.unwrap_or_default();
        let mut replicas: Vec<ReplicaView> = answer.replicas.into_iter().map(ReplicaView::from).collect();
        let head = replicas
            .iter()
            .map(|replica| replica.last_log_index)
            .max()
            .unwrap_or(0);
        for replica in &mut replicas {
            replica.lag = head.saturating_sub(replica.applied_index);
        }
        StatusView {
            cluster_id: answer.cluster_id,
            trust_domain: answer.trust_domain,
            leader_id: answer.leader_id,
            term: answer.term,
            feature_level: answer.feature_level,
            voters: answer.voters,
            failures_tolerated: answer.failures_tolerated,
            fleet: FleetView {
                nodes: fleet.nodes,
                online: fleet.online,
                suspect: fleet.suspect,
                gone: fleet.gone,
                pending_approvals: fleet.pending_approvals,
                open_dispatches: fleet.open_dispatches,
            },
            replicas,
            warnings: answer.warnings,
        }
    }
}

impl Record for ReplicaView {
    const COLUMNS: &'static [Column] = &[
        column("ID"),
        column("NAME"),
        column("STATUS"),
        column("ROLE"),
        column("NODES AT"),
        column("APPLIED"),
        column("LAG"),
        column("SESSIONS"),
        column("CONTACT"),
        wide("LOG"),
        wide("SNAPSHOT"),
        wide("QUIC AT"),
        wide("ENROL AT"),
        wide("PEERS AT"),
        wide("METRICS AT"),
        wide("SKEW"),
        wide("VERSION"),
        wide("STATE"),
        wide("CERTIFICATE"),
        wide("STALE AFTER"),
        wide("WAITING"),
    ];

    fn key(&self) -> String {
        self.id.to_string()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        let known = |text: String| if self.reachable { text } else { String::new() };
        vec![
            self.id.to_string(),
            self.name.clone(),
            self.status.clone(),
            match (self.reachable, self.draining) {
                (true, false) => self.role.clone(),
                (true, true) => format!("{}, draining", self.role),
                (false, _) => "unreachable".to_owned(),
            },
            self.node_addr.clone(),
            known(self.applied_index.to_string()),
            known(self.lag.to_string()),
            known(self.sessions.to_string()),
            known(match self.contact_age_ms {
                // Not since it started.
                u64::MAX => "never".to_owned(),
                age_ms => format!("{} ago", span(age_ms)),
            }),
            known(self.last_log_index.to_string()),
            known(self.snapshot_index.to_string()),
            self.quic_addr.clone(),
            self.enrol_addr.clone(),
            self.peer_addr.clone(),
            self.metrics_addr.clone(),
            known(span(self.clock_skew_ms)),
            self.version.clone(),
            self.state_hash.chars().take(12).collect(),
            self.certificate_not_after.told(now_ms),
            known(span(self.max_staleness_ms)),
            known(self.attaches_waiting.to_string()),
        ]
    }
}

impl StatusView {
    /// What a watch compares: not the numbers that move all the time.
    fn shape(&self) -> impl PartialEq + use<> {
        let replicas: Vec<(u64, String, String, bool, u64)> = self
            .replicas
            .iter()
            .map(|replica| {
                (
                    replica.id,
                    replica.status.clone(),
                    replica.role.clone(),
                    replica.reachable,
                    replica.sessions,
                )
            })
            .collect();
        (
            self.leader_id,
            self.term,
            self.voters,
            self.fleet.clone(),
            replicas,
        )
    }

    fn text(&self, style: Style) -> String {
        let leader = match self.replicas.iter().find(|replica| replica.id == self.leader_id) {
            Some(leader) => format!("{} (replica {}), term {}", leader.name, leader.id, self.term),
            None => format!("none, term {}", self.term),
        };
        let tolerates = match self.failures_tolerated {
            1 => "1 more failure is tolerated".to_owned(),
            count => format!("{count} more failures are tolerated"),
        };
        let fleet = &self.fleet;
        let head = facts(&[
            ("cluster", format!("{} ({})", self.cluster_id, self.trust_domain)),
            ("leader", leader),
            ("voters", format!("{}; {tolerates}", self.voters)),
            ("versions", self.versions()),
            ("clocks", self.clocks()),
            (
                "fleet",
                format!(
                    "{} of {} nodes online{}, {} waiting for approval, {} open jobs",
                    fleet.online,
                    fleet.nodes,
                    fleet.others(),
                    fleet.pending_approvals,
                    fleet.open_dispatches
                ),
            ),
        ]);
        let rows: Vec<Vec<String>> = self.shown().map(|replica| replica.cells(wall_ms())).collect();
        format!("{head}\n{}", draw(ReplicaView::COLUMNS, &rows, style, true))
    }

    /// "0.1.0", or which replica has which when they differ.
    fn versions(&self) -> String {
        let known = || self.shown().filter(|replica| !replica.version.is_empty());
        let first = known()
            .next()
            .map(|replica| replica.version.clone())
            .unwrap_or_default();
        if known().all(|replica| replica.version == first) {
            return first;
        }
        let each: Vec<String> = known()
            .map(|replica| format!("{} {}", replica.name, replica.version))
            .collect();
        each.join(", ")
    }

    /// How far the clocks are apart.
    fn clocks(&self) -> String {
        let skews = self
            .shown()
            .filter(|replica| replica.reachable)
            .map(|replica| replica.clock_skew_ms);
        skews
            .max()
            .map_or_else(String::new, |skew| format!("within {}", span(skew)))
    }

    fn shown(&self) -> impl Iterator<Item = &ReplicaView> {
        self.replicas.iter().filter(|replica| replica.status != "removed")
    }

    /// What somebody should look at.
    fn warnings(&self) -> Vec<String> {
        let mut warnings = self.warnings.clone();
        for replica in self.shown() {
            if !replica.reachable {
                warnings.push(format!(
                    "replica {} ({}) cannot be reached",
                    replica.id, replica.name
                ));
            } else if replica.clock_skew_ms > SKEW_MS {
                let skew = span(replica.clock_skew_ms);
                warnings.push(format!(
                    "the clock of replica {} is off by {skew}: check NTP",
                    replica.id
                ));
            }
        }
        for replica in self
            .shown()
            .filter(|replica| replica.reachable && !replica.state_hash.is_empty())
        {
            let other = self.shown().find(|other| {
                other.reachable
                    && other.id > replica.id
                    && other.applied_index == replica.applied_index
                    && !other.state_hash.is_empty()
                    && other.state_hash != replica.state_hash
            });
            if let Some(other) = other {
                warnings.push(format!(
                    "replicas {} and {} differ at index {}: keep both data folders and report it",
                    replica.id, other.id, replica.applied_index
                ));
            }
        }
        if self.voters > 1 && self.failures_tolerated == 0 {
            warnings.push("no further failure is tolerated".to_owned());
        }
        warnings
    }
}

/// Prints the cluster.
pub(crate) async fn once(global: &Global, session: &Session) -> Result {
    let answer = session.client.status().await?;
    session.learn(&answer);
    let source = Source::from(answer.read);
    print(global.out(), &StatusView::from(answer), source)
}

fn print(out: Out, view: &StatusView, source: Source) -> Result {
    if !out.format.is_table() {
        return out.one(view, source, &[]);
    }
    out.write(&view.text(out.style))?;
    for warning in view.warnings() {
        note(&format!("warning: {warning}"));
    }
    Ok(())
}

/// Prints the cluster whenever it changes, until the process is ended. The loss of replicas, even of all of
/// them, is told and waited for.
pub(crate) async fn watch(global: &Global, session: &Session) -> Result {
    let mut out = global.out();
    if out.format == Format::Json {
        out.format = Format::Jsonl;
    }
    let answer = session.client.status().await?;
    session.learn(&answer);
    let mut index = answer.read.map_or(0, |read| read.index);
    let mut feed = session.client.events(after(index), None);
    let mut source = Source::from(answer.read);
    let mut view = StatusView::from(answer);
    print(out, &view, source)?;
    let client = session.client.clone().with_timeout(global.timeout.unwrap_or(ASK));
    let mut told = None;
    loop {
        // A journal row shows a change at once; roles and reachability are seen at the next question.
        match tokio::time::timeout(EVERY, changed(&mut feed, &mut index)).await {
            Ok(Err(failure)) if !failure.may_pass() => return Err(failure),
            _ => {}
        }
        let next = match client.status().await {
            Ok(answer) => {
                source = Source::from(answer.read);
                told = None;
                StatusView::from(answer)
            }
            Err(error) if error.retryable => {
                // The feed has told it, unless replicas answer and have no quorum.
                if told.as_deref() != Some(error.message.as_str()) {
                    note(&format!("{}; still watching", error.message));
                    told = Some(error.message);
                }
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        if next.shape() != view.shape() {
            if out.format.is_table() {
                out.write(&format!("\n{} UTC\n", Moment(wall_ms()).clock()))?;
            }
            print(out, &next, source)?;
        }
        view = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> StatusView {
        let replica = |id: u64, role: &str, hash: &str| ReplicaStatus {
            id,
            name: format!("r{id}"),
            status: "voter".to_owned(),
            role: role.to_owned(),
            reachable: true,
            applied_index: 9,
            state_hash: hash.to_owned(),
            ..ReplicaStatus::default()
        };
        StatusView::from(StatusResponse {
            leader_id: 1,
            voters: 2,
            failures_tolerated: 1,
            replicas: vec![replica(1, "leader", "aa"), replica(2, "follower", "aa")],
            ..StatusResponse::default()
        })
    }

    #[test]
    fn names_that_scripts_read_stay() {
        let value = serde_json::to_value(view()).unwrap();
        assert_eq!((&value["voters"], &value["leader_id"]), (&2.into(), &1.into()));
        assert_eq!(value["replicas"][1]["reachable"], true);
        assert_eq!(value["replicas"][1]["applied_index"], 9);
    }

    #[test]
    fn different_states_at_one_index_are_told() {
        assert!(view().warnings().is_empty(), "{:?}", view().warnings());
        let mut differing = view();
        differing.replicas[1].state_hash = "bb".to_owned();
        assert!(differing.warnings()[0].contains("differ at index 9"));
        let mut lost = view();
        lost.replicas[1].reachable = false;
        assert!(lost.warnings()[0].contains("cannot be reached"));
    }

    #[test]
    fn a_watch_ignores_what_moves_all_the_time() {
        let mut next = view();
        next.replicas[0].applied_index = 10;
        next.replicas[0].contact_age_ms = 7;
        assert!(next.shape() == view().shape());
        next.leader_id = 2;
        assert!(next.shape() != view().shape());
    }
}
