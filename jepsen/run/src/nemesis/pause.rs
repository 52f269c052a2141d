//! SIGSTOP: the process stands still, its connections stay open and its clocks go on, as of a machine that hangs.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;

use super::{Evidence, Fault, Kind, Nemesis};
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

pub(super) const KINDS: &[Kind] = &[Kind {
    name: "pause",
    argument: None,
    does: "SIGSTOP to replicas and SIGCONT after it: from a blink to several elections",
    needs: &[],
    all: Some(""),
    make: |_| Ok(Box::new(Pause)),
}];

struct Pause;

struct Paused {
    /// Those that were stopped, and whether the kernel said so.
    stopped: Vec<(u64, bool)>,
}

#[async_trait]
impl Nemesis for Pause {
    fn name(&self) -> &str {
        "pause"
    }

    fn targets(&self) -> &'static [Target] {
        &[Target::Leader, Target::One, Target::Minority, Target::All]
    }

    fn lasts(&self) -> (Duration, Duration) {
        // Three elections are two and a half seconds; leases and freshness run out after five.
        (Duration::from_millis(200), Duration::from_secs(8))
    }

    async fn start(&self, run: &Arc<Run>, _: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let mut stopped = Vec::new();
        for id in targets {
            if run.cluster.pause(*id).is_ok() {
                stopped.push((*id, false));
            }
        }
        anyhow::ensure!(!stopped.is_empty(), "none of {targets:?} was running");
        // Every thread has to come to a stop; the kernel says when.
        for _ in 0..100 {
            for (id, seen) in &mut stopped {
                *seen |= run.cluster.is_stopped(*id);
            }
            if stopped.iter().all(|(_, seen)| *seen) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(Box::new(Paused { stopped }))
    }
}

#[async_trait]
impl Fault for Paused {
    fn isolated(&self) -> Vec<u64> {
        self.stopped.iter().map(|(id, _)| *id).collect()
    }

    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let mut happened = true;
        let mut seen = Vec::new();
        for (id, stopped) in &self.stopped {
            run.cluster.resume(*id)?;
            happened &= stopped;
            let word = if *stopped { "stopped" } else { "not stopped" };
            seen.push(format!("r{id}: the kernel had it {word}"));
        }
        Ok(Evidence::when(happened, seen.join("; ")))
    }
}
