//! `FleetService`: what operators see of nodes and devices, and the end of a device: revoked, removed, purged.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::time::Duration;

use futures::{Stream, stream};
use palyra_control::LastSeen;
use palyra_control::NodeView;
use palyra_control::{DeviceView, Enforcement, Progress, Remove, Stand};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::fleet_service_server::FleetService;
use palyra_state::access::Role;
use palyra_state::dispatch;
use palyra_state::identity::{Certificate, CloneSuspicion, Rotation};
use palyra_state::nodes::{Capability, Condition};
use tonic::{Request, Response, Status};

use super::{Gateway, convert};

#[tonic::async_trait]
impl FleetService for Gateway {
    async fn list_nodes(
        &self,
        request: Request<wire::ListNodesRequest>,
    ) -> Result<Response<wire::ListNodesResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let list = request.into_inner();
        let (read, page) = (convert::read_options(list.read), list.page.unwrap_or_default());
        let labels: BTreeMap<String, String> = list.labels.into_iter().collect();
        let page = self
            .control
            .list_nodes(read, &list.status, &labels, &page.after, page.limit)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ListNodesResponse {
            nodes: page.items.into_iter().map(node_info).collect(),
            page: convert::page_info(page.next),
            read: convert::read_info(page.read),
        }))
    }

    async fn get_node(
        &self,
        request: Request<wire::GetNodeRequest>,
    ) -> Result<Response<wire::GetNodeResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let get = request.into_inner();
        let read = convert::read_options(get.read);
        let (node, read) = self
            .control
            .get_node(read, &get.device_id)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetNodeResponse {
            node: Some(node_info(node)),
            read: convert::read_info(read),
        }))
    }

    async fn list_devices(
        &self,
        request: Request<wire::ListDevicesRequest>,
    ) -> Result<Response<wire::ListDevicesResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let list = request.into_inner();
        let (read, page) = (convert::read_options(list.read), list.page.unwrap_or_default());
        let page = self
            .control
            .list_devices(read, &list.status, &page.after, page.limit)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ListDevicesResponse {
            devices: page.items.into_iter().map(device_info).collect(),
            page: convert::page_info(page.next),
            read: convert::read_info(page.read),
        }))
    }

    async fn get_device(
        &self,
        request: Request<wire::GetDeviceRequest>,
    ) -> Result<Response<wire::GetDeviceResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let get = request.into_inner();
        let read = convert::read_options(get.read);
        let (device, read) = self
            .control
            .get_device(read, &get.device_id)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetDeviceResponse {
            device: Some(device_info(device)),
            read: convert::read_info(read),
        }))
    }

    async fn revoke_device(
        &self,
        request: Request<wire::RevokeDeviceRequest>,
    ) -> Result<Response<wire::RevokeDeviceResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let revoke = request.into_inner();
        let revoked = self
            .control
            .revoke_device(
                &caller,
                &revoke.request_id,
                &revoke.device_id,
                &revoke.reason,
                revoke.wait_ms.into(),
            )
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RevokeDeviceResponse {
            enforced: revoked.enforced,
            pending: revoked.pending,
            write: convert::write_info(revoked.write),
            index: revoked.index,
            device_id: revoked.device_id.to_string(),
        }))
    }

    type WatchRevocationStream =
        Pin<Box<dyn Stream<Item = Result<wire::WatchRevocationResponse, Status>> + Send>>;

    async fn watch_revocation(
        &self,
        request: Request<wire::WatchRevocationRequest>,
    ) -> Result<Response<Self::WatchRevocationStream>, Status> {
        self.operator(&request, Role::Viewer)?;
        let ask = request.into_inner();
        let revocation = self
            .control
            .watch_revocation(&ask.device_id, ask.wait_ms.into())
            .await
            .map_err(|error| self.fail(error))?;
        let served_by = self.control.replica_id();
        let told = stream::unfold(revocation, move |mut revocation| async move {
            let progress = revocation.next().await?;
            Some((Ok(revocation_info(progress, served_by)), revocation))
        });
        Ok(Response::new(Box::pin(told)))
    }

    async fn remove_device(
        &self,
        request: Request<wire::RemoveDeviceRequest>,
    ) -> Result<Response<wire::RemoveDeviceResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let ask = request.into_inner();
        let remove = Remove {
            reason: &ask.reason,
            revoke: ask.revoke,
            wait_ms: ask.wait_ms.into(),
        };
        let removed = self
            .control
            .remove_device(&caller, &ask.request_id, &ask.device_id, remove)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RemoveDeviceResponse {
            enforced: removed.enforced,
            pending: removed.pending,
            write: convert::write_info(removed.write),
            index: removed.index,
            device_id: removed.device_id.to_string(),
        }))
    }

    async fn purge_device(
        &self,
        request: Request<wire::PurgeDeviceRequest>,
    ) -> Result<Response<wire::PurgeDeviceResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let ask = request.into_inner();
        let (device_id, write) = self
            .control
            .purge_device(&caller, &ask.request_id, &ask.device_id, &ask.reason, ask.force)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::PurgeDeviceResponse {
            device_id: device_id.to_string(),
            write: convert::write_info(write),
        }))
    }

    async fn rotate_device(
        &self,
        request: Request<wire::RotateDeviceRequest>,
    ) -> Result<Response<wire::RotateDeviceResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let rotate = request.into_inner();
        let rotated = self
            .control
            .rotate_device(
                &caller,
                &rotate.request_id,
                &rotate.device_id,
                (&rotate.reason, rotate.deadline_ms),
                rotate.wait_ms.into(),
            )
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RotateDeviceResponse {
            device: Some(device_info(rotated.device)),
            already: rotated.already,
            write: convert::write_info(rotated.write),
        }))
    }

    async fn clear_clone(
        &self,
        request: Request<wire::ClearCloneRequest>,
    ) -> Result<Response<wire::ClearCloneResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let clear = request.into_inner();
        let write = self
            .control
            .clear_clone(&caller, &clear.request_id, &clear.device_id, &clear.reason)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ClearCloneResponse {
            write: convert::write_info(write),
        }))
    }

    async fn get_certificate_policy(
        &self,
        request: Request<wire::GetCertificatePolicyRequest>,
    ) -> Result<Response<wire::GetCertificatePolicyResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let read = convert::read_options(request.into_inner().read);
        let (policy, read) = self
            .control
            .certificate_policy(read)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetCertificatePolicyResponse {
            policy: Some(wire::CertificatePolicy {
                recovery_ms: policy.recovery_ms,
                set_at_ms: policy.set_at,
                set_by: policy.set_by,
            }),
            read: convert::read_info(read),
        }))
    }

    async fn set_certificate_policy(
        &self,
        request: Request<wire::SetCertificatePolicyRequest>,
    ) -> Result<Response<wire::SetCertificatePolicyResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let set = request.into_inner();
        let write = self
            .control
            .set_certificate_policy(&caller, &set.request_id, set.recovery_ms)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::SetCertificatePolicyResponse {
            write: convert::write_info(write),
        }))
    }
}

