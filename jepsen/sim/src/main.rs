//! The deterministic simulation of a whole cluster: three replicas with the real state machine, the real Raft
//! and the real encodings, on simulated time, disks, network and clocks. One seed is one run, and the same
//! run each time.
//!
//! `jepsen-sim --seeds 1..400` runs many, each in a process of its own; every fiftieth twice, and both must agree.
//! `jepsen-sim --seed 132 --trace` replays one and prints every event.

mod bus;
mod chance;
mod fleet;
mod fork;
mod history;
mod oracle;
mod run;
mod world;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use fork::Ended;
use world::World;

/// Runs simulated clusters under faults and checks what they did.
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
}

/// Exit codes: 0 good, 1 a property was violated, 254 usage.
fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(seed) = args.seed {
        let line = simulate(seed, args.trace);
        println!("{line}");
        return ExitCode::from(u8::from(!line.starts_with("ok")));
    }
    let Some((from, to)) = args.seeds.as_deref().and_then(range) else {
        eprintln!("usage: jepsen-sim --seeds FROM..TO, or --seed N [--trace]");
        return ExitCode::from(254);
    };
    many(from, to, args.jobs)
}

fn range(text: &str) -> Option<(u64, u64)> {
    let (from, to) = text.split_once("..")?;
    let (from, to) = (from.parse().ok()?, to.trim_start_matches('=').parse().ok()?);
    (from <= to).then_some((from, to))
}

/// Runs a range of seeds, prints each failure with the line that replays it, and a summary.
fn many(from: u64, to: u64, jobs: usize) -> ExitCode {
    let (mut good, mut bad, mut answered, mut messages) = (0u64, 0u64, 0u64, 0u64);
    let started = Instant::now();
    fork::for_each(
        from..=to,
        jobs,
        |seed| simulate(seed, false),
        |seed, ended| {
            let mut fail = |what: &str| {
                bad += 1;
                println!("FAIL seed {seed}: {what}\n     replay: jepsen-sim --seed {seed} --trace");
            };
            match ended {
                Ended::Said(line) if line.starts_with("ok") => {
                    good += 1;
                    answered += number(&line, "answered=");
                    messages += number(&line, "messages=");
                }
                Ended::Said(line) => fail(&line),
                Ended::Died(how) => fail(&format!("its process died: {how}")),
                Ended::Hung => fail("it hung"),
            }
        },
    );
    let differing = twice(from, to, jobs);
    let rate = (good + bad) as u128 * 60_000 / started.elapsed().as_millis().max(1);
    println!("{good} passed, {bad} failed");
    println!(
        "answered operations {answered}, messages {messages}, {rate} seeds a minute, replays that differed {differing}"
    );
    ExitCode::from(u8::from(bad + differing > 0))
}

/// Runs every fiftieth seed two more times; the digests of all events must agree.
fn twice(from: u64, to: u64, jobs: usize) -> u64 {
    let mut differing = 0;
    for seed in (from..=to).filter(|seed| seed % 50 == 0) {
        let mut lines = Vec::new();
        for _ in 0..2 {
            fork::for_each(
                std::iter::once(seed),
                jobs,
                |seed| simulate(seed, false),
                |_, ended| lines.push(ended),
            );
        }
        if lines[0] != lines[1] {
            differing += 1;
            println!(
                "FAIL seed {seed} does not replay:\n     {:?}\n     {:?}",
                lines[0], lines[1]
            );
        }
    }
    differing
}

fn number(line: &str, name: &str) -> u64 {
    line.split(name)
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(0)
}

/// One seed, in this process: the line that tells how it ended.
fn simulate(seed: u64, trace: bool) -> String {
    chance::seed(seed);
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return format!("FAIL no runtime: {error}"),
    };
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let world: &'static World = Box::leak(Box::new(World::new(trace)));
        palyra_platform::install(world);
        std::panic::set_hook(Box::new(move |info| world.panicked(info.to_string())));
        let (cluster, answered) = run::whole(world).await;
        let problems = cluster.problems();
        let facts = format!(
            "seed={seed} digest={:016x} virtual_ms={} answered={answered} messages={}",
            world.digest(),
            world.elapsed_ms(),
            cluster.messages()
        );
        match problems.first() {
            None => format!("ok {facts}"),
            Some(first) => format!("FAIL {facts} problems={} first: {first}", problems.len()),
        }
    })
}
