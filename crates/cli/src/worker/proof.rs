//! What a worker proved, verified here, and the keys of egress proxies.
//!
//! Invariants: a signature is verified over the bytes that the cluster keeps, on this machine, and what the cluster
//! says of them
//! is compared; a private key is written for its owner alone and printed never.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use p256::ecdsa::signature::Verifier as _;
use p256::ecdsa::{Signature, VerifyingKey};
use p256::pkcs8::DecodePublicKey as _;
use palyra_client::context::write_private;
use palyra_client::{Class, Client, fill_random, ids::is_ulid, wall_ms};
use palyra_pki::attestation::{EgressBinding, STATEMENT_LABEL, public_key};
use palyra_pki::{KeyPair, sha256};
use palyra_proto::node::v1::GetDeviceRequest;
use palyra_proto::worker::v1::{AttestationInfo, Statement, WorkerInfo};
use prost::Message as _;
use serde::Serialize;

use super::find;
use super::view::{AttestationView, RefusalView, worth};
use crate::failure::{Failure, PROBLEMS, Result};
use crate::output::note;
use crate::output::time::{Moment, millis, parse_limit};
use crate::session::Global;

/// How long a binding is good when nothing is said.
const BINDING: Duration = Duration::from_secs(7 * 86_400);

/// What is told of a proof.
#[derive(Debug, Args)]
pub(crate) struct Attest {
    /// Device id, name, or the beginning of an id
    pub(crate) worker: String,
}

/// What can be done about egress proxies.
#[derive(Debug, Subcommand)]
pub(crate) enum Egress {
    /// Makes the key of a proxy, and prints its part of the policy
    #[command(
        after_help = "Example:\n  palyra worker egress keygen proxy-1 --out proxy-1.key >> policy.toml"
    )]
    Keygen {
        /// The proxy's name
        name: String,
        /// Where the private key goes; never replaced
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Binds a worker to a proxy: the file goes to the worker, `egress` of its configuration names it
    #[command(
        after_help = "Example:\n  palyra worker egress bind web-1 --proxy proxy-1 --key proxy-1.key --out web-1.binding"
    )]
    Bind(Bind),
}

/// What is bound to what.
#[derive(Debug, Args)]
pub(crate) struct Bind {
    /// Device id (a whole one needs no cluster), name, or the beginning of an id
    worker: String,
    /// The proxy's name, as the policy has it
    #[arg(long)]
    proxy: String,
    /// The proxy's private key
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// How long the binding is good; 7d without it
    #[arg(long, value_parser = parse_limit, value_name = "DURATION")]
    ttl: Option<Duration>,
    /// Where the binding goes
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// How a statement stands, as this machine sees it.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Checked {
    /// good, bad, absent
    signature: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    problem: String,
    /// SHA-256 of the signer's `SubjectPublicKeyInfo`.
    key: String,
    /// SHA-256 of the statement.
    statement: String,
}

#[derive(Serialize)]
struct ProofView {
    id: String,
    name: String,
    lifecycle: String,
    evidence_means: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    attestation: Option<AttestationView>,
    checked: Checked,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<RefusalView>,
}

/// `palyra worker attest`: shows the newest statement and verifies it here.
pub(crate) async fn attest(global: &Global, client: &Client, ask: Attest) -> Result {
    let (worker, source) = find(client, ask.worker).await?;
    let checked = check(&worker);
    let now = wall_ms();
    let evidence = worker.attestation.as_ref().map(|info| {
        let provider = info.hardware_provider.as_str();
        worth(&info.evidence, provider)
    });
    let view = ProofView {
        id: worker.id.clone(),
        name: worker.name.clone(),
        lifecycle: worker.lifecycle.clone(),
        evidence_means: evidence.unwrap_or_else(|| worth("", "")),
        attestation: worker.attestation.clone().map(AttestationView::from),
        checked,
        refusal: worker.refusal.clone().map(RefusalView::from),
    };
    let mut facts = vec![
        ("worker", view.id.clone()),
        ("name", view.name.clone()),
        ("lifecycle", view.lifecycle.clone()),
    ];
    match &view.attestation {
        Some(attestation) => facts.extend(attestation.facts(now)),
        None => facts.push(("evidence", view.evidence_means.clone())),
    }
    facts.push(("signature", view.checked.told()));
    if let Some(refusal) = &view.refusal {
        facts.push(("refused", refusal.told(now)));
        let next = format!(
            "docs/errors/{}.md, and palyra journal tail --action worker.attestation_refused",
            refusal.code
        );
        facts.push(("look at", next));
    }
    global.out().one(&view, source, &facts)?;
    if view.checked.signature == "bad" {
        return Err(Failure::Silent(PROBLEMS));
    }
    Ok(())
}

