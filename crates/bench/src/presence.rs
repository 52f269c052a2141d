//! What the cluster said about its nodes, row by row of the journal, and which of it was not true.
//!
//! What never lives here: what the nodes know of themselves. The journal holds every transition of a node that the
//! cluster ever believed, whoever led, so that a node that was shown offline for a moment is found afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Result, bail};
use palyra_client::{Client, Step};
use palyra_proto::journal::v1::{Cursor, Row, TailRequest};
use tokio::time::{Instant, timeout_at};

/// What one row says about one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The device.
    pub(crate) device_id: String,
    /// The action: `node.attached`, `node.detached`…
    pub(crate) action: String,
    /// The replica that the row names: where the session is, or was; 0 when it names none.
    pub(crate) replica: u64,
    /// Why, where the row says it.
    pub(crate) reason: String,
    /// What the node counts as from then on, where the row says it.
    pub(crate) status: String,
    /// When the leader took the entry, by its wall clock.
    pub(crate) at_ms: u64,
}

impl Seen {
    fn of(row: &Row) -> Seen {
        let detail = |name: &str| row.detail.get(name).cloned().unwrap_or_default();
        Seen {
            device_id: row.subject.clone(),
            action: row.action.clone(),
            replica: detail("replica").parse().unwrap_or(0),
            reason: detail("reason"),
            status: detail("status"),
            at_ms: row.at_ms,
        }
    }

    /// Whether the row shows its node as anything but online. A session that a newer one took over, and one that its
    /// replica sent away to another, are no such thing.
    pub(crate) fn is_absence(&self) -> bool {
        match self.action.as_str() {
            "node.detached" => self.status != "online",
            "node.suspect" | "node.offline" | "node.gone" => true,
            _ => false,
        }
    }

    /// Whether the node counts as offline from then on, not only as suspect.
    fn is_offline(&self) -> bool {
        self.is_absence() && self.action != "node.suspect" && self.status != "suspect"
    }
}

/// Where the journal ends now.
pub(crate) async fn end_of_journal(client: &Client) -> Result<Option<Cursor>> {
    let last = TailRequest {
        last: 1,
        ..Default::default()
    };
    let mut feed = client.follow(last, Some(Duration::from_secs(20)));
    loop {
        match feed.next().await? {
            Step::End => return Ok(feed.cursor()),
            Step::Rows(_) | Step::Moved { .. } | Step::Lost { .. } => {}
            Step::Gap(first) => bail!("the journal begins at {first:?}; nothing is in it"),
        }
    }
}

/// All rows of nodes after `after` until the journal's end of now.
pub(crate) async fn since(client: &Client, after: Option<Cursor>, action_prefix: &str) -> Result<Vec<Row>> {
    let request = TailRequest {
        after,
        action_prefix: action_prefix.to_owned(),
        ..Default::default()
    };
    let mut feed = client.follow(request, Some(Duration::from_secs(30)));
    let mut rows = Vec::new();
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        match timeout_at(until, feed.next()).await {
            Err(_) => bail!("the journal was not read within 120 s"),
            Ok(step) => match step? {
                Step::Rows(more) => rows.extend(more),
                Step::End => return Ok(rows),
                Step::Gap(first) => {
                    bail!("rows before {first:?} were trimmed: the run was longer than the journal")
                }
                Step::Moved { .. } | Step::Lost { .. } => {}
            },
        }
    }
}

/// The rows about nodes among them.
pub(crate) fn about_nodes(rows: &[Row]) -> Vec<Seen> {
    rows.iter()
        .filter(|row| row.action.starts_with("node."))
        .map(Seen::of)
        .collect()
}

/// How the rows of a time of trouble are judged.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Nodes that were shown as suspect or worse and whose session was cut off by the fault.
    pub(crate) rightly: BTreeSet<String>,
    /// Those of them that were shown as offline.
    pub(crate) offline: BTreeSet<String>,
    /// Nodes that were shown as suspect or worse and whose session went on: false alarms, and what the row says.
    pub(crate) falsely: BTreeMap<String, String>,
}

/// Judges rows: only the nodes in `struck` may have been shown as absent.
pub(crate) fn judge(rows: &[Seen], ours: &BTreeSet<String>, struck: &BTreeSet<String>) -> Verdict {
    let mut verdict = Verdict::default();
    for row in rows
        .iter()
        .filter(|row| row.is_absence() && ours.contains(&row.device_id))
    {
        if struck.contains(&row.device_id) {
            verdict.rightly.insert(row.device_id.clone());
            if row.is_offline() {
                verdict.offline.insert(row.device_id.clone());
            }
        } else {
            let why = format!("{} at replica {}: {}", row.action, row.replica, row.reason);
            verdict.falsely.entry(row.device_id.clone()).or_insert(why);
        }
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(action: &str, device: &str, status: &str) -> Row {
        let detail = [("replica", "2"), ("reason", "silent"), ("status", status)];
        Row {
            action: action.to_owned(),
            subject: device.to_owned(),
            detail: detail
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            ..Row::default()
        }
    }

    #[test]
    fn only_the_struck_may_be_shown_absent() {
        let set = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<BTreeSet<_>>();
        let rows = about_nodes(&[
            row("node.detached", "a", "suspect"),
            row("node.attached", "a", ""),
            row("node.detached", "b", "online"),
            row("node.session_superseded", "b", ""),
            row("node.detached", "c", "suspect"),
            row("node.offline", "c", ""),
            row("node.detached", "d", "offline"),
            row("node.detached", "stranger", "offline"),
            row("dispatch.finished", "e", ""),
        ]);
        assert_eq!(
            (rows.len(), rows[0].replica, rows[0].reason.as_str()),
            (8, 2, "silent")
        );
        let verdict = judge(&rows, &set(&["a", "b", "c", "d"]), &set(&["a", "d"]));
        assert_eq!(
            (verdict.rightly, verdict.offline),
            (set(&["a", "d"]), set(&["d"]))
        );
        assert_eq!(verdict.falsely.keys().collect::<Vec<_>>(), ["c"]);
        assert!(verdict.falsely["c"].contains("node.detached at replica 2: silent"));
    }
}
