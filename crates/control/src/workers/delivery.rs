//! What a worker is told of its leases: offers, ends, and pieces of files. The state is the outbox.
//!
//! What never lives here: decisions. Each row of the feed is a hint to look at the state again. Invariants: a
//! lease is offered in the session that it was granted in, by the replica that holds it, and after the worker
//! was reconciled; what waits for the reader is ids, and is read from the state when the reader comes for it; a
//! piece of a file goes to the worker that has its run leased, under the present fence, and to nobody else.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use palyra_state::leases::{self, Lease, LeaseState};
use palyra_state::reply::MustEnd;
use palyra_state::{Code, Digest, Id, Read, Reject, Row};

use super::messages::{Chunk, LeaseName, Offer, ToWorker};
use super::session::digest_of;
use crate::control::Control;
use crate::error::Error;
use crate::outbox::{End, Waiting};
use crate::registry::Entry;
use crate::selector::parse_id;

/// A question for a piece of a file, as it waits.
#[derive(Debug, Clone)]
pub(crate) struct ChunkAsk {
    request_id: String,
    lease: LeaseName,
    digest: Bytes,
    offset: u64,
}

/// The workers that rows of the journal may be news for.
pub(crate) fn concerned(rows: &[Row]) -> BTreeSet<Id> {
    let of = |row: &Row| match row.action.split_once('.')?.0 {
        "lease" => Id::parse(row.detail.get("device")?),
        "worker" => Id::parse(&row.subject),
        _ => None,
    };
    rows.iter().filter_map(of).collect()
}

impl Control {
    /// Something happened to these workers or their leases.
    pub(crate) fn on_workers(&self, workers: BTreeSet<Id>) {
        for id in workers {
            for entry in self.registry().of_device(id) {
                self.deliver_work(&entry);
                self.look_after(&entry);
            }
        }
    }

    /// Something happened to all workers: they are held to something else.
    pub(crate) fn on_fleet_policy(&self) {
        for entry in self.registry().all() {
            self.look_after(&entry);
        }
    }

    /// Tells a worker what is due: leases that it is given, and leases that it must end.
    pub(crate) fn deliver_work(&self, entry: &Arc<Entry>) {
        let fits = {
            let mut seat = entry.worker.lock();
            if !seat.reconciled || entry.outbox.end().is_some() {
                return;
            }
            // Looked at under the lock, so that an older view cannot undo what a newer one has told.
            let view = self.replica().view();
            let offers: BTreeSet<Id> = leases::offers(&view, entry.device_id, entry.epoch())
                .iter()
                .map(|lease| lease.id)
                .collect();
            let ends = leases::to_end(&view, entry.device_id);
            seat.offered.retain(|id| offers.contains(id));
            seat.told.retain(|id| ends.iter().any(|end| end.lease_id == *id));
            let mut fits = true;
            for id in offers {
                fits &= !seat.offered.insert(id) || entry.outbox.put(Waiting::Offer(id));
            }
            for end in ends.into_iter().filter_map(|end| worth_telling(&view, end)) {
                fits &= !seat.told.insert(end.lease_id)
                    || entry.outbox.put(Waiting::Worker(Box::new(ToWorker::End(end))));
            }
            fits
        };
        if !fits {
            self.end_session(entry, End::SlowReader);
        }
    }

    /// The lease as it is offered, if it still is.
    pub(crate) fn lease_offer(&self, entry: &Entry, id: Id) -> Option<ToWorker> {
        let view = self.replica().view();
        let lease = leases::lease(&view, id)?;
        let wanted = lease.state() == LeaseState::Granted
            && lease.worker_id == entry.device_id
            && lease.epoch == entry.epoch();
        let run = leases::run(&view, lease.run_id).filter(|_| wanted)?;
        let now = self.now_ms(&view);
        let remaining_ms = lease.deadline_at.saturating_sub(now);
        if remaining_ms == 0 {
            return None;
        }
        Some(ToWorker::Offer(Box::new(Offer {
            lease_id: id,
            run_id: run.id,
            attempt: lease.attempt,
            fence: lease.fence,
            slot: lease.slot,
            ttl_ms: lease.ttl,
            remaining_ms,
            run_remaining_ms: run.deadline_at.saturating_sub(now),
            effect: run.effect().as_str(),
            tool: run.tool,
            params: leases::params(&view, run.id).unwrap_or_default(),
            inputs: run.inputs,
            scope: run.scope,
            limits: run.limits,
        })))
    }

