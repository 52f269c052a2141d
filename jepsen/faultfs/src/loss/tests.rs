//! Random histories of a small tree, then a loss of power, against an account of what each file and folder was at
//! every moment. Nothing of the store's own bookkeeping is used to judge it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ffi::OsString;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::image::{Body, Place, ROOT};
use crate::store::{Limits, New, Owner};

const OWNER: Owner = Owner {
    uid: 0,
    gid: 0,
    mode: 0o600,
};

#[derive(Clone, Debug)]
enum Step {
    Create(u8),
    Write { name: u8, offset: u16, len: u16 },
    Resize { name: u8, size: u16 },
    Zero { name: u8, offset: u16, len: u16 },
    Unlink(u8),
    Rename(u8, u8),
    SyncFile(u8),
    SyncFolder(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = 0..8u8;
    let step = prop_oneof![
        2 => name.clone().prop_map(Step::Create),
        5 => (name.clone(), 0..12_000u16, 1..9_000u16)
            .prop_map(|(name, offset, len)| Step::Write { name, offset, len }),
        1 => (name.clone(), 0..12_000u16).prop_map(|(name, size)| Step::Resize { name, size }),
        1 => (name.clone(), 0..12_000u16, 1..9_000u16)
            .prop_map(|(name, offset, len)| Step::Zero { name, offset, len }),
        1 => name.clone().prop_map(Step::Unlink),
        2 => (name.clone(), name.clone()).prop_map(|(from, to)| Step::Rename(from, to)),
        2 => name.prop_map(Step::SyncFile),
        1 => any::<bool>().prop_map(Step::SyncFolder),
    ];
    vec(step, 1..60)
}

type Listing = BTreeMap<OsString, u64>;

/// All that a thing ever was, each with the moment from which on it was so.
struct Past<T> {
    /// The state that is durable for certain, and then every later one.
    states: Vec<(u64, T)>,
}

impl<T: Clone + PartialEq> Past<T> {
    fn new(first: T) -> Past<T> {
        Past {
            states: vec![(0, first)],
        }
    }

    fn last(&self) -> &T {
        &self.states.last().unwrap().1
    }

    fn synced(&mut self) {
        self.states.drain(..self.states.len() - 1);
    }

    fn at(&self, moment: u64) -> &T {
        let until = self.states.iter().take_while(|(since, _)| *since <= moment);
        &until.last().unwrap_or(&self.states[0]).1
    }
}

/// The store under test and the account of it.
struct Account {
    store: Store,
    sub: u64,
    moment: u64,
    files: BTreeMap<u64, Past<Vec<u8>>>,
    folders: BTreeMap<u64, Past<Listing>>,
    /// The names of all folders at once, since the last sync of anything.
    names: Past<BTreeMap<u64, Listing>>,
    fill: u8,
}

impl Account {
    fn new() -> Account {
        let mut store = Store::new(Limits::default(), 0, 0);
        let sub = Place {
            folder: ROOT,
            name: "sub".into(),
        };
        let sub = store.create(&sub, New::Folder, OWNER).unwrap();
        store.sync_folder(ROOT, u64::MAX);
        let mut account = Account {
            store,
            sub,
            moment: 0,
            files: BTreeMap::new(),
            folders: BTreeMap::new(),
            names: Past::new(BTreeMap::new()),
            fill: 0,
        };
        for folder in [ROOT, sub] {
            account.folders.insert(folder, Past::new(account.listing(folder)));
        }
        account.names = Past::new(account.listings());
        account
    }

    fn listing(&self, folder: u64) -> Listing {
        let node = self
            .store
            .node(folder)
            .map(|node| node.entries().unwrap().clone());
        node.unwrap_or_default()
    }

    fn listings(&self) -> BTreeMap<u64, Listing> {
        [ROOT, self.sub]
            .map(|folder| (folder, self.listing(folder)))
            .into()
    }

