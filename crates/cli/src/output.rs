//! What commands print: one shape for lists and single things in all formats.
//!
//! Invariants: field names are snake_case and stable; every list has `items`, `index`, `age_ms` and
//! `served_by`; standard output holds the answer and nothing else, notes and progress go to standard error;
//! no colour unless a person looks; nothing that a node or a server says steers the terminal.

pub(crate) mod table;
pub(crate) mod time;

use std::io::{IsTerminal, Write};

use clap::ValueEnum;
use palyra_client::wall_ms;
use palyra_proto::common::v1::{ReadInfo, WriteInfo};
use serde::Serialize;

use crate::failure::Result;
use table::{Column, Style};

/// The age from which a table's reader is told that the answer may be old, in milliseconds.
const OLD_MS: u64 = 2_000;

/// How answers are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns.
    Table,
    /// Aligned columns, all of them.
    Wide,
    /// One JSON document.
    Json,
    /// One JSON document a line.
    Jsonl,
    /// One YAML document.
    Yaml,
    /// One TOML document.
    Toml,
    /// What names it, one a line.
    Name,
}

impl Format {
    /// Whether a person is meant.
    pub(crate) fn is_table(self) -> bool {
        matches!(self, Format::Table | Format::Wide)
    }
}

/// Something that is listed.
pub(crate) trait Record: Serialize {
    /// The columns of its table.
    const COLUMNS: &'static [Column];
    /// Fields that are another each time: a watch does not compare them.
    const RESTLESS: &'static [&'static str] = &[];
    /// What names it among others.
    fn key(&self) -> String;
    /// One cell for each column.
    fn cells(&self, now_ms: u64) -> Vec<String>;
}

/// Where and when an answer was true. What was answered on this machine alone has neither index nor replica.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Source {
    /// The log index that the answer reflects, or of the accepted entry.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) index: u64,
    /// Time since the replica last had contact with a quorum.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) age_ms: Option<u64>,
    /// The replica that answered.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) served_by: u64,
    /// The request id was known: this is the answer of the first time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) duplicate: Option<bool>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl From<Option<ReadInfo>> for Source {
    fn from(read: Option<ReadInfo>) -> Source {
        let read = read.unwrap_or_default();
        Source {
            index: read.index,
            age_ms: Some(read.age_ms),
            served_by: read.served_by,
            duplicate: None,
        }
    }
}

impl From<Option<WriteInfo>> for Source {
    fn from(write: Option<WriteInfo>) -> Source {
        let write = write.unwrap_or_default();
        Source {
            index: write.index,
            age_ms: None,
            served_by: write.served_by,
            duplicate: Some(write.duplicate),
        }
    }
}

#[derive(Serialize)]
struct List<'a, T> {
    items: &'a [T],
    #[serde(flatten)]
    source: Source,
}

#[derive(Serialize)]
struct One<'a, T> {
    #[serde(flatten)]
    item: &'a T,
    #[serde(flatten)]
    source: Source,
}

/// How one watched thing changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Change {
    /// It was there when the watch began.
    Listed,
    /// It is new.
    Added,
    /// It changed.
    Changed,
    /// It is gone.
    Removed,
}

impl Change {
    /// The sign in front of a table's row.
    fn sign(self) -> &'static str {
        match self {
            Change::Listed => " ",
            Change::Added => "+",
            Change::Changed => "~",
            Change::Removed => "-",
        }
    }
}

#[derive(Serialize)]
struct Changed<'a, T> {
    change: Change,
    item: &'a T,
    index: u64,
}

/// Where answers go, and how they look.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Out {
    /// The format that was asked for.
    pub(crate) format: Format,
    pub(crate) style: Style,
}

impl Out {
    /// Colour needs a terminal, and neither `--no-color` nor `NO_COLOR`.
    pub(crate) fn new(format: Format, no_color: bool) -> Out {
        let quiet = no_color || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let terminal = std::io::stdout().is_terminal();
        Out {
            format,
            style: Style {
                wide: format == Format::Wide,
                color: terminal && !quiet,
                room: terminal.then(terminal_width).flatten(),
            },
        }
    }

    /// Prints a list.
    pub(crate) fn list<T: Record>(self, items: &[T], source: Source) -> Result {
        self.write(&self.render_list(items, source, wall_ms())?)?;
        if self.format.is_table() {
            self.age_note(source);
        }
        Ok(())
    }

    fn render_list<T: Record>(self, items: &[T], source: Source, now_ms: u64) -> Result<String> {
        match self.format {
            Format::Jsonl => return items.iter().map(json_line).collect(),
            Format::Name => return Ok(items.iter().map(|item| item.key() + "\n").collect()),
            _ => {}
        }
        if !self.format.is_table() {
            return self.render(&List { items, source });
        }
        let rows: Vec<Vec<String>> = items.iter().map(|item| item.cells(now_ms)).collect();
        Ok(table::draw(T::COLUMNS, &rows, self.style, true))
    }

