//! What the daemon of a run can do and is told, by its settings.

use anyhow::{Context, Result};

use crate::abilities::{Abilities, Ability};
use crate::cli::Usage;
use crate::cluster::{Programs, merge};
use crate::run::Settings;

/// A log that holds little: snapshots are made and sent in every run. A replica is sent one when it lacks so many
/// entries.
const SHORT_LOG: &str = "[raft]\nsnapshot_entries = 400\nlog_entries = 200\n";

/// The settings of `palyrad.toml`: a short log where the daemon can have one, and what the workload needs, as TOML.
///
/// # Errors
/// When that is no TOML.
pub fn configuration(workload: &str, short_log: bool) -> Result<toml::Table> {
    let text = if short_log {
        SHORT_LOG
    } else {
        "[raft]\nsnapshot_entries = 400\n"
    };
    let mut table: toml::Table = text.parse().context("the harness's settings are no TOML")?;
    let more: toml::Table = workload.parse().context("the workload's settings are no TOML")?;
    merge(&mut table, &more);
    if !short_log && let Some(raft) = table.get_mut("raft").and_then(toml::Value::as_table_mut) {
        raft.remove("log_entries");
    }
    Ok(table)
}

/// Finds out what the binaries can do. Answers whether the log can be kept short.
///
/// # Errors
/// [`Usage`] when an older binary was asked for that is not there; when the daemon does not start.
pub async fn attempt(abilities: &mut Abilities, programs: &Programs, settings: &Settings) -> Result<bool> {
    match &settings.old_binary {
        Some(folder) if folder.join("palyrad").is_file() => abilities.yes(Ability::OldBinary),
        Some(folder) => {
            let why = format!("there is no palyrad in {}", folder.display());
            return Err(Usage(format!("--old-binary: {why}")).into());
        }
        None => abilities.no(
            Ability::OldBinary,
            "name the folder of an earlier release: --old-binary DIR",
        ),
    }
    // A daemon that does not know the key names it in its refusal.
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("palyrad.toml");
    tokio::fs::write(&file, SHORT_LOG).await?;
    let mut command = tokio::process::Command::new(&programs.palyrad);
    command
        .arg("check-config")
        .arg("--config")
        .arg(&file)
        .kill_on_drop(true);
    let said = command
        .output()
        .await
        .with_context(|| format!("{} does not start", programs.palyrad.display()))?;
    let said = [said.stdout, said.stderr].concat();
    let short_log = !String::from_utf8_lossy(&said).contains("log_entries");
    if short_log {
        abilities.yes(Ability::ShortLog);
    } else {
        abilities.no(Ability::ShortLog, "this palyrad does not know raft.log_entries");
    }
    Ok(short_log)
}
