//! Reading pairing requests, and what the clock makes of them.

use super::{Request, RequestStatus};
use crate::ids::Id;
use crate::read::Read;
use crate::tables;

/// The pairing request with this id.
#[must_use]
pub fn request(r: &dyn Read, id: Id) -> Option<Request> {
    tables::PAIRINGS.get(r, id)
}

/// Pairing requests by id, from the one after `after` on, at most `limit`.
#[must_use]
pub fn requests(r: &dyn Read, after: Option<Id>, limit: usize) -> Vec<Request> {
    tables::PAIRINGS.page(r, (), after, limit)
}

/// Pairing requests whose id begins with `prefix` (text form, either case), at most `limit`.
#[must_use]
pub fn requests_by_prefix(r: &dyn Read, prefix: &str, limit: usize) -> Vec<Request> {
    let Some((first, last)) = Id::prefix_range(prefix) else {
        return Vec::new();
    };
    tables::PAIRINGS.between(r, first, last, limit)
}

/// Requests that wait for an operator at `now`, by device id.
#[must_use]
pub fn pending(r: &dyn Read, now: u64) -> Vec<Request> {
    let waits = |request: &Request| request_status(request, now) == RequestStatus::PendingApproval;
    pending_rows(r).into_iter().filter(waits).collect()
}

/// The pending request of a device, if it has one.
#[must_use]
pub fn pending_of(r: &dyn Read, device_id: Id) -> Option<Request> {
    tables::PAIRINGS_PENDING
        .get(r, device_id)
        .and_then(|pending| request(r, pending.pairing_id))
}

/// Requests that are written as pending, but that the clock has ended: for the sweeper.
#[must_use]
pub fn due_requests(r: &dyn Read, now: u64) -> Vec<Id> {
    let ended = |request: &Request| request_status(request, now) != RequestStatus::PendingApproval;
    pending_rows(r)
        .iter()
        .filter(|request| ended(request))
        .map(|request| request.id)
        .collect()
}

/// Where a request stands at `now`: a pending one may be expired.
#[must_use]
pub fn request_status(request: &Request, now: u64) -> RequestStatus {
    match request.status() {
        RequestStatus::PendingApproval if now >= request.expires_at => RequestStatus::Expired,
        status => status,
    }
}

/// Requests that are written as pending.
fn pending_rows(r: &dyn Read) -> Vec<Request> {
    let pending = tables::PAIRINGS_PENDING.list(r, (), usize::MAX);
    pending
        .into_iter()
        .filter_map(|pending| request(r, pending.pairing_id))
        .collect()
}
