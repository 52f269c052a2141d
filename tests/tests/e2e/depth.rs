//! Dispatches at depth, on real nodes: slots and queues, attempts, what programs write, and what becomes of work that
//! is under way when a replica dies, when the node does, and when both do.

use std::path::{Path, PathBuf};

use palyra_proto::dispatch::v1::{DispatchInfo, LogsRequest};
use palyra_tests::cluster::{Cluster, eventually};
use palyra_tests::node::{Agent, Puppet, identity};

use crate::dispatch::{invoke, lines, request, retire};

/// `once` and `again` note each run, say that they are up, and end when the file `go` is there.
const CAPABILITIES: &str = r#"
[[capability]]
name = "once"
program = "/bin/sh"
args = ["-c", "echo x >> once.runs; while [ ! -e go ]; do sleep 0.05; done; echo 1"]
effect = "once"
timeout = "10m"
concurrency = 2

[[capability]]
name = "again"
program = "/bin/sh"
args = ["-c", "echo x >> again.runs; while [ ! -e go ]; do sleep 0.05; done; echo 1"]
effect = "idempotent"
timeout = "10m"

[[capability]]
name = "chats"
program = "/bin/sh"
args = ["-c", "echo one >&2; echo ::progress 50 half >&2; while [ ! -e go ]; do sleep 0.05; done; echo two >&2; echo 1"]
effect = "once"
timeout = "10m"

[[capability]]
name = "flaky"
program = "/bin/sh"
args = ["-c", "echo x >> flaky.runs; [ $(wc -l < flaky.runs) -ge 3 ] || exit 75; echo 3"]
effect = "idempotent"
attempts = 4
backoff = "50ms"

[[capability]]
name = "narrow"
program = "/bin/sh"
args = ["-c", "while [ ! -e go ]; do sleep 0.05; done; echo x >> order; cat"]
effect = "once"
timeout = "10m"
concurrency = 1
queue_limit = 2
"#;

fn file(cluster: &Cluster) -> PathBuf {
    let file = cluster.path().join("depth.toml");
    std::fs::write(&file, CAPABILITIES).unwrap();
    file
}

async fn node(cluster: &Cluster, name: &str) -> (PathBuf, String, Agent) {
    let dir = cluster.pair_node(name).await;
    let (device_id, _) = identity(&dir);
    let agent = cluster.start_node(&dir, Some(&file(cluster)));
    cluster.online(&device_id).await;
    (dir, device_id, agent)
}

/// Submits without a wait for the end.
async fn submit(cluster: &Cluster, at: u64, device_id: &str, capability: &str) -> DispatchInfo {
    let mut job = request(device_id, capability, "{}");
    (job.wait_ms, job.timeout_ms) = (0, 300_000);
    invoke(cluster, at, job).await
}

async fn end_of(cluster: &Cluster, id: &str) -> DispatchInfo {
    let waited = cluster.client().wait_dispatch(id, 60_000).await.unwrap();
    waited.dispatch.unwrap()
}

fn go(dir: &Path) {
    std::fs::write(dir.join("go"), "").unwrap();
}

async fn begun(dir: &Path, file: &str, count: usize) {
    let path = dir.join(file);
    eventually("the program to begin", async || {
        (lines(&path) == count).then_some(())
    })
    .await;
}

pub(crate) async fn what_a_program_writes_is_seen(cluster: &mut Cluster) {
    let (dir, device_id, _agent) = node(cluster, "chatty").await;
    let job = submit(cluster, 1, &device_id, "chats").await;
    for at in 1..=3 {
        let seen = eventually("the first line", async || {
            let ask = LogsRequest {
                id: job.id.clone(),
                wait_ms: 5_000,
                ..LogsRequest::default()
            };
            let logs = cluster.client_at(at).dispatch_logs(ask).await.ok()?;
            (!logs.lines.is_empty() && logs.progress.is_some()).then_some(logs)
        })
        .await;
        assert_eq!(
            (seen.lines[0].line, seen.lines[0].text.as_str()),
            (1, "one"),
            "r{at}"
        );
        let progress = seen.progress.unwrap();
        assert_eq!((progress.percent, progress.message.as_str()), (Some(50), "half"));
    }
    go(&dir);
    let shown = cluster.palyra(&["job", "logs", "-f", &job.id]).ok();
    assert_eq!(shown.out, "one\ntwo\n", "{}", shown.err);
    let ended = end_of(cluster, &job.id).await;
    assert_eq!(
        (ended.state.as_str(), &ended.log_tail[..]),
        ("succeeded", &b"one\ntwo"[..])
    );
    let followed = cluster
        .palyra(&["node", "invoke", &device_id, "chats", "--follow"])
        .ok();
    assert!(
        followed.err.contains("one") && followed.err.contains("two") && followed.out.trim() == "1",
        "{}{}",
        followed.out,
        followed.err
    );
    retire(cluster, &device_id).await;
}

