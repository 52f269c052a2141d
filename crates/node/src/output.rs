//! What a running program writes to stderr: lines for whoever watches, and how far it says that it is.
//!
//! What never lives here: what becomes of them (see `jobs`), stdout (that is the answer).
//!
//! A line `::progress 40 copying files` is no line of the log: it says how far the program is, in percent, in words,
//! or both. Invariants: memory is bounded, whatever the program writes; every line has a number, from 1, so that
//! whoever reads sees what was dropped; at most one event is under way.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use palyra_proto::node::v1 as wire;
use tokio::sync::mpsc;

use crate::work::Event;

/// What a line of progress begins with.
const PROGRESS: &str = "::progress ";
/// The longest line, in bytes; a longer one is cut.
const LINE_MAX: usize = 1024;
/// The lines that are kept for a replica that comes later, in bytes.
const KEPT: usize = 32 * 1024;
/// What goes out in one message.
const BATCH_LINES: usize = 128;
const BATCH_BYTES: usize = 16 * 1024;
/// What is said again after an attach, in bytes.
const AGAIN: usize = 16 * 1024;
/// What is kept with the result, in bytes.
pub(crate) const TAIL: usize = 4096;

/// The output of one run.
pub(crate) struct Output {
    id: String,
    inside: Mutex<Inside>,
    events: mpsc::UnboundedSender<Event>,
}

#[derive(Default)]
struct Inside {
    lines: VecDeque<String>,
    bytes: usize,
    /// How many lines there were before those that are kept.
    gone: u64,
    /// Number of the last line that went out.
    sent: u64,
    progress: Option<(Option<u32>, String)>,
    progress_sent: bool,
    /// The line that has no end yet.
    open: Vec<u8>,
    /// Somebody was told that there is something.
    told: bool,
}

impl Inside {
    fn last(&self) -> u64 {
        self.gone + self.lines.len() as u64
    }

    fn has_news(&self) -> bool {
        self.sent < self.last() || (self.progress.is_some() && !self.progress_sent)
    }

    fn close_line(&mut self) {
        let bytes = std::mem::take(&mut self.open);
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim_end_matches('\r');
        if let Some(progress) = text.strip_prefix(PROGRESS) {
            self.progress = Some(parse_progress(progress));
            self.progress_sent = false;
            return;
        }
        self.bytes += text.len();
        self.lines.push_back(text.to_owned());
        while self.bytes > KEPT {
            let Some(line) = self.lines.pop_front() else {
                return;
            };
            self.bytes -= line.len();
            self.gone += 1;
        }
    }
}

