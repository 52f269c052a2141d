//! What a process costs, as the kernel counts it in `/proc`, and how many files this one may open.
//!
//! What never lives here: whose process it is.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

/// Files beside the sessions: databases, logs, listeners, and connections that have ended and are not closed yet.
const SPARE_FILES: u64 = 2_048;

/// What a process has used until now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Processor time, user and kernel.
    pub(crate) cpu: Duration,
    /// Resident memory, in KiB.
    pub(crate) resident_kib: u64,
    /// Resident memory that is no file's, in KiB: heap and stacks.
    pub(crate) anonymous_kib: u64,
}

impl Usage {
    /// Of a live process.
    pub(crate) fn of(pid: u32) -> Result<Usage> {
        let read = |what: &str| {
            let path = format!("/proc/{pid}/{what}");
            std::fs::read_to_string(&path).with_context(|| format!("process {pid} has ended: no {path}"))
        };
        let (stat, status) = (read("stat")?, read("status")?);
        Usage::parse(&stat, &status, ticks_per_second()?)
            .with_context(|| format!("/proc/{pid} is not as this program expects it"))
    }

    /// Of this process.
    pub(crate) fn own() -> Result<Usage> {
        Usage::of(std::process::id())
    }

    fn parse(stat: &str, status: &str, ticks: u64) -> Option<Usage> {
        // The second field is the name in parentheses, which may hold anything; what follows is counted from 3.
        let (_, rest) = stat.rsplit_once(") ")?;
        let field = |number: usize| rest.split(' ').nth(number - 3)?.parse::<u64>().ok();
        let used = field(14)? + field(15)?;
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
        };
        Some(Usage {
            cpu: Duration::from_millis(used * 1000 / ticks),
            resident_kib: kib("VmRSS:")?,
            anonymous_kib: kib("RssAnon:")?,
        })
    }

    /// The share of one core that was used since `before`, in percent.
    pub(crate) fn percent_since(&self, before: &Usage, wall: Duration) -> f64 {
        if wall.is_zero() {
            return 0.0;
        }
        self.cpu.saturating_sub(before.cpu).as_secs_f64() * 100.0 / wall.as_secs_f64()
    }
}

/// The columns that [`cells`] fills.
pub(crate) const COLUMNS: [&str; 4] = ["process", "cpu_percent", "resident_mib", "anonymous_mib"];

/// One process over a time of measurement.
pub(crate) fn cells(name: &str, before: &Usage, after: &Usage, wall: Duration) -> Vec<Value> {
    vec![
        json!(name),
        json!(after.percent_since(before, wall)),
        json!(after.resident_kib / 1024),
        json!(after.anonymous_kib / 1024),
    ]
}

fn ticks_per_second() -> Result<u64> {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).context("no clock ticks")?;
    u64::try_from(ticks.unwrap_or(100)).context("clock ticks below zero")
}

/// Lets this process, and those that it starts, have `sessions` connections open beside everything else.
pub(crate) fn allow_files(sessions: u64) -> Result<u64> {
    let wanted = sessions.saturating_mul(2) + SPARE_FILES;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("the limit of open files")?;
    if soft >= wanted {
        return Ok(soft);
    }
    let raised = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard.max(wanted));
    if raised.is_err() {
        // Only root may raise the hard limit.
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("the limit of open files")?;
        ensure!(
            hard >= sessions + SPARE_FILES,
            "{sessions} sessions need {wanted} open files and this user may have {hard}; run it as root, or raise \
             the hard limit (ulimit -Hn, /etc/security/limits.conf)"
        );
    }
    Ok(getrlimit(Resource::RLIMIT_NOFILE)
        .context("the limit of open files")?
        .0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tpalyrad\nVmRSS:\t   20480 kB\nRssAnon:\t  10240 kB\nThreads:\t9\n";

    #[test]
    fn a_name_with_parentheses_does_not_move_the_fields() {
        let stat = "12 (a) b) S 1 12 12 0 -1 4194560 900 0 0 0 150 50 0 0 20 0 9 0 77 1 1";
        let usage = Usage::parse(stat, STATUS, 100).unwrap();
        assert_eq!(usage.cpu, Duration::from_secs(2));
        assert_eq!((usage.resident_kib, usage.anonymous_kib), (20_480, 10_240));
        assert_eq!(Usage::parse("12 (a", STATUS, 100), None);
        assert_eq!(Usage::parse(stat, "VmRSS: some kB", 100), None);
    }

    #[test]
    fn shares_are_of_the_time_between() {
        let at = |ms| Usage {
            cpu: Duration::from_millis(ms),
            ..Usage::default()
        };
        assert!((at(1_500).percent_since(&at(500), Duration::from_secs(2)) - 50.0).abs() < 1e-9);
        assert!(at(1).percent_since(&at(0), Duration::ZERO).abs() < 1e-9);
    }

    #[test]
    fn this_process_is_there() {
        assert!(Usage::own().unwrap().resident_kib > 0);
    }
}
