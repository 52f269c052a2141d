//! The first process of a lease's namespace: builds the sandbox around itself, starts the tool in it, and
//! reaps what is left to it. When it ends, the kernel ends everything in the namespace.
//!
//! What never lives here: what the deadline is (see `warden`). Invariant: the tool is started only when
//! everything that the owner requires holds it.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;

use super::sandbox::{self, View};
use super::spec::{Arg, Event, Lines, Order, Spec, boot_ms, say};

/// Where the tool's standard input comes from must be open before the root changes.
pub(crate) fn run(spec: &Spec, mut socket: UnixStream, mut lines: Lines) -> ExitCode {
    close_others(socket.as_raw_fd());
    // The warden's end is everybody's. Once more after the change of user, which forgets it.
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    let _ = std::fs::write("/proc/self/oom_score_adj", "500");
    let Ok(input) = std::fs::File::open(&spec.params) else {
        return refuse(
            &mut socket,
            "sandbox_unavailable",
            "the parameters cannot be read",
        );
    };
    let mut held = spec.cgroups.clone();
    let view = match sandbox::enter(spec, &mut held) {
        Ok(view) => view,
        Err(why) => return refuse(&mut socket, "sandbox_unavailable", &why),
    };
    let _ = say(&mut socket, &Event::Sandbox(held.clone()));
    if let Some(why) = sandbox::missing(&spec.require, &held) {
        return refuse(&mut socket, "sandbox_unavailable", &why);
    }
    let mut command = match command(spec, &view) {
        Ok(command) => command,
        Err(why) => return refuse(&mut socket, "program_not_started", &why),
    };
    let child = match command.stdin(Stdio::from(input)).spawn() {
        Ok(child) => child,
        Err(error) => {
            let why = format!("cannot start {}: {error}", command.get_program().display());
            return refuse(&mut socket, "program_not_started", &why);
        }
    };
    let tool = Pid::from_raw(child.id().cast_signed());
    let _ = say(&mut socket, &Event::Started);
    let Ok(mut ear) = socket.try_clone() else {
        return ExitCode::FAILURE;
    };
    let kill_at = Arc::new(AtomicU64::new(spec.kill_at_ms));
    let extended = Arc::clone(&kill_at);
    std::thread::spawn(move || {
        while !lines.ended {
            while let Some(order) = lines.next::<Order>() {
                match order {
                    Order::Extend { kill_at_ms } => {
                        extended.fetch_max(kill_at_ms, Ordering::Relaxed);
                    }
                    Order::Stop { .. } => {
                        let _ = killpg(tool, Signal::SIGTERM);
                        let _ = kill(tool, Signal::SIGTERM);
                    }
                }
            }
            lines.fill(&mut ear);
        }
        // The warden is gone: this process is the first of its namespace, and takes all with it.
        std::process::exit(1);
    });
    std::thread::spawn(move || hold_deadline(&kill_at));
    let code = reap(tool);
    let (cpu_ms, max_rss_bytes) = used();
    let _ = say(
        &mut socket,
        &Event::Exited {
            code,
            cpu_ms,
            max_rss_bytes,
        },
    );
    ExitCode::SUCCESS
}

/// The warden holds the deadline; this is for a warden that somebody has stopped.
fn hold_deadline(kill_at: &AtomicU64) {
    loop {
        let left = kill_at.load(Ordering::Relaxed).saturating_sub(boot_ms());
        if left == 0 {
            std::process::exit(1);
        }
        std::thread::sleep(Duration::from_millis(left.min(1_000)));
    }
}

fn refuse(socket: &mut UnixStream, code: &str, message: &str) -> ExitCode {
    let (code, message) = (code.to_owned(), message.to_owned());
    let _ = say(socket, &Event::Refused { code, message });
    ExitCode::SUCCESS
}

/// Nothing that the supervisor has open is the tool's.
fn close_others(keep: i32) {
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .filter_map(std::result::Result::ok)
    {
        open.extend(
            entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok()),
        );
    }
    for fd in open.into_iter().filter(|fd| *fd > 2 && *fd != keep) {
        let _ = nix::unistd::close(fd);
    }
    // Standard input is the socket's other handle: the tool gets its own.
    let _ = std::io::stdin().as_fd();
}

fn command(spec: &Spec, view: &View) -> std::result::Result<Command, String> {
    let word = |arg: &Arg| match arg {
        Arg::Plain(text) => PathBuf::from(text),
        Arg::Tool(path) => view.tool.join(path),
    };
    let mut words = spec.argv.iter().map(word);
    let Some(program) = words.next() else {
        return Err("the tool has no command".to_owned());
    };
    let mut command = Command::new(program);
    command.args(words).env_clear();
    command.envs(spec.env.iter().map(|(name, value)| (name, value)));
    command
        .env("PALYRA_WORK", &view.work)
        .env("PALYRA_WORKSPACE", &view.workspace)
        .env("TMPDIR", &view.tmp)
        .env("HOME", &view.tmp)
        .current_dir(&view.work)
        .process_group(0);
    Ok(command)
}

/// Waits for the tool; whoever lost its parent ends up here too.
fn reap(tool: Pid) -> i32 {
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid == tool => return code,
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == tool => return -(signal as i32),
            Err(nix::Error::ECHILD) => return -1,
            _ => {}
        }
    }
}

fn used() -> (u64, u64) {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_CHILDREN) else {
        return (0, 0);
    };
    let ms = |time: nix::sys::time::TimeVal| {
        u64::try_from(time.tv_sec()).unwrap_or(0) * 1000 + u64::try_from(time.tv_usec()).unwrap_or(0) / 1000
    };
    let rss = u64::try_from(usage.max_rss()).unwrap_or(0) * 1024;
    (ms(usage.user_time()) + ms(usage.system_time()), rss)
}
