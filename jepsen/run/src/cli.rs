//! The command line of `jepsen`.
//!
//! Exit codes: 0 as it should be, 1 a property was violated, 2 nobody knows or too little was tested, 254 usage, 255
//! the harness failed.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands;
use crate::mutants::MutantsArgs;
use crate::scenario::Level;
use crate::target::Target;

/// Wrong usage.
pub const USAGE: u8 = 254;
/// The harness failed.
pub const BROKEN: u8 = 255;

/// Attacks a cluster of Palyra and says what it did wrong.
///
/// Jepsen-style: histories, faults, and checkers that say valid, violated or unknown. It is not Kyle Kingsbury's
/// Jepsen.
#[derive(Debug, Parser)]
#[command(name = "jepsen", version, after_help = AFTER)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER: &str = "Exit codes: 0 valid, 1 a property was violated, 2 unknown or too little tested, 254 usage, \
                     255 the harness failed.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what this machine can do, and why not what it can't
    Doctor(DoctorArgs),
    /// List workloads, nemeses, scenarios, mutants
    List(ListArgs),
    /// Run a workload on real processes under faults
    Run(Box<RunArgs>),
    /// Run the regression of a bug with a name
    Scenario(ScenarioArgs),
    /// Plant bugs in the product, one at a time: each must be caught by the check that is named with it
    Mutants(MutantsArgs),
    /// Simulate whole clusters, seed by seed: see jepsen sim --help
    Sim(SimArgs),
    /// Judge a run that is kept again, with today's checkers
    Check(CheckArgs),
    /// Show runs in a browser on this machine
    Serve(ServeArgs),
    /// What agents run in the workload dispatch: notes its begin and its end
    #[command(hide = true)]
    Effect {
        /// The file that it notes them in
        #[arg(long)]
        ledger: PathBuf,
    },
}

/// Form of what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// Lines for people.
    Text,
    /// One JSON object.
    Json,
}

/// When data folders are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Keep {
    /// After each run.
    Always,
    /// After one that did not pass.
    Fail,
}

/// What `jepsen run` takes.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// What clients do: see jepsen list workloads
    #[arg(long, short)]
    pub workload: String,
    /// What harms the cluster: see jepsen list nemeses; a group such as partition, usual for what the workload is made
    /// for, or all
    #[arg(long, short, value_delimiter = ',')]
    pub nemesis: Vec<String>,
    /// How long clients work: 60s, 5m
    #[arg(long, short, default_value = "60s", value_parser = duration)]
    pub time: Duration,
    /// Decides operations and faults; drawn when absent. It does not decide how threads run: --plan repeats faults,
    /// and only jepsen sim repeats everything
    #[arg(long, short)]
    pub seed: Option<u64>,
    /// Replicas
    #[arg(long, short, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=9))]
    pub replicas: u64,
    /// Operations a second, of all clients together
    #[arg(long, default_value_t = 150, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub rate: u64,
    /// Clients: a number, or 2n for two for each replica, which it is when absent, or what the workload needs if more
    #[arg(long, short)]
    pub concurrency: Option<String>,
    /// From one fault to the next, about
    #[arg(long, default_value = "5s", value_parser = duration)]
    pub nemesis_interval: Duration,
    /// Whom faults strike: one, minority, majority, all, leader, follower, r2; the nemesis's choice when absent
    #[arg(long)]
    pub target: Option<Target>,
    /// The network: bridge, tap, or auto for tap when a fault needs it
    #[arg(long, default_value = "auto")]
    pub fabric: String,
    /// Give each replica's clock since boot another beginning, up to a month apart
    #[arg(long)]
    pub boot_offsets: bool,
    /// Data folders: tmpfs, faultfs, dir, or auto for faultfs when a fault needs it
    #[arg(long, default_value = "auto")]
    pub disk: String,
    /// Folder of palyrad and palyra
    #[arg(long, env = "PALYRA_BIN")]
    pub binary: Option<PathBuf>,
    /// Folder of the same of an earlier release, for upgrade
    #[arg(long)]
    pub old_binary: Option<PathBuf>,
    /// Apply this plan instead of drawing one
    #[arg(long)]
    pub plan: Option<PathBuf>,
    /// When data folders are kept
    #[arg(long, value_enum, default_value_t = Keep::Fail)]
    pub keep: Keep,
    /// Where runs are kept
    #[arg(long, default_value = "jepsen/store")]
    pub store: PathBuf,
    /// The name that the run is kept under; the workload's when absent
    #[arg(long)]
    pub name: Option<String>,
    /// Form of the answer
    #[arg(long, short, value_enum, default_value_t = Form::Text)]
    pub output: Form,
}

