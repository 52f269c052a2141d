//! The control plane over a real replica: one voter, an engine in memory, no sockets.
//!
//! Nothing here sleeps to let something happen: every wait is for an event, and a bound on it turns a hang
//! into a failure.
#![allow(clippy::unwrap_used, missing_docs)]

mod approvals;
mod authorities;
mod beginning;
mod certificates;
mod depth;
mod dispatching;
mod events;
mod hands;
mod hostile;
mod liveness;
mod members;
mod messages;
mod operators;
mod pairing;
mod revocation;
mod sessions;
mod support;
mod workers;
