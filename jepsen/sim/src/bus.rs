//! The message bus between simulated replicas: the real peer messages in their real encoding, without TLS and
//! sockets.
//!
//! Each directed link has a latency, can lose, repeat or hold messages, and can be cut one way. A repeated
//! call arrives some time after the first. All bytes go into the run's digest. What runs on
//! behalf of a replica runs in tasks with its tag, so that killing it ends the call halfway, on either side.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{BoxStream, StreamExt};
use palyra_platform as platform;
use palyra_replica::{Bodies, Lane, Method, PeerError, PeerService, PeerTransport};
use tokio::sync::{mpsc, watch};

use crate::chance;
use crate::world::{Life, World};

/// Messages that a stream may have under way.
const WINDOW: usize = 64;
/// How much later than the first a repeated call may arrive, in virtual milliseconds.
const LATE_MS: u64 = 900;

#[derive(Default)]
struct Inner {
    services: BTreeMap<u64, (Life, PeerService)>,
    cut: BTreeSet<(u64, u64)>,
    loss_percent: u64,
    latency_ms: u64,
    messages: u64,
}

/// The bus; a cheap handle.
#[derive(Clone)]
pub(crate) struct Bus {
    inner: Arc<Mutex<Inner>>,
    world: &'static World,
    /// Bumped whenever a link is healed: held messages go on.
    healed: watch::Sender<u64>,
}

