//! What operators have nodes do, through any replica.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use palyra_node::{Error, mediation};
use palyra_proto::dispatch::v1::{CancelRequest, DispatchInfo, GetRequest, InvokeRequest};
use palyra_proto::node::v1::RevokeDeviceRequest;
use palyra_tests::cluster::{Answer, Cluster, eventually};
use palyra_tests::node::{Agent, identity};

const CAPABILITIES: &str = r#"
[[capability]]
name = "notes.append"
description = "appends the input to a file"
program = "./append"
effect = "once"

[[capability]]
name = "fails"
program = "/bin/sh"
args = ["-c", "echo first >&2; echo the cause >&2; exit 4"]
effect = "idempotent"

[[capability]]
name = "talks"
program = "/bin/echo"
args = ["no json"]
effect = "idempotent"

[[capability]]
name = "slow"
program = "/bin/sh"
args = ["-c", "echo begun >> slow; exec sleep 600"]
effect = "once"
timeout = "10m"

[[capability]]
name = "hangs"
program = "/bin/sleep"
args = ["600"]
effect = "idempotent"
timeout = "500ms"

[[capability]]
name = "asks"
program = "/bin/cat"
effect = "once"
local_mediation = true
"#;

/// Writes the capability file and its program. Answers the file's path.
pub(crate) fn capabilities(cluster: &Cluster) -> PathBuf {
    let dir = cluster.path().join("capabilities");
    std::fs::create_dir_all(&dir).unwrap();
    let program = dir.join("append");
    if !program.exists() {
        std::fs::write(
            &program,
            "#!/bin/sh\ncat >> notes; echo >> notes; echo '{\"appended\":true}'\n",
        )
        .unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let file = dir.join("capabilities.toml");
    std::fs::write(&file, CAPABILITIES).unwrap();
    file
}

/// Pairs and starts a node with these capabilities; waits until it is online.
pub(crate) async fn working_node(cluster: &Cluster, name: &str) -> (PathBuf, String, Agent) {
    let dir = cluster.pair_node(name).await;
    let (device_id, _) = identity(&dir);
    let agent = cluster.start_node(&dir, Some(&capabilities(cluster)));
    cluster.online(&device_id).await;
    (dir, device_id, agent)
}

/// Revokes a test's node, so that the next test begins without it.
pub(crate) async fn retire(cluster: &Cluster, device_id: &str) {
    let revoke = RevokeDeviceRequest {
        device_id: device_id.to_owned(),
        reason: "end of test".to_owned(),
        ..Default::default()
    };
    cluster.client().revoke_device(revoke).await.unwrap();
}

pub(crate) fn request(device_id: &str, capability: &str, payload: &str) -> InvokeRequest {
    InvokeRequest {
        device_id: device_id.to_owned(),
        capability: capability.to_owned(),
        payload: payload.to_owned().into(),
        timeout_ms: 20_000,
        wait_ms: 20_000,
        ..Default::default()
    }
}

pub(crate) async fn invoke(cluster: &Cluster, at: u64, request: InvokeRequest) -> DispatchInfo {
    cluster
        .client_at(at)
        .invoke(request)
        .await
        .unwrap()
        .dispatch
        .unwrap()
}

pub(crate) fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap_or_default().lines().count()
}

