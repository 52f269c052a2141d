//! Every decoder that a stranger's bytes reach: bent, cut and stretched messages, and bytes that were never one.
//!
//! What holds for all: nothing panics, and what is accepted means what the original meant.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::OnceLock;

use palyra_pki::ca::{HostNames, NODE_VALIDITY_MS};
use palyra_pki::chain::{Usage, verify_chain, verify_pinned};
use palyra_pki::keys::check_csr;
use palyra_pki::pin::{self, PinVerifier};
use palyra_pki::ticket::{Secret, check_endpoint};
use palyra_pki::{
    Authority, Credential, JoinToken, Kek, KeyPair, PeerIdentity, Pin, Purpose, Role, Root, SpiffeId, Ticket,
    TrustBundle, TrustDomain, sha256,
};
use proptest::collection::vec;
use proptest::prelude::*;
use rustls_pki_types::CertificateDer;

const NOW: u64 = 1_795_262_400_000;
const CLUSTER: &str = "01JD7Z8QK3M5N7P9R1S3T5V7X9";
const CODE: &str = "01JD7ZA1B2C3D4E5F6G7H8J9K0";
const DEVICE: &str = "01JD7ZB2C4D6E8F0G1H3J5K7M9";

fn seeded(seed: u8) -> impl FnMut(&mut [u8]) {
    let mut counter = 0u64;
    move |out: &mut [u8]| {
        for chunk in out.chunks_mut(32) {
            counter += 1;
            let block = sha256(&[&[seed][..], &counter.to_be_bytes()].concat());
            chunk.copy_from_slice(&block[..chunk.len()]);
        }
    }
}

/// What is honest, made once.
struct Honest {
    csr: Vec<u8>,
    spki: [u8; 32],
    chain: Vec<CertificateDer<'static>>,
    bundle: TrustBundle,
    server: Vec<CertificateDer<'static>>,
    root_pin: [u8; 32],
    credential: String,
    verifier: PinVerifier,
}

fn honest() -> &'static Honest {
    static HONEST: OnceLock<Honest> = OnceLock::new();
    HONEST.get_or_init(|| {
        let mut rng = seeded(1);
        let domain = TrustDomain::for_cluster(CLUSTER).unwrap();
        let root = Root::create(CLUSTER, &domain, NOW, &mut rng).unwrap();
        let issuing = KeyPair::generate(&mut rng).unwrap();
        let signed = root
            .sign_authority(&issuing.make_csr().unwrap(), 1, NOW, &mut rng)
            .unwrap();
        let authority = Authority::new(signed.der, issuing).unwrap();
        let bundle = TrustBundle::new(CLUSTER, domain.clone(), vec![root.der().to_vec()]).unwrap();
        let key = KeyPair::generate(&mut rng).unwrap();
        let csr = key.make_csr().unwrap();
        let mut issue = |role, id: &str, names: &HostNames| {
            let id = SpiffeId::new(domain.clone(), role, id).unwrap();
            authority
                .issue_from_csr(&csr, &id, NODE_VALIDITY_MS, names, NOW, &mut rng)
                .unwrap()
                .der
        };
        let leaf = issue(Role::Node, DEVICE, &HostNames::default());
        let replica = issue(Role::Replica, "1", &HostNames::from_hosts(["127.0.0.1"]));
        let chain = vec![leaf, authority.der().to_vec()];
        let endpoints = vec!["127.0.0.1:7441".to_owned()];
        let credential = Credential::new(&bundle, endpoints, &chain, &key).unwrap();
        Honest {
            spki: key.spki_sha256(),
            chain: chain.into_iter().map(CertificateDer::from).collect(),
            server: [replica, authority.der().to_vec(), root.der().to_vec()]
                .map(CertificateDer::from)
                .to_vec(),
            root_pin: root.pin(),
            credential: credential.to_json().unwrap().to_string(),
            verifier: pin::mint(&Pin::parse("48219034").unwrap(), CODE, &mut seeded(2)).unwrap(),
            bundle,
            csr,
        }
    })
}

/// One change of a message. Places are fractions of its length.
#[derive(Debug, Clone)]
enum Bend {
    Xor(u16, u8),
    Set(u16, u8),
    Cut(u16),
    Drop(u16, u8),
    Insert(u16, Vec<u8>),
    /// Writes a part of the message over another.
    Copy(u16, u16, u8),
}

