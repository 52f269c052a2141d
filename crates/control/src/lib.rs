//! The control plane of Palyra, without sockets: admission, sessions, waiters, pairing, dispatch, revocation,
//! joining, and what the leader does on its own.
//!
//! What never lives here: gRPC, QUIC and HTTP (the server's), the rules of the state machine
//! (`palyra_state`), Raft (`palyra_replica`), and direct use of clocks, tasks and randomness
//! (`palyra_platform`).
//!
//! Invariants: every change is a committed entry; every decision about a caller is made anew on each call and
//! each message; a heartbeat costs the log nothing; everything that waits is bounded in number and in time;
//! an error has a stable code and says what to do next.
//!
//! How to serve with it: accept an mTLS connection with [`Control::accept`] and close it when
//! [`ConnectionGuard::closed`] says so; admit each call with [`Control::admit_operator`] or
//! [`Control::admit_node_as`]; then call what the request asks for.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod access;
mod admission;
mod approvals;
mod ca;
mod caller;
mod certificates;
mod cluster;
mod connections;
mod control;
mod devices;
mod dispatch;
mod drain;
mod endpoints;
mod ends;
mod error;
mod events;
mod feed;
mod genesis;
mod join;
mod journal;
mod json;
pub mod limits;
mod liveness;
mod nodes;
mod outbox;
mod outputs;
mod pace;
mod pairing;
mod peers;
mod poll;
mod readers;
mod reconcile;
mod registry;
mod removal;
mod revocation;
mod selector;
mod sessions;
mod waiters;
mod watch;
mod workers;

pub use access::{Added, OperatorView, WhoAmI};
pub use approvals::{ApprovalView, AskGrant, GrantView, Verdict};
pub use ca::{
    AuthorityView, CaStatus, Installed, MemoryVault, NodeMissing, ReplicaTrust, RootView, TrustAnswer, Vault,
};
pub use caller::{Caller, EnrolSource};
pub use certificates::{CertificateTimes, RecoverRequest, Renewal, Renewed, Rotated};
pub use cluster::{ClusterStatus, FleetCounts, ReplicaView};
pub use connections::{ConnectionGuard, Unwelcome};
pub use control::{Control, ControlConfig, Keys, ReadInfo, ReadOptions, WriteInfo};
pub use devices::{DeviceView, Remove, Revocation};
pub use dispatch::{Completion, DispatchFilter, DispatchView, Invoke, Page};
pub use endpoints::Endpoint;
pub use error::{Class, Error, Refusal};
pub use events::{Event, Events, EventsRequest, FeedRefusal};
pub use genesis::found;
pub use join::{Join, Joined, MintedToken};
pub use journal::{Tail, TailOptions, TailPart, Verified};
pub use limits::{Limits, Timings};
pub use liveness::LastSeen;
pub use nodes::{NodeView, Registered, Registration};
pub use outbox::{Assignment, End, Outbound, ResultAnswer, TrustUpdate};
pub use outputs::{Line, Logs, Output, Position, Progress as ProgramProgress};
pub use pace::{Pace, SessionRefusal};
pub use pairing::codes::{CodeView, Mint, Minted};
pub use pairing::enrol::{BeginPin, FinishPin, Hello, PinBegun, ProofAccepted, ProveTicket};
pub use pairing::requests::{Fetched, PairingView};
pub use poll::PollAnswer;
pub use registry::Transport;
pub use revocation::{Enforcement, Progress, Revocations, Stand};
pub use sessions::{AttachRequest, Attached, Inbound, Outgoing, Session};
pub use workers::WorkerRefusal;
pub use workers::fleet::{FleetView, Reaped, WorkerAct, WorkerView};
pub use workers::leases::{LeaseFilter, LeaseView};
pub use workers::logs::RunLogs;
pub use workers::messages::{
    Answer as WorkerAnswer, AttestAnswer, Challenge, Chunk, CleanedUp, Finished, FromWorker, HeldLease,
    LeaseName, Offer, Renewed as LeaseRenewed, Statement, ToWorker,
};
pub use workers::policy::{PolicyChange, PolicySet, SetPolicy};
pub use workers::renewals::RenewalCounts;
pub use workers::runs::{FilePiece, PieceTaken, Put, RunFilter, RunView, Start};
