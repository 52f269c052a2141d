//! `ApprovalService` and `GrantService`: operators ask, others decide.

use palyra_control::{ApprovalView, AskGrant, GrantView, Verdict};
use palyra_proto::approval::v1 as wire;
use palyra_proto::approval::v1::approval_service_server::ApprovalService;
use palyra_proto::approval::v1::grant_service_server::GrantService;
use palyra_state::access::Role;
use palyra_state::approvals::{ApprovalState, Policy, Prompt};
use tonic::{Request, Response, Status};

use super::{Gateway, convert};

#[tonic::async_trait]
impl ApprovalService for Gateway {
    async fn list(
        &self,
        request: Request<wire::ListApprovalsRequest>,
    ) -> Result<Response<wire::ListApprovalsResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let list = request.into_inner();
        let (read, page) = (convert::read_options(list.read), list.page.unwrap_or_default());
        let page = self
            .control
            .list_approvals(read, &list.state, &list.subject, &page.after, page.limit)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ListApprovalsResponse {
            approvals: page.items.into_iter().map(approval_info).collect(),
            page: convert::page_info(page.next),
            read: convert::read_info(page.read),
        }))
    }

    async fn get(
        &self,
        request: Request<wire::GetApprovalRequest>,
    ) -> Result<Response<wire::GetApprovalResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let get = request.into_inner();
        let read = convert::read_options(get.read);
        let (found, info) = self
            .control
            .get_approval(read, &get.id)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetApprovalResponse {
            approval: Some(approval_info(found)),
            read: convert::read_info(info),
        }))
    }

    async fn decide(
        &self,
        request: Request<wire::DecideRequest>,
    ) -> Result<Response<wire::DecideResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let decide = request.into_inner();
        let verdict = Verdict {
            request_id: decide.request_id,
            id: decide.id,
            decision: decide.decision,
            scope: decide.scope,
            ttl_ms: decide.ttl_ms,
            reason: decide.reason,
            sas: decide.sas,
        };
        let (decided, write) = self
            .control
            .decide_approval(&caller, verdict)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::DecideResponse {
            approval: Some(approval_info(decided)),
            write: convert::write_info(write),
        }))
    }

    async fn withdraw(
        &self,
        request: Request<wire::WithdrawRequest>,
    ) -> Result<Response<wire::WithdrawResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let withdraw = request.into_inner();
        let (withdrawn, write) = self
            .control
            .withdraw_approval(&caller, &withdraw.request_id, &withdraw.id, &withdraw.reason)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::WithdrawResponse {
            approval: Some(approval_info(withdrawn)),
            write: convert::write_info(write),
        }))
    }

    async fn wait(
        &self,
        request: Request<wire::WaitApprovalRequest>,
    ) -> Result<Response<wire::GetApprovalResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let wait = request.into_inner();
        let (found, info) = self
            .control
            .wait_approval(&wait.id, wait.wait_ms.into())
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetApprovalResponse {
            approval: Some(approval_info(found)),
            read: convert::read_info(info),
        }))
    }

    async fn get_policy(
        &self,
        request: Request<wire::GetApprovalPolicyRequest>,
    ) -> Result<Response<wire::GetApprovalPolicyResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let read = convert::read_options(request.into_inner().read);
        let (policy, info) = self
            .control
            .approval_policy(read)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetApprovalPolicyResponse {
            policy: Some(policy_info(policy)),
            read: convert::read_info(info),
        }))
    }

    async fn set_policy(
        &self,
        request: Request<wire::SetApprovalPolicyRequest>,
    ) -> Result<Response<wire::SetApprovalPolicyResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let set = request.into_inner();
        let policy = set.policy.unwrap_or_default();
        let policy = Policy {
            four_eyes: policy.four_eyes,
            timeout: policy.timeout_ms,
            max_timebox: policy.max_timebox_ms,
            set_at: 0,
            set_by: String::new(),
        };
        let (policy, write) = self
            .control
            .set_approval_policy(&caller, &set.request_id, policy)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::SetApprovalPolicyResponse {
            policy: Some(policy_info(policy)),
            write: convert::write_info(write),
        }))
    }
}