pub(crate) async fn every_replica_reaches_the_node(cluster: &mut Cluster) {
    let (dir, device_id, _agent) = working_node(cluster, "worker").await;
    let info = cluster.online(&device_id).await;
    assert!(
        info.capabilities
            .iter()
            .any(|capability| capability.name == "notes.append")
    );
    for id in 1..=3 {
        let done = invoke(
            cluster,
            id,
            request(&device_id, "notes.append", &format!("{{\"from\":{id}}}")),
        )
        .await;
        assert_eq!(
            (done.state.as_str(), &done.result[..]),
            ("succeeded", &b"{\"appended\":true}"[..]),
            "{done:?}"
        );
    }
    let notes = std::fs::read_to_string(dir.join("notes")).unwrap();
    assert_eq!(notes, "{\"from\":1}\n{\"from\":2}\n{\"from\":3}\n");
    // The same request at another replica is answered, not done again.
    let mut same = request(&device_id, "notes.append", "{\"once\":1}");
    same.request_id = palyra_client::new_ulid();
    let first = invoke(cluster, 1, same.clone()).await;
    let second = invoke(cluster, 2, same).await;
    assert_eq!((first.id, first.state), (second.id, second.state));
    assert_eq!(lines(&dir.join("notes")), 4);
    let shown = cluster
        .palyra(&[
            "node",
            "invoke",
            &device_id,
            "echo",
            "--input",
            "{\"a\":[1]}",
            "-o",
            "json",
        ])
        .ok();
    assert_eq!(shown.field("a"), serde_json::json!([1]), "{}", shown.out);
    let identity = invoke(cluster, 2, request(&device_id, "system.identity", "{}")).await;
    let identity: serde_json::Value = serde_json::from_slice(&identity.result).unwrap();
    assert_eq!(identity["device_id"], device_id.as_str());
    let health = invoke(cluster, 3, request(&device_id, "system.health", "{}")).await;
    let health: serde_json::Value = serde_json::from_slice(&health.result).unwrap();
    assert!(health["memory"]["total_bytes"].as_u64().unwrap() > 0);
    retire(cluster, &device_id).await;
}

pub(crate) async fn failures_say_what_failed(cluster: &mut Cluster) {
    let (_dir, device_id, _agent) = working_node(cluster, "failing").await;
    for (capability, code, words) in [
        ("fails", "program_failed", "the cause"),
        ("talks", "output_not_json", "JSON"),
        ("hangs", "timeout", "timeout of 500ms"),
    ] {
        let done = invoke(cluster, 1, request(&device_id, capability, "{}")).await;
        assert_eq!(
            (done.state.as_str(), done.error_code.as_str()),
            ("failed", code),
            "{done:?}"
        );
        assert!(done.error_message.contains(words), "{done:?}");
    }
    let shown = cluster.palyra(&["node", "invoke", &device_id, "fails"]);
    assert_eq!(shown.code, 1, "{}", shown.err);
    assert!(
        shown.err.contains("exit code 4") || shown.out.contains("exit code 4"),
        "{}{}",
        shown.out,
        shown.err
    );
    retire(cluster, &device_id).await;
}

pub(crate) async fn bad_requests_are_refused(cluster: &mut Cluster) {
    let (dir, device_id, _agent) = working_node(cluster, "strict").await;
    let client = cluster.client_at(2);
    let refuse = async |request: InvokeRequest| client.invoke(request).await.unwrap_err();
    let before = client.status().await.unwrap().fleet.unwrap().open_dispatches;
    assert_eq!(refuse(request(&device_id, "no.such", "{}")).await.code, "E0602");
    let large = format!("\"{}\"", "x".repeat(512 * 1024));
    assert_eq!(
        refuse(request(&device_id, "notes.append", &large)).await.code,
        "E0603"
    );
    for text in ["{", "", "{} {}", "{'a':1}", "\u{feff}{}"] {
        let error = refuse(request(&device_id, "notes.append", text)).await;
        assert_eq!(error.exit_code(), 2, "{text:?}: {error}");
    }
    assert_eq!(
        refuse(request("01JD7ZA1B2C3D4E5F6G7H8J9K0", "echo", "{}"))
            .await
            .exit_code(),
        8
    );
    assert!([2, 8].contains(&refuse(request("not a ulid!", "echo", "{}")).await.exit_code()));
    let mut long = request(&device_id, "echo", "{}");
    long.timeout_ms = 25 * 3_600_000;
    assert_eq!(refuse(long).await.code, "E0612");
    // A gigantic message is refused by its size, and the connection's others go on.
    let huge = format!("\"{}\"", "x".repeat(8 << 20));
    let (refused, fine) = tokio::join!(refuse(request(&device_id, "echo", &huge)), client.status());
    assert!(refused.exit_code() != 0 && fine.is_ok(), "{refused}");
    let after = client.status().await.unwrap().fleet.unwrap().open_dispatches;
    assert_eq!(
        (before, lines(&dir.join("notes"))),
        (after, 0),
        "no partial effect"
    );
    retire(cluster, &device_id).await;
}

