//! Certificate authority: the cluster's root, one authority per replica, and the leaves they issue.
//!
//! What never lives here: the decision whether somebody may have a certificate, and the record of it. Callers
//! issue, commit, and only then hand out.
//!
//! Invariants: names and usages in a certificate come from the arguments, never from the request; a leaf
//! never outlives its issuer; an authority can't make authorities (path length 0); serials are 127 random
//! bits.

mod crl;

pub use crl::{Crl, Revoked, RevokedFor};

use std::net::IpAddr;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

use crate::codec::{Fingerprint, sha256};
use crate::entropy::draw;
use crate::identity::{IdentityError, parse_certificate, to_ms};
use crate::keys::{KeyError, KeyPair, check_csr};
use crate::{Entropy, Role, SpiffeId, TrustDomain};

const DAY_MS: u64 = 24 * 60 * 60 * 1000;
/// How long a root lives, in milliseconds: ten years.
pub const ROOT_VALIDITY_MS: u64 = 3653 * DAY_MS;
/// How long a replica's authority lives, in milliseconds: one year.
pub const AUTHORITY_VALIDITY_MS: u64 = 365 * DAY_MS;
/// How long a node's certificate lives unless policy says otherwise, in milliseconds: 24 hours.
pub const NODE_VALIDITY_MS: u64 = DAY_MS;
/// How far the start of validity is dated back, in milliseconds, so that a peer whose clock is behind accepts
/// a fresh certificate; of a short life a quarter.
pub const BACKDATE_MS: u64 = 5 * 60 * 1000;
/// The most DNS names and addresses that a certificate carries.
pub const MAX_NAMES: usize = 32;

/// Why nothing was issued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CaError {
    /// The request or key is refused.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A name or the issuer's certificate is refused.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The private key isn't the certificate's.
    #[error("the private key does not belong to the certificate")]
    KeyMismatch,
    /// The certificate can't issue.
    #[error("the certificate is no certificate authority")]
    NotAnAuthority,
    /// The issuer's own certificate is over.
    #[error("the issuing certificate ended at {not_after_ms} ms and it is now {now_ms} ms; renew it first")]
    IssuerExpired {
        /// When the issuer's certificate ended.
        not_after_ms: u64,
        /// The caller's clock.
        now_ms: u64,
    },
    /// The name is of another trust domain.
    #[error("{id} is not in this authority's trust domain {domain}")]
    OtherDomain {
        /// Who the certificate was asked for.
        id: String,
        /// What the authority issues for.
        domain: String,
    },
    /// Host names or addresses for somebody who doesn't listen, or too many or ill-formed ones.
    #[error("{0}")]
    Names(String),
    /// The clock or the validity can't be written into a certificate.
    #[error("the time {0} ms can't be written into a certificate")]
    Time(u64),
    /// The encoder gave up.
    #[error("the certificate could not be encoded: {0}")]
    Encoding(String),
}

/// A certificate that was just issued, with what the registry records about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCert {
    /// The certificate, DER.
    pub der: Vec<u8>,
    /// SHA-256 of `der`.
    pub fingerprint: Fingerprint,
    /// The serial number, lower-case hexadecimal.
    pub serial: String,
    /// First millisecond of validity.
    pub not_before_ms: u64,
    /// Last millisecond of validity, to the second.
    pub not_after_ms: u64,
    /// SHA-256 of the subject public key info.
    pub spki_sha256: [u8; 32],
}

/// What a certificate of an authority says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// First millisecond of validity.
    pub not_before_ms: u64,
    /// Last millisecond of validity.
    pub not_after_ms: u64,
    /// SHA-256 of the subject public key info.
    pub spki_sha256: [u8; 32],
    /// The serial number, big endian.
    pub serial: Vec<u8>,
}

/// Reads the certificate (DER) of a root or an authority.
pub fn describe(der: &[u8]) -> Result<Described, IdentityError> {
    let parsed = parse_certificate(der)?;
    Ok(Described {
        not_before_ms: to_ms(parsed.validity().not_before.timestamp()),
        not_after_ms: to_ms(parsed.validity().not_after.timestamp()),
        spki_sha256: sha256(parsed.public_key().raw),
        serial: parsed.tbs_certificate.raw_serial().to_vec(),
    })
}

