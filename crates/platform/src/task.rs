//! Tasks and the dedicated I/O thread.
//!
//! Lives here: how a future gets its own task, its own thread, or a turn on the blocking pool. Never here: a
//! policy on what happens when one dies; whoever holds the handle decides.
//!
//! Invariants: dropping a handle detaches and never aborts; a task inherits its parent's tag; in a simulation
//! there are no threads at all, so the order of everything is the order of one queue.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::FutureExt;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::hooks::{self, abort, hooks};

pub use tokio::task::AbortHandle;

/// Why a task gave no value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskEnded {
    /// Somebody called [`Task::abort`], the runtime shut down, or a simulation killed the replica.
    Aborted,
    /// The task panicked, with this message.
    Panicked(String),
}

impl fmt::Display for TaskEnded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TaskEnded::Aborted => f.write_str("the task was aborted"),
            TaskEnded::Panicked(message) => write!(f, "the task panicked: {message}"),
        }
    }
}

impl std::error::Error for TaskEnded {}

/// A running task. Awaiting it gives what the task returned. Dropping it lets the task run on.
#[derive(Debug)]
#[must_use = "drop it explicitly to detach the task"]
pub struct Task<T> {
    handle: JoinHandle<T>,
}

impl<T> Task<T> {
    /// Stops the task at its next await. Has no effect on a task that has ended.
    pub fn abort(&self) {
        self.handle.abort();
    }

    /// A handle that can abort the task and outlives this one.
    pub fn abort_handle(&self) -> AbortHandle {
        self.handle.abort_handle()
    }

    /// Whether the task has returned, panicked, or been aborted.
    pub fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }

    /// Lets the task run on by itself.
    pub fn detach(self) {}
}

impl<T> Future for Task<T> {
    type Output = Result<T, TaskEnded>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let ended = ready!(Pin::new(&mut self.handle).poll(cx));
        Poll::Ready(ended.map_err(|error| match error.try_into_panic() {
            Ok(panic) => TaskEnded::Panicked(message(&*panic)),
            Err(_) => TaskEnded::Aborted,
        }))
    }
}

/// Starts `future` as a task of the current runtime, under the tag of the caller.
///
/// # Panics
/// Outside of a tokio runtime.
#[track_caller]
pub fn spawn<F>(future: F) -> Task<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let place = Location::caller();
    Task {
        handle: start(future, || format!("{}:{}", place.file(), place.line())),
    }
}

fn start<F>(future: F, name: impl FnOnce() -> String) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let tag = hooks::tag();
    let handle = match tag {
        Some(tag) => tokio::spawn(hooks::scope(tag, future)),
        None => tokio::spawn(future),
    };
    if let Some(hooks) = hooks() {
        hooks.on_spawn(tag, &name(), handle.abort_handle());
    }
    handle
}

/// The other end of [`spawn_io`]. Awaiting it gives what the future returned. There is no abort: a thread
/// ends when its future does, which in practice is when the channel it drains is closed.
#[derive(Debug)]
#[must_use = "await it, or drop it explicitly"]
pub struct IoHandle<T = ()> {
    ended: Driver<T>,
}

#[derive(Debug)]
enum Driver<T> {
    Thread {
        ended: oneshot::Receiver<Result<T, String>>,
        thread: std::thread::JoinHandle<()>,
    },
    Task(Task<T>),
}

impl<T> IoHandle<T> {
    /// Blocks until the thread is gone, and with it everything that `future` owned; what it returned is dropped.
    ///
    /// For what must not outlive its owner, such as a database that a process may not exit with while another
    /// thread still closes it. Returns at once in a simulation, which has no threads, and on the thread itself.
    pub fn join(self) {
        if let Driver::Thread { thread, .. } = self.ended
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic went into the result.
            let _ = thread.join();
        }
    }
}

impl<T> Future for IoHandle<T> {
    type Output = Result<T, TaskEnded>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.ended {
            Driver::Task(task) => Pin::new(task).poll(cx),
            Driver::Thread { ended, .. } => Poll::Ready(match ready!(Pin::new(ended).poll(cx)) {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(panic)) => Err(TaskEnded::Panicked(panic)),
                Err(_) => Err(TaskEnded::Aborted),
            }),
        }
    }
}

