//! One replica with its keys and its first operator, and machines that pair with it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use palyra_control::{
    AttachRequest, BeginPin, Caller, Control, ControlConfig, EnrolSource, Error, FinishPin, Invoke, Join,
    Keys, Limits, Mint, PinBegun, ProofAccepted, ProveTicket, Registration, Session, Timings, Transport,
    found,
};
use palyra_pki::ca::HostNames;
use palyra_pki::join::JoinRequest;
use palyra_pki::seal::Purpose;
use palyra_pki::ticket::Secret;
use palyra_pki::transcript::Opening;
use palyra_pki::{
    Authority, IssuedCert, JoinToken, Kek, KeyPair, Method, PeerIdentity, Pin, Role as CertificateRole, Root,
    SpiffeId, Ticket, Transcript, TrustDomain, pin, sha256,
};
use palyra_platform as platform;
use palyra_replica::testing::Bus;
use palyra_replica::{Replica, ReplicaConfig, View};
use palyra_state::access::Role;
use palyra_state::cluster::{self, Addresses, Genesis, Replica as Record, ReplicaStatus};
use palyra_state::identity::NewCertificate;
use palyra_state::nodes::{Capability, Effect};
use palyra_state::{Actor, Envelope, Fingerprint, Id};
use palyra_storage::{Disk, MemEngine};

pub(crate) use crate::messages::{goodbye, next, succeeded};

/// A bound on every wait, far beyond what any of them takes.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) async fn soon<F: Future>(what: F) -> F::Output {
    platform::timeout(SOON, what)
        .await
        .expect("it did not happen in time")
}

pub(crate) fn fresh_id() -> Id {
    Id::from_bytes(platform::new_ulid_bytes())
}

fn rng(out: &mut [u8]) {
    platform::fill_random(out);
}

