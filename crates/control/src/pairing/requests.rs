//! Pairing requests: what operators see and decide, and what the machine fetches afterwards.
//!
//! Invariants: the certificate is signed before the one entry that approves it, and handed out only after it;
//! a fetch shows nothing to who has no token.

use std::time::Duration;

use palyra_pki::ca::HostNames;
use palyra_pki::{Role as CertificateRole, SpiffeId, TrustBundle, transcript};
use palyra_platform as platform;
use palyra_state::identity::{self, NewCertificate};
use palyra_state::pairing::{
    self as records, Approve, MarkCompleted, Reject as RejectRequest, Request, RequestStatus,
};
use palyra_state::{Code, Fingerprint, Id, Read, Reject, ca};

use crate::caller::{Caller, millis};
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo, bounded_wait};
use crate::dispatch::{Page, next_page, page_size, page_start};
use crate::error::{Error, Refusal};
use crate::limits::POLL_WAIT_MAX;
use crate::selector;

/// A pairing request as operators see it.
#[derive(Debug, Clone, PartialEq)]
pub struct PairingView {
    /// The record.
    pub record: Request,
    /// Where it stands by this replica's clock.
    pub status: RequestStatus,
    /// It waits, and a device with this id exists: an approval takes that one's certificates from it.
    pub replaces_device: bool,
}

/// What the machine fetches.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// Where its request stands; a completed one counts as approved.
    pub status: RequestStatus,
    /// Why it was rejected.
    pub reason: String,
    /// The certificate and its issuer, DER, leaf first, without the root; empty unless approved.
    pub chain: Vec<Vec<u8>>,
    /// What to trust.
    pub trust: TrustBundle,
}

impl Control {
    /// The outcome of a pairing, on any replica; waits `wait_ms` at most (30,000) for an operator.
    ///
    /// # Errors
    /// [`Refusal::WrongFetchToken`], also when there is no such pairing.
    pub async fn fetch(&self, pairing_id: &str, token: &[u8], wait_ms: u64) -> Result<Fetched, Error> {
        let id = selector::parse_exact_id("pairing_id", pairing_id)?;
        let mut found = records::request(&self.replica().view(), id);
        if found.is_none() {
            self.barrier().await?;
            found = records::request(&self.replica().view(), id);
        }
        let known = found.ok_or(Refusal::WrongFetchToken)?;
        if !transcript::check_fetch_token(token, &known.fetch_token_hash.to_bytes()) {
            return Err(Refusal::WrongFetchToken.into());
        }
        let wait = bounded_wait(wait_ms, Duration::ZERO, POLL_WAIT_MAX);
        let seen = self.waiters().until(id, wait, || {
            let view = self.replica().view();
            let now = self.now_ms(&view);
            let status = records::request(&view, id).map(|request| records::request_status(&request, now));
            (view, status != Some(RequestStatus::PendingApproval))
        });
        let mut view = seen.await?;
        let now = self.now_ms(&view);
        if records::request(&view, id)
            .is_some_and(|request| records::request_status(&request, now) == RequestStatus::Expired)
        {
            // A machine gives up on this word, and a replica that is behind has the time but not the approval.
            self.barrier().await?;
            view = self.replica().view();
        }
        let request = records::request(&view, id).ok_or(Refusal::WrongFetchToken)?;
        let PairingView { record, status, .. } = seen_at(&view, request, self.now_ms(&view));
        let chain = match (status, record.certificate) {
            (RequestStatus::Approved | RequestStatus::Completed, Some(fingerprint)) => {
                chain_of(&view, fingerprint)?
            }
            _ => Vec::new(),
        };
        if status == RequestStatus::Approved {
            self.mark_completed(id);
        }
        Ok(Fetched {
            status,
            reason: record.reason,
            chain,
            trust: self.trust_bundle()?,
        })
    }

    /// Notes that the certificate was fetched; nobody waits for it, and a next fetch would note it again.
    fn mark_completed(&self, pairing_id: Id) {
        let control = self.clone();
        platform::spawn(async move {
            let command = MarkCompleted { pairing_id };
            if let Err(error) = control
                .propose(control.fresh_id(), control.as_replica(), command)
                .await
            {
                tracing::debug!(pairing = %pairing_id, cause = %error, "completion was not noted");
            }
        })
        .detach();
    }

