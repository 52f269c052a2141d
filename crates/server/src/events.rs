//! The feed on the wire: what is asked for, what is answered, and a row.
//!
//! What never lives here: what a reader may see, and where it goes on (`control`), and the streams of a transport.

use std::pin::Pin;

use futures::{Stream, stream};
use palyra_control::{Error, Event, Events, EventsRequest};
use palyra_proto::journal::v1 as wire;
use palyra_proto::journal::v1::stream_events_response::Body;
use palyra_state::{Cursor, Digest, Row};

use crate::convert;

/// What is asked for, as `control` takes it; `connection` carries the stream.
pub(crate) fn request(ask: wire::StreamEventsRequest, connection: Option<u64>) -> EventsRequest {
    EventsRequest {
        after: ask.after.map(|after| Cursor {
            index: after.index,
            ordinal: after.ordinal,
        }),
        from_first: ask.from_first,
        cluster_id: ask.cluster_id,
        action_prefix: ask.action_prefix,
        subject: ask.subject,
        device: ask.device,
        heartbeat_ms: ask.heartbeat_ms.into(),
        connection: connection.unwrap_or_default(),
    }
}

/// The events as a stream of what `message` makes of them. Nothing is read ahead: the next one is made when the
/// transport has room for it.
pub(crate) fn stream<M: Send + 'static>(
    events: Events,
    message: impl Fn(Event) -> M + Send + 'static,
) -> Pin<Box<dyn Stream<Item = Result<M, Error>> + Send>> {
    Box::pin(stream::unfold(
        (events, message),
        |(mut events, message)| async move {
            let next = events.next().await?.map(&message);
            Some((next, (events, message)))
        },
    ))
}

/// An event of the feed of `cluster_id`.
pub(crate) fn event(event: Event, cluster_id: String) -> wire::StreamEventsResponse {
    let body = match event {
        Event::Rows { rows, cursor } => Body::Rows(wire::EventRows {
            rows: rows.into_iter().map(row).collect(),
            cursor: Some(convert::cursor(cursor)),
        }),
        Event::CaughtUp { cursor, read } => Body::CaughtUp(wire::CaughtUp {
            cursor: Some(convert::cursor(cursor)),
            cluster_id,
            read: convert::read_info(read),
        }),
        Event::Heartbeat { cursor } => Body::Heartbeat(wire::EventHeartbeat {
            cursor: Some(convert::cursor(cursor)),
        }),
        Event::Gap { first, rescan } => Body::Gap(wire::Gap {
            first: Some(convert::cursor(first)),
            rescan,
        }),
    };
    wire::StreamEventsResponse { body: Some(body) }
}

/// A row; one that is shown in part has no hash, and may have no request id.
pub(crate) fn row(row: Row) -> wire::Row {
    let whole = row.hash != Digest::ZERO;
    let hash = |digest: Digest| {
        if whole {
            digest.to_bytes().to_vec().into()
        } else {
            bytes::Bytes::new()
        }
    };
    let request_id = if row.request_id.is_zero() {
        String::new()
    } else {
        row.request_id.to_string()
    };
    wire::Row {
        cursor: Some(convert::cursor(row.cursor())),
        at_ms: row.at_ms,
        request_id,
        prev_hash: hash(row.prev_hash),
        hash: hash(row.hash),
        actor: row.actor,
        action: row.action,
        subject: row.subject,
        detail: row.detail.into_iter().collect(),
    }
}
