//! Renewal against a replica in the test that signs with an authority of its own.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use palyra_pki::ca::HostNames;
use palyra_pki::{Authority, Root, SpiffeId, TrustBundle, TrustDomain};
use palyra_proto::node::v1::node_service_server::{NodeService, NodeServiceServer};
use tokio::net::TcpListener;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use palyra_client::fill_random;

use super::*;

const DEVICE: &str = "01JD7ZA1B2C3D4E5F6G7H8J9K0";
const CLUSTER: &str = "01JD7ZA1B2C3D4E5F6G7H8J9K1";
const LIFE_MS: u64 = 3_600_000;

struct Issuer {
    root: Root,
    authority: Authority,
    domain: TrustDomain,
}

impl Issuer {
    fn new() -> Arc<Self> {
        let domain = TrustDomain::for_cluster(CLUSTER).unwrap();
        let root = Root::create(CLUSTER, &domain, wall_ms(), &mut fill_random).unwrap();
        let key = KeyPair::generate(&mut fill_random).unwrap();
        let csr = key.make_csr().unwrap();
        let signed = root.sign_authority(&csr, 1, wall_ms(), &mut fill_random).unwrap();
        Arc::new(Self {
            root,
            authority: Authority::new(signed.der, key).unwrap(),
            domain,
        })
    }

    fn chain(&self, device: &str, csr: &[u8], now_ms: u64) -> Vec<Vec<u8>> {
        let id = SpiffeId::new(self.domain.clone(), Role::Node, device).unwrap();
        let names = HostNames::default();
        let leaf = self
            .authority
            .issue_from_csr(csr, &id, LIFE_MS, &names, now_ms, &mut fill_random);
        vec![leaf.unwrap().der, self.authority.der().to_vec()]
    }

    fn credential(&self, now_ms: u64) -> Credential {
        let key = KeyPair::generate(&mut fill_random).unwrap();
        let roots = vec![self.root.der().to_vec()];
        let trust = TrustBundle::new(CLUSTER, self.domain.clone(), roots).unwrap();
        let chain = self.chain(DEVICE, &key.make_csr().unwrap(), now_ms);
        Credential::new(&trust, vec!["127.0.0.1:1".to_owned()], &chain, &key).unwrap()
    }
}

struct Fake {
    issuer: Arc<Issuer>,
    device: &'static str,
    /// Counter and key of each request, in order.
    asked: Asked,
    /// How many answers are lost.
    lost: AtomicU32,
}

type Asked = Arc<Mutex<Vec<(u64, [u8; 32])>>>;

#[tonic::async_trait]
impl NodeService for Fake {
    async fn register(
        &self,
        _: Request<wire::RegisterRequest>,
    ) -> std::result::Result<Response<wire::RegisterResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    type SessionStream = ReceiverStream<std::result::Result<wire::ServerMessage, Status>>;

    async fn session(
        &self,
        _: Request<Streaming<wire::NodeMessage>>,
    ) -> std::result::Result<Response<Self::SessionStream>, Status> {
        Err(Status::unimplemented("not here"))
    }

    type StreamEventsStream = ReceiverStream<std::result::Result<wire::NodeEventsResponse, Status>>;

    async fn stream_events(
        &self,
        _: Request<wire::NodeEventsRequest>,
    ) -> std::result::Result<Response<Self::StreamEventsStream>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn poll(
        &self,
        _: Request<wire::PollRequest>,
    ) -> std::result::Result<Response<wire::PollResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn report(
        &self,
        _: Request<wire::ReportRequest>,
    ) -> std::result::Result<Response<wire::ReportResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn renew(
        &self,
        request: Request<wire::RenewRequest>,
    ) -> std::result::Result<Response<wire::RenewResponse>, Status> {
        let request = request.into_inner();
        assert_eq!(request.device_id, DEVICE);
        let key = palyra_pki::keys::check_csr(&request.csr).unwrap().spki_sha256;
        self.asked.lock().unwrap().push((request.counter, key));
        let chain = self.issuer.chain(self.device, &request.csr, wall_ms());
        let chain = chain.into_iter().map(Into::into).collect();
        let lose = |left: u32| left.checked_sub(1);
        if self
            .lost
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, lose)
            .is_ok()
        {
            return Err(Status::unavailable("the answer is lost"));
        }
        Ok(Response::new(wire::RenewResponse {
            chain,
            write: None,
            counter: request.counter,
            times: None,
        }))
    }
}

async fn connection(issuer: &Arc<Issuer>, device: &'static str) -> Connection {
    losing(issuer, device, 0).await.0
}

