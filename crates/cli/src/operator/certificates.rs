//! Operators' certificates: their renewal, by hand and by itself, and their end.
//!
//! Invariants: the key is made here and never travels; the new credential is in place, whole, before it is first
//! used; until then the old one works, so that a crash at any point leaves a credential that does.

use std::time::Duration;

use clap::Args;
use palyra_client::context::write_private;
use palyra_client::{Class, Client, ConnectOptions, Endpoints, fill_random, new_ulid, wall_ms};
use palyra_pki::{Credential, KeyPair};
use palyra_proto::access::v1::{
    ConfirmCertificateRequest, ListOperatorsRequest, OperatorInfo, RenewCertificateRequest,
    RevokeCertificateRequest,
};
use serde::Serialize;

use crate::failure::{Failure, Result};
use crate::output::note;
use crate::output::time::{Moment, millis, parse_limit, span};
use crate::session::{Global, Session};

/// How long the renewal by itself may hold up a command that is done.
const BESIDE: Duration = Duration::from_secs(3);
/// A certificate that was issued a moment ago may not be known to every replica yet.
const CONFIRM_TRIES: u32 = 20;
const CONFIRM_PAUSE: Duration = Duration::from_millis(100);
const UNKNOWN_CERTIFICATE: &str = "E0303";

/// How the certificate of this context is renewed.
#[derive(Debug, Args)]
pub(crate) struct Renew {
    /// How long the new one is good; without it as long as the present one
    #[arg(long, value_parser = parse_limit, value_name = "DURATION")]
    ttl: Option<Duration>,
}

/// Which certificate is revoked.
#[derive(Debug, Args)]
pub(crate) struct Revoke {
    /// Its fingerprint, or the first 8 digits or more: palyra operator show NAME
    fingerprint: String,
    /// Why; kept in the journal
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
}

#[derive(Serialize)]
struct Renewed {
    fingerprint: String,
    not_after: Moment,
}

/// Renews this context's certificate.
pub(crate) async fn renew(global: &Global, session: &Session, renew: Renew) -> Result {
    let next = exchange(session, global.request_id(), renew.ttl.map_or(0, millis)).await?;
    let peer = next.identity().map_err(|error| unusable(&error.to_string()))?;
    let view = Renewed {
        fingerprint: hex::encode(peer.fingerprint),
        not_after: Moment(peer.not_after_ms),
    };
    let facts = [
        ("renewed", peer.id.id().to_owned()),
        ("certificate", view.fingerprint.clone()),
        ("ends", view.not_after.told(wall_ms())),
        ("the old one", "works no more".to_owned()),
    ];
    global.out().one(&view, crate::output::Source::default(), &facts)
}

/// Gets a certificate for a fresh key, puts it in place and uses it.
async fn exchange(session: &Session, request_id: String, ttl_ms: u64) -> Result<Credential> {
    let key = KeyPair::generate(&mut fill_random).map_err(|error| unusable(&error.to_string()))?;
    let csr = key.make_csr().map_err(|error| unusable(&error.to_string()))?;
    let answer = session
        .client
        .renew_certificate(RenewCertificateRequest {
            request_id,
            csr: csr.into(),
            ttl_ms,
        })
        .await?;
    // As it lies there: its roots may have been brought up to date since it was opened.
    let mine = session.context.credential(&session.home)?;
    let trust = mine.trust().map_err(|error| unusable(&error.to_string()))?;
    let chain: Vec<Vec<u8>> = answer.chain.iter().map(|der| der.to_vec()).collect();
    let next = Credential::new(&trust, mine.endpoints.clone(), &chain, &key)
        .and_then(|next| next.with_trust(&trust, mine.trust_generation))
        .map_err(|error| unusable(&error.to_string()))?;
    let text = next.to_json().map_err(|error| unusable(&error.to_string()))?;
    write_private(&session.context.credential_path(&session.home), text.as_bytes())?;
    confirm(session, &next).await?;
    Ok(next)
}

