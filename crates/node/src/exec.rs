//! Runs one program of the owner's: JSON in, JSON out, within its limits.
//!
//! What never lives here: which program, and whether it may run (see `capability` and `work`).
//!
//! Invariants: the program sees only the environment variables that its owner allows and three of ours; it
//! leads a process group of its own, and nothing of that group outlives the run; memory per run is bounded by
//! the payload, the largest answer and the stderr tail.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use crate::capability::Program;
use crate::work::{Outcome, Stop, stopped};

/// How much of stderr is kept for the message of a failure, in bytes.
const STDERR_TAIL: usize = 2048;
/// Between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// How long the pipes may stay open once the program itself has ended and its group was killed.
const DRAIN: Duration = Duration::from_secs(2);

/// One run.
pub(crate) struct Run<'a> {
    /// What to execute.
    pub(crate) program: &'a Program,
    /// Working folder when the program has none of its own.
    pub(crate) home: &'a Path,
    /// Goes to stdin.
    pub(crate) input: &'a [u8],
    /// The run is ended then.
    pub(crate) deadline: Instant,
    /// The largest answer, in bytes.
    pub(crate) max_output: usize,
    /// Set for the program in addition to its allow-list.
    pub(crate) extra_env: &'a [(&'a str, &'a str)],
}

enum End {
    Exited(std::io::Result<ExitStatus>),
    Deadline,
    Overflow,
    Stopped(Stop),
}

/// Runs it. `stop` ends it early; `spawned` hears the process id, which is also the id of its group.
pub(crate) async fn run(
    run: Run<'_>,
    stop: &mut watch::Receiver<Option<Stop>>,
    spawned: impl FnOnce(u32),
) -> Outcome {
    let mut child = match command(&run).spawn() {
        Ok(child) => child,
        Err(error) => {
            let message = format!("cannot start {}: {error}", run.program.path.display());
            return Outcome::failed("program_not_started", message);
        }
    };
    let Some(group) = child.id() else {
        return Outcome::failed(
            "program_not_started",
            "the program ended before it had a process id",
        );
    };
    spawned(group);
    let guard = GroupGuard(group);
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let Some(mut pipe) = stdin {
            // A program that doesn't read its input ends the pipe; that is its right.
            let _ = pipe.write_all(run.input).await;
            let _ = pipe.shutdown().await;
        }
        std::future::pending::<()>().await;
    };
    let (full, overflow) = oneshot::channel();
    let output = tokio::spawn(read_bounded(stdout, run.max_output, full));
    let tail = tokio::spawn(read_tail(stderr));
    let end = tokio::select! {
        status = child.wait() => End::Exited(status),
        () = tokio::time::sleep_until(run.deadline) => End::Deadline,
        () = overflowed(overflow) => End::Overflow,
        reason = stopped(stop) => End::Stopped(reason),
        () = feed => End::Deadline,
    };
    let end = match end {
        End::Exited(status) => End::Exited(status),
        early => {
            terminate(&mut child, group).await;
            early
        }
    };
    drop(guard);
    let output = tokio::time::timeout(DRAIN, output)
        .await
        .ok()
        .and_then(|joined| joined.ok())
        .unwrap_or_default();
    let tail = tokio::time::timeout(DRAIN, tail)
        .await
        .ok()
        .and_then(|joined| joined.ok())
        .unwrap_or_default();
    judge(end, output, &tail, &run)
}

/// Kills what is left of a process group, however the run ends, even when its future is dropped.
struct GroupGuard(u32);

impl Drop for GroupGuard {
    fn drop(&mut self) {
        signal(self.0, Signal::SIGKILL);
    }
}

fn command(run: &Run<'_>) -> Command {
    let mut command = Command::new(&run.program.path);
    command.args(&run.program.args).env_clear();
    for name in &run.program.env {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    for (name, value) in run.extra_env {
        command.env(name, value);
    }
    command.current_dir(run.program.working_dir.as_deref().unwrap_or(run.home));
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.process_group(0).kill_on_drop(true);
    command
}

async fn terminate(child: &mut Child, group: u32) {
    signal(group, Signal::SIGTERM);
    if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
        signal(group, Signal::SIGKILL);
        let _ = child.wait().await;
    }
}

