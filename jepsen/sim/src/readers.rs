//! Readers of the journal, in the words of `palyra_jepsen_check::journal`: pages and heads from every replica all the
//! time, half of them from what the replica has alone, so that those which are cut off are read too.
//!
//! Readers go on where they were, go back on purpose, and begin anew at the first row. Never here: judging.

use std::rc::Rc;
use std::time::Duration;

use palyra_jepsen_check::Kind;
use palyra_jepsen_check::history::Answer as Told;
use palyra_platform as platform;
use palyra_state::journal::{self, Rows};
use palyra_state::{Cursor, Read, meta};
use serde_json::{Value, json};

use crate::chance;
use crate::cluster::{Cluster, Phase};
use crate::tape::{self, place, told};

/// Rows of one answer: more are left for the next.
const PAGE: usize = 40;
/// Places that a reader remembers, to go back to.
const PLACES: usize = 16;

/// Reads until faults end.
pub(crate) async fn reader(cluster: Rc<Cluster>) {
    let (mut last, mut places): (Option<Cursor>, Vec<Cursor>) = (None, Vec::new());
    while cluster.phase.get() == Phase::Faults {
        platform::sleep(Duration::from_millis(chance::between(50, 400))).await;
        let at = cluster.any_member();
        let after = match chance::below(100) {
            0..65 => last,
            65..80 => places
                .get(usize::try_from(chance::below(PLACES as u64)).unwrap_or(0))
                .copied(),
            80..85 => None,
            _ => {
                read(&cluster, at, "head", json!({}), head).await;
                continue;
            }
        };
        let asked = json!({"after": after.map(place)});
        let seen = move |view: &dyn Read| page(view, after);
        let Some(found) = read(&cluster, at, "tail", asked, seen).await else {
            continue;
        };
        last = cursor(&found).or(after);
        if let Some(last) = last {
            if places.len() == PLACES {
                places.remove(0);
            }
            places.push(last);
        }
    }
}

/// One read, of what a quorum has confirmed or of what the replica has alone. Answers what it said.
async fn read(
    cluster: &Cluster,
    at: u64,
    f: &str,
    asked: Value,
    look: impl FnOnce(&dyn Read) -> Value + Send + 'static,
) -> Option<Value> {
    let call = cluster.invoke(f, asked.clone(), Some(at), None);
    let found = if chance::percent(50) {
        cluster.look(at, |view| (view.index(), look(view))).await
    } else {
        cluster.read(at, |view| look(view)).await
    };
    let Some((index, value)) = found else {
        cluster.complete(&call, Kind::Fail, told(asked));
        return None;
    };
    cluster.world.note(&format!("r{at} answers {f} at {index}"));
    let answer = Told {
        value: value.clone(),
        rev: Some(index),
        ..Told::default()
    };
    cluster.complete_unsaid(&call, Kind::Ok, answer);
    Some(value)
}

/// The cursor of a page's last row.
fn cursor(page: &Value) -> Option<Cursor> {
    let last = page["rows"].as_array()?.last()?;
    Some(Cursor {
        index: last["index"].as_u64()?,
        ordinal: u32::try_from(last["ordinal"].as_u64()?).ok()?,
    })
}

fn page(view: &dyn Read, after: Option<Cursor>) -> Value {
    let from = after.unwrap_or_else(|| journal::before_first(view));
    let after = after.map(place);
    match journal::rows_after(view, from, PAGE) {
        Rows::Gap { first } => json!({"after": after, "gap": place(first)}),
        Rows::Rows(rows) => {
            let told: Vec<Value> = rows.iter().map(tape::row).collect();
            json!({"after": after, "rows": told, "end": rows.len() < PAGE})
        }
    }
}

fn head(view: &dyn Read) -> Value {
    let (meta, verified) = (meta(view), journal::verify_all(view));
    let last = meta.journal_last;
    json!({
        "rows": meta.journal_rows,
        "first": place(meta.journal_first),
        "last": place(last),
        "head": meta.journal_head.to_string(),
        "intact": verified.is_ok(),
        "problem": verified.err().map(|broken| broken.to_string()),
    })
}

/// The heads of all replicas at the end.
pub(crate) async fn last_heads(cluster: &Cluster) {
    for id in cluster.members() {
        read(cluster, id, "head", json!({}), head).await;
    }
}
