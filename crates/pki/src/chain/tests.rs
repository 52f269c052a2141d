//! Which chains are ours: issuer, time, usage, names and role, one wrong at a time.

use super::*;
use crate::ca::{AUTHORITY_VALIDITY_MS, BACKDATE_MS, HostNames, NODE_VALIDITY_MS};
use crate::testing::{CLUSTER, Cluster, DEVICE, NOW, Seeded, cluster};
use crate::{Authority, KeyPair, SpiffeId};

fn leaf(cluster: &Cluster, id: &str) -> Vec<CertificateDer<'static>> {
    let mut rng = Seeded::new(77);
    let csr = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
    let id = SpiffeId::parse(&format!("spiffe://{}/{id}", cluster.domain)).unwrap();
    let issued = cluster
        .authority
        .issue_from_csr(&csr, &id, NODE_VALIDITY_MS, &HostNames::default(), NOW, &mut rng)
        .unwrap();
    [
        issued.der,
        cluster.authority.der().to_vec(),
        cluster.root.der().to_vec(),
    ]
    .map(CertificateDer::from)
    .to_vec()
}

fn node() -> String {
    format!("node/{DEVICE}")
}

fn check(chain: &[CertificateDer<'_>], cluster: &Cluster, now: u64) -> Result<PeerIdentity, ChainError> {
    verify_chain(chain, &cluster.bundle, Usage::Client, &[Role::Node], now)
}

#[test]
fn a_chain_of_the_cluster_is_accepted() {
    let cluster = cluster(1);
    let chain = leaf(&cluster, &node());
    assert_eq!(check(&chain, &cluster, NOW).unwrap().id.id(), DEVICE);
    assert!(
        check(&chain[..2], &cluster, NOW).is_ok(),
        "the root need not be presented"
    );
    let (first, last) = (NOW - BACKDATE_MS, NOW + NODE_VALIDITY_MS);
    assert!(check(&chain, &cluster, first).is_ok());
    assert!(check(&chain, &cluster, last).is_ok());
    let early = check(&chain, &cluster, first - 1000).unwrap_err();
    assert_eq!(
        early,
        ChainError::NotYetValid {
            not_before_ms: first,
            now_ms: first - 1000
        }
    );
    let late = check(&chain, &cluster, last + 1000).unwrap_err();
    assert_eq!(
        late,
        ChainError::Expired {
            not_after_ms: last,
            now_ms: last + 1000
        }
    );
}

#[test]
fn another_cluster_is_a_stranger_even_under_the_same_names() {
    let (ours, theirs) = (cluster(1), cluster(2));
    assert_eq!(ours.domain, theirs.domain);
    let refused = check(&leaf(&theirs, &node()), &ours, NOW).unwrap_err();
    let unknown = ChainError::UnknownIssuer {
        cluster_id: CLUSTER.to_owned(),
    };
    assert_eq!(refused, unknown);
    // Their leaf under our authority's certificate: the names match, the signature doesn't.
    let mut mixed = leaf(&theirs, &node());
    mixed[1] = CertificateDer::from(ours.authority.der().to_vec());
    let refused = check(&mixed, &ours, NOW).unwrap_err();
    assert_eq!(refused, unknown);
    let lone = check(&leaf(&ours, &node())[..1], &ours, NOW).unwrap_err();
    assert_eq!(lone, unknown);
}

#[test]
fn role_usage_and_length_are_checked() {
    let cluster = cluster(1);
    let chain = leaf(&cluster, "operator/ann");
    let refused = verify_chain(
        &chain,
        &cluster.bundle,
        Usage::Client,
        &[Role::Node, Role::Worker],
        NOW,
    );
    let expected = "node or worker".to_owned();
    assert_eq!(
        refused.unwrap_err(),
        ChainError::WrongRole {
            found: Role::Operator,
            expected
        }
    );
    let refused = verify_chain(&chain, &cluster.bundle, Usage::Server, &[Role::Operator], NOW);
    assert_eq!(refused.unwrap_err(), ChainError::WrongUsage);
    assert_eq!(check(&[], &cluster, NOW).unwrap_err(), ChainError::Length(0));
    let long = [chain.clone(), chain.clone(), chain.clone()].concat();
    assert_eq!(check(&long, &cluster, NOW).unwrap_err(), ChainError::Length(9));
    let large = vec![CertificateDer::from(vec![0x30; MAX_CERTIFICATE + 1])];
    assert!(matches!(
        check(&large, &cluster, NOW),
        Err(ChainError::Identity(IdentityError::TooLarge(_)))
    ));
    let junk = vec![CertificateDer::from(b"junk".to_vec())];
    assert!(check(&junk, &cluster, NOW).is_err());
}

#[test]
fn an_authority_cannot_make_authorities_nor_act_as_a_leaf() {
    let mut rng = Seeded::new(5);
    let cluster = cluster(1);
    // An authority made by an authority: by hand, as this crate has no way to ask for it.
    let key = KeyPair::generate(&mut rng).unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
    params
        .distinguished_name
        .push(rcgen::DnType::OrganizationName, cluster.domain.as_str());
    let ours = CertificateDer::from(cluster.authority.der().to_vec());
    let issuer = rcgen::Issuer::from_ca_cert_der(&ours, cluster.authority.key()).unwrap();
    let forged = params.signed_by(&key, &issuer).unwrap().der().to_vec();
    let rogue = Authority::new(forged, key).unwrap();
    let csr = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
    let id = SpiffeId::new(cluster.domain.clone(), Role::Node, DEVICE).unwrap();
    let made = rogue
        .issue_from_csr(&csr, &id, 1000, &HostNames::default(), NOW, &mut rng)
        .unwrap();
    let chain = [made.der, rogue.der().to_vec(), ours.to_vec()].map(CertificateDer::from);
    assert!(check(&chain, &cluster, NOW).is_err());
    assert!(check(&[ours], &cluster, NOW).is_err(), "an authority is no leaf");
}

/// A leaf that this crate would not issue, over the authority's own key.
fn crafted(
    cluster: &Cluster,
    uris: &[&str],
    usages: &[rcgen::ExtendedKeyUsagePurpose],
) -> Vec<CertificateDer<'static>> {
    let mut params = rcgen::CertificateParams::default();
    params.extended_key_usages = usages.to_vec();
    let uri = |uri: &&str| {
        let text = format!("spiffe://{}/{uri}", cluster.domain);
        rcgen::SanType::URI(text.try_into().unwrap())
    };
    params.subject_alt_names = uris.iter().map(uri).collect();
    let ours = CertificateDer::from(cluster.authority.der().to_vec());
    let issuer = rcgen::Issuer::from_ca_cert_der(&ours, cluster.authority.key()).unwrap();
    let key = KeyPair::generate(&mut Seeded::new(78)).unwrap();
    let leaf = params.signed_by(&key, &issuer).unwrap();
    vec![leaf.der().clone(), ours]
}

