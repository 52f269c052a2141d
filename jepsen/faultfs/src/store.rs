//! The file system without the kernel: what processes see, what is durable, and what lies between the two.
//!
//! Every change is made at once in the image that processes see, and waits, numbered, until a sync makes it in the
//! durable one. Never here: FUSE (`mount`), faults (`fault`), the choice of what a loss of power takes (`loss`).
//!
//! Invariants: applying all that waits to the durable image gives the other one, except where a failed sync has lost
//! bytes; the changes of one file, and those of one folder, become durable in their order; a file's bytes never
//! become durable by another file's sync; space in use never exceeds the capacity.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::SystemTime;

use nix::errno::Errno;

use crate::content::Content;
use crate::image::{Body, Edit, Image, Node, Place, Rename};

/// What one file system may take of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files; beyond it writes answer ENOSPC. All of it is memory of this process.
    pub capacity: u64,
    /// Files, folders and links together; beyond it creating answers ENOSPC.
    pub nodes: usize,
    /// Bytes of writes that wait for a sync. Beyond it the oldest become durable by themselves, as a kernel's
    /// write-back has it.
    pub unsynced_bytes: u64,
    /// Changes that wait for a sync, with the same end.
    pub unsynced_changes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            capacity: 1 << 30,
            nodes: 100_000,
            unsynced_bytes: 64 << 20,
            unsynced_changes: 1 << 17,
        }
    }
}

/// The longest name, as Linux has it.
const NAME_MAX: usize = 255;
/// The longest file: enough for anything of a replica, and a bound for the numbers of pages.
const FILE_MAX: u64 = 1 << 40;

/// A change of names that is not in the durable image.
#[derive(Clone, Debug)]
pub(crate) struct Waiting {
    pub(crate) change: Rename,
    /// Some sync has come after it. A file system with one journal, as ext4 is, has it durable by that; one that
    /// keeps to the letter of POSIX does not until its folder is synced.
    pub(crate) journaled: bool,
}

/// Who creates something.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
}

/// What is created.
#[derive(Clone, Debug)]
pub(crate) enum New {
    File,
    Folder,
    Link(OsString),
}

#[derive(Debug)]
pub(crate) struct Store {
    /// What processes see.
    pub(crate) now: Image,
    /// What a loss of power cannot take.
    pub(crate) durable: Image,
    /// Edits by their number, with the node.
    pub(crate) edits: BTreeMap<u64, (u64, Edit)>,
    /// The numbers of a file's edits, ascending.
    of_file: HashMap<u64, Vec<u64>>,
    pub(crate) names: BTreeMap<u64, Waiting>,
    /// How many links to a node wait in `names`.
    coming: HashMap<u64, u32>,
    /// Nodes that no process can reach any more, but the durable image might.
    doomed: Vec<u64>,
    last_change: u64,
    last_node: u64,
    weight: u64,
    used: u64,
    quota: u64,
    limits: Limits,
}

type Result<T> = std::result::Result<T, Errno>;

impl Store {
    pub(crate) fn new(limits: Limits, uid: u32, gid: u32) -> Store {
        let image = Image::new(uid, gid);
        Store {
            now: image.clone(),
            durable: image,
            edits: BTreeMap::new(),
            of_file: HashMap::new(),
            names: BTreeMap::new(),
            coming: HashMap::new(),
            doomed: Vec::new(),
            last_change: 0,
            last_node: crate::image::ROOT,
            weight: 0,
            used: 0,
            quota: limits.capacity,
            limits,
        }
    }

    pub(crate) fn node(&self, node: u64) -> Result<&Node> {
        self.now.nodes.get(&node).ok_or(Errno::ENOENT)
    }

    fn node_mut(&mut self, node: u64) -> Result<&mut Node> {
        self.now.nodes.get_mut(&node).ok_or(Errno::ENOENT)
    }

    pub(crate) fn lookup(&self, folder: u64, name: &OsStr) -> Result<u64> {
        self.node(folder)?.entries().ok_or(Errno::ENOTDIR)?;
        self.now.find(folder, name).ok_or(Errno::ENOENT)
    }

    /// The number of the last change so far: a sync covers what came before it, not what came while it lasted.
    pub(crate) fn last_change(&self) -> u64 {
        self.last_change
    }

    /// Bytes in use, and bytes that may be.
    pub(crate) fn space(&self) -> (u64, u64) {
        (self.used, self.quota)
    }

    /// Nodes in use, and how many may be.
    pub(crate) fn node_count(&self) -> (usize, usize) {
        (self.now.nodes.len(), self.limits.nodes)
    }

