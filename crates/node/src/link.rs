//! The node's credential at work: connections with it, and its renewal.
//!
//! Invariants: the old credential stays in use until a session was served with the new one, and is not thrown
//! away before; a renewed credential is on disk before it is tried; the new key is made here and only its
//! signing request leaves.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use palyra_client::error::Failure;
use palyra_client::{
    ConnectError, ConnectOptions, Connection, QuicOptions, connect, new_ulid, quic, wall_ms,
};
use palyra_pki::attestation;
use palyra_pki::chain::{Usage, verify_chain};
use palyra_pki::credential::to_rustls;
use palyra_pki::{Credential, KeyPair, PeerIdentity, Role, TrustBundle, TrustDomain};
use palyra_proto::node::v1 as wire;
use rustls::ClientConfig;
use tokio::time::{Instant, timeout};

use crate::recover::{self, Known, Outcome};
use crate::renewal;
use crate::schedule::Schedule;
use crate::{Error, Home, Kind, Result};

const RENEW_CALL: Duration = Duration::from_secs(10);
/// What a replica says to a device that is suspected to be two machines.
const CLONE_SUSPECTED: &str = "E0314";

/// A connection in the making.
pub(crate) type Dialling = BoxFuture<'static, std::result::Result<Connection, ConnectError>>;

/// How the agent reaches replicas. The second implementation is the tests', without TLS.
pub(crate) trait Link: Send {
    /// Connects with the credential that is to be used now.
    fn dial(&mut self, address: &str) -> Dialling;
    /// The same, over QUIC.
    fn dial_quic(&mut self, address: &str) -> Dialling;
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
    /// Stores another trust bundle (roots, DER) durably and trusts it from the next connection on. An older
    /// one than what is held is passed over.
    fn trust(&mut self, generation: u64, roots: Vec<Vec<u8>>) -> Result<()>;
    /// Hex fingerprint and end of validity of the credential in use.
    fn describe(&self) -> (String, u64);
    /// A replica said how much is left of the credential in use.
    fn told(&mut self, _: &wire::CertificateTimes) {}
    /// Somebody wants a new credential now, and why.
    fn ask(&mut self, _: &str) {}
    /// Signs a worker's statement with the key of the certificate in use: the public key
    /// (SubjectPublicKeyInfo DER) and the signature.
    fn sign_statement(&self, _: &[u8]) -> Result<(Vec<u8>, Vec<u8>)> {
        Err(Error::new(
            Kind::Internal,
            "N0001",
            "there is no key to sign with",
            "",
        ))
    }
    /// Asks for a new credential where an expired one does not matter. How it ended is for [`Link::renewed`]
    /// too.
    fn recover(&mut self, _enrol: Vec<String>) -> BoxFuture<'static, Outcome> {
        async { Outcome::Never(recover::over("there is none to recover with")) }.boxed()
    }
    /// What there is to say of renewals.
    fn health(&self) -> Health {
        Health::default()
    }
}

/// What there is to say of renewals.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Health {
    /// How many were taken, as the cluster counts.
    pub(crate) counter: u64,
    /// When the last one brought a credential (Unix ms); 0 when none did since the start.
    pub(crate) renewed_at_ms: u64,
    /// Why the last one failed; empty when it did not.
    pub(crate) problem: String,
}

struct Loaded {
    credential: Credential,
    peer: PeerIdentity,
    tls: Arc<ClientConfig>,
    quic: Arc<ClientConfig>,
}

/// [`Link`] over mutual TLS with the credential in the data folder.
pub(crate) struct TlsLink {
    home: Home,
    current: Loaded,
    next: Option<Loaded>,
    /// The renewed one was refused; the other is tried.
    next_refused: bool,
    schedule: Schedule,
    health: Health,
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
        let schedule = Schedule::of(&next.as_ref().unwrap_or(&current).peer);
        let health = Health {
            counter: renewal::counter(home),
            ..Health::default()
        };
        Ok(Self {
            home: home.clone(),
            current,
            next,
            next_refused: false,
            schedule,
            health,
        })
    }

    /// Whose certificate it is.
    pub(crate) fn device_id(&self) -> &str {
        self.current.peer.id.id()
    }

    fn in_use(&self) -> &Loaded {
        self.next
            .as_ref()
            .filter(|_| !self.next_refused)
            .unwrap_or(&self.current)
    }

    fn held(&self) -> Vec<[u8; 32]> {
        let next = self.next.iter().map(|next| next.peer.spki_sha256);
        next.chain([self.current.peer.spki_sha256]).collect()
    }
}

impl Link for TlsLink {
    fn dial(&mut self, address: &str) -> Dialling {
        let (tls, address) = (Arc::clone(&self.in_use().tls), address.to_owned());
        async move {
            let channel = connect::connect(&address, &tls, &ConnectOptions::default()).await?;
            Ok(Connection::Grpc(channel))
        }
        .boxed()
    }

    fn dial_quic(&mut self, address: &str) -> Dialling {
        let (tls, address) = (Arc::clone(&self.in_use().quic), address.to_owned());
        async move {
            let connection = quic::connect(&address, &tls, &QuicOptions::default()).await?;
            Ok(Connection::Quic(connection))
        }
        .boxed()
    }

