//! A TAP device in a network namespace: the end of a cable whose other end is this process.
//!
//! The only unsafe code of this crate is here: one `ioctl`.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns};

/// Bytes of the longest frame that a device with the usual MTU sends, with room for two tags.
pub const FRAME_MAX: usize = 1522;

const DEVICE: &str = "/dev/net/tun";

/// The device. It is gone when this is dropped.
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Makes the device `name` in the namespace of the file at `namespace` (`/run/netns/r1`). It is down and has no
    /// address yet: `ip -n r1 addr add ... dev NAME; ip -n r1 link set NAME up`.
    ///
    /// # Errors
    /// The namespace is not there, the device cannot be opened (no root, no TUN in this kernel), or the name is taken
    /// or longer than 15 bytes. The error says which.
    pub fn open(namespace: &Path, name: &str) -> io::Result<Tap> {
        let place = File::open(namespace)
            .map_err(|error| said(&error, &format!("no namespace {}", namespace.display())))?;
        let name = name.to_owned();
        // A thread of its own enters the namespace, so that nothing else of this process ever leaves its own.
        let thread = std::thread::Builder::new().name(format!("tap-{name}"));
        let made = thread.spawn(move || {
            setns(&place, CloneFlags::CLONE_NEWNET)
                .map_err(|error| said(&error.into(), "the namespace can't be entered"))?;
            Tap::here(&name)
        })?;
        made.join()
            .map_err(|_| io::Error::other("the thread that makes a TAP device has panicked"))?
    }

    /// Makes it in the namespace of the calling thread.
    ///
    /// # Errors
    /// As [`Tap::open`].
    pub fn here(name: &str) -> io::Result<Tap> {
        let bytes = name.as_bytes();
        // SAFETY: plain data, for which zeros are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if bytes.is_empty() || bytes.len() >= request.ifr_name.len() {
            let why = format!("`{name}` is no name of a device: 1 to 15 bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(|error| said(&error, &format!("{DEVICE} can't be opened")))?;
        for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: an open descriptor of the right device, and a request that outlives the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
        if result != 0 {
            let error = io::Error::last_os_error();
            return Err(said(&error, &format!("the device {name} can't be made")));
        }
        Ok(Tap {
            file,
            name: name.to_owned(),
        })
    }

    /// Its name in its namespace.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes a frame that the namespace has sent; `None` when there is none at the moment.
    ///
    /// # Errors
    /// Those of the device. A device that is down has nothing to give, which is no error.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.file).read(buffer) {
            Ok(length) => Ok(Some(length)),
            Err(error) if down(&error) || error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(said(&error, &format!("device {}", self.name))),
        }
    }

    /// Gives a frame to the namespace. False when the device is down or full, or finds the frame malformed: a
    /// switch's frame is lost then, as on any network.
    ///
    /// # Errors
    /// Those of the device.
    pub fn send(&self, frame: &[u8]) -> io::Result<bool> {
        match (&self.file).write(frame) {
            Ok(_) => Ok(true),
            Err(error) if down(&error) || error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) => Err(said(&error, &format!("device {}", self.name))),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What the device answers before it is up, and when its namespace has taken it down.
fn down(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EBADFD | libc::ENETDOWN | libc::ENOBUFS)
    )
}

fn said(error: &io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
