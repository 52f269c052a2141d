//! The search for a linearization: Wing and Gong's, with Lowe's memo of what was tried, as an iteration over a list.
//!
//! An operation whose outcome nobody knows may be placed anywhere after its call, or nowhere. The search succeeds when
//! all others are placed.
//!
//! Invariants: it never recurses; whatever runs into a limit is *unknown*, never valid; an order that is given back is
//! one that [`crate::witness::walk`] accepts.

use std::collections::HashSet;

use crate::linear::{Item, Model};

/// When to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most operations of one object.
    pub ops: usize,
    /// Most optional ones among them: each doubles what there is to try.
    pub optional: usize,
    /// Most steps of the model.
    pub steps: u64,
    /// Most bytes of memo, roughly.
    pub memo: usize,
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Search {
    /// There is an order: positions in the list of operations; optional ones that had no effect are left out.
    Found {
        /// The order.
        order: Vec<usize>,
        /// Steps of the model.
        steps: u64,
    },
    /// There is none.
    None {
        /// The longest beginning of an order that was found.
        longest: Vec<usize>,
        /// The operation that could never be placed behind it before it returned.
        stuck: usize,
        /// Steps of the model.
        steps: u64,
    },
    /// A limit was reached.
    Unknown {
        /// Which.
        why: String,
    },
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            ops: 300,
            optional: 12,
            steps: 4_000_000,
            memo: 256 << 20,
        }
    }
}

/// Looks for an order of the operations that the model explains.
#[must_use]
pub fn search<M: Model>(model: &M, items: &[Item<M::Call>], limits: Limits) -> Search {
    let optional = items.iter().filter(|item| item.optional).count();
    let too_many = |what: &str, count: usize, most: usize| Search::Unknown {
        why: format!("{count} {what}, and a search of more than {most} would not end"),
    };
    if items.len() > limits.ops {
        return too_many("operations", items.len(), limits.ops);
    }
    if optional > limits.optional {
        return too_many("operations of unknown outcome", optional, limits.optional);
    }
    Run::new(model, items, limits).run()
}

/// Position in the list of events; 0 is its head, and stands for its end as well.
type Place = usize;

/// What stands in the list: the call or the return of an operation.
#[derive(Clone, Copy)]
struct Entry {
    item: usize,
    is_call: bool,
    /// Of a call: where its return stands, if it has one.
    end: Option<Place>,
}

struct Run<'a, M: Model> {
    model: &'a M,
    items: &'a [Item<M::Call>],
    limits: Limits,
    entries: Vec<Entry>,
    next: Vec<Place>,
    before: Vec<Place>,
    /// Operations that must be placed and are not.
    missing: usize,
    state: M::State,
    placed: Vec<u64>,
    stack: Vec<(Place, M::State)>,
    memo: HashSet<(Vec<u64>, M::State)>,
    steps: u64,
    longest: Vec<usize>,
    stuck: usize,
}

impl<'a, M: Model> Run<'a, M> {
    fn new(model: &'a M, items: &'a [Item<M::Call>], limits: Limits) -> Self {
        let mut events: Vec<(u64, bool, usize)> = Vec::new();
        for (at, item) in items.iter().enumerate() {
            events.push((item.start, true, at));
            if !item.optional {
                events.push((item.stop.unwrap_or(u64::MAX), false, at));
            }
        }
        events.sort_by_key(|(index, is_call, at)| (*index, !*is_call, *at));
        let head = Entry {
            item: usize::MAX,
            is_call: false,
            end: None,
        };
        let mut entries = vec![head];
        let mut calls = vec![0; items.len()];
        for (_, is_call, item) in events {
            if is_call {
                calls[item] = entries.len();
            } else {
                let end = entries.len();
                entries[calls[item]].end = Some(end);
            }
            entries.push(Entry {
                item,
                is_call,
                end: None,
            });
        }
        let count = entries.len();
        Run {
            model,
            items,
            limits,
            entries,
            next: (0..count).map(|at| (at + 1) % count).collect(),
            before: (0..count).map(|at| (at + count - 1) % count).collect(),
            missing: items.iter().filter(|item| !item.optional).count(),
            state: model.initial(),
            placed: vec![0; items.len().div_ceil(64)],
            stack: Vec::new(),
            memo: HashSet::new(),
            steps: 0,
            longest: Vec::new(),
            stuck: 0,
        }
    }

    fn run(mut self) -> Search {
        let mut at = self.next[0];
        while self.missing > 0 {
            let entry = self.entries[at];
            if at != 0 && entry.is_call {
                if self.steps >= self.limits.steps {
                    return Search::Unknown {
                        why: format!("{} steps of search did not suffice", self.limits.steps),
                    };
                }
                if self.memo.len().saturating_mul(self.weight()) >= self.limits.memo {
                    return Search::Unknown {
                        why: format!("{} bytes of memo did not suffice", self.limits.memo),
                    };
                }
                at = self.try_place(at, entry.item);
                continue;
            }
            // An operation returned and is not placed, or the list is at its end: what was placed last was wrong.
            if at != 0 && self.stack.len() >= self.longest.len() {
                self.stuck = entry.item;
                self.longest = self.order();
            }
            let Some((undo, state)) = self.stack.pop() else {
                return Search::None {
                    longest: self.longest,
                    stuck: self.stuck,
                    steps: self.steps,
                };
            };
            self.state = state;
            self.flip(self.entries[undo].item);
            self.put_back(undo);
            at = self.next[undo];
        }
        Search::Found {
            order: self.order(),
            steps: self.steps,
        }
    }

    /// Places the operation whose call stands here, if the model agrees and that was not tried; where to go on.
    fn try_place(&mut self, at: Place, item: usize) -> Place {
        self.steps += 1;
        let Some(after) = self.model.step(&self.state, &self.items[item].call) else {
            return self.next[at];
        };
        self.flip(item);
        if !self.memo.insert((self.placed.clone(), after.clone())) {
            self.flip(item);
            return self.next[at];
        }
        let before = std::mem::replace(&mut self.state, after);
        self.stack.push((at, before));
        self.take_out(at);
        self.next[0]
    }

    /// Bytes of one entry of the memo, roughly.
    fn weight(&self) -> usize {
        self.placed.len() * 8 + size_of::<(Vec<u64>, M::State)>() + 16
    }

    fn order(&self) -> Vec<usize> {
        self.stack.iter().map(|(at, _)| self.entries[*at].item).collect()
    }

    fn flip(&mut self, item: usize) {
        self.placed[item / 64] ^= 1 << (item % 64);
    }

    fn take_out(&mut self, call: Place) {
        self.unlink(call);
        if let Some(end) = self.entries[call].end {
            self.unlink(end);
            self.missing -= 1;
        }
    }

    fn put_back(&mut self, call: Place) {
        if let Some(end) = self.entries[call].end {
            self.link(end);
            self.missing += 1;
        }
        self.link(call);
    }

    fn unlink(&mut self, at: Place) {
        let (before, next) = (self.before[at], self.next[at]);
        self.next[before] = next;
        self.before[next] = before;
    }

    fn link(&mut self, at: Place) {
        let (before, next) = (self.before[at], self.next[at]);
        self.next[before] = at;
        self.before[next] = at;
    }
}
