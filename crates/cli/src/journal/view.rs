//! Journal rows and verdicts as they are printed.

use std::collections::BTreeMap;

use palyra_proto::journal::v1::{Cursor, Row, VerifyResponse};
use serde::{Deserialize, Serialize};

use crate::output::Record;
use crate::output::table::{Column, Style, column, draw, wide};
use crate::output::time::Moment;

/// A place in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    index: u64,
    ordinal: u32,
}

impl From<Cursor> for Place {
    fn from(cursor: Cursor) -> Place {
        Place {
            index: cursor.index,
            ordinal: cursor.ordinal,
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.index, self.ordinal)
    }
}

/// One row.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RowView {
    cursor: Place,
    at: Moment,
    actor: String,
    action: String,
    subject: String,
    request_id: String,
    detail: BTreeMap<String, String>,
    prev_hash: String,
    hash: String,
}

impl From<Row> for RowView {
    fn from(row: Row) -> RowView {
        RowView {
            cursor: row.cursor.unwrap_or_default().into(),
            at: Moment(row.at_ms),
            actor: row.actor,
            action: row.action,
            subject: row.subject,
            request_id: row.request_id,
            detail: row.detail.into_iter().collect(),
            prev_hash: hex::encode(&row.prev_hash),
            hash: hex::encode(&row.hash),
        }
    }
}

impl RowView {
    /// The row as one line. Rows come one by one, so columns have fixed widths instead of those of a table, and
    /// nothing is cut: the record is shown as it is.
    pub(crate) fn line(&self, wide: bool) -> String {
        padded(self.cells(0), wide, false)
    }

    /// The titles above such lines.
    pub(crate) fn titles(wide: bool) -> String {
        let drawn = padded(vec![String::new(); WIDTHS.len()], wide, true);
        drawn
            .lines()
            .take(1)
            .map(|titles| titles.to_owned() + "\n")
            .collect()
    }

    fn told_detail(&self) -> String {
        self.detail
            .iter()
            .map(|(key, value)| match value.parse() {
                Ok(at) if key.ends_with("_at") => {
                    format!("{key}={}", Moment(at).rfc3339().unwrap_or_default())
                }
                _ => format!("{key}={value}"),
            })
            .collect::<Vec<_>>()
            .join(" ")
    }
}

impl Record for RowView {
    const COLUMNS: &'static [Column] = &[
        column("CURSOR"),
        column("TIME"),
        column("ACTOR"),
        column("ACTION"),
        column("SUBJECT"),
        wide("HASH"),
        wide("REQUEST"),
        column("DETAIL"),
    ];

    fn key(&self) -> String {
        self.cursor.to_string()
    }

    fn cells(&self, _now_ms: u64) -> Vec<String> {
        vec![
            self.cursor.to_string(),
            self.at.clock(),
            self.actor.clone(),
            self.action.clone(),
            self.subject.clone(),
            self.hash.chars().take(16).collect(),
            self.request_id.clone(),
            self.told_detail(),
        ]
    }
}

/// How wide each column is at least.
const WIDTHS: [usize; 8] = [9, 14, 31, 26, 26, 16, 26, 0];

fn padded(cells: Vec<String>, wide: bool, titles: bool) -> String {
    let style = Style {
        wide,
        color: false,
        room: None,
    };
    let cells = cells
        .into_iter()
        .zip(WIDTHS)
        .map(|(cell, width)| format!("{cell:<width$}"));
    draw(RowView::COLUMNS, &[cells.collect()], style, titles)
}

/// What a replica says about its journal.
#[derive(Debug, Serialize)]
pub(crate) struct VerifyView {
    pub(crate) intact: bool,
    rows: u64,
    first: Option<Place>,
    last: Option<Place>,
    head: String,
    broken_at: Option<Place>,
    problem: String,
}

