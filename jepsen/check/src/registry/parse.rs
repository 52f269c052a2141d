//! Reads the operations of the registers out of a history.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

use crate::history::{History, Kind, Op};
use crate::linear::Item;
use crate::resolve::{Canonical, Fate};
use crate::zones;

/// The value of an absent key. Values are numbered, so that the search moves small things.
pub(super) const ABSENT: u32 = 0;

/// What was asked of a register, and answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Read {
        version: Option<u64>,
        value: u32,
    },
    Write {
        version: Option<u64>,
        value: u32,
    },
    Cas {
        version: Option<u64>,
        from: u32,
        value: u32,
    },
    Delete {
        version: Option<u64>,
    },
}

/// Whether it changes what it is asked of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Read,
    Change,
}

/// An operation on one register.
#[derive(Clone, Debug)]
pub(super) struct Access<'a> {
    pub(super) op: Op<'a>,
    pub(super) item: Item<Call>,
    /// Its revision, when it is exactly that.
    pub(super) rev: Option<u64>,
}

/// Who wrote a value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Writer {
    pub(super) start: u64,
    /// It did not fail.
    pub(super) possible: bool,
}

/// All of one register.
#[derive(Clone, Debug, Default)]
pub(super) struct Key<'a> {
    /// In the order of their calls, without failed ones, stale reads, and reads that got no answer.
    pub(super) ops: Vec<Access<'a>>,
    pub(super) stale: Vec<Access<'a>>,
    pub(super) writers: HashMap<u32, Writer>,
}

/// An operation whose answer told a revision.
#[derive(Clone, Debug)]
pub(super) struct Told<'a> {
    pub(super) op: Op<'a>,
    pub(super) rev: u64,
    pub(super) effect: Effect,
}

/// All registers of a history.
#[derive(Clone, Debug, Default)]
pub(super) struct Registers<'a> {
    pub(super) keys: BTreeMap<String, Key<'a>>,
    /// Of all keys, without stale reads.
    pub(super) told: Vec<Told<'a>>,
    values: Vec<String>,
    numbers: HashMap<String, u32>,
}

impl Call {
    pub(super) fn effect(&self) -> Effect {
        match self {
            Call::Read { .. } => Effect::Read,
            _ => Effect::Change,
        }
    }

    pub(super) fn version(&self) -> Option<u64> {
        match self {
            Call::Read { version, .. }
            | Call::Write { version, .. }
            | Call::Cas { version, .. }
            | Call::Delete { version } => *version,
        }
    }

    /// What the register holds afterwards.
    pub(super) fn value(&self) -> u32 {
        match self {
            Call::Read { value, .. } | Call::Write { value, .. } | Call::Cas { value, .. } => *value,
            Call::Delete { .. } => ABSENT,
        }
    }
}

impl Access<'_> {
    /// As [`crate::zones`] sees it; `None` when it does more than read or write.
    pub(super) fn access(&self) -> Option<zones::Access> {
        let (is_write, value) = match self.item.call {
            Call::Read { value, .. } => (false, value),
            Call::Write { value, .. } => (true, value),
            Call::Cas { .. } | Call::Delete { .. } => return None,
        };
        Some(zones::Access {
            is_write,
            value,
            start: self.item.start,
            stop: self.item.stop,
        })
    }
}

impl<'a> Registers<'a> {
    /// Reads a history; why it cannot be read when an operation has not the shape of the workload.
    pub(super) fn parse(history: &'a History) -> Result<Self, String> {
        let mut registers = Registers::default();
        registers.number(&Value::Null);
        for op in history.ops() {
            registers
                .take(op)
                .map_err(|what| format!("event {}: `{}` {what}", op.start(), op.invoke.f))?;
        }
        Ok(registers)
    }

    fn take(&mut self, op: Op<'a>) -> Result<(), String> {
        match op.invoke.f.as_str() {
            "read" => self.read(op, op.value()),
            "list" => self.list(op),
            // Other workloads have a `write` of their own, which names no key.
            "write" | "cas" | "delete" if op.invoke.value.get("key").is_some() => self.change(op),
            _ => Ok(()),
        }
    }

    fn read(&mut self, op: Op<'a>, entry: &Value) -> Result<(), String> {
        let key = text(entry, "key")?;
        if !op.is_ok() {
            self.keys.entry(key).or_default();
            return Ok(());
        }
        let value = self.number(entry.get("value").ok_or("has no `value` in its answer")?);
        let access = access(
            op,
            Call::Read {
                version: number(entry, "version"),
                value,
            },
            false,
        );
        let stale = is_set(&op, "stale");
        self.tell(&op, Effect::Read, stale || op.invoke.f == "list");
        let key = self.keys.entry(key).or_default();
        let list = if stale { &mut key.stale } else { &mut key.ops };
        list.push(access);
        Ok(())
    }

