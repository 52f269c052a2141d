//! Admission: who calls, decided anew on each call and on each message of a stream.
//!
//! What never lives here: TLS (the listener has verified the chain) and what a caller may do to a certain
//! thing (`apply` decides that, at the entry's place in the log). Invariants: nobody is admitted by the
//! certificate alone: the registry must know its fingerprint, and neither it nor its holder may be revoked;
//! no node is admitted by a replica that may have missed a revocation.

use palyra_pki::{PeerIdentity, Role as CertificateRole};
use palyra_platform as platform;
use palyra_state::access::{self, OperatorStatus, Role};
use palyra_state::identity::{self, Certificate, CertificateKind, CertificateStatus, DeviceStatus};

use palyra_state::{Actor, Code, Fingerprint, Id, Read, Reject};

use crate::control::Control;
use crate::error::{Error, Refusal};
use crate::outbox::End;

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// A person or tool with an operator's certificate.
    Operator {
        /// Its name.
        name: String,
        /// Its role, as the registry has it.
        role: Role,
        /// The certificate that was shown.
        fingerprint: Fingerprint,
    },
    /// A paired node.
    Node {
        /// Its device id, as in the certificate.
        device_id: Id,
        /// The certificate that was shown.
        fingerprint: Fingerprint,
    },
    /// Somebody on the enrol listener, who has shown nothing yet.
    Enrol(EnrolSource),
    /// Another replica.
    Peer(u64),
}

/// Where an enrolling machine is, as the enrol listener sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnrolSource {
    /// Names the TLS connection, uniquely on this replica; half-done exchanges are bound to it.
    pub connection: u64,
    /// The machine's address, without the port.
    pub address: String,
    /// `tls-server-end-point` of the certificate that the listener showed on this connection.
    pub end_point: [u8; 32],
}

impl Caller {
    /// The actor that goes into the log.
    #[must_use]
    pub fn actor(&self) -> Actor {
        match self {
            Caller::Operator {
                name, fingerprint, ..
            } => Actor::Operator {
                name: name.clone(),
                fingerprint: *fingerprint,
            },
            Caller::Node {
                device_id,
                fingerprint,
            } => Actor::Node {
                device_id: *device_id,
                fingerprint: *fingerprint,
            },
            Caller::Enrol(source) => Actor::Anonymous {
                source: source.address.clone(),
            },
            Caller::Peer(id) => Actor::Replica { id: *id },
        }
    }
}

impl Control {
    /// Admits an operator whose role is at least `needed`.
    ///
    /// # Errors
    /// [`Error::Refused`] or [`Error::Rejected`] with the reason; [`Error::Stale`] when this replica may have
    /// missed a revocation.
    pub fn admit_operator(&self, peer: &PeerIdentity, needed: Role) -> Result<Caller, Error> {
        self.check_fresh()?;
        self.operator_of(peer, needed)
    }

    /// Admits an operator for what must also work without a quorum: to see where the cluster stands.
    ///
    /// # Errors
    /// As [`Control::admit_operator`], save [`Error::Stale`].
    pub fn admit_operator_local(&self, peer: &PeerIdentity) -> Result<Caller, Error> {
        self.operator_of(peer, Role::Viewer)
    }

    /// Admits a node.
    ///
    /// # Errors
    /// As [`Control::admit_operator`].
    pub fn admit_node(&self, peer: &PeerIdentity) -> Result<Caller, Error> {
        self.check_fresh()?;
        let device_id = self.node_of(peer, &self.replica().view())?;
        Ok(Caller::Node {
            device_id,
            fingerprint: fingerprint(peer),
        })
    }

    /// Admits a node whose message names a device: it must be the certificate's.
    ///
    /// # Errors
    /// As [`Control::admit_node`]; [`Error::Invalid`] when the text is no ULID; [`Error::Rejected`] when it
    /// is another device's.
    pub fn admit_node_as(&self, peer: &PeerIdentity, claimed: &str) -> Result<Caller, Error> {
        let caller = self.admit_node(peer)?;
        let claimed_id = crate::selector::parse_id("device_id", claimed)?;
        match &caller {
            Caller::Node { device_id, .. } if *device_id == claimed_id => Ok(caller),
            _ => Err(Reject::new(
                Code::NotYours,
                [&format!("node/{}", peer.id.id()), &format!("node/{claimed}")],
            )
            .into()),
        }
    }

    /// Whether this replica has heard from a quorum lately enough to serve nodes.
    ///
    /// # Errors
    /// [`Error::Stale`].
    pub fn check_fresh(&self) -> Result<(), Error> {
        let age = self.quorum_age();
        // Planted: what this replica knew once is good for ever.
        if age > self.staleness() && !palyra_fault::planted("stale-serves-on") {
            return Err(Error::Stale { age_ms: millis(age) });
        }
        Ok(())
    }

    fn operator_of(&self, peer: &PeerIdentity, needed: Role) -> Result<Caller, Error> {
        let view = self.replica().view();
        let certificate = self.certificate_of(peer, CertificateRole::Operator, &view)?;
        let operator = access::operator(&view, &certificate.subject)
            .ok_or_else(|| Reject::new(Code::NoSuchOperator, [&certificate.subject]))?;
        if operator.status() != OperatorStatus::Active {
            return Err(Reject::new(Code::OperatorRemoved, [&operator.name]).into());
        }
        let role = operator.role();
        if role < needed {
            let who = format!("operator/{}", operator.name);
            return Err(Reject::new(Code::RoleTooLow, [&who, &role.as_str(), &needed.as_str()]).into());
        }
        Ok(Caller::Operator {
            name: operator.name,
            role,
            fingerprint: fingerprint(peer),
        })
    }

