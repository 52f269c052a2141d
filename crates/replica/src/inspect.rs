//! What the records of a replica's disk say, for those who check a replica from outside: the simulation watches every
//! write of every replica. Never used by a replica itself.

use std::collections::BTreeSet;

use palyra_proto::peer::v1 as wire;
use palyra_storage::{Family, Op};

use crate::{codec, meta};

/// Place of an entry in the log, and the leader that put it there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The leader's term.
    pub term: u64,
    /// The leader.
    pub replica: u64,
    /// Index in the log.
    pub index: u64,
}

/// A record that is written, or a range that is removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An entry of the log.
    Entry {
        /// Where.
        place: Place,
        /// Voters, when it is a membership; two sets while it changes.
        voters: Option<Vec<BTreeSet<u64>>>,
        /// Equal for equal entries.
        sum: u64,
    },
    /// Entries are removed: truncated, or purged.
    Cut {
        /// The first.
        from: u64,
        /// The first that stays.
        to: u64,
    },
    /// The vote: term, candidate, and whether it has won.
    Vote {
        /// Term.
        term: u64,
        /// Candidate.
        replica: u64,
    },
    /// Everything up to there is gone from the log, for good.
    Purged(Place),
    /// The state reflects everything up to there.
    Applied(Place),
}

fn place(id: &wire::LogId) -> Place {
    Place {
        term: id.term,
        replica: id.replica,
        index: id.index,
    }
}

fn index(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(..8)?.try_into().ok()?))
}

/// What an operation of a batch writes, when that is one of Raft's records. `None` for all else, and for what cannot be
/// read.
#[must_use]
pub fn record(op: &Op) -> Option<Record> {
    match op {
        Op::Put {
            family: Family::Log,
            value,
            ..
        } => {
            let entry = codec::unseal_entry(value).ok()?;
            let voters = match &entry.payload {
                openraft::EntryPayload::Membership(members) => Some(members.get_joint_config().clone()),
                _ => None,
            };
            // The frame begins with a checksum of the rest.
            let head = value.get(1..5)?.try_into().ok()?;
            Some(Record::Entry {
                place: place(&codec::log_id(&entry.log_id)),
                voters,
                sum: (value.len() as u64) << 32 | u64::from(u32::from_le_bytes(head)),
            })
        }
        Op::Put {
            family: Family::Meta,
            key,
            value,
        } => match meta::watched(key, value)? {
            meta::Watched::Vote(vote) => Some(Record::Vote {
                term: vote.term,
                replica: vote.replica,
            }),
            meta::Watched::Purged(id) => Some(Record::Purged(place(&id))),
            meta::Watched::Applied(id) => Some(Record::Applied(place(&id))),
        },
        Op::DeleteRange {
            family: Family::Log,
            from,
            to,
        } => Some(Record::Cut {
            from: index(from)?,
            to: index(to)?,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use palyra_storage::Batch;

    use super::*;
    use crate::types::{Entry, LeaderId, LogId, Membership, Vote};

    #[test]
    fn records_are_read_back() {
        let leader_id = LeaderId { term: 3, node_id: 2 };
        let id = LogId::new(leader_id, 9);
        let members = Membership::new_with_defaults(vec![[1, 2].into()], []);
        let entry = Entry {
            log_id: id,
            payload: openraft::EntryPayload::Membership(members),
        };
        let mut batch = Batch::new();
        batch.put(
            Family::Log,
            9_u64.to_be_bytes().to_vec(),
            codec::seal_entry(&entry),
        );
        meta::put_vote(
            &mut batch,
            &Vote {
                leader_id,
                committed: true,
            },
        );
        meta::put_purged(&mut batch, &id);
        let applied = meta::Applied {
            last: Some(id),
            ..meta::Applied::default()
        };
        meta::put_applied(&mut batch, &applied);
        batch.delete_range(
            Family::Log,
            1_u64.to_be_bytes().to_vec(),
            4_u64.to_be_bytes().to_vec(),
        );
        batch.put(Family::State, &b"k"[..], &b"v"[..]);
        let found: Vec<Option<Record>> = batch.ops().iter().map(record).collect();
        let place = Place {
            term: 3,
            replica: 2,
            index: 9,
        };
        assert!(
            matches!(&found[0], Some(Record::Entry { place: at, voters: Some(voters), .. })
                if *at == place && voters[..] == [[1, 2].into()])
        );
        assert_eq!(found[1], Some(Record::Vote { term: 3, replica: 2 }));
        assert_eq!(found[2], Some(Record::Purged(place)));
        assert_eq!(found[3], Some(Record::Applied(place)));
        assert_eq!(found[4], Some(Record::Cut { from: 1, to: 4 }));
        assert_eq!(found[5], None);
    }
}
