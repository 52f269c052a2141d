//! The disk under a replica: ordered, atomic batches over one write-ahead log.
//!
//! Lives here: the [`Engine`] trait, [`RocksEngine`] (production, the only user of `rocksdb`) and its twin
//! [`MemEngine`] (tests and the simulation), which loses what was not synced when told that the power went.
//! Never here: what the bytes mean. This crate knows neither Raft nor any record of ours.
//!
//! Invariants, of both engines and held by the same scripts (`tests/conformance.rs`):
//! 1. A batch is all there or not there at all, also across families, also after a crash.
//! 2. Batches survive in order: what a crash leaves is a prefix of what was written.
//! 3. That prefix holds at least all that was written before the last [`Engine::sync`] that returned `Ok`.
//! 4. A process that dies loses nothing that [`Engine::write`] returned `Ok` for; a machine that dies may.
//! 5. After one failed write or sync the engine is poisoned and answers nothing any more: what the disk holds
//!    is unknown until it is read again by a new process, and a second fsync that succeeds proves nothing.
//! 6. What an engine shows when it has been opened is durable: a replica may acknowledge what it finds.

mod batch;
mod engine;
mod error;
mod memory;
mod rocks;

pub use batch::{Batch, MAX_BATCH_BYTES, Op};
pub use engine::{Engine, Family, Snapshot, Visit, prefix_end};
pub use error::{EngineError, Result};
pub use memory::{Disk, Fault, MemEngine};
pub use rocks::{FORMAT_VERSION, Options, RocksEngine};
