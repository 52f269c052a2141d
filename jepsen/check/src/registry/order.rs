//! The orders that the answers themselves claim: that of the versions, which decides, and that of the revisions.

use std::collections::{BTreeMap, HashMap};

use super::parse::{ABSENT, Access, Call, Effect, Key, Registers, tell};
use crate::linear::{Item, Model};
use crate::verdict::Violation;
use crate::witness::{self, Broken};

/// One register, as a sequential object.
pub(super) struct Register;

/// What a register holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct State {
    version: u64,
    value: u32,
}

impl Model for Register {
    type State = State;
    type Call = Call;

    fn initial(&self) -> State {
        State {
            version: 0,
            value: ABSENT,
        }
    }

    fn step(&self, state: &State, call: &Call) -> Option<State> {
        let State { version, value } = *state;
        let next = |told: Option<u64>, value: u32| {
            let version = version + 1;
            told.is_none_or(|told| told == version)
                .then_some(State { version, value })
        };
        match *call {
            Call::Read {
                version: told,
                value: read,
            } => {
                // An absent key has no version of its own.
                let fits = told.is_none_or(|told| told == version || (value == ABSENT && told == 0));
                (read == value && fits).then_some(*state)
            }
            Call::Write { version: told, value } => next(told, value),
            Call::Cas {
                version: told,
                from,
                value: to,
            } => (from == value).then(|| next(told, to)).flatten(),
            Call::Delete { version: told } => next(told, ABSENT),
        }
    }
}

/// What became of an order.
pub(super) enum Order<'k, 'a> {
    /// It is a linearization.
    Lines { steps: u64 },
    /// It is none.
    Broken(Break<'k, 'a>),
}

/// Where an order breaks.
pub(super) enum Break<'k, 'a> {
    /// Two changes made the same version.
    Twice(&'k Access<'a>, &'k Access<'a>),
    /// A version was seen that no operation can have made.
    Missing { version: u64, seen: &'k Access<'a> },
    /// The answer is not what was written last.
    Answer {
        found: &'k Access<'a>,
        last: Option<&'k Access<'a>>,
    },
    /// The order is against time.
    Time {
        called: &'k Access<'a>,
        returned: &'k Access<'a>,
    },
}

impl Break<'_, '_> {
    /// For people.
    pub(super) fn tell(&self, key: &str, registers: &Registers<'_>) -> Violation {
        let (what, ops) = match self {
            Break::Twice(one, other) => (
                format!("{} and {} made the same version", tell(&one.op), tell(&other.op)),
                vec![&one.op, &other.op],
            ),
            Break::Missing { version, seen } => (
                format!(
                    "{} shows that version {version} was made, but no operation can have made it: an acknowledged \
                     change was lost, or versions jump",
                    tell(&seen.op)
                ),
                vec![&seen.op],
            ),
            Break::Answer { found, last: None } => (
                format!("{} is not what an absent register answers", tell(&found.op)),
                vec![&found.op],
            ),
            Break::Answer {
                found,
                last: Some(last),
            } => (
                format!(
                    "{} does not follow from {}, which left {}",
                    tell(&found.op),
                    tell(&last.op),
                    registers.value(last.item.call.value())
                ),
                vec![&last.op, &found.op],
            ),
            Break::Time { called, returned } => (
                format!(
                    "{} had returned before {} was called, and yet comes after it",
                    tell(&returned.op),
                    tell(&called.op)
                ),
                vec![&returned.op, &called.op],
            ),
        };
        Violation::of(format!("register {key}: {what}"), &ops)
    }
}

