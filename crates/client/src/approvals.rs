//! Calls about approvals, which people decide, and grants, which they give.

use std::time::Duration;

use palyra_proto::approval::v1::{
    CreateGrantRequest, CreateGrantResponse, DecideRequest, DecideResponse, GetApprovalPolicyRequest,
    GetApprovalPolicyResponse, GetApprovalRequest, GetApprovalResponse, GetGrantRequest, GetGrantResponse,
    ListApprovalsRequest, ListApprovalsResponse, ListGrantsRequest, ListGrantsResponse, RevokeGrantRequest,
    RevokeGrantResponse, SetApprovalPolicyRequest, SetApprovalPolicyResponse, WaitApprovalRequest,
    WithdrawRequest, WithdrawResponse, approval_service_client::ApprovalServiceClient,
    grant_service_client::GrantServiceClient,
};
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::client::{Client, Mutation};
use crate::error::Error;
use crate::pool::Repeat;
use crate::services::{MAX_ANSWER, MAX_WAIT_MS, remaining_ms};

fn approvals(channel: Channel) -> ApprovalServiceClient<Channel> {
    ApprovalServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

fn grants(channel: Channel) -> GrantServiceClient<Channel> {
    GrantServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

impl Client {
    /// One page of the approvals.
    pub async fn list_approvals(
        &self,
        request: ListApprovalsRequest,
    ) -> Result<ListApprovalsResponse, Error> {
        let request = ListApprovalsRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { approvals(channel).list(request).await }
        })
        .await
    }

    /// One approval, by id or a prefix that names one.
    pub async fn get_approval(&self, request: GetApprovalRequest) -> Result<GetApprovalResponse, Error> {
        let request = GetApprovalRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { approvals(channel).get(request).await }
        })
        .await
    }

    /// Waits until an approval is decided or over, `wait_ms` at most.
    pub async fn wait_approval(&self, id: &str, wait_ms: u32) -> Result<GetApprovalResponse, Error> {
        let wait = Duration::from_millis(wait_ms.min(MAX_WAIT_MS).into());
        let until = Instant::now() + wait;
        self.pool()
            .call(Repeat::Read, self.limits(wait), |channel| {
                let request = WaitApprovalRequest {
                    id: id.to_owned(),
                    wait_ms: remaining_ms(until),
                };
                async move { approvals(channel).wait(request).await }
            })
            .await
    }

    /// Allows or denies what an approval is about.
    pub async fn decide_approval(&self, request: DecideRequest) -> Result<DecideResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            approvals(channel).decide(request).await
        })
        .await
    }

    /// Takes an approval back, or a decision that stands.
    pub async fn withdraw_approval(&self, request: WithdrawRequest) -> Result<WithdrawResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            approvals(channel).withdraw(request).await
        })
        .await
    }

    /// How approvals are decided.
    pub async fn approval_policy(&self) -> Result<GetApprovalPolicyResponse, Error> {
        let read = Some(self.read_options());
        self.read(|channel| async move {
            approvals(channel)
                .get_policy(GetApprovalPolicyRequest { read })
                .await
        })
        .await
    }

    /// Sets how approvals are decided.
    pub async fn set_approval_policy(
        &self,
        request: SetApprovalPolicyRequest,
    ) -> Result<SetApprovalPolicyResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            approvals(channel).set_policy(request).await
        })
        .await
    }

    /// Asks for permission to run one run.
    pub async fn create_grant(&self, request: CreateGrantRequest) -> Result<CreateGrantResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            grants(channel).create(request).await
        })
        .await
    }

    /// One page of the grants.
    pub async fn list_grants(&self, request: ListGrantsRequest) -> Result<ListGrantsResponse, Error> {
        let request = ListGrantsRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { grants(channel).list(request).await }
        })
        .await
    }

    /// One grant, by id or a prefix that names one.
    pub async fn get_grant(&self, request: GetGrantRequest) -> Result<GetGrantResponse, Error> {
        let request = GetGrantRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { grants(channel).get(request).await }
        })
        .await
    }

    /// Takes a grant back.
    pub async fn revoke_grant(&self, request: RevokeGrantRequest) -> Result<RevokeGrantResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            grants(channel).revoke(request).await
        })
        .await
    }
}

impl Mutation for DecideRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for WithdrawRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for SetApprovalPolicyRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for CreateGrantRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for RevokeGrantRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}
