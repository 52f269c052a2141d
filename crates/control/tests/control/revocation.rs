//! How far a revocation is, asked anywhere; and what is left of a device that was removed, or purged.

use std::time::Duration;

use palyra_control::{Error, Progress, ReadOptions, Remove, Revocations, Stand, Timings};

use crate::support::{Cluster, quick, soon, until};

/// Everything that is told until the end.
async fn to_the_end(mut revocation: Revocations) -> Vec<Progress> {
    let mut told = Vec::new();
    while let Some(progress) = soon(revocation.next()).await {
        told.push(progress);
    }
    told
}

fn stand(progress: &Progress, id: u64) -> Stand {
    let mut replicas = progress.replicas.iter();
    let found = replicas.find(|replica| replica.replica_id == id);
    found.unwrap().stand.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_far_a_revocation_is_can_be_asked_anywhere_and_again() {
    let timings = Timings {
        max_staleness: Duration::from_secs(1),
        call_timeout: Duration::from_secs(1),
        ..quick()
    };
    let (one, two, _three) = Cluster::of_three(timings).await;
    let node = one.node("m").await;
    let trusted = one.control.watch_revocation("m", 0).await.unwrap_err();
    assert!(matches!(trusted, Error::Invalid { .. }), "{trusted:?}");
    one.bus.isolate(3);
    let revoked = soon(one.control.revoke_device(&one.operator(), "", "m", "", 1))
        .await
        .unwrap();
    assert!(revoked.pending.contains(&3), "{revoked:?}");
    until(&two.replica, |view| view.index() >= revoked.index).await;
    // At another replica than the one that revoked.
    let told = to_the_end(two.control.watch_revocation("m", 20_000).await.unwrap()).await;
    assert!(matches!(stand(&told[0], 3), Stand::Pending { .. }), "{told:?}");
    let last = told.last().unwrap();
    assert_eq!((last.complete, last.index), (true, revoked.index));
    assert_eq!(stand(last, 1), Stand::Closed);
    assert_eq!(stand(last, 3), Stand::Lapsed);
    let device = node.device_id.to_string();
    let again = to_the_end(one.control.watch_revocation(&device, 20_000).await.unwrap()).await;
    assert!(again.last().unwrap().complete, "{again:?}");
}

#[tokio::test]
async fn a_wait_that_ends_says_who_is_pending_and_why() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let stuck = cluster.control.accept(node.peer(), "192.0.2.1").unwrap();
    let operator = cluster.operator();
    soon(cluster.control.revoke_device(&operator, "", "m", "", 1))
        .await
        .unwrap();
    let told = to_the_end(cluster.control.watch_revocation("m", 50).await.unwrap()).await;
    let last = told.last().unwrap();
    assert!(!last.complete);
    let Stand::Pending { reason } = stand(last, 1) else {
        panic!("{last:?}")
    };
    assert_eq!(reason, "it is closing connections");
    drop(stuck);
    let told = to_the_end(cluster.control.watch_revocation("m", 0).await.unwrap()).await;
    assert!(told.last().unwrap().complete);
}

#[tokio::test]
async fn a_removed_device_is_forgotten_and_stays_refused_until_it_is_purged() {
    let cluster = Cluster::found().await;
    let (control, operator) = (&cluster.control, cluster.operator());
    let mut node = cluster.node("m").await;
    let other = cluster.node("n").await;
    let remove = Remove {
        reason: "sold",
        revoke: true,
        wait_ms: 0,
    };
    let early = Remove {
        revoke: false,
        ..remove
    };
    let refused = control
        .remove_device(&operator, "", "m", early)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), "E0322");
    let removed = soon(control.remove_device(&operator, "", "m", remove))
        .await
        .unwrap();
    assert_eq!((&removed.enforced[..], &removed.pending[..]), (&[1][..], &[][..]));
    let local = ReadOptions::default();
    let listed = async |status: &str| {
        let page = control.list_devices(local, status, "", 0).await.unwrap();
        page.items
            .iter()
            .map(|device| device.record.id)
            .collect::<Vec<_>>()
    };
    assert_eq!(listed("").await, [other.device_id]);
    assert_eq!(listed("removed").await, [node.device_id]);
    assert_eq!(listed("all").await.len(), 2);
    assert!(
        control
            .get_node(local, &node.device_id.to_string())
            .await
            .is_err()
    );
    let (shown, _) = control.get_device(local, "m").await.unwrap();
    assert_eq!(shown.ban.unwrap().reason, "sold", "its name still finds it");
    assert_eq!(control.admit_node(node.peer()).unwrap_err().code(), "E0302");
    let told = to_the_end(control.watch_revocation("m", 0).await.unwrap()).await;
    assert_eq!(told.last().unwrap().index, removed.index);

    let again = node.pair_by_ticket(&cluster, 2).await.unwrap_err();
    assert_eq!(again.code(), "E0320");
    let early = control
        .purge_device(&operator, "", "m", "", false)
        .await
        .unwrap_err();
    assert_eq!(early.code(), "E0324");
    control
        .purge_device(&operator, "", "m", "a mistake", true)
        .await
        .unwrap();
    assert_eq!(
        control.admit_node(node.peer()).unwrap_err().code(),
        "E0303",
        "its old certificate is good for nothing"
    );
    let accepted = node.pair_by_ticket(&cluster, 3).await.unwrap();
    node.let_in(&cluster, &accepted).await;
    assert!(control.admit_node(node.peer()).is_ok(), "a new device");
}
