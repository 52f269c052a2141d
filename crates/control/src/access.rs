//! Operators: who am I, who else is there, add, remove.

use palyra_pki::{PeerIdentity, Role as CertificateRole};
use palyra_state::access::{self, AddOperator, Operator, RemoveOperator, Role};
use palyra_state::identity::{self, Certificate, CertificateKind};

use crate::caller::Caller;
use crate::caller::millis;
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo};
use crate::error::Error;
use crate::limits::{ENFORCE_WAIT, OPERATOR_TTL_MAX_MS};
use crate::pairing::requests::chain_of;

/// Who the caller is.
#[derive(Debug, Clone, PartialEq)]
pub struct WhoAmI {
    /// The operator's record.
    pub operator: Operator,
    /// End of the certificate that was shown.
    pub certificate_not_after_ms: u64,
    /// How fresh it is.
    pub read: ReadInfo,
}

/// An operator with its certificates.
#[derive(Debug, Clone, PartialEq)]
pub struct OperatorView {
    /// The record.
    pub record: Operator,
    /// Its certificates, oldest first.
    pub certificates: Vec<Certificate>,
}

/// A new operator's credential, without the key, which never travelled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Added {
    /// Certificate and issuer, DER, leaf first, without the root.
    pub chain: Vec<Vec<u8>>,
    /// What to trust, DER.
    pub roots: Vec<Vec<u8>>,
    /// The entry.
    pub write: WriteInfo,
}

impl Control {
    /// Who the caller is, by this replica's word. Works without a quorum.
    ///
    /// # Errors
    /// What admission refuses.
    pub fn who_am_i(&self, peer: &PeerIdentity) -> Result<WhoAmI, Error> {
        self.admit_operator_local(peer)?;
        let view = self.replica().view();
        let operator = access::operator(&view, peer.id.id())
            .ok_or_else(|| Error::not_found("operator", peer.id.id()))?;
        let read = self.read_info(view.index());
        Ok(WhoAmI {
            operator,
            certificate_not_after_ms: peer.not_after_ms,
            read,
        })
    }

    /// All operators by name, removed ones too, with their certificates.
    ///
    /// # Errors
    /// What a read can say.
    pub async fn list_operators(&self, read: ReadOptions) -> Result<(Vec<OperatorView>, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        let operators = access::operators(&view).into_iter().map(|record| OperatorView {
            certificates: identity::certificates_of(&view, CertificateKind::Operator, &record.name),
            record,
        });
        Ok((operators.collect(), info))
    }

    /// Lets an operator in: signs its certificate and commits both in one entry. The caller is an admin.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad name, role, CSR or life; what the state machine refuses.
    pub async fn add_operator(
        &self,
        caller: &Caller,
        request_id: &str,
        name: &str,
        role: &str,
        csr: &[u8],
        ttl_ms: u64,
    ) -> Result<Added, Error> {
        let request_id = self.request_id(request_id)?;
        let role = Role::parse(role).ok_or_else(|| {
            let cause = format!("{:?} is no role", role.chars().take(32).collect::<String>());
            Error::invalid("role", cause, "use admin, operator or viewer")
        })?;
        let ttl_ms = if ttl_ms == 0 {
            millis(self.timings().operator_validity)
        } else {
            ttl_ms
        };
        if ttl_ms > OPERATOR_TTL_MAX_MS {
            return Err(Error::invalid(
                "ttl_ms",
                format!("{ttl_ms} ms"),
                "ask for at most a year",
            ));
        }
        let certificate = self.sign(csr, CertificateRole::Operator, name, ttl_ms)?;
        let (spki, fingerprint) = (certificate.spki, certificate.fingerprint());
        let command = AddOperator {
            name: name.to_owned(),
            role: role as i32,
            certificate,
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        self.applied(written.receipt).await?;
        let view = self.replica().view();
        let recorded = identity::certificate_by_fingerprint(&view, fingerprint).or_else(|| {
            identity::certificates_of(&view, CertificateKind::Operator, name)
                .into_iter()
                .rfind(|c| c.spki == spki)
        });
        let recorded = recorded.ok_or_else(|| {
            let next = "remove the operator and add it again under a new request id";
            Error::invalid("request_id", "it added an operator with another key before", next)
        })?;
        let roots = self
            .trust_bundle()?
            .roots()
            .iter()
            .map(|root| root.to_vec())
            .collect();
        Ok(Added {
            chain: chain_of(&view, recorded.fingerprint)?,
            roots,
            write: written.info,
        })
    }

    /// Shuts an operator out; its connections are closed everywhere, as far as that is known within ten
    /// seconds.
    ///
    /// # Errors
    /// What the state machine refuses: there is none, or it is the last admin.
    pub async fn remove_operator(
        &self,
        caller: &Caller,
        request_id: &str,
        name: &str,
        reason: &str,
    ) -> Result<WriteInfo, Error> {
        let request_id = self.request_id(request_id)?;
        let command = RemoveOperator {
            name: name.to_owned(),
            reason: reason.to_owned(),
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        // An operator that removes itself holds the connection on which it waits for this answer.
        if !matches!(caller, Caller::Operator { name: own, .. } if own == name) {
            let (_, pending) = self.enforce_everywhere(written.index, name, ENFORCE_WAIT).await;
            if !pending.is_empty() {
                tracing::warn!(
                    operator = name,
                    ?pending,
                    "not every replica has closed the operator's connections"
                );
            }
        }
        Ok(written.info)
    }
}
