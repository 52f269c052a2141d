//! The attack table over the wire: a paired device with its real key, over mutual TLS, against real replicas.
//!
//! The table and what makes statements of it are those of `crates/state/tests`: what is refused there with a code
//! is refused
//! here with the same one, and the journal, read by an operator, has the same row. Each line that this prints is
//! one attack.

use std::path::PathBuf;

use p256::ecdsa::SigningKey;
use p256::pkcs8::DecodePrivateKey as _;
use palyra_proto::journal::v1::{Row, TailRequest};
use palyra_proto::node::v1::RevokeDeviceRequest;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message::Body as Said;
use palyra_proto::worker::v1 as wire;
use palyra_proto::worker::v1::worker_message::Body as Say;
use palyra_proto::worker::v1::worker_order::Body as Order;
use palyra_state::fleet::{Evidence, Policy};
use palyra_state::{Digest, Id};
use palyra_tests::cluster::Cluster;
use palyra_tests::node::{Puppet, identity, refusal};

#[path = "../../../crates/state/tests/kit/attack.rs"]
mod attack;

use attack::{Attack, Shown, Situation};

/// What came of an attack over the wire.
#[derive(Debug, PartialEq)]
enum Came {
    /// Refused, with this code; and the row of the journal, if it has one.
    Refused(String, String),
    /// A node cannot say it: why.
    Unsayable(&'static str),
}

/// The device that attacks.
struct Attacker {
    name: String,
    dir: PathBuf,
    id: String,
    key: SigningKey,
    puppet: Puppet,
    at: u64,
}

impl Attacker {
    async fn pair(cluster: &Cluster, name: &str) -> Self {
        let dir = cluster.pair_node(name).await;
        let (id, credential) = identity(&dir);
        let pair = credential.key_pair().unwrap();
        let key = SigningKey::from_pkcs8_der(pair.to_pkcs8()).unwrap();
        let puppet = Puppet::attach(&dir, &cluster.node_addr(1), Vec::new())
            .await
            .unwrap();
        let name = name.to_owned();
        Self {
            name,
            dir,
            id,
            key,
            puppet,
            at: 1,
        }
    }

    /// Another session, at the next replica.
    async fn attach_again(&mut self, cluster: &Cluster) {
        self.at = self.at % 3 + 1;
        self.puppet = Puppet::attach(&self.dir, &cluster.node_addr(self.at), Vec::new())
            .await
            .unwrap();
    }

    async fn say(&self, body: Say) {
        self.puppet
            .say(Body::Worker(wire::WorkerMessage { body: Some(body) }))
            .await;
    }

    /// The next order.
    async fn hear(&mut self) -> Order {
        loop {
            match self.puppet.hear().await.unwrap() {
                Some(Said::Worker(order)) => return order.body.unwrap(),
                Some(_) => {}
                None => panic!("the session of {} ended", self.name),
            }
        }
    }

    /// A challenge, or the code that it is refused with.
    async fn challenged(&mut self) -> Result<Situation, String> {
        let request_id = palyra_client::new_ulid();
        let ask = wire::ChallengeRequest {
            request_id: request_id.clone(),
        };
        self.say(Say::Challenge(ask)).await;
        loop {
            match self.hear().await {
                Order::Challenge(challenge) => {
                    return Ok(Situation {
                        cluster_id: Id::from_slice(&challenge.cluster_id).unwrap(),
                        worker_id: Id::parse(&self.id).unwrap(),
                        nonce: Digest::from_slice(&challenge.nonce).unwrap(),
                        now: challenge.now_ms,
                    });
                }
                Order::Answer(answer) if answer.request_id == request_id => return Err(answer.code),
                _ => {}
            }
        }
    }

    fn forge(&self, at: &Situation, steps: &[&str]) -> Shown {
        attack::forge(at, &self.key, steps)
    }

    /// Shows a statement: the code that it is refused with, empty when it is accepted.
    async fn show(&mut self, shown: Shown) -> String {
        let request_id = palyra_client::new_ulid();
        let attest = wire::Attest {
            request_id: request_id.clone(),
            statement: shown.statement,
            public_key: shown.public_key,
            signature: shown.signature,
        };
        self.say(Say::Attest(attest)).await;
        loop {
            match self.hear().await {
                Order::Attested(answer) if answer.request_id == request_id => {
                    assert_eq!(answer.admitted, answer.code.is_empty(), "{answer:?}");
                    return answer.code;
                }
                Order::Answer(answer) if answer.request_id == request_id => {
                    assert!(!answer.accepted, "{answer:?}");
                    return answer.code;
                }
                _ => {}
            }
        }
    }

