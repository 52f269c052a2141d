//! `palyra cluster`: birth, health and membership.

mod init;
mod status;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use palyra_client::{Class, Client};
use palyra_proto::cluster::v1::{MintJoinTokenRequest, RemoveReplicaRequest};
use serde::Serialize;

use crate::failure::{Failure, Result};
use crate::output::Source;
use crate::output::time::{Moment, millis, parse_limit};
use crate::session::{Global, Session};

/// What can be done about the cluster.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Makes a new cluster on this machine: its root, its first replica and its first operator. Nothing is
    /// started
    #[command(
        after_help = "Example:\n  palyra cluster init --data-dir /var/lib/palyra/r1 --name r1\n  \
                            palyra cluster init --data-dir r1 --name r1 --listen-host 0.0.0.0 \
                            --advertise-host r1.example --context prod"
    )]
    Init(Init),
    /// Shows the cluster and its replicas
    #[command(after_help = "Example:\n  palyra cluster status -o wide\n  palyra cluster status --watch")]
    Status {
        /// Print it again whenever something changes, until interrupted
        #[arg(short, long)]
        watch: bool,
    },
    /// Makes a token that lets one replica join
    #[command(after_help = "Example:\n  palyra cluster join-token --name r2\n  \
                      palyra cluster join-token --name r2 -o json")]
    JoinToken {
        /// What the replica will be called; the token is good for no other
        #[arg(long)]
        name: String,
        /// How long it is good: 30s to 24h; without it one hour
        #[arg(long, value_parser = parse_limit, value_name = "DURATION")]
        ttl: Option<Duration>,
    },
    /// Hands leadership to another replica
    #[command(
        after_help = "Example:\n  palyra cluster transfer-leader --to r2\n  palyra cluster transfer-leader"
    )]
    TransferLeader {
        /// Name or id of the replica; without it the best caught-up one
        #[arg(long, value_name = "REPLICA")]
        to: Option<String>,
    },
    /// Removes a replica for good
    #[command(after_help = "Example:\n  palyra cluster remove-replica r3")]
    RemoveReplica {
        /// Name or id of the replica
        replica: String,
        /// Also when no further failure is tolerated afterwards
        #[arg(long)]
        force: bool,
    },
    /// Lets the replica that answers make a snapshot
    #[command(after_help = "Example:\n  palyra cluster snapshot --endpoint 127.0.0.1:7441")]
    Snapshot,
}

/// What is made.
#[derive(Debug, Args)]
pub(crate) struct Init {
    /// The folder of the first replica; must not exist, or be empty
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: PathBuf,
    /// What the first replica is called
    #[arg(long, default_value = "r1")]
    pub(crate) name: String,
    /// Address to listen on
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub(crate) listen_host: String,
    /// Host that nodes, operators and other replicas reach it at, when it is not the address it listens on
    #[arg(long, value_name = "HOST")]
    pub(crate) advertise_host: Option<String>,
    /// First of six ports: +1 nodes and operators, +2 enrolment, +4 replicas, +5 metrics
    #[arg(long, value_name = "PORT", default_value_t = palyra_pki::layout::BASE_PORT)]
    pub(crate) base_port: u16,
    /// The name of the first operator, an admin
    #[arg(long, value_name = "NAME", default_value = "admin")]
    pub(crate) operator: String,
    /// Trust domain of all certificates; without it palyra.<beginning of the cluster id>.internal
    #[arg(long, value_name = "DOMAIN")]
    pub(crate) trust_domain: Option<String>,
}

