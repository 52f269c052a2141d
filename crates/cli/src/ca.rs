//! `palyra ca`: the cluster's roots and authorities, their rotation, and who trusts what.

mod view;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use palyra_client::{Class, Client};
use palyra_pki::KeyPair;
use palyra_proto::ca::v1::{
    AdvanceRootRequest, BeginRootRequest, RevertRootRequest, RotateAuthorityRequest, StatusResponse,
};
use serde::Serialize;
use zeroize::Zeroizing;

use crate::cluster::replica_id;
use crate::failure::{Failure, Result};
use crate::output::{Source, note};
use crate::session::{Global, Session, required_reason};

/// Nodes that are named with `--all`.
const ALL: u32 = 10_000;

/// What can be done about authorities.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Shows roots, authorities, the rotation that is under way, and who has not acknowledged it
    #[command(after_help = "Example:\n  palyra ca status\n  palyra ca status --all -o json")]
    Status {
        /// Name everybody who is missing, not just the first few
        #[arg(long)]
        all: bool,
    },
    /// Replaces authorities or the root, while everything goes on
    #[command(subcommand)]
    Rotate(Rotate),
}

/// What is replaced.
#[derive(Debug, Subcommand)]
pub(crate) enum Rotate {
    /// Gives replicas new issuing authorities; what the old ones issued stays good until it expires
    #[command(
        after_help = "Example:\n  palyra ca rotate authority --replica r2 --reason \"its disk was copied\"\n  \
                      palyra ca rotate authority --all"
    )]
    Authority(Authority),
    /// Gives the cluster a new root: begin, advance twice, or go back
    #[command(subcommand)]
    Root(Root),
}

/// Whose authority.
#[derive(Debug, Args)]
pub(crate) struct Authority {
    /// Name or id of one replica
    #[arg(
        long,
        value_name = "REPLICA",
        conflicts_with = "all",
        required_unless_present = "all"
    )]
    replica: Option<String>,
    /// All replicas
    #[arg(long)]
    all: bool,
    /// Why; kept in the journal
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
}

/// The steps of a root's rotation.
#[derive(Debug, Subcommand)]
pub(crate) enum Root {
    /// Begins: both roots are trusted from here on, and everybody is told
    #[command(
        after_help = "Example:\n  palyra ca rotate root begin --reason \"yearly\"\n  \
                      palyra ca rotate root begin --cert root.pem --key root.key"
    )]
    Begin {
        /// A root that was made elsewhere, PEM; without it the cluster makes one
        #[arg(long, value_name = "FILE", requires = "key")]
        cert: Option<PathBuf>,
        /// Its key, PEM, PKCS#8
        #[arg(long, value_name = "FILE", requires = "cert")]
        key: Option<PathBuf>,
        /// Why; kept in the journal
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
    },
    /// Goes on: to `issue`, where the new root signs, and then to the end, where the old one is retired
    #[command(after_help = "Example:\n  palyra ca rotate root advance\n  \
                      palyra ca rotate root advance --force --reason \"web-7 is scrapped\"\n\n\
                      Refused while somebody has not acknowledged the present phase: palyra ca status")]
    Advance {
        /// Leave behind who has not acknowledged: such nodes have to be paired again
        #[arg(long, requires = "reason")]
        force: bool,
        /// Why; kept in the journal
        #[arg(long)]
        reason: Option<String>,
        #[command(flatten)]
        from: From,
    },
    /// Goes back one phase; from the first, the rotation is given up
    #[command(after_help = "Example:\n  palyra ca rotate root revert --reason \"wrong week\"")]
    Revert {
        /// Why; kept in the journal
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
        #[command(flatten)]
        from: From,
    },
    /// Shows how far it is
    #[command(after_help = "Example:\n  palyra ca rotate root status")]
    Status,
}

/// The phase that is left.
#[derive(Debug, Args)]
pub(crate) struct From {
    /// Only when the rotation is in this phase: distribute, issue
    #[arg(long, value_name = "PHASE", default_value = "", hide_default_value = true)]
    from: String,
}

/// Does what was asked about authorities.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    let session = global.open()?;
    // Who looks at the authorities may well be the last who has not acknowledged them.
    session.follow_trust().await;
    let client = &session.client;
    match verb {
        Verb::Status { all } => status(global, client, all).await?,
        Verb::Rotate(Rotate::Authority(ask)) => rotate_authority(global, client, ask).await?,
        Verb::Rotate(Rotate::Root(root)) => rotate_root(global, &session, root).await?,
    }
    session.close().await;
    Ok(())
}

