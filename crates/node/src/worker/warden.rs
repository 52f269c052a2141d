//! The warden of one lease: a process of its own that holds the lease's deadline, and ends all that runs
//! under it.
//!
//! ```text
//! supervisor ── socket ── warden (deadline, disk) ── socket ── first process of the namespace ── the tool
//! ```
//!
//! What never lives here: what the sandbox is made of (see `sandbox`), what the control plane thinks of the
//! lease.
//!
//! Invariants: the deadline is held here, so that a supervisor that was stopped or killed changes nothing
//! about it; without a supervisor (its end of the socket is closed) everything is ended at once; the warden
//! ends only when nothing of the lease runs any more, or says what it could not end; it never waits for
//! anything but the end of what it killed.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::Pid;

use super::spec::{Event, Lines, Order, Spec, boot_ms, say};
use super::{cgroup, folder, init};

/// How often the disk is looked at, in milliseconds.
const DISK_EVERY: u64 = 200;
/// How long what was killed may take to be gone before that is told.
const GONE_WITHIN: Duration = Duration::from_secs(5);
/// A supervisor that does not read is not waited for longer.
const SAY_WITHIN: Duration = Duration::from_millis(500);

/// The whole process `palyra worker warden`. Its standard input is the supervisor's socket; standard output
/// and error are the tool's. To be called before any thread exists.
#[must_use]
pub fn main(as_init: bool) -> ExitCode {
    let Ok(socket) = std::io::stdin().as_fd().try_clone_to_owned() else {
        return ExitCode::FAILURE;
    };
    let mut socket = UnixStream::from(socket);
    let mut lines = Lines::default();
    let Some(spec) = lines.first::<Spec>(&mut socket) else {
        eprintln!(
            "palyra worker warden is started by palyra worker run, with a socket as its standard input"
        );
        return ExitCode::from(2);
    };
    if as_init {
        return init::run(&spec, socket, lines);
    }
    // Fails only for a process that leads its group already, which is as good.
    let _ = nix::unistd::setsid();
    let _ = socket.set_write_timeout(Some(SAY_WITHIN));
    if boot_ms() >= spec.kill_at_ms {
        refuse(
            &mut socket,
            "lease_over",
            "the lease was over before it was begun",
        );
        return ExitCode::SUCCESS;
    }
    match Warden::begin(spec, socket, lines) {
        Ok(warden) => warden.watch(),
        Err((mut socket, why)) => {
            refuse(&mut socket, "sandbox_unavailable", &why);
            ExitCode::SUCCESS
        }
    }
}

fn refuse(socket: &mut UnixStream, code: &str, message: &str) {
    let (code, message) = (code.to_owned(), message.to_owned());
    let _ = say(socket, &Event::Refused { code, message });
    let _ = say(socket, &Event::Gone);
}

/// New namespaces for the children, as far as they may be had: what holds, in the words of
/// [`Event::Sandbox`].
fn namespaces(spec: &Spec) -> Vec<String> {
    let mut held = Vec::new();
    let root = nix::unistd::geteuid().is_root();
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    if spec.without.iter().any(|part| part == "pidns") {
        return vec!["-pidns: left out".to_owned()];
    }
    let mut flags = CloneFlags::CLONE_NEWPID;
    if !root {
        flags |= CloneFlags::CLONE_NEWUSER;
    }
    if let Err(error) = unshare(flags) {
        held.push(format!("-pidns: {error}"));
        return held;
    }
    if !root {
        let mapped = std::fs::write("/proc/self/setgroups", "deny")
            .and_then(|()| std::fs::write("/proc/self/uid_map", format!("0 {uid} 1")))
            .and_then(|()| std::fs::write("/proc/self/gid_map", format!("0 {gid} 1")));
        held.push(mapped.map_or_else(|error| format!("-userns: {error}"), |()| "userns".to_owned()));
    }
    held.push("pidns".to_owned());
    held
}

struct Warden {
    spec: Spec,
    supervisor: UnixStream,
    orders: Lines,
    inside: UnixStream,
    events: Lines,
    child: Child,
    timer: TimerFd,
    kill_at: u64,
    /// When what was told to stop is ended.
    grace_until: Option<u64>,
    in_namespace: bool,
    disk_before: u64,
    disk_at: u64,
}

