//! The message bus between simulated replicas: the real peer messages in their real encoding, without TLS and
//! sockets.
//!
//! Each directed link has a latency, can lose, repeat or hold messages, and can be cut one way; an answer can be lost
//! after the call had its effect. A stream keeps its order, as TCP does; streams and calls overtake each other. A
//! repeated call or stream arrives some time after the first. All bytes go into the run's digest. What runs on
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
use crate::setup::Net;
use crate::world::{Life, World};

/// Messages that a stream may have under way.
const WINDOW: usize = 64;
/// How much later than the first a repeated call may arrive, in virtual milliseconds.
const LATE_MS: u64 = 900;

struct Inner {
    services: BTreeMap<u64, (Life, PeerService)>,
    cut: BTreeSet<(u64, u64)>,
    /// As the run's configuration has it.
    net: Net,
    /// What storms add to it while they last.
    storms: Vec<Storm>,
    messages: u64,
}

/// A network that is worse for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Storm {
    /// So many of a hundred messages are lost.
    Loss(u64),
    /// Messages take up to so many milliseconds.
    Latency(u64),
    /// So many of a hundred answers are lost.
    Answers(u64),
}

impl Inner {
    fn worst(&self, of: impl Fn(&Storm) -> Option<u64>) -> u64 {
        self.storms.iter().filter_map(of).max().unwrap_or(0)
    }

    fn loss(&self) -> u64 {
        let storm = self.worst(|storm| match storm {
            Storm::Loss(percent) => Some(*percent),
            _ => None,
        });
        storm.max(self.net.loss_percent)
    }

    /// What this message takes.
    fn latency(&self) -> u64 {
        let late = chance::percent(self.net.late_percent);
        let usual = self.net.latency_ms * if late { 40 } else { 1 };
        let storm = self.worst(|storm| match storm {
            Storm::Latency(ms) => Some(*ms),
            _ => None,
        });
        chance::between(1, usual.max(storm))
    }
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
    /// A bus over this network.
    pub(crate) fn new(world: &'static World, net: Net) -> Self {
        let inner = Inner {
            services: BTreeMap::new(),
            cut: BTreeSet::new(),
            net,
            storms: Vec::new(),
            messages: 0,
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
            inner.net.loss_percent = 0;
            inner.net.repeat_percent = 0;
            inner.storms.clear();
        }
        drop(inner);
        self.healed.send_modify(|n| *n += 1);
    }

    /// Heals every link of one replica.
    pub(crate) fn unclog(&self, replica: u64) {
        self.inner()
            .cut
            .retain(|(from, to)| *from != replica && *to != replica);
        self.healed.send_modify(|n| *n += 1);
    }

    /// Loses so many of a hundred messages for a while.
    pub(crate) async fn storm(&self, percent: u64, time: Duration) {
        self.endure(Storm::Loss(percent), time).await;
    }

    /// Lets messages take up to so many milliseconds for a while, and so overtake each other.
    pub(crate) async fn slow(&self, latency_ms: u64, time: Duration) {
        self.endure(Storm::Latency(latency_ms), time).await;
    }

    /// Loses so many of a hundred answers for a while.
    pub(crate) async fn lose_answers(&self, percent: u64, time: Duration) {
        self.endure(Storm::Answers(percent), time).await;
    }

    async fn endure(&self, storm: Storm, time: Duration) {
        self.world.note(&format!("{storm:?} for {time:?}"));
        self.inner().storms.push(storm);
        platform::sleep(time).await;
        let mut inner = self.inner();
        // Healing may have ended it before.
        if let Some(at) = inner.storms.iter().position(|one| *one == storm) {
            inner.storms.remove(at);
        }
        drop(inner);
        self.world.note(&format!("{storm:?} is over"));
    }

