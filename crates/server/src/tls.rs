//! The replica's own certificate and the TLS of its listeners.
//!
//! What never lives here: the check of a peer's certificate (`palyra_pki`) and of its revocation (`control`).
//! Invariants: the key of the certificate is made at each start and never written; a certificate is renewed
//! at half its life and handshakes that begin after that show the new one; no DNS name or address decides who
//! anybody is.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use palyra_pki::ca::HostNames;
use palyra_pki::chain::{Usage, verify_chain};
use palyra_pki::tls::{
    ALPN_H2, ALPN_NODE, Clock, EnrolTls, SharedIdentity, SharedTrust, client_verified, server_enrol,
    server_mutual,
};
use palyra_pki::{Authority, IssuedCert, KeyPair, Role, SpiffeId, TrustBundle};
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;

/// How long the replica's certificate lives unless its configuration says otherwise: 30 days.
const VALIDITY: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// The longest and the shortest pause between two looks at the certificate.
const LOOK_MAX: Duration = Duration::from_secs(24 * 3600);
const LOOK_MIN: Duration = Duration::from_millis(500);
/// The longest pause after a renewal that failed.
const RETRY_MAX: Duration = Duration::from_secs(3600);

/// Everything that the listeners, and the connections to other replicas, show and check.
pub(crate) struct Tls {
    issuer: RwLock<Issuer>,
    id: SpiffeId,
    names: HostNames,
    clock: Clock,
    /// What this replica shows, as a server and as a client.
    pub(crate) identity: Arc<SharedIdentity>,
    trust: Arc<SharedTrust>,
    /// The listener for nodes and operators.
    pub(crate) node: Arc<ServerConfig>,
    /// The QUIC listener: the same checks, another protocol.
    pub(crate) quic: Arc<ServerConfig>,
    /// The listener for replicas.
    pub(crate) peers: Arc<ServerConfig>,
    enrol: RwLock<EnrolTls>,
    validity: Duration,
    issued: watch::Sender<IssuedCert>,
}

/// Who issues this replica's certificate, and what stands behind it in a chain.
struct Issuer {
    authority: Arc<Authority>,
    /// The authority's certificates, one for each root that trusts it.
    own: Vec<Vec<u8>>,
    roots: Vec<Vec<u8>>,
}

impl Issuer {
    /// What this replica shows to those who trust a root.
    fn chain(&self, leaf: &[u8]) -> Vec<Vec<u8>> {
        let mut chain = vec![leaf.to_vec()];
        chain.extend(self.own.iter().cloned());
        chain
    }

    fn enrol(&self, fresh: &Fresh, clock: &Clock) -> anyhow::Result<EnrolTls> {
        // Who enrols knows one of the roots by its pin only, and looks for it in the chain.
        let mut chain = self.chain(&fresh.leaf);
        chain.extend(self.roots.iter().cloned());
        Ok(server_enrol(chain, &fresh.key, clock, &[ALPN_H2])?)
    }
}

/// A fresh certificate with its key.
struct Fresh {
    key: KeyPair,
    leaf: Vec<u8>,
    issued: IssuedCert,
}

impl Tls {
    /// Issues the first certificate; refuses an authority that is not of this cluster, over, or for another
    /// id.
    pub(crate) fn new(
        authority: Arc<Authority>,
        trust: TrustBundle,
        replica_id: u64,
        names: HostNames,
    ) -> anyhow::Result<Tls> {
        let own = vec![authority.der().to_vec()];
        Tls::with_certificates(authority, own, trust, replica_id, names, VALIDITY)
    }

    /// [`Tls::new`], for an authority with several certificates, with certificates of its own that live so long.
    pub(crate) fn with_certificates(
        authority: Arc<Authority>,
        own: Vec<Vec<u8>>,
        trust: TrustBundle,
        replica_id: u64,
        names: HostNames,
        validity: Duration,
    ) -> anyhow::Result<Tls> {
        let clock = Clock::new(palyra_platform::wall_ms);
        let id = SpiffeId::replica(trust.trust_domain().clone(), replica_id)?;
        let fresh = issue(&authority, &id, &names, validity)?;
        let issuer = Issuer {
            authority,
            own,
            roots: roots_of(&trust),
        };
        check(&issuer.chain(&fresh.leaf), &trust)?;
        let identity = SharedIdentity::new(issuer.chain(&fresh.leaf), &fresh.key)?;
        let trust = SharedTrust::new(trust);
        let mutual = |roles: &[Role], alpn| {
            let (identity, trust) = (Arc::clone(&identity), Arc::clone(&trust));
            server_mutual(identity, trust, roles, &clock, &[alpn])
        };
        let callers = [Role::Node, Role::Worker, Role::Operator];
        let node = mutual(&callers, ALPN_H2)?;
        let quic = mutual(&callers, ALPN_NODE)?;
        let peers = mutual(&[Role::Replica], ALPN_H2)?;
        let enrol = issuer.enrol(&fresh, &clock)?;
        Ok(Tls {
            issuer: RwLock::new(issuer),
            id,
            names,
            clock,
            identity,
            trust,
            node,
            quic,
            peers,
            enrol: RwLock::new(enrol),
            validity,
            issued: watch::Sender::new(fresh.issued),
        })
    }