    fn place(&self, name: u8) -> Place {
        Place {
            folder: if name < 4 { ROOT } else { self.sub },
            name: format!("f{}", name % 4).into(),
        }
    }

    fn file(&self, name: u8) -> Option<u64> {
        let at = self.place(name);
        self.store.lookup(at.folder, &at.name).ok()
    }

    /// Adds what a file is from now on; `step` makes one page's worth of a change.
    fn edited(&mut self, node: u64, edit: impl FnOnce(&mut Vec<u8>)) {
        self.moment += 1;
        let past = self.files.get_mut(&node).unwrap();
        let mut state = past.last().clone();
        edit(&mut state);
        past.states.push((self.moment, state));
    }

    fn renamed(&mut self) {
        self.moment += 1;
        for (folder, past) in &mut self.folders {
            let node = self.store.node(*folder).unwrap();
            past.states.push((self.moment, node.entries().unwrap().clone()));
        }
        self.names.states.push((self.moment, self.listings()));
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Create(name) => {
                if let Ok(node) = self.store.create(&self.place(name), New::File, OWNER) {
                    self.files.insert(node, Past::new(Vec::new()));
                    self.renamed();
                }
            }
            Step::Write { name, offset, len } => self.write(name, offset, len),
            Step::Resize { name, size } => {
                if let Some(node) = self.file(name) {
                    self.store.resize(node, size.into()).unwrap();
                    self.edited(node, |state| state.resize(size.into(), 0));
                }
            }
            Step::Zero { name, offset, len } => {
                if let Some(node) = self.file(name) {
                    self.store.zero(node, offset.into(), len.into()).unwrap();
                    self.edited(node, |state| {
                        let from = usize::from(offset).min(state.len());
                        let to = (usize::from(offset) + usize::from(len)).min(state.len());
                        state[from..to].fill(0);
                    });
                }
            }
            Step::Unlink(name) => {
                if self.store.unlink(&self.place(name)).is_ok() {
                    self.renamed();
                }
            }
            Step::Rename(from, to) => {
                let (from, to) = (self.place(from), self.place(to));
                if self.store.move_name(&from, &to, true).is_ok() && from != to {
                    self.renamed();
                }
            }
            Step::SyncFile(name) => {
                if let Some(node) = self.file(name) {
                    self.store.sync_file(node, self.store.last_change());
                    self.files.get_mut(&node).unwrap().synced();
                    self.names.synced();
                }
            }
            Step::SyncFolder(sub) => {
                let folder = if sub { self.sub } else { ROOT };
                self.store.sync_folder(folder, self.store.last_change());
                self.folders.get_mut(&folder).unwrap().synced();
                self.names.synced();
            }
        }
    }

    fn write(&mut self, name: u8, offset: u16, len: u16) {
        let Some(node) = self.file(name) else { return };
        self.fill = self.fill.wrapping_add(1);
        let (fill, offset) = (self.fill, usize::from(offset));
        let bytes = vec![fill; len.into()];
        self.store.write(node, offset as u64, bytes.into()).unwrap();
        for piece in pieces(offset as u64, len.into()) {
            self.edited(node, |state| {
                let (from, to) = (offset + piece.of.start, offset + piece.of.end);
                if state.len() < to {
                    state.resize(to, 0);
                }
                state[from..to].fill(fill);
            });
        }
    }

    fn content(&self, node: u64) -> Vec<u8> {
        self.store.read(node, 0, usize::MAX).unwrap()
    }

    fn survivors(&self) -> Vec<u64> {
        let files = self.store.now.nodes.iter();
        files
            .filter(|(_, node)| matches!(node.body, Body::File(_)))
            .map(|(number, _)| *number)
            .collect()
    }

    /// Whether one moment explains all files that are left, and, when `names`, what leads to them.
    fn one_moment_explains(&self, names: bool) -> bool {
        let survivors = self.survivors();
        (0..=self.moment).any(|moment| {
            (!names || *self.names.at(moment) == self.listings())
                && survivors
                    .iter()
                    .all(|node| *self.files[node].at(moment) == self.content(*node))
        })
    }
}

