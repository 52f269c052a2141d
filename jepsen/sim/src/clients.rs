//! Clients of the registry: registers kept in nodes' labels, and followers of the journal.
//!
//! Registers are written and read with linearizable consistency at replicas of the clients' choice. A follower of the
//! journal moves to another replica when its own goes, and must have seen, at the end, each row once and in order.

use std::rc::Rc;
use std::time::Duration;

use palyra_jepsen_check::Kind;
use palyra_jepsen_check::history::Answer as Told;
use palyra_platform as platform;
use palyra_replica::{Feed, FeedItem};
use palyra_state::journal::Row;
use palyra_state::{Cursor, Digest, Id};
use serde_json::json;

use crate::breaks::Break;
use crate::chance;
use crate::cluster::{Cluster, Phase};
use crate::fleet;
use crate::history::{Asked, Outcome};
use crate::runs;

/// How long a follower waits for a row before it looks whether the run is over.
const PATIENCE: Duration = Duration::from_millis(200);

/// One client of the registers: one operation after the other, until faults end.
pub(crate) async fn registers(cluster: Rc<Cluster>, number: u64, keys: Vec<Id>) {
    let mut value = number * 1_000_000;
    let mut at = cluster.any_member();
    while cluster.phase.get() == Phase::Faults {
        let key = keys[usize::try_from(chance::below(keys.len() as u64)).unwrap_or(0)];
        let outcome = if chance::percent(55) {
            value += 1;
            write(&cluster, at, key, value).await
        } else {
            read(&cluster, at, key).await
        };
        if outcome.index().is_none() || chance::percent(10) {
            at = cluster.any_member();
        }
        platform::sleep(Duration::from_millis(chance::between(1, 60))).await;
    }
}

/// A client that sends at a fixed rate, whatever becomes of it: one that waits for answers would ask nothing just when
/// nobody is served.
pub(crate) async fn steady(cluster: Rc<Cluster>, number: u64, keys: Vec<Id>) {
    let mut value = number * 1_000_000;
    let mut sent = Vec::new();
    while cluster.phase.get() == Phase::Faults {
        value += 1;
        let key = keys[usize::try_from(value).unwrap_or(0) % keys.len()];
        let (at, asking) = (cluster.any_member(), cluster.clone());
        sent.push(tokio::task::spawn_local(async move {
            write(&asking, at, key, value).await;
        }));
        platform::sleep(RATE).await;
    }
    for write in sent {
        if let Err(died) = write.await {
            cluster.problem(format!("a client did not end: {died}"));
        }
    }
}

/// Sets a register.
pub(crate) async fn write(cluster: &Cluster, at: u64, key: Id, value: u64) -> Outcome {
    let envelope = fleet::write(fleet::node(key, 0), key, value);
    let wanted = json!({"key": key.to_string(), "value": value});
    let call = cluster.invoke(None, "write", wanted.clone(), Some(at), Some(envelope.request_id));
    let answer = cluster
        .ask_noted(at, envelope, |answer| Asked::Write {
            key,
            value,
            request: answer.request,
        })
        .await;
    let mut told = wanted;
    told["duplicate"] = answer.again.into();
    // Values are written once: one that changes nothing was written before, under another request.
    let kind = match answer.outcome {
        Outcome::Quiet(_) => Kind::Info,
        ref outcome => runs::kind(outcome),
    };
    let told = Told {
        value: told,
        rev: answer.outcome.index(),
        ..Told::default()
    };
    cluster.complete(&call, kind, told);
    answer.outcome
}

