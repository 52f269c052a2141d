//! Nemeses: what can be done to a cluster, and the register of all of them.
//!
//! To add one: write a type that implements [`Nemesis`] in a file here, give it a [`Kind`] in that file's `KINDS`,
//! and add that to [`kinds`]. `jepsen list nemeses`, `--nemesis`, the plan, the coverage floors and the
//! documentation follow.
//!
//! Invariants: what is done is drawn from the seed before the run begins, so that a plan can be applied again; a
//! fault that was begun is ended, also when the run is broken off; *installed* is only said with evidence that it
//! really happened, taken from the process, the kernel or the replicas, never from the fact that a command returned.

mod admin;
mod behind;
mod clock;
mod damage;
pub(crate) mod disk;
mod failpoint;
mod frames;
mod kill;
pub(crate) mod limits;
mod links;
mod machines;
mod member;
mod noop;
mod partition;
mod pause;
mod power;
mod restart;
mod revive;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::abilities::Ability;
use crate::chance::Chance;
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;
use crate::workloads;

/// Something that harms a cluster.
#[async_trait]
pub trait Nemesis: Send + Sync {
    /// As it is asked for: `partition:leader`, `loss:20`.
    fn name(&self) -> &str;

    /// Whom it strikes when `--target` does not say; one of these is drawn for each fault. Empty: it has no target.
    fn targets(&self) -> &'static [Target] {
        &[Target::One]
    }

    /// How long it lasts, shortest and longest, when there is room. A fault that is over at once has two zeros.
    fn lasts(&self) -> (Duration, Duration) {
        (Duration::from_secs(1), Duration::from_secs(5))
    }

    /// What else has to be drawn, in words that only this nemesis reads: a side of a partition, a file, a rate.
    fn draw(&self, _chance: &mut Chance, _scene: &Scene) -> String {
        String::new()
    }

    /// Begins. `targets` are the replicas that the step's aim has come to.
    ///
    /// # Errors
    /// Why it can't be done now, which is told as *skipped*; nothing may be left of it then.
    async fn start(&self, run: &Arc<Run>, step: &Step, targets: &[u64]) -> Result<Box<dyn Fault>>;
}

/// A fault that has begun.
#[async_trait]
pub trait Fault: Send {
    /// Replicas that hear no quorum, or stand still, because of it: what they tell, if anything, is old.
    fn isolated(&self) -> Vec<u64> {
        Vec::new()
    }

    /// Ends it, and says what shows that it happened.
    ///
    /// # Errors
    /// When it can't be ended: the outcome is then *indeterminate*, and what is left is the final stage's.
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence>;
}

/// What shows that a fault happened, or that it did not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// Whether it did.
    pub happened: bool,
    /// What was seen: `process 211 is gone, 340 serves`, `1,204 packets were dropped`.
    pub seen: String,
}

impl Evidence {
    /// With what was seen.
    #[must_use]
    pub fn when(happened: bool, seen: impl Into<String>) -> Evidence {
        Evidence {
            happened,
            seen: seen.into(),
        }
    }
}

/// What became of a planned fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", content = "why", rename_all = "lowercase")]
pub enum Outcome {
    /// It happened; what shows it.
    Installed(String),
    /// It was not begun, and why.
    Skipped(String),
    /// It was begun, and nothing shows that it happened.
    Indeterminate(String),
}

/// What a nemesis knows when it draws.
#[derive(Clone, Debug)]
pub struct Scene {
    /// Ids of the replicas at the beginning.
    pub replicas: Vec<u64>,
    /// Machines of the fleet.
    pub hosts: u64,
}

/// One entry of the register.
#[derive(Clone, Copy)]
pub struct Kind {
    /// `partition:leader`; of a kind with an argument, what stands before it.
    pub name: &'static str,
    /// The argument's form, when it has one: `PERCENT`.
    pub argument: Option<&'static str>,
    /// One line for people.
    pub does: &'static str,
    /// What a machine must be able to do.
    pub needs: &'static [Ability],
    /// Whether the group `all` has it; of one with an argument, with which.
    pub all: Option<&'static str>,
    /// Makes one. The argument is empty when there is none.
    pub make: fn(argument: &str) -> Result<Box<dyn Nemesis>>,
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// All kinds, in the order in which they are told.
#[must_use]
pub fn kinds() -> Vec<Kind> {
    [
        noop::KINDS,
        kill::KINDS,
        pause::KINDS,
        partition::KINDS,
        frames::KINDS,
        clock::KINDS,
        failpoint::KINDS,
        links::KINDS,
        restart::KINDS,
        member::KINDS,
        behind::KINDS,
        admin::KINDS,
        power::KINDS,
        disk::KINDS,
        damage::KINDS,
        limits::KINDS,
        machines::KINDS,
    ]
    .concat()
}

/// A nemesis that was asked for.
pub struct Asked {
    /// Its entry.
    pub kind: Kind,
    /// Itself.
    pub nemesis: Box<dyn Nemesis>,
}

impl std::fmt::Debug for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.nemesis.name())
    }
}

