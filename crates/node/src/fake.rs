//! A replica inside the test: real gRPC over loopback, without TLS. Heartbeats are answered by themselves, so
//! that a test may take its time; everything else is up to the test.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use palyra_client::{ConnectError, ConnectErrorKind, Connection};
use palyra_proto::common::v1::ErrorDetail;
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::node_service_server::{NodeService, NodeServiceServer};
use palyra_proto::node::v1::server_message::Body as Said;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use crate::home::KnownReplica;
use crate::link::{Dialling, Link};
use crate::{Error, Kind, Result};

/// No test waits longer for what must come. Only a failing one takes it.
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// Three of these without an answer end a session: no busy machine takes so long.
const INTERVAL_MS: u64 = 20_000;

type Say = mpsc::Sender<std::result::Result<wire::ServerMessage, Status>>;

/// One session as the fake replica has it. It ends when this is dropped.
pub(crate) struct Session {
    heard: mpsc::UnboundedReceiver<wire::NodeMessage>,
    say: Say,
    silent: Arc<AtomicBool>,
    pump: AbortHandle,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

/// Answers heartbeats and hands on the rest.
async fn pump(
    mut stream: Streaming<wire::NodeMessage>,
    say: Say,
    silent: Arc<AtomicBool>,
    hand_on: mpsc::UnboundedSender<wire::NodeMessage>,
) {
    while let Ok(Some(message)) = stream.message().await {
        let Some(Body::Heartbeat(beat)) = &message.body else {
            if hand_on.send(message).is_err() {
                return;
            }
            continue;
        };
        let answer = wire::HeartbeatAnswer {
            sequence: beat.sequence,
        };
        let body = Some(Said::Heartbeat(answer));
        if !silent.load(Ordering::Relaxed) && say.send(Ok(wire::ServerMessage { body })).await.is_err() {
            return;
        }
    }
}

impl Session {
    fn new(stream: Streaming<wire::NodeMessage>, say: Say) -> Self {
        let (hand_on, heard) = mpsc::unbounded_channel();
        let silent = Arc::new(AtomicBool::new(false));
        let pump = tokio::spawn(pump(stream, say.clone(), Arc::clone(&silent), hand_on)).abort_handle();
        Self {
            heard,
            say,
            silent,
            pump,
        }
    }

    pub(crate) async fn say(&self, body: Said) {
        let message = wire::ServerMessage { body: Some(body) };
        self.say.send(Ok(message)).await.unwrap();
    }

    /// From now on heartbeats are not answered.
    pub(crate) fn fall_silent(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }

    /// The next message that isn't a heartbeat.
    pub(crate) async fn hear(&mut self) -> Body {
        let message = timeout(SOON, self.heard.recv())
            .await
            .expect("nothing came")
            .unwrap();
        assert_eq!(message.device_id, "DEVICE");
        message.body.unwrap()
    }

    pub(crate) async fn hear_result(&mut self) -> wire::Result {
        loop {
            if let Body::Result(result) = self.hear().await {
                return result;
            }
        }
    }

    /// Takes Attach and answers it. Answers what the node holds.
    pub(crate) async fn attach(&mut self, epoch: u64, endpoints: Vec<wire::NodeEndpoint>) -> Vec<String> {
        self.attach_at(epoch, endpoints, INTERVAL_MS).await
    }

    /// The same, with another interval of heartbeats.
    pub(crate) async fn attach_at(
        &mut self,
        epoch: u64,
        endpoints: Vec<wire::NodeEndpoint>,
        heartbeat_interval_ms: u64,
    ) -> Vec<String> {
        let Body::Attach(attach) = self.hear().await else {
            panic!("the first message was not Attach")
        };
        let attached = wire::Attached {
            epoch,
            replica_id: 1,
            heartbeat_interval_ms,
            endpoints,
            certificate: None,
        };
        self.say(Said::Attached(attached)).await;
        attach.held
    }

    pub(crate) async fn assign(&self, id: &str, capability: &str, epoch: u64) {
        self.say(Said::Assignment(wire::Assignment {
            dispatch_id: id.to_owned(),
            epoch,
            capability: capability.to_owned(),
            payload: "[1]".into(),
            effect: "once".to_owned(),
            remaining_ms: 600_000,
            ..wire::Assignment::default()
        }))
        .await;
    }

    pub(crate) async fn answer(&self, id: &str, accepted: bool, retry: bool) {
        let dispatch_id = id.to_owned();
        self.say(Said::Result(wire::ResultAnswer {
            dispatch_id,
            accepted,
            retry,
            ..Default::default()
        }))
        .await;
    }

