//! The registry of tables: each has a tag that is its keys' first byte and is never reused, even when a table
//! goes.
//!
//! Keys are big endian, so that tables are ordered by number and by time. Nothing else in the crate makes
//! keys.

use std::marker::PhantomData;
use std::ops::ControlFlow;

use bytes::Bytes;

use crate::ids::{Digest, Id};
use crate::read::{Read, Visit};
use crate::{
    access, approvals, ca, cluster, dedup, dispatch, fleet, identity, journal, leases, meta, nodes, pairing,
};

/// Bookkeeping of the state machine: clock, position, hash, journal head.
pub const META: Table<meta::Meta> = Table::new(0x01, "meta");
/// Remembered requests by (actor, request id).
pub const REQUESTS_SEEN: Table<dedup::Seen> = Table::new(0x02, "requests_seen");
/// Remembered requests by (age, request id, actor): the order in which they are forgotten.
pub const REQUESTS_BY_AGE: Table<Present> = Table::new(0x03, "requests_by_age");
/// What is remembered of each actor's requests.
pub const REQUESTERS: Table<dedup::Requester> = Table::new(0x04, "requesters");
/// Journal rows by cursor.
pub const JOURNAL: Table<journal::Row> = Table::new(0x05, "journal");

/// Tags of tables that every entry looks into and that have few keys: see [`crate::limits::DEDUP_MAX`]. Whoever applies
/// may keep them in memory whole.
pub const HOT: [u8; 2] = [0x02, 0x03];

/// The cluster.
pub const CLUSTER: Table<cluster::Cluster> = Table::new(0x10, "cluster");
/// Replicas by id.
pub const REPLICAS: Table<cluster::Replica> = Table::new(0x11, "replicas");
/// Join tokens by id.
pub const JOIN_TOKENS: Table<cluster::JoinToken> = Table::new(0x12, "join_tokens");

/// Operators by name.
pub const OPERATORS: Table<access::Operator> = Table::new(0x18, "operators");

/// Devices by id.
pub const DEVICES: Table<identity::Device> = Table::new(0x20, "devices");
/// Certificates by fingerprint.
pub const CERTIFICATES: Table<identity::Certificate> = Table::new(0x21, "certificates");
/// Fingerprints by (kind, subject).
pub const CERTIFICATES_OF: Table<Present> = Table::new(0x22, "certificates_of");
/// Device ids by public key, revoked ones included.
pub const DEVICE_KEYS: Table<identity::KeyOwner> = Table::new(0x23, "device_keys");
/// What the whole cluster holds certificates to.
pub const CERTIFICATE_POLICY: Table<identity::CertificatePolicy> = Table::new(0x24, "certificate_policy");
/// Removed devices by id.
pub const BANS: Table<identity::Ban> = Table::new(0x26, "bans");
/// Removed devices whose certificates have not been forgotten, by (when they have expired, device id).
pub const BANS_DUE: Table<Present> = Table::new(0x27, "bans_due");

/// Pairing codes by id.
pub const CODES: Table<pairing::Code> = Table::new(0x28, "codes");
/// Ids of open codes.
pub const CODES_OPEN: Table<Present> = Table::new(0x29, "codes_open");
/// Pairing requests by id.
pub const PAIRINGS: Table<pairing::Request> = Table::new(0x2A, "pairings");
/// Ids of pending pairing requests by device id.
pub const PAIRINGS_PENDING: Table<pairing::Pending> = Table::new(0x2B, "pairings_pending");
/// Counters of pairing.
pub const PAIRING_TOTALS: Table<pairing::Totals> = Table::new(0x2C, "pairing_totals");

/// Nodes by device id.
pub const NODES: Table<nodes::Node> = Table::new(0x30, "nodes");
/// Device ids of live sessions by replica.
pub const SESSIONS_OF: Table<Present> = Table::new(0x31, "sessions_of");
/// Counters of the registry.
pub const NODE_TOTALS: Table<nodes::Totals> = Table::new(0x32, "node_totals");
/// Device ids by (time, device id) of nodes whose status time alone changes then.
pub const NODES_DUE: Table<Present> = Table::new(0x33, "nodes_due");
/// Device ids by (status, device id).
pub const NODES_BY_STATUS: Table<Present> = Table::new(0x34, "nodes_by_status");
/// How many sessions each replica holds, by replica.
pub const SESSION_COUNTS: Table<nodes::SessionCount> = Table::new(0x35, "session_counts");