/// Host names and addresses for a certificate whose holder listens. Empty for everybody else.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostNames {
    /// DNS names.
    pub dns: Vec<String>,
    /// IP addresses.
    pub ips: Vec<IpAddr>,
}

impl HostNames {
    /// Sorts listen hosts into addresses and names, adds `localhost`, drops doubles.
    pub fn from_hosts<S: AsRef<str>>(hosts: impl IntoIterator<Item = S>) -> Self {
        let mut names = Self {
            dns: vec!["localhost".to_owned()],
            ips: Vec::new(),
        };
        for host in hosts {
            let host = host.as_ref().trim_start_matches('[').trim_end_matches(']');
            match host.parse::<IpAddr>() {
                Ok(ip) if ip.is_unspecified() || names.ips.contains(&ip) => {}
                Ok(ip) => names.ips.push(ip),
                Err(_) if host.is_empty() || names.dns.iter().any(|known| known == host) => {}
                Err(_) => names.dns.push(host.to_owned()),
            }
        }
        names
    }
}

/// The cluster's root: self-signed, P-256, ten years. Signs replica authorities and nothing in daily use.
#[derive(Debug)]
pub struct Root(Signer);

impl Root {
    /// Makes a root for a cluster, with a key from `rng`, valid from five minutes before `now_ms`.
    pub fn create(
        cluster_id: &str,
        domain: &TrustDomain,
        now_ms: u64,
        rng: &mut dyn Entropy,
    ) -> Result<Self, CaError> {
        Self::create_next(cluster_id, 1, domain, now_ms, rng)
    }

    /// The cluster's root with this number. From the second on the number is in its name, so that roots can be told
    /// apart by it.
    pub fn create_next(
        cluster_id: &str,
        number: u32,
        domain: &TrustDomain,
        now_ms: u64,
        rng: &mut dyn Entropy,
    ) -> Result<Self, CaError> {
        let key = KeyPair::generate(rng)?;
        let name = match number {
            0 | 1 => format!("palyra {cluster_id} root"),
            later => format!("palyra {cluster_id} root {later}"),
        };
        let mut params = base_params(&name, domain, now_ms, ROOT_VALIDITY_MS, u64::MAX, rng)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(encoding)?;
        Self::open(certificate.der().to_vec(), key)
    }

    /// Takes a root certificate (DER) and its key; refuses a key of another certificate and a certificate
    /// that is no authority.
    pub fn open(der: Vec<u8>, key: KeyPair) -> Result<Self, CaError> {
        Signer::open(der, Arc::new(key)).map(Self)
    }

    /// The root certificate, DER.
    pub fn der(&self) -> &[u8] {
        &self.0.der
    }

    /// The root's key, to be sealed.
    pub fn key(&self) -> &KeyPair {
        &self.0.key
    }

    /// When the root ends, in milliseconds since the Unix epoch.
    pub fn not_after_ms(&self) -> u64 {
        self.0.not_after_ms
    }