    /// Lets a machine in: signs its certificate with this replica's authority, and commits both in one entry.
    ///
    /// # Errors
    /// [`Refusal::Signing`], and what the state machine refuses: decided before, expired, digits that differ.
    pub async fn approve(
        &self,
        caller: &Caller,
        request_id: &str,
        id: &str,
        sas: &str,
        reason: &str,
    ) -> Result<(PairingView, WriteInfo), Error> {
        let request_id = self.request_id(request_id)?;
        let pending = self.pairing_named(id).await?;
        let certificate = self.sign_node(&pending.csr_der, pending.device_id)?;
        let command = Approve {
            pairing_id: pending.id,
            certificate,
            sas: sas_form(sas),
            reason: reason.to_owned(),
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        self.applied(written.receipt).await?;
        Ok((self.decided(pending, RequestStatus::Approved), written.info))
    }

    /// Says no to a machine, which is told the reason.
    ///
    /// # Errors
    /// What the state machine refuses: decided before, or expired.
    pub async fn reject(
        &self,
        caller: &Caller,
        request_id: &str,
        id: &str,
        reason: &str,
    ) -> Result<(PairingView, WriteInfo), Error> {
        let request_id = self.request_id(request_id)?;
        let pending = self.pairing_named(id).await?;
        let command = RejectRequest {
            pairing_id: pending.id,
            reason: reason.to_owned(),
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        self.applied(written.receipt).await?;
        Ok((self.decided(pending, RequestStatus::Rejected), written.info))
    }

    async fn pairing_named(&self, selector: &str) -> Result<Request, Error> {
        self.barrier().await?;
        let view = self.replica().view();
        let id = selector::pairing_request(&view, selector)?;
        records::request(&view, id).ok_or_else(|| Reject::new(Code::NoSuchPairing, [&id]).into())
    }

    /// A pairing that was just decided. It may be forgotten already, which makes the decision no refusal.
    fn decided(&self, pending: Request, status: RequestStatus) -> PairingView {
        let view = self.replica().view();
        let found = records::request(&view, pending.id).unwrap_or(Request {
            status: status as i32,
            ..pending
        });
        let now = self.now_ms(&view);
        seen_at(&view, found, now)
    }

    /// Pairing requests by id, oldest first; `status` may be empty for all.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad status or page, and what a read can say.
    pub async fn list_pairings(
        &self,
        read: ReadOptions,
        status: &str,
        after: &str,
        limit: u32,
    ) -> Result<Page<PairingView>, Error> {
        let (view, info) = self.read(read).await?;
        let wanted = parse_status(status)?;
        let now = self.now_ms(&view);
        let limit = page_size(limit);
        let mut after = page_start(after)?;
        let mut items = Vec::new();
        while items.len() <= limit {
            let page = records::requests(&view, after, limit);
            let Some(last) = page.last() else { break };
            after = Some(last.id);
            let seen = page.into_iter().map(|request| seen_at(&view, request, now));
            items.extend(seen.filter(|seen| wanted.is_none_or(|wanted| seen.status == wanted)));
        }
        let next = next_page(&mut items, limit, |seen| seen.record.id.to_string());
        Ok(Page {
            items,
            next,
            read: info,
        })
    }

    /// One pairing request: by its id, the id of a device that waits, or a prefix of either.
    ///
    /// # Errors
    /// [`Refusal::NotFound`], [`Refusal::Ambiguous`], and what a read can say.
    pub async fn get_pairing(
        &self,
        read: ReadOptions,
        selector: &str,
    ) -> Result<(PairingView, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        let id = selector::pairing_request(&view, selector)?;
        let found = records::request(&view, id).ok_or_else(|| Reject::new(Code::NoSuchPairing, [&id]))?;
        let now = self.now_ms(&view);
        Ok((seen_at(&view, found, now), info))
    }

    /// Signs a node's certificate over the key in a CSR.
    pub(crate) fn sign_node(&self, csr: &[u8], device_id: Id) -> Result<NewCertificate, Error> {
        let life = millis(self.timings().node_validity);
        self.sign(csr, CertificateRole::Node, &device_id.to_string(), life)
    }

    /// Signs a leaf with this replica's own authority.
    pub(crate) fn sign(
        &self,
        csr: &[u8],
        role: CertificateRole,
        id: &str,
        ttl_ms: u64,
    ) -> Result<NewCertificate, Error> {
        let signing = |cause: String| Error::from(Refusal::Signing { cause });
        let id = SpiffeId::new(self.trust_domain().clone(), role, id).map_err(|error| {
            Error::invalid("name", error.to_string(), "use lower-case letters, digits, . - _")
        })?;
        let now_ms = platform::wall_ms();
        let (number, authority) = self.issuing()?;
        let issued = authority
            .issue_from_csr(
                csr,
                &id,
                ttl_ms,
                &HostNames::default(),
                now_ms,
                &mut platform::fill_random,
            )
            .map_err(|error| match error {
                palyra_pki::CaError::Key(error) => Error::invalid(
                    "csr",
                    error.to_string(),
                    "send a P-256 CSR in DER form, self-signed",
                ),
                other => signing(other.to_string()),
            })?;
        let mut certificate = new_certificate(&issued, self.replica_id())?;
        certificate.authority_number = number;
        Ok(certificate)
    }
}

/// A request as it stands at a time.
fn seen_at(view: &dyn Read, record: Request, now: u64) -> PairingView {
    let status = records::request_status(&record, now);
    let waits = status == RequestStatus::PendingApproval;
    PairingView {
        status,
        replaces_device: waits && identity::device(view, record.device_id).is_some(),
        record,
    }
}

/// An issued certificate as a command brings it.
pub(crate) fn new_certificate(
    issued: &palyra_pki::IssuedCert,
    authority: u64,
) -> Result<NewCertificate, Error> {
    let serial = decode_hex(&issued.serial)
        .ok_or_else(|| Error::Internal(format!("serial {:?} is not hexadecimal", issued.serial)))?;
    Ok(NewCertificate {
        der: issued.der.clone().into(),
        spki: Fingerprint::from_bytes(issued.spki_sha256),
        serial: serial.into(),
        not_before: issued.not_before_ms,
        not_after: issued.not_after_ms,
        authority,
        authority_number: 0,
    })
}

fn decode_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok())
        .collect()
}

