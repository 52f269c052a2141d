//! Recomputes `docs/protocol/pairing-vectors.json`. `docs/protocol/pairing_vectors.py` does it too, from the
//! text of `docs/protocol/pairing.md` and the RFCs alone and without a line of ours, so the page and the code
//! can't drift apart together.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs)]

use palyra_pki::join::JoinRequest;
use palyra_pki::pin::{self, Pin, PinVerifier};
use palyra_pki::ticket::{Secret, ticket_key};
use palyra_pki::transcript::{Opening, check_fetch_token, fetch_token_hash};
use palyra_pki::{JoinToken, Kek, Method, Purpose, Ticket, Transcript, TrustBundle, TrustDomain};
use serde_json::Value;

fn vectors() -> Value {
    let path = "../../docs/protocol/pairing-vectors.json";
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no text {name}"))
}

fn bytes(value: &Value, name: &str) -> Vec<u8> {
    hex::decode(text(value, name)).unwrap_or_else(|_| panic!("no bytes {name}"))
}

fn array<const N: usize>(value: &Value, name: &str) -> [u8; N] {
    bytes(value, name)
        .try_into()
        .unwrap_or_else(|_| panic!("{name} has not {N} bytes"))
}

fn texts(value: &Value, name: &str) -> Vec<String> {
    value[name]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry.as_str().unwrap().to_owned())
        .collect()
}

fn bundle(vectors: &Value) -> TrustBundle {
    let given = &vectors["trust_bundle"];
    let roots = texts(given, "roots")
        .iter()
        .map(|root| hex::decode(root).unwrap())
        .collect();
    TrustBundle::new(
        text(given, "cluster_id"),
        TrustDomain::new(text(given, "trust_domain")).unwrap(),
        roots,
    )
    .unwrap()
}

#[test]
fn pairing_proofs() {
    let vectors = vectors();
    let digest = bundle(&vectors).digest();
    assert_eq!(hex::encode(digest), text(&vectors["trust_bundle"], "sha256"));
    let pairings = vectors["pairings"].as_array().unwrap();
    assert_eq!(pairings.len(), 2);
    for given in pairings {
        let pin = text(given, "method") == "pin";
        let opening = Opening {
            cluster_id: text(given, "cluster_id"),
            method: if pin { Method::Pin } else { Method::Ticket },
            code_id: text(given, "code_id"),
            node_id: text(given, "node_id"),
            server_end_point: array(given, "server_end_point"),
            csr_sha256: array(given, "csr_sha256"),
            node_nonce: array(given, "node_nonce"),
            server_nonce: array(given, "server_nonce"),
        };
        let mut transcript = Transcript::new(&opening).unwrap();
        assert_eq!(hex::encode(transcript.context()), text(given, "context"));
        if pin {
            transcript = transcript.with_messages(&bytes(given, "ke1"), &bytes(given, "ke2"));
        }
        let key = bytes(given, "key");
        assert_eq!(hex::encode(transcript.encoded()), text(given, "transcript"));
        assert_eq!(hex::encode(transcript.hash()), text(given, "transcript_sha256"));
        assert_eq!(
            hex::encode(transcript.node_proof(&key)),
            text(given, "node_proof")
        );
        assert_eq!(
            hex::encode(transcript.server_proof(&key, &digest)),
            text(given, "server_proof")
        );
        assert_eq!(transcript.sas(&key), text(given, "sas"));
        let token = transcript.fetch_token(&key);
        assert_eq!(hex::encode(token.as_slice()), text(given, "fetch_token"));
        assert_eq!(
            hex::encode(fetch_token_hash(token.as_slice())),
            text(given, "fetch_token_sha256")
        );
        assert!(check_fetch_token(
            token.as_slice(),
            &bytes(given, "fetch_token_sha256")
        ));
    }
}

#[test]
fn ticket_and_join_token_texts() {
    let vectors = vectors();
    let given = &vectors["ticket"];
    let made = Ticket {
        cluster_id: text(given, "cluster_id").to_owned(),
        id: text(given, "id").to_owned(),
        secret: Secret::from_bytes(&bytes(given, "secret")).unwrap(),
        root_pin: array(given, "root_pin"),
        endpoints: texts(given, "endpoints"),
    };
    assert_eq!(made.to_text().unwrap().as_str(), text(given, "text"));
    assert_eq!(Ticket::parse(text(given, "text")).unwrap(), made);
    assert_eq!(hex::encode(*made.key()), text(given, "key"));
    assert_eq!(*ticket_key(&made.secret, &made.cluster_id, &made.id), *made.key());
    let token = JoinToken::parse(text(given, "join_text")).unwrap();
    assert_eq!(
        (token.id.as_str(), &token.secret),
        (made.id.as_str(), &made.secret)
    );
    assert_eq!(token.to_text().unwrap().as_str(), text(given, "join_text"));
}

/// Entropy that gives a fixed nonce, once.
fn fixed(nonce: Vec<u8>) -> impl FnMut(&mut [u8]) {
    let mut nonce = Some(nonce);
    move |out: &mut [u8]| out.copy_from_slice(&nonce.take().expect("only one draw"))
}

