//! What the end-to-end tests stand on: a cluster of real processes, and a runner for tests that share it.
//!
//! What never lives here: the tests themselves (see `tests/tests`), and anything that the product depends on.
#![allow(clippy::unwrap_used)]

pub mod cluster;
pub mod node;
pub mod runner;
pub mod worker;
