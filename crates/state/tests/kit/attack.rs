//! Honest statements, and what attackers make of them.
//!
//! Knows neither a state nor a connection, so that the same table is replayed against apply
//! (`tests/attacks.rs`) and over the wire: a [`Situation`] says who attests to whom, over which nonce and at
//! what time; [`forge`] makes what is shown. Steps that need more than one statement are in
//! [`Attack::before`], for the replaying side to play. Needs `palyra_state`, `p256`, `prost`, `bytes`.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use bytes::Bytes;
use p256::ecdsa::signature::Signer as _;
use p256::ecdsa::{Signature, SigningKey};
use palyra_state::fleet::{
    self, ClaimedCapability, EgressBinding, Evidence, HardwareQuote, Policy, Statement, TrustedCapability,
    TrustedKey, statement,
};
use palyra_state::{Digest, Id};
use prost::Message as _;

/// The table.
pub const TABLE: &str = include_str!("../attacks.txt");

/// One attack.
#[derive(Clone, Debug)]
pub struct Attack {
    pub name: &'static str,
    pub severity: &'static str,
    pub code: &'static str,
    /// Action of the journal's row; empty: the entry itself is refused, and leaves none.
    pub journal: &'static str,
    /// What happens before the statement is shown.
    pub before: Vec<&'static str>,
    /// What is done to the honest statement.
    pub steps: Vec<&'static str>,
}

/// Words that begin a step of [`Attack::before`].
const BEFORE: [&str; 11] = [
    "policy",
    "admitted",
    "refused",
    "replay",
    "challenge",
    "session",
    "late",
    "as",
    "quarantined",
    "revoked",
    "stranger",
];

/// Every attack of the table: `name | severity | code | journal | steps`, steps parted by `;`.
pub fn table() -> Vec<Attack> {
    let lines = TABLE
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let mut columns = line.split('|').map(str::trim);
            let mut next = || {
                columns
                    .next()
                    .unwrap_or_else(|| panic!("a column is missing: {line}"))
            };
            let (name, severity, code, journal) = (next(), next(), next(), next());
            let steps = next().split(';').map(str::trim).filter(|step| !step.is_empty());
            let is_before = |step: &&str| BEFORE.contains(&step.split(' ').next().unwrap());
            let (before, steps) = steps.partition(is_before);
            let journal = if journal == "-" { "" } else { journal };
            Attack {
                name,
                severity,
                code,
                journal,
                before,
                steps,
            }
        })
        .collect()
}

/// Who attests to whom.
#[derive(Clone, Copy, Debug)]
pub struct Situation {
    pub cluster_id: Id,
    pub worker_id: Id,
    pub nonce: Digest,
    /// The cluster's time.
    pub now: u64,
}

/// What is shown.
#[derive(Clone, Debug)]
pub struct Shown {
    pub statement: Bytes,
    pub public_key: Bytes,
    pub signature: Bytes,
}

