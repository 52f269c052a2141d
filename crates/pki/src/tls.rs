//! The `rustls` configurations of every listener and every client, TLS 1.3 only.
//!
//! What never lives here: sockets, and the registry (revocation is checked by fingerprint on each call).
//!
//! Invariants: no session is ever resumed and no early data is taken, because a resumed session skips the
//! check of the certificate; who a peer is comes from its URI name, never from a DNS name or an address;
//! exactly one configuration accepts a server without knowing it, and it is named for the only thing that it
//! may be used for.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error,
    OtherError, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};

use crate::chain::{ChainError, Usage, verify_chain, verify_pinned};
use crate::{KeyPair, PeerIdentity, Role, SpiffeId, TrustBundle, sha256};

/// The protocol that gRPC listeners and clients offer.
pub const ALPN_H2: &[u8] = b"h2";
/// The protocol that QUIC listeners and clients offer: the node plane, version 1.
pub const ALPN_NODE: &[u8] = b"palyra-node/1";

/// The one crypto provider, aws-lc-rs. Nothing is installed process-wide.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| Arc::new(aws_lc_rs::default_provider())))
}

/// Where the handshakes read the time: milliseconds since the Unix epoch.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> u64 + Send + Sync>);

impl Clock {
    /// Wraps a function that answers milliseconds since the Unix epoch.
    pub fn new(now_ms: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(now_ms))
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_millis((self.0)())))
    }
}

/// A certificate chain and key that can be exchanged while listeners and clients use them. A handshake takes
/// what is current when it begins.
#[derive(Debug)]
pub struct SharedIdentity(RwLock<Arc<CertifiedKey>>);

impl SharedIdentity {
    /// Takes a chain (DER, leaf first) and the leaf's key. Refuses an empty chain and a key of another
    /// certificate.
    pub fn new(chain: Vec<Vec<u8>>, key: &KeyPair) -> Result<Arc<Self>, ChainError> {
        Ok(Arc::new(Self(RwLock::new(certified(chain, key)?))))
    }

    /// Puts another chain and key in place, for handshakes that begin from now on. Same refusals as
    /// [`SharedIdentity::new`]; on an error the old ones stay.
    pub fn replace(&self, chain: Vec<Vec<u8>>, key: &KeyPair) -> Result<(), ChainError> {
        let next = certified(chain, key)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(())
    }

    /// The current leaf, DER.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.current().cert[0].clone()
    }

    fn current(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ResolvesServerCert for SharedIdentity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl ResolvesClientCert for SharedIdentity {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// A trust bundle that can be exchanged while listeners and clients use it.
#[derive(Debug)]
pub struct SharedTrust(RwLock<TrustBundle>);

impl SharedTrust {
    /// Starts with a bundle.
    pub fn new(bundle: TrustBundle) -> Arc<Self> {
        Arc::new(Self(RwLock::new(bundle)))
    }

    /// Puts another bundle in place, for handshakes that begin from now on.
    pub fn replace(&self, bundle: TrustBundle) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = bundle;
    }

    /// The current bundle.
    pub fn current(&self) -> TrustBundle {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What the enrol listener needs for one accepted connection: the configuration, and the hash of the
/// certificate that it presents. Both belong together: take a fresh pair for each connection, and the hash of
/// that pair goes into the transcripts of what happens on it, even when the certificate is renewed meanwhile.
#[derive(Debug, Clone)]
pub struct EnrolTls {
    /// Server without client authentication.
    pub config: Arc<ServerConfig>,
    /// `tls-server-end-point` of the certificate in `config`.
    pub end_point: [u8; 32],
}

/// The channel binding `tls-server-end-point` (RFC 5929) of a server's certificate. All certificates of a
/// cluster are signed with ECDSA and SHA-256, for which the RFC prescribes SHA-256 over the DER.
pub fn server_end_point(certificate_der: &[u8]) -> [u8; 32] {
    sha256(certificate_der)
}

/// A server that demands a certificate of the cluster, of one of `roles`.
pub fn server_mutual(
    identity: Arc<SharedIdentity>,
    trust: Arc<SharedTrust>,
    roles: &[Role],
    clock: &Clock,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, ChainError> {
    let verifier = ClusterClients {
        trust,
        roles: roles.to_vec(),
    };
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])
        .map_err(refused)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(identity);
    finish_server(&mut config, alpn);
    Ok(Arc::new(config))
}

/// A server that asks for no certificate: the enrol listener. `chain` is leaf, authority if there is one, and
/// root, so that a client that knows only the root's pin finds the root in it.
pub fn server_enrol(
    chain: Vec<Vec<u8>>,
    key: &KeyPair,
    clock: &Clock,
    alpn: &[&[u8]],
) -> Result<EnrolTls, ChainError> {
    let identity = SharedIdentity::new(chain, key)?;
    let end_point = server_end_point(&identity.certificate());
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])
        .map_err(refused)?
        .with_no_client_auth()
        .with_cert_resolver(identity);
    finish_server(&mut config, alpn);
    Ok(EnrolTls {
        config: Arc::new(config),
        end_point,
    })
}

