//! Encodings of Raft's own records, on disk and between replicas: prost messages of `palyra.peer.v1`.
//!
//! openraft's types are never serialised themselves: it promises no stable format. A record on disk is a
//! frame: one format byte, CRC-32C of the payload (little endian), the payload. Invariant: what does not
//! decode is an error that stops the replica or ends the stream; nothing is skipped.

use std::collections::BTreeSet;
use std::fmt;

use bytes::Bytes;
use openraft::{EmptyNode, EntryPayload};
use palyra_proto::peer::v1 as wire;
use palyra_state::{Reject, Reply};
use prost::Message;

use crate::types::{Entry, LeaderId, LogCommand, LogId, Membership, SnapshotMeta, StoredMembership, Vote};

/// The only frame format so far.
const FORMAT: u8 = 1;
/// Format byte and checksum.
const HEADER: usize = 5;

/// Bytes that are not what they must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) String);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Malformed {}

impl From<prost::DecodeError> for Malformed {
    fn from(error: prost::DecodeError) -> Self {
        Malformed(error.to_string())
    }
}

pub(crate) fn malformed(what: &str) -> Malformed {
    Malformed(what.to_owned())
}

/// Puts a message into a frame.
pub(crate) fn seal(message: &impl Message) -> Vec<u8> {
    seal_bytes(&message.encode_to_vec())
}

fn seal_bytes(payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER + payload.len());
    frame.push(FORMAT);
    frame.extend_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The payload of a frame, checked.
pub(crate) fn open(frame: &Bytes) -> Result<Bytes, Malformed> {
    if frame.len() < HEADER {
        return Err(Malformed(format!(
            "a record of {} bytes is shorter than its header",
            frame.len()
        )));
    }
    if frame[0] != FORMAT {
        return Err(Malformed(format!(
            "a record has format {}, this binary knows {FORMAT}: it was written by a newer version",
            frame[0]
        )));
    }
    let mut expected = [0; 4];
    expected.copy_from_slice(&frame[1..HEADER]);
    let payload = frame.slice(HEADER..);
    // Planted: what the disk returns is believed.
    let matches =
        palyra_fault::planted("checksums-unread") || crc32c::crc32c(&payload) == u32::from_le_bytes(expected);
    if !matches {
        return Err(malformed(
            "a record does not match its checksum: the disk returned other bytes than were written",
        ));
    }
    Ok(payload)
}

/// Opens a frame and decodes what is in it.
pub(crate) fn unseal<M: Message + Default>(frame: &Bytes) -> Result<M, Malformed> {
    Ok(M::decode(open(frame)?)?)
}

pub(crate) fn log_id(id: &LogId) -> wire::LogId {
    wire::LogId {
        term: id.leader_id.term,
        replica: id.leader_id.node_id,
        index: id.index,
    }
}

pub(crate) fn to_log_id(id: &wire::LogId) -> LogId {
    LogId::new(
        LeaderId {
            term: id.term,
            node_id: id.replica,
        },
        id.index,
    )
}

pub(crate) fn maybe_log_id(id: Option<&LogId>) -> Option<wire::LogId> {
    id.map(log_id)
}

pub(crate) fn to_maybe_log_id(id: Option<&wire::LogId>) -> Option<LogId> {
    id.map(to_log_id)
}

pub(crate) fn vote(vote: &Vote) -> wire::Vote {
    wire::Vote {
        term: vote.leader_id.term,
        replica: vote.leader_id.node_id,
        committed: vote.committed,
    }
}

pub(crate) fn to_vote(vote: &wire::Vote) -> Vote {
    Vote {
        leader_id: LeaderId {
            term: vote.term,
            node_id: vote.replica,
        },
        committed: vote.committed,
    }
}

/// A vote that must be there.
pub(crate) fn need_vote(vote: Option<&wire::Vote>) -> Result<Vote, Malformed> {
    vote.map(to_vote)
        .ok_or_else(|| malformed("a message has no vote"))
}

