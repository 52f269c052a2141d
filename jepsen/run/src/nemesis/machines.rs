//! Faults of machines of the fleet: their agents are killed, or stand still. For workloads that have real ones.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use async_trait::async_trait;
use nix::sys::signal::Signal;

use super::{Evidence, Fault, Kind, Nemesis, Scene};
use crate::abilities::Ability;
use crate::chance::Chance;
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

pub(super) const KINDS: &[Kind] = &[
    Kind {
        name: "machine-kill",
        argument: None,
        does: "SIGKILL to the agent of a machine, which is started again: what it ran dies or is found again",
        needs: &[Ability::Hosts],
        all: None,
        make: |_| Ok(Box::new(Machines(What::Kill))),
    },
    Kind {
        name: "machine-pause",
        argument: None,
        does: "SIGSTOP to the agent of a machine, for up to twice the life of a lease",
        needs: &[Ability::Hosts],
        all: None,
        make: |_| Ok(Box::new(Machines(What::Pause))),
    },
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Kill,
    Pause,
}

struct Machines(What);

struct Struck {
    what: What,
    number: u64,
    pid: u32,
    starts: u64,
    stopped: bool,
}

#[async_trait]
impl Nemesis for Machines {
    fn name(&self) -> &str {
        match self.0 {
            What::Kill => "machine-kill",
            What::Pause => "machine-pause",
        }
    }

    fn targets(&self) -> &'static [Target] {
        &[]
    }

    fn lasts(&self) -> (Duration, Duration) {
        match self.0 {
            What::Kill => (Duration::from_secs(1), Duration::from_secs(3)),
            What::Pause => (Duration::from_millis(500), Duration::from_secs(8)),
        }
    }

    fn draw(&self, chance: &mut Chance, scene: &Scene) -> String {
        format!("h{}", chance.between(1, scene.hosts.max(1)))
    }

    async fn start(&self, run: &Arc<Run>, step: &Step, _: &[u64]) -> Result<Box<dyn Fault>> {
        let numbers = run.machines.numbers();
        ensure!(!numbers.is_empty(), "this workload has no machines");
        let drawn = step.draw.trim_start_matches('h').parse::<usize>().unwrap_or(1);
        let number = numbers[drawn.saturating_sub(1) % numbers.len()];
        let starts = run.machines.starts(number);
        let signal = if self.0 == What::Kill {
            Signal::SIGKILL
        } else {
            Signal::SIGSTOP
        };
        let pid = run.machines.signal(number, signal)?;
        let mut struck = Struck {
            what: self.0,
            number,
            pid,
            starts,
            stopped: false,
        };
        // Every thread has to come to a stop; the kernel says when.
        for _ in 0..100 {
            if self.0 == What::Kill || struck.stopped {
                break;
            }
            struck.stopped = is_stopped(pid);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(Box::new(struck))
    }
}

fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('T'))
}

#[async_trait]
impl Fault for Struck {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let number = self.number;
        if self.what == What::Pause {
            // Killed meanwhile by another fault, it is started anew.
            drop(run.machines.signal(number, Signal::SIGCONT));
            let word = if self.stopped { "stopped" } else { "not stopped" };
            return Ok(Evidence::when(
                self.stopped,
                format!("h{number}: the kernel had its agent {word}"),
            ));
        }
        for _ in 0..200 {
            if run.machines.starts(number) > self.starts {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let again = run.machines.starts(number) > self.starts;
        let seen = format!("h{number}: agent {} was killed, started again: {again}", self.pid);
        Ok(Evidence::when(again, seen))
    }
}
