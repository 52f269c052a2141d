//! `jepsen mutants` against a simulation that is made up: who killed a mutant, who did not, and when the harness
//! failed.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// A `jepsen-sim` that does what a script says once a bug is planted, and nothing before.
fn made_up(folder: &Path, script: &str) {
    let path = folder.join("jepsen-sim");
    let text = format!("#!/bin/sh\n[ \"$2\" = none ] && exit 0\n{script}\n");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// Exit code and the JSON object that it printed.
fn mutants(script: &str, words: &[&str]) -> (i32, Value, String) {
    let folder = tempfile::tempdir().unwrap();
    made_up(folder.path(), script);
    let output = Command::new(env!("CARGO_BIN_EXE_jepsen"))
        .args(["mutants", "--only", "M4", "--output", "json", "--binary"])
        .arg(folder.path())
        .args(words)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let object = serde_json::from_str(said.trim()).unwrap_or(Value::Null);
    (
        output.status.code().unwrap(),
        object,
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn a_mutant_is_killed_by_its_own_check_only() {
    let own = "echo 'FAIL seed 3: FAIL x (1 problems) checks=watch.prefix seed=3'
        echo 'FAIL seed 7: FAIL x (2 problems) checks=watch.prefix,registry.real-time seed=7'
        exec sleep 600";
    let (code, told, stderr) = mutants(own, &[]);
    assert_eq!(code, 0, "{told} {stderr}");
    let one = &told["mutants"][0];
    assert_eq!(
        (&told["valid"], &told["killed"]),
        (&Value::from(true), &Value::from(1))
    );
    assert_eq!(
        (&one["outcome"], &one["seed"]),
        (&Value::from("killed"), &Value::from(7))
    );
    assert_eq!(one["caught_by"], "registry.real-time");
    assert_eq!(one["replay"], "jepsen-sim --planted local-reads --seed 7 --trace");

    let another = "echo 'FAIL seed 3: FAIL x (1 problems) checks=watch.prefix seed=3'; exit 1";
    let (code, told, _) = mutants(another, &["--seeds", "9"]);
    assert_eq!((code, &told["valid"]), (1, &Value::from(false)));
    assert_eq!(told["mutants"][0]["outcome"], "killed-by-another-check");

    let (code, told, _) = mutants("exit 0", &["--seeds", "9"]);
    assert_eq!((code, &told["survived"]), (1, &Value::from(1)));
    assert_eq!(
        (&told["mutants"][0]["outcome"], &told["mutants"][0]["tries"]),
        (&"survived".into(), &9.into())
    );
}

#[test]
fn a_failure_of_the_harness_is_no_verdict_and_wrong_words_are_told() {
    let (code, told, stderr) = mutants("echo broken >&2; exit 255", &[]);
    assert_eq!((code, told), (255, Value::Null));
    assert!(
        stderr.contains("local-reads") && stderr.contains("broken"),
        "{stderr}"
    );

    let (code, _, stderr) = mutants(
        "echo 'this jepsen-sim has no planted bugs in it' >&2; exit 254",
        &[],
    );
    assert_eq!(code, 255, "{stderr}");

    let output = Command::new(env!("CARGO_BIN_EXE_jepsen"))
        .args(["mutants", "--only", "M99", "--binary", "/nowhere"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(254));
    assert!(String::from_utf8_lossy(&output.stderr).contains("jepsen list mutants"));
}
