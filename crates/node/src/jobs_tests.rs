//! The table against real programs, without a control plane: answers are made by the test.

use std::path::Path;

use tokio::sync::mpsc;

use super::*;
use crate::capability;
use crate::mediation::Desk;
use crate::testing::Fifo;

struct Bench {
    jobs: Jobs,
    events: mpsc::UnboundedReceiver<Event>,
    desk: Arc<Desk>,
    dir: tempfile::TempDir,
}

fn bench_in(dir: tempfile::TempDir, file: &str) -> Bench {
    let path = dir.path().join("caps.toml");
    std::fs::write(&path, file).unwrap();
    let capabilities = capability::load(&[path]).unwrap();
    let ledger = Arc::new(Mutex::new(Ledger::open(dir.path()).unwrap().0));
    let desk = Arc::new(Desk::default());
    let (_, status) = watch::channel(AgentStatus::default());
    let (sender, events) = mpsc::unbounded_channel();
    let home = dir.path().to_path_buf();
    let worker = Worker::new(
        capabilities,
        Arc::clone(&ledger),
        Arc::clone(&desk),
        home,
        status,
        sender,
    );
    Bench {
        jobs: Jobs::new(worker, ledger),
        events,
        desk,
        dir,
    }
}

fn bench(file: &str) -> Bench {
    bench_in(tempfile::tempdir().unwrap(), file)
}

fn assignment(id: &str, capability: &str) -> wire::Assignment {
    wire::Assignment {
        dispatch_id: id.to_owned(),
        epoch: 7,
        capability: capability.to_owned(),
        payload: "{\"x\":1}".into(),
        effect: "once".to_owned(),
        remaining_ms: 20_000,
        ..wire::Assignment::default()
    }
}

fn entry(name: &str, script: &str, more: &str) -> String {
    format!(
        "[[capability]]\nname = \"{name}\"\nprogram = \"/bin/sh\"\neffect = \"once\"\n\
         args = ['-c', '{script}']\n{more}\n"
    )
}

async fn result_of(bench: &mut Bench) -> wire::Result {
    loop {
        let event = bench.events.recv().await.unwrap();
        if let Some(Body::Result(result)) = bench.jobs.event(event).pop() {
            return result;
        }
    }
}

/// A program that notes each run, says that it is up and then goes on and on.
fn slow(held: &Fifo) -> String {
    let script = format!(
        "echo x >> runs; exec 3>{}; echo up >&3; exec sleep 1000",
        held.path()
    );
    entry("slow", &script, "")
}

fn runs(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap_or_default().lines().count()
}

#[tokio::test]
async fn a_redelivered_dispatch_runs_once_and_its_result_is_sent_until_it_is_accepted() {
    let mut bench = bench(&entry("count", "echo x >> runs; echo 1", ""));
    bench.jobs.attached(7);
    assert_eq!(bench.jobs.assign(assignment("A", "count")).len(), 1);
    assert_eq!(
        bench.jobs.assign(assignment("A", "count")).len(),
        1,
        "only acknowledged"
    );
    let first = result_of(&mut bench).await;
    assert_eq!(
        (first.outcome.as_str(), first.epoch, &first.payload[..]),
        ("succeeded", 7, &b"1"[..])
    );
    let again = bench.jobs.assign(assignment("A", "count"));
    assert!(matches!(&again[1], Body::Result(result) if result.request_id == first.request_id));
    let next_session = bench.jobs.attached(9);
    assert!(matches!(&next_session[0], Body::Result(r) if r.epoch == 9 && r.request_id == first.request_id));
    assert_eq!(runs(&bench.dir.path().join("runs")), 1);
    let retry = wire::ResultAnswer {
        dispatch_id: "A".to_owned(),
        retry: true,
        ..Default::default()
    };
    bench.jobs.answered(&retry);
    assert_eq!(bench.jobs.held(), ["A"]);
    assert_eq!(bench.jobs.overdue(Instant::now() + RETRY_AFTER).len(), 1);
    bench.jobs.answered(&wire::ResultAnswer {
        accepted: true,
        ..retry
    });
    assert!(bench.jobs.held().is_empty() && bench.jobs.next_overdue().is_none());
}