fn history(steps: &[Step]) -> Account {
    let mut account = Account::new();
    steps.iter().for_each(|step| account.take(step));
    let used: u64 = account.store.now.allocated();
    assert_eq!(account.store.space().0, used, "space is accounted for");
    account
}

fn lose(account: &mut Account, keep: Keep, strict_dir: bool, seed: u64) -> Lost {
    let loss = PowerLoss {
        keep,
        strict_dir,
        seed,
    };
    let lost = account.store.lose_power(&loss);
    for node in account.store.now.nodes.values() {
        for child in node.entries().into_iter().flat_map(BTreeMap::values) {
            assert!(account.store.node(*child).is_ok(), "no name leads nowhere");
        }
    }
    lost
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_leaves_what_was_synced_and_no_more(steps in steps(), seed: u64) {
        let mut account = history(&steps);
        let lost = lose(&mut account, Keep::Nothing, false, seed);
        prop_assert_eq!((lost.kept_edits, lost.kept_names, lost.torn), (0, 0, 0));
        for node in account.survivors() {
            prop_assert!(account.files[&node].states[0].1 == account.content(node));
        }
        prop_assert_eq!(&account.names.states[0].1, &account.listings());
    }

    #[test]
    fn a_prefix_is_one_moment_of_everything(steps in steps(), seed: u64) {
        let mut account = history(&steps);
        lose(&mut account, Keep::Prefix, false, seed);
        prop_assert!(account.one_moment_explains(true));
    }

    #[test]
    fn each_file_keeps_a_prefix_of_its_own(steps in steps(), seed: u64) {
        let mut account = history(&steps);
        lose(&mut account, Keep::PerFile, false, seed);
        for node in account.survivors() {
            let content = account.content(node);
            prop_assert!(account.files[&node].states.iter().any(|(_, state)| *state == content));
        }
        let listings = account.listings();
        prop_assert!(account.names.states.iter().any(|(_, state)| *state == listings));
    }

    #[test]
    fn a_torn_write_is_torn_once(steps in steps(), seed: u64) {
        let mut account = history(&steps);
        let lost = lose(&mut account, Keep::Torn, false, seed);
        prop_assert!(lost.torn <= 4096);
        if lost.torn == 0 {
            prop_assert!(account.one_moment_explains(true));
        }
        let moments = |node: &u64| {
            let content = account.content(*node);
            account.files[node].states.iter().any(|(_, state)| *state == content)
        };
        let odd = account.survivors().iter().filter(|node| !moments(node)).count();
        prop_assert!(odd <= 1, "one file is torn, not {odd}");
    }

    #[test]
    fn a_strict_loss_keeps_of_each_folder_what_it_was_since_its_sync(steps in steps(), seed: u64, all: bool) {
        let mut account = history(&steps);
        let keep = if all { Keep::Nothing } else { Keep::Scatter };
        lose(&mut account, keep, true, seed);
        for (folder, past) in &account.folders {
            let listing = account.listing(*folder);
            prop_assert!(past.states.iter().any(|(_, state)| *state == listing));
        }
    }

    #[test]
    fn what_is_synced_altogether_is_there_altogether(steps in steps(), seed: u64) {
        let mut account = history(&steps);
        let files: Vec<u64> = account.survivors();
        for node in &files {
            account.store.sync_file(*node, u64::MAX);
        }
        for folder in [ROOT, account.sub] {
            account.store.sync_folder(folder, u64::MAX);
        }
        let before = (account.listings(), files.iter().map(|node| account.content(*node)).collect::<Vec<_>>());
        let lost = lose(&mut account, Keep::Nothing, true, seed);
        prop_assert!(!lost.any());
        let after = (account.listings(), files.iter().map(|node| account.content(*node)).collect::<Vec<_>>());
        prop_assert!(before == after);
        prop_assert_eq!(account.store.unsynced(), (0, 0));
    }

    #[test]
    fn one_seed_loses_the_same_twice(steps in steps(), seed: u64, strict: bool) {
        for keep in [Keep::Prefix, Keep::Torn, Keep::PerFile, Keep::Scatter] {
            let [one, two] = [(), ()].map(|()| {
                let mut account = history(&steps);
                let lost = lose(&mut account, keep, strict, seed);
                let contents: Vec<_> = account.survivors().into_iter().collect::<std::collections::BTreeSet<_>>()
                    .into_iter().map(|node| (node, account.content(node))).collect();
                (lost, account.listings(), contents)
            });
            prop_assert!(one == two, "{keep:?}");
        }
    }
}

