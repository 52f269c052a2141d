//! Becoming a node: the wait for the operator, and the identity that comes of it. The proof itself is in
//! `enrol`.
//!
//! What never lives here: what the operator sees and does.
//!
//! Invariants: what was proved is on disk before anybody is told of it, so that an interrupted pairing goes
//! on where it was; a certificate is stored only when its chain ends in the proven roots, its name is this
//! device and its key is the one made here.

use std::path::PathBuf;
use std::time::Duration;

use palyra_client::{Class, ConnectOptions, Endpoints, Limits, Pool, Repeat, connect, wall_ms};
use palyra_pki::chain::{Usage, verify_chain};
use palyra_pki::credential::to_rustls;
use palyra_pki::tls::SharedTrust;
use palyra_pki::{Credential, KeyPair, Role, TrustBundle, TrustDomain};
use palyra_proto::pairing::v1 as wire;
use palyra_proto::pairing::v1::enrol_service_client::EnrolServiceClient;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use zeroize::{Zeroize, Zeroizing};

use crate::enrol;
use crate::home::{Home, KnownReplica, NodeRecord};
use crate::lock::FolderLock;
use crate::{Error, Kind, Result};

const PENDING: &str = "identity/pending.json";
/// The longest name of a node, in bytes.
const NAME_MAX: usize = 128;
/// How long one question for the outcome may wait at a replica.
const FETCH_WAIT_MS: u32 = 15_000;
/// What the cluster says about a pairing that it doesn't know.
const FORGOTTEN: &str = "E1026";

/// What the machine proves that it knows.
pub enum PairMethod {
    /// The eight digits that an operator read out.
    Pin {
        /// The digits; blanks and dashes are ignored.
        pin: Zeroizing<String>,
        /// The code's number (`C3` is 3); 0 for the only open code.
        code: u32,
        /// Enrol addresses of replicas, `host:port`; tried in order.
        endpoints: Vec<String>,
    },
    /// The text of a ticket, which names the endpoints itself.
    Ticket(Zeroizing<String>),
    /// Go on with the pairing that this folder began and didn't finish.
    Resume,
}

/// How to pair.
pub struct PairConfig {
    /// The node's data folder; see [`crate::home::default_dir`].
    pub data_dir: PathBuf,
    /// What the machine calls itself; the host name when absent.
    pub name: Option<String>,
    /// What is proved.
    pub method: PairMethod,
    /// How long to wait for the operator; the pairing stays open and can be resumed afterwards.
    pub wait: Duration,
    /// Pair again although the folder holds an identity; the node gets a new device id.
    pub replace: bool,
}

/// What a person should hear while a pairing goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PairEvent {
    /// A replica is being asked.
    Trying {
        /// Its enrol address.
        endpoint: String,
    },
    /// A replica didn't answer; another is tried.
    Failed {
        /// Its enrol address.
        endpoint: String,
        /// What went wrong.
        why: String,
    },
    /// The proof was accepted and the server's proof verified: the operator's screen shows the same digits.
    Proved {
        /// Six digits, to be compared by people.
        sas: String,
        /// The id that this machine will have.
        device_id: String,
        /// The request that the operator approves.
        pairing_id: String,
        /// Hex SHA-256 of the node's public key, as the operator sees it.
        key_fingerprint: String,
        /// The request lapses then.
        expires_at_ms: u64,
    },
    /// An earlier run proved the secret already; this one goes on waiting. The secret given now isn't used.
    Resumed,
    /// The operator approved; the certificate is checked and stored.
    Approved,
}

/// Shows the progress of a pairing.
pub trait PairUi: Sync {
    /// Called once for each step, in order.
    fn event(&self, event: PairEvent);
}

/// What a finished pairing gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paired {
    /// The node's id from now on.
    pub device_id: String,
    /// The cluster that it belongs to.
    pub cluster_id: String,
    /// Hex SHA-256 of its certificate.
    pub fingerprint: String,
    /// End of the certificate's validity.
    pub not_after_ms: u64,
}

