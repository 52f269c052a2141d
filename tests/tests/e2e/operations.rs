//! Birth, joining, configuration, the journal: what an operator of replicas meets.

use std::io::{BufRead, BufReader, Lines};
use std::net::TcpListener;
use std::process::{Child, ChildStdout, Command, Stdio};

use palyra_proto::cluster::v1::RemoveReplicaRequest;
use palyra_tests::cluster::{Cluster, binary};
use serde_json::Value;

pub(crate) async fn birth_gives_three_voters(cluster: &mut Cluster) {
    let status = cluster.becomes("three reachable voters", |status| {
        status.voters == 3
            && status
                .replicas
                .iter()
                .all(|replica| replica.reachable && replica.status == "voter")
    });
    let status = status.await;
    assert_eq!(status.failures_tolerated, 1);
    assert!((1..=3).contains(&status.leader_id));
    for id in 1..=3 {
        let seen = cluster.client_at(id).status().await.unwrap();
        assert_eq!(
            (seen.cluster_id, seen.leader_id),
            (status.cluster_id.clone(), status.leader_id),
            "at replica {id}"
        );
    }
    let shown = cluster.palyra(&["cluster", "status"]).ok();
    assert!(
        shown.out.contains("r1") && shown.out.contains("r3"),
        "{}",
        shown.out
    );
}

pub(crate) async fn a_join_token_is_good_once(cluster: &mut Cluster) {
    let minted = cluster
        .palyra(&["cluster", "join-token", "--name", "r4", "-o", "json"])
        .ok();
    let token = minted.field("token").as_str().unwrap().to_owned();
    let wrong_name = cluster.join(&token, "r5", 5);
    assert_ne!(wrong_name.code, 0, "a token is for one name");
    assert!(wrong_name.err.contains("r4"), "{}", wrong_name.err);
    let joined = cluster.join(&token, "r4", 4);
    assert_eq!(joined.code, 0, "{}", joined.err);
    std::fs::rename(cluster.folder(4), format!("{}-first", cluster.folder(4))).unwrap();
    let again = cluster.join(&token, "r4", 4);
    assert_ne!(again.code, 0);
    assert!(
        again.err.contains("used") && again.err.contains("join-token"),
        "{}",
        again.err
    );
    // It never runs, so it must not stay a member.
    let client = cluster.client();
    let replicas = client.status().await.unwrap().replicas;
    let replica_id = replicas.iter().find(|replica| replica.name == "r4").unwrap().id;
    let remove = RemoveReplicaRequest {
        replica_id,
        force: true,
        ..Default::default()
    };
    client.remove_replica(remove).await.unwrap();
    cluster
        .becomes("r4 to be gone", |status| status.voters == 3)
        .await;
}

pub(crate) fn a_foreign_data_folder_is_refused(cluster: &mut Cluster) {
    let photos = cluster.path().join("photos");
    std::fs::create_dir(&photos).unwrap();
    std::fs::write(photos.join("1.jpg"), "x").unwrap();
    let folder = photos.display().to_string();
    let init = cluster.palyra(&[
        "cluster",
        "init",
        "--data-dir",
        &folder,
        "--name",
        "x",
        "--context",
        "x",
    ]);
    assert!(
        init.code != 0 && init.err.contains(&folder),
        "{} {}",
        init.code,
        init.err
    );
    let token = cluster
        .palyra(&["cluster", "join-token", "--name", "photos", "-o", "json"])
        .ok();
    let file = cluster.path().join("photos.token");
    std::fs::write(&file, token.field("token").as_str().unwrap()).unwrap();
    let file = file.display().to_string();
    let arguments = [
        "join",
        "--token-file",
        &file,
        "--data-dir",
        &folder,
        "--name",
        "photos",
        "--base-port",
        "19990",
    ];
    let joined = cluster.palyrad(&arguments);
    assert!(
        joined.code != 0 && joined.err.contains(&folder),
        "{} {}",
        joined.code,
        joined.err
    );
    let node = cluster.palyra(&["node", "run", "--data-dir", &folder]);
    assert_eq!(node.code, 7, "{}", node.err);
    assert!(node.err.contains("not a node's data folder"), "{}", node.err);
    assert_eq!(
        std::fs::read_dir(&photos).unwrap().count(),
        1,
        "nothing was written"
    );
}