    /// Sets how many bytes all files may take, at most the capacity.
    pub(crate) fn set_quota(&mut self, bytes: u64) {
        self.quota = bytes.min(self.limits.capacity);
    }

    /// Changes and bytes that wait for a sync.
    pub(crate) fn unsynced(&self) -> (usize, u64) {
        (self.edits.len() + self.names.len(), self.weight)
    }

    pub(crate) fn create(&mut self, at: &Place, what: New, owner: Owner) -> Result<u64> {
        self.vacant(at)?;
        if self.now.nodes.len() >= self.limits.nodes {
            return Err(Errno::ENOSPC);
        }
        self.last_node += 1;
        let number = self.last_node;
        let node = Node {
            body: match what {
                New::File => Body::File(Content::default()),
                New::Folder => Body::Folder {
                    entries: BTreeMap::new(),
                    parent: at.folder,
                },
                New::Link(target) => Body::Link(target),
            },
            mode: owner.mode & 0o7777,
            uid: owner.uid,
            gid: owner.gid,
            changed: SystemTime::now(),
            links: 0,
            opens: 0,
            name: at.name.clone(),
        };
        // A node without a name: durable means nothing before a name leads to it.
        self.durable.nodes.insert(number, node.clone());
        self.now.nodes.insert(number, node);
        self.rename(Rename::Link {
            at: at.clone(),
            node: number,
        });
        Ok(number)
    }

    pub(crate) fn link(&mut self, node: u64, at: &Place) -> Result<()> {
        if self.node(node)?.is_folder() {
            return Err(Errno::EPERM);
        }
        self.vacant(at)?;
        self.rename(Rename::Link { at: at.clone(), node });
        Ok(())
    }

    pub(crate) fn unlink(&mut self, at: &Place) -> Result<()> {
        let node = self.lookup(at.folder, &at.name)?;
        if self.node(node)?.is_folder() {
            return Err(Errno::EISDIR);
        }
        self.rename(Rename::Unlink { at: at.clone() });
        Ok(())
    }

    pub(crate) fn remove_folder(&mut self, at: &Place) -> Result<()> {
        let node = self.lookup(at.folder, &at.name)?;
        let entries = self.node(node)?.entries().ok_or(Errno::ENOTDIR)?;
        if !entries.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        self.rename(Rename::Unlink { at: at.clone() });
        Ok(())
    }

    /// Moves a name; `replace` says whether one that is there may be lost.
    pub(crate) fn move_name(&mut self, from: &Place, to: &Place, replace: bool) -> Result<()> {
        let node = self.lookup(from.folder, &from.name)?;
        match self.lookup(to.folder, &to.name) {
            Ok(_) if !replace => return Err(Errno::EEXIST),
            Ok(before) if before == node => return Ok(()),
            Ok(before) => {
                let folder = self.node(node)?.is_folder();
                match self.node(before)?.entries() {
                    Some(_) if !folder => return Err(Errno::EISDIR),
                    Some(entries) if !entries.is_empty() => return Err(Errno::ENOTEMPTY),
                    None if folder => return Err(Errno::ENOTDIR),
                    _ => {}
                }
            }
            Err(Errno::ENOENT) => self.vacant(to)?,
            Err(error) => return Err(error),
        }
        self.rename(Rename::Move {
            from: from.clone(),
            to: to.clone(),
        });
        Ok(())
    }

    pub(crate) fn exchange(&mut self, from: &Place, to: &Place) -> Result<()> {
        self.lookup(from.folder, &from.name)?;
        self.lookup(to.folder, &to.name)?;
        if from != to {
            self.rename(Rename::Exchange {
                from: from.clone(),
                to: to.clone(),
            });
        }
        Ok(())
    }