impl Warden {
    fn begin(
        spec: Spec,
        supervisor: UnixStream,
        orders: Lines,
    ) -> std::result::Result<Self, (UnixStream, String)> {
        // Whoever leaves the sandbox's family tree becomes a child of this process. Needed without a PID
        // namespace.
        let _ = nix::sys::prctl::set_child_subreaper(true);
        let mut held = namespaces(&spec);
        held.extend(spec.cgroups.iter().cloned());
        let in_namespace = held.iter().any(|part| part == "pidns");
        let begun = || -> std::io::Result<(Child, UnixStream, TimerFd)> {
            let (mut inside, theirs) = UnixStream::pair()?;
            let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC)?;
            let child = Command::new("/proc/self/exe")
                .arg0("palyra")
                .args(["worker", "warden", "--init"])
                .env_clear()
                .current_dir("/")
                .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
                .spawn()?;
            let told = Spec {
                cgroups: held.clone(),
                ..spec.clone()
            };
            say(&mut inside, &told)?;
            inside.set_nonblocking(true)?;
            Ok((child, inside, timer))
        };
        let (child, inside, timer) = match begun() {
            Ok(begun) => begun,
            Err(error) => return Err((supervisor, format!("the sandbox cannot be begun: {error}"))),
        };
        if supervisor.set_nonblocking(true).is_err() {
            return Err((supervisor, "the supervisor's socket cannot be used".to_owned()));
        }
        // A warden is small and must be the last to go.
        let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
        let _ = supervisor.set_write_timeout(Some(SAY_WITHIN));
        let disk_before = spec
            .workspace
            .as_deref()
            .map_or(0, |path| folder::used(path).bytes);
        let mut warden = Self {
            kill_at: spec.kill_at_ms,
            spec,
            supervisor,
            orders,
            inside,
            events: Lines::default(),
            child,
            timer,
            grace_until: None,
            in_namespace,
            disk_before,
            disk_at: boot_ms() + DISK_EVERY,
        };
        warden.arm();
        Ok(warden)
    }

    /// The timer goes by the clock that counts sleep, and so fires at once after one that was too long.
    fn arm(&mut self) {
        let at = Duration::from_millis(self.kill_at.max(1));
        let when = Expiration::OneShot(TimeSpec::from_duration(at));
        if self
            .timer
            .set(when, TimerSetTimeFlags::TFD_TIMER_ABSTIME)
            .is_err()
        {
            self.kill_at = 0;
        }
    }

    fn tell(&mut self, event: &Event) {
        // Blocking for this one message, with a limit: an event that is lost is a result that is lost.
        let _ = self.supervisor.set_nonblocking(false);
        let _ = say(&mut self.supervisor, event);
        let _ = self.supervisor.set_nonblocking(true);
    }

    fn watch(mut self) -> ExitCode {
        loop {
            self.wait();
            let now = boot_ms();
            if now >= self.kill_at {
                return self.end("deadline", "the lease ran out".to_owned());
            }
            self.orders.fill(&mut self.supervisor);
            while let Some(order) = self.orders.next::<Order>() {
                self.obey(order);
            }
            if self.orders.ended {
                return self.end("supervisor", "the supervisor is gone".to_owned());
            }
            if self.grace_until.is_some_and(|until| now >= until) {
                return self.end(
                    "stopped",
                    "it did not end by itself when it was told to".to_owned(),
                );
            }
            self.events.fill(&mut self.inside);
            while let Some(event) = self.events.next::<Event>() {
                self.tell(&event);
            }
            if self.events.ended {
                return self.end("", String::new());
            }
            if now >= self.disk_at
                && let Some(message) = self.over_disk(now)
            {
                return self.end("disk", message);
            }
        }
    }

    fn wait(&self) {
        let next = self.grace_until.unwrap_or(u64::MAX).min(self.disk_at);
        let left = next.saturating_sub(boot_ms()).min(60_000);
        let timeout =
            PollTimeout::try_from(u32::try_from(left).unwrap_or(60_000) + 1).unwrap_or(PollTimeout::MAX);
        let mut ready = [
            PollFd::new(self.supervisor.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.inside.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.timer.as_fd(), PollFlags::POLLIN),
        ];
        // An interruption is as good as an event: everything is looked at.
        let _ = poll(&mut ready, timeout);
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Extend { kill_at_ms } if kill_at_ms > self.kill_at => {
                self.kill_at = kill_at_ms;
                self.arm();
                // The sandbox's first process holds it as well, for whoever stops this one.
                let _ = say(&mut self.inside, &order);
            }
            Order::Extend { .. } => {}
            Order::Stop { grace_ms } => {
                let until = boot_ms() + grace_ms;
                self.grace_until = Some(self.grace_until.map_or(until, |before| before.min(until)));
                let _ = say(&mut self.inside, &order);
            }
        }
    }

    /// Why it has written too much, if so.
    fn over_disk(&mut self, now: u64) -> Option<String> {
        self.disk_at = now + DISK_EVERY;
        let mut used = folder::used(&self.spec.work_dir);
        if let Some(workspace) = &self.spec.workspace {
            let there = folder::used(workspace);
            used.bytes += there.bytes.saturating_sub(self.disk_before);
            used.too_many |= there.too_many;
        }
        used.bytes += deleted_but_open(&self.spec.cgroup_procs);
        let limit = self.spec.bounds.disk_bytes;
        if used.bytes > limit {
            return Some(format!(
                "it has written {} bytes, {limit} are allowed",
                used.bytes
            ));
        }
        used.too_many
            .then(|| format!("it has made more than {} files", folder::FILES_MAX))
    }

    fn end(mut self, why: &str, message: String) -> ExitCode {
        // Fails only when it has ended already.
        let _ = self.child.kill();
        cgroup::kill_all(&self.spec.cgroup_procs);
        let killed = !why.is_empty();
        // In its namespace the end of the first process is the end of all: the kernel lets nobody outlive it,
        // and this waits for the last of them.
        let _ = self.child.wait();
        let left = if self.in_namespace {
            cgroup::wait_empty(&self.spec.cgroup_procs, GONE_WITHIN)
        } else {
            end_family(GONE_WITHIN)
        };
        while let Some(event) = self.next_late() {
            self.tell(&event);
        }
        if killed {
            let why = why.to_owned();
            self.tell(&Event::Killed { why, message });
        }
        let last = if left.is_empty() {
            Event::Gone
        } else {
            Event::Left { pids: left }
        };
        self.tell(&last);
        ExitCode::SUCCESS
    }

    /// What the sandbox said before it ended. Its end of the socket is closed by now.
    fn next_late(&mut self) -> Option<Event> {
        for _ in 0..64 {
            if let Some(event) = self.events.next() {
                return Some(event);
            }
            if self.events.ended {
                return None;
            }
            self.events.fill(&mut self.inside);
        }
        None
    }
}

