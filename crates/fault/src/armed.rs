//! The harness's build: which bug is planted, which failpoints are armed.
//!
//! A bug is chosen once, before anything runs: by [`plant`], or by the environment variable `PALYRA_PLANTED`.
//! Failpoints are armed while the process runs, over a Unix socket whose path `PALYRA_FAILPOINTS` names: one line
//! in, one line out.
//!
//! ```text
//! arm NAME crash [AFTER]         the AFTER-th pass from now ends the process (1 when absent)
//! arm NAME sleep MS [TIMES]      the next passes wait so long (1 when absent)
//! disarm NAME
//! hits NAME                      how often it was passed since the process began
//! ```

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::Action;

static BUG: OnceLock<String> = OnceLock::new();
static POINTS: Mutex<BTreeMap<String, Point>> = Mutex::new(BTreeMap::new());

#[derive(Default)]
struct Point {
    hits: u64,
    armed: Option<(Action, u64)>,
}

/// Chooses the bug of this process.
///
/// # Panics
/// When one was chosen, or asked for, before.
pub fn plant(bug: &str) {
    assert!(
        BUG.set(bug.to_owned()).is_ok(),
        "a bug was planted in this process already"
    );
}

/// Whether this bug is planted in this process.
pub fn planted(bug: &str) -> bool {
    BUG.get_or_init(|| std::env::var("PALYRA_PLANTED").unwrap_or_default()) == bug
}

/// Counts a pass, and says what happens to whoever passes.
pub fn hit(point: &str) -> Action {
    let mut points = points();
    let entry = match points.get_mut(point) {
        Some(entry) => entry,
        None => points.entry(point.to_owned()).or_default(),
    };
    entry.hits += 1;
    match &mut entry.armed {
        None => Action::Pass,
        Some((Action::Crash, after)) if *after > 1 => {
            *after -= 1;
            Action::Pass
        }
        Some((action, left)) => {
            let action = *action;
            *left -= 1;
            if *left == 0 {
                entry.armed = None;
            }
            action
        }
    }
}

fn points() -> MutexGuard<'static, BTreeMap<String, Point>> {
    POINTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Listens for commands when `PALYRA_FAILPOINTS` names a socket, on a thread of its own for the rest of the process.
///
/// # Errors
/// When the socket cannot be made.
pub fn serve() -> std::io::Result<()> {
    let Some(path) = std::env::var_os("PALYRA_FAILPOINTS") else {
        return Ok(());
    };
    let path = Path::new(&path);
    // A process before this one has left it.
    drop(std::fs::remove_file(path));
    let listener = UnixListener::bind(path)?;
    let listen = move || {
        for stream in listener.incoming().flatten() {
            // Who hangs up in the middle has heard enough.
            drop(converse(&stream));
        }
    };
    std::thread::Builder::new()
        .name("failpoints".into())
        .spawn(listen)?;
    Ok(())
}

fn converse(stream: &UnixStream) -> std::io::Result<()> {
    let mut answers = stream;
    for line in BufReader::new(stream).lines() {
        let answer = obey(&line?).unwrap_or_else(|| "what?".to_owned());
        writeln!(answers, "{answer}")?;
    }
    Ok(())
}

fn obey(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |at: usize| words.get(at).map_or(Some(1), |word| word.parse::<u64>().ok());
    let name = (*words.get(1)?).to_owned();
    let armed = match (*words.first()?, words.get(2).copied()) {
        ("arm", Some("crash")) => Some((Action::Crash, number(3)?.max(1))),
        ("arm", Some("sleep")) => {
            let ms = words.get(3)?.parse().ok()?;
            Some((Action::Sleep(Duration::from_millis(ms)), number(4)?.max(1)))
        }
        ("disarm", None) => None,
        ("hits", None) => return Some(points().get(&name).map_or(0, |point| point.hits).to_string()),
        _ => return None,
    };
    points().entry(name).or_default().armed = armed;
    Some("ok".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_does_what_it_was_armed_for_and_counts() {
        assert_eq!(hit("a"), Action::Pass);
        assert_eq!(obey("arm a crash 2").as_deref(), Some("ok"));
        assert_eq!(hit("a"), Action::Pass);
        assert_eq!(hit("a"), Action::Crash);
        assert_eq!(obey("arm a sleep 5 1").as_deref(), Some("ok"));
        assert_eq!(hit("a"), Action::Sleep(Duration::from_millis(5)));
        assert_eq!(hit("a"), Action::Pass);
        assert_eq!(obey("hits a").as_deref(), Some("5"));
        for wrong in [
            "",
            "arm",
            "arm a",
            "arm a sleep",
            "arm a sleep x",
            "hits",
            "burn a",
        ] {
            assert_eq!(obey(wrong), None, "{wrong}");
        }
    }
}
