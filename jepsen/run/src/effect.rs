//! `jepsen effect`: the program that real agents run in `dispatch`. It notes its begin before it does anything and
//! its end as the last thing, each as one line of a ledger that many of it append to.
//!
//! A line is `b JOB NANOSECONDS PID` or `e JOB NANOSECONDS PID`, by the machine's monotonic clock, which the
//! harness's is too.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};

use crate::record::Clock;

/// One begin of a program, by the clock of the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    /// The dispatch.
    pub job: String,
    /// When it began, in nanoseconds.
    pub from: u64,
    /// When it ended; nothing when it was cut short.
    pub to: Option<u64>,
}

fn now() -> Result<i128> {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
}

/// Runs it: JSON with `hold_ms` and `fails` on standard input.
///
/// # Errors
/// When the ledger can't be written, or it was asked to fail.
pub fn main(ledger: &Path) -> Result<()> {
    let job = std::env::var("PALYRA_DISPATCH_ID").context("PALYRA_DISPATCH_ID is not set")?;
    note(ledger, "b", &job)?;
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .context("no parameters")?;
    let asked: serde_json::Value = serde_json::from_str(&text).context("parameters that are no JSON")?;
    std::thread::sleep(Duration::from_millis(asked["hold_ms"].as_u64().unwrap_or(0)));
    note(ledger, "e", &job)?;
    if asked["fails"] == true {
        bail!("it was asked to fail");
    }
    println!("{{}}");
    Ok(())
}

fn note(ledger: &Path, what: &str, job: &str) -> Result<()> {
    let line = format!("{what} {job} {} {}\n", now()?, std::process::id());
    let mut file = std::fs::File::options().append(true).create(true).open(ledger)?;
    // One write of less than a page, appended: whole or not at all.
    file.write_all(line.as_bytes())
        .with_context(|| format!("cannot write {}", ledger.display()))
}

/// Reads a ledger. `clock` is the run's, on the same machine.
///
/// # Errors
/// When a line is not what it should be.
pub fn parse(text: &str, clock: Clock) -> Result<Vec<Effect>> {
    let origin = now()? - i128::from(clock.nanos());
    read(text, origin)
}

fn read(text: &str, origin: i128) -> Result<Vec<Effect>> {
    let mut effects: Vec<(String, Effect)> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let words: Vec<&str> = line.split(' ').collect();
        let [what, job, moment, pid] = words[..] else {
            bail!("line {} of a ledger: {line:?}", at + 1)
        };
        let moment: i128 = moment
            .parse()
            .with_context(|| format!("line {} of a ledger", at + 1))?;
        let moment = u64::try_from(moment - origin).unwrap_or(0);
        match what {
            "b" => effects.push((
                pid.to_owned(),
                Effect {
                    job: job.to_owned(),
                    from: moment,
                    to: None,
                },
            )),
            _ => {
                let begun = effects
                    .iter_mut()
                    .rev()
                    .find(|(by, effect)| by == pid && effect.job == job);
                if let Some((_, effect)) = begun {
                    effect.to = Some(moment);
                }
            }
        }
    }
    Ok(effects.into_iter().map(|(_, effect)| effect).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_is_read_by_the_clock_of_the_run() {
        let effects = read("b j1 1100 7\nb j1 1150 8\ne j1 1200 7\n", 1_000).unwrap();
        let effect = |from, to| Effect {
            job: "j1".to_owned(),
            from,
            to,
        };
        assert_eq!(effects, [effect(100, Some(200)), effect(150, None)]);
        assert!(read("b j1", 0).is_err());
    }
}
