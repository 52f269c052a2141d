//! `CaService`: roots, authorities, and who trusts what.

use std::collections::BTreeSet;

use palyra_control::{AuthorityView, CaStatus, RootView};
use palyra_proto::ca::v1 as wire;
use palyra_proto::ca::v1::ca_service_server::CaService;
use palyra_state::access::Role;
use tonic::{Request, Response, Status};

use super::{Gateway, convert};

/// Nodes that a status names when nothing is asked for, and at most.
const NAMES: usize = 10;
const NAMES_MAX: u32 = 10_000;

#[tonic::async_trait]
impl CaService for Gateway {
    async fn status(
        &self,
        request: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let ask = request.into_inner();
        let names = match ask.names {
            0 => NAMES,
            asked => asked.min(NAMES_MAX) as usize,
        };
        let status = self
            .control
            .ca_status(convert::read_options(ask.read), names)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(status_response(status)))
    }

    async fn trust(
        &self,
        request: Request<wire::TrustRequest>,
    ) -> Result<Response<wire::TrustResponse>, Status> {
        let caller = self.operator(&request, Role::Viewer)?;
        let answer = self
            .control
            .operator_trusts(&caller, request.into_inner().generation)
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::TrustResponse {
            generation: answer.generation,
            roots: convert::chain(answer.roots),
        }))
    }

    async fn rotate_authority(
        &self,
        request: Request<wire::RotateAuthorityRequest>,
    ) -> Result<Response<wire::RotateAuthorityResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let ask = request.into_inner();
        let (asked, write) = self
            .control
            .rotate_authorities(&caller, &ask.request_id, ask.replica_id, &ask.reason)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RotateAuthorityResponse {
            asked,
            write: convert::write_info(write),
        }))
    }

    async fn begin_root(
        &self,
        request: Request<wire::BeginRootRequest>,
    ) -> Result<Response<wire::BeginRootResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let ask = request.into_inner();
        let imported = (!ask.certificate.is_empty()).then(|| (ask.certificate.to_vec(), ask.key.to_vec()));
        let write = self
            .control
            .begin_root(&caller, &ask.request_id, imported, &ask.reason)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::BeginRootResponse {
            write: convert::write_info(write),
        }))
    }

    async fn advance_root(
        &self,
        request: Request<wire::AdvanceRootRequest>,
    ) -> Result<Response<wire::AdvanceRootResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let ask = request.into_inner();
        let write = self
            .control
            .advance_root(&caller, &ask.request_id, &ask.from, ask.force, &ask.reason)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::AdvanceRootResponse {
            write: convert::write_info(write),
        }))
    }

    async fn revert_root(
        &self,
        request: Request<wire::RevertRootRequest>,
    ) -> Result<Response<wire::RevertRootResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let ask = request.into_inner();
        let write = self
            .control
            .revert_root(&caller, &ask.request_id, &ask.from, &ask.reason)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RevertRootResponse {
            write: convert::write_info(write),
        }))
    }
}

/// Replicas with an authority that the root which signs now has not signed yet: the rotation's last step is
/// refused until the leader has seen to that, so they are not ready for it.
fn unsigned(status: &CaStatus) -> BTreeSet<u64> {
    let issuing = status.ca.issuing;
    let lacking = status
        .authorities
        .iter()
        .filter(|one| one.record.under(issuing).is_none());
    lacking.map(|one| one.record.replica_id).collect()
}

fn status_response(status: CaStatus) -> wire::StatusResponse {
    let unsigned = unsigned(&status);
    let state = &status.ca;
    let missing = status.operators_missing.len() as u64;
    wire::StatusResponse {
        generation: state.generation,
        step: state.step,
        phase: state.phase().as_str().to_owned(),
        phase_since_ms: state.phase_since,
        begun_by: state.begun_by.clone(),
        nodes: state.devices,
        nodes_acknowledged: state.devices_acked,
        operators: status.operators,
        operators_acknowledged: status.operators.saturating_sub(missing),
        roots: status.roots.into_iter().map(root_info).collect(),
        authorities: status.authorities.into_iter().map(authority_info).collect(),
        replicas: status
            .replicas
            .into_iter()
            .map(|one| wire::ReplicaTrust {
                ready: one.step >= state.step && !unsigned.contains(&one.id),
                replica_id: one.id,
                name: one.name,
                step: one.step,
            })
            .collect(),
        operators_missing: status.operators_missing,
        nodes_missing: status
            .nodes_missing
            .into_iter()
            .map(|one| wire::MissingNode {
                device_id: one.device_id.to_string(),
                name: one.name,
                online: one.online,
                generation: one.generation,
            })
            .collect(),
        warnings: status.warnings,
        read: convert::read_info(status.read),
    }
}

fn root_info(root: RootView) -> wire::RootInfo {
    wire::RootInfo {
        number: root.record.number,
        fingerprint: root.record.fingerprint().to_string(),
        status: root.status.to_owned(),
        not_after_ms: root.not_after_ms,
        added_at_ms: root.record.added_at,
        added_by: root.record.added_by,
        retired_at_ms: root.record.retired_at,
        key_held: !root.record.key_sealed.is_empty(),
        certificate: root.record.der,
    }
}

fn authority_info(one: AuthorityView) -> wire::AuthorityInfo {
    let crl = one.crl.unwrap_or_default();
    wire::AuthorityInfo {
        replica_id: one.record.replica_id,
        replica: one.replica,
        number: one.record.number,
        status: one.record.status().as_str().to_owned(),
        fingerprint: one.fingerprint.to_string(),
        roots: one.record.certificates.iter().map(|one| one.root).collect(),
        not_after_ms: one.not_after_ms,
        since_ms: one.record.since,
        live_certificates: one.live,
        last_not_after_ms: one.record.last_not_after,
        rotation_asked: one.record.rotation_asked_at != 0,
        crl_number: crl.crl_number,
        crl_entries: crl.entries,
        crl_next_update_ms: crl.next_update,
    }
}
