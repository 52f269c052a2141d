//! Whom a fault strikes: as it is asked for ([`Target`]), and as it is drawn ([`Aim`]).
//!
//! `--target` takes a [`Target`]. A seed makes an [`Aim`] of it, which is what a plan holds: fixed replicas, or a
//! role that whoever has it at that moment is struck for. The replicas themselves are known when the fault begins.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::chance::Chance;

/// Whom a fault is to strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// Any one replica.
    One,
    /// As many as may fail.
    Minority,
    /// One more than may fail.
    Majority,
    /// All.
    All,
    /// Who leads when the fault begins.
    Leader,
    /// One that does not lead then.
    Follower,
    /// This one.
    Replica(u64),
}

/// Whom it strikes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Aim {
    /// Nobody in particular.
    Nobody,
    /// Who leads then.
    Leader,
    /// The replica at that place among those that do not lead then.
    Follower(u64),
    /// These.
    These(Vec<u64>),
}

impl Target {
    /// What can be asked for, for messages.
    pub const GRAMMAR: &'static str =
        "one, minority, majority, all, leader, follower, or a replica such as r2";

    /// Draws whom it strikes of `members`.
    #[must_use]
    pub fn draw(self, chance: &mut Chance, members: &[u64]) -> Aim {
        let some = |chance: &mut Chance, count: usize| {
            let mut all = members.to_vec();
            chance.shuffle(&mut all);
            all.truncate(count.max(1));
            all.sort_unstable();
            Aim::These(all)
        };
        let minority = members.len().saturating_sub(1) / 2;
        match self {
            Target::One => some(chance, 1),
            Target::Minority => some(chance, minority),
            Target::Majority => some(chance, members.len() / 2 + 1),
            Target::All => Aim::These(members.to_vec()),
            Target::Leader => Aim::Leader,
            Target::Follower => Aim::Follower(chance.below(members.len().max(2) as u64 - 1)),
            Target::Replica(id) => Aim::These(vec![id]),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        Ok(match text {
            "one" => Target::One,
            "minority" => Target::Minority,
            "majority" => Target::Majority,
            "all" => Target::All,
            "leader" => Target::Leader,
            "follower" => Target::Follower,
            other => Target::Replica(
                replica(other).ok_or_else(|| format!("{text:?} is no target; it is {}", Target::GRAMMAR))?,
            ),
        })
    }
}

fn replica(text: &str) -> Option<u64> {
    let number = text.strip_prefix('r')?.parse().ok()?;
    (number > 0).then_some(number)
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::One => f.write_str("one"),
            Target::Minority => f.write_str("minority"),
            Target::Majority => f.write_str("majority"),
            Target::All => f.write_str("all"),
            Target::Leader => f.write_str("leader"),
            Target::Follower => f.write_str("follower"),
            Target::Replica(id) => write!(f, "r{id}"),
        }
    }
}

impl Aim {
    /// The replicas that it strikes now.
    ///
    /// # Errors
    /// Why it strikes none.
    pub fn resolve(&self, members: &[u64], leader: Option<u64>) -> Result<Vec<u64>, String> {
        let leads = || leader.ok_or_else(|| "nobody leads at the moment".to_owned());
        match self {
            Aim::Nobody => Ok(Vec::new()),
            Aim::Leader => Ok(vec![leads()?]),
            Aim::Follower(place) => {
                let leader = leads()?;
                let others: Vec<u64> = members.iter().copied().filter(|id| *id != leader).collect();
                let place = usize::try_from(*place).unwrap_or(0) % others.len().max(1);
                let found = others.get(place).copied();
                Ok(vec![found.ok_or_else(|| "there is no follower".to_owned())?])
            }
            Aim::These(ids) => {
                let there: Vec<u64> = ids.iter().copied().filter(|id| members.contains(id)).collect();
                if there.is_empty() {
                    return Err(format!("{self} is no member any more"));
                }
                Ok(there)
            }
        }
    }
}