/// A recorded certificate with its issuer, leaf first, without the root. During a rotation of the root the issuer has a
/// certificate under either root, and the chain both.
pub(crate) fn chain_of(view: &dyn Read, fingerprint: Fingerprint) -> Result<Vec<Vec<u8>>, Error> {
    let missing = || {
        Error::Internal(format!(
            "certificate {fingerprint} or its authority is not in the registry"
        ))
    };
    let leaf = identity::certificate_by_fingerprint(view, fingerprint).ok_or_else(missing)?;
    let mut chain = vec![leaf.der.to_vec()];
    let (replica_id, number) = leaf.issuer();
    if replica_id != 0 {
        let issuer = ca::authority(view, replica_id, number).ok_or_else(missing)?;
        chain.extend(crate::ca::certificates_of(view, &issuer));
    }
    Ok(chain)
}

/// Six digits as the state holds them, from however a person typed them.
fn sas_form(typed: &str) -> String {
    let digits: String = typed.chars().filter(char::is_ascii_digit).collect();
    if digits.len() == 6 {
        format!("{} {}", &digits[..3], &digits[3..])
    } else {
        typed.to_owned()
    }
}

fn parse_status(text: &str) -> Result<Option<RequestStatus>, Error> {
    use RequestStatus::{Approved, Completed, Expired, PendingApproval, Rejected};
    const ALL: [RequestStatus; 5] = [PendingApproval, Approved, Rejected, Completed, Expired];
    if text.is_empty() {
        return Ok(None);
    }
    ALL.into_iter()
        .find(|status| status.as_str() == text)
        .map(Some)
        .ok_or_else(|| {
            let names: Vec<&str> = ALL.iter().map(|status| status.as_str()).collect();
            Error::invalid(
                "status",
                format!("{text:?} is no status"),
                format!("use one of {}", names.join(", ")),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_compared_however_they_are_typed() {
        for typed in ["123456", "123 456", " 123-456 "] {
            assert_eq!(sas_form(typed), "123 456");
        }
        assert_eq!(
            sas_form("12345"),
            "12345",
            "the state machine refuses what is not six digits"
        );
        assert_eq!(sas_form(""), "", "not compared");
    }

    #[test]
    fn serials_are_bytes() {
        assert_eq!(decode_hex("0aff"), Some(vec![10, 255]));
        assert_eq!(decode_hex("0af"), None);
        assert_eq!(decode_hex("zz"), None);
    }
}
