//! The worker: a node that runs other people's work, under leases, in sandboxes.
//!
//! ```text
//! control plane ── session ── Desk (what is held and owed) ── one task a lease ── warden ── sandbox ── the tool
//! ```
//!
//! What lives here: the worker's configuration ([`config`]), what it says of itself ([`attest`]), the leases it holds
//! (`desk`, `lease`), their records on disk (`store`), and the processes that run them ([`warden`], [`supervise`]).
//! What never does: the session itself (see `session`), the decision who gets a lease (the control plane's).
//!
//! Invariants: nothing is started before the control plane confirmed, after the offer was received, that the lease is
//! live; what was attested is what runs, byte by byte; a process of a lease is dead before the lease can be another's,
//! whatever happens to this process; nothing is reported clean that was not looked at.

pub mod config;
pub mod execute;
pub mod place;
pub mod spec;
pub mod supervise;
pub mod tools;
pub mod warden;

mod cgroup;
mod folder;
mod init;
mod mounts;
mod sandbox;
mod store;
mod timing;
