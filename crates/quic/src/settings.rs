//! The transport's windows and timers, the same on both sides but for what is asked for here.

use std::sync::Arc;
use std::time::Duration;

use quinn::{IdleTimeout, TransportConfig, VarInt};

/// Bytes that may be under way on one stream: a frame of the full length.
const STREAM_WINDOW: u32 = 640 * 1024;
/// Bytes that a connection takes before anybody has read them, over all streams.
const WINDOW: u32 = 2 * 1024 * 1024;
/// Bytes that a connection holds until the other side has acknowledged them.
const SEND_WINDOW: u64 = 2 * 1024 * 1024;
/// Handshake bytes that arrived out of order.
const CRYPTO_BUFFER: usize = 16 * 1024;

/// The settings of a connection whose peer may open `streams` calls, that ends after `idle` without a sign of the other
/// side, and that gives one itself every `keepalive`.
#[must_use]
pub fn transport(streams: u32, idle: Duration, keepalive: Duration) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(streams))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(WINDOW))
        .send_window(SEND_WINDOW)
        .crypto_buffer_size(CRYPTO_BUFFER)
        // Nothing here uses datagrams of QUIC.
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(keepalive));
    let idle_ms = u32::try_from(idle.as_millis()).unwrap_or(u32::MAX);
    config.max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(idle_ms))));
    Arc::new(config)
}
