//! Is this certificate one of ours: chain, time, usage, role.
//!
//! What never lives here: revocation, which is a question to the replicated registry (by fingerprint), and
//! the clock.
//!
//! Invariants: an identity leaves this file only after its chain ends in a root of the bundle, is valid at
//! the given time, has the right usage, is of the bundle's trust domain and of a role that the caller allows.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, RootCertStore};
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::codec::{Fields, sha256};
use crate::identity::{IdentityError, MAX_CERTIFICATE, parse_certificate};
use crate::{PeerIdentity, Role, TrustDomain};

/// The most certificates in a presented chain: leaf, authority, root, and one to spare.
pub const MAX_CHAIN: usize = 4;
/// The most roots in a bundle: the present one and, during a rotation, its successor, with room to spare.
pub const MAX_ROOTS: usize = 8;

/// Why a chain is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// No certificate, or more than [`MAX_CHAIN`].
    #[error("the peer presented {0} certificates; 1 to {MAX_CHAIN} are allowed")]
    Length(usize),
    /// The leaf says nothing usable about its holder.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Signed by nobody in the bundle, or by another key under a name in it: a certificate of another
    /// cluster.
    #[error("the certificate was not issued by cluster {cluster_id}")]
    UnknownIssuer {
        /// The cluster that this side belongs to.
        cluster_id: String,
    },
    /// Over.
    #[error("the certificate ended at {not_after_ms} ms and it is now {now_ms} ms")]
    Expired {
        /// The end of validity of the leaf, or of the issuer that ended first.
        not_after_ms: u64,
        /// The caller's clock.
        now_ms: u64,
    },
    /// Not begun: a clock is wrong.
    #[error(
        "the certificate begins at {not_before_ms} ms, and it is now {now_ms} ms: check both machines' clocks"
    )]
    NotYetValid {
        /// The begin of validity of the leaf, or of the issuer that hasn't begun.
        not_before_ms: u64,
        /// The caller's clock.
        now_ms: u64,
    },
    /// Not issued for this side of a connection.
    #[error("the certificate is not for this use")]
    WrongUsage,
    /// Not a role that is welcome here.
    #[error("{found} certificates are not accepted here; expected {expected}")]
    WrongRole {
        /// The role in the certificate.
        found: Role,
        /// The roles that are welcome, joined by " or ".
        expected: String,
    },
    /// The right issuer, but a name of another trust domain.
    #[error("the certificate is of trust domain {found}, not {expected}")]
    WrongDomain {
        /// The trust domain in the certificate.
        found: String,
        /// The bundle's trust domain.
        expected: String,
    },
    /// The right role, but somebody else.
    #[error("the peer is {found}, not {expected}")]
    WrongIdentity {
        /// Who the certificate names.
        found: String,
        /// Who was wanted.
        expected: String,
    },
    /// No presented certificate has the pinned key.
    #[error("no certificate of the server has the pinned root key: another cluster, or somebody in between")]
    PinMismatch,
    /// A root in a bundle is no certificate authority, or there are none or too many.
    #[error("the trust bundle is unusable: {0}")]
    Bundle(String),
    /// Anything else that the verifier says.
    #[error("the certificate is refused: {0}")]
    Other(String),
}

/// Which side of a connection the certificate's holder is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// The holder connects.
    Client,
    /// The holder listens.
    Server,
}

/// What a member of a cluster trusts: the cluster's roots, under its id and trust domain. Cheap to clone.
#[derive(Debug, Clone)]
pub struct TrustBundle {
    cluster_id: String,
    domain: TrustDomain,
    roots: Vec<CertificateDer<'static>>,
    store: Arc<RootCertStore>,
}

impl TrustBundle {
    /// Makes a bundle of 1 to [`MAX_ROOTS`] root certificates (DER); refuses what is no certificate
    /// authority.
    pub fn new(cluster_id: &str, domain: TrustDomain, roots: Vec<Vec<u8>>) -> Result<Self, ChainError> {
        if roots.is_empty() || roots.len() > MAX_ROOTS {
            return Err(ChainError::Bundle(format!(
                "{} roots; 1 to {MAX_ROOTS} are allowed",
                roots.len()
            )));
        }
        let mut store = RootCertStore::empty();
        let mut certificates = Vec::with_capacity(roots.len());
        for der in roots {
            if !parse_certificate(&der)?.is_ca() {
                return Err(ChainError::Bundle(
                    "a certificate in it is no authority".to_owned(),
                ));
            }
            let certificate = CertificateDer::from(der);
            store
                .add(certificate.clone())
                .map_err(|error| ChainError::Bundle(error.to_string()))?;
            certificates.push(certificate);
        }
        Ok(Self {
            cluster_id: cluster_id.to_owned(),
            domain,
            roots: certificates,
            store: Arc::new(store),
        })
    }

    /// The cluster that is trusted.
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// The trust domain that all identities must be of.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// The root certificates, in the order they were given.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// SHA-256 over the fields label, cluster id, trust domain and each root's DER, in order: what the
    /// server's proof of a pairing vouches for.
    pub fn digest(&self) -> [u8; 32] {
        let mut fields = Fields::default();
        fields.push(b"palyra trust bundle v1");
        fields.push(self.cluster_id.as_bytes());
        fields.push(self.domain.as_str().as_bytes());
        for root in &self.roots {
            fields.push(root);
        }
        sha256(fields.as_bytes())
    }

