//! Names inside certificates: trust domain, role, SPIFFE id, and what a certificate says about its holder.
//!
//! Invariants: parsing accepts exactly the forms that formatting makes (`parse(format(x)) == x`, and no
//! second spelling of the same identity exists); a certificate has exactly one URI name or it names nobody.

use std::fmt;
use std::str::FromStr;

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::codec::{Fingerprint, sha256};

/// The largest certificate that is looked at, in bytes of DER.
pub const MAX_CERTIFICATE: usize = 8 * 1024;
/// The longest trust domain, in characters.
pub const MAX_TRUST_DOMAIN: usize = 255;
/// The longest name of an operator or egress proxy, in characters.
pub const MAX_NAME: usize = 64;

/// Why a name or a certificate names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// Not a trust domain.
    #[error("{0:?} is no trust domain: 1 to 255 of a-z, 0-9, '.', '-', '_' are allowed")]
    TrustDomain(String),
    /// Not `spiffe://<trust domain>/<role>/<id>`.
    #[error(
        "{0:?} is no identity: expected spiffe://<trust domain>/<node|worker|replica|operator|egress>/<id>"
    )]
    Form(String),
    /// The role is none of the five.
    #[error("{0:?} is no role: expected node, worker, replica, operator or egress")]
    Role(String),
    /// The id doesn't fit its role.
    #[error("{id:?} is no {role} id: expected {expected}")]
    Id {
        /// The role whose id this should be.
        role: Role,
        /// The id as it came in.
        id: String,
        /// What would have been right.
        expected: &'static str,
    },
    /// The certificate is larger than [`MAX_CERTIFICATE`].
    #[error("the certificate has {0} bytes, more than the {MAX_CERTIFICATE} allowed")]
    TooLarge(usize),
    /// The bytes are no X.509 certificate, or something follows it.
    #[error("not an X.509 certificate in DER form")]
    Malformed,
    /// No URI name.
    #[error("the certificate has no URI name, so it says nothing about who holds it")]
    NoUriSan,
    /// More than one URI name.
    #[error("the certificate has {0} URI names; exactly one is allowed")]
    ManyUriSans(usize),
}

/// What the holder of a certificate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// A member of the fleet.
    Node,
    /// An attested executor on a node.
    Worker,
    /// A `palyrad` process.
    Replica,
    /// A human or token behind CLI, API or console.
    Operator,
    /// An egress proxy.
    Egress,
}

impl Role {
    /// The role as it is spelt in identities.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Worker => "worker",
            Self::Replica => "replica",
            Self::Operator => "operator",
            Self::Egress => "egress",
        }
    }

    fn check_id(self, id: &str) -> Result<(), IdentityError> {
        let (fits, expected) = match self {
            Self::Node | Self::Worker => (
                is_ulid(id),
                "a ULID: 26 characters of 0-9 and A-Z without I, L, O, U",
            ),
            Self::Replica => (is_replica_id(id), "a number from 1 on, without leading zeros"),
            Self::Operator | Self::Egress => (
                is_name(id),
                "1 to 64 of a-z, 0-9, '.', '-', '_', a letter or digit first",
            ),
        };
        if fits {
            Ok(())
        } else {
            Err(IdentityError::Id {
                role: self,
                id: id.to_owned(),
                expected,
            })
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        match text {
            "node" => Ok(Self::Node),
            "worker" => Ok(Self::Worker),
            "replica" => Ok(Self::Replica),
            "operator" => Ok(Self::Operator),
            "egress" => Ok(Self::Egress),
            other => Err(IdentityError::Role(other.to_owned())),
        }
    }
}

/// Whether `text` is a ULID in its one canonical spelling: upper case, 26 characters, no overflow.
pub fn is_ulid(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() == 26
        && bytes[0] <= b'7'
        && bytes
            .iter()
            .all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'Z') && !matches!(b, b'I' | b'L' | b'O' | b'U'))
}

fn is_replica_id(text: &str) -> bool {
    !text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit()) && text.parse::<u64>().is_ok()
}

/// Whether `text` can name an operator or an egress proxy.
pub fn is_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    text.len() <= MAX_NAME
        && text.bytes().next().is_some_and(plain)
        && text.bytes().all(|b| plain(b) || matches!(b, b'.' | b'-' | b'_'))
}

/// The part of an identity that says which cluster it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(String);