fn signal(group: u32, signal: Signal) {
    if let Ok(group) = i32::try_from(group) {
        // No such group: it is gone already, which is what was wanted.
        let _ = killpg(Pid::from_raw(group), signal);
    }
}

async fn overflowed(full: oneshot::Receiver<()>) {
    if full.await.is_err() {
        // The reader ended below the limit; the other ends decide.
        std::future::pending::<()>().await;
    }
}

async fn read_bounded(
    pipe: Option<impl AsyncRead + Unpin>,
    limit: usize,
    full: oneshot::Sender<()>,
) -> Vec<u8> {
    let mut all = Vec::new();
    if let Some(pipe) = pipe {
        let _ = pipe.take(limit as u64 + 1).read_to_end(&mut all).await;
        if all.len() > limit {
            let _ = full.send(());
        }
    }
    all
}

async fn read_tail(pipe: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut tail: Vec<u8> = Vec::new();
    let Some(mut pipe) = pipe else { return tail };
    let mut chunk = [0u8; 4096];
    while let Ok(count) = pipe.read(&mut chunk).await {
        if count == 0 {
            break;
        }
        tail.extend_from_slice(&chunk[..count]);
        if tail.len() > STDERR_TAIL {
            tail.drain(..tail.len() - STDERR_TAIL);
        }
    }
    tail
}

fn judge(end: End, mut output: Vec<u8>, tail: &[u8], run: &Run<'_>) -> Outcome {
    let path = run.program.path.display();
    let status = match end {
        End::Deadline => {
            return Outcome::failed(
                "timeout",
                with_tail(format!("{path} did not end in time and was killed"), tail),
            );
        }
        End::Overflow => return too_large(run),
        End::Stopped(Stop::Cancelled) => return Outcome::Cancelled,
        End::Stopped(Stop::Agent) => {
            return Outcome::failed("agent_stopped", format!("the node was stopped while {path} ran"));
        }
        End::Exited(Err(error)) => return Outcome::failed("program_lost", format!("{path}: {error}")),
        End::Exited(Ok(status)) => status,
    };
    if !status.success() {
        return Outcome::failed(
            "program_failed",
            with_tail(format!("{path}: {}", describe(status)), tail),
        );
    }
    if output.len() > run.max_output {
        return too_large(run);
    }
    let trimmed = output.trim_ascii_end().len();
    output.truncate(trimmed);
    if is_json(&output) {
        return Outcome::Succeeded(output);
    }
    let message = format!(
        "{path} ended well but its output of {} bytes is not one JSON value",
        output.len()
    );
    Outcome::failed("output_not_json", with_tail(message, tail))
}

fn too_large(run: &Run<'_>) -> Outcome {
    let path = run.program.path.display();
    Outcome::failed(
        "output_too_large",
        format!("{path} wrote more than the {} bytes allowed", run.max_output),
    )
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("ended by signal {signal}"),
        (None, None) => "ended in an unknown way".to_owned(),
    }
}

fn with_tail(message: String, tail: &[u8]) -> String {
    let tail = String::from_utf8_lossy(tail);
    let tail = tail.trim();
    if tail.is_empty() {
        message
    } else {
        format!("{message}; stderr ends with: {tail}")
    }
}

