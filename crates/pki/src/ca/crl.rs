//! Signed lists of revoked certificates (RFC 5280), for consumers outside of the cluster: replicas themselves ask the
//! registry.
//!
//! Invariant: an authority lists what it has issued itself, and nothing else.

use rcgen::{
    CertificateRevocationListParams, Issuer, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber,
};
use rustls_pki_types::CertificateDer;

use super::{CaError, Signer, encoding, moment};

/// Why a certificate is on the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RevokedFor {
    /// The device or operator is shut out.
    PrivilegeWithdrawn,
    /// The replica is gone, and its authority with it.
    Cessation,
}

/// One certificate of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revoked {
    /// Its serial number, big endian.
    pub serial: Vec<u8>,
    /// When it was revoked.
    pub revoked_at_ms: u64,
    /// Why.
    pub reason: RevokedFor,
}

/// A list, before it is signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crl {
    /// Rises with each list of the same issuer.
    pub number: u64,
    /// Good from.
    pub this_update_ms: u64,
    /// A newer one is out by then.
    pub next_update_ms: u64,
    /// What it lists.
    pub revoked: Vec<Revoked>,
}

impl Signer {
    /// The signed list, DER.
    pub(super) fn sign_crl(&self, crl: &Crl) -> Result<Vec<u8>, CaError> {
        let issuer = Issuer::from_ca_cert_der(&CertificateDer::from(self.der.as_slice()), &*self.key)
            .map_err(encoding)?;
        let revoked: Result<Vec<RevokedCertParams>, CaError> = crl.revoked.iter().map(entry).collect();
        let params = CertificateRevocationListParams {
            this_update: moment(crl.this_update_ms)?,
            next_update: moment(crl.next_update_ms)?,
            crl_number: SerialNumber::from_slice(&number_bytes(crl.number)),
            issuing_distribution_point: None,
            revoked_certs: revoked?,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let signed = params.signed_by(&issuer).map_err(encoding)?;
        Ok(signed.der().to_vec())
    }
}

/// DER wants a number to be as short as it can be, and positive.
fn number_bytes(number: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = number
        .to_be_bytes()
        .into_iter()
        .skip_while(|byte| *byte == 0)
        .collect();
    if bytes.first().is_none_or(|first| first & 0x80 != 0) {
        bytes.insert(0, 0);
    }
    bytes
}

fn entry(revoked: &Revoked) -> Result<RevokedCertParams, CaError> {
    let reason = match revoked.reason {
        RevokedFor::PrivilegeWithdrawn => RevocationReason::PrivilegeWithdrawn,
        RevokedFor::Cessation => RevocationReason::CessationOfOperation,
    };
    Ok(RevokedCertParams {
        serial_number: SerialNumber::from_slice(&revoked.serial),
        revocation_time: moment(revoked.revoked_at_ms)?,
        reason_code: Some(reason),
        invalidity_date: None,
    })
}
