//! `kill -9` at every write of a real process, over a real data folder.
//!
//! The test runs its own binary again as the victim. The victim writes numbered batches, syncs now and then,
//! and says each step on its standard output; the test kills it after the n-th step, opens the folder, and
//! compares. Nothing here waits for time to pass.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::disallowed_types)]

mod script;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use palyra_storage::{Engine, Options, RocksEngine};
use script::{batch, survived};

/// Tells the binary that it is the victim, and in which folder.
const VICTIM: &str = "PALYRA_STORAGE_VICTIM";
const STEPS: u64 = 10_000;
const SYNC_EVERY: u64 = 3;

#[test]
fn victim() {
    let Some(dir) = std::env::var_os(VICTIM) else {
        return;
    };
    let engine = RocksEngine::open(Path::new(&dir), Options::default()).unwrap();
    // Unbuffered and past the test harness's capture: what the parent reads has happened.
    let mut out = std::fs::File::options().append(true).open("/dev/stdout").unwrap();
    for number in survived(&engine) + 1..=STEPS {
        engine.write(batch(number)).unwrap();
        writeln!(out, "\nwritten {number}").unwrap();
        if number.is_multiple_of(SYNC_EVERY) {
            engine.sync().unwrap();
            writeln!(out, "synced {number}").unwrap();
        }
    }
}

/// Runs a victim on `dir` until it has said `steps` lines; returns the last batch that it had written by
/// then.
fn kill_after(dir: &Path, steps: usize) -> u64 {
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "victim", "--nocapture", "--test-threads=1"])
        .env(VICTIM, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut acked = 0;
    let said = BufReader::new(victim.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    for line in said
        .filter(|line| line.starts_with("written ") || line.starts_with("synced "))
        .take(steps)
    {
        acked = line.rsplit(' ').next().unwrap().parse().unwrap();
    }
    // SIGKILL, in the middle of whatever it is doing by now.
    victim.kill().unwrap();
    victim.wait().unwrap();
    assert!(acked > 0, "the victim said nothing");
    acked
}

#[test]
fn a_process_killed_at_any_step_leaves_all_that_it_wrote() {
    for steps in 1..=40 {
        let dir = tempfile::tempdir().unwrap();
        let acked = kill_after(dir.path(), steps);
        let engine = RocksEngine::open(dir.path(), Options::default()).unwrap();
        let survived = survived(&engine);
        assert!(
            survived >= acked,
            "batch {acked} was acknowledged, {survived} survived a kill after step {steps}"
        );
    }
}

#[test]
fn a_folder_survives_one_kill_after_another() {
    let dir = tempfile::tempdir().unwrap();
    let mut last = 0;
    for round in 0..25 {
        let acked = kill_after(dir.path(), 1 + round * 7 % 31);
        assert!(
            acked > last,
            "round {round} starts where round {} ended",
            round - 1
        );
        let engine = RocksEngine::open(dir.path(), Options::default()).unwrap();
        last = survived(&engine);
        assert!(
            last >= acked,
            "round {round}: batch {acked} was acknowledged, {last} survived"
        );
    }
}
