//! A device with its connections, and a revoked certificate that is tried again.

use std::time::Duration;

use anyhow::{Result, anyhow};
use palyra_client::Connection;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use crate::netns::Inside;
use crate::sim::Identity;
use crate::sim::session::{End, Session, register};
use crate::sim::watched::{Closed, dial, end_of};

/// For a try of a certificate at a replica.
const TRY: Duration = Duration::from_secs(20);

/// A device and everything that it has open.
pub(super) struct Device {
    /// Who it is.
    pub(super) identity: Identity,
    open: Vec<Closed>,
    tasks: Vec<AbortHandle>,
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
            open: Vec::new(),
            tasks: Vec::new(),
        }
    }

    /// Begins a session and lives in it. Inside of a namespace when one is given.
    pub(super) async fn hold_session(&mut self, address: &str, inside: Option<&Inside>) -> Result<()> {
        let (identity, address) = (self.identity.clone(), address.to_owned());
        let begin = async move {
            let (connection, closed) = dial(&address, &identity.tls).await.map_err(End::Lost)?;
            register(&connection, &identity.device_id).await?;
            let session = Session::attach(&connection, &identity.device_id).await?;
            // The connection outlives the session: what is looked for is its end, not the session's.
            let living = tokio::spawn(async move {
                session.live(0.5).await;
                std::future::pending::<()>().await;
                drop(connection);
            });
            Ok::<_, End>((closed, living.abort_handle()))
        };
        let (closed, task) = place(inside, begin)
            .await?
            .map_err(|end| anyhow!("no session: {end:?}"))?;
        self.open.push(closed);
        self.tasks.push(task);
        Ok(())
    }

    /// Opens a connection and says nothing.
    pub(super) async fn hold_connection(&mut self, address: &str, inside: Option<&Inside>) -> Result<()> {
        let (identity, address) = (self.identity.clone(), address.to_owned());
        let begin = async move {
            let (connection, closed) = dial(&address, &identity.tls).await?;
            let held = tokio::spawn(async move {
                std::future::pending::<()>().await;
                drop::<Connection>(connection);
            });
            Ok::<_, String>((closed, held.abort_handle()))
        };
        let (closed, task) = place(inside, begin)
            .await?
            .map_err(|cause| anyhow!("no connection: {cause}"))?;
        self.open.push(closed);
        self.tasks.push(task);
        Ok(())
    }

    /// Waits until nothing is open. Answers when the last connection ended.
    pub(super) async fn last_end(&self) -> Instant {
        let mut last = None;
        for closed in &self.open {
            last = last.max(Some(end_of(closed).await));
        }
        last.unwrap_or_else(Instant::now)
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

/// Tries to register and to attach with a certificate.
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
            let registered = register(&connection, &identity.device_id).await;
            let attached = Session::attach(&connection, &identity.device_id)
                .await
                .map(|_| ());
            of_calls(registered, attached)
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