#[test]
fn join_proof_and_key_hand_over() {
    let vectors = vectors();
    let given = &vectors["join"];
    let (replica_csr, authority_csr) = (bytes(given, "replica_csr"), bytes(given, "authority_csr"));
    let addresses = texts(given, "addresses");
    let request = JoinRequest {
        cluster_id: text(given, "cluster_id"),
        token_id: text(given, "token_id"),
        replica_csr: &replica_csr,
        authority_csr: &authority_csr,
        name: text(given, "name"),
        addresses: &addresses,
        server_end_point: array(given, "server_end_point"),
    };
    let secret = Secret::from_bytes(&bytes(given, "secret")).unwrap();
    assert_eq!(hex::encode(request.hash()), text(given, "request_sha256"));
    assert_eq!(hex::encode(request.proof(&secret)), text(given, "proof"));
    let parts: Vec<Vec<u8>> = texts(given, "answer_parts")
        .iter()
        .map(|part| hex::decode(part).unwrap())
        .collect();
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    assert_eq!(
        hex::encode(request.answer_proof(&secret, &parts)),
        text(given, "answer_proof")
    );
    let kek = Kek::from_bytes(&bytes(given, "kek")).unwrap();
    let wrapped = request
        .wrap_kek(&secret, &kek, &mut fixed(bytes(given, "nonce")))
        .unwrap();
    assert_eq!(hex::encode(&wrapped), text(given, "wrapped_kek"));
    assert_eq!(request.unwrap_kek(&secret, &wrapped).unwrap().id(), kek.id());
}

#[test]
fn sealed_blobs() {
    let vectors = vectors();
    let given = &vectors["seal"];
    let kek = Kek::from_bytes(&bytes(given, "kek")).unwrap();
    assert_eq!(text(given, "purpose"), Purpose::PinVerifier.as_str());
    let (context, secret) = (bytes(given, "context"), bytes(given, "secret"));
    let blob = kek
        .seal(
            Purpose::PinVerifier,
            &context,
            &secret,
            &mut fixed(bytes(given, "nonce")),
        )
        .unwrap();
    assert_eq!(hex::encode(&blob), text(given, "blob"));
    assert_eq!(
        kek.open(Purpose::PinVerifier, &context, &blob)
            .unwrap()
            .as_slice(),
        secret
    );
}

/// Entropy that gives these draws, one after the other.
fn tape(draws: Vec<Vec<u8>>) -> impl FnMut(&mut [u8]) {
    let mut draws = draws.into_iter();
    move |out: &mut [u8]| out.copy_from_slice(&draws.next().expect("no draw more than in the vector"))
}

#[test]
fn an_exchange_with_given_choices() {
    let vectors = vectors();
    let (code, given) = (&vectors["pin_code"], &vectors["pin_code"]["exchange"]);
    let pin = Pin::parse(text(code, "pin")).unwrap();
    let verifier = PinVerifier::from_bytes(&bytes(code, "verifier")).unwrap();
    let context = bytes(given, "context");
    // The library draws a scalar as 64 bytes, which it reduces.
    let mut blind = bytes(given, "client_blind");
    blind.resize(64, 0);
    let node = vec![
        blind,
        bytes(given, "client_keyshare_seed"),
        bytes(given, "client_nonce"),
    ];
    let (client, ke1) = pin::client_begin(&pin, &mut tape(node)).unwrap();
    assert_eq!(hex::encode(&ke1), text(given, "ke1"));
    // What it draws first stands in for a code that doesn't exist, and is not used here.
    let mut replica = vec![vec![0; 64]];
    let names = ["masking_nonce", "server_keyshare_seed", "server_nonce"];
    replica.extend(names.map(|name| bytes(given, name)));
    let begun = pin::server_begin(
        &verifier,
        text(code, "code_id"),
        &context,
        &ke1,
        &mut tape(replica),
    );
    let (server, ke2) = begun.unwrap();
    assert_eq!(hex::encode(&ke2), text(given, "ke2"));
    let (ke3, key) = pin::client_finish(client, &pin, &context, &ke2, &mut tape(vec![])).unwrap();
    assert_eq!(hex::encode(&ke3), text(given, "ke3"));
    assert_eq!(hex::encode(key.as_slice()), text(given, "session_key"));
    assert_eq!(pin::server_finish(server, &ke3).unwrap(), key);
}

#[test]
fn a_stored_code_stays_usable() {
    let vectors = vectors();
    let given = &vectors["pin_code"];
    let pin = Pin::parse(text(given, "pin")).unwrap();
    let verifier = PinVerifier::from_bytes(&bytes(given, "verifier")).unwrap();
    let mut counter = 0u8;
    let mut rng = move |out: &mut [u8]| {
        counter += 1;
        out.fill(counter);
    };
    let (client, ke1) = pin::client_begin(&pin, &mut rng).unwrap();
    let (server, ke2) = pin::server_begin(&verifier, text(given, "code_id"), b"c", &ke1, &mut rng).unwrap();
    let (ke3, ours) = pin::client_finish(client, &pin, b"c", &ke2, &mut rng).unwrap();
    assert_eq!(pin::server_finish(server, &ke3).unwrap(), ours);
    assert_eq!(ke1.len(), given["ke1_length"].as_u64().unwrap() as usize);
    assert_eq!(ke2.len(), given["ke2_length"].as_u64().unwrap() as usize);
    assert_eq!(ke3.len(), given["ke3_length"].as_u64().unwrap() as usize);
}