/// Bytes of files that have no name any more and are held open.
fn deleted_but_open(procs: &[std::path::PathBuf]) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut seen = std::collections::BTreeMap::new();
    for pid in cgroup::members(procs) {
        let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for entry in entries.filter_map(std::result::Result::ok) {
            match std::fs::metadata(entry.path()) {
                Ok(meta) if meta.is_file() && meta.nlink() == 0 => {
                    seen.insert((meta.dev(), meta.ino()), meta.blocks() * 512);
                }
                _ => {}
            }
        }
    }
    seen.values().sum()
}

/// Without a PID namespace: ends every descendant of this process, which adopts those that left their family.
/// Answers what could not be ended.
fn end_family(within: Duration) -> Vec<i32> {
    let until = boot_ms() + u64::try_from(within.as_millis()).unwrap_or(0);
    loop {
        while matches!(
            nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG)),
            Ok(status) if status != nix::sys::wait::WaitStatus::StillAlive
        ) {}
        let family = descendants(std::process::id().cast_signed());
        if family.is_empty() || boot_ms() >= until {
            return family;
        }
        for pid in family {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// All processes below this one.
fn descendants(of: i32) -> Vec<i32> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(std::result::Result::ok)
    {
        if let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
            && let Some(parent) = parent_of(&entry.path())
        {
            parents.push((pid, parent));
        }
    }
    let mut family = vec![of];
    let mut at = 0;
    while at < family.len() {
        let parent = family[at];
        family.extend(
            parents
                .iter()
                .filter(|(_, of)| *of == parent)
                .map(|(pid, _)| *pid),
        );
        at += 1;
    }
    family.split_off(1)
}

/// Field 4 of `stat`, behind the name in parentheses, which may hold anything.
fn parent_of(process: &Path) -> Option<i32> {
    let stat = std::fs::read_to_string(process.join("stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}
