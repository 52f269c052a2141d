//! What strangers send to the enrol listener's calls, bent at every field: each gets a stable code, nothing of it
//! enters the log, and the honest message behind it is still good.

use bytes::Bytes;
use palyra_control::{BeginPin, Control, Error, Join, Limits, Mint, Refusal};
use palyra_pki::{KeyPair, Ticket, sha256};
use palyra_platform as platform;
use palyra_state::{Code, cluster};

use crate::support::{Cluster, Joining, Machine, fresh_id, quick, source};

/// The same bends in each run, so that a failure names its case.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// The bytes with another length: cut, or with more behind them.
    fn resized(&mut self, bytes: &[u8]) -> Bytes {
        let mut bent = bytes.to_vec();
        if self.below(2) == 0 && !bent.is_empty() {
            bent.truncate(self.below(bent.len()));
        } else {
            let more = 1 + self.below(5_000);
            bent.extend((0..more).map(|_| self.next() as u8));
        }
        bent.into()
    }

    /// The bytes with one changed.
    fn flipped(&mut self, bytes: &[u8]) -> Bytes {
        let mut bent = bytes.to_vec();
        let at = self.below(bent.len());
        bent[at] ^= 1 << self.below(8);
        bent.into()
    }

    /// A text that is no ULID.
    fn no_id(&mut self) -> String {
        let id = fresh_id().to_string();
        match self.below(6) {
            0 => String::new(),
            1 => id[..self.below(26)].to_owned(),
            2 => id.to_lowercase(),
            3 => format!("{id}0"),
            4 => format!("8{}", &id[1..]),
            _ => "\u{0}é/../".repeat(1 + self.below(2_000)),
        }
    }

    fn no_name(&mut self) -> String {
        match self.below(3) {
            0 => "x".repeat(129 + self.below(4_000)),
            1 => "line\nbreak".to_owned(),
            _ => "\u{1b}[2J".to_owned(),
        }
    }
}

fn is_invalid(error: &Error) -> bool {
    matches!(error, Error::Invalid { .. }) && error.code() == "E1014"
}

async fn ticket(cluster: &Cluster) -> Ticket {
    let minted = cluster
        .control
        .mint_ticket(&cluster.operator(), Mint::default())
        .await
        .unwrap();
    Ticket::parse(&minted.secret).unwrap()
}

async fn pin(cluster: &Cluster) -> String {
    let minted = cluster
        .control
        .mint_pin(&cluster.operator(), Mint::default())
        .await
        .unwrap();
    minted.secret.to_string()
}

#[tokio::test]
async fn bent_ticket_proofs() {
    let cluster = Cluster::found().await;
    let ticket = ticket(&cluster).await;
    let mut machine = Machine::new("m");
    let mut dice = Dice(1);
    let right = machine.ticket_message(&cluster, 1, &ticket);
    let before = cluster.last_log();
    for case in 0..400 {
        let mut bent = right.clone();
        match case % 6 {
            0 => bent.ticket_id = dice.no_id(),
            1 => bent.device_id = dice.no_id(),
            2 => bent.csr = dice.resized(&right.csr),
            3 => bent.node_nonce = dice.resized(&right.node_nonce),
            4 => bent.server_nonce = dice.resized(&right.server_nonce),
            _ => bent.device_name = dice.no_name(),
        }
        let error = cluster
            .control
            .prove_ticket(&source(1), bent.clone())
            .await
            .unwrap_err();
        assert!(is_invalid(&error), "case {case}: {bent:?}: {error:?}");
    }
    for case in 0..100 {
        let mut bent = right.clone();
        bent.server_nonce = dice.flipped(&right.server_nonce);
        let error = cluster.control.prove_ticket(&source(1), bent).await.unwrap_err();
        assert_eq!(error, Refusal::UnknownNonce.into(), "case {case}");
    }
    assert_eq!(cluster.last_log(), before, "nothing was counted");
    cluster.control.prove_ticket(&source(1), right).await.unwrap();
}

