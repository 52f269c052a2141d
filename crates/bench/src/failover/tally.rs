//! What became of the dispatches to one agent, and how it came back after the kills: pure.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::load::Done;
use crate::presence::Seen;
use crate::spread::Spread;

/// Dispatches of one kind.
#[derive(Debug)]
pub(super) struct Tally {
    /// All that were sent.
    pub(super) submitted: u64,
    succeeded: u64,
    session_lost: u64,
    ended_otherwise: u64,
    not_accepted: u64,
    /// Accepted, and no end.
    pub(super) lost: u64,
    /// `once`, and begun more than once by the program's own log.
    pub(super) duplicated: u64,
    /// Succeeded, but the program's log does not know them.
    pub(super) phantoms: u64,
    rerun: u64,
    /// Of those that succeeded.
    pub(super) took: Spread,
    /// Why some were not accepted.
    pub(super) refusals: BTreeMap<String, u64>,
}

impl Tally {
    /// The columns of [`Tally::cells`].
    pub(super) const COLUMNS: [&'static str; 8] = [
        "submitted",
        "succeeded",
        "session_lost",
        "ended_otherwise",
        "not_accepted",
        "lost",
        "duplicated",
        "run_again",
    ];

    /// Counts; `runs` is the program's log.
    pub(super) fn of(all: &[Done], runs: &BTreeMap<String, u32>, once: bool) -> Tally {
        let mut tally = Tally {
            submitted: all.len() as u64,
            succeeded: 0,
            session_lost: 0,
            ended_otherwise: 0,
            not_accepted: 0,
            lost: 0,
            duplicated: 0,
            phantoms: 0,
            rerun: 0,
            took: Spread::new(),
            refusals: BTreeMap::new(),
        };
        for done in all {
            tally.add(done, runs, once);
        }
        tally
    }

    fn add(&mut self, done: &Done, runs: &BTreeMap<String, u32>, once: bool) {
        let info = match &done.outcome {
            Ok(info) => info,
            Err(error) => {
                self.not_accepted += 1;
                let why = format!("{} {:?}", error.code, error.class).to_lowercase();
                *self.refusals.entry(why).or_default() += 1;
                // Nobody knows whether it was accepted: that is as bad as lost.
                self.lost += u64::from(error.unknown);
                return;
            }
        };
        let ran = runs.get(&info.id).copied().unwrap_or(0);
        match info.state.as_str() {
            "succeeded" => {
                self.succeeded += 1;
                self.took.record(done.took);
                self.phantoms += u64::from(ran == 0);
            }
            "session_lost" => self.session_lost += 1,
            _ if done.has_ended() => self.ended_otherwise += 1,
            _ => self.lost += 1,
        }
        if ran > 1 {
            *(if once {
                &mut self.duplicated
            } else {
                &mut self.rerun
            }) += 1;
        }
    }

    /// One row.
    pub(super) fn cells(&self) -> Vec<Value> {
        vec![
            json!(self.submitted),
            json!(self.succeeded),
            json!(self.session_lost),
            json!(self.ended_otherwise),
            json!(self.not_accepted),
            json!(self.lost),
            json!(self.duplicated),
            json!(self.rerun),
        ]
    }
}

/// A replica that was killed, and when, by the wall clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kill {
    pub(super) replica: u64,
    pub(super) at_ms: u64,
}

/// How an agent came back.
#[derive(Debug)]
pub(super) struct Reconnects {
    /// Kills that hit the replica of its session.
    pub(super) struck: u64,
    /// Those after which it did not attach again before the next kill that hit it, or the end.
    pub(super) never_back: u64,
    /// From the kill to the entry that attached it.
    pub(super) took: Spread,
    /// Attaches that no kill explains.
    pub(super) needless: u64,
}

/// Puts together when an agent attached (rows in the journal's order, from its start on) and when replicas were
/// killed.
pub(super) fn reconnects(rows: &[Seen], kills: &[Kill]) -> Reconnects {
    let attaches: Vec<&Seen> = rows.iter().filter(|row| row.action == "node.attached").collect();
    let mut found = Reconnects {
        struck: 0,
        never_back: 0,
        took: Spread::new(),
        needless: 0,
    };
    let mut explained = vec![false; attaches.len()];
    for kill in kills {
        let before = attaches.iter().rposition(|row| row.at_ms <= kill.at_ms);
        let next = before.map_or(0, |at| at + 1);
        if before.is_none_or(|at| attaches[at].replica != kill.replica) {
            continue;
        }
        found.struck += 1;
        match attaches.get(next) {
            Some(row) => {
                found
                    .took
                    .record(Duration::from_millis(row.at_ms.saturating_sub(kill.at_ms)));
                explained[next] = true;
            }
            None => found.never_back += 1,
        }
    }
    // The first attach is the agent's start.
    found.needless = explained.iter().skip(1).filter(|explained| !**explained).count() as u64;
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Job;
    use palyra_proto::dispatch::v1::DispatchInfo;

    fn done(id: &str, state: &str) -> Done {
        Done {
            number: 0,
            job: Job {
                device_id: String::new(),
                capability: String::new(),
                payload: String::new(),
                deadline: Duration::ZERO,
            },
            request_id: String::new(),
            took: Duration::from_millis(5),
            outcome: Ok(DispatchInfo {
                id: id.to_owned(),
                state: state.to_owned(),
                ..Default::default()
            }),
        }
    }

    #[test]
    fn what_ran_twice_and_what_never_ended_is_found() {
        let all = [
            done("a", "succeeded"),
            done("b", "succeeded"),
            done("c", "dispatched"),
            done("d", "session_lost"),
        ];
        let runs: BTreeMap<String, u32> = [("a", 1), ("c", 2)].map(|(id, n)| (id.to_owned(), n)).into();
        let tally = Tally::of(&all, &runs, true);
        assert_eq!(
            (tally.lost, tally.duplicated, tally.phantoms, tally.session_lost),
            (1, 1, 1, 1)
        );
        assert_eq!(tally.took.count(), 2);
        let tally = Tally::of(&all, &runs, false);
        assert_eq!((tally.duplicated, tally.rerun), (0, 1));
    }

    #[test]
    fn an_attach_is_explained_by_the_kill_of_its_replica_only() {
        let attached = |replica, at_ms| Seen {
            device_id: "x".to_owned(),
            action: "node.attached".to_owned(),
            replica,
            reason: String::new(),
            status: String::new(),
            at_ms,
        };
        let kill = |replica, at_ms| Kill { replica, at_ms };
        let rows = [attached(1, 100), attached(2, 1_250), attached(3, 9_000)];
        let found = reconnects(&rows, &[kill(3, 500), kill(1, 1_000), kill(3, 9_500)]);
        assert_eq!((found.struck, found.never_back, found.needless), (2, 1, 1));
        assert_eq!(found.took.max_ms().map(f64::round), Some(250.0));
    }
}
