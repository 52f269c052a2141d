//! What the tests of this crate share: things that other processes do, as events to wait for.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// No test waits longer for what must come. Long, for a machine may be busy; only a failing test takes it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A FIFO that programs open for writing, and one that they read a line from.
///
/// The kernel says when the last of those that hold the first one is gone: it tells apart a process that was
/// killed from one that is about to be.
pub(crate) struct Fifo {
    dir: tempfile::TempDir,
    heard: mpsc::UnboundedReceiver<usize>,
}

impl Fifo {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["held", "gate"] {
            nix::unistd::mkfifo(&dir.path().join(name), nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        let (said, heard) = mpsc::unbounded_channel();
        let path = dir.path().join("held");
        // A thread of its own: to open a FIFO blocks until somebody opens its other end.
        std::thread::spawn(move || {
            let mut file = std::fs::File::open(path).unwrap();
            let mut piece = [0u8; 64];
            while let Ok(count) = file.read(&mut piece) {
                if said.send(count).is_err() || count == 0 {
                    return;
                }
            }
        });
        Self { dir, heard }
    }

    /// For a shell: `exec 3>{path}; echo up >&3`.
    pub(crate) fn path(&self) -> String {
        self.dir.path().join("held").display().to_string()
    }

    /// For a shell: `read line <{gate}`.
    pub(crate) fn gate(&self) -> String {
        self.dir.path().join("gate").display().to_string()
    }

    /// Waits until a program has written into it.
    pub(crate) async fn opened(&mut self) {
        let count = timeout(PATIENCE, self.heard.recv()).await;
        assert!(count.expect("nobody wrote").is_some_and(|count| count > 0));
    }

    /// Waits until no process holds it any more.
    pub(crate) async fn released(&mut self) {
        while timeout(PATIENCE, self.heard.recv())
            .await
            .expect("it is held still")
            .unwrap()
            > 0
        {}
    }

    /// Has the program that reads a line from the gate go on.
    pub(crate) async fn open_gate(&self) {
        let (done, written) = oneshot::channel();
        let path = self.dir.path().join("gate");
        std::thread::spawn(move || {
            std::fs::write(path, "go\n").unwrap();
            let _ = done.send(());
        });
        timeout(PATIENCE, written).await.expect("nobody reads").unwrap();
    }
}

/// An executable shell script. Another process writes it: a file that this one holds open for writing, even
/// in a child that another thread is just starting, can't be executed ("text file busy").
pub(crate) fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
    let (source, path) = (dir.join(format!("{name}.source")), dir.join(name));
    std::fs::write(&source, format!("#!/bin/sh\n{text}\n")).unwrap();
    let copied = std::process::Command::new("install")
        .args(["-m", "755"])
        .args([&source, &path])
        .status();
    assert!(copied.unwrap().success());
    path
}
