//! What running programs write, and how far they are: in the memory of the replica that holds the node's session.
//!
//! What never lives here: the log. Nothing of this is replicated; what an operator asks for at another replica is
//! fetched from this one, and what is lost with it is lost. The last lines of a program come with its result.
//! Invariants: memory is bounded, for each dispatch and in all; lines keep the numbers that the node gave them, so
//! whoever reads sees what is missing; what a node sends again after an attach is there once.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palyra_platform::{self as platform, Instant};
use palyra_state::Id;
use palyra_state::dispatch::{self as records, Dispatch};
use prost::Message;

use crate::control::{Control, bounded_wait};
use crate::dispatch::{DispatchView, view_of};
use crate::error::Error;
use crate::limits::{LOGS_WAIT_MAX, OUTPUT_BATCHES, OUTPUT_BYTES, OUTPUT_LINE_MAX, OUTPUT_LINES, OUTPUTS};
use crate::peers::{Answer, Call};
use crate::registry::Entry;
use crate::selector;

/// How long one question to another replica waits there.
pub(crate) const RELAY_WAIT: Duration = Duration::from_secs(2);
/// The pause after another replica did not answer.
pub(crate) const RELAY_PAUSE: Duration = Duration::from_millis(250);

/// Where in the lines of a dispatch a reader is: the attempt, and the number of the last line that it has.
pub type Position = (u32, u64);

/// A line that a program wrote.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Line {
    /// The attempt.
    #[prost(uint32, tag = "1")]
    pub attempt: u32,
    /// From 1; a number that is missing is of a line that was dropped.
    #[prost(uint64, tag = "2")]
    pub line: u64,
    /// Without its end.
    #[prost(string, tag = "3")]
    pub text: String,
}

/// How far a program says that it is.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Progress {
    /// The attempt.
    #[prost(uint32, tag = "1")]
    pub attempt: u32,
    /// 0 to 100, if it says so.
    #[prost(uint32, optional, tag = "2")]
    pub percent: Option<u32>,
    /// In its words.
    #[prost(string, tag = "3")]
    pub message: String,
    /// How long ago it said so, in milliseconds.
    #[prost(uint64, tag = "4")]
    pub age_ms: u64,
}

/// What a node sends while a program runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The dispatch.
    pub dispatch_id: String,
    /// The session in which the node has it.
    pub epoch: u64,
    /// The attempt.
    pub attempt: u32,
    /// Number of the first line.
    pub first: u64,
    /// Lines.
    pub lines: Vec<String>,
    /// How far it is: percent, and words.
    pub progress: Option<(Option<u32>, String)>,
}

/// What there is of a dispatch's output after some position.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Piece {
    #[prost(message, repeated, tag = "1")]
    pub(crate) lines: Vec<Line>,
    #[prost(message, optional, tag = "2")]
    pub(crate) progress: Option<Progress>,
    /// The dispatch is known here.
    #[prost(bool, tag = "3")]
    pub(crate) known: bool,
}

/// Asks the replica that holds a node's session what the program of a dispatch has written.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct AskOutput {
    #[prost(message, required, tag = "1")]
    pub(crate) dispatch_id: Id,
    #[prost(uint32, tag = "2")]
    pub(crate) attempt: u32,
    #[prost(uint64, tag = "3")]
    pub(crate) line: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) wait_ms: u64,
}

/// What an operator sees of a running dispatch.
#[derive(Debug, Clone, PartialEq)]
pub struct Logs {
    /// The dispatch, as this replica has it.
    pub dispatch: DispatchView,
    /// Lines after the position that was asked for, in order.
    pub lines: Vec<Line>,
    /// The newest word of the program about itself.
    pub progress: Option<Progress>,
    /// The replica that has them; 0 when none does.
    pub replica_id: u64,
}

#[derive(Debug)]
struct Kept {
    lines: VecDeque<Line>,
    bytes: usize,
    last: Position,
    progress: Option<(Instant, u32, Option<u32>, String)>,
    touched: u64,
    /// Messages in the present second.
    window: (Instant, usize),
}

/// The outputs that this replica holds.
#[derive(Debug, Default)]
pub(crate) struct Outputs {
    kept: Mutex<(u64, BTreeMap<Id, Kept>)>,
}

impl Outputs {
    fn lock(&self) -> MutexGuard<'_, (u64, BTreeMap<Id, Kept>)> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what a node sent. `false` when nothing of it is new, or when it sends too much in a second.
    pub(crate) fn take(&self, id: Id, output: Output) -> bool {
        let mut inside = self.lock();
        inside.0 += 1;
        let now = inside.0;
        if !inside.1.contains_key(&id) && inside.1.len() >= OUTPUTS {
            let oldest = inside
                .1
                .iter()
                .min_by_key(|(_, kept)| kept.touched)
                .map(|(id, _)| *id);
            oldest.and_then(|oldest| inside.1.remove(&oldest));
        }
        let kept = inside.1.entry(id).or_insert_with(|| Kept {
            lines: VecDeque::new(),
            bytes: 0,
            last: (0, 0),
            progress: None,
            touched: now,
            window: (platform::now(), 0),
        });
        kept.touched = now;
        kept.add(output)
    }