    /// Prints one thing; `facts` are its lines for people.
    pub(crate) fn one<T: Serialize>(self, item: &T, source: Source, facts: &[(&str, String)]) -> Result {
        if self.format.is_table() {
            self.write(&table::facts(facts))?;
            self.age_note(source);
            return Ok(());
        }
        if self.format == Format::Name {
            return self.write(&name(item, facts)?);
        }
        self.write(&self.render(&One { item, source })?)
    }

    /// Prints something that has no source in the cluster; `text` is for people.
    pub(crate) fn plain<T: Serialize>(self, item: &T, text: &str) -> Result {
        if self.format.is_table() {
            return self.write(text);
        }
        if self.format == Format::Name {
            return self.write(&name(item, &[])?);
        }
        self.write(&self.render(item)?)
    }

    /// Prints rows of a watch, the first ones under titles; `widths` is empty then, and keeps the columns in line
    /// from there on. JSON and JSONL are lines, YAML is a stream of documents.
    pub(crate) fn changes<T: Record>(
        self,
        changes: &[(Change, &T)],
        index: u64,
        widths: &mut Vec<usize>,
    ) -> Result {
        let now_ms = wall_ms();
        if self.format.is_table() {
            let mut columns = vec![table::column(" ")];
            columns.extend_from_slice(T::COLUMNS);
            let rows: Vec<Vec<String>> = changes
                .iter()
                .map(|(change, item)| [vec![change.sign().to_owned()], item.cells(now_ms)].concat())
                .collect();
            let titles = widths.is_empty();
            return self.write(&table::draw_on(&columns, &rows, self.style, titles, widths));
        }
        for (change, item) in changes {
            let changed = Changed {
                change: *change,
                item: *item,
                index,
            };
            match self.format {
                Format::Yaml => self.write(&format!("---\n{}", yaml(&changed)?))?,
                Format::Name => self.write(&(item.key() + "\n"))?,
                _ => self.write(&json_line(&changed)?)?,
            }
        }
        Ok(())
    }

    /// Prints one row of a stream that has no end, without titles.
    pub(crate) fn row<T: Record>(self, item: &T) -> Result {
        match self.format {
            Format::Table | Format::Wide => self.write(&table::draw(
                T::COLUMNS,
                &[item.cells(wall_ms())],
                self.style,
                false,
            )),
            Format::Yaml => self.write(&format!("---\n{}", yaml(item)?)),
            Format::Name => self.write(&(item.key() + "\n")),
            Format::Json | Format::Jsonl | Format::Toml => self.write(&json_line(item)?),
        }
    }

    fn render<T: Serialize>(self, item: &T) -> Result<String> {
        match self.format {
            Format::Yaml => yaml(item),
            Format::Jsonl => json_line(item),
            Format::Toml => toml_text(item),
            Format::Table | Format::Wide | Format::Json | Format::Name => pretty(item),
        }
    }

    /// Writes text as it is to standard output.
    pub(crate) fn write(self, text: &str) -> Result {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        stdout.flush()?;
        Ok(())
    }

    fn age_note(self, source: Source) {
        if let Some(age_ms) = source.age_ms.filter(|age_ms| *age_ms > OLD_MS) {
            let replica = source.served_by;
            note(&match age_ms {
                u64::MAX => format!("replica {replica} has had no contact with a quorum since it started"),
                _ => format!(
                    "replica {replica} last had contact with a quorum {} ago",
                    time::span(age_ms)
                ),
            });
        }
    }
}

/// How many columns the terminal at standard output has.
fn terminal_width() -> Option<usize> {
    terminal_size::terminal_size_of(std::io::stdout()).map(|(width, _)| width.0.into())
}

/// Tells something on standard error that is not part of the answer.
pub(crate) fn note(text: &str) {
    // Nothing can be done when standard error is closed.
    let _ = writeln!(std::io::stderr(), "{}", table::harmless(text));
}

/// Whether a person sits at both ends.
pub(crate) fn interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Says what is about to happen and has it confirmed; `again` is the command that needs no answer.
///
/// Errors: nobody is there to ask, or the answer was not yes.
pub(crate) fn confirm(what: &str, again: &str) -> Result {
    let next = format!("repeat with --yes: {again}");
    if !interactive() {
        let message = format!("{what}; that has to be confirmed, and this is no terminal");
        return Err(crate::failure::Failure::usage(message, next));
    }
    let mut stderr = std::io::stderr();
    write!(stderr, "{}. Go on? [y/N] ", table::harmless(what))?;
    stderr.flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    if matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        return Ok(());
    }
    Err(crate::failure::Failure::usage(
        "not confirmed; nothing was done",
        next,
    ))
}

fn json_line<T: Serialize>(item: &T) -> Result<String> {
    serde_json::to_string(item)
        .map(|text| table::harmless_json(text) + "\n")
        .map_err(|error| encoding(&error))
}

/// JSON over several lines.
pub(crate) fn pretty<T: Serialize>(item: &T) -> Result<String> {
    serde_json::to_string_pretty(item)
        .map(|text| table::harmless_json(text) + "\n")
        .map_err(|error| encoding(&error))
}

