//! The node's side of a pairing against an enrol listener inside the test that can lie in every way: real TLS,
//! real PAKE.

use std::sync::Mutex;

use palyra_client::wall_ms;
use palyra_pki::ca::HostNames;
use palyra_pki::layout::certificates_to_pem;
use palyra_pki::pin::{PinVerifier, ServerState, mint, server_begin, server_finish};
use palyra_pki::tls::server_end_point;
use palyra_pki::{Authority, Role, Root, SpiffeId, TrustBundle, TrustDomain, ticket};
use palyra_proto::pairing::v1::enrol_service_server::{EnrolService, EnrolServiceServer};
use prost::Message as _;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use zeroize::Zeroizing;

use super::*;

const CODE: &str = "01JD7ZA1B2C3D4E5F6G7H8J9K0";
const PIN: &str = "4821 9034";

/// What the listener does wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lie {
    Nothing,
    /// It sits in between: its transcript has the certificate of another listener.
    OtherCertificate,
    ServerProof,
    /// A root of its own, under the true server's proof.
    OtherRoot,
    /// The digits that it says it shows.
    Digits,
    ShortNonce,
    NoClusterId,
    ShortSecondMessage,
    /// It belongs to another cluster than it says.
    OtherCluster,
    /// The first answer to the last message is lost.
    LosesFirstProof,
    /// No answer to a first message arrives.
    LosesEveryBegin,
    /// Its clock is an hour ahead.
    ClockAhead,
}

/// What the operator decided, as the listener tells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Decision {
    Approved,
    /// The certificate is another device's.
    OtherDevice,
    /// It is this device's, over another key.
    OtherKey,
    /// It is of another cluster, whose roots the answer brings along.
    OtherCluster,
    Rejected,
    Expired,
    /// Nobody knows the pairing.
    Forgotten,
    /// The replica answers nothing.
    Silence,
}

/// A cluster's identity, as its enrol listener shows it.
pub(crate) struct Cluster {
    pub(crate) id: String,
    trust: TrustBundle,
    root_pin: [u8; 32],
    chain: Vec<Vec<u8>>,
    key: KeyPair,
    authority: Authority,
}

impl Cluster {
    /// A node's chain, leaf first, without the root.
    fn issue(&self, device_id: &str, csr: &[u8]) -> Vec<Vec<u8>> {
        let id = SpiffeId::new(self.trust.trust_domain().clone(), Role::Node, device_id).unwrap();
        let (now, none) = (wall_ms(), HostNames::default());
        let issued = self
            .authority
            .issue_from_csr(csr, &id, 3_600_000, &none, now, &mut fill_random)
            .unwrap();
        vec![issued.der, self.authority.der().to_vec()]
    }
}

fn cluster() -> Cluster {
    cluster_at(wall_ms())
}

fn cluster_at(now: u64) -> Cluster {
    let rng = &mut fill_random;
    let id = new_ulid();
    let domain = TrustDomain::for_cluster(&id).unwrap();
    let root = Root::create(&id, &domain, now, rng).unwrap();
    let issuing = KeyPair::generate(rng).unwrap();
    let signed = root
        .sign_authority(&issuing.make_csr().unwrap(), 1, now, rng)
        .unwrap();
    let authority = Authority::new(signed.der, issuing).unwrap();
    let key = KeyPair::generate(rng).unwrap();
    let name = SpiffeId::replica(domain.clone(), 1).unwrap();
    let hosts = HostNames::from_hosts(["127.0.0.1"]);
    let leaf = authority
        .issue_from_csr(&key.make_csr().unwrap(), &name, 3_600_000, &hosts, now, rng)
        .unwrap();
    Cluster {
        trust: TrustBundle::new(&id, domain, vec![root.der().to_vec()]).unwrap(),
        root_pin: root.pin(),
        chain: vec![leaf.der, authority.der().to_vec(), root.der().to_vec()],
        key,
        authority,
        id,
    }
}

#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) begun: u32,
    exchange: Option<(ServerState, Transcript, Vec<u8>)>,
    device_id: String,
    /// Device and CSR of the last proof.
    proved: (String, Vec<u8>),
    finished: Vec<wire::FinishPinRequest>,
    answer: Option<wire::ProofAccepted>,
    server_nonce: [u8; 32],
    /// The digits of the true transcript.
    sas: String,
}

pub(crate) struct Fake {
    lie: Lie,
    pub(crate) decision: Mutex<Decision>,
    pub(crate) cluster: Cluster,
    verifier: PinVerifier,
    pub(crate) ticket: Ticket,
    pub(crate) heard: Mutex<Heard>,
}

