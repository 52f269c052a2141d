//! `palyra`: the command line for operators, and for the owners of nodes.
//!
//! What lives here: arguments, printing, exit codes. What never does: rules of the control plane, retries
//! (the client's), and the node agent (a library).
//! Invariants: the answer goes to standard output, everything else to standard error; exit codes follow typed
//! causes.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod approval;
mod args;
mod ca;
mod cluster;
mod context;
mod device;
mod failure;
mod grant;
mod job;
mod journal;
mod lease;
mod node;
mod operator;
mod output;
mod pages;
mod pairing;
mod run;
mod session;
mod version;
mod watch;
mod worker;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::failure::{Failure, Result};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Worker(worker::Verb::Warden(warden)) = cli.command {
        return palyra_node::worker::warden::main(warden.init);
    }
    let format = cli.global.output;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let done = match runtime {
        Ok(runtime) => {
            let done = runtime.block_on(run(cli));
            // Connections that nobody waits for any more must not hold up the prompt.
            runtime.shutdown_background();
            done
        }
        Err(error) => Err(Failure::from(error)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.tell(format);
            ExitCode::from(failure.exit_code())
        }
    }
}

async fn run(cli: Cli) -> Result {
    let global = cli.global;
    match cli.command {
        Command::Cluster(verb) => cluster::run(&global, verb).await,
        Command::Ca(verb) => ca::run(&global, verb).await,
        Command::Pairing(verb) => pairing::run(&global, verb).await,
        Command::Node(verb) => node::run(&global, verb).await,
        Command::Device(verb) => device::run(&global, verb).await,
        Command::Job(verb) => job::run(&global, verb).await,
        Command::Worker(verb) => worker::run(&global, verb).await,
        Command::Run(verb) => run::run(&global, verb).await,
        Command::Lease(verb) => lease::run(&global, verb).await,
        Command::Approval(verb) => approval::run(&global, verb).await,
        Command::Grant(verb) => grant::run(&global, verb).await,
        Command::Journal(verb) => journal::run(&global, verb).await,
        Command::Operator(verb) => operator::run(&global, verb).await,
        Command::Context(verb) => context::run(&global, verb),
        Command::Whoami => operator::whoami(&global).await,
        Command::Version => version::version(&global).await,
        Command::Completion { shell } => version::completion(&global, shell),
    }
}
