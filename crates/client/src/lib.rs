//! Client of the control plane: several replicas behind one handle, failover, retries that never apply twice,
//! and a journal feed that survives the loss of the replica it is read from.
//!
//! What never lives here: printing, and decisions of the control plane. The command line and the node agent
//! use it.
//! Invariants: a mutation keeps its request id over all tries; a refusal is never retried; an outcome that is
//! not known is reported as such.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod approvals;
mod authorities;
mod client;
pub mod connect;
pub mod context;
pub mod error;
mod events;
mod follow;
pub mod ids;
mod mutations;
pub mod plane;
pub mod pool;
pub mod quic;
mod revocation;
mod road;
mod runs;
mod services;
mod story;
mod workers;

pub use client::{ATTEMPT_TIMEOUT, Client, DEFAULT_TIMEOUT, Mutation};
pub use connect::{ConnectError, ConnectErrorKind, ConnectOptions, connect};
pub use context::{Context, Contexts};
pub use error::{Attempt, Class, Error, Trail};
pub use events::{Bookmark, Event, Events};
pub use follow::{Follow, Step};
pub use ids::{fill_random, new_ulid, wall_ms};
pub use plane::{Connection, Incoming};
pub use pool::{Endpoints, Limits, Pool, Reached, Repeat};
pub use quic::{QuicConnection, QuicOptions};
pub use revocation::{Enforced, Revocation};
pub use services::{MAX_ANSWER, MAX_WAIT_MS};