/// A client of a replica: the server's chain must end in the trust bundle and name a replica, and exactly
/// `expected` when that is given. DNS names are not looked at. `identity` is what the client presents.
pub fn client_verified(
    trust: Arc<SharedTrust>,
    expected: Option<SpiffeId>,
    identity: Option<Arc<SharedIdentity>>,
    clock: &Clock,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, ChainError> {
    let check = Check::Trust {
        trust,
        expected,
        seen: None,
    };
    client(check, identity, clock, alpn)
}

/// As [`client_verified`], for any replica, with nothing to present; the server's certificate is then in `seen`.
pub fn client_verified_recording(
    trust: Arc<SharedTrust>,
    seen: Arc<SeenServer>,
    clock: &Clock,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, ChainError> {
    let check = Check::Trust {
        trust,
        expected: None,
        seen: Some(seen),
    };
    client(check, None, clock, alpn)
}

/// A client that knows a cluster only by the pin in a ticket or join token: the server's chain must contain
/// and end in a root whose public key info has that SHA-256, and name a replica. The root is then in `seen`.
pub fn client_pinned(
    pin: [u8; 32],
    cluster_id: &str,
    seen: Arc<SeenServer>,
    clock: &Clock,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, ChainError> {
    client(
        Check::Pin {
            pin,
            cluster_id: cluster_id.to_owned(),
            seen,
        },
        None,
        clock,
        alpn,
    )
}

/// A client that accepts ANY server and records its certificate. Only for PIN pairing, where the PAKE and the
/// proofs over a transcript that holds the recorded certificate's hash decide whom one talked to. Nothing
/// that such a connection says may be believed before [`crate::transcript::Transcript::check_server_proof`]
/// agrees.
pub fn client_unverified_for_pin_pairing(
    seen: Arc<SeenServer>,
    clock: &Clock,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, ChainError> {
    client(Check::RecordOnly { seen }, None, clock, alpn)
}

/// What a pinned or recording client learned about its server. One per pairing: once a server was seen, a
/// handshake that shows another certificate fails, so that all messages of a pairing go to one server.
#[derive(Debug, Default)]
pub struct SeenServer(Mutex<Option<Seen>>);

#[derive(Debug, Clone)]
struct Seen {
    certificate: CertificateDer<'static>,
    verified: Option<(PeerIdentity, CertificateDer<'static>)>,
}

impl SeenServer {
    /// Nothing seen yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// `tls-server-end-point` of the server's certificate; nothing before the first handshake.
    pub fn end_point(&self) -> Option<[u8; 32]> {
        self.lock()
            .as_ref()
            .map(|seen| server_end_point(&seen.certificate))
    }

    /// Who the server is and the pinned root; nothing unless a pinned client verified it.
    pub fn verified(&self) -> Option<(PeerIdentity, CertificateDer<'static>)> {
        self.lock().as_ref().and_then(|seen| seen.verified.clone())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, next: Seen) -> Result<(), ChainError> {
        let mut slot = self.lock();
        match slot.as_ref() {
            Some(first) if first.certificate != next.certificate => Err(ChainError::Other(
                "the server showed another certificate in the middle of a pairing".to_owned(),
            )),
            _ => {
                *slot = Some(next);
                Ok(())
            }
        }
    }
}

/// The reason inside a failed handshake, when this side refused the peer's certificate.
pub fn chain_error(error: &Error) -> Option<&ChainError> {
    match error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => inner.downcast_ref(),
        _ => None,
    }
}

/// What it means for a client when the server ended the connection with an alert about the client's
/// certificate.
pub fn explain_alert(error: &Error) -> Option<&'static str> {
    match error {
        Error::AlertReceived(AlertDescription::UnknownCA) => {
            Some("the server does not know who issued this certificate: it is of another cluster")
        }
        Error::AlertReceived(AlertDescription::CertificateExpired) => {
            Some("the server says that this certificate is over, or not valid yet by its clock")
        }
        Error::AlertReceived(AlertDescription::AccessDenied) => {
            Some("the server does not accept certificates of this role on this port")
        }
        Error::AlertReceived(AlertDescription::CertificateRequired) => Some("the server wants a certificate"),
        Error::AlertReceived(AlertDescription::BadCertificate | AlertDescription::UnsupportedCertificate) => {
            Some("the server can't use this certificate")
        }
        _ => None,
    }
}

fn certified(chain: Vec<Vec<u8>>, key: &KeyPair) -> Result<Arc<CertifiedKey>, ChainError> {
    let Some(leaf) = chain.first() else {
        return Err(ChainError::Length(0));
    };
    if crate::identity::spki_sha256(leaf)? != key.spki_sha256() {
        return Err(ChainError::Other(
            "the private key does not belong to the certificate".to_owned(),
        ));
    }
    let secret = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_pkcs8().as_slice()));
    let signer = aws_lc_rs::sign::any_ecdsa_type(&secret).map_err(refused)?;
    Ok(Arc::new(CertifiedKey::new(
        chain.into_iter().map(CertificateDer::from).collect(),
        signer,
    )))
}

fn finish_server(config: &mut ServerConfig, alpn: &[&[u8]]) {
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
}

fn client(
    check: Check,
    identity: Option<Arc<SharedIdentity>>,
    clock: &Clock,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, ChainError> {
    let builder = ClientConfig::builder_with_details(provider(), Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])
        .map_err(refused)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ClusterServers(check)));
    let mut config = match identity {
        Some(identity) => builder.with_client_cert_resolver(identity),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(Arc::new(config))
}

