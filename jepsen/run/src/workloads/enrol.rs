//! The machine's side of a pairing, one try at one replica: `redeem` and `fetch` of the history.
//!
//! Never here: trying again. Invariant: nothing that may have had an effect is told as a failure: what is lost
//! before the proof was sent had none, what is lost after it is unknown.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palyra_client::error::classify;
use palyra_client::{ConnectErrorKind, ConnectOptions, connect, fill_random, new_ulid};
use palyra_jepsen_check::Kind;
use palyra_pki::pin::{client_begin, client_finish};
use palyra_pki::tls::{SeenServer, SharedTrust};
use palyra_pki::transcript::{NONCE_LEN, Opening};
use palyra_pki::{KeyPair, Method, Pin, Ticket, Transcript, TrustBundle, TrustDomain, sha256};
use palyra_proto::pairing::v1 as wire;
use palyra_proto::pairing::v1::enrol_service_client::EnrolServiceClient;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};
use tonic::transport::Channel;
use tonic::{Response, Status};

use super::operator::merge;
use crate::door::Miss;
use crate::record::End;
use crate::run::Run;

/// For a whole proof: a PIN's computing takes tens of milliseconds on each side, and machines race.
const PROOF: Duration = Duration::from_secs(6);
/// How long a replica may wait for the operator's decision, in milliseconds.
const WAIT_MS: u32 = 500;

/// Of a nonce that is not known any more: the newest exchanges of a network push the oldest out.
const GAVE_WAY: &str = "[E1023]";

/// What a machine has of a code.
#[derive(Clone)]
pub(super) enum Secret {
    /// Eight digits, and the code's id and number.
    Pin(Pin, String, u32),
    /// A ticket.
    Ticket(Arc<Ticket>),
}

/// A machine whose proof was accepted.
#[derive(Clone)]
pub(super) struct Proved {
    /// The pairing.
    pub(super) pairing: String,
    /// The device that it will be.
    pub(super) device: String,
    token: Vec<u8>,
    trust: TrustBundle,
}

impl Secret {
    /// A minted PIN.
    pub(super) fn pin(digits: &str, code: &wire::CodeInfo) -> Result<Secret> {
        let pin = Pin::parse(digits).context("a minted PIN")?;
        Ok(Secret::Pin(pin, code.id.clone(), code.number))
    }

    /// A minted ticket.
    pub(super) fn ticket(text: &str) -> Result<Secret> {
        Ok(Secret::Ticket(Arc::new(
            Ticket::parse(text).context("a minted ticket")?,
        )))
    }

    /// The code's id.
    pub(super) fn code(&self) -> &str {
        match self {
            Secret::Pin(_, id, _) => id,
            Secret::Ticket(ticket) => &ticket.id,
        }
    }

    /// Another secret for the same code.
    pub(super) fn wrong(&self) -> Secret {
        match self {
            Secret::Pin(pin, id, number) => {
                let mut other = Pin::generate(&mut fill_random);
                while other.grouped() == pin.grouped() {
                    other = Pin::generate(&mut fill_random);
                }
                Secret::Pin(other, id.clone(), *number)
            }
            Secret::Ticket(ticket) => Secret::Ticket(Arc::new(Ticket {
                cluster_id: ticket.cluster_id.clone(),
                id: ticket.id.clone(),
                secret: palyra_pki::ticket::Secret::generate(&mut fill_random),
                root_pin: ticket.root_pin,
                endpoints: ticket.endpoints.clone(),
            })),
        }
    }
}

/// What a machine brings, and by when it must be done.
struct Me {
    device: String,
    csr: Vec<u8>,
    until: Instant,
}

/// Why a proof came to nothing, and whether it may have had an effect.
struct Tried(Kind, String);

impl Tried {
    fn harmless(miss: &Miss) -> Tried {
        Tried(Kind::Fail, miss.to_string())
    }
}

