//! Mutants in real processes: `jepsen run` with the bug planted in every `palyrad`, until its check fails.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::process::Command;

use super::MutantsArgs;
use super::build::Planted;
use super::judge::{Judged, Watch};
use super::table::{self, Mutant};

/// Runs it up to `--tries` times.
pub(super) async fn run(mutant: &Mutant, programs: &Planted, args: &MutantsArgs) -> Result<Judged> {
    let Some(folder) = &programs.real else {
        bail!("palyrad with planted bugs was not looked for");
    };
    let mut watch = Watch::new(*mutant);
    for seed in 1..=args.tries {
        let own = std::env::current_exe().context("where is this program?")?;
        let mut command = Command::new(own);
        command.args(["run", "--workload", mutant.workload, "--nemesis", mutant.nemesis]);
        command.args(["--seed", &seed.to_string(), "--output", "json"]);
        command.args(["--time", &format!("{}ms", args.time.as_millis())]);
        command.args(["--name", &format!("mutant-{}", mutant.id)]);
        command.args(mutant.options).arg("--binary").arg(folder);
        if mutant.name != table::BLIND_REAL {
            command.env("PALYRA_PLANTED", mutant.name);
        }
        let output = command
            .kill_on_drop(true)
            .output()
            .await
            .context("jepsen run does not start")?;
        watch.tried(seed);
        let said = String::from_utf8_lossy(&output.stdout);
        let result = said
            .lines()
            .rev()
            .find_map(|line| serde_json::from_str::<Value>(line).ok());
        let failed = result.as_ref().map(failed_checks).unwrap_or_default();
        match output.status.code() {
            Some(0) => {}
            Some(1) => {
                let failed: Vec<&str> = failed.iter().map(String::as_str).collect();
                if watch.failed(seed, &failed, &replay(mutant, seed, args)) {
                    break;
                }
            }
            Some(2) => {
                watch.refused();
                if mutant.name == table::BLIND_REAL {
                    break;
                }
            }
            _ => bail!(
                "jepsen run failed with {} planted: {} {}",
                mutant.name,
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            ),
        }
    }
    Ok(watch.end())
}

fn replay(mutant: &Mutant, seed: u64, args: &MutantsArgs) -> String {
    let options = mutant
        .options
        .iter()
        .map(|word| format!(" {word}"))
        .collect::<String>();
    format!(
        "PALYRA_PLANTED={} jepsen run --workload {} --nemesis {} --time {}s --seed {seed}{options}",
        mutant.name,
        mutant.workload,
        mutant.nemesis,
        args.time.as_secs()
    )
}

/// Names of the checks that a result says are violated.
fn failed_checks(result: &Value) -> Vec<String> {
    let checks = result
        .get("checks")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let violated = checks.filter(|check| check.get("outcome").and_then(Value::as_str) == Some("invalid"));
    violated
        .filter_map(|check| Some(check.get("name")?.as_str()?.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_that_are_violated_are_read() {
        let result = serde_json::json!({"valid": false, "checks": [
            {"name": "lease.exclusive", "outcome": "invalid", "violations": []},
            {"name": "lease.runs-end", "outcome": "valid"},
            {"name": "lease.not-early", "outcome": "unknown", "why": "x"},
        ]});
        assert_eq!(failed_checks(&result), ["lease.exclusive"]);
        assert!(failed_checks(&serde_json::json!({})).is_empty());
    }
}
