//! `palyra operator` and `palyra whoami`: who may operate the cluster.

pub(crate) mod certificates;

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use palyra_client::context::write_private;
use palyra_client::{Class, Client, fill_random, wall_ms};
use palyra_pki::{Credential, KeyPair, TrustBundle, TrustDomain};
use palyra_proto::access::v1::{
    AddOperatorRequest, AddOperatorResponse, ListOperatorsRequest, OperatorInfo, RemoveOperatorRequest,
    WhoAmIResponse,
};
use serde::Serialize;

use crate::failure::{Failure, Result};
use crate::output::table::{Column, column, wide};
use crate::output::time::{Moment, millis, parse_limit};
use crate::output::{Out, Record, Source};
use crate::session::{Global, Session};
use crate::watch::watch;

/// What can be done about operators.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Lists operators
    #[command(after_help = "Example:\n  palyra operator ls -o wide\n  palyra operator ls -w")]
    Ls {
        /// Print what changes, until interrupted
        #[arg(short, long)]
        watch: bool,
    },
    /// Lets an operator in and writes a credential for it; its key is made here
    #[command(
        after_help = "Example:\n  palyra operator add anna --role operator --out anna.json\n\n\
                            On Anna's machine: palyra context add prod --credential anna.json"
    )]
    Add(Add),
    /// Shows one operator and its certificates
    #[command(
        visible_alias = "describe",
        after_help = "Example:\n  palyra operator show anna"
    )]
    Show {
        /// The operator's name
        name: String,
    },
    /// Renews the certificate of this context; it happens by itself in the last third of its life
    #[command(after_help = "Example:\n  palyra operator renew\n  palyra operator renew --ttl 90d")]
    Renew(certificates::Renew),
    /// Revokes one certificate of an operator; the others go on working
    #[command(
        after_help = "Example:\n  palyra operator revoke-certificate 0f3a9c1e77 --reason \"laptop stolen\""
    )]
    RevokeCertificate(certificates::Revoke),
    /// Shuts an operator out; its certificates work no more
    #[command(after_help = "Example:\n  palyra operator remove anna --reason \"left the team\"")]
    Remove {
        /// The operator's name
        name: String,
        /// Why; kept in the journal
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
    },
}

/// What an operator may do.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Role {
    /// Everything
    Admin,
    /// Pairs, invokes, revokes devices
    Operator,
    /// Looks
    Viewer,
}

impl Role {
    fn as_str(self) -> &'static str {
        match self {
            Role::Admin => "admin",
            Role::Operator => "operator",
            Role::Viewer => "viewer",
        }
    }
}

/// Who is let in.
#[derive(Debug, Args)]
pub(crate) struct Add {
    /// The operator's name: a-z, 0-9, '.', '-', '_'
    name: String,
    /// What the operator may do
    #[arg(long, value_enum)]
    role: Role,
    /// The file that the credential is written to; without it NAME.json
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// How long the certificate is good; without it 30 days, at most a year
    #[arg(long, value_parser = parse_limit, value_name = "DURATION")]
    ttl: Option<std::time::Duration>,
}

/// Does what was asked about operators.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    let mut session = global.open()?;
    match verb {
        Verb::Ls { watch: true } => {
            let fetch = async |client: Client| operators(&client).await;
            watch(&session.client, global.out(), usize::MAX, fetch).await?;
        }
        Verb::Ls { watch: false } => {
            let (items, source) = operators(&session.client).await?;
            global.out().list(&items, source)?;
        }
        Verb::Show { name } => certificates::show(global, &session.client, name).await?,
        Verb::Renew(renew) => {
            session.settle().await;
            certificates::renew(global, &session, renew).await?;
            return Ok(());
        }
        Verb::RevokeCertificate(revoke) => certificates::revoke(global, &session.client, revoke).await?,
        Verb::Add(add) => add_operator(global, &session, add).await?,
        Verb::Remove { name, reason } => {
            let request = RemoveOperatorRequest {
                request_id: global.request_id(),
                name: name.clone(),
                reason,
            };
            let answer = session.client.remove_operator(request).await?;
            global.out().one(
                &Removed { removed: &name },
                answer.write.into(),
                &[("removed", name.clone())],
            )?;
        }
    }
    session.close().await;
    Ok(())
}

async fn operators(client: &Client) -> Result<(Vec<OperatorView>, Source)> {
    let answer = client.list_operators(ListOperatorsRequest::default()).await?;
    let items = answer.operators.into_iter().map(OperatorView::from).collect();
    Ok((items, answer.read.into()))
}