fn wire_bundle(trust: &TrustBundle, enrol_addr: &str) -> wire::TrustBundle {
    wire::TrustBundle {
        cluster_id: trust.cluster_id().to_owned(),
        trust_domain: trust.trust_domain().to_string(),
        roots: trust.roots().iter().map(|root| root.to_vec().into()).collect(),
        endpoints: vec![wire::Endpoint {
            replica_id: 1,
            node_addr: "127.0.0.1:1".to_owned(),
            enrol_addr: enrol_addr.to_owned(),
            quic_addr: String::new(),
        }],
    }
}

fn lost<T>() -> std::result::Result<Response<T>, Status> {
    Err(Status::unavailable("connection reset"))
}

impl Fake {
    fn opening<'a>(&'a self, method: Method, node: (&'a str, &[u8], &[u8]), server: [u8; 32]) -> Opening<'a> {
        let (node_id, csr_sha256, node_nonce) = node;
        let mut server_end_point = server_end_point(&self.cluster.chain[0]);
        if self.lie == Lie::OtherCertificate {
            server_end_point = server_end_point.map(|byte| !byte);
        }
        Opening {
            cluster_id: &self.cluster.id,
            method,
            code_id: CODE,
            node_id,
            server_end_point,
            csr_sha256: csr_sha256.try_into().unwrap(),
            node_nonce: node_nonce.try_into().unwrap(),
            server_nonce: server,
        }
    }

    fn accepted(&self, transcript: &Transcript, key: &[u8]) -> wire::ProofAccepted {
        let mut trust = wire_bundle(&self.cluster.trust, &self.ticket.endpoints[0]);
        let mut server_proof = transcript.server_proof(key, &self.cluster.trust.digest());
        let mut sas = transcript.sas(key);
        self.heard.lock().unwrap().sas = sas.clone();
        match self.lie {
            Lie::ServerProof => server_proof[31] ^= 1,
            Lie::OtherRoot => trust.roots = vec![cluster().chain[2].clone().into()],
            Lie::Digits => sas = "no digits".to_owned(),
            _ => {}
        }
        wire::ProofAccepted {
            pairing_id: new_ulid(),
            sas,
            trust: Some(trust),
            server_proof: server_proof.to_vec().into(),
            expires_at_ms: wall_ms() + 60_000,
        }
    }
}

/// A refusal as a replica words it.
fn refused(code: &str, class: &str) -> Status {
    let detail = palyra_proto::common::v1::ErrorDetail {
        code: code.to_owned(),
        class: class.to_owned(),
        message: "no such pairing".to_owned(),
        ..Default::default()
    };
    let mut status = Status::permission_denied("refused");
    let detail = MetadataValue::from_bytes(&detail.encode_to_vec());
    status.metadata_mut().insert_bin("palyra-error-bin", detail);
    status
}

type Answer<T> = std::result::Result<Response<T>, Status>;

#[tonic::async_trait]
impl EnrolService for Fake {
    async fn recover(
        &self,
        _: Request<wire::RecoverRequest>,
    ) -> std::result::Result<Response<wire::RecoverResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn begin_pin(&self, request: Request<wire::BeginPinRequest>) -> Answer<wire::BeginPinResponse> {
        let begin = request.into_inner();
        let mut heard = self.heard.lock().unwrap();
        heard.begun += 1;
        if self.lie == Lie::LosesEveryBegin {
            return lost();
        }
        let server_nonce = nonce();
        let node = (
            begin.device_id.as_str(),
            &begin.csr_sha256[..],
            &begin.node_nonce[..],
        );
        let transcript = Transcript::new(&self.opening(Method::Pin, node, server_nonce)).unwrap();
        let context = transcript.context().to_vec();
        let (state, mut ke2) =
            server_begin(&self.verifier, CODE, &context, &begin.ke1, &mut fill_random).unwrap();
        let transcript = transcript.with_messages(&begin.ke1, &ke2);
        heard.exchange = Some((state, transcript, begin.csr_sha256.to_vec()));
        heard.device_id = begin.device_id.clone();
        let mut answer = wire::BeginPinResponse {
            attempt_id: new_ulid(),
            code_id: CODE.to_owned(),
            cluster_id: self.cluster.id.clone(),
            server_nonce: server_nonce.to_vec().into(),
            replica_id: 1,
            tries_left: 4,
            ..Default::default()
        };
        match self.lie {
            Lie::ShortNonce => answer.server_nonce = vec![0; 31].into(),
            Lie::NoClusterId => answer.cluster_id = "palyra".to_owned(),
            Lie::ShortSecondMessage => ke2.truncate(319),
            _ => {}
        }
        answer.ke2 = ke2.into();
        Ok(Response::new(answer))
    }

