//! Real handshakes in memory, between every kind of listener and every kind of client.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;

use palyra_pki::ca::HostNames;
use palyra_pki::tls::{
    ALPN_H2, Clock, EnrolTls, SeenServer, SharedIdentity, SharedTrust, chain_error, client_pinned,
    client_unverified_for_pin_pairing, client_verified, explain_alert, server_end_point, server_enrol,
    server_mutual,
};
use palyra_pki::{
    Authority, ChainError, KeyPair, PeerIdentity, Role, Root, SpiffeId, TrustBundle, TrustDomain,
};
use rustls::{ClientConfig, ClientConnection, Error, ServerConfig, ServerConnection};

const NOW: u64 = 1_795_262_400_000;
const CLUSTER: &str = "01JD7Z8QK3M5N7P9R1S3T5V7X9";
const DEVICE: &str = "01JD7ZB2C4D6E8F0G1H3J5K7M9";
const DAY: u64 = 24 * 60 * 60 * 1000;
const ALPN: [&[u8]; 1] = [ALPN_H2];

fn seeded(seed: u8) -> impl FnMut(&mut [u8]) {
    let mut counter = 0u64;
    move |out: &mut [u8]| {
        for chunk in out.chunks_mut(32) {
            counter += 1;
            let block = palyra_pki::sha256(&[&[seed][..], &counter.to_be_bytes()].concat());
            chunk.copy_from_slice(&block[..chunk.len()]);
        }
    }
}

struct Cluster {
    root: Root,
    authority: Authority,
    bundle: TrustBundle,
    domain: TrustDomain,
}

fn cluster(seed: u8) -> Cluster {
    let mut rng = seeded(seed);
    let domain = TrustDomain::for_cluster(CLUSTER).unwrap();
    let root = Root::create(CLUSTER, &domain, NOW, &mut rng).unwrap();
    let key = KeyPair::generate(&mut rng).unwrap();
    let issued = root
        .sign_authority(&key.make_csr().unwrap(), 1, NOW, &mut rng)
        .unwrap();
    let authority = Authority::new(issued.der, key).unwrap();
    let bundle = TrustBundle::new(CLUSTER, domain.clone(), vec![root.der().to_vec()]).unwrap();
    Cluster {
        root,
        authority,
        bundle,
        domain,
    }
}

impl Cluster {
    fn leaf(&self, id: &str, seed: u8) -> (Vec<Vec<u8>>, KeyPair) {
        let mut rng = seeded(seed);
        let key = KeyPair::generate(&mut rng).unwrap();
        let id = SpiffeId::parse(&format!("spiffe://{}/{id}", self.domain)).unwrap();
        let hosts = if id.role() == Role::Replica {
            HostNames::from_hosts(["127.0.0.1"])
        } else {
            HostNames::default()
        };
        let csr = key.make_csr().unwrap();
        let issued = self
            .authority
            .issue_from_csr(&csr, &id, DAY, &hosts, NOW, &mut rng)
            .unwrap();
        (
            vec![
                issued.der,
                self.authority.der().to_vec(),
                self.root.der().to_vec(),
            ],
            key,
        )
    }

    fn identity(&self, id: &str, seed: u8) -> Arc<SharedIdentity> {
        let (chain, key) = self.leaf(id, seed);
        SharedIdentity::new(chain, &key).unwrap()
    }

    fn trust(&self) -> Arc<SharedTrust> {
        SharedTrust::new(self.bundle.clone())
    }

    fn mutual(&self, roles: &[Role]) -> Arc<ServerConfig> {
        server_mutual(
            self.identity("replica/1", 50),
            self.trust(),
            roles,
            &clock(),
            &ALPN,
        )
        .unwrap()
    }

    fn enrol(&self, seed: u8) -> EnrolTls {
        let (chain, key) = self.leaf("replica/1", seed);
        server_enrol(chain, &key, &clock(), &ALPN).unwrap()
    }

    fn client(&self, id: Option<&str>) -> Arc<ClientConfig> {
        let identity = id.map(|id| self.identity(id, 60));
        client_verified(self.trust(), None, identity, &clock(), &ALPN).unwrap()
    }
}

fn clock() -> Clock {
    at(NOW)
}

fn at(now: u64) -> Clock {
    Clock::new(move || now)
}

/// Both ends of a handshake that succeeded, or who refused, and what the client is told.
#[derive(Debug)]
enum Outcome {
    Both(Box<ClientConnection>, Box<ServerConnection>),
    ClientRefused(Error),
    ServerRefused(Error),
}

