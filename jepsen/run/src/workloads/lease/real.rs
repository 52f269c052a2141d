//! Real workers: `palyra worker run` in namespaces of their own, with a tool that notes that it lives.
//!
//! Never here: trust in what a worker says of itself. What a program left behind is read from its file at the end:
//! a line each tenth of a second with the moment, by the machine's one clock.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use palyra_proto::run::v1::WorkspaceScope;
use serde_json::{Value, json};
use tokio::process::Command;

use super::proof::{AUTHORITY, TOOL};
use crate::machines::{Machine, enlist, text};
use crate::record::{Clock, End};
use crate::run::Run;

/// What `/proc/uptime` may be off by, twice: it counts hundredths.
const COARSE_NS: u64 = 20_000_000;

/// Notes its life until it is done. Every line is one write, so that it is whole or not there.
const HOLD: &str = r#"#!/bin/sh
params=$(cat)
ms=$(echo "$params" | sed -n 's/.*"hold_ms": *\([0-9]*\).*/\1/p')
beats=$PALYRA_WORKSPACE/beats/$PALYRA_RUN_ID.$PALYRA_FENCE
left=$(( ${ms:-500} / 100 + 1 ))
while [ "$left" -gt 0 ]; do
    left=$((left - 1))
    read -r up _ < /proc/uptime
    echo "$up" >> "$beats"
    sleep 0.1
done
echo '{}'
"#;

/// The real workers of a run.
pub(super) struct Real {
    machines: Vec<Machine>,
    config: PathBuf,
    beats: PathBuf,
    digests: Value,
    /// Nanoseconds of the run at the moment at which the machine's uptime was 0; may be below zero.
    origin: i128,
}

/// Where the tool may write.
pub(super) fn scope() -> WorkspaceScope {
    WorkspaceScope {
        root: "beats".to_owned(),
        allowed: vec!["beats".to_owned()],
        read_only: Vec::new(),
    }
}

impl Real {
    /// Pairs machines and measures what they will prove.
    pub(super) async fn prepare(run: &Arc<Run>, count: u64, slots: u32) -> Result<Real> {
        let shop = run.cluster.data().join("shop");
        let beats = shop.join("workspace/beats");
        std::fs::create_dir_all(&beats)?;
        // Slots run as users of their own.
        std::fs::set_permissions(&beats, std::fs::Permissions::from_mode(0o777))?;
        let tool = shop.join("hold.sh");
        std::fs::write(&tool, HOLD)?;
        std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755))?;
        let config = shop.join("worker.toml");
        let workspace = shop.join("workspace");
        let written = format!(
            "slots = {slots}\nrequire = []\nuid_base = 0\nworkspaces = {{ beats = {:?} }}\n\n[[tools]]\nname = \
             \"{TOOL}\"\nauthority = \"{AUTHORITY}\"\ncommand = [\"./hold.sh\"]\n",
            text(&workspace)?
        );
        std::fs::write(&config, written)?;
        let mut machines = Vec::new();
        for _ in 0..count {
            machines.push(enlist(run).await?);
        }
        let first = machines.first().context("no real workers")?;
        let digests = digests(run, &config, &first.folder).await?;
        Ok(Real {
            origin: origin(run.record.clock())?,
            machines,
            config,
            beats,
            digests,
        })
    }

    /// What they prove.
    pub(super) fn digests(&self) -> &Value {
        &self.digests
    }

    /// Starts them.
    pub(super) fn start(&self, run: &Arc<Run>) -> Result<()> {
        for machine in &self.machines {
            run.machines
                .keep(run, machine, &["worker", "run", "--config", text(&self.config)?])?;
        }
        Ok(())
    }

    /// Writes into the history what the programs left behind.
    pub(super) fn tell_held(&self, run: &Run) -> Result<()> {
        let mut process = run.record.process();
        for entry in std::fs::read_dir(&self.beats)? {
            let path = entry?.path();
            let Some((id, fence)) = named(&path) else { continue };
            let lines = std::fs::read_to_string(&path)?;
            let moments: Vec<u64> = lines.lines().filter_map(|line| self.moment(line)).collect();
            let (Some(first), Some(last)) = (moments.first(), moments.last()) else {
                continue;
            };
            // Only what it surely held.
            let value = json!({
                "run": id,
                "fence": fence,
                "from": first + COARSE_NS,
                "to": last.saturating_sub(COARSE_NS),
            });
            let call = process.invoke("held", value.clone(), None, None);
            process.end(call, End::ok(value));
        }
        Ok(())
    }

    fn moment(&self, uptime: &str) -> Option<u64> {
        u64::try_from(self.origin + nanos(uptime)?).ok()
    }
}

fn named(path: &Path) -> Option<(String, u64)> {
    let (run, fence) = path.file_name()?.to_str()?.rsplit_once('.')?;
    Some((run.to_owned(), fence.parse().ok()?))
}

/// `12.34` seconds.
fn nanos(uptime: &str) -> Option<i128> {
    let (seconds, hundredths) = uptime.trim().split_once('.')?;
    let (seconds, hundredths): (i128, i128) = (seconds.parse().ok()?, hundredths.parse().ok()?);
    Some((seconds * 100 + hundredths) * 10_000_000)
}

fn origin(clock: Clock) -> Result<i128> {
    let uptime = std::fs::read_to_string("/proc/uptime").context("/proc/uptime")?;
    let up = uptime
        .split(' ')
        .next()
        .and_then(nanos)
        .context("/proc/uptime is not what it should be")?;
    Ok(i128::from(clock.nanos()) - up)
}

async fn digests(run: &Run, config: &Path, folder: &Path) -> Result<Value> {
    let mut command = Command::new(&run.cluster.programs().palyra);
    command.args([
        "worker",
        "run",
        "--config",
        text(config)?,
        "--data-dir",
        text(folder)?,
        "--digests",
        "-o",
        "json",
    ]);
    let output = command
        .kill_on_drop(true)
        .output()
        .await
        .context("palyra worker run --digests")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "palyra worker run --digests: {}",
        said.trim()
    );
    serde_json::from_slice(&output.stdout).context("palyra worker run --digests prints no JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beats_are_read() {
        assert_eq!(nanos("12.34\n"), Some(12_340_000_000));
        assert_eq!(nanos("x"), None);
        assert_eq!(named(Path::new("/a/01RUN.77")), Some(("01RUN".to_owned(), 77)));
        assert_eq!(named(Path::new("/a/none")), None);
    }
}
