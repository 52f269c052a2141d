//! Faults of frames: late, out of turn, twice, damaged, or too many for the link. They need the fabric that forwards
//! frames itself (`--fabric tap`).
//!
//! They are between the struck replicas and everybody else but the harness's clients: what those are told must be
//! right, and must not be made late by us.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use palyra_jepsen_switch::Counters;

use super::{Evidence, Fault, Kind, Nemesis};
use crate::abilities::Ability;
use crate::net::{Layer, Rule, Rules, Seat, Way, between};
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

const NEEDS: &[Ability] = &[Ability::Network, Ability::Tap];

macro_rules! kind {
    ($name:literal, $form:literal, $usual:literal, $what:expr, $does:literal) => {
        Kind {
            name: $name,
            argument: Some($form),
            does: $does,
            needs: NEEDS,
            all: Some($usual),
            make: |argument| Ok(Box::new(Frames::read($name, $what, argument)?)),
        }
    };
}

pub(super) const KINDS: &[Kind] = &[
    kind!(
        "delay",
        "MS",
        "50",
        What::Delay,
        "each frame from and to a replica arrives so much later"
    ),
    kind!(
        "jitter",
        "MS",
        "100",
        What::Jitter,
        "each frame arrives up to so much later, evenly drawn, in order"
    ),
    kind!(
        "reorder",
        "PERCENT",
        "20",
        What::Reorder,
        "so many frames of a hundred are overtaken by others"
    ),
    kind!(
        "dup",
        "PERCENT",
        "20",
        What::Duplicate,
        "so many frames of a hundred arrive twice"
    ),
    kind!(
        "corrupt",
        "PERCENT",
        "5",
        What::Corrupt,
        "a bit is turned in so many frames of a hundred; checksums tell"
    ),
    kind!(
        "corrupt-sealed",
        "PERCENT",
        "1",
        What::CorruptSealed,
        "a bit is turned and the checksum made right: only TLS can tell, and breaks off"
    ),
    kind!(
        "slow-link",
        "KBIT",
        "512",
        What::Rate,
        "a replica's links carry only so many kilobits a second each way"
    ),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Delay,
    Jitter,
    Reorder,
    Duplicate,
    Corrupt,
    CorruptSealed,
    Rate,
}

struct Frames {
    name: String,
    what: What,
    amount: u32,
}

impl Frames {
    fn read(kind: &str, what: What, argument: &str) -> Result<Frames> {
        let (unit, most) = match what {
            What::Delay | What::Jitter => ("milliseconds", 60_000),
            What::Rate => ("kilobits a second", 10_000_000),
            _ => ("of a hundred", 100),
        };
        let amount: u32 = argument
            .parse()
            .ok()
            .filter(|amount| (1..=most).contains(amount))
            .with_context(|| {
                format!("{kind}:{argument}: a number from 1 to {most} ({unit}) comes after {kind}:")
            })?;
        Ok(Frames {
            name: format!("{kind}:{amount}"),
            what,
            amount,
        })
    }

    fn rule(&self) -> Rule {
        let amount = self.amount;
        match self.what {
            What::Delay => Rule {
                delay_us: u64::from(amount) * 1_000,
                ..Rule::NONE
            },
            What::Jitter => Rule {
                jitter_us: u64::from(amount) * 1_000,
                ..Rule::NONE
            },
            What::Reorder => Rule {
                reorder: amount,
                ..Rule::NONE
            },
            What::Duplicate => Rule {
                duplicate: amount,
                ..Rule::NONE
            },
            What::Corrupt => Rule {
                corrupt: amount,
                ..Rule::NONE
            },
            What::CorruptSealed => Rule {
                corrupt: amount,
                fix_checksum: true,
                ..Rule::NONE
            },
            What::Rate => Rule {
                rate: u64::from(amount) * 1_000 / 8,
                ..Rule::NONE
            },
        }
    }
}

#[async_trait]
impl Nemesis for Frames {
    fn name(&self) -> &str {
        &self.name
    }

    fn targets(&self) -> &'static [Target] {
        &[Target::One, Target::Leader, Target::Minority, Target::All]
    }

    fn lasts(&self) -> (Duration, Duration) {
        (Duration::from_secs(2), Duration::from_secs(10))
    }

    async fn start(&self, run: &Arc<Run>, _: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let rules = rules(targets, &run.cluster.replicas(), &run.hosts(), self.rule());
        ensure!(
            !rules.is_empty(),
            "there is nobody else whose frames could be harmed"
        );
        let ways: Vec<Way> = rules.keys().copied().collect();
        let before = run.net.frames().await?;
        let layer = run.net.put(rules).await?;
        Ok(Box::new(Harmed {
            what: self.what,
            amount: self.amount,
            ways,
            before,
            layer,
        }))
    }
}

