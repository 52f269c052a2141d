//! The deterministic simulation of a whole cluster: three replicas with the real state machine, the real Raft
//! and the real encodings, on simulated time, disks, network and clocks. One seed is one run, and the same
//! run each time.
//!
//! `jepsen-sim --seeds 1..400` runs many, each in a process of its own; every fiftieth is run again by a new process of
//! this program, and both must agree. `jepsen-sim --seed 132 --trace` replays one and prints every event.

mod agents;
mod breaks;
mod bus;
mod chance;
mod change;
mod clients;
mod cluster;
mod disk;
mod enrol;
mod fleet;
mod fork;
mod history;
mod ledger;
mod line;
mod load;
mod named;
mod nemesis;
mod oracle;
mod papers;
mod planted;
mod reach;
mod revocation;
mod run;
mod runs;
mod workers;
mod world;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::{Parser, ValueEnum as _};

use breaks::Break;
use fork::Ended;
use load::Workload;
use reach::Reached;
use world::World;

/// Of so many seeds one is run again by a new process.
const REPLAY_EVERY: u64 = 50;

/// Runs simulated clusters under faults and checks what they did.
///
/// Exit codes: 0 good, 1 a property was violated or a seed did not replay, 2 a hundred seeds or more did not reach what
/// they must, 254 usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Seeds to run, both ends included: 1..400
    #[arg(long, value_name = "FROM..TO", conflicts_with = "seed")]
    seeds: Option<String>,
    /// One seed to replay
    #[arg(long)]
    seed: Option<u64>,
    /// Print every event of the replayed seed
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Seeds at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Stop at the first seed that fails
    #[arg(long, requires = "seeds")]
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
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(code) = planted::plant(args.planted.as_deref()) {
        return code;
    }
    if let Some(seed) = args.seed {
        let line = simulate(seed, args.trace, args.workload, args.broken);
        println!("{line}");
        return ExitCode::from(u8::from(!line.starts_with("ok")));
    }
    let Some((from, to)) = args.seeds.as_deref().and_then(range) else {
        eprintln!("usage: jepsen-sim --seeds FROM..TO, or --seed N [--trace]; --help tells the rest");
        return ExitCode::from(254);
    };
    Many::default().run(from, to, &args)
}

fn range(text: &str) -> Option<(u64, u64)> {
    let (from, to) = text.split_once("..")?;
    let (from, to) = (from.parse().ok()?, to.trim_start_matches('=').parse().ok()?);
    (from <= to).then_some((from, to))
}

/// What a range of seeds came to.
#[derive(Default)]
struct Many {
    good: u64,
    bad: u64,
    answered: u64,
    messages: u64,
    reached: Reached,
    /// Lines of the seeds that are to be replayed.
    lines: BTreeMap<u64, Ended>,
}

