//! Short runs on real processes: one that passes, one that must not, and one that is killed.
//!
//! They need `palyrad` and `palyra` next to the tests' binaries or where `PALYRA_BIN` says, and namespaces for the
//! last; where these are missing the test says so and does nothing.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn jepsen(store: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_jepsen"));
    command
        .args(["run", "--workload", "registry", "--store"])
        .arg(store)
        .args(arguments);
    command
}

/// Whether there is something to run; told when not.
fn is_able() -> bool {
    let told = Command::new(env!("CARGO_BIN_EXE_jepsen"))
        .args(["doctor", "-o", "json"])
        .output()
        .unwrap();
    if told.status.code() != Some(0) {
        eprintln!("skipped: {}", String::from_utf8_lossy(&told.stdout));
    }
    told.status.code() == Some(0)
}

fn object(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|_| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn registers_hold_while_replicas_are_killed_and_nothing_is_believed_of_a_run_without_faults() {
    if !is_able() {
        return;
    }
    let store = tempfile::tempdir().unwrap();
    let run = [
        "--nemesis",
        "kill",
        "--time",
        "24s",
        "--seed",
        "11",
        "--rate",
        "120",
        "-o",
        "json",
    ];
    let output = jepsen(store.path(), &run).output().unwrap();
    let told = object(&output);
    assert_eq!(
        (output.status.code(), &told["valid"]),
        (Some(0), &Value::Bool(true)),
        "{told}"
    );
    for field in ["workload", "nemesis", "seed", "ops", "faults", "checks"] {
        assert!(!told[field].is_null(), "{field}");
    }
    assert!(told["faults"]["installed"].as_u64() >= Some(1));
    let kept = told["store"].as_str().unwrap();
    let again = Command::new(env!("CARGO_BIN_EXE_jepsen"))
        .args(["check", kept, "-o", "json"])
        .output()
        .unwrap();
    assert_eq!(
        object(&again)["checks"],
        told["checks"],
        "the same verdict a second time"
    );

    let blind = ["--nemesis", "noop", "--time", "9s", "--seed", "12", "-o", "json"];
    let output = jepsen(store.path(), &blind).output().unwrap();
    let told = object(&output);
    assert_eq!(
        (output.status.code(), &told["valid"]),
        (Some(2), &Value::Null),
        "{told}"
    );
    assert!(told.to_string().contains("nothing shows that noop happened"));
}

#[test]
fn nothing_is_left_of_a_run_whose_harness_is_killed() {
    if !is_able() {
        return;
    }
    let ground = Command::new(env!("CARGO_BIN_EXE_jepsen"))
        .args(["doctor", "-o", "json"])
        .output()
        .unwrap();
    let ground = object(&ground)["ground"].clone();
    if ground == "loopback" {
        eprintln!("skipped: no namespaces here");
        return;
    }
    let store = tempfile::tempdir().unwrap();
    let mark = store.path().display().to_string();
    let mut harness = jepsen(
        store.path(),
        &["--nemesis", "pause", "--time", "60s", "--seed", "13"],
    )
    .stdout(Stdio::null())
    .stderr(Stdio::null())
    .spawn()
    .unwrap();
    // It is under way when replicas serve: the harness's inner process and they are in one namespace of processes.
    let inner = wait_for(|| inner_of(&mark));
    let namespace = std::fs::read_link(format!("/proc/{inner}/ns/pid")).unwrap();
    wait_for(|| (members_of(&namespace) >= 4).then_some(0));
    harness.kill().unwrap();
    harness.wait().unwrap();
    wait_for(|| (members_of(&namespace) == 0).then_some(0));
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(
        !mounts.contains(&mark) && !mounts.contains("jepsen /run"),
        "no mount of it is left here"
    );
}

/// Something that has to come to be, awaited for two minutes at most.
fn wait_for(mut look: impl FnMut() -> Option<u32>) -> u32 {
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "it did not come to be");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// The harness inside: it has our store among its arguments and another namespace of processes than we.
fn inner_of(mark: &str) -> Option<u32> {
    let own = std::fs::read_link("/proc/self/ns/pid").unwrap();
    processes().into_iter().find(|pid| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        let namespace = std::fs::read_link(format!("/proc/{pid}/ns/pid"));
        words.contains("jepsen\0run")
            && words.contains(mark)
            && namespace.is_ok_and(|namespace| namespace != own)
    })
}

fn members_of(namespace: &Path) -> usize {
    let of =
        |pid: &u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|found| found == namespace);
    processes().iter().filter(|pid| of(pid)).count()
}
