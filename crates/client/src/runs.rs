//! Calls about runs, their files, and the leases that bind workers to them.
//!
//! Invariant: a file is taken piece by piece; losing the replica that sends it costs the pieces that had not come,
//! and none
//! that had.

use std::time::Duration;

use bytes::Bytes;
use palyra_proto::run::v1::{
    CancelRunRequest, GetArtifactRequest, GetArtifactResponse, GetLeaseRequest, GetLeaseResponse,
    GetRunRequest, GetRunResponse, ListLeasesRequest, ListLeasesResponse, ListRunsRequest, ListRunsResponse,
    PutArtifactRequest, PutArtifactResponse, RevokeLeaseRequest, RevokeLeaseResponse, RunLogsRequest,
    RunLogsResponse, StartRequest, StartResponse, WaitRunRequest, lease_service_client::LeaseServiceClient,
    run_service_client::RunServiceClient,
};
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::client::{Client, Mutation};
use crate::error::{Class, Error, Failure, classify};
use crate::pool::Repeat;
use crate::services::{MAX_ANSWER, MAX_WAIT_MS, remaining_ms};

fn runs(channel: Channel) -> RunServiceClient<Channel> {
    RunServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

fn leases(channel: Channel) -> LeaseServiceClient<Channel> {
    LeaseServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

/// How long a file may take at least.
const FILE_TIME: Duration = Duration::from_secs(120);
/// Between two replicas that are asked for the rest of a file.
const AGAIN: Duration = Duration::from_millis(200);

impl Client {
    /// Starts the run of a grant.
    pub async fn start_run(&self, request: StartRequest) -> Result<StartResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            runs(channel).start(request).await
        })
        .await
    }

    /// Sends one piece of an input file.
    pub async fn put_artifact(&self, request: PutArtifactRequest) -> Result<PutArtifactResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            runs(channel).put_artifact(request).await
        })
        .await
    }

    /// Takes a run back.
    pub async fn cancel_run(&self, request: CancelRunRequest) -> Result<StartResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            runs(channel).cancel(request).await
        })
        .await
    }

    /// One page of the runs.
    pub async fn list_runs(&self, request: ListRunsRequest) -> Result<ListRunsResponse, Error> {
        let request = ListRunsRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { runs(channel).list(request).await }
        })
        .await
    }

    /// One run, by id or a prefix that names one.
    pub async fn get_run(&self, request: GetRunRequest) -> Result<GetRunResponse, Error> {
        let request = GetRunRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { runs(channel).get(request).await }
        })
        .await
    }

    /// Waits until a run ended, or is in another state than `known`, `wait_ms` at most.
    pub async fn wait_run(&self, id: &str, known: &str, wait_ms: u32) -> Result<GetRunResponse, Error> {
        let wait = Duration::from_millis(wait_ms.min(MAX_WAIT_MS).into());
        let until = Instant::now() + wait;
        self.pool()
            .call(Repeat::Read, self.limits(wait), |channel| {
                let request = WaitRunRequest {
                    id: id.to_owned(),
                    wait_ms: remaining_ms(until),
                    known_state: known.to_owned(),
                };
                async move { runs(channel).wait(request).await }
            })
            .await
    }

    /// What a run's program has written after what is known, and how far it is; waits for news, `wait_ms` at most.
    pub async fn run_logs(&self, request: RunLogsRequest) -> Result<RunLogsResponse, Error> {
        let wait = Duration::from_millis(request.wait_ms.min(MAX_WAIT_MS).into());
        let until = Instant::now() + wait;
        self.pool()
            .call(Repeat::Read, self.limits(wait), |channel| {
                let mut request = request.clone();
                request.wait_ms = remaining_ms(until);
                async move { runs(channel).logs(request).await }
            })
            .await
    }

    /// A file of a run: its pieces in order go to `take`, which is called for none twice.
    ///
    /// # Errors
    /// Those of a read; that a replica sent pieces out of order; those of `take`.
    pub async fn get_artifact(
        &self,
        run_id: &str,
        digest: Bytes,
        mut take: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<u64, Error> {
        let mut got = 0;
        let until = Instant::now() + self.timeout().max(FILE_TIME);
        loop {
            let request = GetArtifactRequest {
                read: Some(self.read_options()),
                run_id: run_id.to_owned(),
                digest: digest.clone(),
            };
            let mut pieces = self
                .read(|channel| {
                    let request = request.clone();
                    async move { runs(channel).get_artifact(request).await }
                })
                .await?;
            let mut size = None;
            let lost = loop {
                let piece: GetArtifactResponse = match tokio::time::timeout_at(until, pieces.message()).await
                {
                    Ok(Ok(Some(piece))) => piece,
                    Ok(Ok(None)) if size.is_some_and(|size| got >= size) => return Ok(got),
                    Ok(Ok(None)) => break "the replica ended before the file".to_owned(),
                    Ok(Err(status)) => match classify(&status) {
                        Failure::Answered(error) if !error.retryable => return Err(error),
                        Failure::Answered(error) => break error.message,
                        Failure::Lost { cause, .. } => break cause,
                    },
                    Err(_) => break "it did not come in time".to_owned(),
                };
                size = Some(piece.size);
                let end = piece.offset + piece.chunk.len() as u64;
                if piece.offset > got {
                    let message = format!("a replica left out bytes {got} to {} of a file", piece.offset);
                    return Err(Error::local(Class::Internal, message, "palyra version"));
                }
                if end > got {
                    let known = usize::try_from(got - piece.offset).unwrap_or(usize::MAX);
                    take(piece.chunk.get(known..).unwrap_or_default())?;
                    got = end;
                }
            };
            if Instant::now() >= until {
                let message = format!("a file of run {run_id} did not come whole: {lost}");
                return Err(Error::local(
                    Class::Unavailable,
                    message,
                    "the same command again",
                ));
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// One page of the leases.
    pub async fn list_leases(&self, request: ListLeasesRequest) -> Result<ListLeasesResponse, Error> {
        let request = ListLeasesRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { leases(channel).list_leases(request).await }
        })
        .await
    }

    /// One lease, by id or a prefix that names one.
    pub async fn get_lease(&self, request: GetLeaseRequest) -> Result<GetLeaseResponse, Error> {
        let request = GetLeaseRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { leases(channel).get_lease(request).await }
        })
        .await
    }

    /// Ends a lease: nothing of it is accepted from then on.
    pub async fn revoke_lease(&self, request: RevokeLeaseRequest) -> Result<RevokeLeaseResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            leases(channel).revoke_lease(request).await
        })
        .await
    }
}

impl Mutation for StartRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for PutArtifactRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for CancelRunRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for RevokeLeaseRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}
