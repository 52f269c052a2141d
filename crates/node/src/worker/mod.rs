//! The worker: a node that runs other people's work, under leases, in sandboxes.
//!
//! ```text
//! control plane ── session ── Desk (what is held and owed) ── one task a lease ── warden ── sandbox ── the tool
//! ```
//!
//! What lives here: the worker's configuration ([`config`]), what it says of itself ([`attest`]), the leases
//! it holds (`desk`, `lease`), their records on disk (`store`), and the processes that run them ([`warden`],
//! [`supervise`]).
//! What never does: the session itself (see `session`), the decision who gets a lease (the control plane's).
//!
//! Invariants: nothing is started before the control plane confirmed, after the offer was received, that the
//! lease is live; what was attested is what runs, byte by byte; a process of a lease is dead before the lease
//! can be another's, whatever happens to this process; nothing is reported clean that was not looked at.

pub mod config;
pub mod execute;
pub mod place;
pub mod spec;
pub mod supervise;
pub mod tools;
pub mod warden;

mod attest;
mod cgroup;
pub(crate) mod desk;
mod folder;
mod init;
mod inputs;
mod lease;
mod mounts;
mod proof;
mod sandbox;
mod store;
mod timing;

use std::path::Path;
use std::sync::{Arc, Mutex};

use tokio::sync::mpsc;

use crate::home::NodeConfig;
use crate::output::Output;
use crate::run::WorkerConfig;
use crate::{Error, Home, Kind, Result};

pub use tools::Digests;

/// What of the configuration is in use: a file of its own, or `[worker]` of `node.toml`.
///
/// Errors: neither is there, or it is wrong.
pub fn configuration(home: &Home, file: Option<&Path>) -> Result<config::Config> {
    let found = match file {
        Some(file) => Some(config::Config::read(file)?),
        None => home.config()?.worker,
    };
    found.ok_or_else(|| no_worker(home))
}

fn no_worker(home: &Home) -> Error {
    let message = format!(
        "{} has no [worker], and no file was given",
        home.dir().join("node.toml").display()
    );
    let next =
        "describe the worker (docs/workers.md has an example), then: palyra worker run --config worker.toml";
    Error::new(Kind::Usage, "N1001", message, next)
}

/// The worker that this node is, if it is one. What an earlier life left is cleaned before this returns.
pub(crate) fn desk_of(
    home: &Home,
    owners: &NodeConfig,
    asked: Option<&WorkerConfig>,
    device_id: &str,
) -> Result<Option<desk::Desk>> {
    let file = asked.and_then(|asked| asked.file.as_deref());
    let config = match file {
        Some(file) => config::Config::read(file)?,
        None => match (&owners.worker, asked) {
            (Some(config), _) => config.clone(),
            (None, Some(_)) => return Err(no_worker(home)),
            (None, None) => return Ok(None),
        },
    };
    let program = asked.and_then(|asked| asked.warden.clone());
    let program = program.unwrap_or_else(supervise::Program::this);
    open(home.dir(), config, device_id, Box::new(Wardens(program))).map(Some)
}

/// Opens a worker's table below a folder.
fn open(
    home: &Path,
    config: config::Config,
    device_id: &str,
    runner: Box<dyn lease::Runner>,
) -> Result<desk::Desk> {
    let measured = tools::measure(&config)?;
    let provider = attest::provider(&config)?;
    let digests = &measured.digests;
    tracing::info!(
        image = hex::encode(digests.image),
        build = hex::encode(digests.build),
        artifact = hex::encode(digests.artifact),
        tools = config.tools.len(),
        slots = config.slots,
        "this node is a worker"
    );
    let (said, heard) = mpsc::unbounded_channel();
    let shared = lease::Shared {
        config,
        measured: Mutex::new(measured),
        store: store::Store::open(home)?,
        base: home.join("worker/leases"),
        device_id: device_id.to_owned(),
        runner,
        said,
    };
    desk::Desk::open(Arc::new(shared), heard, provider)
}

/// Starts a warden for each lease.
struct Wardens(supervise::Program);

impl lease::Runner for Wardens {
    fn run<'a>(
        &'a self,
        spec: &'a spec::Spec,
        control: &'a mut execute::Control,
        output: &'a Output,
    ) -> futures::future::BoxFuture<'a, std::io::Result<execute::Ended>> {
        Box::pin(execute::execute(&self.0, spec, control, |piece| {
            output.write(piece)
        }))
    }
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;
