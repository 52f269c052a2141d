//! Session logic against a control plane inside the test: real gRPC over loopback, without TLS.

use std::sync::{Arc, Mutex};

use futures::FutureExt;
use futures::future::BoxFuture;
use palyra_client::ConnectError;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::node_service_server::{NodeService, NodeServiceServer};
use palyra_proto::node::v1::server_message::Body as Said;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::capability;
use crate::ledger::Ledger;
use crate::mediation::Desk;
use crate::work::Worker;
use crate::{Error, Kind};

const SOON: Duration = Duration::from_secs(20);
const INTERVAL_MS: u64 = 200;

/// One session as the fake replica has it.
struct Session {
    heard: Streaming<wire::NodeMessage>,
    say: mpsc::Sender<std::result::Result<wire::ServerMessage, Status>>,
}

impl Session {
    async fn say(&self, body: Said) {
        self.say
            .send(Ok(wire::ServerMessage { body: Some(body) }))
            .await
            .unwrap();
    }

    /// The next message that isn't a heartbeat; answers those.
    async fn hear(&mut self) -> Body {
        loop {
            let message = timeout(SOON, self.heard.message())
                .await
                .unwrap()
                .unwrap()
                .unwrap();
            assert_eq!(message.device_id, "DEVICE");
            match message.body.unwrap() {
                Body::Heartbeat(beat) => {
                    let answer = wire::HeartbeatAnswer {
                        sequence: beat.sequence,
                    };
                    self.say(Said::Heartbeat(answer)).await;
                }
                other => return other,
            }
        }
    }

    async fn hear_result(&mut self) -> wire::Result {
        loop {
            if let Body::Result(result) = self.hear().await {
                return result;
            }
        }
    }

    /// Takes Attach and answers it. Answers what the node holds.
    async fn attach(&mut self, epoch: u64, endpoints: Vec<wire::NodeEndpoint>) -> Vec<String> {
        let Body::Attach(attach) = self.hear().await else {
            panic!("the first message was not Attach")
        };
        let attached = wire::Attached {
            epoch,
            replica_id: 1,
            heartbeat_interval_ms: INTERVAL_MS,
            endpoints,
        };
        self.say(Said::Attached(attached)).await;
        attach.held
    }

    async fn assign(&self, id: &str, capability: &str, epoch: u64) {
        self.say(Said::Assignment(wire::Assignment {
            dispatch_id: id.to_owned(),
            epoch,
            capability: capability.to_owned(),
            payload: "[1]".into(),
            effect: "once".to_owned(),
            remaining_ms: 20_000,
            ..wire::Assignment::default()
        }))
        .await;
    }

    async fn answer(&self, id: &str, accepted: bool, retry: bool) {
        let dispatch_id = id.to_owned();
        self.say(Said::Result(wire::ResultAnswer {
            dispatch_id,
            accepted,
            retry,
            ..Default::default()
        }))
        .await;
    }

    async fn goodbye(&self, code: &str) {
        let code = code.to_owned();
        self.say(Said::Goodbye(wire::Goodbye {
            code,
            ..wire::Goodbye::default()
        }))
        .await;
    }
}

#[derive(Default)]
struct Notes {
    registered: Vec<wire::RegisterRequest>,
    reported: Vec<wire::Result>,
    refuse_register: Option<Status>,
    no_streams: bool,
    polled: Vec<wire::ServerMessage>,
}

struct Replica {
    address: String,
    sessions: mpsc::Receiver<Session>,
    notes: Arc<Mutex<Notes>>,
    task: JoinHandle<()>,
}

struct Fake {
    sessions: mpsc::Sender<Session>,
    notes: Arc<Mutex<Notes>>,
}

impl Replica {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (sender, sessions) = mpsc::channel(8);
        let notes = Arc::new(Mutex::new(Notes::default()));
        let fake = Fake {
            sessions: sender,
            notes: Arc::clone(&notes),
        };
        let serve = Server::builder()
            .add_service(NodeServiceServer::new(fake))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let task = tokio::spawn(async move { serve.await.unwrap() });
        Self {
            address,
            sessions,
            notes,
            task,
        }
    }

    async fn session(&mut self) -> Session {
        timeout(SOON, self.sessions.recv())
            .await
            .expect("no session in time")
            .unwrap()
    }

    fn known(&self, id: u64) -> KnownReplica {
        KnownReplica {
            replica_id: id,
            node_addr: self.address.clone(),
            enrol_addr: String::new(),
        }
    }

    fn endpoint(&self, id: u64) -> wire::NodeEndpoint {
        wire::NodeEndpoint {
            replica_id: id,
            node_addr: self.address.clone(),
            enrol_addr: String::new(),
        }
    }
}

