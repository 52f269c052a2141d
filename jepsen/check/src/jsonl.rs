//! `history.jsonl`: one event a line, as it is stored and read again.
//!
//! Invariants: what is written is read back equal; a file that is damaged, cut off or too large is an error that names
//! the line, never a shorter history, because a verdict on half of a history is no verdict.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use crate::history::{Event, History};

/// Longest line. An operation with more to say is split by its workload; the longest seen are pages of a journal.
pub const MAX_LINE: usize = 1 << 20;

/// Most events: some hours of the fastest run, and what fits into the memory of a small machine.
pub const MAX_EVENTS: usize = 5_000_000;

/// Why a history cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system says no.
    #[error("{name}: {source}")]
    Io {
        /// The file.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line is not an event.
    #[error("{name}, line {line}: {cause}")]
    Line {
        /// The file.
        name: String,
        /// From 1.
        line: usize,
        /// What is wrong, and what to do.
        cause: String,
    },
}

impl History {
    /// Reads a history. `name` is what errors call it.
    ///
    /// # Errors
    /// [`Error`]: it cannot be read, a line is not an event, or it is too large.
    pub fn read(name: &str, mut from: impl BufRead) -> Result<Self, Error> {
        let mut history = History::default();
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            let length = io::Read::take(&mut from, MAX_LINE as u64 + 1)
                .read_until(b'\n', &mut line)
                .map_err(|source| Error::Io {
                    name: name.to_owned(),
                    source,
                })?;
            if length == 0 {
                break;
            }
            let wrong = |cause: String| Error::Line {
                name: name.to_owned(),
                line: number,
                cause,
            };
            if length > MAX_LINE {
                return Err(wrong(format!("it is longer than {MAX_LINE} bytes")));
            }
            if line.last() != Some(&b'\n') {
                return Err(wrong(
                    "it is cut off: the run ended while it wrote. Remove the line to judge the others".into(),
                ));
            }
            if history.events.len() == MAX_EVENTS {
                return Err(wrong(format!(
                    "more than {MAX_EVENTS} events: judge a shorter run"
                )));
            }
            let event =
                serde_json::from_slice(&line).map_err(|error| wrong(format!("not an event: {error}")))?;
            history.events.push(event);
        }
        Ok(history)
    }

    /// Writes a history.
    ///
    /// # Errors
    /// Those of the writer, and an event whose line would be longer than [`MAX_LINE`].
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        self.events
            .iter()
            .try_for_each(|event| write_event(&mut to, event))
    }

    /// Reads a file.
    ///
    /// # Errors
    /// As [`History::read`].
    pub fn load(path: &Path) -> Result<Self, Error> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|source| Error::Io {
            name: name.clone(),
            source,
        })?;
        Self::read(&name, BufReader::with_capacity(1 << 16, file))
    }

    /// Writes a file.
    ///
    /// # Errors
    /// As [`History::write`].
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let saved = File::create(path).and_then(|file| {
            let mut to = BufWriter::with_capacity(1 << 16, file);
            self.write(&mut to)?;
            to.flush()
        });
        saved.map_err(|source| Error::Io {
            name: path.display().to_string(),
            source,
        })
    }
}

/// Writes one line, for those who write a history while it happens.
///
/// # Errors
/// Those of the writer, and an event whose line would be longer than [`MAX_LINE`].
pub fn write_event(to: &mut impl Write, event: &Event) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    if line.len() > MAX_LINE {
        let cause = format!(
            "event {} (`{}`) is longer than {MAX_LINE} bytes",
            event.index, event.f
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, cause));
    }
    to.write_all(&line)
}
