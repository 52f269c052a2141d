//! `mix`: all workloads at once, on one cluster and in one history. Each is judged by its own checks.
//!
//! Clients are dealt to the workloads in turn, so that `--concurrency` has to be at least their number. The journal
//! is read once at the end, for all of them. `failover` is not one of them: its bounds are those of its own rate,
//! without other load.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use async_trait::async_trait;

use super::operator::Operator;
use super::{Kind, Workload};
use crate::run::Run;

pub(super) const KIND: Kind = Kind {
    name: "mix",
    does: "all workloads at once, but for failover; at least 14 clients",
    usual: &["all"],
    make: || {
        let found = PARTS
            .iter()
            .filter_map(|(name, clients)| Some((super::find(name).ok()?, *clients)));
        let (parts, clients): (Vec<_>, Vec<_>) = found.unzip();
        Box::new(Mix { parts, clients })
    },
};

/// What it consists of, and how many clients of each make a round: all that play different parts in it.
const PARTS: &[(&str, u64)] = &[
    ("registry", 2),
    ("pairing", 1),
    ("revocation", 3),
    ("lease", 1),
    ("dispatch", 1),
    ("journal", 2),
    ("watch", 3),
    ("membership", 1),
];

struct Mix {
    parts: Vec<Box<dyn Workload>>,
    clients: Vec<u64>,
}

#[async_trait]
impl Workload for Mix {
    fn name(&self) -> &'static str {
        "mix"
    }

    fn hosts(&self) -> u64 {
        self.parts.iter().map(|part| part.hosts()).sum()
    }

    fn clients(&self) -> u64 {
        self.clients.iter().sum()
    }

    fn floors(&self) -> &'static [&'static str] {
        // Each part has a fraction of the rate; what matters is that every one of them did something.
        &[
            "read", "write", "mint", "probe", "start", "touch", "submit", "deliver", "tail", "next",
            "members",
        ]
    }

    async fn prepare(&self, run: &Arc<Run>) -> Result<()> {
        for part in &self.parts {
            part.prepare(run).await.with_context(|| part.name())?;
        }
        Ok(())
    }

    async fn client(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        let (place, own) = deal(&self.clients, number);
        self.parts[place].client(run, own).await
    }

    async fn finish(&self, run: &Arc<Run>) -> Result<()> {
        run.journal_held.store(true, Ordering::Relaxed);
        // From the moment at which all is whole watchers have seconds to see all; the others' last reads take longer.
        let (watch, others): (Vec<_>, Vec<_>) = self.parts.iter().partition(|part| part.name() == "watch");
        for part in watch.into_iter().chain(others) {
            part.finish(run).await.with_context(|| part.name())?;
        }
        run.journal_held.store(false, Ordering::Relaxed);
        Operator::new(run, "mix, last reads")?.rows().await
    }

    fn bounds(&self) -> BTreeMap<String, f64> {
        self.parts.iter().flat_map(|part| part.bounds()).collect()
    }
}

/// Which part a client is of, and its number there.
fn deal(clients: &[u64], number: u64) -> (usize, u64) {
    let round: u64 = clients.iter().sum();
    let mut left = number % round;
    for (place, count) in clients.iter().enumerate() {
        if left < *count {
            return (place, number / round * count + left);
        }
        left -= count;
    }
    unreachable!("what is left of a division by the sum is below it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_each_part_are_numbered_without_holes() {
        let dealt: Vec<(usize, u64)> = (0..8).map(|number| deal(&[2, 1, 1], number)).collect();
        assert_eq!(
            dealt,
            [(0, 0), (0, 1), (1, 0), (2, 0), (0, 2), (0, 3), (1, 1), (2, 1)]
        );
    }

    #[test]
    fn every_part_is_a_workload() {
        for (name, clients) in PARTS {
            assert!(super::super::find(name).is_ok() && *clients > 0, "{name}");
        }
    }
}
