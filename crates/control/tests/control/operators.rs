//! Operators, the journal, and renewal.

use palyra_control::{End, Error, ReadOptions, Renewal, TailOptions};
use palyra_pki::{KeyPair, PeerIdentity};
use palyra_platform as platform;
use palyra_state::Code;
use palyra_state::access::Role;

use crate::support::{Cluster, soon};

fn code(error: &Error) -> Option<Code> {
    if let Error::Rejected(reject) = error {
        Some(reject.kind())
    } else {
        None
    }
}

fn csr() -> Vec<u8> {
    KeyPair::generate(&mut platform::fill_random)
        .unwrap()
        .make_csr()
        .unwrap()
}

pub(crate) async fn add(cluster: &Cluster, name: &str, role: &str) -> PeerIdentity {
    let added = cluster
        .control
        .add_operator(&cluster.operator(), "", name, role, &csr(), 0)
        .await
        .unwrap();
    assert_eq!(added.chain.len(), 2);
    PeerIdentity::from_der(&added.chain[0]).unwrap()
}

#[tokio::test]
async fn a_removed_operator_loses_connection_and_access() {
    let cluster = Cluster::found().await;
    let viewer = add(&cluster, "vera", "viewer").await;
    assert!(cluster.control.admit_operator(&viewer, Role::Viewer).is_ok());
    let refused = cluster
        .control
        .admit_operator(&viewer, Role::Operator)
        .unwrap_err();
    assert_eq!(code(&refused), Some(Code::RoleTooLow));

    let idle = cluster.control.accept(&viewer, "192.0.2.9").unwrap();
    let closer = platform::spawn(async move {
        let end = idle.closed().await;
        drop(idle);
        end
    });
    soon(
        cluster
            .control
            .remove_operator(&cluster.operator(), "", "vera", "left"),
    )
    .await
    .unwrap();
    assert_eq!(soon(closer).await.unwrap(), End::Revoked);
    assert_eq!(
        cluster.control.connection_count(),
        0,
        "the answer came after the connection was closed"
    );
    let refused = cluster.control.admit_operator(&viewer, Role::Viewer).unwrap_err();
    assert!(
        matches!(
            code(&refused),
            Some(Code::OperatorRemoved | Code::CertificateRevoked)
        ),
        "{refused:?}"
    );
    let last = cluster
        .control
        .remove_operator(&cluster.operator(), "", "root", "")
        .await
        .unwrap_err();
    assert_eq!(code(&last), Some(Code::LastAdmin));
}

#[tokio::test]
async fn a_repeated_removal_is_enforced_like_the_first() {
    let cluster = Cluster::found().await;
    add(&cluster, "vera", "viewer").await;
    let request = crate::support::fresh_id().to_string();
    for _ in 0..2 {
        // The second entry has no rows of its own. Waiting for one in vain would take ten seconds.
        let operator = cluster.operator();
        let removed = cluster
            .control
            .remove_operator(&operator, &request, "vera", "left");
        platform::timeout(std::time::Duration::from_secs(8), removed)
            .await
            .expect("the follower has carried out all there is")
            .unwrap();
    }
}

#[tokio::test]
async fn bad_operators_are_not_added() {
    let cluster = Cluster::found().await;
    let operator = cluster.operator();
    let control = &cluster.control;
    let before = cluster.last_log();
    for (name, role, request, ttl, field) in [
        ("vera", "queen", csr(), 0, "role"),
        ("Vera!", "viewer", csr(), 0, "name"),
        ("vera", "viewer", vec![1, 2, 3], 0, "csr"),
        ("vera", "viewer", csr(), u64::MAX, "ttl_ms"),
    ] {
        let error = control
            .add_operator(&operator, "", name, role, &request, ttl)
            .await
            .unwrap_err();
        assert!(
            matches!(error, Error::Invalid { field: found, .. } if found == field),
            "{field}: {error:?}"
        );
    }
    assert_eq!(cluster.last_log(), before, "no entry");
}

#[tokio::test]
async fn a_renewed_certificate_works_beside_the_old_one_until_it_is_used() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let caller = cluster.control.admit_node(node.peer()).unwrap();
    let renewal = |csr: Vec<u8>| Renewal {
        csr: csr.into(),
        counter: 1,
        ..Renewal::default()
    };
    let brought = cluster.control.renew(&caller, renewal(csr())).await.unwrap();
    let renewed = PeerIdentity::from_der(&brought.chain[0]).unwrap();
    assert!(cluster.control.admit_node(&renewed).is_ok());
    assert!(cluster.control.admit_node(node.peer()).is_ok());
    let error = cluster
        .control
        .renew(&caller, renewal(b"no csr".to_vec()))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Invalid { field: "csr", .. }), "{error:?}");
}

#[tokio::test]
async fn the_journal_is_followed_and_verified() {
    let cluster = Cluster::found().await;
    let options = TailOptions {
        follow: true,
        action_prefix: "access.".to_owned(),
        subject: "vera".to_owned(),
        ..TailOptions::default()
    };
    let mut tail = cluster.control.tail(options).await.unwrap();
    add(&cluster, "vera", "viewer").await;
    let part = soon(tail.next()).await.unwrap();
    assert_eq!(part.rows[0].action, "access.operator_added");
    let waiting = platform::spawn(async move { tail.next().await });
    soon(
        cluster
            .control
            .remove_operator(&cluster.operator(), "", "vera", ""),
    )
    .await
    .unwrap();
    let part = soon(waiting).await.unwrap().unwrap();
    assert_eq!(
        part.rows[0].action, "access.operator_removed",
        "rows that follow wake the reader"
    );

    let mut last = cluster
        .control
        .tail(TailOptions {
            last: 1,
            ..TailOptions::default()
        })
        .await
        .unwrap();
    assert_eq!(soon(last.next()).await.unwrap().rows.len(), 1);
    assert!(soon(last.next()).await.is_none(), "without follow it ends");
    let verified = cluster
        .control
        .verify_journal(ReadOptions::default())
        .await
        .unwrap();
    assert!(verified.outcome.unwrap().rows >= 3);
}

#[tokio::test]
async fn the_newest_rows_come_in_parts_that_fit_a_message() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let operator = cluster.operator();
    for _ in 0..300 {
        cluster
            .control
            .invoke(&operator, node.invoke("echo", "{}"))
            .await
            .unwrap();
    }
    let options = TailOptions {
        last: 290,
        ..TailOptions::default()
    };
    let mut tail = cluster.control.tail(options).await.unwrap();
    let mut parts = Vec::new();
    while let Some(part) = soon(tail.next()).await {
        parts.push(part.rows.len());
    }
    assert_eq!(parts, [256, 34]);
}