fn handshake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> Outcome {
    let name = "anything.invalid".try_into().unwrap();
    let mut client = ClientConnection::new(Arc::clone(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::clone(server)).unwrap();
    for _ in 0..20 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut input = wire.as_slice();
        while !input.is_empty() {
            server.read_tls(&mut input).unwrap();
            if server.process_new_packets().is_err() {
                let mut alert = Vec::new();
                server.write_tls(&mut alert).unwrap();
                client.read_tls(&mut alert.as_slice()).unwrap();
                let seen = client.process_new_packets().unwrap_err();
                return Outcome::ServerRefused(seen);
            }
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut input = wire.as_slice();
        while !input.is_empty() {
            client.read_tls(&mut input).unwrap();
            if let Err(refusal) = client.process_new_packets() {
                return Outcome::ClientRefused(refusal);
            }
        }
        if !client.is_handshaking() && !server.is_handshaking() && !client.wants_write() {
            return Outcome::Both(Box::new(client), Box::new(server));
        }
    }
    panic!("the handshake does not end");
}

fn refused_by_client(outcome: Outcome) -> ChainError {
    match outcome {
        Outcome::ClientRefused(error) => chain_error(&error).cloned().unwrap_or_else(|| panic!("{error}")),
        other => panic!("expected the client to refuse, got {other:?}"),
    }
}

fn alert_of(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::ServerRefused(client) => explain_alert(&client).unwrap_or_else(|| panic!("{client}")),
        other => panic!("expected the server to refuse, got {other:?}"),
    }
}

#[test]
fn a_member_is_let_in_and_both_sides_know_each_other() {
    let ours = cluster(1);
    let node = format!("node/{DEVICE}");
    let Outcome::Both(client, server) = handshake(
        &ours.client(Some(&node)),
        &ours.mutual(&[Role::Node, Role::Operator]),
    ) else {
        panic!("refused")
    };
    let peer = PeerIdentity::from_der(&server.peer_certificates().unwrap()[0]).unwrap();
    assert_eq!((peer.id.role(), peer.id.id()), (Role::Node, DEVICE));
    let replica = PeerIdentity::from_der(&client.peer_certificates().unwrap()[0]).unwrap();
    assert_eq!(replica.id.replica_id(), Some(1));
    assert_eq!(client.alpn_protocol(), Some(ALPN_H2));
    assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
}

#[test]
fn each_refusal_of_a_client_has_its_own_alert() {
    let (ours, theirs) = (cluster(1), cluster(2));
    let node = format!("node/{DEVICE}");
    let server = ours.mutual(&[Role::Replica]);
    assert!(alert_of(handshake(&ours.client(Some(&node)), &server)).contains("role"));
    assert!(alert_of(handshake(&ours.client(None), &server)).contains("wants a certificate"));
    let stranger = client_verified(
        ours.trust(),
        None,
        Some(theirs.identity(&node, 61)),
        &clock(),
        &ALPN,
    )
    .unwrap();
    assert!(alert_of(handshake(&stranger, &ours.mutual(&[Role::Node]))).contains("another cluster"));
    let later = at(NOW + DAY + 2000);
    let late = server_mutual(
        ours.identity("replica/1", 50),
        ours.trust(),
        &[Role::Node],
        &later,
        &ALPN,
    )
    .unwrap();
    assert!(alert_of(handshake(&ours.client(Some(&node)), &late)).contains("over"));
}

#[test]
fn a_client_knows_a_replica_by_its_uri_name_only() {
    let (ours, theirs) = (cluster(1), cluster(2));
    let open = ours.enrol(70).config;
    assert!(matches!(handshake(&ours.client(None), &open), Outcome::Both(..)));
    let foreign = refused_by_client(handshake(&theirs.client(None), &open));
    assert_eq!(
        foreign,
        ChainError::UnknownIssuer {
            cluster_id: CLUSTER.to_owned()
        }
    );
    let id = |id| Some(SpiffeId::replica(ours.domain.clone(), id).unwrap());
    let exact = client_verified(ours.trust(), id(1), None, &clock(), &ALPN).unwrap();
    assert!(matches!(handshake(&exact, &open), Outcome::Both(..)));
    let other = client_verified(ours.trust(), id(2), None, &clock(), &ALPN).unwrap();
    let refused = refused_by_client(handshake(&other, &open));
    assert!(matches!(refused, ChainError::WrongIdentity { .. }), "{refused:?}");
    // Somebody of the cluster who isn't a replica can't pose as one.
    let (chain, key) = ours.leaf("operator/ann", 71);
    let posing = server_enrol(chain, &key, &clock(), &ALPN).unwrap();
    assert_eq!(
        refused_by_client(handshake(&ours.client(None), &posing.config)),
        ChainError::WrongUsage
    );
}