pub(crate) async fn the_person_at_the_machine_is_asked(cluster: &mut Cluster) {
    let (dir, device_id, _agent) = working_node(cluster, "attended").await;
    for (allow, state) in [(true, "succeeded"), (false, "rejected")] {
        let client = cluster.client();
        let mut ask = request(&device_id, "asks", "{\"dangerous\":true}");
        ask.wait_ms = 0;
        let submitted = client.invoke(ask).await.unwrap().dispatch.unwrap();
        let waiting = eventually("the question", async || mediation::list(&dir).await.ok()?.pop()).await;
        assert_eq!(
            (waiting.id.as_str(), waiting.payload.as_str()),
            (submitted.id.as_str(), "{\"dangerous\":true}")
        );
        eventually("the state to show it", async || {
            let get = GetRequest {
                id: submitted.id.clone(),
                ..Default::default()
            };
            client
                .get_dispatch(get)
                .await
                .ok()?
                .dispatch
                .filter(|seen| seen.state == "awaiting_local_mediation")
        })
        .await;
        let decided: Result<_, Error> = mediation::decide(&dir, &waiting.id, allow).await;
        assert_eq!(decided.unwrap().id, submitted.id);
        let ended = client
            .wait_dispatch(&submitted.id, 20_000)
            .await
            .unwrap()
            .dispatch
            .unwrap();
        assert_eq!(ended.state, state, "{ended:?}");
    }
    retire(cluster, &device_id).await;
}

pub(crate) async fn a_cancelled_job_ends_on_the_node(cluster: &mut Cluster) {
    let (dir, device_id, _agent) = working_node(cluster, "cancelled").await;
    let mut slow = request(&device_id, "slow", "{}");
    slow.wait_ms = 0;
    let submitted = invoke(cluster, 1, slow).await;
    eventually("the program to begin", async || {
        (lines(&dir.join("slow")) == 1).then_some(())
    })
    .await;
    let cancel = CancelRequest {
        id: submitted.id.clone(),
        reason: "changed my mind".to_owned(),
        ..Default::default()
    };
    let cancelled = cluster
        .client_at(2)
        .cancel_dispatch(cancel)
        .await
        .unwrap()
        .dispatch
        .unwrap();
    assert!(
        ["cancelling", "cancelled"].contains(&cancelled.state.as_str()),
        "{cancelled:?}"
    );
    let ended = cluster
        .client()
        .wait_dispatch(&submitted.id, 20_000)
        .await
        .unwrap()
        .dispatch
        .unwrap();
    assert_eq!(
        (ended.state.as_str(), ended.error_code.as_str()),
        ("cancelled", "stopped")
    );
    assert!(ended.error_message.contains("SIGTERM"), "{ended:?}");
    eventually("the program's end", async || {
        let status = palyra_node::service::status(&dir).await.ok()?.agent?;
        (status.running.is_empty() && status.unreported.is_empty()).then_some(())
    })
    .await;
    retire(cluster, &device_id).await;
}