/// Dispatches by id.
pub const DISPATCHES: Table<dispatch::Dispatch> = Table::new(0x38, "dispatches");
/// Payloads by dispatch id.
pub const PAYLOADS: Table<Blob> = Table::new(0x39, "payloads");
/// Results by dispatch id.
pub const RESULTS: Table<Blob> = Table::new(0x3A, "results");
/// Open dispatches by (device id, dispatch id).
pub const QUEUES: Table<Present> = Table::new(0x3B, "queues");
/// How long each queue is, by device id.
pub const QUEUE_LENGTHS: Table<dispatch::QueueLength> = Table::new(0x3C, "queue_lengths");
/// Open dispatches by (deadline, dispatch id).
pub const DEADLINES: Table<Present> = Table::new(0x3D, "deadlines");
/// All dispatches by (state, dispatch id).
pub const DISPATCHES_BY_STATE: Table<Present> = Table::new(0x3E, "dispatches_by_state");
/// All dispatches by (device id, dispatch id).
pub const DISPATCHES_OF: Table<Present> = Table::new(0x3F, "dispatches_of");
/// Ended dispatches by (end, dispatch id): the order in which they are forgotten.
pub const FINISHED: Table<Present> = Table::new(0x40, "finished");
/// Counters of dispatches.
pub const DISPATCH_TOTALS: Table<dispatch::Totals> = Table::new(0x41, "dispatch_totals");
/// Dispatches that wait for a slot, by (device id, capability, rank, order, dispatch id): the order in which they go.
pub const WAITING: Table<Present> = Table::new(0x42, "waiting");
/// Dispatches that wait for their next attempt, by (first moment for it, dispatch id).
pub const DELAYED: Table<Present> = Table::new(0x43, "delayed");
/// How many dispatches are with a node, and how many wait, by (device id, capability).
pub const LOADS: Table<dispatch::Load> = Table::new(0x44, "loads");
/// Last lines of programs by dispatch id.
pub const LOG_TAILS: Table<Blob> = Table::new(0x45, "log_tails");

/// Where the authorities stand.
pub const CA: Table<ca::Ca> = Table::new(0x48, "ca");
/// Roots by number, retired ones too.
pub const ROOTS: Table<ca::Root> = Table::new(0x49, "roots");
/// Authorities by (replica, number).
pub const AUTHORITIES: Table<ca::Authority> = Table::new(0x4A, "authorities");
/// What devices acknowledged, by id.
pub const DEVICE_ACKS: Table<ca::Ack> = Table::new(0x4B, "device_acks");
/// What operators and replicas acknowledged, by (kind, name).
pub const MEMBER_ACKS: Table<ca::Ack> = Table::new(0x4C, "member_acks");
/// Published lists of revoked certificates by (replica or 0 for a root, number).
pub const CRLS: Table<ca::Crl> = Table::new(0x4D, "crls");
/// Certificates that were issued by ((replica, number, end), fingerprint), until some time after they expired.
pub const ISSUED: Table<Present> = Table::new(0x4E, "issued");
/// Certificates that were revoked by ((replica, number, end), fingerprint), until some time after they expired.
pub const REVOKED: Table<ca::RevokedCertificate> = Table::new(0x4F, "revoked");

/// What workers are held to.
pub const FLEET_POLICY: Table<fleet::Policy> = Table::new(0x50, "fleet_policy");
/// Workers by id.
pub const WORKERS: Table<fleet::Worker> = Table::new(0x51, "workers");
/// Workers by (lifecycle, id).
pub const WORKERS_BY_LIFECYCLE: Table<Present> = Table::new(0x52, "workers_by_lifecycle");
/// Workers by (when time alone changes something of them, id).
pub const WORKERS_DUE: Table<Present> = Table::new(0x53, "workers_due");
/// Workers that may be given a tool now, by (tool, 255 - evidence, slots used, newest fence, id): the order in
/// which they are asked.
pub const WORKERS_READY: Table<Present> = Table::new(0x54, "workers_ready");
/// Counters of the fleet.
pub const FLEET_TOTALS: Table<fleet::Totals> = Table::new(0x55, "fleet_totals");
/// Workers by (version of the policy that they were last checked against, id), of those with an accepted statement.
pub const WORKERS_CHECKED: Table<Present> = Table::new(0x56, "workers_checked");