fn bends() -> impl Strategy<Value = Vec<Bend>> {
    let bend = prop_oneof![
        (any::<u16>(), 1..=255u8).prop_map(|(at, mask)| Bend::Xor(at, mask)),
        (any::<u16>(), any::<u8>()).prop_map(|(at, byte)| Bend::Set(at, byte)),
        any::<u16>().prop_map(Bend::Cut),
        (any::<u16>(), 1..32u8).prop_map(|(at, count)| Bend::Drop(at, count)),
        (any::<u16>(), vec(any::<u8>(), 1..64)).prop_map(|(at, bytes)| Bend::Insert(at, bytes)),
        (any::<u16>(), any::<u16>(), 1..64u8).prop_map(|(from, to, count)| Bend::Copy(from, to, count)),
    ];
    vec(bend, 1..4)
}

fn bent(original: &[u8], bends: &[Bend]) -> Vec<u8> {
    let mut bytes = original.to_vec();
    for bend in bends {
        let place = |at: u16| usize::from(at) * bytes.len() / (usize::from(u16::MAX) + 1);
        match bend {
            Bend::Xor(at, mask) => {
                let at = place(*at);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= mask;
                }
            }
            Bend::Set(at, value) => {
                let at = place(*at);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = *value;
                }
            }
            Bend::Cut(at) => bytes.truncate(place(*at)),
            Bend::Drop(at, count) => {
                let at = place(*at);
                let end = (at + usize::from(*count)).min(bytes.len());
                bytes.drain(at..end);
            }
            Bend::Insert(at, more) => {
                let at = place(*at);
                bytes.splice(at..at, more.iter().copied());
            }
            Bend::Copy(from, to, count) => {
                let (from, to) = (place(*from), place(*to));
                let count = usize::from(*count).min(bytes.len() - from).min(bytes.len() - to);
                bytes.copy_within(from..from + count, to);
            }
        }
    }
    bytes
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        max_shrink_iters: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(1024))]

    #[test]
    fn a_bent_request_is_believed_for_no_other_key(bends in bends()) {
        let honest = honest();
        if let Ok(key) = check_csr(&bent(&honest.csr, &bends)) {
            prop_assert_eq!(key.spki_sha256, honest.spki);
        }
    }

    #[test]
    fn a_bent_certificate_names_nobody_else(bends in bends()) {
        let honest = honest();
        let leaf = bent(&honest.chain[0], &bends);
        let _ = PeerIdentity::from_der(&leaf);
        let chain = [CertificateDer::from(leaf), honest.chain[1].clone()];
        if let Ok(peer) = verify_chain(&chain, &honest.bundle, Usage::Client, &[Role::Node], NOW) {
            prop_assert_eq!(peer.id.id(), DEVICE);
            prop_assert_eq!(peer.spki_sha256, honest.spki);
        }
    }

    #[test]
    fn a_bent_chain_leads_to_no_other_root(bends in bends(), which in 0..3usize) {
        let honest = honest();
        let mut chain = honest.server.clone();
        chain[which] = CertificateDer::from(bent(&chain[which], &bends));
        if let Ok((peer, root)) = verify_pinned(&chain, &honest.root_pin, CLUSTER, NOW) {
            prop_assert_eq!(peer.id.replica_id(), Some(1));
            prop_assert_eq!(palyra_pki::identity::spki_sha256(&root).unwrap(), honest.root_pin);
        }
    }

    #[test]
    fn bytes_that_never_were_a_message_are_refused(bytes in vec(any::<u8>(), 0..700)) {
        prop_assert!(check_csr(&bytes).is_err());
        prop_assert!(PeerIdentity::from_der(&bytes).is_err());
        prop_assert!(PinVerifier::from_bytes(&bytes).is_err() || bytes.len() == 321);
        let chain = [CertificateDer::from(bytes.clone())];
        let honest = honest();
        prop_assert!(verify_chain(&chain, &honest.bundle, Usage::Client, &[Role::Node], NOW).is_err());
        let kek = Kek::generate(&mut seeded(3));
        prop_assert!(kek.open(Purpose::TicketKey, b"", &bytes).is_err());
    }

    #[test]
    fn a_bent_first_message_is_refused_or_answered(bends in bends()) {
        let verifier = &honest().verifier;
        let (_, ke1) = pin::client_begin(&Pin::parse("48219034").unwrap(), &mut seeded(4)).unwrap();
        let ke1 = bent(&ke1, &bends);
        let answered = pin::server_begin(verifier, CODE, b"context", &ke1, &mut seeded(5));
        prop_assert_eq!(pin::check_first(&ke1).is_ok(), answered.is_ok());
    }

    #[test]
    fn a_bent_ticket_is_no_other_ticket(bends in bends()) {
        let ticket = Ticket {
            cluster_id: CLUSTER.to_owned(),
            id: CODE.to_owned(),
            secret: Secret::from_bytes(&[9; 16]).unwrap(),
            root_pin: [7; 32],
            endpoints: vec!["127.0.0.1:7442".to_owned(), "[::1]:7452".to_owned()],
        };
        let text = bent(ticket.to_text().unwrap().as_bytes(), &bends);
        let text = String::from_utf8_lossy(&text);
        if let Ok(read) = Ticket::parse(&text) {
            prop_assert_eq!(read, ticket);
        }
        prop_assert!(JoinToken::parse(&text).is_err());
    }

    #[test]
    fn typed_texts_are_refused_or_have_one_spelling(text in "\\PC{0,80}") {
        if let Ok(pin) = Pin::parse(&text) {
            let digits = |text: &str| text.chars().filter(char::is_ascii_digit).collect::<String>();
            prop_assert_eq!(digits(&pin.grouped()), digits(&text));
        }
        if let Ok(id) = SpiffeId::parse(&text) {
            prop_assert_eq!(id.to_string(), text.clone());
        }
        let _ = check_endpoint(&text);
        prop_assert!(Ticket::parse(&text).is_err() && Kek::from_text(&text).is_err());
    }

    #[test]
    fn a_bent_blob_does_not_open(bends in bends()) {
        let kek = Kek::generate(&mut seeded(6));
        let blob = kek.seal(Purpose::PinVerifier, b"C1", b"a secret", &mut seeded(7)).unwrap();
        let changed = bent(&blob, &bends);
        prop_assert_eq!(kek.open(Purpose::PinVerifier, b"C1", &changed).is_ok(), changed == blob);
    }
}

