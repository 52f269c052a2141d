//! The plan of a run: which fault begins when, strikes whom, and lasts how long. Drawn from the seed before anything
//! runs.
//!
//! A plan is data: one JSON object a line, `plan.jsonl`. `--plan` applies it again, to the same faults at the same
//! moments; what the cluster does meanwhile is its own affair. Invariant: the same seed and settings give the same
//! plan.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::chance::Chance;
use crate::nemesis::{Asked, Nemesis, Scene};
use crate::target::{Aim, Target};

/// A plan has at most so many steps.
const MAX_STEPS: usize = 20_000;

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Its number, from 1.
    pub number: u64,
    /// When it begins, in milliseconds after faults begin.
    pub at_ms: u64,
    /// How long it lasts.
    pub for_ms: u64,
    /// What is done, as `--nemesis` has it.
    pub nemesis: String,
    /// To whom.
    pub aim: Aim,
    /// What else was drawn, in the nemesis's own words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub draw: String,
}

/// What a plan is drawn for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The run's seed.
    pub seed: u64,
    /// How long faults have.
    pub window: Duration,
    /// From one beginning to the next, about.
    pub interval: Duration,
    /// Whom, when it is not the nemesis's own choice.
    pub target: Option<Target>,
}

/// Draws a plan in which each nemesis that was asked for comes at least once.
#[must_use]
pub fn draw(wish: &Wish, asked: &[Asked], scene: &Scene) -> Vec<Step> {
    let mut chance = Chance::named(wish.seed, "plan");
    let window = millis(wish.window);
    if asked.is_empty() || window == 0 {
        return Vec::new();
    }
    let period = millis(wish.interval).min(window / asked.len() as u64).max(1);
    let count = usize::try_from(window / period)
        .unwrap_or(MAX_STEPS)
        .clamp(1, MAX_STEPS);
    let mut deck: Vec<usize> = Vec::new();
    let mut steps = Vec::new();
    for place in 0..count {
        if deck.is_empty() {
            deck = (0..asked.len()).collect();
            chance.shuffle(&mut deck);
        }
        let nemesis = &*asked[deck.pop().unwrap_or(0)].nemesis;
        let at_ms = place as u64 * period + chance.below(period / 5 + 1);
        // Mostly one after the other; when there are several, sometimes one into the next.
        let room = if asked.len() > 1 && chance.percent(25) {
            period * 8 / 5
        } else {
            period * 7 / 10
        };
        let (shortest, longest) = nemesis.lasts();
        let longest = millis(longest).min(room).min(window.saturating_sub(at_ms));
        let for_ms = chance.between(millis(shortest).min(longest), longest);
        let (aim, draw) = (
            aim(wish.target, nemesis, &mut chance, scene),
            nemesis.draw(&mut chance, scene),
        );
        steps.push(Step {
            number: place as u64 + 1,
            at_ms,
            for_ms,
            nemesis: nemesis.name().to_owned(),
            aim,
            draw,
        });
    }
    steps
}

fn aim(wanted: Option<Target>, nemesis: &dyn Nemesis, chance: &mut Chance, scene: &Scene) -> Aim {
    let own = nemesis.targets();
    if own.is_empty() {
        return Aim::Nobody;
    }
    // Who can strike one kind of replica only does so, whatever was wished for all.
    let wanted = wanted.filter(|_| own.len() > 1 || own[0] == Target::One);
    let target = wanted.unwrap_or_else(|| *chance.one(own));
    target.draw(chance, &scene.replicas)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Writes a plan.
///
/// # Errors
/// When the file can't be written.
pub fn write(path: &Path, steps: &[Step]) -> Result<()> {
    let mut text = String::new();
    for step in steps {
        text.push_str(&serde_json::to_string(step)?);
        text.push('\n');
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a plan.
///
/// # Errors
/// When it can't be read, with the number of the line that is wrong.
pub fn read(path: &Path) -> Result<Vec<Step>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut steps = Vec::new();
    for (at, line) in text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
    {
        let step: Step = serde_json::from_str(line)
            .with_context(|| format!("{}, line {}: no step of a plan", path.display(), at + 1))?;
        steps.push(step);
    }
    ensure!(
        steps.len() <= MAX_STEPS,
        "{} has over {MAX_STEPS} steps",
        path.display()
    );
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nemesis;

    fn asked(names: &[&str]) -> Vec<Asked> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        nemesis::parse(&names, |_| true).unwrap()
    }

    fn plan(seed: u64, names: &[&str], window: u64, target: Option<Target>) -> Vec<Step> {
        let wish = Wish {
            seed,
            window: Duration::from_secs(window),
            interval: Duration::from_secs(5),
            target,
        };
        let scene = Scene {
            replicas: vec![1, 2, 3],
            hosts: 2,
        };
        draw(&wish, &asked(names), &scene)
    }

    #[test]
    fn a_seed_gives_one_plan_and_another_seed_another() {
        let names = ["kill", "pause", "partition"];
        assert_eq!(plan(7, &names, 60, None), plan(7, &names, 60, None));
        assert_ne!(plan(7, &names, 60, None), plan(8, &names, 60, None));
    }

    #[test]
    fn each_nemesis_comes_and_no_fault_outlives_the_window() {
        for seed in 0..100 {
            for (names, window) in [
                (vec!["kill"], 10),
                (vec!["kill", "pause", "partition"], 20),
                (vec!["all"], 30),
            ] {
                let steps = plan(seed, &names, window, None);
                for asked in asked(&names) {
                    let name = asked.nemesis.name();
                    assert!(
                        steps.iter().any(|step| step.nemesis == name),
                        "{name} in {steps:?}"
                    );
                }
                assert!(
                    steps
                        .iter()
                        .all(|step| step.at_ms + step.for_ms <= window * 1_000),
                    "{steps:?}"
                );
                assert!(steps.windows(2).all(|pair| pair[0].at_ms < pair[1].at_ms));
            }
        }
    }

    #[test]
    fn a_target_is_kept_to() {
        let steps = plan(3, &["kill", "pause"], 60, Some(Target::Leader));
        assert!(steps.len() >= 10 && steps.iter().all(|step| step.aim == Aim::Leader));
        let steps = plan(3, &["partition:halves"], 60, Some(Target::Leader));
        assert!(
            steps
                .iter()
                .all(|step| step.aim == Aim::Nobody && step.draw.split(',').count() == 3)
        );
    }

    #[test]
    fn a_plan_is_read_as_it_was_written_and_a_wrong_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plan.jsonl");
        let steps = plan(5, &["all"], 60, None);
        write(&path, &steps).unwrap();
        assert_eq!(read(&path).unwrap(), steps);
        std::fs::write(&path, "{\"number\":1}\n").unwrap();
        assert!(format!("{:#}", read(&path).unwrap_err()).contains("line 1"));
    }
}
