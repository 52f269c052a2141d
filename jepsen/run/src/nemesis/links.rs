//! Links that lose packets, and connections that are reset.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use async_trait::async_trait;

use super::{Evidence, Fault, Kind, Nemesis};
use crate::abilities::Ability;
use crate::net::{Layer, Rule, Seat, between};
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

pub(super) const KINDS: &[Kind] = &[
    Kind {
        name: "loss",
        argument: Some("PERCENT"),
        does: "so many of a hundred packets from and to replicas are lost, those of clients too",
        needs: &[Ability::Network],
        all: Some("20"),
        make: |argument| {
            let percent: u32 = argument.parse().unwrap_or(0);
            ensure!(
                (1..=90).contains(&percent),
                "loss:{argument}: from 1 to 90 percent"
            );
            let rule = Rule {
                loss: percent,
                ..Rule::NONE
            };
            Ok(Box::new(Links {
                name: format!("loss:{percent}"),
                rule,
                lasts: (Duration::from_secs(2), Duration::from_secs(10)),
            }))
        },
    },
    Kind {
        name: "reset",
        argument: None,
        does: "every TCP connection of replicas that says something is answered by a reset, for a moment",
        needs: &[Ability::Network],
        all: Some(""),
        make: |_| {
            let rule = Rule {
                reset: true,
                ..Rule::NONE
            };
            Ok(Box::new(Links {
                name: "reset".to_owned(),
                rule,
                lasts: (Duration::from_millis(100), Duration::from_millis(1_000)),
            }))
        },
    },
];

struct Links {
    name: String,
    rule: Rule,
    lasts: (Duration, Duration),
}

struct Harmed {
    layer: Layer,
    what: String,
}

#[async_trait]
impl Nemesis for Links {
    fn name(&self) -> &str {
        &self.name
    }

    fn targets(&self) -> &'static [Target] {
        &[Target::One, Target::Leader, Target::All]
    }

    fn lasts(&self) -> (Duration, Duration) {
        self.lasts
    }

    async fn start(&self, run: &Arc<Run>, _: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let struck: Vec<Seat> = targets.iter().map(|id| Seat::Replica(*id)).collect();
        let replicas = run.cluster.replicas().into_iter().map(Seat::Replica);
        let hosts = run.hosts().into_iter().map(Seat::Host);
        let others: Vec<Seat> = replicas.chain(hosts).chain([Seat::Clients]).collect();
        let layer = run.net.put(between(&struck, &others, self.rule)).await?;
        Ok(Box::new(Harmed {
            layer,
            what: self.name.clone(),
        }))
    }
}

#[async_trait]
impl Fault for Harmed {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let struck = run.net.lift(self.layer).await?;
        Ok(Evidence::when(
            struck > 0,
            format!("{struck} packets were struck by {}", self.what),
        ))
    }
}
