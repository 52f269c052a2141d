//! `EnrolService`: machines that want to become nodes.

use palyra_control::{BeginPin, FinishPin, ProofAccepted, ProveTicket, RecoverRequest};
use palyra_proto::pairing::v1 as wire;
use palyra_proto::pairing::v1::enrol_service_server::EnrolService;
use tonic::{Request, Response, Status};

use super::{Gateway, convert};

#[tonic::async_trait]
impl EnrolService for Gateway {
    async fn hello(
        &self,
        request: Request<wire::HelloRequest>,
    ) -> Result<Response<wire::HelloResponse>, Status> {
        let source = self.enrol_source(&request)?;
        let hello = self.control.hello(&source).map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::HelloResponse {
            cluster_id: hello.cluster_id.to_string(),
            server_nonce: hello.server_nonce.to_vec().into(),
            replica_id: hello.replica_id,
        }))
    }

    async fn begin_pin(
        &self,
        request: Request<wire::BeginPinRequest>,
    ) -> Result<Response<wire::BeginPinResponse>, Status> {
        let source = self.enrol_source(&request)?;
        let begin = request.into_inner();
        let begin = BeginPin {
            code_number: begin.code_number,
            device_id: begin.device_id,
            ke1: begin.ke1,
            csr_sha256: begin.csr_sha256,
            node_nonce: begin.node_nonce,
        };
        let begun = self
            .control
            .begin_pin(&source, begin)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::BeginPinResponse {
            attempt_id: begun.attempt_id.to_string(),
            code_id: begun.code_id.to_string(),
            cluster_id: begun.cluster_id.to_string(),
            ke2: begun.ke2.into(),
            server_nonce: begun.server_nonce.to_vec().into(),
            replica_id: begun.replica_id,
            tries_left: begun.tries_left,
        }))
    }

    async fn finish_pin(
        &self,
        request: Request<wire::FinishPinRequest>,
    ) -> Result<Response<wire::ProofAccepted>, Status> {
        let source = self.enrol_source(&request)?;
        let finish = request.into_inner();
        let finish = FinishPin {
            attempt_id: finish.attempt_id,
            ke3: finish.ke3,
            csr: finish.csr,
            proof: finish.proof,
            device_name: finish.device_name,
        };
        let accepted = self
            .control
            .finish_pin(&source, finish)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(self.proof_accepted(accepted)))
    }

    async fn prove_ticket(
        &self,
        request: Request<wire::ProveTicketRequest>,
    ) -> Result<Response<wire::ProofAccepted>, Status> {
        let source = self.enrol_source(&request)?;
        let ticket = request.into_inner();
        let ticket = ProveTicket {
            ticket_id: ticket.ticket_id,
            device_id: ticket.device_id,
            csr: ticket.csr,
            node_nonce: ticket.node_nonce,
            server_nonce: ticket.server_nonce,
            proof: ticket.proof,
            device_name: ticket.device_name,
        };
        let accepted = self
            .control
            .prove_ticket(&source, ticket)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(self.proof_accepted(accepted)))
    }

    async fn fetch(
        &self,
        request: Request<wire::FetchRequest>,
    ) -> Result<Response<wire::FetchResponse>, Status> {
        self.enrol_source(&request)?;
        let fetch = request.into_inner();
        let fetched = self
            .control
            .fetch(&fetch.pairing_id, &fetch.fetch_token, fetch.wait_ms.into())
            .await
            .map_err(|error| self.fail(error))?;
        let state = match fetched.status {
            // Whoever fetches again, because an answer was lost, has been approved all the same.
            palyra_state::pairing::RequestStatus::Completed => palyra_state::pairing::RequestStatus::Approved,
            other => other,
        };
        Ok(Response::new(wire::FetchResponse {
            state: state.as_str().to_owned(),
            reason: fetched.reason,
            chain: convert::chain(fetched.chain),
            trust: convert::trust_bundle(&fetched.trust, self.control.endpoints()),
        }))
    }

    async fn recover(
        &self,
        request: Request<wire::RecoverRequest>,
    ) -> Result<Response<wire::RecoverResponse>, Status> {
        let source = self.enrol_source(&request)?;
        let recover = request.into_inner();
        let recover = RecoverRequest {
            device_id: recover.device_id,
            certificate_sha256: recover.certificate_sha256,
            csr: recover.csr,
            counter: recover.counter,
            node_nonce: recover.node_nonce,
            server_nonce: recover.server_nonce,
            signature: recover.signature,
        };
        let recovered = self
            .control
            .recover(&source, recover)
            .await
            .map_err(|error| self.fail(error))?;
        Ok(Response::new(wire::RecoverResponse {
            chain: convert::chain(recovered.chain),
            trust: convert::trust_bundle(&recovered.trust, self.control.endpoints()),
            counter: recovered.counter,
        }))
    }
}

impl Gateway {
    fn proof_accepted(&self, accepted: ProofAccepted) -> wire::ProofAccepted {
        wire::ProofAccepted {
            pairing_id: accepted.pairing_id.to_string(),
            sas: accepted.sas,
            trust: convert::trust_bundle(&accepted.trust, self.control.endpoints()),
            server_proof: accepted.server_proof.to_vec().into(),
            expires_at_ms: accepted.expires_at_ms,
        }
    }
}
