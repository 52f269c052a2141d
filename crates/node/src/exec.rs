//! Runs one program of the owner's: JSON in, JSON out, within its limits.
//!
//! What never lives here: which program, and whether it may run (see `capability` and `work`).
//!
//! Invariants: the program sees only the environment variables that its owner allows and three of ours; it
//! leads a process group of its own, and nothing of that group outlives the run; memory per run is bounded by
//! the payload, the largest answer and the stderr tail.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use crate::capability::Program;
use crate::output::Output;
use crate::work::{Outcome, Stop, stopped};

/// How much of stderr is kept for the message of a failure, in bytes.
const STDERR_TAIL: usize = 2048;
/// The exit code by which a program says that trying again may help: EX_TEMPFAIL of sysexits.h.
const TEMPORARY: i32 = 75;
/// How long the pipes may stay open once the program itself has ended and its group was killed. Only who left
/// the group can hold them open; what came until then is the answer.
const DRAIN: Duration = Duration::from_secs(2);
/// The deepest nesting of an answer: the control plane takes no more.
const JSON_DEPTH: usize = 64;

/// One run.
pub(crate) struct Run<'a> {
    /// What to execute.
    pub(crate) program: &'a Program,
    /// Working folder when the program has none of its own.
    pub(crate) home: &'a Path,
    /// Goes to stdin.
    pub(crate) input: &'a [u8],
    /// The run is ended then: the dispatch's deadline.
    pub(crate) deadline: Instant,
    /// The longest that the capability's owner lets it run.
    pub(crate) timeout: Duration,
    /// Between SIGTERM and SIGKILL.
    pub(crate) grace: Duration,
    /// Hears what it writes to stderr.
    pub(crate) output: Arc<Output>,
    /// The largest answer, in bytes.
    pub(crate) max_output: usize,
    /// Set for the program in addition to its allow-list.
    pub(crate) extra_env: &'a [(&'a str, &'a str)],
}

enum End {
    Exited(std::io::Result<ExitStatus>),
    Deadline,
    Timeout,
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
    let output = Collector::start(stdout, keep_bounded(run.max_output, full));
    let heard = Arc::clone(&run.output);
    let tail = Collector::start(stderr, move |kept, piece| {
        heard.write(piece);
        keep_tail(kept, piece)
    });
    let begun = Instant::now();
    let end = tokio::select! {
        status = child.wait() => End::Exited(status),
        () = tokio::time::sleep_until(run.deadline) => End::Deadline,
        () = tokio::time::sleep(run.timeout) => End::Timeout,
        () = overflowed(overflow) => End::Overflow,
        reason = stopped(stop) => End::Stopped(reason),
        () = feed => End::Deadline,
    };
    let mut killed = false;
    let end = match end {
        End::Exited(status) => End::Exited(status),
        early => {
            killed = terminate(&mut child, group, run.grace).await;
            early
        }
    };
    let stopped = Stopped {
        ran: begun.elapsed(),
        killed,
    };
    drop(guard);
    let until = Instant::now() + DRAIN;
    let (output, tail) = (output.finish(until).await, tail.finish(until).await);
    judge(end, output, &tail, &run, &stopped)
}

/// How a run was ended that did not end by itself.
struct Stopped {
    ran: Duration,
    /// SIGTERM was not enough.
    killed: bool,
}

