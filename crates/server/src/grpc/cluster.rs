//! `ClusterService`: operators see the replicas and change them.

use palyra_control::{ClusterStatus, ReplicaView};
use palyra_proto::cluster::v1 as wire;
use palyra_proto::cluster::v1::cluster_service_server::ClusterService;
use palyra_state::access::Role;
use tonic::{Request, Response, Status};

use super::{Gateway, convert, identity};

#[tonic::async_trait]
impl ClusterService for Gateway {
    async fn status(
        &self,
        request: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusResponse>, Status> {
        let peer = identity(&request)?;
        // Also without a quorum: this is what one looks at when there is none.
        self.control
            .admit_operator_local(&peer)
            .map_err(|error| self.fail(error))?;
        let status = self
            .control
            .cluster_status()
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(self.status_response(status)))
    }

    async fn mint_join_token(
        &self,
        request: Request<wire::MintJoinTokenRequest>,
    ) -> Result<Response<wire::MintJoinTokenResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let mint = request.into_inner();
        let minted = self
            .control
            .mint_join_token(&caller, &mint.request_id, &mint.name, mint.ttl_ms)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::MintJoinTokenResponse {
            token: minted.token.to_string(),
            token_id: minted.id.to_string(),
            expires_at_ms: minted.expires_at_ms,
            write: convert::write_info(minted.write),
        }))
    }

    async fn transfer_leader(
        &self,
        request: Request<wire::TransferLeaderRequest>,
    ) -> Result<Response<wire::TransferLeaderResponse>, Status> {
        self.operator(&request, Role::Admin)?;
        let to = request.into_inner().to;
        let leader_id = self
            .control
            .transfer_leader(to)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::TransferLeaderResponse { leader_id }))
    }

    async fn remove_replica(
        &self,
        request: Request<wire::RemoveReplicaRequest>,
    ) -> Result<Response<wire::RemoveReplicaResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let remove = request.into_inner();
        let write = self
            .control
            .remove_replica(&caller, &remove.request_id, remove.replica_id, remove.force)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RemoveReplicaResponse {
            write: convert::write_info(write),
        }))
    }

    async fn trigger_snapshot(
        &self,
        request: Request<wire::TriggerSnapshotRequest>,
    ) -> Result<Response<wire::TriggerSnapshotResponse>, Status> {
        self.operator(&request, Role::Admin)?;
        let index = self.control.trigger_snapshot().await;
        Ok(Response::new(wire::TriggerSnapshotResponse { index }))
    }
}

impl Gateway {
    fn status_response(&self, status: ClusterStatus) -> wire::StatusResponse {
        wire::StatusResponse {
            cluster_id: self.control.cluster_id().to_string(),
            trust_domain: self.control.trust_domain().to_string(),
            leader_id: status.leader_id.unwrap_or(0),
            term: status.term,
            feature_level: status.feature_level,
            voters: status.voters,
            failures_tolerated: status.failures_tolerated,
            replicas: status.replicas.into_iter().map(replica_status).collect(),
            read: convert::read_info(status.read),
            fleet: Some(wire::FleetCounts {
                nodes: status.fleet.nodes,
                online: status.fleet.online,
                pending_approvals: status.fleet.pending_approvals,
                open_dispatches: status.fleet.open_dispatches,
                suspect: status.fleet.suspect,
                gone: status.fleet.gone,
            }),
            warnings: status.warnings,
        }
    }
}

fn replica_status(replica: ReplicaView) -> wire::ReplicaStatus {
    let status = replica.record.status().as_str().to_owned();
    let addresses = replica.record.addresses;
    wire::ReplicaStatus {
        id: replica.record.id,
        name: replica.record.name,
        status,
        role: replica.role,
        peer_addr: addresses.peer,
        node_addr: addresses.node,
        enrol_addr: addresses.enrol,
        metrics_addr: addresses.metrics,
        last_log_index: replica.last_log_index,
        applied_index: replica.applied_index,
        snapshot_index: replica.snapshot_index,
        contact_age_ms: replica.contact_age_ms,
        version: replica.version,
        state_hash: replica.state_hash,
        clock_skew_ms: replica.clock_skew_ms,
        sessions: replica.sessions,
        reachable: replica.reachable,
        certificate_not_after_ms: replica.certificate_not_after_ms,
        max_staleness_ms: replica.max_staleness_ms,
        draining: replica.draining,
        attaches_waiting: replica.attaches_waiting,
        renewal_entries: replica.renewals.entries,
        leases_renewed: replica.renewals.renewed,
        renewals_refused: replica.renewals.refused,
        quic_addr: addresses.quic,
    }
}
