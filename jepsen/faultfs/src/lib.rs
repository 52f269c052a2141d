//! A file system that loses, refuses, delays and corrupts on command: what the harness puts below a replica's data.
//!
//! It is mounted by FUSE, lives in the memory of the process that mounts it, and keeps two images of every file and
//! folder: what processes see, and what a loss of power leaves. [`Handle`] injects [`Fault`]s, takes space away, and
//! loses the power by the rules of a [`PowerLoss`].
//!
//! | layer | knows |
//! |---|---|
//! | `content`, `image` | bytes and names at one moment |
//! | `store` | what is durable and what waits for a sync |
//! | `loss` | what of that which waits a loss of power takes |
//! | `fault`, `room` | which requests meet a fault, and where they wait |
//! | `shared`, `driver`, `answer`, `mount` | the kernel's requests, the harness's commands |
//!
//! It is a model of a disk, chosen to be hard on programs, not one of any file system in particular:
//! 1. A sync makes durable what the file held when it was asked for, and nothing of other files' bytes. Names become
//!    durable by any sync, or, when the loss of power is a strict one, only by a sync of their folder.
//! 2. Without a sync nothing becomes durable, except the oldest changes when too many wait ([`Limits`]).
//! 3. A sync that fails loses what it was to write, as it does on Linux, and the next one succeeds.
//! 4. Modes and owners are durable at once; times are not kept apart. No extended attributes, no devices, no quotas
//!    of users. Preallocation beyond the end checks for space and sets none aside.
//! 5. While a sync lasts, the kernel holds back writes to the same file, and to no other.
//! 6. A process that waits for a stalled request cannot be killed, as with a real disk; the stall ends by command, by
//!    its watchdog, by a loss of power, or with the file system.

mod answer;
mod content;
mod driver;
mod fault;
mod image;
mod loss;
mod mount;
mod room;
mod shared;
mod store;

pub use fault::{DELAY_MAX, Fault, FaultId, Operation, STALL_MAX};
pub use loss::{Keep, Lost, PowerLoss};
pub use mount::{FaultFs, MountError, probe};
pub use shared::{Counters, Handle, Settings};
pub use store::Limits;
