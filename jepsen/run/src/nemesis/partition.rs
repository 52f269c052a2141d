//! Partitions: which seats no longer hear which.
//!
//! Clients reach every replica in all of them but `hosts`: what a replica tells while it is cut off is what is of
//! interest.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Result, ensure};
use async_trait::async_trait;

use super::{Evidence, Fault, Kind, Nemesis, Scene};
use crate::abilities::Ability;
use crate::chance::Chance;
use crate::net::{Layer, Rule, Rules, Seat, between};
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

macro_rules! kind {
    ($name:literal, $shape:expr, $does:literal $(, $need:expr)?) => {
        Kind {
            name: $name,
            argument: None,
            does: $does,
            needs: &[Ability::Network $(, $need)?],
            all: Some(""),
            make: |_| {
                Ok(Box::new(Partition {
                    name: $name,
                    shape: $shape,
                }))
            },
        }
    };
}

pub(super) const KINDS: &[Kind] = &[
    kind!(
        "partition:halves",
        Shape::Halves,
        "a majority and a minority, drawn at random, don't hear each other"
    ),
    kind!(
        "partition:leader",
        Shape::Alone(Target::Leader),
        "the leader hears no replica and no machine; clients reach it"
    ),
    kind!(
        "partition:one",
        Shape::Alone(Target::One),
        "one replica hears no replica and no machine; clients reach it"
    ),
    kind!(
        "partition:ring",
        Shape::Ring,
        "each replica hears a majority, and no two hear the same one (5 replicas)",
        Ability::Ring
    ),
    kind!(
        "partition:bridge",
        Shape::Bridge,
        "two halves that only one replica in the middle hears both of"
    ),
    kind!(
        "partition:oneway-in",
        Shape::OneWay(true),
        "a replica hears no other, and is heard"
    ),
    kind!(
        "partition:oneway-out",
        Shape::OneWay(false),
        "a replica is heard by no other, and hears them"
    ),
    kind!(
        "partition:peers-only",
        Shape::PeersOnly,
        "the leader hears no replica; machines and clients reach it"
    ),
    kind!(
        "partition:hosts",
        Shape::Hosts,
        "machines of the fleet are cut off from some replicas, or from all",
        Ability::Hosts
    ),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Halves,
    Alone(Target),
    Ring,
    Bridge,
    OneWay(bool),
    PeersOnly,
    Hosts,
}

struct Partition {
    name: &'static str,
    shape: Shape,
}

struct Parted {
    layer: Layer,
    links: usize,
    isolated: Vec<u64>,
}

#[async_trait]
impl Nemesis for Partition {
    fn name(&self) -> &str {
        self.name
    }

    fn targets(&self) -> &'static [Target] {
        match self.shape {
            Shape::Alone(Target::Leader) | Shape::PeersOnly => &[Target::Leader],
            Shape::Alone(_) => &[Target::One],
            Shape::OneWay(_) => &[Target::Leader, Target::Follower],
            Shape::Halves | Shape::Ring | Shape::Bridge | Shape::Hosts => &[],
        }
    }

    /// The order of the replicas around the table, or the machines and replicas that are cut.
    fn draw(&self, chance: &mut Chance, scene: &Scene) -> String {
        let mut order = scene.replicas.clone();
        chance.shuffle(&mut order);
        let mut words: Vec<String> = order.iter().map(|id| format!("r{id}")).collect();
        if self.shape == Shape::Hosts {
            // From one replica, or from all.
            let from = if chance.percent(50) { 1 } else { words.len() };
            words.truncate(from);
            let host = chance.between(1, scene.hosts.max(1));
            words.push(format!("h{host}"));
        }
        words.join(",")
    }

    async fn start(&self, run: &Arc<Run>, step: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let members = run.cluster.replicas();
        let hosts = run.hosts();
        let rules = rules(self.shape, &members, &hosts, &step.draw, targets)?;
        let links = rules.len();
        let isolated = isolated(&rules, &members);
        let layer = run.net.put(rules).await?;
        Ok(Box::new(Parted {
            layer,
            links,
            isolated,
        }))
    }
}

#[async_trait]
impl Fault for Parted {
    fn isolated(&self) -> Vec<u64> {
        self.isolated.clone()
    }

    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let dropped = run.net.lift(self.layer).await?;
        let seen = format!("{} directions were cut, {dropped} packets dropped", self.links);
        Ok(Evidence::when(dropped > 0, seen))
    }
}

