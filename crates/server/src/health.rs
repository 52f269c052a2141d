//! What health and metrics show, gathered from the replica and the control plane.

use std::sync::Arc;
use std::time::Duration;

use palyra_control::Control;
use palyra_replica::{Replica, Status};
use palyra_state::fleet::Lifecycle;
use palyra_state::leases::RunState;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::http::{Figure, Kind, Sample, Source};
use crate::metered::Meter;
use crate::quic;

/// How often the gRPC health service is told.
const REPORT: Duration = Duration::from_secs(1);

/// Keeps the gRPC health service right: this replica may serve nodes, or not, as on the page `/health/ready`.
pub(crate) async fn report(reporter: HealthReporter, control: Control) {
    let mut ticks = tokio::time::interval(REPORT);
    let mut told = None;
    loop {
        ticks.tick().await;
        let fresh = control.check_fresh().is_ok();
        // Whoever watches hears of changes, not of each look.
        if told.replace(fresh) == Some(fresh) {
            continue;
        }
        let status = if fresh {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for service in ["", "palyra.node.v1.NodeService"] {
            reporter.set_service_status(service, status).await;
        }
    }
}

/// Samples are taken when somebody asks.
pub(crate) fn source(
    control: Control,
    replica: Replica,
    meter: Arc<Meter>,
    quic: Arc<quic::Meter>,
) -> Source {
    Arc::new(move || sample(&control, &replica, &meter, &quic))
}

fn sample(control: &Control, replica: &Replica, meter: &Meter, quic: &quic::Meter) -> Sample {
    let status = replica.status();
    let not_ready = match (status.leader, control.check_fresh()) {
        (None, _) => Some("no leader is known".to_owned()),
        (Some(_), Err(error)) => Some(error.to_string()),
        (Some(_), Ok(())) if control.is_draining() => Some("it is about to stop".to_owned()),
        (Some(_), Ok(())) => None,
    };
    let mut figures = raft_figures(&status);
    figures.extend(control_figures(control, replica));
    figures.extend(worker_figures(control, replica));
    figures.extend(renewal_figures(control));
    figures.extend(disk_figures(meter));
    figures.push(gauge((
        "quic_connections",
        "QUIC connections that are open.",
        quic.open(),
    )));
    figures.extend(quic.counters().map(counter));
    Sample {
        not_ready,
        role: status.role.as_str(),
        figures,
    }
}

fn raft_figures(status: &Status) -> Vec<Figure> {
    let age = status
        .quorum_age
        .map_or(u64::MAX, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
    let voters = status.members.voters.len() as u64;
    [
        ("replica_id", "This replica.", status.id),
        (
            "leader_id",
            "The leader that it knows; 0 for none.",
            status.leader.unwrap_or(0),
        ),
        ("raft_term", "Raft term.", status.term),
        ("raft_voters", "Replicas with a vote.", voters),
        (
            "raft_last_log_index",
            "Index of the last log entry.",
            status.last_log,
        ),
        (
            "raft_committed_index",
            "Index of the last entry known to be committed.",
            status.committed,
        ),
        (
            "raft_applied_index",
            "Index of the last applied entry.",
            status.applied,
        ),
        (
            "raft_snapshot_index",
            "Index that the last snapshot covers.",
            status.snapshot,
        ),
        (
            "raft_purged_index",
            "Index up to which the log is purged.",
            status.purged,
        ),
        (
            "quorum_age_milliseconds",
            "Since a quorum last stood behind what is applied here.",
            age,
        ),
    ]
    .map(gauge)
    .to_vec()
}

fn control_figures(control: &Control, replica: &Replica) -> Vec<Figure> {
    let enforced = control.enforced_index();
    let behind = palyra_state::meta(&replica.view())
        .journal_last
        .index
        .saturating_sub(enforced);
    let (sessions, connections) = (control.session_count() as u64, control.connection_count() as u64);
    let fleet = palyra_state::nodes::totals(&replica.view());
    let offline = fleet
        .nodes
        .saturating_sub(fleet.online + fleet.suspect + fleet.gone);
    [
        ("sessions", "Sessions of nodes that this replica holds.", sessions),
        ("connections", "Connections of nodes and operators.", connections),
        (
            "attaches_waiting",
            "Nodes that wait here for their session to begin.",
            control.attaches_waiting() as u64,
        ),
        (
            "nodes_online",
            "Nodes that are online, of the cluster.",
            fleet.online,
        ),
        (
            "nodes_suspect",
            "Nodes whose session was lost a moment ago.",
            fleet.suspect,
        ),
        ("nodes_offline", "Nodes that are offline.", offline),
        (
            "nodes_gone",
            "Nodes that were offline for longer than they may be.",
            fleet.gone,
        ),
        (
            "feed_index",
            "Index up to which connections and sessions follow the journal.",
            enforced,
        ),
        ("feed_lag", "How far they are behind the newest row.", behind),
    ]
    .map(gauge)
    .to_vec()
}

fn worker_figures(control: &Control, replica: &Replica) -> Vec<Figure> {
    let view = replica.view();
    let fleet = palyra_state::fleet::snapshot(&view);
    let leases = palyra_state::leases::totals(&view);
    let of = |wanted: Lifecycle| {
        let mut counts = fleet.workers.iter().filter(|(state, _)| *state == wanted);
        counts.next().map_or(0, |(_, count)| *count)
    };
    [
        (
            "worker_slots",
            "Slots of workers that are available or busy, of the cluster.",
            fleet.slots,
        ),
        ("worker_slots_used", "Slots that are taken.", fleet.slots_used),
        (
            "workers_available",
            "Workers that may be given more.",
            of(Lifecycle::Available),
        ),
        (
            "workers_quarantined",
            "Workers that are given nothing until they are verified anew.",
            of(Lifecycle::Quarantined),
        ),
        (
            "workers_failed",
            "Workers that a cleanup failed on.",
            of(Lifecycle::Failed),
        ),
        ("leases_live", "Leases that have not ended.", leases.live),
        (
            "runs_queued",
            "Runs that wait for a worker.",
            leases
                .runs
                .get(RunState::Queued as usize)
                .copied()
                .unwrap_or_default(),
        ),
        (
            "renewals_waiting",
            "Renewals of leases that wait here to be committed.",
            control.renewals_waiting() as u64,
        ),
    ]
    .map(gauge)
    .to_vec()
}

fn renewal_figures(control: &Control) -> Vec<Figure> {
    let renewals = control.renewal_counts();
    [
        (
            "renewal_entries_total",
            "Entries of the log that renewals of leases cost.",
            renewals.entries,
        ),
        (
            "leases_renewed_total",
            "Leases that were renewed.",
            renewals.renewed,
        ),
        (
            "renewals_refused_total",
            "Renewals of leases that were over, or not the worker's.",
            renewals.refused,
        ),
    ]
    .map(counter)
    .to_vec()
}

fn disk_figures(meter: &Meter) -> Vec<Figure> {
    [
        (
            "disk_writes_total",
            "Batches written to the data folder.",
            meter.writes(),
        ),
        (
            "disk_syncs_total",
            "Syncs of the data folder's log.",
            meter.syncs(),
        ),
        (
            "disk_sync_microseconds_total",
            "Time spent in syncs.",
            meter.sync_us(),
        ),
    ]
    .map(counter)
    .to_vec()
}

fn counter((name, help, value): (&'static str, &'static str, u64)) -> Figure {
    Figure {
        name,
        kind: Kind::Counter,
        help,
        value,
    }
}

fn gauge((name, help, value): (&'static str, &'static str, u64)) -> Figure {
    Figure {
        name,
        kind: Kind::Gauge,
        help,
        value,
    }
}
