//! The policy of workers as a file: TOML that people keep beside their other configuration.
//!
//! What never lives here: whether it is a good one (the cluster checks it, for every way in). Invariant: what is
//! written is
//! read back to the same.

use std::path::Path;

use palyra_client::Class;
use palyra_proto::worker::v1::{FleetPolicy, TrustedCapability, TrustedKey};
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Result};
use crate::output::time::{millis, parse_limit};

/// A file to begin with.
pub(super) const TEMPLATE: &str = "\
# What workers are held to. Nothing that is not named here is admitted.
# On a worker's machine, `palyra worker run --config worker.toml --digests` prints the digests.
images = []       # SHA-256 of images, hex
builds = []       # of worker programs
artifacts = []    # of sets of tools
supervisors = []  # of programs whose own measurements are believed

sdk_protocol_min = 1
sdk_protocol_max = 1
wit_abis = [\"0.2.0\"]

max_lease_ttl = \"1m\"          # longest time between two renewals
heartbeat_timeout = \"30s\"     # how long a worker may be away before it is orphaned
max_attestation_life = \"1d\"
max_workers = 100
leases_per_worker = 4

# The proxy that every worker must be bound to; empty: none is required.
required_egress = \"\"

# A tool, who may vouch for it, and the least evidence of a worker that is given it:
# self-reported, supervisor or hardware.
# [[capabilities]]
# name = \"csv.sum\"
# authorities = [\"ops\"]
# min_evidence = \"supervisor\"

# A proxy: `palyra worker egress keygen` prints this.
# [[egress_proxies]]
# name = \"proxy-1\"
# public_key = \"...\"

# A provider of hardware quotes: its key, as SubjectPublicKeyInfo in hex.
# [[hardware_providers]]
# name = \"tpm-lab\"
# public_key = \"...\"
";

/// The policy as a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    images: Vec<String>,
    builds: Vec<String>,
    artifacts: Vec<String>,
    supervisors: Vec<String>,
    #[serde(default)]
    required_egress: String,
    sdk_protocol_min: u32,
    sdk_protocol_max: u32,
    wit_abis: Vec<String>,
    max_lease_ttl: Time,
    heartbeat_timeout: Time,
    max_attestation_life: Time,
    max_workers: u32,
    leases_per_worker: u32,
    #[serde(default)]
    capabilities: Vec<Capability>,
    #[serde(default)]
    egress_proxies: Vec<Key>,
    #[serde(default)]
    hardware_providers: Vec<Key>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Capability {
    name: String,
    authorities: Vec<String>,
    min_evidence: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Key {
    name: String,
    /// SubjectPublicKeyInfo: hex of its DER.
    public_key: String,
}

/// A time, written so that it is read back to the millisecond.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct Time(u64);

impl TryFrom<String> for Time {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Time, String> {
        parse_limit(&text).map(|time| Time(millis(time)))
    }
}

impl From<Time> for String {
    fn from(Time(ms): Time) -> String {
        let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s")];
        let unit = units.iter().find(|(size, _)| ms > 0 && ms % size == 0);
        unit.map_or_else(
            || format!("{ms}ms"),
            |(size, unit)| format!("{}{unit}", ms / size),
        )
    }
}

impl From<&FleetPolicy> for File {
    fn from(policy: &FleetPolicy) -> File {
        let keys = |keys: &[TrustedKey]| {
            let key = |key: &TrustedKey| Key {
                name: key.name.clone(),
                public_key: hex::encode(&key.public_key),
            };
            keys.iter().map(key).collect()
        };
        File {
            images: policy.images.clone(),
            builds: policy.builds.clone(),
            artifacts: policy.artifacts.clone(),
            supervisors: policy.supervisors.clone(),
            required_egress: policy.required_egress.clone(),
            sdk_protocol_min: policy.sdk_protocol_min,
            sdk_protocol_max: policy.sdk_protocol_max,
            wit_abis: policy.wit_abis.clone(),
            max_lease_ttl: Time(policy.max_lease_ttl_ms),
            heartbeat_timeout: Time(policy.heartbeat_timeout_ms),
            max_attestation_life: Time(policy.max_attestation_life_ms),
            max_workers: policy.max_workers,
            leases_per_worker: policy.leases_per_worker,
            capabilities: policy
                .capabilities
                .iter()
                .map(|tool| Capability {
                    name: tool.name.clone(),
                    authorities: tool.authorities.clone(),
                    min_evidence: tool.min_evidence.clone(),
                })
                .collect(),
            egress_proxies: keys(&policy.egress_proxies),
            hardware_providers: keys(&policy.hardware_providers),
        }
    }
}

impl File {
    /// As the cluster takes it.
    ///
    /// Errors: a key that is not hex. The rest the cluster checks, for every way in.
    fn policy(self) -> std::result::Result<FleetPolicy, String> {
        let key = |key: Key| {
            let public_key = hex::decode(key.public_key.trim()).map_err(|error| {
                format!(
                    "public_key of {:?} is not the hex of a SubjectPublicKeyInfo: {error}",
                    key.name
                )
            })?;
            Ok::<TrustedKey, String>(TrustedKey {
                name: key.name,
                public_key: public_key.into(),
            })
        };
        let keys = |keys: Vec<Key>| {
            keys.into_iter()
                .map(key)
                .collect::<std::result::Result<Vec<_>, _>>()
        };
        Ok(FleetPolicy {
            images: self.images,
            builds: self.builds,
            artifacts: self.artifacts,
            supervisors: self.supervisors,
            required_egress: self.required_egress,
            egress_proxies: keys(self.egress_proxies)?,
            sdk_protocol_min: self.sdk_protocol_min,
            sdk_protocol_max: self.sdk_protocol_max,
            wit_abis: self.wit_abis,
            capabilities: self
                .capabilities
                .into_iter()
                .map(|tool| TrustedCapability {
                    name: tool.name,
                    authorities: tool.authorities,
                    min_evidence: tool.min_evidence,
                })
                .collect(),
            max_lease_ttl_ms: self.max_lease_ttl.0,
            heartbeat_timeout_ms: self.heartbeat_timeout.0,
            max_workers: self.max_workers,
            leases_per_worker: self.leases_per_worker,
            hardware_providers: keys(self.hardware_providers)?,
            max_attestation_life_ms: self.max_attestation_life.0,
            ..FleetPolicy::default()
        })
    }
}

/// What a worker on this machine attests, as far as a policy names it.
pub(crate) struct Measured<'a> {
    pub(crate) image: &'a str,
    pub(crate) build: &'a str,
    pub(crate) artifact: &'a str,
    /// Empty when nobody computed the digests.
    pub(crate) supervisor: &'a str,
    pub(crate) evidence: &'a str,
    /// Name and authority.
    pub(crate) tools: Vec<(&'a str, &'a str)>,
    pub(crate) sdk_protocol: u32,
    pub(crate) wit_abi: &'a str,
    pub(crate) slots: u32,
}

/// A policy that admits one such worker, and what is the same as it: a file for `palyra worker policy set -f`.
pub(crate) fn that_admits(measured: &Measured<'_>) -> Result<String> {
    let mut file: File = toml::from_str(TEMPLATE).map_err(|error| {
        let message = format!("the template of a policy is none: {error}");
        Failure::local(Class::Internal, message, "palyra version")
    })?;
    let one = |digest: &str| match digest {
        "" => Vec::new(),
        digest => vec![digest.to_owned()],
    };
    file.images = one(measured.image);
    file.builds = one(measured.build);
    file.artifacts = one(measured.artifact);
    file.supervisors = one(measured.supervisor);
    file.sdk_protocol_min = measured.sdk_protocol;
    file.sdk_protocol_max = measured.sdk_protocol;
    file.wit_abis = one(measured.wit_abi);
    file.leases_per_worker = file.leases_per_worker.max(measured.slots);
    let capability = |(name, authority): &(&str, &str)| Capability {
        name: (*name).to_owned(),
        authorities: one(authority),
        min_evidence: measured.evidence.to_owned(),
    };
    file.capabilities = measured.tools.iter().map(capability).collect();
    file.capabilities.sort_by(|one, other| one.name.cmp(&other.name));
    to_toml(&file)
}

/// As text.
pub(super) fn to_toml(file: &File) -> Result<String> {
    toml::to_string_pretty(file).map_err(|error| {
        let message = format!("the policy cannot be written as TOML: {error}");
        Failure::local(Class::Internal, message, "try -o json")
    })
}

/// Reads a file; `-` is standard input.
pub(super) fn read(path: &Path) -> Result<FleetPolicy> {
    let text = if path == Path::new("-") {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(path)
    };
    let text = text.map_err(|error| Failure::file("read", path, &error))?;
    let wrong = |error: String| {
        let message = format!("{} is no policy: {error}", path.display());
        Failure::usage(message, "palyra worker policy show --template")
    };
    let file: File = toml::from_str(&text).map_err(|error| wrong(error.to_string().trim_end().to_owned()))?;
    file.policy().map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_a_policy() {
        let file: File = toml::from_str(TEMPLATE).unwrap();
        let policy = file.policy().unwrap();
        assert_eq!(policy.max_lease_ttl_ms, 60_000);
        assert!(policy.images.is_empty(), "it admits nobody");
        let text = TEMPLATE.replace("# [[", "[[");
        let uncommented: String = text
            .lines()
            .map(|line| {
                let line = line
                    .strip_prefix("# ")
                    .filter(|rest| rest.contains(" = "))
                    .unwrap_or(line);
                format!("{line}\n")
            })
            .collect();
        let file: File = toml::from_str(&uncommented).unwrap();
        assert_eq!(
            (file.capabilities.len(), file.egress_proxies.len()),
            (1, 1),
            "what it shows as examples is read, too"
        );
    }

    #[test]
    fn what_is_shown_reads_back_to_the_same() {
        let policy = FleetPolicy {
            images: vec!["ab".repeat(32)],
            required_egress: "p".to_owned(),
            egress_proxies: vec![TrustedKey {
                name: "p".to_owned(),
                public_key: vec![1, 2, 3].into(),
            }],
            capabilities: vec![TrustedCapability {
                name: "sum".to_owned(),
                authorities: vec!["ops".to_owned()],
                min_evidence: "hardware".to_owned(),
            }],
            sdk_protocol_min: 1,
            sdk_protocol_max: 2,
            wit_abis: vec!["0.2.0".to_owned()],
            max_lease_ttl_ms: 61_001,
            heartbeat_timeout_ms: 90_000,
            max_attestation_life_ms: 86_400_000,
            max_workers: 7,
            leases_per_worker: 2,
            ..FleetPolicy::default()
        };
        let text = to_toml(&File::from(&policy)).unwrap();
        for time in ["\"61001ms\"", "\"90s\"", "\"1d\""] {
            assert!(text.contains(time), "{text}");
        }
        let again: File = toml::from_str(&text).unwrap();
        assert_eq!(again.policy().unwrap(), policy);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let unknown = format!("{TEMPLATE}\n[x]\n");
        assert!(toml::from_str::<File>(&unknown).is_err());
        let mut file: File = toml::from_str(TEMPLATE).unwrap();
        file.egress_proxies.push(Key {
            name: "p".to_owned(),
            public_key: "zz".to_owned(),
        });
        assert!(file.policy().unwrap_err().contains("\"p\""));
    }
}