/// What is cut. `order` is what was drawn.
fn rules(shape: Shape, members: &[u64], hosts: &[u64], order: &str, targets: &[u64]) -> Result<Rules> {
    let replicas = |ids: &[u64]| ids.iter().map(|id| Seat::Replica(*id)).collect::<Vec<_>>();
    let machines: Vec<Seat> = hosts.iter().map(|number| Seat::Host(*number)).collect();
    let (struck, rest) = (replicas(targets), {
        let rest: Vec<u64> = members
            .iter()
            .copied()
            .filter(|id| !targets.contains(id))
            .collect();
        replicas(&rest)
    });
    let table = around(order, members);
    Ok(match shape {
        Shape::Halves => {
            ensure!(members.len() > 1, "one replica has no halves");
            let (majority, minority) = table.split_at(members.len() / 2 + 1);
            between(majority, minority, Rule::CUT)
        }
        Shape::Alone(_) => {
            let others: Vec<Seat> = rest.iter().copied().chain(machines).collect();
            ensure!(!others.is_empty(), "there is nobody to be cut off from");
            between(&struck, &others, Rule::CUT)
        }
        Shape::PeersOnly => {
            ensure!(!rest.is_empty(), "there is no other replica");
            between(&struck, &rest, Rule::CUT)
        }
        Shape::OneWay(deaf) => {
            ensure!(!rest.is_empty(), "there is no other replica");
            let both = between(&struck, &rest, Rule::CUT);
            let into = |way: &(Seat, Seat)| struck.contains(&way.1);
            both.into_iter().filter(|(way, _)| into(way) == deaf).collect()
        }
        Shape::Ring => {
            ensure!(table.len() >= 5, "a ring needs five replicas: --replicas 5");
            ring(&table)
        }
        Shape::Bridge => {
            ensure!(table.len() >= 3, "a bridge needs three replicas");
            let (middle, sides) = table.split_at(1);
            let (left, right) = sides.split_at(sides.len() / 2);
            debug_assert!(middle.len() == 1);
            between(left, right, Rule::CUT)
        }
        Shape::Hosts => hosts_cut(order, &machines)?,
    })
}

/// Members that can not talk both ways with enough others to be a majority with them.
fn isolated(rules: &Rules, members: &[u64]) -> Vec<u64> {
    let cut = |from: u64, to: u64| rules.contains_key(&(Seat::Replica(from), Seat::Replica(to)));
    let talks = |one: u64, other: u64| one == other || !cut(one, other) && !cut(other, one);
    let quorum = members.len() / 2 + 1;
    let alone = members.iter().copied().filter(|id| {
        let heard = members.iter().filter(|other| talks(*id, **other));
        heard.count() < quorum
    });
    alone.collect()
}

fn hosts_cut(order: &str, machines: &[Seat]) -> Result<Rules> {
    ensure!(!machines.is_empty(), "this workload has no machines");
    let chosen = order
        .rsplit(",h")
        .next()
        .and_then(|number| number.parse::<usize>().ok());
    let machine = machines[chosen.unwrap_or(1).saturating_sub(1) % machines.len()];
    let from: Vec<Seat> = seats(order);
    Ok(between(&[machine], &from, Rule::CUT))
}

fn seats(order: &str) -> Vec<Seat> {
    let ids = order
        .split(',')
        .filter_map(|word| word.strip_prefix('r')?.parse().ok());
    ids.map(Seat::Replica).collect()
}

/// The members in the order that was drawn; who joined later sits at the end.
fn around(order: &str, members: &[u64]) -> Vec<Seat> {
    let mut table: Vec<Seat> = seats(order);
    table.retain(|seat| matches!(seat, Seat::Replica(id) if members.contains(id)));
    for id in members {
        if !table.contains(&Seat::Replica(*id)) {
            table.push(Seat::Replica(*id));
        }
    }
    table
}