/// Does what was asked about the cluster.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    if let Verb::Init(init) = verb {
        return init::run(global, &init);
    }
    let session = global.open()?;
    match verb {
        Verb::Status { watch: true } => status::watch(global, &session).await?,
        Verb::Init(_) | Verb::Status { .. } => status::once(global, &session).await?,
        Verb::JoinToken { name, ttl } => join_token(global, &session, name, ttl).await?,
        Verb::TransferLeader { to } => transfer_leader(global, &session.client, to.as_deref()).await?,
        Verb::RemoveReplica { replica, force } => {
            remove_replica(global, &session.client, &replica, force).await?
        }
        Verb::Snapshot => {
            let answer = session.client.trigger_snapshot().await?;
            let made = Snapshot { index: answer.index };
            global
                .out()
                .plain(&made, &format!("snapshot at index {}\n", made.index))?;
        }
    }
    session.close().await;
    Ok(())
}

#[derive(Serialize)]
struct Snapshot {
    index: u64,
}

#[derive(Serialize)]
struct Token<'a> {
    token: &'a str,
    token_id: &'a str,
    name: &'a str,
    expires_at: Moment,
}

async fn join_token(global: &Global, session: &Session, name: String, ttl: Option<Duration>) -> Result {
    let request = MintJoinTokenRequest {
        request_id: global.request_id(),
        name: name.clone(),
        ttl_ms: ttl.map_or(0, millis),
    };
    let answer = session.client.mint_join_token(request).await?;
    if answer.token.is_empty() {
        let message = "the token was made, but the answer that held it was lost; it cannot be shown again";
        return Err(Failure::local(
            Class::Unknown,
            message,
            "let it lapse, and make another",
        ));
    }
    let expires_at = Moment(answer.expires_at_ms);
    let token = Token {
        token: &answer.token,
        token_id: &answer.token_id,
        name: &name,
        expires_at,
    };
    let facts = [
        ("token", answer.token.clone()),
        ("for", name.clone()),
        ("expires", expires_at.told(palyra_client::wall_ms())),
        (
            "next",
            format!("on the new machine: palyrad join --token TOKEN --data-dir DIR --name {name}"),
        ),
        ("then", "palyrad run --config DIR/palyrad.toml".to_owned()),
    ];
    global.out().one(&token, answer.write.into(), &facts)
}

#[derive(Serialize)]
struct Leader {
    leader_id: u64,
}

async fn transfer_leader(global: &Global, client: &Client, to: Option<&str>) -> Result {
    let to = match to {
        Some(replica) => replica_id(client, replica).await?,
        None => 0,
    };
    let look = |_: &str| "palyra cluster status".to_owned();
    let answer = client
        .transfer_leader(to)
        .await
        .map_err(|error| Failure::from(error).look_again(look))?;
    let leader = Leader {
        leader_id: answer.leader_id,
    };
    global
        .out()
        .plain(&leader, &format!("leader: replica {}\n", leader.leader_id))
}

#[derive(Serialize)]
struct RemovedReplica {
    replica_id: u64,
}

async fn remove_replica(global: &Global, client: &Client, replica: &str, force: bool) -> Result {
    let replica_id = replica_id(client, replica).await?;
    let request = RemoveReplicaRequest {
        request_id: global.request_id(),
        replica_id,
        force,
    };
    let answer = client.remove_replica(request).await?;
    let facts = [
        ("removed", format!("replica {replica_id}")),
        (
            "next",
            "stop its palyrad and delete its data folder; it is not let in again".to_owned(),
        ),
    ];
    global
        .out()
        .one(&RemovedReplica { replica_id }, Source::from(answer.write), &facts)
}

/// A replica's id from its id or name.
pub(crate) async fn replica_id(client: &Client, replica: &str) -> Result<u64> {
    if let Ok(id) = replica.parse() {
        return Ok(id);
    }
    let replicas = client.status().await?.replicas;
    let found = replicas
        .iter()
        .find(|known| known.name == replica && known.status != "removed");
    found.map(|known| known.id).ok_or_else(|| {
        let names: Vec<&str> = replicas.iter().map(|known| known.name.as_str()).collect();
        let message = format!("there is no replica {replica:?}; there are {}", names.join(", "));
        Failure::local(Class::NotFound, message, "palyra cluster status")
    })
}