    pub(crate) async fn goodbye(&self, code: &str) {
        let code = code.to_owned();
        self.say(Said::Goodbye(wire::Goodbye {
            code,
            ..wire::Goodbye::default()
        }))
        .await;
    }
}

/// What the fake was told, and how it should answer.
#[derive(Default)]
pub(crate) struct Notes {
    pub(crate) registered: Vec<wire::RegisterRequest>,
    pub(crate) refuse_register: Option<Status>,
    /// The next stream is refused with this.
    pub(crate) refuse_stream: Option<Status>,
    pub(crate) no_streams: bool,
    pub(crate) polled: Vec<wire::ServerMessage>,
}

pub(crate) struct Replica {
    address: String,
    sessions: mpsc::Receiver<Session>,
    reports: mpsc::UnboundedReceiver<wire::Result>,
    pub(crate) notes: Arc<Mutex<Notes>>,
    pub(crate) task: JoinHandle<()>,
}

struct Fake {
    sessions: mpsc::Sender<Session>,
    reports: mpsc::UnboundedSender<wire::Result>,
    notes: Arc<Mutex<Notes>>,
}

impl Replica {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (sender, sessions) = mpsc::channel(8);
        let (report, reports) = mpsc::unbounded_channel();
        let notes = Arc::new(Mutex::new(Notes::default()));
        let fake = Fake {
            sessions: sender,
            reports: report,
            notes: Arc::clone(&notes),
        };
        let serve = Server::builder()
            .add_service(NodeServiceServer::new(fake))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let task = tokio::spawn(async move { serve.await.unwrap() });
        Self {
            address,
            sessions,
            reports,
            notes,
            task,
        }
    }

    /// The next session that a node begins here.
    pub(crate) async fn session(&mut self) -> Session {
        timeout(SOON, self.sessions.recv())
            .await
            .expect("no session in time")
            .unwrap()
    }

    /// The next result that comes outside of a stream. It was accepted.
    pub(crate) async fn report(&mut self) -> wire::Result {
        timeout(SOON, self.reports.recv())
            .await
            .expect("no report in time")
            .unwrap()
    }

    pub(crate) fn known(&self, id: u64) -> KnownReplica {
        KnownReplica {
            replica_id: id,
            node_addr: self.address.clone(),
            enrol_addr: String::new(),
            quic_addr: String::new(),
        }
    }

    pub(crate) fn endpoint(&self, id: u64) -> wire::NodeEndpoint {
        wire::NodeEndpoint {
            replica_id: id,
            node_addr: self.address.clone(),
            enrol_addr: String::new(),
            quic_addr: String::new(),
        }
    }
}

/// A refusal as replicas send it.
pub(crate) fn refusal(code: &str, class: &str) -> Status {
    let detail = ErrorDetail {
        code: code.to_owned(),
        message: "no".to_owned(),
        class: class.to_owned(),
        ..Default::default()
    };
    let bytes = prost::Message::encode_to_vec(&detail);
    let mut metadata = tonic::metadata::MetadataMap::new();
    metadata.insert_bin(
        "palyra-error-bin",
        tonic::metadata::MetadataValue::from_bytes(&bytes),
    );
    Status::with_metadata(tonic::Code::FailedPrecondition, "no", metadata)
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
        {
            let mut notes = self.notes.lock().unwrap();
            if notes.no_streams {
                return Err(Status::unavailable("a proxy in between"));
            }
            if let Some(status) = notes.refuse_stream.take() {
                return Err(status);
            }
        }
        let (say, said) = mpsc::channel(64);
        let session = Session::new(request.into_inner(), say);
        // The test may be over.
        let _ = self.sessions.send(session).await;
        Ok(Response::new(ReceiverStream::new(said)))
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
        let _ = self.reports.send(result);
        Ok(Response::new(wire::ReportResponse { answer: Some(answer) }))
    }

    async fn renew(
        &self,
        _: Request<wire::RenewRequest>,
    ) -> std::result::Result<Response<wire::RenewResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }
}

fn unreachable(address: &str, cause: String) -> ConnectError {
    ConnectError {
        address: address.to_owned(),
        kind: ConnectErrorKind::Unreachable,
        cause,
        chain: None,
    }
}

/// A [`Link`] without TLS and without an end of its certificate.
pub(crate) struct Plain;

impl Link for Plain {
    fn dial(&mut self, address: &str) -> Dialling {
        let address = address.to_owned();
        async move {
            let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
            endpoint
                .connect_timeout(Duration::from_secs(2))
                .connect()
                .await
                .map(Connection::Grpc)
                .map_err(|error| unreachable(&address, error.to_string()))
        }
        .boxed()
    }

    fn dial_quic(&mut self, address: &str) -> Dialling {
        let error = unreachable(address, "no UDP here".to_owned());
        async move { Err(error) }.boxed()
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

    fn renew(&mut self, _: Connection) -> BoxFuture<'static, Result<()>> {
        async { Err(Error::new(Kind::Internal, "N0001", "never due", "")) }.boxed()
    }

    fn renewed(&mut self, _: Result<()>) -> bool {
        false
    }

    fn trust_generation(&self) -> u64 {
        0
    }

    fn trust(&mut self, _: u64, _: Vec<Vec<u8>>) -> Result<()> {
        Ok(())
    }

    fn sign_statement(&self, statement: &[u8]) -> Result<(Vec<u8>, Vec<u8>)> {
        let signed = [b"signed: ".as_slice(), statement].concat();
        Ok((b"KEY".to_vec(), palyra_pki::sha256(&signed).to_vec()))
    }

    fn describe(&self) -> (String, u64) {
        (String::new(), u64::MAX)
    }
}