/// Each hears its neighbours, half of a majority on either side, and nobody else.
fn ring(table: &[Seat]) -> Rules {
    let count = table.len();
    let reach = (count / 2).div_ceil(2);
    let mut cut = BTreeSet::new();
    for one in 0..count {
        for other in 0..count {
            let apart = one.abs_diff(other).min(count - one.abs_diff(other));
            if one != other && apart > reach {
                cut.insert((table[one], table[other]));
            }
        }
    }
    cut.into_iter().map(|way| (way, Rule::CUT)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIVE: [u64; 5] = [1, 2, 3, 4, 5];

    fn cut(shape: Shape, members: &[u64], order: &str, targets: &[u64]) -> Rules {
        rules(shape, members, &[1], order, targets).unwrap()
    }

    fn hears(rules: &Rules, from: u64, to: u64) -> bool {
        !rules.contains_key(&(Seat::Replica(from), Seat::Replica(to)))
    }

    #[test]
    fn halves_leave_a_majority_that_hears_itself() {
        let rules = cut(Shape::Halves, &FIVE, "r3,r5,r1,r2,r4", &[]);
        assert!(hears(&rules, 3, 5) && hears(&rules, 1, 3) && hears(&rules, 2, 4));
        assert!(!hears(&rules, 3, 2) && !hears(&rules, 4, 1));
        assert!(this(Shape::Halves, &[1]).is_err());
    }

    fn this(shape: Shape, members: &[u64]) -> Result<Rules> {
        rules(shape, members, &[], "", &members[..1])
    }

    #[test]
    fn one_that_is_alone_hears_neither_replicas_nor_machines() {
        let rules = cut(Shape::Alone(Target::Leader), &[1, 2, 3], "", &[2]);
        assert!(!hears(&rules, 2, 1) && !hears(&rules, 3, 2) && hears(&rules, 1, 3));
        assert!(rules.contains_key(&(Seat::Host(1), Seat::Replica(2))));
        assert!(
            !rules
                .keys()
                .any(|(from, to)| *from == Seat::Clients || *to == Seat::Clients)
        );
        let peers = cut(Shape::PeersOnly, &[1, 2, 3], "", &[2]);
        assert!(!peers.contains_key(&(Seat::Host(1), Seat::Replica(2))));
    }

    #[test]
    fn one_way_is_one_way() {
        let deaf = cut(Shape::OneWay(true), &[1, 2, 3], "", &[1]);
        assert!(!hears(&deaf, 2, 1) && hears(&deaf, 1, 2));
        let mute = cut(Shape::OneWay(false), &[1, 2, 3], "", &[1]);
        assert!(hears(&mute, 2, 1) && !hears(&mute, 1, 2));
    }

    #[test]
    fn in_a_ring_each_hears_a_majority_and_no_two_the_same() {
        let rules = cut(Shape::Ring, &FIVE, "r1,r2,r3,r4,r5", &[]);
        let heard = |id: u64| -> Vec<u64> {
            FIVE.iter()
                .copied()
                .filter(|from| *from == id || hears(&rules, *from, id))
                .collect()
        };
        let sets: BTreeSet<Vec<u64>> = FIVE.iter().map(|id| heard(*id)).collect();
        assert_eq!(sets.len(), 5);
        assert!(sets.iter().all(|set| set.len() == 3));
        assert!(
            this(Shape::Ring, &[1, 2, 3])
                .unwrap_err()
                .to_string()
                .contains("--replicas 5")
        );
    }

    #[test]
    fn a_bridge_has_one_in_the_middle() {
        let rules = cut(Shape::Bridge, &FIVE, "r3,r1,r2,r4,r5", &[]);
        assert!(
            FIVE.iter()
                .all(|id| hears(&rules, 3, *id) && hears(&rules, *id, 3))
        );
        assert!(!hears(&rules, 1, 4) && hears(&rules, 1, 2) && hears(&rules, 4, 5));
    }

    #[test]
    fn who_hears_no_quorum_is_known() {
        let halves = cut(Shape::Halves, &FIVE, "r3,r5,r1,r2,r4", &[]);
        assert_eq!(isolated(&halves, &FIVE), [2, 4]);
        let ring = cut(Shape::Ring, &FIVE, "r1,r2,r3,r4,r5", &[]);
        assert!(isolated(&ring, &FIVE).is_empty());
        let deaf = cut(Shape::OneWay(true), &[1, 2, 3], "", &[1]);
        assert_eq!(isolated(&deaf, &[1, 2, 3]), [1]);
    }

    #[test]
    fn machines_are_cut_from_what_was_drawn() {
        let rules = cut(Shape::Hosts, &[1, 2, 3], "r2,h1", &[]);
        assert_eq!(rules.len(), 2);
        assert!(rules.contains_key(&(Seat::Host(1), Seat::Replica(2))));
        assert!(hosts_cut("r1,h1", &[]).is_err());
    }
}
