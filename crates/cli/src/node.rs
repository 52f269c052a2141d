//! `palyra node`: the fleet as operators see it, and the agent on this machine.

pub(crate) mod host;
mod invoke;
mod mediation;
mod view;

use clap::{Args, Subcommand};
use palyra_client::Client;
use palyra_proto::node::v1::{GetNodeRequest, ListNodesRequest};

use crate::failure::{Failure, Result};
use crate::output::{Out, Source, note};
use crate::pages::{ALL, Limit};
use crate::session::Global;
use crate::watch::watch;
use view::NodeView;

/// What can be done about nodes.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Lists nodes
    #[command(after_help = "Example:\n  palyra node ls --status online -l site=brno\n  palyra node ls -w")]
    Ls(List),
    /// Shows one node with its capabilities
    #[command(after_help = "Example:\n  palyra node describe web-1")]
    Describe {
        /// Device id, name, or the beginning of an id
        node: String,
    },
    /// Runs a capability of a node and prints its result
    #[command(
        after_help = "Example:\n  palyra node invoke web-1 echo --input '{\"hello\":1}'\n  \
                            palyra node invoke web-1 logs.summary --input @query.json --timeout 2m\n  \
                            make-query | palyra node invoke web-1 logs.summary --input -\n\n\
                            --timeout is the deadline of the job, 30s without it.\n\
                            Exit codes: 0 succeeded, 1 failed, 6 rejected, 7 cancelled or never handed \
                            to the node, 13 timed out, session lost or still running"
    )]
    Invoke(invoke::Invoke),
    /// On this machine: becomes a node, with a PIN or a ticket
    #[command(
        after_help = "Example:\n  palyra node pair --pin 48219034 --enrol r1.example:7442,r2.example:7442\n  \
                            palyra node pair --ticket-file ticket.txt"
    )]
    Pair(host::Pair),
    /// On this machine: runs the agent in the foreground; pairs first when it is told how
    #[command(
        after_help = "Example:\n  palyra node run --capabilities capabilities.toml\n  \
                            palyra node run --pin 48219034 --enrol r1.example:7442"
    )]
    Run(host::Run),
    /// On this machine: starts the agent in the background
    #[command(after_help = "Example:\n  palyra node start --capabilities capabilities.toml")]
    Start(host::Start),
    /// On this machine: ends the agent
    #[command(after_help = "Example:\n  palyra node stop")]
    Stop(host::Folder),
    /// On this machine: ends the agent and starts it again
    #[command(after_help = "Example:\n  palyra node restart")]
    Restart(host::Start),
    /// On this machine: what the agent does
    #[command(after_help = "Example:\n  palyra node status -o json")]
    Status(host::Folder),
    /// On this machine: has the agent started with the machine
    #[command(
        after_help = "Example:\n  palyra node install --system --capabilities /etc/palyra/capabilities.toml"
    )]
    Install(host::Install),
    /// On this machine: undoes install; identity and data stay
    #[command(after_help = "Example:\n  palyra node uninstall")]
    Uninstall(host::Folder),
    /// On this machine: answers what dispatches ask the person at it
    #[command(subcommand)]
    Mediation(mediation::Verb),
}

/// What is listed.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only nodes of this status: online, suspect, offline, gone
    #[arg(long, value_name = "STATUS", default_value = "", hide_default_value = true)]
    status: String,
    /// Only nodes with this label; several must all match
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Print what changes, until interrupted
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    limit: Limit,
}

/// Reads `key=value`.
pub(crate) fn parse_label(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is no label: write KEY=VALUE")),
    }
}

/// Does what was asked about nodes.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    let out = global.out();
    match verb {
        Verb::Pair(pair) => return host::pair(global, pair).await,
        Verb::Run(run) => return host::run(global, run, None).await,
        Verb::Start(start) => return host::start(global, start).await,
        Verb::Stop(folder) => return host::stop(global, folder).await,
        Verb::Restart(start) => return host::restart(global, start).await,
        Verb::Status(folder) => return host::status(out, folder).await,
        Verb::Install(install) => return host::install(global, install),
        Verb::Uninstall(folder) => return host::uninstall(out, &folder),
        Verb::Mediation(verb) => return mediation::run(out, verb).await,
        Verb::Ls(_) | Verb::Describe { .. } | Verb::Invoke(_) => {}
    }
    let session = global.open()?;
    let client = &session.client;
    match verb {
        Verb::Ls(list) if list.watch => {
            let fetch = async |client: Client| nodes(&client, &list, ALL).await;
            watch(client, out, list.limit.count(), fetch).await?;
        }
        Verb::Ls(list) => {
            let (items, source) = nodes(client, &list, list.limit).await?;
            out.list(&items, source)?;
            if items.is_empty() && out.format.is_table() {
                note(if list.status.is_empty() && list.labels.is_empty() {
                    "there are no nodes yet; let one in: palyra pairing code"
                } else {
                    "no node is like that: palyra node ls -o wide"
                });
            }
        }
        Verb::Describe { node } => describe(client, out, node).await?,
        Verb::Invoke(invoke) => {
            let done = invoke::run(global, client, invoke).await;
            session.close().await;
            return done;
        }
        _ => {}
    }
    session.close().await;
    Ok(())
}

async fn nodes(client: &Client, list: &List, limit: Limit) -> Result<(Vec<NodeView>, Source)> {
    limit
        .all(async |page| {
            let request = ListNodesRequest {
                status: list.status.clone(),
                labels: list.labels.iter().cloned().collect(),
                page: Some(page),
                read: None,
            };
            let answer = client.list_nodes(request).await?;
            Ok((
                answer.nodes.into_iter().map(NodeView::from).collect(),
                answer.page,
                answer.read.into(),
            ))
        })
        .await
}

async fn describe(client: &Client, out: Out, node: String) -> Result {
    let answer = client
        .get_node(GetNodeRequest {
            device_id: node,
            read: None,
        })
        .await?;
    let Some(node) = answer.node else {
        return Err(Failure::local(
            palyra_client::Class::Internal,
            "the answer names no node",
            "palyra version",
        ));
    };
    let view = NodeView::from(node);
    out.one(&view, answer.read.into(), &view.facts())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_have_a_key() {
        assert_eq!(parse_label("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(parse_label("a="), Ok(("a".to_owned(), String::new())));
        assert!(parse_label("=b").is_err() && parse_label("a").is_err());
    }
}
