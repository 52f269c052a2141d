//! How the table of mutants is told: a line for each as it ends, then the table, or one JSON object.

use std::io::IsTerminal as _;

use anyhow::Result;
use serde_json::{Value, json};

use super::judge::{Fate, Judged};
use super::table::{Level, Mutant};
use crate::cli::Form;

/// Says on a terminal which one is under way.
pub(super) fn begin(form: Form, mutant: &Mutant) {
    if form == Form::Text && std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{} {} …", mutant.id, mutant.name);
    }
}

/// One has ended.
pub(super) fn one(form: Form, judged: &Judged) {
    if form == Form::Text {
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
        println!("{}", row(judged));
    }
}

fn row(judged: &Judged) -> String {
    let (mutant, unit) = (&judged.mutant, effort(judged));
    let caught = judged.caught_by().unwrap_or("-");
    format!(
        "{:<4} {:<30} {:<26} {:>12}  {}",
        mutant.id,
        mutant.name,
        caught,
        unit,
        judged.fate.as_str()
    )
}

/// Seeds, or seconds.
fn effort(judged: &Judged) -> String {
    match (judged.mutant.level, judged.tries) {
        (Level::Sim, 1) => "1 seed".to_owned(),
        (Level::Sim, seeds) => format!("{seeds} seeds"),
        (Level::Real, _) => format!("{:.0} s", judged.took.as_secs_f64()),
    }
}

/// The end: what survived, and the sum.
pub(super) fn all(form: Form, judged: &[Judged]) -> Result<()> {
    let count = |fate: &Fate| judged.iter().filter(|one| one.fate == *fate).count();
    let (killed, others, survived) = (
        count(&Fate::Killed),
        count(&Fate::ByAnother),
        count(&Fate::Survived),
    );
    if form == Form::Json {
        let mutants: Vec<Value> = judged.iter().map(as_json).collect();
        let sum = json!({
            "valid": killed == judged.len(),
            "killed": killed,
            "killed_by_another": others,
            "survived": survived,
            "mutants": mutants,
        });
        println!("{sum}");
        return Ok(());
    }
    for one in judged.iter().filter(|one| !one.is_killed()) {
        let mutant = &one.mutant;
        println!(
            "{} {}: {}; must be caught by {}",
            mutant.id,
            mutant.name,
            mutant.breaks,
            mutant.checks.join(" or ")
        );
        if let Some(replay) = &one.replay {
            let failed: Vec<String> = one
                .failed
                .iter()
                .map(|(name, count)| format!("{name} {count}"))
                .collect();
            println!("     failed instead: {}; {replay}", failed.join(", "));
        }
    }
    let word = if killed == judged.len() { "PASS" } else { "FAIL" };
    println!(
        "{word} mutants={} killed={killed} killed_by_another={others} survived={survived}",
        judged.len()
    );
    Ok(())
}

fn as_json(judged: &Judged) -> Value {
    let mutant = &judged.mutant;
    json!({
        "id": mutant.id,
        "name": mutant.name,
        "breaks": mutant.breaks,
        "level": mutant.level.as_str(),
        "workload": mutant.workload,
        "nemesis": mutant.nemesis,
        "checks": mutant.checks,
        "outcome": match judged.fate {
            Fate::Killed => "killed",
            Fate::ByAnother => "killed-by-another-check",
            Fate::Survived => "survived",
        },
        "caught_by": judged.caught_by(),
        "tries": judged.tries,
        "seed": judged.seed,
        "seconds": judged.took.as_secs_f64(),
        "failed": judged.failed,
        "replay": judged.replay,
    })
}

/// What `jepsen list mutants` prints.
#[must_use]
pub fn list(form: Form) -> String {
    let all = super::mutants();
    match form {
        Form::Json => Value::from(
            all.map(|mutant| {
                json!({
                    "id": mutant.id, "name": mutant.name, "breaks": mutant.breaks, "level": mutant.level.as_str(),
                    "workload": mutant.workload, "nemesis": mutant.nemesis, "checks": mutant.checks,
                })
            })
            .collect::<Vec<_>>(),
        )
        .to_string(),
        Form::Text => all
            .map(|mutant| {
                let level = mutant.level.as_str();
                let against = format!("{} x {}", mutant.workload, mutant.nemesis);
                format!("{:<4} {:<30} {level:<5} {against:<32} {}", mutant.id, mutant.name, mutant.breaks)
            })
            .collect::<Vec<_>>()
            .join("\n"),
    }
}