async fn status(global: &Global, client: &Client, all: bool) -> Result {
    let answer = client.ca_status(if all { ALL } else { 0 }).await?;
    view::print(global.out(), &answer)
}

#[derive(Serialize)]
struct Asked {
    asked: u32,
}

async fn rotate_authority(global: &Global, client: &Client, ask: Authority) -> Result {
    let replica_id = match &ask.replica {
        Some(replica) => replica_id(client, replica).await?,
        None => 0,
    };
    let request = RotateAuthorityRequest {
        request_id: global.request_id(),
        replica_id,
        reason: ask.reason,
    };
    let answer = client.rotate_authority(request).await?;
    let asked = Asked { asked: answer.asked };
    let told = match answer.asked {
        0 => "asked before; it comes as soon as the replica runs".to_owned(),
        1 => "one replica makes a new authority".to_owned(),
        more => format!("{more} replicas make new authorities"),
    };
    let facts = [("rotation", told), ("next", "palyra ca status".to_owned())];
    global.out().one(&asked, Source::from(answer.write), &facts)
}

#[derive(Serialize)]
struct Moved<'a> {
    phase: &'a str,
    generation: u64,
    step: u64,
}

async fn rotate_root(global: &Global, session: &Session, root: Root) -> Result {
    let client = &session.client;
    let request_id = global.request_id();
    let write = match root {
        Root::Status => return status(global, client, false).await,
        Root::Begin { cert, key, reason } => {
            let (certificate, key) = match (cert, key) {
                (Some(cert), Some(key)) => imported(&cert, &key)?,
                _ => (Vec::new(), Vec::new()),
            };
            let request = BeginRootRequest {
                request_id,
                reason,
                certificate: certificate.into(),
                key: key.into(),
            };
            client.begin_root(request).await?.write
        }
        Root::Advance { force, reason, from } => {
            if force {
                required_reason(reason.as_deref().unwrap_or_default())?;
            }
            let request = AdvanceRootRequest {
                request_id,
                from: from.from,
                force,
                reason: reason.unwrap_or_default(),
            };
            client.advance_root(request).await?.write
        }
        Root::Revert { reason, from } => {
            let request = RevertRootRequest {
                request_id,
                from: from.from,
                reason,
            };
            client.revert_root(request).await?.write
        }
    };
    let index = write.as_ref().map_or(0, |write| write.index);
    session.follow_trust().await;
    let now = client.clone().at_least(index).ca_status(0).await?;
    let moved = Moved {
        phase: &now.phase,
        generation: now.generation,
        step: now.step,
    };
    let facts = [
        ("phase", now.phase.clone()),
        ("means", view::meaning(&now.phase).to_owned()),
        ("next", next(&now)),
    ];
    global.out().one(&moved, Source::from(write), &facts)
}

/// What the operator does now.
fn next(now: &StatusResponse) -> String {
    match now.phase.as_str() {
        "idle" => "nothing; palyra ca status shows who still holds the old bundle".to_owned(),
        _ => "palyra ca status, until everybody has acknowledged; then palyra ca rotate root advance"
            .to_owned(),
    }
}

/// A root from files: certificate DER, and key PKCS#8 DER.
fn imported(cert: &Path, key: &Path) -> Result<(Vec<u8>, Vec<u8>)> {
    let read = |path: &Path| {
        let text = std::fs::read_to_string(path).map_err(|error| Failure::file("read", path, &error))?;
        Ok::<_, Failure>(Zeroizing::new(text))
    };
    let bad = |path: &Path, cause: String| {
        let message = format!("{} is unusable: {cause}", path.display());
        Failure::local(
            Class::Invalid,
            message,
            "give one certificate, and its P-256 key in PKCS#8, both PEM",
        )
    };
    let text = read(cert)?;
    let certificates = palyra_pki::layout::certificates_from_pem(&text).unwrap_or_default();
    let [certificate] = certificates.as_slice() else {
        return Err(bad(cert, format!("it holds {} certificates", certificates.len())));
    };
    let text = read(key)?;
    let pair = KeyPair::from_pem(&text).map_err(|error| bad(key, error.to_string()))?;
    note("the key goes to the cluster, which seals it; remove the file once the rotation is over");
    Ok((certificate.clone(), pair.to_pkcs8().to_vec()))
}
