//! Whether a statement holds: in one order, each fault with a code and a severity of its own.
//!
//! What never lives here: what follows from it (`rules`). Pure: the bytes lie in the log, the keys in the
//! state, and the time is the entry's. Order: is there a policy; can it be read; cluster and worker; nonce,
//! session and end of the challenge; who signed, and the signature; its times; versions and slots; digests;
//! evidence; egress; tools; room. What comes before the signature says nothing about the worker but that
//! somebody spoke in its session. Invariants: nothing is taken as less than it claims to be; an empty list
//! allows nothing.

use p256::ecdsa::signature::Verifier as _;
use p256::ecdsa::{Signature, VerifyingKey};
use p256::pkcs8::DecodePublicKey as _;
use prost::Message as _;

use super::statement::{EGRESS_LABEL, QUOTE_LABEL, STATEMENT_LABEL};
use super::store::{policy, totals};
use super::{Attest, Challenge, EgressBinding, Evidence, HardwareQuote, Policy, Severity, Statement, Worker};
use crate::ids::{Digest, Id};
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::txn::Txn;
use crate::{check, cluster, identity, limits};

/// What a statement that holds comes to.
pub(super) struct Passed {
    pub(super) evidence: Evidence,
    pub(super) expires_at: u64,
    pub(super) slots: u32,
    pub(super) tools: Vec<String>,
}

/// How bad it is that a statement was refused with this code.
#[must_use]
pub fn severity(code: Code) -> Severity {
    match code {
        Code::ForeignCluster
        | Code::ForeignWorker
        | Code::StatementReplayed
        | Code::SignerUnknown
        | Code::StatementForged
        | Code::QuoteForged
        | Code::QuoteForeign
        | Code::EgressForged
        | Code::EgressForeign => Severity::Critical,
        Code::StatementMalformed
        | Code::NonceMismatch
        | Code::ImageNotAllowed
        | Code::BuildNotAllowed
        | Code::ArtifactNotAllowed
        | Code::SupervisorNotAllowed
        | Code::EvidenceUnproven
        | Code::QuoteMissing
        | Code::QuoteProvider
        | Code::EgressMissing
        | Code::EgressUnknown
        | Code::EgressOther => Severity::High,
        Code::NoPolicy
        | Code::NoExpectation
        | Code::ChallengeExpired
        | Code::StatementExpired
        | Code::StatementFuture => Severity::Low,
        _ => Severity::Medium,
    }
}

/// Whether what a worker runs is not what may run: a worker that was admitted before has drifted.
pub(super) fn is_drift(code: Code) -> bool {
    matches!(
        code,
        Code::ImageNotAllowed | Code::BuildNotAllowed | Code::ArtifactNotAllowed | Code::SupervisorNotAllowed
    )
}

/// Whether a signature over a label and a message holds, under a key in SubjectPublicKeyInfo form.
pub(super) fn verifies(public_key: &[u8], label: &[u8], message: &[u8], signature: &[u8]) -> bool {
    let Ok(key) = VerifyingKey::from_public_key_der(public_key) else {
        return false;
    };
    let Ok(signature) = Signature::from_der(signature) else {
        return false;
    };
    key.verify(&[label, message].concat(), &signature).is_ok()
}

/// Whether bytes are a P-256 key in SubjectPublicKeyInfo form.
pub(super) fn is_key(bytes: &[u8]) -> bool {
    bytes.len() <= limits::KEY_MAX && VerifyingKey::from_public_key_der(bytes).is_ok()
}

/// Whether a statement, readable or not, is over this nonce.
pub(super) fn is_over(encoded: &[u8], nonce: Digest) -> bool {
    let small = encoded.len() <= limits::STATEMENT_MAX;
    small && Statement::decode(encoded).is_ok_and(|statement| statement.nonce[..] == nonce.to_bytes())
}

/// Judges a statement over an open challenge.
pub(super) fn judge(
    txn: &Txn<'_>,
    worker: &Worker,
    challenge: Challenge,
    command: &Attest,
) -> Result<Passed, Reject> {
    let id = worker.id;
    let Some(policy) = policy(txn) else {
        return Err(Reject::new(Code::NoPolicy, [&id]));
    };
    let statement = read(id, command)?;
    names_us(txn, id, &statement)?;
    is_over_the_challenge(txn.now, worker, challenge, command.epoch, &statement)?;
    is_signed(txn, id, command)?;
    is_of_now(txn.now, id, &policy, &statement)?;
    let passed = hold(txn.now, id, &policy, &statement)?;
    let admitted = totals(txn).admitted;
    let counts = worker
        .attested
        .as_ref()
        .is_some_and(|known| known.policy_version != 0);
    if !counts && admitted >= u64::from(policy.max_workers) {
        return Err(Reject::new(
            Code::TooManyWorkers,
            [&id, &admitted, &policy.max_workers],
        ));
    }
    Ok(passed)
}

