//! What single domains promise beyond the conditions of the shared checkers: history, journal and final state side by
//! side.
//!
//! The rules are written against what callers were told and what the journal says, not against the state machine's own
//! bookkeeping: `palyra_state::invariants` checks that one from within. Never here: order and registers, see `history`;
//! what runs on real processes are held to as well, see `judge`.

use std::collections::BTreeMap;

use palyra_state::dispatch::{self, State};
use palyra_state::journal::Row;
use palyra_state::{Id, Read};

use crate::history::{Asked, Deed, History, Op, Outcome};

/// Checks everything; the first problem of each kind.
pub(crate) fn check(history: &History, rows: &[Row], state: &dyn Read) -> Vec<String> {
    let deeds: Vec<(&Deed, &Op)> = history
        .ops
        .iter()
        .filter_map(|op| match &op.asked {
            Asked::Command { deed, .. } => Some((deed, op)),
            _ => None,
        })
        .collect();
    let mut problems = Vec::new();
    problems.extend(results_are_kept(&deeds, rows, state));
    problems.extend(dispatches_have_their_time(rows));
    problems.extend(epochs_rise(&deeds, rows));
    problems.extend(revoked_means_revoked(&deeds, rows));
    problems
}

/// A result that was accepted is the dispatch's end, in the session that it was reported in; one that came from a
/// session which its node knew to be over was not accepted.
fn results_are_kept(deeds: &[(&Deed, &Op)], rows: &[Row], state: &dyn Read) -> Option<String> {
    let ends: BTreeMap<&str, &Row> = rows
        .iter()
        .filter(|row| row.action == "dispatch.finished")
        .map(|row| (row.subject.as_str(), row))
        .collect();
    deeds.iter().find_map(|(deed, op)| {
        let Deed::Complete {
            dispatch: id,
            epoch,
            result,
            stale,
        } = deed
        else {
            return None;
        };
        if !matches!(op.outcome, Outcome::Ok(_) | Outcome::Told) {
            return None;
        }
        if *stale {
            return Some(format!(
                "the result of {id} was accepted from epoch {epoch}, which was over"
            ));
        }
        let name = id.to_string();
        let end = ends
            .get(name.as_str())
            .map(|row| (row.detail("state"), row.detail("epoch")));
        let kept = dispatch::result(state, *id).map(|bytes| bytes.to_vec());
        let good = end == Some((State::Succeeded.as_str(), epoch.to_string().as_str()))
            && kept.as_deref() == Some(result.as_slice());
        (!good).then(|| format!("the result of {id} was accepted from epoch {epoch}, but its end is {end:?}"))
    })
}

/// A dispatch is given up for its deadline when that has passed, by the log's clock, and not before.
fn dispatches_have_their_time(rows: &[Row]) -> Option<String> {
    let deadlines: BTreeMap<&str, u64> = rows
        .iter()
        .filter(|row| row.action == "dispatch.submitted")
        .filter_map(|row| Some((row.subject.as_str(), row.detail("deadline_at").parse().ok()?)))
        .collect();
    let over = rows.iter().filter(|row| row.action == "dispatch.finished");
    over.filter(|row| row.detail("state") == State::TimedOut.as_str())
        .find_map(|row| {
            let deadline = *deadlines.get(row.subject.as_str())?;
            (row.at_ms < deadline).then(|| {
                format!(
                    "dispatch.not-early: {} timed out at {} and had until {deadline}",
                    row.subject, row.at_ms
                )
            })
        })
}

/// The epoch that a node is told is that of its attach in the journal, and later ones are larger.
fn epochs_rise(deeds: &[(&Deed, &Op)], rows: &[Row]) -> Option<String> {
    let attaches: Vec<(Id, u64, &Op)> = deeds
        .iter()
        .filter_map(|(deed, op)| match deed {
            Deed::Attach { device, epoch } if *epoch != 0 => Some((*device, *epoch, *op)),
            _ => None,
        })
        .collect();
    let told = attaches.iter().find_map(|(device, epoch, _)| {
        let name = device.to_string();
        let found = rows
            .iter()
            .any(|row| row.index == *epoch && row.action == "node.attached" && row.subject == name);
        (!found).then(|| format!("{name} was told of epoch {epoch}, at which it did not attach"))
    });
    told.or_else(|| {
        attaches.iter().find_map(|(device, epoch, op)| {
            let later = attaches.iter().find(|(other, newer, next)| {
                other == device && next.invoked > op.returned && newer <= epoch
            })?;
            Some(format!(
                "{device} was told of epoch {epoch}, and later of {}",
                later.1
            ))
        })
    })
}

