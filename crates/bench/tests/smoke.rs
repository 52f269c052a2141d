//! The bench itself, end to end and small: a fleet of fifty on three real replicas, in seconds.
//!
//! It needs `palyrad` and `palyra` beside its own program, as `cargo build --workspace --bins` leaves them.
#![allow(clippy::unwrap_used)]

use std::process::Command;

use serde_json::Value;

#[test]
fn a_small_fleet_is_measured_and_keeps_its_promises() {
    let output = Command::new(env!("CARGO_BIN_EXE_palyra-bench"))
        .args([
            "-o",
            "json",
            "fleet",
            "--nodes",
            "50",
            "--steady",
            "2",
            "--no-faults",
        ])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{told}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&report["kept"], &report["nodes"]),
        (&Value::Bool(true), &50.into())
    );
    let processes: Vec<&str> = report["cost"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["process"].as_str().unwrap())
        .collect();
    assert_eq!(processes, ["replica 1", "replica 2", "replica 3", "generator"]);
    let sessions = report["memory"].as_array().unwrap().iter();
    assert_eq!(
        sessions.map(|row| row["sessions"].as_u64().unwrap()).sum::<u64>(),
        50
    );
    assert_eq!(report["reach"][0]["count"], 50);
}