    /// Whether the answer that is due now gets lost, after the call had its effect.
    pub(crate) fn loses_answer(&self) -> bool {
        let percent = self.inner().worst(|storm| match storm {
            Storm::Answers(percent) => Some(*percent),
            _ => None,
        });
        let lost = percent > 0 && chance::percent(percent);
        if lost {
            self.world.reach("answer-lost");
        }
        lost
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
            (inner.latency(), chance::percent(inner.loss()))
        };
        tokio::time::sleep(Duration::from_millis(latency)).await;
        if self.is_cut(from, to) {
            let mut healed = self.healed.subscribe();
            while self.is_cut(from, to) {
                if healed.changed().await.is_err() {
                    return false;
                }
            }
            self.world.reach("link-held-message");
        }
        if lost {
            self.world.reach("message-lost");
        }
        !lost
    }

    /// Whether this arrives a second time. Of what a replica sends to another, all but commands may: a stream over TCP
    /// repeats nothing, and a repetition that a new leader takes would belie the refusal of the old one.
    fn repeats(&self, what: &Bytes) -> Option<(Bytes, Duration)> {
        let percent = self.inner().net.repeat_percent;
        (percent > 0 && chance::percent(percent))
            .then(|| (what.clone(), Duration::from_millis(chance::between(0, LATE_MS))))
    }

    /// A call arrives again, later.
    fn repeat(&self, (from, to): (u64, u64), method: Method, body: &Bytes) {
        if method == Method::Propose {
            return;
        }
        if let Some((body, late)) = self.repeats(body) {
            let handle = move |service: PeerService| async move {
                drop(service.handle_call(from, body).await);
            };
            self.later(to, late, "message-repeated", handle);
        }
    }

    /// A request of an append stream arrives again, later, by a stream of its own.
    fn repeat_append(&self, (from, to): (u64, u64), body: &Bytes) {
        if let Some((body, late)) = self.repeats(body) {
            let handle = move |service: PeerService| {
                let mut answers = service.handle_append(from, futures::stream::iter([Ok(body)]).boxed());
                async move { while answers.next().await.is_some() {} }
            };
            self.later(to, late, "append-repeated", handle);
        }
    }

    /// In a task of nobody until it arrives: a message that is under way does not die with its sender.
    fn later<F>(
        &self,
        to: u64,
        late: Duration,
        name: &'static str,
        handle: impl FnOnce(PeerService) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let bus = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(late).await;
            if let Ok((life, service)) = bus.service(to) {
                bus.world.reach(name);
                platform::scope_sync(life.tag(), || platform::spawn(handle(service)).detach());
            }
        });
    }
}

/// What one replica sends through.
pub(crate) struct Port {
    from: u64,
    bus: Bus,
}

/// Which way a stream goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Appends,
    Commands,
    Answers,
    Snapshot,
}

/// Carries one direction of a stream, in order; a lost message breaks the stream, as a reset connection
/// would.
async fn pump(
    bus: Bus,
    way: Way,
    link: (u64, u64),
    mut items: BoxStream<'static, Result<Bytes, PeerError>>,
    out: mpsc::Sender<Result<Bytes, PeerError>>,
) {
    while let Some(item) = items.next().await {
        if let Ok(body) = &item {
            bus.world.absorb(body);
            if way == Way::Appends {
                bus.repeat_append(link, body);
            }
        }
        let lost = way == Way::Answers && bus.loses_answer();
        let item = if bus.hop(link.0, link.1).await && !lost {
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
            let lost = bus.loses_answer();
            if lost && chance::percent(50) {
                return Err(PeerError::Lost("reset".into()));
            }
            if !bus.hop(to, from).await || lost {
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
            let way = match lane {
                Lane::Forward => Way::Commands,
                _ => Way::Appends,
            };
            platform::spawn(pump(
                bus.clone(),
                way,
                (from, to),
                requests.map(Ok).boxed(),
                request_tx,
            ))
            .detach();
            platform::scope_sync(life.tag(), || {
                let requests = receiver(request_rx);
                let answers = match way {
                    Way::Commands => service.handle_forward(from, requests),
                    _ => service.handle_append(from, requests),
                };
                platform::spawn(pump(bus, Way::Answers, (to, from), answers, answer_tx)).detach();
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
            let frames = frames.map(Ok).boxed();
            platform::spawn(pump(bus.clone(), Way::Snapshot, (from, to), frames, frame_tx)).detach();
            let answer = on(life, async move {
                service.handle_snapshot(from, receiver(frame_rx)).await
            })
            .await;
            if bus.loses_answer() || !bus.hop(to, from).await {
                return Err(PeerError::Lost("reset".into()));
            }
            answer
        })
    }
}
