//! What the supervisor, the warden and the first process of a sandbox say to each other: JSON, one line each.
//!
//! What never lives here: what they do about it. Invariant: times are milliseconds of `CLOCK_BOOTTIME`, which
//! goes on while the machine sleeps, so that a lease that ran out in a suspended laptop is over when it
//! wakes.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::time::{ClockId, clock_gettime};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest line; parameters don't go this way.
const LINE_MAX: usize = 1 << 20;

/// Milliseconds since boot, sleep included.
#[must_use]
pub fn boot_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap_or_else(|_| nix::sys::time::TimeSpec::new(0, 0));
    u64::try_from(now.tv_sec()).unwrap_or(0) * 1000 + u64::try_from(now.tv_nsec()).unwrap_or(0) / 1_000_000
}

/// An argument of a tool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Arg {
    /// As it is.
    Plain(String),
    /// A file of the tool, by its path below the tool's folder.
    Tool(String),
}

/// What a lease may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// Of all its processes.
    pub memory_bytes: u64,
    /// At a time.
    pub processes: u32,
    /// Of all that it writes.
    pub disk_bytes: u64,
    /// 100 is one core.
    pub cpu_percent: u32,
    /// Of each process.
    pub open_files: u32,
    /// Whether it sees the machine's network.
    pub network: bool,
}

/// Everything that a warden needs to run one lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The lease.
    pub lease_id: String,
    /// The first moment at which nothing of it may run any more.
    pub kill_at_ms: u64,
    /// The program and its arguments.
    pub argv: Vec<Arg>,
    /// All that is in its environment, besides what the sandbox adds.
    pub env: Vec<(String, String)>,
    /// File that becomes its standard input.
    pub params: PathBuf,
    /// Folder with the tool's own files.
    pub tool_dir: PathBuf,
    /// Its working folder, with `in` and `out`.
    pub work_dir: PathBuf,
    /// Empty folder to build its root in.
    pub root_dir: PathBuf,
    /// Folder of the named workspace, if there is one.
    pub workspace: Option<PathBuf>,
    /// What it may read and write: below the workspace if there is one, else below the working folder.
    pub allowed: Vec<PathBuf>,
    /// What it may read only, likewise.
    pub read_only: Vec<PathBuf>,
    /// The image's root; absent: the system folders of this machine.
    pub image: Option<PathBuf>,
    /// More of this machine that it may read and execute.
    pub read: Vec<PathBuf>,
    /// What it may use.
    pub bounds: Bounds,
    /// `cgroup.procs` files that it is entered in.
    pub cgroup_procs: Vec<PathBuf>,
    /// What the supervisor says of cgroups, as [`Event::Sandbox`] does.
    pub cgroups: Vec<String>,
    /// User and group that it runs as; absent: the supervisor's.
    pub uid: Option<u32>,
    /// What must hold it, or it is not begun.
    pub require: Vec<String>,
    /// Parts of the sandbox that are left out, so that tests see what holds without them.
    #[serde(default)]
    pub without: Vec<String>,
}

/// To the warden, after the [`Spec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// The lease was renewed.
    Extend {
        /// The new last moment; an earlier one than what is known is passed over.
        kill_at_ms: u64,
    },
    /// End it: SIGTERM, and SIGKILL after the grace.
    Stop {
        /// How long it may take to end by itself.
        grace_ms: u64,
    },
}

/// From the warden.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// What holds the tool; a leading `-` names what does not, and why.
    Sandbox(Vec<String>),
    /// It was not begun.
    Refused {
        /// Stable.
        code: String,
        /// For people.
        message: String,
    },
    /// It runs.
    Started,
    /// It ended by itself, or by a signal.
    Exited {
        /// Its exit code; the negative signal when one ended it.
        code: i32,
        /// Processor time of it and of what it waited for.
        cpu_ms: u64,
        /// Most memory of one process.
        max_rss_bytes: u64,
    },
    /// The warden ended it: `deadline`, `supervisor`, `stopped`, `disk`.
    Killed {
        /// Which of them.
        why: String,
        /// For people.
        message: String,
    },
    /// No process of it is left.
    Gone,
    /// Processes of it could not be ended.
    Left {
        /// Their ids.
        pids: Vec<i32>,
    },
}

/// Writes one line.
pub(crate) fn say<T: Serialize>(socket: &mut UnixStream, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message).map_err(io::Error::other)?;
    line.push(b'\n');
    socket.write_all(&line)
}

/// Lines of a socket, that come in pieces.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    buffer: Vec<u8>,
    /// The other side is gone.
    pub(crate) ended: bool,
}

impl Lines {
    /// Reads once. Blocks when the socket does and nothing is there.
    pub(crate) fn fill(&mut self, socket: &mut UnixStream) {
        let mut piece = [0u8; 16 * 1024];
        match socket.read(&mut piece) {
            Ok(0) => self.ended = true,
            Ok(count) => self.buffer.extend_from_slice(&piece[..count]),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => self.ended = true,
        }
        self.ended |= self.buffer.len() > LINE_MAX;
    }

    /// The next whole line; what is no message of ours ends the conversation.
    pub(crate) fn next<T: DeserializeOwned>(&mut self) -> Option<T> {
        let end = self.buffer.iter().position(|byte| *byte == b'\n')?;
        let line: Vec<u8> = self.buffer.drain(..=end).collect();
        let message = serde_json::from_slice(&line).ok();
        self.ended |= message.is_none();
        message
    }

    /// Waits for the first line.
    pub(crate) fn first<T: DeserializeOwned>(&mut self, socket: &mut UnixStream) -> Option<T> {
        while !self.ended {
            if let Some(message) = self.next() {
                return Some(message);
            }
            self.fill(socket);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_in_pieces_and_garbage_ends_them() {
        let (mut one, mut other) = UnixStream::pair().unwrap();
        say(&mut one, &Order::Extend { kill_at_ms: 7 }).unwrap();
        one.write_all(b"{\"Stop\":").unwrap();
        let mut lines = Lines::default();
        assert_eq!(
            lines.first::<Order>(&mut other),
            Some(Order::Extend { kill_at_ms: 7 })
        );
        assert_eq!(lines.next::<Order>(), None);
        one.write_all(b"{\"grace_ms\":3}}\nnonsense\n").unwrap();
        lines.fill(&mut other);
        assert_eq!(lines.next::<Order>(), Some(Order::Stop { grace_ms: 3 }));
        assert!(!lines.ended);
        assert_eq!(lines.next::<Order>(), None);
        assert!(lines.ended, "what cannot be understood is no order");
    }
}
