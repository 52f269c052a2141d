//! Nodes for tests: paired through the library, run as a real agent or played by the test itself.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use nix::sys::signal::Signal;
use palyra_client::{ConnectOptions, connect};
use palyra_node::{Error, Home, PairConfig, PairEvent, PairMethod, PairUi, Paired, pair};
use palyra_pki::Credential;
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::node_service_client::NodeServiceClient;
use palyra_proto::node::v1::server_message::Body as Said;
use palyra_proto::pairing::v1::{ApproveRequest, ListRequestsRequest, MintPinRequest, RequestInfo};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use zeroize::Zeroizing;

use crate::cluster::{Cluster, binary, eventually};

/// Remembers what a pairing said.
#[derive(Default)]
pub struct Heard(Mutex<Vec<PairEvent>>);

impl PairUi for Heard {
    fn event(&self, event: PairEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Heard {
    /// The six digits that this machine shows; the operator may see the request before the machine has its answer.
    pub async fn sas(&self) -> String {
        eventually("the proof to be accepted", async || {
            self.0.lock().unwrap().iter().find_map(|event| match event {
                PairEvent::Proved { sas, .. } => Some(sas.clone()),
                _ => None,
            })
        })
        .await
    }
}

/// How to prove a PIN at some replicas.
#[must_use]
pub fn by_pin(pin: &str, code: u32, endpoints: &[String]) -> PairMethod {
    PairMethod::Pin {
        pin: Zeroizing::new(pin.to_owned()),
        code,
        endpoints: endpoints.to_vec(),
    }
}

/// Pairs a folder; gives up after `wait` when the operator doesn't decide.
///
/// # Errors
/// Those of [`pair`].
pub async fn pair_folder(
    dir: &Path,
    method: PairMethod,
    wait: Duration,
    ui: &Heard,
) -> Result<Paired, Error> {
    let (data_dir, name) = (
        dir.to_path_buf(),
        dir.file_name().map(|name| name.to_string_lossy().into_owned()),
    );
    pair(
        PairConfig {
            data_dir,
            name,
            method,
            wait,
            replace: false,
        },
        ui,
    )
    .await
}

impl Cluster {
    /// Mints a PIN at replica `at`. Answers the digits and the code's number.
    pub async fn mint(&self, at: u64) -> (String, u32) {
        let minted = self
            .client_at(at)
            .mint_pin(MintPinRequest::default())
            .await
            .unwrap();
        (minted.pin, minted.code.unwrap().number)
    }

    /// The pairing request of a machine of that name, as replica `at` sees it.
    pub async fn request_of(&self, name: &str, at: u64) -> RequestInfo {
        let client = self.client_at(at);
        eventually("the pairing request", async || {
            let list = ListRequestsRequest {
                status: "pending_approval".to_owned(),
                ..Default::default()
            };
            let listed = client.list_requests(list).await.ok()?;
            listed
                .requests
                .into_iter()
                .find(|request| request.device_name == name)
        })
        .await
    }

    /// Pairs a new folder called `name`: minted at one replica, proved at the next, approved at the third.
    pub async fn pair_node(&self, name: &str) -> PathBuf {
        let dir = self.path().join(name);
        assert!(!dir.exists(), "another test has a node {name}");
        let (pin, code) = self.mint(1).await;
        let ui = Heard::default();
        let method = by_pin(&pin, code, &[self.enrol_addr(2)]);
        let approve = async {
            let request = self.request_of(name, 3).await;
            self.client_at(3)
                .approve(ApproveRequest {
                    id: request.id,
                    ..Default::default()
                })
                .await
                .unwrap();
        };
        let (paired, ()) = tokio::join!(pair_folder(&dir, method, Duration::from_secs(30), &ui), approve);
        paired.unwrap();
        dir
    }

    /// Runs the agent of a paired folder.
    #[must_use]
    pub fn start_node(&self, dir: &Path, capabilities: Option<&Path>) -> Agent {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let log = self.path().join(format!("logs/{name}.log"));
        let file = std::fs::File::options()
            .append(true)
            .create(true)
            .open(&log)
            .unwrap();
        let mut command = Command::new(binary("palyra"));
        command
            .args(["node", "run", "--data-dir"])
            .arg(dir)
            .stdin(Stdio::null());
        if let Some(capabilities) = capabilities {
            command.arg("--capabilities").arg(capabilities);
        }
        let child = command
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        self.note(&name, child.id());
        Agent { child, log }
    }

    /// Waits until the control plane sees a node online.
    pub async fn online(&self, device_id: &str) -> wire::NodeInfo {
        let client = self.client();
        eventually("the node to be online", async || {
            let request = wire::GetNodeRequest {
                device_id: device_id.to_owned(),
                ..Default::default()
            };
            client
                .get_node(request)
                .await
                .ok()?
                .node
                .filter(|node| node.status == "online" && node.session_replica != 0)
        })
        .await
    }
}

/// A running agent.
pub struct Agent {
    child: Child,
    /// Its output.
    pub log: PathBuf,
}

impl Agent {
    /// A process that was started, and its output.
    #[must_use]
    pub(crate) fn of(child: Child, log: PathBuf) -> Self {
        Self { child, log }
    }

    /// Waits until it ends by itself. Answers its exit code.
    pub async fn ended(&mut self) -> i32 {
        eventually("the agent's end", async || self.child.try_wait().unwrap())
            .await
            .code()
            .unwrap_or(-1)
    }

    /// Tells it to stop.
    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Stops it where it stands, as a machine that sleeps does.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Has it go on.
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The id and credential of a paired folder.
#[must_use]
pub fn identity(dir: &Path) -> (String, Credential) {
    let home = Home::open(dir).unwrap();
    (
        home.record().unwrap().unwrap().device_id,
        home.credential().unwrap().unwrap(),
    )
}

/// Connects with a credential, whatever it is.
///
/// # Errors
/// Why there is no connection.
pub async fn dial(credential: &Credential, address: &str) -> Result<Channel, palyra_client::ConnectError> {
    let (identity, trust) = credential.for_tls().unwrap();
    let tls = connect::mutual(trust, identity, None).unwrap();
    connect::connect(address, &tls, &ConnectOptions::default()).await
}

/// A node played by the test: it says what the test wants, when the test wants.
pub struct Puppet {
    /// The id that it claims.
    pub device_id: String,
    /// The session that it was given.
    pub epoch: u64,
    /// The connection.
    pub client: NodeServiceClient<Channel>,
    say: mpsc::Sender<wire::NodeMessage>,
    heard: Streaming<wire::ServerMessage>,
    heart: tokio::task::AbortHandle,
}

impl Drop for Puppet {
    fn drop(&mut self) {
        self.heart.abort();
    }
}

impl Puppet {
    /// Registers `echo` and `once`, and attaches at one replica.
    ///
    /// # Errors
    /// What the replica refuses.
    pub async fn attach(dir: &Path, address: &str, held: Vec<String>) -> Result<Self, Status> {
        let (device_id, credential) = identity(dir);
        let channel = dial(&credential, address)
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let mut client = NodeServiceClient::new(channel);
        client.register(registration(&device_id)).await?;
        let (say, said) = mpsc::channel(16);
        let request_id = palyra_client::new_ulid();
        let first = message(
            &device_id,
            Body::Attach(wire::Attach {
                request_id,
                held,
                ..wire::Attach::default()
            }),
        );
        say.send(first).await.unwrap();
        let mut heard = client.session(ReceiverStream::new(said)).await?.into_inner();
        match heard.message().await?.and_then(|message| message.body) {
            Some(Said::Attached(attached)) => {
                let beat = beat(device_id.clone(), say.clone(), attached.heartbeat_interval_ms);
                let heart = tokio::spawn(beat).abort_handle();
                Ok(Self {
                    device_id,
                    epoch: attached.epoch,
                    client,
                    say,
                    heard,
                    heart,
                })
            }
            other => Err(Status::internal(format!("not Attached: {other:?}"))),
        }
    }

    /// Says something.
    pub async fn say(&self, body: Body) {
        let _ = self.say.send(message(&self.device_id, body)).await;
    }

    /// Says something in another device's name.
    pub async fn say_as(&self, device_id: &str, body: Body) {
        let _ = self.say.send(message(device_id, body)).await;
    }

    /// The next message that isn't a heartbeat's answer.
    ///
    /// # Errors
    /// How the stream ended.
    pub async fn hear(&mut self) -> Result<Option<Said>, Status> {
        loop {
            let next = tokio::time::timeout(Duration::from_secs(20), self.heard.message()).await;
            match next.map_err(|_| Status::deadline_exceeded("nothing came"))?? {
                Some(wire::ServerMessage {
                    body: Some(Said::Heartbeat(_)),
                }) => {}
                Some(wire::ServerMessage { body }) => return Ok(body),
                None => return Ok(None),
            }
        }
    }

    /// The next assignment.
    pub async fn assigned(&mut self) -> wire::Assignment {
        loop {
            match self.hear().await.unwrap() {
                Some(Said::Assignment(assignment)) => return assignment,
                Some(_) => {}
                None => panic!("the session ended"),
            }
        }
    }

    /// Reports a result. Answers what the replica says to it.
    pub async fn report(&mut self, result: wire::Result) -> wire::ResultAnswer {
        let id = result.dispatch_id.clone();
        self.say(Body::Result(result)).await;
        loop {
            match self.hear().await.unwrap() {
                Some(Said::Result(answer)) if answer.dispatch_id == id => return answer,
                Some(_) => {}
                None => panic!("the session ended"),
            }
        }
    }

    /// A result as this node would report it.
    #[must_use]
    pub fn result(&self, dispatch_id: &str, payload: &str) -> wire::Result {
        succeeded(dispatch_id, self.epoch, payload)
    }
}

async fn beat(device_id: String, say: mpsc::Sender<wire::NodeMessage>, interval_ms: u64) {
    let mut ticks = tokio::time::interval(Duration::from_millis(interval_ms));
    for sequence in 1.. {
        ticks.tick().await;
        if say
            .send(message(&device_id, Body::Heartbeat(wire::Heartbeat { sequence })))
            .await
            .is_err()
        {
            return;
        }
    }
}

/// The result of a dispatch that went well.
#[must_use]
pub fn succeeded(dispatch_id: &str, epoch: u64, payload: &str) -> wire::Result {
    wire::Result {
        request_id: palyra_client::new_ulid(),
        dispatch_id: dispatch_id.to_owned(),
        epoch,
        outcome: "succeeded".to_owned(),
        payload: payload.to_owned().into(),
        ..Default::default()
    }
}

/// What a puppet registers.
#[must_use]
pub fn registration(device_id: &str) -> wire::RegisterRequest {
    let capability = wire::Capability {
        name: "echo".to_owned(),
        effect: "idempotent".to_owned(),
        timeout_ms: 30_000,
        max_concurrency: 4,
        ..Default::default()
    };
    let once = wire::Capability {
        name: "once".to_owned(),
        effect: "once".to_owned(),
        ..capability.clone()
    };
    wire::RegisterRequest {
        request_id: palyra_client::new_ulid(),
        device_id: device_id.to_owned(),
        platform: "test/puppet".to_owned(),
        agent_version: "0".to_owned(),
        capabilities: vec![capability, once],
        ..Default::default()
    }
}

fn message(device_id: &str, body: Body) -> wire::NodeMessage {
    wire::NodeMessage {
        device_id: device_id.to_owned(),
        body: Some(body),
    }
}

/// What a refused call says: its code and its words.
#[must_use]
pub fn refusal(status: &Status) -> (String, String) {
    match palyra_client::error::classify(status) {
        palyra_client::error::Failure::Answered(error) => (error.code.clone(), error.message.clone()),
        palyra_client::error::Failure::Lost { cause, .. } => (String::new(), cause),
    }
}

/// A credential that another cluster would have issued to this device.
#[must_use]
pub fn forged(device_id: &str, real: &Credential) -> Credential {
    use palyra_pki::ca::HostNames;
    use palyra_pki::{Authority, KeyPair, Role, Root, SpiffeId, TrustBundle};
    let mut rng = palyra_client::fill_random;
    let now = palyra_client::wall_ms();
    let trust = real.trust().unwrap();
    let domain = trust.trust_domain().clone();
    let root = Root::create(trust.cluster_id(), &domain, now, &mut rng).unwrap();
    let authority_key = KeyPair::generate(&mut rng).unwrap();
    let signed = root
        .sign_authority(&authority_key.make_csr().unwrap(), 1, now, &mut rng)
        .unwrap();
    let authority = Authority::new(signed.der, authority_key).unwrap();
    let key = KeyPair::generate(&mut rng).unwrap();
    let id = SpiffeId::new(domain.clone(), Role::Node, device_id).unwrap();
    let csr = key.make_csr().unwrap();
    let leaf = authority
        .issue_from_csr(&csr, &id, 3_600_000, &HostNames::default(), now, &mut rng)
        .unwrap();
    let chain = vec![leaf.der, authority.der().to_vec()];
    let own = TrustBundle::new(trust.cluster_id(), domain, vec![root.der().to_vec()]).unwrap();
    let mut credential = Credential::new(&own, real.endpoints.clone(), &chain, &key).unwrap();
    // It trusts the real cluster, so that the refusal can only come from the other side.
    credential.roots = real.roots.clone();
    credential
}
