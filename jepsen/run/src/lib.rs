//! The fault harness on real processes: namespaces, replicas, clients, nemeses, verdicts. The binary is `jepsen`.
//!
//! `inside` enters namespaces, `cluster` starts replicas in them over a `net`work, `conduct` has a workload work
//! while nemeses strike by `plan`, `store` keeps what happened and `judge` says what to make of it.
//!
//! Never here: how a history is judged (`palyra-jepsen-check`), and anything of the product's inside: replicas are
//! met over their sockets, as everybody meets them. Invariants: nothing outside of the run's own namespaces is
//! changed; everything that was started ends with the harness, however it ends; a failure of the harness is exit
//! code 255, never a verdict.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod abilities;
pub mod chance;
pub mod cli;
pub mod clock;
pub mod cluster;
pub mod commands;
pub mod conduct;
pub mod daemon;
pub mod disk;
pub mod door;
pub mod effect;
pub mod equipment;
pub mod floors;
pub mod inside;
pub mod judge;
pub mod machines;
pub mod mutants;
pub mod nemesis;
pub mod net;
pub mod plan;
pub mod record;
pub mod run;
pub mod scenario;
pub mod store;
pub mod target;
pub mod windows;
pub mod workloads;
