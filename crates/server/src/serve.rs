//! The HTTP/2 side of a listener: bounds of streams, frames and headers, signs of life, and the stop.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::Server;
use tower::util::MapResponseLayer;

use crate::listener::Listener;
use crate::status;

/// Largest HTTP/2 frame, in bytes.
const FRAME: u32 = 256 * 1024;
/// Largest list of headers of a request, in bytes.
const HEADERS: u32 = 16 * 1024;
/// Streams that a peer may reset before the server has taken them; more end its connection.
const RESETS: usize = 64;

/// Bounds of the connections of one listener.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Http2 {
    /// Streams that may be open on one connection.
    pub(crate) streams: u32,
    /// Bytes that may be under way on one stream.
    pub(crate) window: u32,
    /// An idle connection is asked for a sign of life this often.
    pub(crate) keepalive: Duration,
    /// It is closed when no sign comes within this.
    pub(crate) keepalive_timeout: Duration,
}

/// Serves the connections of a listener until `stop`, which is the listener's own, is cancelled, and then those
/// that are open until they end. What gRPC itself refuses is said in the words of replica `served_by`.
pub(crate) async fn serve(
    listener: Listener,
    routes: Routes,
    http2: Http2,
    served_by: u64,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let (incoming, accepting) = listener.start();
    let serving = Server::builder()
        .max_concurrent_streams(http2.streams)
        .initial_stream_window_size(http2.window)
        .initial_connection_window_size(http2.window.saturating_mul(2))
        .http2_keepalive_interval(Some(http2.keepalive))
        .http2_keepalive_timeout(Some(http2.keepalive_timeout))
        .http2_max_header_list_size(HEADERS)
        .http2_max_pending_accept_reset_streams(Some(RESETS))
        .max_frame_size(FRAME)
        .layer(MapResponseLayer::new(move |response| {
            explained(response, served_by)
        }))
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned());
    // In one task: a panic of either is a panic of both, and whoever looks after the task hears of it.
    let (served, ()) = tokio::join!(serving, accepting);
    served
}

fn explained(response: http::Response<Body>, served_by: u64) -> http::Response<Body> {
    let refused = Status::from_header_map(response.headers())
        .as_ref()
        .and_then(status::framing);
    match refused {
        Some(error) => status::status(&error, served_by).into_http(),
        None => response,
    }
}
