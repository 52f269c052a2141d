//! The kernel's requests, translated for the store and back. Nothing is decided here that a test of the store could
//! not see.
//!
//! The kernel keeps nothing: no attributes, no names, no pages. Every write of a process is a request at once, every
//! read sees what is stored at that moment, and a loss of power needs no word to the kernel. Locks are the kernel's
//! own, which is right for processes of one machine.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, Errno as Code, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use nix::errno::Errno;

use crate::answer::{TTL, attributes, code, kind, owner, permitted, place, reply_empty, reply_entry};
use crate::content::PAGE;
use crate::fault::{Operation, Outcome};
use crate::image::Body;
use crate::shared::{Core, Handle};
use crate::store::New;

/// The largest write in one request; as much as the kernel gathers for one system call.
const MAX_WRITE: u32 = 1 << 20;

pub(crate) struct Driver {
    pub(crate) handle: Handle,
}

fn open_flags() -> FopenFlags {
    FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
}

/// The node of a write: the kernel's own write-back of a mapping names a handle that need not exist any more.
fn written_node(core: &mut Core, node: u64, handle: u64, flags: WriteFlags) -> Result<u64, Errno> {
    match core.opened(handle) {
        Ok(open) => Ok(open.node),
        Err(_) if flags.contains(WriteFlags::FUSE_WRITE_CACHE) => Ok(node),
        Err(errno) => Err(errno),
    }
}

fn sync(core: &mut Core, outcome: Outcome, handle: u64, upto: u64) -> Result<(), Errno> {
    core.counters.syncs += 1;
    let node = core.opened(handle)?.node;
    match outcome {
        Outcome::Lie => return Ok(()),
        Outcome::Fail(errno) => {
            core.store.forget_edits(node, upto);
            return Err(errno);
        }
        _ => {}
    }
    match core.store.node(node)?.is_folder() {
        true => core.store.sync_folder(node, upto),
        false => core.store.sync_file(node, upto),
    }
    Ok(())
}

fn allocate(core: &mut Core, node: u64, offset: u64, length: u64, mode: i32) -> Result<(), Errno> {
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
    let end = offset.checked_add(length).ok_or(Errno::EFBIG)?;
    let size = core.store.size(node);
    match mode {
        KEEP => core.store.reserve(length),
        PUNCH => core.store.zero(node, offset, length),
        0 | ZERO => {
            core.store.reserve(length)?;
            if size < end {
                core.store.resize(node, end)?;
            }
            match mode {
                ZERO => core.store.zero(node, offset, length),
                _ => Ok(()),
            }
        }
        _ if mode == ZERO | KEEP => core.store.zero(node, offset, length),
        _ => Err(Errno::EOPNOTSUPP),
    }
}

impl Driver {
    /// A change of names: gated, counted, and made by `act`.
    fn name<R: Send + 'static>(
        &self,
        name: &OsStr,
        reply: R,
        act: impl FnOnce(&mut Core) -> Result<u64, Errno> + Send + 'static,
        answer: impl FnOnce(&mut Core, Result<u64, Errno>, R) + Send + 'static,
    ) {
        let name = name.to_owned();
        self.handle.gate(
            Operation::Name,
            move |_| Some(name),
            move |core, outcome| {
                let done = permitted(outcome).and_then(|()| act(core));
                let done = core.counted(done);
                core.counters.names += u64::from(done.is_ok());
                answer(core, done, reply);
            },
        );
    }

    fn name_empty(
        &self,
        name: &OsStr,
        reply: ReplyEmpty,
        act: impl FnOnce(&mut Core) -> Result<(), Errno> + Send + 'static,
    ) {
        let answer = |_: &mut Core, done: Result<u64, Errno>, reply| reply_empty(done.map(drop), reply);
        self.name(name, reply, |core| act(core).map(|()| 0), answer);
    }

    fn name_entry(
        &self,
        name: &OsStr,
        reply: ReplyEntry,
        act: impl FnOnce(&mut Core) -> Result<u64, Errno> + Send + 'static,
    ) {
        self.name(name, reply, act, |core, done, reply| {
            reply_entry(core, done, reply)
        });
    }

    /// An operation on a file's bytes or on its durability.
    fn bytes(
        &self,
        operation: Operation,
        node: INodeNo,
        job: impl FnOnce(&mut Core, Outcome) + Send + 'static,
    ) {
        let name = move |core: &Core| core.store.node(node.0).ok().map(|node| node.name.clone());
        self.handle.gate(operation, name, job);
    }

    fn synced(&self, node: INodeNo, handle: FileHandle, reply: ReplyEmpty) {
        let upto = self.handle.shared.core().store.last_change();
        self.bytes(Operation::Sync, node, move |core, outcome| {
            reply_empty(sync(core, outcome, handle.0, upto), reply);
        });
    }
}

