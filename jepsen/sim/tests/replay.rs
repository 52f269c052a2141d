//! The simulation put to the test itself: a seed is the same run in every process, what is broken on purpose is found,
//! and a run in which nothing strikes is refused.
#![allow(clippy::unwrap_used)]

use std::process::Command;

/// Exit code and standard output.
fn sim(arguments: &str) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_jepsen-sim"))
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
    )
}

#[test]
fn a_seed_is_the_same_run_in_another_process() {
    let one = sim("--seed 7 --trace");
    let other = sim("--seed 7 --trace");
    assert_eq!(one.0, 0, "{}", one.1);
    assert!(one.1.lines().count() > 100, "a trace names every event");
    let differs = one
        .1
        .lines()
        .zip(other.1.lines())
        .find(|(one, other)| one != other);
    assert_eq!(differs, None);
    assert_eq!(one, other);
    let digest = |text: &str| {
        text.split("digest=")
            .nth(1)
            .map(|rest| rest[..16].to_owned())
            .unwrap()
    };
    assert_ne!(
        digest(&one.1),
        digest(&sim("--seed 8").1),
        "another seed is another run"
    );
}

#[test]
fn seeds_that_ran_in_forks_are_replayed_by_new_processes() {
    let (code, text) = sim("--seeds 49..50");
    assert_eq!(code, 0, "{text}");
    assert!(text.contains(" replayed=1/1 "), "{text}");
}

#[test]
fn what_is_broken_on_purpose_is_found() {
    for name in [
        "ack-before-sync",
        "lose-vote",
        "split-apply",
        "drop-put",
        "local-reads",
        "guess-outcome",
        "retry-anew",
        "skip-row",
        "split-install",
    ] {
        let (code, text) = sim(&format!("--seeds 1..60 --first --break {name}"));
        assert_eq!(code, 1, "{name} was not found:\n{text}");
        assert!(text.contains(&format!("--break {name} --trace")), "{text}");
    }
}

#[test]
fn each_workload_runs_by_its_name_and_is_replayed_with_it() {
    for name in [
        "registry",
        "pairing",
        "revocation",
        "lease",
        "dispatch",
        "journal",
        "watch",
        "membership",
        "failover",
    ] {
        let (code, text) = sim(&format!("--workload {name} --seeds 50..51"));
        assert_eq!(code, 0, "{name}:\n{text}");
        assert!(text.contains(" replayed=1/1 "), "{name}:\n{text}");
    }
}

#[test]
fn a_resource_that_looks_at_no_fence_is_found() {
    let (code, text) = sim("--workload lease --seeds 1..200 --first --break ignore-fence");
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("lease.fenced-resource"), "{text}");
    assert!(text.contains("--workload lease --break ignore-fence"), "{text}");
}

#[test]
fn a_run_in_which_nothing_strikes_is_refused() {
    let (code, text) = sim("--seeds 1..100 --break no-faults");
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("NOT REACHED by any seed: kill, power"), "{text}");
}

#[test]
fn a_failing_seed_shrinks_to_a_line_that_fails_in_the_same_way() {
    let (_, text) = sim("--seeds 1..60 --first --break ack-before-sync");
    let seed = text
        .split("first: seed ")
        .nth(1)
        .and_then(|rest| rest.split(':').next())
        .unwrap();
    let (code, text) = sim(&format!("--shrink {seed} --break ack-before-sync"));
    assert_eq!(code, 1, "{text}");
    let line = text
        .lines()
        .last()
        .and_then(|line| line.strip_prefix("smallest: jepsen-sim "))
        .unwrap();
    assert!(line.contains(&format!("--seed {seed} --only ")), "{text}");
    assert_eq!(sim(line).0, 1, "{line}");
    assert_eq!(sim("--shrink 1").0, 2, "nothing to shrink");
}

#[test]
fn the_verdict_is_told_in_three_forms() {
    let (code, text) = sim("--seeds 1..2 -o json");
    assert_eq!(code, 0, "{text}");
    let verdict: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(verdict["valid"], true);
    for key in ["workload", "nemesis", "seed", "ops", "faults", "checks"] {
        assert!(!verdict[key].is_null(), "{key} in {text}");
    }
    let file = std::env::temp_dir().join(format!("palyra-sim-{}.xml", std::process::id()));
    let (code, text) = sim(&format!(
        "--seeds 1..2 --only none --horizon 500ms --junit {}",
        file.display()
    ));
    assert_eq!(code, 0, "{text}");
    assert!(
        text.lines().last().unwrap().starts_with("PASS mix seeds=1..2 "),
        "{text}"
    );
    let xml = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert!(xml.contains("<testcase name=\"raft.log\"></testcase>"), "{xml}");
    assert_eq!(sim("--seeds 1..1 --only none --junit /no/such/folder/x").0, 255);
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    for wrong in [
        "--seeds 9..3",
        "",
        "--seed x",
        "--seeds 1..2 --only burn",
        "--trace --seeds 1..2",
        "--first --seed 1",
        "--junit x.xml --shrink 1",
    ] {
        assert_eq!(sim(wrong).0, 254, "{wrong}");
    }
}
