//! Workers for tests: the real `palyra worker run` in a folder of its own, and the policy that admits it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use palyra_proto::approval::v1::{CreateGrantRequest, DecideRequest, GrantInfo};
use palyra_proto::run::v1::{GetRunRequest, RunInfo};
use palyra_proto::worker::v1::{
    FleetPolicy, GetWorkerRequest, SetPolicyRequest, TrustedCapability, WorkerInfo,
};
use serde_json::Value;

use crate::cluster::{Cluster, binary, eventually};
use crate::node::Agent;

/// Sums the second column of all tables in `in`, a line of log for each step, one step each 200 ms.
const SUM: &str = r#"#!/bin/sh
set -e
params=$(cat)
steps=$(echo "$params" | sed -n 's/.*"steps": *\([0-9]*\).*/\1/p')
i=0
while [ "$i" -lt "${steps:-1}" ]; do
    i=$((i + 1))
    echo "step $i of attempt $PALYRA_ATTEMPT" >&2
    sleep 0.2
done
ls in/*.csv > /dev/null
sum=$(cat in/*.csv | awk -F, '{ s += $2 } END { print s + 0 }')
echo "{\"sum\":$sum}" > out/sum.json
echo "{\"sum\":$sum}"
"#;

/// The folder of a worker's tools and its configuration.
#[derive(Debug, Clone)]
pub struct Shop {
    /// The configuration's file.
    pub config: PathBuf,
    dir: PathBuf,
}

impl Shop {
    /// Writes the tool `csv.sum` and a configuration that offers it.
    #[must_use]
    pub fn open(cluster: &Cluster, name: &str, slots: u32) -> Self {
        let dir = cluster.path().join(format!("shop-{name}"));
        std::fs::create_dir_all(&dir).unwrap();
        let config = dir.join("worker.toml");
        let text = format!(
            "slots = {slots}\nrequire = []\n\n[[tools]]\nname = \"csv.sum\"\nauthority = \"ops\"\n\
             command = [\"./sum.sh\"]\n"
        );
        std::fs::write(&config, text).unwrap();
        let shop = Self { config, dir };
        shop.write_tool(SUM);
        shop
    }

    /// Puts another program in the tool's place.
    pub fn write_tool(&self, text: &str) {
        let tool = self.dir.join("sum.sh");
        std::fs::write(&tool, text).unwrap();
        std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// The tool's text.
    #[must_use]
    pub fn tool(&self) -> String {
        std::fs::read_to_string(self.dir.join("sum.sh")).unwrap()
    }

    /// The tool as it was at first.
    pub fn restore_tool(&self) {
        self.write_tool(SUM);
    }

    /// What a worker with this configuration attests, as `palyra` measures it.
    #[must_use]
    pub fn digests(&self, cluster: &Cluster) -> Value {
        let config = self.config.display().to_string();
        let answer = cluster.palyra(&["worker", "run", "--config", &config, "--digests", "-o", "json"]);
        serde_json::from_str(&answer.ok().out).unwrap()
    }
}

impl Cluster {
    /// Runs a worker of a paired folder.
    #[must_use]
    pub fn start_worker(&self, dir: &Path, shop: &Shop) -> Agent {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let log = self.path().join(format!("logs/{name}.log"));
        let file = std::fs::File::options()
            .append(true)
            .create(true)
            .open(&log)
            .unwrap();
        let mut command = Command::new(binary("palyra"));
        command
            .args(["worker", "run", "--data-dir"])
            .arg(dir)
            .arg("--config")
            .arg(&shop.config)
            .stdin(Stdio::null());
        let child = command
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        self.note(&name, child.id());
        Agent::of(child, log)
    }

    /// Has the policy be one that admits workers of this shop. Answers it.
    pub async fn admit(&self, shop: &Shop) -> FleetPolicy {
        let digests = shop.digests(self);
        let one = |name: &str| vec![digests[name].as_str().unwrap().to_owned()];
        let policy = FleetPolicy {
            images: one("image"),
            builds: one("build"),
            artifacts: one("artifact"),
            supervisors: one("supervisor"),
            sdk_protocol_min: 1,
            sdk_protocol_max: 1,
            wit_abis: vec!["0.2.0".to_owned()],
            capabilities: vec![TrustedCapability {
                name: "csv.sum".to_owned(),
                authorities: vec!["ops".to_owned()],
                min_evidence: "supervisor".to_owned(),
            }],
            max_lease_ttl_ms: 60_000,
            heartbeat_timeout_ms: 10_000,
            max_workers: 10,
            leases_per_worker: 4,
            max_attestation_life_ms: 3_600_000,
            ..FleetPolicy::default()
        };
        let present = self.client().worker_policy().await.unwrap().policy;
        let same = FleetPolicy {
            version: 0,
            set_at_ms: 0,
            set_by: String::new(),
            ..present.unwrap_or_default()
        };
        if same != policy {
            self.set_policy(policy.clone()).await;
        }
        policy
    }

    /// Replaces the policy, whatever it is now.
    pub async fn set_policy(&self, policy: FleetPolicy) {
        let client = self.client();
        let present = client.worker_policy().await.unwrap().policy.unwrap_or_default();
        let request = SetPolicyRequest {
            policy: Some(policy),
            expected_version: present.version,
            reason: "a test".to_owned(),
            ..SetPolicyRequest::default()
        };
        client.set_worker_policy(request).await.unwrap();
    }

    /// A worker as the control plane has it; nothing when it has none of that id.
    pub async fn worker(&self, id: &str) -> Option<WorkerInfo> {
        let request = GetWorkerRequest {
            id: id.to_owned(),
            read: None,
        };
        self.client().get_worker(request).await.ok()?.worker
    }

    /// Waits until a worker stands there.
    pub async fn worker_is(&self, id: &str, lifecycle: &str) -> WorkerInfo {
        eventually(&format!("worker {id} to be {lifecycle}"), async || {
            self.worker(id)
                .await
                .filter(|worker| worker.lifecycle == lifecycle)
        })
        .await
    }

    /// Waits until a run is as asked for.
    pub async fn run_is(&self, id: &str, what: &str, is: impl Fn(&RunInfo) -> bool) -> RunInfo {
        let client = self.client();
        eventually(&format!("run {id} {what}"), async || {
            let request = GetRunRequest {
                id: id.to_owned(),
                read: None,
            };
            client.get_run(request).await.ok()?.run.filter(|run| is(run))
        })
        .await
    }

    /// Permission to run something once, asked for and given.
    pub async fn granted(&self, tool: &str) -> GrantInfo {
        let client = self.client();
        let request = CreateGrantRequest {
            grant_id: palyra_client::new_ulid(),
            run_id: palyra_client::new_ulid(),
            tool: tool.to_owned(),
            summary: "a test".to_owned(),
            ..CreateGrantRequest::default()
        };
        let grant = client.create_grant(request).await.unwrap().grant.unwrap();
        let decide = DecideRequest {
            id: grant.approval_id.clone(),
            decision: "allow".to_owned(),
            reason: "a test".to_owned(),
            ..DecideRequest::default()
        };
        client.decide_approval(decide).await.unwrap();
        grant
    }
}