impl Checked {
    fn told(&self) -> String {
        match self.signature {
            "good" => format!("good, verified here; by the key with sha256 {}", self.key),
            "bad" => format!("BAD: {}; do not trust what this replica says", self.problem),
            _ => "there is no statement to verify".to_owned(),
        }
    }
}

/// Verifies what the cluster keeps of a worker's proof.
fn check(worker: &WorkerInfo) -> Checked {
    let none = AttestationInfo::default();
    let info = worker.attestation.as_ref().unwrap_or(&none);
    let problem = if info.statement.is_empty() {
        None
    } else {
        problem(worker, info).err()
    };
    Checked {
        signature: match (&problem, info.statement.is_empty()) {
            (Some(_), _) => "bad",
            (None, true) => "absent",
            (None, false) => "good",
        },
        problem: problem.unwrap_or_default(),
        key: hex::encode(sha256(&info.public_key)),
        statement: hex::encode(sha256(&info.statement)),
    }
}

fn problem(worker: &WorkerInfo, info: &AttestationInfo) -> std::result::Result<(), String> {
    let key = VerifyingKey::from_public_key_der(&info.public_key)
        .map_err(|_| "the signer's key is no P-256 key".to_owned())?;
    let signature =
        Signature::from_der(&info.signature).map_err(|_| "the signature is none of ECDSA".to_owned())?;
    let signed = [STATEMENT_LABEL, &info.statement].concat();
    key.verify(&signed, &signature)
        .map_err(|_| "the signature does not match the statement".to_owned())?;
    let statement = Statement::decode(info.statement.clone())
        .map_err(|error| format!("the statement is none: {error}"))?;
    let said = [
        ("image", hex::encode(&statement.image), &info.image),
        ("build", hex::encode(&statement.build), &info.build),
        ("artifact", hex::encode(&statement.artifact), &info.artifact),
        ("supervisor", hex::encode(&statement.supervisor), &info.supervisor),
        ("wit_abi", statement.wit_abi.clone(), &info.wit_abi),
        (
            "issued",
            statement.issued_at_ms.to_string(),
            &info.issued_at_ms.to_string(),
        ),
        ("worker", id_text(&statement.worker_id), &worker.id),
    ];
    match said.iter().find(|(_, signed, told)| signed != *told) {
        Some((what, signed, told)) => Err(format!("{what} was signed as {signed} and is told as {told}")),
        None => Ok(()),
    }
}

fn id_text(bytes: &[u8]) -> String {
    palyra_state::Id::from_slice(bytes).map_or_else(String::new, |id| id.to_string())
}

/// `palyra worker egress keygen`.
pub(crate) fn keygen(global: &Global, name: &str, out: &Path) -> Result {
    if out.exists() {
        let message = format!("{} is there already", out.display());
        return Err(Failure::local(
            Class::Conflict,
            message,
            "another --out: keys are never replaced",
        ));
    }
    let unusable = |error: palyra_pki::keys::KeyError| {
        Failure::local(Class::Internal, format!("no key was made: {error}"), "try again")
    };
    let key = KeyPair::generate(&mut fill_random).map_err(unusable)?;
    write_private(out, key.to_pem().as_bytes())?;
    let public_key = hex::encode(public_key(&key));
    let view = KeyView { name, public_key };
    let name = serde_json::Value::from(name).to_string();
    let text = format!(
        "\n[[egress_proxies]]\nname = {name}\npublic_key = \"{}\"\n",
        view.public_key
    );
    note(&format!(
        "the private key is in {}; the proxy's owner keeps it",
        out.display()
    ));
    global.out().plain(&view, &text)
}

#[derive(Serialize)]
struct KeyView<'a> {
    name: &'a str,
    public_key: String,
}

