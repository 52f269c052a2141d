//! What workers are held to: the record, its checks, and what differs between two of them.
//!
//! What never lives here: how a statement is held against it (`verify`).

use bytes::Bytes;

use super::{Evidence, verify};
use crate::ids::Digest;
use crate::reject::{Code, Reject};
use crate::{check, limits};

/// What workers are held to; there is one. Without one nobody is admitted.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Policy {
    /// Counts changes, from 1.
    #[prost(uint64, tag = "1")]
    pub version: u64,
    /// When it was set.
    #[prost(uint64, tag = "2")]
    pub set_at: u64,
    /// Actor who set it.
    #[prost(string, tag = "3")]
    pub set_by: String,
    /// SHA-256 of images that may run; an empty list allows none. Sorted, as the lists below are.
    #[prost(message, repeated, tag = "4")]
    pub images: Vec<Digest>,
    /// SHA-256 of worker programs.
    #[prost(message, repeated, tag = "5")]
    pub builds: Vec<Digest>,
    /// SHA-256 of sets of tools.
    #[prost(message, repeated, tag = "6")]
    pub artifacts: Vec<Digest>,
    /// SHA-256 of supervisors whose digests are believed.
    #[prost(message, repeated, tag = "7")]
    pub supervisors: Vec<Digest>,
    /// Name of the proxy that every worker must be bound to; empty: no binding is required, but one that is
    /// shown is checked.
    #[prost(string, tag = "8")]
    pub required_egress: String,
    /// Proxies whose bindings are believed.
    #[prost(message, repeated, tag = "9")]
    pub egress_proxies: Vec<TrustedKey>,
    /// Lowest version of the SDK's protocol.
    #[prost(uint32, tag = "10")]
    pub sdk_protocol_min: u32,
    /// Highest version of the SDK's protocol.
    #[prost(uint32, tag = "11")]
    pub sdk_protocol_max: u32,
    /// Versions of the WIT ABI.
    #[prost(string, repeated, tag = "12")]
    pub wit_abis: Vec<String>,
    /// Tools that may be offered.
    #[prost(message, repeated, tag = "13")]
    pub capabilities: Vec<TrustedCapability>,
    /// Longest life of a lease between two renewals, in milliseconds.
    #[prost(uint64, tag = "14")]
    pub max_lease_ttl: u64,
    /// How long a worker's session may be away before it is orphaned, in milliseconds.
    #[prost(uint64, tag = "15")]
    pub heartbeat_timeout: u64,
    /// Workers that may be admitted.
    #[prost(uint32, tag = "16")]
    pub max_workers: u32,
    /// Slots of one worker.
    #[prost(uint32, tag = "17")]
    pub leases_per_worker: u32,
    /// Hardware, or test, providers whose quotes are believed.
    #[prost(message, repeated, tag = "18")]
    pub hardware_providers: Vec<TrustedKey>,
    /// Longest life of a statement, in milliseconds.
    #[prost(uint64, tag = "19")]
    pub max_attestation_life: u64,
}

/// Somebody whose signature is believed.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TrustedKey {
    /// Short name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// SubjectPublicKeyInfo DER of a P-256 key.
    #[prost(bytes = "bytes", tag = "2")]
    pub public_key: Bytes,
}

/// A tool that may be offered.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TrustedCapability {
    /// Name of the tool.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Who may vouch for it.
    #[prost(string, repeated, tag = "2")]
    pub authorities: Vec<String>,
    /// Least evidence of a worker that is given it.
    #[prost(enumeration = "Evidence", tag = "3")]
    pub min_evidence: i32,
}

impl Policy {
    /// What is said of a tool.
    #[must_use]
    pub fn capability(&self, name: &str) -> Option<&TrustedCapability> {
        self.capabilities.iter().find(|known| known.name == name)
    }

    /// The proxy with this name.
    #[must_use]
    pub fn proxy(&self, name: &str) -> Option<&TrustedKey> {
        self.egress_proxies.iter().find(|known| known.name == name)
    }

    /// The provider with this name.
    #[must_use]
    pub fn provider(&self, name: &str) -> Option<&TrustedKey> {
        self.hardware_providers.iter().find(|known| known.name == name)
    }
}

/// One thing that differs between two policies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The field, or one entry of it: `images`, `capabilities.echo`.
    pub field: String,
    /// As it was; empty: it was not there.
    pub before: String,
    /// As it is; empty: it is not there any more.
    pub after: String,
}

