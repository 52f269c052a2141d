//! What a run found: facts, tables and promises, for people and as one JSON object.
//!
//! What never lives here: how anything was measured. Invariants: a promise that was not kept is told in both
//! forms and decides the exit code; figures that look bad are printed like the good ones.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

/// How a report is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns.
    Table,
    /// One JSON object.
    Json,
}

/// A table of figures: the first column names the row.
#[derive(Debug)]
struct Table {
    name: String,
    columns: Vec<String>,
    rows: Vec<Vec<Value>>,
}

/// Something that must hold, and whether it did.
#[derive(Debug)]
struct Promise {
    text: String,
    kept: bool,
    found: String,
}

/// Everything that one command found.
#[derive(Debug)]
pub(crate) struct Report {
    command: String,
    facts: Vec<(String, Value)>,
    tables: Vec<Table>,
    promises: Vec<Promise>,
    notes: Vec<String>,
}

impl Report {
    /// An empty report of a command.
    pub(crate) fn new(command: &str) -> Report {
        Report {
            command: command.to_owned(),
            facts: Vec::new(),
            tables: Vec::new(),
            promises: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Adds a figure; `name` is snake_case and holds its unit.
    pub(crate) fn fact(&mut self, name: &str, value: impl Into<Value>) {
        self.facts.push((name.to_owned(), value.into()));
    }

    /// Begins a table, or finds the one that was begun under this name.
    pub(crate) fn row(&mut self, table: &str, columns: &[&str], row: Vec<Value>) {
        debug_assert_eq!(
            columns.len(),
            row.len(),
            "a row of {table} has a value for each column"
        );
        if let Some(found) = self.tables.iter_mut().find(|known| known.name == table) {
            found.rows.push(row);
            return;
        }
        self.tables.push(Table {
            name: table.to_owned(),
            columns: columns.iter().map(|&column| column.to_owned()).collect(),
            rows: vec![row],
        });
    }

    /// Adds a promise: what must hold, whether it did, and the figure that says so.
    pub(crate) fn promise(&mut self, text: &str, kept: bool, found: impl Into<String>) {
        self.promises.push(Promise {
            text: text.to_owned(),
            kept,
            found: found.into(),
        });
    }

    /// Adds a sentence that the reader of the figures must know.
    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// Whether every promise was kept.
    pub(crate) fn kept(&self) -> bool {
        self.promises.iter().all(|promise| promise.kept)
    }

    /// The report in one of its forms, with a line feed at its end.
    pub(crate) fn render(&self, format: Format) -> String {
        match format {
            Format::Table => self.render_table(),
            Format::Json => format!("{:#}\n", self.to_json()),
        }
    }

    fn to_json(&self) -> Value {
        let mut object = Map::new();
        object.insert("command".to_owned(), json!(self.command));
        object.insert("kept".to_owned(), json!(self.kept()));
        for (name, value) in &self.facts {
            object.insert(name.clone(), value.clone());
        }
        for table in &self.tables {
            let rows: Vec<Value> = table
                .rows
                .iter()
                .map(|row| {
                    table
                        .columns
                        .iter()
                        .cloned()
                        .zip(row.iter().cloned())
                        .collect::<Map<_, _>>()
                })
                .map(Value::Object)
                .collect();
            object.insert(table.name.clone(), json!(rows));
        }
        let promises: Vec<Value> = self
            .promises
            .iter()
            .map(|promise| json!({"promise": promise.text, "kept": promise.kept, "found": promise.found}))
            .collect();
        object.insert("promises".to_owned(), json!(promises));
        object.insert("notes".to_owned(), json!(self.notes));
        Value::Object(object)
    }

    fn render_table(&self) -> String {
        let mut out = format!("{}\n", self.command);
        // What has parts of its own is for programs; people get the same in tables.
        let plain = |(_, value): &&(String, Value)| !value.is_object() && !value.is_array();
        let facts: Vec<&(String, Value)> = self.facts.iter().filter(plain).collect();
        let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, value) in facts {
            let _ = writeln!(out, "  {name:width$}  {}", shown(value));
        }
        for table in &self.tables {
            let _ = writeln!(out, "\n{}", table.name);
            out.push_str(&aligned(&table.columns, &table.rows));
        }
        if !self.promises.is_empty() {
            out.push_str("\npromises\n");
        }
        for promise in &self.promises {
            let word = if promise.kept { "kept  " } else { "BROKEN" };
            let _ = writeln!(out, "  {word}  {} ({})", promise.text, promise.found);
        }
        if !self.notes.is_empty() {
            out.push('\n');
        }
        for note in &self.notes {
            let _ = writeln!(out, "note: {note}");
        }
        out
    }
}

/// A value as a cell: numbers as short as they are exact, texts without quotes, nothing as a dash.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
            Some(float) => format!("{float:.2}"),
            None => number.to_string(),
        },
        other => other.to_string(),
    }
}

/// Columns under their titles; the first is a name and stands left, figures stand right.
fn aligned(columns: &[String], rows: &[Vec<Value>]) -> String {
    let cells: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(shown).collect()).collect();
    let widths: Vec<usize> = (0..columns.len())
        .map(|at| {
            let longest = cells.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
            longest.max(columns[at].chars().count())
        })
        .collect();
    let mut out = String::new();
    for row in std::iter::once(columns).chain(cells.iter().map(Vec::as_slice)) {
        let mut line = String::from(" ");
        for (at, cell) in row.iter().enumerate() {
            let width = widths[at];
            let _ = match at {
                0 => write!(line, " {cell:width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(kept: bool) -> Report {
        let mut report = Report::new("fleet");
        report.fact("nodes", 3);
        report.fact("entries_per_s", 0.5);
        report.row(
            "rehome",
            &["after", "nodes", "max_ms"],
            vec![json!("kill"), json!(1), json!(12.345)],
        );
        report.row(
            "rehome",
            &["after", "nodes", "max_ms"],
            vec![json!("leader kill"), json!(20), Value::Null],
        );
        report.promise("nobody is lost", kept, "0 lost");
        report.note("two cores");
        report
    }

    #[test]
    fn one_broken_promise_is_told_in_both_forms() {
        assert!(report(true).kept());
        let broken = report(false);
        assert!(!broken.kept());
        assert!(
            broken
                .render(Format::Table)
                .contains("BROKEN  nobody is lost (0 lost)")
        );
        let json: Value = serde_json::from_str(&broken.render(Format::Json)).unwrap();
        assert_eq!(json["kept"], false);
        assert_eq!(json["promises"][0]["kept"], false);
    }

    #[test]
    fn rows_of_a_table_become_objects() {
        let json: Value = serde_json::from_str(&report(true).render(Format::Json)).unwrap();
        assert_eq!(json["nodes"], 3);
        assert_eq!(json["rehome"][1]["after"], "leader kill");
        assert_eq!(json["rehome"][1]["max_ms"], Value::Null);
    }

    #[test]
    fn figures_line_up() {
        let text = report(true).render(Format::Table);
        assert!(text.contains("  after        nodes  max_ms\n"), "{text}");
        assert!(text.contains("  kill             1   12.35\n"), "{text}");
        assert!(text.contains("  leader kill     20       -\n"), "{text}");
    }
}
