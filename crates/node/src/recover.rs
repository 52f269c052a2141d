//! Recovery: a new certificate after the old one ran out, at a replica's enrol listener. docs/protocol/recovery.md.
//!
//! What never lives here: when (see `agent`), and what becomes of the certificate (see `link`).
//!
//! Invariants: the server is verified by the roots that this node has, before anything is sent; what is signed names
//! the certificate that the server showed, so that nobody in between can pass it on; the key and the counter are
//! those of the renewal that was not answered, if there is one.

use std::sync::Arc;
use std::time::Duration;

use palyra_client::error::{Failure, classify};
use palyra_client::{ConnectErrorKind, ConnectOptions, connect, fill_random};
use palyra_pki::tls::{SeenServer, SharedTrust};
use palyra_pki::transcript::NONCE_LEN;
use palyra_pki::{Credential, PeerIdentity, Recovery, sha256};
use palyra_proto::pairing::v1 as wire;
use palyra_proto::pairing::v1::enrol_service_client::EnrolServiceClient;
use tokio::time::timeout;
use tonic::{Response, Status};

use crate::link::accept;
use crate::renewal::{self, Request};
use crate::{Error, Home, Kind, Result};

const CALL: Duration = Duration::from_secs(10);

/// What became of a recovery.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// A new credential is stored as the next one.
    Done,
    /// Nobody could be asked, or not now.
    Later(Error),
    /// No replica will ever say anything else.
    Never(Error),
}

/// A certificate that this node can sign with, the newest first.
pub(crate) struct Known {
    pub(crate) credential: Credential,
    pub(crate) peer: PeerIdentity,
}

/// Asks the replicas, one after the other, with each certificate.
pub(crate) async fn recover(home: &Home, known: &[Known], enrol: &[String]) -> Outcome {
    let held: Vec<[u8; 32]> = known.iter().map(|known| known.peer.spki_sha256).collect();
    let request = match renewal::prepare(home, &held) {
        Ok(request) => request,
        Err(error) => return Outcome::Later(error),
    };
    let mut last = Outcome::Later(unreachable_error("no enrol address is known"));
    for address in enrol {
        for with in known {
            last = match one(home, with, &request, address).await {
                Ok(()) => return Outcome::Done,
                Err(Try::Later(error)) => Outcome::Later(error),
                // Another certificate of this node may be the one that the cluster has in use.
                Err(Try::Unknown(error)) => {
                    last = Outcome::Never(error);
                    continue;
                }
                Err(Try::Never(error)) => return Outcome::Never(error),
            };
            break;
        }
    }
    last
}

enum Try {
    Later(Error),
    Unknown(Error),
    Never(Error),
}

impl From<Error> for Try {
    fn from(error: Error) -> Self {
        Self::Later(error)
    }
}

async fn one(home: &Home, with: &Known, request: &Request, address: &str) -> std::result::Result<(), Try> {
    let trust = with
        .credential
        .trust()
        .map_err(|error| unreachable_error(&error.to_string()))?;
    let seen = SeenServer::new();
    let tls = connect::enrol_trusted_recording(SharedTrust::new(trust.clone()), Arc::clone(&seen))
        .map_err(|error| unreachable_error(&error.to_string()))?;
    let channel = connect::connect(address, &tls, &ConnectOptions::default())
        .await
        .map_err(|error| match error.kind {
            ConnectErrorKind::WrongServer => unreachable_error(&format!(
                "{error}; if that is about time, set the clock of this machine"
            )),
            ConnectErrorKind::Unreachable | ConnectErrorKind::Refused => {
                unreachable_error(&error.to_string())
            }
        })?;
    let end_point = seen
        .end_point()
        .ok_or_else(|| unreachable_error("the server showed no certificate"))?;
    let mut client = EnrolServiceClient::new(channel);
    let hello = answer(client.hello(wire::HelloRequest {})).await?;
    let ask = signed(with, request, &hello, end_point)?;
    let device_id = ask.device_id.clone();
    let recovered = answer(client.recover(ask)).await?;
    let chain: Vec<Vec<u8>> = recovered.chain.iter().map(|der| der.to_vec()).collect();
    let next = accept(&with.credential, &request.key, &chain, &device_id)?;
    renewal::answered(home, recovered.counter)?;
    home.set_credential(&next, true)?;
    renewal::stored(home)?;
    Ok(())
}

