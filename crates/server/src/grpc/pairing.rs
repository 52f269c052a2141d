//! `PairingService`: operators mint codes and decide requests.

use palyra_control::PairingView;
use palyra_control::{CodeView, Mint};
use palyra_proto::pairing::v1 as wire;
use palyra_proto::pairing::v1::pairing_service_server::PairingService;
use palyra_state::access::Role;
use tonic::{Request, Response, Status};

use super::{Gateway, convert};

#[tonic::async_trait]
impl PairingService for Gateway {
    async fn mint_pin(
        &self,
        request: Request<wire::MintPinRequest>,
    ) -> Result<Response<wire::MintPinResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let mint = request.into_inner();
        let mint = Mint {
            request_id: mint.request_id,
            ttl_ms: mint.ttl_ms,
            device_name: mint.device_name,
        };
        let minted = self
            .control
            .mint_pin(&caller, mint)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::MintPinResponse {
            pin: minted.secret.to_string(),
            code: Some(code_info(minted.code)),
            write: convert::write_info(minted.write),
        }))
    }

    async fn mint_ticket(
        &self,
        request: Request<wire::MintTicketRequest>,
    ) -> Result<Response<wire::MintTicketResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let mint = request.into_inner();
        let mint = Mint {
            request_id: mint.request_id,
            ttl_ms: mint.ttl_ms,
            device_name: mint.device_name,
        };
        let minted = self
            .control
            .mint_ticket(&caller, mint)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::MintTicketResponse {
            ticket: minted.secret.to_string(),
            code: Some(code_info(minted.code)),
            write: convert::write_info(minted.write),
        }))
    }

    async fn list_codes(
        &self,
        request: Request<wire::ListCodesRequest>,
    ) -> Result<Response<wire::ListCodesResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let list = request.into_inner();
        let read = convert::read_options(list.read);
        let (codes, info) = self
            .control
            .list_codes(read, list.all)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ListCodesResponse {
            codes: codes.into_iter().map(code_info).collect(),
            read: convert::read_info(info),
        }))
    }

    async fn revoke_code(
        &self,
        request: Request<wire::RevokeCodeRequest>,
    ) -> Result<Response<wire::RevokeCodeResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let revoke = request.into_inner();
        let write = self
            .control
            .revoke_code(&caller, &revoke.request_id, &revoke.code, &revoke.reason)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RevokeCodeResponse {
            write: convert::write_info(write),
        }))
    }

    async fn list_requests(
        &self,
        request: Request<wire::ListRequestsRequest>,
    ) -> Result<Response<wire::ListRequestsResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let list = request.into_inner();
        let (read, page) = (convert::read_options(list.read), list.page.unwrap_or_default());
        let page = self
            .control
            .list_pairings(read, &list.status, &page.after, page.limit)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ListRequestsResponse {
            requests: page.items.into_iter().map(request_info).collect(),
            page: convert::page_info(page.next),
            read: convert::read_info(page.read),
        }))
    }

    async fn get_request(
        &self,
        request: Request<wire::GetRequestRequest>,
    ) -> Result<Response<wire::GetRequestResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let get = request.into_inner();
        let read = convert::read_options(get.read);
        let (found, info) = self
            .control
            .get_pairing(read, &get.id)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::GetRequestResponse {
            request: Some(request_info(found)),
            read: convert::read_info(info),
        }))
    }

    async fn approve(
        &self,
        request: Request<wire::ApproveRequest>,
    ) -> Result<Response<wire::ApproveResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let approve = request.into_inner();
        let (decided, write) = self
            .control
            .approve(
                &caller,
                &approve.request_id,
                &approve.id,
                &approve.sas,
                &approve.reason,
            )
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::ApproveResponse {
            request: Some(request_info(decided)),
            write: convert::write_info(write),
        }))
    }

    async fn reject(
        &self,
        request: Request<wire::RejectRequest>,
    ) -> Result<Response<wire::RejectResponse>, Status> {
        let caller = self.operator(&request, Role::Operator)?;
        let reject = request.into_inner();
        let (decided, write) = self
            .control
            .reject(&caller, &reject.request_id, &reject.id, &reject.reason)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RejectResponse {
            request: Some(request_info(decided)),
            write: convert::write_info(write),
        }))
    }
}

fn code_info(code: CodeView) -> wire::CodeInfo {
    let CodeView { record, status } = code;
    wire::CodeInfo {
        id: record.id.to_string(),
        number: record.number,
        method: record.method().as_str().to_owned(),
        status: status.as_str().to_owned(),
        created_at_ms: record.created_at,
        expires_at_ms: record.expires_at,
        attempts: u32::try_from(record.attempts.len()).unwrap_or(u32::MAX),
        issued_by: record.issued_by,
        device_name: record.device_name,
    }
}

fn request_info(request: PairingView) -> wire::RequestInfo {
    let PairingView {
        record,
        status,
        replaces_device,
    } = request;
    wire::RequestInfo {
        id: record.id.to_string(),
        device_id: record.device_id.to_string(),
        code_id: record.code_id.to_string(),
        method: record.method().as_str().to_owned(),
        status: status.as_str().to_owned(),
        key_fingerprint: record.csr_spki.to_string(),
        served_by: record.served_by,
        created_at_ms: record.created_at,
        expires_at_ms: record.expires_at,
        certificate_fingerprint: record
            .certificate
            .map(|found| found.to_string())
            .unwrap_or_default(),
        decided_at_ms: record.decided_at,
        device_name: record.device_name,
        sas: record.sas,
        source: record.source,
        decided_by: record.decided_by,
        reason: record.reason,
        replaces_device,
    }
}
