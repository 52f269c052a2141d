//! The proof of a PIN or ticket at one of several replicas: docs/protocol/pairing.md, the node's side.
//!
//! What never lives here: files, and what follows the proof (see `pair`).
//!
//! Invariants: key and signing request are made here and the key stays here; nothing that a server says is
//! believed before its proof over the transcript, which holds the certificate that this side saw, is
//! verified; a wrong secret ends the attempt at once, because each further try would cost one of the code's
//! five; tries whose outcome stays unknown are few for the same reason.

use std::sync::Arc;
use std::time::Duration;

use palyra_client::error::{Failure, classify};
use palyra_client::{
    Class, ConnectError, ConnectErrorKind, ConnectOptions, Endpoints, connect, fill_random, new_ulid, wall_ms,
};
use palyra_pki::pin::{ClientState, PinError, client_begin, client_finish};
use palyra_pki::tls::SeenServer;
use palyra_pki::transcript::{NONCE_LEN, Opening};
use palyra_pki::{ChainError, KeyPair, Method, Pin, Ticket, Transcript, sha256};
use palyra_proto::pairing::v1 as wire;
use palyra_proto::pairing::v1::enrol_service_client::EnrolServiceClient;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::pair::{PairEvent, PairMethod, PairUi, Pending, bundle, replicas_of};
use crate::{Error, Kind, Result};

/// For one call to one replica. The PIN's stretching takes tens of milliseconds on either side.
const CALL: Duration = Duration::from_secs(10);
/// For finding a replica that lets the proof be made.
const SEARCH: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(500);
/// How often a proof is sent while its outcome is not known: longer than an election.
const PROOF_TRIES: u32 = 8;
/// How many tries of a PIN may come to an unknown end: each may be counted, and five burn the code.
const SPENT_MAX: u32 = 2;
const ASK_AGAIN: &str = "ask the operator for a new code: palyra pairing code";

/// Why one try at one replica came to nothing.
enum Try {
    /// Another replica may do better.
    Next(String),
    /// The same, but this try may count against the PIN.
    Spent(String),
    /// No other replica will say anything else.
    Final(Error),
}

impl Try {
    /// Where nothing is counted, an unknown outcome costs nothing.
    fn uncounted(self) -> Self {
        match self {
            Self::Spent(why) => Self::Next(why),
            other => other,
        }
    }
}

impl From<Error> for Try {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl From<ConnectError> for Try {
    fn from(error: ConnectError) -> Self {
        if error.kind == ConnectErrorKind::Unreachable {
            return Self::Next(error.cause);
        }
        if let Some(ChainError::NotYetValid { .. } | ChainError::Expired { .. }) = error.chain {
            let message = format!("{} can't be told from a stranger: {}", error.address, error.cause);
            let next =
                "set the clock of this machine and that of the replica; the ticket is as good as before";
            return Self::Final(Error::new(Kind::Precondition, "N0208", message, next));
        }
        let message = format!(
            "{} is not the cluster that the ticket is for: {}",
            error.address, error.cause
        );
        Self::Final(Error::new(
            Kind::Auth,
            "N0203",
            message,
            "somebody may sit in between: check the address, then ask for a new ticket",
        ))
    }
}

/// What this machine brings.
struct Me<'a> {
    device_id: String,
    name: &'a str,
    key: KeyPair,
    csr: Vec<u8>,
}