/// What differs between two policies, field by field and entry by entry, in the order of the fields. Without
/// one before, everything that is there is new.
#[must_use]
pub fn diff(before: Option<&Policy>, after: &Policy) -> Vec<Change> {
    let (old, new) = (before.map(entries).unwrap_or_default(), entries(after));
    let was = |field: &String, old: &[(String, String, String)]| {
        old.iter()
            .find(|(known, _, _)| known == field)
            .map(|entry| entry.2.clone())
    };
    let mut changes = Vec::new();
    for (key, field, value) in &new {
        let before = was(key, &old).unwrap_or_default();
        if before != *value {
            changes.push(Change {
                field: field.clone(),
                before,
                after: value.clone(),
            });
        }
    }
    for (key, field, value) in &old {
        if was(key, &new).is_none() {
            changes.push(Change {
                field: field.clone(),
                before: value.clone(),
                after: String::new(),
            });
        }
    }
    changes
}

/// Everything that a policy says: a key that is unique, the field for people, and the value. What is empty is
/// not there.
fn entries(policy: &Policy) -> Vec<(String, String, String)> {
    let mut all: Vec<(String, String, String)> = Vec::new();
    for (field, digests) in [
        ("images", &policy.images),
        ("builds", &policy.builds),
        ("artifacts", &policy.artifacts),
        ("supervisors", &policy.supervisors),
    ] {
        all.extend(digests.iter().map(|digest| listed(field, digest.to_string())));
    }
    all.extend(policy.wit_abis.iter().map(|abi| listed("wit_abis", abi.clone())));
    let keys = |field: &str, keys: &[TrustedKey]| -> Vec<(String, String, String)> {
        let one = |key: &TrustedKey| named(field, &key.name, Digest::of(&key.public_key).to_string());
        keys.iter().map(one).collect()
    };
    all.extend(keys("egress_proxies", &policy.egress_proxies));
    all.extend(keys("hardware_providers", &policy.hardware_providers));
    for trusted in &policy.capabilities {
        let evidence = trusted.min_evidence().as_str();
        let value = format!("{} by {}", evidence, trusted.authorities.join(" "));
        all.push(named("capabilities", &trusted.name, value));
    }
    for (field, value) in [
        ("required_egress", policy.required_egress.clone()),
        ("sdk_protocol_min", policy.sdk_protocol_min.to_string()),
        ("sdk_protocol_max", policy.sdk_protocol_max.to_string()),
        ("max_lease_ttl_ms", policy.max_lease_ttl.to_string()),
        ("heartbeat_timeout_ms", policy.heartbeat_timeout.to_string()),
        ("max_workers", policy.max_workers.to_string()),
        ("leases_per_worker", policy.leases_per_worker.to_string()),
        ("max_attestation_life_ms", policy.max_attestation_life.to_string()),
    ] {
        if !value.is_empty() {
            all.push((field.to_owned(), field.to_owned(), value));
        }
    }
    all
}

/// An entry of a list: it is there or not.
fn listed(field: &str, value: String) -> (String, String, String) {
    (format!("{field} {value}"), field.to_owned(), value)
}

/// An entry with a name: it may change.
fn named(field: &str, name: &str, value: String) -> (String, String, String) {
    let field = format!("{field}.{name}");
    (field.clone(), field, value)
}

/// The policy as it is kept: lists in order, what is 0 and has a default with that.
///
/// # Errors
/// `BadPolicy` with the first thing that is wrong. The server asks this too, for what only checks.
pub fn normal(asked: &Policy) -> Result<Policy, Reject> {
    let mut policy = asked.clone();
    let or = |value: u64, default: u64| if value == 0 { default } else { value };
    policy.max_attestation_life = or(policy.max_attestation_life, limits::ATTESTATION_LIFE);
    policy.heartbeat_timeout = or(policy.heartbeat_timeout, limits::HEARTBEAT_TIMEOUT);
    policy.max_lease_ttl = or(policy.max_lease_ttl, limits::LEASE_TTL_MAX);
    for digests in [
        &mut policy.images,
        &mut policy.builds,
        &mut policy.artifacts,
        &mut policy.supervisors,
    ] {
        digests.sort();
    }
    policy.wit_abis.sort();
    for keys in [&mut policy.egress_proxies, &mut policy.hardware_providers] {
        keys.sort_by(|one, other| one.name.cmp(&other.name));
    }
    policy
        .capabilities
        .sort_by(|one, other| one.name.cmp(&other.name));
    for trusted in &mut policy.capabilities {
        trusted.authorities.sort();
    }
    check_lists(&policy)?;
    check_keys(&policy)?;
    check_capabilities(&policy)?;
    check_ranges(&policy)?;
    Ok(policy)
}

fn bad(cause: &str) -> Reject {
    Reject::new(Code::BadPolicy, [&cause])
}

