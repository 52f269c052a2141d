//! What health and metrics show, gathered from the replica and the control plane.

use std::sync::Arc;

use palyra_control::Control;
use palyra_replica::Replica;

use crate::http::{Kind, Sample, Source};

/// Samples are taken when somebody asks.
pub(crate) fn source(control: Control, replica: Replica) -> Source {
    Arc::new(move || sample(&control, &replica))
}

fn sample(control: &Control, replica: &Replica) -> Sample {
    let status = replica.status();
    let not_ready = match (status.leader, control.check_fresh()) {
        (None, _) => Some("no leader is known".to_owned()),
        (Some(_), Err(error)) => Some(error.to_string()),
        (Some(_), Ok(())) => None,
    };
    let age = status
        .quorum_age
        .map_or(u64::MAX, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
    let gauge = |name, help, value| (name, Kind::Gauge, help, value);
    Sample {
        not_ready,
        role: status.role.as_str(),
        figures: vec![
            gauge("replica_id", "This replica.", status.id),
            gauge(
                "leader_id",
                "The leader that it knows; 0 for none.",
                status.leader.unwrap_or(0),
            ),
            gauge("raft_term", "Raft term.", status.term),
            gauge(
                "raft_voters",
                "Replicas with a vote.",
                status.members.voters.len() as u64,
            ),
            gauge(
                "raft_last_log_index",
                "Index of the last log entry.",
                status.last_log,
            ),
            gauge(
                "raft_committed_index",
                "Index of the last entry known to be committed.",
                status.committed,
            ),
            gauge(
                "raft_applied_index",
                "Index of the last applied entry.",
                status.applied,
            ),
            gauge(
                "raft_snapshot_index",
                "Index that the last snapshot covers.",
                status.snapshot,
            ),
            gauge(
                "raft_purged_index",
                "Index up to which the log is purged.",
                status.purged,
            ),
            gauge(
                "quorum_age_milliseconds",
                "Since a quorum last stood behind what is applied here.",
                age,
            ),
            gauge(
                "sessions",
                "Sessions of nodes that this replica holds.",
                control.session_count() as u64,
            ),
            gauge(
                "connections",
                "Connections of nodes and operators.",
                control.connection_count() as u64,
            ),
        ],
    }
}