#[tonic::async_trait]
impl NodeService for Fake {
    async fn register(
        &self,
        request: Request<wire::RegisterRequest>,
    ) -> std::result::Result<Response<wire::RegisterResponse>, Status> {
        let mut notes = self.notes.lock().unwrap();
        notes.registered.push(request.into_inner());
        match notes.refuse_register.clone() {
            Some(status) => Err(status),
            None => Ok(Response::new(wire::RegisterResponse::default())),
        }
    }

    type SessionStream = ReceiverStream<std::result::Result<wire::ServerMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<wire::NodeMessage>>,
    ) -> std::result::Result<Response<Self::SessionStream>, Status> {
        if self.notes.lock().unwrap().no_streams {
            return Err(Status::unavailable("a proxy in between"));
        }
        let (say, said) = mpsc::channel(64);
        self.sessions
            .send(Session {
                heard: request.into_inner(),
                say,
            })
            .await
            .unwrap();
        Ok(Response::new(ReceiverStream::new(said)))
    }

    async fn poll(
        &self,
        request: Request<wire::PollRequest>,
    ) -> std::result::Result<Response<wire::PollResponse>, Status> {
        let request = request.into_inner();
        assert_eq!(request.attach.is_some(), request.epoch == 0);
        let messages = if request.epoch == 0 {
            vec![]
        } else {
            std::mem::take(&mut self.notes.lock().unwrap().polled)
        };
        Ok(Response::new(wire::PollResponse { epoch: 5, messages }))
    }

    async fn report(
        &self,
        request: Request<wire::ReportRequest>,
    ) -> std::result::Result<Response<wire::ReportResponse>, Status> {
        let result = request.into_inner().result.unwrap();
        let answer = wire::ResultAnswer {
            dispatch_id: result.dispatch_id.clone(),
            accepted: true,
            ..Default::default()
        };
        self.notes.lock().unwrap().reported.push(result);
        Ok(Response::new(wire::ReportResponse { answer: Some(answer) }))
    }

    async fn renew(
        &self,
        _: Request<wire::RenewRequest>,
    ) -> std::result::Result<Response<wire::RenewResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }
}

/// A [`Link`] without TLS and without an end of its certificate.
struct Plain;

impl Link for Plain {
    fn dial<'a>(&'a mut self, address: &'a str) -> BoxFuture<'a, std::result::Result<Channel, ConnectError>> {
        async move {
            let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
            endpoint
                .connect_timeout(Duration::from_secs(2))
                .connect()
                .await
                .map_err(|error| ConnectError {
                    address: address.to_owned(),
                    kind: ConnectErrorKind::Unreachable,
                    cause: error.to_string(),
                    chain: None,
                })
        }
        .boxed()
    }

    fn served(&mut self) -> Result<()> {
        Ok(())
    }

    fn refused(&mut self) -> bool {
        false
    }

    fn renew_due(&self) -> bool {
        false
    }

    fn renew(&mut self, _: Channel) -> BoxFuture<'static, Result<()>> {
        async { Err(Error::new(Kind::Internal, "N0001", "never due", "")) }.boxed()
    }

    fn renewed(&mut self, _: Result<()>) -> bool {
        false
    }

    fn describe(&self) -> (String, u64) {
        (String::new(), u64::MAX)
    }
}

struct Node {
    running: JoinHandle<Result<()>>,
    stop: watch::Sender<bool>,
    status: watch::Receiver<AgentStatus>,
    dir: tempfile::TempDir,
}

impl Node {
    fn start(replicas: &[KnownReplica], capabilities: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::create(&dir.path().join("home")).unwrap();
        let file = dir.path().join("caps.toml");
        std::fs::write(&file, capabilities).unwrap();
        let ledger = Arc::new(Mutex::new(Ledger::open(&home.ledger_dir()).unwrap().0));
        let (status, status_receiver) = watch::channel(AgentStatus::default());
        let (events, event_receiver) = mpsc::unbounded_channel();
        let worker = Worker::new(
            capability::load(&[file]).unwrap(),
            Arc::clone(&ledger),
            Arc::new(Desk::default()),
            home.dir().to_path_buf(),
            status_receiver.clone(),
            events,
        );
        let (stop, stopped) = watch::channel(false);
        let record = NodeRecord {
            device_id: "DEVICE".to_owned(),
            name: "n".to_owned(),
            cluster_id: "C".to_owned(),
            replicas: replicas.to_vec(),
        };
        let agent = Agent {
            device_id: record.device_id.clone(),
            registration: wire::RegisterRequest {
                device_id: "DEVICE".to_owned(),
                ..Default::default()
            },
            registered: false,
            jobs: Jobs::new(worker, ledger),
            events: event_receiver,
            link: Box::new(Plain),
            route: Route::new(replicas.to_vec()),
            status,
            shutdown: Shutdown::new(stopped),
            home,
            record,
        };
        Self {
            running: tokio::spawn(agent.run()),
            stop,
            status: status_receiver,
            dir,
        }
    }

