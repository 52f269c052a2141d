//! `palyrad join`: from a token to the data folder of a new replica.
//!
//! What never lives here: the replica's start; `palyrad run` does that. Invariants: nothing that the other
//! side says is believed unless its TLS chain ends in the root that the token pins; the keys are made here
//! and never sent; what was begun is written down first, so that a repeated call after a crash asks for the
//! same and gets the same replica id; `palyrad.toml` is written last.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use palyra_pki::join::JoinRequest as Proved;
use palyra_pki::layout::{self, NewConfig};
use palyra_pki::{Authority, JoinToken, Kek, KeyPair, Purpose, TrustBundle, TrustDomain};
use palyra_proto::cluster::v1 as wire;
use palyra_proto::cluster::v1::join_service_client::JoinServiceClient;
use palyra_proto::common::v1::ErrorDetail;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tonic::Status;
use zeroize::Zeroize as _;

use crate::cli::JoinArgs;
use crate::config::{Addresses, Config, resolve};
use crate::dial::{self, Dialled};
use crate::exit::{Code, Failure};
use crate::files::{self, NewFiles};
use crate::status::TRAILER;

/// Where a join that is under way keeps its keys.
const PENDING: &str = "join.pending";
/// How long one replica may take to answer.
const ANSWER: Duration = Duration::from_secs(20);
/// How often all endpoints of the token are tried.
const ROUNDS: u32 = 3;
/// Pause between rounds.
const PAUSE: Duration = Duration::from_secs(1);

/// A join that was begun.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pending {
    token_id: String,
    name: String,
    /// Where the replica will be reached, in the order of the join transcript: the cluster keeps what it was
    /// told first.
    addresses: [String; 4],
    authority_key: String,
    replica_key: String,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.authority_key.zeroize();
        self.replica_key.zeroize();
    }
}

/// Does what the command line says.
pub(crate) async fn join(args: JoinArgs) -> Result<(), Failure> {
    let token = JoinToken::parse(&token_text(&args)?).map_err(|error| Failure::new(Code::Usage, error))?;
    if let Some(done) = already_joined(&args, &token)? {
        println!("{done}");
        return Ok(());
    }
    let addresses = addresses(&args)?;
    let pending = begin(&args, &token, addresses)?;
    let admitted = match ask_all(&args, &token, &pending).await {
        Ok(admitted) => admitted,
        Err(Trouble::Next(cause)) => {
            let next = "see that one of its replicas is up and reachable, then repeat";
            let message = format!(
                "cluster {} did not admit this replica ({cause}); {next}",
                token.cluster_id
            );
            return Err(Failure::new(Code::Unreachable, message));
        }
        Err(Trouble::Refused(failure)) => {
            // The keys were made for this token, and the cluster knows none of them.
            files::remove(&args.data_dir.join(PENDING))?;
            return Err(failure);
        }
        // The cluster may know the keys: they stay, for the next try.
        Err(Trouble::Final(failure)) => return Err(failure),
    };
    let replica_id = admitted.replica_id;
    store(&args, &token, &admitted)?;
    let config = args.data_dir.join(layout::CONFIG);
    println!(
        "joined cluster {} as replica {replica_id} ({}); start it with: palyrad run --config {}",
        token.cluster_id,
        args.name,
        config.display()
    );
    Ok(())
}

fn token_text(args: &JoinArgs) -> Result<zeroize::Zeroizing<String>, Failure> {
    let text = match (&args.token, &args.token_file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) if path.as_os_str() == "-" => std::io::read_to_string(std::io::stdin().lock())
            .map_err(|error| {
                Failure::new(
                    Code::Usage,
                    format!("the token can't be read from standard input: {error}"),
                )
            })?,
        (None, Some(path)) => std::fs::read_to_string(path).map_err(|error| {
            Failure::new(
                Code::Usage,
                format!("the token can't be read from {}: {error}", path.display()),
            )
        })?,
        (None, None) => String::new(),
    };
    Ok(zeroize::Zeroizing::new(text))
}