    pub(crate) fn store(&self) -> &Arc<RootCertStore> {
        &self.store
    }
}

/// Verifies a presented chain (leaf first) at `now_ms` for a use and a set of welcome roles, and says who it
/// is.
pub fn verify_chain(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    usage: Usage,
    roles: &[Role],
    now_ms: u64,
) -> Result<PeerIdentity, ChainError> {
    let peer = verify_signatures(chain, bundle.store(), &bundle.cluster_id, usage, now_ms)?;
    if peer.id.trust_domain() != &bundle.domain {
        return Err(ChainError::WrongDomain {
            found: peer.id.trust_domain().to_string(),
            expected: bundle.domain.to_string(),
        });
    }
    check_role(peer, roles)
}

/// Verifies a presented chain whose root is known only by the SHA-256 of its public key info. The root must
/// be in the chain. Answers who the server is and the root certificate, which can be trusted from here on.
pub fn verify_pinned(
    chain: &[CertificateDer<'_>],
    pin: &[u8; 32],
    cluster_id: &str,
    now_ms: u64,
) -> Result<(PeerIdentity, CertificateDer<'static>), ChainError> {
    check_length(chain)?;
    let mut root = None;
    for certificate in chain.iter().skip(1) {
        let parsed = parse_certificate(certificate)?;
        // The key alone isn't enough: what is returned as the root must be signed by that key as a whole.
        if sha256(parsed.public_key().raw) == *pin && parsed.is_ca() && parsed.verify_signature(None).is_ok()
        {
            root = Some(certificate.clone().into_owned());
        }
    }
    let root = root.ok_or(ChainError::PinMismatch)?;
    let mut store = RootCertStore::empty();
    store
        .add(root.clone())
        .map_err(|error| ChainError::Bundle(error.to_string()))?;
    let peer = verify_signatures(chain, &Arc::new(store), cluster_id, Usage::Server, now_ms)?;
    Ok((check_role(peer, &[Role::Replica])?, root))
}

fn check_role(peer: PeerIdentity, roles: &[Role]) -> Result<PeerIdentity, ChainError> {
    if roles.contains(&peer.id.role()) {
        return Ok(peer);
    }
    let expected: Vec<&str> = roles.iter().map(|role| role.as_str()).collect();
    Err(ChainError::WrongRole {
        found: peer.id.role(),
        expected: expected.join(" or "),
    })
}

fn check_length(chain: &[CertificateDer<'_>]) -> Result<(), ChainError> {
    if chain.is_empty() || chain.len() > MAX_CHAIN {
        return Err(ChainError::Length(chain.len()));
    }
    match chain
        .iter()
        .find(|certificate| certificate.len() > MAX_CERTIFICATE)
    {
        Some(large) => Err(IdentityError::TooLarge(large.len()).into()),
        None => Ok(()),
    }
}

fn verify_signatures(
    chain: &[CertificateDer<'_>],
    store: &Arc<RootCertStore>,
    cluster_id: &str,
    usage: Usage,
    now_ms: u64,
) -> Result<PeerIdentity, ChainError> {
    check_length(chain)?;
    let (leaf, intermediates) = (&chain[0], &chain[1..]);
    let now = UnixTime::since_unix_epoch(Duration::from_millis(now_ms));
    let provider = crate::tls::provider();
    let verdict = match usage {
        Usage::Client => verify_client(leaf, intermediates, store, provider, now),
        Usage::Server => ParsedCertificate::try_from(leaf).and_then(|parsed| {
            let algorithms = provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&parsed, store, intermediates, now, algorithms)
        }),
    };
    verdict.map_err(|error| explain(&error, leaf, cluster_id, now_ms))?;
    Ok(PeerIdentity::from_der(leaf)?)
}

fn verify_client(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    store: &Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    now: UnixTime,
) -> Result<(), rustls::Error> {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(store), provider)
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    verifier.verify_client_cert(leaf, intermediates, now).map(|_| ())
}

fn explain(error: &rustls::Error, leaf: &CertificateDer<'_>, cluster_id: &str, now_ms: u64) -> ChainError {
    let validity = PeerIdentity::from_der(leaf).map(|peer| (peer.not_before_ms, peer.not_after_ms));
    let (not_before_ms, not_after_ms) = validity.unwrap_or((0, 0));
    match error {
        rustls::Error::InvalidCertificate(reason) => match reason {
            CertificateError::Expired => ChainError::Expired { not_after_ms, now_ms },
            CertificateError::ExpiredContext { not_after, .. } => ChainError::Expired {
                not_after_ms: not_after.as_secs().saturating_mul(1000),
                now_ms,
            },
            CertificateError::NotValidYet => ChainError::NotYetValid {
                not_before_ms,
                now_ms,
            },
            CertificateError::NotValidYetContext { not_before, .. } => ChainError::NotYetValid {
                not_before_ms: not_before.as_secs().saturating_mul(1000),
                now_ms,
            },
            CertificateError::UnknownIssuer | CertificateError::BadSignature => ChainError::UnknownIssuer {
                cluster_id: cluster_id.to_owned(),
            },
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                ChainError::WrongUsage
            }
            CertificateError::BadEncoding => IdentityError::Malformed.into(),
            other => ChainError::Other(other.to_string()),
        },
        other => ChainError::Other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
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
        let long = [chain.clone(), chain.clone()].concat();
        assert_eq!(check(&long, &cluster, NOW).unwrap_err(), ChainError::Length(6));
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
}
