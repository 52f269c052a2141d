//! `WorkerService`: the fleet of workers, as operators see it and decide about it.

use std::time::Duration;

use palyra_control::{Error, PolicyChange, SetPolicy, WorkerAct, WorkerView};
use palyra_proto::worker::v1 as wire;
use palyra_proto::worker::v1::worker_service_server::WorkerService;
use palyra_state::Digest;
use palyra_state::access::Role;
use palyra_state::fleet::{
    Attested, Evidence, Hold, Policy, Refusal, Statement, TrustedCapability, TrustedKey,
};
use palyra_state::leases::RunState;
use prost::Message as _;
use tonic::{Request, Response, Status};

use super::runs::lease_info;
use super::{Gateway, convert};

#[tonic::async_trait]
impl WorkerService for Gateway {
    async fn list_workers(
        &self,
        request: Request<wire::ListWorkersRequest>,
    ) -> Result<Response<wire::ListWorkersResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let list = request.into_inner();
        let (read, page) = (convert::read_options(list.read), list.page.unwrap_or_default());
        let page = self
            .control
            .list_workers(read, &list.lifecycle, &page.after, page.limit)
            .await;
        let page = page.map_err(|error| self.fail(error))?;
        let bare = |worker| worker_info(worker, false);
        Ok(Response::new(wire::ListWorkersResponse {
            workers: page.items.into_iter().map(bare).collect(),
            page: convert::page_info(page.next),
            read: convert::read_info(page.read),
        }))
    }

    async fn get_worker(
        &self,
        request: Request<wire::GetWorkerRequest>,
    ) -> Result<Response<wire::GetWorkerResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let get = request.into_inner();
        let read = convert::read_options(get.read);
        let found = self.control.get_worker(read, &get.id).await;
        let (worker, read) = found.map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetWorkerResponse {
            worker: Some(worker_info(worker, true)),
            read: convert::read_info(read),
        }))
    }

    async fn get_fleet(
        &self,
        request: Request<wire::GetFleetRequest>,
    ) -> Result<Response<wire::GetFleetResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let read = convert::read_options(request.into_inner().read);
        let found = self.control.fleet(read).await;
        let (fleet, read) = found.map_err(|error| self.fail(error))?;
        let (workers, leases) = (fleet.workers, fleet.leases);
        let by_state = RunState::ALL.iter().zip(&leases.runs);
        Ok(Response::new(wire::GetFleetResponse {
            workers: workers
                .workers
                .iter()
                .map(|(state, count)| (state.as_str().to_owned(), *count))
                .collect(),
            slots: workers.slots,
            slots_used: workers.slots_used,
            leases: leases.live,
            runs: by_state
                .map(|(state, count)| (state.as_str().to_owned(), *count))
                .collect(),
            policy_version: workers.policy_version,
            artifact_bytes: leases.artifact_bytes,
            read: convert::read_info(read),
        }))
    }

    async fn get_policy(
        &self,
        request: Request<wire::GetPolicyRequest>,
    ) -> Result<Response<wire::GetPolicyResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let read = convert::read_options(request.into_inner().read);
        let found = self.control.fleet_policy(read).await;
        let (policy, read) = found.map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetPolicyResponse {
            policy: Some(policy_info(policy)),
            read: convert::read_info(read),
        }))
    }

    async fn set_policy(
        &self,
        request: Request<wire::SetPolicyRequest>,
    ) -> Result<Response<wire::SetPolicyResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let ask = request.into_inner();
        let policy = policy_of(ask.policy.unwrap_or_default());
        let set = SetPolicy {
            request_id: ask.request_id,
            policy: policy.map_err(|error| self.fail(error))?,
            expected_version: ask.expected_version,
            reason: ask.reason,
            dry_run: ask.dry_run,
        };
        let set = self.control.set_fleet_policy(&caller, set).await;
        let set = set.map_err(|error| self.fail(error))?;
        let change = |change: PolicyChange| wire::PolicyChange {
            field: change.field,
            before: change.before,
            after: change.after,
        };
        Ok(Response::new(wire::SetPolicyResponse {
            policy: Some(policy_info(set.policy)),
            changes: set.changes.into_iter().map(change).collect(),
            affected: set.affected,
            write: set.write.and_then(convert::write_info),
        }))
    }

    async fn quarantine(
        &self,
        request: Request<wire::WorkerRequest>,
    ) -> Result<Response<wire::WorkerResponse>, Status> {
        self.decide(request, |_| WorkerAct::Quarantine).await
    }

    async fn reverify(
        &self,
        request: Request<wire::WorkerRequest>,
    ) -> Result<Response<wire::WorkerResponse>, Status> {
        self.decide(request, |_| WorkerAct::Reverify).await
    }

    async fn release(
        &self,
        request: Request<wire::WorkerRequest>,
    ) -> Result<Response<wire::WorkerResponse>, Status> {
        self.decide(request, |_| WorkerAct::Release).await
    }

    async fn drain(
        &self,
        request: Request<wire::DrainRequest>,
    ) -> Result<Response<wire::WorkerResponse>, Status> {
        let act = WorkerAct::Drain {
            deadline: Duration::from_millis(request.get_ref().deadline_ms),
            force: request.get_ref().force,
        };
        let request = request.map(|drain| wire::WorkerRequest {
            request_id: drain.request_id,
            id: drain.id,
            reason: drain.reason,
            force: drain.force,
        });
        self.decide(request, |_| act).await
    }

    async fn cleanup(
        &self,
        request: Request<wire::WorkerRequest>,
    ) -> Result<Response<wire::WorkerResponse>, Status> {
        self.decide(request, |force| WorkerAct::Cleanup { force }).await
    }

    async fn reap(
        &self,
        request: Request<wire::ReapRequest>,
    ) -> Result<Response<wire::ReapResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let ask = request.into_inner();
        let reaped = self
            .control
            .reap_workers(&caller, &ask.request_id, ask.older_than_ms)
            .await;
        let reaped = reaped.map_err(|error| self.fail(error))?;
        let count = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Response::new(wire::ReapResponse {
            leases: count(reaped.leases as u64),
            workers: count(reaped.workers),
            write: convert::write_info(reaped.write),
        }))
    }
}