/// A replica whose first answers are lost, and what it was asked.
async fn losing(issuer: &Arc<Issuer>, device: &'static str, lost: u32) -> (Connection, Asked) {
    let asked = Asked::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let fake = Fake {
        issuer: Arc::clone(issuer),
        device,
        asked: Arc::clone(&asked),
        lost: AtomicU32::new(lost),
    };
    let incoming = TcpListenerStream::new(listener);
    tokio::spawn(
        Server::builder()
            .add_service(NodeServiceServer::new(fake))
            .serve_with_incoming(incoming),
    );
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    (Connection::Grpc(endpoint.connect().await.unwrap()), asked)
}

fn paired(issuer: &Issuer, dir: &tempfile::TempDir, now_ms: u64) -> (Home, TlsLink) {
    let home = Home::create(&dir.path().join("home")).unwrap();
    home.set_credential(&issuer.credential(now_ms), false).unwrap();
    let link = TlsLink::open(&home).unwrap();
    (home, link)
}

#[tokio::test]
async fn a_renewed_certificate_replaces_the_old_one_once_it_was_served() {
    let (issuer, dir) = (Issuer::new(), tempfile::tempdir().unwrap());
    // Three quarters of its life are over.
    let (home, mut link) = paired(&issuer, &dir, wall_ms() - LIFE_MS * 3 / 4);
    assert!(link.renew_due());
    let old = link.describe();
    let outcome = link.renew(connection(&issuer, DEVICE).await).await;
    assert!(!link.renew_due(), "one renewal at a time");
    assert!(link.renewed(outcome), "connect anew with it");
    let new = link.describe();
    assert!(new.0 != old.0 && new.1 > old.1);
    let stored = home.credential().unwrap().unwrap().identity().unwrap();
    assert_eq!(
        hex::encode(stored.fingerprint),
        old.0,
        "the old one is in place until the new one was served"
    );
    assert_eq!(
        TlsLink::open(&home).unwrap().describe(),
        new,
        "a restart goes on with the new one"
    );
    link.served().unwrap();
    let stored = home.credential().unwrap().unwrap().identity().unwrap();
    assert_eq!(hex::encode(stored.fingerprint), new.0);
    assert!(
        home.next_credential().unwrap().is_none() && !link.refused(),
        "nothing to fall back on"
    );
}

