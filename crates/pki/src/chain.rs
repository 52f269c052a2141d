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

/// The most certificates in a presented chain: leaf, and during a rotation of the root the authority under either root
/// and both roots; with one to spare.
pub const MAX_CHAIN: usize = 6;
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
    #[error(
        "no certificate of the server has the pinned root key: another cluster, somebody in between, or the root was \
         rotated since"
    )]
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
    authorities: Arc<Vec<CertificateDer<'static>>>,
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
            authorities: Arc::default(),
        })
    }

    /// The same bundle, with authorities (DER) that chains may leave out: after a rotation of the root the chains that
    /// were handed out before it end in the old one, while the authorities in them have a certificate under the new.
    /// They are worth nothing by themselves: a chain still has to end in a root.
    #[must_use]
    pub fn with_authorities(mut self, authorities: Vec<Vec<u8>>) -> Self {
        self.authorities = Arc::new(authorities.into_iter().map(CertificateDer::from).collect());
        self
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
    let known = &bundle.authorities;
    let peer = verify_signatures(chain, known, bundle.store(), &bundle.cluster_id, usage, now_ms)?;
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
    let peer = verify_signatures(chain, &[], &Arc::new(store), cluster_id, Usage::Server, now_ms)?;
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
    known: &[CertificateDer<'_>],
    store: &Arc<RootCertStore>,
    cluster_id: &str,
    usage: Usage,
    now_ms: u64,
) -> Result<PeerIdentity, ChainError> {
    check_length(chain)?;
    let leaf = &chain[0];
    let intermediates: Vec<CertificateDer<'_>> = chain[1..].iter().chain(known).cloned().collect();
    let intermediates = intermediates.as_slice();
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
    check_usage(leaf, usage)?;
    Ok(PeerIdentity::from_der(leaf)?)
}

/// The verifier lets a leaf that names no usage pass for any; this doesn't.
fn check_usage(leaf: &CertificateDer<'_>, usage: Usage) -> Result<(), ChainError> {
    let certificate = parse_certificate(leaf)?;
    let named = certificate.extended_key_usage();
    let named = named.map_err(|_| IdentityError::Malformed)?;
    let fits = named.is_some_and(|named| match usage {
        Usage::Client => named.value.client_auth,
        Usage::Server => named.value.server_auth,
    });
    if fits { Ok(()) } else { Err(ChainError::WrongUsage) }
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
mod tests;