fn refused(error: Error) -> ChainError {
    ChainError::Other(error.to_string())
}

fn whole_chain(leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Vec<CertificateDer<'static>> {
    std::iter::once(leaf)
        .chain(rest)
        .map(|certificate| certificate.clone().into_owned())
        .collect()
}

fn millis(now: UnixTime) -> u64 {
    now.as_secs().saturating_mul(1000)
}

fn check_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    verify_tls13_signature(
        message,
        certificate,
        signed,
        &provider().signature_verification_algorithms,
    )
}

fn no_tls12() -> Error {
    Error::General("TLS 1.2 is not spoken here".to_owned())
}

/// Accepts clients of the cluster, of some roles.
#[derive(Debug)]
struct ClusterClients {
    trust: Arc<SharedTrust>,
    roles: Vec<Role>,
}

impl ClientCertVerifier for ClusterClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let chain = whole_chain(end_entity, intermediates);
        verify_chain(
            &chain,
            &self.trust.current(),
            Usage::Client,
            &self.roles,
            millis(now),
        )
        .map(|_| ClientCertVerified::assertion())
        .map_err(|error| Error::InvalidCertificate(alert_of(&error)))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

/// The alert is all that a refused client sees, so each cause keeps its own.
fn alert_of(error: &ChainError) -> CertificateError {
    match error {
        ChainError::UnknownIssuer { .. } | ChainError::PinMismatch => CertificateError::UnknownIssuer,
        ChainError::Expired { .. } => CertificateError::Expired,
        ChainError::NotYetValid { .. } => CertificateError::NotValidYet,
        ChainError::WrongUsage => CertificateError::InvalidPurpose,
        ChainError::WrongRole { .. } | ChainError::WrongDomain { .. } | ChainError::WrongIdentity { .. } => {
            CertificateError::ApplicationVerificationFailure
        }
        ChainError::Length(_) | ChainError::Identity(_) | ChainError::Bundle(_) | ChainError::Other(_) => {
            CertificateError::Other(OtherError(Arc::new(error.clone())))
        }
    }
}

/// How a client decides about a server.
#[derive(Debug)]
enum Check {
    Trust {
        trust: Arc<SharedTrust>,
        expected: Option<SpiffeId>,
        seen: Option<Arc<SeenServer>>,
    },
    Pin {
        pin: [u8; 32],
        cluster_id: String,
        seen: Arc<SeenServer>,
    },
    RecordOnly {
        seen: Arc<SeenServer>,
    },
}

impl Check {
    fn run(&self, chain: &[CertificateDer<'static>], now_ms: u64) -> Result<(), ChainError> {
        match self {
            Self::Trust {
                trust,
                expected,
                seen,
            } => {
                let peer = verify_chain(chain, &trust.current(), Usage::Server, &[Role::Replica], now_ms)?;
                match expected {
                    Some(wanted) if *wanted != peer.id => Err(ChainError::WrongIdentity {
                        found: peer.id.to_string(),
                        expected: wanted.to_string(),
                    }),
                    _ => seen.as_ref().map_or(Ok(()), |seen| {
                        seen.record(Seen {
                            certificate: chain[0].clone(),
                            verified: None,
                        })
                    }),
                }
            }
            Self::Pin {
                pin,
                cluster_id,
                seen,
            } => {
                let verified = verify_pinned(chain, pin, cluster_id, now_ms)?;
                seen.record(Seen {
                    certificate: chain[0].clone(),
                    verified: Some(verified),
                })
            }
            Self::RecordOnly { seen } => seen.record(Seen {
                certificate: chain[0].clone(),
                verified: None,
            }),
        }
    }
}

#[derive(Debug)]
struct ClusterServers(Check);

impl ServerCertVerifier for ClusterServers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.0
            .run(&whole_chain(end_entity, intermediates), millis(now))
            .map(|()| ServerCertVerified::assertion())
            .map_err(|error| Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error)))))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}