/// Proves the secret at one of the replicas. Answers what has to be kept until the operator decides.
pub(crate) async fn prove(method: &PairMethod, name: &str, ui: &dyn PairUi) -> Result<Pending> {
    let secret = Secret::parse(method)?;
    let key = KeyPair::generate(&mut fill_random).map_err(|error| internal(&error.to_string()))?;
    let csr = key.make_csr().map_err(|error| internal(&error.to_string()))?;
    let me = Me {
        device_id: new_ulid(),
        name,
        key,
        csr,
    };
    let endpoints = secret.endpoints()?;
    let until = Instant::now() + SEARCH;
    let mut failures: Vec<String> = Vec::new();
    let mut spent = 0;
    loop {
        for endpoint in endpoints.as_slice() {
            ui.event(PairEvent::Trying {
                endpoint: endpoint.clone(),
            });
            let tried = match &secret {
                Secret::Pin { pin, code, .. } => prove_pin(endpoint, pin, *code, &me).await,
                Secret::Ticket(ticket) => prove_ticket(endpoint, ticket, &me).await,
            };
            let why = match tried {
                Ok(pending) => return Ok(pending),
                Err(Try::Final(error)) => return Err(error),
                Err(Try::Next(why)) => why,
                Err(Try::Spent(why)) => {
                    spent += 1;
                    why
                }
            };
            ui.event(PairEvent::Failed {
                endpoint: endpoint.clone(),
                why: why.clone(),
            });
            let line = format!("{endpoint} ({why})");
            if !failures.contains(&line) {
                failures.push(line);
            }
            if spent == SPENT_MAX {
                let next = "see whether the cluster has a leader (palyra cluster status), then run this again; \
                            each of these tries may be one of the code's five";
                return Err(nobody(&failures, next));
            }
        }
        if Instant::now() + PAUSE >= until {
            let next =
                "is the cluster running, and are these its enrol addresses? see: palyra cluster status";
            return Err(nobody(&failures, next));
        }
        sleep(PAUSE).await;
    }
}

fn nobody(failures: &[String], next: &str) -> Error {
    let message = format!("no replica took the proof: {}", failures.join(", "));
    Error::new(Kind::Unreachable, "N0201", message, next)
}

enum Secret {
    Pin {
        pin: Pin,
        code: u32,
        endpoints: Vec<String>,
    },
    Ticket(Ticket),
}

impl Secret {
    fn parse(method: &PairMethod) -> Result<Self> {
        match method {
            PairMethod::Pin { pin, code, endpoints } => {
                let pin = Pin::parse(pin).map_err(|error| {
                    Error::new(
                        Kind::Usage,
                        "N0204",
                        error.to_string(),
                        "type the eight digits as the operator reads them",
                    )
                })?;
                Ok(Self::Pin {
                    pin,
                    code: *code,
                    endpoints: endpoints.clone(),
                })
            }
            PairMethod::Ticket(text) => Ticket::parse(text).map(Self::Ticket).map_err(|error| {
                let next = "copy the whole ticket, from `palyra-ticket.` to its end";
                Error::new(
                    Kind::Usage,
                    "N0205",
                    format!("the ticket cannot be read: {error}"),
                    next,
                )
            }),
            PairMethod::Resume => Err(Error::new(
                Kind::Precondition,
                "N0106",
                "no pairing waits in this folder",
                "begin one: palyra node pair --pin …, or --ticket …",
            )),
        }
    }

    fn endpoints(&self) -> Result<Endpoints> {
        Ok(match self {
            Self::Pin { endpoints, .. } => Endpoints::new(endpoints)?,
            Self::Ticket(ticket) => Endpoints::new(&ticket.endpoints)?,
        })
    }
}

type Client = EnrolServiceClient<Channel>;

async fn dial(
    endpoint: &str,
    tls: &Arc<rustls::ClientConfig>,
    seen: &SeenServer,
) -> std::result::Result<(Client, [u8; 32]), Try> {
    let channel = connect::connect(endpoint, tls, &ConnectOptions::default()).await?;
    let end_point = seen
        .end_point()
        .ok_or_else(|| internal("the server showed no certificate"))?;
    Ok((Client::new(channel), end_point))
}

async fn prove_pin(endpoint: &str, pin: &Pin, code: u32, me: &Me<'_>) -> std::result::Result<Pending, Try> {
    let seen = SeenServer::new();
    let tls = connect::enrol_recording(Arc::clone(&seen)).map_err(|error| internal(&error.to_string()))?;
    let (mut client, end_point) = dial(endpoint, &tls, &seen).await?;
    let (state, ke1) = client_begin(pin, &mut fill_random).map_err(|error| internal(&error.to_string()))?;
    let node_nonce = nonce();
    let begin = wire::BeginPinRequest {
        code_number: code,
        device_id: me.device_id.clone(),
        ke1: ke1.clone().into(),
        csr_sha256: sha256(&me.csr).to_vec().into(),
        node_nonce: node_nonce.to_vec().into(),
    };
    let begun = answer(client.begin_pin(begin)).await?;
    let opening = Opening {
        cluster_id: &begun.cluster_id,
        method: Method::Pin,
        code_id: &begun.code_id,
        node_id: &me.device_id,
        server_end_point: end_point,
        csr_sha256: sha256(&me.csr),
        node_nonce,
        server_nonce: nonce_of(&begun.server_nonce)?,
    };
    let transcript = Transcript::new(&opening).map_err(|error| nonsense(&error.to_string()))?;
    let (ke3, session) = finish_pin(state, pin, &transcript, &begun, &end_point).await?;
    let transcript = transcript.with_messages(&ke1, &begun.ke2);
    let finish = wire::FinishPinRequest {
        attempt_id: begun.attempt_id.clone(),
        ke3: ke3.into(),
        csr: me.csr.clone().into(),
        proof: transcript.node_proof(&session[..]).to_vec().into(),
        device_name: me.name.to_owned(),
        ..Default::default()
    };
    let accepted = insist(async || answer(client.clone().finish_pin(finish.clone())).await).await?;
    Ok(believe(
        &accepted,
        &transcript,
        &session[..],
        &begun.cluster_id,
        me,
    )?)
}