impl Many {
    /// Runs a range of seeds, prints each failure with the line that replays it, and a summary.
    fn run(mut self, from: u64, to: u64, args: &Args) -> ExitCode {
        let started = Instant::now();
        fork::for_each(
            from..=to,
            args.jobs,
            |seed| simulate(seed, false, args.workload, args.broken),
            |seed, ended| {
                let good = self.take(seed, ended, args);
                if good || !args.first {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            },
        );
        let rate = u128::from(self.good + self.bad) * 60_000 / started.elapsed().as_millis().max(1);
        let (replayed, differing) = self.replay(args);
        println!(
            "{} passed, {} failed, {replayed} replayed by another process, {differing} of them differed",
            self.good, self.bad
        );
        println!(
            "answered operations {}, messages {}, {rate} seeds a minute",
            self.answered, self.messages
        );
        println!(
            "reached {}",
            self.reached.encode().replace(',', ", ").replace(':', " ")
        );
        if self.bad + differing > 0 {
            return ExitCode::from(1);
        }
        let missing = self.reached.missing(args.workload, to - from + 1);
        if !missing.is_empty() {
            println!("NOT REACHED by any seed: {}", missing.join(", "));
            return ExitCode::from(2);
        }
        ExitCode::SUCCESS
    }

    /// Takes note of how a seed ended; true when that was well.
    fn take(&mut self, seed: u64, ended: Ended, args: &Args) -> bool {
        if seed.is_multiple_of(REPLAY_EVERY) {
            self.lines.insert(seed, ended.clone());
        }
        let what = match ended {
            Ended::Said(line) if line.starts_with("ok") => {
                self.good += 1;
                self.answered += field(&line, "answered").parse().unwrap_or(0);
                self.messages += field(&line, "messages").parse().unwrap_or(0);
                self.reached.add(field(&line, "reached"));
                return true;
            }
            Ended::Said(line) => line,
            Ended::Died(how) => format!("its process died: {how}"),
            Ended::Hung => "it hung".to_owned(),
        };
        self.bad += 1;
        let options = options(args.workload, args.broken).join(" ");
        println!("FAIL seed {seed}: {what}\n     replay: jepsen-sim --seed {seed} --trace {options}");
        false
    }

    /// Runs some of the seeds again, each by a new process of this program; says how many, and how many differed.
    fn replay(&self, args: &Args) -> (usize, u64) {
        let mut differing = 0;
        let again = |seed| replayed(seed, args.workload, args.broken);
        fork::for_each(self.lines.keys().copied(), args.jobs, again, |seed, ended| {
            if ended != self.lines[&seed] {
                differing += 1;
                println!(
                    "FAIL seed {seed} does not replay:\n     {:?}\n     {ended:?}",
                    self.lines[&seed]
                );
            }
            ControlFlow::Continue(())
        });
        (self.lines.len(), differing)
    }
}

/// The last line that a new process of this program prints for a seed. A fork would not do: it begins with the
/// addresses and the statics of its parent.
fn replayed(seed: u64, workload: Workload, broken: Option<Break>) -> String {
    let said = std::env::current_exe().and_then(|program| {
        Command::new(program)
            .args(["--seed", &seed.to_string()])
            .args(options(workload, broken))
            .output()
    });
    match said {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            text.lines().last().unwrap_or_default().to_owned()
        }
        Err(error) => format!("FAIL cannot be run again: {error}"),
    }
}

/// The options that a replay needs besides its seed.
fn options(workload: Workload, broken: Option<Break>) -> Vec<String> {
    let mut options = Vec::new();
    if workload != Workload::Mix {
        options.extend(["--workload".to_owned(), workload.name()]);
    }
    if let Some(name) = broken.and_then(|broken| broken.to_possible_value()) {
        options.extend(["--break".to_owned(), name.get_name().to_owned()]);
    }
    if let Some(name) = planted::name() {
        options.extend(["--planted".to_owned(), name]);
    }
    options
}

/// The value of `name=value` in a seed's line.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        .unwrap_or("")
}

/// One seed, in this process: the line that tells how it ended.
fn simulate(seed: u64, trace: bool, workload: Workload, broken: Option<Break>) -> String {
    chance::seed(seed);
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return format!("FAIL no runtime: {error}"),
    };
    palyra_pki::keys::sign_repeatably();
    // To the end: without it, the world's clock is the wall's.
    let _entered = runtime.enter();
    let world: &'static World = Box::leak(Box::new(World::new(trace, broken)));
    palyra_platform::install(world);
    std::panic::set_hook(Box::new(move |info| world.panicked(info.to_string())));
    let local = tokio::task::LocalSet::new();
    let ran = catch_unwind(AssertUnwindSafe(|| {
        local.block_on(&runtime, run::whole(world, workload))
    }));
    let Ok((cluster, answered)) = ran else {
        return format!("FAIL the simulation itself panicked: {:?}", world.panics());
    };
    let facts = format!(
        "seed={seed} digest={:016x} virtual_ms={} answered={answered} messages={} reached={}",
        world.digest(),
        world.elapsed_ms(),
        cluster.bus.messages(),
        world.reached().encode()
    );
    let problems = cluster.problems();
    match problems.first() {
        None => format!("ok {facts}"),
        // One line, whatever a panic said.
        Some(first) => format!(
            "FAIL {} ({} problems) checks={} {facts}",
            first.replace('\n', " "),
            problems.len(),
            named::checks(&problems)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_s_line_is_read_back() {
        let line = "ok seed=7 digest=00ff answered=12 messages=90 reached=kill:2,power:1";
        assert_eq!(field(line, "answered"), "12");
        assert_eq!(field(line, "reached"), "kill:2,power:1");
        assert_eq!(field(line, "absent"), "");
        assert_eq!(range("1..400"), Some((1, 400)));
        assert_eq!(range("5..4"), None);
        assert_eq!(
            options(Workload::Mix, Some(Break::LoseVote)),
            ["--break", "lose-vote"]
        );
        assert_eq!(options(Workload::Lease, None), ["--workload", "lease"]);
    }
}
