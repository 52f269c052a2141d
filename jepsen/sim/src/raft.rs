//! What Raft promises, checked at every write of every replica: the simulation holds the disks, so it sees each entry,
//! vote and applied index when it is written, and knows what a loss of power would leave.
//!
//! - `raft.log`: one payload and one predecessor for each log id, on whatever replica, so logs that agree at one entry
//!   agree before it; no hole.
//! - `raft.committed`: what was applied anywhere stays what it is.
//! - `raft.quorum`: when an entry is first applied, a quorum of the voters of its time, of both sets while they change,
//!   has it durable.
//! - `raft.complete`: who begins to lead has everything that was applied under earlier leaders.
//! - `raft.leader`: a term of one leader belongs to one process; one that starts again has to be elected anew.
//! - `raft.durable`: no durable entry of a leader without a durable vote for it or a later one; nobody leads without;
//!   and nothing is purged that the state does not reflect as durably.
//!
//! openraft orders leaders by term and id: one replica after another may lead in the same term.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use palyra_replica::inspect::{Place, Record};

use crate::world::Life;

/// A leader: term and id, in the order of elections.
type Leader = (u64, u64);

fn leader(place: Place) -> Leader {
    (place.term, place.replica)
}

/// What a disk holds of Raft, at one moment.
#[derive(Clone, Debug, Default)]
struct Held {
    log: BTreeMap<u64, Place>,
    vote: Leader,
    purged: Option<Place>,
    applied: Option<Place>,
}

impl Held {
    fn take(&mut self, record: &Record) {
        match record {
            Record::Entry { place, .. } => {
                self.log.insert(place.index, *place);
            }
            Record::Cut { from, to } => {
                let indexes: Vec<u64> = self.log.range(*from..*to).map(|(index, _)| *index).collect();
                for index in indexes {
                    self.log.remove(&index);
                }
            }
            Record::Vote { term, replica } => self.vote = (*term, *replica),
            Record::Purged(place) => self.purged = Some(*place),
            Record::Applied(place) => self.applied = Some(*place),
        }
    }

    /// The last place that it has, as an entry or behind one that was purged.
    fn last(&self) -> Option<Place> {
        self.log
            .last_key_value()
            .map(|(_, place)| *place)
            .max(self.purged)
    }

    /// The place at an index, as far as it can be known.
    fn at(&self, index: u64) -> Option<Place> {
        let purged = self.purged.filter(|place| place.index == index);
        self.log.get(&index).copied().or(purged)
    }

    /// Whether it has this very entry, or what it did.
    fn has(&self, place: Place) -> bool {
        let behind = |upto: Option<Place>| upto.is_some_and(|upto| upto.index >= place.index);
        match self.log.get(&place.index) {
            Some(found) => *found == place,
            None => behind(self.purged) || behind(self.applied),
        }
    }
}

/// One replica's disk.
#[derive(Debug, Default)]
struct Disk {
    present: Held,
    durable: Held,
    /// Written and not synced, batch by batch.
    pending: VecDeque<Vec<Record>>,
}

/// Watches all disks.
#[derive(Debug, Default)]
pub(crate) struct Raft {
    disks: BTreeMap<u64, Disk>,
    /// Of each place that was ever written: a sum of its payload, and the place before it.
    known: BTreeMap<Place, (u64, Option<Place>)>,
    /// Voters by the place of the membership.
    voters: BTreeMap<Place, Vec<BTreeSet<u64>>>,
    /// What was applied anywhere.
    committed: BTreeMap<u64, Place>,
    leaders: BTreeMap<Leader, Life>,
    problems: Vec<String>,
}

impl Raft {
    /// Problems since the last call.
    pub(crate) fn take_problems(&mut self) -> Vec<String> {
        std::mem::take(&mut self.problems)
    }

    fn problem(&mut self, check: &str, replica: u64, what: &str) {
        self.problems.push(format!("{check}: r{replica} {what}"));
    }

    /// A replica wrote a batch.
    pub(crate) fn wrote(&mut self, replica: u64, records: Vec<Record>) {
        let mut applied = None;
        for record in &records {
            match record {
                Record::Entry { place, voters, sum } => {
                    self.appended(replica, *place, *sum);
                    if let Some(voters) = voters {
                        self.voters.insert(*place, voters.clone());
                    }
                }
                Record::Applied(place) => applied = Some(*place),
                _ => {}
            }
            self.disks.entry(replica).or_default().present.take(record);
        }
        self.disks.entry(replica).or_default().pending.push_back(records);
        if let Some(place) = applied {
            self.applied(replica, place);
        }
        self.purged_is_applied(replica, |disk| &disk.present);
    }

