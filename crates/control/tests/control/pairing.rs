//! Pairing by PIN and by ticket, with every way to get it wrong.

use palyra_control::{BeginPin, Error, Mint, Refusal};
use palyra_pki::Ticket;
use palyra_state::Code;
use palyra_state::pairing::{CodeStatus, RequestStatus};

use crate::support::{Cluster, Machine, soon, source};

fn code(error: &Error) -> Option<Code> {
    if let Error::Rejected(reject) = error {
        Some(reject.kind())
    } else {
        None
    }
}

async fn mint_pin(cluster: &Cluster) -> String {
    let minted = cluster
        .control
        .mint_pin(&cluster.operator(), Mint::default())
        .await
        .unwrap();
    minted.secret.to_string()
}

/// Eight digits that are not these.
fn wrong(pin: &str) -> String {
    let last = pin.chars().last().unwrap();
    let other = if last == '0' { '1' } else { '0' };
    format!("{}{other}", &pin[..pin.len() - 1])
}

#[tokio::test]
async fn a_pin_pairs_a_machine_end_to_end() {
    let cluster = Cluster::found().await;
    let pin = mint_pin(&cluster).await;
    let mut machine = Machine::new("edge-1");
    let half = machine.begin(&cluster, 1, &pin).await.unwrap();
    assert_eq!(half.begun.tries_left, 4);
    let accepted = cluster
        .control
        .finish_pin(&source(1), half.finish.clone())
        .await
        .unwrap();
    assert!(
        half.believes(&accepted),
        "the cluster proves itself, and both screens show the same digits"
    );

    // The fetch waits for the operator, who may be anywhere.
    let id = accepted.pairing_id.to_string();
    let (control, token) = (cluster.control.clone(), machine.fetch_token.clone());
    let waiting = {
        let id = id.clone();
        palyra_platform::spawn(async move { control.fetch(&id, &token, 20_000).await })
    };
    let operator = cluster.operator();
    let digits: String = accepted.sas.chars().filter(char::is_ascii_digit).collect();
    let (approved, _) = cluster
        .control
        .approve(&operator, "", &id[..20], &digits, "")
        .await
        .unwrap();
    assert!(matches!(
        approved.status,
        RequestStatus::Approved | RequestStatus::Completed
    ));
    let fetched = soon(waiting).await.unwrap().unwrap();
    assert_eq!(fetched.chain.len(), 2, "leaf and authority");
    let peer = palyra_pki::PeerIdentity::from_der(&fetched.chain[0]).unwrap();
    assert_eq!(peer.id.id(), machine.device_id.to_string());
    assert_eq!(peer.spki_sha256, machine.key.spki_sha256());
    assert!(cluster.control.admit_node(&peer).is_ok());

    let codes = cluster
        .control
        .list_codes(Default::default(), true)
        .await
        .unwrap()
        .0;
    assert_eq!(codes[0].status, CodeStatus::Used);
    assert!(codes[0].record.sealed.is_empty(), "the sealed blob stays inside");
}

#[tokio::test]
async fn the_same_last_message_gets_the_same_answer_and_a_replay_elsewhere_nothing() {
    let cluster = Cluster::found().await;
    let pin = mint_pin(&cluster).await;
    let mut machine = Machine::new("m");
    let half = machine.begin(&cluster, 1, &pin).await.unwrap();
    let elsewhere = cluster
        .control
        .finish_pin(&source(2), half.finish.clone())
        .await
        .unwrap_err();
    assert_eq!(elsewhere, Refusal::UnknownExchange.into(), "another connection");
    let first = cluster
        .control
        .finish_pin(&source(1), half.finish.clone())
        .await
        .unwrap();
    let again = cluster
        .control
        .finish_pin(&source(1), half.finish.clone())
        .await
        .unwrap();
    assert_eq!(
        (first.pairing_id, first.server_proof),
        (again.pairing_id, again.server_proof)
    );
    let elsewhere = cluster
        .control
        .finish_pin(&source(2), half.finish.clone())
        .await
        .unwrap_err();
    assert_eq!(elsewhere, Refusal::UnknownExchange.into());
    let mut changed = half.finish.clone();
    changed.device_name = "other".to_owned();
    let changed = cluster.control.finish_pin(&source(1), changed).await.unwrap_err();
    assert_eq!(
        changed,
        Refusal::UnknownExchange.into(),
        "what proved right is not proved for something else"
    );
}