/// Runs by id.
pub const RUNS: Table<leases::Run> = Table::new(0x58, "runs");
/// Parameters by run id.
pub const RUN_PARAMS: Table<Blob> = Table::new(0x59, "run_params");
/// Results by run id.
pub const RUN_RESULTS: Table<Blob> = Table::new(0x5A, "run_results");
/// Last lines of programs by run id.
pub const RUN_LOG_TAILS: Table<Blob> = Table::new(0x5B, "run_log_tails");
/// Runs that wait for a worker, by (tool, what they ask of a worker, order, id).
pub const RUNS_QUEUED: Table<Present> = Table::new(0x5C, "runs_queued");
/// All runs by (state, id).
pub const RUNS_BY_STATE: Table<Present> = Table::new(0x5D, "runs_by_state");
/// Runs that have not ended by (deadline, id).
pub const RUNS_DUE: Table<Present> = Table::new(0x5E, "runs_due");
/// Ended runs by (end, id): the order in which they are forgotten.
pub const RUNS_ENDED: Table<Present> = Table::new(0x5F, "runs_ended");
/// Leases by id.
pub const LEASES: Table<leases::Lease> = Table::new(0x60, "leases");
/// Leases that have not ended by (deadline, id).
pub const LEASES_DUE: Table<Present> = Table::new(0x61, "leases_due");
/// Leases that have not ended by (worker, slot).
pub const SLOTS: Table<leases::LeaseRef> = Table::new(0x62, "slots");
/// All leases by (run, id).
pub const LEASES_OF: Table<Present> = Table::new(0x63, "leases_of");
/// Ended leases by (worker, end, id).
pub const LEASES_ENDED: Table<Present> = Table::new(0x64, "leases_ended");
/// Counters of runs and leases.
pub const LEASE_TOTALS: Table<leases::Totals> = Table::new(0x65, "lease_totals");
/// Pieces of files by (run, digest, number).
pub const ARTIFACT_CHUNKS: Table<Blob> = Table::new(0x66, "artifact_chunks");
/// Files by (run, digest).
pub const ARTIFACTS: Table<leases::Artifact> = Table::new(0x67, "artifacts");

/// Approvals by id.
pub const APPROVALS: Table<approvals::Approval> = Table::new(0x68, "approvals");
/// All approvals by (state, id).
pub const APPROVALS_BY_STATE: Table<Present> = Table::new(0x69, "approvals_by_state");
/// Approvals of grants that wait or stand, by (when that ends, id).
pub const APPROVALS_DUE: Table<Present> = Table::new(0x6A, "approvals_due");
/// Decisions that cover more than what was asked, by (operator, tool, session or nothing, risk,
/// u64::MAX - end, id): those that last are first.
pub const APPROVALS_STANDING: Table<Present> = Table::new(0x6B, "approvals_standing");
/// Grants by id.
pub const GRANTS: Table<approvals::Grant> = Table::new(0x6C, "grants");
/// Ids of grants by run.
pub const GRANTS_OF_RUNS: Table<approvals::GrantOfRun> = Table::new(0x6D, "grants_of_runs");
/// Grants that are pending or active by (end, id).
pub const GRANTS_DUE: Table<Present> = Table::new(0x6E, "grants_due");
/// What approvals are held to.
pub const APPROVAL_POLICY: Table<approvals::Policy> = Table::new(0x6F, "approval_policy");
/// Counters of approvals and grants.
pub const APPROVAL_TOTALS: Table<approvals::Totals> = Table::new(0x70, "approval_totals");
/// Approvals that were decided or ended, by (when nothing can rest on them any more, id): the order in which they are
/// forgotten.
pub const APPROVALS_ENDED: Table<Present> = Table::new(0x71, "approvals_ended");
/// Grants that were used or ended, by (when, id): the order in which they are forgotten.
pub const GRANTS_ENDED: Table<Present> = Table::new(0x72, "grants_ended");
/// Grants that are pending or active by (operator, id).
pub const GRANTS_LIVE_OF: Table<Present> = Table::new(0x73, "grants_live_of");
/// All grants by (state, id).
pub const GRANTS_BY_STATE: Table<Present> = Table::new(0x74, "grants_by_state");

