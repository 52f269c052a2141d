//! The checkers: what a history of operations must satisfy, and how a verdict is told.
//!
//! One history format and one set of checkers serve the simulation (`jepsen/sim`) and the runs on real processes
//! (`jepsen/run`). Each workload has a module here: its doc lists the operations (`f`, the shape of `value`) and the
//! exact conditions, and its `check` judges a history. Never here: sockets, processes, clocks, or anything of
//! Palyra's: a checker that shared code with what it judges would share its mistakes.
//!
//! Invariants: a checker that runs out of time or memory says *unknown*, never *valid*; an operation whose outcome
//! nobody knows may have taken effect or not, at any moment after its call; a history that breaks its own rules (see
//! [`history`]) is a failure of the harness, not a verdict.

pub mod context;
pub mod dispatch;
pub mod evidence;
pub mod export;
pub mod failover;
pub mod history;
pub mod journal;
pub mod jsonl;
pub mod judge;
pub mod lease;
pub mod linear;
pub mod membership;
pub mod pairing;
pub mod registry;
pub mod resolve;
pub mod revocation;
#[cfg(test)]
mod sketch;
pub mod verdict;
pub mod watch;
pub mod wgl;
pub mod witness;
pub mod zones;

pub use context::{Context, Facts};
pub use history::{Event, History, Kind, Op, Process, Recorder};
pub use judge::{NoVerdict, judge};
pub use verdict::{Check, Outcome, Verdict, Violation};
