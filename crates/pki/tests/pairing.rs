//! Whole pairings with everything but the sockets, and what becomes of those who sit in between.
#![allow(clippy::unwrap_used, missing_docs)]

use palyra_pki::ca::{HostNames, NODE_VALIDITY_MS};
use palyra_pki::chain::{Usage, verify_chain};
use palyra_pki::pin::{self, PinError, PinVerifier};
use palyra_pki::ticket::Secret;
use palyra_pki::transcript::{Opening, check_fetch_token, fetch_token_hash};
use palyra_pki::{
    Authority, Kek, KeyPair, Method, Pin, Purpose, Role, Root, SpiffeId, Ticket, Transcript, TrustBundle,
    TrustDomain, sha256,
};
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

struct Cluster {
    authority: Authority,
    bundle: TrustBundle,
    domain: TrustDomain,
    kek: Kek,
}

fn cluster() -> Cluster {
    let mut rng = seeded(1);
    let domain = TrustDomain::for_cluster(CLUSTER).unwrap();
    let root = Root::create(CLUSTER, &domain, NOW, &mut rng).unwrap();
    let key = KeyPair::generate(&mut rng).unwrap();
    let issued = root
        .sign_authority(&key.make_csr().unwrap(), 1, NOW, &mut rng)
        .unwrap();
    Cluster {
        authority: Authority::new(issued.der, key).unwrap(),
        bundle: TrustBundle::new(CLUSTER, domain.clone(), vec![root.der().to_vec()]).unwrap(),
        domain,
        kek: Kek::generate(&mut rng),
    }
}

fn opening(method: Method, end_point: u8, csr: &[u8]) -> Opening<'static> {
    Opening {
        cluster_id: CLUSTER,
        method,
        code_id: CODE,
        node_id: DEVICE,
        server_end_point: [end_point; 32],
        csr_sha256: sha256(csr),
        node_nonce: [2; 32],
        server_nonce: [3; 32],
    }
}

/// What one side ends with.
struct Side {
    transcript: Transcript,
    key: Vec<u8>,
}

/// Runs a PIN pairing in which the two sides see the given end points and requests.
fn pin_pairing(
    cluster: &Cluster,
    typed: &str,
    seen: (u8, u8),
    csrs: (&[u8], &[u8]),
) -> Result<(Side, Side), PinError> {
    let mut rng = seeded(2);
    let minted = pin::mint(&Pin::parse("48219034").unwrap(), CODE, &mut rng).unwrap();
    let stored = cluster
        .kek
        .seal(Purpose::PinVerifier, CODE.as_bytes(), minted.to_bytes(), &mut rng)
        .unwrap();
    let opened = cluster
        .kek
        .open(Purpose::PinVerifier, CODE.as_bytes(), &stored)
        .unwrap();
    let verifier = PinVerifier::from_bytes(&opened).unwrap();

    let typed = Pin::parse(typed).unwrap();
    let node = Transcript::new(&opening(Method::Pin, seen.0, csrs.0)).unwrap();
    let server = Transcript::new(&opening(Method::Pin, seen.1, csrs.1)).unwrap();
    let (client_state, ke1) = pin::client_begin(&typed, &mut rng)?;
    let (server_state, ke2) = pin::server_begin(&verifier, CODE, server.context(), &ke1, &mut rng)?;
    let (ke3, node_key) = pin::client_finish(client_state, &typed, node.context(), &ke2, &mut rng)?;
    let server_key = pin::server_finish(server_state, &ke3)?;
    let (node, server) = (node.with_messages(&ke1, &ke2), server.with_messages(&ke1, &ke2));
    Ok((
        Side {
            transcript: node,
            key: node_key.to_vec(),
        },
        Side {
            transcript: server,
            key: server_key.to_vec(),
        },
    ))
}