fn signed(
    with: &Known,
    request: &Request,
    hello: &wire::HelloResponse,
    server_end_point: [u8; 32],
) -> Result<wire::RecoverRequest> {
    let csr = request
        .key
        .make_csr()
        .map_err(|error| unreachable_error(&error.to_string()))?;
    let mut node_nonce = [0; NONCE_LEN];
    fill_random(&mut node_nonce);
    let server_nonce = hello
        .server_nonce
        .as_ref()
        .try_into()
        .map_err(|_| unreachable_error("the server's nonce has the wrong length"))?;
    let device_id = with.peer.id.id();
    // The cluster is the one of the roots that the server was verified by, whatever the answer says.
    let recovery = Recovery {
        cluster_id: &with.credential.cluster_id,
        device_id,
        certificate: with.peer.fingerprint,
        server_end_point,
        csr_sha256: sha256(&csr),
        node_nonce,
        server_nonce,
        counter: request.counter,
    };
    let key = with
        .credential
        .key_pair()
        .map_err(|error| unreachable_error(&error.to_string()))?;
    let signature = recovery
        .sign(&key)
        .map_err(|error| unreachable_error(&error.to_string()))?;
    Ok(wire::RecoverRequest {
        device_id: device_id.to_owned(),
        certificate_sha256: with.peer.fingerprint.to_vec().into(),
        csr: csr.into(),
        counter: request.counter,
        node_nonce: node_nonce.to_vec().into(),
        server_nonce: server_nonce.to_vec().into(),
        signature: signature.into(),
    })
}

async fn answer<T>(
    call: impl Future<Output = std::result::Result<Response<T>, Status>>,
) -> std::result::Result<T, Try> {
    let status = match timeout(CALL, call).await {
        Ok(Ok(response)) => return Ok(response.into_inner()),
        Ok(Err(status)) => status,
        Err(_) => return Err(unreachable_error("no answer in time").into()),
    };
    match classify(&status) {
        Failure::Answered(error) => Err(refused(error)),
        Failure::Lost { cause, .. } => Err(unreachable_error(&cause).into()),
    }
}

/// What a replica's refusal means for this node.
fn refused(error: palyra_client::Error) -> Try {
    let words = error.to_string();
    let auth = |code: &str, message: String, next: &str| Error::new(Kind::Auth, code, message, next);
    match error.code.as_str() {
        // Revoked, or forgotten together with its certificates.
        "E0301" | "E0302" | "E0304" | "E0320" => Try::Never(auth(
            "N0501",
            format!("this node was revoked ({words})"),
            "the agent ends; talk to the operator, pairing again needs a new PIN or ticket and --replace",
        )),
        "E0314" => Try::Never(copied(&words)),
        "E0303" | "E0316" => Try::Unknown(over(&words)),
        "E0315" => Try::Never(over(&words)),
        _ => Try::Later(error.into()),
    }
}

/// The certificate ran out and there is no way back.
pub(crate) fn over(words: &str) -> Error {
    Error::new(
        Kind::Auth,
        "N0503",
        format!("the certificate of this node is over, and it cannot recover: {words}"),
        "pair again with a new PIN or ticket: palyra node pair --replace",
    )
}

/// The cluster has seen a newer state of this folder.
pub(crate) fn copied(words: &str) -> Error {
    Error::new(
        Kind::Auth,
        "N0801",
        format!("this folder is a copy of another node's, or an older state of its own: {words}"),
        "pair this machine as one of its own: palyra node pair --replace; or ask the operator: palyra device describe",
    )
}

fn unreachable_error(why: &str) -> Error {
    Error::new(
        Kind::Unreachable,
        "N0802",
        format!("the certificate of this node is over, and no replica was reached to recover it: {why}"),
        "see whether the cluster runs (palyra cluster status); the agent goes on trying",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(code: &str) -> palyra_client::Error {
        palyra_client::Error::new(palyra_client::Class::Denied, code, "no")
    }

    #[test]
    fn a_refusal_is_final_when_no_other_replica_would_say_anything_else() {
        for (code, expected) in [("E0302", "N0501"), ("E0314", "N0801"), ("E0315", "N0503")] {
            let Try::Never(error) = refused(refusal(code)) else {
                panic!("{code} is final");
            };
            assert_eq!(error.code, expected);
        }
        assert!(matches!(refused(refusal("E0316")), Try::Unknown(_)));
        assert!(matches!(refused(refusal("E1012")), Try::Later(_)));
    }
}
