//! Ways to break the product on purpose, at the seams where the simulation holds it: the disk below it, the callers
//! above it. A check that no break can trip checks nothing.
//!
//! None of these is in the product: `--break NAME` changes what the simulated disk or client does.

/// One way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Break {
    /// A sync answers at once and makes nothing durable: votes and entries are acknowledged too early
    AckBeforeSync,
    /// Votes are never written
    LoseVote,
    /// Applied state and the index that it reflects are two writes instead of one
    SplitApply,
    /// A received snapshot becomes current in two writes: the log goes first, the state follows
    SplitInstall,
    /// Replica 2 drops one in fifty values of the state that it writes
    DropPut,
    /// Reads answer from the local state without asking the leader
    LocalReads,
    /// A lost answer is taken for a refusal
    GuessOutcome,
    /// A retry is sent under a new request id
    RetryAnew,
    /// Followers of the journal begin one row too late after they moved to another replica
    SkipRow,
    /// The resource that leases protect takes every write, whatever its fence
    IgnoreFence,
    /// No fault ever strikes: the run must be refused as one that tests nothing
    NoFaults,
}
