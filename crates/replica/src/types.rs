//! What openraft is parametrised with: our command and answer, replica ids, and a runtime that goes through
//! `platform`.
//!
//! Nothing here leaves the crate. Addresses are not part of Raft's membership (`EmptyNode`): they live in the
//! replicated state and in the address book, so that a changed address can never change who votes.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::io;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::time::Duration;

use bytes::Bytes;
use openraft::alias;
use openraft::{AsyncRuntime, OptionalSend, TokioRuntime};
use palyra_platform as platform;
use palyra_state::{Reject, Reply};

/// What a log entry carries: the envelope's bytes as the edge encoded them, and the leader's clock.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct LogCommand {
    /// Milliseconds since the Unix epoch, stamped by the leader that took the command.
    pub(crate) at_ms: u64,
    /// An encoded `palyra_state::Envelope`.
    pub(crate) bytes: Bytes,
}

impl fmt::Debug for LogCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command({} bytes at {})", self.bytes.len(), self.at_ms)
    }
}

impl fmt::Display for LogCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What applying an entry answered; nothing for entries that are Raft's own.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer(pub(crate) Option<Decided>);

/// What the state machine decided.
#[derive(Clone, Debug)]
pub(crate) struct Decided {
    /// Its answer.
    pub(crate) reply: Result<Reply, Reject>,
    /// It was decided in an earlier entry.
    pub(crate) duplicate: bool,
}

openraft::declare_raft_types!(
    /// The types that openraft is used with.
    pub(crate) TypeConfig:
        D = LogCommand,
        R = Answer,
        NodeId = u64,
        Node = openraft::EmptyNode,
        AsyncRuntime = Runtime,
);

pub(crate) type Entry = alias::EntryOf<TypeConfig>;
pub(crate) type LeaderId = alias::LeaderIdOf<TypeConfig>;
pub(crate) type LogId = alias::LogIdOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, openraft::EmptyNode>;
pub(crate) type Metrics = openraft::RaftMetrics<TypeConfig>;
pub(crate) type SnapshotMeta = alias::SnapshotMetaOf<TypeConfig>;
pub(crate) type StoredMembership = alias::StoredMembershipOf<TypeConfig>;
pub(crate) type Vote = alias::VoteOf<TypeConfig>;
pub(crate) type Raft = openraft::Raft<TypeConfig, crate::machine::Machine>;

type Tokio = TokioRuntime;

/// Tokio, with tasks and randomness taken from `platform`: a simulation tags, kills and replays them.
#[derive(Debug)]
pub(crate) struct Runtime;

/// A moment on the clock of `platform`, which in a simulation is that of the running replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(platform::Instant);

impl Add<Duration> for Moment {
    type Output = Moment;

    fn add(self, duration: Duration) -> Moment {
        Moment(self.0 + duration)
    }
}

impl AddAssign<Duration> for Moment {
    fn add_assign(&mut self, duration: Duration) {
        self.0 += duration;
    }
}

impl Sub<Duration> for Moment {
    type Output = Moment;

    fn sub(self, duration: Duration) -> Moment {
        Moment(self.0 - duration)
    }
}

impl SubAssign<Duration> for Moment {
    fn sub_assign(&mut self, duration: Duration) {
        self.0 -= duration;
    }
}

impl Sub for Moment {
    type Output = Duration;

    fn sub(self, earlier: Moment) -> Duration {
        self.0.saturating_duration_since(earlier.0)
    }
}

impl openraft::Instant for Moment {
    fn now() -> Moment {
        Moment(platform::now())
    }
}

/// Random numbers for election timeouts.
pub(crate) struct PlatformRng;

impl rand_core::TryRng for PlatformRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(platform::random_u64() as u32)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(platform::random_u64())
    }

    fn try_fill_bytes(&mut self, dst: &mut [u8]) -> Result<(), Infallible> {
        platform::fill_random(dst);
        Ok(())
    }
}

impl AsyncRuntime for Runtime {
    type JoinError = platform::TaskEnded;
    type JoinHandle<T: OptionalSend + 'static> = platform::Task<T>;
    type Sleep = <Tokio as AsyncRuntime>::Sleep;
    type Instant = Moment;
    type TimeoutError = <Tokio as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = <Tokio as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = PlatformRng;
    type Mpsc = <Tokio as AsyncRuntime>::Mpsc;
    type Watch = <Tokio as AsyncRuntime>::Watch;
    type Oneshot = <Tokio as AsyncRuntime>::Oneshot;
    type Mutex<T: OptionalSend + 'static> = <Tokio as AsyncRuntime>::Mutex<T>;

    #[track_caller]
    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        // Raft's core, its state machine, a stream to a peer: without one of them the replica is a living dead, that
        // holds its connections and answers nobody.
        platform::spawn(platform::vital("a task of Raft", future))
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        platform::sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        platform::sleep_until(deadline.0)
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(
        duration: Duration,
        future: F,
    ) -> Self::Timeout<R, F> {
        platform::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(
        deadline: Self::Instant,
        future: F,
    ) -> Self::Timeout<R, F> {
        platform::timeout_at(deadline.0, future)
    }

    fn is_panic(error: &Self::JoinError) -> bool {
        matches!(error, platform::TaskEnded::Panicked(_))
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        PlatformRng
    }

    fn new(_threads: usize) -> Self {
        Runtime
    }

    // openraft uses these two in its own test suites only, where there is no runtime yet.
    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        Tokio::run(future)
    }

    async fn spawn_blocking<F, T>(body: F) -> Result<T, io::Error>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        Ok(platform::blocking(body).await)
    }
}