/// Reads names. `all` is every kind that the group has and `can` says yes to, and [`usual`] of a workload what it is
/// made for and `can` says yes to; a name such as `partition` is every kind that begins with it and a colon and `can`
/// says yes to, or all of them when it says so to none: what can't be done is then told.
///
/// # Errors
/// When a name is none, or an argument is wrong.
pub fn parse(names: &[String], can: impl Fn(&Kind) -> bool) -> Result<Vec<Asked>> {
    let kinds = kinds();
    let mut asked: Vec<Asked> = Vec::new();
    let mut add = |kind: Kind, argument: &str| -> Result<()> {
        let nemesis = (kind.make)(argument)?;
        if !asked.iter().any(|other| other.nemesis.name() == nemesis.name()) {
            asked.push(Asked { kind, nemesis });
        }
        Ok(())
    };
    for (name, if_able) in &written_out(names)? {
        let group = format!("{name}:");
        let members = || {
            kinds
                .iter()
                .filter(|kind| kind.name.starts_with(&group) && kind.argument.is_none())
        };
        if name == "all" {
            for kind in kinds.iter().filter(|kind| kind.all.is_some() && can(kind)) {
                add(*kind, kind.all.unwrap_or_default())?;
            }
        } else if let Some((kind, argument)) = find(&kinds, name)? {
            if !if_able || can(&kind) {
                add(kind, argument)?;
            }
        } else if members().next().is_some() {
            let able = members().any(&can);
            for kind in members().filter(|kind| can(kind) || !able && !if_able) {
                add(*kind, "")?;
            }
        } else {
            bail!("{name:?} is no nemesis; see jepsen list nemeses");
        }
    }
    Ok(asked)
}

/// The names with those of [`usual`] groups in their place, and whether each is only meant where it can be done.
fn written_out(names: &[String]) -> Result<Vec<(String, bool)>> {
    let mut all = Vec::new();
    for name in names {
        let Some(workload) = name.strip_prefix(USUAL_OF) else {
            all.push((name.clone(), false));
            continue;
        };
        let Some(kind) = workloads::kinds().into_iter().find(|kind| kind.name == workload) else {
            bail!("{workload:?} is no workload; see jepsen list workloads");
        };
        all.extend(kind.usual.iter().map(|name| ((*name).to_owned(), true)));
    }
    Ok(all)
}

/// The name of the group of nemeses that a workload is made for.
#[must_use]
pub fn usual(workload: &str) -> String {
    format!("{USUAL_OF}{workload}")
}

const USUAL_OF: &str = "usual:";

fn find<'a>(kinds: &[Kind], name: &'a str) -> Result<Option<(Kind, &'a str)>> {
    if let Some(kind) = kinds.iter().find(|kind| kind.name == name) {
        return match (kind.argument, kind.all) {
            (None, _) => Ok(Some((*kind, ""))),
            // Without an argument it has the one that the group uses.
            (Some(_), Some(usual)) => Ok(Some((*kind, usual))),
            (Some(form), None) => bail!("{name} needs an argument: {name}:{form}"),
        };
    }
    let with = kinds
        .iter()
        .filter(|kind| kind.argument.is_some())
        .find_map(|kind| {
            let argument = name.strip_prefix(kind.name)?.strip_prefix(':')?;
            Some((*kind, argument))
        });
    Ok(with)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(asked: &[&str]) -> Result<Vec<String>> {
        let asked: Vec<String> = asked.iter().map(|name| (*name).to_owned()).collect();
        let found = parse(&asked, |_| true)?;
        Ok(found
            .iter()
            .map(|asked| asked.nemesis.name().to_owned())
            .collect())
    }

    #[test]
    fn names_and_groups_are_read() {
        assert_eq!(names(&["kill", "pause", "kill"]).unwrap(), ["kill", "pause"]);
        let partitions = names(&["partition"]).unwrap();
        assert!(partitions.len() >= 6 && partitions.contains(&"partition:ring".to_owned()));
        let error = names(&["partition:nobody"]).unwrap_err().to_string();
        assert!(error.contains("partition:nobody") && error.contains("jepsen list"));
    }

    #[test]
    fn what_a_workload_is_made_for_is_a_group_of_what_can_be_done() {
        for kind in workloads::kinds() {
            let found = names(&[&usual(kind.name)]).unwrap();
            assert!(found.len() >= kind.usual.len(), "{}: {found:?}", kind.name);
            let nothing = parse(&[usual(kind.name)], |kind| kind.needs.is_empty()).unwrap();
            assert!(
                nothing.iter().all(|asked| asked.kind.needs.is_empty()),
                "{}",
                kind.name
            );
        }
        assert!(names(&["usual:bank"]).unwrap_err().to_string().contains("bank"));
    }

    #[test]
    fn every_kind_says_what_it_does_and_makes_what_it_is_called() {
        for kind in kinds() {
            assert!(!kind.does.is_empty() && kind.does.len() < 110, "{}", kind.name);
            let Some(argument) = kind.all.or(kind.argument.is_none().then_some("")) else {
                continue;
            };
            let nemesis = (kind.make)(argument).unwrap();
            assert!(
                nemesis.name().starts_with(kind.name),
                "{} makes {}",
                kind.name,
                nemesis.name()
            );
        }
    }
}