pub(crate) async fn a_once_job_is_not_run_again(cluster: &mut Cluster) {
    let (dir, device_id, mut agent) = working_node(cluster, "crashing").await;
    let mut slow = request(&device_id, "slow", "{}");
    (slow.wait_ms, slow.timeout_ms) = (0, 120_000);
    let submitted = invoke(cluster, 1, slow).await;
    eventually("the program to begin", async || {
        (lines(&dir.join("slow")) == 1).then_some(())
    })
    .await;
    agent.kill();
    let _agent = cluster.start_node(&dir, Some(&capabilities(cluster)));
    let ended = cluster
        .client()
        .wait_dispatch(&submitted.id, 20_000)
        .await
        .unwrap()
        .dispatch
        .unwrap();
    // Told by the new agent, or by the control plane if the new session came without it.
    let told = (ended.state.as_str(), ended.error_code.as_str());
    assert_eq!(told, ("failed", "agent_restarted"), "{ended:?}");
    assert_eq!(lines(&dir.join("slow")), 1, "it ran once");
    cluster.online(&device_id).await;
    let done = invoke(cluster, 2, request(&device_id, "echo", "1")).await;
    assert_eq!(done.state, "succeeded");
    retire(cluster, &device_id).await;
}

/// A mistake in the file keeps the agent from starting, and says where it is.
fn a_mistake_keeps_it_from_starting(file: &str, node: &dyn Fn(&str, &[&str]) -> Answer) {
    std::fs::write(file, format!("{CAPABILITIES}\n[[capability]]\ncolour = 1\n")).unwrap();
    let refused = node("restart", &[]);
    assert!(
        refused.code == 2 && refused.err.contains("capabilities.toml:") && refused.err.contains("colour"),
        "{} {}",
        refused.code,
        refused.err
    );
    let stopped = node("status", &[]);
    assert_eq!(
        (stopped.code, stopped.out.contains("stopped")),
        (7, true),
        "{}",
        stopped.out
    );
}

pub(crate) async fn the_agent_runs_in_the_background(cluster: &mut Cluster) {
    let dir = cluster.pair_node("background").await;
    let (device_id, _) = identity(&dir);
    let folder = dir.display().to_string();
    let file = capabilities(cluster).display().to_string();
    let node = |verb: &str, more: &[&str]| {
        let mut arguments = vec!["node", verb, "--data-dir", &folder];
        arguments.extend_from_slice(more);
        cluster.palyra(&arguments)
    };
    let _ = node("start", &["--capabilities", &file]).ok();
    cluster.online(&device_id).await;
    let again = node("start", &[]);
    assert!(
        again.code == 11 && again.err.contains("already"),
        "{} {}",
        again.code,
        again.err
    );
    let status = eventually("the agent to be connected", async || {
        let status = node("status", &["-o", "json"]).ok();
        (status.field("state") == "connected").then_some(status)
    });
    let status = status.await;
    assert_eq!(status.field("device_id"), device_id.as_str());
    let done = invoke(cluster, 1, request(&device_id, "notes.append", "\"from behind\"")).await;
    assert_eq!(done.state, "succeeded", "{done:?}");
    let pid = status.field("pid").as_u64().unwrap();
    // A restart reads the files again and keeps the options of the start.
    std::fs::write(&file, CAPABILITIES.replace("notes.append", "notes.add")).unwrap();
    let _ = node("restart", &[]).ok();
    let status = node("status", &["-o", "json"]).ok();
    assert_ne!(status.field("pid"), pid, "another process");
    eventually("the capability of the new file", async || {
        let done = cluster
            .client()
            .invoke(request(&device_id, "notes.add", "1"))
            .await
            .ok()?;
        (done.dispatch.unwrap().state == "succeeded").then_some(())
    })
    .await;
    a_mistake_keeps_it_from_starting(&file, &node);
    let _ = capabilities(cluster);
    let _ = node("start", &["--capabilities", &file]).ok();
    cluster.online(&device_id).await;
    let _ = node("stop", &[]).ok();
    assert!(!palyra_node::service::status(&dir).await.unwrap().running);
    let _ = node("stop", &[]).ok();
    retire(cluster, &device_id).await;
    let revoked = node("start", &[]);
    assert!(
        revoked.code == 3 && revoked.err.contains("revoked"),
        "{} {}{}",
        revoked.code,
        revoked.out,
        revoked.err
    );
}