async fn finish_pin(
    state: ClientState,
    pin: &Pin,
    transcript: &Transcript,
    begun: &wire::BeginPinResponse,
    end_point: &[u8; 32],
) -> Result<(Vec<u8>, palyra_pki::pin::SessionKey)> {
    let (pin, context, ke2) = (pin.clone(), transcript.context().to_vec(), begun.ke2.clone());
    // Argon2id: tens of milliseconds of computing.
    let finished =
        tokio::task::spawn_blocking(move || client_finish(state, &pin, &context, &ke2, &mut fill_random))
            .await;
    match finished.map_err(|error| internal(&error.to_string()))? {
        Ok(both) => Ok(both),
        Err(PinError::WrongPin) => {
            let tries = match begun.tries_left {
                0 => "the code is burnt now".to_owned(),
                left => format!("{left} tries are left"),
            };
            let message =
                format!("wrong PIN, or somebody sits between this machine and the cluster; {tries}");
            let next = format!(
                "compare the digits with the operator's; if they are right, compare the certificate that was \
                 shown here with the one in the replica's log (`the listeners show this certificate`): {}",
                hex::encode(end_point)
            );
            Err(Error::new(Kind::Auth, "N0202", message, next))
        }
        Err(error) => Err(nonsense(&error.to_string())),
    }
}

async fn prove_ticket(endpoint: &str, ticket: &Ticket, me: &Me<'_>) -> std::result::Result<Pending, Try> {
    let seen = SeenServer::new();
    let tls = connect::enrol_pinned(ticket.root_pin, &ticket.cluster_id, Arc::clone(&seen))
        .map_err(|error| internal(&error.to_string()))?;
    let (mut client, end_point) = dial(endpoint, &tls, &seen).await?;
    let hello = answer(client.hello(wire::HelloRequest {}))
        .await
        .map_err(Try::uncounted)?;
    if hello.cluster_id != ticket.cluster_id {
        let message = format!(
            "{endpoint} is of cluster {}, the ticket of {}",
            hello.cluster_id, ticket.cluster_id
        );
        return Err(Error::new(
            Kind::Auth,
            "N0203",
            message,
            "check the address, then ask for a new ticket",
        )
        .into());
    }
    let node_nonce = nonce();
    let opening = Opening {
        cluster_id: &ticket.cluster_id,
        method: Method::Ticket,
        code_id: &ticket.id,
        node_id: &me.device_id,
        server_end_point: end_point,
        csr_sha256: sha256(&me.csr),
        node_nonce,
        server_nonce: nonce_of(&hello.server_nonce)?,
    };
    let transcript = Transcript::new(&opening).map_err(|error| nonsense(&error.to_string()))?;
    let key = ticket.key();
    let prove = wire::ProveTicketRequest {
        ticket_id: ticket.id.clone(),
        device_id: me.device_id.clone(),
        csr: me.csr.clone().into(),
        node_nonce: node_nonce.to_vec().into(),
        server_nonce: hello.server_nonce.clone(),
        proof: transcript.node_proof(&key[..]).to_vec().into(),
        device_name: me.name.to_owned(),
        ..Default::default()
    };
    let proved = insist(async || answer(client.clone().prove_ticket(prove.clone())).await).await;
    let accepted = proved.map_err(Try::uncounted)?;
    Ok(believe(&accepted, &transcript, &key[..], &ticket.cluster_id, me)?)
}