#[tonic::async_trait]
impl GrantService for Gateway {
    async fn create(
        &self,
        request: Request<wire::CreateGrantRequest>,
    ) -> Result<Response<wire::CreateGrantResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let create = request.into_inner();
        let ask = AskGrant {
            request_id: create.request_id,
            grant_id: create.grant_id,
            run_id: create.run_id,
            tool: create.tool,
            session: create.session,
            ttl_ms: create.ttl_ms,
            summary: create.summary,
            risk: create.risk,
        };
        let (created, write) = self
            .control
            .create_grant(&caller, ask)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::CreateGrantResponse {
            grant: Some(grant_info(created)),
            write: convert::write_info(write),
        }))
    }

    async fn list(
        &self,
        request: Request<wire::ListGrantsRequest>,
    ) -> Result<Response<wire::ListGrantsResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let list = request.into_inner();
        let (read, page) = (convert::read_options(list.read), list.page.unwrap_or_default());
        let page = self
            .control
            .list_grants(read, &list.state, &page.after, page.limit)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ListGrantsResponse {
            grants: page.items.into_iter().map(grant_info).collect(),
            page: convert::page_info(page.next),
            read: convert::read_info(page.read),
        }))
    }

    async fn get(
        &self,
        request: Request<wire::GetGrantRequest>,
    ) -> Result<Response<wire::GetGrantResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let get = request.into_inner();
        let read = convert::read_options(get.read);
        let (found, info) = self
            .control
            .get_grant(read, &get.id)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetGrantResponse {
            grant: Some(grant_info(found)),
            read: convert::read_info(info),
        }))
    }

    async fn revoke(
        &self,
        request: Request<wire::RevokeGrantRequest>,
    ) -> Result<Response<wire::RevokeGrantResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let revoke = request.into_inner();
        let (revoked, write) = self
            .control
            .revoke_grant(
                &caller,
                &revoke.request_id,
                &revoke.id,
                &revoke.reason,
                revoke.cancel_run,
            )
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RevokeGrantResponse {
            grant: Some(grant_info(revoked)),
            write: convert::write_info(write),
        }))
    }
}

fn approval_info(approval: ApprovalView) -> wire::ApprovalInfo {
    let ApprovalView { record, status } = approval;
    let allowed = record.state() == ApprovalState::Allowed;
    wire::ApprovalInfo {
        id: record.id.to_string(),
        subject: record.subject().as_str().to_owned(),
        subject_id: record.subject_id.to_string(),
        state: status.as_str().to_owned(),
        requested_at_ms: record.requested_at,
        expires_at_ms: record.expires_at,
        decided_at_ms: record.decided_at,
        scope: if allowed {
            record.scope().as_str().to_owned()
        } else {
            String::new()
        },
        valid_until_ms: record.valid_until,
        covered: record.covered,
        standing: record.standing,
        prompt: Some(prompt_info(record.prompt)),
        requested_by: record.requested_by,
        decided_by: record.decided_by,
        reason: record.reason,
        session: record.session,
        tool: record.tool,
    }
}

fn prompt_info(prompt: Prompt) -> wire::Prompt {
    let risk = prompt.risk().as_str().to_owned();
    let options = prompt.options.into_iter().map(|option| wire::PromptOption {
        decision: if option.allow { "allow" } else { "deny" }.to_owned(),
        scope: option.scope().as_str().to_owned(),
        id: option.id,
        label: option.label,
    });
    wire::Prompt {
        options: options.collect(),
        title: prompt.title,
        risk,
        summary: prompt.summary,
    }
}

fn grant_info(grant: GrantView) -> wire::GrantInfo {
    let GrantView { record, status } = grant;
    wire::GrantInfo {
        id: record.id.to_string(),
        run_id: record.run_id.to_string(),
        approval_id: record.approval_id.to_string(),
        state: status.as_str().to_owned(),
        created_at_ms: record.created_at,
        expires_at_ms: record.expires_at,
        used_at_ms: record.used_at,
        ended_at_ms: record.ended_at,
        covered: record.covered,
        tool: record.tool,
        session: record.session,
        requested_by: record.requested_by,
        ended_by: record.ended_by,
        reason: record.reason,
    }
}

fn policy_info(policy: Policy) -> wire::ApprovalPolicy {
    wire::ApprovalPolicy {
        four_eyes: policy.four_eyes,
        timeout_ms: policy.timeout,
        max_timebox_ms: policy.max_timebox,
        set_at_ms: policy.set_at,
        set_by: policy.set_by,
    }
}
