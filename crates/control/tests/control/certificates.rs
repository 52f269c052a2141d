//! The life of certificates, at one replica: first use, copies, recovery, rotation, operators' own.

use bytes::Bytes;
use futures::FutureExt as _;
use palyra_control::{Caller, End, Error, Outbound, ReadOptions, RecoverRequest, Renewal};
use palyra_pki::{KeyPair, PeerIdentity, Recovery, sha256};
use palyra_state::access::Role;

use crate::support::{Cluster, Machine, next, soon, source};

const LOCAL: ReadOptions = ReadOptions {
    local: true,
    min_index: 0,
};

fn key() -> KeyPair {
    let mut rng = palyra_platform::fill_random;
    KeyPair::generate(&mut rng).unwrap()
}

fn renewal(key: &KeyPair, counter: u64) -> Renewal {
    Renewal {
        csr: key.make_csr().unwrap().into(),
        counter,
        ..Renewal::default()
    }
}

fn code(error: &Error) -> String {
    error.code().to_string()
}

/// The machine with a renewed certificate.
async fn renew(cluster: &Cluster, machine: &Machine, key: KeyPair, counter: u64) -> Result<Machine, Error> {
    let caller = cluster.control.admit_node(machine.peer())?;
    let brought = cluster.control.renew(&caller, renewal(&key, counter)).await?;
    let mut renewed = Machine::new(&machine.name);
    renewed.device_id = machine.device_id;
    renewed.csr = key.make_csr().unwrap().into();
    renewed.key = key;
    renewed.identity = Some(PeerIdentity::from_der(&brought.chain[0]).unwrap());
    Ok(renewed)
}

#[tokio::test]
async fn the_first_use_ends_the_old_certificate_and_its_session() {
    let cluster = Cluster::found().await;
    let old = cluster.node("m").await;
    let session = old.attach(&cluster, &[]).await.unwrap();
    let guard = cluster.control.accept(old.peer(), "192.0.2.7:1").unwrap();
    let new = renew(&cluster, &old, key(), 1).await.unwrap();
    assert!(
        cluster.control.admit_node(old.peer()).is_ok(),
        "nothing was used yet"
    );
    let newer = new.attach(&cluster, &[]).await.unwrap();
    assert!(
        newer.attached().certificate.is_some(),
        "it is told how long it lives"
    );
    assert_eq!(soon(guard.closed()).await, End::Replaced);
    let goodbye = next(&session.outgoing()).await;
    assert!(matches!(
        goodbye,
        Some(Outbound::Goodbye {
            end: End::Superseded,
            ..
        })
    ));
    let refused = cluster.control.admit_node(old.peer()).unwrap_err();
    assert_eq!(code(&refused), "E0312");
    assert_eq!(code(&old.attach(&cluster, &[]).await.unwrap_err()), "E0312");
}

#[tokio::test]
async fn a_refused_connection_stays_entered_and_a_revocation_closes_it() {
    let cluster = Cluster::found().await;
    let old = cluster.node("m").await;
    let new = renew(&cluster, &old, key(), 1).await.unwrap();
    let session = new.attach(&cluster, &[]).await.unwrap();
    let refused = cluster.control.accept(old.peer(), "192.0.2.7:1").unwrap_err();
    assert_eq!(code(&refused.error), "E0312");
    let stays = refused.stays.unwrap();
    assert_eq!(cluster.control.connection_count(), 1);
    assert!(stays.closed().now_or_never().is_none(), "it is told why");

    let revoked = soon(cluster.control.revoke_device(&cluster.operator(), "", "m", "", 1)).await;
    let revoked = revoked.unwrap();
    until_enforced(&cluster, revoked.index).await;
    assert_eq!(stays.closed().now_or_never(), Some(End::Revoked));
    // Whoever comes now is refused, and keeps no revocation waiting by coming again.
    let late = cluster.control.accept(old.peer(), "192.0.2.7:2").unwrap_err();
    let mut progress = cluster.control.watch_revocation("m", 20_000).await.unwrap();
    drop((stays, session));
    let mut last = soon(progress.next()).await;
    while let Some(next) = soon(progress.next()).await {
        last = Some(next);
    }
    assert!(last.unwrap().complete);
    drop(late);
}

