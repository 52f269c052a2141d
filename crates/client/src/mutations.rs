//! Which calls are writes: each carries a request id, under which a repetition is answered and not applied again.

use palyra_proto::access::v1::{
    AddOperatorRequest, ConfirmCertificateRequest, RemoveOperatorRequest, RenewCertificateRequest,
    RevokeCertificateRequest,
};
use palyra_proto::cluster::v1::{MintJoinTokenRequest, RemoveReplicaRequest};
use palyra_proto::dispatch::v1::{CancelRequest, InvokeRequest};
use palyra_proto::node::v1::{
    ClearCloneRequest, PurgeDeviceRequest, RemoveDeviceRequest, RevokeDeviceRequest, RotateDeviceRequest,
    SetCertificatePolicyRequest,
};
use palyra_proto::pairing::v1::{
    ApproveRequest, MintPinRequest, MintTicketRequest, RejectRequest, RevokeCodeRequest,
};

use crate::client::Mutation;

impl Mutation for MintJoinTokenRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for RemoveReplicaRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for MintPinRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for MintTicketRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for RevokeCodeRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for ApproveRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for RejectRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for CancelRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for AddOperatorRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for RemoveOperatorRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for InvokeRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for RevokeDeviceRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for RotateDeviceRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for RemoveDeviceRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for ClearCloneRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for SetCertificatePolicyRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for RenewCertificateRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for ConfirmCertificateRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for RevokeCertificateRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for PurgeDeviceRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}