#[test]
fn eight_digits_become_a_certificate() {
    let cluster = cluster();
    let mut rng = seeded(3);
    let key = KeyPair::generate(&mut rng).unwrap();
    let csr = key.make_csr().unwrap();
    let (node, server) = pin_pairing(&cluster, "4821 9034", (7, 7), (&csr, &csr)).unwrap();

    let proof = node.transcript.node_proof(&node.key);
    assert!(server.transcript.check_node_proof(&server.key, &proof));
    let answer = server
        .transcript
        .server_proof(&server.key, &cluster.bundle.digest());
    assert!(
        node.transcript
            .check_server_proof(&node.key, &cluster.bundle.digest(), &answer)
    );
    assert_eq!(node.transcript.sas(&node.key), server.transcript.sas(&server.key));
    let stored = fetch_token_hash(server.transcript.fetch_token(&server.key).as_slice());
    assert!(check_fetch_token(
        node.transcript.fetch_token(&node.key).as_slice(),
        &stored
    ));

    let id = SpiffeId::new(cluster.domain.clone(), Role::Node, DEVICE).unwrap();
    let names = HostNames::default();
    let issued = cluster
        .authority
        .issue_from_csr(&csr, &id, NODE_VALIDITY_MS, &names, NOW, &mut rng)
        .unwrap();
    assert_eq!(issued.spki_sha256, key.spki_sha256());
    let chain = [issued.der, cluster.authority.der().to_vec()].map(CertificateDer::from);
    let peer = verify_chain(&chain, &cluster.bundle, Usage::Client, &[Role::Node], NOW).unwrap();
    assert_eq!(peer.id, id);
}

#[test]
fn a_relay_between_two_tls_connections_ends_inside_the_pake() {
    let cluster = cluster();
    // The node sees the relay's certificate, the server its own; the PIN is right and the bytes are
    // untouched.
    let relayed = pin_pairing(&cluster, "48219034", (8, 7), (b"csr", b"csr"));
    assert_eq!(relayed.map(drop).unwrap_err(), PinError::WrongPin);
}

#[test]
fn a_swapped_key_ends_inside_the_pake() {
    let cluster = cluster();
    let swapped = pin_pairing(&cluster, "48219034", (7, 7), (b"the node's", b"somebody's"));
    assert_eq!(swapped.map(drop).unwrap_err(), PinError::WrongPin);
}

#[test]
fn who_poses_as_the_server_has_one_guess() {
    let mut rng = seeded(4);
    let typed = Pin::parse("48219034").unwrap();
    let node = Transcript::new(&opening(Method::Pin, 8, b"csr")).unwrap();
    // Posing means to register a guessed PIN with oneself and to answer from that.
    let guess = pin::mint(&Pin::parse("00000000").unwrap(), CODE, &mut rng).unwrap();
    let (state, ke1) = pin::client_begin(&typed, &mut rng).unwrap();
    let (_, ke2) = pin::server_begin(&guess, CODE, node.context(), &ke1, &mut rng).unwrap();
    let finished = pin::client_finish(state, &typed, node.context(), &ke2, &mut rng);
    assert_eq!(finished.map(drop).unwrap_err(), PinError::WrongPin);
}

#[test]
fn a_ticket_is_proved_over_its_own_connection_and_request_only() {
    let cluster = cluster();
    let ticket = Ticket {
        cluster_id: CLUSTER.to_owned(),
        id: CODE.to_owned(),
        secret: Secret::generate(&mut seeded(5)),
        root_pin: palyra_pki::identity::spki_sha256(&cluster.bundle.roots()[0]).unwrap(),
        endpoints: vec!["127.0.0.1:7442".to_owned()],
    };
    let read = Ticket::parse(&ticket.to_text().unwrap()).unwrap();
    let (theirs, ours) = (ticket.key(), read.key());
    let at = |end_point, csr: &[u8]| Transcript::new(&opening(Method::Ticket, end_point, csr)).unwrap();
    let proof = at(7, b"csr").node_proof(ours.as_slice());
    assert!(at(7, b"csr").check_node_proof(theirs.as_slice(), &proof));
    assert!(
        !at(8, b"csr").check_node_proof(theirs.as_slice(), &proof),
        "relayed"
    );
    assert!(
        !at(7, b"another").check_node_proof(theirs.as_slice(), &proof),
        "another key"
    );
    let as_pin = Transcript::new(&opening(Method::Pin, 7, b"csr")).unwrap();
    assert!(
        !as_pin.check_node_proof(theirs.as_slice(), &proof),
        "another method"
    );
    let mut replayed = opening(Method::Ticket, 7, b"csr");
    replayed.server_nonce = [4; 32];
    let replayed = Transcript::new(&replayed).unwrap();
    assert!(
        !replayed.check_node_proof(theirs.as_slice(), &proof),
        "another connection's nonce"
    );
}