pub(crate) fn an_unknown_key_in_a_config_is_named(cluster: &mut Cluster) {
    let good = std::fs::read_to_string(format!("{}/palyrad.toml", cluster.folder(1))).unwrap();
    let bad = format!("{}/bad.toml", cluster.folder(1));
    std::fs::write(&bad, format!("colour = \"blue\"\n{good}")).unwrap();
    for verb in ["check-config", "run"] {
        let refused = cluster.palyrad(&[verb, "--config", &bad]);
        assert_eq!(refused.code, 2, "{}", refused.err);
        assert!(
            refused.err.contains("colour") && refused.err.contains("bad.toml"),
            "{}",
            refused.err
        );
    }
    std::fs::remove_file(bad).unwrap();
}

pub(crate) fn a_port_in_use_is_named(cluster: &mut Cluster) {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let copy = cluster.path().join("port");
    std::fs::create_dir(&copy).unwrap();
    // A second process on the same folder is the other half of this mistake: the lock is found first.
    let second = cluster.palyrad(&["run", "--config", &format!("{}/palyrad.toml", cluster.folder(1))]);
    assert!(
        second.code != 0 && second.err.contains(&cluster.folder(1)),
        "{}",
        second.err
    );
    let folder = copy.join("r9").display().to_string();
    let base = (port - 1).to_string();
    let home = copy.join("operator").display().to_string();
    let init = Command::new(binary("palyra"))
        .args([
            "cluster",
            "init",
            "--data-dir",
            &folder,
            "--name",
            "r9",
            "--base-port",
            &base,
            "--context",
            "p",
        ])
        .env("PALYRA_HOME", &home)
        .output()
        .unwrap();
    assert!(init.status.success(), "{}", String::from_utf8_lossy(&init.stderr));
    let refused = cluster.palyrad(&["run", "--config", &format!("{folder}/palyrad.toml")]);
    assert_eq!(refused.code, 7, "{}", refused.err);
    assert!(refused.err.contains(&port.to_string()), "{}", refused.err);
}

pub(crate) fn the_journal_holds(cluster: &mut Cluster) {
    let verified = cluster.palyra(&["journal", "verify"]).ok();
    assert!(!verified.out.is_empty());
    let tail = cluster
        .palyra(&["journal", "tail", "--last", "20", "-o", "json"])
        .ok();
    assert!(tail.out.contains("device"), "{}", tail.out);
}