#[tokio::test]
async fn five_wrong_proofs_burn_a_pin_and_a_right_one_gives_its_attempt_back() {
    let cluster = Cluster::found().await;
    let pin = mint_pin(&cluster).await;
    let mut machine = Machine::new("m");
    for left in (0..5).rev() {
        let before = cluster.last_log();
        let half = machine.begin(&cluster, 1, &wrong(&pin)).await.unwrap();
        assert_eq!(half.begun.tries_left, left);
        assert!(cluster.last_log() > before, "counted before it is answered");
        let error = cluster
            .control
            .finish_pin(&source(1), half.finish)
            .await
            .unwrap_err();
        assert_eq!(error, Refusal::WrongPin.into());
    }
    let burned = machine.begin(&cluster, 1, &pin).await.err().unwrap();
    assert!(
        matches!(code(&burned), Some(Code::CodeBurned | Code::NoOpenCode)),
        "{burned:?}"
    );

    let pin = mint_pin(&cluster).await;
    let half = machine.begin(&cluster, 1, &pin).await.unwrap();
    cluster.control.finish_pin(&source(1), half.finish).await.unwrap();
    let used = machine.begin(&cluster, 1, &pin).await.err().unwrap();
    assert!(matches!(code(&used), Some(Code::NoOpenCode)), "{used:?}");
}

#[tokio::test]
async fn a_proof_for_another_key_is_refused_and_counted() {
    let cluster = Cluster::found().await;
    let pin = mint_pin(&cluster).await;
    let mut machine = Machine::new("m");
    let half = machine.begin(&cluster, 1, &pin).await.unwrap();
    let mut finish = half.finish.clone();
    finish.csr = Machine::new("thief").csr;
    let error = cluster.control.finish_pin(&source(1), finish).await.unwrap_err();
    assert_eq!(error, Refusal::OtherCsr.into());
    let next = machine.begin(&cluster, 1, &pin).await.unwrap();
    assert_eq!(next.begun.tries_left, 3, "the attempt stays counted");
}

#[tokio::test]
async fn malformed_messages_are_refused_before_they_count() {
    let cluster = Cluster::found().await;
    mint_pin(&cluster).await;
    let before = cluster.last_log();
    let good = BeginPin {
        code_number: 0,
        device_id: crate::support::fresh_id().to_string(),
        ke1: vec![1; 96].into(),
        csr_sha256: vec![0; 32].into(),
        node_nonce: vec![0; 32].into(),
    };
    let bad = [
        (
            "device_id",
            BeginPin {
                device_id: "not-a-ulid".to_owned(),
                ..good.clone()
            },
        ),
        (
            "ke1",
            BeginPin {
                ke1: vec![1; 95].into(),
                ..good.clone()
            },
        ),
        (
            "csr_sha256",
            BeginPin {
                csr_sha256: vec![0; 31].into(),
                ..good.clone()
            },
        ),
        (
            "node_nonce",
            BeginPin {
                node_nonce: vec![0; 33].into(),
                ..good.clone()
            },
        ),
    ];
    for (wrong, begin) in bad {
        let error = cluster.control.begin_pin(&source(1), begin).await.unwrap_err();
        assert!(
            matches!(error, Error::Invalid { field, .. } if field == wrong),
            "{wrong}: {error:?}"
        );
    }
    assert_eq!(cluster.last_log(), before, "no entry");
}

#[tokio::test]
async fn of_two_machines_with_one_ticket_the_first_wins() {
    let cluster = Cluster::found().await;
    let minted = cluster
        .control
        .mint_ticket(&cluster.operator(), Mint::default())
        .await
        .unwrap();
    let ticket = Ticket::parse(&minted.secret).unwrap();
    let (mut one, mut two) = (Machine::new("one"), Machine::new("two"));
    let (first, second) = tokio::join!(
        one.prove_ticket(&cluster, 1, &ticket),
        two.prove_ticket(&cluster, 2, &ticket)
    );
    let error = match (first, second) {
        (Ok(_), Err(error)) | (Err(error), Ok(_)) => error,
        both => panic!("exactly one wins: {both:?}"),
    };
    assert_eq!(code(&error), Some(Code::CodeUsed));
}

