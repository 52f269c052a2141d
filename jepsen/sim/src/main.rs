//! The deterministic simulation of a whole cluster: one to five replicas with the real state machine, the real Raft
//! and the real encodings, on simulated time, disks, network and clocks. One seed is one run, and the same
//! run each time.
//!
//! `jepsen-sim --seeds 1..400` runs many, each in a process of its own; every fiftieth is run again by a new process of
//! this program, and both must agree. `jepsen-sim --seed 132 --trace` replays one and prints every event;
//! `jepsen-sim --shrink 132` looks for a smaller run that fails in the same way.

mod agents;
mod breaks;
mod bus;
mod case;
mod chance;
mod change;
mod clients;
mod cluster;
mod disk;
mod enrol;
mod faults;
mod fleet;
mod fork;
mod held;
mod history;
mod judge;
mod ledger;
mod line;
mod load;
mod many;
mod memory;
mod named;
mod nemesis;
mod oracle;
mod papers;
mod planted;
mod raft;
mod reach;
mod readers;
mod revocation;
mod run;
mod runs;
mod setup;
mod shrink;
mod tape;
mod watchers;
mod workers;
mod world;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use breaks::Break;
use case::Case;
use faults::Kind;
use load::Workload;
use many::Many;
use setup::Setup;
use world::World;

/// Runs simulated clusters under faults and checks what they did.
///
/// Exit codes: 0 good, 1 a property was violated or a seed did not replay, 2 a hundred seeds or more did not reach what
/// they must, 254 usage, 255 the harness itself failed.
#[derive(Parser)]
#[command(name = "jepsen-sim", version)]
struct Args {
    /// Seeds to run, both ends included: 1..400
    #[arg(long, value_name = "FROM..TO", conflicts_with_all = ["seed", "shrink"])]
    seeds: Option<String>,
    /// One seed to replay
    #[arg(long, value_name = "N", conflicts_with = "shrink")]
    seed: Option<u64>,
    /// A seed that fails: look for a smaller run that fails in the same way
    #[arg(long, value_name = "N")]
    shrink: Option<u64>,
    /// Print every event of the replayed seed
    #[arg(long, requires = "seed", conflicts_with_all = ["seeds", "shrink"])]
    trace: bool,
    /// Virtual time under faults, in place of what each seed draws: 15s, 800ms
    #[arg(long, value_name = "TIME", value_parser = case::duration)]
    horizon: Option<Duration>,
    /// Of the faults that a seed uses, only these: kill,power,halves or none
    #[arg(long, value_name = "FAULTS")]
    only: Option<String>,
    /// Seeds at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Stop at the first seed that fails
    #[arg(long, requires = "seeds", conflicts_with_all = ["seed", "shrink"])]
    first: bool,
    /// What clients do
    #[arg(long, value_name = "NAME", default_value = "mix")]
    workload: Workload,
    /// Break the product on purpose: the run has to find it
    #[arg(long = "break", value_name = "NAME")]
    broken: Option<Break>,
    /// Plant a bug in the product: the run has to find it. Names: `jepsen list mutants`
    #[arg(long, value_name = "NAME")]
    planted: Option<String>,
    /// How the verdict is printed
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Output,
    /// Write the verdict as JUnit XML to this file too
    #[arg(long, value_name = "FILE", requires = "seeds", conflicts_with_all = ["seed", "shrink"])]
    junit: Option<PathBuf>,
}

/// How a verdict is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people; the verdict is the last line
    Text,
    /// One object
    Json,
}

// Its own tests run on many threads, and test the allocator besides.
#[cfg(not(test))]
#[global_allocator]
static MEMORY: memory::Memory = memory::Memory;

/// Wrong use of the command line.
const USAGE: u8 = 254;
/// The harness itself failed.
const HARNESS: u8 = 255;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let code = if error.use_stderr() { USAGE } else { 0 };
            // Nobody to tell when standard error is gone.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    if let Some(code) = planted::plant(args.planted.as_deref()) {
        return code;
    }
    let only = match args.only.as_deref().map(case::kinds).transpose() {
        Ok(only) => only,
        Err(error) => return usage(&format!("--only: {error}")),
    };
    fork::warm_up();
    let case = |seed| case_of(&args, only.clone(), seed);
    if let Some(seed) = args.seed {
        let line = simulate(&case(seed), args.trace);
        println!("{line}");
        return ExitCode::from(u8::from(!line.starts_with("ok")));
    }
    if let Some(seed) = args.shrink {
        return shrink::run(&case(seed), args.jobs);
    }
    match args.seeds.as_deref().map(range) {
        Some(Some((from, to))) => Many::new(&args, &case).run(from, to),
        Some(None) => usage("--seeds wants FROM..TO, both ends included: --seeds 1..400"),
        None => usage("say --seeds FROM..TO, --seed N or --shrink N"),
    }
}

fn usage(what: &str) -> ExitCode {
    eprintln!("{what}; jepsen-sim --help tells the rest");
    ExitCode::from(USAGE)
}

fn case_of(args: &Args, only: Option<BTreeSet<Kind>>, seed: u64) -> Case {
    Case {
        seed,
        workload: args.workload,
        only,
        horizon: args.horizon,
        broken: args.broken,
    }
}

fn range(text: &str) -> Option<(u64, u64)> {
    let (from, to) = text.split_once("..")?;
    let (from, to) = (from.parse().ok()?, to.trim_start_matches('=').parse().ok()?);
    (from <= to).then_some((from, to))
}

/// One run, in this process: the line that tells how it ended.
fn simulate(case: &Case, trace: bool) -> String {
    chance::seed(case.seed);
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return format!("FAIL no runtime: {error}"),
    };
    // To the end: without it, the world's clock is the wall's.
    let _entered = runtime.enter();
    let setup = Setup::draw(case);
    let world: &'static World = Box::leak(Box::new(World::new(trace, case.broken, &setup)));
    palyra_platform::install(world);
    std::panic::set_hook(Box::new(move |info| world.panicked(info.to_string())));
    let local = tokio::task::LocalSet::new();
    let ran = catch_unwind(AssertUnwindSafe(|| {
        local.block_on(&runtime, run::whole(world, setup, case.workload))
    }));
    let Ok(cluster) = ran else {
        return format!("FAIL the simulation itself panicked: {:?}", world.panics());
    };
    let (ok, fail, info) = cluster.history.borrow().tally();
    let facts = format!(
        "seed={} digest={:016x} virtual_ms={} ok={ok} fail={fail} info={info} faults={} messages={} reached={}",
        case.seed,
        world.digest(),
        world.elapsed_ms(),
        world.strikes(),
        cluster.bus.messages(),
        world.reached().encode()
    );
    let problems = cluster.problems();
    // One line, whatever a panic said.
    match problems.first().map(|first| first.replace('\n', " ")) {
        None => format!("ok {facts}"),
        Some(first) => format!(
            "FAIL {first} ({} problems) checks={} {facts}",
            problems.len(),
            named::checks(&problems)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_both_ends() {
        assert_eq!(range("1..400"), Some((1, 400)));
        assert_eq!(range("1..=400"), Some((1, 400)));
        assert_eq!(range("5..4"), None);
        assert_eq!(range("5"), None);
    }
}
