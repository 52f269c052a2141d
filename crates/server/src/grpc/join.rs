//! `JoinService`: replicas to be, on the enrolment listener.

use palyra_control::Join;
use palyra_proto::cluster::v1 as wire;
use palyra_proto::cluster::v1::join_service_server::JoinService;
use palyra_state::cluster::Replica as Record;
use tonic::{Request, Response, Status};

use super::Gateway;

#[tonic::async_trait]
impl JoinService for Gateway {
    async fn join(
        &self,
        request: Request<wire::JoinRequest>,
    ) -> Result<Response<wire::JoinResponse>, Status> {
        let source = self.enrol_source(&request)?;
        let ask = request.into_inner();
        let join = Join {
            token_id: ask.token_id,
            proof: ask.proof.to_vec(),
            name: ask.name,
            replica_csr: ask.replica_csr.to_vec(),
            authority_csr: ask.authority_csr.to_vec(),
            peer_addr: ask.peer_addr,
            node_addr: ask.node_addr,
            enrol_addr: ask.enrol_addr,
            metrics_addr: ask.metrics_addr,
        };
        let joined = self
            .control
            .join(&source, join)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::JoinResponse {
            cluster_id: self.control.cluster_id().to_string(),
            trust_domain: self.control.trust_domain().to_string(),
            replica_id: joined.replica_id,
            root_certificate: joined.root_certificate.into(),
            authority_certificate: joined.authority_certificate.into(),
            replica_certificate: joined.replica_certificate.into(),
            wrapped_kek: joined.wrapped_kek.into(),
            peers: joined.peers.into_iter().map(peer_address).collect(),
            proof: joined.proof.into(),
            more_roots: super::convert::chain(joined.more_roots),
        }))
    }
}

fn peer_address(record: Record) -> wire::PeerAddress {
    wire::PeerAddress {
        replica_id: record.id,
        name: record.name,
        peer_addr: record.addresses.peer,
        node_addr: record.addresses.node,
        enrol_addr: record.addresses.enrol,
    }
}
