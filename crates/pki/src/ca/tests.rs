//! What the authority promises: names from the arguments, keys from the request, ends within the issuer's.

use super::*;
use crate::testing::{CLUSTER, DEVICE, NOW, Seeded, cluster};
use crate::{PeerIdentity, TrustBundle};

fn node(domain: &TrustDomain) -> SpiffeId {
    SpiffeId::new(domain.clone(), Role::Node, DEVICE).unwrap()
}

#[test]
fn a_leaf_says_what_the_arguments_said() {
    let mut rng = Seeded::new(9);
    let cluster = cluster(1);
    let key = KeyPair::generate(&mut rng).unwrap();
    let id = node(&cluster.domain);
    let issued = cluster
        .authority
        .issue_from_csr(
            &key.make_csr().unwrap(),
            &id,
            NODE_VALIDITY_MS,
            &HostNames::default(),
            NOW,
            &mut rng,
        )
        .unwrap();
    let peer = PeerIdentity::from_der(&issued.der).unwrap();
    assert_eq!(peer.id, id);
    assert_eq!(peer.spki_sha256, key.spki_sha256());
    assert_eq!(
        (issued.not_before_ms, issued.not_after_ms),
        (NOW - BACKDATE_MS, NOW + NODE_VALIDITY_MS)
    );
    assert_eq!(
        (peer.not_before_ms, peer.not_after_ms),
        (issued.not_before_ms, issued.not_after_ms)
    );
    assert_eq!(
        (&peer.serial, peer.fingerprint),
        (&issued.serial, issued.fingerprint)
    );
    assert_eq!(issued.serial.len(), 32);
    let parsed = parse_certificate(&issued.der).unwrap();
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && !usage.server_auth && !usage.any);
    assert!(!parsed.is_ca());
}

#[test]
fn nothing_but_the_key_is_taken_from_the_request() {
    let mut rng = Seeded::new(10);
    let cluster = cluster(1);
    let key = KeyPair::generate(&mut rng).unwrap();
    let mut greedy = CertificateParams::default();
    greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    greedy.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    greedy.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    greedy.subject_alt_names = vec![SanType::URI("spiffe://td/operator/root".try_into().unwrap())];
    greedy
        .distinguished_name
        .push(DnType::CommonName, "operator root");
    let csr = greedy.serialize_request(&key).unwrap();
    let id = node(&cluster.domain);
    let names = HostNames::default();
    let issued = cluster
        .authority
        .issue_from_csr(csr.der(), &id, 1000, &names, NOW, &mut rng)
        .unwrap();
    let parsed = parse_certificate(&issued.der).unwrap();
    assert_eq!(PeerIdentity::from_der(&issued.der).unwrap().id, id);
    assert!(!parsed.is_ca());
    assert!(!parsed.subject().to_string().contains("operator"));
    assert!(!parsed.extended_key_usage().unwrap().unwrap().value.server_auth);
}

#[test]
fn a_leaf_does_not_outlive_its_issuer() {
    let mut rng = Seeded::new(11);
    let cluster = cluster(1);
    let csr = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
    let (id, names) = (node(&cluster.domain), HostNames::default());
    let end = cluster.authority.not_after_ms();
    assert_eq!(end, NOW + AUTHORITY_VALIDITY_MS);
    let late = cluster
        .authority
        .issue_from_csr(&csr, &id, DAY_MS, &names, end - 1000, &mut rng)
        .unwrap();
    assert_eq!(late.not_after_ms, end);
    let over = cluster
        .authority
        .issue_from_csr(&csr, &id, DAY_MS, &names, end, &mut rng)
        .unwrap_err();
    assert_eq!(
        over,
        CaError::IssuerExpired {
            not_after_ms: end,
            now_ms: end
        }
    );
    let never = cluster
        .authority
        .issue_from_csr(&csr, &id, u64::MAX, &names, NOW, &mut rng)
        .unwrap();
    assert_eq!(never.not_after_ms, end);
}

