//! What the clients asked and what they were told, in the one order in which the simulation runs, and the
//! checks of it against the journal that the cluster ended with.
//!
//! A command is `Ok` (told: applied, at or before this index), `Told` (the same without an index), `Quiet` (told:
//! accepted, there was nothing to change), `Refused` (told: no effect) or `Unknown`. Unknown ones may or may not have
//! happened; every check leaves both open until the journal, which has passed its own checks, decides. Never here:
//! what single domains promise, see `ledger`.

use std::collections::BTreeMap;

use palyra_state::journal::Row;
use palyra_state::{Id, MemRead, Reply};

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// A read reflects the log up to this index; a command was applied there, or before when it had to be asked for
    /// twice.
    Ok(u64),
    /// It was applied, and nobody said at which index.
    Told,
    /// It was accepted at this index and changed nothing.
    Quiet(u64),
    /// It is known to have had no effect.
    Refused,
    /// Nobody knows.
    Unknown,
}

impl Outcome {
    /// The index that an answer names.
    pub(crate) fn index(&self) -> Option<u64> {
        match self {
            Outcome::Ok(index) | Outcome::Quiet(index) => Some(*index),
            Outcome::Told | Outcome::Refused | Outcome::Unknown => None,
        }
    }
}

/// What a command other than a write was for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// Only that it happened is checked.
    Plain(&'static str),
    /// A node reported a result in a session; `stale`: one that it knew to be over.
    Complete {
        dispatch: Id,
        epoch: u64,
        result: Vec<u8>,
        stale: bool,
    },
    /// A node began the session of this epoch; 0 when it was not told.
    Attach { device: Id, epoch: u64 },
    /// An operator revoked a device.
    Revoke { device: Id },
    /// A device did something in its own name.
    ByDevice { device: Id },
}

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// A register was set to `value`, under this request id.
    Write { key: Id, value: u64, request: Id },
    /// A register was read with linearizable consistency and held `value`; 0 is what it holds at first.
    Read { key: Id, value: u64 },
    /// Any other command, under this request id; zero when nobody was told which.
    Command { deed: Deed, request: Id },
}

impl Asked {
    /// The request id of a command.
    fn request(&self) -> Option<Id> {
        match self {
            Asked::Write { request, .. } | Asked::Command { request, .. } => {
                (*request != Id::ZERO).then_some(*request)
            }
            Asked::Read { .. } => None,
        }
    }
}

/// One operation. `invoked` and `returned` are places in the order of all events of the run.
#[derive(Clone, Debug)]
pub(crate) struct Op {
    pub(crate) asked: Asked,
    pub(crate) outcome: Outcome,
    pub(crate) invoked: u64,
    pub(crate) returned: u64,
}

/// Everything that clients did in a run.
#[derive(Default)]
pub(crate) struct History {
    pub(crate) ops: Vec<Op>,
    now: u64,
}

impl History {
    /// The next place in the order of events.
    pub(crate) fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// Adds an operation that has ended.
    pub(crate) fn push(&mut self, op: Op) {
        self.ops.push(op);
    }

    /// How many operations took effect, certainly did not, and may have.
    pub(crate) fn tally(&self) -> (usize, usize, usize) {
        let count = |is: fn(&Outcome) -> bool| self.ops.iter().filter(|op| is(&op.outcome)).count();
        (
            count(|outcome| outcome.index().is_some()),
            count(|outcome| *outcome == Outcome::Refused),
            count(|outcome| *outcome == Outcome::Unknown),
        )
    }

    /// Checks the whole history against the journal's rows; the first problem of each kind.
    pub(crate) fn check(&self, rows: &[Row]) -> Vec<String> {
        let mut problems = Vec::new();
        problems.extend(self.check_acknowledged(rows));
        problems.extend(self.check_real_time());
        problems.extend(self.check_values(rows));
        problems
    }

    /// An acknowledged command stands in the journal once, not after the index that was told; a refused one does not,
    /// nor one that changed nothing; an unknown one at most once.
    fn check_acknowledged(&self, rows: &[Row]) -> Option<String> {
        let mut at: BTreeMap<Id, Vec<u64>> = BTreeMap::new();
        for row in rows {
            let indexes = at.entry(row.request_id).or_default();
            if indexes.last() != Some(&row.index) {
                indexes.push(row.index);
            }
        }
        self.ops.iter().find_map(|op| {
            let found = at.get(&op.asked.request()?).map_or(&[][..], Vec::as_slice);
            let good = match op.outcome {
                Outcome::Ok(index) => found.len() == 1 && found[0] <= index,
                Outcome::Told => found.len() == 1,
                Outcome::Refused | Outcome::Quiet(_) => found.is_empty(),
                Outcome::Unknown => found.len() <= 1,
            };
            (!good).then(|| {
                format!(
                    "{:?} ended {:?}, but the journal has it at {found:?}",
                    op.asked, op.outcome
                )
            })
        })
    }

    /// If one operation returned before another was invoked, its index is not larger; strictly smaller before
    /// a command. One sweep in the order of invocation with the largest index returned so far.
    fn check_real_time(&self) -> Option<String> {
        let mut events: Vec<(u64, bool, &Op)> = Vec::new();
        for op in self.ops.iter().filter(|op| op.outcome.index().is_some()) {
            events.push((op.invoked, false, op));
            events.push((op.returned, true, op));
        }
        events.sort_by_key(|(at, _, _)| *at);
        let mut floor = 0;
        let mut floors: BTreeMap<u64, u64> = BTreeMap::new();
        for (_, returned, op) in events {
            let Some(index) = op.outcome.index() else { continue };
            if !returned {
                floors.insert(op.invoked, floor);
                continue;
            }
            let before = floors.get(&op.invoked).copied().unwrap_or(0);
            let is_read = matches!(op.asked, Asked::Read { .. });
            if index < before || (!is_read && index == before && before > 0) {
                return Some(format!(
                    "{op:?} reflects index {index}, but {before} was seen before it began"
                ));
            }
            floor = floor.max(index);
        }
        None
    }