    /// What there is after `after`.
    pub(crate) fn after(&self, id: Id, after: Position) -> Piece {
        let inside = self.lock();
        let Some(kept) = inside.1.get(&id) else {
            return Piece::default();
        };
        let lines = kept.lines.iter().filter(|line| (line.attempt, line.line) > after);
        let progress = kept
            .progress
            .as_ref()
            .map(|(at, attempt, percent, message)| Progress {
                attempt: *attempt,
                percent: *percent,
                message: message.clone(),
                age_ms: crate::caller::millis(at.elapsed()),
            });
        Piece {
            lines: lines.cloned().collect(),
            progress,
            known: true,
        }
    }
}

impl Kept {
    fn add(&mut self, output: Output) -> bool {
        if self.window.0.elapsed() >= Duration::from_secs(1) {
            self.window = (platform::now(), 0);
        }
        self.window.1 += 1;
        if self.window.1 > OUTPUT_BATCHES {
            return false;
        }
        let attempt = output.attempt;
        let mut news = false;
        for (line, text) in (output.first..).zip(output.lines) {
            // Sent again after an attach, or of an attempt that is over.
            if (attempt, line) <= self.last {
                continue;
            }
            self.last = (attempt, line);
            let text = plain(&text);
            self.bytes += text.len();
            self.lines.push_back(Line { attempt, line, text });
            news = true;
        }
        while self.lines.len() > OUTPUT_LINES || self.bytes > OUTPUT_BYTES {
            let gone = self.lines.pop_front().map_or(0, |line| line.text.len());
            self.bytes -= gone;
        }
        if let Some((percent, message)) = output.progress {
            let percent = percent.map(|percent| percent.min(100));
            self.progress = Some((platform::now(), attempt, percent, plain(&message)));
            news = true;
        }
        news
    }
}

/// One line of bounded length that moves no cursor.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    for symbol in text.chars() {
        let symbol = if symbol.is_control() && symbol != '\t' {
            ' '
        } else {
            symbol
        };
        if plain.len() + symbol.len_utf8() > OUTPUT_LINE_MAX {
            break;
        }
        plain.push(symbol);
    }
    plain
}

impl Control {
    /// Takes what a node sent of a dispatch that is bound to its session; of any other it is nobody's business.
    pub(crate) fn take_output(&self, entry: &Entry, output: Output) -> Result<(), Error> {
        let id = selector::parse_id("dispatch_id", &output.dispatch_id)?;
        let found = records::dispatch(&self.replica().view(), id);
        let is_own = found.is_some_and(|found| {
            found.device_id == entry.device_id
                && found.epoch == entry.epoch()
                && found.attempt == output.attempt
        });
        if is_own && output.epoch == entry.epoch() && self.outputs().take(id, output) {
            self.waiters().wake(id);
        }
        Ok(())
    }

    /// What the program of a dispatch wrote after `after`, wherever its node is connected; waits for something new,
    /// or for another state of the dispatch, `wait_ms` at most (30,000).
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is no such dispatch; [`Error::Busy`].
    pub async fn logs(&self, id: &str, after: Position, wait_ms: u64) -> Result<Logs, Error> {
        let known = Id::parse(id).filter(|id| records::dispatch(&self.replica().view(), *id).is_some());
        let id = match known {
            Some(id) => id,
            None => {
                self.barrier().await?;
                selector::dispatch_id(&self.replica().view(), id)?
            }
        };
        let wait = bounded_wait(wait_ms, Duration::ZERO, LOGS_WAIT_MAX);
        let until = platform::now() + wait;
        let first = self.record_of(id)?;
        let mut held_by = owner(&first);
        loop {
            let left = until.saturating_duration_since(platform::now());
            let now = self.record_of(id)?;
            // Of what has ended, the last that held it may have something still.
            held_by = owner(&now).or(held_by);
            let changed =
                now.state != first.state || now.attempt != first.attempt || owner(&now) != owner(&first);
            let wait = if changed || now.state().is_terminal() {
                Duration::ZERO
            } else {
                left.min(RELAY_WAIT)
            };
            let piece = match held_by {
                Some(replica) if replica == self.replica_id() => self.output_here(id, after, wait).await?,
                Some(replica) => self.output_there(replica, id, after, wait).await,
                None => {
                    self.wait_for_change(id, &now, wait).await?;
                    Piece::default()
                }
            };
            if !piece.lines.is_empty() || changed || now.state().is_terminal() || left.is_zero() {
                return Ok(Logs {
                    dispatch: view_of(&self.replica().view(), id)?,
                    lines: piece.lines,
                    progress: piece.progress,
                    replica_id: held_by.unwrap_or_default(),
                });
            }
        }
    }

    fn record_of(&self, id: Id) -> Result<Dispatch, Error> {
        view_of(&self.replica().view(), id).map(|seen| seen.record)
    }