impl TrustDomain {
    /// Accepts 1 to 255 of `a-z 0-9 . - _`, or says [`IdentityError::TrustDomain`].
    pub fn new(text: &str) -> Result<Self, IdentityError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > MAX_TRUST_DOMAIN || !text.bytes().all(allowed) {
            return Err(IdentityError::TrustDomain(
                text.chars().take(MAX_TRUST_DOMAIN).collect(),
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// The default of a cluster: `palyra.<first 8 of its id, lower case>.internal`. Refuses an id that is no
    /// ULID.
    pub fn for_cluster(cluster_id: &str) -> Result<Self, IdentityError> {
        if !is_ulid(cluster_id) {
            return Err(IdentityError::TrustDomain(
                cluster_id.chars().take(MAX_TRUST_DOMAIN).collect(),
            ));
        }
        Self::new(&format!(
            "palyra.{}.internal",
            cluster_id[..8].to_ascii_lowercase()
        ))
    }

    /// The text form.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `spiffe://<trust domain>/<role>/<id>`: who somebody is, to the whole cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    domain: TrustDomain,
    role: Role,
    id: String,
}

impl SpiffeId {
    /// Joins the parts. The id must fit the role: a ULID for nodes and workers, a number for replicas, a name
    /// for operators and egress proxies; anything else is [`IdentityError::Id`].
    pub fn new(domain: TrustDomain, role: Role, id: &str) -> Result<Self, IdentityError> {
        role.check_id(id)?;
        Ok(Self {
            domain,
            role,
            id: id.to_owned(),
        })
    }

    /// The identity of a replica; refuses 0, which is no replica id.
    pub fn replica(domain: TrustDomain, id: u64) -> Result<Self, IdentityError> {
        Self::new(domain, Role::Replica, &id.to_string())
    }

    /// Reads the text form; see [`IdentityError`] for what is refused.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Form(text.chars().take(400).collect());
        let mut parts = text.strip_prefix("spiffe://").ok_or_else(form)?.split('/');
        let (Some(domain), Some(role), Some(id), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(form());
        };
        Self::new(TrustDomain::new(domain)?, role.parse()?, id)
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// The role.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The id within the role: a ULID, a number or a name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The replica id, or nothing when this is no replica.
    pub fn replica_id(&self) -> Option<u64> {
        if self.role == Role::Replica {
            self.id.parse().ok()
        } else {
            None
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}/{}", self.domain, self.role, self.id)
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        Self::parse(text)
    }
}

/// What a certificate says about its holder. Says nothing about whether the certificate can be trusted:
/// [`crate::chain`] does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The one URI name.
    pub id: SpiffeId,
    /// SHA-256 of the certificate's DER.
    pub fingerprint: Fingerprint,
    /// The serial number, lower-case hexadecimal.
    pub serial: String,
    /// First millisecond of validity.
    pub not_before_ms: u64,
    /// Last millisecond of validity, to the second.
    pub not_after_ms: u64,
    /// SHA-256 of the subject public key info: names the key, across renewals with the same key.
    pub spki_sha256: [u8; 32],
}

impl PeerIdentity {
    /// Reads a certificate in DER form. Refuses what has no or several URI names, trailing bytes, or more
    /// than [`MAX_CERTIFICATE`] bytes.
    pub fn from_der(der: &[u8]) -> Result<Self, IdentityError> {
        let certificate = parse_certificate(der)?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|_| IdentityError::Malformed)?
            .map(|extension| extension.value.general_names.clone())
            .unwrap_or_default();
        let uris: Vec<&str> = names
            .iter()
            .filter_map(|name| {
                if let GeneralName::URI(uri) = name {
                    Some(*uri)
                } else {
                    None
                }
            })
            .collect();
        let id = match uris.as_slice() {
            [] => return Err(IdentityError::NoUriSan),
            [one] => SpiffeId::parse(one)?,
            many => return Err(IdentityError::ManyUriSans(many.len())),
        };
        Ok(Self {
            id,
            fingerprint: sha256(der),
            serial: hex::encode(certificate.tbs_certificate.raw_serial()),
            not_before_ms: to_ms(certificate.validity().not_before.timestamp()),
            not_after_ms: to_ms(certificate.validity().not_after.timestamp()),
            spki_sha256: sha256(certificate.public_key().raw),
        })
    }
}

/// SHA-256 of a certificate's subject public key info: the pin in tickets and join tokens. Same refusals as
/// [`PeerIdentity::from_der`], save those about names.
pub fn spki_sha256(der: &[u8]) -> Result<[u8; 32], IdentityError> {
    Ok(sha256(parse_certificate(der)?.public_key().raw))
}

pub(crate) fn parse_certificate(der: &[u8]) -> Result<X509Certificate<'_>, IdentityError> {
    if der.len() > MAX_CERTIFICATE {
        return Err(IdentityError::TooLarge(der.len()));
    }
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(IdentityError::Malformed),
    }
}