    async fn end(self) -> Result<()> {
        timeout(SOON, self.running)
            .await
            .expect("the agent did not end")
            .unwrap()
    }

    async fn becomes(&mut self, wanted: impl FnMut(&AgentStatus) -> bool) {
        timeout(SOON, self.status.wait_for(wanted))
            .await
            .expect("the status did not change")
            .unwrap();
    }
}

fn script(name: &str, script: &str) -> String {
    format!(
        "[[capability]]\nname = \"{name}\"\nprogram = \"/bin/sh\"\neffect = \"once\"\n\
         args = ['-c', '{script}']\n"
    )
}

#[tokio::test]
async fn it_registers_attaches_works_and_stops() {
    let mut replica = Replica::start().await;
    let mut node = Node::start(&[replica.known(1)], "");
    let mut session = replica.session().await;
    assert_eq!(session.attach(7, vec![]).await, Vec::<String>::new());
    session.assign("A", "echo", 7).await;
    assert!(matches!(session.hear().await, Body::Ack(ack) if ack.dispatch_id == "A" && ack.epoch == 7));
    let result = session.hear_result().await;
    assert_eq!(
        (result.outcome.as_str(), &result.payload[..], result.epoch),
        ("succeeded", &b"[1]"[..], 7)
    );
    session.answer("A", true, false).await;
    node.becomes(|status| status.epoch == 7 && status.unreported.is_empty())
        .await;
    assert_eq!(replica.notes.lock().unwrap().registered.len(), 1);
    node.stop.send_replace(true);
    node.end().await.unwrap();
}

#[tokio::test]
async fn work_survives_the_move_to_another_replica() {
    let mut first = Replica::start().await;
    let mut second = Replica::start().await;
    let node = Node::start(
        &[first.known(1)],
        &script(
            "slow",
            "echo x >> runs; while [ ! -e go ]; do sleep 0.05; done; echo 2",
        ),
    );
    let mut session = first.session().await;
    session
        .attach(7, vec![first.endpoint(1), second.endpoint(2)])
        .await;
    session.assign("A", "slow", 7).await;
    assert!(matches!(session.hear().await, Body::Ack(_)));
    first.task.abort();
    drop(session);
    drop(first);
    let mut session = second.session().await;
    assert_eq!(session.attach(9, vec![]).await, ["A"]);
    session.assign("A", "slow", 9).await;
    std::fs::write(node.dir.path().join("home/go"), "").unwrap();
    let result = session.hear_result().await;
    assert_eq!((result.epoch, &result.payload[..]), (9, &b"2"[..]));
    let runs = std::fs::read_to_string(node.dir.path().join("home/runs")).unwrap();
    assert_eq!(runs.lines().count(), 1, "delivered twice, run once");
    let record: NodeRecord = serde_json::from_str(
        &std::fs::read_to_string(node.dir.path().join("home/identity/node.json")).unwrap(),
    )
    .unwrap();
    assert_eq!(
        record.replicas.len(),
        2,
        "the replicas that it was told of are stored"
    );
    let again = second.notes.lock().unwrap().registered.len();
    assert_eq!(again, 0, "registered once, at the first replica");
}

#[tokio::test]
async fn a_result_is_sent_again_until_it_is_accepted() {
    let mut replica = Replica::start().await;
    let mut node = Node::start(&[replica.known(1)], "");
    let mut session = replica.session().await;
    session.attach(7, vec![]).await;
    session.assign("A", "echo", 7).await;
    let first = session.hear_result().await;
    session.answer("A", false, true).await;
    let second = session.hear_result().await;
    assert_eq!(
        first.request_id, second.request_id,
        "one request id for all tries"
    );
    // The session breaks before the answer.
    drop(session);
    let mut session = replica.session().await;
    assert_eq!(session.attach(8, vec![]).await, ["A"]);
    let third = session.hear_result().await;
    assert_eq!((third.request_id, third.epoch), (first.request_id, 8));
    session.answer("A", false, false).await;
    node.becomes(|status| status.epoch == 8 && status.unreported.is_empty())
        .await;
}