    async fn finish_pin(&self, request: Request<wire::FinishPinRequest>) -> Answer<wire::ProofAccepted> {
        let finish = request.into_inner();
        let (exchange, earlier) = {
            let mut heard = self.heard.lock().unwrap();
            heard.finished.push(finish.clone());
            (heard.exchange.take(), heard.answer.clone())
        };
        if let Some(answer) = earlier {
            return Ok(Response::new(answer));
        }
        let (state, transcript, csr) = exchange.unwrap();
        assert_eq!(sha256(&finish.csr).as_slice(), csr);
        let key = server_finish(state, &finish.ke3).unwrap();
        assert!(transcript.check_node_proof(&key[..], &finish.proof));
        let answer = self.accepted(&transcript, &key[..]);
        {
            let mut heard = self.heard.lock().unwrap();
            heard.answer = Some(answer.clone());
            heard.proved = (heard.device_id.clone(), finish.csr.to_vec());
        }
        if self.lie == Lie::LosesFirstProof {
            return lost();
        }
        Ok(Response::new(answer))
    }

    async fn hello(&self, _: Request<wire::HelloRequest>) -> Answer<wire::HelloResponse> {
        let server_nonce = nonce();
        self.heard.lock().unwrap().server_nonce = server_nonce;
        let mut cluster_id = self.cluster.id.clone();
        if self.lie == Lie::OtherCluster {
            cluster_id = new_ulid();
        }
        Ok(Response::new(wire::HelloResponse {
            cluster_id,
            server_nonce: server_nonce.to_vec().into(),
            replica_id: 1,
        }))
    }

    async fn prove_ticket(&self, request: Request<wire::ProveTicketRequest>) -> Answer<wire::ProofAccepted> {
        let prove = request.into_inner();
        let server_nonce = self.heard.lock().unwrap().server_nonce;
        let csr = sha256(&prove.csr);
        let node = (prove.device_id.as_str(), &csr[..], &prove.node_nonce[..]);
        let transcript = Transcript::new(&self.opening(Method::Ticket, node, server_nonce)).unwrap();
        let key = self.ticket.key();
        assert!(transcript.check_node_proof(&key[..], &prove.proof));
        self.heard.lock().unwrap().proved = (prove.device_id.clone(), prove.csr.to_vec());
        Ok(Response::new(self.accepted(&transcript, &key[..])))
    }

    async fn fetch(&self, _: Request<wire::FetchRequest>) -> Answer<wire::FetchResponse> {
        let (device_id, csr) = self.heard.lock().unwrap().proved.clone();
        let mut trust = wire_bundle(&self.cluster.trust, &self.ticket.endpoints[0]);
        let (state, chain) = match *self.decision.lock().unwrap() {
            Decision::Approved => ("approved", self.cluster.issue(&device_id, &csr)),
            Decision::OtherDevice => ("approved", self.cluster.issue(&new_ulid(), &csr)),
            Decision::OtherKey => {
                let other = KeyPair::generate(&mut fill_random).unwrap().make_csr().unwrap();
                ("approved", self.cluster.issue(&device_id, &other))
            }
            Decision::OtherCluster => {
                let other = cluster();
                trust = wire_bundle(&other.trust, &self.ticket.endpoints[0]);
                ("approved", other.issue(&device_id, &csr))
            }
            Decision::Rejected => ("rejected", vec![]),
            Decision::Expired => ("expired", vec![]),
            Decision::Forgotten => return Err(refused("E1026", "denied")),
            Decision::Silence => return lost(),
        };
        Ok(Response::new(wire::FetchResponse {
            state: state.to_owned(),
            reason: "not ours".to_owned(),
            chain: chain.into_iter().map(Into::into).collect(),
            trust: Some(trust),
        }))
    }
}

/// A listener that runs, and where.
pub(crate) async fn listener(lie: Lie) -> (Arc<Fake>, String) {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = socket.local_addr().unwrap().to_string();
    let ahead = if lie == Lie::ClockAhead { 3_600_000 } else { 0 };
    let cluster = cluster_at(wall_ms() + ahead);
    let chain = certificates_to_pem(&cluster.chain);
    let tls = ServerTlsConfig::new().identity(Identity::from_pem(chain, cluster.key.to_pem().as_bytes()));
    let fake = Arc::new(Fake {
        lie,
        decision: Mutex::new(Decision::Approved),
        verifier: mint(&Pin::parse(PIN).unwrap(), CODE, &mut fill_random).unwrap(),
        ticket: Ticket {
            cluster_id: cluster.id.clone(),
            id: CODE.to_owned(),
            secret: ticket::Secret::generate(&mut fill_random),
            root_pin: cluster.root_pin,
            endpoints: vec![endpoint.clone()],
        },
        cluster,
        heard: Mutex::default(),
    });
    let service = EnrolServiceServer::from_arc(Arc::clone(&fake));
    let server = Server::builder().tls_config(tls).unwrap().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(socket)));
    (fake, endpoint)
}

pub(crate) struct Quiet;

