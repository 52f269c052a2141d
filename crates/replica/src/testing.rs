//! A message bus between replicas of one process, for tests: the peer protocol without sockets and
//! certificates.
//!
//! Links can be cut in either direction. A cut link swallows messages, as a network does: senders learn of it
//! by their own time limits only. Never used in production.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt};
use palyra_platform as platform;
use tokio::sync::mpsc;

use crate::peer::{Bodies, Lane, Method, PeerError, PeerTransport, Refusal};
use crate::service::PeerService;

/// The bus.
#[derive(Default)]
pub struct Bus {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    services: BTreeMap<u64, PeerService>,
    cut: BTreeSet<(u64, u64)>,
    /// Replicas that do not know [`Lane::Forward`].
    old: BTreeSet<u64>,
    snapshots: u64,
}

impl Bus {
    /// A bus without replicas.
    #[must_use]
    pub fn new() -> Arc<Bus> {
        Arc::new(Bus::default())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the replica `from` sends through.
    #[must_use]
    pub fn transport(self: &Arc<Self>, from: u64) -> Arc<dyn PeerTransport> {
        Arc::new(Sender {
            bus: self.clone(),
            from,
        })
    }

    /// Makes a replica reachable.
    pub fn attach(&self, id: u64, service: PeerService) {
        self.state().services.insert(id, service);
    }

    /// Makes a replica unreachable, as if its process were gone.
    pub fn detach(&self, id: u64) {
        self.state().services.remove(&id);
    }

    /// Swallows messages from `from` to `to`.
    pub fn cut(&self, from: u64, to: u64) {
        self.state().cut.insert((from, to));
    }

    /// Cuts a replica off from all others, both ways.
    pub fn isolate(&self, id: u64) {
        let mut state = self.state();
        let others: Vec<u64> = state
            .services
            .keys()
            .copied()
            .filter(|other| *other != id)
            .collect();
        for other in others {
            state.cut.insert((id, other));
            state.cut.insert((other, id));
        }
    }

    /// Restores all links.
    pub fn heal(&self) {
        self.state().cut.clear();
    }

    /// Makes a replica one of before the stream of commands.
    pub fn make_old(&self, id: u64) {
        self.state().old.insert(id);
    }

    /// Snapshot transfers that began so far.
    #[must_use]
    pub fn snapshots(&self) -> u64 {
        self.state().snapshots
    }

    fn passes(&self, from: u64, to: u64) -> bool {
        !self.state().cut.contains(&(from, to))
    }

    fn service(&self, to: u64) -> Result<PeerService, PeerError> {
        let service = self.state().services.get(&to).cloned();
        service.ok_or_else(|| PeerError::Unreachable(format!("replica {to} is down")))
    }
}

struct Sender {
    bus: Arc<Bus>,
    from: u64,
}

async fn task_of(
    to: u64,
    answer: impl Future<Output = Result<Bytes, PeerError>> + Send + 'static,
) -> Result<Bytes, PeerError> {
    let task = platform::scope_sync(to, || platform::spawn(answer));
    task.await
        .unwrap_or_else(|ended| Err(PeerError::Lost(ended.to_string())))
}

/// Answers that a task of the replica `to` makes: what kills that replica must not take the caller along, nor may what
/// the caller does be taken for the replica's.
fn answered_by(to: u64, answer: impl FnOnce() -> Bodies) -> Bodies {
    let (sender, receiver) = mpsc::channel(1);
    platform::scope_sync(to, || {
        let mut answers = answer();
        platform::spawn(async move {
            while let Some(one) = answers.next().await {
                if sender.send(one).await.is_err() {
                    return;
                }
            }
        })
        .detach();
    });
    stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|one| (one, receiver))
    })
    .boxed()
}

/// Drops messages while the link is cut.
fn link<T: Send + 'static>(
    bus: Arc<Bus>,
    from: u64,
    to: u64,
    messages: BoxStream<'static, T>,
) -> BoxStream<'static, T> {
    messages
        .filter(move |_| std::future::ready(bus.passes(from, to)))
        .boxed()
}

impl PeerTransport for Sender {
    fn call(
        &self,
        to: u64,
        _method: Method,
        body: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let (bus, from) = (self.bus.clone(), self.from);
        let exchange = async move {
            if !bus.passes(from, to) {
                std::future::pending::<()>().await;
            }
            let service = bus.service(to)?;
            // A task of the one who answers: what kills that replica must not take the caller along.
            let answer = task_of(to, async move { service.handle_call(from, body).await }).await;
            if !bus.passes(to, from) {
                std::future::pending::<()>().await;
            }
            answer
        };
        Box::pin(async move {
            platform::timeout(timeout, exchange)
                .await
                .unwrap_or(Err(PeerError::Timeout(timeout)))
        })
    }

    fn stream(
        &self,
        to: u64,
        lane: Lane,
        requests: BoxStream<'static, Bytes>,
    ) -> BoxFuture<'static, Result<Bodies, PeerError>> {
        let (bus, from) = (self.bus.clone(), self.from);
        Box::pin(async move {
            let service = bus.service(to)?;
            if lane == Lane::Forward && bus.state().old.contains(&to) {
                let message = "this version does not know the method";
                return Err(PeerError::refused(Refusal::Unsupported, message));
            }
            let requests = link(bus.clone(), from, to, requests).map(Ok).boxed();
            let replies = match lane {
                Lane::Forward => answered_by(to, move || service.handle_forward(from, requests)),
                _ => platform::scope(to, async move { service.handle_append(from, requests) }).await,
            };
            let alive = bus.clone();
            let replies = replies
                .take_while(move |_| std::future::ready(alive.service(to).is_ok()))
                .boxed();
            Ok(link(bus, to, from, replies))
        })
    }

    fn snapshot(
        &self,
        to: u64,
        frames: BoxStream<'static, Bytes>,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let (bus, from) = (self.bus.clone(), self.from);
        Box::pin(async move {
            bus.state().snapshots += 1;
            let service = bus.service(to)?;
            let stop = bus.clone();
            // A link that is cut in the middle of a transfer swallows the rest of it.
            let frames = frames
                .then(move |frame| {
                    let open = stop.passes(from, to);
                    async move {
                        if !open {
                            std::future::pending::<()>().await;
                        }
                        Ok(frame)
                    }
                })
                .boxed();
            let answer = task_of(to, async move { service.handle_snapshot(from, frames).await }).await;
            if !bus.passes(to, from) {
                std::future::pending::<()>().await;
            }
            answer
        })
    }
}
