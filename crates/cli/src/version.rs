//! `palyra version` and `palyra completion`.

use std::time::Duration;

use clap::CommandFactory;
use clap_complete::Shell;
use palyra_proto::cluster::v1::StatusResponse;
use serde::Serialize;

use crate::args::Cli;
use crate::failure::Result;
use crate::output::note;
use crate::output::table::facts;
use crate::session::Global;

/// How long the replicas may take to tell their versions.
const ASK: Duration = Duration::from_secs(2);

#[derive(Serialize)]
struct Versions {
    version: &'static str,
    replicas: Vec<ReplicaVersion>,
}

#[derive(Serialize)]
struct ReplicaVersion {
    id: u64,
    name: String,
    version: String,
}

/// Tells the version of this program, and those of the replicas when a cluster can be asked.
pub(crate) async fn version(global: &Global) -> Result {
    let mut replicas = Vec::new();
    if let Ok(session) = global.open() {
        let status = match session.client.clone().with_timeout(ASK).status().await {
            Ok(status) => status,
            Err(error) => {
                note(&format!(
                    "the replicas' versions are not known: {}",
                    error.message
                ));
                StatusResponse::default()
            }
        };
        let live = status
            .replicas
            .into_iter()
            .filter(|replica| replica.status != "removed");
        replicas.extend(live.map(|replica| ReplicaVersion {
            id: replica.id,
            name: replica.name,
            version: replica.version,
        }));
        session.close().await;
    }
    let versions = Versions {
        version: env!("CARGO_PKG_VERSION"),
        replicas,
    };
    let mut text = format!("palyra {}\n", versions.version);
    let pairs: Vec<(&str, String)> = versions
        .replicas
        .iter()
        .map(|replica| (replica.name.as_str(), replica.version.clone()))
        .collect();
    text += &facts(&pairs);
    global.out().plain(&versions, &text)
}

/// Prints a completion script.
pub(crate) fn completion(global: &Global, shell: Shell) -> Result {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "palyra", &mut script);
    global.out().write(&String::from_utf8_lossy(&script))
}
