//! What is made of a run: the workload's checks, what must hold of any cluster, and whether enough was tested.

use std::collections::BTreeMap;
use std::path::Path;

use palyra_jepsen_check::export::{self, Title};
use palyra_jepsen_check::{Check, Event, Facts, History, Kind, Outcome, Process, Verdict, Violation};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::floors;
use crate::store::Kept;
use crate::windows::{self, Gaps};

/// The results of a run; `results.json`, and with `-o json` what is printed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    /// Whether it was as it should be; nothing when nobody knows.
    pub valid: Option<bool>,
    /// The workload.
    pub workload: String,
    /// Nemeses.
    pub nemesis: Vec<String>,
    /// The seed.
    pub seed: u64,
    /// How long clients worked, in seconds.
    pub seconds: f64,
    /// Operations.
    pub ops: Counts,
    /// Faults.
    pub faults: Faults,
    /// How many leaders there were.
    pub leaders: usize,
    /// The longest time in which no change succeeded, in milliseconds.
    pub gap_max_ms: u64,
    /// Such times by kind of fault.
    pub gaps: BTreeMap<String, Gaps>,
    /// The longest time by which the harness itself was late, in milliseconds.
    pub late_ms: u64,
    /// Whether the machine was too busy for times to mean much.
    pub starved: bool,
    /// All checks.
    pub checks: Vec<Check>,
    /// Where the run is kept.
    pub store: String,
    /// The command that applies the same faults again.
    pub replay: String,
}

/// Operations by outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// All.
    pub all: u64,
    /// That took effect.
    pub ok: u64,
    /// That had none.
    pub fail: u64,
    /// That nobody knows of.
    pub info: u64,
}

/// Faults by outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faults {
    /// With evidence.
    pub installed: u64,
    /// Not begun.
    pub skipped: u64,
    /// Begun, without evidence.
    pub indeterminate: u64,
}

/// The harness was late by more than this: elections may have come from that alone.
const STARVED_MS: u64 = 200;

/// Judges a run that is kept in `store`.
#[must_use]
pub fn judge(kept: &Kept, history: &History, store: &str) -> Results {
    let checks = checks(kept, history);
    let verdict = Verdict { checks };
    let faults = count_faults(kept);
    let spans = floors::phases(history);
    let seconds = match (
        spans.get(&crate::run::Phase::Before),
        spans.get(&crate::run::Phase::After),
    ) {
        (Some(before), Some(after)) => (after.to - before.from) as f64 / 1e9,
        _ => 0.0,
    };
    Results {
        valid: verdict.valid(),
        workload: kept.settings.workload.clone(),
        nemesis: kept.nemeses.clone(),
        seed: kept.settings.seed,
        seconds,
        ops: count(history),
        faults,
        leaders: history.faults().filter(|event| event.f == "leader").count(),
        gap_max_ms: windows::longest(history),
        gaps: windows::by_fault(history, &kept.course.faults),
        late_ms: kept.course.late_ms,
        starved: kept.course.late_ms > STARVED_MS,
        checks: verdict.checks,
        store: store.to_owned(),
        replay: replay(kept, store),
    }
}

fn checks(kept: &Kept, history: &History) -> Vec<Check> {
    let mut checks = workload_checks(kept, history);
    checks.push(one_leader_per_term(history));
    checks.push(no_crash(kept));
    checks.push(converges(kept, history));
    checks.extend(ends_on_disk_errors(kept, history));
    let kinds: Vec<&str> = kept.floors.iter().map(String::as_str).collect();
    checks.push(floors::operations(history, &kinds));
    if !kept.nemeses.is_empty() {
        checks.push(floors::faults(&kept.nemeses, &kept.course.faults));
    }
    checks.extend(floors::leaders(history, &kept.course.faults));
    if kept.course.broken_off {
        checks.push(Check::unknown(
            "coverage.whole",
            "the run was broken off before its end",
        ));
    }
    checks
}

/// The same operations and the same faults; how threads run is nobody's to repeat.
fn replay(kept: &Kept, store: &str) -> String {
    let asked = &kept.settings;
    let mut line = format!(
        "jepsen run --workload {} --time {}ms --seed {} --replicas {} --rate {} --concurrency {} \
         --plan {store}/plan.jsonl",
        asked.workload,
        asked.time.as_millis(),
        asked.seed,
        asked.replicas,
        asked.rate,
        asked.concurrency
    );
    for (name, value, usual) in [("fabric", &asked.fabric, "auto"), ("disk", &asked.disk, "auto")] {
        if value != usual {
            line += &format!(" --{name} {value}");
        }
    }
    line
}

/// The checks of `palyra-jepsen-check`. A history that breaks its rules never comes here.
fn workload_checks(kept: &Kept, history: &History) -> Vec<Check> {
    let facts = Facts {
        setting: kept.setting.clone(),
        ..kept.facts.clone()
    };
    let workload = &kept.settings.workload;
    match palyra_jepsen_check::judge::judge(workload, history, &facts) {
        Ok(verdict) => verdict.checks,
        Err(why) => vec![Check::unknown(format!("{workload}.judged"), why.to_string())],
    }
}

fn count(history: &History) -> Counts {
    let mut counts = Counts::default();
    for op in history.ops() {
        counts.all += 1;
        match op.kind() {
            Kind::Ok => counts.ok += 1,
            Kind::Fail => counts.fail += 1,
            Kind::Info | Kind::Invoke => counts.info += 1,
        }
    }
    counts
}

