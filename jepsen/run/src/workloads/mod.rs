//! Workloads: what clients do and what must hold of it, and the register of all of them.
//!
//! To add one: its operations and conditions are a module of `palyra-jepsen-check`, where it is judged; its driver
//! is a file here with a type that implements [`Workload`] and a line in [`kinds`]. `jepsen list workloads`,
//! `--workload` and the coverage floors follow.
//!
//! Invariants: each operation is one try at one replica that was chosen for it; what is recorded as `fail` certainly
//! had no effect; a client's trouble is an outcome of its operation, never an error of the run: an error from here
//! is a failure of the harness.

mod dispatch;
mod enrol;
mod failover;
pub mod fleet;
mod journal;
mod lease;
mod membership;
mod mix;
mod operator;
mod pairing;
mod registry;
mod revocation;
mod session;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Result, bail};
use async_trait::async_trait;

use palyra_jepsen_check::Facts;

use crate::run::Run;

/// What clients do.
#[async_trait]
pub trait Workload: Send + Sync {
    /// As `--workload` has it; the name of its module of checks.
    fn name(&self) -> &'static str;

    /// Machines of the fleet that it wants: seats `h1`, `h2` and so on.
    fn hosts(&self) -> u64 {
        0
    }

    /// The fewest clients with which it can be run.
    fn clients(&self) -> u64 {
        1
    }

    /// Settings of `palyrad.toml` that it needs to be other than usual, as TOML.
    fn settings(&self) -> &'static str {
        ""
    }

    /// Kinds of operations of which enough must have succeeded, or the run has tested too little.
    fn floors(&self) -> &'static [&'static str];

    /// Makes what clients need, while nothing is harmed. Nothing of it is in the history.
    async fn prepare(&self, run: &Arc<Run>) -> Result<()>;

    /// What one client does, while [`Run::is_loading`]. Numbers are from 0 to below the concurrency.
    async fn client(&self, run: &Arc<Run>, number: u64) -> Result<()>;

    /// The last reads, when everything is whole again: what each replica has.
    async fn finish(&self, run: &Arc<Run>) -> Result<()>;

    /// Bounds that hold in this run, for the checkers: see `palyra_jepsen_check::Facts`.
    fn bounds(&self) -> BTreeMap<String, f64> {
        BTreeMap::new()
    }

    /// What else checkers need to know of this run.
    fn tell(&self, _: &mut Facts) {}
}

/// One entry of the register.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// Its name.
    pub name: &'static str,
    /// One line for people.
    pub does: &'static str,
    /// Nemeses that it is made for: `--nemesis usual`.
    pub usual: &'static [&'static str],
    /// Makes one.
    pub make: fn() -> Box<dyn Workload>,
}

/// All kinds.
#[must_use]
pub fn kinds() -> Vec<Kind> {
    vec![
        registry::KIND,
        pairing::KIND,
        revocation::KIND,
        lease::KIND,
        dispatch::KIND,
        journal::KIND,
        watch::KIND,
        membership::KIND,
        failover::KIND,
        mix::KIND,
    ]
}

/// The workload of that name.
///
/// # Errors
/// When there is none.
pub fn find(name: &str) -> Result<Box<dyn Workload>> {
    match kinds().into_iter().find(|kind| kind.name == name) {
        Some(kind) => Ok((kind.make)()),
        None => bail!("{name:?} is no workload; see jepsen list workloads"),
    }
}
