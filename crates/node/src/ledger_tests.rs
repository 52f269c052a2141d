//! The ledger under restarts, cuts, damage and full disks.

use super::*;

fn result(id: &str) -> StoredResult {
    StoredResult {
        id: id.to_owned(),
        request_id: "R".to_owned(),
        outcome: "succeeded".to_owned(),
        payload: "{\"text\":\"line\\nbreak ü\"}".to_owned(),
        error_code: String::new(),
        error_message: String::new(),
        log_tail: String::new(),
        attempt: 1,
    }
}

fn story(dir: &Path) {
    let (mut ledger, left) = Ledger::open(dir).unwrap();
    assert!(left.is_empty());
    ledger.begin("A", 1, Effect::Once).unwrap();
    ledger
        .process(
            "A",
            Started {
                pid: 7,
                ticks: 8,
                boot: "b".to_owned(),
            },
        )
        .unwrap();
    ledger.begin("B", 1, Effect::Idempotent).unwrap();
    ledger.finish(result("A")).unwrap();
    ledger.begin("C", 1, Effect::Once).unwrap();
    ledger.forget("A", 0).unwrap();
    ledger.finish(result("B")).unwrap();
}

fn reopened(dir: &Path) -> Vec<(String, String)> {
    let (ledger, _) = Ledger::open(dir).unwrap();
    ledger
        .results()
        .iter()
        .map(|one| (one.id.clone(), one.error_code.clone()))
        .collect()
}

#[test]
fn what_was_begun_and_owed_survives() {
    let dir = tempfile::tempdir().unwrap();
    story(dir.path());
    let expected = vec![
        ("B".to_owned(), String::new()),
        ("C".to_owned(), "agent_restarted".to_owned()),
    ];
    assert_eq!(reopened(dir.path()), expected);
    assert_eq!(reopened(dir.path()), expected, "and again");
    let (ledger, _) = Ledger::open(dir.path()).unwrap();
    let again = ledger.results()[1].request_id.clone();
    assert_eq!(
        Ledger::open(dir.path()).unwrap().0.results()[1].request_id,
        again,
        "one request id for all tries"
    );
}

#[test]
fn a_cut_at_any_byte_leaves_a_prefix_of_the_story() {
    let dir = tempfile::tempdir().unwrap();
    story(dir.path());
    let path = dir.path().join("ledger.log");
    let whole = std::fs::read(&path).unwrap();
    let line_ends: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] == b'\n').collect();
    for cut in 0..=whole.len() {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let lines = line_ends.iter().filter(|end| **end < cut).count();
        let seen = reopened(dir.path());
        // Lines: begun A, process, begun B, finished A, begun C, forgotten A, finished B.
        let expected: &[(&str, &str)] = match lines {
            0 => &[],
            1..=3 => &[("A", "agent_restarted")],
            4 => &[("A", "")],
            5 => &[("A", ""), ("C", "agent_restarted")],
            6 => &[("C", "agent_restarted")],
            _ => &[("B", ""), ("C", "agent_restarted")],
        };
        let seen: Vec<(&str, &str)> = seen
            .iter()
            .map(|(id, code)| (id.as_str(), code.as_str()))
            .collect();
        assert_eq!(seen, expected, "cut at {cut}, {lines} whole lines");
    }
}

