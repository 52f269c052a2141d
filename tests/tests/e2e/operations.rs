//! Birth, joining, configuration, the journal: what an operator of replicas meets.

use std::net::TcpListener;

use palyra_proto::cluster::v1::RemoveReplicaRequest;
use palyra_tests::cluster::{Cluster, binary};

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
    let init = std::process::Command::new(binary("palyra"))
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
