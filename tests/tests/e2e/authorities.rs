//! The root is replaced on real replicas while nodes come and go; and lists of revoked certificates that a stranger
//! checks.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use palyra_proto::node::v1::RevokeDeviceRequest;
use palyra_tests::cluster::{Cluster, eventually};
use palyra_tests::node::{Agent, identity};
use serde_json::Value;

use crate::dispatch::{capabilities, request, working_node};

/// Waits until `palyra ca status` is as wanted.
async fn status(cluster: &Cluster, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    eventually(what, async || {
        let answer = cluster.palyra(&["ca", "status", "--all", "-o", "json"]);
        let value: Value = serde_json::from_str(&answer.out).ok()?;
        wanted(&value).then_some(value)
    })
    .await
}

fn replicas_ready(status: &Value) -> bool {
    status["acknowledged"]["replicas"] == status["acknowledged"]["replicas_of"]
}

async fn advance(cluster: &Cluster, how: &[&str], to: &str) {
    let command = [&["ca", "rotate", "root", "advance", "-o", "json"], how].concat();
    let step = eventually("the step to be taken", async || {
        let answer = cluster.palyra(&command);
        // Replicas take a moment for the step before, and the leader for the last signature.
        (!answer.err.contains("E0704")).then_some(answer)
    })
    .await;
    assert_eq!(step.ok().field("phase"), to);
}

async fn works(cluster: &Cluster, device_id: &str, what: &str) {
    let done = cluster
        .client()
        .invoke(request(device_id, "echo", &format!("\"{what}\"")))
        .await
        .unwrap()
        .dispatch
        .unwrap();
    assert_eq!(done.state, "succeeded", "{what}: {done:?}");
}

/// A node that was paired and served once, and is stopped now.
async fn stopped_node(cluster: &Cluster, name: &str) -> (PathBuf, String) {
    let (dir, device_id, mut agent) = working_node(cluster, name).await;
    agent.kill();
    (dir, device_id)
}

async fn comes_back(cluster: &Cluster, dir: &Path, device_id: &str) -> Agent {
    let agent = cluster.start_node(dir, Some(&capabilities(cluster)));
    cluster.online(device_id).await;
    works(cluster, device_id, "is back").await;
    agent
}

pub(crate) async fn the_root_is_replaced_while_nodes_come_and_go(cluster: &mut Cluster) {
    let before = status(cluster, "the replicas to be ready", replicas_ready).await;
    let (_, steady, _agent) = working_node(cluster, "steady-root").await;
    let (first_dir, first) = stopped_node(cluster, "away-in-distribute").await;
    let (last_dir, last) = stopped_node(cluster, "away-throughout").await;

    let begun = cluster.palyra(&[
        "ca", "rotate", "root", "begin", "--reason", "yearly", "-o", "json",
    ]);
    assert_eq!(begun.ok().field("phase"), "distribute");
    works(cluster, &steady, "distribute").await;
    let (second_dir, second) = stopped_node(cluster, "paired-in-distribute").await;
    status(cluster, "the steady node's word", |now| {
        replicas_ready(now)
            && now["nodes_missing"]
                .as_array()
                .unwrap()
                .iter()
                .all(|one| one["online"] == false)
    })
    .await;
    advance(cluster, &[], "issue").await;

    works(cluster, &steady, "issue").await;
    let _first = comes_back(cluster, &first_dir, &first).await;
    let (third_dir, third) = stopped_node(cluster, "paired-in-issue").await;
    // Nodes of other tests may be missing as well.
    status(
        cluster,
        "the node that is away to be the one of them that is missing",
        |now| {
            let missing = now["nodes_missing"].as_array().unwrap();
            let is_missing = |id: &String| missing.iter().any(|one| one["device_id"] == id.as_str());
            let told = [&steady, &first, &second, &third]
                .into_iter()
                .all(|id| !is_missing(id));
            replicas_ready(now) && is_missing(&last) && told
        },
    )
    .await;
    let refused = cluster.palyra(&["ca", "rotate", "root", "advance"]);
    assert_eq!(refused.code, 7, "{}", refused.err);
    assert!(refused.err.contains("E0705"), "{}", refused.err);
    let force = ["--force", "--reason", "scrapped"];
    advance(cluster, &force, "idle").await;

    let left = [(&second_dir, &second), (&third_dir, &third)];
    after_the_end(cluster, &before, &steady, &left, &last_dir).await;
}

/// The old root is gone: who was told goes on, who was not says why.
async fn after_the_end(
    cluster: &mut Cluster,
    before: &Value,
    steady: &str,
    told: &[(&PathBuf, &String)],
    last_dir: &Path,
) {
    let after = status(cluster, "the old root to be gone", |now| {
        replicas_ready(now)
            && now["roots"]
                .as_array()
                .unwrap()
                .iter()
                .any(|one| one["status"] == "retired")
    })
    .await;
    assert_ne!(
        before["roots"][0]["fingerprint"],
        after["roots"][1]["fingerprint"]
    );
    assert_eq!(after["roots"][0]["key_held"], false);
    works(cluster, steady, "after").await;
    let mut agents = Vec::new();
    for (dir, device_id) in told {
        agents.push(comes_back(cluster, dir, device_id).await);
    }
    let (_, new, _new) = working_node(cluster, "paired-after").await;
    works(cluster, &new, "new").await;

    // Who was away throughout says so, and how it comes back.
    let _last = cluster.start_node(last_dir, None);
    eventually("the node that was left behind to say why", async || {
        let status = palyra_node::service::status(last_dir).await.ok()?.agent?;
        (status.last_error.contains("N0901") && status.last_error.contains("pair --replace")).then_some(())
    })
    .await;
    // And a replica that starts anew finds its way with what is on its disk.
    cluster.kill(2);
    cluster.start_replica(2);
    works(cluster, steady, "restarted").await;
}

