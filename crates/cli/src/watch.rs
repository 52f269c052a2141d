//! Watching a list: the list first, then what changes, on whichever replica is alive.
//!
//! The journal says when something happened; the list, asked again at that index, says what it is now.
//! Heartbeats make no journal rows, so a quiet cluster costs a watch nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use palyra_client::{Client, Step};
use palyra_proto::journal::v1::{Cursor, TailRequest};

use crate::failure::Result;
use crate::output::{Change, Out, Record, Source, note};

/// How long changes are gathered before the list is asked for again.
const GATHER: Duration = Duration::from_millis(100);

/// Prints the list that `fetch` gives, and then its changes until the process is ended.
///
/// Errors: those of the first list, and refusals; the loss of replicas is none.
pub(crate) async fn watch<T, F>(client: &Client, out: Out, fetch: F) -> Result
where
    T: Record + Clone,
    F: AsyncFn(Client) -> Result<(Vec<T>, Source)>,
{
    let (items, source) = fetch(client.clone()).await?;
    let listed: Vec<(Change, &T)> = items.iter().map(|item| (Change::Listed, item)).collect();
    out.changes(&listed, source.index, true)?;
    let mut known = by_key(items);
    let after = Cursor {
        index: source.index,
        ordinal: u32::MAX,
    };
    let mut feed = client.follow(
        TailRequest {
            after: Some(after),
            follow: true,
            ..TailRequest::default()
        },
        None,
    );
    let mut index = source.index;
    loop {
        let mut step = Some(feed.next().await?);
        while let Some(now) = step.take() {
            match now {
                Step::Rows(rows) => {
                    index = index.max(rows.last().and_then(|row| row.cursor).map_or(0, |c| c.index))
                }
                Step::Gap(first) => index = index.max(first.index),
                Step::Moved { endpoint, cause } => note(&format!("watching at {endpoint} now ({cause})")),
                Step::End => return Ok(()),
            }
            step = match tokio::time::timeout(GATHER, feed.next()).await {
                Ok(next) => Some(next?),
                Err(_) => None,
            };
        }
        let (items, source) = fetch(client.clone().at_least(index)).await?;
        let next = by_key(items);
        let changes = difference(&known, &next)?;
        out.changes(&changes, source.index, false)?;
        index = index.max(source.index);
        known = next;
    }
}

fn by_key<T: Record>(items: Vec<T>) -> BTreeMap<String, T> {
    items.into_iter().map(|item| (item.key(), item)).collect()
}

/// What differs between two lists, by key and by what is printed of an item.
fn difference<'a, T: Record>(
    before: &'a BTreeMap<String, T>,
    after: &'a BTreeMap<String, T>,
) -> Result<Vec<(Change, &'a T)>> {
    let mut changes = Vec::new();
    for (key, item) in after {
        match before.get(key) {
            None => changes.push((Change::Added, item)),
            Some(old) if content(old) != content(item) => changes.push((Change::Changed, item)),
            Some(_) => {}
        }
    }
    changes.extend(
        before
            .iter()
            .filter(|(key, _)| !after.contains_key(*key))
            .map(|(_, item)| (Change::Removed, item)),
    );
    Ok(changes)
}

fn content<T: Record>(item: &T) -> Option<serde_json::Value> {
    serde_json::to_value(item).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::table::{Column, column};
    use serde::Serialize;

    #[derive(Clone, Serialize)]
    struct Thing(&'static str, u32);

    impl Record for Thing {
        const COLUMNS: &'static [Column] = &[column("ID")];
        fn key(&self) -> String {
            self.0.to_owned()
        }
        fn cells(&self, _now_ms: u64) -> Vec<String> {
            vec![self.0.to_owned()]
        }
    }

    #[test]
    fn only_differences_are_told() {
        let before = by_key(vec![Thing("a", 1), Thing("b", 1), Thing("c", 1)]);
        let after = by_key(vec![Thing("a", 1), Thing("b", 2), Thing("d", 1)]);
        let changes: Vec<(Change, &str)> = difference(&before, &after)
            .unwrap()
            .into_iter()
            .map(|(change, item)| (change, item.0))
            .collect();
        assert_eq!(
            changes,
            [
                (Change::Changed, "b"),
                (Change::Added, "d"),
                (Change::Removed, "c")
            ]
        );
    }
}