/// Waits until a replica has carried out what the journal says up to `index`.
async fn until_enforced(cluster: &Cluster, index: u64) {
    soon(async {
        while cluster.control.enforced_index() < index {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn two_machines_with_one_folder_are_found_and_the_first_goes_on() {
    let cluster = Cluster::found().await;
    let first = cluster.node("m").await;
    let lost = key();
    renew(&cluster, &first, key_of(&lost), 1).await.unwrap();
    let again = renew(&cluster, &first, key_of(&lost), 1).await.unwrap();
    let suspected = renew(&cluster, &first, key(), 1).await.err().unwrap();
    assert_eq!(code(&suspected), "E0314");
    let (seen, _) = cluster
        .control
        .get_device(LOCAL, &first.device_id.to_string())
        .await
        .unwrap();
    let suspicion = seen.record.suspicion.unwrap();
    assert_eq!((suspicion.shown_counter, suspicion.counter), (1, 1));
    // The one that was first keeps its session and goes on renewing.
    let session = again.attach(&cluster, &[]).await.unwrap();
    let third = renew(&cluster, &again, key(), 2).await.unwrap();
    assert!(session.attached().epoch > 0);
    // Nobody recovers until an operator has looked.
    assert_eq!(
        code(&recover(&cluster, &third, key(), 3, |_| {}).await.unwrap_err()),
        "E0314"
    );
    let device = first.device_id.to_string();
    let operator = cluster.operator();
    cluster
        .control
        .clear_clone(&operator, "", &device, "one")
        .await
        .unwrap();
    let taken = recover(&cluster, &third, key(), 1, |_| {}).await.unwrap();
    assert_eq!(taken, 3, "whatever counter it has, once");
}

fn key_of(key: &KeyPair) -> KeyPair {
    KeyPair::from_pkcs8(key.to_pkcs8()).unwrap()
}

/// Recovers with a machine's key, after something was changed; answers the counter.
async fn recover(
    cluster: &Cluster,
    machine: &Machine,
    fresh: KeyPair,
    counter: u64,
    change: impl FnOnce(&mut RecoverRequest),
) -> Result<u64, Error> {
    let hello = cluster.control.hello(&source(5))?;
    let csr = fresh.make_csr().unwrap();
    let (cluster_id, device_id) = (hello.cluster_id.to_string(), machine.device_id.to_string());
    let signed = Recovery {
        cluster_id: &cluster_id,
        device_id: &device_id,
        certificate: machine.peer().fingerprint,
        server_end_point: source(5).end_point,
        csr_sha256: sha256(&csr),
        node_nonce: [3; 32],
        server_nonce: hello.server_nonce,
        counter,
    };
    let mut request = RecoverRequest {
        device_id: device_id.clone(),
        certificate_sha256: machine.peer().fingerprint.to_vec().into(),
        csr: csr.into(),
        counter,
        node_nonce: vec![3; 32].into(),
        server_nonce: hello.server_nonce.to_vec().into(),
        signature: signed.sign(&machine.key).unwrap().into(),
    };
    change(&mut request);
    let recovered = cluster.control.recover(&source(5), request).await?;
    Ok(recovered.counter)
}

#[tokio::test]
async fn only_the_key_of_the_newest_certificate_recovers() {
    let cluster = Cluster::found().await;
    let old = cluster.node("m").await;
    let other = cluster.node("o").await;
    let before = cluster.last_log();
    type Bend<'a> = &'a dyn Fn(&mut RecoverRequest);
    let bent: [(&str, Bend<'_>); 6] = [
        ("E0316", &|r| r.counter += 1),
        ("E0316", &|r| r.csr = key().make_csr().unwrap().into()),
        ("E0316", &|r| r.node_nonce = vec![4; 32].into()),
        ("E0316", &|r| r.signature = Bytes::from_static(b"none")),
        ("E0303", &|r| {
            r.certificate_sha256 = other.peer().fingerprint.to_vec().into()
        }),
        ("E1023", &|r| r.server_nonce = vec![9; 32].into()),
    ];
    for (expected, change) in bent {
        let refused = recover(&cluster, &old, key(), 1, change).await.unwrap_err();
        assert_eq!(code(&refused), expected, "{refused}");
    }
    assert_eq!(cluster.last_log(), before, "a stranger makes no entry");
    let new = renew(&cluster, &old, key(), 1).await.unwrap();
    new.attach(&cluster, &[]).await.unwrap();
    assert_eq!(recover(&cluster, &new, key(), 2, |_| {}).await.unwrap(), 2);
    let copy = recover(&cluster, &old, key(), 3, |_| {}).await.unwrap_err();
    assert_eq!(
        code(&copy),
        "E0314",
        "whoever has the old key is not who used the new one"
    );
    let operator = cluster.operator();
    let device = old.device_id.to_string();
    cluster
        .control
        .revoke_device(&operator, "", &device, "lost", 1)
        .await
        .unwrap();
    let revoked = recover(&cluster, &new, key(), 3, |_| {}).await.unwrap_err();
    assert_eq!(code(&revoked), "E0302");
}

#[tokio::test]
async fn a_window_of_nothing_closes_recovery() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let operator = cluster.operator();
    cluster
        .control
        .set_certificate_policy(&operator, "", 0)
        .await
        .unwrap();
    let (policy, _) = cluster.control.certificate_policy(LOCAL).await.unwrap();
    assert_eq!((policy.recovery_ms, policy.set_by.as_str()), (0, "operator/root"));
    let refused = recover(&cluster, &node, key(), 1, |_| {}).await.unwrap_err();
    assert_eq!(code(&refused), "E0315");
}

#[tokio::test]
async fn a_rotation_is_told_in_the_session_and_at_the_next_attach() {
    let cluster = Cluster::found().await;
    let node = cluster.node("m").await;
    let session = node.attach(&cluster, &[]).await.unwrap();
    let operator = cluster.operator();
    let device = node.device_id.to_string();
    let asked = cluster
        .control
        .rotate_device(&operator, "", &device, ("spring", 0), 0)
        .await
        .unwrap();
    let index = asked.device.record.rotation.unwrap().index;
    let is_it = |message: Option<Outbound>| match message {
        Some(Outbound::Rotate {
            index: told, reason, ..
        }) => told == index && reason == "spring",
        _ => false,
    };
    assert!(is_it(next(&session.outgoing()).await));
    let session = node.attach(&cluster, &[]).await.unwrap();
    assert!(is_it(next(&session.outgoing()).await));
    let waiting = {
        let (control, operator, device) = (cluster.control.clone(), operator.clone(), device.clone());
        palyra_platform::spawn(async move {
            control
                .rotate_device(&operator, "", &device, ("again", 0), 30_000)
                .await
        })
    };
    let new = renew(&cluster, &node, key(), 1).await.unwrap();
    let _session = new.attach(&cluster, &[]).await.unwrap();
    let done = soon(waiting).await.unwrap().unwrap();
    let rotation = done.device.record.rotation.unwrap();
    assert!(
        rotation.used_at >= rotation.fetched_at && rotation.fetched_at > 0,
        "{rotation:?}"
    );
}

#[tokio::test]
async fn an_operator_renews_itself_and_the_old_certificate_ends_when_the_new_is_used() {
    let cluster = Cluster::found().await;
    let admin = cluster.operator();
    let (first, second) = (key(), key());
    let added = cluster
        .control
        .add_operator(
            &admin,
            "",
            "vera",
            "viewer",
            &first.make_csr().unwrap(),
            3_600_000,
        )
        .await
        .unwrap();
    let old = PeerIdentity::from_der(&added.chain[0]).unwrap();
    let caller = cluster.control.admit_operator(&old, Role::Viewer).unwrap();
    let renewed = cluster
        .control
        .renew_operator(&caller, "", &second.make_csr().unwrap(), 0)
        .await
        .unwrap();
    let new = PeerIdentity::from_der(&renewed.chain[0]).unwrap();
    let life = |peer: &PeerIdentity| peer.not_after_ms - peer.not_before_ms;
    assert!(
        life(&new).abs_diff(life(&old)) <= 2_000,
        "as long a life as before"
    );
    assert!(cluster.control.admit_operator(&old, Role::Viewer).is_ok());
    let caller = cluster.control.admit_operator(&new, Role::Viewer).unwrap();
    cluster.control.confirm_certificate(&caller, "").await.unwrap();
    let refused = cluster.control.admit_operator(&old, Role::Viewer).unwrap_err();
    assert_eq!(code(&refused), "E0312");
    let missing = cluster
        .control
        .revoke_operator_certificate(&admin, "", &"0".repeat(16), "")
        .await
        .unwrap_err();
    assert_eq!(code(&missing), "E1016");
    let hex: String = new.fingerprint.iter().map(|byte| format!("{byte:02x}")).collect();
    cluster
        .control
        .revoke_operator_certificate(&admin, "", &hex[..12], "lost")
        .await
        .unwrap();
    let refused = cluster.control.admit_operator(&new, Role::Viewer).unwrap_err();
    assert_eq!(code(&refused), "E0304");
    let Caller::Operator { name, .. } = caller else {
        panic!("it is one");
    };
    assert_eq!(name, "vera");
}