/// Gives `future` a thread of its own, so that a slow disk stalls nothing else. The future may call blocking
/// code, and may await channels and timers. In a simulation it is a task like any other.
///
/// Aborts the process when the operating system gives no thread.
pub fn spawn_io<F>(name: &str, future: F) -> IoHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    if hooks::simulated() {
        let handle = start(future, || name.to_owned());
        return IoHandle {
            ended: Driver::Task(Task { handle }),
        };
    }
    let tag = hooks::tag();
    // Timers inside `future` register with the runtime of whoever started it.
    let runtime = tokio::runtime::Handle::try_current().ok();
    let (done, ended) = oneshot::channel();
    let body = move || {
        let _entered = runtime.as_ref().map(tokio::runtime::Handle::enter);
        let drive = AssertUnwindSafe(|| match tag {
            Some(tag) => futures::executor::block_on(hooks::scope(tag, future)),
            None => futures::executor::block_on(future),
        });
        let result = catch_unwind(drive).map_err(|panic| message(&*panic));
        // Nobody has to be waiting for it.
        let _ = done.send(result);
    };
    match std::thread::Builder::new().name(name.to_owned()).spawn(body) {
        Ok(thread) => IoHandle {
            ended: Driver::Thread { ended, thread },
        },
        Err(error) => abort(&format!("cannot start the thread `{name}`: {error}")),
    }
}

/// Runs `body`, which computes or blocks for longer than a task may, away from the runtime's workers. In a
/// simulation it runs inline. A panic in `body` goes on in the caller. `body` runs to its end even when the
/// caller is dropped.
pub async fn blocking<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
    if hooks::simulated() {
        return body();
    }
    let tag = hooks::tag();
    let body = move || match tag {
        Some(tag) => hooks::scope_sync(tag, body),
        None => body(),
    };
    match tokio::task::spawn_blocking(body).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // Only a runtime that is shutting down refuses; the caller is about to be dropped with it.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Runs `future`, without which the process is of no use: a panic in it ends the process, where a task's panic
/// would end only the task and leave the rest waiting for it. `what` names it in the last words.
///
/// In a simulation the panic goes on, so that the simulation sees it as what it is.
pub async fn vital<F: Future>(what: &str, future: F) -> F::Output {
    match AssertUnwindSafe(future).catch_unwind().await {
        Ok(value) => value,
        Err(panic) if hooks::simulated() => resume_unwind(panic),
        Err(panic) => abort(&format!("{what} panicked: {}", message(&*panic))),
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_task_gives_its_value_its_abort_or_its_panic() {
        assert_eq!(spawn(async { 7 }).await, Ok(7));
        let endless = spawn(std::future::pending::<()>());
        endless.abort();
        assert_eq!(endless.await, Err(TaskEnded::Aborted));
        let failing = spawn(async { resume_unwind(Box::new("broke".to_owned())) });
        assert_eq!(failing.await, Err::<(), _>(TaskEnded::Panicked("broke".into())));
    }

    #[tokio::test]
    async fn dropping_a_handle_detaches() {
        let (done, ended) = oneshot::channel();
        spawn(async move {
            tokio::task::yield_now().await;
            done.send(()).unwrap();
        })
        .detach();
        ended.await.unwrap();
    }

    #[tokio::test]
    async fn tags_are_inherited_by_tasks_threads_and_blocking_work() {
        assert_eq!(crate::tag(), None);
        let seen = crate::scope(9, async {
            let grandchild = spawn(async { spawn(async { crate::tag() }).await.unwrap() });
            let thread = spawn_io("tagged", async { crate::tag() });
            let blocked = blocking(crate::tag).await;
            (grandchild.await.unwrap(), thread.await.unwrap(), blocked)
        })
        .await;
        assert_eq!(seen, (Some(9), Some(9), Some(9)));
        assert_eq!(crate::scope_sync(3, crate::tag), Some(3));
    }

    #[tokio::test]
    async fn an_io_thread_waits_on_channels_and_timers_and_ends_with_its_future() {
        let (work, mut queue) = tokio::sync::mpsc::unbounded_channel::<u64>();
        let io = spawn_io("io-test", async move {
            let mut sum = 0;
            while let Some(item) = queue.recv().await {
                crate::sleep(Duration::from_millis(1)).await;
                sum += item;
            }
            (sum, std::thread::current().name().map(str::to_owned))
        });
        work.send(1).unwrap();
        work.send(2).unwrap();
        drop(work);
        assert_eq!(io.await, Ok((3, Some("io-test".to_owned()))));
    }

    #[test]
    fn what_an_io_thread_owns_is_gone_once_it_is_joined() {
        struct Slow(std::sync::Arc<std::sync::atomic::AtomicBool>);
        impl Drop for Slow {
            fn drop(&mut self) {
                (0..100).for_each(|_| std::thread::yield_now());
                self.0.store(true, std::sync::atomic::Ordering::SeqCst);
            }
        }
        let gone = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let owned = Slow(gone.clone());
        spawn_io("io-joined", async move { drop(owned) }).join();
        assert!(gone.load(std::sync::atomic::Ordering::SeqCst));
    }

    #[tokio::test]
    async fn a_panic_on_an_io_thread_is_told() {
        let io = spawn_io("io-panics", async { resume_unwind(Box::new("disk".to_owned())) });
        assert_eq!(io.await, Err::<(), _>(TaskEnded::Panicked("disk".into())));
    }
}