/// Percent if the first word is a number, and the rest.
fn parse_progress(text: &str) -> (Option<u32>, String) {
    let text = text.trim();
    let (first, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    match first.trim_end_matches('%').parse::<u32>() {
        Ok(percent) => (Some(percent.min(100)), rest.trim().to_owned()),
        Err(_) => (None, text.to_owned()),
    }
}

impl Output {
    pub(crate) fn new(id: &str, events: mpsc::UnboundedSender<Event>) -> Self {
        Self {
            id: id.to_owned(),
            inside: Mutex::default(),
            events,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a piece of the pipe.
    pub(crate) fn write(&self, piece: &[u8]) {
        let mut inside = self.lock();
        for byte in piece {
            match byte {
                b'\n' => inside.close_line(),
                // The rest of a line that is too long is dropped.
                byte if inside.open.len() < LINE_MAX => inside.open.push(*byte),
                _ => {}
            }
        }
        if inside.has_news() && !inside.told {
            inside.told = true;
            // Nobody listens only when the agent is gone.
            let _ = self.events.send(Event::Output(self.id.clone()));
        }
    }

    /// What is to go out next, and whether more follows. Lines that were dropped before they went out are seen by
    /// their numbers.
    pub(crate) fn take(&self) -> (Option<wire::LogLines>, Option<wire::Progress>, bool) {
        let mut inside = self.lock();
        let progress = inside.progress.clone().filter(|_| !inside.progress_sent);
        inside.progress_sent = true;
        inside.sent = inside.sent.max(inside.gone);
        let skip = usize::try_from(inside.sent - inside.gone).unwrap_or(usize::MAX);
        let mut bytes = 0;
        let fits = |line: &&String| {
            bytes += line.len();
            bytes <= BATCH_BYTES
        };
        let lines: Vec<String> = inside
            .lines
            .iter()
            .skip(skip)
            .take(BATCH_LINES)
            .take_while(fits)
            .cloned()
            .collect();
        let first = inside.sent + 1;
        inside.sent += lines.len() as u64;
        let more = inside.has_news();
        inside.told = more;
        let lines = (!lines.is_empty()).then(|| wire::LogLines {
            dispatch_id: self.id.clone(),
            first,
            lines,
            ..wire::LogLines::default()
        });
        let progress = progress.map(|(percent, message)| wire::Progress {
            dispatch_id: self.id.clone(),
            percent,
            message,
            ..wire::Progress::default()
        });
        (lines, progress, more)
    }

    /// A new replica listens: the newest lines go out once more. Whether there is anything.
    pub(crate) fn rewind(&self) -> bool {
        let mut inside = self.lock();
        let mut bytes = 0;
        let newest = inside.lines.iter().rev().take_while(|line| {
            bytes += line.len();
            bytes <= AGAIN
        });
        let newest = newest.count() as u64;
        inside.sent = inside.last() - newest;
        inside.progress_sent = false;
        inside.told = inside.has_news();
        inside.told
    }

    /// The last lines, for whoever looks when it is over.
    pub(crate) fn tail(&self) -> String {
        let mut inside = self.lock();
        if !inside.open.is_empty() {
            inside.close_line();
        }
        let mut bytes = 0;
        let newest = inside.lines.iter().rev().take_while(|line| {
            bytes += line.len() + 1;
            bytes <= TAIL
        });
        let mut lines: Vec<&str> = newest.map(String::as_str).collect();
        lines.reverse();
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output() -> (Output, mpsc::UnboundedReceiver<Event>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Output::new("A", sender), receiver)
    }

    #[test]
    fn lines_have_numbers_and_progress_is_none_of_them() {
        let (output, mut events) = output();
        output.write(b"one\ntw");
        output.write(b"o\r\n::progress 40 half\n");
        assert_eq!(events.try_recv(), Ok(Event::Output("A".to_owned())));
        assert!(events.try_recv().is_err(), "told once");
        let (lines, progress, more) = output.take();
        let (lines, progress) = (lines.unwrap(), progress.unwrap());
        assert_eq!(
            (lines.first, lines.lines),
            (1, vec!["one".to_owned(), "two".to_owned()])
        );
        assert_eq!(
            (progress.percent, progress.message.as_str(), more),
            (Some(40), "half", false)
        );
        output.write(b"three");
        assert!(events.try_recv().is_err(), "no line yet");
        output.write(b"\n");
        assert_eq!(output.take().0.unwrap().first, 3);
        assert!(output.rewind());
        assert_eq!(
            output.take().0.unwrap().lines.len(),
            3,
            "said again to the next replica"
        );
        assert_eq!(output.tail(), "one\ntwo\nthree");
    }

    #[test]
    fn progress_is_a_number_or_words_or_both() {
        assert_eq!(parse_progress("7"), (Some(7), String::new()));
        assert_eq!(
            parse_progress(" 120% more than all"),
            (Some(100), "more than all".to_owned())
        );
        assert_eq!(
            parse_progress("looking around"),
            (None, "looking around".to_owned())
        );
    }

    #[test]
    fn what_is_dropped_is_seen_by_the_numbers() {
        let (output, _events) = output();
        let line = format!("{}\n", "x".repeat(3 * LINE_MAX));
        for _ in 0..100 {
            output.write(line.as_bytes());
        }
        let kept = KEPT / LINE_MAX;
        let (mut lines, _, mut more) = output.take();
        let mut seen = 0;
        let first = lines.as_ref().unwrap().first;
        assert_eq!(first, 100 - kept as u64 + 1);
        while let Some(batch) = lines {
            assert!(batch.lines.iter().all(|line| line.len() == LINE_MAX));
            seen += batch.lines.len();
            assert_eq!(more, seen < kept);
            (lines, _, more) = output.take();
        }
        assert_eq!(seen, kept);
        assert!(output.tail().len() <= TAIL);
    }
}
