//! `palyra-bench`: load on real replicas, and the promises of the design measured.
//!
//! What lives here: arguments and exit codes. One module per workload; `cluster` starts real `palyrad` processes,
//! `sim` plays nodes, `report` says what was found. Invariants: what is measured is measured from outside, as
//! operators, nodes and the kernel see it; exit code 0 when every promise was kept, 14 when one was not, 1 when the
//! run itself failed.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cluster;
mod failover;
mod feed;
mod fleet;
mod lease;
mod load;
mod netns;
mod presence;
mod report;
mod revoke;
mod sim;
mod spread;
mod usage;
mod versus;
mod write;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use crate::report::{Format, Report};

/// As `palyrad` has it: what a client costs is on both sides of a comparison.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The exit code of a check that found problems, as `palyra` and `palyrad` have it.
const BROKEN: u8 = 14;

const EXAMPLES: &str = "\
Examples:
  palyra-bench fleet --nodes 10000 --dir /var/tmp/palyra-fleet
  palyra-bench -o json fleet --nodes 200 --steady 20
  palyra-bench failover --kills 50 --transfers 50
  palyra-bench revoke --count 100 --partitioned 20
  palyra-bench feed --hops 200
  palyra-bench write --against etcd --clients 1,64,256 --seconds 10 --rounds 3
  palyra-bench lease --time 60s --workers 30 --slots 4 --runs 3000 --kill --pause

Exit codes:
  0 every promise was kept   1 the run failed   2 usage   14 a promise was not kept";

/// Loads a cluster of real replicas and says which promises it kept.
#[derive(Debug, Parser)]
#[command(name = "palyra-bench", version, about, after_help = EXAMPLES, disable_help_subcommand = true)]
struct Cli {
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value = "table", global = true)]
    output: Format,
    /// Leave the cluster's folder, with its logs, when the run ends
    #[arg(long, global = true)]
    keep: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Sessions of many nodes: cost while nothing happens, and what a lost replica or leader does to them
    Fleet(fleet::Args),
    /// Real agents under steady dispatch through kills of replicas and leader transfers
    Failover(failover::Args),
    /// Revocations: from the command to the last socket, and what a certificate is worth after the answer
    Revoke(revoke::Args),
    /// A reader of the feed that hops between replicas under load, compared with the journal
    Feed(feed::Args),
    /// Replicated changes of a node's record, beside etcd's puts
    Write(write::Args),
    /// Competing leases through kills and pauses of replicas and of workers: who held what, and under which fence
    Lease(lease::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Revoke(args) = &cli.command
        && args.partitioned > 0
        && let Err(error) = netns::enter()
    {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let done = runtime.block_on(until_interrupted(cli));
        // Nodes and connections that nobody waits for must not hold up the end.
        runtime.shutdown_background();
        done
    });
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn until_interrupted(cli: Cli) -> Result<ExitCode> {
    let format = cli.output;
    let report = tokio::select! {
        report = run(cli) => report?,
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
    };
    print!("{}", report.render(format));
    Ok(if report.kept() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(BROKEN)
    })
}

async fn run(cli: Cli) -> Result<Report> {
    let keep = Keep(cli.keep);
    match cli.command {
        Command::Fleet(args) => Box::pin(fleet::run(args, keep)).await,
        Command::Failover(args) => Box::pin(failover::run(args, keep)).await,
        Command::Revoke(args) => Box::pin(revoke::run(args, keep)).await,
        Command::Feed(args) => Box::pin(feed::run(args, keep)).await,
        Command::Write(args) => Box::pin(write::run(args, keep)).await,
        Command::Lease(args) => Box::pin(lease::run(args, keep)).await,
    }
}

/// Whether folders that a run makes for itself stay.
#[derive(Debug, Clone, Copy)]
struct Keep(bool);

impl Keep {
    /// Ends a cluster as the user wants it.
    async fn end(self, mut cluster: cluster::Cluster) -> Result<()> {
        if self.0 {
            let folder: PathBuf = cluster.keep();
            say(&format!("the cluster's folder stays: {}", folder.display()));
        }
        cluster.stop().await
    }
}

/// Tells the person who waits how far it is; standard output is the answer's.
fn say(text: &str) {
    eprintln!("{text}");
}