/// A pairing whose proof was accepted.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Pending {
    pub(crate) pairing_id: String,
    pub(crate) fetch_token: String,
    pub(crate) device_id: String,
    pub(crate) name: String,
    pub(crate) key: String,
    pub(crate) cluster_id: String,
    pub(crate) trust_domain: String,
    pub(crate) roots: Vec<String>,
    pub(crate) replicas: Vec<KnownReplica>,
    pub(crate) sas: String,
    pub(crate) expires_at_ms: u64,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.key.zeroize();
        self.fetch_token.zeroize();
    }
}

/// Pairs this machine with a cluster, or goes on with a pairing that was begun. Safe to drop at any point:
/// what is proved already is on disk, and the next call continues to wait, whatever its method.
///
/// Errors: wrong PIN or ticket, a server that isn't who the secret came from, refusal, expiry, no reachable
/// replica, a folder that is paired already.
pub async fn pair(config: PairConfig, ui: &dyn PairUi) -> Result<Paired> {
    let home = Home::create(&config.data_dir)?;
    let _agent = FolderLock::agent(&home)?.ok_or_else(|| {
        let message = format!("the agent of {} is running", home.dir().display());
        Error::new(
            Kind::Precondition,
            "N0107",
            message,
            "stop it first: palyra node stop",
        )
    })?;
    if let Some(record) = home.record()?.filter(|_| !config.replace) {
        return Err(Error::new(
            Kind::Precondition,
            "N0105",
            format!(
                "{} is paired already, as {} of cluster {}",
                home.dir().display(),
                record.device_id,
                record.cluster_id
            ),
            "start it with `palyra node start`, or give it a new identity with --replace",
        ));
    }
    // With a new secret at hand, one that is over by this machine's clock is not worth a question.
    let resumes = matches!(config.method, PairMethod::Resume);
    let kept = home.read_json::<Pending>(PENDING)?;
    let pending = match kept.filter(|pending| resumes || pending.expires_at_ms > wall_ms()) {
        Some(pending) => {
            ui.event(PairEvent::Resumed);
            pending
        }
        None => {
            let name = device_name(&config, &home)?;
            let pending = enrol::prove(&config.method, &name, ui).await?;
            home.write_json(PENDING, &pending, 0o600)?;
            pending
        }
    };
    let key = key_of(&pending)?;
    ui.event(PairEvent::Proved {
        sas: pending.sas.clone(),
        device_id: pending.device_id.clone(),
        pairing_id: pending.pairing_id.clone(),
        key_fingerprint: hex::encode(key.spki_sha256()),
        expires_at_ms: pending.expires_at_ms,
    });
    let answer = wait_for_decision(&home, &pending, config.wait).await?;
    let paired = store(&home, &pending, &key, &answer)?;
    ui.event(PairEvent::Approved);
    Ok(paired)
}

fn device_name(config: &PairConfig, home: &Home) -> Result<String> {
    let configured = config.name.clone().or(home.config()?.name);
    let host = || {
        std::fs::read_to_string("/proc/sys/kernel/hostname")
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let name = configured.unwrap_or_else(host);
    if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
        let message = format!("{name:?} is no name for a node: 1 to {NAME_MAX} bytes on one line");
        return Err(Error::new(
            Kind::Usage,
            "N0304",
            message,
            "give another with --name",
        ));
    }
    Ok(name)
}

fn key_of(pending: &Pending) -> Result<KeyPair> {
    KeyPair::from_pem(&pending.key).map_err(|error| broken(&error.to_string()))
}

fn broken(why: &str) -> Error {
    let message = format!("{PENDING} is broken: {why}");
    Error::new(
        Kind::Precondition,
        "N0104",
        message,
        "remove the file and pair again with a new PIN or ticket",
    )
}

