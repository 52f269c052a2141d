//! The replicas that a client knows, which of them to ask next, and the calls it makes to them.
//!
//! What never lives here: what the calls mean (see `ops`), and how a connection is made (see
//! [`crate::connect`]).
//! Invariants: the replica that answered last is asked first, the others in random order, so that a lost
//! replica's load spreads; a mutation goes out again only with the request id of its first try; a refusal
//! ends the call; every call ends at its deadline, and says then what is known about its outcome.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::ClientConfig;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::connect::{ConnectError, ConnectErrorKind, ConnectOptions, connect};
use crate::error::{Class, Error, Failure, classify};
use crate::ids::below;
use crate::story::{Story, note, unreachable};

/// The longest pause between two rounds over all replicas.
const PAUSE_MAX_MS: u64 = 1_000;
/// How long a connection may take while there are other replicas that were not tried yet: one that hangs must
/// not cost every command its full timeout. The second round has the patience that slow networks need.
const FIRST_CONNECT: Duration = Duration::from_millis(800);
/// The longest first pause.
const PAUSE_MIN_MS: u64 = 50;

/// Where replicas can be reached: one or more `host:port`, without doubles, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoints(Vec<String>);

impl Endpoints {
    /// Takes `host:port` entries.
    ///
    /// # Errors
    /// [`Class::Invalid`] when there is none, or one has no port.
    pub fn new<S: AsRef<str>>(entries: impl IntoIterator<Item = S>) -> Result<Endpoints, Error> {
        let mut list: Vec<String> = Vec::new();
        for entry in entries {
            let entry = entry.as_ref().trim();
            let port = entry
                .rsplit_once(':')
                .filter(|(host, _)| !host.is_empty())
                .map(|(_, port)| port);
            if !port.is_some_and(|port| port.parse::<u16>().is_ok_and(|port| port != 0)) {
                let message = format!("{entry:?} is no endpoint");
                return Err(Error::local(
                    Class::Invalid,
                    message,
                    "write HOST:PORT, for example 127.0.0.1:7441",
                ));
            }
            if !list.iter().any(|known| known == entry) {
                list.push(entry.to_owned());
            }
        }
        if list.is_empty() {
            return Err(Error::local(
                Class::Invalid,
                "no endpoint is given",
                "name one: --endpoint HOST:PORT",
            ));
        }
        Ok(Endpoints(list))
    }

    /// Takes a comma-separated list.
    ///
    /// # Errors
    /// See [`Endpoints::new`].
    pub fn parse(text: &str) -> Result<Endpoints, Error> {
        Endpoints::new(text.split(',').filter(|entry| !entry.trim().is_empty()))
    }

    /// The addresses.
    #[must_use]
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }
}

/// How a call may be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// It changes nothing: repeated after any failure that is not a refusal.
    Read,
    /// It carries a request id, the same in each try: repeated like a read, and its outcome may stay unknown.
    WithRequestId,
    /// It must not be sent twice: repeated only when it was not sent, or the server says that it may be.
    Once,
}

/// Limits of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For the call with all its tries.
    pub total: Duration,
    /// For one try at one replica.
    pub attempt: Duration,
}

struct Slot {
    address: String,
    channel: tokio::sync::Mutex<Option<Channel>>,
}

/// The replicas that a client knows. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
    patience: Duration,
}

struct Inner {
    slots: RwLock<Vec<Arc<Slot>>>,
    good: AtomicUsize,
    tls: Arc<ClientConfig>,
    options: ConnectOptions,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("endpoints", &self.addresses())
            .finish_non_exhaustive()
    }
}

/// A channel and the address that it leads to.
#[derive(Debug, Clone)]
pub struct Reached {
    /// `host:port`.
    pub address: String,
    /// The connection.
    pub channel: Channel,
}

impl Pool {
    /// A pool over `endpoints`. Connects when it is first used.
    #[must_use]
    pub fn new(endpoints: &Endpoints, tls: Arc<ClientConfig>, options: ConnectOptions) -> Pool {
        let inner = Inner {
            slots: RwLock::default(),
            good: AtomicUsize::new(0),
            tls,
            options,
        };
        let pool = Pool {
            inner: Arc::new(inner),
            patience: Duration::MAX,
        };
        pool.learn(endpoints.as_slice());
        pool
    }