#[tokio::test]
async fn cancelling_kills_the_program() {
    let mut replica = Replica::start().await;
    let mut node = Node::start(
        &[replica.known(1)],
        &script("slow", "echo $$ > pid; exec sleep 1000"),
    );
    let mut session = replica.session().await;
    session.attach(7, vec![]).await;
    session.assign("A", "slow", 7).await;
    node.becomes(|status| status.running == ["A"]).await;
    let pid_file = node.dir.path().join("home/pid");
    while !std::fs::read_to_string(&pid_file).is_ok_and(|text| text.ends_with('\n')) {
        tokio::task::yield_now().await;
    }
    let cancel = wire::CancelDispatch {
        dispatch_id: "A".to_owned(),
        reason: "enough".to_owned(),
    };
    session.say(Said::Cancel(cancel)).await;
    node.becomes(|status| status.running.is_empty() && status.unreported.is_empty())
        .await;
    let pid = std::fs::read_to_string(&pid_file).unwrap();
    assert!(!std::path::Path::new("/proc").join(pid.trim()).exists());
}

#[tokio::test]
async fn superseded_and_revoked_end_the_agent_with_different_exit_codes() {
    for (code, exit_code, own) in [("superseded", 11, "N0502"), ("revoked", 3, "N0501")] {
        let mut replica = Replica::start().await;
        let node = Node::start(&[replica.known(1)], "");
        let mut session = replica.session().await;
        session.attach(7, vec![]).await;
        session.goodbye(code).await;
        let error = node.end().await.unwrap_err();
        assert_eq!((error.exit_code(), error.code.as_str()), (exit_code, own));
    }
}

#[tokio::test]
async fn a_revoked_node_that_comes_back_ends() {
    let replica = Replica::start().await;
    let detail = palyra_proto::common::v1::ErrorDetail {
        code: "E0302".to_owned(),
        message: "device DEVICE was revoked".to_owned(),
        class: "denied".to_owned(),
        ..Default::default()
    };
    let mut metadata = tonic::metadata::MetadataMap::new();
    let bytes = prost::Message::encode_to_vec(&detail);
    metadata.insert_bin(
        "palyra-error-bin",
        tonic::metadata::MetadataValue::from_bytes(&bytes),
    );
    replica.notes.lock().unwrap().refuse_register = Some(Status::with_metadata(
        tonic::Code::PermissionDenied,
        "no",
        metadata,
    ));
    let error = Node::start(&[replica.known(1)], "").end().await.unwrap_err();
    assert!(
        error.code == "N0501" && error.message.contains("E0302"),
        "{error}"
    );
}

#[tokio::test]
async fn draining_moves_the_node_and_silence_does_too() {
    let mut first = Replica::start().await;
    let mut second = Replica::start().await;
    let _node = Node::start(&[first.known(1)], "");
    let mut session = first.session().await;
    session
        .attach(7, vec![first.endpoint(1), second.endpoint(2)])
        .await;
    session.goodbye("draining").await;
    let mut session = second.session().await;
    session.attach(8, vec![]).await;
    // Says nothing more and answers no heartbeat.
    let mut back = first.session().await;
    back.attach(9, vec![]).await;
    drop(session);
}

#[tokio::test]
async fn broken_streams_lead_to_polling() {
    let replica = Replica::start().await;
    replica.notes.lock().unwrap().no_streams = true;
    replica.notes.lock().unwrap().polled.push(wire::ServerMessage {
        body: Some(Said::Assignment(wire::Assignment {
            dispatch_id: "A".to_owned(),
            epoch: 5,
            capability: "echo".to_owned(),
            payload: "true".into(),
            remaining_ms: 20_000,
            ..wire::Assignment::default()
        })),
    });
    let mut node = Node::start(&[replica.known(1)], "");
    node.becomes(|status| status.transport == "poll" && status.epoch == 5)
        .await;
    while replica.notes.lock().unwrap().reported.is_empty() {
        tokio::task::yield_now().await;
    }
    let reported = replica.notes.lock().unwrap().reported[0].clone();
    assert_eq!(
        (
            reported.dispatch_id.as_str(),
            reported.epoch,
            &reported.payload[..]
        ),
        ("A", 5, &b"true"[..])
    );
    node.becomes(|status| status.unreported.is_empty()).await;
    node.stop.send_replace(true);
    node.end().await.unwrap();
}

#[tokio::test]
async fn a_stop_without_any_replica_is_prompt() {
    let nobody = KnownReplica {
        replica_id: 1,
        node_addr: "127.0.0.1:1".to_owned(),
        enrol_addr: String::new(),
    };
    let mut node = Node::start(&[nobody], "");
    node.becomes(|status| !status.last_error.is_empty()).await;
    node.stop.send_replace(true);
    node.end().await.unwrap();
}
