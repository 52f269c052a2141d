//! `palyra worker policy`: what workers are held to, as a file that people keep.
//!
//! What never lives here: what a policy allows (the cluster's state machine). Invariants: what `show -o toml` prints, `set -f`
//! reads back to the same; a change is shown, field by field, before it is made, and is made to what was shown or not at all.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use palyra_client::{Class, Client, new_ulid, wall_ms};
use palyra_proto::worker::v1::{
    FleetPolicy, PolicyChange, SetPolicyRequest, SetPolicyResponse, TrustedCapability, TrustedKey,
};
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Result};
use crate::output::time::{Moment, millis, parse_limit, span};
use crate::output::{Format, Source, confirm, note};
use crate::session::Global;

/// What can be done about the policy.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Shows the policy; `-o toml` prints what `set -f` reads
    #[command(
        after_help = "Example:\n  palyra worker policy show -o toml > policy.toml\n  \
                            palyra worker policy show --template > policy.toml"
    )]
    Show {
        /// Print a file to begin with instead: it admits nobody until digests and tools are written into it
        #[arg(long)]
        template: bool,
    },
    /// Shows what a file would change, asks, and replaces the policy
    #[command(
        after_help = "Example:\n  palyra worker policy set -f policy.toml --dry-run\n  \
                            palyra worker policy set -f policy.toml --expect-version 3 --yes"
    )]
    Set(Set),
}