fn capability_info(capability: Capability) -> wire::Capability {
    wire::Capability {
        effect: capability.effect().as_str().to_owned(),
        timeout_ms: capability.timeout_ms,
        max_concurrency: capability.max_concurrency,
        local_mediation: capability.local_mediation,
        name: capability.name,
        description: capability.description,
        queue_limit: capability.queue_limit,
        max_attempts: capability.max_attempts,
        backoff_ms: capability.backoff_ms,
        retry_on: capability.retry_on,
    }
}

fn node_info(node: NodeView) -> wire::NodeInfo {
    let NodeView {
        record,
        name,
        open_dispatches,
        bound_dispatches,
        last_seen,
    } = node;
    let seen = seen_info(last_seen);
    let (slots, places) = (dispatch::device_slots(&record), dispatch::device_queue(&record));
    let status = record.status().as_str().to_owned();
    let session = record.session.clone();
    wire::NodeInfo {
        device_id: record.device_id.to_string(),
        name,
        status,
        status_since_ms: record.status_since,
        status_reason: record.status_reason,
        platform: record.platform,
        agent_version: record.agent_version,
        capabilities: record.capabilities.into_iter().map(capability_info).collect(),
        labels: record.labels.into_iter().collect(),
        session_epoch: session.as_ref().map_or(0, |session| session.epoch),
        session_replica: session.as_ref().map_or(0, |session| session.replica_id),
        registered_at_ms: record.registered_at,
        generation: record.generation,
        open_dispatches: open_dispatches.into(),
        transport_fallback: session
            .as_ref()
            .map(|session| session.fallback.clone())
            .unwrap_or_default(),
        transport: session.map(|session| session.transport).unwrap_or_default(),
        conditions: record.conditions.into_iter().map(condition_info).collect(),
        lost_after_ms: record.lost_after,
        due_at_ms: record.due_at,
        max_concurrency: slots,
        queue_limit: places,
        bound_dispatches: bound_dispatches.into(),
        waiting_dispatches: (open_dispatches - bound_dispatches).into(),
        ..seen
    }
}