    /// A worker wants a piece of a file: it waits until the reader comes for it.
    pub(super) fn ask_chunk(
        &self,
        entry: &Arc<Entry>,
        request_id: String,
        lease: LeaseName,
        digest: Bytes,
        offset: u64,
    ) {
        let ask = ChunkAsk {
            request_id,
            lease,
            digest,
            offset,
        };
        if !entry.worker.begin_chunk() {
            let busy = Error::Busy {
                what: "pieces of files that this session waits for",
            };
            return self.tell_worker(entry, ToWorker::Chunk(no_chunk(ask, &busy)));
        }
        if !entry.outbox.put(Waiting::Chunk(Box::new(ask))) {
            self.end_session(entry, End::SlowReader);
        }
    }

    /// The piece, as it is now.
    pub(crate) fn chunk(&self, entry: &Entry, ask: ChunkAsk) -> ToWorker {
        entry.worker.end_chunk();
        match self.find_chunk(entry, &ask) {
            Ok((size, chunk)) => ToWorker::Chunk(Chunk {
                request_id: ask.request_id,
                digest: ask.digest,
                size,
                offset: ask.offset,
                chunk,
                ..Chunk::default()
            }),
            Err(error) => ToWorker::Chunk(no_chunk(ask, &error)),
        }
    }

    fn find_chunk(&self, entry: &Entry, ask: &ChunkAsk) -> Result<(u64, Bytes), Error> {
        let view = self.replica().view();
        let lease = own_lease(&view, entry, &ask.lease)?;
        let digest = digest_of(&ask.digest)?;
        piece(&view, lease.run_id, digest, ask.offset)
    }
}

/// A lease that a worker must end, with the reason that its end had. One that it has finished itself is not
/// told: it is cleaning up; when its deadline has passed without a word of it, it is.
fn worth_telling(view: &dyn Read, mut end: MustEnd) -> Option<MustEnd> {
    let Some(lease) = leases::lease(view, end.lease_id) else {
        return Some(end);
    };
    let over = lease.state() == LeaseState::Ended;
    let finished = lease.end_reason() == leases::EndReason::Finished;
    if finished && !over {
        return None;
    }
    if !finished {
        end.reason = lease.end_reason().as_str().to_owned();
    }
    Some(end)
}

fn no_chunk(ask: ChunkAsk, error: &Error) -> Chunk {
    Chunk {
        request_id: ask.request_id,
        digest: ask.digest,
        offset: ask.offset,
        code: error.code(),
        message: error.to_string(),
        ..Chunk::default()
    }
}

/// The live lease that a worker names, if it is its own and the fence is the present one.
pub(super) fn own_lease(view: &dyn Read, entry: &Entry, named: &LeaseName) -> Result<Lease, Error> {
    let id = parse_id("lease_id", &named.id)?;
    let found = leases::lease(view, id).ok_or_else(|| Reject::new(Code::NoSuchLease, [&id]))?;
    if found.worker_id != entry.device_id {
        return Err(Reject::new(Code::LeaseForeign, [&id]).into());
    }
    if found.fence != named.fence {
        let thing = format!("lease {id}");
        return Err(Reject::new(Code::FenceStale, [&thing, &found.fence, &named.fence]).into());
    }
    if !found.is_live() {
        let (state, why) = (found.state().as_str(), found.end_reason().as_str());
        return Err(Reject::new(Code::LeaseOver, [&id, &state, &why]).into());
    }
    Ok(found)
}

/// The piece of a whole file of a run that begins at `offset`, with the file's size.
pub(crate) fn piece(view: &dyn Read, run_id: Id, digest: Digest, offset: u64) -> Result<(u64, Bytes), Error> {
    let none = || Error::from(Reject::new(Code::NoSuchFile, [&run_id, &digest]));
    let file = leases::artifact(view, run_id, digest)
        .filter(|file| file.complete)
        .ok_or_else(none)?;
    if file.size == 0 && offset == 0 {
        return Ok((0, Bytes::new()));
    }
    let chunk = leases::artifact_chunk(view, run_id, digest, offset).filter(|_| offset < file.size);
    let chunk = chunk.ok_or_else(|| {
        let next = format!("ask for a multiple of {}", palyra_state::limits::ARTIFACT_CHUNK);
        Error::invalid(
            "offset",
            format!("no piece begins at {offset} of {}", file.size),
            next,
        )
    })?;
    Ok((file.size, chunk))
}