fn trust_of(pending: &Pending) -> Result<TrustBundle> {
    let roots = pending
        .roots
        .iter()
        .map(hex::decode)
        .collect::<std::result::Result<Vec<_>, _>>();
    let roots = roots.map_err(|error| broken(&error.to_string()))?;
    bundle(&pending.cluster_id, &pending.trust_domain, roots).map_err(|error| broken(&error))
}

/// A bundle out of the parts that travel.
pub(crate) fn bundle(
    cluster_id: &str,
    trust_domain: &str,
    roots: Vec<Vec<u8>>,
) -> std::result::Result<TrustBundle, String> {
    let domain = TrustDomain::new(trust_domain).map_err(|error| error.to_string())?;
    TrustBundle::new(cluster_id, domain, roots).map_err(|error| error.to_string())
}

async fn wait_for_decision(home: &Home, pending: &Pending, wait: Duration) -> Result<wire::FetchResponse> {
    let until = Instant::now() + wait;
    let tls = connect::enrol_trusted(SharedTrust::new(trust_of(pending)?))
        .map_err(|error| broken(&error.to_string()))?;
    let enrol = pending
        .replicas
        .iter()
        .map(|replica| &replica.enrol_addr)
        .filter(|address| !address.is_empty());
    let pool = Pool::new(&Endpoints::new(enrol)?, tls, ConnectOptions::default());
    let token = hex::decode(&pending.fetch_token).map_err(|error| broken(&error.to_string()))?;
    let mut silent = None;
    while Instant::now() < until {
        let begun = Instant::now();
        let left = u32::try_from((until - begun).as_millis()).unwrap_or(u32::MAX);
        let request = wire::FetchRequest {
            pairing_id: pending.pairing_id.clone(),
            fetch_token: token.clone().into(),
            wait_ms: FETCH_WAIT_MS.min(left),
        };
        let total = Duration::from_millis(u64::from(request.wait_ms)) + Duration::from_secs(5);
        let limits = Limits {
            total,
            attempt: total,
        };
        let asked = pool.call(Repeat::Read, limits, |channel| {
            let request = request.clone();
            async move { EnrolServiceClient::new(channel).fetch(request).await }
        });
        match asked.await {
            Ok(answer) if answer.state == "approved" => return Ok(answer),
            Ok(answer) if answer.state == "rejected" || answer.state == "expired" => {
                return Err(lapsed(home, &answer)?);
            }
            Ok(_) => silent = None,
            Err(error)
                if error.retryable
                    || matches!(
                        error.class,
                        Class::Unreachable | Class::Unavailable | Class::Stale
                    ) =>
            {
                tracing::debug!(%error, "no replica answers; asking again");
                silent = Some(error.message);
            }
            Err(error) => return Err(unanswered(home, pending, error)?),
        }
        // A server that answers at once must not be asked in a tight loop.
        sleep(Duration::from_millis(300).saturating_sub(begun.elapsed())).await;
    }
    if let Some(cause) = silent {
        let message = format!(
            "no replica says what became of pairing {}: {cause}",
            pending.pairing_id
        );
        let next =
            "see whether the cluster runs (palyra cluster status), then run `palyra node pair` here again";
        return Err(Error::new(Kind::Unreachable, "N0201", message, next));
    }
    Err(Error::new(
        Kind::Precondition,
        "N0210",
        format!(
            "the operator has not decided about pairing {} yet",
            pending.pairing_id
        ),
        "approve it with `palyra pairing approve`, then run `palyra node pair` here again",
    ))
}

/// Why there is no outcome and none will come by asking again.
fn unanswered(home: &Home, pending: &Pending, error: palyra_client::Error) -> Result<Error> {
    if error.code == FORGOTTEN {
        home.remove(PENDING)?;
        let message = format!(
            "the cluster does not know pairing {} (any more)",
            pending.pairing_id
        );
        let next = "ask for a new PIN or ticket and pair again";
        return Ok(Error::new(Kind::Precondition, "N0214", message, next));
    }
    let mut error = Error::from(error);
    if error.code == palyra_client::error::E_NOT_THIS_CLUSTER {
        let file = home.dir().join(PENDING);
        error.next = format!(
            "the pairing was begun with cluster {}; if it is about time, set the clocks; to forget the pairing and \
             begin anew, remove {}",
            pending.cluster_id,
            file.display()
        );
    }
    Ok(error)
}

