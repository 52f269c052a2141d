//! Calls about workers, and what they are held to.

use std::time::Duration;

use palyra_proto::worker::v1::{
    DrainRequest, GetFleetRequest, GetFleetResponse, GetPolicyRequest, GetPolicyResponse, GetWorkerRequest,
    GetWorkerResponse, ListWorkersRequest, ListWorkersResponse, ReapRequest, ReapResponse, SetPolicyRequest,
    SetPolicyResponse, WorkerRequest, WorkerResponse, worker_service_client::WorkerServiceClient,
};
use tonic::transport::Channel;

use crate::client::{Client, Mutation};
use crate::error::Error;
use crate::services::MAX_ANSWER;

fn workers(channel: Channel) -> WorkerServiceClient<Channel> {
    WorkerServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

impl Client {
    /// One page of the workers.
    pub async fn list_workers(&self, request: ListWorkersRequest) -> Result<ListWorkersResponse, Error> {
        let request = ListWorkersRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { workers(channel).list_workers(request).await }
        })
        .await
    }

    /// One worker with its leases and its statement, by id, name, or a prefix that names one.
    pub async fn get_worker(&self, request: GetWorkerRequest) -> Result<GetWorkerResponse, Error> {
        let request = GetWorkerRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { workers(channel).get_worker(request).await }
        })
        .await
    }

    /// Counts of the whole fleet of workers, of one moment.
    pub async fn fleet_totals(&self) -> Result<GetFleetResponse, Error> {
        let read = Some(self.read_options());
        self.read(|channel| async move { workers(channel).get_fleet(GetFleetRequest { read }).await })
            .await
    }

    /// What workers are held to.
    pub async fn worker_policy(&self) -> Result<GetPolicyResponse, Error> {
        let read = Some(self.read_options());
        self.read(|channel| async move { workers(channel).get_policy(GetPolicyRequest { read }).await })
            .await
    }

    /// Replaces the policy when its version is the expected one, or says what that would change.
    pub async fn set_worker_policy(&self, request: SetPolicyRequest) -> Result<SetPolicyResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            workers(channel).set_policy(request).await
        })
        .await
    }

    /// Gives it nothing any more, and ends its leases.
    pub async fn quarantine_worker(&self, request: WorkerRequest) -> Result<WorkerResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            workers(channel).quarantine(request).await
        })
        .await
    }

    /// Wants a worker to attest again.
    pub async fn reverify_worker(&self, request: WorkerRequest) -> Result<WorkerResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            workers(channel).reverify(request).await
        })
        .await
    }

    /// Takes a drain back.
    pub async fn release_worker(&self, request: WorkerRequest) -> Result<WorkerResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            workers(channel).release(request).await
        })
        .await
    }

    /// Gives it nothing new, and ends what runs at a deadline, or at once.
    pub async fn drain_worker(&self, request: DrainRequest) -> Result<WorkerResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            workers(channel).drain(request).await
        })
        .await
    }

    /// Wants a failed cleanup tried again, or vouches that the worker is clean.
    pub async fn cleanup_worker(&self, request: WorkerRequest) -> Result<WorkerResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            workers(channel).cleanup(request).await
        })
        .await
    }

    /// Ends what is due, and forgets workers that have long been offline.
    pub async fn reap_workers(&self, request: ReapRequest) -> Result<ReapResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            workers(channel).reap(request).await
        })
        .await
    }
}

impl Mutation for SetPolicyRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for WorkerRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for DrainRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for ReapRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}