impl Filesystem for Driver {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // An older kernel refuses shared mappings of files without it, and no more.
        let _ = config.add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP);
        // The bound is below what the library can take, so it is never refused.
        let _ = config.set_max_write(MAX_WRITE);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let core = self.handle.shared.core();
        reply_entry(&core, core.store.lookup(parent.0, name), reply);
    }

    fn getattr(&self, _request: &Request, node: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match attributes(&self.handle.shared.core(), node.0) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _changed: Option<SystemTime>,
        handle: Option<FileHandle>,
        _created: Option<SystemTime>,
        _checked: Option<SystemTime>,
        _backed_up: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let act = move |core: &mut Core, outcome: Outcome| -> Result<FileAttr, Errno> {
            if let Some(handle) = handle {
                core.opened(handle.0)?;
            }
            core.store.set_owner(node.0, mode, uid, gid)?;
            if let Some(size) = size {
                permitted(outcome)?;
                core.store.resize(node.0, size)?;
                core.counters.writes += 1;
            }
            match modified {
                Some(TimeOrNow::SpecificTime(at)) => core.store.set_changed(node.0, at)?,
                Some(TimeOrNow::Now) => core.store.set_changed(node.0, SystemTime::now())?,
                None => {}
            }
            attributes(core, node.0)
        };
        let answer = move |core: &mut Core, outcome| match act(core, outcome) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(errno) => reply.error(code(errno)),
        };
        match size {
            Some(_) => self.bytes(Operation::Write, node, answer),
            None => answer(&mut self.handle.shared.core(), Outcome::Pass),
        }
    }

    fn readlink(&self, _request: &Request, node: INodeNo, reply: ReplyData) {
        match self
            .handle
            .shared
            .core()
            .store
            .node(node.0)
            .map(|node| &node.body)
        {
            Ok(Body::Link(target)) => reply.data(target.as_encoded_bytes()),
            Ok(_) => reply.error(Code::EINVAL),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _device: u32,
        reply: ReplyEntry,
    ) {
        if mode & libc::S_IFMT != libc::S_IFREG {
            return reply.error(Code::EPERM);
        }
        let (at, owner) = (place(parent, name), owner(request, mode, umask));
        self.name_entry(name, reply, move |core| core.store.create(&at, New::File, owner));
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let (at, owner) = (place(parent, name), owner(request, mode, umask));
        self.name_entry(name, reply, move |core| {
            core.store.create(&at, New::Folder, owner)
        });
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (at, owner) = (place(parent, name), owner(request, 0o777, 0));
        let what = New::Link(target.as_os_str().to_owned());
        self.name_entry(name, reply, move |core| core.store.create(&at, what, owner));
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let (at, owner) = (place(parent, name), owner(request, mode, umask));
        let act = move |core: &mut Core| core.store.create(&at, New::File, owner);
        self.name(name, reply, act, |core, node, reply| {
            let made = node.and_then(|node| Ok((attributes(core, node)?, core.open(node)?)));
            match made {
                Ok((attributes, handle)) => {
                    reply.created(&TTL, &attributes, Generation(0), FileHandle(handle), open_flags());
                }
                Err(errno) => reply.error(code(errno)),
            }
        });
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let at = place(parent, name);
        self.name_empty(name, reply, move |core| core.store.unlink(&at));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let at = place(parent, name);
        self.name_empty(name, reply, move |core| core.store.remove_folder(&at));
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = (place(parent, name), place(new_parent, new_name));
        self.name_empty(new_name, reply, move |core| {
            if flags.contains(RenameFlags::RENAME_WHITEOUT) {
                Err(Errno::EINVAL)
            } else if flags.contains(RenameFlags::RENAME_EXCHANGE) {
                core.store.exchange(&from, &to)
            } else {
                let replace = !flags.contains(RenameFlags::RENAME_NOREPLACE);
                core.store.move_name(&from, &to, replace)
            }
        });
    }

    fn link(&self, _request: &Request, node: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let at = place(parent, name);
        self.name_entry(name, reply, move |core| {
            core.store.link(node.0, &at)?;
            Ok(node.0)
        });
    }

    fn open(&self, _request: &Request, node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.handle.shared.core().open(node.0) {
            Ok(handle) => reply.opened(FileHandle(handle), open_flags()),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn opendir(&self, _request: &Request, node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.handle.shared.core().open(node.0) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn release(
        &self,
        _request: &Request,
        _node: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.handle.shared.core().close(handle.0);
        reply.ok();
    }

    fn releasedir(
        &self,
        _request: &Request,
        _node: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.handle.shared.core().close(handle.0);
        reply.ok();
    }

    fn read(
        &self,
        _request: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.bytes(Operation::Read, node, move |core, outcome| {
            let read = permitted(outcome)
                .and_then(|()| core.opened(handle.0).map(|open| open.node))
                .and_then(|node| core.store.read(node, offset, size.min(MAX_WRITE) as usize));
            core.counters.reads += u64::from(read.is_ok());
            match (read, outcome) {
                (Ok(mut bytes), Outcome::Flip(bit)) if !bytes.is_empty() => {
                    let bit = bit % (8 * bytes.len() as u64);
                    bytes[bit as usize / 8] ^= 1 << (bit % 8);
                    reply.data(&bytes);
                }
                (Ok(bytes), _) => reply.data(&bytes),
                (Err(errno), _) => reply.error(code(errno)),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data: Arc<[u8]> = Arc::from(data);
        let length = data.len() as u32;
        let act = move |core: &mut Core, outcome: Outcome| {
            permitted(outcome)?;
            let node = written_node(core, node.0, handle.0, write_flags)?;
            // The kernel's idea of the end can be old.
            let offset = match flags.0 & libc::O_APPEND {
                0 => offset,
                _ => core.store.size(node),
            };
            let written = core.store.write(node, offset, data);
            core.counted(written)?;
            core.counters.writes += 1;
            core.counters.written_bytes += u64::from(length);
            if flags.0 & libc::O_DSYNC != 0 {
                let upto = core.store.last_change();
                core.store.sync_file(node, upto);
            }
            Ok(())
        };
        self.bytes(Operation::Write, node, move |core, outcome| {
            match act(core, outcome) {
                Ok(()) => reply.written(length),
                Err(errno) => reply.error(code(errno)),
            }
        });
    }

    fn fallocate(
        &self,
        _request: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.bytes(Operation::Write, node, move |core, outcome| {
            let done = permitted(outcome)
                .and_then(|()| core.opened(handle.0).map(|open| open.node))
                .and_then(|node| allocate(core, node, offset, length, mode));
            core.counters.writes += u64::from(done.is_ok());
            reply_empty(core.counted(done), reply);
        });
    }

    fn fsync(&self, _request: &Request, node: INodeNo, handle: FileHandle, _data: bool, reply: ReplyEmpty) {
        self.synced(node, handle, reply);
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        node: INodeNo,
        handle: FileHandle,
        _data: bool,
        reply: ReplyEmpty,
    ) {
        self.synced(node, handle, reply);
    }

    fn readdir(
        &self,
        _request: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let mut core = self.handle.shared.core();
        let entries = match list(&mut core, node.0, handle.0, offset == 0) {
            Ok(entries) => entries,
            Err(errno) => return reply.error(code(errno)),
        };
        for (place, (child, name)) in entries.iter().enumerate().skip(offset as usize) {
            if reply.add(INodeNo(*child), place as u64 + 1, kind(&core, *child), name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _node: INodeNo, reply: ReplyStatfs) {
        let core = self.handle.shared.core();
        let (used, quota) = core.store.space();
        let free = quota.saturating_sub(used) / PAGE;
        let (nodes, most) = core.store.node_count();
        let (blocks, left) = (quota / PAGE, most.saturating_sub(nodes) as u64);
        reply.statfs(
            blocks,
            free,
            free,
            most as u64,
            left,
            PAGE as u32,
            255,
            PAGE as u32,
        );
    }
}

/// A folder's entries as they were when its reading began, so that whoever removes what it reads misses nothing.
fn list(core: &mut Core, node: u64, handle: u64, afresh: bool) -> Result<Vec<(u64, OsString)>, Errno> {
    if afresh {
        let Body::Folder { entries, parent } = &core.store.node(node)?.body else {
            return Err(Errno::ENOTDIR);
        };
        let dots = [(node, OsString::from(".")), (*parent, OsString::from(".."))];
        let all = entries.iter().map(|(name, child)| (*child, name.clone()));
        let all: Vec<_> = dots.into_iter().chain(all).collect();
        core.opened(handle)?.entries = all;
    }
    Ok(core.opened(handle)?.entries.clone())
}