    /// An entry continues the log, and is the one that everybody has under this id.
    fn appended(&mut self, replica: u64, place: Place, sum: u64) {
        let present = &self.disks.entry(replica).or_default().present;
        let last = present.last();
        if last.is_some_and(|last| place.index != last.index + 1) {
            let what = format!("appends {place:?} behind {last:?}");
            self.problem("raft.log", replica, &what);
            return;
        }
        match self.known.get_mut(&place) {
            None => {
                self.known.insert(place, (sum, last));
            }
            Some((known, before)) => {
                let differs = *known != sum;
                let before = *before.get_or_insert(last.unwrap_or_default());
                if differs {
                    let what = format!("has another payload at {place:?} than was written there before");
                    self.problem("raft.log", replica, &what);
                } else if last.is_some_and(|last| last != before && before != Place::default()) {
                    let what = format!("has {last:?} before {place:?}, another replica had {before:?}");
                    self.problem("raft.log", replica, &what);
                }
            }
        }
    }

    /// A replica applied everything up to this place: it is committed.
    fn applied(&mut self, replica: u64, place: Place) {
        if let Some(other) = self.committed.get(&place.index) {
            if *other != place {
                let what = format!("applied {place:?}, but {other:?} had been applied there");
                self.problem("raft.committed", replica, &what);
            }
            return;
        }
        let first = self.committed.last_key_value().map_or(0, |(index, _)| index + 1);
        let present = &self.disks.entry(replica).or_default().present;
        let reached: Vec<Place> = (first..=place.index)
            .filter_map(|index| present.at(index))
            .collect();
        for one in reached {
            self.committed.entry(one.index).or_insert(one);
        }
        self.committed.insert(place.index, place);
        if let Some(missing) = self.lacks_quorum(place) {
            let what = format!("applied {place:?}, {missing}");
            self.problem("raft.quorum", replica, &what);
        }
    }

    /// Why no quorum has this entry durable: of the voters as they were when it was committed, or as a membership has
    /// them that lies behind it in some log and may have been in force already.
    fn lacks_quorum(&self, place: Place) -> Option<String> {
        let holders: BTreeSet<u64> = self
            .disks
            .iter()
            .filter(|(_, disk)| disk.durable.has(place))
            .map(|(id, _)| *id)
            .collect();
        let voters_at = |at: &Place| self.voters.get(at);
        let mut upto = self.committed.range(..=place.index).rev().map(|(_, at)| *at);
        let since = upto.find(|at| self.voters.contains_key(at));
        let before = since.as_ref().and_then(voters_at);
        // A leader goes by the newest voters of its log, as Raft has it, and openraft's (`append_membership`) counts by
        // them in the step that appends them, before any disk has them: once both halves are committed, the change is
        // over for it as soon as it proposes that, and what it commits then needs the new half alone.
        let ends = since.filter(|at| at.index < place.index).and(before);
        let ended: Option<Vec<BTreeSet<u64>>> = ends.and_then(|sets| Some(vec![sets.last()?.clone()]));
        let later = self
            .disks
            .values()
            .flat_map(|disk| disk.present.log.range(place.index + 1..))
            .filter_map(|(_, at)| voters_at(at));
        let quorum = |config: &Vec<BTreeSet<u64>>| {
            let half = |voters: &BTreeSet<u64>| voters.intersection(&holders).count() * 2 > voters.len();
            config.iter().all(half)
        };
        let mut configs = before.into_iter().chain(later).chain(ended.as_ref());
        (!configs.any(quorum)).then(|| format!("which only {holders:?} have durable of {before:?}"))
    }

    fn purged_is_applied(&mut self, replica: u64, of: impl Fn(&Disk) -> &Held) {
        let held = of(self.disks.entry(replica).or_default());
        let (purged, applied) = (held.purged, held.applied);
        if purged.map(|place| place.index) > applied.map(|place| place.index) {
            let what = format!("purged its log up to {purged:?}, its state reflects {applied:?}");
            self.problem("raft.durable", replica, &what);
        }
    }

