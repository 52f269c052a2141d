//! One process per seed: `futures` counts in statics, libraries cache what they drew, and a hang must not
//! take the run with it. The parent stays single-threaded; a child writes one line and ends.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io::Read as _;
use std::ops::ControlFlow;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use crate::memory;

/// Seconds of processor time after which a seed counts as hung: a loop that awaits no timer stops virtual time for
/// ever. Not wall time, which a busy machine stretches at will.
const CPU_SECONDS: u64 = 20;
/// Wall time after which a seed that uses no processor counts as hung.
const WATCHDOG: Duration = Duration::from_secs(600);

/// How the process of a seed ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With this line.
    Said(String),
    /// Without one: it died.
    Died(String),
    /// It used up its processor time, or the watchdog ended it.
    Hung,
}

impl Ended {
    /// Whether it said that all is well.
    pub(crate) fn is_good(&self) -> bool {
        matches!(self, Ended::Said(line) if line.starts_with("ok"))
    }
}

/// Makes what every child would make for itself: constant tables, 30 MB of them, that Raft's metrics look up, and the
/// cluster's papers.
pub(crate) fn warm_up() {
    keep_memory();
    crate::papers::warm_up();
    drop(base2histogram::Histogram::<()>::new());
}

/// A seed's process lives for less than a second: what it gave back to the kernel it would ask for again.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_memory() {
    const NEVER: libc::c_int = 1 << 30;
    for (what, value) in [
        (libc::M_TRIM_THRESHOLD, NEVER),
        (libc::M_MMAP_THRESHOLD, 32 << 20),
        (libc::M_TOP_PAD, 8 << 20),
    ] {
        // SAFETY: sets a number of the allocator; there is one thread yet.
        unsafe { libc::mallopt(what, value) };
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_memory() {}

/// Processor time of all children that have ended.
pub(crate) fn processor_time() -> Duration {
    // SAFETY: a structure of integers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is writable and lives.
    unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage) };
    let time = |time: libc::timeval| {
        let micros = time.tv_sec * 1_000_000 + time.tv_usec;
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

struct Child {
    pid: libc::pid_t,
    pipe: std::fs::File,
    started: Instant,
}

/// Runs `body` for each key in its own process, at most `jobs` at a time, and hands each end to `each` as it
/// comes, until that breaks.
pub(crate) fn for_each(
    keys: impl Iterator<Item = u64>,
    jobs: usize,
    body: impl Fn(u64) -> String,
    mut each: impl FnMut(u64, Ended) -> ControlFlow<()>,
) {
    let mut keys = keys.peekable();
    let mut running: BTreeMap<u64, Child> = BTreeMap::new();
    let mut going = true;
    while (going && keys.peek().is_some()) || !running.is_empty() {
        while going && running.len() < jobs.max(1) {
            let Some(key) = keys.next() else { break };
            running.insert(key, start(key, &body));
        }
        let done = wait_any(&running);
        for key in done {
            if let Some(child) = running.remove(&key) {
                going &= each(key, finish(child)).is_continue();
            }
        }
    }
}

/// The processor time of this process, and of what it executes, is limited.
fn limit_cpu() {
    let limit = libc::rlimit {
        rlim_cur: CPU_SECONDS,
        rlim_max: CPU_SECONDS,
    };
    // SAFETY: `limit` is a valid structure that lives.
    unsafe { libc::setrlimit(libc::RLIMIT_CPU, &limit) };
}

fn start(key: u64, body: &impl Fn(u64) -> String) -> Child {
    let mut ends: [RawFd; 2] = [0; 2];
    // SAFETY: `ends` has room for the two descriptors.
    assert_eq!(
        unsafe { libc::pipe(ends.as_mut_ptr()) },
        0,
        "no pipe for a seed's process"
    );
    // SAFETY: the parent has one thread, so the child's copy of the process is whole.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "no process for a seed");
    if pid == 0 {
        limit_cpu();
        memory::begin_anew();
        // Unwinding further would run the parent's loop once more, in the child.
        let line = std::panic::catch_unwind(AssertUnwindSafe(|| body(key)))
            .unwrap_or_else(|_| "FAIL the simulation itself panicked".to_owned());
        // SAFETY: writes a buffer that lives, to a descriptor that is open, and ends without running
        // destructors.
        unsafe {
            libc::write(ends[1], line.as_ptr().cast(), line.len().min(60_000));
            libc::_exit(0);
        }
    }
    // SAFETY: both descriptors are open and owned by nobody else.
    let read = unsafe {
        libc::close(ends[1]);
        OwnedFd::from_raw_fd(ends[0])
    };
    Child {
        pid,
        pipe: std::fs::File::from(read),
        started: Instant::now(),
    }
}

/// Keys of the children whose pipe has something to read or is closed, or whose time is over.
fn wait_any(running: &BTreeMap<u64, Child>) -> Vec<u64> {
    use std::os::fd::AsRawFd as _;
    let keys: Vec<u64> = running.keys().copied().collect();
    let mut fds: Vec<libc::pollfd> = running
        .values()
        .map(|child| libc::pollfd {
            fd: child.pipe.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: `fds` is a valid array of its length.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 1000) };
    keys.into_iter()
        .zip(&fds)
        .filter(|(key, fd)| fd.revents != 0 || running[key].started.elapsed() > WATCHDOG)
        .map(|(key, _)| key)
        .collect()
}

fn finish(mut child: Child) -> Ended {
    let hung = child.started.elapsed() > WATCHDOG;
    if hung {
        // SAFETY: the process is our child and not yet waited for, so its id is still its own.
        unsafe { libc::kill(child.pid, libc::SIGKILL) };
    }
    let mut said = String::new();
    let read = child.pipe.read_to_string(&mut said);
    let mut status = 0;
    // SAFETY: as above; `status` is writable.
    unsafe { libc::waitpid(child.pid, &mut status, 0) };
    let ran_out =
        libc::WIFSIGNALED(status) && [libc::SIGXCPU, libc::SIGKILL].contains(&libc::WTERMSIG(status));
    if hung || ran_out {
        Ended::Hung
    } else if read.is_err() || said.is_empty() {
        Ended::Died(format!("wait status {status}"))
    } else {
        Ended::Said(said)
    }
}