/// Checks the order of the versions. It decides: each change makes the next version, so that no other order is
/// possible. `None` when an answer tells no version, or when a deletion of unknown outcome, or a cas of one where a
/// version is missing, leaves more than one order.
pub(super) fn by_version<'k, 'a>(key: &'k Key<'a>) -> Option<Order<'k, 'a>> {
    let mut made: BTreeMap<u64, &Access<'a>> = BTreeMap::new();
    let mut reads: BTreeMap<u64, Vec<&Access<'a>>> = BTreeMap::new();
    let mut open: Vec<&Access<'a>> = Vec::new();
    let deletes = key
        .ops
        .iter()
        .any(|op| matches!(op.item.call, Call::Delete { .. }));
    for op in &key.ops {
        match (op.item.call, op.item.optional) {
            (Call::Write { .. } | Call::Cas { .. }, true) => open.push(op),
            (_, true) => return None,
            (
                Call::Read {
                    value: ABSENT,
                    version,
                },
                _,
            ) if deletes && version.is_none_or(|told| told == 0) => return None,
            (
                Call::Read {
                    value: ABSENT,
                    version: None,
                },
                _,
            ) => reads.entry(0).or_default().push(op),
            (Call::Read { version, .. }, _) => reads.entry(version?).or_default().push(op),
            (call, _) => {
                if let Some(other) = made.insert(call.version()?, op) {
                    return Some(Order::Broken(Break::Twice(other, op)));
                }
            }
        }
    }
    if let Err(broken) = place_open(&mut made, &reads, open)? {
        return Some(Order::Broken(broken));
    }
    let mut order: Vec<&Access<'a>> = Vec::with_capacity(key.ops.len());
    order.extend(reads.remove(&0).unwrap_or_default());
    for (version, change) in made {
        order.push(change);
        order.extend(reads.remove(&version).unwrap_or_default());
    }
    Some(walk(&order))
}

/// Gives the versions that nobody was told of to writes of unknown outcome: to those whose value was read there, and
/// else the earliest version to the earliest call, which leaves most room to the others. `None` when that is not so.
fn place_open<'k, 'a>(
    made: &mut BTreeMap<u64, &'k Access<'a>>,
    reads: &BTreeMap<u64, Vec<&'k Access<'a>>>,
    mut open: Vec<&'k Access<'a>>,
) -> Option<Result<(), Break<'k, 'a>>> {
    for (version, seen) in reads {
        let read = seen[0];
        let fits = open
            .iter()
            .position(|op| op.item.call.value() == read.item.call.value());
        if let Some(at) = fits.filter(|_| *version > 0 && !made.contains_key(version)) {
            made.insert(*version, open.remove(at));
        }
    }
    let highest = made
        .keys()
        .next_back()
        .copied()
        .max(reads.keys().next_back().copied())
        .unwrap_or(0);
    let mut missing: Vec<(u64, u64, &'k Access<'a>)> = Vec::new();
    let mut due: Option<(u64, &'k Access<'a>)> = None;
    for version in (1..=highest).rev() {
        if missing.len() > open.len() {
            break;
        }
        let there = made.get(&version).copied().into_iter();
        for op in there.chain(reads.get(&version).into_iter().flatten().copied()) {
            let stop = op.item.stop.unwrap_or(u64::MAX);
            if due.is_none_or(|(earliest, _)| stop < earliest) {
                due = Some((stop, op));
            }
        }
        if let (false, Some((deadline, seen))) = (made.contains_key(&version), due) {
            missing.push((version, deadline, seen));
        }
    }
    let is_write = |op: &&Access<'a>| matches!(op.item.call, Call::Write { .. });
    if !missing.is_empty() && !open.iter().all(is_write) {
        return None;
    }
    let mut candidates = open.into_iter();
    for (version, deadline, seen) in missing.into_iter().rev() {
        match candidates.next().filter(|op| op.item.start < deadline) {
            Some(op) => drop(made.insert(version, op)),
            None => return Some(Err(Break::Missing { version, seen })),
        }
    }
    Some(Ok(()))
}

/// Checks the order of the revisions, a change before the reads that reflect it. A change of unknown outcome stands
/// right before the first that saw its value: nothing can have come between them. What found nothing and tells no
/// revision stands before all changes, where nothing is ever deleted.
///
/// An operation that has no place in the order, because it tells no revision or because nobody knows whether it did
/// anything, ends what can be said: if it did something, then at a revision beyond all that had been answered before
/// it was called. The order is checked up to there. `None` when nothing is.
pub(super) fn claimed<'k, 'a>(key: &'k Key<'a>) -> Option<Order<'k, 'a>> {
    let placed = places(key);
    let unplaced = key.ops.iter().zip(&placed).filter(|(_, place)| place.is_none());
    let cut = unplaced.map(|(op, _)| op.item.start).min().unwrap_or(u64::MAX);
    let answered = |op: &Access<'a>| op.item.stop.is_some_and(|stop| stop < cut) && !op.item.optional;
    let whole = cut == u64::MAX;
    let last = key
        .ops
        .iter()
        .zip(&placed)
        .filter(|(op, _)| whole || answered(op))
        .filter_map(|(_, place)| place.map(|(rev, _)| rev))
        .max()?;
    Some(walk_placed(key, &placed, last))
}

