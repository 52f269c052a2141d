//! From the options of the command line to a client: which context, which replicas, which limits.
//!
//! What never lives here: what commands do. Invariants: `--endpoint` and `PALYRA_ENDPOINTS` win over the
//! context's endpoints; a context learns of further replicas on its own, so that the loss of the first one
//! never strands it, and forgets only those that the cluster has removed for good.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use palyra_client::context::{Context, Contexts};
use palyra_client::{Class, Client, ConnectOptions, Endpoints, new_ulid, wall_ms};
use palyra_pki::Credential;
use palyra_proto::cluster::v1::{ReplicaStatus, StatusResponse};
use tokio::task::JoinHandle;

use crate::failure::{Failure, Result};
use crate::output::time::parse_limit;
use crate::output::{Format, Out, note};

/// How old a context's list of replicas may become before it is compared with the cluster's.
const LEARN_AFTER_MS: u64 = 5 * 60 * 1_000;
/// How long a finished command waits for that comparison.
const LEARN_GRACE: Duration = Duration::from_millis(150);

/// Options that every command has.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Which cluster and credential to use; without it, the current context (`palyra context use`)
    #[arg(long, global = true, env = "PALYRA_CONTEXT", value_name = "NAME")]
    pub(crate) context: Option<String>,
    /// Replicas to ask, instead of the context's: HOST:PORT[,HOST:PORT...]
    #[arg(
        long = "endpoint",
        global = true,
        env = "PALYRA_ENDPOINTS",
        value_name = "HOST:PORT"
    )]
    pub(crate) endpoint: Option<String>,
    /// How the answer is printed
    #[arg(
        short,
        long,
        global = true,
        env = "PALYRA_OUTPUT",
        value_enum,
        default_value = "table",
        value_name = "FORMAT"
    )]
    pub(crate) output: Format,
    /// Never use colour, also on a terminal
    #[arg(long, global = true)]
    pub(crate) no_color: bool,
    /// How long the command may take, for example 500ms, 30s, 10m
    #[arg(long, global = true, value_parser = parse_limit, value_name = "DURATION")]
    pub(crate) timeout: Option<Duration>,
    /// Request id (ULID) of the change: a repeated one is answered and not done again
    #[arg(long, global = true, value_name = "ULID", value_parser = parse_ulid)]
    pub(crate) request_id: Option<String>,
    /// Let the asked replica answer reads alone: at once, and maybe behind. One that lost its quorum for
    /// seconds answers nothing but `cluster status`
    #[arg(long, global = true)]
    pub(crate) local: bool,
    /// Let reads reflect at least this log index
    #[arg(
        long,
        global = true,
        value_name = "INDEX",
        default_value_t = 0,
        hide_default_value = true
    )]
    pub(crate) min_index: u64,
}

fn parse_ulid(text: &str) -> std::result::Result<String, String> {
    let upper = text.to_ascii_uppercase();
    if palyra_client::ids::is_ulid(&upper) {
        Ok(upper)
    } else {
        Err(format!("{text:?} is no ULID (26 characters)"))
    }
}

impl Global {
    /// Where answers go.
    pub(crate) fn out(&self) -> Out {
        Out::new(self.output, self.no_color)
    }

    /// The request id of this command's one change.
    pub(crate) fn request_id(&self) -> String {
        self.request_id.clone().unwrap_or_else(new_ulid)
    }

    /// The folder of contexts.
    pub(crate) fn home() -> Result<PathBuf> {
        let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
        Ok(palyra_client::context::home(
            path("PALYRA_HOME"),
            path("XDG_CONFIG_HOME"),
            path("HOME"),
        )?)
    }

    /// A client as the options say, and what belongs to it.
    pub(crate) fn open(&self) -> Result<Session> {
        let home = Global::home()?;
        let contexts = Contexts::load(&home)?;
        let (name, context) = contexts.select(self.context.as_deref())?;
        let credential = context.credential(&home)?;
        let given = self.endpoint.as_deref().map(Endpoints::parse).transpose()?;
        let pinned = given.is_some();
        let endpoints = match given {
            Some(endpoints) => endpoints,
            None => Endpoints::new(&context.endpoints)?,
        };
        let mut client =
            Client::new(&credential, Some(endpoints), ConnectOptions::default())?.at_least(self.min_index);
        if let Some(timeout) = self.timeout {
            client = client.with_timeout(timeout);
        }
        if self.local {
            client = client.with_local_reads();
        }
        let stale = wall_ms().saturating_sub(context.learned_at_ms) > LEARN_AFTER_MS;
        let path = context.credential_path(&home);
        let following = (pinned || stale).then(|| {
            let client = client.clone();
            tokio::spawn(async move { client.follow_trust(&path).await.ok().flatten() })
        });
        let learning = (!pinned && stale).then(|| {
            let client = client.clone();
            tokio::spawn(async move { client.status().await.ok() })
        });
        Ok(Session {
            client,
            home,
            name: name.to_owned(),
            context: context.clone(),
            credential,
            learning,
            following,
        })
    }
}