/// Uses the new certificate: the old one ends.
async fn confirm(session: &Session, next: &Credential) -> Result {
    let endpoints = Endpoints::new(session.known_endpoints())?;
    let client = Client::new(next, Some(endpoints), ConnectOptions::default())?;
    let request = ConfirmCertificateRequest {
        request_id: new_ulid(),
    };
    for _ in 0..CONFIRM_TRIES {
        match client.confirm_certificate(request.clone()).await {
            Err(error) if error.code == UNKNOWN_CERTIFICATE => tokio::time::sleep(CONFIRM_PAUSE).await,
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
    // It works, and the old one does too, until the next change is made with it.
    Ok(())
}

fn unusable(why: &str) -> Failure {
    Failure::local(
        Class::Internal,
        format!("the new certificate is unusable: {why}"),
        "the old one works until its end; try again: palyra operator renew",
    )
}

/// Renews the certificate by itself when two thirds of its life are over. A failure is told, and fails no command.
pub(crate) async fn renew_if_due(session: &Session) {
    let Ok(peer) = session.credential.identity() else {
        return;
    };
    let (now, life) = (wall_ms(), peer.not_after_ms.saturating_sub(peer.not_before_ms));
    let left = peer.not_after_ms.saturating_sub(now);
    if left == 0 || left > life / 3 {
        return;
    }
    let done = tokio::time::timeout(BESIDE, exchange(session, new_ulid(), 0)).await;
    match done {
        Ok(Ok(next)) => {
            let ends = next.identity().map_or(0, |peer| peer.not_after_ms);
            note(&format!(
                "the certificate of {} was renewed; it ends {}",
                peer.id.id(),
                Moment(ends).told(now)
            ));
        }
        Ok(Err(_)) | Err(_) => note(&format!(
            "the certificate of {} ends in {}, and renewing it failed: palyra operator renew",
            peer.id.id(),
            span(left)
        )),
    }
}

#[derive(Serialize)]
struct Revoked<'a> {
    revoked: &'a str,
}

/// Revokes one certificate of an operator.
pub(crate) async fn revoke(global: &Global, client: &Client, revoke: Revoke) -> Result {
    let answer = client
        .revoke_certificate(RevokeCertificateRequest {
            request_id: global.request_id(),
            fingerprint: revoke.fingerprint.clone(),
            reason: revoke.reason,
        })
        .await?;
    let view = Revoked {
        revoked: &revoke.fingerprint,
    };
    let facts = [("revoked", revoke.fingerprint.clone())];
    global.out().one(&view, answer.write.into(), &facts)
}

#[derive(Serialize)]
struct Shown {
    name: String,
    role: String,
    status: String,
    certificates: Vec<CertificateView>,
}

#[derive(Serialize)]
struct CertificateView {
    fingerprint: String,
    status: String,
    issued_at: Moment,
    not_after: Moment,
}

/// Shows one operator and its certificates.
pub(crate) async fn show(global: &Global, client: &Client, name: String) -> Result {
    let answer = client.list_operators(ListOperatorsRequest::default()).await?;
    let found: Option<OperatorInfo> = answer
        .operators
        .into_iter()
        .find(|operator| operator.name == name);
    let found = found.ok_or_else(|| {
        let message = format!("there is no operator {name}");
        Failure::local(Class::NotFound, message, "palyra operator ls")
    })?;
    let now = wall_ms();
    let certificates: Vec<CertificateView> = found
        .certificates
        .into_iter()
        .map(|certificate| CertificateView {
            fingerprint: certificate.fingerprint,
            status: certificate.status,
            issued_at: Moment(certificate.issued_at_ms),
            not_after: Moment(certificate.not_after_ms),
        })
        .collect();
    let lines: Vec<String> = certificates
        .iter()
        .map(|certificate| {
            let short: String = certificate.fingerprint.chars().take(16).collect();
            format!(
                "{short}  {}  ends {}",
                certificate.status,
                certificate.not_after.told(now)
            )
        })
        .collect();
    let view = Shown {
        name: found.name,
        role: found.role,
        status: found.status,
        certificates,
    };
    let facts = [
        ("operator", view.name.clone()),
        ("role", view.role.clone()),
        ("status", view.status.clone()),
        ("certificates", lines.join("\n")),
    ];
    global.out().one(&view, answer.read.into(), &facts)
}
