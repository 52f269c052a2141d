//! `jepsen check`: a stored history, judged again with today's checkers.

use anyhow::{Context, Result};
use palyra_jepsen_check::{History, Verdict};

use super::run::tell_checks;
use crate::cli::{CheckArgs, Form, Usage};
use crate::{judge, store};

/// Judges it.
///
/// # Errors
/// When the folder is none of a run, or its history breaks its rules.
pub fn main(args: &CheckArgs) -> Result<u8> {
    let kept = store::read(&args.folder).map_err(|error| Usage(format!("{error:#}")))?;
    let history = History::load(&args.folder.join("history.jsonl"))?;
    let problems = history.problems();
    if let Some(first) = problems.first() {
        anyhow::bail!(
            "this history breaks its own rules ({} places), so nothing can be said of it: {first}",
            problems.len()
        );
    }
    let folder = std::path::absolute(&args.folder)?;
    let mut results = judge::judge(&kept, &history, &folder.display().to_string());
    if let Some(only) = &args.only {
        let names: Vec<String> = results.checks.iter().map(|check| check.name.clone()).collect();
        results.checks.retain(|check| check.name.contains(only.as_str()));
        if results.checks.is_empty() {
            let why = format!(
                "--only {only}: no check has this in its name; there are {}",
                names.join(", ")
            );
            return Err(Usage(why).into());
        }
        let checks = results.checks.clone();
        results.valid = Verdict { checks }.valid();
    } else {
        results.export(&folder, &history).context("the new results")?;
    }
    match args.output {
        Form::Json => println!("{}", serde_json::to_string(&results)?),
        Form::Text => {
            tell_checks(&results);
            println!("{}", results.line());
        }
    }
    Ok(results.exit_code())
}
