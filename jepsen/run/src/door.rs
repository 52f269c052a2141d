//! One way into one replica: one try for each call, and what a failed one means for the history.
//!
//! The product's client tries again and elsewhere, as it should; a history needs to know of each try. So clients of the
//! harness come in here: one connection, made when it is needed, one request, one answer or none.
//! Invariant: `fail` is said only of what certainly had no effect: nothing was sent, or the replica itself refused
//! it by a typed error that it knows the outcome of.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use palyra_client::connect::{self, ConnectOptions};
use palyra_client::error::{Class, Failure, classify};
use palyra_client::{ConnectErrorKind, Error};
use palyra_jepsen_check::Kind;
use palyra_pki::Credential;
use rustls::ClientConfig;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};
use tonic::transport::Channel;
use tonic::{Response, Status};

use anyhow::Context as _;

/// Why a call has no answer.
#[derive(Clone, Debug)]
pub enum Miss {
    /// No connection: nothing was sent.
    NotSent(String),
    /// The server refused this side's certificate.
    Refused(String),
    /// It was sent, and nothing came back.
    Lost(String),
    /// The replica answered with an error.
    Answered(Error),
}

impl Miss {
    /// What it means for the history. A read has no effect, whatever became of it.
    #[must_use]
    pub fn kind(&self, changes: bool) -> Kind {
        if !changes {
            return Kind::Fail;
        }
        match self {
            Miss::NotSent(_) | Miss::Refused(_) => Kind::Fail,
            Miss::Lost(_) => Kind::Info,
            Miss::Answered(error) if error.unknown => Kind::Info,
            // A defect may have struck before or after the effect.
            Miss::Answered(error) if matches!(error.class, Class::Unknown | Class::Internal) => Kind::Info,
            Miss::Answered(_) => Kind::Fail,
        }
    }

    /// From a failure of a node's call.
    #[must_use]
    pub fn of(failure: Failure) -> Miss {
        match failure {
            Failure::Answered(error) => Miss::Answered(error),
            Failure::Lost { cause, refused: true } => Miss::Refused(cause),
            Failure::Lost {
                cause,
                refused: false,
            } => Miss::Lost(cause),
        }
    }

    /// The stable code of the replica's error; empty for a broken connection.
    #[must_use]
    pub fn code(&self) -> &str {
        match self {
            Miss::Answered(error) => &error.code,
            _ => "",
        }
    }

    /// Whether the connection is of no more use.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        !matches!(self, Miss::Answered(_))
    }
}

impl std::fmt::Display for Miss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Miss::NotSent(why) => write!(f, "not sent: {why}"),
            Miss::Refused(why) => write!(f, "certificate refused: {why}"),
            Miss::Lost(why) => write!(f, "lost: {why}"),
            Miss::Answered(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for Miss {}

/// A credential, ready for connections. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Identity {
    tls: Arc<ClientConfig>,
}

impl Identity {
    /// From a node's or an operator's credential.
    ///
    /// # Errors
    /// When it can't be used.
    pub fn of(credential: &Credential) -> anyhow::Result<Identity> {
        let (own, trust) = credential.for_tls().context("a credential can't be used")?;
        let tls = connect::mutual(trust, own, None).context("a credential can't be used")?;
        Ok(Identity { tls })
    }

    /// The TLS settings that present it.
    #[must_use]
    pub fn tls(&self) -> &Arc<ClientConfig> {
        &self.tls
    }
}

/// The way in. One connection at a time; clones share it.
#[derive(Clone, Debug)]
pub struct Door {
    address: String,
    identity: Identity,
    channel: Arc<Mutex<Option<Channel>>>,
}

impl Door {
    /// To `host:port`, as somebody.
    #[must_use]
    pub fn new(address: &str, identity: &Identity) -> Door {
        Door {
            address: address.to_owned(),
            identity: identity.clone(),
            channel: Arc::default(),
        }
    }

    /// Makes one call, and nothing after `within`.
    ///
    /// # Errors
    /// What is known about it.
    pub async fn call<T, F, Fut>(&self, within: Duration, send: F) -> Result<T, Miss>
    where
        F: FnOnce(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let until = Instant::now() + within;
        let channel = self.open(until).await?;
        let answered = timeout_at(until, send(channel)).await;
        let miss = match answered {
            Ok(Ok(response)) => return Ok(response.into_inner()),
            Ok(Err(status)) => Miss::of(classify(&status)),
            Err(_) => Miss::Lost(format!("no answer within {} ms", within.as_millis())),
        };
        if miss.is_broken() {
            self.close().await;
        }
        Err(miss)
    }

    /// A connection, the one that there is or a new one.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn open(&self, until: Instant) -> Result<Channel, Miss> {
        let late = || Miss::NotSent("no connection in time".to_owned());
        let mut place = timeout_at(until, self.channel.lock()).await.map_err(|_| late())?;
        if let Some(channel) = place.as_ref() {
            return Ok(channel.clone());
        }
        let options = ConnectOptions::default();
        let connecting = connect::connect(&self.address, &self.identity.tls, &options);
        let connected = timeout_at(until, connecting).await.map_err(|_| late())?;
        let channel = connected.map_err(|error| match error.kind {
            ConnectErrorKind::Refused => Miss::Refused(error.cause),
            ConnectErrorKind::Unreachable | ConnectErrorKind::WrongServer => Miss::NotSent(error.cause),
        })?;
        *place = Some(channel.clone());
        Ok(channel)
    }

    /// Forgets the connection: the next call makes another.
    pub async fn close(&self) {
        *self.channel.lock().await = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_certainly_had_no_effect_is_a_failure() {
        let answered = |class: Class, unknown: bool| {
            let mut error = Error::new(class, "E0000", "x");
            error.unknown = unknown;
            Miss::Answered(error)
        };
        let cases = [
            (Miss::NotSent(String::new()), Kind::Fail),
            (Miss::Refused(String::new()), Kind::Fail),
            (Miss::Lost(String::new()), Kind::Info),
            (answered(Class::Conflict, false), Kind::Fail),
            (answered(Class::Unavailable, false), Kind::Fail),
            (answered(Class::Unavailable, true), Kind::Info),
            (answered(Class::Unknown, true), Kind::Info),
            (answered(Class::Unknown, false), Kind::Info),
            (answered(Class::Internal, false), Kind::Info),
            (answered(Class::Stale, false), Kind::Fail),
        ];
        for (miss, kind) in cases {
            assert_eq!(miss.kind(true), kind, "{miss:?}");
            assert_eq!(miss.kind(false), Kind::Fail, "a read has no effect: {miss:?}");
        }
    }
}