pub(crate) async fn what_fails_for_a_while_is_tried_again(cluster: &mut Cluster) {
    let (dir, device_id, _agent) = node(cluster, "flaky").await;
    let mut job = request(&device_id, "flaky", "{}");
    job.max_attempts = 2;
    let ended = invoke(cluster, 2, job).await;
    assert_eq!((ended.state.as_str(), ended.attempt), ("failed", 2), "{ended:?}");
    assert_eq!(ended.error_code, "temporary_failure");
    let ended = invoke(cluster, 3, request(&device_id, "flaky", "{}")).await;
    assert_eq!(
        (ended.state.as_str(), &ended.result[..]),
        ("succeeded", &b"3"[..]),
        "{ended:?}"
    );
    assert_eq!((ended.attempt, lines(&dir.join("flaky.runs"))), (1, 3));
    std::fs::remove_file(dir.join("flaky.runs")).unwrap();
    let ended = invoke(cluster, 1, request(&device_id, "flaky", "{}")).await;
    assert_eq!(
        (ended.state.as_str(), ended.attempt, ended.attempts.len()),
        ("succeeded", 3, 2)
    );
    let shown = cluster.palyra(&["job", "get", &ended.id]).ok();
    assert!(shown.out.contains("temporary_failure"), "{}", shown.out);
    retire(cluster, &device_id).await;
}

pub(crate) async fn slots_and_queues_are_kept(cluster: &mut Cluster) {
    let (dir, device_id, _agent) = node(cluster, "narrow").await;
    let job = |payload: &str, priority: &str| {
        let mut job = request(&device_id, "narrow", payload);
        (job.wait_ms, job.timeout_ms) = (0, 300_000);
        job.priority = priority.to_owned();
        job
    };
    let first = invoke(cluster, 1, job("1", "")).await;
    let second = invoke(cluster, 2, job("2", "low")).await;
    let third = invoke(cluster, 3, job("3", "high")).await;
    assert_eq!(
        (first.state.as_str(), second.state.as_str()),
        ("dispatched", "queued")
    );
    assert!(
        second.waits_for.contains("one of 1 slots of narrow"),
        "{second:?}"
    );
    let refused = cluster.client_at(1).invoke(job("4", "high")).await.unwrap_err();
    assert_eq!(refused.code, "E0615");
    assert!(
        refused.message.contains("2 dispatches wait while 1 are with it"),
        "{refused}"
    );
    let told = cluster
        .palyra(&[
            "job", "ls", "--device", &device_id, "--state", "queued", "-o", "json",
        ])
        .ok();
    assert!(
        told.out.contains(&second.id) && !told.out.contains(&first.id),
        "{}",
        told.out
    );
    let taken = cluster.palyra(&["job", "cancel", &second.id, "--wait"]).ok();
    assert!(taken.out.contains("cancelled"), "{}", taken.out);
    let fourth = invoke(cluster, 1, job("4", "")).await;
    let fifth = cluster.palyra(&["job", "cancel", &first.id, "--wait"]).ok();
    assert!(fifth.out.contains("SIGTERM"), "{}", fifth.out);
    go(&dir);
    let (third, fourth) = (
        end_of(cluster, &third.id).await,
        end_of(cluster, &fourth.id).await,
    );
    assert_eq!(
        (third.state.as_str(), fourth.state.as_str()),
        ("succeeded", "succeeded")
    );
    assert!(
        third.ended_at_ms <= fourth.assigned_at_ms,
        "the urgent one first: {third:?} {fourth:?}"
    );
    retire(cluster, &device_id).await;
}

/// What dies while work is under way.
#[derive(Clone, Copy, PartialEq)]
enum Dies {
    Replica,
    Node,
    Both,
}

pub(crate) async fn work_in_flight_ends_right(cluster: &mut Cluster) {
    for (dies, name) in [
        (Dies::Replica, "flight-r"),
        (Dies::Node, "flight-n"),
        (Dies::Both, "flight-b"),
    ] {
        running(cluster, dies, name).await;
        finished(cluster, dies, &format!("{name}-done")).await;
    }
    Box::pin(delivered(cluster)).await;
}