#[tokio::test]
async fn a_wrong_ticket_is_counted_and_its_nonce_is_spent() {
    let cluster = Cluster::found().await;
    let minted = cluster
        .control
        .mint_ticket(&cluster.operator(), Mint::default())
        .await
        .unwrap();
    let mut ticket = Ticket::parse(&minted.secret).unwrap();
    let mut machine = Machine::new("m");
    let right = machine.ticket_message(&cluster, 1, &ticket);
    ticket.secret = palyra_pki::ticket::Secret::from_bytes(&[0; 16]).unwrap();
    let wrong = machine.ticket_message(&cluster, 1, &ticket);
    let error = cluster
        .control
        .prove_ticket(&source(1), wrong.clone())
        .await
        .unwrap_err();
    assert_eq!(error, Refusal::WrongTicket.into());
    let error = cluster.control.prove_ticket(&source(1), wrong).await.unwrap_err();
    assert_eq!(
        error,
        Refusal::UnknownNonce.into(),
        "a nonce is good for one proof"
    );
    let codes = cluster
        .control
        .list_codes(Default::default(), true)
        .await
        .unwrap()
        .0;
    assert_eq!(codes[0].record.attempts.len(), 1);
    let error = cluster
        .control
        .prove_ticket(&source(2), right.clone())
        .await
        .unwrap_err();
    assert_eq!(error, Refusal::UnknownNonce.into(), "another connection's nonce");
    cluster.control.prove_ticket(&source(1), right).await.unwrap();
}

#[tokio::test]
async fn twenty_unproved_attempts_close_pairing_for_everybody() {
    let cluster = Cluster::found().await;
    let mut machine = Machine::new("m");
    for _ in 0..4 {
        let pin = mint_pin(&cluster).await;
        for _ in 0..5 {
            machine.begin(&cluster, 1, &wrong(&pin)).await.unwrap();
        }
        let codes = cluster
            .control
            .list_codes(Default::default(), false)
            .await
            .unwrap()
            .0;
        for open in codes {
            let id = open.record.id.to_string();
            cluster
                .control
                .revoke_code(&cluster.operator(), "", &id, "")
                .await
                .unwrap();
        }
    }
    let pin = mint_pin(&cluster).await;
    let closed = machine.begin(&cluster, 1, &pin).await.err().unwrap();
    assert_eq!(code(&closed), Some(Code::PairingClosed));
    let by_ticket = machine.pair_by_ticket(&cluster, 1).await.unwrap_err();
    assert_eq!(
        code(&by_ticket),
        Some(Code::PairingClosed),
        "a right proof as well: closed is closed"
    );
}

#[tokio::test]
async fn a_decision_by_name_is_repeated_under_its_request_id() {
    let cluster = Cluster::found().await;
    let operator = cluster.operator();
    let (mut cam, mut lamp) = (Machine::new("cam"), Machine::new("lamp"));
    cam.pair_by_ticket(&cluster, 1).await.unwrap();
    let request = crate::support::fresh_id().to_string();
    let approve = || cluster.control.approve(&operator, &request, "cam", "", "");
    let (first, _) = approve().await.unwrap();
    let (again, _) = approve().await.unwrap();
    assert_eq!(
        (first.record.id, first.record.certificate),
        (again.record.id, again.record.certificate),
        "the answer was lost, and the name waits no more"
    );
    let device = cam.device_id.to_string();
    let shown = cluster
        .control
        .get_pairing(Default::default(), &device)
        .await
        .unwrap()
        .0;
    assert_eq!(shown.record.id, first.record.id, "by the device's id too");
    let error = cluster
        .control
        .approve(&operator, "", "cam", "", "")
        .await
        .unwrap_err();
    assert_eq!(
        code(&error),
        Some(Code::PairingDecided),
        "under another id it is late"
    );

    lamp.pair_by_ticket(&cluster, 1).await.unwrap();
    let request = crate::support::fresh_id().to_string();
    for _ in 0..2 {
        let (rejected, _) = cluster
            .control
            .reject(&operator, &request, "lamp", "not ours")
            .await
            .unwrap();
        assert_eq!(rejected.status, RequestStatus::Rejected);
    }
    // A newer request of the same name is what waits, and is what the name means.
    let mut second = Machine::new("lamp");
    let waiting = second.pair_by_ticket(&cluster, 1).await.unwrap();
    let found = cluster
        .control
        .get_pairing(Default::default(), "lamp")
        .await
        .unwrap()
        .0;
    assert_eq!(found.record.id, waiting.pairing_id);
}