#[test]
fn a_pinned_client_learns_the_root() {
    let (ours, theirs) = (cluster(1), cluster(2));
    let enrol = ours.enrol(72);
    let seen = SeenServer::new();
    let config = client_pinned(ours.root.pin(), CLUSTER, Arc::clone(&seen), &clock(), &ALPN).unwrap();
    assert!(matches!(handshake(&config, &enrol.config), Outcome::Both(..)));
    let (peer, root) = seen.verified().unwrap();
    assert_eq!(peer.id.replica_id(), Some(1));
    assert_eq!(root.as_ref(), ours.root.der());
    assert_eq!(seen.end_point(), Some(enrol.end_point));
    let wrong = SeenServer::new();
    let config = client_pinned(theirs.root.pin(), CLUSTER, Arc::clone(&wrong), &clock(), &ALPN).unwrap();
    assert_eq!(
        refused_by_client(handshake(&config, &enrol.config)),
        ChainError::PinMismatch
    );
    assert_eq!((wrong.end_point(), wrong.verified()), (None, None));
}

#[test]
fn a_recording_client_accepts_anybody_once() {
    let (ours, theirs) = (cluster(1), cluster(2));
    let (first, second) = (ours.enrol(73), theirs.enrol(74));
    let seen = SeenServer::new();
    let config = client_unverified_for_pin_pairing(Arc::clone(&seen), &clock(), &ALPN).unwrap();
    assert!(matches!(handshake(&config, &first.config), Outcome::Both(..)));
    assert_eq!(seen.end_point(), Some(first.end_point));
    assert_eq!(seen.verified(), None);
    assert!(
        matches!(handshake(&config, &first.config), Outcome::Both(..)),
        "the same server again"
    );
    let refused = refused_by_client(handshake(&config, &second.config));
    assert!(refused.to_string().contains("another certificate"), "{refused}");
    assert_eq!(seen.end_point(), Some(first.end_point));
}

#[test]
fn certificates_and_trust_are_exchanged_while_listening() {
    let (ours, theirs) = (cluster(1), cluster(2));
    let node = format!("node/{DEVICE}");
    let (identity, trust) = (ours.identity("replica/1", 75), ours.trust());
    let before = identity.certificate();
    let server = server_mutual(
        Arc::clone(&identity),
        Arc::clone(&trust),
        &[Role::Node],
        &clock(),
        &ALPN,
    )
    .unwrap();
    let presented = |client: &Arc<ClientConfig>| match handshake(client, &server) {
        Outcome::Both(client, _) => client.peer_certificates().unwrap()[0].clone().into_owned(),
        other => panic!("{other:?}"),
    };
    let client = ours.client(Some(&node));
    assert_eq!(presented(&client), before);
    let (chain, key) = ours.leaf("replica/1", 76);
    let next = chain[0].clone();
    let (_, other_key) = ours.leaf("replica/1", 77);
    assert!(
        identity.replace(chain.clone(), &other_key).is_err(),
        "a key of another certificate"
    );
    assert_eq!(presented(&client), before, "a refused exchange changes nothing");
    identity.replace(chain, &key).unwrap();
    assert_eq!(presented(&client).as_ref(), next.as_slice());
    trust.replace(theirs.bundle.clone());
    assert!(matches!(handshake(&client, &server), Outcome::ServerRefused(_)));
}

#[test]
fn sessions_are_never_resumed() {
    let ours = cluster(1);
    let node = format!("node/{DEVICE}");
    let (client, server) = (ours.client(Some(&node)), ours.mutual(&[Role::Node]));
    for _ in 0..3 {
        let Outcome::Both(ours, theirs) = handshake(&client, &server) else {
            panic!("refused")
        };
        assert_eq!(ours.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert_eq!(theirs.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
}

#[test]
fn the_end_point_is_the_hash_of_the_certificate() {
    let ours = cluster(1);
    let (chain, key) = ours.leaf("replica/1", 78);
    let enrol = server_enrol(chain.clone(), &key, &clock(), &ALPN).unwrap();
    assert_eq!(enrol.end_point, palyra_pki::sha256(&chain[0]));
    assert_eq!(enrol.end_point, server_end_point(&chain[0]));
    assert!(matches!(
        SharedIdentity::new(vec![], &key),
        Err(ChainError::Length(0))
    ));
}
