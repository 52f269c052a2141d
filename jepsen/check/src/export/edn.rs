//! Histories in EDN, as Jepsen stores them: one op map after the other, which knossos and elle read.
//!
//! `history.edn` has whole operations. `independent/KEY/history.edn` has one register each, with bare values, which is
//! what knossos' models want: `:read` of a value or `nil`, `:write` of a value, `:cas` of `[from to]`; a deletion
//! writes `nil`.
//!
//! Invariants: names that EDN cannot have as keywords are strings; numbers are written as they are; times are
//! nanoseconds.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde_json::{Value, json};

use crate::history::{Event, History, Kind, Process};

/// Most registers that get a file of their own.
const MAX_KEYS: usize = 500;

/// Writes a whole history.
///
/// # Errors
/// Those of the writer.
pub fn history(to: &mut dyn Write, history: &History) -> io::Result<()> {
    history.events.iter().try_for_each(|event| op(to, event))
}

/// Writes these events.
///
/// # Errors
/// Those of the writer.
pub fn events(to: &mut dyn Write, events: &[Event]) -> io::Result<()> {
    events.iter().try_for_each(|event| op(to, event))
}

fn op(to: &mut dyn Write, event: &Event) -> io::Result<()> {
    let kind = match event.kind {
        Kind::Invoke => "invoke",
        Kind::Ok => "ok",
        Kind::Fail => "fail",
        Kind::Info => "info",
    };
    write!(
        to,
        "{{:index {}, :time {}, :type :{kind}, :process ",
        event.index, event.time
    )?;
    match event.process {
        Process::Client(process) => write!(to, "{process}")?,
        Process::Nemesis(_) => write!(to, ":nemesis")?,
    }
    write!(to, ", :f ")?;
    name(to, &event.f)?;
    write!(to, ", :value ")?;
    value(to, &event.value)?;
    if let Some(rev) = event.rev {
        write!(to, ", :rev {rev}")?;
    }
    for (field, text) in [
        ("node", &event.node),
        ("request", &event.request),
        ("error", &event.error),
    ] {
        if let Some(text) = text {
            write!(to, ", :{field} ")?;
            string(to, text)?;
        }
    }
    writeln!(to, "}}")
}

/// Writes a value; objects become maps with keywords.
///
/// # Errors
/// Those of the writer.
pub fn value(to: &mut dyn Write, from: &Value) -> io::Result<()> {
    match from {
        Value::Null => write!(to, "nil"),
        Value::Bool(bool) => write!(to, "{bool}"),
        Value::Number(number) => write!(to, "{number}"),
        Value::String(text) => string(to, text),
        Value::Array(items) => {
            write!(to, "[")?;
            for (at, item) in items.iter().enumerate() {
                if at > 0 {
                    write!(to, " ")?;
                }
                value(to, item)?;
            }
            write!(to, "]")
        }
        Value::Object(fields) => {
            write!(to, "{{")?;
            for (at, (field, item)) in fields.iter().enumerate() {
                if at > 0 {
                    write!(to, ", ")?;
                }
                name(to, field)?;
                write!(to, " ")?;
                value(to, item)?;
            }
            write!(to, "}}")
        }
    }
}

/// A keyword when it can be one.
fn name(to: &mut dyn Write, text: &str) -> io::Result<()> {
    let starts = text.starts_with(|first: char| first.is_ascii_alphabetic());
    let plain = |char: char| char.is_ascii_alphanumeric() || "-_.?!*+".contains(char);
    if starts && text.chars().all(plain) {
        write!(to, ":{text}")
    } else {
        string(to, text)
    }
}

fn string(to: &mut dyn Write, text: &str) -> io::Result<()> {
    write!(to, "\"")?;
    for char in text.chars() {
        match char {
            '"' => write!(to, "\\\"")?,
            '\\' => write!(to, "\\\\")?,
            '\n' => write!(to, "\\n")?,
            '\r' => write!(to, "\\r")?,
            '\t' => write!(to, "\\t")?,
            other if other.is_control() => write!(to, "\\u{:04x}", other as u32)?,
            other => write!(to, "{other}")?,
        }
    }
    write!(to, "\"")
}

/// The history of each register by itself, with bare values; by the name of its folder.
#[must_use]
pub fn independent(history: &History) -> BTreeMap<String, Vec<Event>> {
    let mut keys: BTreeMap<String, Vec<Event>> = BTreeMap::new();
    for event in &history.events {
        let stale = event.value.get("stale").and_then(Value::as_bool).unwrap_or(false);
        let Some(key) = event.value.get("key").and_then(Value::as_str).filter(|_| !stale) else {
            continue;
        };
        let Some((f, bare)) = bare(event) else { continue };
        let folder = folder(key);
        if keys.len() == MAX_KEYS && !keys.contains_key(&folder) {
            continue;
        }
        let events = keys.entry(folder).or_default();
        let index = events.len() as u64;
        events.push(Event {
            index,
            f: f.into(),
            value: bare,
            ..event.clone()
        });
    }
    keys
}

/// What knossos' registers understand.
fn bare(event: &Event) -> Option<(&'static str, Value)> {
    let field = |name: &str| event.value.get(name).cloned().unwrap_or(Value::Null);
    match event.f.as_str() {
        "read" if event.kind == Kind::Ok => Some(("read", field("value"))),
        "read" => Some(("read", Value::Null)),
        "write" => Some(("write", field("value"))),
        "cas" => Some(("cas", json!([field("from"), field("value")]))),
        "delete" => Some(("write", Value::Null)),
        _ => None,
    }
}

/// A key as the name of a folder: nothing in it leaves its place.
fn folder(key: &str) -> String {
    let safe = |char: char| {
        if char.is_ascii_alphanumeric() || "-_".contains(char) {
            char
        } else {
            '_'
        }
    };
    let name: String = key.chars().take(100).map(safe).collect();
    if name == key && !name.is_empty() {
        return name;
    }
    // Two keys that look alike stay two.
    let sum = key.bytes().fold(0xcbf2_9ce4_8422_2325u64, |sum, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{name}-{sum:016x}")
}