    /// The trust domain that the root is for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.domain
    }

    /// SHA-256 of the root's public key info: the pin in tickets and join tokens.
    pub fn pin(&self) -> [u8; 32] {
        self.0.key.spki_sha256()
    }

    /// Signs the authority of a replica (path length 0, one year) over the key in its signing request.
    pub fn sign_authority(
        &self,
        csr_der: &[u8],
        replica_id: u64,
        now_ms: u64,
        rng: &mut dyn Entropy,
    ) -> Result<IssuedCert, CaError> {
        let request = check_csr(csr_der)?;
        let name = format!("palyra replica {replica_id} authority");
        let domain = self.0.domain.clone();
        let limit = self.0.usable_until(now_ms)?;
        let mut params = base_params(&name, &domain, now_ms, AUTHORITY_VALIDITY_MS, limit, rng)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        self.0.sign(params, &request.public_key)
    }

    /// Signs an authority that another root of the cluster has signed: the same key under the same name, to the same
    /// end. A chain through either is good then.
    pub fn certify_authority(
        &self,
        authority_der: &[u8],
        replica_id: u64,
        now_ms: u64,
        rng: &mut dyn Entropy,
    ) -> Result<IssuedCert, CaError> {
        let signed = parse_certificate(authority_der)?;
        if !signed.is_ca() {
            return Err(CaError::NotAnAuthority);
        }
        let end = to_ms(signed.validity().not_after.timestamp());
        let public_key = SubjectPublicKeyInfo::from_der(signed.public_key().raw).map_err(encoding)?;
        let name = format!("palyra replica {replica_id} authority");
        let domain = self.0.domain.clone();
        let limit = self.0.usable_until(now_ms)?.min(end);
        let mut params = base_params(&name, &domain, now_ms, AUTHORITY_VALIDITY_MS, limit, rng)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        self.0.sign(params, &public_key)
    }

    /// Signs a list of revoked certificates that this root has issued.
    pub fn sign_crl(&self, crl: &Crl) -> Result<Vec<u8>, CaError> {
        self.0.sign_crl(crl)
    }

    /// Issues a leaf directly under the root; see [`Authority::issue_from_csr`]. For the certificate that a
    /// replica joins with, so that it doesn't depend on the authority of the replica that admitted it.
    pub fn issue_from_csr(
        &self,
        csr_der: &[u8],
        id: &SpiffeId,
        validity_ms: u64,
        names: &HostNames,
        now_ms: u64,
        rng: &mut dyn Entropy,
    ) -> Result<IssuedCert, CaError> {
        self.0.issue(csr_der, id, validity_ms, names, now_ms, rng)
    }
}

/// A replica's issuing authority. Its key never leaves the replica.
#[derive(Debug)]
pub struct Authority(Signer);

impl Authority {
    /// Takes an authority's certificate (DER) and its key; refuses a key of another certificate and a
    /// certificate that is no authority.
    pub fn new(der: Vec<u8>, key: impl Into<Arc<KeyPair>>) -> Result<Self, CaError> {
        Signer::open(der, key.into()).map(Self)
    }

    /// The authority's certificate, DER: follows the leaf in every chain.
    pub fn der(&self) -> &[u8] {
        &self.0.der
    }

    /// The authority's key, to be sealed.
    pub fn key(&self) -> &KeyPair {
        &self.0.key
    }

    /// When the authority ends, in milliseconds since the Unix epoch.
    pub fn not_after_ms(&self) -> u64 {
        self.0.not_after_ms
    }

    /// Signs a list of revoked certificates that this authority has issued.
    pub fn sign_crl(&self, crl: &Crl) -> Result<Vec<u8>, CaError> {
        self.0.sign_crl(crl)
    }

    /// Issues a leaf over the key in a signing request. Only the key is taken from the request; name, usages
    /// and validity come from the arguments. `validity_ms` counts from `now_ms` and is cut to the authority's
    /// own end. `names` must be empty unless the holder is a replica or egress proxy.
    pub fn issue_from_csr(
        &self,
        csr_der: &[u8],
        id: &SpiffeId,
        validity_ms: u64,
        names: &HostNames,
        now_ms: u64,
        rng: &mut dyn Entropy,
    ) -> Result<IssuedCert, CaError> {
        self.0.issue(csr_der, id, validity_ms, names, now_ms, rng)
    }
}

/// A certificate that may sign, and its key.
#[derive(Debug)]
struct Signer {
    der: Vec<u8>,
    key: Arc<KeyPair>,
    domain: TrustDomain,
    not_after_ms: u64,
}

impl Signer {
    fn open(der: Vec<u8>, key: Arc<KeyPair>) -> Result<Self, CaError> {
        let certificate = parse_certificate(&der)?;
        if sha256(certificate.public_key().raw) != key.spki_sha256() {
            return Err(CaError::KeyMismatch);
        }
        if !certificate.is_ca() {
            return Err(CaError::NotAnAuthority);
        }
        let organization = certificate
            .subject()
            .iter_organization()
            .next()
            .and_then(|name| name.as_str().ok());
        let domain = TrustDomain::new(organization.unwrap_or_default())?;
        let not_after_ms = to_ms(certificate.validity().not_after.timestamp());
        Ok(Self {
            domain,
            not_after_ms,
            der,
            key,
        })
    }