/// Tag and name of every table, in order of tags.
pub const ALL: &[(u8, &str)] = &[
    META.entry(),
    REQUESTS_SEEN.entry(),
    REQUESTS_BY_AGE.entry(),
    REQUESTERS.entry(),
    JOURNAL.entry(),
    CLUSTER.entry(),
    REPLICAS.entry(),
    JOIN_TOKENS.entry(),
    OPERATORS.entry(),
    DEVICES.entry(),
    CERTIFICATES.entry(),
    CERTIFICATES_OF.entry(),
    DEVICE_KEYS.entry(),
    CERTIFICATE_POLICY.entry(),
    BANS.entry(),
    BANS_DUE.entry(),
    CODES.entry(),
    CODES_OPEN.entry(),
    PAIRINGS.entry(),
    PAIRINGS_PENDING.entry(),
    PAIRING_TOTALS.entry(),
    NODES.entry(),
    SESSIONS_OF.entry(),
    NODE_TOTALS.entry(),
    NODES_DUE.entry(),
    NODES_BY_STATUS.entry(),
    SESSION_COUNTS.entry(),
    DISPATCHES.entry(),
    PAYLOADS.entry(),
    RESULTS.entry(),
    QUEUES.entry(),
    QUEUE_LENGTHS.entry(),
    DEADLINES.entry(),
    DISPATCHES_BY_STATE.entry(),
    DISPATCHES_OF.entry(),
    FINISHED.entry(),
    DISPATCH_TOTALS.entry(),
    WAITING.entry(),
    DELAYED.entry(),
    LOADS.entry(),
    LOG_TAILS.entry(),
    CA.entry(),
    ROOTS.entry(),
    AUTHORITIES.entry(),
    DEVICE_ACKS.entry(),
    MEMBER_ACKS.entry(),
    CRLS.entry(),
    ISSUED.entry(),
    REVOKED.entry(),
    FLEET_POLICY.entry(),
    WORKERS.entry(),
    WORKERS_BY_LIFECYCLE.entry(),
    WORKERS_DUE.entry(),
    WORKERS_READY.entry(),
    FLEET_TOTALS.entry(),
    WORKERS_CHECKED.entry(),
    RUNS.entry(),
    RUN_PARAMS.entry(),
    RUN_RESULTS.entry(),
    RUN_LOG_TAILS.entry(),
    RUNS_QUEUED.entry(),
    RUNS_BY_STATE.entry(),
    RUNS_DUE.entry(),
    RUNS_ENDED.entry(),
    LEASES.entry(),
    LEASES_DUE.entry(),
    SLOTS.entry(),
    LEASES_OF.entry(),
    LEASES_ENDED.entry(),
    LEASE_TOTALS.entry(),
    ARTIFACT_CHUNKS.entry(),
    ARTIFACTS.entry(),
    APPROVALS.entry(),
    APPROVALS_BY_STATE.entry(),
    APPROVALS_DUE.entry(),
    APPROVALS_STANDING.entry(),
    GRANTS.entry(),
    GRANTS_OF_RUNS.entry(),
    GRANTS_DUE.entry(),
    APPROVAL_POLICY.entry(),
    APPROVAL_TOTALS.entry(),
    APPROVALS_ENDED.entry(),
    GRANTS_ENDED.entry(),
    GRANTS_LIVE_OF.entry(),
    GRANTS_BY_STATE.entry(),
];

// Tags rise strictly: no two tables share one.
const _: () = {
    let mut at = 1;
    while at < ALL.len() {
        assert!(ALL[at - 1].0 < ALL[at].0);
        at += 1;
    }
};

/// A value that says nothing but that its key is there.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Present {}

/// Bytes beside a record.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Blob {
    /// The bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub bytes: Bytes,
}

/// A table of `V`.
#[derive(Debug)]
pub struct Table<V> {
    tag: u8,
    name: &'static str,
    value: PhantomData<fn() -> V>,
}

/// A key, or the beginning of one.
pub trait Key {
    /// Appends the key's bytes; their order is the order of the keys.
    fn write(&self, out: &mut Vec<u8>);
}

/// A string that another part of the key follows; must not hold a zero byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text<'a>(pub &'a str);

impl Key for () {
    fn write(&self, _out: &mut Vec<u8>) {}
}

impl Key for u32 {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_be_bytes());
    }
}

impl Key for u64 {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_be_bytes());
    }
}

impl Key for Id {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_bytes());
    }
}

impl Key for Digest {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_bytes());
    }
}

impl Key for &str {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.as_bytes());
    }
}

impl Key for Text<'_> {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.0.as_bytes());
        out.push(0);
    }
}

impl<A: Key, B: Key> Key for (A, B) {
    fn write(&self, out: &mut Vec<u8>) {
        self.0.write(out);
        self.1.write(out);
    }
}

impl<A: Key, B: Key, C: Key> Key for (A, B, C) {
    fn write(&self, out: &mut Vec<u8>) {
        self.0.write(out);
        self.1.write(out);
        self.2.write(out);
    }
}

impl<A: Key, B: Key, C: Key, D: Key> Key for (A, B, C, D) {
    fn write(&self, out: &mut Vec<u8>) {
        self.0.write(out);
        self.1.write(out);
        self.2.write(out);
        self.3.write(out);
    }
}

