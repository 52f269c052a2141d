//! Machines that the harness pretends to be: real keys, real pairing, real certificates, without an agent.
//!
//! Never here: what they do then. For real agents see [`crate::hosts`].

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use palyra_client::error::Failure;
use palyra_client::{Client, ConnectOptions, connect, fill_random, new_ulid};
use palyra_pki::tls::SeenServer;
use palyra_pki::transcript::{NONCE_LEN, Opening};
use palyra_pki::{Credential, KeyPair, Method, Ticket, Transcript, TrustBundle, TrustDomain, sha256};
use palyra_proto::pairing::v1 as wire;
use palyra_proto::pairing::v1::enrol_service_client::EnrolServiceClient;
use tonic::transport::Channel;

use crate::cluster::Cluster;
use crate::door::Identity;

const CALL: Duration = Duration::from_secs(15);
const FETCH_WAIT_MS: u32 = 10_000;

/// A paired machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its device id.
    pub device_id: String,
    /// Its name.
    pub name: String,
    /// What it connects with.
    pub identity: Identity,
    /// The same as a credential.
    pub credential: Credential,
}

/// Pairs a machine by a ticket that the first operator mints and approves, at the replicas that are up. For
/// preparations: nothing is harmed meanwhile, so an error is the harness's or the product's.
///
/// # Errors
/// When a step fails.
pub async fn pair(cluster: &Cluster, name: &str) -> Result<Machine> {
    let operator = cluster.client_of_all(CALL)?;
    let enrol = cluster
        .up()
        .first()
        .map(|id| cluster.enrol_address(*id))
        .context("no replica is up")?;
    let request = wire::MintTicketRequest {
        device_name: name.to_owned(),
        ..Default::default()
    };
    let minted = operator.mint_ticket(request).await.context("minting a ticket")?;
    let ticket = Ticket::parse(&minted.ticket).context("the minted ticket")?;
    let credential = enrol_by(&operator, &enrol, &ticket, name)
        .await
        .with_context(|| format!("pairing {name} at {enrol}"))?;
    Ok(Machine {
        device_id: credential.identity()?.id.id().to_owned(),
        name: name.to_owned(),
        identity: Identity::of(&credential)?,
        credential,
    })
}

async fn enrol_by(operator: &Client, enrol: &str, ticket: &Ticket, name: &str) -> Result<Credential> {
    let seen = SeenServer::new();
    let tls = connect::enrol_pinned(ticket.root_pin, &ticket.cluster_id, Arc::clone(&seen))?;
    let channel = connect::connect(enrol, &tls, &ConnectOptions::default()).await?;
    let end_point = seen
        .end_point()
        .context("the enrol listener shows no certificate")?;
    let mut client = EnrolServiceClient::new(channel);
    let key = KeyPair::generate(&mut fill_random)?;
    let proved = prove(&mut client, end_point, ticket, name, &key).await?;
    let approve = wire::ApproveRequest {
        id: proved.pairing_id.clone(),
        ..Default::default()
    };
    operator.approve(approve).await.context("the approval")?;
    let request = wire::FetchRequest {
        pairing_id: proved.pairing_id,
        fetch_token: proved.fetch_token.into(),
        wait_ms: FETCH_WAIT_MS,
    };
    let fetched = client.fetch(request).await.map_err(refused)?.into_inner();
    ensure!(
        fetched.state == "approved",
        "an approved request is {}",
        fetched.state
    );
    let chain: Vec<Vec<u8>> = fetched.chain.iter().map(|der| der.to_vec()).collect();
    Ok(Credential::new(&proved.trust, proved.endpoints, &chain, &key)?)
}

/// What follows a proof that was accepted.
struct Proved {
    pairing_id: String,
    fetch_token: Vec<u8>,
    trust: TrustBundle,
    endpoints: Vec<String>,
}

async fn prove(
    client: &mut EnrolServiceClient<Channel>,
    server_end_point: [u8; 32],
    ticket: &Ticket,
    name: &str,
    key: &KeyPair,
) -> Result<Proved> {
    let (csr, device_id) = (key.make_csr()?, new_ulid());
    let mut node_nonce = [0u8; NONCE_LEN];
    fill_random(&mut node_nonce);
    let hello = client
        .hello(wire::HelloRequest {})
        .await
        .map_err(refused)?
        .into_inner();
    let server_nonce = <[u8; NONCE_LEN]>::try_from(&hello.server_nonce[..]).context("the server's nonce")?;
    let opening = Opening {
        cluster_id: &ticket.cluster_id,
        method: Method::Ticket,
        code_id: &ticket.id,
        node_id: &device_id,
        server_end_point,
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
    let accepted = client.prove_ticket(request).await.map_err(refused)?.into_inner();
    let parts = accepted
        .trust
        .context("the answer to a proof has no trust bundle")?;
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

fn refused(status: tonic::Status) -> anyhow::Error {
    match palyra_client::error::classify(&status) {
        Failure::Answered(error) => anyhow!("{error}"),
        Failure::Lost { cause, .. } => anyhow!("{cause}"),
    }
}
