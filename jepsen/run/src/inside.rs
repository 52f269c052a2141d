//! How the harness gets inside namespaces of its own, and how all that it started ends with it.
//!
//! The program runs itself once more under `unshare`: the outer process only waits, the inner one is the first
//! process of a new process namespace. The outer one's death, however it comes, kills `unshare` (by `setpriv
//! --pdeathsig`), that kills the inner one (`--kill-child`), and the kernel then ends every process of the namespace
//! and takes mounts and networks away. A signal that asks the outer one to stop is passed on by closing the inner
//! one's standard input.
//!
//! Never here: what runs inside. Invariant: nothing outside is changed, not even a folder in `/run`.

use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Says to the second run of this program where it is.
const INSIDE: &str = "JEPSEN_INSIDE";

/// How much of a machine a run has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ground {
    /// Namespaces, as root.
    Root,
    /// Namespaces of a user: no FUSE, no cgroups.
    User,
    /// No namespaces: processes on loopback, which can be killed and paused.
    Loopback,
}

impl Ground {
    /// The word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Ground::Root => "root",
            Ground::User => "user",
            Ground::Loopback => "loopback",
        }
    }

    /// Whether there are namespaces.
    #[must_use]
    pub fn is_apart(self) -> bool {
        self != Ground::Loopback
    }

    fn parse(word: &str) -> Option<Ground> {
        [Ground::Root, Ground::User, Ground::Loopback]
            .into_iter()
            .find(|ground| ground.word() == word)
    }

    /// What `unshare` is told for it.
    pub(crate) fn flags(self) -> &'static [&'static str] {
        const ROOT: &[&str] = &[
            "--net",
            "--mount",
            "--pid",
            "--ipc",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ];
        const USER: &[&str] = &[
            "--user",
            "--map-root-user",
            "--net",
            "--mount",
            "--pid",
            "--ipc",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ];
        match self {
            Ground::Root => ROOT,
            Ground::User => USER,
            Ground::Loopback => &[],
        }
    }
}

/// What this machine allows: the best ground, and why not a better one.
#[must_use]
pub fn best_ground() -> (Ground, Option<String>) {
    let wanted = if geteuid().is_root() {
        Ground::Root
    } else {
        Ground::User
    };
    match try_ground(wanted) {
        Ok(()) if wanted == Ground::Root => (wanted, None),
        Ok(()) => (
            wanted,
            Some("not root: no FUSE file system and no cgroups; run it as root for them".to_owned()),
        ),
        Err(why) => (Ground::Loopback, Some(why)),
    }
}

fn try_ground(ground: Ground) -> Result<(), String> {
    let told = Command::new("unshare").args(ground.flags()).arg("true").output();
    match told {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let reason = said.lines().next().unwrap_or("it said nothing").to_owned();
            let next = match ground {
                Ground::User => "; as root: sysctl kernel.unprivileged_userns_clone=1, or run jepsen as root",
                _ => "; is this a container without CAP_SYS_ADMIN?",
            };
            Err(format!("no namespaces: {reason}{next}"))
        }
        Err(error) => Err(format!(
            "unshare does not start ({error}): apt-get install util-linux"
        )),
    }
}

/// Where this process is already, when it is the inner one.
#[must_use]
pub fn here() -> Option<Ground> {
    Ground::parse(std::env::var(INSIDE).ok()?.as_str())
}

/// Runs this program once more on `ground` and waits for it. Answers its exit code.
///
/// # Errors
/// When it can't be started.
pub fn enter(ground: Ground) -> Result<u8> {
    let own = std::env::current_exe().context("where is this program?")?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    if ground.is_apart() {
        command.arg("unshare").args(ground.flags());
        command.args(["--propagation", "private", "--"]);
    }
    command.arg(own).args(std::env::args_os().skip(1));
    command.env(INSIDE, ground.word()).stdin(Stdio::piped());
    // The death signal comes when the thread that spawned ends: this is the main one, and it waits below.
    let mut child = command
        .spawn()
        .context("setpriv does not start: apt-get install util-linux")?;
    let alive = child.stdin.take();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.spawn_blocking(move || drop(end_on_signal(alive)));
    let status = child.wait().context("waiting for the inner process")?;
    runtime.shutdown_background();
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(u8::try_from(code).unwrap_or(255)),
        (None, Some(number)) => bail!("the inner process was ended by signal {number}"),
        (None, None) => bail!("the inner process ended in an unknown way"),
    }
}

/// Holds the inner one's standard input open until this process is told to stop.
fn end_on_signal(alive: Option<std::process::ChildStdin>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (mut interrupt, mut terminate, mut hangup) = (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        );
        let hold = alive;
        tokio::select! {
            _ = interrupt.recv() => {},
            _ = terminate.recv() => {},
            _ = hangup.recv() => {},
        }
        drop(hold);
        // The second time it is meant at once: this process ends, and everything with it.
        tokio::select! {
            _ = interrupt.recv() => {},
            _ = terminate.recv() => {},
            _ = hangup.recv() => {},
        }
        std::process::exit(255);
    })
}

/// Of the inner process: cancelled when the outer one wants the run to end, or is gone.
#[must_use]
pub fn asked_to_stop() -> CancellationToken {
    let token = CancellationToken::new();
    let told = token.clone();
    std::thread::spawn(move || {
        let mut nothing = [0u8; 1];
        // Nobody writes to it: this returns when it is closed.
        while matches!(std::io::stdin().read(&mut nothing), Ok(1..)) {}
        told.cancel();
    });
    // A terminal's interrupt comes to this process as well; the outer one decides.
    tokio::spawn(async {
        let handlers = [SignalKind::interrupt(), SignalKind::hangup()].map(signal);
        for mut handler in handlers.into_iter().flatten() {
            tokio::spawn(async move { while handler.recv().await.is_some() {} });
        }
    });
    token
}