proptest! {
    #![proptest_config(config(192))]

    #[test]
    fn a_bent_last_message_proves_nothing(bends in bends()) {
        let typed = Pin::parse("48219034").unwrap();
        // The exchange is the same each time; the node's Argon2id is paid once.
        static KE3: OnceLock<Vec<u8>> = OnceLock::new();
        let (client, ke1) = pin::client_begin(&typed, &mut seeded(8)).unwrap();
        let (server, ke2) =
            pin::server_begin(&honest().verifier, CODE, b"context", &ke1, &mut seeded(9)).unwrap();
        let ke3 = KE3.get_or_init(|| {
            pin::client_finish(client, &typed, b"context", &ke2, &mut seeded(10)).unwrap().0
        });
        let changed = bent(ke3, &bends);
        prop_assert_eq!(pin::server_finish(server, &changed).is_ok(), changed == *ke3);
    }

    #[test]
    fn a_bent_credential_is_refused_or_usable(bends in bends()) {
        let text = bent(honest().credential.as_bytes(), &bends);
        if let Ok(read) = Credential::from_json(&String::from_utf8_lossy(&text)) {
            prop_assert!(read.for_tls().is_ok());
        }
    }
}

proptest! {
    // Each case may pay an Argon2id.
    #![proptest_config(config(24))]

    #[test]
    fn a_bent_second_message_is_noticed_by_the_node(bends in bends()) {
        let typed = Pin::parse("48219034").unwrap();
        let (client, ke1) = pin::client_begin(&typed, &mut seeded(11)).unwrap();
        let (_, ke2) =
            pin::server_begin(&honest().verifier, CODE, b"context", &ke1, &mut seeded(12)).unwrap();
        let changed = bent(&ke2, &bends);
        let finished = pin::client_finish(client, &typed, b"context", &changed, &mut seeded(13));
        prop_assert_eq!(finished.is_ok(), changed == ke2);
    }
}