    fn vacant(&self, at: &Place) -> Result<()> {
        if at.name.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        match self.lookup(at.folder, &at.name) {
            Ok(_) => Err(Errno::EEXIST),
            // A folder that was removed while somebody is in it takes no more names.
            Err(Errno::ENOENT) if self.node(at.folder)?.links > 0 => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn rename(&mut self, change: Rename) {
        let lost = self.now.rename(&change);
        if let Rename::Link { node, .. } = &change {
            *self.coming.entry(*node).or_default() += 1;
        }
        self.last_change += 1;
        let waiting = Waiting {
            change,
            journaled: false,
        };
        self.names.insert(self.last_change, waiting);
        if let Some(node) = lost {
            self.forget_unreachable(node);
        }
        self.write_back();
    }

    pub(crate) fn open(&mut self, node: u64) -> Result<()> {
        self.node_mut(node)?.opens += 1;
        Ok(())
    }

    pub(crate) fn close(&mut self, node: u64) {
        if let Ok(found) = self.node_mut(node) {
            found.opens = found.opens.saturating_sub(1);
            self.forget_unreachable(node);
        }
    }

    fn forget_unreachable(&mut self, node: u64) {
        let gone = |node: &Node| node.links == 0 && node.opens == 0;
        if self.now.nodes.get(&node).is_some_and(gone)
            && let Some(node_was) = self.now.nodes.remove(&node)
        {
            self.used -= node_was.content().map_or(0, Content::allocated);
            self.bury(node);
        }
    }

    /// Lets go of a node that neither image can reach, now or by what waits, or remembers to.
    fn bury(&mut self, node: u64) {
        let named = self.durable.nodes.get(&node).is_some_and(|node| node.links > 0);
        if named || self.coming.contains_key(&node) {
            self.doomed.push(node);
        } else {
            self.durable.nodes.remove(&node);
            self.forget_edits(node, u64::MAX);
        }
    }

    /// Makes a change of names durable; whoever makes some calls [`Store::reap`] after them.
    fn settle_name(&mut self, change: &Rename) {
        self.durable.rename(change);
        if let Rename::Link { node, .. } = change
            && let Some(coming) = self.coming.get_mut(node)
        {
            *coming -= 1;
            if *coming == 0 {
                self.coming.remove(node);
            }
        }
    }

    fn reap(&mut self) {
        let doomed = std::mem::take(&mut self.doomed);
        doomed.into_iter().for_each(|node| self.bury(node));
    }

    pub(crate) fn read(&self, node: u64, offset: u64, len: usize) -> Result<Vec<u8>> {
        let content = self.node(node)?.content().ok_or(Errno::EISDIR)?;
        Ok(content.read(offset, len))
    }

    pub(crate) fn size(&self, node: u64) -> u64 {
        let content = self.now.nodes.get(&node).and_then(Node::content);
        content.map_or(0, Content::size)
    }

    pub(crate) fn write(&mut self, node: u64, offset: u64, bytes: Arc<[u8]>) -> Result<()> {
        let content = self.node(node)?.content().ok_or(Errno::EISDIR)?;
        if offset.saturating_add(bytes.len() as u64) > FILE_MAX {
            return Err(Errno::EFBIG);
        }
        if self.used + content.growth(offset, bytes.len()) > self.quota {
            return Err(Errno::ENOSPC);
        }
        self.edit(node, Edit::Write { offset, bytes })
    }

    pub(crate) fn resize(&mut self, node: u64, size: u64) -> Result<()> {
        if size > FILE_MAX {
            return Err(Errno::EFBIG);
        }
        self.edit(node, Edit::Resize { size })
    }

    /// Whether `len` bytes more would fit. Nothing is set aside for them: what fits now may not fit later.
    pub(crate) fn reserve(&self, len: u64) -> Result<()> {
        match self.used.saturating_add(len) > self.quota {
            true => Err(Errno::ENOSPC),
            false => Ok(()),
        }
    }

    pub(crate) fn zero(&mut self, node: u64, offset: u64, len: u64) -> Result<()> {
        self.edit(node, Edit::Zero { offset, len })
    }

    fn edit(&mut self, node: u64, edit: Edit) -> Result<()> {
        let content = self.now.content_mut(node).ok_or(Errno::EINVAL)?;
        let before = content.allocated();
        edit.apply(content);
        self.used = self.used - before + content.allocated();
        self.node_mut(node)?.changed = SystemTime::now();
        self.last_change += 1;
        self.weight += edit.weight();
        self.edits.insert(self.last_change, (node, edit));
        self.of_file.entry(node).or_default().push(self.last_change);
        self.write_back();
        Ok(())
    }

    /// Changes who owns a node and what may be done with it, durably: no loss of power is about that.
    pub(crate) fn set_owner(
        &mut self,
        node: u64,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> Result<()> {
        self.node(node)?;
        for image in [&mut self.now, &mut self.durable] {
            if let Some(node) = image.nodes.get_mut(&node) {
                node.mode = mode.map_or(node.mode, |mode| mode & 0o7777);
                node.uid = uid.unwrap_or(node.uid);
                node.gid = gid.unwrap_or(node.gid);
            }
        }
        Ok(())
    }

    pub(crate) fn set_changed(&mut self, node: u64, at: SystemTime) -> Result<()> {
        self.node_mut(node)?.changed = at;
        Ok(())
    }

    /// Makes durable what was done to the file's bytes, and, for a file system with a journal, to any name, up to the
    /// change `upto`.
    pub(crate) fn sync_file(&mut self, node: u64, upto: u64) {
        let all = self.of_file.remove(&node).unwrap_or_default();
        let bound = all.partition_point(|number| *number <= upto);
        let edits: Vec<Edit> = all[..bound]
            .iter()
            .filter_map(|number| self.edits.remove(number).map(|(_, edit)| edit))
            .collect();
        self.weight -= edits.iter().map(Edit::weight).sum::<u64>();
        let only_writes = edits.iter().all(|edit| matches!(edit, Edit::Write { .. }));
        let present = self.now.nodes.get(&node).and_then(Node::content);
        if let Some(durable) = self.durable.content_mut(node) {
            for edit in &edits {
                match (edit, present) {
                    // Nothing else has happened to these pages since: both images can hold the same ones.
                    (Edit::Write { offset, bytes }, Some(present)) if only_writes && bound == all.len() => {
                        durable.share(present, *offset, bytes.len());
                    }
                    _ => edit.apply(durable),
                }
            }
        }
        if bound < all.len() {
            self.of_file.insert(node, all[bound..].to_vec());
        }
        self.journal(upto);
    }

    fn journal(&mut self, upto: u64) {
        for waiting in self.names.range_mut(..=upto).map(|(_, waiting)| waiting) {
            waiting.journaled = true;
        }
    }

    /// Makes durable what was done to the folder's names, and to those of other folders that it hangs on by a move.
    pub(crate) fn sync_folder(&mut self, folder: u64, upto: u64) {
        let mut folders = vec![folder];
        let mut ready = Vec::new();
        for (number, waiting) in self.names.range(..=upto).rev() {
            if waiting.change.folders().any(|folder| folders.contains(&folder)) {
                folders.extend(waiting.change.folders());
                ready.push(*number);
            }
        }
        for number in ready.into_iter().rev() {
            if let Some(waiting) = self.names.remove(&number) {
                self.settle_name(&waiting.change);
            }
        }
        self.journal(upto);
        self.reap();
    }

    /// What a kernel does with a file whose write-back failed: the pages count as clean, processes go on seeing
    /// them, and no later sync will write them. Returns the bytes that are lost this way.
    pub(crate) fn forget_edits(&mut self, node: u64, upto: u64) -> u64 {
        let all = self.of_file.remove(&node).unwrap_or_default();
        let bound = all.partition_point(|number| *number <= upto);
        let edits = all[..bound].iter().filter_map(|number| self.edits.remove(number));
        let weight = edits.map(|(_, edit)| edit.weight()).sum();
        if bound < all.len() {
            self.of_file.insert(node, all[bound..].to_vec());
        }
        self.weight -= weight;
        weight
    }

    /// Makes the oldest changes durable when too many wait.
    fn write_back(&mut self) {
        let limits = self.limits;
        let over = |store: &Store, share: u64| {
            store.weight > limits.unsynced_bytes / share
                || store.edits.len() + store.names.len() > limits.unsynced_changes / share as usize
        };
        if !over(self, 1) {
            return;
        }
        while over(self, 2) {
            let edit = self
                .edits
                .first_key_value()
                .map_or(u64::MAX, |(number, _)| *number);
            let name = self
                .names
                .first_key_value()
                .map_or(u64::MAX, |(number, _)| *number);
            if edit < name {
                self.write_back_edit();
            } else if let Some((_, waiting)) = self.names.pop_first() {
                self.settle_name(&waiting.change);
            }
        }
        self.reap();
    }

    fn write_back_edit(&mut self) {
        let Some((number, (node, edit))) = self.edits.pop_first() else {
            return;
        };
        self.weight -= edit.weight();
        if let Some(durable) = self.durable.content_mut(node) {
            edit.apply(durable);
        }
        if let Some(numbers) = self.of_file.get_mut(&node) {
            numbers.retain(|other| *other != number);
            if numbers.is_empty() {
                self.of_file.remove(&node);
            }
        }
    }

    /// Starts over from what is durable, as a machine does.
    pub(crate) fn restart(&mut self) {
        self.durable.sweep();
        self.now = self.durable.clone();
        self.edits.clear();
        self.of_file.clear();
        self.names.clear();
        self.coming.clear();
        self.doomed.clear();
        self.weight = 0;
        self.used = self.now.allocated();
    }
}
