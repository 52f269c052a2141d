//! A device with its connections, and a revoked certificate that is tried again.

use std::time::Duration;

use anyhow::{Result, anyhow};
use palyra_client::Connection;
use palyra_client::error::Failure;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use crate::netns::Inside;
use crate::sim::Identity;
use crate::sim::node::{self, Transport};
use crate::sim::session::{End, Session, register};
use crate::sim::watched::{Closed, dial, end_of};

/// How often a QUIC connection is asked whether it is there, once its session has ended.
const LOOK: Duration = Duration::from_millis(1);
/// For a try of a certificate at a replica.
const TRY: Duration = Duration::from_secs(20);

/// A device and everything that it has open.
pub(super) struct Device {
    /// Who it is.
    pub(super) identity: Identity,
    /// Its sockets at replicas that can be reached from everywhere.
    pub(super) sockets: Sockets,
    /// Its socket at the replica that is going to be cut off.
    pub(super) cut_off: Sockets,
    /// When its session ended.
    pub(super) session: Sockets,
    tasks: Vec<AbortHandle>,
}

/// Things that end.
#[derive(Default)]
pub(super) struct Sockets(Vec<Closed>);

impl Sockets {
    /// Waits until all have ended. Answers when the last did.
    pub(super) async fn last_end(&self) -> Instant {
        let mut last = None;
        for closed in &self.0 {
            last = last.max(Some(end_of(closed).await));
        }
        last.unwrap_or_else(Instant::now)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Device {
    /// One that has nothing open.
    pub(super) fn new(identity: Identity) -> Device {
        Device {
            identity,
            sockets: Sockets::default(),
            cut_off: Sockets::default(),
            session: Sockets::default(),
            tasks: Vec::new(),
        }
    }

    /// Begins a session and lives in it; inside of a namespace when one is given, whose replica will be cut off.
    pub(super) async fn hold_session(&mut self, address: &str, inside: Option<&Inside>) -> Result<()> {
        let (identity, address) = (self.identity.clone(), address.to_owned());
        let begin = async move {
            let (connection, closed) = dial(&address, &identity.tls).await.map_err(End::Lost)?;
            register(&connection, &identity.device_id).await?;
            let session = Session::attach(&connection, &identity.device_id).await?;
            let (tell, ended) = watch::channel(None);
            // The connection outlives the session: its own end is looked for as well.
            let living = tokio::spawn(async move {
                session.live(0.5).await;
                tell.send_replace(Some(Instant::now()));
                std::future::pending::<()>().await;
                drop(connection);
            });
            Ok::<_, End>((closed, ended, living.abort_handle()))
        };
        let begun = place(inside, begin).await?;
        let (closed, ended, task) = begun.map_err(|end| anyhow!("no session: {end:?}"))?;
        let sockets = if inside.is_some() {
            &mut self.cut_off
        } else {
            &mut self.sockets
        };
        sockets.0.push(closed);
        self.session.0.push(ended);
        self.tasks.push(task);
        Ok(())
    }

    /// Begins a session over QUIC and lives in it. Its connection counts as ended when nothing can be asked on it.
    pub(super) async fn hold_quic_session(&mut self, address: &str) -> Result<()> {
        let failed = |end: End| anyhow!("no session over QUIC at {address}: {end:?}");
        let dialled = node::dial(&self.identity, address, Transport::Quic).await;
        let connection = dialled.map_err(failed)?;
        register(&connection, &self.identity.device_id)
            .await
            .map_err(failed)?;
        let session = Session::attach(&connection, &self.identity.device_id)
            .await
            .map_err(failed)?;
        let ((tell, ended), (tell_closed, closed)) = (watch::channel(None), watch::channel(None));
        let living = tokio::spawn(async move {
            session.live(0.5).await;
            tell.send_replace(Some(Instant::now()));
            if let Connection::Quic(quic) = &connection {
                while !matches!(quic.health().await, Err(Failure::Lost { .. })) {
                    tokio::time::sleep(LOOK).await;
                }
            }
            tell_closed.send_replace(Some(Instant::now()));
            std::future::pending::<()>().await;
        });
        self.sockets.0.push(closed);
        self.session.0.push(ended);
        self.tasks.push(living.abort_handle());
        Ok(())
    }

    /// Opens a connection and says nothing.
    pub(super) async fn hold_connection(&mut self, address: &str) -> Result<()> {
        let (connection, closed) = dial(address, &self.identity.tls)
            .await
            .map_err(|cause| anyhow!("no connection to {address}: {cause}"))?;
        let held = tokio::spawn(async move {
            std::future::pending::<()>().await;
            drop::<Connection>(connection);
        });
        self.sockets.0.push(closed);
        self.tasks.push(held.abort_handle());
        Ok(())
    }
}

async fn place<T: Send + 'static>(
    inside: Option<&Inside>,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T> {
    match inside {
        Some(inside) => inside.run(work).await,
        None => Ok(work.await),
    }
}

/// What came of a try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Tried {
    /// The replica served it.
    Accepted,
    /// The replica refused it, for whatever reason that it names.
    Refused(String),
    /// There was nobody to ask.
    Unreachable(String),
}

/// Tries to register and to attach with a certificate over QUIC.
pub(super) async fn try_over_quic(identity: &Identity, address: &str) -> Tried {
    let tried = timeout(TRY, async {
        match node::dial(identity, address, Transport::Quic).await {
            Ok(connection) => calls(&connection, identity).await,
            Err(End::Lost(cause)) => of_dial(&cause),
            Err(end) => Tried::Refused(format!("{end:?}")),
        }
    });
    tried
        .await
        .unwrap_or_else(|_| Tried::Unreachable(format!("no answer within {} s", TRY.as_secs())))
}

async fn calls(connection: &Connection, identity: &Identity) -> Tried {
    let registered = register(connection, &identity.device_id).await;
    let attached = Session::attach(connection, &identity.device_id).await.map(|_| ());
    of_calls(registered, attached)
}

/// The same over gRPC, inside of a namespace when one is given.
pub(super) async fn try_certificate(
    identity: &Identity,
    address: &str,
    inside: Option<&Inside>,
) -> Result<Tried> {
    let (identity, address) = (identity.clone(), address.to_owned());
    let work = async move {
        let tried = timeout(TRY, async {
            let (connection, _closed) = match dial(&address, &identity.tls).await {
                Ok(connected) => connected,
                Err(cause) => return of_dial(&cause),
            };
            calls(&connection, &identity).await
        });
        tried
            .await
            .unwrap_or_else(|_| Tried::Unreachable(format!("no answer within {} s", TRY.as_secs())))
    };
    place(inside, work).await
}

/// A server that breaks the handshake off has refused; one that nobody listens for has not.
fn of_dial(cause: &str) -> Tried {
    let absent = ["refused", "unreachable", "timed out", "within", "route"];
    if absent.iter().any(|word| cause.to_lowercase().contains(word)) {
        return Tried::Unreachable(cause.to_owned());
    }
    Tried::Refused(cause.to_owned())
}

/// Either call that is served is an acceptance.
fn of_calls(registered: Result<(), End>, attached: Result<(), End>) -> Tried {
    match (registered, attached) {
        (Ok(()), _) | (_, Ok(())) => Tried::Accepted,
        (Err(first), Err(_)) => Tried::Refused(format!("{first:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_there_is_no_refusal() {
        assert!(matches!(
            of_dial("Connection refused (os error 111)"),
            Tried::Unreachable(_)
        ));
        assert!(matches!(
            of_dial("no connection within 10 s"),
            Tried::Unreachable(_)
        ));
        assert!(matches!(
            of_dial("received fatal alert: CertificateRevoked"),
            Tried::Refused(_)
        ));
    }

    #[test]
    fn one_call_that_is_served_is_an_acceptance() {
        let refused = || Err(End::Revoked("E0304".to_owned()));
        assert_eq!(of_calls(refused(), Ok(())), Tried::Accepted);
        assert_eq!(of_calls(Ok(()), refused()), Tried::Accepted);
        assert!(matches!(of_calls(refused(), refused()), Tried::Refused(_)));
    }
}