impl Bus {
    /// A bus with latencies and losses of the seed's choice.
    pub(crate) fn new(world: &'static World) -> Self {
        let inner = Inner {
            loss_percent: chance::below(3),
            latency_ms: chance::between(1, 12),
            ..Inner::default()
        };
        Bus {
            inner: Arc::new(Mutex::new(inner)),
            world,
            healed: watch::channel(0).0,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects a replica that has started.
    pub(crate) fn plug(&self, life: Life, service: PeerService) {
        self.inner().services.insert(life.replica(), (life, service));
    }

    /// Disconnects a replica that has died.
    pub(crate) fn unplug(&self, replica: u64) {
        self.inner().services.remove(&replica);
    }

    /// Lets nothing pass in this direction any more.
    pub(crate) fn cut(&self, from: u64, to: u64) {
        self.world.reach("link-cut");
        self.inner().cut.insert((from, to));
    }

    /// Heals every link, and ends losses when the run is about to settle.
    pub(crate) fn heal(&self, settle: bool) {
        let mut inner = self.inner();
        inner.cut.clear();
        if settle {
            inner.loss_percent = 0;
        }
        drop(inner);
        self.healed.send_modify(|n| *n += 1);
    }

    /// Messages so far.
    pub(crate) fn messages(&self) -> u64 {
        self.inner().messages
    }

    /// The transport of one replica.
    pub(crate) fn port(&self, from: u64) -> Arc<Port> {
        Arc::new(Port {
            from,
            bus: self.clone(),
        })
    }

    fn is_cut(&self, from: u64, to: u64) -> bool {
        self.inner().cut.contains(&(from, to))
    }

    fn service(&self, to: u64) -> Result<(Life, PeerService), PeerError> {
        let found = self.inner().services.get(&to).cloned();
        found
            .filter(|(life, _)| self.world.lives(*life))
            .ok_or_else(|| PeerError::Unreachable("connection refused".into()))
    }

    /// One message over one link; false when it was lost. A cut link holds it until it is healed.
    async fn hop(&self, from: u64, to: u64) -> bool {
        let (latency, lost) = {
            let mut inner = self.inner();
            inner.messages += 1;
            let slow = if chance::percent(2) { 40 } else { 1 };
            (
                chance::between(1, inner.latency_ms * slow),
                chance::percent(inner.loss_percent),
            )
        };
        let mut healed = self.healed.subscribe();
        platform::sleep(Duration::from_millis(latency)).await;
        let mut held = false;
        while self.is_cut(from, to) {
            held = true;
            if healed.changed().await.is_err() {
                return false;
            }
        }
        if held {
            self.world.reach("link-held-message");
        }
        if lost {
            self.world.reach("message-lost");
        }
        !lost
    }

    /// Now and then one of Raft's own calls arrives twice, the second time later. Commands do not: a stream over
    /// TCP repeats nothing, and a repetition that a new leader takes would belie the refusal of the old one.
    fn repeat(&self, (from, to): (u64, u64), method: Method, body: &Bytes) {
        if method == Method::Propose || !chance::percent(2) {
            return;
        }
        let (bus, body) = (self.clone(), body.clone());
        let late = Duration::from_millis(chance::between(0, LATE_MS));
        // In a task of nobody: a message that is under way does not die with its sender.
        tokio::spawn(async move {
            platform::sleep(late).await;
            if let Ok((life, service)) = bus.service(to) {
                bus.world.reach("message-repeated");
                platform::scope_sync(life.tag(), || {
                    platform::spawn(async move { drop(service.handle_call(from, body).await) }).detach();
                });
            }
        });
    }
}

/// What one replica sends through.
pub(crate) struct Port {
    from: u64,
    bus: Bus,
}

/// Carries one direction of a stream, in order; a lost message breaks the stream, as a reset connection
/// would.
async fn pump(
    bus: Bus,
    link: (u64, u64),
    mut items: BoxStream<'static, Result<Bytes, PeerError>>,
    out: mpsc::Sender<Result<Bytes, PeerError>>,
) {
    while let Some(item) = items.next().await {
        if let Ok(body) = &item {
            bus.world.absorb(body);
        }
        let item = if bus.hop(link.0, link.1).await {
            item
        } else {
            Err(PeerError::Lost("reset".into()))
        };
        let broken = item.is_err();
        if out.send(item).await.is_err() || broken {
            return;
        }
    }
}

fn receiver(items: mpsc::Receiver<Result<Bytes, PeerError>>) -> Bodies {
    futures::stream::unfold(
        items,
        |mut items| async move { Some((items.recv().await?, items)) },
    )
    .boxed()
}

/// Runs a future as a task of the replica that it asks; an answer that died with it is lost.
async fn on<T: Send + 'static>(
    life: Life,
    future: impl Future<Output = Result<T, PeerError>> + Send + 'static,
) -> Result<T, PeerError> {
    let task = platform::scope_sync(life.tag(), || platform::spawn(future));
    task.await
        .unwrap_or_else(|ended| Err(PeerError::Lost(ended.to_string())))
}

impl PeerTransport for Port {
    fn call(
        &self,
        to: u64,
        method: Method,
        body: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let (bus, from) = (self.bus.clone(), self.from);
        let exchange = async move {
            if !bus.hop(from, to).await {
                std::future::pending::<()>().await;
            }
            let (life, service) = bus.service(to)?;
            bus.world.absorb(&body);
            bus.repeat((from, to), method, &body);
            let answer = on(life, async move { service.handle_call(from, body).await }).await;
            if !bus.hop(to, from).await {
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

    fn append(
        &self,
        to: u64,
        _lane: Lane,
        requests: BoxStream<'static, Bytes>,
    ) -> BoxFuture<'static, Result<Bodies, PeerError>> {
        let (bus, from) = (self.bus.clone(), self.from);
        Box::pin(async move {
            if bus.is_cut(from, to) || bus.is_cut(to, from) {
                if chance::percent(50) {
                    return Err(PeerError::Unreachable("no route".into()));
                }
                // Nobody says anything: the caller has to give up by itself.
                std::future::pending::<()>().await;
            }
            let (life, service) = bus.service(to)?;
            let (request_tx, request_rx) = mpsc::channel(WINDOW);
            let (answer_tx, answer_rx) = mpsc::channel(WINDOW);
            platform::spawn(pump(
                bus.clone(),
                (from, to),
                requests.map(Ok).boxed(),
                request_tx,
            ))
            .detach();
            platform::scope_sync(life.tag(), || {
                let answers = service.handle_append(from, receiver(request_rx));
                platform::spawn(pump(bus, (to, from), answers, answer_tx)).detach();
            });
            Ok(receiver(answer_rx))
        })
    }

    fn snapshot(
        &self,
        to: u64,
        frames: BoxStream<'static, Bytes>,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let (bus, from) = (self.bus.clone(), self.from);
        Box::pin(async move {
            let (life, service) = bus.service(to)?;
            let (frame_tx, frame_rx) = mpsc::channel(WINDOW);
            platform::spawn(pump(bus.clone(), (from, to), frames.map(Ok).boxed(), frame_tx)).detach();
            let answer = on(life, async move {
                service.handle_snapshot(from, receiver(frame_rx)).await
            })
            .await;
            if !bus.hop(to, from).await {
                return Err(PeerError::Lost("reset".into()));
            }
            answer
        })
    }
}
