//! Mutants in the simulation: seeds with the bug planted, until its check fails.

use std::process::Stdio;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

use super::build::Planted;
use super::judge::{Judged, Watch};
use super::table::Mutant;
use super::{MutantsArgs, table};

/// A seed whose process died, and one that did not come to an end: what some bugs do instead of anything else.
const DIED: &str = "sim.died";
const HUNG: &str = "sim.hung";

/// Runs seeds until its check fails, or there are no more.
pub(super) async fn run(mutant: &Mutant, programs: &Planted, args: &MutantsArgs) -> Result<Judged> {
    let Some(program) = &programs.sim else {
        bail!("jepsen-sim with planted bugs was not looked for");
    };
    let mut command = Command::new(program);
    let seeds = format!("1..{}", args.seeds);
    command.args(["--seeds", &seeds, "--jobs", &args.jobs.to_string()]);
    if mutant.name == table::BLIND_SIM {
        command.args(["--break", "no-faults"]);
    } else {
        command.args(["--planted", mutant.name]);
    }
    // Its own group: the seeds that run when it has been seen are ended with it.
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("{} does not start", program.display()))?;
    let group = child.id();
    let output = child.stdout.take().context("jepsen-sim has no output")?;
    let mut lines = BufReader::new(output).lines();
    let mut watch = Watch::new(*mutant);
    while let Some(line) = lines.next_line().await? {
        let Some(failure) = Failure::read(&line) else {
            continue;
        };
        watch.tried(failure.seed);
        let replay = format!(
            "jepsen-sim --planted {} --seed {} --trace",
            mutant.name, failure.seed
        );
        if watch.failed(failure.seed, &failure.checks, &replay) {
            end_group(group);
            // Its exit code is of our own making.
            let _ = child.wait().await;
            return Ok(watch.end());
        }
    }
    let status = child.wait_with_output().await?;
    watch.tried(args.seeds);
    match status.status.code() {
        Some(0 | 1) => {}
        Some(2) => watch.refused(),
        _ => bail!(
            "jepsen-sim failed with {} planted: {} {}",
            mutant.name,
            status.status,
            String::from_utf8_lossy(&status.stderr).trim()
        ),
    }
    Ok(watch.end())
}

fn end_group(group: Option<u32>) {
    let Some(group) = group.and_then(|id| i32::try_from(id).ok()) else {
        return;
    };
    // It may have ended by itself.
    let _ = nix::sys::signal::killpg(
        nix::unistd::Pid::from_raw(group),
        nix::sys::signal::Signal::SIGKILL,
    );
}

/// What a line says of a seed that failed.
#[derive(Debug, PartialEq, Eq)]
struct Failure<'a> {
    seed: u64,
    checks: Vec<&'a str>,
}

impl<'a> Failure<'a> {
    /// `FAIL seed 7: FAIL … checks=a,b seed=7 …`
    fn read(line: &'a str) -> Option<Failure<'a>> {
        let (seed, rest) = line.strip_prefix("FAIL seed ")?.split_once(':')?;
        let seed = seed.parse().ok()?;
        let named = rest
            .split_whitespace()
            .rev()
            .find_map(|word| word.strip_prefix("checks="));
        let checks = match named {
            Some(names) => names.split(',').collect(),
            None if rest.trim() == "it hung" => vec![HUNG],
            None => vec![DIED],
        };
        Some(Failure { seed, checks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_seeds_are_read() {
        let read = |line| Failure::read(line).map(|failure| (failure.seed, failure.checks.join(" ")));
        let own = |seed, checks: &str| Some((seed, checks.to_owned()));
        assert_eq!(
            read("FAIL seed 7: FAIL a read at index 3: checks=x (2 problems) checks=a.b,c.d seed=7 digest=0"),
            own(7, "a.b c.d")
        );
        assert_eq!(read("FAIL seed 9: it hung"), own(9, HUNG));
        assert_eq!(read("FAIL seed 9: its process died: wait status 6"), own(9, DIED));
        for other in [
            "300 passed, 0 failed",
            "FAIL seed 50 does not replay:",
            "     replay: jepsen-sim",
        ] {
            assert_eq!(read(other), None, "{other}");
        }
    }
}