pub(crate) fn to_ms(seconds: i64) -> u64 {
    u64::try_from(seconds).unwrap_or(0).saturating_mul(1000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CLUSTER, DEVICE, NOW, Seeded, cluster};
    use crate::{KeyPair, ca::HostNames};

    #[test]
    fn identities_are_read_back() {
        let domain = TrustDomain::for_cluster(CLUSTER).unwrap();
        assert_eq!(domain.as_str(), "palyra.01jd7z8q.internal");
        let pairs = [
            (Role::Node, DEVICE),
            (Role::Worker, DEVICE),
            (Role::Replica, "18446744073709551615"),
            (Role::Operator, "ann.b-c_1"),
            (Role::Egress, "e"),
        ];
        for (role, id) in pairs {
            let made = SpiffeId::new(domain.clone(), role, id).unwrap();
            assert_eq!(SpiffeId::parse(&made.to_string()).unwrap(), made);
            assert_eq!((made.role(), made.id()), (role, id));
        }
        assert_eq!(
            SpiffeId::replica(domain.clone(), 3).unwrap().replica_id(),
            Some(3)
        );
        assert!(SpiffeId::replica(domain, 0).is_err());
    }

    #[test]
    fn there_is_no_second_spelling() {
        let refused = [
            "",
            "spiffe://",
            "spiffe://td",
            "spiffe://td/node",
            "spiffe://td/node/",
            "SPIFFE://td/replica/1",
            "https://td/replica/1",
            "spiffe://TD/replica/1",
            "spiffe:///replica/1",
            "spiffe://t:1/replica/1",
            "spiffe://u@t/replica/1",
            "spiffe://td/Replica/1",
            "spiffe://td/admin/1",
            "spiffe://td/replica/01",
            "spiffe://td/replica/+1",
            "spiffe://td/replica/0",
            "spiffe://td/replica/18446744073709551616",
            "spiffe://td/replica/1/",
            "spiffe://td//replica/1",
            "spiffe://td/replica/1/2",
            "spiffe://td/replica/1?x",
            "spiffe://td/operator/%61nn",
            "spiffe://td/operator/Ann",
            "spiffe://td/operator/.ann",
            "spiffe://td/operator/a b",
            "spiffe://td/node/01jd7zb2c4d6e8f0g1h3j5k7m9",
            "spiffe://td/node/01JD7ZB2C4D6E8F0G1H3J5K7M",
            "spiffe://td/node/01JD7ZB2C4D6E8F0G1H3J5K7MU",
            "spiffe://td/node/81JD7ZB2C4D6E8F0G1H3J5K7M9",
        ];
        for text in refused {
            assert!(SpiffeId::parse(text).is_err(), "{text}");
        }
        assert!(SpiffeId::parse(&format!("spiffe://td/operator/{}", "a".repeat(65))).is_err());
        assert!(TrustDomain::new(&"a".repeat(256)).is_err());
        assert!(TrustDomain::for_cluster("short").is_err());
    }

    fn with_sans(sans: Vec<rcgen::SanType>) -> Vec<u8> {
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = sans;
        params
            .self_signed(&KeyPair::generate(&mut Seeded::new(1)).unwrap())
            .unwrap()
            .der()
            .to_vec()
    }

    #[test]
    fn a_certificate_names_exactly_one_holder() {
        let uri = |text: &str| rcgen::SanType::URI(text.try_into().unwrap());
        let dns = rcgen::SanType::DnsName("localhost".try_into().unwrap());
        let one =
            PeerIdentity::from_der(&with_sans(vec![dns.clone(), uri("spiffe://td/replica/1")])).unwrap();
        assert_eq!(one.id.to_string(), "spiffe://td/replica/1");
        assert_eq!(
            PeerIdentity::from_der(&with_sans(vec![])),
            Err(IdentityError::NoUriSan)
        );
        assert_eq!(
            PeerIdentity::from_der(&with_sans(vec![dns])),
            Err(IdentityError::NoUriSan)
        );
        let two = with_sans(vec![uri("spiffe://td/replica/1"), uri("spiffe://td/replica/2")]);
        assert_eq!(PeerIdentity::from_der(&two), Err(IdentityError::ManyUriSans(2)));
        let web = PeerIdentity::from_der(&with_sans(vec![uri("https://example.org/")]));
        assert!(matches!(web, Err(IdentityError::Form(_))), "{web:?}");
    }

    #[test]
    fn hostile_certificates_are_refused() {
        let mut rng = Seeded::new(2);
        let cluster = cluster(1);
        let csr = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
        let id = SpiffeId::new(cluster.domain.clone(), Role::Node, DEVICE).unwrap();
        let day = crate::ca::NODE_VALIDITY_MS;
        let issued = cluster
            .authority
            .issue_from_csr(&csr, &id, day, &HostNames::default(), NOW, &mut rng)
            .unwrap();
        for cut in 0..issued.der.len() {
            assert!(
                PeerIdentity::from_der(&issued.der[..cut]).is_err(),
                "cut at {cut}"
            );
        }
        let mut longer = issued.der.clone();
        longer.push(0);
        assert_eq!(PeerIdentity::from_der(&longer), Err(IdentityError::Malformed));
        let large = vec![0x30; MAX_CERTIFICATE + 1];
        assert_eq!(
            PeerIdentity::from_der(&large),
            Err(IdentityError::TooLarge(MAX_CERTIFICATE + 1))
        );
        for index in 0..issued.der.len() {
            let mut bent = issued.der.clone();
            bent[index] ^= 0x20;
            // Must not panic; whether it parses is the signature's business.
            let _ = PeerIdentity::from_der(&bent);
        }
    }
}