    /// The same pool, whose calls give up after `patience` when no replica at all could be reached until
    /// then.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Pool {
        self.patience = patience;
        self
    }

    /// Adds replicas that were not known yet.
    pub fn learn(&self, addresses: &[String]) {
        let mut slots = self.inner.slots.write().unwrap_or_else(PoisonError::into_inner);
        for address in addresses {
            if !slots.iter().any(|slot| slot.address == *address) {
                slots.push(Arc::new(Slot {
                    address: address.clone(),
                    channel: tokio::sync::Mutex::default(),
                }));
            }
        }
    }

    /// All addresses, in the order they were learned.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        self.slots().iter().map(|slot| slot.address.clone()).collect()
    }

    /// Connects to one replica, the best first. `avoid` is tried last.
    ///
    /// # Errors
    /// [`Class::Unreachable`] or [`Class::Denied`] when none lets itself be reached, with what each try came
    /// to.
    pub async fn reach(&self, avoid: Option<&str>) -> Result<Reached, Error> {
        let mut attempts = Vec::new();
        let mut refusal = None;
        let mut hope = false;
        let mut order = self.order();
        order.sort_by_key(|(_, slot)| avoid == Some(slot.address.as_str()));
        for connect in [self.first_connect(), self.inner.options] {
            for (index, slot) in &order {
                match self.channel(slot, &connect).await {
                    Ok(channel) => {
                        self.inner.good.store(*index, Ordering::Relaxed);
                        let address = slot.address.clone();
                        return Ok(Reached { address, channel });
                    }
                    Err(error) => {
                        hope |= error.kind == ConnectErrorKind::Unreachable;
                        note(&mut attempts, &mut refusal, error);
                    }
                }
            }
        }
        Err(unreachable(refusal, hope, attempts))
    }

    /// Forgets the connection to `address`, so that the next call makes a new one.
    pub async fn forget(&self, address: &str) {
        let slot = self.slots().into_iter().find(|slot| slot.address == address);
        if let Some(slot) = slot {
            *slot.channel.lock().await = None;
        }
    }

    /// Makes a call, on other replicas when one fails, until it is answered or `limits` end.
    ///
    /// # Errors
    /// The refusal; or what is known when time ran out: [`Class::Unknown`] when a mutation may have been
    /// applied, [`Class::Unreachable`] when no replica was reached, [`Class::Unavailable`] otherwise.
    pub async fn call<T, F, Fut>(&self, repeat: Repeat, limits: Limits, send: F) -> Result<T, Error>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let since = Instant::now();
        let deadline = since + limits.total;
        let mut story = Story::default();
        let mut pause = PAUSE_MIN_MS;
        let mut connect = self.first_connect();
        // Whoever lets itself be connected to first is asked first. Out of time, the loop says so.
        let _ = timeout_at(deadline, self.connect_any()).await;
        loop {
            for (index, slot) in self.order() {
                let until = deadline.min(Instant::now() + limits.attempt);
                match self.attempt(&slot, connect, until, &send).await {
                    Outcome::Answer(value) => {
                        self.inner.good.store(index, Ordering::Relaxed);
                        return Ok(value);
                    }
                    Outcome::Final(error) => return Err(story.finish(error)),
                    Outcome::NotSent(error) => story.not_sent(error),
                    Outcome::Retryable(error) if repeat == Repeat::Once && error.unknown => {
                        return Err(story.finish(error));
                    }
                    Outcome::Retryable(error) => story.answered(&slot.address, error),
                    Outcome::Lost { cause, refused } => {
                        story.lost(&slot.address, cause, refused);
                        if repeat == Repeat::Once && !refused {
                            return Err(story.give_up(repeat));
                        }
                    }
                }
                if Instant::now() >= deadline {
                    return Err(story.give_up(repeat));
                }
            }
            if story.hopeless() || (!story.reached && since.elapsed() >= self.patience) {
                return Err(story.give_up(repeat));
            }
            // Full jitter: clients that lost the same replica must not come back in step.
            let wait = Duration::from_millis(1 + below(pause));
            if Instant::now() + wait >= deadline {
                return Err(story.give_up(repeat));
            }
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(PAUSE_MAX_MS);
            connect = self.inner.options;
        }
    }

    /// Connects to the best replica, and when that takes long, to others beside it; the first connection wins and
    /// the rest is given up. Nothing is sent, and nothing is told: when all fail, the calls that follow say why.
    async fn connect_any(&self) {
        let options = self.inner.options;
        let mut waiting = self.order().into_iter();
        let connected = |slot: &Slot| slot.channel.try_lock().is_ok_and(|place| place.is_some());
        if waiting.len() < 2
            || waiting
                .as_slice()
                .first()
                .is_some_and(|(_, slot)| connected(slot))
        {
            return;
        }
        let mut under_way = JoinSet::new();
        loop {
            if let Some((index, slot)) = waiting.next() {
                let pool = self.clone();
                under_way.spawn(async move { pool.channel(&slot, &options).await.is_ok().then_some(index) });
            }
            let joined = if waiting.len() == 0 {
                under_way.join_next().await
            } else {
                match timeout(options.beside, under_way.join_next()).await {
                    Ok(joined) => joined,
                    Err(_) => continue,
                }
            };
            match joined {
                Some(Ok(Some(index))) => return self.inner.good.store(index, Ordering::Relaxed),
                Some(_) => {}
                None => return,
            }
        }
    }

    /// How the first round over all replicas connects.
    fn first_connect(&self) -> ConnectOptions {
        let mut options = self.inner.options;
        if self.slots().len() > 1 {
            options.connect_timeout = options.connect_timeout.min(FIRST_CONNECT);
        }
        options
    }

    async fn attempt<T, F, Fut>(
        &self,
        slot: &Slot,
        connect: ConnectOptions,
        until: Instant,
        send: &F,
    ) -> Outcome<T>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let channel = match timeout_at(until, self.channel(slot, &connect)).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => return Outcome::NotSent(error),
            Err(_) => {
                let cause = "no connection in time".to_owned();
                let kind = ConnectErrorKind::Unreachable;
                return Outcome::NotSent(ConnectError {
                    address: slot.address.clone(),
                    kind,
                    cause,
                    chain: None,
                });
            }
        };
        let failure = match timeout_at(until, send(channel)).await {
            Ok(Ok(response)) => return Outcome::Answer(response.into_inner()),
            Ok(Err(status)) => classify(&status),
            Err(_) => Failure::Lost {
                cause: "no answer in time".to_owned(),
                refused: false,
            },
        };
        match failure {
            Failure::Answered(error) if error.retryable || error.unknown => Outcome::Retryable(error),
            Failure::Answered(error) => Outcome::Final(error),
            Failure::Lost { cause, refused } => {
                *slot.channel.lock().await = None;
                Outcome::Lost { cause, refused }
            }
        }
    }

    async fn channel(&self, slot: &Slot, options: &ConnectOptions) -> Result<Channel, ConnectError> {
        // Held while connecting: calls that come together share one connection.
        let mut place = slot.channel.lock().await;
        if let Some(channel) = place.as_ref() {
            return Ok(channel.clone());
        }
        let channel = connect(&slot.address, &self.inner.tls, options).await?;
        *place = Some(channel.clone());
        Ok(channel)
    }

    fn slots(&self) -> Vec<Arc<Slot>> {
        self.inner
            .slots
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The last good replica, then the others in random order.
    fn order(&self) -> Vec<(usize, Arc<Slot>)> {
        let mut order: Vec<(usize, Arc<Slot>)> = self.slots().into_iter().enumerate().collect();
        let good = self
            .inner
            .good
            .load(Ordering::Relaxed)
            .min(order.len().saturating_sub(1));
        if order.is_empty() {
            return order;
        }
        order.swap(0, good);
        for end in (2..order.len()).rev() {
            let pick = 1 + usize::try_from(below(end as u64)).unwrap_or(0);
            order.swap(pick, end);
        }
        order
    }
}