fn lapsed(home: &Home, answer: &wire::FetchResponse) -> Result<Error> {
    home.remove(PENDING)?;
    if answer.state == "expired" {
        let message = "the pairing expired before the operator decided";
        return Ok(Error::new(
            Kind::Precondition,
            "N0212",
            message,
            "ask for a new PIN or ticket and pair again",
        ));
    }
    let reason = if answer.reason.is_empty() {
        "no reason given"
    } else {
        &answer.reason
    };
    let message = format!("the operator rejected this machine: {reason}");
    Ok(Error::new(
        Kind::Policy,
        "N0211",
        message,
        "talk to the operator; pairing again needs a new PIN or ticket",
    ))
}

fn store(home: &Home, pending: &Pending, key: &KeyPair, answer: &wire::FetchResponse) -> Result<Paired> {
    let untrusted = |why: String| {
        let message = format!("the cluster handed out an identity that is not this machine's: {why}");
        Error::new(
            Kind::Auth,
            "N0213",
            message,
            "report this to the operator; nothing was stored",
        )
    };
    // The bundle of the answer came over a connection that the proven roots vouch for; it may know newer
    // roots.
    let (trust, replicas) = match answer
        .trust
        .as_ref()
        .filter(|trust| trust.cluster_id == pending.cluster_id)
    {
        Some(newer) => {
            let roots = newer.roots.iter().map(|root| root.to_vec()).collect();
            (
                bundle(&newer.cluster_id, &newer.trust_domain, roots).map_err(untrusted)?,
                replicas_of(newer),
            )
        }
        None => (trust_of(pending)?, pending.replicas.clone()),
    };
    let chain: Vec<Vec<u8>> = answer.chain.iter().map(|der| der.to_vec()).collect();
    let peer = verify_chain(
        &to_rustls(&chain),
        &trust,
        Usage::Client,
        &[Role::Node],
        wall_ms(),
    )
    .map_err(|error| untrusted(error.to_string()))?;
    if peer.id.id() != pending.device_id || peer.spki_sha256 != key.spki_sha256() {
        return Err(untrusted(format!("the certificate is {}'s", peer.id)));
    }
    let endpoints = replicas.iter().map(|replica| replica.node_addr.clone()).collect();
    let credential =
        Credential::new(&trust, endpoints, &chain, key).map_err(|error| untrusted(error.to_string()))?;
    let record = NodeRecord {
        device_id: pending.device_id.clone(),
        name: pending.name.clone(),
        cluster_id: pending.cluster_id.clone(),
        replicas,
    };
    // What an earlier identity still owed is nobody's now.
    home.remove("ledger/ledger.log")?;
    home.drop_next_credential()?;
    crate::renewal::forget(home)?;
    home.set_credential(&credential, false)?;
    home.set_record(&record)?;
    home.remove(PENDING)?;
    Ok(Paired {
        device_id: record.device_id,
        cluster_id: record.cluster_id,
        fingerprint: hex::encode(peer.fingerprint),
        not_after_ms: peer.not_after_ms,
    })
}

/// The replicas of a bundle.
pub(crate) fn replicas_of(trust: &wire::TrustBundle) -> Vec<KnownReplica> {
    let known = trust.endpoints.iter().map(|endpoint| KnownReplica {
        replica_id: endpoint.replica_id,
        node_addr: endpoint.node_addr.clone(),
        enrol_addr: endpoint.enrol_addr.clone(),
        quic_addr: endpoint.quic_addr.clone(),
    });
    known.collect()
}

#[cfg(test)]
#[path = "pair_tests.rs"]
mod tests;
