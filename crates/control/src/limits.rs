//! Every bound and every duration of the control plane in one place, with the relations that must hold
//! between them.
//!
//! What never lives here: limits of the replicated state (`palyra_state::limits`), on which all replicas must
//! agree. These here are one replica's own; two replicas may differ in them without harm, save for
//! [`Timings::max_staleness`].

use std::time::Duration;

/// Durations that an installation may tune.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timings {
    /// How often a node sends a heartbeat.
    pub heartbeat_interval: Duration,
    /// Silence after which a session is closed.
    pub heartbeat_timeout: Duration,
    /// Time without quorum contact after which this replica serves no node. The same everywhere: revocation
    /// waits for it.
    pub max_staleness: Duration,
    /// Time without contact after which the leader detaches a replica's sessions.
    pub replica_lost_after: Duration,
    /// Longest that one proposal, one linearizable read or one call of another replica may take.
    pub call_timeout: Duration,
    /// How long a session's outbound message may wait for a reader that stalls.
    pub stall_timeout: Duration,
    /// How long a node whose session ended is suspect before it is offline.
    pub suspect_for: Duration,
    /// How long a node that asks for nothing else may be offline before it is gone; `None`: as long as it takes.
    pub lost_after: Option<Duration>,
    /// Over how long a replica that stops spreads the goodbyes of its sessions.
    pub drain: Duration,
    /// How long a node may wait for its turn to be attached. Less than the 10 s after which it gives up.
    pub attach_wait: Duration,
    /// Life of a node's certificate that this replica signs.
    pub node_validity: Duration,
    /// Life of an operator's certificate when none is asked for.
    pub operator_validity: Duration,
}

impl Default for Timings {
    fn default() -> Timings {
        Timings {
            heartbeat_interval: Duration::from_secs(2),
            heartbeat_timeout: Duration::from_secs(7),
            max_staleness: Duration::from_secs(5),
            replica_lost_after: Duration::from_secs(5),
            call_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(30),
            suspect_for: Duration::from_millis(palyra_state::limits::SUSPECT_FOR),
            lost_after: Some(Duration::from_millis(palyra_state::limits::LOST_AFTER)),
            drain: Duration::from_secs(4),
            attach_wait: Duration::from_secs(8),
            node_validity: NODE_VALIDITY,
            operator_validity: OPERATOR_VALIDITY,
        }
    }
}

impl Timings {
    /// Says which relation between the durations is broken, if one is.
    ///
    /// # Errors
    /// A sentence for the person who wrote the configuration.
    pub fn check(&self) -> Result<(), String> {
        if self.heartbeat_interval.is_zero() {
            return Err("heartbeat_interval must be longer than nothing".to_owned());
        }
        if self.heartbeat_timeout < 2 * self.heartbeat_interval {
            return Err(
                "heartbeat_timeout must be at least twice heartbeat_interval, or one lost message ends a \
                        session"
                    .to_owned(),
            );
        }
        if self.max_staleness < Duration::from_secs(1) {
            return Err("max_staleness must be at least a second: elections take as long".to_owned());
        }
        if self.suspect_for.is_zero() {
            return Err("suspect_for must be longer than nothing, or a moving node is offline".to_owned());
        }
        Ok(())
    }

    /// [`Timings::lost_after`] as the state has it.
    pub(crate) fn lost_after_ms(&self) -> u64 {
        self.lost_after
            .map_or(palyra_state::limits::NEVER, crate::caller::millis)
    }
}

/// Bounds of what one replica holds in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sessions.
    pub sessions: usize,
    /// Sessions of one device: the live one, and those that ended and are not let go of yet.
    pub sessions_per_device: usize,
    /// Accepted connections, of nodes and operators.
    pub connections: usize,
    /// Messages that wait for one session's reader. Assignments wait as ids, their payloads stay in the
    /// state.
    pub outbound: usize,
    /// Results of one session that are being committed at one time.
    pub results_in_flight: usize,
    /// Calls that wait for a dispatch or a pairing request.
    pub waiters: usize,
    /// Readers of the feed.
    pub readers: usize,
    /// Readers of the feed under one identity.
    pub readers_per_identity: usize,
    /// Half-done pairing exchanges.
    pub exchanges: usize,
    /// Half-done pairing exchanges from one address.
    pub exchanges_per_source: usize,
    /// PINs that are being minted at one time; each takes 19 MiB and tens of milliseconds.
    pub minting: usize,
    /// Attaches that are under way at one time: as many as one write of the log takes in well.
    pub attaches: usize,
    /// Nodes that wait for their turn to be attached.
    pub attach_queue: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            sessions: 20_000,
            sessions_per_device: 16,
            connections: 40_000,
            outbound: 2_048,
            results_in_flight: 16,
            waiters: 8_192,
            readers: 24_000,
            readers_per_identity: 64,
            exchanges: 512,
            exchanges_per_source: 32,
            minting: 2,
            attaches: 128,
            attach_queue: 16_384,
        }
    }
}

