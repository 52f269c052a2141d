//! `palyrad`: the process around the control plane. Configuration, TLS listeners, gRPC services, health and
//! metrics.
//!
//! What lives here: sockets, files of the data folder, the mapping between wire messages and
//! `palyra-control`. What never does: decisions about the state (those are `control`'s and `state`'s), and
//! anything about Raft or disks (`replica`'s and `storage`'s). Invariants: who calls is known from the
//! certificate before a handler runs; each listener serves its own roles and services only; one misbehaving
//! connection costs the others nothing.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cli;
mod config;
mod convert;
mod crl;
mod dial;
mod events;
mod exit;
mod files;
mod grpc;
mod health;
mod http;
mod join;
mod listener;
mod logging;
mod metered;
mod nodeplane;
mod offline;
mod open_files;
mod own;
mod ports;
mod quic;
mod serve;
mod startup;
mod status;
mod tls;
mod vault;

pub use cli::main;
