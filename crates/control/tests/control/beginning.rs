//! What goes on in the background at the beginning of every test.

use palyra_replica::Replica;
use palyra_state::ca;

use crate::support::until;

/// Waits for what a replica says of itself at first, so that it is in nobody's count of entries.
pub(crate) async fn spoken(replica: &Replica) {
    until(replica, |view| {
        ca::replica_step(view, 1) > 0 && ca::crl(view, 0, 1).is_some() && ca::crl(view, 1, 1).is_some()
    })
    .await;
}
