//! A stand-in for a replica: real TLS under a real root, and one behaviour.

use std::pin::Pin;
use std::sync::{Arc, Mutex};

use palyra_client::{fill_random, new_ulid, wall_ms};
use palyra_pki::ca::HostNames;
use palyra_pki::tls::{ALPN_H2, SharedIdentity, SharedTrust, server_mutual};
use palyra_pki::{Authority, Credential, KeyPair, Role, Root, SpiffeId, TrustBundle, TrustDomain};
use palyra_proto::access::v1 as access;
use palyra_proto::access::v1::access_service_server::{AccessService, AccessServiceServer};
use palyra_proto::access::v1::{
    AddOperatorRequest, AddOperatorResponse, ListOperatorsRequest, ListOperatorsResponse,
    RemoveOperatorRequest, RemoveOperatorResponse, WhoAmIRequest, WhoAmIResponse,
};
use palyra_proto::common::v1::{ErrorDetail, WriteInfo};
use palyra_proto::journal::v1::journal_service_server::{JournalService, JournalServiceServer};
use palyra_proto::journal::v1::{
    Cursor, EventRows, Row, StreamEventsRequest, StreamEventsResponse, TailRequest, TailResponse,
    VerifyRequest, VerifyResponse, stream_events_response,
};
use prost::Message as _;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Request, Response, Status};

/// The highest index in the journal of a replica that works.
const HEAD: u64 = 6;
/// Where a replica that breaks off ends its journal.
const BREAK: u64 = 3;

/// What a replica does with requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// Answers.
    Works,
    /// Says that there is no leader.
    NoLeader,
    /// Says that the outcome is unknown.
    Unknown,
    /// Refuses for good.
    Refuses,
    /// Never answers.
    Silent,
    /// Loses the connection after the request came.
    BreaksOff,
    /// Lets a stream begin and ends it at once, each time.
    EndsStreams,
}

/// The keys of a cluster.
pub(crate) struct Cluster {
    authority: Authority,
    trust: TrustBundle,
    domain: TrustDomain,
}

/// A running stand-in.
pub(crate) struct Replica {
    /// `host:port`.
    pub(crate) address: String,
    asked: Arc<Mutex<Vec<String>>>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Replica {
    /// The request ids that came, in order.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl Cluster {
    /// Fresh keys.
    pub(crate) fn new() -> Cluster {
        let cluster_id = new_ulid();
        let domain = TrustDomain::for_cluster(&cluster_id).unwrap();
        let root = Root::create(&cluster_id, &domain, wall_ms(), &mut fill_random).unwrap();
        let key = KeyPair::generate(&mut fill_random).unwrap();
        let csr = key.make_csr().unwrap();
        let signed = root.sign_authority(&csr, 1, wall_ms(), &mut fill_random).unwrap();
        let authority = Authority::new(signed.der, key).unwrap();
        let trust = TrustBundle::new(&cluster_id, domain.clone(), vec![root.der().to_vec()]).unwrap();
        Cluster {
            authority,
            trust,
            domain,
        }
    }

    fn leaf(&self, role: Role, id: &str) -> (Vec<Vec<u8>>, KeyPair) {
        let key = KeyPair::generate(&mut fill_random).unwrap();
        let csr = key.make_csr().unwrap();
        let id = SpiffeId::new(self.domain.clone(), role, id).unwrap();
        let (names, now) = (HostNames::default(), wall_ms());
        let issued = self
            .authority
            .issue_from_csr(&csr, &id, 3_600_000, &names, now, &mut fill_random)
            .unwrap();
        (vec![issued.der, self.authority.der().to_vec()], key)
    }

    /// An operator's credential.
    pub(crate) fn credential(&self) -> Credential {
        let (chain, key) = self.leaf(Role::Operator, "admin");
        Credential::new(&self.trust, vec!["127.0.0.1:1".to_owned()], &chain, &key).unwrap()
    }

    /// Starts a stand-in with an id.
    pub(crate) async fn start(&self, id: u64, behaviour: Behaviour) -> Replica {
        let (chain, key) = self.leaf(Role::Replica, &id.to_string());
        let identity = SharedIdentity::new(chain, &key).unwrap();
        let trust = SharedTrust::new(self.trust.clone());
        let clock = palyra_client::connect::wall_clock();
        let tls = server_mutual(identity, trust, &[Role::Operator], &clock, &[ALPN_H2]).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (sender, accepted) = mpsc::channel(8);
        let acceptor = TlsAcceptor::from(tls);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                if let Ok(stream) = acceptor.accept(tcp).await
                    && sender.send(Ok::<_, std::io::Error>(stream)).await.is_err()
                {
                    break;
                }
            }
        });
        let asked = Arc::new(Mutex::new(Vec::new()));
        let service = Service {
            id,
            behaviour,
            asked: Arc::clone(&asked),
        };
        let serving = tonic::transport::Server::builder()
            .add_service(AccessServiceServer::new(service.clone()))
            .add_service(JournalServiceServer::new(service))
            .serve_with_incoming(ReceiverStream::new(accepted));
        let server = tokio::spawn(async move {
            let _ = serving.await;
        });
        Replica {
            address,
            asked,
            server,
        }
    }
}

#[derive(Clone)]
struct Service {
    id: u64,
    behaviour: Behaviour,
    asked: Arc<Mutex<Vec<String>>>,
}