/// The part of a node that says when it was last heard.
fn seen_info(seen: LastSeen) -> wire::NodeInfo {
    let mut info = wire::NodeInfo::default();
    info.last_seen_source = match seen {
        LastSeen::Never => "never",
        LastSeen::Live { age, replica } => {
            info.last_seen_known = true;
            info.last_seen_age_ms = convert::millis(age);
            info.last_seen_replica = replica;
            "live"
        }
        LastSeen::Recorded { at_ms } => {
            info.last_seen_known = true;
            info.last_seen_age_ms = palyra_platform::wall_ms().saturating_sub(at_ms);
            info.last_seen_at_ms = at_ms;
            "record"
        }
        LastSeen::Unknown { replica, silent_for } => {
            info.last_seen_replica = replica;
            info.last_seen_unreachable_ms = silent_for.map_or(0, convert::millis);
            "unknown"
        }
    }
    .to_owned();
    info
}

fn condition_info(condition: Condition) -> wire::Condition {
    wire::Condition {
        r#type: condition.kind().as_str().to_owned(),
        status: condition.truth().as_str().to_owned(),
        since_ms: condition.since,
        reason: condition.reason,
        message: condition.message,
    }
}

fn revocation_info(progress: Progress, served_by: u64) -> wire::WatchRevocationResponse {
    let replica = |replica: Enforcement| {
        let (state, reason, lapses_in) = match replica.stand {
            Stand::Closed => ("closed", String::new(), Duration::ZERO),
            Stand::Lapsed => ("lapsed", String::new(), Duration::ZERO),
            Stand::Pending { reason } => ("pending", reason, replica.lapses_in),
        };
        wire::ReplicaEnforcement {
            replica_id: replica.replica_id,
            name: replica.name,
            state: state.to_owned(),
            reason,
            lapses_in_ms: u64::try_from(lapses_in.as_millis()).unwrap_or(u64::MAX),
        }
    };
    wire::WatchRevocationResponse {
        device_id: progress.device_id.to_string(),
        index: progress.index,
        replicas: progress.replicas.into_iter().map(replica).collect(),
        complete: progress.complete,
        served_by,
    }
}

pub(super) fn device_info(device: DeviceView) -> wire::DeviceInfo {
    let DeviceView {
        record,
        certificates,
        ban,
    } = device;
    let status = match &ban {
        Some(_) => "removed",
        None => record.status().as_str(),
    };
    let ban = ban.unwrap_or_default();
    wire::DeviceInfo {
        id: record.id.to_string(),
        status: status.to_owned(),
        removed_at_ms: ban.removed_at,
        removed_by: ban.removed_by,
        purgeable_at_ms: ban.expires_at,
        name: record.name,
        paired_at_ms: record.paired_at,
        paired_by: record.paired_by,
        revoked_at_ms: record.revoked_at,
        revoked_by: record.revoked_by,
        reason: record.reason,
        certificates: certificates.into_iter().map(certificate_info).collect(),
        counter: record.counter,
        counter_source: record.counter_source,
        counter_at_ms: record.counter_at,
        suspicion: record.suspicion.map(suspicion_info),
        rotation: record.rotation.map(rotation_info),
        recovered_at_ms: record.recovered_at,
    }
}

fn suspicion_info(suspicion: CloneSuspicion) -> wire::CloneSuspicion {
    wire::CloneSuspicion {
        since_ms: suspicion.since,
        taken_from: suspicion.taken_from,
        refused_from: suspicion.refused_from,
        shown_counter: suspicion.shown_counter,
        counter: suspicion.counter,
        how: suspicion.how,
    }
}

fn rotation_info(rotation: Rotation) -> wire::Rotation {
    wire::Rotation {
        state: rotation.state(palyra_platform::wall_ms()).as_str().to_owned(),
        requested_at_ms: rotation.requested_at,
        requested_by: rotation.requested_by,
        reason: rotation.reason,
        deadline_at_ms: rotation.deadline_at,
        fetched_at_ms: rotation.fetched_at,
        used_at_ms: rotation.used_at,
        index: rotation.index,
    }
}

fn certificate_info(certificate: Certificate) -> wire::CertificateInfo {
    wire::CertificateInfo {
        fingerprint: certificate.fingerprint.to_string(),
        serial: certificate
            .serial
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
        status: convert::certificate_status(&certificate).to_owned(),
        not_before_ms: certificate.not_before,
        not_after_ms: certificate.not_after,
        authority: certificate.authority,
        issued_at_ms: certificate.issued_at,
        used_at_ms: certificate.used_at,
        superseded_at_ms: certificate.superseded_at,
        counter: certificate.counter,
    }
}
