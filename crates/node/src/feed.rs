//! What the node hears of the cluster beside its session: where the replicas are now.
//!
//! What never lives here: work, and the end of a session (both come through the session). Invariant: nothing depends on
//! it: a replica that does not serve it, or ends it, costs the node some freshness of its list and nothing else.

use futures::FutureExt;
use futures::future::BoxFuture;
use palyra_client::error::Failure;
use palyra_client::{Connection, Incoming};
use palyra_proto::journal::v1::StreamEventsRequest;
use palyra_proto::node::v1 as wire;

/// Pause between heartbeats: the session has its own, and here nothing waits for them.
const HEARTBEAT_MS: u32 = 60_000;

type Opened = Result<Incoming<wire::NodeEventsResponse>, Failure>;

/// The feed of one session.
pub(crate) enum Feed {
    Opening(BoxFuture<'static, Opened>),
    Open(Box<Incoming<wire::NodeEventsResponse>>),
    Off,
}

impl Feed {
    /// Begins at the present: the first word tells where the replicas are, so that nothing is missed by not going on
    /// where the last session's feed ended.
    pub(crate) fn open(connection: &Connection, device_id: &str) -> Feed {
        let connection = connection.clone();
        let request = wire::NodeEventsRequest {
            device_id: device_id.to_owned(),
            events: Some(StreamEventsRequest {
                // Its own rows come through the session.
                action_prefix: "cluster.".to_owned(),
                heartbeat_ms: HEARTBEAT_MS,
                ..StreamEventsRequest::default()
            }),
        };
        Feed::Opening(async move { connection.events(request).await }.boxed())
    }

    /// Where the replicas are, when that may be news; never when there is no feed. Safe to cancel.
    pub(crate) async fn endpoints(&mut self) -> Vec<wire::NodeEndpoint> {
        loop {
            match self {
                Feed::Opening(opening) => {
                    *self = opening.await.map_or_else(
                        |failure| {
                            tracing::debug!(?failure, "no feed of the cluster with this replica");
                            Feed::Off
                        },
                        |stream| Feed::Open(Box::new(stream)),
                    );
                }
                Feed::Open(stream) => match stream.message().await {
                    Ok(Some(message)) if !message.endpoints.is_empty() => return message.endpoints,
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => *self = Feed::Off,
                },
                Feed::Off => std::future::pending().await,
            }
        }
    }
}