fn rules(targets: &[u64], members: &[u64], hosts: &[u64], rule: Rule) -> Rules {
    let struck: Vec<Seat> = targets.iter().copied().map(Seat::Replica).collect();
    let replicas = members.iter().copied().map(Seat::Replica);
    let others: Vec<Seat> = replicas.chain(hosts.iter().copied().map(Seat::Host)).collect();
    between(&struck, &others, rule)
}

struct Harmed {
    what: What,
    amount: u32,
    ways: Vec<Way>,
    before: BTreeMap<Way, Counters>,
    layer: Layer,
}

#[async_trait]
impl Fault for Harmed {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let after = run.net.frames().await?;
        run.net.lift(self.layer).await?;
        let none = Counters::default();
        let count = self.ways.iter().fold(none, |sum, way| {
            let (now, then) = (
                after.get(way).unwrap_or(&none),
                self.before.get(way).unwrap_or(&none),
            );
            sum + now.since(then)
        });
        Ok(evidence(self.what, self.amount, self.ways.len(), &count))
    }
}

/// What the counters of the struck links show.
fn evidence(what: What, amount: u32, links: usize, count: &Counters) -> Evidence {
    let mean = count.held_mean();
    let held = || {
        format!(
            "{} frames were held {:.1} ms on average",
            count.slowed,
            mean.as_secs_f64() * 1e3
        )
    };
    let amount = Duration::from_millis(u64::from(amount));
    let (happened, seen) = match what {
        What::Delay => (count.slowed > 0 && mean >= amount / 2, held()),
        What::Jitter => (count.slowed > 0 && mean >= amount / 8, held()),
        What::Rate => (
            count.slowed > 0,
            format!("{}, {} did not fit", held(), count.overflowed),
        ),
        What::Reorder => (
            count.reordered > 0,
            format!("{} frames were held for others to overtake", count.reordered),
        ),
        What::Duplicate => (
            count.duplicated > 0,
            format!("{} frames came twice", count.duplicated),
        ),
        What::Corrupt => (
            count.corrupted > 0,
            format!("{} frames were damaged", count.corrupted),
        ),
        What::CorruptSealed => {
            let told = format!("{} frames were damaged under a right checksum", count.corrupted);
            (count.corrupted > 0, told)
        }
    };
    Evidence::when(
        happened,
        format!("on {links} directions, of {} frames: {seen}", count.frames),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_and_refused_by_name() {
        let delay = Frames::read("delay", What::Delay, "25").unwrap();
        assert_eq!((delay.name.as_str(), delay.rule().delay_us), ("delay:25", 25_000));
        let slow = Frames::read("slow-link", What::Rate, "512").unwrap();
        assert_eq!(slow.rule().rate, 64_000);
        for (what, wrong) in [
            (What::Reorder, "101"),
            (What::Delay, "0"),
            (What::Rate, "fast"),
            (What::Corrupt, ""),
        ] {
            let error = Frames::read("it", what, wrong)
                .map(|_| ())
                .unwrap_err()
                .to_string();
            assert!(
                error.starts_with(&format!("it:{wrong}: a number from 1 to")),
                "{error}"
            );
        }
        assert!(KINDS.iter().all(|kind| (kind.make)(kind.all.unwrap()).is_ok()));
    }

    #[test]
    fn clients_are_spared_and_nobody_is_late_to_himself() {
        let rules = rules(
            &[1],
            &[1, 2, 3],
            &[1],
            Rule {
                delay_us: 1,
                ..Rule::NONE
            },
        );
        assert_eq!(rules.len(), 6);
        assert!(
            rules
                .keys()
                .all(|(from, to)| from != to && *from != Seat::Clients && *to != Seat::Clients)
        );
        assert!(super::rules(&[1], &[1], &[], Rule::CUT).is_empty());
    }

    #[test]
    fn only_the_fault_that_was_asked_for_counts_as_its_evidence() {
        let count = Counters {
            frames: 100,
            delivered: 100,
            slowed: 100,
            held_ns: 100 * 50_000_000,
            duplicated: 3,
            ..Counters::default()
        };
        assert!(evidence(What::Delay, 50, 2, &count).happened);
        assert!(evidence(What::Delay, 50, 2, &count).seen.contains("held 50.0 ms"));
        assert!(
            !evidence(What::Delay, 500, 2, &count).happened,
            "held, but not for that long"
        );
        assert!(evidence(What::Duplicate, 20, 2, &count).happened);
        for what in [What::Reorder, What::Corrupt, What::CorruptSealed] {
            assert!(!evidence(what, 20, 2, &count).happened, "{what:?}");
        }
        assert!(!evidence(What::Rate, 20, 2, &Counters::default()).happened);
    }
}
