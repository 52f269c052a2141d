//! A whole file system at one moment: nodes by number, and names in folders.
//!
//! Two of them exist: what processes see, and what a loss of power leaves. Both change only by [`Change`]s, so that
//! the second can follow the first at its own pace. Never here: checks on behalf of a caller (`store`), and when a
//! change becomes durable (`store`, `loss`).
//!
//! Invariant: `links` of a node is the number of entries of this image that lead to it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::SystemTime;

use crate::content::Content;

/// The root folder's number, as FUSE has it.
pub(crate) const ROOT: u64 = 1;

#[derive(Clone, Debug)]
pub(crate) enum Body {
    File(Content),
    Folder {
        entries: BTreeMap<OsString, u64>,
        parent: u64,
    },
    Link(OsString),
}

#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) body: Body,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) changed: SystemTime,
    pub(crate) links: u32,
    /// Open handles; only counted in the image that processes see.
    pub(crate) opens: u32,
    /// The last name it got, for faults that ask for names.
    pub(crate) name: OsString,
}

impl Node {
    pub(crate) fn content(&self) -> Option<&Content> {
        match &self.body {
            Body::File(content) => Some(content),
            _ => None,
        }
    }

    pub(crate) fn entries(&self) -> Option<&BTreeMap<OsString, u64>> {
        match &self.body {
            Body::Folder { entries, .. } => Some(entries),
            _ => None,
        }
    }

    pub(crate) fn is_folder(&self) -> bool {
        matches!(self.body, Body::Folder { .. })
    }
}

/// A folder and a name in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) folder: u64,
    pub(crate) name: OsString,
}

/// A change of names. Each is atomic.
#[derive(Clone, Debug)]
pub(crate) enum Rename {
    Link { at: Place, node: u64 },
    Unlink { at: Place },
    Move { from: Place, to: Place },
    Exchange { from: Place, to: Place },
}

impl Rename {
    /// The folders that it changes.
    pub(crate) fn folders(&self) -> impl Iterator<Item = u64> {
        let (one, two) = match self {
            Rename::Link { at, .. } | Rename::Unlink { at } => (at.folder, None),
            Rename::Move { from, to } | Rename::Exchange { from, to } => (from.folder, Some(to.folder)),
        };
        std::iter::once(one).chain(two)
    }
}

/// A change of one file's bytes.
#[derive(Clone, Debug)]
pub(crate) enum Edit {
    Write { offset: u64, bytes: Arc<[u8]> },
    Resize { size: u64 },
    Zero { offset: u64, len: u64 },
}

impl Edit {
    pub(crate) fn apply(&self, content: &mut Content) {
        match self {
            Edit::Write { offset, bytes } => content.write(*offset, bytes),
            Edit::Resize { size } => content.resize(*size),
            Edit::Zero { offset, len } => content.zero(*offset, *len),
        }
    }

    /// Bytes that it holds on to.
    pub(crate) fn weight(&self) -> u64 {
        match self {
            Edit::Write { bytes, .. } => bytes.len() as u64,
            Edit::Resize { .. } | Edit::Zero { .. } => 0,
        }
    }
}

/// The nodes and what leads to them.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) nodes: HashMap<u64, Node>,
}

impl Image {
    pub(crate) fn new(uid: u32, gid: u32) -> Image {
        let root = Node {
            body: Body::Folder {
                entries: BTreeMap::new(),
                parent: ROOT,
            },
            mode: 0o755,
            uid,
            gid,
            changed: SystemTime::now(),
            links: 1,
            opens: 0,
            name: OsString::new(),
        };
        Image {
            nodes: HashMap::from([(ROOT, root)]),
        }
    }

    pub(crate) fn find(&self, folder: u64, name: &OsStr) -> Option<u64> {
        self.nodes.get(&folder)?.entries()?.get(name).copied()
    }

    pub(crate) fn content_mut(&mut self, node: u64) -> Option<&mut Content> {
        match &mut self.nodes.get_mut(&node)?.body {
            Body::File(content) => Some(content),
            _ => None,
        }
    }

    fn put(&mut self, at: &Place, node: u64) {
        if let Some(Node {
            body: Body::Folder { entries, .. },
            changed,
            ..
        }) = self.nodes.get_mut(&at.folder)
        {
            entries.insert(at.name.clone(), node);
            *changed = SystemTime::now();
        }
        if let Some(node) = self.nodes.get_mut(&node) {
            node.name.clone_from(&at.name);
            node.links += 1;
            if let Body::Folder { parent, .. } = &mut node.body {
                *parent = at.folder;
            }
        }
    }

    fn take(&mut self, at: &Place) -> Option<u64> {
        let Node {
            body: Body::Folder { entries, .. },
            changed,
            ..
        } = self.nodes.get_mut(&at.folder)?
        else {
            return None;
        };
        let number = entries.remove(&at.name)?;
        *changed = SystemTime::now();
        if let Some(node) = self.nodes.get_mut(&number) {
            node.links -= 1;
        }
        Some(number)
    }

    /// Makes the change, and names the node that lost its place, which may now have no name at all.
    pub(crate) fn rename(&mut self, change: &Rename) -> Option<u64> {
        match change {
            Rename::Link { at, node } => {
                let before = self.take(at);
                self.put(at, *node);
                before
            }
            Rename::Unlink { at } => self.take(at),
            Rename::Move { from, to } => {
                // Two names of one file: POSIX has this do nothing.
                if self.find(from.folder, &from.name) == self.find(to.folder, &to.name) {
                    return None;
                }
                let node = self.take(from)?;
                let before = self.take(to);
                self.put(to, node);
                before
            }
            Rename::Exchange { from, to } => {
                let (one, two) = (self.take(from)?, self.take(to)?);
                self.put(to, one);
                self.put(from, two);
                None
            }
        }
    }

    /// Forgets every node that no name leads to.
    pub(crate) fn sweep(&mut self) {
        let mut seen = HashSet::from([ROOT]);
        let mut open = vec![ROOT];
        while let Some(number) = open.pop() {
            let entries = self.nodes.get(&number).and_then(Node::entries);
            for child in entries.into_iter().flat_map(BTreeMap::values) {
                if seen.insert(*child) {
                    open.push(*child);
                }
            }
        }
        self.nodes.retain(|number, _| seen.contains(number));
    }

    pub(crate) fn allocated(&self) -> u64 {
        let contents = self.nodes.values().filter_map(Node::content);
        contents.map(Content::allocated).sum()
    }
}