fn refusal(detail: ErrorDetail) -> Status {
    let mut metadata = MetadataMap::new();
    let bytes = detail.encode_to_vec();
    metadata.insert_bin(
        palyra_client::error::ERROR_TRAILER,
        MetadataValue::from_bytes(&bytes),
    );
    Status::with_metadata(Code::Unavailable, "words", metadata)
}

impl Service {
    async fn behave(&self) -> Result<(), Status> {
        let detail = ErrorDetail {
            served_by: self.id,
            ..ErrorDetail::default()
        };
        match self.behaviour {
            Behaviour::Works => Ok(()),
            Behaviour::NoLeader => Err(refusal(ErrorDetail {
                code: "E1040".to_owned(),
                class: "unavailable".to_owned(),
                retryable: true,
                ..detail
            })),
            Behaviour::Unknown => Err(refusal(ErrorDetail {
                code: "E1041".to_owned(),
                class: "unknown".to_owned(),
                retryable: true,
                unknown: true,
                ..detail
            })),
            Behaviour::Refuses => Err(refusal(ErrorDetail {
                code: "E0203".to_owned(),
                class: "not_found".to_owned(),
                ..detail
            })),
            Behaviour::EndsStreams => Ok(()),
            Behaviour::Silent => std::future::pending().await,
            Behaviour::BreaksOff => Err(Status::unavailable("the connection broke")),
        }
    }
}

#[tonic::async_trait]
impl AccessService for Service {
    async fn who_am_i(&self, _: Request<WhoAmIRequest>) -> Result<Response<WhoAmIResponse>, Status> {
        self.behave().await?;
        Ok(Response::new(WhoAmIResponse::default()))
    }

    async fn list_operators(
        &self,
        _: Request<ListOperatorsRequest>,
    ) -> Result<Response<ListOperatorsResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn add_operator(
        &self,
        _: Request<AddOperatorRequest>,
    ) -> Result<Response<AddOperatorResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn renew_certificate(
        &self,
        _: Request<access::RenewCertificateRequest>,
    ) -> Result<Response<access::RenewCertificateResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn confirm_certificate(
        &self,
        _: Request<access::ConfirmCertificateRequest>,
    ) -> Result<Response<access::ConfirmCertificateResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn revoke_certificate(
        &self,
        _: Request<access::RevokeCertificateRequest>,
    ) -> Result<Response<access::RevokeCertificateResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn remove_operator(
        &self,
        request: Request<RemoveOperatorRequest>,
    ) -> Result<Response<RemoveOperatorResponse>, Status> {
        self.asked.lock().unwrap().push(request.into_inner().request_id);
        self.behave().await?;
        let write = WriteInfo {
            index: HEAD,
            served_by: self.id,
            duplicate: false,
        };
        Ok(Response::new(RemoveOperatorResponse { write: Some(write) }))
    }
}

#[tonic::async_trait]
impl JournalService for Service {
    type TailStream = Pin<Box<dyn Stream<Item = Result<TailResponse, Status>> + Send>>;

    async fn tail(&self, request: Request<TailRequest>) -> Result<Response<Self::TailStream>, Status> {
        if self.behaviour == Behaviour::EndsStreams {
            self.asked.lock().unwrap().push("tail".to_owned());
            let end = [Err(Status::unavailable("going down"))];
            return Ok(Response::new(Box::pin(tokio_stream::iter(end))));
        }
        let after = request.into_inner().after.unwrap_or_default().index;
        let breaks = self.behaviour == Behaviour::BreaksOff;
        let end = if breaks { BREAK } else { HEAD };
        // One row before what was asked for: a reader must drop what it has.
        let rows = (after.max(1)..=end).map(|index| Row {
            cursor: Some(Cursor { index, ordinal: 0 }),
            ..Row::default()
        });
        let mut answers = vec![Ok(TailResponse {
            rows: rows.collect(),
            ..TailResponse::default()
        })];
        if breaks {
            answers.push(Err(Status::unavailable("the connection broke")));
            return Ok(Response::new(Box::pin(tokio_stream::iter(answers))));
        }
        use tokio_stream::StreamExt as _;
        Ok(Response::new(Box::pin(
            tokio_stream::iter(answers).chain(tokio_stream::pending()),
        )))
    }

    type StreamEventsStream = Pin<Box<dyn Stream<Item = Result<StreamEventsResponse, Status>> + Send>>;

    async fn stream_events(
        &self,
        request: Request<StreamEventsRequest>,
    ) -> Result<Response<Self::StreamEventsStream>, Status> {
        use tokio_stream::StreamExt as _;
        let after = request.into_inner().after.unwrap_or_default().index;
        let breaks = self.behaviour == Behaviour::BreaksOff;
        let end = if breaks { BREAK } else { HEAD };
        let rows = (after + 1..=end).map(|index| {
            let cursor = Some(Cursor { index, ordinal: 0 });
            let row = Row {
                cursor,
                ..Row::default()
            };
            let rows = EventRows {
                rows: vec![row],
                cursor,
            };
            Ok(StreamEventsResponse {
                body: Some(stream_events_response::Body::Rows(rows)),
            })
        });
        let rows = tokio_stream::iter(rows.collect::<Vec<_>>());
        if breaks {
            let end = tokio_stream::iter([Err(Status::unavailable("the connection broke"))]);
            return Ok(Response::new(Box::pin(rows.chain(end))));
        }
        Ok(Response::new(Box::pin(rows.chain(tokio_stream::pending()))))
    }

    async fn verify(&self, _: Request<VerifyRequest>) -> Result<Response<VerifyResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}
