//! Golden samples of runs and leases: commands, records, replies, enums, and the key of the queue.

use std::collections::BTreeMap;

use bytes::Bytes;
use palyra_state::dispatch::{Effect, Failure};
use palyra_state::fleet::Evidence;
use palyra_state::leases::{self, EndReason, HeldState, Lease, LeaseState, Outcome, Run, RunState};
use palyra_state::reply::{self, Reply};
use palyra_state::{Code, Command, Digest, Reject, tables};

use super::records::{add, id, text};

fn manifest() -> leases::Manifest {
    leases::Manifest {
        entries: vec![leases::ManifestEntry {
            path: text("in/a"),
            digest: Digest::of(b"a"),
            size: 1,
            stored: true,
            executable: true,
        }],
    }
}

fn scope() -> leases::Scope {
    leases::Scope {
        root: text("repo"),
        allowed: vec![text("src")],
        read_only: vec![text("lib")],
    }
}

fn limits() -> leases::Limits {
    leases::Limits {
        memory_bytes: 1,
        processes: 2,
        disk_bytes: 3,
        cpu_percent: 4,
        open_files: 5,
        network: true,
    }
}

fn failure() -> Failure {
    Failure {
        code: text("exit_status"),
        message: text("exit 1"),
    }
}

fn lease_ref() -> leases::LeaseRef {
    leases::LeaseRef {
        lease_id: id(2),
        fence: 3,
        worker_id: id(4),
        epoch: 5,
    }
}

fn start() -> leases::StartRun {
    leases::StartRun {
        run_id: id(1),
        tool: text("build"),
        params: Bytes::from_static(b"{}"),
        inputs: Some(manifest()),
        scope: Some(scope()),
        limits: Some(limits()),
        effect: Effect::Idempotent as i32,
        max_attempts: 2,
        ttl_ms: 3,
        timeout_ms: 4,
        min_evidence: Evidence::Hardware as i32,
        labels: BTreeMap::from([(text("site"), text("lab"))]),
    }
}

fn finish() -> leases::Finish {
    leases::Finish {
        lease_id: id(2),
        fence: 3,
        outcome: Outcome::Failed as i32,
        exit_code: Some(-9),
        result: Bytes::from_static(b"{}"),
        outputs: Some(manifest()),
        error: Some(failure()),
        log_tail: Bytes::from_static(b"the end"),
        usage: BTreeMap::from([(text("cpu_ms"), 7)]),
        sandbox: vec![text("landlock:7")],
    }
}

/// One of each, in the order of the domain's actions.
pub(super) fn commands() -> Vec<Command> {
    vec![
        start().into(),
        leases::PutArtifact {
            run_id: id(1),
            digest: Digest::of(b"a"),
            size: 1,
            offset: 0,
            chunk: Bytes::from_static(b"a"),
            lease_id: Some(id(2)),
            fence: 3,
        }
        .into(),
        leases::CancelRun {
            run_id: id(1),
            reason: text("no"),
        }
        .into(),
        leases::Accept {
            lease_id: id(2),
            fence: 3,
            epoch: 4,
        }
        .into(),
        leases::Renew {
            leases: vec![lease_ref()],
        }
        .into(),
        finish().into(),
        leases::Cleaned {
            lease_id: id(2),
            fence: 3,
            ok: true,
            message: text("all of it"),
            removed_files: 4,
            removed_bytes: 5,
        }
        .into(),
        leases::RevokeLease {
            lease_id: id(2),
            reason: text("no"),
        }
        .into(),
        leases::Expire {
            leases: vec![id(2)],
            runs: vec![id(1)],
        }
        .into(),
        leases::Reconcile {
            worker_id: id(4),
            epoch: 5,
            held: vec![leases::Held {
                lease_id: id(2),
                fence: 3,
                state: HeldState::Unclean as i32,
                message: text("busy"),
            }],
        }
        .into(),
    ]
}