#[tokio::test]
async fn bent_beginnings() {
    let cluster = Cluster::found().await;
    let pin = pin(&cluster).await;
    let mut dice = Dice(2);
    let typed = palyra_pki::Pin::parse(&pin).unwrap();
    let (_, ke1) = palyra_pki::pin::client_begin(&typed, &mut platform::fill_random).unwrap();
    let right = BeginPin {
        code_number: 0,
        device_id: fresh_id().to_string(),
        ke1: ke1.clone().into(),
        csr_sha256: vec![1; 32].into(),
        node_nonce: vec![2; 32].into(),
    };
    let before = cluster.last_log();
    for case in 0..300 {
        let mut bent = right.clone();
        match case % 6 {
            0 => bent.device_id = dice.no_id(),
            1 => bent.ke1 = dice.resized(&ke1),
            2 => bent.csr_sha256 = dice.resized(&right.csr_sha256),
            3 => bent.node_nonce = dice.resized(&right.node_nonce),
            // No points: the blinded element at the front, the key share at the end.
            4 => bent.ke1 = [&[0xff; 32], &ke1[32..]].concat().into(),
            _ => bent.ke1 = [&ke1[..64], &[0xff; 32]].concat().into(),
        }
        let error = cluster
            .control
            .begin_pin(&source(1), bent.clone())
            .await
            .unwrap_err();
        assert!(is_invalid(&error), "case {case}: {bent:?}: {error:?}");
    }
    for number in [2, 7, u32::MAX] {
        let mut bent = right.clone();
        bent.code_number = number;
        let error = cluster.control.begin_pin(&source(1), bent).await.unwrap_err();
        assert_eq!(error.code(), "E0401", "{number}");
    }
    assert_eq!(cluster.last_log(), before, "nothing was counted");
    let begun = cluster.control.begin_pin(&source(1), right).await.unwrap();
    assert_eq!(begun.tries_left, 4);
}

#[tokio::test]
async fn bent_ends() {
    let cluster = Cluster::found().await;
    let pin = pin(&cluster).await;
    let mut machine = Machine::new("m");
    let half = machine.begin(&cluster, 1, &pin).await.unwrap();
    let (right, mut dice) = (half.finish.clone(), Dice(3));
    let before = cluster.last_log();
    for case in 0..300 {
        let mut bent = right.clone();
        match case % 4 {
            0 => bent.attempt_id = dice.no_id(),
            1 => bent.ke3 = dice.resized(&right.ke3),
            2 => bent.device_name = dice.no_name(),
            _ => bent.attempt_id = fresh_id().to_string(),
        }
        let error = cluster
            .control
            .finish_pin(&source(1), bent.clone())
            .await
            .unwrap_err();
        let expected = is_invalid(&error) || (case % 4 == 3 && error == Refusal::UnknownExchange.into());
        assert!(expected, "case {case}: {bent:?}: {error:?}");
    }
    assert_eq!(cluster.last_log(), before, "no entry");
    let accepted = cluster
        .control
        .finish_pin(&source(1), right.clone())
        .await
        .unwrap();
    assert!(half.believes(&accepted), "the exchange has survived all of it");
    let id = accepted.pairing_id.to_string();
    for case in 0..100 {
        let (bent, token) = match case % 3 {
            0 => (dice.no_id(), Bytes::from(machine.fetch_token.clone())),
            1 => (id.clone(), dice.resized(&machine.fetch_token)),
            _ => (id.clone(), dice.flipped(&machine.fetch_token)),
        };
        let error = cluster.control.fetch(&bent, &token, 0).await.unwrap_err();
        assert!(
            is_invalid(&error) || error == Refusal::WrongFetchToken.into(),
            "case {case}: {error:?}"
        );
    }
}

#[tokio::test]
async fn wrong_proofs_of_an_open_exchange_end_it_and_no_more() {
    let cluster = Cluster::found().await;
    let pin = pin(&cluster).await;
    let mut dice = Dice(4);
    for (field, expected) in [("ke3", "E1021"), ("proof", "E1021"), ("csr", "E1025")] {
        let mut machine = Machine::new("m");
        let half = machine.begin(&cluster, 1, &pin).await.unwrap();
        let mut bent = half.finish.clone();
        match field {
            "ke3" => bent.ke3 = dice.flipped(&half.finish.ke3),
            "proof" => bent.proof = dice.resized(&half.finish.proof),
            _ => bent.csr = dice.flipped(&half.finish.csr),
        }
        let error = cluster.control.finish_pin(&source(1), bent).await.unwrap_err();
        assert_eq!(error.code(), expected, "{field}");
        let error = cluster
            .control
            .finish_pin(&source(1), half.finish)
            .await
            .unwrap_err();
        assert_eq!(
            error,
            Refusal::UnknownExchange.into(),
            "{field}: one proof for one exchange"
        );
    }
    // Whose hash was given may be no CSR of ours: the exchange is over, and no request was made.
    let mut machine = Machine::new("m");
    machine.csr = Bytes::from_static(b"no signing request");
    let half = machine.begin(&cluster, 1, &pin).await.unwrap();
    let error = cluster
        .control
        .finish_pin(&source(1), half.finish)
        .await
        .unwrap_err();
    assert!(is_invalid(&error), "{error:?}");
    let waiting = cluster
        .control
        .list_pairings(Default::default(), "", "", 0)
        .await
        .unwrap();
    assert!(waiting.items.is_empty(), "{waiting:?}");
}