/// The statement, if it is one and encoded as there is one way to.
fn read(id: Id, command: &Attest) -> Result<Statement, Reject> {
    let bad = |cause: &str| Reject::new(Code::StatementMalformed, [&id, &cause]);
    let size = command.statement.len();
    if size > limits::STATEMENT_MAX {
        return Err(Reject::new(
            Code::StatementTooLarge,
            [&id, &size, &limits::STATEMENT_MAX],
        ));
    }
    if command.public_key.len() > limits::KEY_MAX || command.signature.len() > limits::KEY_MAX {
        return Err(bad("its key or its signature is too large"));
    }
    let Ok(statement) = Statement::decode(command.statement.clone()) else {
        return Err(bad("it is no statement"));
    };
    if statement.encode_to_vec() != command.statement[..] {
        return Err(bad("it is not encoded canonically"));
    }
    let digests = [&statement.image, &statement.build, &statement.artifact];
    let sized = statement.cluster_id.len() == 16
        && statement.worker_id.len() == 16
        && statement.nonce.len() == 32
        && digests.iter().all(|digest| digest.len() == 32)
        && matches!(statement.supervisor.len(), 0 | 32);
    if !sized {
        return Err(bad(
            "an id, the nonce or a digest has another length than it must have",
        ));
    }
    if check::text("", &statement.wit_abi, limits::SHORT_NAME_MAX).is_err() {
        return Err(bad("its WIT ABI is too long or no text"));
    }
    Ok(statement)
}

fn names_us(r: &dyn Read, id: Id, statement: &Statement) -> Result<(), Reject> {
    let ours = cluster::cluster(r).map(|cluster| cluster.cluster_id.to_bytes());
    if ours.as_ref().map(|bytes| &bytes[..]) != Some(&statement.cluster_id[..]) {
        return Err(Reject::new(Code::ForeignCluster, [&id]));
    }
    let named = Id::from_slice(&statement.worker_id).unwrap_or_default();
    if named != id {
        return Err(Reject::new(Code::ForeignWorker, [&id, &named]));
    }
    Ok(())
}

fn is_over_the_challenge(
    now: u64,
    worker: &Worker,
    challenge: Challenge,
    epoch: u64,
    statement: &Statement,
) -> Result<(), Reject> {
    let id = worker.id;
    let nonce = Digest::from_slice(&statement.nonce);
    if nonce.is_some() && nonce == worker.last_nonce {
        return Err(Reject::new(Code::StatementReplayed, [&id]));
    }
    if nonce != Some(challenge.nonce) {
        return Err(Reject::new(Code::NonceMismatch, [&id]));
    }
    if challenge.epoch != epoch {
        return Err(Reject::new(
            Code::ChallengeSession,
            [&id, &challenge.epoch, &epoch],
        ));
    }
    if now >= challenge.expires_at {
        return Err(Reject::new(Code::ChallengeExpired, [&id, &challenge.expires_at]));
    }
    Ok(())
}

/// Signed with the key of a certificate of the device that lets it in now.
fn is_signed(txn: &Txn<'_>, id: Id, command: &Attest) -> Result<(), Reject> {
    let spki = Digest::of(&command.public_key);
    let kind = identity::CertificateKind::Node;
    let known = identity::certificates_of(txn, kind, &id.to_string())
        .iter()
        .any(|certificate| certificate.spki == spki && identity::works(certificate, txn.now));
    if !known {
        return Err(Reject::new(Code::SignerUnknown, [&id, &spki]));
    }
    if !verifies(
        &command.public_key,
        STATEMENT_LABEL,
        &command.statement,
        &command.signature,
    ) {
        return Err(Reject::new(Code::StatementForged, [&id]));
    }
    Ok(())
}

