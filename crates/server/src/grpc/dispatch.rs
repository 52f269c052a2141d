//! `DispatchService`: operators have nodes do things.

use palyra_control::{DispatchFilter, DispatchView, Invoke, Line};
use palyra_proto::dispatch::v1 as wire;
use palyra_proto::dispatch::v1::dispatch_service_server::DispatchService;
use palyra_state::access::Role;
use palyra_state::dispatch::{Attempt, Late, State};
use tonic::{Request, Response, Status};

use super::{Gateway, convert};

#[tonic::async_trait]
impl DispatchService for Gateway {
    async fn invoke(
        &self,
        request: Request<wire::InvokeRequest>,
    ) -> Result<Response<wire::InvokeResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let wire::InvokeRequest {
            request_id,
            device_id,
            capability,
            payload,
            timeout_ms,
            wait_ms,
            priority,
            max_attempts,
        } = request.into_inner();
        let invoke = Invoke {
            request_id,
            device: device_id,
            capability,
            payload,
            timeout_ms,
            priority,
            max_attempts,
        };
        let (mut seen, write) = self
            .control
            .invoke(&caller, invoke)
            .await
            .map_err(|error| self.fail(error))?;
        if wait_ms > 0 && !seen.record.state().is_terminal() {
            let id = seen.record.id;
            match self.control.wait_submitted(id, wait_ms.into()).await {
                Ok((waited, _)) => seen = waited,
                // It is committed: an answer without an end is better than an error that looks like a
                // refusal.
                Err(error) => {
                    tracing::debug!(dispatch = %id, %error, "the wait for a dispatch was cut short")
                }
            }
        }
        Ok(Response::new(wire::InvokeResponse {
            dispatch: Some(info(seen)),
            write: convert::write_info(write),
        }))
    }

    async fn wait(
        &self,
        request: Request<wire::WaitRequest>,
    ) -> Result<Response<wire::WaitResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let wait = request.into_inner();
        let (seen, read) = self
            .control
            .wait_dispatch(&wait.id, wait.wait_ms.into(), &wait.known_state)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::WaitResponse {
            dispatch: Some(info(seen)),
            read: convert::read_info(read),
        }))
    }

    async fn get(&self, request: Request<wire::GetRequest>) -> Result<Response<wire::GetResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let get = request.into_inner();
        let read = convert::read_options(get.read);
        let (seen, read) = self
            .control
            .get_dispatch(read, &get.id)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetResponse {
            dispatch: Some(info(seen)),
            read: convert::read_info(read),
        }))
    }

    async fn list(
        &self,
        request: Request<wire::ListRequest>,
    ) -> Result<Response<wire::ListResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let list = request.into_inner();
        let (read, page) = (convert::read_options(list.read), list.page.unwrap_or_default());
        let filter = DispatchFilter {
            device: list.device_id,
            state: list.state,
            after: page.after,
            limit: page.limit,
        };
        let page = self
            .control
            .list_dispatches(read, &filter)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ListResponse {
            dispatches: page.items.into_iter().map(info).collect(),
            page: convert::page_info(page.next),
            read: convert::read_info(page.read),
        }))
    }

    async fn logs(
        &self,
        request: Request<wire::LogsRequest>,
    ) -> Result<Response<wire::LogsResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let asked = request.into_inner();
        let logs = self
            .control
            .logs(&asked.id, (asked.attempt, asked.line), asked.wait_ms.into())
            .await
            .map_err(|error| self.fail(error))?;
        let dispatch = DispatchView {
            payload: Vec::new().into(),
            ..logs.dispatch
        };
        let line = |line: Line| wire::LogLine {
            attempt: line.attempt,
            line: line.line,
            text: line.text,
        };
        Ok(Response::new(wire::LogsResponse {
            dispatch: Some(info(dispatch)),
            lines: logs.lines.into_iter().map(line).collect(),
            progress: logs.progress.map(|progress| wire::ProgressInfo {
                attempt: progress.attempt,
                percent: progress.percent,
                message: progress.message,
                age_ms: progress.age_ms,
            }),
            replica_id: logs.replica_id,
        }))
    }

    async fn cancel(
        &self,
        request: Request<wire::CancelRequest>,
    ) -> Result<Response<wire::CancelResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let cancel = request.into_inner();
        let (seen, write) = self
            .control
            .cancel_dispatch(&caller, &cancel.request_id, &cancel.id, &cancel.reason)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::CancelResponse {
            dispatch: Some(info(seen)),
            write: convert::write_info(write),
        }))
    }
}

fn info(seen: DispatchView) -> wire::DispatchInfo {
    let mediation = mediation(&seen);
    let DispatchView {
        record,
        payload,
        result,
        log_tail,
        waits_for,
        device_name: _,
    } = seen;
    let failure = record.error.clone().unwrap_or_default();
    // Why it was cancelled stands where a failure would: there is only one place where people look.
    let error_message = if failure.message.is_empty() && record.state() != State::Cancelling {
        record.reason.clone()
    } else {
        failure.message
    };
    let retry = record.retry.clone().unwrap_or_default();
    let cancel = record.cancel.clone().unwrap_or_default();
    wire::DispatchInfo {
        id: record.id.to_string(),
        device_id: record.device_id.to_string(),
        state: record.state().as_str().to_owned(),
        effect: record.effect().as_str().to_owned(),
        epoch: record.epoch,
        attempt: record.attempt,
        submitted_at_ms: record.submitted_at,
        deadline_at_ms: record.deadline_at,
        ended_at_ms: record.ended_at,
        replica_id: record.replica_id,
        priority: record.priority().as_str().to_owned(),
        not_before_ms: record.not_before,
        max_attempts: retry.max_attempts.max(1),
        backoff_ms: retry.backoff_ms,
        retry_on: retry.on,
        mediation,
        cancel_reason: if record.cancel.is_some() {
            record.reason
        } else {
            String::new()
        },
        cancel_asked_at_ms: cancel.at,
        cancel_asked_by: cancel.by,
        assigned_at_ms: record.assigned_at,
        attempts: record.attempts.into_iter().map(attempt_info).collect(),
        late: record.late.map(|late| late_info(&late)),
        capability: record.capability,
        submitted_by: record.submitted_by,
        payload,
        result,
        log_tail,
        waits_for,
        error_code: failure.code,
        error_message,
    }
}

fn attempt_info(attempt: Attempt) -> wire::AttemptInfo {
    wire::AttemptInfo {
        number: attempt.number,
        epoch: attempt.epoch,
        replica_id: attempt.replica_id,
        assigned_at_ms: attempt.assigned_at,
        ended_at_ms: attempt.ended_at,
        why: attempt.why,
        message: attempt.message,
    }
}

fn late_info(late: &Late) -> wire::LateInfo {
    wire::LateInfo {
        at_ms: late.at,
        outcome: late.outcome().as_str().to_owned(),
        error_code: late.code.clone(),
        size: late.size,
        digest: late.digest.to_string(),
    }
}

/// Who has to act, and what they run for it.
fn mediation(seen: &DispatchView) -> Option<wire::MediationInfo> {
    let waits = seen.record.mediation.clone()?;
    Some(wire::MediationInfo {
        since_ms: waits.since,
        host: waits.host,
        device: seen.device_name.clone(),
        prompt: waits.prompt,
        command: format!("palyra node mediation allow {}", seen.record.id),
    })
}