/// The first key after all that begin with `prefix`.
fn end_of(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // Only bytes 0xFF, and no tag is 0xFF.
    vec![u8::MAX; prefix.len() + 1]
}

impl<V: prost::Message + Default> Table<V> {
    const fn new(tag: u8, name: &'static str) -> Table<V> {
        assert!(tag != 0 && tag != u8::MAX);
        Table {
            tag,
            name,
            value: PhantomData,
        }
    }

    const fn entry(&self) -> (u8, &'static str) {
        (self.tag, self.name)
    }

    /// Its name, for people.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The full key of a row, or the common beginning of several.
    pub fn key(&self, key: impl Key) -> Vec<u8> {
        let mut out = Vec::with_capacity(48);
        out.push(self.tag);
        key.write(&mut out);
        out
    }

    /// A stored value. One that does not decode ends the replica: going on would let it differ from the
    /// others.
    pub fn decode(&self, bytes: &[u8]) -> V {
        match V::decode(bytes) {
            Ok(value) => value,
            Err(error) => panic!("table {} holds a record that does not decode: {error}", self.name),
        }
    }

    /// The row under `key`.
    pub fn get(&self, r: &dyn Read, key: impl Key) -> Option<V> {
        r.get(&self.key(key)).map(|bytes| self.decode(&bytes))
    }

    /// Whether there is a row under `key`.
    pub fn has(&self, r: &dyn Read, key: impl Key) -> bool {
        r.get(&self.key(key)).is_some()
    }

    /// Visits rows whose key begins with `prefix` and is above `after`; the callback gets the key behind the
    /// prefix.
    pub fn visit(&self, r: &dyn Read, prefix: impl Key, after: Option<&[u8]>, visit: &mut Visit<'_>) {
        let prefix = self.key(prefix);
        let mut from = prefix.clone();
        if let Some(after) = after {
            from.extend_from_slice(after);
            from.push(0); // the key right behind `after`
        }
        r.scan(&from, &end_of(&prefix), &mut |key, value| {
            visit(&key[prefix.len()..], value)
        });
    }

    /// Rows whose key begins with `prefix`, at most `limit`.
    pub fn list(&self, r: &dyn Read, prefix: impl Key, limit: usize) -> Vec<V> {
        self.page(r, prefix, None::<()>, limit)
    }

    /// Rows whose key begins with `prefix`, from the one after `after` on, at most `limit`.
    pub fn page(&self, r: &dyn Read, prefix: impl Key, after: Option<impl Key>, limit: usize) -> Vec<V> {
        let after = after.map(|after| bytes_of(&after));
        let mut rows = Vec::new();
        self.visit(r, prefix, after.as_deref(), &mut |_, value| {
            if rows.len() >= limit {
                return ControlFlow::Break(());
            }
            rows.push(self.decode(value));
            ControlFlow::Continue(())
        });
        rows
    }

    /// Rows with keys from `first` to `last`, both included, at most `limit`.
    pub fn between(&self, r: &dyn Read, first: impl Key, last: impl Key, limit: usize) -> Vec<V> {
        let mut rows = Vec::new();
        r.scan(&self.key(first), &end_of(&self.key(last)), &mut |_, value| {
            if rows.len() >= limit {
                return ControlFlow::Break(());
            }
            rows.push(self.decode(value));
            ControlFlow::Continue(())
        });
        rows
    }

    /// What follows `prefix` in the keys that begin with it, at most `limit`.
    pub fn suffixes(&self, r: &dyn Read, prefix: impl Key, limit: usize) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        self.visit(r, prefix, None, &mut |key, _| {
            if found.len() >= limit {
                return ControlFlow::Break(());
            }
            found.push(key.to_vec());
            ControlFlow::Continue(())
        });
        found
    }

    /// The ids that follow `prefix` in the keys, from the one after `after` on, at most `limit`.
    pub fn ids(&self, r: &dyn Read, prefix: impl Key, after: Option<Id>, limit: usize) -> Vec<Id> {
        let after = after.map(Id::to_bytes);
        let mut found = Vec::new();
        self.visit(
            r,
            prefix,
            after.as_ref().map(|bytes| bytes.as_slice()),
            &mut |key, _| {
                if found.len() >= limit {
                    return ControlFlow::Break(());
                }
                found.extend(Id::from_slice(key));
                ControlFlow::Continue(())
            },
        );
        found
    }
}

fn bytes_of(key: &impl Key) -> Vec<u8> {
    let mut out = Vec::new();
    key.write(&mut out);
    out
}
