//! Workers, as the control plane serves them: their side of a node's session, the leases that they are given,
//! renewals, and what operators see and decide of them.
//!
//! What never lives here: the rules (`palyra_state::fleet` and `palyra_state::leases`). Invariants: a worker is
//! served on the session of its node, and by nothing else; the state is the outbox; a message that carries a
//! stale fence is refused, wherever it arrives.

pub(crate) mod care;
pub(crate) mod delivery;
pub(crate) mod fleet;
pub(crate) mod leases;
pub(crate) mod logs;
pub(crate) mod messages;
pub(crate) mod policy;
pub(crate) mod renewals;
pub(crate) mod runs;
pub(crate) mod seat;
mod session;
mod sweep;

use std::fmt;

use tokio::sync::Semaphore;

use crate::error::Class;
use crate::limits::CHALLENGES;
use crate::outputs::Outputs;
use renewals::Renewals;

/// What the control plane keeps of workers.
#[derive(Debug)]
pub(crate) struct Workers {
    pub(crate) renewals: Renewals,
    pub(crate) outputs: Outputs,
    /// Challenges that are being opened.
    pub(crate) challenging: Semaphore,
}

impl Workers {
    pub(crate) fn new() -> Workers {
        Workers {
            renewals: Renewals::default(),
            outputs: Outputs::default(),
            challenging: Semaphore::new(CHALLENGES),
        }
    }
}

/// Why a worker's message is not taken in, before the state machine is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkerRefusal {
    /// It speaks of leases before it has reported what it has of them.
    NotReported,
    /// A session of polls, which carries no work.
    Polls,
}

impl WorkerRefusal {
    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            WorkerRefusal::NotReported => "E1080",
            WorkerRefusal::Polls => "E1081",
        }
    }

    /// What kind of trouble it is.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            WorkerRefusal::NotReported | WorkerRefusal::Polls => Class::Precondition,
        }
    }

    /// What to do now.
    #[must_use]
    pub fn next(&self) -> String {
        match self {
            WorkerRefusal::NotReported => "send Report first, and wait for Reconciled".to_owned(),
            WorkerRefusal::Polls => {
                "let the worker open a stream, or QUIC, to a replica; a proxy on the way must pass HTTP/2"
                    .to_owned()
            }
        }
    }
}

impl fmt::Display for WorkerRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WorkerRefusal::NotReported => {
                "in this session the worker has not reported yet what it has of leases"
            }
            WorkerRefusal::Polls => "a worker's messages do not come in a session of polls",
        })
    }
}