#[test]
fn damage_in_the_middle_is_reported_not_skipped() {
    let dir = tempfile::tempdir().unwrap();
    story(dir.path());
    let path = dir.path().join("ledger.log");
    let whole = std::fs::read(&path).unwrap();
    let second = whole.iter().position(|byte| *byte == b'\n').unwrap() + 30;
    // A bit that flipped, and a line that was made two.
    for byte in [whole[second] ^ 1, b'\n'] {
        let mut bent = whole.clone();
        bent[second] = byte;
        std::fs::write(&path, &bent).unwrap();
        let error = Ledger::open(dir.path()).err().unwrap();
        assert!(
            error.code == "N0401" && error.message.contains("line 2"),
            "{error}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), bent, "nothing is thrown away");
    }
}

#[test]
fn a_power_loss_may_tear_all_that_was_not_synced() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ledger, _) = Ledger::open(dir.path()).unwrap();
    ledger.begin("A", 1, Effect::Once).unwrap();
    ledger.finish(result("A")).unwrap();
    let synced = usize::try_from(ledger.length).unwrap();
    ledger.begin("B", 1, Effect::Idempotent).unwrap();
    ledger.begin("C", 1, Effect::Idempotent).unwrap();
    ledger.begin("D", 1, Effect::Once).unwrap();
    let path = dir.path().join("ledger.log");
    let whole = std::fs::read(&path).unwrap();
    // The pages of a file reach the disk in any order; one that didn't reads as zeros.
    for (from, to) in [
        (synced, synced + 40),
        (synced + 10, whole.len() - 70),
        (synced, whole.len()),
    ] {
        let mut torn = whole.clone();
        torn[from..to].fill(0);
        std::fs::write(&path, &torn).unwrap();
        let held = reopened(dir.path());
        assert_eq!(
            held[0],
            ("A".to_owned(), String::new()),
            "what was synced is there"
        );
    }
    // Zeros before something that was synced after them: no power loss does this.
    let mut rotten = whole.clone();
    rotten[10..40].fill(0);
    std::fs::write(&path, &rotten).unwrap();
    assert_eq!(Ledger::open(dir.path()).err().unwrap().code, "N0401");
}

#[test]
fn a_disk_that_takes_nothing_stops_what_must_not_run_twice() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ledger, _) = Ledger::open(dir.path()).unwrap();
    // Every write fails.
    ledger.file = File::open(dir.path().join("ledger.log")).unwrap();
    assert!(matches!(ledger.begin("A", 1, Effect::Once), Err(Refused::Io(_))));
    ledger.begin("B", 1, Effect::Idempotent).unwrap();
    assert!(ledger.finish(result("B")).is_err());
    assert_eq!(ledger.results().len(), 1, "kept in memory, to be reported");
}

#[test]
fn the_processes_of_a_dead_agent_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let process = Started {
        pid: 7,
        ticks: 8,
        boot: "b".to_owned(),
    };
    let (mut ledger, _) = Ledger::open(dir.path()).unwrap();
    ledger.begin("A", 1, Effect::Idempotent).unwrap();
    ledger.process("A", process.clone()).unwrap();
    drop(ledger);
    assert_eq!(Ledger::open(dir.path()).unwrap().1, vec![process]);
    assert_eq!(
        Ledger::open(dir.path()).unwrap().1,
        vec![],
        "told once, and an idempotent start is not owed"
    );
}

#[test]
fn the_number_of_held_dispatches_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ledger, _) = Ledger::open(dir.path()).unwrap();
    for number in 0..MAX_HELD {
        ledger.begin(&format!("{number}"), 1, Effect::Idempotent).unwrap();
    }
    assert!(matches!(
        ledger.begin("one more", 1, Effect::Once),
        Err(Refused::Full)
    ));
    ledger.forget("0", 0).unwrap();
    ledger.begin("one more", 1, Effect::Idempotent).unwrap();
}

#[test]
fn the_file_is_rewritten_when_it_is_mostly_past() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ledger, _) = Ledger::open(dir.path()).unwrap();
    let big = StoredResult {
        payload: "x".repeat(300_000),
        ..result("A")
    };
    for _ in 0..5 {
        ledger.begin("A", 1, Effect::Idempotent).unwrap();
        ledger.finish(big.clone()).unwrap();
        ledger.forget("A", 0).unwrap();
    }
    assert!(std::fs::metadata(dir.path().join("ledger.log")).unwrap().len() < COMPACT_AT);
    ledger.begin("Z", 1, Effect::Once).unwrap();
    drop(ledger);
    assert_eq!(reopened(dir.path()).len(), 1, "appending goes to the new file");
}