/// A sentence when the folder is that of this very join, finished; a refusal when it is anything else but
/// empty or a join under way.
fn already_joined(args: &JoinArgs, token: &JoinToken) -> Result<Option<String>, Failure> {
    let dir = &args.data_dir;
    let config = dir.join(layout::CONFIG);
    if config.exists() {
        let found = Config::load(&config)?.replica;
        if found.cluster_id == token.cluster_id && found.name == args.name {
            files::remove(&dir.join(PENDING))?;
            let run = format!("palyrad run --config {}", config.display());
            return Ok(Some(format!(
                "{} has joined already, as replica {}; start it with: {run}",
                args.name, found.id
            )));
        }
        let problem = format!(
            "{} is the folder of replica {} ({}) of cluster {}; choose another --data-dir",
            dir.display(),
            found.id,
            found.name,
            found.cluster_id
        );
        return Err(Failure::new(Code::Precondition, problem));
    }
    if dir.join(PENDING).exists() {
        return Ok(None);
    }
    // Some file systems are born with a folder for what a repair finds.
    let foreign = |entry: &std::fs::DirEntry| entry.file_name() != "lost+found";
    let stranger = std::fs::read_dir(dir)
        .ok()
        .and_then(|entries| entries.flatten().find(foreign));
    match stranger {
        Some(entry) => {
            let problem = format!(
                "{} is not empty (it holds {:?}) and is no replica's folder; choose another --data-dir",
                dir.display(),
                entry.file_name()
            );
            Err(Failure::new(Code::Precondition, problem))
        }
        None => Ok(None),
    }
}

/// Addresses as the new replica's configuration will give them, in the order of the join transcript.
fn addresses(args: &JoinArgs) -> Result<[String; 4], Failure> {
    let text = config_text(args, "01JD7Z8QK3M5N7P9R1S3T5V7X9", "palyra.internal", 1);
    let Addresses {
        peers,
        node,
        enrol,
        metrics,
        // It is announced with the first start, as every change of an address is.
        quic: _,
    } = Config::parse(&text, Path::new("palyrad join"))?.advertised_addresses();
    Ok([peers, node, enrol, metrics])
}

fn config_text(args: &JoinArgs, cluster_id: &str, trust_domain: &str, replica_id: u64) -> String {
    layout::render_config(&NewConfig {
        cluster_id,
        trust_domain,
        replica_id,
        name: &args.name,
        listen_host: &args.listen_host,
        base_port: args.base_port,
        advertise_host: args.advertise_host.as_deref().unwrap_or(&args.listen_host),
    })
}

/// What was begun before, or a new beginning, on disk before anything is asked.
fn begin(args: &JoinArgs, token: &JoinToken, addresses: [String; 4]) -> Result<Pending, Failure> {
    let path = args.data_dir.join(PENDING);
    if path.exists() {
        let text = files::secret_text(&path)?;
        let pending: Pending = serde_json::from_str(&text).map_err(|error| {
            Failure::new(
                Code::Precondition,
                format!("{} is damaged: {error}; remove the folder", path.display()),
            )
        })?;
        if pending.token_id != token.id || pending.name != args.name {
            let problem = format!(
                "{} holds the join of {:?} with another token; finish that one or remove the folder",
                path.display(),
                pending.name
            );
            return Err(Failure::new(Code::Conflict, problem));
        }
        if pending.addresses != addresses {
            let problem = format!(
                "{} holds a join under the addresses {}; repeat it with those (--listen-host, \
                 --advertise-host, --base-port), and change them in {} afterwards",
                path.display(),
                pending.addresses.join(" "),
                layout::CONFIG
            );
            return Err(Failure::new(Code::Conflict, problem));
        }
        return Ok(pending);
    }
    let rng = &mut palyra_platform::fill_random;
    let key = |rng: &mut dyn palyra_pki::Entropy| KeyPair::generate(rng).map_err(anyhow::Error::from);
    let pending = Pending {
        token_id: token.id.clone(),
        name: args.name.clone(),
        addresses,
        authority_key: key(rng)?.to_pem().to_string(),
        replica_key: key(rng)?.to_pem().to_string(),
    };
    files::make_private_dir(&args.data_dir)?;
    let text = zeroize::Zeroizing::new(serde_json::to_string(&pending).map_err(anyhow::Error::from)?);
    files::replace(&path, text.as_bytes(), 0o600)?;
    Ok(pending)
}