    fn usable_until(&self, now_ms: u64) -> Result<u64, CaError> {
        if now_ms >= self.not_after_ms {
            return Err(CaError::IssuerExpired {
                not_after_ms: self.not_after_ms,
                now_ms,
            });
        }
        Ok(self.not_after_ms)
    }

    fn issue(
        &self,
        csr_der: &[u8],
        id: &SpiffeId,
        validity_ms: u64,
        names: &HostNames,
        now_ms: u64,
        rng: &mut dyn Entropy,
    ) -> Result<IssuedCert, CaError> {
        let request = check_csr(csr_der)?;
        if *id.trust_domain() != self.domain {
            return Err(CaError::OtherDomain {
                id: id.to_string(),
                domain: self.domain.to_string(),
            });
        }
        let subject = format!("{} {}", id.role(), id.id());
        let limit = self.usable_until(now_ms)?;
        let mut params = base_params(&subject, &self.domain, now_ms, validity_ms, limit, rng)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if matches!(id.role(), Role::Replica | Role::Egress) {
            params
                .extended_key_usages
                .push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.subject_alt_names = alternative_names(id, names)?;
        self.sign(params, &request.public_key)
    }

    fn sign(
        &self,
        params: CertificateParams,
        public_key: &impl PublicKeyData,
    ) -> Result<IssuedCert, CaError> {
        let issuer = Issuer::from_ca_cert_der(&CertificateDer::from(self.der.as_slice()), &*self.key)
            .map_err(encoding)?;
        let certificate = params.signed_by(public_key, &issuer).map_err(encoding)?;
        let der = certificate.der().to_vec();
        let parsed = parse_certificate(&der)?;
        Ok(IssuedCert {
            fingerprint: sha256(&der),
            serial: hex::encode(parsed.tbs_certificate.raw_serial()),
            not_before_ms: to_ms(parsed.validity().not_before.timestamp()),
            not_after_ms: to_ms(parsed.validity().not_after.timestamp()),
            spki_sha256: sha256(parsed.public_key().raw),
            der,
        })
    }
}

fn base_params(
    subject: &str,
    domain: &TrustDomain,
    now_ms: u64,
    validity_ms: u64,
    limit_ms: u64,
    rng: &mut dyn Entropy,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, domain.as_str());
    name.push(DnType::CommonName, subject);
    params.distinguished_name = name;
    let mut serial: [u8; 16] = draw(rng);
    // Positive and of constant length: DER neither needs a leading zero nor drops one.
    serial[0] = (serial[0] & 0x7f) | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    // A certificate that lives seconds must not be mostly past when it is made.
    let backdate = BACKDATE_MS.min(validity_ms / 4);
    params.not_before = moment(now_ms.saturating_sub(backdate))?;
    params.not_after = moment(now_ms.saturating_add(validity_ms).min(limit_ms))?;
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn moment(ms: u64) -> Result<OffsetDateTime, CaError> {
    let seconds = i64::try_from(ms / 1000).map_err(|_| CaError::Time(ms))?;
    OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| CaError::Time(ms))
}

fn alternative_names(id: &SpiffeId, names: &HostNames) -> Result<Vec<SanType>, CaError> {
    let count = names.dns.len() + names.ips.len();
    if count > 0 && !matches!(id.role(), Role::Replica | Role::Egress) {
        return Err(CaError::Names(format!(
            "a {} does not listen, so it gets no host names",
            id.role()
        )));
    }
    if count > MAX_NAMES {
        return Err(CaError::Names(format!(
            "{count} host names and addresses; at most {MAX_NAMES} are allowed"
        )));
    }
    let uri = id.to_string().try_into().map_err(encoding)?;
    let mut all = vec![SanType::URI(uri)];
    for dns in &names.dns {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        if dns.is_empty() || dns.len() > 253 || !dns.bytes().all(plain) {
            return Err(CaError::Names(format!("{dns:?} is no host name")));
        }
        all.push(SanType::DnsName(dns.as_str().try_into().map_err(encoding)?));
    }
    all.extend(names.ips.iter().map(|ip| SanType::IpAddress(*ip)));
    Ok(all)
}

fn encoding(error: rcgen::Error) -> CaError {
    CaError::Encoding(error.to_string())
}

#[cfg(test)]
mod tests;
