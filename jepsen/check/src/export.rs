//! What a run leaves behind for others to read: Jepsen's EDN for knossos and elle, JSON, JUnit, and a page for people.
//!
//! Invariants: every file is written whole or not at all, under its own name; nothing here judges.

pub mod edn;
pub mod html;
pub mod junit;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::history::{History, Kind};
use crate::verdict::Verdict;

/// What a run is called, for the heads of files.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Title {
    /// `lease`.
    pub workload: String,
    /// `partition,kill`.
    pub nemesis: String,
    /// What its chances were drawn from.
    pub seed: u64,
    /// The command that runs it again.
    pub replay: String,
}

/// An export that failed.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct Error {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Writes everything that is made from a history and its verdict into a folder: `history.edn`,
/// `independent/KEY/history.edn`, `results.edn`, `results.json`, `junit.xml`, `timeline.html`. `results` is what the
/// results say: those of [`results`], or more.
///
/// # Errors
/// The first file that cannot be written.
pub fn write_all(
    folder: &Path,
    title: &Title,
    history: &History,
    verdict: &Verdict,
    results: &Value,
) -> Result<(), Error> {
    let put = |name: &str, write: &dyn Fn(&mut dyn Write) -> io::Result<()>| put(&folder.join(name), write);
    put("history.edn", &|to| edn::history(to, history))?;
    for (key, events) in edn::independent(history) {
        put(&format!("independent/{key}/history.edn"), &|to| {
            edn::events(to, &events)
        })?;
    }
    put("results.edn", &|to| {
        edn::value(to, results)?;
        writeln!(to)
    })?;
    put("results.json", &|to| {
        serde_json::to_writer_pretty(&mut *to, results)?;
        writeln!(to)
    })?;
    put("junit.xml", &|to| {
        to.write_all(junit::report(title, history, verdict).as_bytes())
    })?;
    put("timeline.html", &|to| {
        to.write_all(html::page(title, history, verdict).as_bytes())
    })
}

/// Writes beside the file and moves it there, so that nobody reads half of it.
fn put(path: &Path, write: &dyn Fn(&mut dyn Write) -> io::Result<()>) -> Result<(), Error> {
    let beside = path.with_extension("part");
    let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| {
        let mut to = io::BufWriter::new(fs::File::create(&beside)?);
        write(&mut to)?;
        to.flush()?;
        fs::rename(&beside, path)
    });
    written.map_err(|source| Error {
        path: path.to_owned(),
        source,
    })
}

/// The verdict as one object: `valid` is true, false or `"unknown"`.
#[must_use]
pub fn results(title: &Title, history: &History, verdict: &Verdict) -> Value {
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
    for op in history.ops() {
        let kind = match op.kind() {
            Kind::Ok => "ok",
            Kind::Fail => "fail",
            Kind::Info | Kind::Invoke => "info",
        };
        *kinds.entry(kind).or_default() += 1;
    }
    let count = |kind: &str| kinds.get(kind).copied().unwrap_or(0);
    let valid = verdict.valid().map_or(json!("unknown"), Value::Bool);
    let first = verdict.first().map(|(check, violation)| {
        json!({"check": check, "what": violation.what, "time": violation.time, "events": violation.events})
    });
    json!({
        "valid": valid,
        "workload": title.workload,
        "nemesis": title.nemesis,
        "seed": title.seed,
        "replay": title.replay,
        "ops": kinds.values().sum::<u64>(),
        "ok": count("ok"),
        "fail": count("fail"),
        "info": count("info"),
        "first": first,
        "checks": verdict.checks,
    })
}