/// What the cluster answered, checked and opened.
struct Admitted {
    replica_id: u64,
    trust_domain: String,
    roots: Vec<Vec<u8>>,
    authority: Authority,
    kek: Kek,
    peers: BTreeMap<u64, String>,
}

/// Why one endpoint gave nothing.
enum Trouble {
    /// Try another one.
    Next(String),
    /// The cluster refused: no other one will say anything else.
    Refused(Failure),
    /// Going on makes no sense, and whether the cluster admitted this replica isn't known.
    Final(Failure),
}

async fn ask_all(args: &JoinArgs, token: &JoinToken, pending: &Pending) -> Result<Admitted, Trouble> {
    let mut tried = Vec::new();
    for round in 0..ROUNDS {
        if round > 0 {
            tokio::time::sleep(PAUSE).await;
        }
        tried.clear();
        for endpoint in &token.endpoints {
            match ask(endpoint, args, token, pending).await {
                Ok(admitted) => return Ok(admitted),
                Err(Trouble::Next(cause)) => tried.push(format!("{endpoint}: {cause}")),
                Err(last) => return Err(last),
            }
        }
    }
    Err(Trouble::Next(tried.join("; ")))
}

async fn ask(
    endpoint: &str,
    args: &JoinArgs,
    token: &JoinToken,
    pending: &Pending,
) -> Result<Admitted, Trouble> {
    let address = resolve(endpoint).map_err(|error| Trouble::Next(error.to_string()))?;
    let Dialled { channel, end_point } = dial::pinned(address, token.root_pin, &token.cluster_id)
        .await
        .map_err(|error| Trouble::Next(error.to_string()))?;
    let internal = |error: &dyn std::error::Error| Trouble::Final(Failure::new(Code::Internal, error));
    let authority_key = KeyPair::from_pem(&pending.authority_key).map_err(|error| internal(&error))?;
    let replica_key = KeyPair::from_pem(&pending.replica_key).map_err(|error| internal(&error))?;
    let authority_csr = authority_key.make_csr().map_err(|error| internal(&error))?;
    let replica_csr = replica_key.make_csr().map_err(|error| internal(&error))?;
    let proved = Proved {
        cluster_id: &token.cluster_id,
        token_id: &token.id,
        replica_csr: &replica_csr,
        authority_csr: &authority_csr,
        name: &args.name,
        addresses: &pending.addresses,
        server_end_point: end_point,
    };
    let [peer_addr, node_addr, enrol_addr, metrics_addr] = pending.addresses.clone();
    let request = wire::JoinRequest {
        token_id: token.id.clone(),
        proof: proved.proof(&token.secret).to_vec().into(),
        name: args.name.clone(),
        replica_csr: replica_csr.clone().into(),
        authority_csr: authority_csr.clone().into(),
        peer_addr,
        node_addr,
        enrol_addr,
        metrics_addr,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Default::default()
    };
    let call = async { JoinServiceClient::new(channel).join(request).await };
    let answer = match tokio::time::timeout(ANSWER, call).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return Err(refusal(&status)),
        Err(_) => return Err(Trouble::Next(format!("no answer within {} s", ANSWER.as_secs()))),
    };
    open(token, &proved, authority_key, answer).map_err(|error| {
        let next = "nothing was stored; repeat, and if it stays so, mint another token with `palyra cluster \
                    join-token`";
        let message =
            format!("the answer of {endpoint} is not what the token vouches for: {error:#}; {next}");
        Trouble::Final(Failure::new(Code::Auth, message))
    })
}