    async fn attests(&mut self, steps: &[&str]) -> String {
        let at = self.challenged().await.unwrap();
        let shown = self.forge(&at, steps);
        self.show(shown).await
    }

    /// Neither admitted nor quarantined.
    async fn reset(&mut self, cluster: &Cluster) {
        let Some(worker) = cluster.worker(&self.id).await else {
            return;
        };
        if worker.quarantine.is_some() {
            reverify(cluster, &self.id).await;
            assert_eq!(
                self.attests(&[]).await,
                "",
                "an honest statement lifts a quarantine"
            );
        }
        if self.is_admitted(cluster).await {
            assert_eq!(self.attests(&["sdk 9"]).await, "E0827");
        }
        assert!(!self.is_admitted(cluster).await);
    }

    /// Whether it may be given work, but for its session.
    async fn is_admitted(&self, cluster: &Cluster) -> bool {
        cluster.worker(&self.id).await.is_some_and(|worker| {
            worker.quarantine.is_none()
                && worker.attestation.is_some_and(|known| {
                    known.policy_version != 0 && known.expires_at_ms > palyra_client::wall_ms()
                })
        })
    }
}

async fn reverify(cluster: &Cluster, id: &str) {
    let request = wire::WorkerRequest {
        id: id.to_owned(),
        reason: "a test".to_owned(),
        ..wire::WorkerRequest::default()
    };
    cluster.client().reverify_worker(request).await.unwrap();
}

/// A policy of the state machine as operators set it.
fn on_the_wire(policy: &Policy) -> wire::FleetPolicy {
    let digests = |digests: &[Digest]| {
        digests
            .iter()
            .map(|digest| hex::encode(digest.to_bytes()))
            .collect()
    };
    let keys = |keys: &[palyra_state::fleet::TrustedKey]| {
        let key = |key: &palyra_state::fleet::TrustedKey| wire::TrustedKey {
            name: key.name.clone(),
            public_key: key.public_key.clone(),
        };
        keys.iter().map(key).collect()
    };
    wire::FleetPolicy {
        images: digests(&policy.images),
        builds: digests(&policy.builds),
        artifacts: digests(&policy.artifacts),
        supervisors: digests(&policy.supervisors),
        required_egress: policy.required_egress.clone(),
        egress_proxies: keys(&policy.egress_proxies),
        sdk_protocol_min: policy.sdk_protocol_min,
        sdk_protocol_max: policy.sdk_protocol_max,
        wit_abis: policy.wit_abis.clone(),
        capabilities: policy
            .capabilities
            .iter()
            .map(|tool| wire::TrustedCapability {
                name: tool.name.clone(),
                authorities: tool.authorities.clone(),
                min_evidence: Evidence::try_from(tool.min_evidence).unwrap().as_str().to_owned(),
            })
            .collect(),
        max_lease_ttl_ms: policy.max_lease_ttl,
        heartbeat_timeout_ms: policy.heartbeat_timeout,
        max_workers: policy.max_workers,
        leases_per_worker: policy.leases_per_worker,
        hardware_providers: keys(&policy.hardware_providers),
        max_attestation_life_ms: policy.max_attestation_life,
        ..wire::FleetPolicy::default()
    }
}

/// The newest row of refused statements of a device.
async fn newest_row(cluster: &Cluster, id: &str) -> Option<Row> {
    let request = TailRequest {
        // The newest rows of all: what followed from it comes behind it.
        last: 64,
        action_prefix: "worker.attestation_refused".to_owned(),
        subject: id.to_owned(),
        ..TailRequest::default()
    };
    let mut tail = cluster
        .client()
        .follow(request, Some(std::time::Duration::from_secs(20)));
    let mut newest = None;
    loop {
        match tail.next().await.unwrap() {
            palyra_client::Step::Rows(rows) => newest = rows.into_iter().next_back().or(newest),
            palyra_client::Step::End => return newest,
            _ => {}
        }
    }
}

/// What a step before the statement leaves behind: a statement that is shown later, whether a challenge is still to
/// be asked for, or
/// the end of the attack.
struct Before {
    kept: Option<Shown>,
    open: bool,
    came: Option<Came>,
}

impl Before {
    /// Of steps that end the attack, or that need the operator.
    async fn step(&mut self, cluster: &Cluster, attacker: &mut Attacker, step: &str) {
        let mut words = step.split(' ');
        match (words.next().unwrap(), words.next().unwrap_or_default()) {
            ("policy", "none") => {
                let policy = cluster.client().worker_policy().await.unwrap().policy;
                if policy.is_some_and(|policy| policy.version != 0) {
                    self.came = Some(Came::Unsayable("this cluster has a policy by now, and keeps one"));
                }
            }
            ("policy", _) => {
                let policy = attack::policy_after(step).unwrap();
                cluster.set_policy(on_the_wire(&policy)).await;
            }
            ("session", "old") => {
                self.came = Some(Came::Unsayable(
                    "the epoch is the replica's to say, not the node's",
                ));
            }
            ("late", _) => {
                self.came = Some(Came::Unsayable(
                    "a challenge is good for two minutes of real time",
                ));
            }
            ("as", _) => self.came = Some(in_anothers_name(cluster, attacker).await),
            ("revoked", _) => self.came = Some(after_the_end(cluster, attacker).await),
            ("quarantined", how) => {
                let request = wire::WorkerRequest {
                    id: attacker.id.clone(),
                    reason: "looks odd".to_owned(),
                    ..wire::WorkerRequest::default()
                };
                cluster.client().quarantine_worker(request).await.unwrap();
                self.open = how == "reverify";
                if self.open {
                    reverify(cluster, &attacker.id).await;
                } else {
                    assert_eq!(attacker.challenged().await.unwrap_err(), "E0803");
                }
            }
            _ => self.say(cluster, attacker, step).await,
        }
    }