impl Gateway {
    /// A decision about one worker; `act` is given whether it is forced.
    async fn decide(
        &self,
        request: Request<wire::WorkerRequest>,
        act: impl FnOnce(bool) -> WorkerAct + Send,
    ) -> Result<Response<wire::WorkerResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let ask = request.into_inner();
        let decided = self
            .control
            .decide_worker(&caller, &ask.request_id, &ask.id, &ask.reason, act(ask.force))
            .await;
        let (worker, write) = decided.map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::WorkerResponse {
            worker: Some(worker_info(worker, true)),
            write: convert::write_info(write),
        }))
    }
}

/// A worker; `whole` with its statement as it was signed.
fn worker_info(seen: WorkerView, whole: bool) -> wire::WorkerInfo {
    let worker = seen.record;
    let lifecycle = worker.lifecycle().as_str().to_owned();
    let good = worker
        .attested
        .as_ref()
        .filter(|attested| attested.policy_version != 0);
    let (slots, evidence) = good.map_or((0, ""), |attested| (attested.slots, attested.evidence().as_str()));
    let evidence = evidence.to_owned();
    let (session_epoch, session_replica) = seen.session;
    wire::WorkerInfo {
        id: worker.id.to_string(),
        name: seen.name,
        lifecycle,
        lifecycle_since_ms: worker.lifecycle_since,
        lifecycle_reason: worker.lifecycle_reason,
        lifecycle_actor: worker.lifecycle_actor,
        registered_at_ms: worker.registered_at,
        slots,
        slots_used: worker.slots_used,
        evidence,
        attestation: worker.attested.map(|attested| attestation_info(attested, whole)),
        quarantine: worker.quarantine.map(hold_info),
        drain: worker.drain.map(hold_info),
        failure: worker.failure.map(hold_info),
        session_epoch,
        session_replica,
        reconciled: session_epoch != 0 && worker.reconciled_epoch == session_epoch,
        unclean: worker.unclean.iter().map(ToString::to_string).collect(),
        leases: seen.leases.into_iter().map(lease_info).collect(),
        due_at_ms: worker.due_at,
        reverify_asked: worker.reverify_at != 0,
        refusal: worker.refusal.map(refusal_info),
    }
}

fn attestation_info(attested: Attested, whole: bool) -> wire::AttestationInfo {
    // It was decoded when it was accepted.
    let statement = Statement::decode(attested.statement.clone()).unwrap_or_default();
    let hex = |bytes: &[u8]| Digest::from_slice(bytes).map_or_else(String::new, |digest| digest.to_string());
    let kept = |bytes: bytes::Bytes| if whole { bytes } else { bytes::Bytes::new() };
    let capability = |claimed: palyra_state::fleet::ClaimedCapability| wire::ClaimedCapability {
        name: claimed.name,
        authority: claimed.authority,
    };
    wire::AttestationInfo {
        image: hex(&statement.image),
        build: hex(&statement.build),
        artifact: hex(&statement.artifact),
        supervisor: hex(&statement.supervisor),
        egress_proxy: statement.egress.map(|binding| binding.proxy).unwrap_or_default(),
        capabilities: statement.capabilities.into_iter().map(capability).collect(),
        sdk_protocol: statement.sdk_protocol,
        wit_abi: statement.wit_abi,
        issued_at_ms: statement.issued_at,
        expires_at_ms: attested.expires_at,
        accepted_at_ms: attested.accepted_at,
        policy_version: attested.policy_version,
        evidence: attested.evidence().as_str().to_owned(),
        hardware_provider: statement.quote.map(|quote| quote.provider).unwrap_or_default(),
        index: attested.index,
        statement: kept(attested.statement),
        public_key: kept(attested.public_key),
        signature: kept(attested.signature),
    }
}