/// The server's proof decides whether anything of the answer is true.
fn believe(
    accepted: &wire::ProofAccepted,
    transcript: &Transcript,
    key: &[u8],
    cluster_id: &str,
    me: &Me<'_>,
) -> Result<Pending> {
    let parts = accepted
        .trust
        .as_ref()
        .ok_or_else(|| nonsense("no trust bundle in it"))?;
    let roots: Vec<Vec<u8>> = parts.roots.iter().map(|root| root.to_vec()).collect();
    let trust = bundle(&parts.cluster_id, &parts.trust_domain, roots).map_err(|why| nonsense(&why))?;
    if trust.cluster_id() != cluster_id
        || !transcript.check_server_proof(key, &trust.digest(), &accepted.server_proof)
    {
        let message = "the server could not prove that it knows the secret: somebody sits in between";
        return Err(Error::new(
            Kind::Auth,
            "N0206",
            message,
            format!("nothing was stored; {ASK_AGAIN}"),
        ));
    }
    let replicas = replicas_of(parts);
    if replicas.is_empty() {
        return Err(nonsense("it names no replica"));
    }
    Ok(Pending {
        pairing_id: accepted.pairing_id.clone(),
        fetch_token: hex::encode(&transcript.fetch_token(key)[..]),
        device_id: me.device_id.clone(),
        name: me.name.to_owned(),
        key: me.key.to_pem().to_string(),
        cluster_id: cluster_id.to_owned(),
        trust_domain: parts.trust_domain.clone(),
        roots: parts.roots.iter().map(hex::encode).collect(),
        replicas,
        // Computed here: what the server says it shows is worth nothing for a comparison.
        sas: transcript.sas(key),
        expires_at_ms: if accepted.expires_at_ms == 0 {
            wall_ms() + 600_000
        } else {
            accepted.expires_at_ms
        },
    })
}

/// Sends a proof until its outcome is known. The same proof, sent again on the same connection, is answered
/// and not applied again; on another connection it would be worth nothing, so when this one is gone the
/// pairing begins anew.
async fn insist<T>(send: impl AsyncFn() -> std::result::Result<T, Try>) -> std::result::Result<T, Try> {
    let mut unknown = None;
    for _ in 0..PROOF_TRIES {
        match send().await {
            Err(Try::Next(why) | Try::Spent(why)) => unknown = Some(why),
            Err(Try::Final(error)) if unknown.is_some() => {
                return Err(Try::Spent(format!(
                    "the outcome of the proof is not known: {}",
                    error.message
                )));
            }
            known => return known,
        }
        sleep(PAUSE).await;
    }
    Err(Try::Spent(unknown.unwrap_or_default()))
}

async fn answer<T>(
    call: impl Future<Output = std::result::Result<Response<T>, Status>>,
) -> std::result::Result<T, Try> {
    let status = match timeout(CALL, call).await {
        Ok(Ok(response)) => return Ok(response.into_inner()),
        Ok(Err(status)) => status,
        Err(_) => return Err(Try::Spent(format!("no answer within {} s", CALL.as_secs()))),
    };
    match classify(&status) {
        // A replica that lost its quorum after the commit says that it is stale.
        Failure::Answered(error) if error.unknown || error.class == Class::Stale => {
            Err(Try::Spent(error.message))
        }
        Failure::Answered(error) if error.retryable => Err(Try::Next(error.message)),
        Failure::Answered(error) => Err(Try::Final(error.into())),
        Failure::Lost { cause, .. } => Err(Try::Spent(cause)),
    }
}

fn nonce() -> [u8; NONCE_LEN] {
    let mut bytes = [0u8; NONCE_LEN];
    fill_random(&mut bytes);
    bytes
}

fn nonce_of(bytes: &[u8]) -> Result<[u8; NONCE_LEN]> {
    bytes
        .try_into()
        .map_err(|_| nonsense("its nonce has the wrong length"))
}

fn nonsense(why: &str) -> Error {
    let next = "check that the address is a replica's enrol listener (port 7442 by default)";
    Error::new(
        Kind::Unsupported,
        "N0207",
        format!("the server's answer makes no sense: {why}"),
        next,
    )
}

fn internal(why: &str) -> Error {
    Error::new(Kind::Internal, "N0001", why.to_owned(), "")
}

#[cfg(test)]
#[path = "enrol_tests.rs"]
pub(crate) mod tests;
