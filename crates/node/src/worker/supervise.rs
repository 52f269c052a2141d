//! The supervisor's end of a warden: starts it, tells it of renewals, hears what becomes of the tool.
//!
//! What never lives here: leases and files. Invariant: the end of the socket is the end of the lease's
//! processes, so that whoever drops this ends them.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::process::Stdio;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

use super::spec::{Event, Order, Spec};

/// The longest line of a warden.
const LINE_MAX: usize = 1 << 20;

/// How a warden is started: this program, with the hidden command.
#[derive(Debug, Clone)]
pub struct Program {
    /// The file.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

impl Program {
    /// This very program, also when its file was replaced meanwhile: what was attested is what holds the
    /// tools.
    #[must_use]
    pub fn this() -> Self {
        Self {
            path: PathBuf::from("/proc/self/exe"),
            args: ["worker", "warden"].map(OsString::from).into(),
        }
    }
}

/// A warden that runs.
#[derive(Debug)]
pub struct Warden {
    child: Child,
    says: OwnedReadHalf,
    hears: OwnedWriteHalf,
    buffer: Vec<u8>,
    /// What the tool writes to its standard output.
    pub stdout: Option<ChildStdout>,
    /// What the tool writes to its standard error.
    pub stderr: Option<ChildStderr>,
}

impl Warden {
    /// Starts one for `spec`.
    ///
    /// Errors: no process, no socket.
    pub async fn start(program: &Program, spec: &Spec) -> io::Result<Self> {
        let (ours, theirs) = StdStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut child = Command::new(&program.path)
            .args(&program.args)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (says, mut hears) = UnixStream::from_std(ours)?.into_split();
        let mut line = serde_json::to_vec(spec).map_err(io::Error::other)?;
        line.push(b'\n');
        hears.write_all(&line).await?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        Ok(Self {
            child,
            says,
            hears,
            buffer: Vec::new(),
            stdout,
            stderr,
        })
    }

    /// The warden's process id; nothing when it has ended.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Tells it something. One that is gone does not hear it, which is seen by its events.
    pub async fn tell(&mut self, order: Order) {
        if let Ok(mut line) = serde_json::to_vec(&order) {
            line.push(b'\n');
            let _ = self.hears.write_all(&line).await;
        }
    }

    /// The next event; nothing when the warden is gone. Safe to cancel.
    pub async fn event(&mut self) -> Option<Event> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                match serde_json::from_slice(&line) {
                    Ok(event) => return Some(event),
                    Err(_) => return None,
                }
            }
            if self.buffer.len() > LINE_MAX {
                return None;
            }
            match self.says.read_buf(&mut self.buffer).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// Waits for its end.
    pub async fn ended(mut self) {
        drop(self.hears);
        // Only ever fails for a process that was waited for already.
        let _ = self.child.wait().await;
    }
}