#[tokio::test]
async fn a_refused_renewal_leaves_the_old_certificate_in_use() {
    let (issuer, dir) = (Issuer::new(), tempfile::tempdir().unwrap());
    let (home, mut link) = paired(&issuer, &dir, wall_ms());
    assert!(!link.renew_due(), "it is fresh");
    let old = link.describe();
    let outcome = link.renew(connection(&issuer, DEVICE).await).await;
    assert!(link.renewed(outcome));
    assert!(link.refused(), "the old one is there to fall back on");
    assert_eq!(link.describe(), old);
    // It may be the one that the cluster has in use, by whose key alone the node recovers.
    assert!(home.next_credential().unwrap().is_some());
    assert!(!link.refused(), "there is no third");
    link.served().unwrap();
    assert_eq!(link.describe(), old);
    assert!(
        home.next_credential().unwrap().is_none(),
        "the cluster has let the old one in"
    );
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_as_it_was() {
    let (issuer, dir) = (Issuer::new(), tempfile::tempdir().unwrap());
    let (home, mut link) = paired(&issuer, &dir, wall_ms());
    let (connection, asked) = losing(&issuer, DEVICE, 2).await;
    let outcome = link.renew(connection.clone()).await;
    assert!(!link.renewed(outcome) && !link.health().problem.is_empty());
    // The process dies in between.
    let mut link = TlsLink::open(&home).unwrap();
    let outcome = link.renew(connection.clone()).await;
    assert!(!link.renewed(outcome));
    let outcome = link.renew(connection.clone()).await;
    assert!(link.renewed(outcome));
    assert_eq!((link.health().counter, link.health().problem.as_str()), (1, ""));
    link.served().unwrap();
    let outcome = link.renew(connection).await;
    assert!(link.renewed(outcome));
    let asked = asked.lock().unwrap();
    assert!(
        asked[0] == asked[1] && asked[1] == asked[2],
        "one key, one counter"
    );
    assert_eq!((asked[0].0, asked[3].0), (1, 2));
    assert_ne!(asked[3].1, asked[2].1, "the next one has a key of its own");
}

#[tokio::test]
async fn a_crash_between_the_answer_and_its_use_loses_nothing() {
    let (issuer, dir) = (Issuer::new(), tempfile::tempdir().unwrap());
    let (home, mut link) = paired(&issuer, &dir, wall_ms());
    let (connection, asked) = losing(&issuer, DEVICE, 0).await;
    let before = std::fs::read(home.dir().join("identity/credential.json")).unwrap();
    link.renew(connection.clone()).await.unwrap();
    drop(link);
    // After the answer was stored, and before it was used.
    let mut link = TlsLink::open(&home).unwrap();
    let next = link.describe();
    assert_eq!(
        before,
        std::fs::read(home.dir().join("identity/credential.json")).unwrap()
    );
    link.served().unwrap();
    assert_eq!(link.describe(), next);
    let outcome = link.renew(connection).await;
    assert!(link.renewed(outcome));
    let counters: Vec<u64> = asked
        .lock()
        .unwrap()
        .iter()
        .map(|(counter, _)| *counter)
        .collect();
    assert_eq!(counters, [1, 2]);
}

#[tokio::test]
async fn a_full_disk_asks_for_nothing_and_keeps_the_certificate() {
    let (issuer, dir) = (Issuer::new(), tempfile::tempdir().unwrap());
    let (home, mut link) = paired(&issuer, &dir, wall_ms());
    let (connection, asked) = losing(&issuer, DEVICE, 0).await;
    let old = link.describe();
    // What cannot be written, whoever runs the test.
    let blocked = home.dir().join("identity/renewal.json.tmp");
    std::fs::create_dir(&blocked).unwrap();
    let outcome = link.renew(connection.clone()).await;
    assert_eq!(outcome.as_ref().unwrap_err().code, "N0001");
    assert!(!link.renewed(outcome));
    assert!(asked.lock().unwrap().is_empty(), "its key would be lost");
    assert_eq!(link.describe(), old);
    std::fs::remove_dir(&blocked).unwrap();
    // The key is on disk and the certificate finds no room: the same request brings it later.
    let blocked = home.dir().join("identity/next.json.tmp");
    std::fs::create_dir(&blocked).unwrap();
    let outcome = link.renew(connection.clone()).await;
    assert!(!link.renewed(outcome));
    std::fs::remove_dir(&blocked).unwrap();
    let outcome = link.renew(connection).await;
    assert!(link.renewed(outcome));
    let asked = asked.lock().unwrap();
    assert!(asked.len() == 2 && asked[0] == asked[1]);
}

#[tokio::test]
async fn a_certificate_for_somebody_else_or_of_another_cluster_is_not_taken() {
    let (issuer, dir) = (Issuer::new(), tempfile::tempdir().unwrap());
    let (home, mut link) = paired(&issuer, &dir, wall_ms());
    let before = link.describe();
    for (other, device) in [(Arc::clone(&issuer), CLUSTER), (Issuer::new(), DEVICE)] {
        let outcome = link.renew(connection(&other, device).await).await;
        assert_eq!(outcome.as_ref().unwrap_err().code, "N0504");
        assert!(!link.renewed(outcome));
    }
    assert_eq!(link.describe(), before);
    assert!(home.next_credential().unwrap().is_none());
}

#[test]
fn a_trust_bundle_is_on_disk_for_both_credentials_before_it_counts() {
    let issuer = Issuer::new();
    let dir = tempfile::tempdir().unwrap();
    let home = Home::create(dir.path()).unwrap();
    home.set_credential(&issuer.credential(wall_ms()), false).unwrap();
    let next = Root::create_next(CLUSTER, 2, &issuer.domain, wall_ms(), &mut fill_random).unwrap();
    let both = vec![issuer.root.der().to_vec(), next.der().to_vec()];
    let mut link = TlsLink::open(&home).unwrap();
    assert_eq!(link.trust_generation(), 0);
    link.trust(2, both.clone()).unwrap();
    let stored = home.credential().unwrap().unwrap();
    assert_eq!(
        (stored.trust_generation, stored.trust().unwrap().roots().len()),
        (2, 2)
    );
    // An older one that comes late changes nothing; one that is none is refused and changes nothing.
    link.trust(1, both[..1].to_vec()).unwrap();
    assert_eq!(link.trust(3, Vec::new()).unwrap_err().code, "N0902");
    assert_eq!(link.trust(3, vec![b"junk".to_vec()]).unwrap_err().code, "N0902");
    assert_eq!(home.credential().unwrap().unwrap(), stored);

    // A renewal that was under way brings the bundle of before; it is brought up to date before it is used.
    home.set_credential(&issuer.credential(wall_ms()), true).unwrap();
    assert!(link.renewed(Ok(())));
    assert_eq!(link.trust_generation(), 2);
    assert_eq!(home.next_credential().unwrap().unwrap().trust_generation, 2);
    // The same after a crash in between.
    home.set_credential(&issuer.credential(wall_ms()), true).unwrap();
    assert_eq!(TlsLink::open(&home).unwrap().trust_generation(), 2);
    link.trust(3, both[1..].to_vec()).unwrap();
    for stored in [
        home.credential().unwrap().unwrap(),
        home.next_credential().unwrap().unwrap(),
    ] {
        assert_eq!(
            (stored.trust_generation, stored.trust().unwrap().roots().len()),
            (3, 1)
        );
    }
}