#[test]
fn one_name_and_the_right_usage_or_nobody() {
    use rcgen::ExtendedKeyUsagePurpose::{Any, ClientAuth, ServerAuth};
    let cluster = cluster(1);
    let node = node();
    let at = |uris: &[&str], usages: &[_]| check(&crafted(&cluster, uris, usages), &cluster, NOW);
    assert!(at(&[&node], &[ClientAuth]).is_ok());
    for usages in [&[][..], &[ServerAuth], &[Any]] {
        assert_eq!(at(&[&node], usages), Err(ChainError::WrongUsage), "{usages:?}");
    }
    let names = |error| Err(ChainError::Identity(error));
    let two = [node.as_str(), "operator/ann"];
    assert_eq!(at(&two, &[ClientAuth]), names(IdentityError::ManyUriSans(2)));
    assert_eq!(
        at(&[&node, &node], &[ClientAuth]),
        names(IdentityError::ManyUriSans(2))
    );
    assert_eq!(at(&[], &[ClientAuth]), names(IdentityError::NoUriSan));
    assert!(matches!(
        at(&["root/1"], &[ClientAuth]),
        Err(ChainError::Identity(_))
    ));
    let server = crafted(&cluster, &["replica/1"], &[ClientAuth]);
    let served = verify_chain(&server, &cluster.bundle, Usage::Server, &[Role::Replica], NOW);
    assert_eq!(served, Err(ChainError::WrongUsage));
}