    /// Of steps that the worker says itself.
    async fn say(&mut self, cluster: &Cluster, attacker: &mut Attacker, step: &str) {
        match step {
            "admitted" => assert_eq!(attacker.attests(&[]).await, ""),
            "stranger" => self.open = false,
            "challenge none" => {
                assert_eq!(attacker.attests(&["sdk 9"]).await, "E0827");
                self.open = false;
            }
            "refused" => {
                let at = attacker.challenged().await.unwrap();
                self.kept = Some(attacker.forge(&at, &[]));
                let bad = attacker.forge(&at, &["sdk 9"]);
                assert_ne!(attacker.show(bad).await, "");
                self.open = false;
            }
            "replay closed" | "replay open" => {
                let at = attacker.challenged().await.unwrap();
                let honest = attacker.forge(&at, &[]);
                assert_eq!(attacker.show(honest.clone()).await, "");
                self.kept = Some(honest);
                self.open = step == "replay open";
            }
            // A replica shows an open challenge again; in another session there is another.
            "challenge again" | "session new" => {
                let at = attacker.challenged().await.unwrap();
                self.kept = Some(attacker.forge(&at, &[]));
                attacker.attach_again(cluster).await;
                self.open = step == "challenge again";
            }
            _ => panic!("no such step: {step}"),
        }
    }
}

/// Plays one attack.
async fn play(cluster: &Cluster, attacker: &mut Attacker, attack: &Attack) -> Came {
    let mut before = Before {
        kept: None,
        open: true,
        came: None,
    };
    for step in &attack.before {
        before.step(cluster, attacker, step).await;
        if let Some(came) = before.came {
            return came;
        }
    }
    let Before { kept, open, .. } = before;
    let now = Situation {
        cluster_id: Id::ZERO,
        worker_id: Id::parse(&attacker.id).unwrap(),
        nonce: attack::digest("no nonce"),
        now: palyra_client::wall_ms(),
    };
    let at = if open {
        attacker.challenged().await.unwrap()
    } else {
        now
    };
    let shown = kept.unwrap_or_else(|| attacker.forge(&at, &attack.steps));
    let before = newest_row(cluster, &attacker.id).await.and_then(|row| row.cursor);
    let code = attacker.show(shown).await;
    let row = newest_row(cluster, &attacker.id)
        .await
        .filter(|row| row.cursor != before);
    if let Some(row) = &row {
        assert_eq!(
            (&row.detail["code"], row.detail["severity"].as_str()),
            (&code, attack.severity),
            "{}: the row and the answer differ",
            attack.name
        );
    }
    Came::Refused(code, row.map(|row| row.action).unwrap_or_default())
}

/// What one device says in the name of another ends its stream.
async fn in_anothers_name(cluster: &Cluster, attacker: &mut Attacker) -> Came {
    let other = palyra_client::new_ulid();
    let at = attacker.challenged().await.unwrap();
    let shown = attacker.forge(&at, &[]);
    let attest = wire::Attest {
        request_id: palyra_client::new_ulid(),
        statement: shown.statement,
        public_key: shown.public_key,
        signature: shown.signature,
    };
    let body = Body::Worker(wire::WorkerMessage {
        body: Some(Say::Attest(attest)),
    });
    attacker.puppet.say_as(&other, body).await;
    let code = loop {
        match attacker.puppet.hear().await {
            // A goodbye first, and then why.
            Ok(Some(_)) => {}
            Ok(None) => break "ended".to_owned(),
            Err(status) => break refusal(&status).0,
        }
    };
    attacker.attach_again(cluster).await;
    Came::Refused(code, String::new())
}

/// A revoked device has no session to say anything in.
async fn after_the_end(cluster: &Cluster, attacker: &mut Attacker) -> Came {
    let fresh = Attacker::pair(cluster, "attacker-revoked").await;
    let old = std::mem::replace(attacker, fresh);
    let honest = attacker.challenged().await.unwrap();
    let _ = attacker.forge(&honest, &[]);
    let revoke = RevokeDeviceRequest {
        device_id: attacker.id.clone(),
        reason: "a test".to_owned(),
        ..RevokeDeviceRequest::default()
    };
    cluster.client().revoke_device(revoke).await.unwrap();
    let again = Puppet::attach(&attacker.dir, &cluster.node_addr(2), Vec::new()).await;
    let code = match again {
        Ok(_) => String::new(),
        Err(status) => {
            let code = refusal(&status).0;
            // TLS itself may end it, before any code could be said.
            if code.starts_with('E') {
                code
            } else {
                "E0302".to_owned()
            }
        }
    };
    *attacker = old;
    Came::Refused(code, String::new())
}

/// Every attack of the table, by a device with a real key, over real connections.
pub(crate) async fn the_attack_table_over_the_wire(cluster: &mut Cluster) {
    let mut attacker = Attacker::pair(cluster, "attacker").await;
    let mut table = attack::table();
    // What needs a cluster without a policy comes first.
    table.sort_by_key(|attack| !attack.before.contains(&"policy none"));
    let base = on_the_wire(&attack::policy());
    let (mut wrong, mut unsayable, mut has_policy) = (Vec::new(), 0, false);
    println!(
        "{:28} {:8} {:5} {:28} {:5} wire",
        "attack", "severity", "code", "journal", "apply"
    );
    for attack in &table {
        let fresh = attack.before.contains(&"stranger");
        if fresh {
            let name = format!("attacker-{}", attack.name.len());
            let other = Attacker::pair(cluster, &name).await;
            let known = std::mem::replace(&mut attacker, other);
            let came = play(cluster, &mut attacker, attack).await;
            report(attack, &came, &mut wrong, &mut unsayable);
            crate::dispatch::retire(cluster, &attacker.id).await;
            attacker = known;
            continue;
        }
        if !attack.before.contains(&"policy none") {
            if !has_policy {
                cluster.set_policy(base.clone()).await;
                has_policy = true;
            }
            attacker.reset(cluster).await;
        }
        let came = play(cluster, &mut attacker, attack).await;
        if attack
            .before
            .iter()
            .any(|step| step.starts_with("policy ") && *step != "policy none")
        {
            cluster.set_policy(base.clone()).await;
        }
        report(attack, &came, &mut wrong, &mut unsayable);
        let allowed = attack.before.contains(&"replay closed") || attack.before.contains(&"replay open");
        assert!(
            allowed || !attacker.is_admitted(cluster).await || matches!(came, Came::Unsayable(_)),
            "{} leaves the worker admitted",
            attack.name
        );
    }
    println!(
        "{} attacks, {unsayable} of them cannot be said by a node",
        table.len()
    );
    assert!(wrong.is_empty(), "came out otherwise: {wrong:#?}");
    attacker.reset(cluster).await;
    assert_eq!(
        attacker.attests(&[]).await,
        "",
        "the honest statement passes all the same"
    );
    crate::dispatch::retire(cluster, &attacker.id).await;
}

fn report(attack: &Attack, came: &Came, wrong: &mut Vec<String>, unsayable: &mut usize) {
    let told = match came {
        Came::Refused(code, row) if (code.as_str(), row.as_str()) == (attack.code, attack.journal) => {
            "same".to_owned()
        }
        Came::Refused(code, row) => {
            wrong.push(format!(
                "{}: {code} {row}, not {} {}",
                attack.name, attack.code, attack.journal
            ));
            format!("{code} {row}")
        }
        Came::Unsayable(why) => {
            *unsayable += 1;
            format!("cannot be said: {why}")
        }
    };
    println!(
        "{:28} {:8} {:5} {:28} {:5} {told}",
        attack.name, attack.severity, attack.code, attack.journal, "same"
    );
}
