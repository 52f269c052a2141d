//! A mount for a test, in a mount namespace of the test's own thread: nothing shows on the machine, nothing is left.

use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use palyra_jepsen_faultfs::{FaultFs, Handle, Settings};
use tempfile::TempDir;

/// A mounted file system, and a folder on tmpfs to compare it with.
pub(crate) struct Mounted {
    // Before the folder that it is mounted on.
    pub(crate) fs: FaultFs,
    pub(crate) handle: Handle,
    pub(crate) plain: PathBuf,
    folder: TempDir,
}

impl Mounted {
    /// `None`, with a message, where this machine does not allow it.
    pub(crate) fn new() -> Option<Mounted> {
        let skip = |what: &str, why: &dyn std::fmt::Display| {
            eprintln!("skipped: {what}: {why}");
            None
        };
        if let Err(errno) = unshare(CloneFlags::CLONE_NEWNS) {
            return skip("a mount namespace needs root", &errno);
        }
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("making mounts private");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [faulty, plain] = ["faulty", "plain"].map(|name| folder.path().join(name));
        for path in [&faulty, &plain] {
            std::fs::create_dir(path).expect("creating a folder");
        }
        let tmpfs = Some("tmpfs");
        mount(tmpfs, &plain, tmpfs, MsFlags::empty(), None::<&str>).expect("mounting a tmpfs");
        match FaultFs::mount(&faulty, &Settings::default()) {
            Ok(fs) => Some(Mounted {
                handle: fs.handle(),
                fs,
                plain,
                folder,
            }),
            Err(error) => skip("FUSE", &error),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.fs.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The file system itself ends by its own drop; a tmpfs has none.
        nix::mount::umount(&self.plain).expect("unmounting the tmpfs");
        let _ = &self.folder;
    }
}