#[test]
fn an_issuer_that_is_over_takes_its_leaves_with_it() {
    let cluster = cluster(1);
    let mut rng = Seeded::new(79);
    let csr = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
    let id = SpiffeId::new(cluster.domain.clone(), Role::Node, DEVICE).unwrap();
    let end = cluster.authority.not_after_ms();
    let names = HostNames::default();
    let late = cluster
        .authority
        .issue_from_csr(&csr, &id, NODE_VALIDITY_MS, &names, end - 1000, &mut rng)
        .unwrap();
    let chain = [late.der, cluster.authority.der().to_vec()].map(CertificateDer::from);
    assert!(check(&chain, &cluster, end - 1000).is_ok());
    let refused = check(&chain, &cluster, end + 1000).unwrap_err();
    assert!(matches!(refused, ChainError::Expired { .. }), "{refused}");
}

#[test]
fn a_name_of_another_trust_domain_is_refused() {
    let mut rng = Seeded::new(6);
    let cluster = cluster(1);
    let chain = leaf(&cluster, &node());
    let other = TrustDomain::new("other.internal").unwrap();
    let roots = vec![cluster.root.der().to_vec()];
    let bundle = TrustBundle::new(CLUSTER, other, roots).unwrap();
    let refused = verify_chain(&chain, &bundle, Usage::Client, &[Role::Node], NOW).unwrap_err();
    assert!(matches!(refused, ChainError::WrongDomain { .. }), "{refused}");
    let csr = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
    let authority = cluster.root.sign_authority(&csr, 2, NOW, &mut rng).unwrap();
    assert_eq!(authority.not_after_ms, NOW + AUTHORITY_VALIDITY_MS);
}

#[test]
fn a_pin_finds_its_root_and_nothing_else() {
    let (ours, theirs) = (cluster(1), cluster(2));
    let mut rng = Seeded::new(7);
    let csr = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
    let id = SpiffeId::replica(ours.domain.clone(), 1).unwrap();
    let names = HostNames::from_hosts(["127.0.0.1"]);
    let issued = ours
        .root
        .issue_from_csr(&csr, &id, NODE_VALIDITY_MS, &names, NOW, &mut rng)
        .unwrap();
    let root = CertificateDer::from(ours.root.der().to_vec());
    let chain = [CertificateDer::from(issued.der), root.clone()];
    let (peer, found) = verify_pinned(&chain, &ours.root.pin(), CLUSTER, NOW).unwrap();
    assert_eq!((peer.id, found), (id, root));
    assert_eq!(
        verify_pinned(&chain, &theirs.root.pin(), CLUSTER, NOW),
        Err(ChainError::PinMismatch)
    );
    assert_eq!(
        verify_pinned(&chain[..1], &ours.root.pin(), CLUSTER, NOW),
        Err(ChainError::PinMismatch)
    );
    // A stranger's leaf with our root appended to it.
    let mut stranger = leaf(&theirs, "replica/1");
    stranger[2] = chain[1].clone();
    assert!(verify_pinned(&stranger, &ours.root.pin(), CLUSTER, NOW).is_err());
    let node = leaf(&ours, &node());
    assert!(
        verify_pinned(&node, &ours.root.pin(), CLUSTER, NOW).is_err(),
        "a node is no server"
    );
}

#[test]
fn bundles_are_checked_and_named_by_their_content() {
    let (ours, theirs) = (cluster(1), cluster(2));
    let roots = vec![ours.root.der().to_vec(), theirs.root.der().to_vec()];
    let both = TrustBundle::new(CLUSTER, ours.domain.clone(), roots).unwrap();
    assert_ne!(both.digest(), ours.bundle.digest());
    assert!(verify_chain(&leaf(&theirs, &node()), &both, Usage::Client, &[Role::Node], NOW).is_ok());
    let none = TrustBundle::new(CLUSTER, ours.domain.clone(), vec![]);
    assert!(matches!(none, Err(ChainError::Bundle(_))));
    let many = vec![ours.root.der().to_vec(); MAX_ROOTS + 1];
    assert!(matches!(
        TrustBundle::new(CLUSTER, ours.domain.clone(), many),
        Err(ChainError::Bundle(_))
    ));
    let no_authority = vec![leaf(&ours, &node())[0].to_vec()];
    let refused = TrustBundle::new(CLUSTER, ours.domain.clone(), no_authority);
    assert!(matches!(refused, Err(ChainError::Bundle(_))));
}