/// How the policy is set.
#[derive(Debug, Args)]
pub(crate) struct Set {
    /// The file; - for standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Show what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// The version that it replaces; without it the present one
    #[arg(long, value_name = "VERSION")]
    expect_version: Option<u64>,
    /// Why; kept in the journal
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// A file to begin with.
const TEMPLATE: &str = "\
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
struct File {
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

/// The policy as it is printed.
#[derive(Debug, Serialize)]
struct PolicyView {
    version: u64,
    set_at: Moment,
    set_by: String,
    #[serde(flatten)]
    rules: File,
}

#[derive(Debug, Serialize)]
struct ChangeView {
    field: String,
    before: String,
    after: String,
}

/// What a change of the policy was, or would be.
#[derive(Debug, Serialize)]
struct SetView {
    version: u64,
    dry_run: bool,
    changes: Vec<ChangeView>,
    /// Workers whose statement the new policy does not allow.
    affected: u64,
}

/// Does what was asked about the policy.
pub(crate) async fn run(global: &Global, client: &Client, verb: Verb) -> Result {
    match verb {
        Verb::Show { .. } => show(global, client).await,
        Verb::Set(ask) => set(global, client, ask).await,
    }
}

/// The file to begin with.
pub(crate) fn template(global: &Global) -> Result {
    global.out().write(TEMPLATE)
}

async fn present(client: &Client) -> Result<(FleetPolicy, Source)> {
    let answer = client.worker_policy().await?;
    Ok((answer.policy.unwrap_or_default(), answer.read.into()))
}

async fn show(global: &Global, client: &Client) -> Result {
    let (policy, source) = present(client).await?;
    let out = global.out();
    if policy.version == 0 && (out.format.is_table() || out.format == Format::Toml) {
        let next =
            "palyra worker policy show --template > policy.toml, and palyra worker policy set -f policy.toml";
        let message = "no policy was ever set: nobody is admitted";
        return Err(Failure::local(Class::NotFound, message, next));
    }
    if out.format == Format::Toml {
        let head = format!(
            "# version {}, set {} by {}\n",
            policy.version,
            Moment(policy.set_at_ms).rfc3339().unwrap_or_default(),
            policy.set_by
        );
        return out.write(&(head + &to_toml(&File::from(&policy))?));
    }
    let facts = facts(&policy);
    let view = PolicyView {
        version: policy.version,
        set_at: Moment(policy.set_at_ms),
        set_by: policy.set_by.clone(),
        rules: File::from(&policy),
    };
    out.one(&view, source, &facts)
}

fn to_toml(file: &File) -> Result<String> {
    toml::to_string_pretty(file).map_err(|error| {
        let message = format!("the policy cannot be written as TOML: {error}");
        Failure::local(Class::Internal, message, "try -o json")
    })
}

/// All of it, for people.
fn facts(policy: &FleetPolicy) -> Vec<(&'static str, String)> {
    let set = Moment(policy.set_at_ms).told(wall_ms());
    let list = |list: &[String]| {
        if list.is_empty() {
            "none: nobody is admitted".to_owned()
        } else {
            list.join("\n")
        }
    };
    let keys = |keys: &[TrustedKey]| {
        keys.iter()
            .map(|key| key.name.clone())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let tools: Vec<String> = policy
        .capabilities
        .iter()
        .map(|tool| {
            let by = tool.authorities.join(" or ");
            format!(
                "{}: vouched for by {by}, from {} on",
                tool.name, tool.min_evidence
            )
        })
        .collect();
    vec![
        (
            "policy",
            format!("version {}, set {set} by {}", policy.version, policy.set_by),
        ),
        ("images", list(&policy.images)),
        ("builds", list(&policy.builds)),
        ("artifacts", list(&policy.artifacts)),
        ("supervisors", policy.supervisors.join("\n")),
        ("tools", list(&tools)),
        (
            "versions",
            format!(
                "SDK protocol {} to {}, WIT ABI {}",
                policy.sdk_protocol_min,
                policy.sdk_protocol_max,
                policy.wit_abis.join(", ")
            ),
        ),
        (
            "egress",
            match policy.required_egress.as_str() {
                "" => "no binding is required".to_owned(),
                proxy => format!("every worker is bound to {proxy}"),
            },
        ),
        ("proxies", keys(&policy.egress_proxies)),
        ("providers", keys(&policy.hardware_providers)),
        (
            "leases",
            format!(
                "{} a worker, {} at most between renewals",
                policy.leases_per_worker,
                span(policy.max_lease_ttl_ms)
            ),
        ),
        (
            "workers",
            format!(
                "{} at most; orphaned after {} away",
                policy.max_workers,
                span(policy.heartbeat_timeout_ms)
            ),
        ),
        (
            "statements",
            format!("good for {} at most", span(policy.max_attestation_life_ms)),
        ),
    ]
}

fn read(path: &Path) -> Result<FleetPolicy> {
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

async fn set(global: &Global, client: &Client, ask: Set) -> Result {
    let policy = read(&ask.file)?;
    let expected_version = match ask.expect_version {
        Some(version) => version,
        None => present(client).await?.0.version,
    };
    let request = |request_id, dry_run| SetPolicyRequest {
        request_id,
        policy: Some(policy.clone()),
        expected_version,
        reason: ask.reason.clone(),
        dry_run,
    };
    let would = client.set_worker_policy(request(new_ulid(), true)).await?;
    if ask.dry_run {
        return print(global, would, expected_version, true);
    }
    let changes: Vec<ChangeView> = would.changes.iter().map(ChangeView::from).collect();
    for change in &changes {
        note(&change.told());
    }
    if changes.is_empty() {
        note("nothing changes: the policy is that already");
        return print(global, would, expected_version, true);
    }
    let affected = quarantines(would.affected, "are quarantined");
    let what = format!("the policy goes from version {expected_version} on; {affected}");
    if ask.yes {
        note(&what);
    } else {
        let again = format!(
            "palyra worker policy set -f {} --expect-version {expected_version} --yes",
            ask.file.display()
        );
        confirm(&what, &again)?;
    }
    let done = client
        .set_worker_policy(request(global.request_id(), false))
        .await?;
    print(global, done, expected_version, false)
}

impl From<&PolicyChange> for ChangeView {
    fn from(change: &PolicyChange) -> ChangeView {
        ChangeView {
            field: change.field.clone(),
            before: change.before.clone(),
            after: change.after.clone(),
        }
    }
}

impl ChangeView {
    /// `field: before → after`.
    fn told(&self) -> String {
        let or_none = |text: &str| if text.is_empty() { "(none)" } else { text }.to_owned();
        format!(
            "  {}: {} → {}",
            self.field,
            or_none(&self.before),
            or_none(&self.after)
        )
    }
}

fn quarantines(affected: u64, words: &str) -> String {
    match affected {
        0 => "no worker's statement fails it".to_owned(),
        1 => format!(
            "1 worker's statement fails it: with its leases it {}",
            words.replace("are", "is")
        ),
        count => format!("the statements of {count} workers fail it: with their leases they {words}"),
    }
}

fn print(global: &Global, answer: SetPolicyResponse, before: u64, dry_run: bool) -> Result {
    let view = SetView {
        version: answer.policy.as_ref().map_or(before, |policy| policy.version),
        dry_run,
        changes: answer.changes.iter().map(ChangeView::from).collect(),
        affected: answer.affected,
    };
    let changes: Vec<String> = view.changes.iter().map(ChangeView::told).collect();
    let state = if dry_run {
        format!("version {before}; nothing was changed")
    } else {
        format!("version {}", view.version)
    };
    let words = if dry_run {
        "would be quarantined"
    } else {
        "are quarantined"
    };
    let facts = [
        ("policy", state),
        (
            if dry_run { "would change" } else { "changed" },
            if changes.is_empty() {
                "nothing".to_owned()
            } else {
                changes.join("\n")
            },
        ),
        ("workers", quarantines(view.affected, words)),
    ];
    global.out().one(&view, answer.write.into(), &facts)
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

    #[test]
    fn a_change_is_told_with_its_blast_radius() {
        let change = ChangeView {
            field: "max_workers".to_owned(),
            before: String::new(),
            after: "9".to_owned(),
        };
        assert_eq!(change.told(), "  max_workers: (none) → 9");
        assert_eq!(
            quarantines(1, "are quarantined"),
            "1 worker's statement fails it: with its leases it is quarantined"
        );
        assert!(quarantines(3, "would be quarantined").starts_with("the statements of 3 workers"));
    }
}
