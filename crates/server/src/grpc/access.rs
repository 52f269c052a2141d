//! `AccessService`: operators, and who the caller is.

use palyra_control::OperatorView;
use palyra_proto::access::v1 as wire;
use palyra_proto::access::v1::access_service_server::AccessService;
use palyra_state::access::{Operator, Role};
use tonic::{Request, Response, Status};

use super::{Gateway, convert, identity};

#[tonic::async_trait]
impl AccessService for Gateway {
    async fn who_am_i(
        &self,
        request: Request<wire::WhoAmIRequest>,
    ) -> Result<Response<wire::WhoAmIResponse>, Status> {
        let peer = identity(&request)?;
        let me = self.control.who_am_i(&peer).map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::WhoAmIResponse {
            operator: Some(operator_info(me.operator)),
            cluster_id: self.control.cluster_id().to_string(),
            certificate_not_after_ms: me.certificate_not_after_ms,
            read: convert::read_info(me.read),
        }))
    }

    async fn list_operators(
        &self,
        request: Request<wire::ListOperatorsRequest>,
    ) -> Result<Response<wire::ListOperatorsResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let read = convert::read_options(request.into_inner().read);
        let (operators, info) = self
            .control
            .list_operators(read)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ListOperatorsResponse {
            operators: operators.into_iter().map(operator_view).collect(),
            read: convert::read_info(info),
        }))
    }

    async fn add_operator(
        &self,
        request: Request<wire::AddOperatorRequest>,
    ) -> Result<Response<wire::AddOperatorResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let add = request.into_inner();
        let added = self
            .control
            .add_operator(
                &caller,
                &add.request_id,
                &add.name,
                &add.role,
                &add.csr,
                add.ttl_ms,
            )
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::AddOperatorResponse {
            chain: convert::chain(added.chain),
            roots: convert::chain(added.roots),
            write: convert::write_info(added.write),
        }))
    }

    async fn remove_operator(
        &self,
        request: Request<wire::RemoveOperatorRequest>,
    ) -> Result<Response<wire::RemoveOperatorResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let remove = request.into_inner();
        let write = self
            .control
            .remove_operator(&caller, &remove.request_id, &remove.name, &remove.reason)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RemoveOperatorResponse {
            write: convert::write_info(write),
        }))
    }

    async fn renew_certificate(
        &self,
        request: Request<wire::RenewCertificateRequest>,
    ) -> Result<Response<wire::RenewCertificateResponse>, Status> {
        let caller = self.operator(&request, Role::Viewer)?;
        let renew = request.into_inner();
        let renewed = self
            .control
            .renew_operator(&caller, &renew.request_id, &renew.csr, renew.ttl_ms)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RenewCertificateResponse {
            chain: convert::chain(renewed.chain),
            roots: convert::chain(renewed.roots),
            write: convert::write_info(renewed.write),
        }))
    }

    async fn confirm_certificate(
        &self,
        request: Request<wire::ConfirmCertificateRequest>,
    ) -> Result<Response<wire::ConfirmCertificateResponse>, Status> {
        let caller = self.operator(&request, Role::Viewer)?;
        let write = self
            .control
            .confirm_certificate(&caller, &request.into_inner().request_id)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ConfirmCertificateResponse {
            write: convert::write_info(write),
        }))
    }

    async fn revoke_certificate(
        &self,
        request: Request<wire::RevokeCertificateRequest>,
    ) -> Result<Response<wire::RevokeCertificateResponse>, Status> {
        let caller = self.operator(&request, Role::Admin)?;
        let revoke = request.into_inner();
        let write = self
            .control
            .revoke_operator_certificate(&caller, &revoke.request_id, &revoke.fingerprint, &revoke.reason)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RevokeCertificateResponse {
            write: convert::write_info(write),
        }))
    }
}

fn operator_view(view: OperatorView) -> wire::OperatorInfo {
    let certificates = view
        .certificates
        .iter()
        .map(|certificate| wire::OperatorCertificate {
            fingerprint: certificate.fingerprint.to_string(),
            status: convert::certificate_status(certificate).to_owned(),
            issued_at_ms: certificate.issued_at,
            not_after_ms: certificate.not_after,
            used_at_ms: certificate.used_at,
        });
    wire::OperatorInfo {
        certificates: certificates.collect(),
        ..operator_info(view.record)
    }
}

fn operator_info(operator: Operator) -> wire::OperatorInfo {
    wire::OperatorInfo {
        role: operator.role().as_str().to_owned(),
        status: operator.status().as_str().to_owned(),
        name: operator.name,
        created_at_ms: operator.created_at,
        created_by: operator.created_by,
        certificates: Vec::new(),
    }
}
