//! What is done to replicas while leases compete.
//!
//! What never lives here: what is done to workers (they do it to themselves). Invariants: never more than one
//! replica is away at
//! a time; a fault begins only in a cluster that is whole.

use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::Run;
use crate::say;

/// How long a killed replica is away.
const AWAY: Duration = Duration::from_millis(1_500);
/// How long one is frozen: longer than an election, and than its authority over sessions.
const FROZEN: Duration = Duration::from_secs(7);
/// Between a cluster that is whole again and the next fault.
const BREATH: Duration = Duration::from_secs(2);
const WHOLE: Duration = Duration::from_secs(90);

#[derive(Debug, Clone, Copy)]
enum Fault {
    KillLeader,
    KillFollower,
    FreezeLeader,
    FreezeFollower,
    Transfer,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Fault::KillLeader => "kill of the leader",
            Fault::KillFollower => "kill of a follower",
            Fault::FreezeLeader => "freeze of the leader",
            Fault::FreezeFollower => "freeze of a follower",
            Fault::Transfer => "leader transfer",
        }
    }
}

impl Run {
    /// One after the other until the time is up.
    pub(super) async fn faults(&mut self, kills: bool, pauses: bool, until: Instant) -> Result<()> {
        let mut faults = Vec::new();
        if kills {
            faults.extend([Fault::KillLeader, Fault::Transfer, Fault::KillFollower]);
        }
        if pauses {
            faults.extend([Fault::FreezeLeader, Fault::FreezeFollower]);
        }
        let mut counts: Vec<u64> = faults.iter().map(|_| 0).collect();
        let mut next = 0;
        while Instant::now() < until {
            sleep(BREATH.min(until.saturating_duration_since(Instant::now()))).await;
            if faults.is_empty() || Instant::now() >= until {
                continue;
            }
            let at = next % faults.len();
            self.fault(faults[at]).await?;
            counts[at] += 1;
            next += 1;
        }
        for (fault, count) in faults.iter().zip(counts) {
            let row = vec![json!(fault.name()), json!(count)];
            self.report.row("faults", &["fault", "count"], row);
        }
        Ok(())
    }

    async fn fault(&mut self, fault: Fault) -> Result<()> {
        let leader = self.cluster.settled(WHOLE).await?.leader_id;
        let others: Vec<u64> = self
            .cluster
            .ids()
            .into_iter()
            .filter(|id| *id != leader)
            .collect();
        let other = others[usize::try_from(super::worker::below(others.len() as u64))?];
        let victim = match fault {
            Fault::KillLeader | Fault::FreezeLeader => leader,
            Fault::KillFollower | Fault::FreezeFollower | Fault::Transfer => other,
        };
        say(&format!("{}: replica {victim}", fault.name()));
        match fault {
            Fault::KillLeader | Fault::KillFollower => {
                self.cluster.kill(victim).await?;
                sleep(AWAY).await;
                self.cluster.start_replica(victim).await?;
            }
            Fault::FreezeLeader | Fault::FreezeFollower => {
                let pids = self.cluster.pids();
                let pid = pids.iter().find(|(id, _)| *id == victim).map(|(_, pid)| *pid);
                if let Some(pid) = pid {
                    let pid = Pid::from_raw(i32::try_from(pid)?);
                    kill(pid, Signal::SIGSTOP)?;
                    sleep(FROZEN).await;
                    kill(pid, Signal::SIGCONT)?;
                }
            }
            // Another leader may have been elected just then.
            Fault::Transfer => drop(self.client.transfer_leader(victim).await),
        }
        self.cluster.settled(WHOLE).await?;
        Ok(())
    }
}
