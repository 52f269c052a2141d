//! A loss of power: which of the changes that were not synced are on the disk all the same.
//!
//! Never here: what counts as synced (`store`). Every choice comes from the seed, so a loss can be repeated.

use std::collections::{BTreeMap, HashMap, HashSet};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::content::pieces;
use crate::image::{Edit, Rename};
use crate::store::Store;

/// What a loss of power leaves of that which was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing.
    Nothing,
    /// All that came before a random moment, page by page, over all files and names: a disk that writes in order.
    Prefix,
    /// The same, and the last page is only partly written.
    Torn,
    /// Of each file all that came before a moment of its own, and of the names likewise: files are written back on
    /// their own, each in order.
    PerFile,
    /// Each page by a coin of its own, so that later bytes of a file may be there without earlier ones, which then
    /// read as zeros: a page cache and a disk that write in any order.
    Scatter,
}

/// How the power is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerLoss {
    /// What is left of the bytes and names that were not synced.
    pub keep: Keep,
    /// Whether names count as synced only by a sync of their folder, as POSIX has it. Otherwise any sync makes all
    /// earlier creates, renames and unlinks durable, as ext4 and XFS have it.
    pub strict_dir: bool,
    /// Decides every choice.
    pub seed: u64,
}

/// What a loss of power took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Pages of writes, truncations and holes that were not synced and are gone.
    pub edits: u64,
    /// Those that were not synced and are there.
    pub kept_edits: u64,
    /// Bytes of writes that are gone.
    pub bytes: u64,
    /// Creates, links, renames and unlinks that are gone.
    pub names: u64,
    /// Those that were not synced and are there.
    pub kept_names: u64,
    /// Bytes of the last page that was written in part.
    pub torn: u64,
}

impl Lost {
    /// Whether anything at all is gone.
    pub fn any(&self) -> bool {
        self.edits + self.names + self.torn > 0
    }
}

/// The smallest thing that is kept or lost.
enum Unit {
    /// A part of a write.
    Bytes {
        node: u64,
        offset: u64,
        bytes: Vec<u8>,
    },
    /// A truncation or a hole.
    Shape {
        node: u64,
        edit: Edit,
    },
    Name(Rename),
}

impl Store {
    /// Loses what `loss` says, and starts over from the rest. Open handles are void.
    pub(crate) fn lose_power(&mut self, loss: &PowerLoss) -> Lost {
        let mut chance = SmallRng::seed_from_u64(loss.seed);
        if !loss.strict_dir {
            for waiting in self.names.values().filter(|waiting| waiting.journaled) {
                self.durable.rename(&waiting.change);
            }
            self.names.retain(|_, waiting| !waiting.journaled);
        }
        let units = self.units();
        let mut lost = Lost::default();
        let kept = choose(&units, loss, &mut chance);
        let last = kept.iter().rposition(|kept| *kept);
        for (place, (unit, kept)) in units.iter().zip(kept).enumerate() {
            let torn = loss.keep == Keep::Torn && Some(place) == last;
            self.settle(unit, kept, torn.then_some(&mut chance), &mut lost);
        }
        self.restart();
        lost
    }

    /// All that waits, in order, cut into pages.
    fn units(&self) -> Vec<Unit> {
        let mut units = BTreeMap::new();
        for (number, (node, edit)) in &self.edits {
            let node = *node;
            let cut = match edit {
                Edit::Write { offset, bytes } => pieces(*offset, bytes.len())
                    .map(|piece| Unit::Bytes {
                        node,
                        offset: offset + piece.of.start as u64,
                        bytes: bytes[piece.of].to_vec(),
                    })
                    .collect(),
                shape => vec![Unit::Shape {
                    node,
                    edit: shape.clone(),
                }],
            };
            units.insert(*number, cut);
        }
        for (number, waiting) in &self.names {
            units.insert(*number, vec![Unit::Name(waiting.change.clone())]);
        }
        units.into_values().flatten().collect()
    }

    fn settle(&mut self, unit: &Unit, kept: bool, torn: Option<&mut SmallRng>, lost: &mut Lost) {
        match unit {
            Unit::Bytes { bytes, .. } if !kept => {
                lost.edits += 1;
                lost.bytes += bytes.len() as u64;
            }
            Unit::Shape { .. } if !kept => lost.edits += 1,
            Unit::Name(_) if !kept => lost.names += 1,
            Unit::Bytes { node, offset, bytes } => {
                let whole = bytes.len();
                let there = torn.map_or(whole, |chance| chance.gen_range(0..whole));
                lost.kept_edits += 1;
                lost.torn += (whole - there) as u64;
                if let Some(content) = self.durable.content_mut(*node)
                    && there > 0
                {
                    content.write(*offset, &bytes[..there]);
                }
            }
            Unit::Shape { node, edit } => {
                lost.kept_edits += 1;
                if let Some(content) = self.durable.content_mut(*node) {
                    edit.apply(content);
                }
            }
            Unit::Name(change) => {
                lost.kept_names += 1;
                self.durable.rename(change);
            }
        }
    }
}

/// For each unit whether it is kept.
fn choose(units: &[Unit], loss: &PowerLoss, chance: &mut SmallRng) -> Vec<bool> {
    let strict = loss.strict_dir;
    match loss.keep {
        Keep::Nothing => vec![false; units.len()],
        Keep::Prefix | Keep::Torn => {
            let bound = chance.gen_range(0..=units.len());
            (0..units.len()).map(|place| place < bound).collect()
        }
        Keep::PerFile => {
            let mut lengths: HashMap<u64, usize> = HashMap::new();
            for unit in units {
                *lengths.entry(owner(unit, strict)).or_default() += 1;
            }
            // Drawn in the order of first appearance: a map's own order differs from run to run.
            let mut left: HashMap<u64, usize> = HashMap::new();
            let take = |unit| {
                let owner = owner(unit, strict);
                let left = left
                    .entry(owner)
                    .or_insert_with(|| chance.gen_range(0..=lengths[&owner]));
                *left = left.checked_sub(1)?;
                Some(())
            };
            let wanted: Vec<bool> = units.iter().map(take).map(|kept| kept.is_some()).collect();
            in_order(units, wanted, strict)
        }
        Keep::Scatter => {
            let coins = (0..units.len()).map(|_| chance.gen_bool(0.5)).collect();
            in_order(units, coins, strict)
        }
    }
}

/// Stands for the one journal of all names.
const JOURNAL: u64 = 0;

/// The folders in whose order a change of names stands.
fn orders(change: &Rename, strict: bool) -> Vec<u64> {
    match strict {
        true => change.folders().collect(),
        false => vec![JOURNAL],
    }
}

/// Whose order a unit belongs to: a file, a folder by its first name, or the journal.
fn owner(unit: &Unit, strict: bool) -> u64 {
    match unit {
        Unit::Bytes { node, .. } | Unit::Shape { node, .. } => *node,
        Unit::Name(change) => orders(change, strict)[0],
    }
}

/// Holds names to what any file system gives: in one folder, or in the journal, they are lost from the end only.
fn in_order(units: &[Unit], wanted: Vec<bool>, strict: bool) -> Vec<bool> {
    let mut stopped: HashSet<u64> = HashSet::new();
    let decide = |(unit, wanted): (&Unit, bool)| {
        let Unit::Name(change) = unit else { return wanted };
        let orders = orders(change, strict);
        let kept = wanted && !orders.iter().any(|order| stopped.contains(order));
        if !kept {
            stopped.extend(orders);
        }
        kept
    };
    units.iter().zip(wanted).map(decide).collect()
}

#[cfg(test)]
mod tests;