impl Stopped {
    fn words(&self, grace: Duration) -> String {
        let ran = self.ran.as_secs_f64();
        if self.killed {
            format!("ended by SIGKILL after {ran:.1} s: it did not end within {grace:?} of SIGTERM")
        } else {
            format!("ended by SIGTERM after {ran:.1} s")
        }
    }
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

/// Ends the group; whether it took SIGKILL.
async fn terminate(child: &mut Child, group: u32, grace: Duration) -> bool {
    signal(group, Signal::SIGTERM);
    if timeout(grace, child.wait()).await.is_ok() {
        return false;
    }
    signal(group, Signal::SIGKILL);
    let _ = child.wait().await;
    true
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

/// Reads a pipe in the background. What it has read can be had while the pipe is still open.
struct Collector {
    kept: Arc<Mutex<Vec<u8>>>,
    reading: JoinHandle<()>,
}

impl Collector {
    /// `keep` takes each piece into what is kept and answers whether to read on.
    fn start(
        pipe: Option<impl AsyncRead + Send + Unpin + 'static>,
        mut keep: impl FnMut(&mut Vec<u8>, &[u8]) -> bool + Send + 'static,
    ) -> Self {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&kept);
        let reading = tokio::spawn(async move {
            let Some(mut pipe) = pipe else { return };
            let mut piece = vec![0u8; 8192];
            while let Ok(count @ 1..) = pipe.read(&mut piece).await {
                let mut kept = into.lock().unwrap_or_else(PoisonError::into_inner);
                if !keep(&mut kept, &piece[..count]) {
                    return;
                }
            }
        });
        Self { kept, reading }
    }

    /// What there is at the end of the pipe, or at `until` when it stays open.
    async fn finish(mut self, until: Instant) -> Vec<u8> {
        let _ = timeout_at(until, &mut self.reading).await;
        std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

/// Keeps one byte more than allowed, which says that it was too much.
fn keep_bounded(limit: usize, full: oneshot::Sender<()>) -> impl FnMut(&mut Vec<u8>, &[u8]) -> bool {
    let mut full = Some(full);
    move |kept, piece| {
        let room = (limit + 1).saturating_sub(kept.len());
        kept.extend_from_slice(&piece[..piece.len().min(room)]);
        if kept.len() <= limit {
            return true;
        }
        if let Some(full) = full.take() {
            // Nobody listens when the run has ended already.
            let _ = full.send(());
        }
        false
    }
}

fn keep_tail(kept: &mut Vec<u8>, piece: &[u8]) -> bool {
    kept.extend_from_slice(piece);
    if kept.len() > STDERR_TAIL {
        kept.drain(..kept.len() - STDERR_TAIL);
    }
    true
}

fn judge(end: End, mut output: Vec<u8>, tail: &[u8], run: &Run<'_>, stopped: &Stopped) -> Outcome {
    let path = run.program.path.display();
    let status = match end {
        End::Deadline => {
            let message = format!("the deadline came while {path} ran: {}", stopped.words(run.grace));
            return Outcome::failed("deadline", with_tail(message, tail));
        }
        End::Timeout => {
            let (limit, words) = (run.timeout, stopped.words(run.grace));
            let message = format!("{path} ran longer than its capability's timeout of {limit:?}: {words}");
            return Outcome::failed("timeout", with_tail(message, tail));
        }
        End::Overflow => return too_large(run),
        End::Stopped(Stop::Cancelled) => {
            return Outcome::cancelled("stopped", format!("{path} was {}", stopped.words(run.grace)));
        }
        End::Stopped(Stop::Agent) => {
            return Outcome::failed("agent_stopped", format!("the node was stopped while {path} ran"));
        }
        End::Exited(Err(error)) => return Outcome::failed("program_lost", format!("{path}: {error}")),
        End::Exited(Ok(status)) => status,
    };
    if status.code() == Some(TEMPORARY) {
        let message = format!("{path}: exit code {TEMPORARY}, try again later");
        return Outcome::failed("temporary_failure", with_tail(message, tail));
    }
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
        "{path} ended well but its output of {} bytes is not one JSON value of at most {JSON_DEPTH} levels",
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

/// Whether `bytes` are exactly one JSON value in UTF-8 that the control plane takes. Does not recurse.
pub(crate) fn is_json(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| {
        depth(bytes) <= JSON_DEPTH && serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
    })
}

/// The deepest nesting of brackets outside of strings. Meaningful for JSON; finite for anything.
fn depth(bytes: &[u8]) -> usize {
    let (mut now, mut deepest, mut in_string, mut escaped) = (0usize, 0usize, false, false);
    for byte in bytes {
        match (in_string, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (_, b'"') => in_string = !in_string,
            (false, b'[' | b'{') => {
                now += 1;
                deepest = deepest.max(now);
            }
            (false, b']' | b'}') => now = now.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::testing::Fifo;

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
            deadline: Instant::now() + LONG,
            timeout: limit,
            grace: Duration::from_millis(500),
            output: Arc::new(Output::new("x", tokio::sync::mpsc::unbounded_channel().0)),
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
    async fn a_program_that_hangs_runs_into_its_deadline() {
        // The deadline may come before the shell does; that is a hang as well.
        let (code, _) = failure(outcome(&sh("exec sleep 1000"), b"", Duration::from_millis(50)).await);
        assert_eq!(code, "timeout");
        let program = sh("exec sleep 1000");
        let mut late = job(&program, b"", LONG);
        late.deadline = Instant::now() + Duration::from_millis(50);
        let (_keep, mut stop) = watch::channel(None);
        let (code, message) = failure(run(late, &mut stop, |_| {}).await);
        assert!(code == "deadline" && message.contains("SIGTERM"), "{message}");
        let (code, _) = failure(outcome(&sh("exit 75"), b"", LONG).await);
        assert_eq!(code, "temporary_failure");
    }

    #[tokio::test]
    async fn a_program_that_ignores_sigterm_is_killed_with_its_children() {
        let mut held = Fifo::new();
        let script = format!(
            "trap '' TERM; exec 3>{}; echo up >&3; sleep 1000 & wait",
            held.path()
        );
        let (cancel, mut stop) = watch::channel(None);
        let program = sh(&script);
        let end = run(job(&program, b"", LONG), &mut stop, |_| {});
        let (end, ()) = tokio::join!(end, async {
            held.opened().await;
            cancel.send_replace(Some(Stop::Cancelled));
        });
        assert!(
            matches!(&end, Outcome::Cancelled { code, message } if code == "stopped" && message.contains("SIGKILL")),
            "{end:?}"
        );
        held.released().await;
    }

    #[tokio::test]
    async fn what_a_program_leaves_behind_is_ended_with_it() {
        let mut held = Fifo::new();
        let script = format!("exec 3>{}; echo up >&3; sleep 1000 & echo true", held.path());
        let end = outcome(&sh(&script), b"", LONG).await;
        assert_eq!(end, Outcome::Succeeded(b"true".to_vec()));
        held.opened().await;
        held.released().await;
    }

    #[tokio::test]
    async fn who_left_the_group_does_not_cost_the_answer() {
        let mut held = Fifo::new();
        // It waits for the FIFO to be read, so that it has left the group before the program ends.
        let script = format!(
            "setsid sh -c 'exec 3>{}; echo up >&3; exec sleep 5' & read line <{}; echo true",
            held.path(),
            held.gate()
        );
        let program = sh(&script);
        let end = outcome(&program, b"", LONG);
        let (end, ()) = tokio::join!(end, async {
            held.opened().await;
            held.open_gate().await;
        });
        assert_eq!(end, Outcome::Succeeded(b"true".to_vec()));
    }

    #[test]
    fn json_is_one_value_of_a_depth_that_the_control_plane_takes() {
        let nested = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        assert!(is_json(nested(JSON_DEPTH).as_bytes()) && !is_json(nested(JSON_DEPTH + 1).as_bytes()));
        assert!(
            !is_json(nested(1_000_000).as_bytes()),
            "no input exhausts the stack"
        );
        assert!(
            is_json(format!("\"{}\\\"[\"", "[".repeat(100)).as_bytes()),
            "brackets in a string"
        );
    }

    #[tokio::test]
    async fn cancelling_ends_the_run() {
        let (cancel, mut stop) = watch::channel(None);
        let program = sh("sleep 1000");
        let end = run(job(&program, b"", LONG), &mut stop, |_| {
            cancel.send_replace(Some(Stop::Cancelled));
        });
        let end = end.await;
        assert!(
            matches!(&end, Outcome::Cancelled { message, .. } if message.contains("SIGTERM after")),
            "{end:?}"
        );
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
