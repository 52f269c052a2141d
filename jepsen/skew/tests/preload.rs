//! The shim in a real process: this test program runs itself once more with the library preloaded, and asks that copy
//! what its clocks say, line by line, so that no test depends on how fast anything is.
#![allow(clippy::unwrap_used)]

#[allow(dead_code, unreachable_pub)]
#[path = "../src/page.rs"]
mod page;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use page::{SEEN_AT, SETTING_AT, Setting, VARIABLE};

const HOUR: i64 = 3_600_000_000_000;
/// More than any two readings in one test are apart, and far less than any offset that is tested.
const SLACK: i64 = HOUR / 4;

fn library() -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let folders = [here.parent().unwrap(), here.parent().unwrap().parent().unwrap()];
    let found = folders.map(|folder| folder.join("libjepsen_skew.so"));
    let mut found = found.into_iter().filter(|path| path.exists());
    found.next().expect("cargo has built the library for its tests")
}

fn nanoseconds(time: SystemTime) -> i64 {
    i64::try_from(time.duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}

fn real() -> i64 {
    nanoseconds(SystemTime::now())
}

/// A process with the shim, and its page.
struct Helper {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    page: File,
    _dir: tempfile::TempDir,
}

impl Helper {
    fn start(content: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("page");
        std::fs::write(&path, content).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "helper", "--nocapture", "--test-threads", "1"])
            .env("JEPSEN_SKEW_HELPER", "1")
            .env("LD_PRELOAD", library())
            .env(VARIABLE, &path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let helper = Helper {
            to: child.stdin.take().unwrap(),
            from: BufReader::new(child.stdout.take().unwrap()),
            child,
            page: OpenOptions::new().read(true).write(true).open(&path).unwrap(),
            _dir: dir,
        };
        assert_eq!(helper.page.metadata().unwrap().len(), content.len() as u64);
        helper
    }

    fn set(&self, setting: Setting) {
        self.page
            .write_all_at(&setting.encode(), SETTING_AT as u64)
            .unwrap();
    }

    /// The words that the shim writes: answers, last moment shown, processes.
    fn seen(&self) -> [i64; 3] {
        let mut bytes = [0; 24];
        self.page.read_exact_at(&mut bytes, SEEN_AT as u64).unwrap();
        [0, 8, 16].map(|at| i64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap()))
    }

    fn ask(&mut self, what: &str) -> i64 {
        writeln!(self.to, "{what}").unwrap();
        let mut line = String::new();
        loop {
            line.clear();
            assert!(
                self.from.read_line(&mut line).unwrap() > 0,
                "the helper has ended"
            );
            if let Some((_, answer)) = line.trim().split_once("answer ") {
                return answer.parse().unwrap();
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for `duration` in a way of Rust's that ends by time alone, and says for how long it did by the monotonic
/// clock.
fn wait(duration: Duration) -> i64 {
    let started = Instant::now();
    let never = Arc::new((Mutex::new(()), Condvar::new()));
    let guard = never.0.lock().unwrap();
    let (_guard, ended) = never.1.wait_timeout_while(guard, duration, |()| true).unwrap();
    assert!(ended.timed_out());
    i64::try_from(started.elapsed().as_nanos()).unwrap()
}

/// Waits in the way of C++ until the wall clock shows a moment that is `nanoseconds` ahead. Answers as [`wait`].
#[allow(unsafe_code)]
fn wait_until(nanoseconds: i64) -> i64 {
    let started = Instant::now();
    let until = real() + nanoseconds;
    let until = libc::timespec {
        tv_sec: until / 1_000_000_000,
        tv_nsec: until % 1_000_000_000,
    };
    let mut mutex = libc::PTHREAD_MUTEX_INITIALIZER;
    let mut condition = libc::PTHREAD_COND_INITIALIZER;
    let (mutex, condition) = (&raw mut mutex, &raw mut condition);
    // SAFETY: both live in this frame and are nobody else's; the mutex is held where the wait wants it.
    let ended = unsafe {
        assert_eq!(libc::pthread_mutex_lock(mutex), 0);
        loop {
            let result = libc::pthread_cond_timedwait(condition, mutex, &raw const until);
            if result != 0 {
                break result;
            }
        }
    };
    assert_eq!(ended, libc::ETIMEDOUT);
    i64::try_from(started.elapsed().as_nanos()).unwrap()
}

fn shell(command: &str) -> i64 {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

/// The other side of [`Helper`]; an empty test when nobody asks for it.
#[test]
fn helper() {
    if std::env::var_os("JEPSEN_SKEW_HELPER").is_none() {
        return;
    }
    let started = Instant::now();
    for line in std::io::stdin().lines() {
        let answer = match line.unwrap().as_str() {
            "wall" => real(),
            "monotonic" => i64::try_from(started.elapsed().as_nanos()).unwrap(),
            "wait" => wait(Duration::from_millis(20)),
            "date" => shell("date +%s%N"),
            "wait until" => wait_until(50_000_000),
            other => panic!("unknown question {other}"),
        };
        println!("\nanswer {answer}");
    }
}

fn ahead(shown: i64) -> i64 {
    shown - real()
}

#[test]
fn a_jump_takes_effect_at_once_in_both_directions() {
    let mut helper = Helper::start(&page::blank());
    assert!(ahead(helper.ask("wall")).abs() < SLACK, "no fault yet");
    assert_eq!(helper.seen()[0], 0, "and none counted");
    for offset in [HOUR, -HOUR, 24 * HOUR, 0] {
        let setting = Setting {
            offset,
            drift: 0,
            since: 0,
        };
        let before = helper.seen()[0];
        helper.set(setting);
        let off = ahead(helper.ask("wall")) - offset;
        assert!(off.abs() < SLACK, "asked for {offset}, it is {off} beside it");
        let [reads, shown, processes] = helper.seen();
        assert_eq!(reads > before, offset != 0, "the shim counts what it shows");
        assert!(offset == 0 || (ahead(shown) - offset).abs() < SLACK);
        assert_eq!(processes, 1);
    }
}

#[test]
fn every_way_to_ask_for_the_wall_clock_sees_it() {
    let mut helper = Helper::start(&page::blank());
    helper.set(Setting {
        offset: -9 * HOUR,
        drift: 0,
        since: 0,
    });
    let inherited = ahead(helper.ask("date")) + 9 * HOUR;
    assert!(inherited.abs() < SLACK, "a child inherits it, off by {inherited}");
    assert!(helper.seen()[2] >= 2, "and maps the page itself");
}

#[test]
fn drift_grows_with_the_true_time() {
    let mut helper = Helper::start(&page::blank());
    // A thousand true seconds ago it began to gain 9 seconds in each.
    helper.set(Setting {
        offset: 0,
        drift: 9_000_000_000,
        since: real() - 1_000_000_000_000,
    });
    let gained = ahead(helper.ask("wall"));
    assert!(gained >= 9_000_000_000_000, "it gained {gained}");
}

#[test]
fn monotonic_clocks_and_waits_are_not_touched() {
    let mut helper = Helper::start(&page::blank());
    let mut last = helper.ask("monotonic");
    for offset in [HOUR, -HOUR, 1000 * HOUR] {
        helper.set(Setting {
            offset,
            drift: 0,
            since: 0,
        });
        let waited = helper.ask("wait");
        assert!((20_000_000..SLACK).contains(&waited), "waited for {waited}");
        let now = helper.ask("monotonic");
        assert!((last..last + SLACK).contains(&now), "from {last} to {now}");
        last = now;
    }
}

#[test]
fn waits_for_a_moment_of_the_wall_clock_last_as_long_as_they_should() {
    let mut helper = Helper::start(&page::blank());
    for offset in [-HOUR, HOUR] {
        helper.set(Setting {
            offset,
            drift: 0,
            since: 0,
        });
        let waited = helper.ask("wait until");
        assert!((50_000_000..SLACK).contains(&waited), "waited for {waited}");
    }
}

#[test]
fn a_page_that_is_not_ours_or_broken_shows_the_true_time() {
    let mut foreign = page::blank();
    foreign[0] ^= 1;
    let mut torn = page::blank();
    torn[SETTING_AT] = 77;
    for content in [foreign, torn, b"short".to_vec(), Vec::new()] {
        let mut helper = Helper::start(&content);
        assert!(ahead(helper.ask("wall")).abs() < SLACK);
    }
}