fn is_of_now(now: u64, id: Id, policy: &Policy, statement: &Statement) -> Result<(), Reject> {
    let ahead = statement.issued_at.saturating_sub(now);
    if ahead > limits::ISSUED_AHEAD {
        return Err(Reject::new(Code::StatementFuture, [&id, &ahead]));
    }
    if now >= statement.expires_at {
        return Err(Reject::new(Code::StatementExpired, [&id, &statement.expires_at]));
    }
    let life = statement.expires_at.saturating_sub(statement.issued_at);
    if life == 0 || life > policy.max_attestation_life {
        return Err(Reject::new(
            Code::StatementLife,
            [&id, &life, &policy.max_attestation_life],
        ));
    }
    Ok(())
}

/// Holds a statement that was signed against a policy.
pub(super) fn hold(now: u64, id: Id, policy: &Policy, statement: &Statement) -> Result<Passed, Reject> {
    versions(id, policy, statement)?;
    digests(id, policy, statement)?;
    let evidence = evidence(id, policy, statement)?;
    let bound_until = egress(now, id, policy, statement)?;
    let tools = tools(id, policy, statement, evidence)?;
    // A policy that came later may want a shorter life than the statement has.
    let longest = statement.issued_at.saturating_add(policy.max_attestation_life);
    Ok(Passed {
        evidence,
        expires_at: statement.expires_at.min(longest).min(bound_until),
        slots: statement.slots.min(policy.leases_per_worker),
        tools,
    })
}

fn versions(id: Id, policy: &Policy, statement: &Statement) -> Result<(), Reject> {
    let spoken = statement.sdk_protocol;
    if !(policy.sdk_protocol_min..=policy.sdk_protocol_max).contains(&spoken) {
        return Err(Reject::new(
            Code::SdkProtocol,
            [&id, &spoken, &policy.sdk_protocol_min, &policy.sdk_protocol_max],
        ));
    }
    if !policy.wit_abis.contains(&statement.wit_abi) {
        return Err(Reject::new(
            Code::WitAbi,
            [&id, &check::quoted(&statement.wit_abi)],
        ));
    }
    if statement.slots == 0 || statement.slots > limits::SLOTS_PER_WORKER {
        return Err(Reject::new(
            Code::SlotsClaimed,
            [&id, &statement.slots, &limits::SLOTS_PER_WORKER],
        ));
    }
    Ok(())
}

fn digests(id: Id, policy: &Policy, statement: &Statement) -> Result<(), Reject> {
    let kinds = [
        ("image", &policy.images, &statement.image, Code::ImageNotAllowed),
        ("build", &policy.builds, &statement.build, Code::BuildNotAllowed),
        (
            "set of tools",
            &policy.artifacts,
            &statement.artifact,
            Code::ArtifactNotAllowed,
        ),
    ];
    for (kind, allowed, shown, code) in kinds {
        allows(id, kind, allowed, shown, code)?;
    }
    if !statement.supervisor.is_empty() {
        allows(
            id,
            "supervisor",
            &policy.supervisors,
            &statement.supervisor,
            Code::SupervisorNotAllowed,
        )?;
    }
    Ok(())
}

fn allows(id: Id, kind: &str, allowed: &[Digest], shown: &[u8], code: Code) -> Result<(), Reject> {
    if allowed.is_empty() {
        return Err(Reject::new(Code::NoExpectation, [&id, &kind]));
    }
    let shown = Digest::from_slice(shown).unwrap_or_default();
    if allowed.contains(&shown) {
        return Ok(());
    }
    Err(Reject::new(code, [&id, &shown]))
}

/// The level that is claimed, if it is proven.
fn evidence(id: Id, policy: &Policy, statement: &Statement) -> Result<Evidence, Reject> {
    let level = i32::try_from(statement.evidence)
        .ok()
        .and_then(|number| Evidence::try_from(number).ok())
        .unwrap_or(Evidence::None);
    let unproven = |cause: &str| {
        Err(Reject::new(
            Code::EvidenceUnproven,
            [&id, &level.as_str(), &cause],
        ))
    };
    let supervised = !statement.supervisor.is_empty();
    match (level, &statement.quote) {
        (Evidence::None, _) => unproven("there is no such level"),
        (Evidence::SelfReported, _) if supervised => unproven("it names a supervisor all the same"),
        (Evidence::Supervisor, _) if !supervised => unproven("it names no supervisor"),
        (Evidence::SelfReported | Evidence::Supervisor, Some(_)) => unproven("it shows a quote all the same"),
        (Evidence::SelfReported | Evidence::Supervisor, None) => Ok(level),
        (Evidence::Hardware, None) => Err(Reject::new(Code::QuoteMissing, [&id])),
        (Evidence::Hardware, Some(quote)) => vouched(id, policy, statement, quote).map(|()| level),
    }
}

