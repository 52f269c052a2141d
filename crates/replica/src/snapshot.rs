//! A snapshot on its way: header, chunks with checksums, trailer with count and digest.
//!
//! The sender reads pages of a pinned view, so memory stays bounded whatever the state's size. The receiver
//! writes under a generation of its own and hands it over only after the trailer fits. Invariant: a transfer
//! that breaks off leaves nothing behind but a generation that is removed at once, or at the next start.

use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{self, Stream};
use palyra_platform as platform;
use palyra_proto::peer::v1 as wire;
use palyra_state::tables;
use palyra_storage::{Family, Snapshot};
use prost::Message;
use sha2::{Digest, Sha256};
use wire::snapshot_frame::Frame;

use crate::codec::{Malformed, malformed};
use crate::machine::Machine;
use crate::view::disk_key;

/// How chunks are laid out.
pub(crate) const FORMAT: u32 = 1;
/// Bytes of keys and values in one chunk; a single larger value makes a larger chunk.
const CHUNK_BYTES: usize = 512 * 1024;
/// Length of the generation prefix of keys on disk.
const PREFIX: usize = 4;

/// Running digest of the pairs that were sent or received.
#[derive(Default)]
struct Tally {
    hasher: Sha256,
    count: u64,
}

impl Tally {
    fn add(&mut self, pair: &wire::Pair) {
        for part in [&pair.key, &pair.value] {
            self.hasher.update((part.len() as u64).to_be_bytes());
            self.hasher.update(part);
        }
        self.count += 1;
    }

    fn trailer(self) -> wire::SnapshotTrailer {
        wire::SnapshotTrailer {
            count: self.count,
            sha256: self.hasher.finalize().to_vec().into(),
        }
    }
}

enum Stage {
    Header(wire::SnapshotHeader),
    Pairs { after: Vec<u8>, tally: Tally },
    End,
}

/// The frames of a snapshot, read from the pinned view as they are asked for.
pub(crate) fn frames(
    header: wire::SnapshotHeader,
    view: Arc<dyn Snapshot>,
    generation: u32,
) -> impl Stream<Item = Bytes> + Send + 'static {
    stream::unfold(Stage::Header(header), move |stage| {
        let view = view.clone();
        async move {
            let (frame, next) = match stage {
                Stage::Header(header) => {
                    let after = disk_key(generation, &[]);
                    (
                        Frame::Header(header),
                        Stage::Pairs {
                            after,
                            tally: Tally::default(),
                        },
                    )
                }
                Stage::Pairs { after, tally } => {
                    platform::io_point("snapshot.send").await;
                    page(&*view, generation, after, tally)
                }
                Stage::End => return None,
            };
            Some((
                wire::SnapshotFrame { frame: Some(frame) }.encode_to_vec().into(),
                next,
            ))
        }
    })
}

/// Planted: tables that a snapshot lacks, by the first byte of their keys.
fn left_behind(table: u8) -> bool {
    let is = |key: Vec<u8>| key == [table];
    (palyra_fault::planted("snapshot-without-revocations")
        && (is(tables::BANS.key(())) || is(tables::REVOKED.key(()))))
        || (palyra_fault::planted("snapshot-without-journal") && is(tables::JOURNAL.key(())))
}

/// The next chunk, or the trailer after the last.
fn page(view: &dyn Snapshot, generation: u32, from: Vec<u8>, mut tally: Tally) -> (Frame, Stage) {
    let mut pairs = Vec::new();
    let mut bytes = 0;
    let mut after = from.clone();
    let scanned = view.scan(
        Family::State,
        &from,
        &disk_key(generation + 1, &[]),
        &mut |key, value| {
            if bytes > 0 && bytes + key.len() + value.len() > CHUNK_BYTES {
                return ControlFlow::Break(());
            }
            bytes += key.len() + value.len();
            after = [key, &[0]].concat();
            if left_behind(key[PREFIX]) {
                return ControlFlow::Continue(());
            }
            let pair = wire::Pair {
                key: Bytes::copy_from_slice(&key[PREFIX..]),
                value: Bytes::copy_from_slice(value),
            };
            tally.add(&pair);
            pairs.push(pair);
            ControlFlow::Continue(())
        },
    );
    if let Err(error) = scanned {
        platform::abort(&format!("the state cannot be read for a snapshot: {error}"));
    }
    if pairs.is_empty() {
        return (Frame::Trailer(tally.trailer()), Stage::End);
    }
    let pairs: Bytes = wire::Pairs { pairs }.encode_to_vec().into();
    let crc32c = crc32c::crc32c(&pairs);
    (
        Frame::Chunk(wire::SnapshotChunk { pairs, crc32c }),
        Stage::Pairs { after, tally },
    )
}

/// The receiving side of one transfer. Dropping it leaves a generation that the next start removes.
pub(crate) struct Receiver {
    machine: Machine,
    generation: u32,
    tally: Tally,
}

impl Receiver {
    pub(crate) fn new(machine: Machine) -> Receiver {
        let generation = machine.new_generation();
        Receiver {
            machine,
            generation,
            tally: Tally::default(),
        }
    }

    /// Takes a frame after the header; true when it was the trailer and everything fits.
    pub(crate) async fn take(&mut self, body: Bytes) -> Result<bool, Malformed> {
        match wire::SnapshotFrame::decode(body)?.frame {
            Some(Frame::Chunk(chunk)) => self.take_chunk(chunk).await.map(|()| false),
            Some(Frame::Trailer(trailer)) => {
                let found = std::mem::take(&mut self.tally).trailer();
                if found == trailer {
                    return Ok(true);
                }
                Err(Malformed(format!(
                    "the snapshot's trailer announces {} pairs, {} with another digest were received",
                    trailer.count, found.count
                )))
            }
            Some(Frame::Header(_)) => Err(malformed("a second snapshot header")),
            None => Err(malformed("an empty snapshot frame")),
        }
    }

    async fn take_chunk(&mut self, chunk: wire::SnapshotChunk) -> Result<(), Malformed> {
        if crc32c::crc32c(&chunk.pairs) != chunk.crc32c {
            return Err(malformed("a snapshot chunk does not match its checksum"));
        }
        let pairs = wire::Pairs::decode(chunk.pairs)?.pairs;
        for pair in &pairs {
            self.tally.add(pair);
        }
        platform::io_point("snapshot.receive").await;
        self.machine.receive(
            self.generation,
            pairs.into_iter().map(|pair| (pair.key, pair.value)),
        );
        Ok(())
    }

    /// The generation that holds the whole snapshot.
    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    /// Removes what was received.
    pub(crate) fn discard(self) {
        self.machine.discard(self.generation);
    }
}
