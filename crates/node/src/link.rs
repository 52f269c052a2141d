//! The node's credential at work: connections with it, and its renewal.
//!
//! Invariants: the old credential stays in use until a session was served with the new one; a renewed
//! credential is on disk before it is tried; the new key is made here and only its signing request leaves.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use palyra_client::error::Failure;
use palyra_client::{ConnectError, ConnectOptions, Connection, connect, fill_random, new_ulid, wall_ms};
use palyra_pki::chain::{Usage, verify_chain};
use palyra_pki::credential::to_rustls;
use palyra_pki::{Credential, KeyPair, PeerIdentity, Role, TrustBundle, TrustDomain};
use palyra_proto::node::v1 as wire;
use rustls::ClientConfig;
use tokio::time::timeout;

use crate::route::random_below;
use crate::{Error, Home, Kind, Result};

const RENEW_CALL: Duration = Duration::from_secs(10);
/// After a renewal that failed.
const RENEW_AGAIN_MS: u64 = 60_000;

/// How the agent reaches replicas. The second implementation is the tests', without TLS.
pub(crate) trait Link: Send {
    /// Connects with the credential that is to be used now.
    fn dial<'a>(
        &'a mut self,
        address: &'a str,
    ) -> BoxFuture<'a, std::result::Result<Connection, ConnectError>>;
    /// A session was served: the credential works.
    fn served(&mut self) -> Result<()>;
    /// A server refused the credential. Answers whether there is another to fall back on.
    fn refused(&mut self) -> bool;
    /// Whether it is time to renew.
    fn renew_due(&self) -> bool;
    /// Asks for a new credential over a connection. Completes when it is on disk.
    fn renew(&mut self, connection: Connection) -> BoxFuture<'static, Result<()>>;
    /// How the renewal ended. Answers whether to connect anew with what it brought.
    fn renewed(&mut self, outcome: Result<()>) -> bool;
    /// The generation of the trust bundle that is on disk; 0 when it is not known.
    fn trust_generation(&self) -> u64;
    /// Stores another trust bundle (roots, DER) durably and trusts it from the next connection on. An older one than
    /// what is held is passed over.
    fn trust(&mut self, generation: u64, roots: Vec<Vec<u8>>) -> Result<()>;
    /// Hex fingerprint and end of validity of the credential in use.
    fn describe(&self) -> (String, u64);
}

struct Loaded {
    credential: Credential,
    peer: PeerIdentity,
    tls: Arc<ClientConfig>,
}

/// [`Link`] over mutual TLS with the credential in the data folder.
pub(crate) struct TlsLink {
    home: Home,
    current: Loaded,
    next: Option<Loaded>,
    /// By the wall clock: a machine that slept must notice.
    renew_at_ms: u64,
}

impl TlsLink {
    /// Loads the credential, and a renewed one that was not used yet.
    pub(crate) fn open(home: &Home) -> Result<Self> {
        let Some(credential) = home.credential()? else {
            let message = format!("{} has no credential", home.dir().display());
            return Err(Error::new(
                Kind::Precondition,
                "N0101",
                message,
                "pair this machine first: palyra node pair",
            ));
        };
        let current = load(credential)?;
        let next = home
            .next_credential()?
            .map(|next| aligned(home, &current, next))
            .transpose()?;
        let renew_at_ms = half_life(&current.peer);
        Ok(Self {
            home: home.clone(),
            current,
            next,
            renew_at_ms,
        })
    }

    /// Whose certificate it is.
    pub(crate) fn device_id(&self) -> &str {
        self.current.peer.id.id()
    }

    fn in_use(&self) -> &Loaded {
        self.next.as_ref().unwrap_or(&self.current)
    }
}