#[tokio::test]
async fn a_result_survives_the_agent_and_a_begun_once_is_not_run_again() {
    let mut held = Fifo::new();
    let mut first = bench(&(entry("quick", "echo 1", "") + &slow(&held)));
    first.jobs.assign(assignment("A", "quick"));
    result_of(&mut first).await;
    first.jobs.assign(assignment("B", "slow"));
    held.opened().await;
    // A crash: nothing is told to stop, the ledger is read anew.
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(
        first.dir.path().join("ledger.log"),
        copy.path().join("ledger.log"),
    )
    .unwrap();
    let mut second = bench_in(copy, &entry("slow", "echo x >> runs", ""));
    assert_eq!(second.jobs.held(), ["A", "B"]);
    let sent = second.jobs.attached(9);
    assert!(
        matches!(&sent[1], Body::Result(r) if r.error_code == "agent_restarted" && r.outcome == "failed")
    );
    second.jobs.assign(assignment("B", "slow"));
    assert_eq!(runs(&second.dir.path().join("runs")), 0);
    first.jobs.abort().await;
    held.released().await;
}

#[tokio::test]
async fn cancelling_ends_the_run_and_says_how() {
    let mut held = Fifo::new();
    let mut bench = bench(&slow(&held));
    bench.jobs.assign(assignment("A", "slow"));
    held.opened().await;
    let cancel = |id: &str, epoch| wire::CancelDispatch {
        dispatch_id: id.to_owned(),
        reason: "operator".to_owned(),
        epoch,
        attempt: 1,
    };
    assert!(bench.jobs.cancel(&cancel("A", 7)).is_empty(), "its end says it");
    let result = result_of(&mut bench).await;
    assert_eq!(
        (result.outcome.as_str(), result.error_code.as_str()),
        ("cancelled", "stopped")
    );
    assert!(
        result.error_message.contains("SIGTERM after"),
        "{}",
        result.error_message
    );
    held.released().await;
    assert_eq!(
        bench_in(bench.dir, "").jobs.held(),
        ["A"],
        "owed until it is accepted"
    );
}

#[tokio::test]
async fn what_is_taken_back_and_not_here_is_said_to_be_not_begun() {
    let mut bench = bench("");
    bench.jobs.attached(7);
    let mut cancel = wire::CancelDispatch {
        dispatch_id: "A".to_owned(),
        epoch: 7,
        attempt: 2,
        ..wire::CancelDispatch::default()
    };
    let said = bench.jobs.cancel(&cancel);
    assert!(
        matches!(&said[0], Body::Result(r) if r.outcome == "cancelled" && r.error_code == "not_begun" && r.attempt == 2)
    );
    cancel.epoch = 0;
    assert!(
        bench.jobs.cancel(&cancel).is_empty(),
        "it has ended: nobody waits for a word"
    );
}

#[tokio::test]
async fn a_later_attempt_begins_after_a_failure_and_takes_over_what_runs_or_succeeded() {
    let gate = Fifo::new();
    let script = format!("echo x >> runs; read line <{}; echo 1", gate.gate());
    let files = entry("fails", "echo x >> runs; exit 75", "") + &entry("waits", &script, "");
    let mut bench = bench(&files);
    bench.jobs.attached(7);
    let attempt = |id: &str, capability: &str, attempt| wire::Assignment {
        attempt,
        effect: "idempotent".to_owned(),
        ..assignment(id, capability)
    };
    bench.jobs.assign(attempt("A", "fails", 1));
    let first = result_of(&mut bench).await;
    assert_eq!(
        (first.error_code.as_str(), first.attempt),
        ("temporary_failure", 1)
    );
    assert_eq!(
        bench.jobs.assign(attempt("A", "fails", 1)).len(),
        2,
        "the same again: its result again"
    );
    assert_eq!(bench.jobs.assign(attempt("A", "fails", 2)).len(), 1, "begun anew");
    assert_eq!(result_of(&mut bench).await.attempt, 2);
    assert_eq!(runs(&bench.dir.path().join("runs")), 2);
    // The control plane had taken it for lost, and it runs.
    bench.jobs.assign(attempt("B", "waits", 1));
    bench.jobs.assign(attempt("B", "waits", 2));
    assert_eq!(bench.jobs.held_attempts(), [2, 2]);
    gate.open_gate().await;
    assert_eq!(result_of(&mut bench).await.attempt, 2);
    let again = bench.jobs.assign(attempt("B", "waits", 3));
    assert!(matches!(&again[1], Body::Result(r) if r.attempt == 3 && r.outcome == "succeeded"));
    assert_eq!(runs(&bench.dir.path().join("runs")), 3, "done is done");
}