/// Reads a register.
pub(crate) async fn read(cluster: &Cluster, at: u64, key: Id) -> Outcome {
    let invoked = cluster.history.borrow_mut().tick();
    let wanted = json!({"key": key.to_string()});
    let call = cluster.invoke(None, "read", wanted, Some(at), None);
    let read = cluster.read(at, move |view| fleet::value(view, key)).await;
    let kind = if read.is_some() { Kind::Ok } else { Kind::Info };
    let value = read.map(|(_, value)| value).filter(|value| *value > 0);
    let told = Told {
        value: json!({"key": key.to_string(), "value": value}),
        rev: read.map(|(index, _)| index),
        ..Told::default()
    };
    cluster.complete(&call, kind, told);
    let asked = Asked::Read {
        key,
        value: read.map_or(0, |(_, value)| value),
    };
    let outcome = read.map_or(Outcome::Unknown, |(index, _)| Outcome::Ok(index));
    cluster.record(at, asked, outcome.clone(), invoked);
    outcome
}

/// Between two writes of a steady client.
const RATE: Duration = Duration::from_millis(60);

/// What a follower of the journal has seen, in its order.
pub(crate) type Seen = Vec<(Cursor, Digest)>;

/// Follows the journal until the run is over, at one replica while that is there, or moving; gives back what it saw.
pub(crate) async fn follow(cluster: Rc<Cluster>, roams: bool) -> Seen {
    let mut seen = Seen::new();
    let mut at = cluster.any_member();
    while cluster.phase.get() != Phase::Over {
        if roams || !cluster.members().contains(&at) {
            at = cluster.any_member();
        }
        let Some((life, replica)) = cluster.replica(at) else {
            platform::sleep(PATIENCE).await;
            continue;
        };
        let mut after = seen.last().map(|(cursor, _)| *cursor).unwrap_or_default();
        if !seen.is_empty() {
            cluster.world.reach("feed-moved");
            if cluster.world.broken() == Some(Break::SkipRow) {
                after.ordinal += 1;
                after.index += 1;
            }
        }
        let mut feed = platform::scope_sync(life.tag(), || replica.feed(after));
        drop(replica);
        let moves_at = platform::now() + Duration::from_millis(chance::between(300, 3_000));
        while cluster.phase.get() != Phase::Over && platform::now() < moves_at {
            // In a task of the replica: its end is the feed's.
            let task = platform::scope_sync(life.tag(), || platform::spawn(next(feed)));
            let Ok((back, item)) = task.await else { break };
            feed = back;
            match item {
                Some(FeedItem::Rows(rows)) => seen.extend(rows.iter().map(|row| (row.cursor(), row.hash))),
                Some(FeedItem::Gap { first }) => {
                    cluster.problem(format!("r{at} says that the journal begins at {first:?}"));
                }
                None => {}
            }
        }
    }
    seen
}

async fn next(mut feed: Feed) -> (Feed, Option<FeedItem>) {
    let item = platform::timeout(PATIENCE, feed.next()).await;
    (feed, item.ok().flatten())
}

/// Whether a follower saw the journal's beginning, row by row.
pub(crate) fn check_seen(seen: &Seen, rows: &[Row]) -> Option<String> {
    let held = rows.iter().map(|row| (row.cursor(), row.hash));
    let wrong = seen.iter().zip(held).position(|(seen, held)| *seen != held);
    if let Some(at) = wrong {
        let (found, row) = (seen[at].0, rows[at].cursor());
        return Some(format!(
            "a follower of the journal saw {found:?} where {row:?} is"
        ));
    }
    (seen.len() > rows.len()).then(|| format!("a follower saw {} rows of {}", seen.len(), rows.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_follower_that_missed_repeated_or_invented_a_row_is_found() {
        let row = |index| Row {
            index,
            hash: Digest::of(&[index as u8]),
            ..Row::default()
        };
        let rows = [row(1), row(2), row(4)];
        let saw = |indexes: &[u64]| -> Seen {
            indexes
                .iter()
                .map(|at| (row(*at).cursor(), row(*at).hash))
                .collect()
        };
        assert_eq!(check_seen(&saw(&[]), &rows), None);
        assert_eq!(check_seen(&saw(&[1, 2]), &rows), None);
        for bad in [&[1, 4][..], &[1, 1], &[2], &[1, 2, 4, 5], &[1, 3]] {
            assert!(check_seen(&saw(bad), &rows).is_some(), "{bad:?}");
        }
    }
}