    async fn wait_for_change(&self, id: Id, seen: &Dispatch, wait: Duration) -> Result<(), Error> {
        let look = || {
            let now = records::dispatch(&self.replica().view(), id);
            (
                (),
                now.is_none_or(|now| now.state != seen.state || now.epoch != seen.epoch),
            )
        };
        self.waiters().until(id, wait, look).await
    }

    /// What this replica has; waits for something new, or for the end.
    pub(crate) async fn output_here(&self, id: Id, after: Position, wait: Duration) -> Result<Piece, Error> {
        let before = self
            .outputs()
            .after(id, after)
            .progress
            .map(|progress| (progress.percent, progress.message));
        let epoch = records::dispatch(&self.replica().view(), id).map(|found| (found.state, found.epoch));
        let look = || {
            let piece = self.outputs().after(id, after);
            let progress = piece.progress.as_ref();
            let moved = progress.map(|progress| (progress.percent, progress.message.clone())) != before;
            let now = records::dispatch(&self.replica().view(), id).map(|found| (found.state, found.epoch));
            let news = !piece.lines.is_empty() || moved || now != epoch;
            (piece, news)
        };
        self.waiters().until(id, wait, look).await
    }

    async fn output_there(&self, replica: u64, id: Id, after: Position, wait: Duration) -> Piece {
        let ask = AskOutput {
            dispatch_id: id,
            attempt: after.0,
            line: after.1,
            wait_ms: crate::caller::millis(wait),
        };
        let answered = self.call_peer(replica, Call::Output(ask), wait + self.timings().call_timeout);
        match answered.await {
            Ok(Answer::Output(piece)) => piece,
            other => {
                // It is gone, or too busy: what it had is lost unless it comes back; the node will find another.
                tracing::debug!(dispatch = %id, replica, ?other, "the output of a program was not fetched");
                platform::sleep(RELAY_PAUSE.min(wait)).await;
                Piece::default()
            }
        }
    }
}

/// The replica that holds the session to which a dispatch is, or was, bound.
fn owner(found: &Dispatch) -> Option<u64> {
    (found.replica_id != 0).then_some(found.replica_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(attempt: u32, first: u64, texts: &[&str]) -> Output {
        Output {
            dispatch_id: String::new(),
            epoch: 1,
            attempt,
            first,
            lines: texts.iter().map(|text| (*text).to_owned()).collect(),
            progress: None,
        }
    }

    fn numbers(piece: &Piece) -> Vec<Position> {
        piece.lines.iter().map(|line| (line.attempt, line.line)).collect()
    }

    #[tokio::test]
    async fn lines_keep_their_numbers_and_are_there_once() {
        let outputs = Outputs::default();
        assert!(outputs.take(Id::ZERO, lines(1, 1, &["a", "b"])));
        assert!(
            !outputs.take(Id::ZERO, lines(1, 1, &["a", "b"])),
            "sent again after an attach"
        );
        assert!(outputs.take(Id::ZERO, lines(1, 2, &["b", "c"])));
        assert!(
            outputs.take(Id::ZERO, lines(1, 9, &["i\u{1b}[2J"])),
            "five were dropped"
        );
        assert!(outputs.take(Id::ZERO, lines(2, 1, &["again"])));
        assert!(
            !outputs.take(Id::ZERO, lines(1, 10, &["too late"])),
            "of an attempt that is over"
        );
        let all = outputs.after(Id::ZERO, (0, 0));
        assert_eq!(numbers(&all), [(1, 1), (1, 2), (1, 3), (1, 9), (2, 1)]);
        assert_eq!(all.lines[3].text, "i [2J");
        assert_eq!(numbers(&outputs.after(Id::ZERO, (1, 3))), [(1, 9), (2, 1)]);
    }

    #[tokio::test(start_paused = true)]
    async fn memory_and_rate_are_bounded() {
        let outputs = Outputs::default();
        let many: Vec<&str> = std::iter::repeat_n("x", 3 * OUTPUT_LINES).collect();
        outputs.take(Id::ZERO, lines(1, 1, &many));
        let kept = outputs.after(Id::ZERO, (0, 0)).lines;
        assert_eq!(
            (kept.len(), kept.last().map(|line| line.line)),
            (OUTPUT_LINES, Some(3 * OUTPUT_LINES as u64))
        );
        let fits = (1..)
            .take_while(|at| outputs.take(Id::ZERO, lines(2, *at, &["y"])))
            .count();
        assert_eq!(fits, OUTPUT_BATCHES - 1);
        for number in 0..=OUTPUTS as u64 {
            let id = Id::from_bytes((u128::from(number) + 1).to_be_bytes());
            outputs.take(id, lines(1, 1, &["z"]));
        }
        assert!(
            !outputs.after(Id::ZERO, (0, 0)).known,
            "the one that was quiet for longest goes"
        );
        assert_eq!(outputs.lock().1.len(), OUTPUTS);
    }
}