enum Outcome<T> {
    Answer(T),
    Final(Error),
    Retryable(Error),
    NotSent(ConnectError),
    Lost { cause: String, refused: bool },
}

#[cfg(test)]
mod tests {
    use super::*;
    use palyra_pki::tls::SeenServer;

    fn pool(addresses: &[&str]) -> Pool {
        let tls = crate::connect::enrol_recording(SeenServer::new()).unwrap();
        Pool::new(
            &Endpoints::new(addresses).unwrap(),
            tls,
            ConnectOptions::default(),
        )
    }

    #[test]
    fn endpoints_are_checked_and_doubles_dropped() {
        let list = Endpoints::parse("a:1, b:2,a:1,,[::1]:3").unwrap();
        assert_eq!(list.as_slice(), ["a:1", "b:2", "[::1]:3"]);
        for bad in ["", "a", "a:", ":1", "a:0", "a:70000", "a:b"] {
            assert_eq!(
                Endpoints::parse(bad).unwrap_err().class,
                Class::Invalid,
                "{bad:?}"
            );
        }
    }

    #[test]
    fn the_last_good_replica_is_first_and_every_one_is_in_the_order() {
        let pool = pool(&["a:1", "b:2", "c:3", "d:4"]);
        pool.inner.good.store(2, Ordering::Relaxed);
        let mut seconds = std::collections::BTreeSet::new();
        for _ in 0..200 {
            let order: Vec<usize> = pool.order().iter().map(|(index, _)| *index).collect();
            assert_eq!(order[0], 2);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3]);
            seconds.insert(order[1]);
        }
        assert_eq!(
            seconds.into_iter().collect::<Vec<_>>(),
            [0, 1, 3],
            "any other may come second"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn unreachable_replicas_are_all_named() {
        let limits = Limits {
            total: Duration::from_millis(200),
            attempt: Duration::from_millis(200),
        };
        let send = |_channel| async { Ok(Response::new(())) };
        let error = pool(&["127.0.0.1:1", "127.0.0.1:2"])
            .call(Repeat::Read, limits, send)
            .await
            .unwrap_err();
        assert_eq!((error.class, error.exit_code()), (Class::Unreachable, 4));
        assert!(
            error.message.contains("127.0.0.1:1") && error.message.contains("127.0.0.1:2"),
            "{error}"
        );
    }
}