/// The order of the revisions as a proof: every operation has its place in it, but for changes of unknown outcome that
/// nobody saw, which may have done nothing. `None` when that is not so, or when the order breaks and such a change may
/// be why.
pub(super) fn by_rev<'k, 'a>(key: &'k Key<'a>) -> Option<Order<'k, 'a>> {
    let placed = places(key);
    let unplaced = || {
        let all = key.ops.iter().zip(&placed);
        all.filter(|(_, place)| place.is_none()).map(|(op, _)| op)
    };
    if unplaced().any(|op| !op.item.optional || is_delete(op)) {
        return None;
    }
    match walk_placed(key, &placed, u64::MAX) {
        Order::Broken(_) if unplaced().next().is_some() => None,
        found => Some(found),
    }
}

/// Walks along the operations whose place is no later than that.
fn walk_placed<'k, 'a>(key: &'k Key<'a>, placed: &[Option<(u64, Place)>], last: u64) -> Order<'k, 'a> {
    let mut order: Vec<(u64, Place, u64, &Access<'a>)> = key
        .ops
        .iter()
        .zip(placed)
        .filter_map(|(op, place)| place.map(|(rev, place)| (rev, place, op.item.start, op)))
        .filter(|(rev, ..)| *rev <= last)
        .collect();
    order.sort_by_key(|(rev, place, start, _)| (*rev, *place, *start));
    let order: Vec<&Access<'a>> = order.into_iter().map(|(.., op)| op).collect();
    walk(&order)
}

fn is_delete(op: &Access<'_>) -> bool {
    matches!(op.item.call, Call::Delete { .. })
}

/// Where each operation stands in the order of the revisions, as far as it is known.
fn places(key: &Key<'_>) -> Vec<Option<(u64, Place)>> {
    let deletes = key.ops.iter().any(is_delete);
    let rev_of = |op: &Access<'_>| match op.item.call {
        Call::Read { value: ABSENT, .. } if !deletes => op.rev.or(Some(0)),
        _ => op.rev,
    };
    let mut seen_at: HashMap<u32, u64> = HashMap::new();
    for op in key.ops.iter().filter(|op| !op.item.optional) {
        let seen = match op.item.call {
            Call::Read { value, .. } => value,
            Call::Cas { from, .. } => from,
            Call::Write { .. } | Call::Delete { .. } => continue,
        };
        let Some(at) = rev_of(op) else { continue };
        seen_at
            .entry(seen)
            .and_modify(|first| *first = at.min(*first))
            .or_insert(at);
    }
    let place = |op: &Access<'_>| match (op.item.optional, op.item.call.effect()) {
        (true, _) if is_delete(op) => None,
        (true, _) => Some((*seen_at.get(&op.item.call.value())?, Place::Assumed)),
        (false, Effect::Change) => Some((op.rev?, Place::Change)),
        (false, Effect::Read) => Some((rev_of(op)?, Place::Read)),
    };
    key.ops.iter().map(place).collect()
}

/// What comes first at one revision.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    /// A change that must have been before what is there.
    Assumed,
    /// The change of this revision.
    Change,
    /// Reads that reflect it.
    Read,
}

fn walk<'k, 'a>(order: &[&'k Access<'a>]) -> Order<'k, 'a> {
    let items = order.iter().map(|op| -> &Item<Call> { &op.item });
    match witness::walk(&Register, items) {
        Ok(steps) => Order::Lines { steps: steps as u64 },
        Err(Broken::Answer { at }) => {
            let is_change = |op: &&&Access<'a>| op.item.call.effect() == Effect::Change;
            Order::Broken(Break::Answer {
                found: order[at],
                last: order[..at].iter().rev().find(is_change).copied(),
            })
        }
        Err(Broken::Time { called, returned }) => Order::Broken(Break::Time {
            called: order[called],
            returned: order[returned],
        }),
    }
}
