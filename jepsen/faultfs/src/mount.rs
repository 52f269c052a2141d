//! Mounting, unmounting, and finding out whether this machine allows it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use fuser::{BackgroundSession, Config, MountOption, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::driver::Driver;
use crate::shared::{Handle, Settings};

/// Why a file system could not be mounted.
#[derive(Debug)]
pub struct MountError {
    path: PathBuf,
    cause: String,
    next: &'static str,
}

impl fmt::Display for MountError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        write!(f, "cannot mount faultfs on {path}: {}; {}", self.cause, self.next)
    }
}

impl std::error::Error for MountError {}

impl MountError {
    fn new(path: &Path, error: &io::Error) -> MountError {
        let errno = error.raw_os_error().map(Errno::from_raw);
        let next = match errno {
            Some(Errno::EPERM | Errno::EACCES) => {
                "run as root, or inside `unshare --user --map-root-user --mount`"
            }
            Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => "load FUSE with `modprobe fuse`",
            _ => "see `jepsen doctor`",
        };
        MountError {
            path: path.to_owned(),
            cause: error.to_string(),
            next,
        }
    }
}

/// A mounted file system. Dropping it ends it: requests that wait are aborted, the mount is gone.
#[derive(Debug)]
pub struct FaultFs {
    handle: Handle,
    path: PathBuf,
    session: Option<BackgroundSession>,
}

/// Where FUSE is spoken.
const DEVICE: &str = "/dev/fuse";

impl FaultFs {
    /// Mounts an empty file system on the folder `at`, in the mount namespace of this thread. It lives in this
    /// process's memory, within the limits of the settings, and ends with it.
    ///
    /// # Errors
    /// Without FUSE or without the right to mount; the text says what to do.
    pub fn mount(at: &Path, settings: &Settings) -> Result<FaultFs, MountError> {
        let failed = |error: io::Error| MountError::new(at, &error);
        // Asked first: the library's own way out, a helper program, would hide the cause.
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(DEVICE)
            .map_err(|error| MountError::new(Path::new(DEVICE), &error))?;
        let handle = Handle::new(settings).map_err(failed)?;
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("faultfs".to_owned()),
            MountOption::DefaultPermissions,
            MountOption::NoAtime,
        ];
        config.acl = SessionACL::All;
        let driver = Driver {
            handle: handle.clone(),
        };
        let session = fuser::spawn_mount(driver, at, &config).map_err(failed)?;
        Ok(FaultFs {
            handle,
            path: at.to_owned(),
            session: Some(session),
        })
    }

    /// Commands it.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unmounts it, whoever still uses it: their requests fail from now on.
    ///
    /// # Errors
    /// From the operating system, as when it is called in another mount namespace than [`FaultFs::mount`] was.
    pub fn unmount(mut self) -> io::Result<()> {
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(session) = self.session.take() else {
            return Ok(());
        };
        // The force aborts what waits for an answer, stalled requests included, and ends the session's thread.
        umount2(&self.path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH)?;
        self.handle.room.release_all();
        match session.join() {
            // What the force leaves behind: the thread was told of the abort before it was of the unmount.
            Err(error) if error.raw_os_error() == Some(Errno::ECONNABORTED as i32) => Ok(()),
            ended => ended,
        }
    }
}

impl Drop for FaultFs {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("faultfs: {} is still mounted: {error}", self.path.display());
        }
    }
}

/// Whether this thread may mount such a file system: mounts one on the folder `at`, uses it, and ends it.
///
/// # Errors
/// The reason why not.
pub fn probe(at: &Path) -> Result<(), MountError> {
    let mounted = FaultFs::mount(at, &Settings::default())?;
    let file = mounted.path().join("probe");
    let used = std::fs::write(&file, b"probe").and_then(|()| std::fs::read(&file));
    let result = match used {
        Ok(bytes) if bytes == b"probe" => Ok(()),
        Ok(_) => Err(io::Error::other("what was written does not read back")),
        Err(error) => Err(error),
    };
    result
        .and_then(|()| mounted.unmount())
        .map_err(|error| MountError::new(at, &error))
}
