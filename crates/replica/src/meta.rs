//! What a data folder says about itself, and where Raft's own records lie in `Family::Meta`.
//!
//! One record each: identity, vote, committed, purged, applied (with the active generation), snapshot.
//! Invariant: a folder belongs to one cluster and one replica for ever; opening it as another, or with an
//! older binary than wrote it, is refused before anything is written.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use palyra_proto::peer::v1 as wire;
use palyra_state::Id;
use palyra_storage::{Batch, Engine, Family, Snapshot};
use prost::Message;

use crate::codec::{self, Malformed};
use crate::types::{LogId, StoredMembership, Vote};

/// The layout of a data folder that this binary writes and reads.
pub(crate) const FORMAT: u32 = 1;

const IDENTITY: &[u8] = b"identity";
const VOTE: &[u8] = b"vote";
const COMMITTED: &[u8] = b"committed";
const PURGED: &[u8] = b"purged";
const APPLIED: &[u8] = b"applied";
const SNAPSHOT: &[u8] = b"snapshot";

/// Whose data a folder holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster, as given at its birth.
    pub cluster_id: Id,
    /// The replica; ids are never used twice in a cluster.
    pub replica_id: u64,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "replica {} of cluster {}", self.replica_id, self.cluster_id)
    }
}

#[derive(Clone, PartialEq, Message)]
struct WireIdentity {
    #[prost(uint32, tag = "1")]
    format: u32,
    #[prost(bytes = "bytes", tag = "2")]
    cluster_id: Bytes,
    #[prost(uint64, tag = "3")]
    replica_id: u64,
}

/// Position of the state machine; written with the state itself.
#[derive(Clone, PartialEq, Message)]
struct WireApplied {
    #[prost(message, optional, tag = "1")]
    last: Option<wire::LogId>,
    #[prost(message, optional, tag = "2")]
    membership: Option<wire::StoredMembership>,
    #[prost(uint32, tag = "3")]
    generation: u32,
}

/// The part of it that a view needs; the membership is passed over.
#[derive(Clone, PartialEq, Message)]
struct WirePlace {
    #[prost(message, optional, tag = "1")]
    last: Option<wire::LogId>,
    #[prost(uint32, tag = "3")]
    generation: u32,
}

/// Up to which entry a view shows the state, and under which key prefix that lies.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Place {
    /// The last entry that was applied.
    pub(crate) last: Option<LogId>,
    /// Prefix of the state's keys.
    pub(crate) generation: u32,
}

/// How far the state machine is, and under which key prefix its state lies.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Applied {
    /// The last entry that was applied.
    pub(crate) last: Option<LogId>,
    /// The last membership among applied entries.
    pub(crate) membership: StoredMembership,
    /// Prefix of the state's keys.
    pub(crate) generation: u32,
}

/// Why a data folder cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It holds the data of somebody else.
    #[error(
        "the data folder belongs to {found}, but the configuration says {expected}; point the \
         configuration at the right folder, or join with an empty one"
    )]
    NotOurs {
        /// Whose data it is.
        found: Identity,
        /// Whose data was expected.
        expected: Identity,
    },
    /// A newer version wrote it.
    #[error(
        "the data folder has format {found}, this binary reads up to {supported}; start the version \
         that wrote it, or a newer one"
    )]
    FromTheFuture {
        /// Format of the folder.
        found: u32,
        /// Newest format that this binary knows.
        supported: u32,
    },
    /// A record cannot be read.
    #[error(
        "the data folder is damaged: {0}; restore it from a copy, or wipe it and join again under a new id"
    )]
    Damaged(String),
    /// The storage engine failed.
    #[error("the storage engine failed: {0}; check the disk and the folder's permissions")]
    Storage(String),
    /// The configuration is impossible.
    #[error("the replica's configuration is wrong: {0}")]
    Config(String),
}

impl From<palyra_storage::EngineError> for OpenError {
    fn from(error: palyra_storage::EngineError) -> Self {
        OpenError::Storage(error.to_string())
    }
}

impl From<Malformed> for OpenError {
    fn from(error: Malformed) -> Self {
        OpenError::Damaged(error.to_string())
    }
}

/// Whose data an engine holds; `None` when it is empty.
///
/// # Errors
/// [`OpenError::FromTheFuture`], [`OpenError::Damaged`] or [`OpenError::Storage`].
pub fn identity(engine: &dyn Engine) -> Result<Option<Identity>, OpenError> {
    let Some(frame) = engine.get(Family::Meta, IDENTITY)? else {
        return Ok(None);
    };
    let record: WireIdentity = codec::unseal(&frame)?;
    if record.format > FORMAT {
        return Err(OpenError::FromTheFuture {
            found: record.format,
            supported: FORMAT,
        });
    }
    let cluster_id = Id::from_slice(&record.cluster_id)
        .ok_or_else(|| OpenError::Damaged("its cluster id is no id".to_owned()))?;
    Ok(Some(Identity {
        cluster_id,
        replica_id: record.replica_id,
    }))
}