/// Proves a code at one replica, as a new machine with a key of its own. `more` is told as well: `alone`, `wrong`.
pub(super) async fn redeem(run: Arc<Run>, at: u64, secret: Secret, more: Value) -> Result<Option<Proved>> {
    let key = KeyPair::generate(&mut fill_random).context("a key")?;
    let me = Me {
        device: new_ulid(),
        csr: key.make_csr().context("a signing request")?,
        until: Instant::now() + PROOF,
    };
    let mut process = run.record.process();
    let value = merge(json!({"code": secret.code(), "device": me.device}), &more);
    let call = process.invoke(
        "redeem",
        value.clone(),
        Some(&format!("r{at}")),
        Some(&new_ulid()),
    );
    let address = run.cluster.enrol_address(at);
    let proved = match &secret {
        Secret::Pin(pin, _, number) => prove_pin(&address, pin, *number, &me).await,
        Secret::Ticket(ticket) => prove_ticket(&address, ticket, &me).await,
    };
    match proved {
        Ok(proved) => {
            let told = merge(value, &json!({"pairing": proved.pairing}));
            process.end(call, End::ok(told));
            Ok(Some(proved))
        }
        Err(Tried(kind, why)) => {
            // The replica keeps so many exchanges of one network, and all machines here are of one: it was not
            // alone after all.
            let crowded = why.contains(GAVE_WAY);
            let value = if crowded {
                merge(value, &json!({"alone": false}))
            } else {
                value
            };
            process.end(call, End::missed(kind, value, why));
            Ok(None)
        }
    }
}

type Enrol = EnrolServiceClient<Channel>;

async fn dial(
    address: &str,
    tls: &Arc<rustls::ClientConfig>,
    seen: &SeenServer,
    until: Instant,
) -> Result<(Enrol, [u8; 32]), Tried> {
    let options = ConnectOptions::default();
    let connected = timeout_at(until, connect::connect(address, tls, &options)).await;
    let late = || Tried(Kind::Fail, "no connection in time".to_owned());
    let channel = connected
        .map_err(|_| late())?
        .map_err(|error| Tried(Kind::Fail, error.cause))?;
    let end_point = seen
        .end_point()
        .ok_or_else(|| Tried(Kind::Fail, "no certificate was shown".to_owned()))?;
    Ok((EnrolServiceClient::new(channel), end_point))
}

