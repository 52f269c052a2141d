//! What the worker says of itself, and who signs it.
//!
//! What never lives here: keys of the node (the link signs), sessions. Invariants: the digests of a statement
//! are those that runs are compared with (see `tools`); what is claimed is what is shown: without a binding
//! or a quote there is none.

use std::sync::Arc;

use palyra_pki::attestation::{QuoteProvider, TestProvider};
use palyra_proto::worker::v1 as wire;
use prost::Message;

use super::config::Config;
use super::tools::{Digests, Measured};
use crate::{Error, Kind, Result};

/// What vouches for digests.
pub(crate) type Provider = dyn QuoteProvider + Send + Sync;

/// The provider that the configuration names. It proves nothing about a machine: it is a key in a file, for
/// tests and for trying things out, until there is a driver for hardware.
///
/// Errors: its key cannot be read.
pub(crate) fn provider(config: &Config) -> Result<Option<Arc<Provider>>> {
    let Some(named) = &config.provider else {
        return Ok(None);
    };
    let path = &named.key;
    let text = std::fs::read_to_string(path).map_err(|error| Error::io("read", path, &error))?;
    let key = palyra_pki::KeyPair::from_pem(&text).map_err(|error| {
        super::config::bad(format!(
            "provider.key: {} is no P-256 key in PKCS #8 PEM: {error}",
            path.display()
        ))
    })?;
    Ok(Some(Arc::new(TestProvider::new(&named.name, key))))
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
    provider: Option<&Provider>,
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

fn quote(provider: &Provider, digests: &Digests, challenge: &wire::Challenge) -> Result<wire::HardwareQuote> {
    let failed = |why: String| Error::new(Kind::Internal, "N0001", format!("there is no quote: {why}"), "");
    let nonce = <[u8; 32]>::try_from(challenge.nonce.as_ref());
    let nonce = nonce.map_err(|_| failed("the challenge's nonce is none of 32 bytes".to_owned()))?;
    let quote = provider.quote(nonce, [digests.image, digests.build, digests.artifact]);
    let quote = quote.map_err(|error| failed(error.to_string()))?;
    Ok(wire::HardwareQuote {
        provider: quote.provider,
        nonce: quote.nonce.to_vec().into(),
        digests: quote.digests.to_vec().into(),
        signature: quote.signature.into(),
    })
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
