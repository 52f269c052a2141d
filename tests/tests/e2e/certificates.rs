//! Certificates that live seconds: renewals in a row, a rotation, an end in sleep, a copied folder.

use std::path::Path;

use palyra_proto::node::v1::{DeviceInfo, GetDeviceRequest};
use palyra_tests::cluster::{Cluster, eventually};
use palyra_tests::node::identity;

/// Long enough for a busy machine, short enough for a test.
const SHORT: &str = "\n[certificates]\nnode_validity = \"12s\"\nshort_lives = true\n";

async fn device(cluster: &Cluster, id: &str) -> Option<DeviceInfo> {
    let request = GetDeviceRequest {
        device_id: id.to_owned(),
        ..Default::default()
    };
    cluster.client().get_device(request).await.ok()?.device
}

/// Waits until the device is as wanted.
async fn becomes(
    cluster: &Cluster,
    id: &str,
    what: &str,
    wanted: impl Fn(&DeviceInfo) -> bool,
) -> DeviceInfo {
    eventually(what, async || {
        device(cluster, id).await.filter(|seen| wanted(seen))
    })
    .await
}

/// Starts every replica anew, with or without short lives.
fn restart(cluster: &mut Cluster, short: bool) {
    for id in cluster.running() {
        let path = format!("{}/palyrad.toml", cluster.folder(id));
        let text = std::fs::read_to_string(&path).unwrap().replace(SHORT, "");
        let end = if short { SHORT } else { "" };
        std::fs::write(&path, text + end).unwrap();
        cluster.terminate(id);
        cluster.start_replica(id);
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &target);
        } else if entry.file_type().unwrap().is_file() {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

pub(crate) async fn certificates_that_live_seconds(cluster: &mut Cluster) {
    restart(cluster, true);
    let dir = cluster.pair_node("brief").await;
    let (id, first) = identity(&dir);
    let mut agent = cluster.start_node(&dir, None);
    cluster.online(&id).await;
    // Several renewals in a row, with work in between.
    for renewals in 1..=2 {
        becomes(cluster, &id, "a renewal", |seen| seen.counter >= renewals).await;
        let arguments = ["node", "invoke", &id, "echo", "--input", "{}", "--wait"];
        let _ = cluster.palyra(&arguments).ok();
    }
    let arguments = [
        "device", "rotate", &id, "--reason", "spring", "--wait", "-o", "json",
    ];
    assert_eq!(cluster.palyra(&arguments).ok().field("state"), "in_use");
    // Asleep past the end, the node recovers by itself.
    agent.freeze();
    becomes(cluster, &id, "the end of the certificate", |seen| {
        !seen
            .certificates
            .iter()
            .any(|one| matches!(one.status.as_str(), "active" | "issued"))
    })
    .await;
    agent.thaw();
    let seen = becomes(cluster, &id, "the recovery", |seen| seen.recovered_at_ms > 0).await;
    assert!(seen.suspicion.is_none(), "{seen:?}");
    cluster.online(&id).await;
    // A copy of the folder, as it was a renewal ago, on another machine.
    let elsewhere = cluster.path().join("copied");
    agent.kill();
    copy(&dir, &elsewhere);
    let before = device(cluster, &id).await.unwrap().counter;
    let _agent = cluster.start_node(&dir, None);
    becomes(cluster, &id, "one more renewal", |now| now.counter > before).await;
    let mut other = cluster.start_node(&elsewhere, None);
    assert_eq!(other.ended().await, 3, "a copy ends");
    let found = becomes(cluster, &id, "the copy to be found", |seen| {
        seen.suspicion.is_some()
    })
    .await;
    assert_eq!(found.suspicion.unwrap().refused_from, "127.0.0.1");
    cluster.online(&id).await;
    let shown = cluster.palyra(&["device", "ls"]).ok();
    assert!(shown.out.contains("CLONE SUSPECTED"), "{}", shown.out);
    let arguments = ["device", "clear-clone", &id, "--reason", "the copy is gone"];
    let _ = cluster.palyra(&arguments).ok();
    assert!(first.identity().unwrap().id.id() == id);
    restart(cluster, false);
}
