//! A worker played by the test: it sends old fences, and says that it could not clean up.

use std::path::Path;

use palyra_pki::attestation::{public_key, sign_statement};
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message::Body as Said;
use palyra_proto::run::v1::StartRequest;
use palyra_proto::worker::v1 as wire;
use palyra_proto::worker::v1::worker_message::Body as Say;
use palyra_proto::worker::v1::worker_order::Body as Order;
use palyra_tests::cluster::Cluster;
use palyra_tests::node::{Puppet, identity};
use palyra_tests::worker::Shop;
use prost::Message as _;

use crate::dispatch::retire;

/// A worker that says what the test wants.
struct Played {
    puppet: Puppet,
    dir: std::path::PathBuf,
}

impl Played {
    async fn attach(dir: &Path, address: &str) -> Self {
        let puppet = Puppet::attach(dir, address, Vec::new()).await.unwrap();
        let dir = dir.to_owned();
        Self { puppet, dir }
    }

    async fn say(&self, body: Say) {
        let message = wire::WorkerMessage { body: Some(body) };
        self.puppet.say(Body::Worker(message)).await;
    }

    /// The next order that is wanted.
    async fn hear<T>(&mut self, mut wanted: impl FnMut(Order) -> Option<T>) -> T {
        loop {
            match self.puppet.hear().await.unwrap() {
                Some(Said::Worker(order)) => {
                    if let Some(found) = wanted(order.body.unwrap()) {
                        return found;
                    }
                }
                Some(_) => {}
                None => panic!("the session ended"),
            }
        }
    }

    /// Says something that is answered: the code of its refusal, empty when it was accepted.
    async fn code(&mut self, request_id: &str, body: Say) -> String {
        self.say(body).await;
        self.hear(|order| match order {
            Order::Answer(answer) if answer.request_id == request_id => {
                assert!(!answer.retry, "{answer:?}");
                assert_eq!(answer.accepted, answer.code.is_empty(), "{answer:?}");
                Some(answer.code)
            }
            _ => None,
        })
        .await
    }

    /// Reports that it has nothing, and attests what the shop's worker would.
    async fn ready(&mut self, digests: &serde_json::Value) {
        let report = wire::Report {
            request_id: palyra_client::new_ulid(),
            held: Vec::new(),
        };
        self.say(Say::Report(report)).await;
        self.hear(|order| matches!(order, Order::Reconciled(_)).then_some(()))
            .await;
        let challenge = self
            .hear(|order| match order {
                Order::Challenge(challenge) => Some(challenge),
                _ => None,
            })
            .await;
        let (id, credential) = identity(&self.dir);
        let bytes = |name: &str| hex::decode(digests[name].as_str().unwrap()).unwrap();
        let statement = wire::Statement {
            cluster_id: challenge.cluster_id,
            worker_id: palyra_state::Id::parse(&id).unwrap().to_bytes().to_vec().into(),
            nonce: challenge.nonce,
            image: bytes("image").into(),
            build: bytes("build").into(),
            artifact: bytes("artifact").into(),
            supervisor: bytes("supervisor").into(),
            evidence: 2,
            capabilities: vec![wire::ClaimedCapability {
                name: "csv.sum".to_owned(),
                authority: "ops".to_owned(),
            }],
            sdk_protocol: 1,
            wit_abi: "0.2.0".to_owned(),
            issued_at_ms: challenge.now_ms,
            expires_at_ms: challenge.now_ms + 600_000,
            slots: 1,
            ..wire::Statement::default()
        };
        let encoded = statement.encode_to_vec();
        let key = credential.key_pair().unwrap();
        let attest = wire::Attest {
            request_id: palyra_client::new_ulid(),
            signature: sign_statement(&key, &encoded).unwrap().into(),
            statement: encoded.into(),
            public_key: public_key(&key).into(),
        };
        self.say(Say::Attest(attest)).await;
        self.hear(|order| match order {
            Order::Attested(answer) => {
                assert!(answer.admitted, "{answer:?}");
                Some(())
            }
            _ => None,
        })
        .await;
    }

    async fn offered(&mut self) -> wire::LeaseOffer {
        self.hear(|order| match order {
            Order::Offer(offer) => Some(offer),
            _ => None,
        })
        .await
    }
}

fn accept(lease_id: &str, fence: u64) -> (String, Say) {
    let request_id = palyra_client::new_ulid();
    let accept = wire::LeaseAccept {
        request_id: request_id.clone(),
        lease_id: lease_id.to_owned(),
        fence,
    };
    (request_id, Say::Accept(accept))
}

fn finish(lease_id: &str, fence: u64) -> (String, Say) {
    let request_id = palyra_client::new_ulid();
    let finish = wire::LeaseFinish {
        request_id: request_id.clone(),
        lease_id: lease_id.to_owned(),
        fence,
        outcome: "succeeded".to_owned(),
        result: b"{}".to_vec().into(),
        ..wire::LeaseFinish::default()
    };
    (request_id, Say::Finish(finish))
}

fn cleaned(lease_id: &str, fence: u64, ok: bool) -> (String, Say) {
    let request_id = palyra_client::new_ulid();
    let message = if ok {
        String::new()
    } else {
        "a mount is busy".to_owned()
    };
    let cleaned = wire::LeaseCleaned {
        request_id: request_id.clone(),
        lease_id: lease_id.to_owned(),
        fence,
        ok,
        message,
        ..wire::LeaseCleaned::default()
    };
    (request_id, Say::Cleaned(cleaned))
}