/// After its revocation in the log a device has no effect, and after the answer to it no success.
fn revoked_means_revoked(deeds: &[(&Deed, &Op)], rows: &[Row]) -> Option<String> {
    for row in rows.iter().filter(|row| row.action == "identity.device_revoked") {
        let actor = format!("node/{}", row.subject);
        if let Some(late) = rows
            .iter()
            .find(|late| late.actor == actor && late.index > row.index)
        {
            return Some(format!(
                "{actor} was revoked at {}, and did {} at {}",
                row.index, late.action, late.index
            ));
        }
    }
    let revocations = deeds.iter().filter_map(|(deed, op)| match deed {
        Deed::Revoke { device } if op.outcome.index().is_some() => Some((*device, op.returned)),
        _ => None,
    });
    for (revoked, told) in revocations {
        let late = deeds.iter().find(|(deed, op)| {
            matches!(deed, Deed::ByDevice { device } | Deed::Attach { device, .. } if *device == revoked)
                && op.invoked > told
                && op.outcome.index().is_some()
        });
        if let Some((deed, op)) = late {
            return Some(format!(
                "{deed:?} ended {:?} after the revocation was answered",
                op.outcome
            ));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use palyra_state::MemRead;

    fn id(n: u8) -> Id {
        Id::from_bytes([n; 16])
    }

    fn row(index: u64, action: &str, subject: Id, details: &[(&str, &str)]) -> Row {
        let detail = details
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Row {
            index,
            action: action.into(),
            subject: subject.to_string(),
            detail: detail.collect(),
            ..Row::default()
        }
    }

    fn found(deeds: Vec<(Deed, Outcome)>, rows: &[Row]) -> Vec<String> {
        let mut history = History::default();
        for (deed, outcome) in deeds {
            let (invoked, returned) = (history.tick(), history.tick());
            let asked = Asked::Command {
                deed,
                request: id(99),
            };
            history.push(Op {
                asked,
                outcome,
                invoked,
                returned,
            });
        }
        check(&history, rows, &MemRead::new())
    }

    #[test]
    fn what_a_revoked_device_does_is_found() {
        let revoked = row(5, "identity.device_revoked", id(1), &[]);
        let mut late = row(6, "node.registered", id(1), &[]);
        late.actor = format!("node/{}", id(1));
        assert_eq!(
            found(vec![], std::slice::from_ref(&revoked)),
            Vec::<String>::new()
        );
        assert_eq!(found(vec![], &[revoked, late]).len(), 1);
        let revoke = (Deed::Revoke { device: id(1) }, Outcome::Ok(5));
        let act = (Deed::ByDevice { device: id(1) }, Outcome::Ok(6));
        assert_eq!(
            found(vec![act.clone(), revoke.clone()], &[]),
            Vec::<String>::new()
        );
        assert_eq!(found(vec![revoke, act], &[]).len(), 1);
    }

    #[test]
    fn results_that_are_not_kept_are_found() {
        let good = [row(7, "dispatch.finished", id(2), &[("state", "failed")])];
        let complete = |stale| Deed::Complete {
            dispatch: id(2),
            epoch: 4,
            result: vec![1],
            stale,
        };
        let of = |stale, outcome| found(vec![(complete(stale), outcome)], &good);
        assert_eq!(of(true, Outcome::Ok(7)).len(), 1, "stale");
        assert_eq!(of(false, Outcome::Ok(7)).len(), 1, "another end");
        assert_eq!(of(true, Outcome::Refused), Vec::<String>::new());
    }

    #[test]
    fn a_dispatch_that_is_given_up_before_its_time_is_found() {
        let submitted = row(5, "dispatch.submitted", id(2), &[("deadline_at", "900")]);
        let over = |at_ms, state| Row {
            at_ms,
            ..row(7, "dispatch.finished", id(2), &[("state", state)])
        };
        let early = |over: Row| found(vec![], &[submitted.clone(), over]).len();
        assert_eq!(early(over(899, "timed_out")), 1);
        assert_eq!(early(over(900, "timed_out")), 0);
        assert_eq!(early(over(1, "cancelled")), 0, "somebody took it back");
    }

    #[test]
    fn epochs_that_nobody_gave_or_that_fall_are_found() {
        let attach = |epoch| (Deed::Attach { device: id(3), epoch }, Outcome::Ok(epoch));
        let rows = [
            row(5, "node.attached", id(3), &[]),
            row(9, "node.attached", id(3), &[]),
        ];
        assert_eq!(found(vec![attach(5), attach(9)], &rows), Vec::<String>::new());
        assert_eq!(found(vec![attach(6)], &rows).len(), 1);
        assert_eq!(found(vec![attach(9), attach(5)], &rows).len(), 1);
    }
}