impl PairUi for Quiet {
    fn event(&self, _: PairEvent) {}
}

async fn with_pin(endpoint: &str, pin: &str) -> Result<Pending> {
    let method = PairMethod::Pin {
        pin: Zeroizing::new(pin.to_owned()),
        code: 0,
        endpoints: vec![endpoint.to_owned()],
    };
    prove(&method, "m", &Quiet).await
}

async fn with_ticket(ticket: &Ticket) -> Result<Pending> {
    prove(&PairMethod::Ticket(ticket.to_text().unwrap()), "m", &Quiet).await
}

fn code(proved: Result<Pending>) -> String {
    proved.map(drop).unwrap_err().code
}

#[tokio::test]
async fn the_digits_are_the_nodes_own_and_not_what_the_server_says() {
    for lie in [Lie::Nothing, Lie::Digits] {
        let (fake, endpoint) = listener(lie).await;
        let pending = with_pin(&endpoint, PIN).await.unwrap();
        assert_eq!(pending.sas, fake.heard.lock().unwrap().sas, "{lie:?}");
        assert_eq!(pending.cluster_id, fake.cluster.id);
        assert_eq!(pending.roots, [hex::encode(&fake.cluster.chain[2])]);
        assert!(KeyPair::from_pem(&pending.key).is_ok());
    }
}

#[tokio::test]
async fn a_wrong_pin_and_somebody_in_between_end_it_at_the_first_try() {
    for (lie, typed) in [(Lie::Nothing, "4821 9035"), (Lie::OtherCertificate, PIN)] {
        let (fake, endpoint) = listener(lie).await;
        let error = with_pin(&endpoint, typed).await.map(drop).unwrap_err();
        assert_eq!(error.code, "N0202", "{lie:?}: {error}");
        assert!(error.message.contains("4 tries"), "{error}");
        let heard = fake.heard.lock().unwrap();
        assert_eq!(
            (heard.begun, heard.finished.len()),
            (1, 0),
            "{lie:?}: each further try would cost one of the code's"
        );
    }
}

#[tokio::test]
async fn a_server_that_cannot_prove_its_roots_is_not_believed() {
    for lie in [Lie::ServerProof, Lie::OtherRoot] {
        let (fake, endpoint) = listener(lie).await;
        assert_eq!(code(with_pin(&endpoint, PIN).await), "N0206", "{lie:?}");
        assert_eq!(code(with_ticket(&fake.ticket).await), "N0206", "{lie:?}");
    }
}

#[tokio::test]
async fn answers_that_make_no_sense_are_named() {
    for lie in [Lie::ShortNonce, Lie::NoClusterId, Lie::ShortSecondMessage] {
        let (_fake, endpoint) = listener(lie).await;
        assert_eq!(code(with_pin(&endpoint, PIN).await), "N0207", "{lie:?}");
    }
}

#[tokio::test]
async fn a_proof_whose_answer_is_lost_is_sent_again_as_it_was() {
    let (fake, endpoint) = listener(Lie::LosesFirstProof).await;
    with_pin(&endpoint, PIN).await.unwrap();
    let heard = fake.heard.lock().unwrap();
    assert_eq!((heard.begun, heard.finished.len()), (1, 2));
    assert_eq!(heard.finished[0], heard.finished[1]);
}

#[tokio::test]
async fn unknown_outcomes_do_not_burn_the_code() {
    let (fake, endpoint) = listener(Lie::LosesEveryBegin).await;
    let error = with_pin(&endpoint, PIN).await.map(drop).unwrap_err();
    assert_eq!((error.code.as_str(), error.exit_code()), ("N0201", 4), "{error}");
    assert!(error.next.contains("five"), "{error}");
    assert_eq!(fake.heard.lock().unwrap().begun, 2, "five burn the code");
}

#[tokio::test]
async fn a_ticket_is_proved_to_its_own_cluster_only() {
    let (fake, _) = listener(Lie::Nothing).await;
    let pending = with_ticket(&fake.ticket).await.unwrap();
    assert_eq!(pending.sas, fake.heard.lock().unwrap().sas);
    let mut moved = fake.ticket.clone();
    (moved.root_pin, moved.cluster_id) = ([7; 32], new_ulid());
    assert_eq!(code(with_ticket(&moved).await), "N0203", "another root");
    let (fake, _) = listener(Lie::OtherCluster).await;
    assert_eq!(code(with_ticket(&fake.ticket).await), "N0203", "another id");
    let (fake, _) = listener(Lie::ClockAhead).await;
    let error = with_ticket(&fake.ticket).await.map(drop).unwrap_err();
    assert_eq!((error.code.as_str(), error.exit_code()), ("N0208", 7), "{error}");
    assert!(
        error.message.contains("clock") && error.next.contains("clock"),
        "{error}"
    );
}