/// `GET path` from a replica's port for metrics and health.
fn get(cluster: &Cluster, path: &str) -> Vec<u8> {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", cluster.port(1, 5))).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nHost: palyra\r\n\r\n").unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    let head = all.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    assert!(
        all.starts_with(b"HTTP/1.0 200"),
        "{path}: {}",
        String::from_utf8_lossy(&all)
    );
    all.split_off(head + 4)
}

/// The number of replica 3's active authority, once it has published a list.
fn listed(status: &Value) -> Option<u64> {
    let all = status["authorities"].as_array()?;
    let one = all
        .iter()
        .find(|one| one["replica_id"] == 3 && one["status"] == "active" && one["crl_number"] != 0)?;
    one["number"].as_u64()
}

pub(crate) async fn a_stranger_checks_the_lists_of_revoked_certificates(cluster: &mut Cluster) {
    let (dir, device_id, mut agent) = working_node(cluster, "to-be-listed").await;
    agent.kill();
    let credential = identity(&dir).1;
    let chain = credential.chain().unwrap();
    let place = |name: &str| cluster.path().join(name);
    let pem = |ders: &[Vec<u8>]| palyra_pki::layout::certificates_to_pem(ders);
    std::fs::write(place("leaf.pem"), pem(&chain[..1])).unwrap();
    std::fs::write(place("authorities.pem"), pem(&chain[1..])).unwrap();
    std::fs::write(place("roots.pem"), &credential.roots).unwrap();
    // Approved at replica 3, so its authority signed it.
    let now = status(cluster, "a list of replica 3", |now| listed(now).is_some()).await;
    let list = format!("/crl/r3-{}", listed(&now).unwrap());
    let listing = String::from_utf8(get(cluster, "/crl")).unwrap();
    assert!(listing.contains(&format!("{list}.crl ")), "{listing}");
    let fetch = |form: &str| get(cluster, &format!("{list}.{form}"));
    std::fs::write(place("list.pem"), fetch("pem")).unwrap();
    let verify = |crl: &str| {
        let paths = ["roots.pem", "authorities.pem", crl, "leaf.pem"].map(place);
        let output = Command::new("openssl")
            .args(["verify", "-crl_check", "-CAfile"])
            .arg(&paths[0])
            .arg("-untrusted")
            .arg(&paths[1])
            .arg("-CRLfile")
            .args(&paths[2..])
            .output();
        output.map(|output| {
            let all = [output.stdout, output.stderr].concat();
            (
                output.status.success(),
                String::from_utf8_lossy(&all).into_owned(),
            )
        })
    };
    let Ok((good, said)) = verify("list.pem") else {
        println!("  openssl is not installed: only the form of the lists is checked");
        assert_eq!(fetch("crl")[0], 0x30);
        return;
    };
    assert!(good, "{said}");
    let revoke = RevokeDeviceRequest {
        device_id,
        reason: "stolen".to_owned(),
        ..Default::default()
    };
    cluster.client().revoke_device(revoke).await.unwrap();
    let said = eventually("the revoked certificate on the list", async || {
        std::fs::write(place("newer.pem"), fetch("pem")).unwrap();
        let (good, said) = verify("newer.pem").ok()?;
        (!good).then_some(said)
    })
    .await;
    assert!(said.contains("revoked"), "{said}");
}

pub(crate) async fn authorities_are_replaced_one_and_all(cluster: &mut Cluster) {
    let (_, device_id, _agent) = working_node(cluster, "steady-authority").await;
    let numbers = |status: &Value| -> Vec<u64> {
        let all = status["authorities"].as_array().unwrap().iter();
        all.filter(|one| one["status"] == "active")
            .map(|one| one["number"].as_u64().unwrap())
            .collect()
    };
    let before = numbers(&status(cluster, "the replicas to be ready", replicas_ready).await);
    let asked = cluster.palyra(&[
        "ca",
        "rotate",
        "authority",
        "--replica",
        "r2",
        "--reason",
        "copied",
        "-o",
        "json",
    ]);
    assert_eq!(asked.ok().field("asked"), 1);
    let expected = [before[0], before[1] + 1, before[2]];
    status(cluster, "a new authority", |now| numbers(now) == expected).await;
    assert_eq!(
        cluster
            .palyra(&["ca", "rotate", "authority", "--all", "-o", "json"])
            .ok()
            .field("asked"),
        3
    );
    let expected = [before[0] + 1, before[1] + 2, before[2] + 1];
    status(cluster, "new authorities", |now| numbers(now) == expected).await;
    works(cluster, &device_id, "old certificates").await;
    let (_, fresh, _fresh) = working_node(cluster, "by-a-new-authority").await;
    works(cluster, &fresh, "new certificates").await;
    // The keys of all of them are where a restart finds them.
    for id in 1..=3 {
        cluster.kill(id);
        cluster.start_replica(id);
    }
    works(cluster, &fresh, "restarted").await;
}