fn vouched(id: Id, policy: &Policy, statement: &Statement, quote: &HardwareQuote) -> Result<(), Reject> {
    let Some(provider) = policy.provider(&quote.provider) else {
        let name = check::quoted(&quote.provider);
        return Err(Reject::new(Code::QuoteProvider, [&id, &name]));
    };
    let message = quote.signed_bytes();
    if !verifies(&provider.public_key, QUOTE_LABEL, &message, &quote.signature) {
        return Err(Reject::new(Code::QuoteForged, [&id]));
    }
    if quote.nonce != statement.nonce {
        return Err(Reject::new(Code::QuoteForeign, [&id, &"nonce"]));
    }
    if quote.digests[..]
        != [
            &statement.image[..],
            &statement.build[..],
            &statement.artifact[..],
        ]
        .concat()
    {
        return Err(Reject::new(Code::QuoteForeign, [&id, &"set of digests"]));
    }
    Ok(())
}

/// Until when the worker is bound to the proxy that it must be bound to.
fn egress(now: u64, id: Id, policy: &Policy, statement: &Statement) -> Result<u64, Reject> {
    let required = policy.required_egress.as_str();
    let Some(binding) = &statement.egress else {
        if required.is_empty() {
            return Ok(u64::MAX);
        }
        return Err(Reject::new(Code::EgressMissing, [&id, &required]));
    };
    let name = check::quoted(&binding.proxy);
    let Some(proxy) = policy.proxy(&binding.proxy) else {
        return Err(Reject::new(Code::EgressUnknown, [&id, &name]));
    };
    if !required.is_empty() && binding.proxy != required {
        return Err(Reject::new(Code::EgressOther, [&id, &name, &required]));
    }
    let message = binding.signed_bytes();
    if !verifies(&proxy.public_key, EGRESS_LABEL, &message, &binding.signature) {
        return Err(Reject::new(Code::EgressForged, [&id]));
    }
    is_bound(now, id, binding)?;
    Ok(binding.expires_at)
}

fn is_bound(now: u64, id: Id, binding: &EgressBinding) -> Result<(), Reject> {
    let of = Id::from_slice(&binding.worker_id).unwrap_or_default();
    if of != id {
        return Err(Reject::new(Code::EgressForeign, [&id, &of]));
    }
    if binding.not_before > now.saturating_add(limits::ISSUED_AHEAD) {
        return Err(Reject::new(Code::EgressEarly, [&id, &binding.not_before]));
    }
    if now >= binding.expires_at {
        return Err(Reject::new(Code::EgressExpired, [&id, &binding.expires_at]));
    }
    Ok(())
}

/// The tools that are offered, if every one is trusted.
fn tools(id: Id, policy: &Policy, statement: &Statement, proven: Evidence) -> Result<Vec<String>, Reject> {
    let list = &statement.capabilities;
    let bad = |cause: String| Err(Reject::new(Code::CapabilityList, [&id, &cause]));
    if list.is_empty() {
        return bad("it is empty".to_owned());
    }
    if list.len() > limits::CAPABILITIES {
        return bad(format!("it has over {} entries", limits::CAPABILITIES));
    }
    if let Some(odd) = list.iter().find(|claimed| !check::is_short_name(&claimed.name)) {
        return bad(format!("{} is no name for a tool", check::quoted(&odd.name)));
    }
    if let Some(pair) = list.windows(2).find(|pair| pair[0].name >= pair[1].name) {
        let cause = format!(
            "{} comes after {}: each once, by name",
            pair[1].name, pair[0].name
        );
        return bad(cause);
    }
    for claimed in list {
        let Some(trusted) = policy.capability(&claimed.name) else {
            return Err(Reject::new(Code::CapabilityUntrusted, [&id, &claimed.name]));
        };
        if !trusted.authorities.contains(&claimed.authority) {
            let by = check::quoted(&claimed.authority);
            return Err(Reject::new(Code::AuthorityUntrusted, [&id, &claimed.name, &by]));
        }
        if proven < trusted.min_evidence() {
            let wanted = trusted.min_evidence().as_str();
            return Err(Reject::new(
                Code::EvidenceTooLow,
                [&id, &claimed.name, &wanted, &proven.as_str()],
            ));
        }
    }
    Ok(list.iter().map(|claimed| claimed.name.clone()).collect())
}