impl Link for TlsLink {
    fn dial<'a>(
        &'a mut self,
        address: &'a str,
    ) -> BoxFuture<'a, std::result::Result<Connection, ConnectError>> {
        let tls = Arc::clone(&self.in_use().tls);
        async move {
            let channel = connect::connect(address, &tls, &ConnectOptions::default()).await?;
            Ok(Connection::Grpc(channel))
        }
        .boxed()
    }

    fn served(&mut self) -> Result<()> {
        let Some(next) = self.next.take() else {
            return Ok(());
        };
        self.renew_at_ms = half_life(&next.peer);
        self.current = next;
        let fingerprint = hex::encode(self.current.peer.fingerprint);
        tracing::info!(%fingerprint, "the renewed certificate works");
        // Last: if the disk refuses, this agent goes on with the new one all the same, and so does the next,
        // which finds it where it is.
        self.home.promote_credential()
    }

    fn refused(&mut self) -> bool {
        if self.next.take().is_none() {
            return false;
        }
        tracing::warn!("the renewed certificate was refused; the old one stays in use");
        self.renew_at_ms = wall_ms() + RENEW_AGAIN_MS;
        if let Err(error) = self.home.drop_next_credential() {
            tracing::warn!(%error, "the refused certificate could not be removed");
        }
        true
    }

    fn renew_due(&self) -> bool {
        wall_ms() >= self.renew_at_ms
    }

    fn renew(&mut self, connection: Connection) -> BoxFuture<'static, Result<()>> {
        // Not again while this one is under way.
        self.renew_at_ms = wall_ms() + RENEW_AGAIN_MS;
        let (home, old) = (self.home.clone(), self.current.credential.clone());
        let device_id = self.device_id().to_owned();
        async move {
            let key = KeyPair::generate(&mut fill_random).map_err(|error| failed(error.to_string()))?;
            let request = wire::RenewRequest {
                request_id: new_ulid(),
                device_id: device_id.clone(),
                csr: key.make_csr().map_err(|error| failed(error.to_string()))?.into(),
            };
            let answer = timeout(RENEW_CALL, connection.renew(request)).await;
            let answer = answer
                .map_err(|_| failed("no answer in time".to_owned()))?
                .map_err(|failure| match failure {
                    Failure::Answered(error) => error.into(),
                    Failure::Lost { cause, .. } => failed(cause),
                })?;
            let chain: Vec<Vec<u8>> = answer.chain.iter().map(|der| der.to_vec()).collect();
            let next = accept(&old, &key, &chain, &device_id)?;
            home.set_credential(&next, true)
        }
        .boxed()
    }

    fn renewed(&mut self, outcome: Result<()>) -> bool {
        let next = |next| aligned(&self.home, &self.current, next);
        let loaded = outcome.and_then(|()| self.home.next_credential()?.map(next).transpose());
        match loaded {
            Ok(next) => {
                self.next = next;
                self.next.is_some()
            }
            Err(error) => {
                tracing::warn!(%error, "the certificate was not renewed; it is tried again in a minute");
                false
            }
        }
    }

    fn trust_generation(&self) -> u64 {
        let next = self.next.as_ref().map(|next| next.credential.trust_generation);
        let current = self.current.credential.trust_generation;
        next.map_or(current, |next| next.min(current))
    }

    fn trust(&mut self, generation: u64, roots: Vec<Vec<u8>>) -> Result<()> {
        if generation <= self.trust_generation() {
            return Ok(());
        }
        // The renewed one last: until both are there, the older generation is what this node says that it holds.
        let current = with_roots(&self.current.credential, generation, &roots)?;
        let next = self
            .next
            .as_ref()
            .map(|next| with_roots(&next.credential, generation, &roots));
        let next = next.transpose()?;
        self.home.set_credential(&current, false)?;
        self.current = load(current)?;
        if let Some(next) = next {
            self.home.set_credential(&next, true)?;
            self.next = Some(load(next)?);
        }
        tracing::info!(
            generation,
            roots = roots.len(),
            "the cluster's trust bundle is in place"
        );
        Ok(())
    }

    fn describe(&self) -> (String, u64) {
        let peer = &self.in_use().peer;
        (hex::encode(peer.fingerprint), peer.not_after_ms)
    }
}

fn load(credential: Credential) -> Result<Loaded> {
    let bad = |error: String| {
        let message = format!("the credential of this node is unusable: {error}");
        Error::new(
            Kind::Precondition,
            "N0104",
            message,
            "pair again: palyra node pair --replace",
        )
    };
    let (identity, trust) = credential.for_tls().map_err(|error| bad(error.to_string()))?;
    let peer = credential.identity().map_err(|error| bad(error.to_string()))?;
    let tls = connect::mutual(trust, identity, None).map_err(|error| bad(error.to_string()))?;
    Ok(Loaded {
        credential,
        peer,
        tls,
    })
}

/// Loads a renewed credential. The trust bundle may have changed while it was on its way.
fn aligned(home: &Home, current: &Loaded, next: Credential) -> Result<Loaded> {
    let held = &current.credential;
    if next.trust_generation >= held.trust_generation {
        return load(next);
    }
    let roots = held.trust().map_err(|error| failed(error.to_string()))?;
    let next = next
        .with_trust(&roots, held.trust_generation)
        .map_err(|error| failed(error.to_string()))?;
    home.set_credential(&next, true)?;
    load(next)
}

fn with_roots(held: &Credential, generation: u64, roots: &[Vec<u8>]) -> Result<Credential> {
    let bad = |why: String| {
        let message = format!("the cluster sent a trust bundle that is unusable: {why}");
        let next = "report it to the operator: palyra ca status there; the node goes on with what it trusts";
        Error::new(Kind::Auth, "N0902", message, next)
    };
    let domain = TrustDomain::new(&held.trust_domain).map_err(|error| bad(error.to_string()))?;
    let trust = TrustBundle::new(&held.cluster_id, domain, roots.to_vec());
    let trust = trust.map_err(|error| bad(error.to_string()))?;
    held.with_trust(&trust, generation)
        .map_err(|error| bad(error.to_string()))
}

/// Checks a renewed chain before it replaces anything.
fn accept(old: &Credential, key: &KeyPair, chain: &[Vec<u8>], device_id: &str) -> Result<Credential> {
    let trust = old.trust().map_err(|error| failed(error.to_string()))?;
    let peer = verify_chain(&to_rustls(chain), &trust, Usage::Client, &[Role::Node], wall_ms())
        .map_err(|error| failed(error.to_string()))?;
    if peer.id.id() != device_id || peer.spki_sha256 != key.spki_sha256() {
        return Err(failed(format!("it is {}'s", peer.id)));
    }
    let renewed = Credential::new(&trust, old.endpoints.clone(), chain, key);
    let mut renewed = renewed.map_err(|error| failed(error.to_string()))?;
    renewed.trust_generation = old.trust_generation;
    Ok(renewed)
}

fn failed(why: String) -> Error {
    Error::new(
        Kind::Unreachable,
        "N0504",
        format!("no new certificate: {why}"),
        "",
    )
}

/// Half the certificate's life, and up to a tenth of it later, so that a fleet doesn't renew in step.
fn half_life(peer: &PeerIdentity) -> u64 {
    let life = peer.not_after_ms.saturating_sub(peer.not_before_ms);
    peer.not_before_ms + life / 2 + random_below(life / 10 + 1)
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