/// An opened context.
#[derive(Debug)]
pub(crate) struct Session {
    /// The client.
    pub(crate) client: Client,
    /// The folder of contexts.
    pub(crate) home: PathBuf,
    /// The context's name.
    pub(crate) name: String,
    /// The context.
    pub(crate) context: Context,
    /// Its credential.
    pub(crate) credential: Credential,
    learning: Option<JoinHandle<Option<StatusResponse>>>,
    /// Brings the credential up to the cluster's roots. Also with endpoints from elsewhere: it is about whom to trust.
    following: Option<JoinHandle<Option<u64>>>,
}

impl Session {
    /// Ends the session; takes along what was learned, if it is there by now, and renews the certificate when it is
    /// near its end.
    pub(crate) async fn close(mut self) {
        self.take_along().await;
        self.settle().await;
        crate::operator::certificates::renew_if_due(&self).await;
    }

    /// Has nobody else write to the credential from here on.
    pub(crate) async fn settle(&mut self) {
        if let Some(following) = self.following.take() {
            following.abort();
            // Whether it was done or cut short, it is over.
            let _ = following.await;
        }
    }

    async fn take_along(&mut self) {
        if let Some(following) = self.following.as_mut()
            && let Ok(done) = tokio::time::timeout(LEARN_GRACE, following).await
        {
            self.following = None;
            if let Ok(Some(generation)) = done {
                tell_trust(generation);
            }
        }
        let Some(learning) = self.learning.take() else {
            return;
        };
        if let Ok(Ok(Some(status))) = tokio::time::timeout(LEARN_GRACE, learning).await {
            self.learn(&status);
        }
    }

    /// Brings the credential up to the cluster's trust bundle now. What fails is tried again another time: whether the
    /// cluster waits for this operator is shown by `palyra ca status`.
    pub(crate) async fn follow_trust(&self) {
        let path = self.context.credential_path(&self.home);
        match self.client.follow_trust(&path).await {
            Ok(Some(generation)) => tell_trust(generation),
            Ok(None) => {}
            Err(error) => note(&format!(
                "this credential's roots could not be brought up to date: {error}"
            )),
        }
    }

    /// Brings the context's replicas in line with the cluster's. What cannot be written is learned another time.
    pub(crate) fn learn(&self, status: &StatusResponse) {
        let (removed, live): (Vec<_>, Vec<_>) = status
            .replicas
            .iter()
            .filter(|replica| !replica.node_addr.is_empty())
            .partition(|replica| replica.status == "removed");
        let addresses = |replicas: Vec<&ReplicaStatus>| -> Vec<String> {
            replicas
                .into_iter()
                .map(|replica| replica.node_addr.clone())
                .collect()
        };
        let (removed, live) = (addresses(removed), addresses(live));
        let _ = Contexts::update(&self.home, |contexts| {
            if let Some(context) = contexts.contexts.get_mut(&self.name) {
                merge(context, &live, &removed);
            }
            Ok(())
        });
    }

    /// Endpoints for somebody who gets a credential from this session.
    pub(crate) fn known_endpoints(&self) -> Vec<String> {
        self.context.endpoints.clone()
    }
}

fn tell_trust(generation: u64) {
    note(&format!(
        "this credential holds generation {generation} of the cluster's roots now"
    ));
}

fn merge(context: &mut Context, live: &[String], removed: &[String]) {
    // An address may have gone from a removed replica to a new one.
    context
        .endpoints
        .retain(|known| !removed.contains(known) || live.contains(known));
    for address in live {
        if !context.endpoints.contains(address) && Endpoints::new([address]).is_ok() {
            context.endpoints.push(address.clone());
        }
    }
    context.learned_at_ms = wall_ms();
}

/// Refuses an empty reason where one is required.
pub(crate) fn required_reason(reason: &str) -> Result {
    if reason.trim().is_empty() {
        return Err(Failure::local(
            Class::Invalid,
            "the reason is empty",
            "say why: --reason \"...\"",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_learns_and_forgets_only_what_was_removed() {
        let mut context = Context {
            cluster_id: String::new(),
            endpoints: ["vip:7441", "gone:7441", "reused:7441"]
                .map(str::to_owned)
                .to_vec(),
            credential: PathBuf::new(),
            learned_at_ms: 0,
        };
        merge(
            &mut context,
            &["a:7441", "vip:7441", "bad", "reused:7441"].map(str::to_owned),
            &["gone:7441", "reused:7441"].map(str::to_owned),
        );
        assert_eq!(context.endpoints, ["vip:7441", "reused:7441", "a:7441"]);
        assert!(context.learned_at_ms > 0);
    }

    #[test]
    fn request_ids_are_read_in_either_case() {
        assert_eq!(
            parse_ulid("01arz3ndektsv4rrffq69g5fav").unwrap(),
            "01ARZ3NDEKTSV4RRFFQ69G5FAV"
        );
        assert!(parse_ulid("1").is_err());
    }
}
