//! `palyra context`: the clusters that this machine knows.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use palyra_client::context::{Adding, Context, Contexts, read_credential};
use palyra_client::{Class, Endpoints, Error};
use serde::Serialize;

use crate::failure::{Failure, Result};
use crate::output::table::{Column, column, facts, text, wide};
use crate::output::time::Moment;
use crate::output::{Record, Source};
use crate::session::Global;

/// What can be done about contexts.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Lists contexts
    #[command(after_help = "Example:\n  palyra context ls")]
    Ls,
    /// Makes a context the current one
    #[command(after_help = "Example:\n  palyra context use prod")]
    Use {
        /// The context's name
        name: String,
    },
    /// Shows a context: its replicas, and whose credential it holds
    #[command(after_help = "Example:\n  palyra context show")]
    Show {
        /// The context's name; without it the current one
        name: Option<String>,
    },
    /// Adds a context, or changes the replicas of one
    #[command(after_help = "Example:\n  palyra context add prod --credential anna.json\n  \
                            palyra context add prod --endpoints r1.example:7441,r2.example:7441")]
    Add(Add),
    /// Removes a context and the credential in it
    #[command(after_help = "Example:\n  palyra context rm prod")]
    Rm {
        /// The context's name
        name: String,
    },
}

/// What is added.
#[derive(Debug, Args)]
pub(crate) struct Add {
    /// The context's name
    name: String,
    /// The credential's file, as `palyra operator add` writes it; required for a new context
    #[arg(long, value_name = "FILE")]
    credential: Option<PathBuf>,
    /// The replicas; without them those that the credential names
    #[arg(long, value_name = "HOST:PORT")]
    endpoints: Option<String>,
    /// Make it the current context
    #[arg(long = "use")]
    make_current: bool,
}

/// Does what was asked about contexts.
pub(crate) fn run(global: &Global, verb: Verb) -> Result {
    let home = Global::home()?;
    let out = global.out();
    match verb {
        Verb::Ls => {
            let contexts = Contexts::load(&home)?;
            let items: Vec<ContextView> = contexts
                .contexts
                .iter()
                .map(|(name, context)| view(name, context, contexts.current.as_deref() == Some(name)))
                .collect();
            out.list(&items, Source::default())
        }
        Verb::Use { name } => {
            let used = Contexts::update(&home, |contexts| {
                let (name, context) = contexts.select(Some(&name))?;
                let used = view(name, context, true);
                contexts.current = Some(used.name.clone());
                Ok(used)
            })?;
            let text = format!("current context: {}\n", used.name);
            out.plain(&used, &text)
        }
        Verb::Show { name } => show(global, name.as_deref()),
        Verb::Add(add) => {
            let (name, context) = add_context(&home, add)?;
            let current = Contexts::load(&home)?.current.as_deref() == Some(name.as_str());
            let view = view(&name, &context, current);
            let pairs = [("context", name.clone()), ("replicas", view.endpoints.join(" "))];
            out.plain(&view, &facts(&pairs))
        }
        Verb::Rm { name } => {
            let removed = Contexts::remove(&home, &name)?;
            out.plain(&view(&name, &removed, false), &format!("removed: {name}\n"))
        }
    }
}

fn add_context(home: &std::path::Path, add: Add) -> Result<(String, Context)> {
    let endpoints = add.endpoints.as_deref().map(Endpoints::parse).transpose()?;
    let endpoints = endpoints.map(|endpoints| endpoints.as_slice().to_vec());
    if let Some(path) = &add.credential {
        let credential = read_credential(path)?;
        let options = Adding {
            endpoints,
            replace: true,
            make_current: add.make_current,
        };
        let known = Contexts::load(home)?
            .contexts
            .get(&add.name)
            .map(|context| context.cluster_id.clone());
        if let Some(known) = known.filter(|known| *known != credential.cluster_id) {
            let message = format!(
                "{:?} is a context of cluster {known}, the credential is of {}",
                add.name, credential.cluster_id
            );
            let next = format!("choose another name, or first: palyra context rm {}", add.name);
            return Err(Failure::local(Class::Conflict, message, next));
        }
        let context = Contexts::add(home, &add.name, &credential, options)?;
        return Ok((add.name, context));
    }
    let context = Contexts::update(home, |contexts| {
        let Some(context) = contexts.contexts.get_mut(&add.name) else {
            let next = format!("palyra context add {} --credential FILE", add.name);
            return Err(Error::local(
                Class::NotFound,
                format!("there is no context {:?} yet", add.name),
                next,
            ));
        };
        if let Some(endpoints) = endpoints {
            context.endpoints = endpoints;
        }
        let context = context.clone();
        if add.make_current {
            contexts.current = Some(add.name.clone());
        }
        Ok(context)
    })?;
    Ok((add.name, context))
}

fn show(global: &Global, name: Option<&str>) -> Result {
    let home = Global::home()?;
    let contexts = Contexts::load(&home)?;
    let (name, context) = contexts.select(name.or(global.context.as_deref()))?;
    let mut view = view(name, context, contexts.current.as_deref() == Some(name));
    let identity = context
        .credential(&home)
        .map_err(|error| error.message.clone())
        .and_then(|credential| credential.identity().map_err(|error| error.to_string()));
    let told = match identity {
        Ok(identity) => {
            view.identity = Some(identity.id.to_string());
            view.certificate_not_after = Moment(identity.not_after_ms);
            identity.id.to_string()
        }
        Err(problem) => format!("unusable: {problem}"),
    };
    let pairs = [
        (
            "context",
            if view.current {
                format!("{name} (current)")
            } else {
                name.to_owned()
            },
        ),
        ("cluster", view.cluster_id.clone()),
        ("replicas", view.endpoints.join("\n")),
        ("credential", context.credential_path(&home).display().to_string()),
        ("identity", told),
        (
            "certificate",
            format!(
                "ends {}",
                view.certificate_not_after.told(palyra_client::wall_ms())
            ),
        ),
    ];
    global.out().plain(&view, &facts(&pairs))
}

/// A context as it is printed.
#[derive(Debug, Clone, Serialize)]
struct ContextView {
    name: String,
    current: bool,
    cluster_id: String,
    endpoints: Vec<String>,
    credential: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<String>,
    certificate_not_after: Moment,
}

fn view(name: &str, context: &Context, current: bool) -> ContextView {
    ContextView {
        name: name.to_owned(),
        current,
        cluster_id: context.cluster_id.clone(),
        endpoints: context.endpoints.clone(),
        credential: context.credential.clone(),
        identity: None,
        certificate_not_after: Moment(0),
    }
}

impl Record for ContextView {
    const COLUMNS: &'static [Column] = &[
        column("CURRENT"),
        column("NAME"),
        column("CLUSTER"),
        text("REPLICAS"),
        wide("CREDENTIAL"),
    ];

    fn key(&self) -> String {
        self.name.clone()
    }

    fn cells(&self, _now_ms: u64) -> Vec<String> {
        vec![
            if self.current { "*" } else { " " }.to_owned(),
            self.name.clone(),
            self.cluster_id.clone(),
            self.endpoints.join(","),
            self.credential.display().to_string(),
        ]
    }
}
