//! A credential as text: what an operator's context and a node's data folder hold.
//!
//! What never lives here: files and their permissions; whoever writes one makes it readable by its owner
//! only.
//!
//! Invariants: a credential that was read is usable: the key belongs to the first certificate, its name is of
//! the trust domain, the endpoints are well formed, the roots are authorities.

use std::fmt;
use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::chain::MAX_CHAIN;
use crate::ticket::{MAX_ENDPOINTS, TicketError, check_endpoints};
use crate::tls::{SharedIdentity, SharedTrust};
use crate::{ChainError, IdentityError, KeyPair, PeerIdentity, TrustBundle, TrustDomain};

/// The largest text of a credential, in bytes.
pub const MAX_TEXT: usize = 128 * 1024;
const FORM: u32 = 1;
const CERTIFICATE: &str = "CERTIFICATE";

/// Why a text is no credential.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialError {
    /// Larger than [`MAX_TEXT`].
    #[error("a credential of {0} bytes; at most {MAX_TEXT} are allowed")]
    TooLarge(usize),
    /// Not the JSON of a credential.
    #[error("not a credential: {0}")]
    Json(String),
    /// Made by a newer release.
    #[error("the credential is of form {0}, which this release does not know; update this program")]
    Form(u32),
    /// The PEM of certificates or key is wrong.
    #[error("the {0} of the credential is not valid PEM")]
    Pem(&'static str),
    /// The key is refused, or belongs to another certificate.
    #[error("the private key does not belong to the credential's certificate")]
    Key,
    /// The certificates or roots are refused.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The endpoints are refused.
    #[error(transparent)]
    Endpoints(#[from] TicketError),
}

impl From<IdentityError> for CredentialError {
    fn from(error: IdentityError) -> Self {
        Self::Chain(error.into())
    }
}

/// Who somebody is and what cluster it belongs to.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credential {
    form: u32,
    /// The cluster's id.
    pub cluster_id: String,
    /// The cluster's trust domain.
    pub trust_domain: String,
    /// Where replicas listen, `host:port`, 1 to 9.
    pub endpoints: Vec<String>,
    /// The certificates, PEM, leaf first.
    pub certificates: String,
    /// The private key, PEM, PKCS#8.
    pub key: String,
    /// The cluster's roots, PEM.
    pub roots: String,
    /// The generation of the cluster's trust bundle that `roots` is; 0 when it is not known.
    #[serde(default)]
    pub trust_generation: u64,
}

impl Credential {
    /// Puts a credential together and checks it as a whole. `chain` is DER, leaf first. Of more endpoints than
    /// it holds the first are kept: a cluster may have more replicas than anybody needs to know at first.
    pub fn new(
        trust: &TrustBundle,
        mut endpoints: Vec<String>,
        chain: &[Vec<u8>],
        key: &KeyPair,
    ) -> Result<Self, CredentialError> {
        endpoints.truncate(MAX_ENDPOINTS);
        let roots: Vec<&[u8]> = trust.roots().iter().map(|root| root.as_ref()).collect();
        let credential = Self {
            form: FORM,
            cluster_id: trust.cluster_id().to_owned(),
            trust_domain: trust.trust_domain().to_string(),
            endpoints,
            certificates: certificates_to_pem(chain),
            key: key.to_pem().to_string(),
            roots: certificates_to_pem(&roots),
            trust_generation: 0,
        };
        credential.check()?;
        Ok(credential)
    }

    /// The same credential with another trust bundle, which must be of the same cluster.
    pub fn with_trust(&self, trust: &TrustBundle, generation: u64) -> Result<Self, CredentialError> {
        let mut next = self.clone();
        let roots: Vec<&[u8]> = trust.roots().iter().map(|root| root.as_ref()).collect();
        next.roots = certificates_to_pem(&roots);
        next.trust_generation = generation;
        next.check()?;
        Ok(next)
    }

