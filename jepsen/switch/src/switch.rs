//! The thread that moves frames between devices, and the handle that tells it how.
//!
//! Invariants: one thread touches the devices; it holds the engine's lock only while it computes, never while it reads
//! or writes; a change of rules wakes it at once. When a device fails in a way that is not a network's, the thread ends
//! and [`Switch::health`] says why: a broken harness is no verdict about anybody.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::engine::{Counters, Delivery, Engine, Port};
use crate::rule::Rule;
use crate::tap::{FRAME_MAX, Tap};

/// Frames that are taken from one device before the others have their turn.
const BATCH: usize = 64;

struct Shared {
    engine: Mutex<Engine>,
    taps: Mutex<Vec<Arc<Tap>>>,
    wake: EventFd,
    stop: AtomicBool,
    refused: AtomicU64,
    failure: Mutex<Option<String>>,
    epoch: Instant,
}

/// A running switch. It ends, and takes its devices with it, when this is dropped.
pub struct Switch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Switch {
    /// Starts the thread, with no device yet. The seed decides about chance, not about the timing of threads.
    ///
    /// # Errors
    /// The machine has no descriptor or thread left.
    pub fn start(seed: u64) -> io::Result<Switch> {
        let shared = Arc::new(Shared {
            engine: Mutex::new(Engine::new(seed)),
            taps: Mutex::new(Vec::new()),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            stop: AtomicBool::new(false),
            refused: AtomicU64::new(0),
            failure: Mutex::new(None),
            epoch: Instant::now(),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("switch".to_owned());
        let thread = thread.spawn(move || {
            // Timers of a thread are rounded by 50 microseconds unless it asks for less.
            let _ = nix::sys::prctl::set_timerslack(1);
            if let Err(error) = theirs.forward() {
                *lock(&theirs.failure) = Some(error.to_string());
            }
        })?;
        Ok(Switch {
            shared,
            thread: Some(thread),
        })
    }

    /// Plugs a device in. Its port is its place in the order of attachment.
    pub fn attach(&self, tap: Tap) -> Port {
        let mut taps = lock(&self.shared.taps);
        taps.push(Arc::new(tap));
        let port = lock(&self.shared.engine).attach();
        drop(taps);
        self.wake();
        port
    }

    /// Sets the rule of a directed link, from now on.
    ///
    /// # Errors
    /// See [`Engine::set`].
    pub fn set(&self, from: Port, to: Port, rule: Rule) -> Result<(), String> {
        lock(&self.shared.engine).set(from, to, rule)?;
        self.wake();
        Ok(())
    }

    /// The rule of a directed link.
    #[must_use]
    pub fn rule(&self, from: Port, to: Port) -> Rule {
        lock(&self.shared.engine).rule(from, to)
    }

    /// What became of the frames of a directed link so far.
    #[must_use]
    pub fn counters(&self, from: Port, to: Port) -> Counters {
        lock(&self.shared.engine).counters(from, to)
    }

    /// Of all links together.
    #[must_use]
    pub fn total(&self) -> Counters {
        lock(&self.shared.engine).total()
    }

    /// Frames that a device did not take, because it was down, full, or found them malformed.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// Whether the thread still works.
    ///
    /// # Errors
    /// Why it has ended.
    pub fn health(&self) -> Result<(), String> {
        match lock(&self.shared.failure).as_ref() {
            Some(why) => Err(format!("the switch has ended: {why}")),
            None if self.thread.as_ref().is_some_and(JoinHandle::is_finished) => {
                Err("the switch has ended: its thread has panicked".to_owned())
            }
            None => Ok(()),
        }
    }

    fn wake(&self) {
        // A full counter wakes as well.
        let _ = self.shared.wake.write(1);
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn forward(&self) -> io::Result<()> {
        let mut frames = Frames::new();
        let mut due = Vec::with_capacity(BATCH);
        while !self.stop.load(Ordering::Acquire) {
            let taps = lock(&self.taps).clone();
            self.deliver(&taps, &mut due)?;
            for port in self.readable(&taps)? {
                frames.fill(&taps[port])?;
                let mut engine = lock(&self.engine);
                let now = self.now();
                frames.each(|frame| engine.accept(now, port, frame));
            }
        }
        Ok(())
    }

    /// Puts out what is due, in batches.
    fn deliver(&self, taps: &[Arc<Tap>], due: &mut Vec<Delivery>) -> io::Result<()> {
        loop {
            {
                let mut engine = lock(&self.engine);
                let now = self.now();
                due.extend(std::iter::from_fn(|| engine.take(now)).take(BATCH));
            }
            if due.is_empty() {
                return Ok(());
            }
            for delivery in due.drain(..) {
                let taken = match taps.get(delivery.to) {
                    Some(tap) => tap.send(&delivery.frame)?,
                    None => false,
                };
                self.refused.fetch_add(u64::from(!taken), Ordering::Relaxed);
            }
        }
    }

    /// Waits for frames, for a change, or for the moment when the next frame is due.
    fn readable(&self, taps: &[Arc<Tap>]) -> io::Result<Vec<Port>> {
        let next = lock(&self.engine).next_due();
        let timeout = next.map(|due| Duration::from_nanos(due.saturating_sub(self.now())).into());
        let mut files: Vec<PollFd<'_>> = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        files.extend(taps.iter().map(|tap| PollFd::new(tap.as_fd(), PollFlags::POLLIN)));
        match ppoll(&mut files, timeout, None) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
        let ready = |file: &PollFd<'_>| {
            file.revents()
                .is_some_and(|events| events.contains(PollFlags::POLLIN))
        };
        if ready(&files[0]) {
            let _ = self.wake.read();
        }
        let ports = files[1..].iter().enumerate().filter(|(_, file)| ready(file));
        Ok(ports.map(|(port, _)| port).collect())
    }
}

/// Room for a batch, kept from one to the next.
struct Frames {
    buffers: Vec<[u8; FRAME_MAX]>,
    lengths: Vec<usize>,
}

impl Frames {
    fn new() -> Self {
        Frames {
            buffers: vec![[0; FRAME_MAX]; BATCH],
            lengths: Vec::with_capacity(BATCH),
        }
    }

    fn fill(&mut self, tap: &Tap) -> io::Result<()> {
        self.lengths.clear();
        while self.lengths.len() < BATCH {
            match tap.receive(&mut self.buffers[self.lengths.len()])? {
                Some(length) => self.lengths.push(length),
                None => break,
            }
        }
        Ok(())
    }

    fn each(&self, mut take: impl FnMut(&[u8])) {
        for (buffer, length) in self.buffers.iter().zip(&self.lengths) {
            take(&buffer[..*length]);
        }
    }
}
