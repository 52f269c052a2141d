//! What this node has begun and what it still owes the control plane, on disk.
//!
//! One file of lines, each `<16 hex digits of SHA-256> <JSON>`. What a power loss tears is what was written
//! since the last sync, and is passed over; damage to what was synced is reported, because a forgotten start
//! could run a `once` dispatch twice. The two can be told apart: nothing is written before a sync is over, so
//! everything before a synced line that another one follows was on the disk.
//!
//! What never lives here: processes, the network, the decision what to run.
//!
//! Invariants: a `once` start is on disk before [`Ledger::begin`] returns; a result is on disk before
//! [`Ledger::finish`] returns, and kept until [`Ledger::forget`]; a `once` dispatch that had begun when the
//! agent died comes back as a failure, never as something to run; count and bytes are bounded; after a failed
//! write nothing is promised any more until the agent is restarted, save for a full disk that has room again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use palyra_pki::sha256;
use serde::{Deserialize, Serialize};

use crate::capability::Effect;
use crate::home::{open_append, write_atomic};
use crate::{Error, Kind, Result};

/// The most dispatches that are held at a time.
pub(crate) const MAX_HELD: usize = 1024;
/// The most bytes of results that are held before new dispatches are turned away.
const MAX_BYTES: usize = 32 << 20;
/// The file is rewritten when it is this long and mostly of the past.
const COMPACT_AT: u64 = 1 << 20;
const DIGEST: usize = 16;

/// A result that the control plane hasn't accepted yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredResult {
    /// The dispatch.
    pub(crate) id: String,
    /// The same for each try of this result.
    pub(crate) request_id: String,
    /// `succeeded`, `failed`, `rejected` or `cancelled`.
    pub(crate) outcome: String,
    /// JSON; empty unless it succeeded.
    pub(crate) payload: String,
    /// Empty when it succeeded.
    pub(crate) error_code: String,
    /// Empty when it succeeded.
    pub(crate) error_message: String,
    /// The last lines that the program wrote.
    #[serde(default)]
    pub(crate) log_tail: String,
    /// The attempt that it is of; 0 when that is not known any more.
    #[serde(default)]
    pub(crate) attempt: u32,
}

/// A process that the agent started; enough to know it again after a restart of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Started {
    /// Its id, and that of its group.
    pub(crate) pid: u32,
    /// When it began, in clock ticks since boot: `/proc/<pid>/stat`, field 22.
    pub(crate) ticks: u64,
    /// The boot that those ticks count from.
    pub(crate) boot: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    Begun { id: String, once: bool },
    Process { id: String, process: Started },
    Finished(StoredResult),
    Forgotten { id: String },
}