    /// The text form: JSON. Holds the private key in the clear.
    pub fn to_json(&self) -> Result<Zeroizing<String>, CredentialError> {
        let text =
            serde_json::to_string_pretty(self).map_err(|error| CredentialError::Json(error.to_string()))?;
        Ok(Zeroizing::new(text + "\n"))
    }

    /// Reads the text form and checks it as a whole; a field that isn't known is refused.
    pub fn from_json(text: &str) -> Result<Self, CredentialError> {
        if text.len() > MAX_TEXT {
            return Err(CredentialError::TooLarge(text.len()));
        }
        let form = serde_json::from_str::<FormOnly>(text)
            .map_err(|error| CredentialError::Json(error.to_string()))?;
        if form.form != FORM {
            return Err(CredentialError::Form(form.form));
        }
        let credential: Self =
            serde_json::from_str(text).map_err(|error| CredentialError::Json(error.to_string()))?;
        credential.check()?;
        Ok(credential)
    }

    /// The certificates, DER, leaf first.
    pub fn chain(&self) -> Result<Vec<Vec<u8>>, CredentialError> {
        certificates_from_pem(&self.certificates, "certificates")
    }

    /// The private key.
    pub fn key_pair(&self) -> Result<KeyPair, CredentialError> {
        KeyPair::from_pem(&self.key).map_err(|_| CredentialError::Key)
    }

    /// Who the credential is for.
    pub fn identity(&self) -> Result<PeerIdentity, CredentialError> {
        let chain = self.chain()?;
        Ok(PeerIdentity::from_der(
            chain.first().ok_or(CredentialError::Pem("certificates"))?,
        )?)
    }

    /// What the holder trusts.
    pub fn trust(&self) -> Result<TrustBundle, CredentialError> {
        let roots = certificates_from_pem(&self.roots, "roots")?;
        Ok(TrustBundle::new(
            &self.cluster_id,
            TrustDomain::new(&self.trust_domain)?,
            roots,
        )?)
    }

    /// Identity and trust in the shape that [`crate::tls`] asks for.
    pub fn for_tls(&self) -> Result<(Arc<SharedIdentity>, Arc<SharedTrust>), CredentialError> {
        Ok((
            SharedIdentity::new(self.chain()?, &self.key_pair()?)?,
            SharedTrust::new(self.trust()?),
        ))
    }

    fn check(&self) -> Result<(), CredentialError> {
        check_endpoints(&self.endpoints)?;
        let trust = self.trust()?;
        let peer = self.identity()?;
        if peer.id.trust_domain() != trust.trust_domain() {
            let (found, expected) = (peer.id.trust_domain().to_string(), self.trust_domain.clone());
            return Err(ChainError::WrongDomain { found, expected }.into());
        }
        if self.key_pair()?.spki_sha256() != peer.spki_sha256 {
            return Err(CredentialError::Key);
        }
        Ok(())
    }
}

impl Drop for Credential {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Credential(cluster {}, {} endpoints)",
            self.cluster_id,
            self.endpoints.len()
        )
    }
}

#[derive(Deserialize)]
struct FormOnly {
    form: u32,
}

/// Certificates as PEM blocks, in order.
pub fn certificates_to_pem<C: AsRef<[u8]>>(certificates: &[C]) -> String {
    certificates
        .iter()
        .map(|der| pem::encode(&pem::Pem::new(CERTIFICATE, der.as_ref())))
        .collect()
}

/// Reads PEM blocks `CERTIFICATE`; other blocks, none, or more than 8 are refused under the name `what`.
pub fn certificates_from_pem(text: &str, what: &'static str) -> Result<Vec<Vec<u8>>, CredentialError> {
    let blocks = pem::parse_many(text).map_err(|_| CredentialError::Pem(what))?;
    let plausible = !blocks.is_empty() && blocks.len() <= 2 * MAX_CHAIN;
    if !plausible || blocks.iter().any(|block| block.tag() != CERTIFICATE) {
        return Err(CredentialError::Pem(what));
    }
    Ok(blocks.into_iter().map(|block| block.into_contents()).collect())
}