#[tokio::test]
async fn too_many_half_done_exchanges_cost_no_attempt() {
    let limits = Limits {
        exchanges_per_source: 1,
        ..Limits::default()
    };
    let cluster = Cluster::found_with(quick(), limits).await;
    let pin = pin(&cluster).await;
    let half = Machine::new("one").begin(&cluster, 1, &pin).await.unwrap();
    let before = cluster.last_log();
    let busy = Machine::new("two").begin(&cluster, 2, &pin).await.err().unwrap();
    assert!(matches!(busy, Error::Busy { .. }), "{busy:?}");
    assert_eq!(cluster.last_log(), before, "nothing was counted");
    cluster.control.finish_pin(&source(1), half.finish).await.unwrap();
    Machine::new("three")
        .pair_by_ticket(&cluster, 3)
        .await
        .expect("what is proved gives way");
}

#[tokio::test]
async fn a_code_that_is_not_open_answers_right_and_wrong_proofs_alike() {
    let cluster = Cluster::found().await;
    let used = ticket(&cluster).await;
    Machine::new("first")
        .prove_ticket(&cluster, 1, &used)
        .await
        .unwrap();
    let revoked = ticket(&cluster).await;
    cluster
        .control
        .revoke_code(&cluster.operator(), "", &revoked.id, "")
        .await
        .unwrap();
    let before = cluster.last_log();
    for (right, expected) in [(&used, Code::CodeUsed), (&revoked, Code::CodeRevoked)] {
        let mut wrong = right.clone();
        wrong.secret = palyra_pki::ticket::Secret::from_bytes(&[0; 16]).unwrap();
        for ticket in [right, &wrong] {
            let error = Machine::new("late")
                .prove_ticket(&cluster, 2, ticket)
                .await
                .unwrap_err();
            assert!(
                matches!(&error, Error::Rejected(reject) if reject.kind() == expected),
                "{error:?}"
            );
        }
    }
    assert_eq!(cluster.last_log(), before, "no entry");
}

async fn try_join(control: &Control, join: Join) -> Error {
    control.join(&source(1), join).await.unwrap_err()
}

#[tokio::test]
async fn bent_joins() {
    let cluster = Cluster::found().await;
    let minted = cluster
        .control
        .mint_join_token(&cluster.operator(), "", "r2", 0)
        .await
        .unwrap();
    let asked = Joining::new(&minted.token);
    let (right, mut dice) = (asked.message("r2"), Dice(5));
    let before = cluster.last_log();
    for case in 0..300 {
        let mut bent = right.clone();
        match case % 10 {
            0 => bent.token_id = dice.no_id(),
            1 => bent.proof = dice.resized(&right.proof).to_vec(),
            2 => bent.proof = dice.flipped(&right.proof).to_vec(),
            3 => bent.name = dice.no_name(),
            4 => bent.replica_csr = dice.resized(&right.replica_csr).to_vec(),
            5 => bent.authority_csr = dice.flipped(&right.authority_csr).to_vec(),
            6 => bent.peer_addr = dice.no_name(),
            7 => bent.node_addr = format!("{}0", right.node_addr),
            8 => bent.enrol_addr = String::new(),
            _ => bent.metrics_addr = dice.no_name(),
        }
        let error = try_join(&cluster.control, bent.clone()).await;
        assert!(
            is_invalid(&error) || error == Refusal::WrongJoinProof.into(),
            "case {case}: {bent:?}: {error:?}"
        );
    }
    let unknown = Join {
        token_id: fresh_id().to_string(),
        ..right.clone()
    };
    assert_eq!(try_join(&cluster.control, unknown).await.code(), "E0106");
    assert_eq!(cluster.last_log(), before, "no entry");
    assert_eq!(cluster::replicas(&cluster.replica.view()).len(), 1);
    let joined = cluster.control.join(&source(1), right).await.unwrap();
    assert_eq!(joined.replica_id, 2, "no id was wasted");
}

#[tokio::test]
async fn a_key_that_is_another_devices_is_refused() {
    let cluster = Cluster::found().await;
    let owner = cluster.node("owner").await;
    let mut thief = Machine::new("thief");
    // A signing request proves its key; who holds the key may be another device only by theft.
    thief.csr = owner.csr.clone();
    let error = thief.pair_by_ticket(&cluster, 1).await.unwrap_err();
    assert!(
        matches!(&error, Error::Rejected(reject) if reject.kind() == Code::KeyInUse),
        "{error:?}"
    );
    let other = KeyPair::generate(&mut platform::fill_random)
        .unwrap()
        .make_csr()
        .unwrap();
    assert_ne!(sha256(&other), sha256(&owner.csr));
}
