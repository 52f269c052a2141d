//! The bench itself, end to end and small: a fleet of fifty, and writes, on three real replicas, in seconds.
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

#[test]
fn a_few_writes_are_measured() {
    let output = Command::new(env!("CARGO_BIN_EXE_palyra-bench"))
        .args("-o json write --clients 4 --connections 2 --seconds 1 --warm-up 0 --rounds 2".split(' '))
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{told}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&report["workload"], &report["clients"]),
        (&"write".into(), &4.into())
    );
    assert_eq!(
        (&report["ours"]["rounds"], &report["ours"]["failed"]),
        (&2.into(), &0.into())
    );
    assert!(report["ours"]["ops_per_s"].as_f64().unwrap() > 0.0, "{report}");
    assert_eq!(report["peer"], Value::Null);
}
