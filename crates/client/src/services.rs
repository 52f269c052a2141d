//! Every call that an operator can make, typed.
//!
//! What never lives here: retries and limits, which all calls share (see [`crate::pool`]); each call's errors
//! are those of [`crate::Pool::call`]. Reads carry the client's [`Client::read_options`].
//! Invariant: a wait at a server is cut to what is left of it when another replica is asked.

use std::time::Duration;

use palyra_proto::access::v1::{
    AddOperatorRequest, AddOperatorResponse, ConfirmCertificateRequest, ConfirmCertificateResponse,
    ListOperatorsRequest, ListOperatorsResponse, RemoveOperatorRequest, RemoveOperatorResponse,
    RenewCertificateRequest, RenewCertificateResponse, RevokeCertificateRequest, RevokeCertificateResponse,
    WhoAmIRequest, WhoAmIResponse, access_service_client::AccessServiceClient,
};
use palyra_proto::cluster::v1::{
    MintJoinTokenRequest, MintJoinTokenResponse, RemoveReplicaRequest, RemoveReplicaResponse, StatusRequest,
    StatusResponse, TransferLeaderRequest, TransferLeaderResponse, TriggerSnapshotRequest,
    TriggerSnapshotResponse, cluster_service_client::ClusterServiceClient,
};
use palyra_proto::dispatch::v1::{
    CancelRequest, CancelResponse, GetRequest, GetResponse, InvokeRequest, InvokeResponse, ListRequest,
    ListResponse, LogsRequest, LogsResponse, WaitRequest, WaitResponse,
    dispatch_service_client::DispatchServiceClient,
};
use palyra_proto::journal::v1::{
    VerifyRequest, VerifyResponse, journal_service_client::JournalServiceClient,
};
use palyra_proto::node::v1::{
    ClearCloneRequest, ClearCloneResponse, GetCertificatePolicyRequest, GetCertificatePolicyResponse,
    GetDeviceRequest, GetDeviceResponse, GetNodeRequest, GetNodeResponse, ListDevicesRequest,
    ListDevicesResponse, ListNodesRequest, ListNodesResponse, PurgeDeviceRequest, PurgeDeviceResponse,
    RemoveDeviceRequest, RemoveDeviceResponse, RevokeDeviceRequest, RevokeDeviceResponse,
    RotateDeviceRequest, RotateDeviceResponse, SetCertificatePolicyRequest, SetCertificatePolicyResponse,
    fleet_service_client::FleetServiceClient,
};
use palyra_proto::pairing::v1::{
    ApproveRequest, ApproveResponse, GetRequestRequest, GetRequestResponse, ListCodesRequest,
    ListCodesResponse, ListRequestsRequest, ListRequestsResponse, MintPinRequest, MintPinResponse,
    MintTicketRequest, MintTicketResponse, RejectRequest, RejectResponse, RevokeCodeRequest,
    RevokeCodeResponse, pairing_service_client::PairingServiceClient,
};
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::client::Client;
use crate::error::Error;
use crate::pool::Repeat;

/// The largest answer that is taken: a full page of nodes, or payload and result of a dispatch, with room to
/// spare.
pub const MAX_ANSWER: usize = 32 * 1024 * 1024;
/// The longest that one call waits at a server, in milliseconds; longer waits are several calls.
pub const MAX_WAIT_MS: u32 = 300_000;
/// How long a revocation waits for its enforcement when nothing is asked for, in milliseconds.
const REVOKE_WAIT_MS: u32 = 10_000;