    fn served(&mut self) -> Result<()> {
        let Some(next) = self.next.take() else {
            return Ok(());
        };
        if std::mem::take(&mut self.next_refused) {
            // The cluster lets the old one in, so the new one was never used, and leads nowhere.
            return self.home.drop_next_credential();
        }
        self.current = next;
        let fingerprint = hex::encode(self.current.peer.fingerprint);
        tracing::info!(%fingerprint, "the renewed certificate works");
        // Last: if the disk refuses, this agent goes on with the new one all the same, and so does the next,
        // which finds it where it is.
        self.home.promote_credential()
    }

    fn refused(&mut self) -> bool {
        // Neither is thrown away: which one the cluster has in use is not known here.
        let other = self.next.is_some() && !self.next_refused;
        if other {
            tracing::warn!("the renewed certificate was refused; the old one is tried");
            self.next_refused = true;
        }
        other
    }

    fn renew_due(&self) -> bool {
        self.schedule.is_due(wall_ms(), Instant::now())
    }

    fn renew(&mut self, connection: Connection) -> BoxFuture<'static, Result<()>> {
        // Not again while this one is under way.
        self.schedule.begin(RENEW_CALL * 2, Instant::now());
        let (home, old, held) = (self.home.clone(), self.current.credential.clone(), self.held());
        let device_id = self.device_id().to_owned();
        async move {
            let asked = renewal::prepare(&home, &held)?;
            let request = wire::RenewRequest {
                request_id: new_ulid(),
                device_id: device_id.clone(),
                csr: asked
                    .key
                    .make_csr()
                    .map_err(|error| failed(error.to_string()))?
                    .into(),
                counter: asked.counter,
            };
            let answer = timeout(RENEW_CALL, connection.renew(request)).await;
            let answer = answer
                .map_err(|_| failed("no answer in time".to_owned()))?
                .map_err(|failure| match failure {
                    Failure::Answered(error) => error.into(),
                    Failure::Lost { cause, .. } => failed(cause),
                })?;
            let chain: Vec<Vec<u8>> = answer.chain.iter().map(|der| der.to_vec()).collect();
            let next = accept(&old, &asked.key, &chain, &device_id)?;
            renewal::answered(&home, answer.counter)?;
            home.set_credential(&next, true)?;
            renewal::stored(&home)
        }
        .boxed()
    }

    fn renewed(&mut self, outcome: Result<()>) -> bool {
        let next = |next| aligned(&self.home, &self.current, next);
        let loaded = outcome.and_then(|()| self.home.next_credential()?.map(next).transpose());
        match loaded {
            Ok(Some(next)) => {
                self.schedule = Schedule::of(&next.peer);
                self.health = Health {
                    counter: renewal::counter(&self.home),
                    renewed_at_ms: wall_ms(),
                    problem: String::new(),
                };
                self.next = Some(next);
                self.next_refused = false;
                true
            }
            Ok(None) => false,
            Err(error) => {
                let pause = self.schedule.failed(wall_ms(), Instant::now());
                if error.code == CLONE_SUSPECTED {
                    tracing::error!(%error, ?pause, "the cluster takes this machine for a copy of another");
                } else {
                    tracing::warn!(%error, ?pause, "the certificate was not renewed; it is tried again");
                }
                self.health.problem = error.to_string();
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
        // The renewed one last: until both are there, the older generation is what this node says that it
        // holds.
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

    fn told(&mut self, times: &wire::CertificateTimes) {
        self.schedule.told(times, Instant::now());
    }

    fn sign_statement(&self, statement: &[u8]) -> Result<(Vec<u8>, Vec<u8>)> {
        let failed = |error: &dyn std::fmt::Display| {
            let why = format!("the key of this node cannot sign: {error}");
            Error::new(Kind::Internal, "N0001", why, "")
        };
        let key = self
            .in_use()
            .credential
            .key_pair()
            .map_err(|error| failed(&error))?;
        let signature = attestation::sign_statement(&key, statement).map_err(|error| failed(&error))?;
        Ok((attestation::public_key(&key), signature))
    }

    fn ask(&mut self, why: &str) {
        tracing::info!(why, "a new certificate is asked for now");
        self.schedule.ask();
    }

    fn recover(&mut self, enrol: Vec<String>) -> BoxFuture<'static, Outcome> {
        let home = self.home.clone();
        let known = |loaded: &Loaded| Known {
            credential: loaded.credential.clone(),
            peer: loaded.peer.clone(),
        };
        let all: Vec<Known> = self.next.iter().chain([&self.current]).map(known).collect();
        async move { recover::recover(&home, &all, &enrol).await }.boxed()
    }

    fn health(&self) -> Health {
        self.health.clone()
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
    let tls = connect::mutual(Arc::clone(&trust), Arc::clone(&identity), None)
        .map_err(|error| bad(error.to_string()))?;
    let quic = quic::mutual(trust, identity, None).map_err(|error| bad(error.to_string()))?;
    Ok(Loaded {
        credential,
        peer,
        tls,
        quic,
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
pub(crate) fn accept(
    old: &Credential,
    key: &KeyPair,
    chain: &[Vec<u8>],
    device_id: &str,
) -> Result<Credential> {
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

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
