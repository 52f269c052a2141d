//! Palyra beside a peer: the same load on both, on one machine, in one run, one after the other and again.
//!
//! What lives here: rounds and what they come to. `drive` makes the load, `etcd` is the peer, `machine` measures what
//! the machine itself allows. What never lives here: what one operation is (that is the workload's, such as
//! [`crate::write`]). Invariants: both sides run at the same time on the same disk with TLS everywhere and answer
//! nothing before a quorum has it on disk; rounds alternate, so that what else the machine does strikes both;
//! figures are medians over rounds, and the spread of the ratio is told.

pub(crate) mod drive;
pub(crate) mod etcd;
pub(crate) mod machine;
mod plot;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use crate::report::Report;
use crate::say;
use crate::spread::Spread;

/// How long and how often.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Shape {
    /// Clients, each with one operation at a time; several numbers make one comparison each
    #[arg(long, default_value = "64", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) clients: Vec<u32>,
    /// TLS connections that the clients share
    #[arg(long, default_value = "64", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) connections: u32,
    /// Seconds of a round
    #[arg(long, default_value = "10", value_parser = clap::value_parser!(u64).range(1..=3_600))]
    pub(crate) seconds: u64,
    /// Seconds before each round that don't count
    #[arg(long, default_value = "2", value_parser = clap::value_parser!(u64).range(0..=3_600))]
    pub(crate) warm_up: u64,
    /// Rounds of each side
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) rounds: u32,
    /// Operations a second of all clients together, by a schedule that waits for nobody; as fast as answers come when
    /// absent
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) rate: Option<u32>,
    /// Draw latency against load into this SVG file; give several numbers of clients
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
}

impl Shape {
    /// The time of a round, and of what comes before it.
    pub(crate) fn times(&self) -> (Duration, Duration) {
        (
            Duration::from_secs(self.warm_up),
            Duration::from_secs(self.seconds),
        )
    }

    /// Draws what was asked for.
    pub(crate) fn draw(&self, workload: &str, compared: &[Compared]) -> Result<()> {
        match &self.plot {
            Some(path) => plot::draw(path, workload, compared),
            None => Ok(()),
        }
    }

    /// Connections for so many clients.
    pub(crate) fn connections_of(&self, clients: u32) -> u32 {
        self.connections.min(clients)
    }
}

/// What one round of one side came to.
#[derive(Debug, Clone)]
pub(crate) struct Round {
    /// Operations that succeeded.
    pub(crate) ops: u64,
    /// Operations that did not.
    pub(crate) failed: u64,
    /// The first failure.
    pub(crate) why: Option<String>,
    /// How long it took.
    pub(crate) time: Duration,
    /// Of those that succeeded.
    pub(crate) spread: Spread,
}

impl Round {
    fn ops_per_s(&self) -> f64 {
        float(self.ops) / self.time.as_secs_f64().max(f64::EPSILON)
    }

    fn quantile_us(&self, quantile: f64) -> f64 {
        self.spread.quantile_ms(quantile).unwrap_or(0.0) * 1_000.0
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of a run are exact in an f64")]
fn float(count: u64) -> f64 {
    count as f64
}

/// Rounds of one side.
#[derive(Debug, Clone, Default)]
pub(crate) struct Side(Vec<Round>);

impl Side {
    pub(crate) fn add(&mut self, round: Round) {
        self.0.push(round);
    }

    fn median(&self, of: impl Fn(&Round) -> f64) -> f64 {
        median(self.0.iter().map(of).collect())
    }

    /// The medians over rounds.
    pub(crate) fn figures(&self) -> Figures {
        Figures {
            ops_per_s: self.median(Round::ops_per_s),
            p50_us: self.median(|round| round.quantile_us(0.5)),
            p99_us: self.median(|round| round.quantile_us(0.99)),
        }
    }

    fn failed(&self) -> u64 {
        self.0.iter().map(|round| round.failed).sum()
    }

    fn to_json(&self) -> Value {
        let mut figures = self.figures().to_json();
        let rounds: Vec<f64> = self.0.iter().map(|round| rounded(round.ops_per_s())).collect();
        figures["rounds"] = json!(self.0.len());
        figures["each_ops_per_s"] = json!(rounds);
        figures["failed"] = json!(self.failed());
        figures
    }
}

/// Medians of a side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figures {
    pub(crate) ops_per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

impl Figures {
    fn to_json(self) -> Value {
        json!({
            "ops_per_s": rounded(self.ops_per_s),
            "p50_us": rounded(self.p50_us),
            "p99_us": rounded(self.p99_us),
        })
    }
}

/// One comparison: this many clients, on both sides.
#[derive(Debug)]
pub(crate) struct Compared {
    pub(crate) clients: u32,
    pub(crate) ours: Side,
    pub(crate) peer: Option<Side>,
}

/// What is wanted of a comparison: at least so many times the peer's rate, at most such a part of its p99.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    pub(crate) rate: f64,
    pub(crate) p99: f64,
}

const COLUMNS: [&str; 9] = [
    "clients",
    "side",
    "ops_per_s",
    "p50_us",
    "p99_us",
    "failed",
    "ratio_ops",
    "ratio_p50",
    "ratio_p99",
];

impl Compared {
    /// Puts rows into the report, and whether the target is met. Answers the object that says it all.
    fn tell(&self, report: &mut Report, workload: &str, target: Target) -> Value {
        let ours = self.ours.figures();
        let mut object = json!({
            "workload": workload, "clients": self.clients, "ours": self.ours.to_json(),
        });
        self.row(
            report,
            "palyra",
            &self.ours,
            [Value::Null, Value::Null, Value::Null],
        );
        if let Some(peer) = &self.peer {
            let theirs = peer.figures();
            let ratio = Figures {
                ops_per_s: ours.ops_per_s / theirs.ops_per_s,
                p50_us: ours.p50_us / theirs.p50_us,
                p99_us: ours.p99_us / theirs.p99_us,
            };
            object["peer"] = peer.to_json();
            object["ratio"] = json!({
                "ops_per_s": hundredths(ratio.ops_per_s),
                "p50_us": hundredths(ratio.p50_us),
                "p99_us": hundredths(ratio.p99_us),
            });
            let (low, high) = self.spread_of_ratio(peer);
            object["ratio"]["ops_per_s_low"] = json!(hundredths(low));
            object["ratio"]["ops_per_s_high"] = json!(hundredths(high));
            let cells = [ratio.ops_per_s, ratio.p50_us, ratio.p99_us].map(|ratio| json!(hundredths(ratio)));
            self.row(report, "etcd", peer, cells);
            report.promise(
                &format!(
                    "{workload}, {} clients: at least {} times the peer's rate",
                    self.clients, target.rate
                ),
                ratio.ops_per_s >= target.rate,
                format!("{:.2}, from {low:.2} to {high:.2}", ratio.ops_per_s),
            );
            report.promise(
                &format!(
                    "{workload}, {} clients: p99 at most {} of the peer's",
                    self.clients, target.p99
                ),
                ratio.p99_us <= target.p99,
                format!("{:.2}", ratio.p99_us),
            );
        }
        object
    }

