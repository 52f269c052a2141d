//! The life of one connection: handshake, admission, calls, close.
//!
//! Invariants: the guard of `control`'s registry outlives the connection; every end has a code that says why; when a
//! connection ends, whatever its calls were at ends with it.

use std::net::SocketAddr;
use std::sync::Arc;

use palyra_control::{ConnectionGuard, Transport, Unwelcome};
use palyra_pki::PeerIdentity;
use palyra_quic::Fault;
use palyra_quic::close::Close;
use quinn::{Connection, Incoming};
use rustls_pki_types::CertificateDer;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::calls::{self, Callee};
use super::slots::{Handshake, Slot};
use super::{Meter, Shared};
use crate::nodeplane::Origin;

/// Calls of one connection that may be at large messages at one time.
pub(super) const LARGE: usize = 4;

/// Serves a connection from its first datagram to its end.
pub(super) async fn serve(shared: Arc<Shared>, incoming: Incoming, handshake: Handshake) {
    let source = incoming.remote_address();
    let Some(connection) = shake_hands(&shared, incoming).await else {
        Meter::count(&shared.meter.refused);
        return;
    };
    let peer = match identity(&connection) {
        Ok(peer) => peer,
        Err(error) => {
            tracing::debug!(listener = "quic", %source, error, "certificate refused");
            connection.close(Close::Protocol.code(), error.as_bytes());
            return;
        }
    };
    let slot = match handshake.done(&peer.id.to_string()) {
        Ok(slot) => slot,
        Err(fault) => {
            Meter::count(&shared.meter.refused);
            if shared.refused.now() {
                tracing::warn!(listener = "quic", %source, who = %peer.id, %fault, "connection refused");
            }
            connection.close(Close::Busy.code(), words(&fault).as_bytes());
            return;
        }
    };
    Meter::count(&shared.meter.accepted);
    let _open = Open::new(&shared.meter);
    stay(&shared, &connection, source, peer, &slot).await;
}

/// `E1065: thing and cause; next step`, in the bytes of a reason phrase.
fn words(fault: &Fault) -> String {
    format!("{}: {fault}; {}", fault.code(), fault.next())
}

async fn shake_hands(shared: &Shared, incoming: Incoming) -> Option<Connection> {
    let source = incoming.remote_address();
    let connecting = incoming.accept().ok()?;
    match tokio::time::timeout(shared.limits.handshake, connecting).await {
        Ok(Ok(connection)) => Some(connection),
        Ok(Err(error)) => {
            tracing::debug!(listener = "quic", %source, %error, "handshake failed");
            None
        }
        Err(_) => {
            tracing::debug!(listener = "quic", %source, "handshake took too long");
            None
        }
    }
}

fn identity(connection: &Connection) -> Result<PeerIdentity, String> {
    let shown = connection.peer_identity();
    let chain = shown.and_then(|shown| shown.downcast::<Vec<CertificateDer<'static>>>().ok());
    let leaf = chain.as_deref().and_then(|chain| chain.first());
    let leaf = leaf.ok_or("no certificate was shown")?;
    PeerIdentity::from_der(leaf).map_err(|error| error.to_string())
}

/// From the admission to the end.
async fn stay(shared: &Shared, connection: &Connection, source: SocketAddr, peer: PeerIdentity, slot: &Slot) {
    let (guard, welcome) = match shared.control.accept(&peer, &source.to_string()) {
        Ok(guard) => (guard, true),
        Err(unwelcome) => {
            let Unwelcome { error, stays } = *unwelcome;
            tracing::info!(who = %peer.id, %source, %error, "connection will be refused");
            let Some(guard) = stays else {
                let words = format!("{}: {error}; {}", error.code(), error.next());
                return connection.close(Close::Busy.code(), words.as_bytes());
            };
            (guard, false)
        }
    };
    let callee = Arc::new(Callee {
        plane: shared.plane.clone(),
        from: Origin {
            peer,
            connection: welcome.then(|| guard.id()),
            transport: Transport::Quic,
        },
        replica_id: shared.control.replica_id(),
        limits: shared.limits,
        meter: Arc::clone(&shared.meter),
        large: Arc::new(Semaphore::new(LARGE)),
    });
    let (close, reason) = tokio::select! {
        biased;
        ended = ordered_out(&guard) => ended,
        () = slot.replaced() => (Close::Replaced, "a newer connection of this identity took its place".to_owned()),
        () = shared.stop.now.cancelled() => (Close::Draining, "the replica is about to stop".to_owned()),
        ended = take_calls(shared, connection, &callee) => ended,
    };
    // The calls are gone with the last line; nothing of this connection is looked at any more.
    connection.close(close.code(), reason.as_bytes());
    drop(guard);
}

/// Completes when `control` wants the connection closed.
async fn ordered_out(guard: &ConnectionGuard) -> (Close, String) {
    let end = guard.closed().await;
    (Close::of_word(end.as_str()), end.message().to_owned())
}

/// Serves the calls until the peer closes, or until the listener stops and the last call has ended.
async fn take_calls(shared: &Shared, connection: &Connection, callee: &Arc<Callee>) -> (Close, String) {
    let limit = usize::try_from(shared.limits.streams).unwrap_or(usize::MAX);
    let mut tasks = JoinSet::new();
    let mut stopping = false;
    loop {
        if stopping && tasks.is_empty() {
            return (Close::Draining, "the replica is about to stop".to_owned());
        }
        tokio::select! {
            biased;
            Some(ended) = tasks.join_next(), if !tasks.is_empty() => {
                if let Err(error) = ended && error.is_panic() {
                    tracing::error!(%error, "a call over QUIC has panicked");
                }
            }
            () = shared.stop.gently.cancelled(), if !stopping => stopping = true,
            accepted = connection.accept_bi(), if !stopping => {
                let Ok((send, receive)) = accepted else {
                    return (Close::Done, String::new());
                };
                if tasks.len() >= limit {
                    tasks.spawn(calls::refuse(Arc::clone(callee), send, receive, limit));
                } else {
                    tasks.spawn(calls::serve(Arc::clone(callee), send, receive));
                }
            }
        }
    }
}

/// Counts an open connection.
struct Open<'a>(&'a Meter);

impl<'a> Open<'a> {
    fn new(meter: &'a Meter) -> Open<'a> {
        Meter::count(&meter.open);
        Open(meter)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
    }
}