/// Whether `bytes` are exactly one JSON value in UTF-8.
pub(crate) fn is_json(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn sh(script: &str) -> Program {
        let args = vec!["-c".to_owned(), script.to_owned()];
        Program {
            path: PathBuf::from("/bin/sh"),
            args,
            working_dir: None,
            env: vec![],
        }
    }

    async fn outcome(program: &Program, input: &[u8], limit: Duration) -> Outcome {
        let (_keep, mut stop) = watch::channel(None);
        run(job(program, input, limit), &mut stop, |_| {}).await
    }

    fn job<'a>(program: &'a Program, input: &'a [u8], limit: Duration) -> Run<'a> {
        Run {
            program,
            home: Path::new("/"),
            input,
            deadline: Instant::now() + limit,
            max_output: 1000,
            extra_env: &[("PALYRA_DISPATCH_ID", "x")],
        }
    }

    fn failure(outcome: Outcome) -> (String, String) {
        let Outcome::Failed { code, message } = outcome else {
            panic!("{outcome:?}")
        };
        (code, message)
    }

    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn json_goes_in_and_comes_out() {
        let end = outcome(&sh("cat"), b"{\"a\":1}", LONG).await;
        assert_eq!(end, Outcome::Succeeded(b"{\"a\":1}".to_vec()));
        assert_eq!(
            outcome(&sh("echo 5; exec <&-"), &[b' '; 200_000], LONG).await,
            Outcome::Succeeded(b"5".to_vec())
        );
    }

    #[tokio::test]
    async fn failures_carry_code_and_stderr() {
        let (code, message) = failure(outcome(&sh("echo oh no >&2; exit 3"), b"", LONG).await);
        assert_eq!(code, "program_failed");
        assert!(
            message.contains("exit code 3") && message.contains("oh no"),
            "{message}"
        );
        let (code, message) = failure(outcome(&sh("kill -9 $$"), b"", LONG).await);
        assert!(
            code == "program_failed" && message.contains("signal 9"),
            "{message}"
        );
        let missing = Program {
            path: PathBuf::from("/nowhere"),
            ..sh("")
        };
        assert_eq!(
            failure(outcome(&missing, b"", LONG).await).0,
            "program_not_started"
        );
    }

    #[tokio::test]
    async fn output_is_checked_and_bounded() {
        for script in ["echo hello", "true", "echo 1 2", "printf '\"\\377\"'"] {
            assert_eq!(
                failure(outcome(&sh(script), b"", LONG).await).0,
                "output_not_json",
                "{script}"
            );
        }
        let (code, _) = failure(outcome(&sh("while :; do echo 1234567890; done"), b"", LONG).await);
        assert_eq!(code, "output_too_large");
        let (_, message) =
            failure(outcome(&sh("yes longline | head -c 100000 >&2; exit 1"), b"", LONG).await);
        assert!(message.len() < 3000);
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let script = format!(
            "trap '' TERM; sleep 1000 & echo $! > {}; wait",
            pid_file.display()
        );
        let begun = Instant::now();
        let (code, _) = failure(outcome(&sh(&script), b"", Duration::from_millis(300)).await);
        assert_eq!(code, "timeout");
        assert!(begun.elapsed() < Duration::from_secs(10));
        let pid = std::fs::read_to_string(pid_file).unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        assert!(stat.is_empty() || stat.contains(" Z "), "{stat}");
    }

    #[tokio::test]
    async fn a_background_child_that_keeps_the_pipe_open_does_not_hold_the_result() {
        let begun = Instant::now();
        let end = outcome(&sh("sleep 1000 & echo true"), b"", LONG).await;
        assert_eq!(end, Outcome::Succeeded(b"true".to_vec()));
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn cancelling_ends_the_run() {
        let (cancel, mut stop) = watch::channel(None);
        let program = sh("sleep 1000");
        let end = run(job(&program, b"", LONG), &mut stop, |_| {
            cancel.send_replace(Some(Stop::Cancelled));
        });
        assert_eq!(end.await, Outcome::Cancelled);
    }

    #[tokio::test]
    async fn the_environment_is_only_what_is_allowed() {
        let program = Program {
            env: vec!["HOME".to_owned()],
            ..sh("env | cut -d= -f1 | sort | tr '\\n' ' ' | sed 's/.*/\"&\"/'")
        };
        let Outcome::Succeeded(names) = outcome(&program, b"", LONG).await else {
            panic!("failed")
        };
        let names = String::from_utf8(names).unwrap();
        assert!(
            names.contains("HOME") && names.contains("PALYRA_DISPATCH_ID"),
            "{names}"
        );
        assert!(!names.contains("CARGO"), "{names}");
    }
}
