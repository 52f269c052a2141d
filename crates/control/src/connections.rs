//! Live mTLS connections of this replica, idle ones too, so that a revocation can close them.
//!
//! What never lives here: sockets. A connection is a certificate and a signal; the listener that holds the
//! socket waits for the signal and drops its guard once the socket is closed. Invariants: a connection is
//! entered before its certificate is checked, so that either the check sees a revocation or the revocation
//! sees the connection; it stays entered until its guard is dropped, also when the check refuses it: such a one stays
//! for as long as it takes to be told why, and less when its holder is revoked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use palyra_pki::PeerIdentity;
use palyra_platform::{self as platform, Instant};
use tokio::sync::watch;

use crate::caller::end_of;
use crate::control::Control;
use crate::error::Error;
use crate::limits::REFUSED_STAY;
use crate::outbox::End;

/// What a listener holds for each connection that it accepted.
#[derive(Debug)]
pub struct ConnectionGuard {
    id: u64,
    close: watch::Receiver<Option<End>>,
    /// Of a refused one: when it has stayed for long enough, and what ends it then.
    leaves: Option<(Instant, End)>,
    registry: Arc<Connections>,
}

/// A connection whose certificate is not accepted.
#[derive(Debug)]
pub struct Unwelcome {
    /// Why.
    pub error: Error,
    /// It may stay until [`ConnectionGuard::closed`] says so, to ask and be told why, and carries nothing that lasts;
    /// none: it must be closed now.
    pub stays: Option<ConnectionGuard>,
}

impl ConnectionGuard {
    /// Names the connection on this replica.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Resolves when the connection must be closed, with the reason. Close the socket, then drop the guard.
    pub async fn closed(&self) -> End {
        let Some((at, end)) = self.leaves else {
            return self.ordered().await;
        };
        let stay = at.saturating_duration_since(platform::now());
        platform::timeout(stay, self.ordered()).await.unwrap_or(end)
    }

    async fn ordered(&self) -> End {
        let mut close = self.close.clone();
        loop {
            if let Some(end) = *close.borrow_and_update() {
                return end;
            }
            if close.changed().await.is_err() {
                return End::Draining;
            }
        }
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.id);
        self.registry.changed.send_modify(|count| *count += 1);
    }
}

#[derive(Debug)]
struct Connection {
    peer: PeerIdentity,
    source: String,
    close: watch::Sender<Option<End>>,
    /// Its certificate was not accepted: nothing that lasts is on it.
    refused: bool,
}

impl Connection {
    /// Whether a revocation waits for it. Who comes after it is refused, and could keep it waiting by coming again.
    fn is_awaited(&self) -> bool {
        !self.refused || self.close.borrow().is_some()
    }
}

/// The registry.
#[derive(Debug)]
pub(crate) struct Connections {
    live: Mutex<BTreeMap<u64, Connection>>,
    next: std::sync::atomic::AtomicU64,
    changed: watch::Sender<u64>,
    limit: usize,
}

impl Connections {
    pub(crate) fn new(limit: usize) -> Arc<Connections> {
        Arc::new(Connections {
            live: Mutex::new(BTreeMap::new()),
            next: std::sync::atomic::AtomicU64::new(1),
            changed: watch::Sender::new(0),
            limit,
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Connection>> {
        // Nothing that runs under the lock can panic half-way through a change.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(self: &Arc<Self>, peer: PeerIdentity, source: String) -> Result<ConnectionGuard, Error> {
        let id = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let close = watch::Sender::new(None);
        let receiver = close.subscribe();
        let mut live = self.lock();
        if live.len() >= self.limit {
            return Err(Error::Busy { what: "connections" });
        }
        let connection = Connection {
            peer,
            source,
            close,
            refused: false,
        };
        live.insert(id, connection);
        Ok(ConnectionGuard {
            id,
            close: receiver,
            leaves: None,
            registry: Arc::clone(self),
        })
    }

    /// Closes one connection.
    pub(crate) fn close(&self, id: u64, end: End) {
        if let Some(connection) = self.lock().get(&id) {
            connection.close.send_replace(Some(end));
        }
    }

    fn refuse(&self, guard: &mut ConnectionGuard, end: End) {
        if let Some(connection) = self.lock().get_mut(&guard.id) {
            connection.refused = true;
        }
        guard.leaves = Some((platform::now() + REFUSED_STAY, end));
    }

    /// The identities of the connections of one subject, with their ids.
    pub(crate) fn of_subject(&self, subject: &str) -> Vec<(u64, PeerIdentity)> {
        let live = self.lock();
        let matching = live
            .iter()
            .filter(|(_, connection)| connection.peer.id.id() == subject);
        matching
            .map(|(id, connection)| (*id, connection.peer.clone()))
            .collect()
    }

    /// The identities of all connections, with their ids.
    pub(crate) fn all(&self) -> Vec<(u64, PeerIdentity)> {
        self.lock()
            .iter()
            .map(|(id, connection)| (*id, connection.peer.clone()))
            .collect()
    }

    /// Whether no connection of this subject is open, save refused ones that came after its revocation.
    pub(crate) fn none_of(&self, subject: &str) -> bool {
        !self
            .lock()
            .values()
            .any(|connection| connection.peer.id.id() == subject && connection.is_awaited())
    }

    /// Changes whenever a connection was dropped.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    /// Where a connection came from; for the log.
    pub(crate) fn source(&self, id: u64) -> Option<String> {
        self.lock().get(&id).map(|connection| connection.source.clone())
    }
}

impl Control {
    /// Enters an accepted mTLS connection of a node or operator. Wait for [`ConnectionGuard::closed`] beside
    /// the connection's own work.
    ///
    /// # Errors
    /// [`Unwelcome`], with what [`Control::admit_node`] and [`Control::admit_operator_local`] refuse, or with
    /// [`Error::Busy`].
    pub fn accept(&self, peer: &PeerIdentity, source: &str) -> Result<ConnectionGuard, Box<Unwelcome>> {
        let entered = self.connections().enter(peer.clone(), source.to_owned());
        let mut guard = entered.map_err(|error| Box::new(Unwelcome { error, stays: None }))?;
        match self.may_stay(peer) {
            Ok(()) => Ok(guard),
            Err(error) => {
                self.connections().refuse(&mut guard, end_of(&error));
                Err(Box::new(Unwelcome {
                    error,
                    stays: Some(guard),
                }))
            }
        }
    }

    /// How many connections of nodes and operators are open on this replica.
    #[must_use]
    pub fn connection_count(&self) -> usize {
        self.connections().count()
    }

    /// Closes those connections of a subject that admission would refuse now.
    pub(crate) fn recheck_connections(&self, subject: Option<&str>) {
        let connections = self.connections();
        let candidates = subject.map_or_else(|| connections.all(), |subject| connections.of_subject(subject));
        for (id, peer) in candidates {
            if let Err(error) = self.may_stay(&peer) {
                let source = connections.source(id).unwrap_or_default();
                tracing::info!(peer = %peer.id, source, cause = %error, "closing a connection");
                connections.close(id, end_of(&error));
            }
        }
    }
}