    /// Configuration and certificate hash for one connection of the enrol listener.
    pub(crate) fn enrol(&self) -> EnrolTls {
        self.enrol.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// When the certificate that is shown now ends, in milliseconds since the Unix epoch.
    pub(crate) fn not_after_ms(&self) -> u64 {
        self.issued.borrow().not_after_ms
    }

    /// The certificate that is shown now, and each that follows.
    pub(crate) fn shown(&self) -> watch::Receiver<IssuedCert> {
        self.issued.subscribe()
    }

    /// For a connection to another replica, which must be exactly that one.
    pub(crate) fn client_of(&self, replica_id: u64) -> anyhow::Result<Arc<ClientConfig>> {
        let expected = SpiffeId::replica(self.id.trust_domain().clone(), replica_id)?;
        let (trust, identity) = (Arc::clone(&self.trust), Arc::clone(&self.identity));
        Ok(client_verified(
            trust,
            Some(expected),
            Some(identity),
            &self.clock,
            &[ALPN_H2],
        )?)
    }

    /// Puts a fresh certificate in place. On an error the old one stays.
    pub(crate) fn renew(&self) -> anyhow::Result<()> {
        let issuer = self.issuer.read().unwrap_or_else(PoisonError::into_inner);
        self.renew_by(&issuer)
    }

    fn renew_by(&self, issuer: &Issuer) -> anyhow::Result<()> {
        let fresh = issue(&issuer.authority, &self.id, &self.names, self.validity)?;
        let enrol = issuer.enrol(&fresh, &self.clock)?;
        self.identity.replace(issuer.chain(&fresh.leaf), &fresh.key)?;
        *self.enrol.write().unwrap_or_else(PoisonError::into_inner) = enrol;
        self.issued.send_replace(fresh.issued);
        Ok(())
    }

    /// Trusts another bundle, and shows a certificate of this authority, from the next handshake on. On an error
    /// everything stays as it was.
    pub(crate) fn install(
        &self,
        authority: Arc<Authority>,
        own: Vec<Vec<u8>>,
        trust: TrustBundle,
    ) -> anyhow::Result<()> {
        let next = Issuer {
            authority,
            own,
            roots: roots_of(&trust),
        };
        let mut issuer = self.issuer.write().unwrap_or_else(PoisonError::into_inner);
        if next.own != issuer.own || next.roots != issuer.roots {
            let fresh = issue(&next.authority, &self.id, &self.names, self.validity)?;
            check(&next.chain(&fresh.leaf), &trust)?;
            self.renew_by(&next)?;
            tracing::info!(
                roots = next.roots.len(),
                "the listeners show a certificate of another authority or root"
            );
            *issuer = next;
        }
        self.trust.replace(trust);
        Ok(())
    }

    /// The SHA-256 that a machine names when its PIN does not fit: whoever compares the two finds out whether
    /// somebody sits in between.
    fn tell_certificate(&self) {
        let sha256: String = self
            .enrol()
            .end_point
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let not_after_ms = self.not_after_ms();
        tracing::info!(sha256, not_after_ms, "the listeners show this certificate");
    }

    fn left(&self) -> Duration {
        let now = palyra_platform::wall_ms();
        Duration::from_millis(self.not_after_ms().saturating_sub(now))
    }

    /// Renews at half the certificate's life, forever. A failure is logged and tried again an hour later, sooner when
    /// the end is near.
    pub(crate) async fn keep_fresh(&self) {
        self.tell_certificate();
        loop {
            // Short pauses: the machine may sleep, or its clock be set, in between.
            tokio::time::sleep((self.left() / 8).clamp(LOOK_MIN, LOOK_MAX)).await;
            if self.left() > self.validity / 2 {
                continue;
            }
            match self.renew() {
                Ok(()) => self.tell_certificate(),
                Err(error) => {
                    let pause = (self.left() / 8).clamp(LOOK_MIN, RETRY_MAX);
                    tracing::error!(%error, ?pause, "the certificate could not be renewed; it is tried again");
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }
}

fn issue(
    authority: &Authority,
    id: &SpiffeId,
    names: &HostNames,
    validity: Duration,
) -> anyhow::Result<Fresh> {
    let rng = &mut palyra_platform::fill_random;
    let key = KeyPair::generate(rng)?;
    let now = palyra_platform::wall_ms();
    let life = u64::try_from(validity.as_millis())?;
    let issued = authority.issue_from_csr(&key.make_csr()?, id, life, names, now, rng)?;
    Ok(Fresh {
        key,
        leaf: issued.der.clone(),
        issued,
    })
}

fn roots_of(trust: &TrustBundle) -> Vec<Vec<u8>> {
    trust.roots().iter().map(|root| root.to_vec()).collect()
}

/// What this replica is about to show must be good by its own rules.
fn check(chain: &[Vec<u8>], trust: &TrustBundle) -> anyhow::Result<()> {
    let chain: Vec<CertificateDer<'_>> = chain
        .iter()
        .map(|der| CertificateDer::from(der.as_slice()))
        .collect();
    let now = palyra_platform::wall_ms();
    verify_chain(&chain, trust, Usage::Server, &[Role::Replica], now)?;
    Ok(())
}