/// Checks that the engine is ours, or makes an empty one ours, durably.
pub(crate) fn claim(engine: &dyn Engine, expected: Identity) -> Result<(), OpenError> {
    match identity(engine)? {
        Some(found) if found == expected => Ok(()),
        Some(found) => Err(OpenError::NotOurs { found, expected }),
        None => {
            let record = WireIdentity {
                format: FORMAT,
                cluster_id: Bytes::copy_from_slice(&expected.cluster_id.to_bytes()),
                replica_id: expected.replica_id,
            };
            let mut batch = Batch::new();
            batch.put(Family::Meta, IDENTITY, codec::seal(&record));
            engine.write(batch)?;
            engine.sync()?;
            Ok(())
        }
    }
}

fn record<M: Message + Default>(engine: &dyn Engine, key: &[u8]) -> Result<Option<M>, OpenError> {
    Ok(engine
        .get(Family::Meta, key)?
        .map(|frame| codec::unseal(&frame))
        .transpose()?)
}

pub(crate) fn load_vote(engine: &dyn Engine) -> Result<Option<Vote>, OpenError> {
    Ok(record::<wire::Vote>(engine, VOTE)?.map(|vote| codec::to_vote(&vote)))
}

pub(crate) fn load_committed(engine: &dyn Engine) -> Result<Option<LogId>, OpenError> {
    Ok(record::<wire::LogId>(engine, COMMITTED)?.map(|id| codec::to_log_id(&id)))
}

pub(crate) fn load_purged(engine: &dyn Engine) -> Result<Option<LogId>, OpenError> {
    Ok(record::<wire::LogId>(engine, PURGED)?.map(|id| codec::to_log_id(&id)))
}

/// Whether a snapshot was ever recorded: from then on the live state may be sent as one.
pub(crate) fn has_snapshot(engine: &dyn Engine) -> Result<bool, OpenError> {
    Ok(engine.get(Family::Meta, SNAPSHOT)?.is_some())
}

pub(crate) fn load_applied(engine: &dyn Engine) -> Result<Applied, OpenError> {
    decode_applied(engine.get(Family::Meta, APPLIED)?)
}

/// The same without the membership: views are made for every read.
pub(crate) fn pinned_place(snapshot: &dyn Snapshot) -> Result<Place, OpenError> {
    let Some(frame) = snapshot.get(Family::Meta, APPLIED)? else {
        return Ok(Place::default());
    };
    let record: WirePlace = codec::unseal(&frame)?;
    Ok(Place {
        last: codec::to_maybe_log_id(record.last.as_ref()),
        generation: record.generation,
    })
}

/// The position as a pinned view has it: what is read through the same view is at exactly this position.
pub(crate) fn pinned_applied(snapshot: &Arc<dyn Snapshot>) -> Result<Applied, OpenError> {
    decode_applied(snapshot.get(Family::Meta, APPLIED)?)
}

/// A record that `inspect` reports.
pub(crate) enum Watched {
    Vote(wire::Vote),
    Purged(wire::LogId),
    Applied(wire::LogId),
}

/// What lies under a key of `Family::Meta`, when it is one of those.
pub(crate) fn watched(key: &[u8], frame: &Bytes) -> Option<Watched> {
    match key {
        VOTE => codec::unseal(frame).ok().map(Watched::Vote),
        PURGED => codec::unseal(frame).ok().map(Watched::Purged),
        APPLIED => codec::unseal::<WirePlace>(frame).ok()?.last.map(Watched::Applied),
        _ => None,
    }
}

fn decode_applied(frame: Option<Bytes>) -> Result<Applied, OpenError> {
    let Some(frame) = frame else {
        return Ok(Applied::default());
    };
    let record: WireApplied = codec::unseal(&frame)?;
    Ok(Applied {
        last: codec::to_maybe_log_id(record.last.as_ref()),
        membership: codec::to_stored_membership(record.membership.as_ref())?,
        generation: record.generation,
    })
}

pub(crate) fn put_vote(batch: &mut Batch, vote: &Vote) {
    batch.put(Family::Meta, VOTE, codec::seal(&codec::vote(vote)));
}

pub(crate) fn put_committed(batch: &mut Batch, committed: &LogId) {
    batch.put(Family::Meta, COMMITTED, codec::seal(&codec::log_id(committed)));
}

pub(crate) fn put_purged(batch: &mut Batch, purged: &LogId) {
    batch.put(Family::Meta, PURGED, codec::seal(&codec::log_id(purged)));
}

pub(crate) fn put_applied(batch: &mut Batch, applied: &Applied) {
    let record = WireApplied {
        last: codec::maybe_log_id(applied.last.as_ref()),
        membership: Some(codec::stored_membership(&applied.membership)),
        generation: applied.generation,
    };
    batch.put(Family::Meta, APPLIED, codec::seal(&record));
}

pub(crate) fn put_snapshot(batch: &mut Batch, last: Option<&LogId>) {
    let last = last.map(codec::log_id).unwrap_or_default();
    batch.put(Family::Meta, SNAPSHOT, codec::seal(&last));
}