/// A store with one synced file of `old` bytes.
fn with_file(limits: Limits) -> (Store, u64) {
    let mut store = Store::new(limits, 0, 0);
    let at = Place {
        folder: ROOT,
        name: "f".into(),
    };
    let node = store.create(&at, New::File, OWNER).unwrap();
    store.sync_folder(ROOT, u64::MAX);
    (store, node)
}

fn nothing() -> PowerLoss {
    PowerLoss {
        keep: Keep::Nothing,
        strict_dir: false,
        seed: 0,
    }
}

#[test]
fn a_sync_covers_what_came_before_it_only() {
    let (mut store, node) = with_file(Limits::default());
    store.write(node, 0, b"early".as_slice().into()).unwrap();
    let upto = store.last_change();
    store.write(node, 5, b"late".as_slice().into()).unwrap();
    store.sync_file(node, upto);
    store.lose_power(&nothing());
    assert_eq!(store.read(node, 0, 100).unwrap(), b"early");
}

#[test]
fn a_sync_that_failed_has_lost_its_bytes_for_good() {
    let (mut store, node) = with_file(Limits::default());
    store.write(node, 0, vec![1; 8192].into()).unwrap();
    assert_eq!(store.forget_edits(node, u64::MAX), 8192);
    store.write(node, 8192, vec![2; 10].into()).unwrap();
    store.sync_file(node, u64::MAX);
    assert_eq!(
        store.read(node, 0, 1).unwrap(),
        [1],
        "processes go on seeing them"
    );
    store.lose_power(&nothing());
    let mut expected = vec![0; 8192];
    expected.extend([2; 10]);
    assert_eq!(store.read(node, 0, 10_000).unwrap(), expected);
}

#[test]
fn too_many_changes_write_the_oldest_back() {
    let limits = Limits {
        unsynced_bytes: 10_000,
        ..Limits::default()
    };
    let (mut store, node) = with_file(limits);
    for place in 0..100u8 {
        store
            .write(node, u64::from(place) * 1000, vec![place; 1000].into())
            .unwrap();
        assert!(store.unsynced().1 <= 10_000);
    }
    store.lose_power(&nothing());
    let left = store.read(node, 0, usize::MAX).unwrap();
    assert!(left.len() >= 90_000 && left.len() < 100_000, "{}", left.len());
    assert!(
        left.chunks(1000)
            .enumerate()
            .all(|(place, chunk)| chunk == vec![place as u8; 1000])
    );
}

#[test]
fn what_is_gone_for_both_images_takes_no_memory() {
    let mut store = Store::new(Limits::default(), 0, 0);
    for round in 0..10 {
        let at = Place {
            folder: ROOT,
            name: format!("t{round}").into(),
        };
        let node = store.create(&at, New::File, OWNER).unwrap();
        store.open(node).unwrap();
        store.write(node, 0, vec![1; 5000].into()).unwrap();
        store.unlink(&at).unwrap();
        assert_eq!(
            store.read(node, 0, 1).unwrap(),
            [1],
            "open files outlive their name"
        );
        store.close(node);
    }
    store.sync_folder(ROOT, u64::MAX);
    assert_eq!((store.now.nodes.len(), store.durable.nodes.len()), (1, 1));
    assert_eq!((store.unsynced(), store.space().0), ((0, 0), 0));
}
