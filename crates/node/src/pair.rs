//! Becoming a node: proof of a PIN or ticket, the wait for the operator, and the identity that comes of it.

use std::path::PathBuf;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::{Error, Kind, Result};

/// What the machine proves that it knows.
pub enum PairMethod {
    /// The eight digits that an operator read out.
    Pin {
        /// The digits; blanks and dashes are ignored.
        pin: Zeroizing<String>,
        /// The code's number (`C3` is 3); 0 for the only open code.
        code: u32,
        /// Enrol addresses of replicas, `host:port`; tried in order.
        endpoints: Vec<String>,
    },
    /// The text of a ticket, which names the endpoints itself.
    Ticket(Zeroizing<String>),
    /// Go on with the pairing that this folder began and didn't finish.
    Resume,
}

/// How to pair.
pub struct PairConfig {
    /// The node's data folder; see [`crate::home::default_dir`].
    pub data_dir: PathBuf,
    /// What the machine calls itself; the host name when absent.
    pub name: Option<String>,
    /// What is proved.
    pub method: PairMethod,
    /// How long to wait for the operator; the pairing stays open and can be resumed afterwards.
    pub wait: Duration,
    /// Pair again although the folder holds an identity; the node gets a new device id.
    pub replace: bool,
}

/// What a person should hear while a pairing goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PairEvent {
    /// A replica is being asked.
    Trying {
        /// Its enrol address.
        endpoint: String,
    },
    /// A replica didn't answer; another is tried.
    Failed {
        /// Its enrol address.
        endpoint: String,
        /// What went wrong.
        why: String,
    },
    /// The proof was accepted and the server's proof verified: the operator's screen shows the same digits.
    Proved {
        /// Six digits, to be compared by people.
        sas: String,
        /// The id that this machine will have.
        device_id: String,
        /// The request that the operator approves.
        pairing_id: String,
        /// Hex SHA-256 of the node's public key, as the operator sees it.
        key_fingerprint: String,
        /// The request lapses then.
        expires_at_ms: u64,
    },
    /// The operator approved; the certificate is checked and stored.
    Approved,
}

/// Shows the progress of a pairing.
pub trait PairUi: Sync {
    /// Called once for each step, in order.
    fn event(&self, event: PairEvent);
}

/// What a finished pairing gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paired {
    /// The node's id from now on.
    pub device_id: String,
    /// The cluster that it belongs to.
    pub cluster_id: String,
    /// Hex SHA-256 of its certificate.
    pub fingerprint: String,
    /// End of the certificate's validity.
    pub not_after_ms: u64,
}

/// Pairs this machine with a cluster, or goes on with a pairing that was begun. Safe to drop at any point: what is
/// proved already is on disk, and the next call with [`PairMethod::Resume`] continues to wait.
///
/// Errors: wrong PIN or ticket, a server that isn't who the secret came from, refusal, expiry, no reachable replica,
/// a folder that is paired already.
pub async fn pair(config: PairConfig, ui: &dyn PairUi) -> Result<Paired> {
    let _ = (config.data_dir, ui);
    Err(Error::new(Kind::Internal, "N0001", "not here yet", ""))
}
