//! The wire form of what workers say and hear; both transports carry it as it is.
//!
//! What never lives here: what a message means (`control::workers`).

use palyra_control::{
    CleanedUp, Error, Finished, FromWorker, HeldLease, LeaseName, Offer, Refusal, Statement, ToWorker,
};
use palyra_proto::worker::v1 as wire;
use palyra_proto::worker::v1::worker_message::Body;
use palyra_proto::worker::v1::worker_order::Body as Order;
use palyra_state::reply::MustEnd;

use crate::convert::run::{limits, manifest, manifest_wire, scope};

/// What a worker says.
pub(super) fn inbound(message: wire::WorkerMessage) -> Result<FromWorker, Error> {
    let says = |request_id, statement| FromWorker::Says {
        request_id,
        statement,
    };
    Ok(match message.body {
        None => {
            let cause = "a message of a worker without a body";
            return Err(Refusal::Protocol { cause }.into());
        }
        Some(Body::Report(report)) => {
            let held = report.held.into_iter().map(held_lease).collect();
            says(report.request_id, Statement::Report { held })
        }
        Some(Body::Challenge(ask)) => says(ask.request_id, Statement::AskChallenge),
        Some(Body::Attest(attest)) => says(
            attest.request_id,
            Statement::Attest {
                statement: attest.statement,
                public_key: attest.public_key,
                signature: attest.signature,
            },
        ),
        Some(Body::Accept(accept)) => {
            let lease = lease(accept.lease_id, accept.fence);
            says(accept.request_id, Statement::Accept(lease))
        }
        Some(Body::Renew(renew)) => FromWorker::Renew {
            sequence: renew.sequence,
            leases: renew
                .leases
                .into_iter()
                .map(|named| lease(named.lease_id, named.fence))
                .collect(),
        },
        Some(Body::Finish(finish)) => finished(finish)?,
        Some(Body::Cleaned(cleaned)) => cleaned_up(cleaned),
        Some(Body::Violation(violation)) => says(
            violation.request_id,
            Statement::Violation {
                lease: lease(violation.lease_id, violation.fence),
                kind: violation.kind,
                message: violation.message,
            },
        ),
        Some(Body::Put(put)) => piece(put),
        Some(Body::Get(get)) => FromWorker::Get {
            request_id: get.request_id,
            lease: lease(get.lease_id, get.fence),
            digest: get.digest,
            offset: get.offset,
        },
        Some(Body::Log(log)) => FromWorker::Output {
            lease: lease(log.lease_id, log.fence),
            first: log.first,
            lines: log.lines,
            progress: None,
        },
        Some(Body::Progress(progress)) => FromWorker::Output {
            lease: lease(progress.lease_id, progress.fence),
            first: 0,
            lines: Vec::new(),
            progress: Some((progress.percent, progress.message)),
        },
    })
}

fn lease(id: String, fence: u64) -> LeaseName {
    LeaseName { id, fence }
}

fn held_lease(held: wire::HeldLease) -> HeldLease {
    HeldLease {
        lease: lease(held.lease_id, held.fence),
        state: held.state,
        message: held.message,
    }
}

fn cleaned_up(cleaned: wire::LeaseCleaned) -> FromWorker {
    let up = CleanedUp {
        ok: cleaned.ok,
        message: cleaned.message,
        removed_files: cleaned.removed_files,
        removed_bytes: cleaned.removed_bytes,
    };
    FromWorker::Says {
        request_id: cleaned.request_id,
        statement: Statement::Cleaned(lease(cleaned.lease_id, cleaned.fence), up),
    }
}

fn piece(put: wire::ArtifactPut) -> FromWorker {
    FromWorker::Says {
        request_id: put.request_id,
        statement: Statement::Put {
            lease: lease(put.lease_id, put.fence),
            digest: put.digest,
            size: put.size,
            offset: put.offset,
            chunk: put.chunk,
        },
    }
}