    fn list(&mut self, op: Op<'a>) -> Result<(), String> {
        if !op.is_ok() {
            return Ok(());
        }
        let entries = op.value().get("entries").and_then(Value::as_array);
        for entry in entries.ok_or("has no `entries` in its answer")? {
            self.read(op, entry)?;
        }
        self.tell(&op, Effect::Read, is_set(&op, "stale"));
        Ok(())
    }

    fn change(&mut self, op: Op<'a>) -> Result<(), String> {
        let key = text(&op.invoke.value, "key")?;
        let version = op.is_ok().then(|| number(op.value(), "version")).flatten();
        let mut value_of = |name: &str| {
            let value = op.invoke.value.get(name);
            value
                .map(|value| self.number(value))
                .ok_or(format!("has no `{name}`"))
        };
        let call = match op.invoke.f.as_str() {
            "write" => Call::Write {
                version,
                value: value_of("value")?,
            },
            "cas" => Call::Cas {
                version,
                from: value_of("from")?,
                value: value_of("value")?,
            },
            _ => Call::Delete { version },
        };
        let writer = Writer {
            start: op.start(),
            possible: op.kind() != Kind::Fail,
        };
        let entry = self.keys.entry(key).or_default();
        if !matches!(call, Call::Delete { .. }) {
            let known = entry.writers.insert(call.value(), writer);
            if known.is_some_and(|known| known.possible && writer.possible) {
                return Err("writes a value that was written before: each must be used once".into());
            }
            if let Some(known) = known.filter(|known| known.possible) {
                entry.writers.insert(call.value(), known);
            }
        }
        if writer.possible {
            entry.ops.push(access(op, call, !op.is_ok()));
        }
        self.tell(&op, Effect::Change, false);
        Ok(())
    }

    fn tell(&mut self, op: &Op<'a>, effect: Effect, skip: bool) {
        if let Some(rev) = op.rev().filter(|_| op.is_ok() && !skip) {
            self.told.push(Told { op: *op, rev, effect });
        }
    }

    fn number(&mut self, value: &Value) -> u32 {
        let text = value.to_string();
        if let Some(known) = self.numbers.get(&text) {
            return *known;
        }
        let new = u32::try_from(self.values.len()).unwrap_or(u32::MAX);
        self.values.push(text.clone());
        self.numbers.insert(text, new);
        new
    }

    /// A value as the history writes it.
    pub(super) fn value(&self, number: u32) -> String {
        self.values.get(number as usize).cloned().unwrap_or_default()
    }

    /// The same, with the outcomes that the canonical journal knows.
    pub(super) fn resolve(&self, canonical: Option<&Canonical>) -> Self {
        let mut resolved = self.clone();
        let Some(canonical) = canonical else {
            return resolved;
        };
        for key in resolved.keys.values_mut() {
            key.ops.retain_mut(|access| {
                if access.item.call.effect() == Effect::Read {
                    return true;
                }
                match canonical.fate(&access.op) {
                    Fate::At(rev) => {
                        access.item.optional = false;
                        access.rev = access.rev.or(Some(rev));
                        true
                    }
                    // An answered change that is not in the journal is the journal's own check to find.
                    Fate::Never => !access.item.optional,
                    Fate::Open => true,
                }
            });
        }
        resolved
    }
}

fn access(op: Op<'_>, call: Call, optional: bool) -> Access<'_> {
    let item = Item {
        call,
        start: op.start(),
        stop: op.stop(),
        optional,
    };
    let rev = op.rev().filter(|_| op.is_ok() && !is_set(&op, "duplicate"));
    Access { op, item, rev }
}

fn is_set(op: &Op<'_>, name: &str) -> bool {
    op.field(name).and_then(Value::as_bool).unwrap_or(false)
}

fn text(value: &Value, name: &str) -> Result<String, String> {
    let found = value.get(name).and_then(Value::as_str);
    found.map(str::to_owned).ok_or(format!("has no text `{name}`"))
}

fn number(value: &Value, name: &str) -> Option<u64> {
    value.get(name).and_then(Value::as_u64)
}

/// An operation in the words of a person: `the read of 7 (version 3) at r2 (event 120)`.
pub(super) fn tell(op: &Op<'_>) -> String {
    let value = op
        .field("value")
        .map(|value| format!(" of {value}"))
        .unwrap_or_default();
    let version = op.field("version").and_then(Value::as_u64);
    let version = version
        .map(|version| format!(" (version {version})"))
        .unwrap_or_default();
    let node = op
        .end
        .and_then(|end| end.node.as_deref())
        .or(op.invoke.node.as_deref());
    let node = node.map(|node| format!(" at {node}")).unwrap_or_default();
    format!("the {}{value}{version}{node} (event {})", op.invoke.f, op.start())
}
