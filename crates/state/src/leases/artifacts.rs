//! Files of runs: how they arrive in pieces, and how long they are kept.
//!
//! A file belongs to a run and is named by its digest. Pieces come in order, so that what has arrived is one
//! number. A file whose bytes have another digest is dropped whole. Inputs arrive while the run waits for
//! them; outputs under the live lease, and those of an attempt without a result go with it. What is left is
//! kept as long as the run.

use sha2::{Digest as _, Sha256};

use super::store::{make_room, put_run};
use super::worker::own;
use super::{Artifact, Manifest, PutArtifact, Run, RunState, artifact, run, select, totals};
use crate::actor::Actor;
use crate::ids::{Digest, Id};
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::reply::{ArtifactReceived, Reply};
use crate::tables::{self, Blob};
use crate::txn::Txn;
use crate::{check, limits};

pub(super) fn put(txn: &mut Txn<'_>, command: &PutArtifact) -> Result<Reply, Reject> {
    let found = match command.lease_id {
        Some(lease_id) => {
            let lease = own(txn, lease_id, command.fence)?;
            run(txn, lease.run_id).filter(|run| run.id == command.run_id)
        }
        None => run(txn, command.run_id),
    };
    let found = found.ok_or_else(|| Reject::new(Code::NoSuchRun, [&command.run_id]))?;
    check_piece(command)?;
    if command.lease_id.is_some() {
        check_output(txn, &found, command)?;
    } else {
        check_input(txn, &found, command)?;
    }
    if command.size == 0 {
        // Nothing of it has to be kept.
        return Ok(received(0, true, None));
    }
    let before = artifact(txn, found.id, command.digest).unwrap_or(Artifact {
        digest: command.digest,
        size: command.size,
        received: 0,
        complete: false,
        fence: command.fence,
    });
    let end = command.offset + command.chunk.len() as u64;
    if before.complete || end <= before.received {
        return Ok(received(before.received, before.complete, None));
    }
    if command.offset != before.received {
        return Err(Reject::new(
            Code::PieceOrder,
            [&command.digest, &before.received, &command.offset],
        ));
    }
    check_room(txn, command)?;
    let chunk = Blob {
        bytes: command.chunk.clone(),
    };
    txn.put(
        &tables::ARTIFACT_CHUNKS,
        chunk_key(&found, command.digest, command.offset),
        &chunk,
    );
    let after = Artifact {
        received: end,
        complete: end == before.size,
        ..before
    };
    if !after.complete {
        keep(txn, &found, &after, command.chunk.len() as u64);
        return Ok(received(end, false, None));
    }
    complete(txn, &found, &after, command)
}

/// All bytes are there: are they the right ones?
fn complete(
    txn: &mut Txn<'_>,
    found: &Run,
    after: &Artifact,
    command: &PutArtifact,
) -> Result<Reply, Reject> {
    let mut hasher = Sha256::new();
    for piece in tables::ARTIFACT_CHUNKS.list(txn, (found.id, after.digest), usize::MAX) {
        hasher.update(&piece.bytes);
    }
    let is = Digest::from_bytes(hasher.finalize().into());
    let detail = [
        ("run", found.id.to_string()),
        ("device", worker_of(found, after)),
        ("digest", after.digest.to_string()),
        ("size", after.size.to_string()),
        ("fence", after.fence.to_string()),
    ];
    if is != after.digest {
        let [run_id, device, digest, size, fence] = detail;
        drop_one(txn, found.id, after.digest);
        let mut changed = found.clone();
        changed.artifact_bytes = changed.artifact_bytes.saturating_sub(command.offset);
        put_run(txn, Some(found), &changed);
        let detail = [run_id, device, digest, size, fence, ("is", is.to_string())];
        txn.emit("run.file_dropped", found.id, detail);
        let refusal = Reject::new(Code::FileDigest, [&after.digest, &is]);
        return Ok(received(0, false, Some(refusal)));
    }
    let changed = keep(txn, found, after, command.chunk.len() as u64);
    txn.emit("run.file_arrived", found.id, detail);
    if changed.state() == RunState::AwaitingInput && is_missing_nothing(txn, &changed) {
        let mut waits = changed.clone();
        waits.set_state(RunState::Queued);
        put_run(txn, Some(&changed), &waits);
        txn.emit("run.input_complete", waits.id, [("tool", waits.tool.clone())]);
        select::place(txn, waits.id);
    }
    Ok(received(after.size, true, None))
}

fn received(received: u64, complete: bool, refusal: Option<Reject>) -> Reply {
    Reply::ArtifactReceived(ArtifactReceived {
        received,
        complete,
        refusal,
    })
}

/// The worker that an output comes from.
fn worker_of(found: &Run, file: &Artifact) -> String {
    let worker = found.worker_id.filter(|_| file.fence != 0);
    worker.map_or_else(String::new, |id| id.to_string())
}

/// Counts a piece that has come.
fn keep(txn: &mut Txn<'_>, found: &Run, file: &Artifact, added: u64) -> Run {
    txn.put(&tables::ARTIFACTS, (found.id, file.digest), file);
    let mut changed = found.clone();
    changed.artifact_bytes += added;
    put_run(txn, Some(found), &changed);
    changed
}

fn chunk_key(found: &Run, digest: Digest, offset: u64) -> (Id, Digest, u32) {
    (found.id, digest, (offset / limits::ARTIFACT_CHUNK as u64) as u32)
}