fn finished(finish: wire::LeaseFinish) -> Result<FromWorker, Error> {
    let named = lease(finish.lease_id, finish.fence);
    let finished = Finished {
        // What was refused was not started, and has no exit code.
        exit_code: (finish.outcome != "refused").then_some(finish.exit_code),
        outcome: finish.outcome,
        result: finish.result,
        outputs: finish.outputs.map(manifest).transpose()?,
        error_code: finish.error_code,
        error_message: finish.error_message,
        log_tail: finish.log_tail,
        usage: finish.usage.into_iter().collect(),
        sandbox: finish.sandbox,
    };
    Ok(FromWorker::Says {
        request_id: finish.request_id,
        statement: Statement::Finish(named, Box::new(finished)),
    })
}

/// What a worker is told.
pub(super) fn order(message: ToWorker) -> wire::WorkerOrder {
    let body = match message {
        ToWorker::Challenge(challenge) => Order::Challenge(wire::Challenge {
            nonce: challenge.nonce.to_bytes().to_vec().into(),
            expires_in_ms: challenge.expires_in_ms,
            reason: challenge.reason.to_owned(),
            now_ms: challenge.now_ms,
            cluster_id: challenge.cluster_id.to_bytes().to_vec().into(),
            max_life_ms: challenge.max_life_ms,
        }),
        ToWorker::Attested(answer) => Order::Attested(wire::AttestAnswer {
            request_id: answer.request_id,
            admitted: answer.admitted,
            code: answer.code,
            message: answer.message,
            next: answer.next,
            evidence: answer.evidence.to_owned(),
            expires_in_ms: answer.expires_in_ms,
        }),
        ToWorker::Offer(offer) => Order::Offer(lease_offer(*offer)),
        ToWorker::Renewed { sequence, leases } => Order::Renewed(wire::RenewAnswer {
            sequence,
            leases: leases
                .into_iter()
                .map(|renewed| wire::RenewedLease {
                    lease_id: renewed.lease.id,
                    fence: renewed.lease.fence,
                    renewed: renewed.renewed,
                    code: renewed.code,
                    message: renewed.message,
                    retry: renewed.retry,
                    remaining_ms: renewed.remaining_ms,
                })
                .collect(),
        }),
        ToWorker::Answer(answer) => Order::Answer(wire::Answer {
            request_id: answer.request_id,
            accepted: answer.accepted,
            code: answer.code,
            message: answer.message,
            retry: answer.retry,
        }),
        ToWorker::End(end) => Order::End(lease_end(end)),
        ToWorker::Cleanup { reason } => Order::Cleanup(wire::CleanupAsk { reason }),
        ToWorker::Reconciled {
            request_id,
            keep,
            end,
        } => Order::Reconciled(wire::Reconciled {
            request_id,
            keep: keep.iter().map(ToString::to_string).collect(),
            end: end.into_iter().map(lease_end).collect(),
        }),
        ToWorker::Chunk(chunk) => Order::Chunk(wire::ArtifactChunk {
            request_id: chunk.request_id,
            digest: chunk.digest,
            size: chunk.size,
            offset: chunk.offset,
            chunk: chunk.chunk,
            code: chunk.code,
            message: chunk.message,
        }),
    };
    wire::WorkerOrder { body: Some(body) }
}

fn lease_offer(offer: Offer) -> wire::LeaseOffer {
    wire::LeaseOffer {
        lease_id: offer.lease_id.to_string(),
        run_id: offer.run_id.to_string(),
        attempt: offer.attempt,
        fence: offer.fence,
        slot: offer.slot,
        ttl_ms: offer.ttl_ms,
        remaining_ms: offer.remaining_ms,
        run_remaining_ms: offer.run_remaining_ms,
        tool: offer.tool,
        params: offer.params,
        inputs: offer.inputs.map(manifest_wire),
        scope: offer.scope.map(scope),
        limits: offer.limits.map(limits),
        effect: offer.effect.to_owned(),
    }
}

fn lease_end(end: MustEnd) -> wire::LeaseEnd {
    wire::LeaseEnd {
        lease_id: end.lease_id.to_string(),
        fence: end.fence,
        reason: end.reason,
    }
}
