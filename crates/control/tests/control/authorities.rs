//! Roots and authorities that are replaced while nodes come and go.

use palyra_control::{Error, Outbound, ReadOptions, Renewal, Session};
use palyra_pki::chain::{Usage, verify_chain};
use palyra_pki::credential::to_rustls;
use palyra_pki::{KeyPair, Role, TrustBundle};
use palyra_platform as platform;
use palyra_replica::Replica;
use palyra_state::ca::{self, AuthorityStatus, Phase};
use palyra_state::{Code, cluster};

use crate::support::{Cluster, Machine, Member, next, quick, soon, until};

fn code(error: &Error) -> Option<Code> {
    if let Error::Rejected(reject) = error {
        Some(reject.kind())
    } else {
        None
    }
}

/// Waits until every member has taken the step, and every authority is under every trusted root that it needs.
async fn settled(replica: &Replica) {
    until(replica, |view| {
        let state = ca::ca(view);
        let members = cluster::replicas(view).into_iter().filter(|one| one.is_member());
        let ready = members
            .into_iter()
            .all(|one| ca::replica_step(view, one.id) >= state.step);
        let roots = match state.phase() {
            Phase::Issue => state.trusted(),
            _ => vec![state.issuing],
        };
        let signed = |one: &ca::Authority| roots.iter().all(|root| one.under(*root).is_some());
        ready && ca::authorities(view).iter().all(signed)
    })
    .await;
}

async fn begin(one: &Cluster) {
    let operator = one.operator();
    one.control.begin_root(&operator, "", None, "due").await.unwrap();
    settled(&one.replica).await;
}

async fn advance(one: &Cluster) -> Result<(), Error> {
    let operator = one.operator();
    one.control.advance_root(&operator, "", "", false, "").await?;
    settled(&one.replica).await;
    Ok(())
}

async fn revert(one: &Cluster) {
    let operator = one.operator();
    one.control
        .revert_root(&operator, "", "", "not yet")
        .await
        .unwrap();
    settled(&one.replica).await;
}

/// The admin's command line does what it does with each command.
async fn admin_follows(one: &Cluster) {
    let answer = one.control.operator_trusts(&one.operator(), 0).unwrap();
    one.control
        .operator_trusts(&one.operator(), answer.generation)
        .unwrap();
    until(&one.replica, |view| {
        ca::operator_ack(view, "root").is_some_and(|ack| ack.number == answer.generation)
    })
    .await;
}

/// What a node trusts that was told this.
fn bundle(one: &Cluster, roots: Vec<Vec<u8>>) -> TrustBundle {
    TrustBundle::new(&one.control.cluster_id().to_string(), one.domain.clone(), roots).unwrap()
}

/// The chain that a node gets when it renews now.
async fn renewed(one: &Cluster, node: &Machine) -> Vec<Vec<u8>> {
    let caller = one.control.admit_node(node.peer()).unwrap();
    let device = node.device_id.to_string();
    let local = ReadOptions {
        local: true,
        min_index: 0,
    };
    let (seen, _) = one.control.get_device(local, &device).await.unwrap();
    let renewal = Renewal {
        csr: csr().into(),
        counter: seen.record.counter + 1,
        ..Renewal::default()
    };
    one.control.renew(&caller, renewal).await.unwrap().chain
}

fn csr() -> Vec<u8> {
    let key = KeyPair::generate(&mut |out: &mut [u8]| platform::fill_random(out)).unwrap();
    key.make_csr().unwrap()
}

fn is_good(chain: &[Vec<u8>], trust: &TrustBundle) -> bool {
    verify_chain(
        &to_rustls(chain),
        trust,
        Usage::Client,
        &[Role::Node],
        platform::wall_ms(),
    )
    .is_ok()
}

/// Hears of a bundle, and says that it is stored.
async fn told(one: &Cluster, node: &Machine, session: &Session) -> TrustBundle {
    let device = node.device_id.to_string();
    loop {
        match next(&session.outgoing()).await {
            Some(Outbound::Trust(update)) => {
                session.trusts(node.peer(), &device, update.generation).unwrap();
                until(&one.replica, |view| {
                    ca::device_ack(view, node.device_id).is_some_and(|ack| ack.number >= update.generation)
                })
                .await;
                return bundle(one, update.roots);
            }
            Some(_) => {}
            None => panic!("the session ended"),
        }
    }
}

