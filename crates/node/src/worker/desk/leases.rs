//! Offers, renewals and ends of leases, as they come in and go out.

use std::sync::Arc;

use palyra_client::new_ulid;
use palyra_proto::worker::v1 as wire;
use palyra_proto::worker::v1::worker_message::Body;
use tokio::time::Instant;

use super::{ANSWER_WITHIN, Desk, Phase, RETRY_AFTER, plain_id, stop};
use crate::worker::lease::Task;
use crate::worker::spec::boot_ms;
use crate::worker::store::Record;
use crate::worker::timing;

impl Desk {
    pub(super) fn reconciled(&mut self, reconciled: wire::Reconciled) -> Vec<Body> {
        if !matches!(&self.phase, Phase::Reporting { request_id, .. } if *request_id == reconciled.request_id)
        {
            return Vec::new();
        }
        self.phase = Phase::Ready;
        let mut bodies: Vec<Body> = reconciled.end.iter().flat_map(|end| self.end(end)).collect();
        for (id, held) in &mut self.held {
            let named = reconciled.keep.contains(id) || reconciled.end.iter().any(|end| end.lease_id == *id);
            if !named {
                stop(&held.stop, "unknown");
            }
            if held.renew_at.is_some() {
                held.renew_at = Some(Instant::now());
            }
            // The replica of this session may have heard nothing of it.
            if held.output.rewind() {
                held.output_at = Some(Instant::now());
            }
        }
        let again_at = Instant::now() + ANSWER_WITHIN;
        for call in self.calls.values_mut() {
            call.again_at = again_at;
            bodies.push(call.body.clone());
        }
        bodies.extend(self.renewals(Instant::now()));
        bodies.extend(self.proof.due(Instant::now()));
        bodies
    }

    pub(super) fn offered(&mut self, offer: wire::LeaseOffer) -> Vec<Body> {
        if self.held.contains_key(&offer.lease_id) || !matches!(self.phase, Phase::Ready) {
            // Delivered again; or by a session that was not reconciled, which is a mistake and costs the
            // lease its time.
            return Vec::new();
        }
        let busy = self
            .held
            .values()
            .filter(|held| matches!(held.state, "running" | "finished" | "unclean"))
            .count();
        let full = busy >= self.shared.config.slots as usize;
        if !plain_id(&offer.lease_id) || full || self.stopping {
            let code = if self.stopping { "worker_stopped" } else { "slots" };
            tracing::warn!(lease = offer.lease_id, code, "an offer is refused");
            return vec![self.refusal(&offer, code)];
        }
        tracing::info!(
            lease = offer.lease_id,
            run = offer.run_id,
            tool = offer.tool,
            fence = offer.fence,
            "offered"
        );
        let run_ends = boot_ms().saturating_add(if offer.run_remaining_ms == 0 {
            u64::MAX / 2
        } else {
            offer.run_remaining_ms
        });
        let (held, ears) = self.hold(&offer.lease_id, offer.fence, offer.ttl_ms, run_ends);
        let record = Record {
            lease_id: offer.lease_id.clone(),
            fence: offer.fence,
            run_id: offer.run_id.clone(),
            ..Record::default()
        };
        let output = Arc::clone(&held.output);
        self.held.insert(offer.lease_id.clone(), held);
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(
            Task {
                shared,
                offer,
                ears,
                output,
                record,
                violation: None,
            }
            .run(),
        );
        Vec::new()
    }

    /// Nothing of it is here, and nothing will be.
    fn refusal(&mut self, offer: &wire::LeaseOffer, code: &str) -> Body {
        let request_id = new_ulid();
        let body = Body::Finish(wire::LeaseFinish {
            request_id: request_id.clone(),
            lease_id: offer.lease_id.clone(),
            fence: offer.fence,
            outcome: "refused".to_owned(),
            error_code: code.to_owned(),
            error_message: "the worker has no room for it".to_owned(),
            ..wire::LeaseFinish::default()
        });
        self.ask(&offer.lease_id, request_id, body.clone(), None);
        body
    }

    pub(super) fn end(&mut self, end: &wire::LeaseEnd) -> Vec<Body> {
        if let Some(held) = self.held.get_mut(&end.lease_id) {
            if held.fence == end.fence || end.fence == 0 {
                tracing::info!(lease = end.lease_id, reason = end.reason, "the lease is over");
                held.renew_at = None;
                stop(&held.stop, &end.reason);
            }
            return Vec::new();
        }
        let told = self
            .calls
            .values()
            .any(|call| call.lease_id == end.lease_id && matches!(call.body, Body::Cleaned(_)));
        if told {
            return Vec::new();
        }
        let request_id = new_ulid();
        let body = Body::Cleaned(wire::LeaseCleaned {
            request_id: request_id.clone(),
            lease_id: end.lease_id.clone(),
            fence: end.fence,
            ok: true,
            ..wire::LeaseCleaned::default()
        });
        self.ask(&end.lease_id, request_id, body.clone(), None);
        vec![body]
    }

    pub(super) fn renewed(&mut self, renewed: &wire::RenewAnswer) {
        let Some(sent_ms) = self.sent.remove(&renewed.sequence) else {
            return;
        };
        for lease in &renewed.leases {
            let Some(held) = self
                .held
                .get_mut(&lease.lease_id)
                .filter(|held| held.fence == lease.fence)
            else {
                continue;
            };
            if lease.renewed {
                let kill_at = timing::kill_at(sent_ms, held.ttl_ms, lease.remaining_ms, held.run_ends_ms);
                held.kill_at.send_if_modified(|at| {
                    let later = kill_at > *at;
                    *at = kill_at.max(*at);
                    later
                });
            } else if lease.retry {
                held.renew_at = held.renew_at.map(|at| at.min(Instant::now() + RETRY_AFTER));
            } else {
                tracing::warn!(
                    lease = lease.lease_id,
                    code = lease.code,
                    lease.message,
                    "the lease was not renewed"
                );
                held.renew_at = None;
                stop(&held.stop, "fenced");
            }
        }
    }

    /// One message for all leases that are to be renewed about now.
    pub(super) fn renewals(&mut self, now: Instant) -> Vec<Body> {
        let mut leases = Vec::new();
        for (id, held) in &mut self.held {
            let every = timing::renew_every(held.ttl_ms);
            if held.renew_at.is_some_and(|at| at <= now + every / 4) {
                held.renew_at = Some(now + every);
                leases.push((
                    held.renew_at,
                    wire::LeaseRef {
                        lease_id: id.clone(),
                        fence: held.fence,
                    },
                ));
            }
        }
        if leases.is_empty() {
            return Vec::new();
        }
        self.sequence += 1;
        self.sent.insert(self.sequence, boot_ms());
        // Answers that never came are of no use to anybody.
        while self.sent.len() > 1_024 {
            self.sent.pop_first();
        }
        let leases = leases.into_iter().map(|(_, lease)| lease).collect();
        vec![Body::Renew(wire::LeaseRenew {
            sequence: self.sequence,
            leases,
        })]
    }
}
