//! The command line of `palyrad`, and how the process ends.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::config::Config;
use crate::exit::{Code, Failure};
use crate::{join, logging, offline, startup};

/// One replica of a Palyra cluster.
#[derive(Debug, Parser)]
#[command(name = "palyrad", version, about, disable_help_subcommand = true)]
struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Runs the replica of a data folder until it is told to stop (SIGTERM or SIGINT).
    Run(ConfigFile),
    /// Makes this machine a replica of a cluster, with a token of `palyra cluster join-token`.
    Join(JoinArgs),
    /// Checks a configuration and the files that it names, and says what is wrong.
    CheckConfig(ConfigFile),
    /// Checks the hash chain of the journal in the data folder of a replica that does not run.
    JournalVerify(JournalVerifyArgs),
    /// Prints the version.
    Version,
}

/// What `palyrad journal-verify` is told.
#[derive(Debug, Args)]
struct JournalVerifyArgs {
    /// The data folder, or a copy of it.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// `text`, or `json`: one object with `intact`, `rows`, `first`, `last`, `head`, or `broken_at` and
    /// `problem`.
    #[arg(short = 'o', long = "output", value_name = "FORMAT")]
    #[arg(default_value = "text", value_parser = ["text", "json"])]
    output: String,
}

#[derive(Debug, Args)]
struct ConfigFile {
    /// The configuration, `palyrad.toml` of a data folder.
    #[arg(long, value_name = "FILE", env = "PALYRAD_CONFIG")]
    config: PathBuf,
}

/// What `palyrad join` is told.
#[derive(Debug, Args)]
pub(crate) struct JoinArgs {
    /// The token itself. Others on this machine may see it while the command runs: prefer --token-file.
    #[arg(
        long,
        value_name = "TOKEN",
        conflicts_with = "token_file",
        required_unless_present = "token_file"
    )]
    pub(crate) token: Option<String>,
    /// A file that holds the token; `-` reads it from standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// The folder to make; it may exist if it is empty.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: PathBuf,
    /// The replica's name, as the token was made for.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: String,
    /// Address to listen on.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub(crate) listen_host: String,
    /// First of six ports: +1 nodes and operators, +2 enrolment, +4 replicas, +5 metrics.
    #[arg(long, value_name = "PORT", default_value_t = 7450)]
    pub(crate) base_port: u16,
    /// Host that others reach this replica at, when it is not the address it listens on.
    #[arg(long, value_name = "HOST")]
    pub(crate) advertise_host: Option<String>,
}

/// Reads the command line and does what it says.
#[must_use]
pub fn main() -> ExitCode {
    let command = Command::parse();
    // Whoever links a library that asks for a default gets the same provider as everything here.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let done = match command.verb {
        Verb::Run(file) => run(&file),
        Verb::Join(args) => with_runtime(|| join::join(args)),
        Verb::CheckConfig(file) => startup::check(&file.config),
        Verb::JournalVerify(args) => offline::verify_journal(&args.data_dir, args.output == "json"),
        Verb::Version => {
            println!("palyrad {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("palyrad: {failure}");
            failure.exit_code()
        }
    }
}

fn run(file: &ConfigFile) -> Result<(), Failure> {
    let config = Config::load(&file.config)?;
    logging::start(&config.log);
    if let Err(error) = palyra_fault::serve() {
        tracing::warn!(cause = %error, "failpoints are not served: PALYRA_FAILPOINTS names no place for a socket");
    }
    let database = startup::Database::default();
    let done = with_runtime(|| startup::run(config, &database));
    database.close();
    done
}

/// How long tasks may take to be dropped at the end; none does more than one step by then.
const LAST_TASKS: Duration = Duration::from_secs(2);

fn with_runtime<F>(work: impl FnOnce() -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.max(2))
        .thread_name("palyrad")
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Code::Internal, format!("the runtime does not start: {error}")))?;
    let done = runtime.block_on(work());
    // What is still running belongs to connections that were given their time; it is dropped before this returns.
    runtime.shutdown_timeout(LAST_TASKS);
    done
}