fn recorded(issued: &IssuedCert, authority: u64) -> NewCertificate {
    NewCertificate {
        der: issued.der.clone().into(),
        spki: Fingerprint::from_bytes(issued.spki_sha256),
        serial: hex(&issued.serial).into(),
        not_before: issued.not_before_ms,
        not_after: issued.not_after_ms,
        authority,
        authority_number: 0,
    }
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

/// A cluster of one.
pub(crate) struct Cluster {
    pub(crate) control: Control,
    pub(crate) replica: Replica,
    /// The first operator, an admin.
    pub(crate) admin: PeerIdentity,
    pub(crate) domain: TrustDomain,
    pub(crate) root: Root,
    pub(crate) bus: Arc<Bus>,
    timings: Timings,
}

/// A replica that joined.
pub(crate) struct Member {
    pub(crate) control: Control,
    pub(crate) replica: Replica,
}

/// Waits until the state of a replica is as wanted.
pub(crate) async fn until(replica: &Replica, wanted: impl Fn(&View) -> bool) {
    let mut applied = replica.applied();
    soon(async {
        while !wanted(&replica.view()) {
            applied.changed().await.unwrap();
        }
    })
    .await;
}

/// A replica that wants to join, with its side of the protocol.
pub(crate) struct Joining {
    token: JoinToken,
    authority_key: KeyPair,
    replica_csr: Vec<u8>,
    authority_csr: Vec<u8>,
}

impl Joining {
    pub(crate) fn new(token: &str) -> Joining {
        let authority_key = KeyPair::generate(&mut rng).unwrap();
        Joining {
            token: JoinToken::parse(token).unwrap(),
            replica_csr: KeyPair::generate(&mut rng).unwrap().make_csr().unwrap(),
            authority_csr: authority_key.make_csr().unwrap(),
            authority_key,
        }
    }

    fn transcript<T>(&self, name: &str, use_it: impl FnOnce(&JoinRequest<'_>, &Secret) -> T) -> T {
        let listens = addresses();
        let request = JoinRequest {
            cluster_id: &self.token.cluster_id,
            token_id: &self.token.id,
            replica_csr: &self.replica_csr,
            authority_csr: &self.authority_csr,
            name,
            addresses: &[listens.peer, listens.node, listens.enrol, listens.metrics],
            server_end_point: [7; 32],
        };
        use_it(&request, &self.token.secret)
    }

    pub(crate) fn message(&self, name: &str) -> Join {
        let listens = addresses();
        Join {
            token_id: self.token.id.clone(),
            proof: self.transcript(name, |request, secret| request.proof(secret).to_vec()),
            name: name.to_owned(),
            replica_csr: self.replica_csr.clone(),
            authority_csr: self.authority_csr.clone(),
            peer_addr: listens.peer,
            node_addr: listens.node,
            enrol_addr: listens.enrol,
            metrics_addr: listens.metrics,
        }
    }
}

pub(crate) fn quick() -> Timings {
    Timings {
        heartbeat_interval: Duration::from_millis(100),
        heartbeat_timeout: Duration::from_secs(30),
        ..Timings::default()
    }
}

/// What is made before a cluster lives.
struct Birth {
    cluster_id: Id,
    domain: TrustDomain,
    root: Root,
    authority: Authority,
    kek: Kek,
    admin: PeerIdentity,
    genesis: Genesis,
}

impl Birth {
    fn new() -> Birth {
        // Not by time: clusters that are founded at the same moment must not share a trust domain.
        let mut random = [0; 16];
        rng(&mut random);
        let cluster_id = Id::from_bytes(random);
        let domain = TrustDomain::for_cluster(&cluster_id.to_string()).unwrap();
        let now = platform::wall_ms();
        let kek = Kek::generate(&mut rng);
        let root = Root::create(&cluster_id.to_string(), &domain, now, &mut rng).unwrap();
        let context = cluster_id.to_string();
        let sealed = kek
            .seal(
                Purpose::RootKey,
                context.as_bytes(),
                root.key().to_pkcs8(),
                &mut rng,
            )
            .unwrap();
        let authority_key = KeyPair::generate(&mut rng).unwrap();
        let signed = root
            .sign_authority(&authority_key.make_csr().unwrap(), 1, now, &mut rng)
            .unwrap();
        let authority = Authority::new(signed.der.clone(), authority_key).unwrap();
        let replica_key = KeyPair::generate(&mut rng).unwrap();
        let replica_id = SpiffeId::replica(domain.clone(), 1).unwrap();
        let names = HostNames::from_hosts(["127.0.0.1"]);
        let replica_csr = replica_key.make_csr().unwrap();
        let certificate = root
            .issue_from_csr(&replica_csr, &replica_id, 3_600_000, &names, now, &mut rng)
            .unwrap();
        let admin_csr = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
        let admin_id = SpiffeId::new(domain.clone(), CertificateRole::Operator, "root").unwrap();
        let none = HostNames::default();
        let admin = authority
            .issue_from_csr(&admin_csr, &admin_id, 3_600_000, &none, now, &mut rng)
            .unwrap();
        let genesis = Genesis {
            cluster_id,
            trust_domain: domain.to_string(),
            root_cert_der: root.der().to_vec().into(),
            root_key_sealed: sealed.into(),
            replica_name: "r1".to_owned(),
            addresses: addresses(),
            authority_cert_der: signed.der.into(),
            replica_certificate: recorded(&certificate, 0),
            operator_name: "root".to_owned(),
            operator_certificate: recorded(&admin, 1),
        };
        let admin = PeerIdentity::from_der(&admin.der).unwrap();
        Birth {
            cluster_id,
            domain,
            root,
            authority,
            kek,
            admin,
            genesis,
        }
    }
}

impl Cluster {
    pub(crate) async fn found() -> Cluster {
        Cluster::found_with(quick(), Limits::default()).await
    }

    pub(crate) async fn found_with(timings: Timings, limits: Limits) -> Cluster {
        let Birth {
            cluster_id,
            domain,
            root,
            authority,
            kek,
            admin,
            genesis,
        } = Birth::new();
        let bus = Bus::new();
        let engine = Arc::new(MemEngine::open(&Disk::new("r1")).unwrap());
        let config = ReplicaConfig::new(1, cluster_id);
        let replica = Replica::open(config, engine, bus.transport(1)).await.unwrap();
        let control = Control::start(
            ControlConfig {
                replica_id: 1,
                cluster_id,
                trust_domain: domain.clone(),
                version: "test".to_owned(),
                timings,
                limits,
            },
            replica.clone(),
            Keys { authority, kek },
        );
        bus.attach(1, replica.peer_service());
        replica.start();
        soon(found(&replica, Envelope::new(fresh_id(), Actor::System, genesis)))
            .await
            .unwrap();
        crate::beginning::spoken(&replica).await;
        Cluster {
            control,
            replica,
            admin,
            domain,
            root,
            bus,
            timings,
        }
    }

    /// Another replica, by a token of this cluster, up and running; it becomes a voter in its own time.
    pub(crate) async fn join(&self, name: &str) -> Member {
        let minted = self
            .control
            .mint_join_token(&self.operator(), "", name, 0)
            .await
            .unwrap();
        let asked = Joining::new(&minted.token);
        let joined = self.control.join(&source(1), asked.message(name)).await.unwrap();
        let kek = asked.transcript(name, |request, secret| {
            request.unwrap_kek(secret, &joined.wrapped_kek).unwrap()
        });
        let authority = Authority::new(joined.authority_certificate, asked.authority_key).unwrap();
        let (id, cluster_id) = (joined.replica_id, self.control.cluster_id());
        let engine = Arc::new(MemEngine::open(&Disk::new(name)).unwrap());
        let config = ReplicaConfig::new(id, cluster_id);
        let replica = Replica::open(config, engine, self.bus.transport(id))
            .await
            .unwrap();
        let config = ControlConfig {
            replica_id: id,
            cluster_id,
            trust_domain: self.domain.clone(),
            version: "test".to_owned(),
            timings: self.timings,
            limits: Limits::default(),
        };
        let control = Control::start(config, replica.clone(), Keys { authority, kek });
        self.bus.attach(id, replica.peer_service());
        replica.start();
        Member { control, replica }
    }

    /// Two more replicas, all three voters.
    pub(crate) async fn of_three(timings: Timings) -> (Cluster, Member, Member) {
        let cluster = Cluster::found_with(timings, Limits::default()).await;
        let (two, three) = (cluster.join("r2").await, cluster.join("r3").await);
        for replica in [&cluster.replica, &two.replica, &three.replica] {
            until(replica, |view| {
                let voter = |replica: &&Record| replica.status() == ReplicaStatus::Voter;
                cluster::replicas(view).iter().filter(voter).count() == 3
            })
            .await;
        }
        (cluster, two, three)
    }

    pub(crate) fn operator(&self) -> Caller {
        self.control.admit_operator(&self.admin, Role::Admin).unwrap()
    }

    /// Index of the last entry of the log.
    pub(crate) fn last_log(&self) -> u64 {
        self.replica.status().last_log
    }

    /// A paired and registered machine.
    pub(crate) async fn node(&self, name: &str) -> Machine {
        let mut machine = Machine::new(name);
        let accepted = machine.pair_by_ticket(self, 1).await.unwrap();
        machine.let_in(self, &accepted).await;
        machine.register(self).await;
        machine
    }
}

pub(crate) fn addresses() -> Addresses {
    Addresses {
        peer: "127.0.0.1:7444".to_owned(),
        node: "127.0.0.1:7441".to_owned(),
        enrol: "127.0.0.1:7442".to_owned(),
        http: String::new(),
        metrics: "127.0.0.1:7445".to_owned(),
        quic: "127.0.0.1:7443".to_owned(),
    }
}

pub(crate) fn source(connection: u64) -> EnrolSource {
    EnrolSource {
        connection,
        address: "192.0.2.1".to_owned(),
        end_point: [7; 32],
    }
}

/// A machine that pairs, with the node's side of the protocol.
pub(crate) struct Machine {
    pub(crate) device_id: Id,
    pub(crate) name: String,
    pub(crate) key: KeyPair,
    pub(crate) csr: Bytes,
    pub(crate) fetch_token: Vec<u8>,
    pub(crate) identity: Option<PeerIdentity>,
}

/// A PIN exchange on the machine's side, after the second message.
pub(crate) struct HalfDone {
    pub(crate) begun: PinBegun,
    pub(crate) finish: FinishPin,
    key: Vec<u8>,
    transcript: Transcript,
}

impl Machine {
    pub(crate) fn new(name: &str) -> Machine {
        let key = KeyPair::generate(&mut rng).unwrap();
        let csr = key.make_csr().unwrap().into();
        Machine {
            device_id: fresh_id(),
            name: name.to_owned(),
            key,
            csr,
            fetch_token: Vec::new(),
            identity: None,
        }
    }

    pub(crate) fn peer(&self) -> &PeerIdentity {
        self.identity.as_ref().unwrap()
    }

    fn transcript(
        &self,
        cluster: &Control,
        method: Method,
        code_id: &str,
        server_nonce: [u8; 32],
    ) -> Transcript {
        Transcript::new(&Opening {
            cluster_id: &cluster.cluster_id().to_string(),
            method,
            code_id,
            node_id: &self.device_id.to_string(),
            server_end_point: [7; 32],
            csr_sha256: sha256(&self.csr),
            node_nonce: [3; 32],
            server_nonce,
        })
        .unwrap()
    }

    pub(crate) async fn pair_by_ticket(
        &mut self,
        cluster: &Cluster,
        connection: u64,
    ) -> Result<ProofAccepted, Error> {
        let mint = Mint {
            device_name: self.name.clone(),
            ..Mint::default()
        };
        let minted = cluster.control.mint_ticket(&cluster.operator(), mint).await?;
        let ticket = Ticket::parse(&minted.secret).unwrap();
        self.prove_ticket(cluster, connection, &ticket).await
    }

    pub(crate) async fn prove_ticket(
        &mut self,
        cluster: &Cluster,
        connection: u64,
        ticket: &Ticket,
    ) -> Result<ProofAccepted, Error> {
        let message = self.ticket_message(cluster, connection, ticket);
        cluster.control.prove_ticket(&source(connection), message).await
    }

    pub(crate) fn ticket_message(
        &mut self,
        cluster: &Cluster,
        connection: u64,
        ticket: &Ticket,
    ) -> ProveTicket {
        let control = &cluster.control;
        let hello = control.hello(&source(connection)).unwrap();
        let transcript = self.transcript(control, Method::Ticket, &ticket.id, hello.server_nonce);
        let key = ticket.key();
        self.fetch_token = transcript.fetch_token(key.as_slice()).to_vec();
        ProveTicket {
            ticket_id: ticket.id.clone(),
            device_id: self.device_id.to_string(),
            csr: self.csr.clone(),
            node_nonce: Bytes::from_static(&[3; 32]),
            server_nonce: hello.server_nonce.to_vec().into(),
            proof: transcript.node_proof(key.as_slice()).to_vec().into(),
            device_name: String::new(),
        }
    }

    /// Begins a PIN exchange and prepares the last message. A wrong PIN shows in the second message already;
    /// then a last message is made up, as an attacker would.
    pub(crate) async fn begin(
        &mut self,
        cluster: &Cluster,
        connection: u64,
        text: &str,
    ) -> Result<HalfDone, Error> {
        let typed = Pin::parse(text).unwrap();
        let (state, ke1) = pin::client_begin(&typed, &mut rng).unwrap();
        let begin = BeginPin {
            code_number: 0,
            device_id: self.device_id.to_string(),
            ke1: ke1.clone().into(),
            csr_sha256: sha256(&self.csr).to_vec().into(),
            node_nonce: Bytes::from_static(&[3; 32]),
        };
        let begun = cluster.control.begin_pin(&source(connection), begin).await?;
        let opening = self.transcript(
            &cluster.control,
            Method::Pin,
            &begun.code_id.to_string(),
            begun.server_nonce,
        );
        let context = opening.context().to_vec();
        let transcript = opening.with_messages(&ke1, &begun.ke2);
        let (ke3, key) = match pin::client_finish(state, &typed, &context, &begun.ke2, &mut rng) {
            Ok((ke3, key)) => (ke3, key.to_vec()),
            Err(_) => (vec![9; pin::KE3_LEN], vec![9; 64]),
        };
        self.fetch_token = transcript.fetch_token(&key).to_vec();
        let finish = FinishPin {
            attempt_id: begun.attempt_id.to_string(),
            ke3: ke3.into(),
            csr: self.csr.clone(),
            proof: transcript.node_proof(&key).to_vec().into(),
            device_name: self.name.clone(),
        };
        Ok(HalfDone {
            begun,
            finish,
            key,
            transcript,
        })
    }

    /// Approves what was proved, and fetches the certificate.
    pub(crate) async fn let_in(&mut self, cluster: &Cluster, accepted: &ProofAccepted) {
        let id = accepted.pairing_id.to_string();
        let operator = cluster.operator();
        cluster
            .control
            .approve(&operator, "", &id, &accepted.sas, "")
            .await
            .unwrap();
        let fetched = cluster.control.fetch(&id, &self.fetch_token, 0).await.unwrap();
        self.identity = Some(PeerIdentity::from_der(&fetched.chain[0]).unwrap());
    }

    pub(crate) async fn register(&self, cluster: &Cluster) {
        let capability = |name: &str, effect: Effect| Capability {
            name: name.to_owned(),
            effect: effect as i32,
            ..Capability::default()
        };
        let capabilities = vec![
            capability("echo", Effect::Idempotent),
            capability("pay", Effect::Once),
        ];
        self.register_with(cluster, capabilities).await;
    }

    pub(crate) async fn register_with(&self, cluster: &Cluster, capabilities: Vec<Capability>) {
        let device = self.device_id.to_string();
        let caller = cluster.control.admit_node_as(self.peer(), &device).unwrap();
        let registration = Registration {
            platform: "linux/x86_64".to_owned(),
            agent_version: "test".to_owned(),
            capabilities,
            ..Registration::default()
        };
        cluster.control.register(&caller, registration).await.unwrap();
    }

    pub(crate) async fn attach(&self, cluster: &Cluster, held: &[Id]) -> Result<Session, Error> {
        self.attach_at(&cluster.control, held).await
    }

    pub(crate) async fn attach_at(&self, control: &Control, held: &[Id]) -> Result<Session, Error> {
        let request = AttachRequest {
            device_id: self.device_id.to_string(),
            held: held.iter().map(ToString::to_string).collect(),
            held_attempts: Vec::new(),
            transport: Transport::Stream,
            fallback: String::new(),
            connection: 0,
        };
        soon(control.attach(self.peer(), request)).await
    }

    pub(crate) fn invoke(&self, capability: &str, payload: &'static str) -> Invoke {
        Invoke {
            request_id: String::new(),
            device: self.device_id.to_string(),
            capability: capability.to_owned(),
            payload: Bytes::from_static(payload.as_bytes()),
            timeout_ms: 60_000,
            priority: String::new(),
            max_attempts: 0,
        }
    }
}

impl HalfDone {
    /// Whether the cluster proved itself to the machine.
    pub(crate) fn believes(&self, accepted: &ProofAccepted) -> bool {
        accepted.sas == self.transcript.sas(&self.key)
            && self
                .transcript
                .check_server_proof(&self.key, &accepted.trust.digest(), &accepted.server_proof)
    }
}
