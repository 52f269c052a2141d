//! The birth of a cluster, as its first replica carries it out.
//!
//! What never lives here: the making of keys and of the genesis envelope; `palyra cluster init` does that,
//! offline. Invariant: done again after a crash at any point, it comes to the same cluster or does nothing.

use std::time::Duration;

use palyra_platform as platform;
use palyra_replica::{ProposeError, Replica};
use palyra_state::{Code, Envelope, cluster};

use crate::error::Error;

/// How long the first replica may take to elect itself and to commit.
const PATIENCE: Duration = Duration::from_secs(30);

/// Founds the cluster: makes this replica the only voter, and commits the genesis envelope. Answers when it
/// is applied here. Does nothing when the cluster exists already with the same id.
///
/// # Errors
/// [`Error::Rejected`] when another cluster lives in this data folder; [`Error::Unavailable`] when the
/// replica did not come to lead in time.
pub async fn found(replica: &Replica, genesis: Envelope) -> Result<(), Error> {
    let committing = async {
        // Harmless when an earlier run got this far.
        replica
            .initialize()
            .await
            .map_err(|error| Error::Internal(error.to_string()))?;
        loop {
            match replica.propose(genesis.clone()).await {
                Ok(committed) => return Ok(committed),
                // The same request id again: an unknown outcome becomes known.
                Err(ProposeError::Unavailable { .. } | ProposeError::Unknown) => {
                    platform::sleep(Duration::from_millis(50)).await;
                }
                Err(ProposeError::TooLarge { .. }) => {
                    return Err(Error::Internal("the genesis envelope is too large".to_owned()));
                }
            }
        }
    };
    let committed = platform::timeout(PATIENCE, committing).await;
    let committed = committed.map_err(|_| Error::Unavailable { leader_hint: None })??;
    if !replica.wait_applied(committed.index, PATIENCE).await {
        return Err(Error::Unavailable { leader_hint: None });
    }
    match committed.reply {
        Ok(_) => Ok(()),
        // Born by an earlier run whose answer was lost: its id says whether it is the same cluster.
        Err(reject) if reject.kind() == Code::ClusterExists && is_same(replica, &genesis) => Ok(()),
        Err(reject) => Err(reject.into()),
    }
}

fn is_same(replica: &Replica, genesis: &Envelope) -> bool {
    let palyra_state::Command::Cluster(command) = &genesis.command else {
        return false;
    };
    let Some(cluster::Action::Genesis(wanted)) = &command.action else {
        return false;
    };
    cluster::cluster(&replica.view()).is_some_and(|cluster| cluster.cluster_id == wanted.cluster_id)
}