async fn start(cluster: &Cluster) -> String {
    let grant = cluster.granted("csv.sum").await;
    let request = StartRequest {
        run_id: grant.run_id,
        tool: "csv.sum".to_owned(),
        effect: "once".to_owned(),
        ..StartRequest::default()
    };
    cluster.client().start_run(request).await.unwrap().run.unwrap().id
}

/// Everything that is said under another fence than the lease's is refused.
async fn under_other_fences(played: &mut Played, lease: &str, fence: u64) {
    for (request_id, body) in [
        accept(lease, fence - 1),
        accept(lease, fence + 1),
        finish(lease, fence - 1),
        cleaned(lease, fence - 1, true),
    ] {
        let said = format!("{body:?}");
        assert_ne!(played.code(&request_id, body).await, "", "taken: {said}");
    }
    let renew = wire::LeaseRenew {
        sequence: 1,
        leases: vec![wire::LeaseRef {
            lease_id: lease.to_owned(),
            fence: fence - 1,
        }],
    };
    played.say(Say::Renew(renew)).await;
    let renewed = played
        .hear(|order| match order {
            Order::Renewed(answer) if answer.sequence == 1 => Some(answer),
            _ => None,
        })
        .await;
    let first = &renewed.leases[0];
    assert!(!first.renewed && !first.code.is_empty(), "{renewed:?}");
}

/// A worker that could not clean up is asked to try again, gets nothing, and comes back when somebody vouches.
async fn until_somebody_vouches(cluster: &Cluster, played: &mut Played) -> wire::LeaseOffer {
    let waits = start(cluster).await;
    let asked = cluster
        .palyra(&["worker", "cleanup", "played", "-o", "json"])
        .ok();
    assert_eq!(asked.field("lifecycle"), "failed");
    played
        .hear(|order| matches!(order, Order::Cleanup(_)).then_some(()))
        .await;
    let unasked = cluster.palyra(&["worker", "cleanup", "played", "--force", "--yes"]);
    assert_eq!(unasked.code, 2, "whoever vouches says why: {}", unasked.err);
    let vouched = "worker cleanup played --force --reason unmounted --yes --wait";
    let vouched: Vec<&str> = vouched.split(' ').collect();
    let _ = cluster.palyra(&vouched).ok();
    let next = played.offered().await;
    assert_eq!(next.run_id, waits, "it gets work again");
    next
}

/// A lease that an operator revokes is over for its worker, which is told.
async fn revoked(cluster: &Cluster, played: &mut Played, offer: &wire::LeaseOffer) {
    let (lease, fence) = (offer.lease_id.as_str(), offer.fence);
    let _ = cluster
        .palyra(&["lease", "revoke", lease, "--reason", "seen enough", "--yes"])
        .ok();
    let end = played
        .hear(|order| match order {
            Order::End(end) => Some(end),
            _ => None,
        })
        .await;
    assert_eq!(
        (end.lease_id.as_str(), end.fence, end.reason.as_str()),
        (lease, fence, "revoked")
    );
    let (request_id, body) = finish(lease, fence);
    assert_ne!(
        played.code(&request_id, body).await,
        "",
        "nothing of a revoked lease is taken"
    );
    let (request_id, body) = cleaned(lease, fence, true);
    assert_eq!(played.code(&request_id, body).await, "");
}

/// Every message under an old fence is refused; a cleanup that failed keeps its worker from work until somebody
/// vouches.
pub(crate) async fn old_fences_and_failed_cleanups(cluster: &mut Cluster) {
    let shop = Shop::open(cluster, "played", 1);
    cluster.admit(&shop).await;
    let dir = cluster.pair_node("played").await;
    let (id, _) = identity(&dir);
    let digests = shop.digests(cluster);
    let mut played = Played::attach(&dir, &cluster.node_addr(1)).await;
    played.ready(&digests).await;
    cluster.worker_is(&id, "available").await;
    let run = start(cluster).await;
    let offer = played.offered().await;
    let (lease, fence) = (offer.lease_id.as_str(), offer.fence);
    under_other_fences(&mut played, lease, fence).await;
    let (request_id, body) = accept(lease, fence);
    assert_eq!(played.code(&request_id, body).await, "");
    let (request_id, body) = finish(lease, fence);
    assert_eq!(played.code(&request_id, body).await, "");
    let (request_id, body) = finish(lease, fence);
    assert_ne!(played.code(&request_id, body).await, "", "a run ends once");
    cluster
        .run_is(&run, "to have succeeded", |run| run.state == "succeeded")
        .await;
    let (request_id, body) = cleaned(lease, fence, false);
    assert_eq!(played.code(&request_id, body).await, "");
    let failed = cluster.worker_is(&id, "failed").await;
    assert_eq!(failed.failure.unwrap().subject, offer.lease_id);
    let next = until_somebody_vouches(cluster, &mut played).await;
    assert!(next.fence > fence);
    // Taken, so that its run, which must run once, does not go on elsewhere.
    let (request_id, body) = accept(&next.lease_id, next.fence);
    assert_eq!(played.code(&request_id, body).await, "");
    revoked(cluster, &mut played, &next).await;
    cluster.worker_is(&id, "available").await;
    retire(cluster, &id).await;
}