fn hold_info(hold: Hold) -> wire::HoldInfo {
    wire::HoldInfo {
        at_ms: hold.at,
        by: hold.by,
        cause: hold.cause,
        reason: hold.reason,
        until_ms: hold.until,
        subject: hold.lease_id.map(|id| id.to_string()).unwrap_or_default(),
        forced: hold.forced,
    }
}

fn refusal_info(refusal: Refusal) -> wire::RefusalInfo {
    let severity = refusal.severity().as_str().to_owned();
    let reject = refusal.reject;
    wire::RefusalInfo {
        at_ms: refusal.at,
        code: reject.as_ref().map(|reject| reject.code()).unwrap_or_default(),
        message: reject.map(|reject| reject.message()).unwrap_or_default(),
        severity,
    }
}

fn policy_info(policy: Policy) -> wire::FleetPolicy {
    let hex = |digests: &[Digest]| digests.iter().map(ToString::to_string).collect();
    let keys = |keys: Vec<TrustedKey>| {
        let key = |key: TrustedKey| wire::TrustedKey {
            name: key.name,
            public_key: key.public_key,
        };
        keys.into_iter().map(key).collect()
    };
    let capability = |trusted: TrustedCapability| wire::TrustedCapability {
        min_evidence: trusted.min_evidence().as_str().to_owned(),
        name: trusted.name,
        authorities: trusted.authorities,
    };
    wire::FleetPolicy {
        version: policy.version,
        set_at_ms: policy.set_at,
        set_by: policy.set_by,
        images: hex(&policy.images),
        builds: hex(&policy.builds),
        artifacts: hex(&policy.artifacts),
        supervisors: hex(&policy.supervisors),
        required_egress: policy.required_egress,
        egress_proxies: keys(policy.egress_proxies),
        sdk_protocol_min: policy.sdk_protocol_min,
        sdk_protocol_max: policy.sdk_protocol_max,
        wit_abis: policy.wit_abis,
        capabilities: policy.capabilities.into_iter().map(capability).collect(),
        max_lease_ttl_ms: policy.max_lease_ttl,
        heartbeat_timeout_ms: policy.heartbeat_timeout,
        max_workers: policy.max_workers,
        leases_per_worker: policy.leases_per_worker,
        hardware_providers: keys(policy.hardware_providers),
        max_attestation_life_ms: policy.max_attestation_life,
    }
}

fn policy_of(policy: wire::FleetPolicy) -> Result<Policy, Error> {
    let digests = |field: &'static str, texts: Vec<String>| -> Result<Vec<Digest>, Error> {
        let digest = |text: String| {
            Digest::parse(&text).ok_or_else(|| {
                let shown: String = text.chars().take(80).collect();
                let cause = format!("{shown:?} is no SHA-256");
                Error::invalid(field, cause, "send 64 hexadecimal digits")
            })
        };
        texts.into_iter().map(digest).collect()
    };
    let keys = |keys: Vec<wire::TrustedKey>| {
        let key = |key: wire::TrustedKey| TrustedKey {
            name: key.name,
            public_key: key.public_key,
        };
        keys.into_iter().map(key).collect()
    };
    let capability = |trusted: wire::TrustedCapability| {
        let evidence = Evidence::parse(&trusted.min_evidence).ok_or_else(|| {
            let shown: String = trusted.min_evidence.chars().take(32).collect();
            Error::invalid(
                "capabilities.min_evidence",
                format!("{shown:?} is no level of evidence"),
                "use self-reported, supervisor or hardware",
            )
        })?;
        Ok(TrustedCapability {
            name: trusted.name,
            authorities: trusted.authorities,
            min_evidence: evidence as i32,
        })
    };
    let capabilities: Result<Vec<TrustedCapability>, Error> =
        policy.capabilities.into_iter().map(capability).collect();
    Ok(Policy {
        images: digests("images", policy.images)?,
        builds: digests("builds", policy.builds)?,
        artifacts: digests("artifacts", policy.artifacts)?,
        supervisors: digests("supervisors", policy.supervisors)?,
        required_egress: policy.required_egress,
        egress_proxies: keys(policy.egress_proxies),
        sdk_protocol_min: policy.sdk_protocol_min,
        sdk_protocol_max: policy.sdk_protocol_max,
        wit_abis: policy.wit_abis,
        capabilities: capabilities?,
        max_lease_ttl: policy.max_lease_ttl_ms,
        heartbeat_timeout: policy.heartbeat_timeout_ms,
        max_workers: policy.max_workers,
        leases_per_worker: policy.leases_per_worker,
        hardware_providers: keys(policy.hardware_providers),
        max_attestation_life: policy.max_attestation_life_ms,
        ..Policy::default()
    })
}