fn count_faults(kept: &Kept) -> Faults {
    use crate::nemesis::Outcome as What;
    let mut faults = Faults::default();
    for done in &kept.course.faults {
        match done.outcome {
            What::Installed(_) => faults.installed += 1,
            What::Skipped(_) => faults.skipped += 1,
            What::Indeterminate(_) => faults.indeterminate += 1,
        }
    }
    faults
}

/// Nobody says that it leads in a term in which another has said so.
fn one_leader_per_term(history: &History) -> Check {
    let mut first: BTreeMap<u64, &Event> = BTreeMap::new();
    let mut violations = Vec::new();
    for event in history.faults().filter(|event| event.f == "leader") {
        let Some(term) = event.value["term"].as_u64() else {
            continue;
        };
        let before = *first.entry(term).or_insert(event);
        if before.value["replica"] != event.value["replica"] {
            let name = |event: &Event| event.value["replica"].as_str().unwrap_or("?").to_owned();
            violations.push(Violation {
                what: format!(
                    "{} leads in term {term}, in which {} has led",
                    name(event),
                    name(before)
                ),
                time: event.time,
                events: vec![before.index, event.index],
            });
        }
    }
    Check::of("cluster.one-leader-per-term", violations).fact("terms", first.len())
}

/// No process ends but by a fault that may end it.
fn no_crash(kept: &Kept) -> Check {
    let crashed = kept.ended.iter().filter(|end| !end.allowed);
    let violations = crashed.map(|end| Violation {
        what: format!("r{} ended by itself: {}", end.replica, end.how),
        time: end.time,
        events: Vec::new(),
    });
    Check::of("cluster.no-crash", violations.collect()).fact("ended", kept.ended.len())
}

/// After a write or a sync has failed nobody knows what is on the disk: a process must not go on.
fn ends_on_disk_errors(kept: &Kept, history: &History) -> Option<Check> {
    let asked = kept
        .nemeses
        .iter()
        .any(|name| name.starts_with("disk:") && name.contains("eio"));
    let survived = history
        .faults()
        .filter(|event| event.f == crate::nemesis::disk::SURVIVED);
    let violations = survived.map(|event| {
        let word = |key: &str| event.value[key].as_str().unwrap_or("?").to_owned();
        Violation {
            what: format!("{} went on after {} had met it", word("replica"), word("nemesis")),
            time: event.time,
            events: vec![event.index],
        }
    });
    asked.then(|| Check::of("cluster.ends-on-disk-errors", violations.collect()))
}

/// After everything was made whole all replicas come to agree.
fn converges(kept: &Kept, history: &History) -> Check {
    let end = history.events.last();
    let violations = kept.course.diverged.iter().map(|why| Violation {
        what: format!("after all faults had ended: {why}"),
        time: end.map_or(0, |event| event.time),
        events: Vec::new(),
    });
    Check::of("cluster.converges", violations.collect())
}

impl Results {
    /// Writes the results and all that is made of them for others to read: see `palyra_jepsen_check::export`.
    ///
    /// # Errors
    /// The first file that can't be written.
    pub fn export(&self, folder: &Path, history: &History) -> anyhow::Result<()> {
        let title = Title {
            workload: self.workload.clone(),
            nemesis: self.nemesis.join(","),
            seed: self.seed,
            replay: self.replay.clone(),
        };
        let verdict = Verdict {
            checks: self.checks.clone(),
        };
        let results = serde_json::to_value(self)?;
        Ok(export::write_all(folder, &title, history, &verdict, &results)?)
    }

    /// What the process ends with.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self.valid {
            Some(true) => 0,
            Some(false) => 1,
            None => 2,
        }
    }

    /// The last line, for people and for scripts.
    #[must_use]
    pub fn line(&self) -> String {
        let word = match self.valid {
            Some(true) => "PASS",
            Some(false) => "FAIL",
            None => "UNKNOWN",
        };
        let held = self.checks.iter().filter(|check| check.holds()).count();
        let nemesis = if self.nemesis.is_empty() {
            "none".to_owned()
        } else {
            self.nemesis.join(",")
        };
        let mut line = format!(
            "{word} {} nemesis={nemesis} seed={} {:.0}s ops={} ok={} fail={} info={} faults={} leaders={} \
             gap_max={:.1}s checks={held}/{} store={}",
            self.workload,
            self.seed,
            self.seconds,
            self.ops.all,
            self.ops.ok,
            self.ops.fail,
            self.ops.info,
            self.faults.installed,
            self.leaders,
            self.gap_max_ms as f64 / 1e3,
            self.checks.len(),
            self.store,
        );
        let verdict = Verdict {
            checks: self.checks.clone(),
        };
        if let Some((check, first)) = verdict.first() {
            let at = first.time as f64 / 1e9;
            line += &format!(" first: {check}: {} t={at:.3}s", first.what);
            line += &format!(" replay: {}", self.replay);
        } else if let Some(why) = self.checks.iter().find_map(unknown) {
            line += &format!(" why: {why}");
        }
        line
    }
}

fn unknown(check: &Check) -> Option<String> {
    match &check.outcome {
        Outcome::Unknown { why } => Some(format!("{}: {why}", check.name)),
        _ => None,
    }
}

/// What the nemesis and the clients did, for a line of progress.
#[must_use]
pub fn glance(events: &[Event]) -> serde_json::Value {
    let of = |kind: Kind| {
        let clients = events
            .iter()
            .filter(|event| matches!(event.process, Process::Client(_)));
        clients.filter(|event| event.kind == kind).count()
    };
    json!({"ok": of(Kind::Ok), "fail": of(Kind::Fail), "info": of(Kind::Info)})
}