/// Attaches and says which bundle it holds.
async fn attached(node: &Machine, at: &Member, generation: u64) -> Session {
    until(&at.replica, |view| {
        palyra_state::nodes::node(view, node.device_id).is_some()
    })
    .await;
    let session = node.attach_at(&at.control, &[]).await.unwrap();
    session
        .trusts(node.peer(), &node.device_id.to_string(), generation)
        .unwrap();
    session
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_is_replaced_under_a_node_that_stays() {
    let (one, two, _three) = Cluster::of_three(quick()).await;
    let node = one.node("edge-1").await;
    let old = one.control.trust_bundle().unwrap();
    let session = attached(&node, &two, 1).await;
    begin(&one).await;
    let error = advance(&one).await.unwrap_err();
    assert_eq!(
        code(&error),
        Some(Code::NotAcknowledged),
        "the node is online: {error}"
    );
    let both = told(&one, &node, &session).await;
    assert_eq!(both.roots().len(), 2);
    assert_eq!(both.roots()[0], old.roots()[0], "the old one signs still");
    advance(&one).await.unwrap();

    // Both phases of knowledge accept what is issued now.
    let chain = renewed(&one, &node).await;
    assert_eq!(chain.len(), 3, "the authority under either root");
    assert!(is_good(&chain, &old) && is_good(&chain, &both));
    let error = advance(&one).await.unwrap_err();
    assert_eq!(
        code(&error),
        Some(Code::NotAcknowledged),
        "the admin has not followed: {error}"
    );
    admin_follows(&one).await;
    advance(&one).await.unwrap();

    let new = told(&one, &node, &session).await;
    assert_eq!((new.roots().len(), &new.roots()[0]), (1, &both.roots()[1]));
    let chain = renewed(&one, &node).await;
    assert!(is_good(&chain, &new) && !is_good(&chain, &old));
    let view = one.replica.view();
    let retired = ca::root(&view, 1).unwrap();
    assert!(retired.key_sealed.is_empty(), "the key of a retired root is gone");
    assert!(
        one.control.admit_node(node.peer()).is_ok(),
        "no node had to renew for it"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_are_away_hold_up_the_last_step_only() {
    let (one, two, three) = Cluster::of_three(quick()).await;
    let (early, late, never) = (
        one.node("early").await,
        one.node("late").await,
        one.node("never").await,
    );
    let old = one.control.trust_bundle().unwrap();
    begin(&one).await;
    admin_follows(&one).await;
    let session = attached(&early, &two, 1).await;
    told(&one, &early, &session).await;
    // Whoever is offline does not hold up this step.
    advance(&one).await.unwrap();
    let status = one.control.ca_status(ReadOptions::default(), 10).await.unwrap();
    let mut missing: Vec<&str> = status.nodes_missing.iter().map(|one| one.name.as_str()).collect();
    missing.sort_unstable();
    assert_eq!(missing, ["late", "never"]);
    assert_eq!((status.ca.devices, status.ca.devices_acked), (3, 1));
    let error = advance(&one).await.unwrap_err();
    assert_eq!(code(&error), Some(Code::NotAcknowledged), "{error}");

    // One comes back during `issue`, with the old root alone: it can verify what replicas show, and is told.
    let chain = renewed(&one, &late).await;
    assert!(is_good(&chain, &old));
    let session = attached(&late, &three, 1).await;
    told(&one, &late, &session).await;
    let error = advance(&one).await.unwrap_err();
    assert_eq!(
        code(&error),
        Some(Code::NotAcknowledged),
        "one is away still: {error}"
    );
    let operator = one.operator();
    let without = one.control.advance_root(&operator, "", "issue", true, " ").await;
    assert_eq!(
        code(&without.unwrap_err()),
        Some(Code::FieldInvalid),
        "a reason is required"
    );
    one.control
        .advance_root(&operator, "", "issue", true, "never is scrapped")
        .await
        .unwrap();
    settled(&one.replica).await;
    let chain = renewed(&one, &never).await;
    assert!(
        !is_good(&chain, &old),
        "who was away throughout cannot tell the cluster from a stranger"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_phase_can_be_gone_back_from() {
    let (one, two, _three) = Cluster::of_three(quick()).await;
    let node = one.node("edge-1").await;
    let session = attached(&node, &two, 1).await;
    let old = one.control.trust_bundle().unwrap();
    begin(&one).await;
    told(&one, &node, &session).await;
    revert(&one).await;
    let again = told(&one, &node, &session).await;
    assert_eq!(again.roots(), old.roots(), "given up: one root, the old one");

    begin(&one).await;
    let both = told(&one, &node, &session).await;
    advance(&one).await.unwrap();
    let by_new = renewed(&one, &node).await;
    revert(&one).await;
    let by_old = renewed(&one, &node).await;
    for chain in [&by_new, &by_old] {
        assert!(is_good(chain, &both));
    }
    assert!(is_good(&by_old, &old));
    advance(&one).await.unwrap();
    admin_follows(&one).await;
    advance(&one).await.unwrap();
    assert!(is_good(&renewed(&one, &node).await, &both));
    let roots: Vec<bool> = ca::roots(&one.replica.view())
        .iter()
        .map(|root| root.key_sealed.is_empty())
        .collect();
    assert_eq!(
        roots,
        [true, true, false],
        "the first was replaced, the second given up"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machines_and_replicas_come_in_every_phase() {
    let (one, _two, _three) = Cluster::of_three(quick()).await;
    let mut members = Vec::new();
    for phase in [Phase::Distribute, Phase::Issue, Phase::Idle] {
        if phase == Phase::Distribute {
            begin(&one).await;
        } else {
            admin_follows(&one).await;
            advance(&one).await.unwrap();
        }
        assert_eq!(ca::ca(&one.replica.view()).phase(), phase);
        let node = one.node(&format!("in-{}", phase.as_str())).await;
        let trust = one.control.trust_bundle().unwrap();
        assert!(is_good(&renewed(&one, &node).await, &trust));
        let member = one.join(&format!("r-{}", phase.as_str())).await;
        until(&member.replica, |view| ca::ca(view).phase() == phase).await;
        settled(&one.replica).await;
        members.push(member);
    }
    let view = one.replica.view();
    assert!(
        ca::authorities(&view)
            .iter()
            .all(|one| one.certificates.len() == 1)
    );
    assert_eq!(ca::ca(&view).devices, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_is_replaced_and_lists_what_it_revoked() {
    let one = Cluster::found().await;
    let (stays, goes) = (one.node("stays").await, one.node("goes").await);
    let before = renewed(&one, &stays).await;
    let operator = one.operator();
    let (asked, _) = one
        .control
        .rotate_authorities(&operator, "", 0, "its disk was copied")
        .await
        .unwrap();
    assert_eq!(asked, 1);
    until(&one.replica, |view| {
        let status = |number| ca::authority(view, 1, number).map(|one| one.status());
        status(1) == Some(AuthorityStatus::Retiring) && status(2) == Some(AuthorityStatus::Active)
    })
    .await;
    // It is in force a moment after it is in the state. Asked with operators, for a node has room for few certificates.
    soon(async {
        for number in 0.. {
            let name = format!("op-{number}");
            let added = one
                .control
                .add_operator(&operator, "", &name, "viewer", &csr(), 0)
                .await
                .unwrap();
            if added.chain[1] != before[1] {
                return;
            }
            platform::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    let trust = one.control.trust_bundle().unwrap();
    assert!(is_good(&before, &trust) && is_good(&renewed(&one, &stays).await, &trust));
    assert!(
        one.control.admit_node(stays.peer()).is_ok(),
        "the old one's certificates stay good"
    );

    let revoked = one
        .control
        .revoke_device(&operator, "", &goes.device_id.to_string(), "lost", 0)
        .await
        .unwrap();
    until(&one.replica, |view| {
        ca::crl(view, 1, 1).is_some_and(|crl| crl.crl_number >= revoked.index)
    })
    .await;
    let view = one.replica.view();
    let (old, new) = (ca::crl(&view, 1, 1).unwrap(), ca::crl(&view, 1, 2).unwrap());
    assert_eq!((old.entries, new.entries), (1, 0), "each lists what it issued");
    assert_eq!(ca::revoked_of(&view, 1, 1, platform::wall_ms(), 10).len(), 1);
}
