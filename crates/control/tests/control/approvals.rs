//! Approvals and grants: asked by one operator, decided by another, ended by time.

use palyra_control::{AskGrant, Caller, Error, ReadOptions, Verdict};
use palyra_platform as platform;
use palyra_state::Code;
use palyra_state::access::Role;
use palyra_state::approvals::{ApprovalState, GrantState, Policy, Subject};

use crate::operators::add;
use crate::support::{Cluster, Machine, soon};

fn code(error: &Error) -> Option<Code> {
    if let Error::Rejected(reject) = error {
        Some(reject.kind())
    } else {
        None
    }
}

async fn operator(cluster: &Cluster, name: &str) -> Caller {
    let peer = add(cluster, name, "operator").await;
    cluster.control.admit_operator(&peer, Role::Operator).unwrap()
}

fn ask(tool: &str) -> AskGrant {
    AskGrant {
        tool: tool.to_owned(),
        ..AskGrant::default()
    }
}

fn verdict(id: &str, decision: &str) -> Verdict {
    Verdict {
        id: id.to_owned(),
        decision: decision.to_owned(),
        ..Verdict::default()
    }
}

fn policy(four_eyes: bool, timeout: u64) -> Policy {
    Policy {
        four_eyes,
        timeout,
        max_timebox: 3_600_000,
        ..Policy::default()
    }
}

async fn set(cluster: &Cluster, policy: Policy) {
    let caller = cluster.operator();
    cluster
        .control
        .set_approval_policy(&caller, "", policy)
        .await
        .unwrap();
}

#[tokio::test]
async fn who_waits_hears_of_the_decision_of_another() {
    let cluster = Cluster::found().await;
    set(&cluster, policy(true, 60_000)).await;
    let (anna, bob) = (operator(&cluster, "anna").await, operator(&cluster, "bob").await);
    let control = &cluster.control;
    let (asked, _) = control.create_grant(&anna, ask("resize")).await.unwrap();
    assert_eq!(asked.status, GrantState::Pending);
    let id = asked.record.approval_id.to_string();
    let waiting = {
        let (control, id) = (control.clone(), id.clone());
        platform::spawn(async move { control.wait_approval(&id, 20_000).await })
    };
    let own = control.decide_approval(&anna, verdict(&id, "allow")).await;
    assert_eq!(code(&own.unwrap_err()), Some(Code::FourEyes));
    // By the beginning of its id, as people name it, and twice under one request id.
    let decide = Verdict {
        request_id: crate::support::fresh_id().to_string(),
        scope: "timeboxed".to_owned(),
        ..verdict(&id[..20], "allow")
    };
    let (decided, _) = control.decide_approval(&bob, decide.clone()).await.unwrap();
    assert_eq!(decided.status, ApprovalState::Allowed);
    let (again, _) = control.decide_approval(&bob, decide).await.unwrap();
    assert_eq!(again, decided);
    let (heard, _) = soon(waiting).await.unwrap().unwrap();
    assert_eq!(heard.status, ApprovalState::Allowed);

    let (next, _) = control.create_grant(&anna, ask("resize")).await.unwrap();
    assert_eq!((next.status, next.record.covered), (GrantState::Active, true));
    let (other, _) = control.create_grant(&anna, ask("other")).await.unwrap();
    assert_eq!(other.status, GrantState::Pending);
    let listed = |state: &'static str| control.list_grants(ReadOptions::default(), state, "", 0);
    assert_eq!(listed("active").await.unwrap().items.len(), 2);
    assert_eq!(listed("pending").await.unwrap().items, [other]);
    assert!(matches!(listed("odd").await.unwrap_err(), Error::Invalid { .. }));
}

