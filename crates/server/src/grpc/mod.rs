//! The gRPC services: a thin mapping between wire messages and `palyra-control`.
//!
//! What never lives here: decisions. Invariants: a handler first asks `control` who the caller is, by the
//! certificate of the connection, and only then looks at the request; every refusal goes through
//! [`crate::status`].

mod access;
mod approvals;
mod ca;
mod cluster;
mod dispatch;
mod enrol;
mod fleet;
mod join;
mod journal;
mod node;
mod pairing;
mod runs;
#[cfg(test)]
mod tests;
mod workers;

use std::sync::Arc;

use palyra_control::Control;
use palyra_control::{Caller, EnrolSource};
use palyra_control::{Error, Refusal};
use palyra_pki::{PeerIdentity, Role as CertificateRole};
use palyra_proto::access::v1::access_service_server::AccessServiceServer;
use palyra_proto::approval::v1::approval_service_server::ApprovalServiceServer;
use palyra_proto::approval::v1::grant_service_server::GrantServiceServer;
use palyra_proto::ca::v1::ca_service_server::CaServiceServer;
use palyra_proto::cluster::v1::cluster_service_server::ClusterServiceServer;
use palyra_proto::cluster::v1::join_service_server::JoinServiceServer;
use palyra_proto::dispatch::v1::dispatch_service_server::DispatchServiceServer;
use palyra_proto::journal::v1::journal_service_server::JournalServiceServer;
use palyra_proto::node::v1::fleet_service_server::FleetServiceServer;
use palyra_proto::node::v1::node_service_server::NodeServiceServer;
use palyra_proto::pairing::v1::enrol_service_server::EnrolServiceServer;
use palyra_proto::pairing::v1::pairing_service_server::PairingServiceServer;
use palyra_proto::run::v1::lease_service_server::LeaseServiceServer;
use palyra_proto::run::v1::run_service_server::RunServiceServer;
use palyra_proto::worker::v1::worker_service_server::WorkerServiceServer;
use palyra_state::access::Role;
use tonic::service::interceptor::InterceptedService;
use tonic::service::{Interceptor, Routes};
use tonic::{Request, Status};
use tonic_health::server::HealthReporter;

use crate::convert;
use crate::listener::Peer;
use crate::nodeplane::NodePlane;
use crate::status;

/// Answers of lists may be larger than requests: a page has up to a thousand entries.
const ANSWER: usize = 16 << 20;

/// What all services share. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Gateway {
    control: Control,
    nodes: NodePlane,
}

impl Gateway {
    /// Services in front of a control plane.
    pub(crate) fn new(control: Control) -> Gateway {
        let nodes = NodePlane::new(control.clone());
        Gateway { control, nodes }
    }

    /// The services of the listener for nodes and operators; requests have at most `message` bytes. What the
    /// health service says is set by the reporter.
    pub(crate) fn node_routes(&self, message: usize) -> anyhow::Result<(Routes, HealthReporter)> {
        let (reporter, health) = tonic_health::server::health_reporter();
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(palyra_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        macro_rules! sized {
            ($server:ident) => {
                $server::new(self.clone())
                    .max_decoding_message_size(message)
                    .max_encoding_message_size(ANSWER)
            };
        }
        let routes = Routes::new(sized!(NodeServiceServer))
            .add_service(sized!(FleetServiceServer))
            .add_service(sized!(PairingServiceServer))
            .add_service(sized!(DispatchServiceServer))
            .add_service(sized!(JournalServiceServer))
            .add_service(sized!(AccessServiceServer))
            .add_service(sized!(ClusterServiceServer))
            .add_service(sized!(CaServiceServer))
            .add_service(sized!(ApprovalServiceServer))
            .add_service(sized!(GrantServiceServer))
            .add_service(sized!(WorkerServiceServer))
            .add_service(sized!(RunServiceServer))
            .add_service(sized!(LeaseServiceServer))
            .add_service(self.for_the_known(health.max_decoding_message_size(message)))
            .add_service(self.for_the_known(reflection.max_decoding_message_size(message)));
        Ok((routes, reporter))
    }

    /// The services of the enrolment listener.
    pub(crate) fn enrol_routes(&self) -> Routes {
        Routes::new(EnrolServiceServer::new(self.clone()).max_decoding_message_size(ENROL))
            .add_service(JoinServiceServer::new(self.clone()).max_decoding_message_size(ENROL))
    }

    /// A service that says nothing of ours, for whoever the registry knows: a revoked certificate gets no
    /// answer from any service, this harmless one included.
    fn for_the_known<S>(&self, service: S) -> InterceptedService<S, impl Interceptor + Clone + use<S>> {
        let gateway = self.clone();
        InterceptedService::new(service, move |request: Request<()>| {
            let peer = identity(&request)?;
            let known = match peer.id.role() {
                CertificateRole::Operator => gateway.control.admit_operator_local(&peer),
                _ => gateway.control.admit_node(&peer),
            };
            known.map(|_| request).map_err(|error| gateway.fail(error))
        })
    }

    fn fail(&self, error: Error) -> Status {
        status::status(&error, self.control.replica_id())
    }

    fn operator<T>(&self, request: &Request<T>, needed: Role) -> Result<Caller, Status> {
        let peer = identity(request)?;
        self.control
            .admit_operator(&peer, needed)
            .map_err(|error| self.fail(error))
    }

    fn enrol_source<T>(&self, request: &Request<T>) -> Result<EnrolSource, Status> {
        let peer = connection(request)?;
        let end_point = peer.end_point.ok_or_else(|| {
            self.fail(
                Refusal::Protocol {
                    cause: "enrolment has a listener of its own",
                }
                .into(),
            )
        })?;
        Ok(EnrolSource {
            connection: peer.id,
            address: peer.source.ip().to_string(),
            end_point,
        })
    }
}

/// Strangers send no more than a CSR, a proof and a few names.
const ENROL: usize = 64 * 1024;

/// The connection that a request came on.
fn connection<T>(request: &Request<T>) -> Result<Arc<Peer>, Status> {
    let found = request.extensions().get::<Arc<Peer>>();
    found
        .cloned()
        .ok_or_else(|| Status::internal("E1015: the listener has not said whose connection this is"))
}

/// Whose certificate a request came with.
fn identity<T>(request: &Request<T>) -> Result<PeerIdentity, Status> {
    let peer = connection(request)?;
    peer.identity
        .clone()
        .ok_or_else(|| Status::unauthenticated("E1001: this call takes a certificate"))
}
