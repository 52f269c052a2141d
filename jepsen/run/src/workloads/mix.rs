//! `mix`: all workloads at once, on one cluster and in one history. Each is judged by its own checks.
//!
//! Clients are dealt to the workloads in turn, so that `--concurrency` has to be at least their number. The journal is read
//! once at the end, for all of them. `failover` is not one of them: its bounds are those of its own rate, without other load.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;

use super::operator::Operator;
use super::{Kind, Workload};
use crate::run::Run;

pub(super) const KIND: Kind = Kind {
    name: "mix",
    does: "all workloads at once; at least as many clients as workloads (--concurrency 4n)",
    make: || {
        let parts = PARTS.iter().filter_map(|name| super::find(name).ok()).collect();
        Box::new(Mix { parts })
    },
};

/// What it consists of.
const PARTS: &[&str] = &[
    "registry",
    "pairing",
    "revocation",
    "lease",
    "dispatch",
    "journal",
    "watch",
    "membership",
];

struct Mix {
    parts: Vec<Box<dyn Workload>>,
}

impl Mix {
    fn count(&self) -> u64 {
        self.parts.len() as u64
    }
}

#[async_trait]
impl Workload for Mix {
    fn name(&self) -> &'static str {
        "mix"
    }

    fn hosts(&self) -> u64 {
        self.parts.iter().map(|part| part.hosts()).sum()
    }

    fn floors(&self) -> &'static [&'static str] {
        // Each part has a fraction of the rate; what matters is that every one of them did something.
        &[
            "read", "write", "mint", "probe", "start", "renew", "submit", "deliver", "tail", "next",
            "members",
        ]
    }

    async fn prepare(&self, run: &Arc<Run>) -> Result<()> {
        let clients = run.settings.concurrency;
        ensure!(
            clients >= self.count(),
            "{clients} clients are fewer than the {} workloads of mix: --concurrency 4n",
            self.count()
        );
        for part in &self.parts {
            part.prepare(run).await.with_context(|| part.name())?;
        }
        Ok(())
    }

    async fn client(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        let place = usize::try_from(number % self.count())?;
        self.parts[place].client(run, number / self.count()).await
    }

    async fn finish(&self, run: &Arc<Run>) -> Result<()> {
        run.journal_held.store(true, Ordering::Relaxed);
        for part in &self.parts {
            part.finish(run).await.with_context(|| part.name())?;
        }
        run.journal_held.store(false, Ordering::Relaxed);
        Operator::new(run, "mix, last reads")?.rows().await
    }

    fn bounds(&self) -> BTreeMap<String, f64> {
        self.parts.iter().flat_map(|part| part.bounds()).collect()
    }
}