fn cluster(channel: Channel) -> ClusterServiceClient<Channel> {
    ClusterServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

fn pairing(channel: Channel) -> PairingServiceClient<Channel> {
    PairingServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

pub(crate) fn fleet(channel: Channel) -> FleetServiceClient<Channel> {
    FleetServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

fn dispatch(channel: Channel) -> DispatchServiceClient<Channel> {
    DispatchServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

pub(crate) fn journal(channel: Channel) -> JournalServiceClient<Channel> {
    JournalServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

fn access(channel: Channel) -> AccessServiceClient<Channel> {
    AccessServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

impl Client {
    /// The cluster and its replicas, as the answering replica sees them.
    pub async fn status(&self) -> Result<StatusResponse, Error> {
        self.read(|channel| async move { cluster(channel).status(StatusRequest {}).await })
            .await
    }

    /// Who the cluster takes this client for.
    pub async fn whoami(&self) -> Result<WhoAmIResponse, Error> {
        self.read(|channel| async move { access(channel).who_am_i(WhoAmIRequest {}).await })
            .await
    }

    /// Pairing codes and tickets.
    pub async fn list_codes(&self, request: ListCodesRequest) -> Result<ListCodesResponse, Error> {
        let request = ListCodesRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| async move { pairing(channel).list_codes(request).await })
            .await
    }

    /// One page of the pairing requests.
    pub async fn list_requests(&self, request: ListRequestsRequest) -> Result<ListRequestsResponse, Error> {
        let request = ListRequestsRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { pairing(channel).list_requests(request).await }
        })
        .await
    }

    /// One pairing request, by id, device id, or a prefix that names one.
    pub async fn get_request(&self, request: GetRequestRequest) -> Result<GetRequestResponse, Error> {
        let request = GetRequestRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { pairing(channel).get_request(request).await }
        })
        .await
    }

    /// One page of the nodes.
    pub async fn list_nodes(&self, request: ListNodesRequest) -> Result<ListNodesResponse, Error> {
        let request = ListNodesRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { fleet(channel).list_nodes(request).await }
        })
        .await
    }

    /// One node, by device id, name, or a prefix that names one.
    pub async fn get_node(&self, request: GetNodeRequest) -> Result<GetNodeResponse, Error> {
        let request = GetNodeRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { fleet(channel).get_node(request).await }
        })
        .await
    }

    /// One page of the devices.
    pub async fn list_devices(&self, request: ListDevicesRequest) -> Result<ListDevicesResponse, Error> {
        let request = ListDevicesRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { fleet(channel).list_devices(request).await }
        })
        .await
    }

    /// One device with its certificates, by id, name, or a prefix that names one.
    pub async fn get_device(&self, request: GetDeviceRequest) -> Result<GetDeviceResponse, Error> {
        let request = GetDeviceRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { fleet(channel).get_device(request).await }
        })
        .await
    }

    /// One dispatch with payload and result.
    pub async fn get_dispatch(&self, request: GetRequest) -> Result<GetResponse, Error> {
        let request = GetRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { dispatch(channel).get(request).await }
        })
        .await
    }

    /// One page of the dispatches, without payloads and results.
    pub async fn list_dispatches(&self, request: ListRequest) -> Result<ListResponse, Error> {
        let request = ListRequest {
            read: Some(self.read_options()),
            ..request
        };
        self.read(|channel| {
            let request = request.clone();
            async move { dispatch(channel).list(request).await }
        })
        .await
    }

    /// Recomputes the journal's hash chain at the answering replica.
    pub async fn verify_journal(&self, request: VerifyRequest) -> Result<VerifyResponse, Error> {
        let request = VerifyRequest {
            read: request.read.or(Some(self.read_options())),
        };
        self.read(|channel| async move { journal(channel).verify(request).await })
            .await
    }

    /// All operators.
    pub async fn list_operators(
        &self,
        request: ListOperatorsRequest,
    ) -> Result<ListOperatorsResponse, Error> {
        let request = ListOperatorsRequest {
            read: request.read.or(Some(self.read_options())),
        };
        self.read(|channel| async move { access(channel).list_operators(request).await })
            .await
    }

    /// Makes a token that lets one replica join.
    pub async fn mint_join_token(
        &self,
        request: MintJoinTokenRequest,
    ) -> Result<MintJoinTokenResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            cluster(channel).mint_join_token(request).await
        })
        .await
    }

    /// Removes a replica for good.
    pub async fn remove_replica(
        &self,
        request: RemoveReplicaRequest,
    ) -> Result<RemoveReplicaResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            cluster(channel).remove_replica(request).await
        })
        .await
    }

    /// Makes a pairing code of eight digits. `pin` is empty when this was a repeated answer.
    pub async fn mint_pin(&self, request: MintPinRequest) -> Result<MintPinResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            pairing(channel).mint_pin(request).await
        })
        .await
    }

    /// Makes a pairing ticket. `ticket` is empty when this was a repeated answer.
    pub async fn mint_ticket(&self, request: MintTicketRequest) -> Result<MintTicketResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            pairing(channel).mint_ticket(request).await
        })
        .await
    }

    /// Revokes a pairing code or ticket.
    pub async fn revoke_code(&self, request: RevokeCodeRequest) -> Result<RevokeCodeResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            pairing(channel).revoke_code(request).await
        })
        .await
    }

    /// Lets a machine in: its certificate is issued.
    pub async fn approve(&self, request: ApproveRequest) -> Result<ApproveResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            pairing(channel).approve(request).await
        })
        .await
    }

    /// Turns a machine away.
    pub async fn reject(&self, request: RejectRequest) -> Result<RejectResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            pairing(channel).reject(request).await
        })
        .await
    }

    /// Cancels a dispatch that has not ended.
    pub async fn cancel_dispatch(&self, request: CancelRequest) -> Result<CancelResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            dispatch(channel).cancel(request).await
        })
        .await
    }

    /// Lets an operator in, with a certificate for the key in the signing request.
    pub async fn add_operator(&self, request: AddOperatorRequest) -> Result<AddOperatorResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            access(channel).add_operator(request).await
        })
        .await
    }

    /// Shuts an operator out, and waits ten seconds at most until all replicas have closed its connections.
    pub async fn remove_operator(
        &self,
        request: RemoveOperatorRequest,
    ) -> Result<RemoveOperatorResponse, Error> {
        let wait = Duration::from_millis(REVOKE_WAIT_MS.into());
        self.mutate(request, wait, |channel, request| async move {
            access(channel).remove_operator(request).await
        })
        .await
    }

    /// Hands leadership to replica `to`, or with 0 to the best caught-up voter. Not repeated when its outcome
    /// is unknown: ask for [`Client::status`].
    pub async fn transfer_leader(&self, to: u64) -> Result<TransferLeaderResponse, Error> {
        self.once(|channel| async move {
            cluster(channel)
                .transfer_leader(TransferLeaderRequest { to })
                .await
        })
        .await
    }

    /// Lets the answering replica make a snapshot.
    pub async fn trigger_snapshot(&self) -> Result<TriggerSnapshotResponse, Error> {
        self.once(|channel| async move { cluster(channel).trigger_snapshot(TriggerSnapshotRequest {}).await })
            .await
    }

    /// Asks a device to change its certificate, and waits `wait_ms` at most until the new one is in use.
    pub async fn rotate_device(&self, request: RotateDeviceRequest) -> Result<RotateDeviceResponse, Error> {
        let wait = Duration::from_millis(request.wait_ms.min(MAX_WAIT_MS).into());
        let until = Instant::now() + wait;
        self.mutate(request, wait, |channel, mut request| async move {
            request.wait_ms = remaining_ms(until);
            fleet(channel).rotate_device(request).await
        })
        .await
    }

    /// Says that a device that is suspected to be two machines is one.
    pub async fn clear_clone(&self, request: ClearCloneRequest) -> Result<ClearCloneResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            fleet(channel).clear_clone(request).await
        })
        .await
    }

    /// What the whole cluster holds certificates to.
    pub async fn certificate_policy(&self) -> Result<GetCertificatePolicyResponse, Error> {
        let request = GetCertificatePolicyRequest {
            read: Some(self.read_options()),
        };
        self.read(|channel| async move { fleet(channel).get_certificate_policy(request).await })
            .await
    }

    /// Sets it.
    pub async fn set_certificate_policy(
        &self,
        request: SetCertificatePolicyRequest,
    ) -> Result<SetCertificatePolicyResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            fleet(channel).set_certificate_policy(request).await
        })
        .await
    }

    /// The next certificate of this client's own operator.
    pub async fn renew_certificate(
        &self,
        request: RenewCertificateRequest,
    ) -> Result<RenewCertificateResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            access(channel).renew_certificate(request).await
        })
        .await
    }

    /// Uses this client's certificate and does nothing else: the ones before it end.
    pub async fn confirm_certificate(
        &self,
        request: ConfirmCertificateRequest,
    ) -> Result<ConfirmCertificateResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            access(channel).confirm_certificate(request).await
        })
        .await
    }

    /// Revokes one certificate of an operator.
    pub async fn revoke_certificate(
        &self,
        request: RevokeCertificateRequest,
    ) -> Result<RevokeCertificateResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            access(channel).revoke_certificate(request).await
        })
        .await
    }

    /// Revokes a device and waits `wait_ms` (0: ten seconds) at most until all replicas have enforced it.
    pub async fn revoke_device(&self, request: RevokeDeviceRequest) -> Result<RevokeDeviceResponse, Error> {
        let wait_ms = if request.wait_ms == 0 {
            REVOKE_WAIT_MS
        } else {
            request.wait_ms.min(MAX_WAIT_MS)
        };
        let wait = Duration::from_millis(wait_ms.into());
        let until = Instant::now() + wait;
        self.mutate(request, wait, |channel, mut request| async move {
            request.wait_ms = remaining_ms(until).max(1);
            fleet(channel).revoke_device(request).await
        })
        .await
    }

    /// Forgets a revoked device, and waits as [`Client::revoke_device`] does.
    pub async fn remove_device(&self, request: RemoveDeviceRequest) -> Result<RemoveDeviceResponse, Error> {
        let wait_ms = if request.wait_ms == 0 {
            REVOKE_WAIT_MS
        } else {
            request.wait_ms.min(MAX_WAIT_MS)
        };
        let wait = Duration::from_millis(wait_ms.into());
        let until = Instant::now() + wait;
        self.mutate(request, wait, |channel, mut request| async move {
            request.wait_ms = remaining_ms(until).max(1);
            fleet(channel).remove_device(request).await
        })
        .await
    }

    /// Forgets what a removed device is refused by.
    pub async fn purge_device(&self, request: PurgeDeviceRequest) -> Result<PurgeDeviceResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            fleet(channel).purge_device(request).await
        })
        .await
    }

    /// Submits a dispatch, and with `wait_ms` waits that long at most until it ended, at whichever replica
    /// answers.
    pub async fn invoke(&self, request: InvokeRequest) -> Result<InvokeResponse, Error> {
        let asked = request.wait_ms.min(MAX_WAIT_MS);
        let wait = Duration::from_millis(asked.into());
        let until = Instant::now() + wait;
        self.mutate(request, wait, |channel, mut request| async move {
            request.wait_ms = if asked == 0 { 0 } else { remaining_ms(until).max(1) };
            dispatch(channel).invoke(request).await
        })
        .await
    }

    /// Waits until a dispatch ended, `wait_ms` at most; the answer may be one that has not.
    pub async fn wait_dispatch(&self, id: &str, wait_ms: u32) -> Result<WaitResponse, Error> {
        self.wait_dispatch_change(id, "", wait_ms).await
    }

    /// Waits until a dispatch ended, or is in another state than `known`, `wait_ms` at most.
    pub async fn wait_dispatch_change(
        &self,
        id: &str,
        known: &str,
        wait_ms: u32,
    ) -> Result<WaitResponse, Error> {
        let wait = Duration::from_millis(wait_ms.min(MAX_WAIT_MS).into());
        let until = Instant::now() + wait;
        self.pool()
            .call(Repeat::Read, self.limits(wait), |channel| {
                let request = WaitRequest {
                    id: id.to_owned(),
                    wait_ms: remaining_ms(until),
                    known_state: known.to_owned(),
                };
                async move { dispatch(channel).wait(request).await }
            })
            .await
    }

    /// What a program has written after what is known, and how far it is; waits for news, `wait_ms` at most.
    pub async fn dispatch_logs(&self, request: LogsRequest) -> Result<LogsResponse, Error> {
        let wait = Duration::from_millis(request.wait_ms.min(MAX_WAIT_MS).into());
        let until = Instant::now() + wait;
        self.pool()
            .call(Repeat::Read, self.limits(wait), |channel| {
                let mut request = request.clone();
                request.wait_ms = remaining_ms(until);
                async move { dispatch(channel).logs(request).await }
            })
            .await
    }
}

pub(crate) fn remaining_ms(until: Instant) -> u32 {
    u32::try_from(until.saturating_duration_since(Instant::now()).as_millis()).unwrap_or(MAX_WAIT_MS)
}