#[test]
fn wrong_requests_are_refused() {
    let mut rng = Seeded::new(12);
    let cluster = cluster(1);
    let csr = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
    let stranger = SpiffeId::parse("spiffe://other.internal/operator/ann").unwrap();
    let none = HostNames::default();
    let refused = cluster
        .authority
        .issue_from_csr(&csr, &stranger, 1, &none, NOW, &mut rng)
        .unwrap_err();
    assert!(matches!(refused, CaError::OtherDomain { .. }), "{refused}");
    let listens = HostNames::from_hosts(["127.0.0.1"]);
    let id = node(&cluster.domain);
    let refused = cluster
        .authority
        .issue_from_csr(&csr, &id, 1, &listens, NOW, &mut rng)
        .unwrap_err();
    assert!(matches!(refused, CaError::Names(_)), "{refused}");
    let replica = SpiffeId::replica(cluster.domain.clone(), 1).unwrap();
    for bad in ["", "a b", "*.example.org", "x/y", &"h".repeat(254)] {
        let names = HostNames {
            dns: vec![bad.to_owned()],
            ips: vec![],
        };
        assert!(
            cluster
                .root
                .issue_from_csr(&csr, &replica, 1, &names, NOW, &mut rng)
                .is_err(),
            "{bad:?}"
        );
    }
    let many = HostNames {
        dns: vec!["a".to_owned(); MAX_NAMES + 1],
        ips: vec![],
    };
    assert!(
        cluster
            .root
            .issue_from_csr(&csr, &replica, 1, &many, NOW, &mut rng)
            .is_err()
    );
    let junk = cluster
        .authority
        .issue_from_csr(b"junk", &id, 1, &none, NOW, &mut rng)
        .unwrap_err();
    assert_eq!(junk, CaError::Key(KeyError::CsrMalformed));
}

#[test]
fn replicas_get_the_names_they_listen_on() {
    let names = HostNames::from_hosts([
        "0.0.0.0",
        "127.0.0.1",
        "[::1]",
        "r1.example.org",
        "localhost",
        "127.0.0.1",
    ]);
    assert_eq!(names.dns, ["localhost", "r1.example.org"]);
    assert_eq!(
        names.ips,
        ["127.0.0.1".parse::<IpAddr>().unwrap(), "::1".parse().unwrap()]
    );
    let mut rng = Seeded::new(13);
    let cluster = cluster(1);
    let csr = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
    let id = SpiffeId::replica(cluster.domain.clone(), 1).unwrap();
    let issued = cluster
        .root
        .issue_from_csr(&csr, &id, DAY_MS, &names, NOW, &mut rng)
        .unwrap();
    let parsed = parse_certificate(&issued.der).unwrap();
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && usage.server_auth);
    assert_eq!(
        parsed
            .subject_alternative_name()
            .unwrap()
            .unwrap()
            .value
            .general_names
            .len(),
        5
    );
}

#[test]
fn signers_are_checked_when_opened() {
    let mut rng = Seeded::new(14);
    let cluster = cluster(1);
    let other = KeyPair::generate(&mut rng).unwrap();
    assert_eq!(
        Authority::new(cluster.authority.der().to_vec(), other).unwrap_err(),
        CaError::KeyMismatch
    );
    let key = KeyPair::generate(&mut rng).unwrap();
    let id = node(&cluster.domain);
    let csr = key.make_csr().unwrap();
    let names = HostNames::default();
    let leaf = cluster
        .authority
        .issue_from_csr(&csr, &id, DAY_MS, &names, NOW, &mut rng)
        .unwrap();
    assert_eq!(
        Authority::new(leaf.der, key).unwrap_err(),
        CaError::NotAnAuthority
    );
    let again = Root::open(
        cluster.root.der().to_vec(),
        KeyPair::from_pkcs8(cluster.root.key().to_pkcs8()).unwrap(),
    );
    assert_eq!(
        again.unwrap().pin(),
        crate::identity::spki_sha256(cluster.root.der()).unwrap()
    );
    assert!(Root::create(CLUSTER, &cluster.domain, u64::MAX, &mut rng).is_err());
}

