//! How a replica is set up, and the timing of elections.

use std::time::Duration;

use openraft::SnapshotPolicy;
use palyra_state::Id;

use crate::meta::{Identity, OpenError};

/// Heartbeats, elections, and how long callers wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Between two heartbeats of a leader; also the limit for one heartbeat's answer.
    pub heartbeat: Duration,
    /// Shortest random wait before a candidacy.
    pub election_min: Duration,
    /// Longest random wait before a candidacy, and the time for which a follower trusts a silent leader.
    pub election_max: Duration,
    /// How long a command or a read waits for a leader and for its answer.
    pub deadline: Duration,
}

impl Default for Timing {
    /// A follower stands for election after the lease (`election_max`) and a random wait. With 100/450/850 ms
    /// that is
    /// 1.3 to 1.7 s after the last heartbeat; the pre-vote, the vote's fsync and the first entry add some
    /// tens of milliseconds, so the next write is accepted within 2.5 s of a leader's death, a missed vote
    /// included. Shorter would make eight missed heartbeats, which a loaded two-core machine can bring about,
    /// cost a leader.
    fn default() -> Self {
        Timing {
            heartbeat: Duration::from_millis(100),
            election_min: Duration::from_millis(450),
            election_max: Duration::from_millis(850),
            deadline: Duration::from_secs(5),
        }
    }
}

/// When snapshots are made and what stays of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compaction {
    /// Entries after which a snapshot is made.
    pub snapshot_every: u64,
    /// Entries kept behind a snapshot: a replica that is further behind gets a snapshot instead of the log.
    pub keep: u64,
    /// Entries purged at a time.
    pub purge_batch: u64,
}

impl Default for Compaction {
    fn default() -> Self {
        Compaction {
            snapshot_every: 50_000,
            keep: 100_000,
            purge_batch: 4_096,
        }
    }
}

/// How a replica is set up.
#[derive(Clone, Debug)]
pub struct ReplicaConfig {
    /// This replica's id; from the replicated counter, never used twice.
    pub replica_id: u64,
    /// The cluster.
    pub cluster_id: Id,
    /// Elections and deadlines.
    pub timing: Timing,
    /// Snapshots.
    pub compaction: Compaction,
    /// Bytes that the log may hold, roughly, whatever `compaction.keep` says.
    pub log_bytes: u64,
    /// Bytes of commands that may wait for their outcome on this replica: of its own callers, and, as leader, as many
    /// again of the others'.
    pub in_flight_bytes: usize,
}

impl ReplicaConfig {
    /// The defaults, for a replica of a cluster.
    #[must_use]
    pub fn new(replica_id: u64, cluster_id: Id) -> ReplicaConfig {
        ReplicaConfig {
            replica_id,
            cluster_id,
            timing: Timing::default(),
            compaction: Compaction::default(),
            log_bytes: 1024 * 1024 * 1024,
            in_flight_bytes: 64 * 1024 * 1024,
        }
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity {
            cluster_id: self.cluster_id,
            replica_id: self.replica_id,
        }
    }

    pub(crate) fn openraft(&self) -> Result<openraft::Config, OpenError> {
        if self.replica_id == 0 || self.cluster_id.is_zero() {
            return Err(OpenError::Config(
                "replica id and cluster id must not be zero".to_owned(),
            ));
        }
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let election_max = ms(self.timing.election_max);
        openraft::Config {
            cluster_name: self.cluster_id.to_string(),
            heartbeat_interval: ms(self.timing.heartbeat),
            election_timeout_min: ms(self.timing.election_min),
            election_timeout_max: election_max,
            install_snapshot_timeout: 10_000,
            max_payload_entries: 1_024,
            max_append_entries: Some(4_096),
            replication_lag_threshold: 1_000,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.compaction.snapshot_every),
            max_in_snapshot_log_to_keep: self.compaction.keep,
            purge_batch_size: self.compaction.purge_batch,
            enable_pre_vote: Some(true),
            // A restarted leader that lost its unsynced tail would issue the same log ids again with other
            // payloads.
            // Planted: openraft's default.
            enable_leader_restore: Some(palyra_fault::planted("leader-restored")),
            // A leader that a majority cannot reach must let go, or a bridge partition never elects.
            quorum_loss_probe_interval: Some(election_max * 4),
            ..openraft::Config::default()
        }
        .validate()
        .map_err(|error| OpenError::Config(error.to_string()))
    }
}