impl Line {
    /// Whether it is on the disk before the next line is written.
    fn is_synced(&self) -> bool {
        match self {
            Self::Begun { once, .. } => *once,
            Self::Finished(_) => true,
            Self::Process { .. } | Self::Forgotten { .. } => false,
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Held {
    once: bool,
    attempt: u32,
    process: Option<Started>,
    result: Option<Arc<StoredResult>>,
}

/// Why a dispatch can't begin.
#[derive(Debug)]
pub(crate) enum Refused {
    /// Too much is held already.
    Full,
    /// The disk doesn't take it.
    Io(io::Error),
}

/// The file and what it says.
pub(crate) struct Ledger {
    path: PathBuf,
    file: File,
    length: u64,
    held: BTreeMap<String, Held>,
    bytes: usize,
    broken: bool,
}

impl Ledger {
    /// Opens or makes the ledger in `dir`. Answers it and the processes that an earlier agent left; end those
    /// that are still alive before anything begins. What a power loss tore is cut out; any other damage is an
    /// error.
    pub(crate) fn open(dir: &Path) -> Result<(Self, Vec<Started>)> {
        let path = dir.join("ledger.log");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Error::io("read", &path, &error)),
        };
        let mut held = BTreeMap::new();
        for line in parse(&bytes).map_err(|line| damaged(&path, line))? {
            replay(&mut held, line);
        }
        let left: Vec<Started> = held
            .values()
            .filter(|one| one.result.is_none())
            .filter_map(|one| one.process.clone())
            .collect();
        held.retain(|_, one| one.once || one.result.is_some());
        for (id, one) in &mut held {
            if one.result.is_none() {
                one.result = Some(Arc::new(interrupted(id)));
            }
        }
        // The rewrite also makes the failures above durable, so that their request ids stay the same.
        let text = render(&held).map_err(|error| Error::io("write", &path, &error))?;
        write_atomic(&path, &text, 0o600)?;
        let file = open_append(&path)?;
        let bytes = held.values().map(size_of_held).sum();
        Ok((
            Self {
                path,
                file,
                length: text.len() as u64,
                held,
                bytes,
                broken: false,
            },
            left,
        ))
    }

    /// Notes that a dispatch begins; durable on return when `effect` is `once`. What may run twice begins also
    /// when the disk does not take the note.
    pub(crate) fn begin(
        &mut self,
        id: &str,
        attempt: u32,
        effect: Effect,
    ) -> std::result::Result<(), Refused> {
        // An earlier attempt that is over, whose end the control plane knows.
        if let Some(before) = self.held.remove(id) {
            self.bytes -= size_of_held(&before);
        }
        if self.held.len() >= MAX_HELD || self.bytes >= MAX_BYTES {
            return Err(Refused::Full);
        }
        let once = effect == Effect::Once;
        let line = Line::Begun {
            id: id.to_owned(),
            once,
        };
        match self.append(&line, once) {
            Err(error) if once => return Err(Refused::Io(error)),
            Err(error) => tracing::warn!(dispatch = id, %error, "it begins without a note in the ledger"),
            Ok(()) => {}
        }
        self.held.insert(
            id.to_owned(),
            Held {
                once,
                attempt,
                ..Held::default()
            },
        );
        Ok(())
    }

    /// Notes the process of a dispatch, for whoever cleans up after this agent. Not waited for.
    pub(crate) fn process(&mut self, id: &str, process: Started) -> io::Result<()> {
        if let Some(one) = self.held.get_mut(id) {
            one.process = Some(process.clone());
        }
        self.append(
            &Line::Process {
                id: id.to_owned(),
                process,
            },
            false,
        )
    }

    /// Keeps a result, durable on return. On an error it is kept in memory only.
    pub(crate) fn finish(&mut self, result: StoredResult) -> io::Result<Arc<StoredResult>> {
        let result = Arc::new(result);
        let slot = self.held.entry(result.id.clone()).or_default();
        self.bytes -= size_of_held(slot);
        slot.attempt = result.attempt;
        slot.result = Some(Arc::clone(&result));
        self.bytes += size_of_held(slot);
        self.append(&Line::Finished((*result).clone()), true)?;
        Ok(result)
    }

    /// Drops an attempt of a dispatch: its result was accepted or finally refused, or nobody wants it any more. A later
    /// attempt that has begun meanwhile stays; 0 is any.
    pub(crate) fn forget(&mut self, id: &str, attempt: u32) -> io::Result<()> {
        let later = |held: &Held| attempt != 0 && held.attempt > attempt;
        if self.held.get(id).is_none_or(later) {
            return Ok(());
        }
        let Some(gone) = self.held.remove(id) else {
            return Ok(());
        };
        self.bytes -= size_of_held(&gone);
        // Losing this line is harmless: the result is sent once more and refused as known.
        self.append(&Line::Forgotten { id: id.to_owned() }, false)?;
        if self.length > COMPACT_AT && self.length > 4 * self.bytes as u64 {
            self.compact()
        } else {
            Ok(())
        }
    }

    /// The results that are owed, in the order of their ids.
    pub(crate) fn results(&self) -> Vec<Arc<StoredResult>> {
        self.held.values().filter_map(|one| one.result.clone()).collect()
    }

    fn append(&mut self, line: &Line, durable: bool) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other(
                "an earlier write to the ledger failed; restart the agent",
            ));
        }
        let text = encode(line)?;
        let written = self.file.write_all(text.as_bytes());
        let synced = written.and_then(|()| if durable { self.file.sync_data() } else { Ok(()) });
        if let Err(error) = synced {
            // After a failed write the file may end in half a line, after a failed sync the page cache may
            // lie.
            let cut = self
                .file
                .set_len(self.length)
                .and_then(|()| self.file.sync_data());
            self.broken = cut.is_err() || error.kind() != io::ErrorKind::StorageFull;
            return Err(error);
        }
        self.length += text.len() as u64;
        Ok(())
    }

    fn compact(&mut self) -> io::Result<()> {
        let text = render(&self.held)?;
        let rewritten = write_atomic(&self.path, &text, 0o600).and_then(|()| open_append(&self.path));
        match rewritten {
            Ok(file) => {
                self.file = file;
                self.length = text.len() as u64;
                Ok(())
            }
            Err(error) => {
                self.broken = true;
                Err(io::Error::other(error.message))
            }
        }
    }
}