async fn answer<T>(
    until: Instant,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Miss> {
    match timeout_at(until, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(Miss::of(classify(&status))),
        Err(_) => Err(Miss::Lost("no answer in time".to_owned())),
    }
}

fn nonce() -> [u8; NONCE_LEN] {
    let mut nonce = [0u8; NONCE_LEN];
    fill_random(&mut nonce);
    nonce
}

/// What an answer that makes no sense comes to: the product's defect, and nobody knows what it did.
fn odd(what: impl std::fmt::Display) -> Tried {
    Tried(Kind::Info, format!("an answer that makes no sense: {what}"))
}

async fn prove_ticket(address: &str, ticket: &Ticket, me: &Me) -> Result<Proved, Tried> {
    let seen = SeenServer::new();
    let tls = connect::enrol_pinned(ticket.root_pin, &ticket.cluster_id, Arc::clone(&seen)).map_err(odd)?;
    let (mut client, server_end_point) = dial(address, &tls, &seen, me.until).await?;
    let hello = answer(me.until, client.hello(wire::HelloRequest {})).await;
    let hello = hello.map_err(|miss| Tried::harmless(&miss))?;
    let node_nonce = nonce();
    let opening = Opening {
        cluster_id: &ticket.cluster_id,
        method: Method::Ticket,
        code_id: &ticket.id,
        node_id: &me.device,
        server_end_point,
        csr_sha256: sha256(&me.csr),
        node_nonce,
        server_nonce: <[u8; NONCE_LEN]>::try_from(&hello.server_nonce[..]).map_err(odd)?,
    };
    let (transcript, key) = (Transcript::new(&opening).map_err(odd)?, ticket.key());
    let request = wire::ProveTicketRequest {
        ticket_id: ticket.id.clone(),
        device_id: me.device.clone(),
        csr: me.csr.clone().into(),
        node_nonce: node_nonce.to_vec().into(),
        server_nonce: hello.server_nonce,
        proof: transcript.node_proof(&key[..]).to_vec().into(),
        device_name: format!("m-{}", &me.device[20..]),
        ..Default::default()
    };
    let accepted = answer(me.until, client.prove_ticket(request)).await;
    let accepted = accepted.map_err(|miss| Tried(miss.kind(true), miss.to_string()))?;
    believe(accepted, &transcript, &key[..], me)
}

async fn prove_pin(address: &str, pin: &Pin, number: u32, me: &Me) -> Result<Proved, Tried> {
    let seen = SeenServer::new();
    let tls = connect::enrol_recording(Arc::clone(&seen)).map_err(odd)?;
    let (mut client, server_end_point) = dial(address, &tls, &seen, me.until).await?;
    let (state, ke1) = client_begin(pin, &mut fill_random).map_err(odd)?;
    let node_nonce = nonce();
    let begin = wire::BeginPinRequest {
        code_number: number,
        device_id: me.device.clone(),
        ke1: ke1.clone().into(),
        csr_sha256: sha256(&me.csr).to_vec().into(),
        node_nonce: node_nonce.to_vec().into(),
    };
    // It counts an attempt, which is no success.
    let begun = answer(me.until, client.begin_pin(begin))
        .await
        .map_err(|miss| Tried::harmless(&miss))?;
    let opening = Opening {
        cluster_id: &begun.cluster_id,
        method: Method::Pin,
        code_id: &begun.code_id,
        node_id: &me.device,
        server_end_point,
        csr_sha256: sha256(&me.csr),
        node_nonce,
        server_nonce: <[u8; NONCE_LEN]>::try_from(&begun.server_nonce[..]).map_err(odd)?,
    };
    let transcript = Transcript::new(&opening).map_err(odd)?;
    let (pin, context, ke2) = (pin.clone(), transcript.context().to_vec(), begun.ke2.clone());
    let finished =
        tokio::task::spawn_blocking(move || client_finish(state, &pin, &context, &ke2, &mut fill_random))
            .await;
    // A wrong PIN shows here, and nothing more is sent.
    let (ke3, key) = finished
        .map_err(odd)?
        .map_err(|error| Tried(Kind::Fail, error.to_string()))?;
    let transcript = transcript.with_messages(&ke1, &begun.ke2);
    let finish = wire::FinishPinRequest {
        attempt_id: begun.attempt_id,
        ke3: ke3.into(),
        csr: me.csr.clone().into(),
        proof: transcript.node_proof(&key[..]).to_vec().into(),
        device_name: format!("m-{}", &me.device[20..]),
        ..Default::default()
    };
    let accepted = answer(me.until, client.finish_pin(finish)).await;
    let accepted = accepted.map_err(|miss| Tried(miss.kind(true), miss.to_string()))?;
    believe(accepted, &transcript, &key[..], me)
}

fn believe(
    accepted: wire::ProofAccepted,
    transcript: &Transcript,
    key: &[u8],
    me: &Me,
) -> Result<Proved, Tried> {
    let parts = accepted.trust.ok_or_else(|| odd("no trust bundle"))?;
    let roots = parts.roots.iter().map(|root| root.to_vec()).collect();
    let domain = TrustDomain::new(&parts.trust_domain).map_err(odd)?;
    let trust = TrustBundle::new(&parts.cluster_id, domain, roots).map_err(odd)?;
    if !transcript.check_server_proof(key, &trust.digest(), &accepted.server_proof) {
        return Err(odd("the server does not know the secret"));
    }
    Ok(Proved {
        pairing: accepted.pairing_id,
        device: me.device.clone(),
        token: transcript.fetch_token(key).to_vec(),
        trust,
    })
}

/// Asks one replica what became of a pairing.
pub(super) async fn fetch(run: &Arc<Run>, at: u64, proved: &Proved) -> Result<()> {
    let tls = connect::enrol_trusted(SharedTrust::new(proved.trust.clone())).context("trust of a pairing")?;
    let mut process = run.record.process();
    let value = json!({"pairing": proved.pairing, "device": proved.device});
    let call = process.invoke("fetch", value.clone(), Some(&format!("r{at}")), None);
    let until = Instant::now() + PROOF;
    let options = ConnectOptions::default();
    let address = run.cluster.enrol_address(at);
    let request = wire::FetchRequest {
        pairing_id: proved.pairing.clone(),
        fetch_token: proved.token.clone().into(),
        wait_ms: WAIT_MS,
    };
    let fetched = match timeout_at(until, connect::connect(&address, &tls, &options)).await {
        Err(_) => Err(Miss::NotSent("no connection in time".to_owned())),
        Ok(Err(error)) => Err(match error.kind {
            ConnectErrorKind::Refused => Miss::Refused(error.cause),
            ConnectErrorKind::Unreachable | ConnectErrorKind::WrongServer => Miss::NotSent(error.cause),
        }),
        Ok(Ok(channel)) => answer(until, EnrolServiceClient::new(channel).fetch(request)).await,
    };
    let end = match fetched {
        Ok(fetched) => End::ok(merge(value, &told(&fetched)?)),
        Err(miss) => End::missed(Kind::Fail, value, miss.to_string()),
    };
    process.end(call, end);
    Ok(())
}

fn told(fetched: &wire::FetchResponse) -> Result<Value> {
    let mut told = json!({"state": fetched.state});
    if fetched.state == "approved" {
        ensure!(
            !fetched.chain.is_empty(),
            "an approved pairing has no certificate"
        );
        told["certificate"] = hex::encode(sha256(&fetched.chain[0])).into();
    }
    Ok(told)
}
