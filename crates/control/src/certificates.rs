//! The life of certificates: renewal, recovery after the end, rotation by operators, copies that were found, and
//! operators' own.
//!
//! What never lives here: who is a copy (`apply` decides, at the entry's place in the log) and the making of keys.
//! Invariants: a certificate is committed before it is handed out; nobody without a valid signature by the key of a
//! recorded certificate makes a recovery reach the log; the same request, sent again, is answered the same.

use std::time::Duration;

use bytes::Bytes;
use palyra_pki::{IssuedCert, Recovery, Role as CertificateRole, TrustBundle, sha256};
use palyra_platform as platform;
use palyra_state::access;
use palyra_state::cluster::{self, AnnounceCertificate};
use palyra_state::identity::{
    self, Certificate, CertificateKind, CertificatePolicy, ClearClone, ConfirmCertificate, RecoverDevice,
    RenewCertificate, RenewOperatorCertificate, RevokeOperatorCertificate, RotateDevice, SetPolicy,
};
use palyra_state::reply::RenewalOutcome;
use palyra_state::{Code, Fingerprint, Id, Read, Reject, Reply};

use crate::access::Added;
use crate::caller::{Caller, EnrolSource};
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo, Written};
use crate::devices::DeviceView;
use crate::error::{Error, Refusal};
use crate::limits::{DISPATCH_WAIT_MAX, OPERATOR_TTL_MAX_MS};
use crate::outbox::Waiting;
use crate::pairing::enrol::csr_key;
use crate::pairing::exchange::{self, Stage, exactly_32};
use crate::pairing::requests::chain_of;
use crate::registry::Entry;
use crate::selector::parse_exact_id;

/// What a node asks when it renews.
#[derive(Debug, Clone, Default)]
pub struct Renewal {
    /// A ULID, the same for each try; empty for a fresh one.
    pub request_id: String,
    /// The CSR, DER.
    pub csr: Bytes,
    /// One more than the counter that the node holds.
    pub counter: u64,
    /// The connection that it came on, from [`crate::ConnectionGuard::id`]; 0 when that is not known.
    pub connection: u64,
}

/// The times of a certificate, by this replica's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CertificateTimes {
    /// Until half of its life is over.
    pub renew_in: Duration,
    /// Until its end.
    pub expires_in: Duration,
    /// From its issue to its end.
    pub life: Duration,
}

/// What a renewal or recovery brings.
#[derive(Debug, Clone)]
pub struct Renewed {
    /// Certificate and issuer, DER, leaf first, without the root.
    pub chain: Vec<Vec<u8>>,
    /// The device's counter from now on.
    pub counter: u64,
    /// The certificate's times.
    pub times: CertificateTimes,
    /// What to trust.
    pub trust: TrustBundle,
    /// The entry.
    pub write: WriteInfo,
}

/// A node's request for a certificate after its own ran out.
#[derive(Debug, Clone)]
pub struct RecoverRequest {
    /// The device.
    pub device_id: String,
    /// SHA-256 of the certificate whose key signs.
    pub certificate_sha256: Bytes,
    /// The CSR, DER, of a fresh key.
    pub csr: Bytes,
    /// One more than the counter that the node holds.
    pub counter: u64,
    /// 32 random bytes of the node's.
    pub node_nonce: Bytes,
    /// From [`crate::Hello`].
    pub server_nonce: Bytes,
    /// Over all of it.
    pub signature: Bytes,
}

/// How far a rotation has come.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotated {
    /// The device.
    pub device: DeviceView,
    /// An earlier request is open; this one changed nothing.
    pub already: bool,
    /// The entry.
    pub write: WriteInfo,
}

