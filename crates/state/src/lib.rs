//! The replicated state machine of Palyra: records, tables, commands, `apply`, queries, invariants.
//!
//! Pure: no clock, no randomness, no files, no network, no threads, no logging, no hash maps, no floats. Time
//! comes with the entry, ids and signatures come with the command. Equal logs make equal bytes on every
//! replica. Domains, one module each: [`cluster`], [`access`], [`identity`], [`pairing`], [`nodes`],
//! [`dispatch`], [`ca`], [`fleet`], [`leases`], [`approvals`], [`journal`]. Reading: the queries of the domains,
//! over anything that implements [`Read`].

pub mod access;
mod actor;
mod admit;
mod apply;
pub mod approvals;
pub mod ca;
mod check;
pub mod cluster;
mod command;
mod dedup;
pub mod dispatch;
pub mod fleet;
pub mod identity;
mod ids;
pub mod invariants;
pub mod journal;
pub mod leases;
pub mod limits;
mod meta;
pub mod nodes;
pub mod pairing;
mod read;
mod reject;
pub mod reply;
pub mod tables;
mod txn;

pub use actor::Actor;
pub use apply::{Applied, Position, apply};
pub use command::{Command, Envelope, Undecodable, decode};
pub use dedup::{Accepted, Answer, Requester, Seen};
pub use ids::{Digest, Fingerprint, Id};
pub use journal::{Cursor, Row};
pub use meta::{Meta, clock, meta, state_hash};
pub use read::{MemRead, Read, Visit, Writes};
pub use reject::{Class, Code, Reject};
pub use reply::Reply;