/// A command that goes on, and what it prints.
struct Watch {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watch {
    fn begin(cluster: &Cluster, arguments: &[&str]) -> Watch {
        let mut child = Command::new(binary("palyra"))
            .args(arguments)
            .env("PALYRA_HOME", cluster.path().join("operator"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Watch { child, lines }
    }

    fn line(&mut self) -> Value {
        let line = self.lines.next().expect("the watch ended").unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every list and every single thing, in every format, from each replica.
pub(crate) fn every_format_is_what_it_says(cluster: &mut Cluster) {
    // A device that never ran an agent is no node.
    let device = cluster.palyra(&["node", "ls", "-o", "json"]).ok();
    let device = device.field("items")[0]["device_id"].as_str().unwrap().to_owned();
    let job = cluster.palyra(&["job", "ls", "-o", "json"]).ok();
    let job = job.field("items")[0]["id"].as_str().unwrap().to_owned();
    let pairing = cluster.palyra(&["pairing", "ls", "-o", "json"]).ok();
    let pairing = pairing.field("items")[0]["id"].as_str().unwrap().to_owned();
    let verbs: &[&[&str]] = &[
        &["cluster", "status"],
        &["node", "ls"],
        &["node", "describe", &device],
        &["device", "ls"],
        &["device", "show", &device],
        &["job", "ls"],
        &["job", "get", &job],
        &["pairing", "ls"],
        &["pairing", "show", &pairing],
        &["operator", "ls"],
        &["journal", "tail"],
        &["journal", "verify"],
        &["whoami"],
        &["version"],
    ];
    for (at, verb) in verbs.iter().enumerate() {
        for (shift, format) in ["table", "wide", "json", "jsonl", "yaml"].iter().enumerate() {
            // Each verb at each replica, each format too; not each of both.
            let id = 1 + u64::try_from((at + shift) % 3).unwrap();
            let endpoint = cluster.node_addr(id);
            let words = [*verb, &["-o", format, "--endpoint", &endpoint][..]].concat();
            let said = cluster.palyra(&words).ok();
            // Notes are for people; a program gets its answer and nothing else.
            let told = matches!(*format, "table" | "wide");
            assert!(told || said.err.is_empty(), "{words:?}: {}", said.err);
            assert!(
                !said.out.is_empty() && !said.out.contains('\u{1b}'),
                "{words:?}: {}",
                said.out
            );
            let json = |text: &str| serde_json::from_str::<Value>(text).is_ok();
            let holds = match *format {
                "json" => json(&said.out),
                "jsonl" => said.out.lines().all(json),
                "yaml" => !json(&said.out) && said.out.contains(": "),
                _ => !json(&said.out),
            };
            assert!(holds, "{words:?}: {}", said.out);
        }
    }
}

/// The first replica of the context hangs: what is asked and what is changed goes on at the others.
pub(crate) async fn commands_leave_a_frozen_replica(cluster: &mut Cluster) {
    cluster.freeze(1);
    let listed = cluster.palyra(&["node", "ls"]);
    let status = cluster.palyra(&["cluster", "status", "-o", "json"]);
    let out = cluster.path().join("wanda.json").display().to_string();
    let added = cluster.palyra(&["operator", "add", "wanda", "--role", "viewer", "--out", &out]);
    let device = cluster
        .palyra(&["device", "ls", "--status", "trusted", "-o", "json"])
        .ok();
    let device = device.field("items")[0]["id"].as_str().unwrap().to_owned();
    let revoked = cluster.palyra(&["device", "revoke", &device, "--reason", "only a test"]);
    let only = cluster.node_addr(1);
    let alone = cluster.palyra(&["node", "ls", "--endpoint", &only, "--timeout", "1s"]);
    let remove = ["operator", "remove", "wanda", "--reason", "only a test"];
    let changed = cluster.palyra(&[&remove[..], &["--endpoint", &only, "--timeout", "1s"]].concat());
    cluster.thaw(1);
    assert_eq!(listed.code, 0, "{}", listed.err);
    let seen = status.ok();
    let unreachable = seen.field("replicas")[0]["reachable"] == false;
    assert!(unreachable, "{}", seen.out);
    let _ = added.ok();
    assert_eq!(
        revoked.code, 0,
        "a frozen replica's authority lapses: {}{}",
        revoked.out, revoked.err
    );
    assert_eq!(alone.code, 4, "{}", alone.err);
    assert_eq!(
        changed.code, 4,
        "nothing was sent, so the outcome is known: {}",
        changed.err
    );
    let _ = cluster.palyra(&remove).ok();
    cluster
        .becomes("all three replicas", |status| {
            status.replicas.iter().filter(|r| r.reachable).count() == 3
        })
        .await;
}

/// A watch that loses its replica goes on at another, and tells each change once.
pub(crate) async fn a_watch_goes_on_elsewhere(cluster: &mut Cluster) {
    let mut watch = Watch::begin(cluster, &["operator", "ls", "--watch", "-o", "jsonl"]);
    let listed = cluster.palyra(&["operator", "ls", "-o", "json"]).ok();
    for operator in listed.field("items").as_array().unwrap() {
        let line = watch.line();
        assert_eq!(
            (&line["change"], &line["item"]["name"]),
            (&"listed".into(), &operator["name"])
        );
    }
    // The context's first replica is the one that a command asks first.
    cluster.kill(1);
    let out = cluster.path().join("vera.json").display().to_string();
    let _ = cluster
        .palyra(&["operator", "add", "vera", "--role", "viewer", "--out", &out])
        .ok();
    let added = watch.line();
    assert_eq!(
        (&added["change"], &added["item"]["name"]),
        (&"added".into(), &"vera".into())
    );
    cluster.start_replica(1);
    let _ = cluster
        .palyra(&["operator", "remove", "vera", "--reason", "only a test"])
        .ok();
    let removed = watch.line();
    assert_eq!(
        (&removed["change"], &removed["item"]["status"]),
        (&"changed".into(), &"removed".into())
    );
    cluster
        .becomes("all three replicas", |status| {
            status.replicas.iter().filter(|r| r.reachable).count() == 3
        })
        .await;
}
