//! `RunService` and `LeaseService`: operators have workers run things.

use std::pin::Pin;

use futures::{Stream, stream};
use palyra_control::{LeaseFilter, LeaseView, Line, Put, RunFilter, RunView, Start};
use palyra_proto::dispatch::v1 as dispatch;
use palyra_proto::run::v1 as wire;
use palyra_proto::run::v1::lease_service_server::LeaseService;
use palyra_proto::run::v1::run_service_server::RunService;
use palyra_state::access::Role;
use palyra_state::leases::{Attempt, Cleanup, Limits, Scope};
use tonic::{Request, Response, Status};

use super::{Gateway, convert};
use crate::convert::run::{limits, manifest, manifest_wire, scope};

#[tonic::async_trait]
impl RunService for Gateway {
    async fn start(
        &self,
        request: Request<wire::StartRequest>,
    ) -> Result<Response<wire::StartResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let ask = request.into_inner();
        let inputs = ask.inputs.map(manifest).transpose();
        let start = Start {
            request_id: ask.request_id,
            run_id: ask.run_id,
            tool: ask.tool,
            params: ask.params,
            inputs: inputs.map_err(|error| self.fail(error))?,
            scope: ask.scope.map(|scope| Scope {
                root: scope.root,
                allowed: scope.allowed,
                read_only: scope.read_only,
            }),
            limits: ask.limits.map(|limits| Limits {
                memory_bytes: limits.memory_bytes,
                processes: limits.processes,
                disk_bytes: limits.disk_bytes,
                cpu_percent: limits.cpu_percent,
                open_files: limits.open_files,
                network: limits.network,
            }),
            effect: ask.effect,
            max_attempts: ask.max_attempts,
            ttl_ms: ask.ttl_ms,
            timeout_ms: ask.timeout_ms,
            min_evidence: ask.min_evidence,
            labels: ask.labels.into_iter().collect(),
        };
        let started = self.control.start_run(&caller, start).await;
        let (run, write) = started.map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::StartResponse {
            run: Some(run_info(run)),
            write: convert::write_info(write),
        }))
    }

    async fn put_artifact(
        &self,
        request: Request<wire::PutArtifactRequest>,
    ) -> Result<Response<wire::PutArtifactResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let ask = request.into_inner();
        let put = Put {
            request_id: ask.request_id,
            run_id: ask.run_id,
            digest: ask.digest,
            size: ask.size,
            offset: ask.offset,
            chunk: ask.chunk,
        };
        let taken = self.control.put_artifact(&caller, put).await;
        let taken = taken.map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::PutArtifactResponse {
            received: taken.received,
            complete: taken.complete,
            run: Some(run_info(short(taken.run))),
            write: convert::write_info(taken.write),
        }))
    }

    type GetArtifactStream = Pin<Box<dyn Stream<Item = Result<wire::GetArtifactResponse, Status>> + Send>>;

    async fn get_artifact(
        &self,
        request: Request<wire::GetArtifactRequest>,
    ) -> Result<Response<Self::GetArtifactStream>, Status> {
        self.operator(&request, Role::Viewer)?;
        let ask = request.into_inner();
        let read = convert::read_options(ask.read);
        let found = self.control.find_artifact(read, &ask.run_id, &ask.digest).await;
        let (run, digest, size) = found.map_err(|error| self.fail(error))?;
        let gateway = self.clone();
        // One piece at a time, read when the one before was taken.
        let pieces = stream::unfold(Some(0), move |next| {
            let gateway = gateway.clone();
            async move {
                let offset = next?;
                match gateway.control.read_artifact(run, digest, offset) {
                    Ok(piece) => {
                        let end = offset + piece.chunk.len() as u64;
                        let more = end < size && !piece.chunk.is_empty();
                        let piece = wire::GetArtifactResponse {
                            size: piece.size,
                            offset: piece.offset,
                            chunk: piece.chunk,
                        };
                        Some((Ok(piece), more.then_some(end)))
                    }
                    Err(error) => Some((Err(gateway.fail(error)), None)),
                }
            }
        });
        Ok(Response::new(Box::pin(pieces)))
    }

    async fn list(
        &self,
        request: Request<wire::ListRunsRequest>,
    ) -> Result<Response<wire::ListRunsResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let list = request.into_inner();
        let (read, page) = (convert::read_options(list.read), list.page.unwrap_or_default());
        let filter = RunFilter {
            state: list.state,
            worker: list.worker_id,
            after: page.after,
            limit: page.limit,
        };
        let page = self.control.list_runs(read, &filter).await;
        let page = page.map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ListRunsResponse {
            runs: page.items.into_iter().map(run_info).collect(),
            page: convert::page_info(page.next),
            read: convert::read_info(page.read),
        }))
    }

    async fn get(
        &self,
        request: Request<wire::GetRunRequest>,
    ) -> Result<Response<wire::GetRunResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let get = request.into_inner();
        let read = convert::read_options(get.read);
        let found = self.control.get_run(read, &get.id).await;
        let (run, read) = found.map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetRunResponse {
            run: Some(run_info(run)),
            read: convert::read_info(read),
        }))
    }

    async fn wait(
        &self,
        request: Request<wire::WaitRunRequest>,
    ) -> Result<Response<wire::GetRunResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let wait = request.into_inner();
        let seen = self
            .control
            .wait_run(&wait.id, wait.wait_ms.into(), &wait.known_state)
            .await;
        let (run, read) = seen.map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetRunResponse {
            run: Some(run_info(run)),
            read: convert::read_info(read),
        }))
    }

    async fn cancel(
        &self,
        request: Request<wire::CancelRunRequest>,
    ) -> Result<Response<wire::StartResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let cancel = request.into_inner();
        let cancelled = self
            .control
            .cancel_run(&caller, &cancel.request_id, &cancel.id, &cancel.reason)
            .await;
        let (run, write) = cancelled.map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::StartResponse {
            run: Some(run_info(run)),
            write: convert::write_info(write),
        }))
    }

    async fn logs(
        &self,
        request: Request<wire::RunLogsRequest>,
    ) -> Result<Response<wire::RunLogsResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let ask = request.into_inner();
        let logs = self
            .control
            .run_logs(&ask.id, (ask.attempt, ask.line), ask.wait_ms.into())
            .await;
        let logs = logs.map_err(|error| self.fail(error))?;
        let line = |line: Line| dispatch::LogLine {
            attempt: line.attempt,
            line: line.line,
            text: line.text,
        };
        let run = RunView {
            params: bytes::Bytes::new(),
            ..logs.run
        };
        Ok(Response::new(wire::RunLogsResponse {
            run: Some(run_info(run)),
            lines: logs.lines.into_iter().map(line).collect(),
            progress: logs.progress.map(|progress| dispatch::ProgressInfo {
                attempt: progress.attempt,
                percent: progress.percent,
                message: progress.message,
                age_ms: progress.age_ms,
            }),
            replica_id: logs.replica_id,
        }))
    }
}