/// Certificates in the shape that `rustls` asks for.
pub fn to_rustls(chain: &[Vec<u8>]) -> Vec<CertificateDer<'static>> {
    chain
        .iter()
        .map(|der| CertificateDer::from(der.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::HostNames;
    use crate::testing::{NOW, Seeded, cluster};
    use crate::{Role, SpiffeId};

    fn credential() -> Credential {
        let mut rng = Seeded::new(3);
        let cluster = cluster(1);
        let key = KeyPair::generate(&mut rng).unwrap();
        let id = SpiffeId::new(cluster.domain.clone(), Role::Operator, "ann").unwrap();
        let csr = key.make_csr().unwrap();
        let names = HostNames::default();
        let issued = cluster
            .authority
            .issue_from_csr(&csr, &id, 1000, &names, NOW, &mut rng)
            .unwrap();
        let chain = [issued.der, cluster.authority.der().to_vec()];
        Credential::new(&cluster.bundle, vec!["127.0.0.1:7441".to_owned()], &chain, &key).unwrap()
    }

    #[test]
    fn credentials_are_read_back() {
        let made = credential();
        let text = made.to_json().unwrap();
        let read = Credential::from_json(&text).unwrap();
        assert_eq!(read, made);
        assert_eq!(read.identity().unwrap().id.id(), "ann");
        assert_eq!(read.chain().unwrap().len(), 2);
        assert!(read.for_tls().is_ok());
        assert!(!format!("{read:?}").contains("PRIVATE"));
    }

    #[test]
    fn a_large_cluster_fits() {
        let made = credential();
        let all: Vec<String> = (1..=32).map(|replica| format!("r{replica}:7441")).collect();
        let (trust, key) = (made.trust().unwrap(), made.key_pair().unwrap());
        let large = Credential::new(&trust, all.clone(), &made.chain().unwrap(), &key).unwrap();
        assert_eq!(large.endpoints, all[..MAX_ENDPOINTS]);
        assert!(Credential::from_json(&large.to_json().unwrap()).is_ok());
    }

    #[test]
    fn what_is_not_usable_is_refused() {
        let text = credential().to_json().unwrap();
        let changed = |from: &str, to: &str| Credential::from_json(&text.replacen(from, to, 1)).unwrap_err();
        assert_eq!(changed("\"form\": 1", "\"form\": 2"), CredentialError::Form(2));
        assert!(matches!(
            changed("\"form\": 1", "\"form\": 1, \"x\": 2"),
            CredentialError::Json(_)
        ));
        assert!(matches!(
            changed("127.0.0.1:7441", "127.0.0.1"),
            CredentialError::Endpoints(_)
        ));
        assert!(matches!(
            changed("\"palyra.", "\"q."),
            CredentialError::Chain(ChainError::WrongDomain { .. })
        ));
        assert_eq!(changed("BEGIN PRIVATE", "BEGIN PUBLIC"), CredentialError::Key);
        assert_eq!(
            changed("BEGIN CERTIFICATE", "BEGIN CERT"),
            CredentialError::Pem("certificates")
        );
        let mut other_key = credential();
        other_key.key = KeyPair::generate(&mut Seeded::new(4))
            .unwrap()
            .to_pem()
            .to_string();
        let refused = Credential::from_json(&other_key.to_json().unwrap()).unwrap_err();
        assert_eq!(refused, CredentialError::Key);
        assert!(matches!(
            Credential::from_json("{"),
            Err(CredentialError::Json(_))
        ));
        let large = " ".repeat(MAX_TEXT + 1);
        assert_eq!(
            Credential::from_json(&large).unwrap_err(),
            CredentialError::TooLarge(MAX_TEXT + 1)
        );
        for cut in (0..text.len() - 2).step_by(97) {
            assert!(Credential::from_json(&text[..cut]).is_err(), "cut at {cut}");
        }
    }
}
