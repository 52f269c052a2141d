//! Pairing of many machines: a ticket for each, proved over the real enrol listener, approved by the operator,
//! many at a time.
//!
//! What never lives here: a short cut. Keys and signing requests are made here, the proof is that of
//! docs/protocol/pairing.md, and a certificate is taken only from a server that proved that it knows the ticket.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use palyra_client::{Client, ConnectOptions, connect, fill_random, new_ulid};
use palyra_pki::tls::SeenServer;
use palyra_pki::transcript::{NONCE_LEN, Opening};
use palyra_pki::{Credential, KeyPair, Method, Ticket, Transcript, TrustBundle, TrustDomain, sha256};
use palyra_proto::pairing::v1 as wire;
use palyra_proto::pairing::v1::enrol_service_client::EnrolServiceClient;
use tokio::sync::{Mutex, mpsc};
use tokio::time::sleep;
use tonic::transport::Channel;

use super::cache;
use crate::cluster::Cluster;

/// Pairings under way at one time; a cluster keeps twenty open tickets.
const UNDER_WAY: usize = 16;
/// How often one node is tried: a connection may end, and a leader change.
const TRIES: u32 = 5;
/// For the certificate of an approved request.
const FETCH_WAIT_MS: u32 = 10_000;

/// Pairs nodes until `count` good credentials are in `file`. Answers all of them.
pub(crate) async fn pair(cluster: &Cluster, file: &Path, count: usize) -> Result<Vec<Credential>> {
    let mut credentials = cache::read_now(file, count)?;
    let missing = count - credentials.len();
    if missing == 0 {
        return Ok(credentials);
    }
    close_tickets(&cluster.client()?).await?;
    let mut writer = cache::Writer::open(file)?;
    let next = Arc::new(AtomicUsize::new(credentials.len()));
    let (send, mut paired) = mpsc::channel(UNDER_WAY);
    let mut workers = tokio::task::JoinSet::new();
    let ids = cluster.ids();
    let turns: Vec<Arc<Mutex<()>>> = ids.iter().map(|_| Arc::default()).collect();
    for at in 0..UNDER_WAY.min(missing) {
        let worker = Worker {
            operator: cluster.client()?,
            enrol: cluster.enrol_address(ids[at % ids.len()]),
            turn: Arc::clone(&turns[at % ids.len()]),
            enrolled: None,
        };
        workers.spawn(worker.work(Arc::clone(&next), count, send.clone()));
    }
    drop(send);
    while let Some(credential) = paired.recv().await {
        writer.add(&credential)?;
        credentials.push(credential);
        if credentials.len() % 500 == 0 {
            crate::say(&format!("paired {} of {count}", credentials.len()));
        }
    }
    while let Some(ended) = workers.join_next().await {
        ended.context("a pairing worker has panicked")??;
    }
    ensure!(
        credentials.len() == count,
        "only {} of {count} nodes were paired",
        credentials.len()
    );
    Ok(credentials)
}

/// Revokes the tickets that a run before left open when it was broken off: they would take the places of new ones.
async fn close_tickets(client: &Client) -> Result<()> {
    let open = client.list_codes(wire::ListCodesRequest::default()).await?.codes;
    for code in open {
        let revoke = wire::RevokeCodeRequest {
            code: code.id,
            ..Default::default()
        };
        client.revoke_code(revoke).await?;
    }
    Ok(())
}

/// One machine after the other.
struct Worker {
    operator: Client,
    enrol: String,
    /// A replica keeps 32 exchanges of one address, answered ones too, and what is too many pushes out the nonce
    /// that is oldest: from one address, one proof at a time.
    turn: Arc<Mutex<()>>,
    enrolled: Option<Enrolled>,
}

/// A connection to an enrol listener.
struct Enrolled {
    client: EnrolServiceClient<Channel>,
    end_point: [u8; 32],
}

