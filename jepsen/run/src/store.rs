//! Where a run is kept: `STORE/NAME/UTC-SEED/`, with everything that judging it again needs.
//!
//! | file | what |
//! |---|---|
//! | `run.json` | [`Kept`]: settings, faults and what became of them, what the cluster itself did |
//! | `history.jsonl` | the history |
//! | `plan.jsonl` | the plan, for `--plan` |
//! | `results.json`, `results.edn`, `junit.xml` | the verdict |
//! | `history.edn`, `independent/KEY/history.edn` | the history for Jepsen's own checkers |
//! | `timeline.html` | the history for people |
//! | `logs/` | what replicas, machines and fabric logged |
//! | `data/` | data folders, of a run that failed |

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use palyra_jepsen_check::Facts;
use palyra_jepsen_check::evidence::Setting;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::conduct::Course;
use crate::inside::Ground;
use crate::run::Settings;

/// What is kept of a run besides its history.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kept {
    /// What it was asked to be.
    pub settings: Settings,
    /// The names that the nemeses came to.
    pub nemeses: Vec<String>,
    /// Where it ran.
    pub ground: Ground,
    /// Its network.
    pub fabric: String,
    /// How it went.
    pub course: Course,
    /// Kinds of operations that must have succeeded.
    pub floors: Vec<String>,
    /// What the checkers are told.
    pub facts: Facts,
    /// What else they are told: times of faults and clocks.
    pub setting: Setting,
    /// Ends of processes that nobody asked for.
    pub ended: Vec<KeptEnd>,
    /// By term: who said that it leads.
    pub claims: Vec<(u64, Vec<u64>)>,
    /// When it began, for people.
    pub began: String,
    /// Version of the harness.
    pub version: String,
}

/// An end of a process that nobody asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeptEnd {
    /// Nanoseconds since the run began.
    pub time: u64,
    /// Which replica.
    pub replica: u64,
    /// How, and its last words.
    pub how: String,
    /// Whether a fault was at work that may end a process.
    pub allowed: bool,
}

/// Makes the folder of a new run. Its name says when and with which seed.
///
/// # Errors
/// When it can't be made, or is there already.
pub fn make(store: &Path, name: &str, seed: u64) -> Result<PathBuf> {
    let now = OffsetDateTime::now_utc();
    let stamp = format!(
        "{:04}{:02}{:02}T{:02}{:02}{:02}Z",
        now.year(),
        u8::from(now.month()),
        now.day(),
        now.hour(),
        now.minute(),
        now.second()
    );
    let folder = std::path::absolute(store)?
        .join(name)
        .join(format!("{stamp}-{seed}"));
    ensure!(
        !folder.exists(),
        "{} is there already; wait a second",
        folder.display()
    );
    std::fs::create_dir_all(folder.join("logs"))
        .with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// Writes a value as JSON, for people too.
///
/// # Errors
/// When the file can't be written.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Reads what was kept of a run.
///
/// # Errors
/// When the folder is none of a run.
pub fn read(folder: &Path) -> Result<Kept> {
    let path = folder.join("run.json");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("{} is no folder of a run: it has no run.json", folder.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is of another version", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_none_of_a_run_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(
            read(folder.path())
                .unwrap_err()
                .to_string()
                .contains("no run.json")
        );
        let one = make(folder.path(), "x", 7).unwrap();
        assert!(one.ends_with(one.file_name().unwrap()) && one.join("logs").is_dir());
        assert!(one.display().to_string().ends_with("Z-7"));
    }
}