#[tokio::test]
async fn what_nobody_decides_ends_by_itself() {
    let cluster = Cluster::found().await;
    set(&cluster, policy(false, 1_000)).await;
    let control = &cluster.control;
    let root = cluster.operator();
    let (asked, _) = control.create_grant(&root, ask("resize")).await.unwrap();
    let id = asked.record.approval_id.to_string();
    let (ended, _) = soon(control.wait_approval(&id, 20_000)).await.unwrap();
    assert_eq!(ended.status, ApprovalState::Expired);
    let grant = asked.record.id.to_string();
    let (grant, _) = control.get_grant(ReadOptions::default(), &grant).await.unwrap();
    assert_eq!(grant.status, GrantState::Expired);
    let late = control.decide_approval(&root, verdict(&id, "allow")).await;
    let late = code(&late.unwrap_err());
    assert!(
        matches!(late, Some(Code::ApprovalExpired | Code::ApprovalDecided)),
        "{late:?}"
    );
}

#[tokio::test]
async fn what_a_removed_operator_had_allowed_counts_no_more() {
    let cluster = Cluster::found().await;
    let (anna, bob) = (operator(&cluster, "anna").await, operator(&cluster, "bob").await);
    let control = &cluster.control;
    let (asked, _) = control.create_grant(&anna, ask("resize")).await.unwrap();
    let id = asked.record.approval_id.to_string();
    control
        .decide_approval(&bob, verdict(&id, "allow"))
        .await
        .unwrap();
    soon(control.remove_operator(&cluster.operator(), "", "bob", "left"))
        .await
        .unwrap();
    let page = control
        .list_grants(ReadOptions::default(), "revoked", "", 0)
        .await;
    assert_eq!(page.unwrap().items.len(), 1, "nobody vouches for it any more");
    soon(control.remove_operator(&cluster.operator(), "", "anna", "left"))
        .await
        .unwrap();
    let grant = asked.record.id.to_string();
    let (grant, _) = control.get_grant(ReadOptions::default(), &grant).await.unwrap();
    assert_eq!(
        grant.record.state(),
        GrantState::Revoked,
        "written down with the removal"
    );
}

#[tokio::test]
async fn a_pairing_is_decided_as_an_approval() {
    let cluster = Cluster::found().await;
    set(&cluster, policy(true, 60_000)).await;
    let control = &cluster.control;
    let mut machine = Machine::new("edge-1");
    let accepted = machine.pair_by_ticket(&cluster, 1).await.unwrap();
    let page = control
        .list_approvals(ReadOptions::default(), "", "pairing", "", 0)
        .await;
    let page = page.unwrap().items;
    assert_eq!(page.len(), 1);
    assert_eq!(page[0].record.subject(), Subject::Pairing);
    assert!(page[0].record.prompt.summary.contains(&accepted.sas));
    let id = page[0].record.id.to_string();
    let own = control
        .decide_approval(&cluster.operator(), verdict(&id, "allow"))
        .await;
    assert_eq!(
        code(&own.unwrap_err()),
        Some(Code::FourEyes),
        "it minted the code"
    );
    let bob = operator(&cluster, "bob").await;
    let wide = Verdict {
        scope: "timeboxed".to_owned(),
        ..verdict(&id, "allow")
    };
    let wide = control.decide_approval(&bob, wide).await;
    assert!(matches!(wide.unwrap_err(), Error::Invalid { field: "scope", .. }));
    let wrong = Verdict {
        sas: "000 000 0".to_owned(),
        ..verdict(&id, "allow")
    };
    let wrong = control.decide_approval(&bob, wrong).await;
    assert_eq!(code(&wrong.unwrap_err()), Some(Code::SasMismatch));
    let right = Verdict {
        sas: accepted.sas.clone(),
        ..verdict(&id, "allow")
    };
    let (decided, _) = control.decide_approval(&bob, right).await.unwrap();
    assert_eq!(decided.status, ApprovalState::Allowed);
    let fetched = control.fetch(&id, &machine.fetch_token, 0).await.unwrap();
    assert!(
        !fetched.chain.is_empty(),
        "its certificate was issued with the decision"
    );
}