impl Worker {
    async fn work(
        mut self,
        next: Arc<AtomicUsize>,
        count: usize,
        send: mpsc::Sender<Credential>,
    ) -> Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(());
            }
            let mut tries = 0;
            let credential = loop {
                tries += 1;
                match self.pair_one(&format!("sim-{number:05}")).await {
                    Ok(credential) => break credential,
                    Err(error) if tries == TRIES => {
                        return Err(error.context(format!("node {number} was not paired in {TRIES} tries")));
                    }
                    Err(error) => {
                        crate::say(&format!("node {number} is tried again: {error:#}"));
                        self.enrolled = None;
                        sleep(Duration::from_millis(200)).await;
                    }
                }
            };
            if send.send(credential).await.is_err() {
                return Ok(());
            }
        }
    }

    async fn pair_one(&mut self, name: &str) -> Result<Credential> {
        let request = wire::MintTicketRequest {
            device_name: name.to_owned(),
            ..Default::default()
        };
        let minted = self.operator.mint_ticket(request).await?;
        let ticket = Ticket::parse(&minted.ticket).context("the minted ticket")?;
        let key = KeyPair::generate(&mut fill_random)?;
        let proved = match self.prove(&ticket, name, &key).await {
            Ok(proved) => proved,
            Err(error) => {
                // A ticket that stays open takes one of the places of all others.
                let revoke = wire::RevokeCodeRequest {
                    code: ticket.id.clone(),
                    ..Default::default()
                };
                let _ = self.operator.revoke_code(revoke).await;
                return Err(error.context("the proof"));
            }
        };
        let approve = wire::ApproveRequest {
            id: proved.pairing_id.clone(),
            ..Default::default()
        };
        self.operator.approve(approve).await.context("the approval")?;
        self.fetch(proved, &key).await.context("the certificate")
    }

    async fn enrolled(&mut self, ticket: &Ticket) -> Result<&mut Enrolled> {
        if self.enrolled.is_none() {
            let seen = SeenServer::new();
            let tls = connect::enrol_pinned(ticket.root_pin, &ticket.cluster_id, Arc::clone(&seen))?;
            let channel = connect::connect(&self.enrol, &tls, &ConnectOptions::default()).await?;
            let end_point = seen
                .end_point()
                .ok_or_else(|| anyhow!("the enrol listener shows no certificate"))?;
            let client = EnrolServiceClient::new(channel);
            self.enrolled = Some(Enrolled { client, end_point });
        }
        self.enrolled
            .as_mut()
            .ok_or_else(|| anyhow!("no enrol connection"))
    }

    async fn prove(&mut self, ticket: &Ticket, name: &str, key: &KeyPair) -> Result<Proved> {
        let (csr, device_id) = (key.make_csr()?, new_ulid());
        let turn = Arc::clone(&self.turn);
        let _mine = turn.lock().await;
        let mut node_nonce = [0u8; NONCE_LEN];
        fill_random(&mut node_nonce);
        let enrolled = self.enrolled(ticket).await?;
        let hello = enrolled
            .client
            .hello(wire::HelloRequest {})
            .await
            .map_err(refused)?
            .into_inner();
        let server_nonce =
            <[u8; NONCE_LEN]>::try_from(&hello.server_nonce[..]).context("the server's nonce")?;
        let opening = Opening {
            cluster_id: &ticket.cluster_id,
            method: Method::Ticket,
            code_id: &ticket.id,
            node_id: &device_id,
            server_end_point: enrolled.end_point,
            csr_sha256: sha256(&csr),
            node_nonce,
            server_nonce,
        };
        let (transcript, secret) = (Transcript::new(&opening)?, ticket.key());
        let request = wire::ProveTicketRequest {
            ticket_id: ticket.id.clone(),
            device_id,
            csr: csr.into(),
            node_nonce: node_nonce.to_vec().into(),
            server_nonce: hello.server_nonce,
            proof: transcript.node_proof(&secret[..]).to_vec().into(),
            device_name: name.to_owned(),
            ..Default::default()
        };
        let accepted = enrolled
            .client
            .prove_ticket(request)
            .await
            .map_err(refused)?
            .into_inner();
        let parts = accepted
            .trust
            .ok_or_else(|| anyhow!("the answer to a proof has no trust bundle"))?;
        let roots = parts.roots.iter().map(|root| root.to_vec()).collect();
        let trust = TrustBundle::new(&parts.cluster_id, TrustDomain::new(&parts.trust_domain)?, roots)?;
        ensure!(
            transcript.check_server_proof(&secret[..], &trust.digest(), &accepted.server_proof),
            "the server could not prove that it knows the ticket"
        );
        Ok(Proved {
            pairing_id: accepted.pairing_id,
            fetch_token: transcript.fetch_token(&secret[..]).to_vec(),
            trust,
            endpoints: parts
                .endpoints
                .into_iter()
                .map(|endpoint| endpoint.node_addr)
                .collect(),
        })
    }

    async fn fetch(&mut self, proved: Proved, key: &KeyPair) -> Result<Credential> {
        let request = wire::FetchRequest {
            pairing_id: proved.pairing_id,
            fetch_token: proved.fetch_token.into(),
            wait_ms: FETCH_WAIT_MS,
        };
        let enrolled = self
            .enrolled
            .as_mut()
            .ok_or_else(|| anyhow!("no enrol connection"))?;
        let fetched = enrolled
            .client
            .fetch(request)
            .await
            .map_err(refused)?
            .into_inner();
        ensure!(
            fetched.state == "approved",
            "an approved request is {}",
            fetched.state
        );
        let chain: Vec<Vec<u8>> = fetched.chain.iter().map(|der| der.to_vec()).collect();
        Ok(Credential::new(&proved.trust, proved.endpoints, &chain, key)?)
    }
}

/// What follows a proof that was accepted.
struct Proved {
    pairing_id: String,
    fetch_token: Vec<u8>,
    trust: TrustBundle,
    endpoints: Vec<String>,
}

fn refused(status: tonic::Status) -> anyhow::Error {
    match palyra_client::error::classify(&status) {
        palyra_client::error::Failure::Answered(error) => anyhow!("{error}"),
        palyra_client::error::Failure::Lost { cause, .. } => anyhow!("{cause}"),
    }
}