    fn row(&self, report: &mut Report, side: &str, of: &Side, ratios: [Value; 3]) {
        let figures = of.figures();
        let mut cells = vec![
            json!(self.clients),
            json!(side),
            json!(rounded(figures.ops_per_s)),
            json!(rounded(figures.p50_us)),
            json!(rounded(figures.p99_us)),
            json!(of.failed()),
        ];
        cells.extend(ratios);
        report.row("compared", &COLUMNS, cells);
    }

    /// The lowest and the highest ratio of neighbouring rounds.
    fn spread_of_ratio(&self, peer: &Side) -> (f64, f64) {
        let pairs = self.ours.0.iter().zip(&peer.0);
        let ratios = pairs.map(|(ours, theirs)| ours.ops_per_s() / theirs.ops_per_s());
        ratios.fold((f64::INFINITY, 0.0), |(low, high), ratio| {
            (f64::min(low, ratio), f64::max(high, ratio))
        })
    }
}

/// Puts comparisons into the report: one is the object itself, several are a list.
pub(crate) fn tell_all(report: &mut Report, compared: &[Compared], workload: &str, target: Target) {
    let mut objects: Vec<Value> = compared
        .iter()
        .map(|one| one.tell(report, workload, target))
        .collect();
    match (objects.len(), objects.pop()) {
        (1, Some(Value::Object(only))) => only
            .into_iter()
            .for_each(|(name, value)| report.fact(&name, value)),
        (_, last) => {
            objects.extend(last);
            report.fact("comparisons", objects);
        }
    }
}

/// Tells of rounds that had failures: a rate of failures is no rate.
pub(crate) fn tell_round(side: &str, round: &Round) -> Result<()> {
    say(&format!(
        "{side}: {:.0} operations a second, p50 {:.0} us, p99 {:.0} us",
        round.ops_per_s(),
        round.quantile_us(0.5),
        round.quantile_us(0.99)
    ));
    if let Some(why) = &round.why {
        say(&format!("{side}: {} failed, the first: {why}", round.failed));
    }
    anyhow::ensure!(round.ops > 0, "{side} did nothing in a round");
    Ok(())
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    match all.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => all[odd / 2],
        even => f64::midpoint(all[even / 2 - 1], all[even / 2]),
    }
}

fn rounded(value: f64) -> f64 {
    value.round()
}

fn hundredths(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(ops: u64, ms: u64) -> Round {
        Round {
            ops,
            failed: 0,
            why: None,
            time: Duration::from_secs(1),
            spread: [Duration::from_millis(ms)].into_iter().collect(),
        }
    }

    #[test]
    fn ratios_are_of_medians_and_their_spread_is_of_neighbours() {
        let compared = Compared {
            clients: 4,
            ours: Side(vec![round(300, 1), round(100, 1), round(900, 1)]),
            peer: Some(Side(vec![round(100, 4), round(100, 4), round(100, 4)])),
        };
        let mut report = Report::new("write");
        tell_all(&mut report, &[compared], "write", Target { rate: 3.0, p99: 0.5 });
        let object: Value = serde_json::from_str(&report.render(crate::report::Format::Json)).unwrap();
        assert_eq!(object["clients"], 4);
        assert_eq!(object["ratio"]["ops_per_s"], 3.0);
        assert_eq!(object["ratio"]["ops_per_s_low"], 1.0);
        assert_eq!(object["ratio"]["ops_per_s_high"], 9.0);
        assert_eq!(object["ratio"]["p99_us"], 0.25);
        assert!(report.kept());
    }

    #[test]
    fn a_target_that_is_missed_is_a_broken_promise() {
        let compared = Compared {
            clients: 1,
            ours: Side(vec![round(299, 3)]),
            peer: Some(Side(vec![round(100, 4)])),
        };
        let mut report = Report::new("write");
        tell_all(&mut report, &[compared], "write", Target { rate: 3.0, p99: 0.5 });
        assert!(!report.kept());
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(Vec::new()), 0.0);
    }
}
