//! One execution of one tool, from the start of its warden until nothing of it runs any more.
//!
//! What never lives here: why it is run, what becomes of its files. Invariants: memory is bounded by the
//! largest answer and the kept lines; the end is told only after the warden has said that nothing is left, or
//! is itself gone.

use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::spec::{Event, Order, Spec, boot_ms};
use super::supervise::{Program, Warden};

/// How long after its last moment a warden may take to tell of the end.
const LAST_WORD: Duration = Duration::from_secs(10);
/// How long the pipes may stay open when everybody who could write is gone.
const DRAIN: Duration = Duration::from_secs(2);

/// What steers it from outside.
#[derive(Debug)]
pub struct Control {
    /// The first moment at which it must not run any more; moves with renewals.
    pub kill_at_ms: watch::Receiver<u64>,
    /// Why it is to end, once it is.
    pub stop: watch::Receiver<Option<String>>,
    /// The longest that the tool's owner lets it run.
    pub timeout: Duration,
    /// Between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// The largest answer, in bytes.
    pub max_result: usize,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    /// It was not begun.
    Refused {
        /// Stable.
        code: String,
        /// For people.
        message: String,
    },
    /// By itself: its exit code, or the negative signal.
    Exited(i32),
    /// It was ended: `deadline`, `stopped`, `disk`, `timeout`, `result`.
    Killed {
        /// Which of them.
        why: String,
        /// For people.
        message: String,
    },
    /// The warden ended without a word.
    Lost,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// How.
    pub how: How,
    /// What held it, as [`Event::Sandbox`] has it.
    pub sandbox: Vec<String>,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// The warden saw that nothing of it runs any more.
    pub gone: bool,
    /// Processes that could not be ended.
    pub left: Vec<i32>,
    /// Processor time, in milliseconds.
    pub cpu_ms: u64,
    /// Most memory of one process.
    pub max_rss_bytes: u64,
    /// How long it ran.
    pub wall_ms: u64,
}

impl Ended {
    pub(crate) fn new() -> Self {
        Self {
            how: How::Lost,
            sandbox: Vec::new(),
            stdout: Vec::new(),
            gone: false,
            left: Vec::new(),
            cpu_ms: 0,
            max_rss_bytes: 0,
            wall_ms: 0,
        }
    }

    /// Keeps one byte more than allowed, which says that it was too much.
    fn keep(&mut self, piece: &[u8], most: usize) {
        let room = (most + 1).saturating_sub(self.stdout.len());
        self.stdout.extend_from_slice(&piece[..piece.len().min(room)]);
    }

    fn check_size(&mut self, most: usize) {
        if self.stdout.len() > most && matches!(self.how, How::Exited(_)) {
            self.how = How::Killed {
                why: "result".to_owned(),
                message: format!("it wrote more than the {most} bytes allowed"),
            };
        }
    }

    fn take(&mut self, event: Event, early: &mut Option<How>) {
        match event {
            Event::Sandbox(held) => self.sandbox = held,
            Event::Refused { code, message } => self.how = How::Refused { code, message },
            Event::Started => {}
            Event::Exited {
                code,
                cpu_ms,
                max_rss_bytes,
            } => {
                (self.cpu_ms, self.max_rss_bytes) = (cpu_ms, max_rss_bytes);
                self.how = early.take().unwrap_or(How::Exited(code));
            }
            // What it was killed for is more than how it ended under that.
            Event::Killed { why, message } => {
                self.how = early.take().unwrap_or(How::Killed { why, message });
            }
            Event::Gone => self.gone = true,
            Event::Left { pids } => self.left = pids,
        }
    }
}

/// Runs it. `lines` hears what the tool writes to its standard error.
///
/// Errors: no warden could be started.
pub async fn execute(
    program: &Program,
    spec: &Spec,
    control: &mut Control,
    mut lines: impl FnMut(&[u8]),
) -> std::io::Result<Ended> {
    let begun = Instant::now();
    let mut ended = Ended::new();
    let mut warden = Warden::start(program, spec).await?;
    let (mut out, mut err) = (warden.stdout.take(), warden.stderr.take());
    let (mut piece, mut other) = (vec![0u8; 8192], vec![0u8; 8192]);
    let mut early: Option<How> = None;
    let timeout = begun + control.timeout;
    loop {
        let told_by = *control.kill_at_ms.borrow();
        let last = Instant::now() + Duration::from_millis(told_by.saturating_sub(boot_ms())) + LAST_WORD;
        let mut stop = None;
        tokio::select! {
            event = warden.event() => match event {
                Some(event) => {
                    let over = matches!(event, Event::Gone | Event::Left { .. });
                    ended.take(event, &mut early);
                    if over { break }
                }
                None => break,
            },
            count = read(&mut out, &mut piece) => {
                ended.keep(&piece[..count], control.max_result);
                if count == 0 {
                    out = None;
                } else if ended.stdout.len() > control.max_result {
                    out = None;
                    stop = Some(("result", format!("it wrote more than the {} bytes allowed", control.max_result)));
                }
            }
            count = read(&mut err, &mut other) => match count {
                0 => err = None,
                count => lines(&other[..count]),
            },
            Ok(()) = control.kill_at_ms.changed() => {
                let kill_at_ms = *control.kill_at_ms.borrow_and_update();
                warden.tell(Order::Extend { kill_at_ms }).await;
            }
            why = asked(&mut control.stop), if early.is_none() => stop = Some(("stopped", why)),
            () = sleep_until(timeout), if early.is_none() => {
                stop = Some(("timeout", format!("it ran longer than its timeout of {:?}", control.timeout)));
            }
            // A warden that does not end is given up; what it holds may still run, and nothing says that it
            // does not.
            () = sleep_until(last) => break,
        }
        if let Some((why, message)) = stop.filter(|_| early.is_none()) {
            let why = why.to_owned();
            early = Some(How::Killed { why, message });
            let grace_ms = u64::try_from(control.grace.as_millis()).unwrap_or(0);
            warden.tell(Order::Stop { grace_ms }).await;
        }
    }
    ended.wall_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let until = Instant::now() + DRAIN;
    if ended.gone || !ended.left.is_empty() {
        let _ = timeout_at(until, warden.ended()).await;
    }
    let rest = async {
        while let count @ 1.. = read(&mut err, &mut other).await {
            lines(&other[..count]);
        }
        while let count @ 1.. = read(&mut out, &mut piece).await {
            ended.keep(&piece[..count], control.max_result);
        }
    };
    let _ = timeout_at(until, rest).await;
    ended.check_size(control.max_result);
    Ok(ended)
}

/// Reads a pipe that may be closed; then never completes. 0 at its end. Safe to cancel.
async fn read(pipe: &mut Option<impl tokio::io::AsyncRead + Unpin>, into: &mut [u8]) -> usize {
    match pipe {
        Some(pipe) => pipe.read(into).await.unwrap_or(0),
        None => std::future::pending().await,
    }
}

async fn asked(stop: &mut watch::Receiver<Option<String>>) -> String {
    let why = match stop.wait_for(Option::is_some).await {
        Ok(why) => why.clone(),
        Err(_) => None,
    };
    match why {
        Some(why) => why,
        None => std::future::pending().await,
    }
}
