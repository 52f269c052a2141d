//! Watching a list: the list first, then what changes, on whichever replica is alive.
//!
//! The feed says when something happened; the list, asked again at that index, says what it is now.
//! Heartbeats make no journal rows, so a quiet cluster costs a watch nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use palyra_client::{Client, Event, Events};
use palyra_proto::journal::v1::{Cursor, StreamEventsRequest};
use tokio::time::{Instant, timeout_at};

use crate::failure::Result;
use crate::output::{Change, Out, Record, Source, note};

/// How long changes are gathered before the list is asked for again.
const GATHER: Duration = Duration::from_millis(100);
/// How long after a list that nobody could give it is asked for again.
const AGAIN: Duration = Duration::from_secs(1);

/// Prints the list that `fetch` gives, the last `limit` entries of it, and then its changes until the process
/// is ended.
///
/// Errors: those of the first list, and refusals. The loss of replicas, even of all of them, is told and waited
/// for.
pub(crate) async fn watch<T, F>(client: &Client, out: Out, limit: usize, fetch: F) -> Result
where
    T: Record + Clone,
    F: AsyncFn(Client) -> Result<(Vec<T>, Source)>,
{
    let (items, source) = fetch(client.clone()).await?;
    let shown = &items[items.len().saturating_sub(limit)..];
    let listed: Vec<(Change, &T)> = shown.iter().map(|item| (Change::Listed, item)).collect();
    let mut widths = Vec::new();
    out.changes(&listed, source.index, &mut widths)?;
    let mut known = by_key(items);
    let mut index = source.index;
    let mut feed = client.events(after(index), None);
    loop {
        changed(&mut feed, &mut index).await?;
        let (items, source) = loop {
            match fetch(client.clone().at_least(index)).await {
                Ok(list) => break list,
                Err(failure) if failure.may_pass() => note(&format!("{}; still watching", failure.words())),
                Err(failure) => return Err(failure),
            }
            tokio::time::sleep(AGAIN).await;
        };
        let next = by_key(items);
        let changes = difference(&known, &next)?;
        if !changes.is_empty() {
            out.changes(&changes, source.index, &mut widths)?;
        }
        index = index.max(source.index);
        known = next;
    }
}

/// What a watch that knows the list at `index` follows.
pub(crate) fn after(index: u64) -> StreamEventsRequest {
    let ordinal = u32::MAX;
    StreamEventsRequest {
        after: Some(Cursor { index, ordinal }),
        ..StreamEventsRequest::default()
    }
}

/// Waits for the journal to grow, and lets what comes together come together.
pub(crate) async fn changed(feed: &mut Events, index: &mut u64) -> Result {
    // From the first change on, so that a cluster that never rests is shown all the same.
    let mut until = None;
    loop {
        let event = match until {
            Some(until) => match timeout_at(until, feed.next()).await {
                Ok(event) => event?,
                Err(_) => return Ok(()),
            },
            None => feed.next().await?,
        };
        match event {
            Event::Rows(rows) => {
                *index = rows
                    .iter()
                    .filter_map(|row| row.cursor)
                    .fold(*index, |max, at| max.max(at.index));
                until.get_or_insert_with(|| Instant::now() + GATHER);
            }
            // What was missed is in the list that is asked for next, and what lies before it needs no telling.
            Event::Gap { rescan, .. } => {
                *index = (*index).max(rescan);
                feed.go_on_after(rescan);
                until.get_or_insert_with(|| Instant::now() + GATHER);
            }
            event => tell(&event),
        }
    }
}

/// Tells of a feed's loss and return.
pub(crate) fn tell(event: &Event) {
    match event {
        Event::Moved { endpoint, cause } => note(&format!("going on at {endpoint} ({cause})")),
        Event::Lost { cause } => note(&format!("{cause}; still trying")),
        Event::Rows(_) | Event::Gap { .. } | Event::CaughtUp { .. } => {}
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
    let mut value = serde_json::to_value(item).ok()?;
    if let Some(fields) = value.as_object_mut() {
        fields.retain(|name, _| !T::RESTLESS.contains(&name.as_str()));
    }
    Some(value)
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
