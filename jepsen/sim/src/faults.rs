//! The kinds of faults, and the plan of a run: which of them strike, and when.
//!
//! The plan is drawn from streams of its own, each strike with a stream for its details, so that a run without one
//! kind, or a shorter one, sees the other strikes at the same moments. Never here: what a fault does, see `nemesis`.

use std::fmt;

use clap::ValueEnum;

use crate::case::Case;
use crate::chance::Stream;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Kind {
    // What strikes at a moment.
    /// A process ends as by SIGKILL
    Kill,
    /// A machine loses power: of what was not synced a prefix survives
    Power,
    /// All machines lose power at once
    PowerAll,
    /// A process ends at its n-th disk operation from now
    CrashSoon,
    /// A process ends at a named place
    CrashAt,
    /// A replica is cut off, in one direction or both
    Isolate,
    /// One direction of one link is cut
    CutLink,
    /// Whoever leads is cut off from the other replicas; clients still reach it
    IsolateLeader,
    /// Two parts that do not see each other
    Halves,
    /// Two parts that only one replica in the middle sees
    Bridge,
    /// Each replica sees only its neighbours
    Ring,
    /// Some replicas are clogged one by one, and unclogged in another order
    Swizzle,
    /// For a while, many messages are lost
    Storm,
    /// For a while, messages take long and overtake each other
    Slow,
    /// For a while, calls have their effect and their answers are lost
    LoseAnswers,
    /// A wall clock jumps
    Skew,
    /// A replica makes a snapshot, and so purges its log
    Snapshot,
    /// One disk operation fails or finds damage
    BreakDisk,
    /// A disk is full for a while
    FillDisk,
    /// A disk answers nothing for a while
    StallDisk,
    /// A disk is lost for good, and its replica is replaced
    RuinDisk,
    /// The leader hands over
    HandOver,
    /// A replica is replaced by a new one
    Replace,
    /// A replica is left behind until only a snapshot helps, and dies while it takes that in
    CatchUp,
    // What goes on all the time, as often as the seed says.
    /// Messages are lost
    Loss,
    /// Calls of Raft arrive twice
    Repeat,
    /// Named places in the code wait or die
    Points,
    /// Clocks and timers of replicas go at other rates
    Drift,
}

impl Kind {
    /// As the command line and traces have it.
    pub(crate) fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether it strikes at moments of the plan; the others go on all the time.
    pub(crate) fn strikes(self) -> bool {
        self < Kind::Loss
    }
}

/// A moment of the plan.
#[derive(Clone, Debug)]
pub(crate) struct Strike {
    /// Virtual milliseconds after the first moment of load.
    pub(crate) at_ms: u64,
    /// What strikes; `None`: everything is healed and started.
    pub(crate) kind: Option<Kind>,
    /// Whom, and how.
    pub(crate) draw: Stream,
}

/// All strikes of a run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    /// Kinds that the seed uses.
    pub(crate) kinds: Vec<Kind>,
    /// By their moments.
    pub(crate) strikes: Vec<Strike>,
    /// When load and faults end.
    pub(crate) end_ms: u64,
}

/// Shortest and longest time under faults that a seed draws, in virtual milliseconds.
const LENGTH_MS: (u64, u64) = (2_000, 7_000);

impl Plan {
    /// The plan of a case.
    pub(crate) fn draw(case: &Case) -> Plan {
        let mut draw = Stream::new(case.seed, "plan");
        let used = drawn_kinds(&mut draw);
        let all: Vec<Kind> = used.iter().copied().filter(|kind| kind.strikes()).collect();
        let kinds = used.into_iter().filter(|kind| case.allows(*kind)).collect();
        let length = draw.between(LENGTH_MS.0, LENGTH_MS.1);
        let end_ms = case.horizon.map_or(length, |horizon| {
            u64::try_from(horizon.as_millis()).unwrap_or(u64::MAX)
        });
        let mut strikes = Vec::new();
        let mut at_ms = 0;
        loop {
            at_ms += draw.between(80, 700);
            // Whatever a seed uses, it heals as well, or little else would ever happen; now and then for long.
            let heals = all.is_empty() || draw.percent(25);
            let kind = if heals { None } else { draw.pick(&all).copied() };
            let strike = Strike {
                at_ms,
                kind,
                draw: Stream::new(draw.next(), "strike"),
            };
            if heals && draw.percent(25) {
                at_ms += draw.between(800, 2_000);
            }
            if strike.at_ms >= end_ms {
                break;
            }
            if strike.kind.is_none_or(|kind| case.allows(kind)) {
                strikes.push(strike);
            }
        }
        Plan {
            kinds,
            strikes,
            end_ms,
        }
    }

    /// Whether the seed uses this kind.
    pub(crate) fn uses(&self, kind: Kind) -> bool {
        self.kinds.contains(&kind)
    }
}

/// Some seeds see one kind again and again, others see all of them mixed.
fn drawn_kinds(draw: &mut Stream) -> Vec<Kind> {
    let percent = *draw.pick(&[15, 40, 60, 85]).unwrap_or(&60);
    let kinds = Kind::value_variants().iter().copied();
    kinds.filter(|_| draw.percent(percent)).collect()
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.kinds.iter().map(|kind| kind.name()).collect();
        write!(
            f,
            "{} strikes in {} ms of {}",
            self.strikes.len(),
            self.end_ms,
            if names.is_empty() {
                "nothing".to_owned()
            } else {
                names.join(",")
            }
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::case;

    fn moments(case: &Case) -> Vec<(u64, Option<Kind>)> {
        let plan = Plan::draw(case);
        plan.strikes
            .iter()
            .map(|strike| (strike.at_ms, strike.kind))
            .collect()
    }

    #[test]
    fn what_is_left_out_moves_nothing_else() {
        for seed in 1..50 {
            let whole = Case {
                seed,
                ..Case::default()
            };
            let without = Case {
                only: Some(case::kinds("power,halves,skew").unwrap()),
                ..whole.clone()
            };
            let mut kept = moments(&whole);
            kept.retain(|(_, kind)| kind.is_none_or(|kind| without.allows(kind)));
            assert_eq!(moments(&without), kept);
            let short = Case {
                horizon: Some(Duration::from_millis(1_500)),
                ..whole.clone()
            };
            let mut begin = moments(&whole);
            begin.retain(|(at, _)| *at < 1_500);
            assert_eq!(moments(&short), begin);
        }
    }

    #[test]
    fn seeds_use_different_kinds_and_all_are_used() {
        let mut used = std::collections::BTreeSet::new();
        let mut sizes = std::collections::BTreeSet::new();
        for seed in 1..200 {
            let case = Case {
                seed,
                ..Case::default()
            };
            let plan = Plan::draw(&case);
            sizes.insert(plan.kinds.len());
            used.extend(plan.kinds);
        }
        assert_eq!(used.len(), Kind::value_variants().len());
        assert!(sizes.len() > 8, "{sizes:?}");
    }
}
