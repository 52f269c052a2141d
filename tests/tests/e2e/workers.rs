//! Runs on real workers, through the death of whoever takes part: from the grant to the slot that is free again.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use palyra_proto::approval::v1::{DecideRequest, ListApprovalsRequest};
use palyra_proto::node::v1::RevokeDeviceRequest;
use palyra_proto::run::v1::{GetLeaseRequest, LeaseInfo, ListLeasesRequest, RunInfo, StartRequest};
use palyra_tests::cluster::{Answer, Cluster, binary, eventually};
use palyra_tests::node::{Agent, identity};
use palyra_tests::worker::Shop;

use crate::dispatch::retire;

/// A worker of this test that may be given work.
struct Working {
    dir: PathBuf,
    id: String,
    agent: Agent,
    shop: Shop,
}

async fn working(cluster: &Cluster, name: &str, slots: u32) -> Working {
    let shop = Shop::open(cluster, name, slots);
    cluster.admit(&shop).await;
    let dir = cluster.pair_node(name).await;
    let (id, _) = identity(&dir);
    let agent = cluster.start_worker(&dir, &shop);
    cluster.worker_is(&id, "available").await;
    Working { dir, id, agent, shop }
}

/// Two tables whose second column sums up to 42.
fn tables(cluster: &Cluster, name: &str) -> PathBuf {
    let dir = cluster.path().join(format!("tables-{name}"));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("a.csv"), "x,2\ny,30\n").unwrap();
    std::fs::write(dir.join("b.csv"), "z,10\n").unwrap();
    dir
}

/// A command of `palyra` that runs beside the test.
struct Beside {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Beside {
    fn begin(cluster: &Cluster, name: &str, arguments: &[&str]) -> Self {
        let (out, err) = (
            cluster.path().join(format!("logs/{name}.stdout")),
            cluster.path().join(format!("logs/{name}.stderr")),
        );
        let child = Command::new(binary("palyra"))
            .args(arguments)
            .env("PALYRA_HOME", cluster.operator_home())
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&out).unwrap())
            .stderr(std::fs::File::create(&err).unwrap())
            .spawn()
            .unwrap();
        Self { child, out, err }
    }

    async fn ended(mut self) -> Answer {
        let status = eventually("the end of palyra", async || self.child.try_wait().unwrap()).await;
        Answer {
            code: status.code().unwrap_or(-1),
            out: std::fs::read_to_string(&self.out).unwrap(),
            err: std::fs::read_to_string(&self.err).unwrap(),
        }
    }
}

/// Allows what waits for an approval of a grant, at whichever replica.
async fn allow_next(cluster: &Cluster) {
    let client = cluster.client();
    let id = eventually("an approval of a grant", async || {
        let request = ListApprovalsRequest {
            subject: "grant".to_owned(),
            ..ListApprovalsRequest::default()
        };
        let listed = client.list_approvals(request).await.ok()?;
        listed.approvals.into_iter().next().map(|approval| approval.id)
    })
    .await;
    let decide = DecideRequest {
        id,
        decision: "allow".to_owned(),
        reason: "a test".to_owned(),
        ..DecideRequest::default()
    };
    client.decide_approval(decide).await.unwrap();
}

async fn lease(cluster: &Cluster, id: &str) -> LeaseInfo {
    let request = GetLeaseRequest {
        id: id.to_owned(),
        read: None,
    };
    cluster.client().get_lease(request).await.unwrap().lease.unwrap()
}

async fn lease_is(cluster: &Cluster, id: &str, state: &str) -> LeaseInfo {
    eventually(&format!("lease {id} to be {state}"), async || {
        Some(lease(cluster, id).await).filter(|lease| lease.state == state)
    })
    .await
}

/// A run that takes `steps` times 200 ms, permitted and started.
async fn started(cluster: &Cluster, steps: u32, effect: &str, ttl_ms: u64) -> RunInfo {
    let grant = cluster.granted("csv.sum").await;
    let request = StartRequest {
        run_id: grant.run_id,
        tool: "csv.sum".to_owned(),
        params: format!("{{\"steps\": {steps}}}").into(),
        effect: effect.to_owned(),
        ttl_ms,
        ..StartRequest::default()
    };
    let run = cluster.client().start_run(request).await.unwrap().run.unwrap();
    cluster
        .run_is(&run.id, "to run", |run| run.state == "running")
        .await
}

/// The actions that the journal has of one subject, in their order.
fn actions(cluster: &Cluster, subject: &str) -> Vec<String> {
    let tail = cluster
        .palyra(&["journal", "tail", "--subject", subject, "-o", "jsonl"])
        .ok();
    tail.out
        .lines()
        .map(|line| {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            row["action"].as_str().unwrap().to_owned()
        })
        .collect()
}