impl fmt::Display for Aim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Aim::Nobody => f.write_str("-"),
            Aim::Leader => f.write_str("leader"),
            Aim::Follower(place) => write!(f, "follower#{place}"),
            Aim::These(ids) => {
                let names: Vec<String> = ids.iter().map(|id| format!("r{id}")).collect();
                f.write_str(&names.join(","))
            }
        }
    }
}

impl From<Aim> for String {
    fn from(aim: Aim) -> String {
        aim.to_string()
    }
}

impl TryFrom<String> for Aim {
    type Error = String;

    fn try_from(text: String) -> Result<Aim, String> {
        if let Some(place) = text.strip_prefix("follower#") {
            let place = place.parse().map_err(|_| format!("{text:?} has no number"))?;
            return Ok(Aim::Follower(place));
        }
        match text.as_str() {
            "-" => Ok(Aim::Nobody),
            "leader" => Ok(Aim::Leader),
            list => {
                let ids: Option<Vec<u64>> = list.split(',').map(replica).collect();
                ids.map(Aim::These).ok_or_else(|| {
                    format!(
                        "{list:?} is no aim of a plan: it is -, leader, follower#N, or replicas such as r1,r3"
                    )
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIVE: [u64; 5] = [1, 2, 3, 4, 5];

    fn drawn(target: Target, seed: u64) -> Aim {
        target.draw(&mut Chance::of(seed), &FIVE)
    }

    #[test]
    fn targets_are_read_and_told() {
        for text in ["one", "minority", "majority", "all", "leader", "follower", "r2"] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
        for wrong in ["", "r", "r0", "rx", "leaders", "2"] {
            assert!(
                wrong.parse::<Target>().unwrap_err().contains("such as r2"),
                "{wrong}"
            );
        }
    }

    #[test]
    fn a_seed_draws_as_many_as_was_asked_for() {
        let count = |target, seed| match drawn(target, seed) {
            Aim::These(ids) => ids.len(),
            other => panic!("{other}"),
        };
        for seed in 0..50 {
            assert_eq!(drawn(Target::One, seed), drawn(Target::One, seed));
            let counts =
                [Target::One, Target::Minority, Target::Majority, Target::All].map(|of| count(of, seed));
            assert_eq!(counts, [1, 2, 3, 5]);
        }
        let hit: std::collections::BTreeSet<_> =
            (0..50).map(|seed| drawn(Target::One, seed).to_string()).collect();
        assert_eq!(hit.len(), 5, "each replica's turn comes");
        assert_eq!(
            Target::Minority.draw(&mut Chance::of(1), &[1]),
            Aim::These(vec![1])
        );
    }

    #[test]
    fn roles_are_known_when_the_fault_begins() {
        assert_eq!(Aim::Leader.resolve(&FIVE, Some(4)), Ok(vec![4]));
        assert!(Aim::Leader.resolve(&FIVE, None).is_err());
        for place in 0..9 {
            assert_ne!(Aim::Follower(place).resolve(&FIVE, Some(2)).unwrap(), [2]);
        }
        assert!(Aim::Follower(0).resolve(&[1], Some(1)).is_err());
        assert_eq!(Aim::These(vec![2, 9]).resolve(&FIVE, None), Ok(vec![2]));
        assert!(
            Aim::These(vec![9])
                .resolve(&FIVE, None)
                .unwrap_err()
                .contains("r9")
        );
    }

    #[test]
    fn aims_survive_a_plan() {
        for aim in [Aim::Nobody, Aim::Leader, Aim::Follower(3), Aim::These(vec![1, 5])] {
            let text = serde_json::to_string(&aim).unwrap();
            assert_eq!(serde_json::from_str::<Aim>(&text).unwrap(), aim);
        }
        assert!(serde_json::from_str::<Aim>("\"r1,x\"").is_err());
    }
}