fn interrupted(id: &str) -> StoredResult {
    StoredResult {
        id: id.to_owned(),
        request_id: palyra_client::ids::new_ulid(),
        outcome: "failed".to_owned(),
        payload: String::new(),
        error_code: "agent_restarted".to_owned(),
        error_message: "the node's agent ended while this ran; whether it took effect is not known"
            .to_owned(),
        log_tail: String::new(),
        attempt: 0,
    }
}

fn damaged(path: &Path, line: usize) -> Error {
    Error::new(
        Kind::Internal,
        "N0401",
        format!("the ledger {} is damaged at line {line}", path.display()),
        "check the disk; to go on without the results in it, move the file away and start again",
    )
}

fn size_of_held(held: &Held) -> usize {
    held.result.as_ref().map_or(0, |result| {
        result.payload.len() + result.error_message.len() + result.log_tail.len() + 128
    })
}

fn encode(line: &Line) -> io::Result<String> {
    let json = serde_json::to_string(line).map_err(io::Error::other)?;
    Ok(format!("{} {json}\n", digest(json.as_bytes())))
}

fn digest(bytes: &[u8]) -> String {
    let mut text = hex::encode(sha256(bytes));
    text.truncate(DIGEST);
    text
}

fn render(held: &BTreeMap<String, Held>) -> io::Result<Vec<u8>> {
    let mut text = String::new();
    for (id, one) in held {
        text += &encode(&Line::Begun {
            id: id.clone(),
            once: one.once,
        })?;
        if let Some(process) = &one.process {
            text += &encode(&Line::Process {
                id: id.clone(),
                process: process.clone(),
            })?;
        }
        if let Some(result) = &one.result {
            text += &encode(&Line::Finished((**result).clone()))?;
        }
    }
    Ok(text.into_bytes())
}

/// All good lines; the number of the first bad line when it had been synced.
fn parse(bytes: &[u8]) -> std::result::Result<Vec<Line>, usize> {
    let mut lines = Vec::new();
    // The first bad line, and whether a line that is synced when it is written came after it.
    let (mut torn, mut synced_since) = (None, false);
    for (at, whole) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let Some(line) = whole.strip_suffix(b"\n").and_then(decode) else {
            torn.get_or_insert(at + 1);
            continue;
        };
        if let (Some(number), true) = (torn, synced_since) {
            return Err(number);
        }
        synced_since |= torn.is_some() && line.is_synced();
        lines.push(line);
    }
    if let Some(number) = torn {
        tracing::warn!(
            line = number,
            "the end of the ledger was torn, by a power loss or a crash"
        );
    }
    Ok(lines)
}

fn decode(line: &[u8]) -> Option<Line> {
    let (sum, json) = line.split_at_checked(DIGEST)?;
    let json = json.strip_prefix(b" ")?;
    if digest(json).as_bytes() != sum {
        return None;
    }
    serde_json::from_slice(json).ok()
}

fn replay(held: &mut BTreeMap<String, Held>, line: Line) {
    match line {
        Line::Begun { id, once } => {
            held.insert(
                id,
                Held {
                    once,
                    ..Held::default()
                },
            );
        }
        Line::Process { id, process } => {
            if let Some(one) = held.get_mut(&id) {
                one.process = Some(process);
            }
        }
        Line::Finished(result) => {
            let slot = held.entry(result.id.clone()).or_default();
            slot.attempt = result.attempt;
            slot.result = Some(Arc::new(result));
        }
        Line::Forgotten { id } => {
            held.remove(&id);
        }
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