#[tokio::test]
async fn what_a_program_writes_goes_out_while_it_runs_and_again_to_the_next_replica() {
    let gate = Fifo::new();
    let script = format!(
        "echo one >&2; echo ::progress 50 half >&2; read line <{}; echo two >&2; echo 1",
        gate.gate()
    );
    let mut bench = bench(&entry("talks", &script, ""));
    bench.jobs.attached(7);
    bench.jobs.assign(assignment("A", "talks"));
    let mut lines = Vec::new();
    let mut percent = None;
    while lines.is_empty() || percent.is_none() {
        let event = bench.events.recv().await.unwrap();
        assert_eq!(bench.jobs.event(event), []);
        let due = bench.jobs.next_overdue().unwrap();
        for body in bench.jobs.overdue(due) {
            match body {
                Body::LogLines(sent) => lines.extend(sent.lines),
                Body::Progress(said) => percent = said.percent,
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!((lines, percent), (vec!["one".to_owned()], Some(50)));
    assert!(bench.jobs.attached(9).is_empty());
    let due = bench.jobs.next_overdue().unwrap();
    let again = bench.jobs.overdue(due);
    assert!(
        matches!(&again[0], Body::LogLines(sent) if sent.first == 1 && sent.epoch == 9),
        "{again:?}"
    );
    gate.open_gate().await;
    // The last line goes before the result, whether its time has come or not.
    let last = loop {
        let event = bench.events.recv().await.unwrap();
        let bodies = bench.jobs.event(event);
        if !bodies.is_empty() {
            break bodies;
        }
    };
    assert!(
        matches!(&last[0], Body::LogLines(sent) if sent.lines.last().unwrap() == "two"),
        "{last:?}"
    );
    let Some(Body::Result(result)) = last.last() else {
        panic!("{last:?}")
    };
    assert_eq!(&result.log_tail[..], b"one\ntwo");
}

#[tokio::test]
async fn the_person_at_the_machine_decides() {
    let mut bench = bench(&entry("ask", "echo x >> runs; echo 1", "local_mediation = true"));
    for (id, allow) in [("A", true), ("B", false)] {
        bench.jobs.assign(assignment(id, "ask"));
        let event = bench.events.recv().await.unwrap();
        let asked = bench.jobs.event(event).pop().unwrap();
        assert!(matches!(
            asked,
            Body::Mediation(wire::Mediation { waiting: true, .. })
        ));
        assert!(matches!(bench.jobs.attached(3).last().unwrap(), Body::Mediation(m) if m.epoch == 3));
        bench.desk.decide(id, allow).unwrap();
        let result = result_of(&mut bench).await;
        assert_eq!(result.outcome, if allow { "succeeded" } else { "rejected" });
    }
    assert_eq!(runs(&bench.dir.path().join("runs")), 1);
}

#[tokio::test]
async fn nobody_at_the_machine_means_no() {
    let mut bench = bench(&entry("ask", "echo 1", "local_mediation = true"));
    bench.jobs.assign(wire::Assignment {
        remaining_ms: 50,
        ..assignment("A", "ask")
    });
    let result = result_of(&mut bench).await;
    assert_eq!(
        (result.outcome.as_str(), result.error_code.as_str()),
        ("rejected", "mediation_timeout")
    );
    assert!(bench.desk.list().is_empty());
}

#[tokio::test]
async fn concurrency_is_the_owners_and_the_wait_is_within_the_deadline() {
    let gate = Fifo::new();
    let script = format!("read line <{}; echo 1", gate.gate());
    let mut bench = bench(&entry("one", &script, "concurrency = 1"));
    bench.jobs.assign(assignment("A", "one"));
    bench.jobs.assign(wire::Assignment {
        remaining_ms: 100,
        ..assignment("B", "one")
    });
    let first = result_of(&mut bench).await;
    assert_eq!(
        (first.dispatch_id.as_str(), first.error_code.as_str()),
        ("B", "deadline")
    );
    gate.open_gate().await;
    assert_eq!(result_of(&mut bench).await.dispatch_id, "A");
}

#[tokio::test]
async fn an_unknown_capability_is_rejected_and_a_stopping_agent_takes_nothing() {
    let mut bench = bench("");
    let sent = bench.jobs.assign(assignment("A", "nope"));
    assert!(matches!(&sent[1], Body::Result(r) if r.error_code == "unknown_capability"));
    bench.jobs.begin_stop();
    assert!(bench.jobs.assign(assignment("B", "echo")).is_empty());
    assert!(bench.jobs.held().is_empty());
}

fn refusal(code: &str, retry: bool) -> wire::ResultAnswer {
    wire::ResultAnswer {
        dispatch_id: "A".to_owned(),
        error_code: code.to_owned(),
        retry,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_refusal_that_the_control_plane_remembers_is_not_asked_for_again() {
    let mut bench = bench(&entry("quick", "echo 1", ""));
    bench.jobs.assign(assignment("A", "quick"));
    let first = result_of(&mut bench).await;
    bench.jobs.answered(&refusal("E1001", true));
    let again = bench.jobs.attached(8);
    assert!(
        matches!(&again[0], Body::Result(r) if r.request_id == first.request_id),
        "unknown: the same"
    );
    for code in OF_THE_REQUEST {
        bench.jobs.answered(&refusal(code, code == "E0609"));
        let again = bench.jobs.attached(9);
        assert!(
            matches!(&again[0], Body::Result(r) if r.request_id.is_empty() && r.epoch == 9),
            "{code}"
        );
    }
}

#[tokio::test]
async fn what_is_refused_for_good_is_forgotten() {
    for code in ["E0605", "E0606", "E0607", "E0608", "E0603", "E0906", ""] {
        let mut bench = bench(&entry("quick", "echo 1", ""));
        bench.jobs.assign(assignment("A", "quick"));
        result_of(&mut bench).await;
        bench.jobs.answered(&refusal(code, false));
        assert!(
            bench.jobs.held().is_empty() && bench.jobs.next_overdue().is_none(),
            "{code}"
        );
    }
}

#[tokio::test]
async fn what_is_held_is_bounded() {
    let mut bench = bench(&entry("ask", "echo 1", "local_mediation = true\nconcurrency = 1"));
    let large = || wire::Assignment {
        payload: vec![b' '; capability::MAX_OUTPUT].into(),
        ..assignment("", "ask")
    };
    let room = MAX_INPUT / capability::MAX_OUTPUT;
    let give = |bench: &mut Bench, id: usize, rest: wire::Assignment| {
        let dispatch_id = id.to_string();
        bench.jobs.assign(wire::Assignment { dispatch_id, ..rest })
    };
    for id in 0..room {
        assert_eq!(give(&mut bench, id, large()).len(), 1);
    }
    let sent = give(&mut bench, room, large());
    assert!(matches!(&sent[1], Body::Result(r) if r.error_code == "node_full"));
    for id in room..MAX_HELD {
        let small = wire::Assignment {
            payload: "".into(),
            ..assignment("", "ask")
        };
        assert_eq!(give(&mut bench, id, small).len(), 1);
    }
    for id in MAX_HELD..MAX_HELD + 5 {
        let sent = give(&mut bench, id, assignment("", "ask"));
        assert!(matches!(&sent[1], Body::Result(r) if r.error_code == "node_full"));
    }
    assert_eq!(bench.jobs.held().len(), MAX_HELD, "an attach may name no more");
    bench.jobs.abort().await;
}

#[tokio::test]
async fn a_stopped_once_is_owned_up_to() {
    let mut held = Fifo::new();
    let mut bench = bench(&slow(&held));
    bench.jobs.assign(assignment("A", "slow"));
    held.opened().await;
    bench.jobs.begin_stop();
    bench.jobs.abort().await;
    assert_eq!(result_of(&mut bench).await.error_code, "agent_stopped");
}