async fn add_operator(global: &Global, session: &Session, add: Add) -> Result {
    let path = add
        .out
        .unwrap_or_else(|| PathBuf::from(format!("{}.json", add.name)));
    let place = Place::reserve(&path)?;
    let defect = |what: &dyn std::fmt::Display| {
        Failure::local(
            Class::Internal,
            format!("no credential can be made: {what}"),
            "palyra version",
        )
    };
    let key = KeyPair::generate(&mut fill_random).map_err(|error| defect(&error))?;
    let csr = key.make_csr().map_err(|error| defect(&error))?;
    let request = AddOperatorRequest {
        request_id: global.request_id(),
        name: add.name.clone(),
        role: add.role.as_str().to_owned(),
        csr: csr.into(),
        ttl_ms: add.ttl.map_or(0, millis),
    };
    let name = add.name.clone();
    let look = move |_: &str| {
        // The certificate of a repeated request is of the first key, which is gone with this process.
        let remove = format!("palyra operator remove {name} --reason \"credential lost\"");
        format!("palyra operator ls; if {name} is there: {remove}, and add it again")
    };
    let answer = session.client.add_operator(request).await;
    let answer = answer.map_err(|error| Failure::from(error).look_again(look))?;
    let credential = credential(session, &answer, &key).map_err(|error| {
        // A repeated request is answered with the certificate of the first key, which is gone.
        let next = format!(
            "palyra operator remove {} --reason \"credential lost\", and add it again",
            add.name
        );
        Failure::local(
            Class::Unknown,
            format!("the operator was added, but its credential is unusable: {error}"),
            next,
        )
    })?;
    let json = credential.to_json().map_err(|error| defect(&error))?;
    write_private(&path, json.as_bytes())?;
    place.keep();
    let view = Added {
        name: &add.name,
        role: add.role.as_str(),
        credential: &path,
    };
    let facts = [
        ("added", add.name.clone()),
        ("role", add.role.as_str().to_owned()),
        (
            "credential",
            format!("{} (secret: hand it over safely)", path.display()),
        ),
        (
            "next",
            format!(
                "on its machine: palyra context add NAME --credential {}",
                path.display()
            ),
        ),
    ];
    global.out().one(&view, answer.write.into(), &facts)
}

/// A file that is there before the cluster lets anybody in: a credential must not be lost for want of a place
/// to write it to.
struct Place<'a>(Option<&'a std::path::Path>);

impl Place<'_> {
    fn reserve(path: &std::path::Path) -> Result<Place<'_>> {
        use std::os::unix::fs::OpenOptionsExt;
        let made = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        match made {
            Ok(_) => Ok(Place(Some(path))),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(Failure::local(
                Class::Conflict,
                format!("{} exists already", path.display()),
                "choose another file: --out FILE",
            )),
            Err(error) => Err(Failure::file("write", path, &error)),
        }
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.0 {
            // An empty file of ours; when it cannot be removed, the next try says that it exists.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn credential(
    session: &Session,
    answer: &AddOperatorResponse,
    key: &KeyPair,
) -> std::result::Result<Credential, String> {
    let mine = &session.credential;
    let roots: Vec<Vec<u8>> = answer.roots.iter().map(|root| root.to_vec()).collect();
    let domain = TrustDomain::new(&mine.trust_domain).map_err(|error| error.to_string())?;
    let trust = TrustBundle::new(&mine.cluster_id, domain, roots).map_err(|error| error.to_string())?;
    let chain: Vec<Vec<u8>> = answer
        .chain
        .iter()
        .map(|certificate| certificate.to_vec())
        .collect();
    Credential::new(&trust, session.known_endpoints(), &chain, key).map_err(|error| error.to_string())
}

#[derive(Serialize)]
struct Added<'a> {
    name: &'a str,
    role: &'a str,
    credential: &'a std::path::Path,
}

#[derive(Serialize)]
struct Removed<'a> {
    removed: &'a str,
}

/// An operator as it is printed.
#[derive(Debug, Clone, Default, Serialize)]
struct OperatorView {
    name: String,
    role: String,
    status: String,
    created_at: Moment,
    created_by: String,
}

impl From<OperatorInfo> for OperatorView {
    fn from(info: OperatorInfo) -> OperatorView {
        OperatorView {
            name: info.name,
            role: info.role,
            status: info.status,
            created_at: Moment(info.created_at_ms),
            created_by: info.created_by,
        }
    }
}

impl Record for OperatorView {
    const COLUMNS: &'static [Column] = &[
        column("NAME"),
        column("ROLE"),
        column("STATUS"),
        column("ADDED"),
        wide("ADDED BY"),
    ];

    fn key(&self) -> String {
        self.name.clone()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        vec![
            self.name.clone(),
            self.role.clone(),
            self.status.clone(),
            self.created_at.told(now_ms),
            self.created_by.clone(),
        ]
    }
}

#[derive(Serialize)]
struct Identity<'a> {
    #[serde(flatten)]
    operator: OperatorView,
    cluster_id: String,
    context: &'a str,
    certificate_not_after: Moment,
}

/// Tells who the cluster takes this context's credential for.
pub(crate) async fn whoami(global: &Global) -> Result {
    let session = global.open()?;
    let answer = session.client.whoami().await?;
    print_identity(global.out(), &session.name, answer)?;
    session.close().await;
    Ok(())
}

fn print_identity(out: Out, context: &str, answer: WhoAmIResponse) -> Result {
    let identity = Identity {
        operator: answer.operator.map(OperatorView::from).unwrap_or_default(),
        cluster_id: answer.cluster_id,
        context,
        certificate_not_after: Moment(answer.certificate_not_after_ms),
    };
    let facts = [
        ("operator", identity.operator.name.clone()),
        ("role", identity.operator.role.clone()),
        ("cluster", identity.cluster_id.clone()),
        ("context", context.to_owned()),
        (
            "certificate",
            format!("ends {}", identity.certificate_not_after.told(wall_ms())),
        ),
    ];
    out.one(&identity, Source::from(answer.read), &facts)
}