impl Control {
    /// Signs and records a node's next certificate; the present one works until the next is first used.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad CSR, and what the state machine refuses: above all a device that is suspected to
    /// be two machines.
    pub async fn renew(&self, caller: &Caller, renewal: Renewal) -> Result<Renewed, Error> {
        let Caller::Node { device_id, .. } = caller else {
            return Err(Error::Internal(format!(
                "{:?} renews like a node",
                caller.actor()
            )));
        };
        let request_id = self.request_id(&renewal.request_id)?;
        let command = RenewCertificate {
            device_id: *device_id,
            certificate: self.sign_node(&renewal.csr, *device_id)?,
            counter: renewal.counter,
            source: self.address_of(renewal.connection),
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        self.renewed(*device_id, written).await
    }

    /// The address at the other end of a connection, without its port.
    fn address_of(&self, connection: u64) -> String {
        let source = self.connections().source(connection).unwrap_or_default();
        let host = source.rsplit_once(':').map_or(source.as_str(), |(host, _)| host);
        host.trim_matches(['[', ']']).to_owned()
    }

    /// What became of a renewal or recovery.
    async fn renewed(&self, device_id: Id, written: Written) -> Result<Renewed, Error> {
        let Reply::Renewed(reply) = written.reply else {
            return Err(self.odd_reply("a renewal"));
        };
        self.applied(written.receipt).await?;
        let view = self.replica().view();
        if reply.outcome() == RenewalOutcome::CloneSuspected {
            tracing::warn!(device = %device_id, "two machines seem to have this device's folder");
            return Err(clone_suspected(&view, device_id).into());
        }
        let recorded = identity::certificate_by_fingerprint(&view, reply.fingerprint)
            .ok_or_else(|| Error::Internal(format!("{} is not recorded", reply.fingerprint)))?;
        let chain = chain_of(&view, recorded.fingerprint)?;
        // After the work too: a replica that was cut off meanwhile may have missed a revocation.
        self.fresh_after(written.receipt)?;
        Ok(Renewed {
            chain,
            counter: reply.counter,
            times: self.times_of(&view, &recorded),
            trust: self.trust_bundle()?,
            write: written.info,
        })
    }

    /// A certificate's times by this replica's clock.
    fn times_of(&self, view: &dyn Read, certificate: &Certificate) -> CertificateTimes {
        let now = self.now_ms(view);
        let life = certificate.not_after.saturating_sub(certificate.issued_at);
        let renew_at = certificate.issued_at + life / 2;
        CertificateTimes {
            renew_in: Duration::from_millis(renew_at.saturating_sub(now)),
            expires_in: Duration::from_millis(certificate.not_after.saturating_sub(now)),
            life: Duration::from_millis(life),
        }
    }

    /// The times of the certificate that a session was attached with.
    pub(crate) fn session_times(&self, entry: &Entry) -> Option<CertificateTimes> {
        let view = self.replica().view();
        let shown = Fingerprint::from_bytes(entry.peer.fingerprint);
        let certificate = identity::certificate_by_fingerprint(&view, shown)?;
        Some(self.times_of(&view, &certificate))
    }

    /// A new certificate for a node whose own ran out, after [`Control::hello`] on the same connection.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is malformed, [`Refusal::UnknownNonce`], and the refusals: no such certificate, a
    /// signature that does not hold, revoked, out of the window, suspected to be two machines.
    pub async fn recover(&self, source: &EnrolSource, request: RecoverRequest) -> Result<Renewed, Error> {
        self.check_fresh()?;
        let device_id = parse_exact_id("device_id", &request.device_id)?;
        let shown = exactly_32("certificate_sha256", &request.certificate_sha256)?;
        let node_nonce = exactly_32("node_nonce", &request.node_nonce)?;
        let server_nonce = exactly_32("server_nonce", &request.server_nonce)?;
        csr_key(&request.csr)?;
        if !matches!(self.exchanges().take(&server_nonce, source), Some(Stage::Nonce)) {
            return Err(exchange::unknown(true));
        }
        let certificate = self.shown_certificate(device_id, shown).await?;
        let cluster_id = self.cluster_id().to_string();
        let recovery = Recovery {
            cluster_id: &cluster_id,
            device_id: &request.device_id,
            certificate: shown,
            server_end_point: source.end_point,
            csr_sha256: sha256(&request.csr),
            node_nonce,
            server_nonce,
            counter: request.counter,
        };
        if !recovery.check(&certificate.der, &request.signature) {
            let cause = "the signature is not by the key of that certificate over this exchange";
            return Err(Reject::new(Code::RecoveryProof, [&device_id, &cause]).into());
        }
        let command = RecoverDevice {
            device_id,
            certificate: self.sign_node(&request.csr, device_id)?,
            counter: request.counter,
            source: source.address.clone(),
            shown: certificate.fingerprint,
        };
        let written = self.propose(self.fresh_id(), self.as_replica(), command).await?;
        self.renewed(device_id, written).await
    }

    /// The recorded certificate of a device that a recovery is signed with.
    async fn shown_certificate(&self, device_id: Id, shown: [u8; 32]) -> Result<Certificate, Error> {
        let shown = Fingerprint::from_bytes(shown);
        let find = |view: &dyn Read| {
            identity::certificate_by_fingerprint(view, shown).filter(|found| {
                found.kind() == CertificateKind::Node && found.subject == device_id.to_string()
            })
        };
        if let Some(found) = find(&self.replica().view()) {
            return Ok(found);
        }
        // It may have been issued a moment ago, at another replica.
        self.barrier().await?;
        find(&self.replica().view()).ok_or_else(|| Reject::new(Code::CertificateUnknown, [&shown]).into())
    }

    /// Asks a device to change its certificate, and waits (not at all unless asked, five minutes at most) until the
    /// new one is in use.
    ///
    /// # Errors
    /// What the state machine refuses: no such device, a revoked one, a deadline out of bounds.
    pub async fn rotate_device(
        &self,
        caller: &Caller,
        request_id: &str,
        device: &str,
        (reason, deadline_ms): (&str, u64),
        wait_ms: u64,
    ) -> Result<Rotated, Error> {
        let request_id = self.request_id(request_id)?;
        let device_id = self.resolve_device(device).await?;
        let command = RotateDevice {
            device_id,
            reason: reason.to_owned(),
            deadline_ms,
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        let Reply::RotationRequested(requested) = written.reply else {
            return Err(self.odd_reply("identity.rotate_device"));
        };
        self.applied(written.receipt).await?;
        let wait = Duration::from_millis(wait_ms).min(DISPATCH_WAIT_MAX);
        // Whether it was in use in time, the answer shows.
        let _ = platform::timeout(wait, self.rotation_used(device_id, requested.index)).await;
        let (device, _) = self
            .get_device(
                ReadOptions {
                    local: true,
                    min_index: 0,
                },
                &device_id.to_string(),
            )
            .await?;
        Ok(Rotated {
            device,
            already: requested.already,
            write: written.info,
        })
    }

    /// Returns when the rotation that was asked for at `index` is in use, or asked for no more.
    async fn rotation_used(&self, device_id: Id, index: u64) {
        let mut applied = self.replica().applied();
        loop {
            applied.borrow_and_update();
            let open = identity::device(&self.replica().view(), device_id)
                .and_then(|device| device.rotation)
                .is_some_and(|rotation| rotation.index == index && rotation.used_at == 0);
            if !open || applied.changed().await.is_err() {
                return;
            }
        }
    }

    /// Tells a session that an operator wants its node to change its certificate, if one does.
    pub(crate) fn tell_rotation(&self, entry: &Entry, view: &dyn Read) {
        let wanted = identity::device(view, entry.device_id)
            .and_then(|device| device.rotation)
            .filter(identity::Rotation::is_wanted);
        if let Some(rotation) = wanted
            && entry.epoch() != 0
        {
            // A box that is full ends its session at the next message; the next attach tells it again.
            entry.outbox.put(Waiting::Rotate {
                index: rotation.index,
                reason: rotation.reason,
                deadline_at_ms: rotation.deadline_at,
            });
        }
    }

    /// Says that a device that is suspected to be two machines is one.
    ///
    /// # Errors
    /// What the state machine refuses: no such device, nothing to clear.
    pub async fn clear_clone(
        &self,
        caller: &Caller,
        request_id: &str,
        device: &str,
        reason: &str,
    ) -> Result<WriteInfo, Error> {
        let request_id = self.request_id(request_id)?;
        let command = ClearClone {
            device_id: self.resolve_device(device).await?,
            reason: reason.to_owned(),
        };
        Ok(self.propose(request_id, caller.actor(), command).await?.info)
    }

    /// What the whole cluster holds certificates to.
    ///
    /// # Errors
    /// What a read can say.
    pub async fn certificate_policy(
        &self,
        read: ReadOptions,
    ) -> Result<(CertificatePolicy, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        Ok((identity::policy(&view), info))
    }

    /// Sets how long after the end of its certificate a device may recover by itself.
    ///
    /// # Errors
    /// What the state machine refuses: more than a year.
    pub async fn set_certificate_policy(
        &self,
        caller: &Caller,
        request_id: &str,
        recovery_ms: u64,
    ) -> Result<WriteInfo, Error> {
        let request_id = self.request_id(request_id)?;
        let command = SetPolicy { recovery_ms };
        Ok(self.propose(request_id, caller.actor(), command).await?.info)
    }

    /// Signs and records the caller's own next certificate, as an operator; the present one works until the next is
    /// first used. `ttl_ms` may be 0 for as long a life as the present one's.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad CSR or life, and what the state machine refuses.
    pub async fn renew_operator(
        &self,
        caller: &Caller,
        request_id: &str,
        csr: &[u8],
        ttl_ms: u64,
    ) -> Result<Added, Error> {
        let Caller::Operator {
            name, fingerprint, ..
        } = caller
        else {
            return Err(Error::Internal(format!(
                "{:?} renews like an operator",
                caller.actor()
            )));
        };
        let request_id = self.request_id(request_id)?;
        let present = identity::certificate_by_fingerprint(&self.replica().view(), *fingerprint);
        let life = present.map_or(0, |found| found.not_after.saturating_sub(found.issued_at));
        let ttl_ms = if ttl_ms == 0 { life } else { ttl_ms };
        if ttl_ms == 0 || ttl_ms > OPERATOR_TTL_MAX_MS {
            return Err(Error::invalid(
                "ttl_ms",
                format!("{ttl_ms} ms"),
                "ask for at most a year",
            ));
        }
        let certificate = self.sign(csr, CertificateRole::Operator, name, ttl_ms)?;
        let (spki, signed) = (certificate.spki, certificate.fingerprint());
        let command = RenewOperatorCertificate {
            name: name.clone(),
            certificate,
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        self.applied(written.receipt).await?;
        let view = self.replica().view();
        // A retry signed a second certificate that nobody recorded; the first one's key is the same.
        let recorded = identity::certificate_by_fingerprint(&view, signed).or_else(|| {
            identity::certificates_of(&view, CertificateKind::Operator, name)
                .into_iter()
                .rfind(|found| found.spki == spki)
        });
        let recorded = recorded.ok_or_else(|| {
            let next = "renew again under a new request id";
            Error::invalid("request_id", "it renewed another key's certificate before", next)
        })?;
        let trust = self.trust_bundle()?;
        Ok(Added {
            chain: chain_of(&view, recorded.fingerprint)?,
            roots: trust.roots().iter().map(|root| root.to_vec()).collect(),
            write: written.info,
        })
    }

    /// Uses the caller's certificate, and does nothing else: the ones before it end.
    ///
    /// # Errors
    /// What the state machine refuses.
    pub async fn confirm_certificate(&self, caller: &Caller, request_id: &str) -> Result<WriteInfo, Error> {
        let request_id = self.request_id(request_id)?;
        let written = self
            .propose(request_id, caller.actor(), ConfirmCertificate {})
            .await?;
        Ok(written.info)
    }

    /// Revokes one certificate of an operator, by its fingerprint or the beginning of it.
    ///
    /// # Errors
    /// [`Refusal::NotFound`] or [`Refusal::Ambiguous`], and what the state machine refuses: the last one of the last
    /// admin.
    pub async fn revoke_operator_certificate(
        &self,
        caller: &Caller,
        request_id: &str,
        fingerprint: &str,
        reason: &str,
    ) -> Result<WriteInfo, Error> {
        let request_id = self.request_id(request_id)?;
        self.barrier().await?;
        let command = RevokeOperatorCertificate {
            fingerprint: operator_certificate(&self.replica().view(), fingerprint)?,
            reason: reason.to_owned(),
        };
        Ok(self.propose(request_id, caller.actor(), command).await?.info)
    }

    /// Records which certificate this replica shows, unless the state has it already. Whether nothing is left to do:
    /// a replica that is no member yet has nothing to say.
    ///
    /// # Errors
    /// What the state machine refuses, and [`Error::Unavailable`] without a leader: say it again.
    pub async fn announce_certificate(&self, issued: &IssuedCert) -> Result<bool, Error> {
        let id = self.replica_id();
        let record = cluster::replica(&self.replica().view(), id).filter(cluster::Replica::is_member);
        let Some(record) = record else {
            return Ok(false);
        };
        let certificate = Fingerprint::from_bytes(issued.fingerprint);
        if (record.certificate, record.certificate_not_after) == (certificate, issued.not_after_ms) {
            return Ok(true);
        }
        let command = AnnounceCertificate {
            replica_id: id,
            certificate,
            not_after: issued.not_after_ms,
        };
        self.propose(self.fresh_id(), self.as_replica(), command).await?;
        Ok(true)
    }
}

/// The operators' certificate that a fingerprint, or the beginning of one, names.
fn operator_certificate(view: &dyn Read, given: &str) -> Result<Fingerprint, Error> {
    let given = given.to_ascii_lowercase();
    if given.len() < 8 || !given.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Error::invalid(
            "fingerprint",
            format!("{:?}", given.chars().take(64).collect::<String>()),
            "give at least 8 hexadecimal digits: palyra operator show NAME",
        ));
    }
    let mut found: Vec<Fingerprint> = access::operators(view)
        .iter()
        .flat_map(|operator| identity::certificates_of(view, CertificateKind::Operator, &operator.name))
        .map(|certificate| certificate.fingerprint)
        .filter(|fingerprint| fingerprint.to_string().starts_with(&given))
        .collect();
    match (found.pop(), found.len()) {
        (Some(only), 0) => Ok(only),
        (None, _) => Err(Error::not_found("operator's certificate", &given)),
        (Some(last), _) => Err(Refusal::Ambiguous {
            kind: "operator's certificate",
            selector: given,
            matches: found.iter().chain([&last]).map(ToString::to_string).collect(),
        }
        .into()),
    }
}

/// Why a device is refused that is suspected to be two machines.
fn clone_suspected(view: &dyn Read, device_id: Id) -> Reject {
    let suspicion = identity::device(view, device_id).and_then(|device| device.suspicion);
    let cause = suspicion.map_or_else(
        || "the counter was used before".to_owned(),
        |found| {
            format!(
                "a {} from {} came with counter {}, and {} had been taken from {}",
                found.how,
                or_unknown(&found.refused_from),
                found.shown_counter,
                found.counter,
                or_unknown(&found.taken_from)
            )
        },
    );
    Reject::new(Code::CloneSuspected, [&device_id, &cause])
}

fn or_unknown(address: &str) -> &str {
    if address.is_empty() {
        "an unknown address"
    } else {
        address
    }
}