    fn node_of(&self, peer: &PeerIdentity, view: &dyn Read) -> Result<Id, Error> {
        let certificate = self.certificate_of(peer, CertificateRole::Node, view)?;
        let device_id = Id::parse(&certificate.subject)
            .ok_or_else(|| Error::Internal(format!("certificate of device {:?}", certificate.subject)))?;
        let device =
            identity::device(view, device_id).ok_or_else(|| Reject::new(Code::NoSuchDevice, [&device_id]))?;
        match device.status() {
            DeviceStatus::Trusted => Ok(device_id),
            DeviceStatus::Revoked => Err(Reject::new(Code::DeviceRevoked, [&device_id]).into()),
        }
    }

    /// The registry's record of the certificate that was shown, if it and its time are good.
    fn certificate_of(
        &self,
        peer: &PeerIdentity,
        role: CertificateRole,
        view: &dyn Read,
    ) -> Result<Certificate, Error> {
        if peer.id.trust_domain() != self.trust_domain() {
            let (found, expected) = (
                peer.id.trust_domain().to_string(),
                self.trust_domain().to_string(),
            );
            return Err(Refusal::OtherCluster { found, expected }.into());
        }
        if peer.id.role() != role {
            let found = peer.id.role().to_string();
            return Err(Refusal::WrongRole {
                found,
                expected: role.as_str(),
            }
            .into());
        }
        let shown = fingerprint(peer);
        let now_ms = platform::wall_ms();
        if now_ms < peer.not_before_ms {
            return Err(Refusal::NotYetValid {
                not_before_ms: peer.not_before_ms,
                now_ms,
            }
            .into());
        }
        // Planted: a stream that is open outlives its certificate.
        if now_ms > peer.not_after_ms && !palyra_fault::planted("expiry-unwatched") {
            return Err(Reject::new(Code::CertificateExpired, [&shown, &peer.not_after_ms]).into());
        }
        let certificate = identity::certificate_by_fingerprint(view, shown)
            .filter(|known| known.kind() == kind_of(role) && known.subject == peer.id.id())
            .ok_or_else(|| Reject::new(Code::CertificateUnknown, [&shown]))?;
        if certificate.status() == CertificateStatus::Revoked {
            // A revoked device says so itself, which is of more use than the name of a certificate.
            return Err(self.revoked(&certificate, view).into());
        }
        if certificate.status() == CertificateStatus::Superseded {
            return Err(Reject::new(Code::CertificateSuperseded, [&shown, &certificate.subject]).into());
        }
        Ok(certificate)
    }

    fn revoked(&self, certificate: &Certificate, view: &dyn Read) -> Reject {
        let device = match certificate.kind() {
            CertificateKind::Node => {
                Id::parse(&certificate.subject).and_then(|id| identity::device(view, id))
            }
            CertificateKind::Operator | CertificateKind::Replica => None,
        };
        match device {
            Some(device) if device.status() == DeviceStatus::Revoked => {
                Reject::new(Code::DeviceRevoked, [&device.id])
            }
            None if certificate.kind() == CertificateKind::Node => {
                let banned = Id::parse(&certificate.subject).filter(|id| identity::ban(view, *id).is_some());
                match banned {
                    Some(id) => Reject::new(Code::DeviceRevoked, [&id]),
                    None => Reject::new(Code::CertificateRevoked, [&certificate.fingerprint]),
                }
            }
            _ => Reject::new(Code::CertificateRevoked, [&certificate.fingerprint]),
        }
    }

    /// Whether a connection with this certificate may stay open: everything that admission checks but
    /// freshness.
    pub(crate) fn may_stay(&self, peer: &PeerIdentity) -> Result<(), Error> {
        match peer.id.role() {
            CertificateRole::Operator => self.operator_of(peer, Role::Viewer).map(drop),
            CertificateRole::Node => self.node_of(peer, &self.replica().view()).map(drop),
            other => Err(Refusal::WrongRole {
                found: other.to_string(),
                expected: "node or operator",
            }
            .into()),
        }
    }
}

/// Why a connection or session ends whose certificate is refused now. A certificate that is not valid at this
/// time is no revoked one: its holder may come back with another.
pub(crate) fn end_of(refused: &Error) -> End {
    match refused {
        Error::Rejected(reject) if reject.kind() == Code::CertificateExpired => End::Expired,
        Error::Rejected(reject) if reject.kind() == Code::CertificateSuperseded => End::Replaced,
        Error::Refused(Refusal::NotYetValid { .. }) => End::Expired,
        _ => End::Revoked,
    }
}

/// The shown certificate's fingerprint, in the state's type.
pub(crate) fn fingerprint(peer: &PeerIdentity) -> Fingerprint {
    Fingerprint::from_bytes(peer.fingerprint)
}

/// A duration in whole milliseconds.
pub(crate) fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn kind_of(role: CertificateRole) -> CertificateKind {
    match role {
        CertificateRole::Operator => CertificateKind::Operator,
        CertificateRole::Replica => CertificateKind::Replica,
        CertificateRole::Node | CertificateRole::Worker | CertificateRole::Egress => CertificateKind::Node,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_registry_has_revoked_ends_as_revoked() {
        let at = Id::ZERO;
        let expired = Reject::new(Code::CertificateExpired, [&at, &1]);
        assert_eq!(end_of(&expired.into()), End::Expired);
        let early = Refusal::NotYetValid {
            not_before_ms: 2,
            now_ms: 1,
        };
        assert_eq!(end_of(&early.into()), End::Expired);
        let replaced = Reject::new(Code::CertificateSuperseded, [&at, &1]);
        assert_eq!(end_of(&replaced.into()), End::Replaced);
        for code in [Code::DeviceRevoked, Code::CertificateRevoked] {
            assert_eq!(end_of(&Reject::new(code, [&at]).into()), End::Revoked);
        }
    }
}