    /// What a replica wrote is durable now.
    pub(crate) fn synced(&mut self, replica: u64) {
        self.settle(replica, usize::MAX);
    }

    fn settle(&mut self, replica: u64, count: usize) {
        let disk = self.disks.entry(replica).or_default();
        let count = count.min(disk.pending.len());
        for record in disk.pending.drain(..count).flatten() {
            disk.durable.take(&record);
        }
        let newest = disk.durable.log.last_key_value().map(|(_, place)| *place);
        let vote = disk.durable.vote;
        // The first membership of all stands for itself: nobody was elected to write it.
        if let Some(newest) = newest.filter(|newest| newest.term > 0 && leader(*newest) > vote) {
            let what = format!("has {newest:?} durable, and no vote after that for {vote:?}");
            self.problem("raft.durable", replica, &what);
        }
        self.purged_is_applied(replica, |disk| &disk.durable);
    }

    /// A replica lost power: the first `keep` batches that were not synced survive.
    pub(crate) fn power_loss(&mut self, replica: u64, keep: usize) {
        self.settle(replica, keep);
        let disk = self.disks.entry(replica).or_default();
        disk.pending.clear();
        disk.present = disk.durable.clone();
    }

    /// A replica says that it leads.
    pub(crate) fn leads(&mut self, life: Life, term: u64) {
        let (replica, mine) = (life.replica(), (term, life.replica()));
        match self.leaders.get(&mine) {
            Some(known) if *known == life => return,
            Some(_) => {
                let what =
                    format!("leads in term {term} in another process than before, without an election");
                self.problem("raft.leader", replica, &what);
            }
            None => {
                self.leaders.insert(mine, life);
            }
        }
        let disk = self.disks.entry(replica).or_default();
        let vote = disk.durable.vote;
        let earlier = self.committed.values().rev().find(|place| leader(**place) < mine);
        let lacks = earlier.copied().filter(|place| !disk.present.has(*place));
        if vote < mine {
            let what = format!("leads in term {term}, its vote on disk is for {vote:?}");
            self.problem("raft.durable", replica, &what);
        }
        if let Some(place) = lacks {
            let what = format!("leads in term {term} without {place:?}, which was applied");
            self.problem("raft.complete", replica, &what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(term: u64, index: u64) -> Place {
        Place {
            term,
            replica: term,
            index,
        }
    }

    fn entry(term: u64, index: u64, sum: u64) -> Record {
        let voters = (index == 0).then(|| vec![[1, 2, 3].into()]);
        Record::Entry {
            place: place(term, index),
            voters,
            sum,
        }
    }

    fn vote(term: u64) -> Record {
        Record::Vote { term, replica: term }
    }

    /// Three replicas that agree on two entries of term 1; two of them have them durable.
    fn three() -> Raft {
        let mut raft = Raft::default();
        for id in [1, 2, 3] {
            raft.wrote(id, vec![vote(1), entry(1, 0, 10), entry(1, 1, 11)]);
        }
        raft.synced(1);
        raft.synced(2);
        assert_eq!(raft.take_problems(), Vec::<String>::new());
        raft
    }

    fn found(raft: &mut Raft) -> Vec<String> {
        let problems = raft.take_problems();
        problems
            .iter()
            .map(|what| what.split(':').next().unwrap_or_default().to_owned())
            .collect()
    }

    #[test]
    fn a_good_course_passes() {
        let mut raft = three();
        raft.wrote(1, vec![Record::Applied(place(1, 1))]);
        raft.leads(Life::of(1, 1), 1);
        raft.leads(Life::of(1, 1), 1);
        raft.wrote(2, vec![vote(2)]);
        raft.synced(2);
        raft.leads(Life::of(2, 2), 2);
        raft.wrote(2, vec![entry(2, 2, 12)]);
        raft.wrote(2, vec![Record::Cut { from: 2, to: 3 }, entry(2, 2, 12)]);
        raft.wrote(2, vec![Record::Applied(place(1, 1))]);
        raft.wrote(
            2,
            vec![Record::Cut { from: 0, to: 2 }, Record::Purged(place(1, 1))],
        );
        raft.synced(2);
        assert_eq!(raft.take_problems(), Vec::<String>::new());
    }

    #[test]
    fn two_payloads_and_two_predecessors_and_holes_are_found() {
        let mut raft = three();
        raft.wrote(1, vec![entry(1, 2, 12)]);
        raft.wrote(2, vec![entry(1, 2, 99)]);
        assert_eq!(found(&mut raft), ["raft.log"], "another payload");
        let mut raft = three();
        raft.wrote(1, vec![entry(2, 2, 12), entry(2, 3, 13)]);
        raft.wrote(2, vec![entry(3, 2, 22), entry(2, 3, 13)]);
        assert_eq!(found(&mut raft), ["raft.log"], "another predecessor");
        let mut raft = three();
        raft.wrote(1, vec![entry(1, 3, 13)]);
        assert_eq!(found(&mut raft), ["raft.log"], "a hole");
    }

    #[test]
    fn what_was_applied_stays_and_lies_on_a_quorum() {
        let mut raft = three();
        raft.wrote(1, vec![entry(1, 2, 12), Record::Applied(place(1, 2))]);
        assert_eq!(found(&mut raft), ["raft.quorum"], "nobody has it durable");
        raft.wrote(2, vec![entry(2, 2, 22), Record::Applied(place(2, 2))]);
        assert_eq!(found(&mut raft), ["raft.committed"], "another one was applied");
        let mut raft = three();
        raft.power_loss(3, 0);
        raft.wrote(1, vec![Record::Applied(place(1, 1))]);
        assert_eq!(
            found(&mut raft),
            Vec::<String>::new(),
            "two of three still have it"
        );
        raft.wrote(1, vec![entry(1, 2, 12)]);
        raft.synced(1);
        raft.wrote(1, vec![Record::Applied(place(1, 2))]);
        assert_eq!(found(&mut raft), ["raft.quorum"], "one of three has it");
    }

    #[test]
    fn a_change_needs_both_halves_for_itself_and_the_new_one_after_it() {
        let joint = |index| Record::Entry {
            place: place(1, index),
            voters: Some(vec![[1, 2, 3].into(), [2, 3, 4].into()]),
            sum: 20,
        };
        let mut raft = three();
        for id in [2, 3, 4] {
            raft.wrote(id, vec![vote(1)]);
        }
        for id in [1, 2, 3] {
            raft.wrote(id, vec![joint(2)]);
        }
        raft.synced(1);
        raft.synced(2);
        raft.wrote(1, vec![Record::Applied(place(1, 2))]);
        assert_eq!(found(&mut raft), ["raft.quorum"], "one of the new half has it");
        let mut raft = three();
        for id in [1, 2, 3] {
            raft.wrote(id, vec![joint(2)]);
            raft.synced(id);
        }
        raft.wrote(1, vec![Record::Applied(place(1, 2))]);
        for id in [2, 3] {
            raft.wrote(id, vec![entry(1, 3, 13)]);
            raft.synced(id);
        }
        raft.wrote(1, vec![entry(1, 3, 13), Record::Applied(place(1, 3))]);
        assert_eq!(found(&mut raft), Vec::<String>::new());
    }

    #[test]
    fn leaders_without_vote_election_or_entries_are_found() {
        let mut raft = three();
        raft.leads(Life::of(1, 1), 1);
        raft.leads(Life::of(1, 5), 1);
        assert_eq!(found(&mut raft), ["raft.leader"]);
        let mut raft = three();
        raft.leads(Life::of(2, 1), 2);
        assert_eq!(found(&mut raft), ["raft.durable"], "it has not voted");
        let mut raft = three();
        raft.wrote(1, vec![Record::Applied(place(1, 1))]);
        raft.power_loss(3, 0);
        raft.wrote(3, vec![vote(3)]);
        raft.synced(3);
        raft.leads(Life::of(3, 1), 3);
        assert_eq!(found(&mut raft), ["raft.complete"]);
    }

    #[test]
    fn entries_without_a_vote_and_purges_of_what_is_not_applied_are_found() {
        let mut raft = three();
        raft.wrote(1, vec![entry(2, 2, 12)]);
        raft.synced(1);
        assert_eq!(found(&mut raft), ["raft.durable"]);
        let mut raft = three();
        raft.wrote(
            1,
            vec![Record::Cut { from: 0, to: 1 }, Record::Purged(place(1, 0))],
        );
        assert_eq!(found(&mut raft), ["raft.durable"]);
    }
}