/// A digest with a name.
pub fn digest(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

fn bytes_of(name: &str) -> Bytes {
    Bytes::copy_from_slice(&digest(name).to_bytes())
}

/// A key with a name.
pub fn key(name: &str) -> SigningKey {
    SigningKey::from_slice(&digest(name).to_bytes()).unwrap()
}

/// SubjectPublicKeyInfo of a key.
pub fn public_key(key: &SigningKey) -> Bytes {
    let mut spki = vec![
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
        0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
    ];
    spki.extend_from_slice(key.verifying_key().to_encoded_point(false).as_bytes());
    spki.into()
}

/// A signature over a label and a message.
pub fn sign(key: &SigningKey, label: &[u8], message: &[u8]) -> Bytes {
    let signature: Signature = key.sign(&[label, message].concat());
    Bytes::copy_from_slice(signature.to_der().as_bytes())
}

fn trusted(name: &str) -> TrustedKey {
    TrustedKey {
        name: name.to_owned(),
        public_key: public_key(&key(name)),
    }
}

fn capability(name: &str, min_evidence: Evidence) -> TrustedCapability {
    TrustedCapability {
        name: name.to_owned(),
        authorities: vec!["ops".to_owned()],
        min_evidence: min_evidence as i32,
    }
}

/// The policy that honest statements meet.
pub fn policy() -> Policy {
    Policy {
        images: vec![digest("image")],
        builds: vec![digest("build")],
        artifacts: vec![digest("artifact")],
        supervisors: vec![digest("supervisor")],
        required_egress: "egress-1".to_owned(),
        egress_proxies: vec![trusted("egress-1"), trusted("egress-2")],
        sdk_protocol_min: 2,
        sdk_protocol_max: 3,
        wit_abis: vec!["0.2.0".to_owned()],
        capabilities: vec![
            capability("echo", Evidence::Supervisor),
            capability("lint", Evidence::SelfReported),
            capability("vault", Evidence::Hardware),
        ],
        max_workers: 100,
        leases_per_worker: 4,
        hardware_providers: vec![trusted("provider-1")],
        ..Policy::default()
    }
}

fn claimed(name: &str, authority: &str) -> ClaimedCapability {
    ClaimedCapability {
        name: name.to_owned(),
        authority: authority.to_owned(),
    }
}

/// What an honest worker says, at the level of evidence `supervisor`; not signed yet.
pub fn honest(at: &Situation) -> Statement {
    let mut egress = EgressBinding {
        proxy: "egress-1".to_owned(),
        worker_id: Bytes::copy_from_slice(&at.worker_id.to_bytes()),
        not_before: at.now - 1_000,
        expires_at: at.now + 12 * 3_600_000,
        signature: Bytes::new(),
    };
    egress.signature = sign(&key("egress-1"), statement::EGRESS_LABEL, &egress.signed_bytes());
    Statement {
        cluster_id: Bytes::copy_from_slice(&at.cluster_id.to_bytes()),
        worker_id: Bytes::copy_from_slice(&at.worker_id.to_bytes()),
        nonce: Bytes::copy_from_slice(&at.nonce.to_bytes()),
        image: bytes_of("image"),
        build: bytes_of("build"),
        artifact: bytes_of("artifact"),
        supervisor: bytes_of("supervisor"),
        evidence: Evidence::Supervisor as u32,
        egress: Some(egress),
        capabilities: vec![claimed("echo", "ops"), claimed("lint", "ops")],
        sdk_protocol: 2,
        wit_abi: "0.2.0".to_owned(),
        issued_at: at.now,
        expires_at: at.now + 6 * 3_600_000,
        slots: 2,
        quote: None,
    }
}

/// What is shown when these steps are done to an honest statement of the worker whose key is `signer`;
/// without steps, the honest one.
pub fn forge(at: &Situation, signer: &SigningKey, steps: &[&str]) -> Shown {
    let mut made = honest(at);
    let last = |step: &&&str| ["sign", "encode", "quote"].contains(&step.split(' ').next().unwrap());
    for step in steps.iter().filter(|step| !last(step)) {
        change(at, &mut made, step);
    }
    for step in steps.iter().filter(|step| step.starts_with("quote")) {
        quote(&mut made, step);
    }
    let mut encoded = made.encode_to_vec();
    for step in steps.iter().filter(|step| step.starts_with("encode")) {
        encode(&made, &mut encoded, step);
    }
    let mut shown = Shown {
        signature: sign(signer, statement::STATEMENT_LABEL, &encoded),
        statement: encoded.into(),
        public_key: public_key(signer),
    };
    for step in steps.iter().filter(|step| step.starts_with("sign")) {
        resign(&mut shown, signer, step);
    }
    shown
}

/// Changes what the statement says: `image other`, `issued +40s`.
fn change(at: &Situation, made: &mut Statement, step: &str) {
    let mut words = step.split(' ');
    let (field, value) = (words.next().unwrap(), words.next().unwrap_or_default());
    let other = words.next().unwrap_or_default();
    let number = || -> u32 { value.parse().unwrap_or_else(|_| panic!("no number: {step}")) };
    let as_digest = || match value {
        "none" => Bytes::new(),
        "short" => bytes_of("x").slice(1..),
        name => bytes_of(name),
    };
    match field {
        "image" => made.image = as_digest(),
        "build" => made.build = as_digest(),
        "artifact" => made.artifact = as_digest(),
        "supervisor" => made.supervisor = as_digest(),
        "nonce" => made.nonce = as_digest(),
        "cluster" => made.cluster_id = bytes_of(value).slice(16..),
        "worker" => made.worker_id = bytes_of(value).slice(16..),
        "evidence" => made.evidence = number(),
        "slots" => made.slots = number(),
        "sdk" => made.sdk_protocol = number(),
        "wit" => made.wit_abi = value.to_owned(),
        "issued" => made.issued_at = moved(at.now, value),
        "expires" => made.expires_at = moved(at.now, value),
        "tools" => tools(made, value, other),
        "egress" => egress(at, made, value),
        _ => panic!("no such step: {step}"),
    }
}

/// A time so far from now: `+40s`, `-1s`, `+40d`.
fn moved(now: u64, by: &str) -> u64 {
    let (sign, rest) = by.split_at(1);
    let (number, unit) = rest.split_at(rest.len() - 1);
    let unit = match unit {
        "s" => 1_000,
        "m" => 60_000,
        "d" => 86_400_000,
        _ => panic!("no unit: {by}"),
    };
    let by = number.parse::<u64>().unwrap() * unit;
    if sign == "-" { now - by } else { now + by }
}

fn tools(made: &mut Statement, value: &str, other: &str) {
    match value {
        "none" => made.capabilities.clear(),
        "twice" => made.capabilities.push(claimed("lint", "ops")),
        "unsorted" => made.capabilities.reverse(),
        "odd" => made.capabilities.push(claimed("z z", "ops")),
        "by" => made.capabilities[0].authority = other.to_owned(),
        "add" => made.capabilities.push(claimed(other, "ops")),
        "many" => made.capabilities = (0..65).map(|at| claimed(&format!("t{at:03}"), "ops")).collect(),
        _ => panic!("no such tools: {value}"),
    }
}

/// Another egress binding: signed as it is, unless it is forged.
fn egress(at: &Situation, made: &mut Statement, value: &str) {
    let mut binding = made.egress.clone().unwrap_or_default();
    let mut signer = "egress-1";
    match value {
        "none" => {
            made.egress = None;
            return;
        }
        "unknown" => (binding.proxy, signer) = ("egress-9".to_owned(), "egress-9"),
        "other" => (binding.proxy, signer) = ("egress-2".to_owned(), "egress-2"),
        "forged" => signer = "stranger",
        "expired" => binding.expires_at = at.now,
        "early" => binding.not_before = at.now + 60_000,
        "foreign" => binding.worker_id = bytes_of("another worker").slice(16..),
        "extended" => binding.expires_at += 1,
        "unsigned" => {}
        _ => panic!("no such binding: {value}"),
    }
    binding.signature = match value {
        "extended" => binding.signature,
        "unsigned" => Bytes::new(),
        _ => sign(&key(signer), statement::EGRESS_LABEL, &binding.signed_bytes()),
    };
    made.egress = Some(binding);
}

/// A quote over the statement as it is by now.
fn quote(made: &mut Statement, step: &str) {
    let mut quote = HardwareQuote {
        provider: "provider-1".to_owned(),
        nonce: made.nonce.clone(),
        digests: [&made.image[..], &made.build[..], &made.artifact[..]]
            .concat()
            .into(),
        signature: Bytes::new(),
    };
    let mut signer = "provider-1";
    match step.split(' ').nth(1).unwrap_or("good") {
        "good" => {}
        "unknown" => (quote.provider, signer) = ("provider-9".to_owned(), "provider-9"),
        "forged" => signer = "stranger",
        "nonce" => quote.nonce = bytes_of("another nonce"),
        "digests" => quote.digests = bytes_of("another image").repeat(3).into(),
        value => panic!("no such quote: {value}"),
    }
    quote.signature = sign(&key(signer), statement::QUOTE_LABEL, &quote.signed_bytes());
    made.quote = Some(quote);
}

/// Other bytes for the same, or nearly the same, statement; signed afterwards.
fn encode(made: &Statement, encoded: &mut Vec<u8>, step: &str) {
    match step.split(' ').nth(1).unwrap_or_default() {
        // Field 40, which nobody knows.
        "unknown-field" => encoded.extend_from_slice(&[0xc0, 0x02, 0x01]),
        // `slots` once more: the later one counts to a reader that does not care.
        "field-twice" => encoded.extend_from_slice(&[0x78, 0x40]),
        "default" => encoded.extend_from_slice(&[0x78, 0x00]),
        "reordered" => {
            let (head, tail) = encoded.split_at(18); // the first field: tag, length, 16 bytes
            *encoded = [tail, head].concat();
        }
        "long-varint" => {
            let at = encoded.len() - 2; // `slots` is the last field, and small
            assert_eq!((encoded[at], u32::from(encoded[at + 1])), (0x78, made.slots));
            encoded[at + 1] |= 0x80;
            encoded.push(0);
        }
        "garbage" => *encoded = vec![0xff; 64],
        "empty" => encoded.clear(),
        "large" => encoded.resize(palyra_state::limits::STATEMENT_MAX + 1, 0),
        _ => panic!("no such encoding: {step}"),
    }
}

fn resign(shown: &mut Shown, signer: &SigningKey, step: &str) {
    match step.split(' ').nth(1).unwrap_or_default() {
        // With a key of its own, and says so.
        "stranger" => {
            let stranger = key("stranger");
            shown.public_key = public_key(&stranger);
            shown.signature = sign(&stranger, statement::STATEMENT_LABEL, &shown.statement);
        }
        // With a key of its own under the worker's name.
        "impostor" => shown.signature = sign(&key("stranger"), statement::STATEMENT_LABEL, &shown.statement),
        "unlabelled" => shown.signature = sign(signer, b"", &shown.statement),
        "egress-label" => shown.signature = sign(signer, statement::EGRESS_LABEL, &shown.statement),
        "none" => shown.signature = Bytes::new(),
        "no-key" => shown.public_key = Bytes::new(),
        "large" => shown.signature = vec![0x30; 4_096].into(),
        // More slots than was signed.
        "tampered" => {
            let mut changed = Statement::decode(shown.statement.clone()).unwrap();
            changed.slots += 1;
            shown.statement = changed.encode_to_vec().into();
        }
        _ => panic!("no such signature: {step}"),
    }
}

/// The policy after a step `policy ..`.
pub fn policy_after(step: &str) -> Option<Policy> {
    let mut changed = policy();
    match step.split(' ').nth(1).unwrap_or_default() {
        "none" => return None,
        "no-images" => changed.images.clear(),
        "no-builds" => changed.builds.clear(),
        "no-artifacts" => changed.artifacts.clear(),
        "no-supervisors" => changed.supervisors.clear(),
        "full" => changed.max_workers = 0,
        "open-egress" => changed.required_egress.clear(),
        _ => panic!("no such policy: {step}"),
    }
    Some(changed)
}

/// The severity that the state gives a code.
pub fn severity_of(code: &str) -> Option<&'static str> {
    let number: i32 = code.strip_prefix('E')?.parse().ok()?;
    palyra_state::Code::try_from(number)
        .ok()
        .map(|code| fleet::severity(code).as_str())
}