/// Kills what dies, and brings it back.
fn strike(cluster: &mut Cluster, dies: Dies, holder: u64, dir: &Path, agent: Agent) -> Agent {
    let mut agent = agent;
    if dies != Dies::Node {
        cluster.kill(holder);
    }
    if dies != Dies::Replica {
        agent.kill();
        agent = cluster.start_node(dir, Some(&file(cluster)));
    }
    agent
}

/// Programs run when it happens.
async fn running(cluster: &mut Cluster, dies: Dies, name: &str) {
    let (dir, device_id, agent) = node(cluster, name).await;
    let once = submit(cluster, 1, &device_id, "once").await;
    let again = submit(cluster, 2, &device_id, "again").await;
    begun(&dir, "once.runs", 1).await;
    begun(&dir, "again.runs", 1).await;
    let holder = cluster.online(&device_id).await.session_replica;
    let _agent = strike(cluster, dies, holder, &dir, agent);
    let restarted = dies != Dies::Replica;
    if restarted {
        begun(&dir, "again.runs", 2).await;
    }
    go(&dir);
    let (once, again) = (end_of(cluster, &once.id).await, end_of(cluster, &again.id).await);
    let expected = if restarted {
        ("failed", "agent_restarted")
    } else {
        ("succeeded", "")
    };
    assert_eq!(
        (once.state.as_str(), once.error_code.as_str()),
        expected,
        "{name}: {once:?}"
    );
    assert_eq!(again.state, "succeeded", "{name}: {again:?}");
    assert_eq!(again.attempt, 1 + u32::from(restarted), "{name}: {again:?}");
    let runs = (lines(&dir.join("once.runs")), lines(&dir.join("again.runs")));
    assert_eq!(runs, (1, 1 + usize::from(restarted)), "{name}");
    if !cluster.running().contains(&holder) {
        cluster.start_replica(holder);
        cluster.online(&device_id).await;
    }
    retire(cluster, &device_id).await;
}

/// Programs have ended while the node's replica was frozen: it knows of no result.
async fn finished(cluster: &mut Cluster, dies: Dies, name: &str) {
    let (dir, device_id, agent) = node(cluster, name).await;
    let once = submit(cluster, 1, &device_id, "once").await;
    let again = submit(cluster, 2, &device_id, "again").await;
    begun(&dir, "once.runs", 1).await;
    begun(&dir, "again.runs", 1).await;
    let holder = cluster.online(&device_id).await.session_replica;
    cluster.freeze(holder);
    go(&dir);
    eventually("the results", async || {
        let status = palyra_node::service::status(&dir).await.ok()?.agent?;
        (status.unreported.len() == 2).then_some(())
    })
    .await;
    if dies == Dies::Node {
        cluster.thaw(holder);
    }
    let _agent = strike(cluster, dies, holder, &dir, agent);
    let (once, again) = (end_of(cluster, &once.id).await, end_of(cluster, &again.id).await);
    assert_eq!(
        (once.state.as_str(), again.state.as_str()),
        ("succeeded", "succeeded"),
        "{name}: {once:?} {again:?}"
    );
    let runs = (lines(&dir.join("once.runs")), lines(&dir.join("again.runs")));
    assert_eq!(runs, (1, 1), "{name}: what is done is not done again");
    if !cluster.running().contains(&holder) {
        cluster.start_replica(holder);
        cluster.online(&device_id).await;
    }
    retire(cluster, &device_id).await;
}

/// Delivered and not acknowledged: the node comes back without it.
async fn delivered(cluster: &mut Cluster) {
    let dir = cluster.pair_node("flight-d").await;
    let mut puppet = Puppet::attach(&dir, &cluster.node_addr(1), vec![]).await.unwrap();
    let (once, again) = (
        submit(cluster, 2, &puppet.device_id, "once").await,
        submit(cluster, 2, &puppet.device_id, "echo").await,
    );
    let first = puppet.assigned().await.dispatch_id;
    let second = puppet.assigned().await.dispatch_id;
    assert_eq!(
        (first.as_str(), second.as_str()),
        (once.id.as_str(), again.id.as_str())
    );
    drop(puppet);
    let mut puppet = Puppet::attach(&dir, &cluster.node_addr(3), vec![]).await.unwrap();
    let given = puppet.assigned().await;
    assert_eq!(
        (given.dispatch_id.as_str(), given.attempt),
        (again.id.as_str(), 2)
    );
    let ended = end_of(cluster, &once.id).await;
    assert_eq!(
        ended.state, "session_lost",
        "nobody can know that it did not run: {ended:?}"
    );
    assert!(puppet.report(puppet.result(&again.id, "1")).await.accepted);
    assert_eq!(end_of(cluster, &again.id).await.state, "succeeded");
    retire(cluster, &puppet.device_id).await;
}
