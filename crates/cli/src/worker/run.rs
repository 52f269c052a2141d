//! `palyra worker run`: this machine as a worker.
//!
//! What never lives here: what the worker does (`palyra_node`). Invariant: a warden is started before any
//! thread of this process exists: namespaces and Landlock are of the thread that makes them.

use std::path::PathBuf;

use clap::Args;
use palyra_node::home::Home;
use palyra_node::run::WorkerConfig;
use palyra_node::worker;
use serde::Serialize;

use super::policy;
use crate::failure::Result;
use crate::node::host;
use crate::output::{Format, table};
use crate::session::Global;

/// `palyra worker run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    node: host::Run,
    /// The worker's description; without it [worker] of node.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the digests that this worker would attest, and end; with `-o toml` as a policy that admits it
    #[arg(long)]
    digests: bool,
}

/// `palyra worker warden`.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Warden {
    /// As the first process of the sandbox
    #[arg(long)]
    pub(crate) init: bool,
}

/// What a worker on this machine would attest.
#[derive(Debug, Serialize)]
struct DigestsView {
    evidence: String,
    image: String,
    build: String,
    artifact: String,
    supervisor: String,
    tools: Vec<String>,
}

/// Runs the worker until it is told to stop.
pub(crate) async fn run(global: &Global, run: Run) -> Result {
    if run.digests {
        return digests(global, &run);
    }
    let file = run.config.map(|path| std::path::absolute(&path).unwrap_or(path));
    host::run(global, run.node, Some(WorkerConfig { file, warden: None })).await
}

fn digests(global: &Global, run: &Run) -> Result {
    let config = match &run.config {
        Some(file) => worker::config::Config::read(file)?,
        None => worker::configuration(&Home::open(&run.node.dir())?, None)?,
    };
    let digests = worker::tools::measure(&config)?.digests;
    let level = match config.evidence {
        worker::config::Level::SelfReported => "self-reported",
        worker::config::Level::Supervisor => "supervisor",
        worker::config::Level::Hardware => "hardware",
    };
    let view = DigestsView {
        evidence: level.to_owned(),
        image: hex::encode(digests.image),
        build: hex::encode(digests.build),
        artifact: hex::encode(digests.artifact),
        supervisor: digests.supervisor.map(hex::encode).unwrap_or_default(),
        tools: config
            .tools
            .iter()
            .map(|tool| format!("{}@{}", tool.name, tool.authority))
            .collect(),
    };
    if global.out().format == Format::Toml {
        let names = |tool: &'_ worker::config::Tool| (tool.name.clone(), tool.authority.clone());
        let tools: Vec<(String, String)> = config.tools.iter().map(names).collect();
        return global.out().write(&policy::that_admits(&policy::Measured {
            image: &view.image,
            build: &view.build,
            artifact: &view.artifact,
            supervisor: &view.supervisor,
            evidence: &view.evidence,
            tools: tools
                .iter()
                .map(|(name, by)| (name.as_str(), by.as_str()))
                .collect(),
            sdk_protocol: config.sdk_protocol,
            wit_abi: &config.wit_abi,
            slots: config.slots,
        })?);
    }
    let facts = [
        ("evidence", view.evidence.clone()),
        ("image", view.image.clone()),
        ("build", view.build.clone()),
        ("artifact", view.artifact.clone()),
        ("supervisor", view.supervisor.clone()),
        ("tools", view.tools.join(" ")),
    ];
    global.out().plain(&view, &table::facts(&facts))
}
