//! A range of seeds: each in a process of its own, some of them twice, and the verdict over all.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::ops::ControlFlow;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use palyra_jepsen_check::{Check, Verdict, Violation};
use serde_json::json;

use crate::case::Case;
use crate::fork::{self, Ended};
use crate::judge;
use crate::named;
use crate::reach::Reached;
use crate::{Args, HARNESS, Output, simulate};

/// Of so many seeds one is run again by a new process.
const REPLAY_EVERY: u64 = 50;

/// What a range of seeds came to.
pub(crate) struct Many<'a> {
    args: &'a Args,
    case: &'a dyn Fn(u64) -> Case,
    total: Total,
    reached: Reached,
    failures: Vec<Failure>,
    /// Lines of the seeds that are to be replayed.
    lines: BTreeMap<u64, Ended>,
}

/// Sums over all seeds.
#[derive(Default)]
struct Total {
    passed: u64,
    ok: u64,
    fail: u64,
    info: u64,
    faults: u64,
    messages: u64,
    virtual_ms: u64,
    replayed: u64,
    differing: u64,
}

/// A seed that failed.
struct Failure {
    seed: u64,
    what: String,
    replay: String,
}

/// How long it took.
struct Cost {
    wall: Duration,
    processor: Duration,
}

impl<'a> Many<'a> {
    /// Nothing has run yet.
    pub(crate) fn new(args: &'a Args, case: &'a dyn Fn(u64) -> Case) -> Self {
        Many {
            args,
            case,
            total: Total::default(),
            reached: Reached::default(),
            failures: Vec::new(),
            lines: BTreeMap::new(),
        }
    }