#[tokio::test]
async fn a_rejected_machine_is_told_why_and_a_stranger_nothing() {
    let cluster = Cluster::found().await;
    let mut machine = Machine::new("m");
    let accepted = machine.pair_by_ticket(&cluster, 1).await.unwrap();
    let id = accepted.pairing_id.to_string();
    let error = cluster.control.fetch(&id, &[0; 32], 0).await.unwrap_err();
    assert_eq!(error, Refusal::WrongFetchToken.into());
    let nobody = crate::support::fresh_id().to_string();
    let error = cluster
        .control
        .fetch(&nobody, &machine.fetch_token, 0)
        .await
        .unwrap_err();
    assert_eq!(
        error,
        Refusal::WrongFetchToken.into(),
        "no such pairing looks like a wrong token"
    );

    let operator = cluster.operator();
    let error = cluster
        .control
        .approve(&operator, "", &id, "000 000", "")
        .await
        .unwrap_err();
    let same = accepted.sas == "000 000";
    assert!(same || code(&error) == Some(Code::SasMismatch), "{error:?}");
    cluster
        .control
        .reject(&operator, "", &id, "not ours")
        .await
        .unwrap();
    let fetched = cluster
        .control
        .fetch(&id, &machine.fetch_token, 20_000)
        .await
        .unwrap();
    assert_eq!(
        (fetched.status, fetched.reason.as_str()),
        (RequestStatus::Rejected, "not ours")
    );
    assert!(fetched.chain.is_empty());
    let error = cluster
        .control
        .approve(&operator, "", &id, "", "")
        .await
        .unwrap_err();
    assert_eq!(code(&error), Some(Code::PairingDecided));
}

#[tokio::test]
async fn a_request_id_mints_one_code_and_approves_once() {
    let cluster = Cluster::found().await;
    let operator = cluster.operator();
    let mint = Mint {
        request_id: crate::support::fresh_id().to_string(),
        ..Mint::default()
    };
    cluster.control.mint_pin(&operator, mint.clone()).await.unwrap();
    let error = cluster.control.mint_pin(&operator, mint).await.err().unwrap();
    assert!(
        matches!(error, Error::Refused(Refusal::ShownOnce { .. })),
        "{error:?}"
    );
    assert_eq!(
        cluster
            .control
            .list_codes(Default::default(), true)
            .await
            .unwrap()
            .0
            .len(),
        1
    );

    let mut machine = Machine::new("m");
    let accepted = machine.pair_by_ticket(&cluster, 1).await.unwrap();
    let (request, id) = (
        crate::support::fresh_id().to_string(),
        accepted.pairing_id.to_string(),
    );
    let (first, _) = cluster
        .control
        .approve(&operator, &request, &id, "", "")
        .await
        .unwrap();
    let (again, _) = cluster
        .control
        .approve(&operator, &request, &id, "", "")
        .await
        .unwrap();
    assert_eq!(
        first.record.certificate, again.record.certificate,
        "one certificate per approval"
    );
}

#[tokio::test]
async fn a_request_in_the_name_of_a_known_device_is_marked() {
    let cluster = Cluster::found().await;
    let known = cluster.node("cam").await;
    let mut posing = Machine::new("cam");
    posing.device_id = known.device_id;
    let accepted = posing.pair_by_ticket(&cluster, 1).await.unwrap();
    let id = accepted.pairing_id.to_string();
    let shown = cluster
        .control
        .get_pairing(Default::default(), &id)
        .await
        .unwrap()
        .0;
    assert!(
        shown.replaces_device,
        "the operator must hear of it before approving"
    );
    assert!(
        cluster.control.admit_node(known.peer()).is_ok(),
        "asking takes nothing from it"
    );
    posing.let_in(&cluster, &accepted).await;
    assert!(
        cluster.control.admit_node(known.peer()).is_err(),
        "approving does"
    );
    let fresh = Machine::new("lamp").pair_by_ticket(&cluster, 1).await.unwrap();
    let id = fresh.pairing_id.to_string();
    let shown = cluster
        .control
        .get_pairing(Default::default(), &id)
        .await
        .unwrap()
        .0;
    assert!(!shown.replaces_device);
}