    /// A read at an index holds the value of the last write at or below that index.
    fn check_values(&self, rows: &[Row]) -> Option<String> {
        let mut values: BTreeMap<Id, (Id, u64)> = BTreeMap::new();
        for op in &self.ops {
            if let Asked::Write { key, value, request } = &op.asked {
                values.insert(*request, (*key, *value));
            }
        }
        let mut chain: BTreeMap<Id, BTreeMap<u64, u64>> = BTreeMap::new();
        for row in rows.iter().filter(|row| row.action == "node.registered") {
            if let Some((key, value)) = values.get(&row.request_id) {
                chain.entry(*key).or_default().insert(row.index, *value);
            }
        }
        self.ops.iter().find_map(|op| {
            let (Asked::Read { key, value }, Outcome::Ok(index)) = (&op.asked, &op.outcome) else {
                return None;
            };
            let held = chain
                .get(key)
                .and_then(|c| c.range(..=*index).next_back())
                .map_or(0, |(_, value)| *value);
            (held != *value)
                .then(|| format!("a read at index {index} gave {value}, but {held} was the value there"))
        })
    }
}

/// All journal rows of a state.
pub(crate) fn journal(state: &MemRead) -> Vec<Row> {
    palyra_state::journal::last_rows(state, usize::MAX)
}

/// Whether the state machine said that there was nothing to do.
pub(crate) fn changes_nothing(reply: &Reply) -> bool {
    match reply {
        Reply::Registered(registered) => !registered.changed,
        Reply::Revoked(revoked) => revoked.already,
        Reply::Counted(counted) => counted.count == 0,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> Id {
        Id::from_bytes([n; 16])
    }

    fn row(index: u64, request: u8) -> Row {
        Row {
            index,
            action: "node.registered".into(),
            request_id: id(request),
            ..Row::default()
        }
    }

    fn write(value: u64, request: u8, outcome: Outcome, invoked: u64, returned: u64) -> Op {
        Op {
            asked: Asked::Write {
                key: id(1),
                value,
                request: id(request),
            },
            outcome,
            invoked,
            returned,
        }
    }

    fn read(value: u64, index: u64, invoked: u64, returned: u64) -> Op {
        Op {
            asked: Asked::Read { key: id(1), value },
            outcome: Outcome::Ok(index),
            invoked,
            returned,
        }
    }

    fn check(ops: Vec<Op>, rows: &[Row]) -> Vec<String> {
        History { ops, now: 0 }.check(rows)
    }

    #[test]
    fn a_good_history_passes() {
        let ops = vec![
            write(7, 10, Outcome::Ok(5), 1, 2),
            read(7, 5, 3, 4),
            write(8, 11, Outcome::Unknown, 5, 6),
            read(8, 6, 7, 8),
            write(8, 12, Outcome::Quiet(7), 9, 10),
            // Asked for twice: the answer names the second entry, which did nothing.
            write(9, 13, Outcome::Ok(9), 11, 12),
        ];
        // One entry may have several rows.
        let rows = [row(5, 10), row(6, 11), row(8, 13), row(8, 13)];
        assert_eq!(check(ops, &rows), Vec::<String>::new());
    }

    #[test]
    fn altered_histories_fail() {
        let lost = vec![write(7, 10, Outcome::Ok(5), 1, 2)];
        assert_eq!(check(lost, &[]).len(), 1, "an acknowledged write is gone");
        let later = vec![write(7, 10, Outcome::Ok(5), 1, 2)];
        assert_eq!(
            check(later, &[row(6, 10)]).len(),
            1,
            "it was told before it happened"
        );
        let twice = vec![write(7, 10, Outcome::Unknown, 1, 2)];
        assert_eq!(
            check(twice, &[row(5, 10), row(9, 10)]).len(),
            1,
            "an unknown write happened twice"
        );
        let refused = vec![write(7, 10, Outcome::Refused, 1, 2)];
        assert_eq!(check(refused, &[row(5, 10)]).len(), 1, "a refused write happened");
        let quiet = vec![write(7, 10, Outcome::Quiet(5), 1, 2)];
        assert_eq!(
            check(quiet, &[row(5, 10)]).len(),
            1,
            "one that changed nothing did"
        );
        let stale = vec![write(7, 10, Outcome::Ok(5), 1, 2), read(0, 4, 3, 4)];
        assert_eq!(check(stale, &[row(5, 10)]).len(), 1, "a read went back in time");
        let wrong = vec![write(7, 10, Outcome::Ok(5), 1, 2), read(9, 5, 3, 4)];
        assert_eq!(
            check(wrong, &[row(5, 10)]).len(),
            1,
            "a read gave what nobody wrote"
        );
        let command = Op {
            asked: Asked::Command {
                deed: Deed::Plain("x"),
                request: id(10),
            },
            ..write(0, 0, Outcome::Ok(5), 1, 2)
        };
        assert_eq!(
            check(vec![command], &[]).len(),
            1,
            "an acknowledged command is gone"
        );
    }
}