fn once<T: PartialEq>(field: &str, list: &[T]) -> Result<(), Reject> {
    if list.len() > limits::POLICY_ENTRIES {
        let cause = format!("{field} has over {} entries", limits::POLICY_ENTRIES);
        return Err(bad(&cause));
    }
    if list.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(bad(&format!("{field} names something twice")));
    }
    Ok(())
}

fn check_lists(policy: &Policy) -> Result<(), Reject> {
    for (field, digests) in [
        ("images", &policy.images),
        ("builds", &policy.builds),
        ("artifacts", &policy.artifacts),
        ("supervisors", &policy.supervisors),
    ] {
        once(field, digests)?;
        if digests.iter().any(|digest| digest.is_zero()) {
            return Err(bad(&format!("{field} names a digest that is none")));
        }
    }
    once("wit_abis", &policy.wit_abis)?;
    let is_version = |abi: &String| check::is_short_name(abi);
    if let Some(odd) = policy.wit_abis.iter().find(|abi| !is_version(abi)) {
        return Err(bad(&format!(
            "{} is no version of the WIT ABI",
            check::quoted(odd)
        )));
    }
    Ok(())
}

fn check_keys(policy: &Policy) -> Result<(), Reject> {
    for (field, keys) in [
        ("egress_proxies", &policy.egress_proxies),
        ("hardware_providers", &policy.hardware_providers),
    ] {
        let names: Vec<&str> = keys.iter().map(|key| key.name.as_str()).collect();
        once(field, &names)?;
        for key in keys {
            if !check::is_short_name(&key.name) {
                return Err(bad(&format!(
                    "{} is no name in {field}",
                    check::quoted(&key.name)
                )));
            }
            if !verify::is_key(&key.public_key) {
                return Err(bad(&format!(
                    "the key of {} in {field} is no P-256 key",
                    key.name
                )));
            }
        }
    }
    let required = policy.required_egress.as_str();
    if !required.is_empty() && policy.proxy(required).is_none() {
        let name = check::quoted(required);
        return Err(bad(&format!(
            "required_egress is {name}, which egress_proxies does not name"
        )));
    }
    Ok(())
}

fn check_capabilities(policy: &Policy) -> Result<(), Reject> {
    let names: Vec<&str> = policy.capabilities.iter().map(|one| one.name.as_str()).collect();
    once("capabilities", &names)?;
    for trusted in &policy.capabilities {
        let name = check::quoted(&trusted.name);
        if !check::is_short_name(&trusted.name) {
            return Err(bad(&format!("{name} is no name for a tool")));
        }
        once(&format!("authorities of {name}"), &trusted.authorities)?;
        let most = limits::AUTHORITIES_PER_TOOL;
        if trusted.authorities.is_empty() || trusted.authorities.len() > most {
            return Err(bad(&format!("tool {name} needs 1 to {most} authorities")));
        }
        let odd = |authority: &&String| !check::is_short_name(authority);
        if let Some(odd) = trusted.authorities.iter().find(odd) {
            return Err(bad(&format!(
                "{} is no name for an authority",
                check::quoted(odd)
            )));
        }
        if trusted.min_evidence() == Evidence::None {
            return Err(bad(&format!("tool {name} has no least evidence")));
        }
    }
    Ok(())
}

fn check_ranges(policy: &Policy) -> Result<(), Reject> {
    if policy.sdk_protocol_min == 0 || policy.sdk_protocol_min > policy.sdk_protocol_max {
        return Err(bad(
            "sdk_protocol_min must be at least 1, and at most sdk_protocol_max",
        ));
    }
    for (field, value, least, most) in [
        (
            "max_lease_ttl_ms",
            policy.max_lease_ttl,
            limits::LEASE_TTL_MIN,
            limits::LEASE_TTL_MAX,
        ),
        (
            "heartbeat_timeout_ms",
            policy.heartbeat_timeout,
            limits::HEARTBEAT_TIMEOUT_MIN,
            limits::HEARTBEAT_TIMEOUT_MAX,
        ),
        (
            "max_attestation_life_ms",
            policy.max_attestation_life,
            limits::MINUTE,
            limits::ATTESTATION_LIFE_MAX,
        ),
        ("max_workers", policy.max_workers.into(), 0, limits::WORKERS),
        (
            "leases_per_worker",
            policy.leases_per_worker.into(),
            1,
            limits::SLOTS_PER_WORKER.into(),
        ),
    ] {
        if !(least..=most).contains(&value) {
            return Err(bad(&format!("{field} is {value}; it may be {least} to {most}")));
        }
    }
    Ok(())
}