/// Whether the piece is one that a file of this size has.
fn check_piece(command: &PutArtifact) -> Result<(), Reject> {
    let chunk = limits::ARTIFACT_CHUNK as u64;
    let (offset, size) = (command.offset, command.size);
    if size > limits::ARTIFACT_MAX {
        let cause = format_args!("it has {size} bytes; the limit is {}", limits::ARTIFACT_MAX);
        return Err(check::invalid("the file", &cause));
    }
    if (size == 0) != (command.digest == Digest::of(b"")) {
        return Err(check::invalid("the file", &"its digest is that of another size"));
    }
    if !offset.is_multiple_of(chunk) || (offset >= size && size != 0) || (offset != 0 && size == 0) {
        let cause = format_args!("offset {offset} is none of a file of {size} bytes in pieces of {chunk}");
        return Err(check::invalid("the piece", &cause));
    }
    let whole = (size - offset).min(chunk);
    if command.chunk.len() as u64 != whole {
        let cause = format_args!("it has {} bytes and should have {whole}", command.chunk.len());
        return Err(check::invalid("the piece", &cause));
    }
    Ok(())
}

fn check_input(txn: &Txn<'_>, found: &Run, command: &PutArtifact) -> Result<(), Reject> {
    if found.requested_by != txn.actor.to_string() {
        return Err(Reject::new(Code::NotYours, [txn.actor, &found.requested_by]));
    }
    let named = found.inputs.as_ref().is_some_and(|inputs| {
        let entries = &mut inputs.entries.iter();
        entries.any(|entry| entry.stored && entry.digest == command.digest && entry.size == command.size)
    });
    if !named {
        return Err(Reject::new(Code::NoSuchFile, [&found.id, &command.digest]));
    }
    let is_there = artifact(txn, found.id, command.digest).is_some_and(|file| file.complete);
    if found.state() != RunState::AwaitingInput && !is_there && command.size != 0 {
        return Err(Reject::new(
            Code::RunTakesNoInput,
            [&found.id, &found.state().as_str()],
        ));
    }
    Ok(())
}

fn check_output(txn: &Txn<'_>, found: &Run, command: &PutArtifact) -> Result<(), Reject> {
    let known = tables::ARTIFACTS.list(txn, found.id, usize::MAX);
    match known.iter().find(|file| file.digest == command.digest) {
        Some(file) if file.size == command.size => return Ok(()),
        Some(_) => return Err(Reject::new(Code::NoSuchFile, [&found.id, &command.digest])),
        None => {}
    }
    let outputs: Vec<&Artifact> = known.iter().filter(|file| file.fence != 0).collect();
    check::count("the output", outputs.len() + 1, limits::MANIFEST)?;
    let sum: u64 = outputs.iter().map(|file| file.size).sum::<u64>() + command.size;
    if sum > limits::ARTIFACTS_OF_RUN {
        let cause = format!(
            "{sum} bytes are to be kept; the limit of a run is {}",
            limits::ARTIFACTS_OF_RUN
        );
        return Err(Reject::new(Code::BadManifest, [&"output", &cause]));
    }
    Ok(())
}

/// Makes room for a piece: files of ended runs go first.
fn check_room(txn: &mut Txn<'_>, command: &PutArtifact) -> Result<(), Reject> {
    let size = command.chunk.len() as u64;
    let limit = if matches!(txn.actor, Actor::Node { .. }) {
        limits::ARTIFACT_BYTES
    } else {
        limits::INPUT_BYTES
    };
    let open = totals(txn).open_artifact_bytes;
    if open + size > limit {
        return Err(Reject::new(Code::FilesFull, [&open, &limit]));
    }
    make_room(txn, size);
    let kept = totals(txn).artifact_bytes;
    // Of runs that have ended and whose leases have not.
    if kept + size > limits::ARTIFACT_BYTES {
        return Err(Reject::new(Code::FilesFull, [&kept, &limits::ARTIFACT_BYTES]));
    }
    Ok(())
}

/// Digests of input files that have not arrived, in order.
#[must_use]
pub fn missing(r: &dyn Read, found: &Run) -> Vec<Digest> {
    absent(r, found.id, found.inputs.as_ref())
}

fn is_missing_nothing(r: &dyn Read, found: &Run) -> bool {
    missing(r, found).is_empty()
}

/// Files of a list that are to be kept and have not arrived.
pub(super) fn absent(r: &dyn Read, run_id: Id, list: Option<&Manifest>) -> Vec<Digest> {
    let stored = list.map(Manifest::stored).unwrap_or_default();
    let is_there = |digest: &Digest| artifact(r, run_id, *digest).is_some_and(|file| file.complete);
    stored.into_keys().filter(|digest| !is_there(digest)).collect()
}

/// Drops outputs that the list does not name, and says what is left of `run` then.
pub(super) fn keep_outputs(txn: &mut Txn<'_>, run: &mut Run, list: Option<&Manifest>) {
    let named = list.map(Manifest::stored).unwrap_or_default();
    for file in tables::ARTIFACTS.list(txn, run.id, usize::MAX) {
        if file.fence != 0 && !named.contains_key(&file.digest) {
            drop_one(txn, run.id, file.digest);
            run.artifact_bytes = run.artifact_bytes.saturating_sub(file.received);
        }
    }
}

/// Drops all files of a run.
pub(super) fn drop_all(txn: &mut Txn<'_>, run_id: Id) {
    for file in tables::ARTIFACTS.list(txn, run_id, usize::MAX) {
        drop_one(txn, run_id, file.digest);
    }
}

fn drop_one(txn: &mut Txn<'_>, run_id: Id, digest: Digest) {
    for key in tables::ARTIFACT_CHUNKS.suffixes(txn, (run_id, digest), usize::MAX) {
        if let Ok(number) = key.try_into().map(u32::from_be_bytes) {
            txn.delete(&tables::ARTIFACT_CHUNKS, (run_id, digest, number));
        }
    }
    txn.delete(&tables::ARTIFACTS, (run_id, digest));
}