    /// Runs a range of seeds, prints each failure with the line that replays it, and the verdict.
    pub(crate) fn run(mut self, from: u64, to: u64) -> ExitCode {
        let started = Instant::now();
        let count = to - from + 1;
        let (args, case) = (self.args, self.case);
        let run = |seed| simulate(&case(seed), false);
        let mut done = 0;
        fork::for_each(from..=to, args.jobs, run, |seed, how| {
            done += 1;
            progress(done, count);
            let failed = !how.is_good();
            self.take(seed, how);
            if failed && args.first {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        let cost = Cost {
            wall: started.elapsed(),
            processor: fork::processor_time(),
        };
        self.replay();
        self.tell(from, to, &cost)
    }

    /// Takes note of how a seed ended.
    fn take(&mut self, seed: u64, ended: Ended) {
        if seed.is_multiple_of(REPLAY_EVERY) {
            self.lines.insert(seed, ended.clone());
        }
        let what = match ended {
            Ended::Said(line) => {
                self.count(&line);
                if line.starts_with("ok") {
                    self.total.passed += 1;
                    return;
                }
                line.trim_start_matches("FAIL ").to_owned()
            }
            Ended::Died(how) => format!("its process died: {how}"),
            Ended::Hung => "it hung: some loop awaits nothing".to_owned(),
        };
        self.fail(seed, what);
    }

    fn fail(&mut self, seed: u64, what: String) {
        let replay = (self.case)(seed).replay();
        if self.args.output == Output::Text {
            println!("FAIL seed {seed}: {what}\n     replay: {replay}");
        }
        self.failures.push(Failure { seed, what, replay });
    }

    fn count(&mut self, line: &str) {
        let number = |name| field(line, name).parse().unwrap_or(0);
        self.total.ok += number("ok");
        self.total.fail += number("fail");
        self.total.info += number("info");
        self.total.faults += number("faults");
        self.total.messages += number("messages");
        self.total.virtual_ms += number("virtual_ms");
        self.reached.add(field(line, "reached"));
    }

    /// Runs some of the seeds again, each by a new process of this program.
    fn replay(&mut self) {
        let case = self.case;
        let mut differing = Vec::new();
        let again = |seed| replayed(&case(seed));
        fork::for_each(
            self.lines.keys().copied(),
            self.args.jobs,
            again,
            |seed, ended| {
                if ended != self.lines[&seed] {
                    differing.push((seed, ended));
                }
                ControlFlow::Continue(())
            },
        );
        self.total.replayed = self.lines.len() as u64;
        self.total.differing = differing.len() as u64;
        for (seed, ended) in differing {
            let what = format!("it does not replay: {:?}, then {ended:?}", self.lines[&seed]);
            self.fail(seed, what);
        }
    }

    /// Prints the verdict and gives the exit code.
    fn tell(self, from: u64, to: u64, cost: &Cost) -> ExitCode {
        let missing = self.reached.missing(self.args.workload, to - from + 1);
        let verdict = self.verdict(&missing);
        if let Some(path) = &self.args.junit
            && let Err(error) = std::fs::write(path, junit(&verdict))
        {
            eprintln!(
                "cannot write {}: {error}; name a file that can be written",
                path.display()
            );
            return ExitCode::from(HARNESS);
        }
        let (word, code) = match verdict.valid() {
            Some(true) => ("PASS", 0),
            Some(false) => ("FAIL", 1),
            None => ("UNKNOWN", 2),
        };
        match self.args.output {
            Output::Json => println!("{}", self.json(from, to, cost, &verdict)),
            Output::Text => {
                println!(
                    "reached {}",
                    self.reached.encode().replace(',', ", ").replace(':', " ")
                );
                if !missing.is_empty() {
                    println!("NOT REACHED by any seed: {}", missing.join(", "));
                }
                println!("{}", self.line(word, (from, to), cost, &verdict));
            }
        }
        ExitCode::from(code)
    }

    /// Each check by its name; of what was violated the first line.
    fn verdict(&self, missing: &[&str]) -> Verdict {
        let mut by_name: BTreeMap<String, Vec<Violation>> = BTreeMap::new();
        for failure in &self.failures {
            let violation = Violation {
                what: format!(
                    "seed {}: {}; replay: {}",
                    failure.seed, failure.what, failure.replay
                ),
                time: failure.seed,
                events: Vec::new(),
            };
            by_name
                .entry(named::check_of(&failure.what).to_owned())
                .or_default()
                .push(violation);
        }
        let shared = judge::names(self.args.workload);
        let mut checks: Vec<Check> = CHECKS
            .iter()
            .chain(&shared)
            .filter(|name| !by_name.contains_key(**name))
            .map(|name| Check::of(*name, Vec::new()))
            .collect();
        checks.extend(
            by_name
                .into_iter()
                .map(|(name, violations)| Check::of(name, violations)),
        );
        if !missing.is_empty() {
            let why = format!("no seed reached {}", missing.join(", "));
            checks.push(Check::unknown("sim.coverage", why));
        }
        Verdict { checks }
    }

    fn line(&self, word: &str, (from, to): (u64, u64), cost: &Cost, verdict: &Verdict) -> String {
        let total = &self.total;
        let held = verdict.checks.iter().filter(|check| check.holds()).count();
        let mut line = format!(
            "{word} {} seeds={from}..{to} passed={} ops={} ok={} fail={} info={} faults={} leaders={} \
             checks={held}/{} replayed={}/{} virtual={:.1}h rate={}/min cpu={}/min",
            self.args.workload.name(),
            total.passed,
            total.ok + total.fail + total.info,
            total.ok,
            total.fail,
            total.info,
            total.faults,
            self.reached.count("leader-changed"),
            verdict.checks.len(),
            total.replayed - total.differing,
            total.replayed,
            total.virtual_ms as f64 / 3_600_000.0,
            self.rate(cost.wall),
            self.rate(cost.processor),
        );
        if let Some(first) = self.failures.iter().min_by_key(|failure| failure.seed) {
            line += &format!(
                " first: seed {}: {} replay: {}",
                first.seed,
                brief(&first.what),
                first.replay
            );
        }
        line
    }

    /// Seeds in a minute of this time.
    fn rate(&self, time: Duration) -> u128 {
        let seeds = u128::from(self.total.passed) + self.failures.len() as u128;
        seeds * 60_000 / time.as_millis().max(1)
    }

    fn json(&self, from: u64, to: u64, cost: &Cost, verdict: &Verdict) -> serde_json::Value {
        let total = &self.total;
        let failures = self
            .failures
            .iter()
            .map(|failure| json!({"seed": failure.seed, "what": failure.what, "replay": failure.replay}));
        json!({
            "valid": verdict.valid(),
            "workload": self.args.workload.name(),
            "nemesis": self.args.only.as_deref().unwrap_or("all"),
            "seed": format!("{from}..{to}"),
            "ops": {"ok": total.ok, "fail": total.fail, "info": total.info},
            "faults": total.faults,
            "checks": verdict.checks,
            "failures": failures.collect::<Vec<_>>(),
            "replayed": total.replayed,
            "differed": total.differing,
            "messages": total.messages,
            "virtual_ms": total.virtual_ms,
            "seeds_per_minute": {"wall": self.rate(cost.wall) as u64, "processor": self.rate(cost.processor) as u64},
            "reached": self.reached.counts(),
        })
    }
}

/// What the simulation itself checks in every run; a violation begins with the name of its check.
const CHECKS: &[&str] = &[
    "raft.leader",
    "raft.log",
    "raft.committed",
    "raft.quorum",
    "raft.complete",
    "raft.durable",
    "replica.progress",
    "replica.same-state",
    "replica.invariants",
    "replica.freshness",
    "replica.lives",
    "replica.starts",
    "replica.panics",
    "cluster.heals",
    "journal.acknowledged",
    "registry.real-time",
    "registry.values",
    "dispatch.none-vanish",
    "dispatch.results-kept",
    "dispatch.not-early",
    "dispatch.epochs-rise",
    "revocation.enforced",
];

/// A problem without the figures of its seed.
fn brief(what: &str) -> &str {
    what.split(" seed=").next().unwrap_or(what)
}

/// JUnit XML of a verdict: a test case for each check.
fn junit(verdict: &Verdict) -> String {
    let escape = |text: &str| {
        text.replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;")
            .replace('"', "&quot;")
    };
    let failures = verdict.checks.iter().filter(|check| !check.holds()).count();
    let mut out = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <testsuite name=\"jepsen-sim\" tests=\"{}\" failures=\"{failures}\">\n",
        verdict.checks.len()
    );
    for check in &verdict.checks {
        let what = match &check.outcome {
            palyra_jepsen_check::Outcome::Valid => None,
            palyra_jepsen_check::Outcome::Invalid { violations } => Some(
                violations
                    .iter()
                    .map(|one| one.what.clone())
                    .collect::<Vec<_>>()
                    .join("\n"),
            ),
            palyra_jepsen_check::Outcome::Unknown { why } => Some(why.clone()),
        };
        let body = what.map_or_else(String::new, |what| {
            format!("<failure message=\"{}\"/>", escape(&what))
        });
        out += &format!("  <testcase name=\"{}\">{body}</testcase>\n", escape(&check.name));
    }
    out + "</testsuite>\n"
}

/// How far it is, on a terminal.
fn progress(done: u64, of: u64) {
    if std::io::stderr().is_terminal() && (done.is_multiple_of(10) || done == of) {
        eprint!("\r{done} of {of} seeds");
        if done == of {
            eprintln!();
        }
    }
}

/// The last line that a new process of this program prints for a run. A fork would not do: it begins with the
/// addresses and the statics of its parent.
fn replayed(case: &Case) -> String {
    let said = std::env::current_exe().and_then(|program| {
        Command::new(program)
            .args(["--seed", &case.seed.to_string()])
            .args(case.options())
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

/// The value of `name=value` in a seed's line.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        .unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_s_line_is_read_back() {
        let line = "ok seed=7 digest=00ff ok=12 messages=90 reached=kill:2,power:1";
        assert_eq!(field(line, "ok"), "12");
        assert_eq!(field(line, "reached"), "kill:2,power:1");
        assert_eq!(field(line, "absent"), "");
        assert_eq!(
            brief("r1 is wrong (2 problems) seed=7 ok=1"),
            "r1 is wrong (2 problems)"
        );
    }

    #[test]
    fn a_verdict_is_xml_that_can_be_read() {
        let violation = Violation {
            what: "a <b>".to_owned(),
            time: 1,
            events: Vec::new(),
        };
        let verdict = Verdict {
            checks: vec![
                Check::of("raft.log", vec![violation]),
                Check::of("sim.run", Vec::new()),
            ],
        };
        let xml = junit(&verdict);
        assert!(
            xml.contains("tests=\"2\" failures=\"1\"") && xml.contains("a &lt;b&gt;"),
            "{xml}"
        );
    }
}