impl From<VerifyResponse> for VerifyView {
    fn from(answer: VerifyResponse) -> VerifyView {
        VerifyView {
            intact: answer.intact,
            rows: answer.rows,
            first: answer.first.map(Place::from),
            last: answer.last.map(Place::from),
            head: hex::encode(&answer.head),
            broken_at: answer.broken_at.map(Place::from),
            problem: answer.problem,
        }
    }
}

fn told(place: Option<Place>) -> String {
    place.map(|place| place.to_string()).unwrap_or_default()
}

impl VerifyView {
    /// All of it, for people; `replica` is the one whose journal it is.
    pub(crate) fn facts(&self, replica: u64) -> Vec<(&'static str, String)> {
        let mut facts = verdict(
            self.intact,
            self.rows,
            told(self.first),
            told(self.last),
            &self.head,
            told(self.broken_at),
            &self.problem,
        );
        facts.push(("checked at", format!("replica {replica}")));
        facts
    }
}

/// What `palyrad journal-verify` says about a data folder. Everything but the verdict may be missing.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct OfflineView {
    pub(crate) intact: bool,
    #[serde(default)]
    rows: u64,
    #[serde(default)]
    first: Option<serde_json::Value>,
    #[serde(default)]
    last: Option<serde_json::Value>,
    #[serde(default)]
    head: String,
    #[serde(default)]
    broken_at: Option<serde_json::Value>,
    #[serde(default)]
    problem: String,
}

impl OfflineView {
    /// All of it, for people.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let place = |value: &Option<serde_json::Value>| match value {
            Some(serde_json::Value::String(text)) => text.clone(),
            Some(value) => told(serde_json::from_value::<Place>(value.clone()).ok()),
            None => String::new(),
        };
        let (first, last, broken) = (place(&self.first), place(&self.last), place(&self.broken_at));
        verdict(
            self.intact,
            self.rows,
            first,
            last,
            &self.head,
            broken,
            &self.problem,
        )
    }
}

fn verdict(
    intact: bool,
    rows: u64,
    first: String,
    last: String,
    head: &str,
    broken_at: String,
    problem: &str,
) -> Vec<(&'static str, String)> {
    let span = if first.is_empty() {
        String::new()
    } else {
        format!("{first} to {last}")
    };
    vec![
        ("journal", if intact { "intact" } else { "BROKEN" }.to_owned()),
        ("rows", rows.to_string()),
        ("from", span),
        ("head", head.to_owned()),
        ("broken at", broken_at),
        ("problem", problem.to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_one_line_whatever_it_holds() {
        let row = Row {
            cursor: Some(Cursor {
                index: 12,
                ordinal: 1,
            }),
            at_ms: 1_700_000_000_000,
            actor: "operator/admin".to_owned(),
            action: "device.revoke".to_owned(),
            subject: "01ARZ3NDEKTSV4RRFFQ69G5FAV".to_owned(),
            detail: [("reason".to_owned(), "two\nlines".to_owned())].into(),
            ..Row::default()
        };
        let line = RowView::from(row).line(false);
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.starts_with("12.1 "), "{line}");
        assert!(line.contains("11-14 22:13:20"), "{line}");
        let titles = RowView::titles(false);
        assert_eq!(
            titles.find("ACTION"),
            line.find("device.revoke"),
            "{titles}{line}"
        );
    }

    #[test]
    fn offline_verdicts_are_read_in_either_form_of_a_cursor() {
        let text = r#"{"intact":false,"rows":9,"first":{"index":1,"ordinal":0},"last":"9.0",
            "broken_at":{"index":4,"ordinal":0},"problem":"hash"}"#;
        let view: OfflineView = serde_json::from_str(text).unwrap();
        let facts = view.facts();
        assert!(facts.contains(&("from", "1.0 to 9.0".to_owned())), "{facts:?}");
        assert!(facts.contains(&("broken at", "4.0".to_owned())), "{facts:?}");
        assert!(
            serde_json::from_str::<OfflineView>("{}").is_err(),
            "a verdict is required"
        );
    }
}
