//! The node: the agent that runs on a machine of the fleet, as a library that `palyra node …` calls.
//!
//! What lives here: the data folder ([`home`]), becoming a node ([`pair()`]), the agent itself ([`run()`]),
//! what its owner lets it do ([`capability`]), the questions it asks the person at the machine
//! ([`mediation`]) and the agent as a background process ([`service`]).
//!
//! What never does: no argument parsing, no terminal output, no logging setup (the binary's), no state of the
//! control plane beyond what this node was told.
//!
//! Invariants: the private key is made here and never leaves the folder; nothing that a server says is
//! believed before its proof or its certificate is verified; a `once` dispatch is never begun twice, not even
//! after a power loss; a result is kept until the control plane accepted or finally refused it.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod capability;
pub mod home;
pub mod mediation;
pub mod pair;
pub mod run;
pub mod service;
pub mod worker;

mod agent;
mod builtin;
mod carrier;
mod enrol;
mod error;
mod exec;
#[cfg(test)]
mod fake;
mod feed;
mod jobs;
mod ledger;
mod link;
mod lock;
mod lost_after;
mod output;
mod poll;
mod recover;
mod renewal;
mod route;
mod schedule;
mod session;
mod socket;
#[cfg(test)]
mod testing;
mod unit;
mod work;

pub use carrier::Choice;
pub use error::{Error, Kind, Result};
pub use home::Home;
pub use lost_after::parse_lost_after;
pub use pair::{PairConfig, PairEvent, PairMethod, PairUi, Paired, pair};
pub use run::{RunConfig, RunEnd, run};
