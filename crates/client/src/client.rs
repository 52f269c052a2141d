//! A client of one cluster, on behalf of one operator.
//!
//! What never lives here: the calls themselves, one file for all of them (see `services`).
//! Invariants: see [`crate::pool`]; a mutation without a request id gets one before its first try, and an
//! error of a mutation names it.

use std::future::Future;
use std::time::Duration;

use palyra_pki::Credential;
use palyra_proto::common::v1::{Consistency, ReadOptions};
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::connect::{ConnectOptions, mutual};
use crate::error::{Class, Error};
use crate::pool::{Endpoints, Limits, Pool, Repeat};

/// How long a call may take when nothing else is asked for.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long one try may take: longer than an election, shorter than patience.
pub const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(6);
/// How long a client tries while no replica at all can be reached: a restart on the same machine is over by
/// then.
const PATIENCE: Duration = Duration::from_secs(3);
/// What is added to a wait at the server, for the way there and back and for the commit.
pub(crate) const WAIT_MARGIN: Duration = Duration::from_secs(5);

/// A mutation: a request that carries the id under which its answer is remembered.
pub trait Mutation: Clone {
    /// Where the request id is kept.
    fn request_id(&mut self) -> &mut String;
}

/// A client of one cluster. Cheap to clone; clones share connections.
#[derive(Debug, Clone)]
pub struct Client {
    pool: Pool,
    timeout: Duration,
    read: ReadOptions,
}

impl Client {
    /// A client that presents `credential`, to `endpoints` or, without them, to the credential's own.
    pub fn new(
        credential: &Credential,
        endpoints: Option<Endpoints>,
        options: ConnectOptions,
    ) -> Result<Client, Error> {
        let unusable = |error: String| {
            let next = "get a new one from an admin: palyra operator add, or palyra context add";
            Error::local(
                Class::Denied,
                format!("the credential can't be used: {error}"),
                next,
            )
        };
        let endpoints = match endpoints {
            Some(endpoints) => endpoints,
            None => Endpoints::new(&credential.endpoints)?,
        };
        let (identity, trust) = credential
            .for_tls()
            .map_err(|error| unusable(error.to_string()))?;
        let tls = mutual(trust, identity, None).map_err(|error| unusable(error.to_string()))?;
        Ok(Client::over(Pool::new(&endpoints, tls, options)))
    }

    /// A client over an existing pool.
    #[must_use]
    pub fn over(pool: Pool) -> Client {
        Client {
            pool: pool.with_patience(PATIENCE),
            timeout: DEFAULT_TIMEOUT,
            read: ReadOptions::default(),
        }
    }

    /// The same client with another time limit for each call. All of it is spent, also while no replica can
    /// be reached.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Client {
        self.timeout = timeout;
        self.pool = self.pool.with_patience(timeout);
        self
    }

    /// The same client, whose reads are answered by the asked replica alone; the answers tell index and age.
    #[must_use]
    pub fn with_local_reads(mut self) -> Client {
        self.read.consistency = Consistency::Local.into();
        self
    }

    /// The same client, whose reads reflect at least the log index `index`.
    #[must_use]
    pub fn at_least(mut self, index: u64) -> Client {
        self.read.min_index = self.read.min_index.max(index);
        self
    }

    /// The options that reads of this client carry.
    #[must_use]
    pub fn read_options(&self) -> ReadOptions {
        self.read
    }

    /// The replicas that this client knows.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The time limit of a call.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(crate) async fn read<T, F, Fut>(&self, send: F) -> Result<T, Error>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        self.pool
            .call(Repeat::Read, self.limits(Duration::ZERO), send)
            .await
    }

    /// `wait` is how long the server may hold the answer back.
    pub(crate) async fn mutate<M, T, F, Fut>(
        &self,
        mut request: M,
        wait: Duration,
        send: F,
    ) -> Result<T, Error>
    where
        M: Mutation,
        F: Fn(Channel, M) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        if request.request_id().is_empty() {
            *request.request_id() = crate::ids::new_ulid();
        }
        let answer = self
            .pool
            .call(Repeat::WithRequestId, self.limits(wait), |channel| {
                send(channel, request.clone())
            })
            .await;
        answer.map_err(|mut error| {
            error.trail.request_id.clone_from(request.request_id());
            error
        })
    }

    pub(crate) async fn once<T, F, Fut>(&self, send: F) -> Result<T, Error>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        // No request id and no second try: one long one instead.
        let limits = Limits {
            total: self.timeout,
            attempt: self.timeout,
        };
        self.pool.call(Repeat::Once, limits, send).await
    }

    pub(crate) fn limits(&self, wait: Duration) -> Limits {
        if wait.is_zero() {
            return Limits {
                total: self.timeout,
                attempt: ATTEMPT_TIMEOUT.min(self.timeout),
            };
        }
        Limits {
            total: self.timeout.max(wait + WAIT_MARGIN),
            attempt: wait + WAIT_MARGIN,
        }
    }
}