#[tonic::async_trait]
impl LeaseService for Gateway {
    async fn list_leases(
        &self,
        request: Request<wire::ListLeasesRequest>,
    ) -> Result<Response<wire::ListLeasesResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let list = request.into_inner();
        let (read, page) = (convert::read_options(list.read), list.page.unwrap_or_default());
        let filter = LeaseFilter {
            worker: list.worker_id,
            state: list.state,
            after: page.after,
            limit: page.limit,
        };
        let page = self.control.list_leases(read, &filter).await;
        let page = page.map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ListLeasesResponse {
            leases: page.items.into_iter().map(lease_info).collect(),
            page: convert::page_info(page.next),
            read: convert::read_info(page.read),
        }))
    }

    async fn get_lease(
        &self,
        request: Request<wire::GetLeaseRequest>,
    ) -> Result<Response<wire::GetLeaseResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let get = request.into_inner();
        let read = convert::read_options(get.read);
        let found = self.control.get_lease(read, &get.id).await;
        let (lease, read) = found.map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetLeaseResponse {
            lease: Some(lease_info(lease)),
            read: convert::read_info(read),
        }))
    }

    async fn revoke_lease(
        &self,
        request: Request<wire::RevokeLeaseRequest>,
    ) -> Result<Response<wire::RevokeLeaseResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let revoke = request.into_inner();
        let revoked = self
            .control
            .revoke_lease(&caller, &revoke.request_id, &revoke.id, &revoke.reason)
            .await;
        let (lease, write) = revoked.map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RevokeLeaseResponse {
            lease: Some(lease_info(lease)),
            write: convert::write_info(write),
        }))
    }
}