/// What `jepsen scenario` takes.
#[derive(Clone, Debug, Args)]
pub struct ScenarioArgs {
    /// Their names, see jepsen list scenarios; files that end in .toml; or all
    #[arg(required = true)]
    pub names: Vec<String>,
    /// Tell what they are about, and run nothing
    #[arg(long)]
    pub show: bool,
    /// Only their stages of this level
    #[arg(long, value_enum)]
    pub level: Option<Level>,
    /// Folder of palyrad and palyra
    #[arg(long, env = "PALYRA_BIN")]
    pub binary: Option<PathBuf>,
    /// Where runs are kept
    #[arg(long, default_value = "jepsen/store")]
    pub store: PathBuf,
    /// Form of the answer
    #[arg(long, short, value_enum, default_value_t = Form::Text)]
    pub output: Form,
}

/// What `jepsen doctor` takes.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Folder of palyrad and palyra
    #[arg(long, env = "PALYRA_BIN")]
    pub binary: Option<PathBuf>,
    /// Form of the answer
    #[arg(long, short, value_enum, default_value_t = Form::Text)]
    pub output: Form,
}

/// What can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Listed {
    /// What clients do.
    Workloads,
    /// What harms the cluster.
    Nemeses,
    /// Bugs with a name.
    Scenarios,
    /// Bugs that can be planted.
    Mutants,
}

/// What `jepsen list` takes.
#[derive(Clone, Debug, Args)]
pub struct ListArgs {
    /// Of what
    #[arg(value_enum)]
    pub what: Listed,
    /// Form of the answer
    #[arg(long, short, value_enum, default_value_t = Form::Text)]
    pub output: Form,
}

/// What `jepsen sim` takes: whatever `jepsen-sim` does.
#[derive(Clone, Debug, Args)]
#[command(disable_help_flag = true)]
pub struct SimArgs {
    /// Arguments of jepsen-sim
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<std::ffi::OsString>,
}

/// What `jepsen check` takes.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// Folder of the run
    pub folder: PathBuf,
    /// Only checks with this in their names
    #[arg(long)]
    pub only: Option<String>,
    /// Form of the answer
    #[arg(long, short, value_enum, default_value_t = Form::Text)]
    pub output: Form,
}

/// What `jepsen serve` takes.
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// Where runs are kept
    #[arg(default_value = "jepsen/store")]
    pub folder: PathBuf,
    /// Port on 127.0.0.1; 0 takes a free one
    #[arg(long, default_value_t = 7450)]
    pub port: u16,
}

/// Reads `90s`, `5m`, `500ms`, `2h`.
///
/// # Errors
/// When it is no duration.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration; write 500ms, 90s, 5m or 2h");
    let digits = text
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let ms = match unit {
        "ms" => 1,
        "s" | "" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    let total = number
        .checked_mul(ms)
        .filter(|total| (1..=7 * 24 * 3_600_000).contains(total));
    total
        .map(Duration::from_millis)
        .ok_or_else(|| format!("{text:?} is not between a millisecond and a week"))
}

/// Runs the program. Answers its exit code.
#[must_use]
pub fn main() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { USAGE } else { 0 };
            drop(error.print());
            return code;
        }
    };
    let done = match cli.command {
        Command::Doctor(args) => commands::doctor::main(&args),
        Command::List(args) => commands::list::main(&args),
        Command::Run(args) => commands::run::main(&args),
        Command::Scenario(args) => commands::scenario::main(&args),
        Command::Mutants(args) => crate::mutants::main(&args),
        Command::Sim(args) => commands::sim::main(&args),
        Command::Check(args) => commands::check::main(&args),
        Command::Serve(args) => commands::serve::main(&args),
        Command::Effect { ledger } => crate::effect::main(&ledger).map(|()| 0),
    };
    done.unwrap_or_else(|error| {
        eprintln!("jepsen: {error:#}");
        if error.is::<Usage>() { USAGE } else { BROKEN }
    })
}

/// An error that is the caller's.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_are_read() {
        for (text, ms) in [
            ("500ms", 500),
            ("90s", 90_000),
            ("5m", 300_000),
            ("2h", 7_200_000),
            ("7", 7_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for wrong in [
            "",
            "s",
            "5 s",
            "0s",
            "-1s",
            "1d",
            "99999h",
            "99999999999999999999s",
        ] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
