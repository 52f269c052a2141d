//! What a simulation may replace, and the tag that tells it which replica a task belongs to.
//!
//! Lives here: the [`Hooks`] trait, its installation, tags, [`io_point`] and [`abort`]. Never here: a policy.
//! When to crash, and how far a clock is off, is decided by whoever implements [`Hooks`].
//!
//! Invariant: hooks are installed at most once per process and before the first task; there is no way back.

use std::future::Future;
use std::io::Write;
use std::sync::OnceLock;

use futures::future::BoxFuture;
use tokio::task::AbortHandle;
use tokio::time::Instant;

static HOOKS: OnceLock<&'static dyn Hooks> = OnceLock::new();

tokio::task_local! {
    static TAG: u64;
}

/// What an I/O point does once the simulation has had its say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoVerdict {
    /// Go on as in production. The hook may have delayed or yielded before it said so.
    Continue,
    /// The process of this tag dies here: [`Hooks::abort`] is called and the task never gets past the point.
    Crash,
}

/// The simulation's side of the seam. `tag` is what [`scope`] set around the calling task, `None` outside of
/// any.
///
/// Every method must be a pure function of the simulation's seed and of what happened before in virtual time,
/// or the run cannot be replayed.
pub trait Hooks: Send + Sync {
    /// A task was spawned, and has not run yet. `name` is the place in the source (`file:line`) or, for
    /// [`crate::spawn_io`], the name of its thread. Aborting all handles of a tag is `kill -9` of that
    /// replica.
    fn on_spawn(&self, tag: Option<u64>, name: &str, task: AbortHandle);
    /// Milliseconds since the Unix epoch as the replica's skewed wall clock shows them.
    fn wall_ms(&self, tag: Option<u64>) -> u64;
    /// Milliseconds on the replica's boot-time clock: never goes back, goes on during suspend.
    fn boot_ms(&self, tag: Option<u64>) -> u64;
    /// Fills `buf` from the seed.
    fn fill_random(&self, tag: Option<u64>, buf: &mut [u8]);
    /// What the clock behind [`crate::now`] shows on the replica at this moment of the runtime's clock. Timers go
    /// by it: a replica whose clock is too fast gives up too early. Must rise with `time`.
    fn to_local(&self, tag: Option<u64>, time: Instant) -> Instant {
        let _ = tag;
        time
    }
    /// The other way round: when the replica's clock will show `time`.
    fn to_true(&self, tag: Option<u64>, time: Instant) -> Instant {
        let _ = tag;
        time
    }
    /// Called at each [`io_point`]; the returned future may yield or sleep. `None`: go on at once.
    fn io_point(&self, tag: Option<u64>, name: &'static str) -> Option<BoxFuture<'static, IoVerdict>>;
    /// The replica must be dead when this returns: all its tasks aborted, nothing of it scheduled again. The
    /// calling task unwinds right after.
    fn abort(&self, tag: Option<u64>, reason: &str);
}

/// Hands every function of this crate over to a simulation, for the rest of the process.
///
/// # Panics
/// When hooks were installed before: two simulations in one process would take each other's tasks.
pub fn install(hooks: &'static dyn Hooks) {
    assert!(
        HOOKS.set(hooks).is_ok(),
        "platform hooks were installed already in this process"
    );
}

/// True once hooks are installed. For the few places whose production form cannot run on virtual time.
pub fn simulated() -> bool {
    hooks().is_some()
}

pub(crate) fn hooks() -> Option<&'static dyn Hooks> {
    HOOKS.get().copied()
}

/// The tag of the running task, `None` outside of [`scope`].
pub fn tag() -> Option<u64> {
    TAG.try_with(|tag| *tag).ok()
}

/// Runs `future` under `tag`. What it spawns, and what that spawns, inherits the tag.
pub fn scope<F: Future>(tag: u64, future: F) -> impl Future<Output = F::Output> {
    TAG.scope(tag, future)
}

/// Runs a synchronous `body` under `tag`.
pub fn scope_sync<T>(tag: u64, body: impl FnOnce() -> T) -> T {
    TAG.sync_scope(tag, body)
}

/// A named place around a disk or network effect. In production it costs one load and never waits; in a
/// simulation, and in the fault harness's build, the replica may be delayed here, or die here. Names are stable:
/// `component.before_what`.
pub async fn io_point(name: &'static str) {
    let Some(hooks) = hooks() else {
        return failpoint(name).await;
    };
    let Some(passage) = hooks.io_point(tag(), name) else {
        return;
    };
    match passage.await {
        IoVerdict::Continue => {}
        IoVerdict::Crash => {
            hooks.abort(tag(), name);
            // The abort reaches this task at this very await.
            std::future::pending::<()>().await;
        }
    }
}

/// What the fault harness armed here in a real process; nothing in a product.
async fn failpoint(name: &'static str) {
    match palyra_fault::hit(name) {
        palyra_fault::Action::Pass => {}
        // Nothing is flushed and nothing is told: as a kill in the middle.
        palyra_fault::Action::Crash => {
            // A process may always signal itself.
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
        palyra_fault::Action::Sleep(time) => crate::sleep(time).await,
    }
}

/// Ends the process because going on would be wrong (a failed fsync, a state that cannot be). In production:
/// one line on standard error, then `SIGABRT`. In a simulation: the replica of the running task is dead, and
/// the task unwinds.
pub fn abort(reason: &str) -> ! {
    match hooks() {
        Some(hooks) => {
            hooks.abort(tag(), reason);
            // Not `panic!`: the simulation has recorded the death, and a back trace per injected crash hides
            // bugs.
            std::panic::resume_unwind(Box::new(format!("aborted: {reason}")))
        }
        None => {
            // Not `eprintln!`: it panics when standard error is a file on the disk that is full, and that panic
            // would take the place of the abort.
            let _ = writeln!(std::io::stderr(), "aborting: {reason}");
            std::process::abort()
        }
    }
}
