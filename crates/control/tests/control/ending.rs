//! What goes on in the background of every test, at its beginning and its end.

use futures::FutureExt as _;
use palyra_replica::Replica;
use palyra_state::ca;

use crate::support::{Cluster, Member, until};

/// Waits for what a replica says of itself at first, so that it is in nobody's count of entries.
pub(crate) async fn spoken(replica: &Replica) {
    until(replica, |view| {
        ca::replica_step(view, 1) > 0 && ca::crl(view, 0, 1).is_some() && ca::crl(view, 1, 1).is_some()
    })
    .await;
}

// What is proposed in the background while the runtime of a test ends must not look like the death of Raft.
impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.replica.shutdown().now_or_never();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.replica.shutdown().now_or_never();
    }
}
