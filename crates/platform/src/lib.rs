//! The one seam between our code and the world's chance: time, tasks, threads, randomness and the ways to
//! die.
//!
//! Production runs on tokio and the operating system. A simulation calls [`install`] once per process; from
//! then on the same functions give it every task (to kill a replica), every clock (to skew it), every random
//! byte (to replay it) and every [`io_point`] (to crash there). `storage`, `replica` and `control` take these
//! things from nowhere else: their `.clippy.toml` files ban the originals, because one call past this seam
//! makes a failing run impossible to replay.
//!
//! What never lives here: anything of ours. This crate does not know what a replica, a log or a node is; a
//! *tag* is a number that a task inherits from the task that spawned it, and only the simulation gives it a
//! meaning.
//!
//! Invariants: a task spawned inside [`scope`] carries that tag, and so do all its descendants; without
//! hooks, every function here is its tokio or operating-system original and nothing more.

mod clock;
mod hooks;
mod random;
mod task;

pub use clock::{
    Elapsed, Instant, Interval, Sleep, Stopwatch, Timeout, boot_ms, interval, now, sleep, sleep_until,
    timeout, timeout_at, wall_ms,
};
pub use hooks::{Hooks, IoVerdict, abort, install, io_point, scope, scope_sync, simulated, tag};
pub use random::{fill_random, new_ulid_bytes, random_below, random_u64, ulid_bytes_at};
pub use task::{AbortHandle, IoHandle, Task, TaskEnded, blocking, spawn, spawn_io, vital};
