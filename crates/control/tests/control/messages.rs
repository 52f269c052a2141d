//! What nodes say and hear in tests.

use bytes::Bytes;
use palyra_control::{Completion, End, Outbound, Outgoing};
use palyra_state::Id;

use crate::support::{fresh_id, soon};

pub(crate) fn succeeded(id: Id, epoch: u64) -> Completion {
    Completion {
        request_id: fresh_id().to_string(),
        dispatch_id: id.to_string(),
        epoch,
        outcome: "succeeded".to_owned(),
        payload: Bytes::from_static(b"{\"ok\":true}"),
        error_code: String::new(),
        error_message: String::new(),
        log_tail: Bytes::new(),
        attempt: 0,
    }
}

/// The last message of a session that ends so.
pub(crate) fn goodbye(end: End) -> Outbound {
    let pace = end.pace();
    Outbound::Goodbye { end, pace }
}

/// The next message that is no heartbeat.
pub(crate) async fn next(outgoing: &Outgoing) -> Option<Outbound> {
    soon(outgoing.next()).await
}