/// Longest wait for the end of a dispatch.
pub const DISPATCH_WAIT_MAX: Duration = Duration::from_secs(300);
/// Longest wait for the outcome of a pairing, and for messages of a polling node.
pub const POLL_WAIT_MAX: Duration = Duration::from_secs(30);
/// Longest wait for something that a program writes.
pub const LOGS_WAIT_MAX: Duration = Duration::from_secs(30);
/// Dispatches whose output this replica holds.
pub const OUTPUTS: usize = 512;
/// Lines of one dispatch that are held.
pub const OUTPUT_LINES: usize = 512;
/// Bytes of one dispatch's lines that are held.
pub const OUTPUT_BYTES: usize = 64 * 1024;
/// Longest line; longer ones are cut.
pub const OUTPUT_LINE_MAX: usize = 1024;
/// Messages about one dispatch's output that are taken in a second; the node sends five.
pub const OUTPUT_BATCHES: usize = 32;
/// Wait for the enforcement of a revocation when none is asked for.
pub const ENFORCE_WAIT: Duration = Duration::from_secs(10);
/// Longest wait for the enforcement of a revocation.
pub const ENFORCE_WAIT_MAX: Duration = Duration::from_secs(120);
/// How much longer than `max_staleness` after a revocation a silent replica's authority counts as lapsed:
/// clocks of two machines do not run at the same speed, and a replica that is stale notices within
/// [`WATCH_PAUSE`].
pub const LAPSE_MARGIN: Duration = Duration::from_secs(2);
/// How long after its removal a replica counts among those that a revocation has to reach: it serves nodes
/// until it hears of its removal, or is stale.
pub const REMOVED_LINGERS: Duration = Duration::from_secs(120);
/// Longest pause between two looks at the freshness of this replica and at its sessions.
pub const WATCH_PAUSE: Duration = Duration::from_secs(1);
/// How often a replica tells the leader what it holds.
pub const DIGEST_EVERY: Duration = Duration::from_secs(1);
/// Devices that wait to be attached and are named in one digest; more, and the leader gives nobody up meanwhile.
pub const DIGEST_KNOCKING: usize = 1_024;
/// How long a question for the age of what was last heard may take.
pub const SEEN_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause between two goodbyes of a replica that stops, as long as all fit into [`Timings::drain`].
pub const GOODBYE_PAUSE: Duration = Duration::from_millis(2);
/// Over how long the nodes that were sent away at one moment come to another replica.
pub const MOVE_SPREAD: Duration = Duration::from_millis(250);
/// Longest pause between two looks for sessions that nobody holds.
pub const ORPHANS_PAUSE: Duration = Duration::from_secs(2);
/// How long renewals of leases are gathered before they are committed together.
pub const RENEW_EVERY: Duration = Duration::from_millis(250);
/// Renewals that wait; more are asked back.
pub const RENEW_WAITING: usize = 65_536;
/// Challenges that this replica opens at one time by itself.
pub const CHALLENGES: usize = 64;
/// How long a connection may stay whose certificate is not accepted: time to ask and to be told why.
pub const REFUSED_STAY: Duration = Duration::from_secs(5);
/// Life of a half-done pairing exchange, and of a server nonce.
pub const EXCHANGE_LIFE: Duration = Duration::from_millis(palyra_state::limits::ATTEMPT_TTL);
/// Deepest nesting of a payload; what parses it on the node recurses.
pub const JSON_DEPTH: usize = 64;
/// Life of an operator's certificate when none is asked for.
pub const OPERATOR_VALIDITY: Duration = Duration::from_millis(30 * palyra_state::limits::DAY);
/// Longest life of an operator's certificate, in milliseconds.
pub const OPERATOR_TTL_MAX_MS: u64 = 366 * palyra_state::limits::DAY;
/// Life of a node's certificate.
pub const NODE_VALIDITY: Duration = Duration::from_millis(palyra_pki::ca::NODE_VALIDITY_MS);
/// Life of a replica's certificate, in milliseconds: as long as its authority's.
pub const REPLICA_TTL_MS: u64 = palyra_pki::ca::AUTHORITY_VALIDITY_MS;
/// Journal rows that one step of a tail reads.
pub const TAIL_ROWS: usize = 256;
/// Bytes of rows in one message of the feed, unless a single row has more: it must fit a frame of every transport.
pub const EVENT_BYTES: usize = 256 * 1024;
/// Most rows that a tail of the newest begins with; who wants more names a cursor.
pub const NEWEST_ROWS: usize = 4_096;
/// Bytes of one page of nodes; a page that would have more ends early. A registration may have 30 KiB.
pub const PAGE_BYTES: usize = 4 << 20;

const _: () = {
    assert!(ENFORCE_WAIT.as_millis() < ENFORCE_WAIT_MAX.as_millis());
    assert!(OPERATOR_VALIDITY.as_millis() < OPERATOR_TTL_MAX_MS as u128);
    assert!(WATCH_PAUSE.as_millis() < LAPSE_MARGIN.as_millis());
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_hold_and_broken_ones_are_named() {
        assert_eq!(Timings::default().check(), Ok(()));
        let hasty = Timings {
            heartbeat_timeout: Duration::from_secs(3),
            ..Timings::default()
        };
        assert!(
            hasty
                .check()
                .is_err_and(|cause| cause.contains("heartbeat_timeout"))
        );
    }
}