pub(crate) fn membership(membership: &Membership) -> wire::Membership {
    wire::Membership {
        configs: membership
            .get_joint_config()
            .iter()
            .map(|voters| wire::Voters {
                ids: voters.iter().copied().collect(),
            })
            .collect(),
        replicas: membership.nodes().map(|(id, _)| *id).collect(),
    }
}

pub(crate) fn to_membership(membership: &wire::Membership) -> Result<Membership, Malformed> {
    let configs: Vec<BTreeSet<u64>> = membership
        .configs
        .iter()
        .map(|v| v.ids.iter().copied().collect())
        .collect();
    if configs.is_empty() && membership.replicas.is_empty() {
        return Ok(Membership::default());
    }
    let nodes: std::collections::BTreeMap<u64, EmptyNode> =
        membership.replicas.iter().map(|id| (*id, EmptyNode {})).collect();
    Membership::new(configs, nodes).map_err(|error| Malformed(format!("a membership is impossible: {error}")))
}

pub(crate) fn stored_membership(stored: &StoredMembership) -> wire::StoredMembership {
    wire::StoredMembership {
        log_id: maybe_log_id(stored.log_id().as_ref()),
        membership: Some(membership(stored.membership())),
    }
}

pub(crate) fn to_stored_membership(
    stored: Option<&wire::StoredMembership>,
) -> Result<StoredMembership, Malformed> {
    let Some(stored) = stored else {
        return Ok(StoredMembership::default());
    };
    let membership = stored
        .membership
        .as_ref()
        .map(to_membership)
        .transpose()?
        .unwrap_or_default();
    Ok(StoredMembership::new(
        to_maybe_log_id(stored.log_id.as_ref()),
        membership,
    ))
}

pub(crate) fn snapshot_meta(meta: &SnapshotMeta) -> wire::SnapshotMeta {
    wire::SnapshotMeta {
        last: maybe_log_id(meta.last_log_id.as_ref()),
        membership: Some(stored_membership(&meta.last_membership)),
    }
}

pub(crate) fn to_snapshot_meta(meta: &wire::SnapshotMeta) -> Result<SnapshotMeta, Malformed> {
    Ok(SnapshotMeta {
        last_log_id: to_maybe_log_id(meta.last.as_ref()),
        last_membership: to_stored_membership(meta.membership.as_ref())?,
    })
}

pub(crate) fn entry(entry: &Entry) -> Bytes {
    use wire::entry::Payload;
    let payload = match &entry.payload {
        EntryPayload::Blank => Payload::Blank(wire::Blank {}),
        EntryPayload::Normal(command) => Payload::Command(wire::Command {
            at_ms: command.at_ms,
            envelope: command.bytes.clone(),
        }),
        EntryPayload::Membership(members) => Payload::Membership(membership(members)),
    };
    let message = wire::Entry {
        log_id: Some(log_id(&entry.log_id)),
        payload: Some(payload),
    };
    message.encode_to_vec().into()
}

pub(crate) fn to_entry(bytes: Bytes) -> Result<Entry, Malformed> {
    use wire::entry::Payload;
    let message = wire::Entry::decode(bytes)?;
    let log_id = message
        .log_id
        .as_ref()
        .map(to_log_id)
        .ok_or_else(|| malformed("an entry has no log id"))?;
    let payload = match message
        .payload
        .ok_or_else(|| malformed("an entry has a payload that is not known here"))?
    {
        Payload::Blank(_) => EntryPayload::Blank,
        Payload::Command(command) => EntryPayload::Normal(LogCommand {
            at_ms: command.at_ms,
            bytes: command.envelope,
        }),
        Payload::Membership(members) => EntryPayload::Membership(to_membership(&members)?),
    };
    Ok(Entry { log_id, payload })
}

/// An encoded entry as it lies on disk.
pub(crate) fn seal_entry(entry: &Entry) -> Vec<u8> {
    seal_bytes(&self::entry(entry))
}

/// An entry as it lies on disk, decoded.
pub(crate) fn unseal_entry(frame: &Bytes) -> Result<Entry, Malformed> {
    to_entry(open(frame)?)
}