/// Whether another replica may say something else.
fn refusal(status: &Status) -> Trouble {
    let detail = status
        .metadata()
        .get_bin(TRAILER)
        .and_then(|value| value.to_bytes().ok())
        .and_then(|bytes| ErrorDetail::decode(bytes).ok());
    let Some(detail) = detail else {
        return Trouble::Next(status.message().to_owned());
    };
    let text = format!("{}: {}; {}", detail.code, detail.message, detail.next);
    // A defect of one replica need not be another's, and it may have come after the admission.
    if detail.retryable || detail.unknown || detail.class == "internal" {
        return Trouble::Next(text);
    }
    let code = match detail.class.as_str() {
        "denied" => Code::Auth,
        "invalid" => Code::Usage,
        "conflict" => Code::Conflict,
        _ => Code::Precondition,
    };
    Trouble::Refused(Failure::new(code, text))
}

/// Checks an answer against the token: cluster, root, and that the authority is ours.
fn open(
    token: &JoinToken,
    proved: &Proved<'_>,
    authority_key: KeyPair,
    answer: wire::JoinResponse,
) -> anyhow::Result<Admitted> {
    anyhow::ensure!(
        answer.cluster_id == token.cluster_id,
        "the answer is of cluster {}",
        answer.cluster_id
    );
    let mut roots = vec![answer.root_certificate.to_vec()];
    roots.extend(answer.more_roots.iter().map(|root| root.to_vec()));
    let mut pinned = false;
    for root in &roots {
        pinned |= palyra_pki::identity::spki_sha256(root)? == token.root_pin;
    }
    anyhow::ensure!(
        pinned,
        "the root in the answer is not the one that the token names; was the root rotated since?"
    );
    let id = answer.replica_id.to_string();
    let mut parts: Vec<&[u8]> = vec![
        answer.cluster_id.as_bytes(),
        answer.trust_domain.as_bytes(),
        id.as_bytes(),
        &answer.root_certificate,
        &answer.authority_certificate,
        &answer.replica_certificate,
        &answer.wrapped_kek,
    ];
    parts.extend(roots[1..].iter().map(Vec::as_slice));
    anyhow::ensure!(
        proved.check_answer_proof(&token.secret, &parts, &answer.proof),
        "the answer is not proved by the token: somebody else made it"
    );
    let kek = proved.unwrap_kek(&token.secret, &answer.wrapped_kek)?;
    let bundle = TrustBundle::new(
        &answer.cluster_id,
        TrustDomain::new(&answer.trust_domain)?,
        roots.clone(),
    )?;
    let authority = Authority::new(answer.authority_certificate.to_vec(), authority_key)?;
    let authority = std::sync::Arc::new(authority);
    // The first certificate that it issues is checked against the root: what does not verify now never will.
    drop(crate::tls::Tls::new(
        std::sync::Arc::clone(&authority),
        bundle,
        answer.replica_id,
        palyra_pki::ca::HostNames::default(),
    )?);
    let authority = std::sync::Arc::into_inner(authority)
        .ok_or_else(|| anyhow::anyhow!("the authority is still in use"))?;
    let peers = answer
        .peers
        .into_iter()
        .map(|peer| (peer.replica_id, peer.peer_addr))
        .collect();
    Ok(Admitted {
        replica_id: answer.replica_id,
        trust_domain: answer.trust_domain,
        roots,
        authority,
        kek,
        peers,
    })
}

fn store(args: &JoinArgs, token: &JoinToken, admitted: &Admitted) -> Result<(), Failure> {
    let context = layout::authority_context(&token.cluster_id, admitted.replica_id);
    let secret = admitted.authority.key().to_pkcs8();
    let sealed = admitted
        .kek
        .seal(
            Purpose::ReplicaKey,
            &context,
            secret,
            &mut palyra_platform::fill_random,
        )
        .map_err(anyhow::Error::from)?;
    let config = config_text(
        args,
        &token.cluster_id,
        &admitted.trust_domain,
        admitted.replica_id,
    );
    let new = NewFiles {
        kek: &admitted.kek,
        authority_key_sealed: &sealed,
        authority_cert: admitted.authority.der(),
        root_certs: &admitted.roots,
        peers: admitted.peers.clone(),
        config: &config,
    };
    new.store(&args.data_dir)?;
    let pending: PathBuf = args.data_dir.join(PENDING);
    Ok(files::remove(&pending)?)
}

#[cfg(test)]
mod tests;