fn sum(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

/// What starts the run of two tables.
fn starting(tables: &Path, results: &Path) -> Vec<String> {
    let words = "run start --tool csv.sum --evidence supervisor --ttl 15s --follow -o json --summary sums";
    let mut words: Vec<String> = words.split(' ').map(str::to_owned).collect();
    words.extend(["--params".to_owned(), "{\"steps\": 30}".to_owned()]);
    for table in ["a.csv", "b.csv"] {
        words.extend(["--input".to_owned(), tables.join(table).display().to_string()]);
    }
    words.extend(["--output-dir".to_owned(), results.display().to_string()]);
    words
}

/// From the grant to the slot that is free again, with real files in and out, while the leader dies.
pub(crate) async fn a_run_survives_the_leader(cluster: &mut Cluster) {
    let worker = working(cluster, "summer", 1).await;
    let tables = tables(cluster, "summer");
    let results = cluster.path().join("results-summer");
    let start = starting(&tables, &results);
    let start: Vec<&str> = start.iter().map(String::as_str).collect();
    let command = Beside::begin(cluster, "run-start", &start);
    allow_next(cluster).await;
    let client = cluster.client();
    let run = eventually("the run", async || {
        let listed = client
            .list_runs(palyra_proto::run::v1::ListRunsRequest::default())
            .await
            .ok()?;
        listed.runs.into_iter().find(|run| run.state == "running")
    })
    .await;
    let before = lease(cluster, &run.lease_id).await;
    let leader = cluster.client().status().await.unwrap().leader_id;
    cluster.kill(leader);
    let answer = command.ended().await.ok();
    cluster.start_replica(leader);
    assert_eq!(
        (
            answer.field("state"),
            answer.field("attempt"),
            answer.field("fence")
        ),
        ("succeeded".into(), 1.into(), before.fence.into()),
        "{}",
        answer.out
    );
    assert_eq!(answer.field("result"), serde_json::json!({"sum": 42}));
    assert_eq!(sum(&results.join("sum.json")), "{\"sum\":42}");
    assert!(answer.err.contains("step 1 of attempt 1"), "{}", answer.err);
    let after = lease_is(cluster, &run.lease_id, "ended").await;
    assert_eq!(
        (after.end_reason.as_str(), after.fence, after.granted_at_ms),
        ("finished", before.fence, before.granted_at_ms)
    );
    assert!(after.cleanup.unwrap().ok, "its worker said that it is clean");
    let idle = cluster.worker_is(&worker.id, "available").await;
    assert_eq!((idle.slots_used, idle.unclean.len()), (0, 0));
    let told = actions(cluster, &run.lease_id);
    let order = ["lease.granted", "lease.accepted", "lease.ending", "lease.ended"];
    let seen: Vec<&String> = told
        .iter()
        .filter(|told| order.contains(&told.as_str()))
        .collect();
    assert_eq!(seen, order, "{told:?}");
    cluster
        .becomes("all three replicas", |status| {
            status.replicas.iter().filter(|replica| replica.reachable).count() == 3
        })
        .await;
    retire(cluster, &worker.id).await;
}

/// A worker that dies is fenced: its run goes on elsewhere only when its lease is over, and then under a higher fence.
pub(crate) async fn a_dead_workers_run_goes_on_elsewhere(cluster: &mut Cluster) {
    let mut first = working(cluster, "mortal-1", 1).await;
    let run = started(cluster, 60, "idempotent", 4_000).await;
    assert_eq!(run.worker_id, first.id);
    let second = working(cluster, "mortal-2", 1).await;
    let before = lease(cluster, &run.lease_id).await;
    first.agent.kill();
    let again = cluster
        .run_is(&run.id, "to run elsewhere", |run| {
            run.state == "running" && run.attempt == 2
        })
        .await;
    assert_eq!(again.worker_id, second.id);
    let (over, next) = (
        lease(cluster, &before.id).await,
        lease(cluster, &again.lease_id).await,
    );
    assert!(next.fence > over.fence, "{} after {}", next.fence, over.fence);
    assert_eq!(over.state, "ended");
    assert!(
        next.granted_at_ms >= over.deadline_at_ms,
        "granted at {} before the end of the other at {}",
        next.granted_at_ms,
        over.deadline_at_ms
    );
    // The one that was lost comes back: what it has left is cleaned, and said, before it gets work.
    first.agent = cluster.start_worker(&first.dir, &first.shop);
    let back = cluster.worker_is(&first.id, "available").await;
    assert_eq!((back.unclean.len(), back.reconciled), (0, true));
    retire(cluster, &second.id).await;
    // Its worker is revoked: the third attempt is where the first one was, after a restart.
    let third = cluster
        .run_is(&run.id, "to run at the first again", |run| {
            run.state == "running" && run.attempt == 3
        })
        .await;
    assert_eq!(third.worker_id, first.id);
    assert!(third.fence > next.fence);
    let cancel = cluster
        .palyra(&["run", "cancel", &run.id, "--reason", "seen enough", "--wait"])
        .ok();
    assert!(cancel.out.contains("cancelled"), "{}", cancel.out);
    cluster.worker_is(&first.id, "available").await;
    retire(cluster, &first.id).await;
}

/// Lines of a run are followed while it runs; its deadline ends it.
pub(crate) async fn a_runs_lines_are_followed(cluster: &mut Cluster) {
    let worker = working(cluster, "talker", 1).await;
    let run = started(cluster, 8, "once", 10_000).await;
    let followed = Beside::begin(cluster, "run-logs", &["run", "logs", "-f", &run.id]);
    let answer = followed.ended().await.ok();
    let lines: Vec<&str> = answer.out.lines().collect();
    let wanted: Vec<String> = (1..=8).map(|step| format!("step {step} of attempt 1")).collect();
    // Behind them stands what became of it without a table.
    assert_eq!(
        lines.get(..8),
        Some(wanted.iter().map(String::as_str).collect::<Vec<_>>()).as_deref(),
        "{}",
        answer.err
    );
    let got = cluster.palyra(&["run", "wait", &run.id, "-o", "json"]);
    // There was no table to sum: the tool fails, and says so in its exit code and in ours.
    assert_eq!(
        (got.code, got.field("state")),
        (1, "failed".into()),
        "{}",
        got.out
    );
    retire(cluster, &worker.id).await;
}

/// Drained, quarantined, released, reverified: what operators do, and what it ends.
pub(crate) async fn operators_hold_a_worker(cluster: &mut Cluster) {
    let worker = working(cluster, "held", 2).await;
    let run = started(cluster, 12, "once", 10_000).await;
    // The monitor of a drain ends when the worker is empty.
    let drained = Beside::begin(
        cluster,
        "drain",
        &[
            "worker",
            "drain",
            "held",
            "--deadline",
            "1m",
            "--wait",
            "-o",
            "json",
        ],
    );
    let answer = drained.ended().await.ok();
    assert_eq!(answer.field("lifecycle"), "draining");
    assert!(answer.err.contains("1 lease left"), "{}", answer.err);
    cluster
        .run_is(&run.id, "to be over", |run| run.ended_at_ms != 0)
        .await;
    let _ = cluster.palyra(&["worker", "release", "held"]).ok();
    cluster.worker_is(&worker.id, "available").await;
    let run = started(cluster, 100, "once", 10_000).await;
    let asked = cluster.palyra(&["worker", "quarantine", "held", "--reason", "odd"]);
    assert_eq!(asked.code, 2, "{}", asked.err);
    assert!(
        asked.err.contains(&format!("1 lease ends: run {}", run.id)),
        "{}",
        asked.err
    );
    let _ = cluster
        .palyra(&["worker", "quarantine", "held", "--reason", "odd", "--yes"])
        .ok();
    let lost = cluster
        .run_is(&run.id, "to be lost", |run| run.ended_at_ms != 0)
        .await;
    assert_eq!(lost.state, "lost", "a run of effect `once` is not tried again");
    let over = lease_is(cluster, &run.lease_id, "ended").await;
    assert_eq!(over.end_reason, "quarantined");
    let release = cluster.palyra(&["worker", "release", "held"]);
    assert_ne!(
        release.code, 0,
        "a quarantine is lifted by reverify alone: {}",
        release.out
    );
    let passed = cluster
        .palyra(&[
            "worker",
            "reverify",
            "held",
            "--reason",
            "looked at it",
            "--wait",
            "-o",
            "json",
        ])
        .ok();
    assert!(
        passed.field("lifecycle") == "available" || passed.field("lifecycle") == "registered",
        "{}",
        passed.out
    );
    cluster.worker_is(&worker.id, "available").await;
    retire(cluster, &worker.id).await;
}

/// A tool that changed is not run: the worker is quarantined, and comes back when the tool does.
pub(crate) async fn a_changed_tool_is_never_run(cluster: &mut Cluster) {
    let worker = working(cluster, "drifter", 1).await;
    worker
        .shop
        .write_tool("#!/bin/sh\ntouch /tmp/never\necho '{\"sum\":666}'\n");
    let grant = cluster.granted("csv.sum").await;
    let request = StartRequest {
        run_id: grant.run_id,
        tool: "csv.sum".to_owned(),
        effect: "once".to_owned(),
        ..StartRequest::default()
    };
    let run = cluster.client().start_run(request).await.unwrap().run.unwrap();
    let ended = cluster
        .run_is(&run.id, "to be over", |run| run.ended_at_ms != 0)
        .await;
    assert_ne!(ended.state, "succeeded", "{ended:?}");
    assert!(ended.result.is_empty());
    let held = cluster.worker_is(&worker.id, "quarantined").await;
    assert_eq!(held.quarantine.unwrap().cause, "digest_drift");
    let refused = cluster.palyra(&[
        "worker", "reverify", "drifter", "--reason", "try", "--wait", "-o", "json",
    ]);
    assert_eq!(refused.code, 14, "{}\n{}", refused.out, refused.err);
    worker.shop.restore_tool();
    let _ = cluster
        .palyra(&["worker", "reverify", "drifter", "--reason", "put back", "--wait"])
        .ok();
    cluster.worker_is(&worker.id, "available").await;
    let shown = cluster.palyra(&["worker", "attest", "drifter"]).ok();
    for part in [
        "supervisor: the program that starts the tools",
        "good, verified here",
    ] {
        assert!(shown.out.contains(part), "{}", shown.out);
    }
    retire(cluster, &worker.id).await;
}

/// A revoked worker's lease ends in the same entry, and its run with it.
pub(crate) async fn a_revoked_worker_has_nothing(cluster: &mut Cluster) {
    let worker = working(cluster, "outcast", 1).await;
    let run = started(cluster, 200, "once", 3_000).await;
    let revoke = RevokeDeviceRequest {
        device_id: worker.id.clone(),
        reason: "stolen".to_owned(),
        ..RevokeDeviceRequest::default()
    };
    cluster.client().revoke_device(revoke).await.unwrap();
    let end = lease(cluster, &run.lease_id).await;
    assert_eq!(end.end_reason, "device_revoked", "{end:?}");
    let lost = cluster
        .run_is(&run.id, "to be lost", |run| run.ended_at_ms != 0)
        .await;
    assert_eq!(lost.state, "lost");
    let over = lease_is(cluster, &run.lease_id, "ended").await;
    assert!(
        over.ended_at_ms >= over.deadline_at_ms,
        "nobody said that it is clean: {over:?}"
    );
    assert_eq!(cluster.worker_is(&worker.id, "offline").await.leases.len(), 0);
    let live = ListLeasesRequest {
        worker_id: worker.id.clone(),
        ..ListLeasesRequest::default()
    };
    assert!(
        cluster
            .client()
            .list_leases(live)
            .await
            .unwrap()
            .leases
            .is_empty()
    );
    let reaped = cluster
        .palyra(&["worker", "reap", "--older-than", "1ms", "-o", "json"])
        .ok();
    assert!(reaped.field("workers").as_u64().unwrap() >= 1, "{}", reaped.out);
}

/// The policy: shown as a file, changed by a file, with what that changes said before.
pub(crate) async fn a_policy_is_changed_by_what_was_shown(cluster: &mut Cluster) {
    let worker = working(cluster, "ruled", 1).await;
    let file = cluster.path().join("policy.toml");
    let path = file.display().to_string();
    let shown = cluster.palyra(&["worker", "policy", "show", "-o", "toml"]).ok();
    std::fs::write(&file, &shown.out).unwrap();
    let same = cluster
        .palyra(&["worker", "policy", "set", "-f", &path, "-o", "json"])
        .ok();
    assert_eq!(
        same.field("changes"),
        serde_json::json!([]),
        "what is shown reads back to the same"
    );
    let before = same.field("version");
    let other = "ab".repeat(32);
    let artifact = worker.shop.digests(cluster)["artifact"]
        .as_str()
        .unwrap()
        .to_owned();
    std::fs::write(&file, shown.out.replace(&artifact, &other)).unwrap();
    let dry = cluster
        .palyra(&["worker", "policy", "set", "-f", &path, "--dry-run", "-o", "json"])
        .ok();
    assert_eq!(
        (dry.field("field"), dry.field("affected")),
        ("artifacts".into(), 1.into())
    );
    assert_eq!(
        cluster.worker_is(&worker.id, "available").await.lifecycle,
        "available"
    );
    let asked = cluster.palyra(&["worker", "policy", "set", "-f", &path]);
    assert_eq!(
        asked.code, 2,
        "it is asked for, and nobody is there: {}",
        asked.err
    );
    assert!(
        asked.err.contains("1 worker's statement fails it"),
        "{}",
        asked.err
    );
    let stale = cluster.palyra(&[
        "worker",
        "policy",
        "set",
        "-f",
        &path,
        "--expect-version",
        "999999",
        "--yes",
    ]);
    assert_eq!(stale.code, 11, "{}", stale.err);
    let set = cluster
        .palyra(&["worker", "policy", "set", "-f", &path, "--yes", "-o", "json"])
        .ok();
    assert_eq!(
        set.field("version").as_u64().unwrap(),
        before.as_u64().unwrap() + 1
    );
    let held = cluster.worker_is(&worker.id, "quarantined").await;
    assert_eq!(held.quarantine.unwrap().cause, "digest_drift");
    retire(cluster, &worker.id).await;
}