#[test]
fn an_authority_under_two_roots_makes_chains_that_either_trusts() {
    use crate::chain::{Usage, verify_chain};
    use crate::credential::to_rustls;
    let cluster = cluster(1);
    let mut rng = Seeded::new(77);
    let next = Root::create_next("01JD7Z8QK3M5N7P9R1S3T5V7X9", 2, &cluster.domain, NOW, &mut rng).unwrap();
    let again = next
        .certify_authority(cluster.authority.der(), 1, NOW, &mut rng)
        .unwrap();
    assert_eq!(again.spki_sha256, cluster.authority.key().spki_sha256());
    assert!(again.not_after_ms <= cluster.authority.not_after_ms());
    let key = KeyPair::generate(&mut rng).unwrap();
    let id = SpiffeId::new(cluster.domain.clone(), Role::Operator, "ann").unwrap();
    let none = HostNames::default();
    let leaf = cluster
        .authority
        .issue_from_csr(&key.make_csr().unwrap(), &id, 1000, &none, NOW, &mut rng)
        .unwrap();
    let old_root = cluster.bundle.clone();
    let roots = vec![next.der().to_vec()];
    let new_root = TrustBundle::new(old_root.cluster_id(), cluster.domain.clone(), roots).unwrap();
    let check = |chain: &[Vec<u8>], bundle: &TrustBundle| {
        verify_chain(&to_rustls(chain), bundle, Usage::Client, &[Role::Operator], NOW)
    };
    let old_chain = [leaf.der.clone(), cluster.authority.der().to_vec()];
    let both = [
        leaf.der.clone(),
        again.der.clone(),
        cluster.authority.der().to_vec(),
    ];
    check(&both, &old_root).unwrap();
    check(&both, &new_root).unwrap();
    check(&old_chain, &old_root).unwrap();
    check(&old_chain, &new_root).unwrap_err();
    // Whoever knows the authority under its new root completes an old chain.
    let knowing = new_root.clone().with_authorities(vec![again.der.clone()]);
    check(&old_chain, &knowing).unwrap();
    // A known authority is no root.
    let stranger =
        Root::create_next("01JD7Z8QK3M5N7P9R1S3T5V7X9", 3, &cluster.domain, NOW, &mut rng).unwrap();
    let roots = vec![stranger.der().to_vec()];
    let other = TrustBundle::new(old_root.cluster_id(), cluster.domain.clone(), roots).unwrap();
    check(&both, &other.with_authorities(vec![again.der])).unwrap_err();
}

#[test]
fn a_list_of_revoked_certificates_is_signed_and_read_back() {
    use x509_parser::prelude::{CertificateRevocationList, FromDer as _, X509Certificate};
    let cluster = cluster(1);
    let crl = Crl {
        number: 0x80,
        this_update_ms: NOW,
        next_update_ms: NOW + 86_400_000,
        revoked: vec![Revoked {
            serial: vec![0x40, 1, 2],
            revoked_at_ms: NOW,
            reason: RevokedFor::PrivilegeWithdrawn,
        }],
    };
    let der = cluster.authority.sign_crl(&crl).unwrap();
    let (_, read) = CertificateRevocationList::from_der(&der).unwrap();
    let (_, authority) = X509Certificate::from_der(cluster.authority.der()).unwrap();
    read.verify_signature(authority.public_key()).unwrap();
    assert_eq!(read.crl_number().unwrap().to_string(), "128");
    assert_eq!(read.issuer(), authority.subject());
    let listed: Vec<Vec<u8>> = read
        .iter_revoked_certificates()
        .map(|one| one.raw_serial().to_vec())
        .collect();
    assert_eq!(listed, [vec![0x40, 1, 2]]);
    let empty = Crl {
        revoked: Vec::new(),
        ..crl
    };
    assert!(cluster.authority.sign_crl(&empty).is_ok());
}
