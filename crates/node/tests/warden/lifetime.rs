//! Tools that want to live longer than their lease, and supervisors that die or hang in the middle of it.

use std::io::Read;
use std::process::{Command, ExitCode, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use palyra_node::worker::execute::How;
use palyra_node::worker::spec::{Order, Spec, boot_ms};
use palyra_node::worker::supervise::Warden;

use crate::kit::{Lease, program, read, runtime, until};

pub(crate) const TESTS: &[(&str, fn())] = &[
    (
        "who_outlives_the_lease_is_dead_at_its_end",
        who_outlives_the_lease_is_dead_at_its_end,
    ),
    ("a_renewal_moves_the_end", a_renewal_moves_the_end),
    ("a_stop_is_gentle_first", a_stop_is_gentle_first),
    (
        "a_lease_that_is_over_is_not_begun",
        a_lease_that_is_over_is_not_begun,
    ),
    (
        "a_killed_supervisor_leaves_nothing",
        a_killed_supervisor_leaves_nothing,
    ),
    (
        "a_frozen_supervisor_changes_nothing",
        a_frozen_supervisor_changes_nothing,
    ),
    ("a_killed_warden_leaves_nothing", a_killed_warden_leaves_nothing),
    (
        "a_frozen_warden_changes_nothing_either",
        a_frozen_warden_changes_nothing_either,
    ),
];

/// Writes the time since boot, in milliseconds, into `out/beat`, again and again, and ignores every signal.
const BEAT: &str = "trap '' TERM INT HUP; while :; do read up rest < /proc/uptime; echo $up > out/beat.new\n\
                    mv out/beat.new out/beat; done";

/// The last beat, in milliseconds since boot.
fn last_beat(lease: &Lease) -> u64 {
    let text = read(&lease.out("beat"));
    let (seconds, hundredths) = text.trim().split_once('.').unwrap_or(("0", "0"));
    seconds.parse::<u64>().unwrap_or(0) * 1000 + hundredths.parse::<u64>().unwrap_or(0) * 10
}

fn who_outlives_the_lease_is_dead_at_its_end() {
    let mut lease = Lease::new(BEAT).ending_in(1500);
    let ended = lease.run();
    assert!(
        matches!(&ended.how, How::Killed { why, .. } if why == "deadline") && ended.gone,
        "{ended:?}"
    );
    let (last, end) = (last_beat(&lease), lease.spec.kill_at_ms);
    let after = i128::from(last) - i128::from(end);
    println!("  the last sign of life was {} ms before the end", -after);
    assert!(last > 0, "it never ran");
    // Not a measure of this machine: the margin of a lease, which is what keeps the promise.
    assert!(after < 100, "it lived {after} ms beyond its end");
}

fn a_renewal_moves_the_end() {
    let mut lease = Lease::new("while [ ! -e in/go ]; do :; done; echo 1").ending_in(1000);
    let (kill_at, go) = (lease.kill_at.clone(), lease.place.work().join("in/go"));
    let first = lease.spec.kill_at_ms;
    let ended = runtime().block_on(async {
        let steer = async {
            kill_at.send_replace(first + 60_000);
            while boot_ms() < first + 100 {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            std::fs::write(go, "").unwrap();
        };
        tokio::join!(lease.go(), steer).0
    });
    assert_eq!(ended.how, How::Exited(0));
}

fn a_stop_is_gentle_first() {
    let mut lease =
        Lease::new("trap 'echo \"\\\"ended\\\"\"; exit 0' TERM; echo up >&2; while :; do sleep 0.01; done");
    lease.stop.send_replace(Some("cancelled".to_owned()));
    let ended = lease.run();
    assert!(
        matches!(&ended.how, How::Killed { why, message } if why == "stopped" && message == "cancelled"),
        "{ended:?}"
    );
    let mut lease = Lease::new(BEAT);
    lease.stop.send_replace(Some("cancelled".to_owned()));
    assert!(lease.run().gone, "who ignores SIGTERM is killed");
}

fn a_lease_that_is_over_is_not_begun() {
    let mut lease = Lease::new("echo > out/ran").ending_in(0);
    let ended = lease.run();
    assert!(
        matches!(&ended.how, How::Refused { code, .. } if code == "lease_over"),
        "{ended:?}"
    );
    assert!(!lease.out("ran").exists());
}

/// The child's side: a supervisor that starts a warden and waits.
pub(crate) fn supervise(spec: &str) -> ExitCode {
    let spec: Spec = serde_json::from_str(spec).unwrap();
    runtime().block_on(async {
        let mut warden = Warden::start(&program(), &spec).await.unwrap();
        warden.tell(Order::Extend { kill_at_ms: 0 }).await;
        while warden.event().await.is_some() {}
    });
    ExitCode::SUCCESS
}

struct Supervisor(std::process::Child);

impl Supervisor {
    fn start(lease: &Lease) -> Self {
        let spec = serde_json::to_string(&lease.spec).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["supervise", &spec])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let child = command.spawn().unwrap();
        until("the first beat", || last_beat(lease) > 0);
        Self(child)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }

    /// All that held its output is gone: wardens, their children, and itself.
    fn end(mut self) {
        let _ = self.0.kill();
        self.0.wait().unwrap();
        let mut rest = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
    }
}

/// The tool writes without pause: when the same is read twice, with time for a hundred beats in between, it
/// is over.
fn nothing_runs(lease: &Lease) -> bool {
    let before = last_beat(lease);
    std::thread::sleep(std::time::Duration::from_millis(50));
    before == last_beat(lease) && lease.members().is_empty()
}

fn a_killed_supervisor_leaves_nothing() {
    let lease = Lease::new(BEAT);
    let supervisor = Supervisor::start(&lease);
    supervisor.signal(Signal::SIGKILL);
    until("the end of the tool", || nothing_runs(&lease));
    supervisor.end();
}

fn a_frozen_supervisor_changes_nothing() {
    let lease = Lease::new(BEAT).ending_in(2000);
    let supervisor = Supervisor::start(&lease);
    supervisor.signal(Signal::SIGSTOP);
    until("the end of the lease", || boot_ms() > lease.spec.kill_at_ms);
    until("the end of the tool", || nothing_runs(&lease));
    let after = i128::from(last_beat(&lease)) - i128::from(lease.spec.kill_at_ms);
    println!("  the last sign of life was {} ms before the end", -after);
    assert!(after < 100, "it lived {after} ms beyond its end");
    supervisor.signal(Signal::SIGCONT);
    supervisor.end();
}

/// Sends a signal to the wardens of this process once the tool of the lease runs.
async fn signal_warden(beat: std::path::PathBuf, signal: Signal) {
    while !beat.exists() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let own = std::process::id();
    let children = read(std::path::Path::new(&format!("/proc/{own}/task/{own}/children")));
    for pid in children.split_whitespace() {
        let line = read(std::path::Path::new(&format!("/proc/{pid}/cmdline")));
        if line.contains("warden") {
            kill(Pid::from_raw(pid.parse().unwrap()), signal).unwrap();
        }
    }
}

fn a_frozen_warden_changes_nothing_either() {
    let mut lease = Lease::new(BEAT).ending_in(2000);
    let (beat, end) = (lease.out("beat"), lease.spec.kill_at_ms);
    let ended = runtime().block_on(async {
        let thaw = async {
            signal_warden(beat.clone(), Signal::SIGSTOP).await;
            while boot_ms() < end + 200 {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            signal_warden(beat, Signal::SIGCONT).await;
        };
        tokio::join!(lease.go(), thaw).0
    });
    assert!(ended.gone, "{ended:?}");
    let after = i128::from(last_beat(&lease)) - i128::from(end);
    assert!(after < 100, "it lived {after} ms beyond its end");
}

fn a_killed_warden_leaves_nothing() {
    let mut lease = Lease::new(BEAT);
    let ended = runtime().block_on(async {
        let murder = signal_warden(lease.out("beat"), Signal::SIGKILL);
        tokio::join!(lease.go(), murder).0
    });
    assert!(
        ended.how == How::Lost && !ended.gone,
        "nobody vouches for it: {ended:?}"
    );
    until("the end of the tool", || nothing_runs(&lease));
    lease.place.clean().unwrap();
}
