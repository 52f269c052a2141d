//! SIGKILL, and a start after a while. What was written is in the page cache and survives; what was in memory is gone.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use async_trait::async_trait;

use super::{Evidence, Fault, Kind, Nemesis};
use crate::cluster::State;
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

pub(super) const KINDS: &[Kind] = &[Kind {
    name: "kill",
    argument: None,
    does: "SIGKILL to replicas, and a start of each after the fault",
    needs: &[],
    all: Some(""),
    make: |_| Ok(Box::new(Kill)),
}];

struct Kill;

struct Killed {
    /// Process ids that were killed, by replica.
    gone: BTreeMap<u64, u32>,
}

#[async_trait]
impl Nemesis for Kill {
    fn name(&self) -> &str {
        "kill"
    }

    fn targets(&self) -> &'static [Target] {
        &[Target::Leader, Target::One, Target::Minority, Target::All]
    }

    async fn start(&self, run: &Arc<Run>, _: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let mut gone = BTreeMap::new();
        for id in targets {
            // Another fault may have it down.
            if let Ok(pid) = run.cluster.kill(*id).await {
                gone.insert(*id, pid);
            }
        }
        anyhow::ensure!(!gone.is_empty(), "none of {targets:?} was running");
        Ok(Box::new(Killed { gone }))
    }
}

#[async_trait]
impl Fault for Killed {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let starts = self.gone.keys().map(|id| async move {
            if run.cluster.state(*id) == State::Down {
                run.cluster.start(*id).await?;
            }
            anyhow::Ok(())
        });
        futures::future::try_join_all(starts).await?;
        let mut happened = true;
        let mut seen = Vec::new();
        for (id, old) in &self.gone {
            let new = run.cluster.pid(*id);
            let alive = std::path::Path::new(&format!("/proc/{old}")).exists();
            happened &= !alive && new != Some(*old);
            let new = new.map_or_else(|| "nobody".to_owned(), |pid| pid.to_string());
            seen.push(format!("r{id}: process {old} is gone, {new} serves"));
        }
        Ok(Evidence::when(happened, seen.join("; ")))
    }
}