/// A run without what may be large.
fn short(run: RunView) -> RunView {
    RunView {
        params: bytes::Bytes::new(),
        result: bytes::Bytes::new(),
        log_tail: bytes::Bytes::new(),
        ..run
    }
}

fn run_info(seen: RunView) -> wire::RunInfo {
    let run = seen.record;
    let (state, effect) = (run.state().as_str().to_owned(), run.effect().as_str().to_owned());
    let min_evidence = run.min_evidence().as_str().to_owned();
    let failure = run.error.clone().unwrap_or_default();
    let id = |id: Option<palyra_state::Id>| id.map(|id| id.to_string()).unwrap_or_default();
    wire::RunInfo {
        id: run.id.to_string(),
        tool: run.tool,
        grant_id: run.grant_id.to_string(),
        state,
        requested_by: run.requested_by,
        effect,
        attempt: run.attempt,
        max_attempts: run.max_attempts,
        submitted_at_ms: run.submitted_at,
        deadline_at_ms: run.deadline_at,
        ended_at_ms: run.ended_at,
        ttl_ms: run.ttl,
        lease_id: id(run.lease_id),
        worker_id: id(run.worker_id),
        worker_name: seen.worker_name,
        fence: run.fence,
        params: seen.params,
        inputs: run.inputs.map(manifest_wire),
        outputs: run.outputs.map(manifest_wire),
        scope: run.scope.map(scope),
        limits: run.limits.map(limits),
        result: seen.result,
        has_exit_code: run.exit_code.is_some(),
        exit_code: run.exit_code.unwrap_or_default(),
        error_code: failure.code,
        error_message: failure.message,
        log_tail: seen.log_tail,
        attempts: run.attempts.into_iter().map(attempt_info).collect(),
        missing: seen.missing.iter().map(ToString::to_string).collect(),
        waits_for: seen.waits_for,
        min_evidence,
        labels: run.labels.into_iter().collect(),
        usage: run.usage.into_iter().collect(),
        sandbox: run.sandbox,
        fence_past_at_ms: seen.fence_past_at,
        reason: run.reason,
    }
}

fn attempt_info(attempt: Attempt) -> wire::RunAttempt {
    wire::RunAttempt {
        number: attempt.number,
        lease_id: attempt.lease_id.to_string(),
        worker_id: attempt.worker_id.to_string(),
        fence: attempt.fence,
        leased_at_ms: attempt.leased_at,
        ended_at_ms: attempt.ended_at,
        why: attempt.why,
    }
}

/// A lease as operators see it.
pub(super) fn lease_info(seen: LeaseView) -> wire::LeaseInfo {
    let lease = seen.record;
    wire::LeaseInfo {
        id: lease.id.to_string(),
        run_id: lease.run_id.to_string(),
        attempt: lease.attempt,
        worker_id: lease.worker_id.to_string(),
        worker_name: seen.worker_name,
        slot: lease.slot,
        fence: lease.fence,
        state: lease.state().as_str().to_owned(),
        granted_at_ms: lease.granted_at,
        deadline_at_ms: lease.deadline_at,
        ttl_ms: lease.ttl,
        renewals: lease.renewals,
        renewed_at_ms: lease.renewed_at,
        ended_at_ms: lease.ended_at,
        end_reason: lease.end_reason().as_str().to_owned(),
        epoch: lease.epoch,
        scope: seen.scope.map(scope),
        tool: lease.tool,
        ended_by: lease.ended_by,
        cleanup: lease.cleanup.map(cleanup_info),
    }
}

fn cleanup_info(cleanup: Cleanup) -> wire::CleanupInfo {
    wire::CleanupInfo {
        at_ms: cleanup.at,
        ok: cleanup.ok,
        message: cleanup.message,
        removed_files: cleanup.removed_files,
        removed_bytes: cleanup.removed_bytes,
        by: cleanup.by,
    }
}
