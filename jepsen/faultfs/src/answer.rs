//! Answers of the store in FUSE's words.

use std::ffi::OsStr;
use std::time::Duration;

use fuser::{Errno as Code, FileAttr, FileType, Generation, INodeNo, ReplyEmpty, ReplyEntry, Request};
use nix::errno::Errno;

use crate::content::PAGE;
use crate::fault::Outcome;
use crate::image::{Body, Place};
use crate::shared::Core;
use crate::store::Owner;

/// How long the kernel may believe an answer.
pub(crate) const TTL: Duration = Duration::ZERO;

pub(crate) fn code(errno: Errno) -> Code {
    Code::from_i32(errno as i32)
}

pub(crate) fn place(folder: INodeNo, name: &OsStr) -> Place {
    Place {
        folder: folder.0,
        name: name.to_owned(),
    }
}

/// The outcome that faults impose, for operations on which only an error makes sense.
pub(crate) fn permitted(outcome: Outcome) -> Result<(), Errno> {
    match outcome {
        Outcome::Fail(errno) => Err(errno),
        _ => Ok(()),
    }
}

pub(crate) fn attributes(core: &Core, node: u64) -> Result<FileAttr, Errno> {
    let found = core.store.node(node)?;
    let (kind, size, blocks, nlink) = match &found.body {
        Body::File(content) => {
            let blocks = content.allocated() / 512;
            (FileType::RegularFile, content.size(), blocks, found.links)
        }
        // One name means that folders within are not counted, as on btrfs.
        Body::Folder { .. } => (FileType::Directory, PAGE, 8, 1),
        Body::Link(target) => (FileType::Symlink, target.len() as u64, 0, found.links),
    };
    Ok(FileAttr {
        ino: INodeNo(node),
        size,
        blocks,
        atime: found.changed,
        mtime: found.changed,
        ctime: found.changed,
        crtime: found.changed,
        kind,
        perm: found.mode as u16,
        nlink,
        uid: found.uid,
        gid: found.gid,
        rdev: 0,
        blksize: PAGE as u32,
        flags: 0,
    })
}

pub(crate) fn kind(core: &Core, node: u64) -> FileType {
    match core.store.node(node).map(|node| &node.body) {
        Ok(Body::Folder { .. }) => FileType::Directory,
        Ok(Body::Link(_)) => FileType::Symlink,
        _ => FileType::RegularFile,
    }
}

pub(crate) fn reply_entry(core: &Core, node: Result<u64, Errno>, reply: ReplyEntry) {
    match node.and_then(|node| attributes(core, node)) {
        Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
        Err(errno) => reply.error(code(errno)),
    }
}

pub(crate) fn reply_empty(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(code(errno)),
    }
}

pub(crate) fn owner(request: &Request, mode: u32, umask: u32) -> Owner {
    Owner {
        uid: request.uid(),
        gid: request.gid(),
        mode: mode & !umask,
    }
}