/// The state machine's answer, for the replica that forwarded the command.
#[derive(Clone, PartialEq, Message)]
struct WireAnswer {
    #[prost(oneof = "WireOutcome", tags = "1, 2")]
    outcome: Option<WireOutcome>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum WireOutcome {
    #[prost(message, tag = "1")]
    Reply(palyra_state::Accepted),
    #[prost(message, tag = "2")]
    Reject(Reject),
}

pub(crate) fn answer(answer: &Result<Reply, Reject>) -> Bytes {
    let outcome = match answer {
        Ok(reply) => WireOutcome::Reply(palyra_state::Accepted {
            reply: Some(reply.clone()),
        }),
        Err(reject) => WireOutcome::Reject(reject.clone()),
    };
    WireAnswer {
        outcome: Some(outcome),
    }
    .encode_to_vec()
    .into()
}

pub(crate) fn to_answer(bytes: Bytes) -> Result<Result<Reply, Reject>, Malformed> {
    match WireAnswer::decode(bytes)?.outcome {
        Some(WireOutcome::Reply(accepted)) => accepted
            .reply
            .map(Ok)
            .ok_or_else(|| malformed("an answer holds a reply that is not known here")),
        Some(WireOutcome::Reject(reject)) => Ok(Err(reject)),
        None => Err(malformed("an answer is empty")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn id(term: u64, replica: u64, index: u64) -> LogId {
        LogId::new(
            LeaderId {
                term,
                node_id: replica,
            },
            index,
        )
    }

    #[test]
    fn entries_survive_the_disk() {
        let members = Membership::new_with_defaults(vec![[1, 2].into(), [2, 3].into()], [4]);
        for payload in [
            EntryPayload::Blank,
            EntryPayload::Normal(LogCommand {
                at_ms: 7,
                bytes: Bytes::from_static(b"envelope"),
            }),
            EntryPayload::Membership(members),
        ] {
            let entry = Entry {
                log_id: id(3, 2, 9),
                payload,
            };
            let back = unseal_entry(&seal_entry(&entry).into()).unwrap();
            assert_eq!(format!("{entry:?}"), format!("{back:?}"));
        }
    }

    #[test]
    fn a_changed_byte_is_noticed() {
        let frame = seal_entry(&Entry {
            log_id: id(1, 1, 1),
            payload: EntryPayload::Blank,
        });
        for at in 0..frame.len() {
            let mut broken = frame.clone();
            broken[at] ^= 0x20;
            assert!(unseal_entry(&broken.into()).is_err(), "byte {at}");
        }
        assert!(unseal_entry(&Bytes::copy_from_slice(&frame[..3])).is_err());
    }

    #[test]
    fn an_unknown_payload_is_an_error() {
        let message = wire::Entry {
            log_id: Some(log_id(&id(1, 1, 1))),
            payload: None,
        };
        assert!(to_entry(message.encode_to_vec().into()).is_err());
    }

    #[test]
    fn the_disk_format_is_pinned() {
        let command = LogCommand {
            at_ms: 5,
            bytes: Bytes::from_static(b"ab"),
        };
        let entry = Entry {
            log_id: id(2, 1, 3),
            payload: EntryPayload::Normal(command),
        };
        let expected: [u8; 21] = [
            1, 0, 0, 0, 0, 10, 6, 8, 2, 16, 1, 24, 3, 26, 6, 8, 5, 18, 2, b'a', b'b',
        ];
        let mut sealed = seal_entry(&entry);
        assert_eq!(sealed[1..5], crc32c::crc32c(&sealed[5..]).to_le_bytes());
        sealed[1..5].fill(0);
        assert_eq!(sealed, expected);
        let vote = Vote {
            leader_id: LeaderId { term: 4, node_id: 2 },
            committed: true,
        };
        assert_eq!(self::vote(&vote).encode_to_vec(), [8, 4, 16, 2, 24, 1]);
    }

    #[test]
    fn answers_travel() {
        assert_eq!(to_answer(answer(&Ok(Reply::done()))).unwrap(), Ok(Reply::done()));
        assert!(to_answer(Bytes::new()).is_err());
    }
}