fn run() -> Run {
    Run {
        id: id(1),
        tool: text("build"),
        grant_id: id(2),
        state: RunState::Fenced as i32,
        requested_by: text("operator/alice"),
        effect: Effect::Idempotent as i32,
        attempt: 2,
        max_attempts: 3,
        submitted_at: 4,
        deadline_at: 5,
        ended_at: 6,
        ttl: 7,
        lease_id: Some(id(8)),
        worker_id: Some(id(9)),
        fence: 10,
        inputs: Some(manifest()),
        outputs: Some(manifest()),
        scope: Some(scope()),
        limits: Some(limits()),
        exit_code: Some(-9),
        error: Some(failure()),
        attempts: vec![leases::Attempt {
            number: 1,
            lease_id: id(8),
            worker_id: id(9),
            fence: 3,
            leased_at: 4,
            ended_at: 5,
            why: text("expired"),
        }],
        min_evidence: Evidence::Supervisor as i32,
        labels: BTreeMap::from([(text("site"), text("lab"))]),
        usage: BTreeMap::from([(text("cpu_ms"), 7)]),
        sandbox: vec![text("landlock:7")],
        reason: text("no"),
        cancelled_by: text("operator/bob"),
        order: 29,
        params_size: 30,
        result_size: 31,
        artifact_bytes: 32,
        tried: 1,
        tail_size: 34,
    }
}

fn lease() -> Lease {
    Lease {
        id: id(8),
        run_id: id(1),
        attempt: 2,
        worker_id: id(9),
        slot: 3,
        fence: 10,
        state: LeaseState::Ended as i32,
        ttl: 8,
        granted_at: 9,
        deadline_at: 10,
        renewed_at: 11,
        renewals: 12,
        epoch: 13,
        replica_id: 14,
        end_reason: EndReason::RunDeadline as i32,
        ended_by: text("system"),
        ending_at: 17,
        ended_at: 18,
        cleanup: Some(leases::Cleanup {
            at: 1,
            ok: true,
            message: text("all of it"),
            removed_files: 4,
            removed_bytes: 5,
            by: text("node/x"),
        }),
        tool: text("build"),
        accepted_at: 21,
        run_deadline_at: 22,
    }
}

pub(super) fn records(all: &mut BTreeMap<String, Vec<u8>>) {
    add(all, "record.run", &run());
    add(all, "record.lease", &lease());
    add(all, "record.slot", &lease_ref());
    let artifact = leases::Artifact {
        digest: Digest::of(b"a"),
        size: 1,
        received: 1,
        complete: true,
        fence: 5,
    };
    add(all, "record.artifact", &artifact);
    let totals = leases::Totals {
        live: 1,
        ended: 2,
        last_fence: 3,
        runs: vec![4, 5],
        artifact_bytes: 5,
        open_bytes: 6,
        ended_bytes: 7,
        open_artifact_bytes: 8,
        ended_oldest: 9,
    };
    add(all, "record.lease_totals", &totals);
    let queued = tables::RUNS_QUEUED.key((tables::Text("build"), 258u64, 259u64, id(1)));
    all.insert("key.run_queued".to_owned(), queued);
    all.insert("key.slot".to_owned(), tables::SLOTS.key((id(1), 3u32)));
    let chunk = tables::ARTIFACT_CHUNKS.key((id(1), Digest::of(b"a"), 3u32));
    all.insert("key.artifact_chunk".to_owned(), chunk);
}

pub(super) fn replies() -> Vec<(&'static str, Reply)> {
    let refusal = || Some(Reject::new(Code::NoSuchLease, [&id(2)]));
    vec![
        (
            "run_started",
            Reply::RunStarted(reply::RunStarted {
                run_id: id(1),
                state: RunState::Leased as i32,
                deadline_at: 3,
            }),
        ),
        (
            "artifact_received",
            Reply::ArtifactReceived(reply::ArtifactReceived {
                received: 1,
                complete: true,
                refusal: refusal(),
            }),
        ),
        (
            "leases_renewed",
            Reply::LeasesRenewed(reply::LeasesRenewed {
                renewals: vec![reply::Renewal {
                    lease_id: id(2),
                    deadline_at: 3,
                    refusal: refusal(),
                }],
            }),
        ),
        (
            "reconciled",
            Reply::Reconciled(reply::Reconciled {
                keep: vec![id(1)],
                end: vec![reply::MustEnd {
                    lease_id: id(2),
                    fence: 3,
                    reason: text("unclean"),
                }],
            }),
        ),
    ]
}
