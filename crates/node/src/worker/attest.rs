//! What the worker says of itself, and who signs it.
//!
//! What never lives here: keys of the node (the link signs), sessions. Invariants: the digests of a statement are those that
//! runs are compared with (see `tools`); what is claimed is what is shown: without a binding or a quote there is none.

use std::sync::Arc;

use palyra_proto::worker::v1 as wire;
use prost::Message;

use super::config::Config;
use super::tools::{Digests, Measured};
use crate::{Error, Kind, Result};

/// In front of a statement when it is signed; see `docs/protocol/attestation.md`.
pub(crate) const STATEMENT_LABEL: &[u8] = b"palyra worker attestation v1\0";
/// In front of a quote when it is signed.
pub(crate) const QUOTE_LABEL: &[u8] = b"palyra hardware quote v1\0";

/// Vouches for digests over a nonce: hardware, or something that plays it in tests.
pub trait QuoteProvider: Send + Sync {
    /// As the policy names it.
    fn name(&self) -> &str;

    /// Signs a quote's bytes: ECDSA P-256 with SHA-256, ASN.1.
    ///
    /// Errors: the device does not answer, or not now.
    fn sign(&self, bytes: &[u8]) -> Result<Vec<u8>>;
}

/// A provider that is a key in a file: for tests, and for trying things out. It proves nothing about a machine.
pub(crate) struct KeyFile {
    name: String,
    key: palyra_pki::KeyPair,
}

impl KeyFile {
    /// Reads the key.
    ///
    /// Errors: no such file, no such key.
    pub(crate) fn open(provider: &super::config::Provider) -> Result<Self> {
        let path = &provider.key;
        let text = std::fs::read_to_string(path).map_err(|error| Error::io("read", path, &error))?;
        let key = palyra_pki::KeyPair::from_pem(&text).map_err(|error| {
            super::config::bad(format!(
                "provider.key: {} is no P-256 key in PKCS #8 PEM: {error}",
                path.display()
            ))
        })?;
        let name = provider.name.clone();
        Ok(Self { name, key })
    }
}

impl QuoteProvider for KeyFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn sign(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        sign(&self.key, bytes)
    }
}

/// The provider that the configuration names.
///
/// Errors: its key cannot be read.
pub(crate) fn provider(config: &Config) -> Result<Option<Arc<dyn QuoteProvider>>> {
    let opened = config.provider.as_ref().map(KeyFile::open).transpose()?;
    Ok(opened.map(|provider| Arc::new(provider) as Arc<dyn QuoteProvider>))
}

/// Signs with a key: ECDSA P-256 with SHA-256, ASN.1.
pub(crate) fn sign(key: &palyra_pki::KeyPair, bytes: &[u8]) -> Result<Vec<u8>> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::new(
            Kind::Internal,
            "N0001",
            format!("nothing can be signed: {error}"),
            "",
        )
    };
    key.sign_message(bytes).map_err(|error| failed(&error))
}

/// Who attests, and to whom.
pub(crate) struct Parties {
    /// ULID text.
    pub(crate) worker_id: String,
}

/// The bytes of a statement over a challenge.
///
/// Errors: a binding that cannot be read, a provider that does not answer.
pub(crate) fn statement(
    config: &Config,
    measured: &Measured,
    provider: Option<&dyn QuoteProvider>,
    parties: &Parties,
    challenge: &wire::Challenge,
) -> Result<Vec<u8>> {
    let digests = &measured.digests;
    let quote = provider
        .map(|provider| quote(provider, digests, challenge))
        .transpose()?;
    let statement = wire::Statement {
        cluster_id: challenge.cluster_id.clone(),
        worker_id: ulid_bytes(&parties.worker_id)?.to_vec().into(),
        nonce: challenge.nonce.clone(),
        image: digests.image.to_vec().into(),
        build: digests.build.to_vec().into(),
        artifact: digests.artifact.to_vec().into(),
        supervisor: digests
            .supervisor
            .map(|digest| digest.to_vec())
            .unwrap_or_default()
            .into(),
        evidence: config.evidence.number(),
        egress: egress(config)?,
        capabilities: config
            .tools
            .iter()
            .map(|tool| wire::ClaimedCapability {
                name: tool.name.clone(),
                authority: tool.authority.clone(),
            })
            .collect(),
        sdk_protocol: config.sdk_protocol,
        wit_abi: config.wit_abi.clone(),
        issued_at_ms: challenge.now_ms,
        expires_at_ms: challenge.now_ms + challenge.max_life_ms,
        slots: config.slots,
        quote,
    };
    Ok(statement.encode_to_vec())
}

/// What is signed of a statement.
pub(crate) fn to_sign(statement: &[u8]) -> Vec<u8> {
    [STATEMENT_LABEL, statement].concat()
}

fn quote(
    provider: &dyn QuoteProvider,
    digests: &Digests,
    challenge: &wire::Challenge,
) -> Result<wire::HardwareQuote> {
    let mut quote = wire::HardwareQuote {
        provider: provider.name().to_owned(),
        nonce: challenge.nonce.clone(),
        digests: [digests.image, digests.build, digests.artifact].concat().into(),
        signature: Vec::new().into(),
    };
    let bytes = [QUOTE_LABEL, &quote.encode_to_vec()].concat();
    quote.signature = provider.sign(&bytes)?.into();
    Ok(quote)
}

/// The binding, read anew each time: it is renewed while the worker runs.
fn egress(config: &Config) -> Result<Option<wire::EgressBinding>> {
    let Some(path) = &config.egress else {
        return Ok(None);
    };
    let bytes = std::fs::read(path).map_err(|error| Error::io("read", path, &error))?;
    let read = wire::EgressBinding::decode(bytes.as_slice());
    read.map(Some)
        .map_err(|error| super::config::bad(format!("egress: {} is no binding: {error}", path.display())))
}

/// The 16 bytes of a ULID's text.
pub(crate) fn ulid_bytes(text: &str) -> Result<[u8; 16]> {
    const DIGITS: &[u8] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    let value = text.bytes().try_fold(0u128, |value, byte| {
        let digit = DIGITS
            .iter()
            .position(|digit| *digit == byte.to_ascii_uppercase())?;
        value.checked_mul(32)?.checked_add(digit as u128)
    });
    match value {
        Some(value) if text.len() == 26 => Ok(value.to_be_bytes()),
        _ => Err(Error::new(
            Kind::Internal,
            "N0001",
            format!("{text:?} is no device id"),
            "",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ulid_is_sixteen_bytes() {
        assert_eq!(ulid_bytes("00000000000000000000000001").unwrap()[15], 1);
        assert_eq!(ulid_bytes("7ZZZZZZZZZZZZZZZZZZZZZZZZZ").unwrap(), [255; 16]);
        for bad in [
            "",
            "U0000000000000000000000001",
            "8ZZZZZZZZZZZZZZZZZZZZZZZZZ",
            "0000000000000000000000001",
        ] {
            assert!(ulid_bytes(bad).is_err(), "{bad}");
        }
    }
}