fn yaml<T: Serialize>(item: &T) -> Result<String> {
    serde_yaml_ng::to_string(item).map_err(|error| encoding(&error))
}

/// TOML has no null: what has no value is left out.
fn toml_text<T: Serialize>(item: &T) -> Result<String> {
    let mut value = serde_json::to_value(item).map_err(|error| encoding(&error))?;
    without_nulls(&mut value);
    toml::to_string(&value).map_err(|error| encoding(&error))
}

fn without_nulls(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(without_nulls);
        }
        serde_json::Value::Array(items) => {
            items.retain(|item| !item.is_null());
            items.iter_mut().for_each(without_nulls);
        }
        _ => {}
    }
}

/// What names one thing: its id, or the first that is told of it.
fn name<T: Serialize>(item: &T, facts: &[(&str, String)]) -> Result<String> {
    let value = serde_json::to_value(item).map_err(|error| encoding(&error))?;
    let field = ["id", "name"].iter().find_map(|field| value.get(field)?.as_str());
    let first = facts.first().map(|(_, value)| value.as_str());
    Ok(format!("{}\n", field.or(first).unwrap_or_default()))
}

fn encoding(error: &dyn std::fmt::Display) -> crate::failure::Failure {
    let message = format!("the answer cannot be written in this format: {error}");
    crate::failure::Failure::local(palyra_client::Class::Internal, message, "try -o json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Thing {
        id: String,
        at: time::Moment,
    }

    impl Record for Thing {
        const COLUMNS: &'static [Column] = &[table::column("ID"), table::wide("AT")];
        fn key(&self) -> String {
            self.id.clone()
        }
        fn cells(&self, now_ms: u64) -> Vec<String> {
            vec![self.id.clone(), self.at.told(now_ms)]
        }
    }

    fn out(format: Format) -> Out {
        Out {
            format,
            style: Style {
                wide: format == Format::Wide,
                color: false,
                room: None,
            },
        }
    }

    fn things() -> Vec<Thing> {
        vec![
            Thing {
                id: "a".to_owned(),
                at: time::Moment(1_000),
            },
            Thing {
                id: "b".to_owned(),
                at: time::Moment(0),
            },
        ]
    }

    fn source() -> Source {
        Some(ReadInfo {
            index: 7,
            served_by: 2,
            age_ms: 3,
        })
        .into()
    }

    #[test]
    fn a_list_has_the_same_parts_in_json_and_yaml() {
        let json = out(Format::Json).render_list(&things(), source(), 0).unwrap();
        let from_json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let yaml = out(Format::Yaml).render_list(&things(), source(), 0).unwrap();
        let from_yaml: serde_json::Value = serde_yaml_ng::from_str(&yaml).unwrap();
        assert_eq!(from_json, from_yaml);
        assert_eq!(from_json["items"][0]["at"], "1970-01-01T00:00:01.000Z");
        assert_eq!(from_json["items"][1]["at"], serde_json::Value::Null);
        assert_eq!(
            (&from_json["index"], &from_json["served_by"], &from_json["age_ms"]),
            (&7.into(), &2.into(), &3.into())
        );
        assert!(json.contains("\"id\": \"a\""), "{json}");
    }

    #[test]
    fn jsonl_is_one_item_a_line() {
        let text = out(Format::Jsonl).render_list(&things(), source(), 0).unwrap();
        let ids: Vec<String> = text
            .lines()
            .map(|line| {
                serde_json::from_str::<serde_json::Value>(line).unwrap()["id"]
                    .as_str()
                    .unwrap()
                    .to_owned()
            })
            .collect();
        assert_eq!(ids, ["a", "b"]);
    }

    #[test]
    fn tables_hide_wide_columns_until_asked() {
        assert_eq!(
            out(Format::Table)
                .render_list(&things(), source(), 5_000)
                .unwrap(),
            "ID\na\nb\n"
        );
        let wide = out(Format::Wide).render_list(&things(), source(), 5_000).unwrap();
        assert_eq!(wide, "ID  AT\na   4s ago\nb   -\n");
    }

    #[test]
    fn names_and_toml_leave_out_the_rest() {
        let names = out(Format::Name).render_list(&things(), source(), 0).unwrap();
        assert_eq!(names, "a\nb\n");
        assert_eq!(name(&things()[0], &[]).unwrap(), "a\n");
        assert_eq!(name(&1, &[("job", "x".to_owned())]).unwrap(), "x\n");
        let toml = out(Format::Toml).render(&things()[1]).unwrap();
        assert_eq!(toml, "id = \"b\"\n", "a moment that is none is left out");
    }

    #[test]
    fn one_thing_carries_its_source() {
        let thing = &things()[0];
        let write = Some(WriteInfo {
            index: 9,
            served_by: 1,
            duplicate: true,
        });
        let text = out(Format::Json)
            .render(&One {
                item: thing,
                source: write.into(),
            })
            .unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&value["id"], &value["index"], &value["duplicate"]),
            (&"a".into(), &9.into(), &true.into())
        );
        assert_eq!(value.get("age_ms"), None);
    }
}