#[derive(Serialize)]
struct BoundView {
    id: String,
    proxy: String,
    not_before: Moment,
    expires_at: Moment,
    file: PathBuf,
}

/// `palyra worker egress bind`.
pub(crate) async fn bind(global: &Global, ask: Bind) -> Result {
    let worker = worker_id(global, &ask.worker).await?;
    let text = std::fs::read_to_string(&ask.key).map_err(|error| Failure::file("read", &ask.key, &error))?;
    let wrong = |_| {
        let message = format!("{} is no P-256 private key in PEM", ask.key.display());
        Failure::usage(message, "palyra worker egress keygen makes one")
    };
    let pair = KeyPair::from_pem(&text).map_err(wrong)?;
    let now = wall_ms();
    let expires = now.saturating_add(millis(ask.ttl.unwrap_or(BINDING)));
    let bound = EgressBinding::sign(&pair, &ask.proxy, worker.to_bytes(), now, expires).map_err(wrong)?;
    std::fs::write(&ask.out, bound.encode()).map_err(|error| Failure::file("write", &ask.out, &error))?;
    let view = BoundView {
        id: worker.to_string(),
        proxy: ask.proxy,
        not_before: Moment(bound.not_before_ms),
        expires_at: Moment(bound.expires_at_ms),
        file: ask.out,
    };
    let facts = [
        ("worker", view.id.clone()),
        ("proxy", view.proxy.clone()),
        ("good until", view.expires_at.told(wall_ms())),
        ("file", view.file.display().to_string()),
        (
            "next",
            "put it on the worker's machine, where `egress` of its configuration says".to_owned(),
        ),
    ];
    global.out().one(&view, crate::output::Source::default(), &facts)
}

async fn worker_id(global: &Global, worker: &str) -> Result<palyra_state::Id> {
    let mut id = worker.to_ascii_uppercase();
    if !is_ulid(&id) {
        let session = global.open()?;
        let request = GetDeviceRequest {
            device_id: worker.to_owned(),
            read: None,
        };
        let answer = session.client.get_device(request).await?;
        id = answer.device.unwrap_or_default().id;
        session.close().await;
    }
    palyra_state::Id::parse(&id).ok_or_else(|| {
        let message = format!("{worker:?} names no device");
        Failure::local(Class::NotFound, message, "palyra device ls")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use palyra_pki::attestation::sign_statement;

    fn attested(key: &KeyPair) -> WorkerInfo {
        let id = palyra_state::Id::parse("01ARZ3NDEKTSV4RRFFQ69G5FAV").unwrap();
        let statement = Statement {
            worker_id: id.to_bytes().to_vec().into(),
            image: vec![1; 32].into(),
            wit_abi: "0.2.0".to_owned(),
            issued_at_ms: 5,
            ..Statement::default()
        };
        let bytes = statement.encode_to_vec();
        let signature = sign_statement(key, &bytes).unwrap();
        WorkerInfo {
            id: id.to_string(),
            attestation: Some(AttestationInfo {
                image: hex::encode([1; 32]),
                wit_abi: "0.2.0".to_owned(),
                issued_at_ms: 5,
                statement: bytes.into(),
                public_key: public_key(key).into(),
                signature: signature.into(),
                ..AttestationInfo::default()
            }),
            ..WorkerInfo::default()
        }
    }

    #[test]
    fn a_statement_is_verified_without_the_cluster() {
        let key = KeyPair::generate(&mut fill_random).unwrap();
        let good = attested(&key);
        assert_eq!(check(&good).signature, "good");
        assert_eq!(check(&WorkerInfo::default()).signature, "absent");
        let mut lied = good.clone();
        lied.attestation.as_mut().unwrap().image = hex::encode([2; 32]);
        assert!(
            check(&lied).problem.starts_with("image was signed as 0101"),
            "{:?}",
            check(&lied)
        );
        let mut other = good.clone();
        other.id = palyra_client::new_ulid();
        assert_eq!(check(&other).signature, "bad", "a statement of another worker");
        let mut forged = good;
        let stranger = KeyPair::generate(&mut fill_random).unwrap();
        forged.attestation.as_mut().unwrap().public_key = public_key(&stranger).into();
        assert_eq!(
            check(&forged).problem,
            "the signature does not match the statement"
        );
    }
}
