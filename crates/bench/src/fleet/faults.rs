//! One fault after the other, each with all nodes attached: who had to move, how long it took, who was wrongly
//! believed absent.
//!
//! Invariants: struck are the nodes whose session was at the replica that the fault hit, by their own account at that
//! moment; the journal is read only after the longest time in which anybody could still be declared absent.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{Run, applied};
use crate::presence::{about_nodes, end_of_journal, judge, since};
use crate::say;
use crate::spread::{self, Spread};

/// Longer than any timeout after which a node or a replica is declared absent.
const ALARMS: Duration = Duration::from_secs(20);
/// For the nodes of a lost replica to be back.
const BACK: Duration = Duration::from_secs(300);

/// What is done to the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// SIGKILL of a replica that does not lead.
    KillFollower,
    /// Another replica leads.
    Transfer,
    /// SIGKILL of the leader.
    KillLeader,
    /// SIGTERM of a replica: it drains.
    Stop,
}

impl Fault {
    const ALL: [Fault; 4] = [
        Fault::KillFollower,
        Fault::Transfer,
        Fault::KillLeader,
        Fault::Stop,
    ];

    fn name(self) -> &'static str {
        match self {
            Fault::KillFollower => "kill of a follower",
            Fault::Transfer => "leader transfer",
            Fault::KillLeader => "kill of the leader",
            Fault::Stop => "stop (SIGTERM) of a replica",
        }
    }
}

impl Run {
    /// All of them.
    pub(super) async fn faults(&mut self) -> Result<()> {
        let mut falsely = 0;
        for fault in Fault::ALL {
            falsely += self.fault(fault).await?;
        }
        let found = format!("{falsely} nodes");
        self.report.promise(
            "no node that kept its replica is believed absent",
            falsely == 0,
            found,
        );
        Ok(())
    }

    /// The replica that a fault hits: the one with the most sessions among those that it may hit.
    async fn victim(&self, fault: Fault) -> Result<u64> {
        let leader = self.client.status().await?.leader_id;
        let may = |id: &u64| match fault {
            Fault::KillFollower | Fault::Transfer => *id != leader,
            Fault::KillLeader => *id == leader,
            Fault::Stop => true,
        };
        let candidates = self.cluster.ids().into_iter().filter(may);
        let busiest = candidates.max_by_key(|id| self.fleet.board().at(*id).len());
        busiest.ok_or_else(|| anyhow!("no replica for the {}", fault.name()))
    }

    /// One fault; answers how many nodes were wrongly believed absent.
    async fn fault(&mut self, fault: Fault) -> Result<usize> {
        let victim = self.victim(fault).await?;
        let all = self.fleet.device_ids.len();
        say(&format!("{}: replica {victim}", fault.name()));
        let (cursor, before) = (end_of_journal(&self.client).await?, self.client.status().await?);
        let attaches = self.fleet.board().attaches();
        let struck = match fault {
            Fault::Transfer => Vec::new(),
            _ => self.fleet.board().at(victim),
        };
        let began = Instant::now();
        match fault {
            Fault::KillFollower | Fault::KillLeader => drop(self.cluster.kill(victim).await?),
            Fault::Stop => self.cluster.terminate(victim).await?,
            Fault::Transfer => drop(self.client.transfer_leader(victim).await?),
        }
        let took: Spread = self
            .fleet
            .board()
            .rehomed(&struck, began, BACK)
            .await?
            .into_iter()
            .collect();
        self.fleet.board().await_attached(all, BACK).await?;
        sleep(ALARMS).await;
        let after = self.client.status().await?;
        let rows = about_nodes(&since(&self.client, cursor, "node.").await?);
        let names = struck.iter().map(|seat| self.fleet.device_ids[*seat].clone());
        let verdict = judge(&rows, &self.ours, &names.collect::<BTreeSet<_>>());
        let more = self.fleet.board().attaches() - attaches;
        let columns = [
            &["fault", "replica", "struck"][..],
            &spread::COLUMNS[..],
            &[
                "entries",
                "shown_suspect",
                "shown_offline",
                "falsely_absent",
                "moved_without_need",
            ][..],
        ];
        let mut row = vec![json!(fault.name()), json!(victim), json!(struck.len())];
        row.extend(took.cells());
        row.push(json!(applied(&after).saturating_sub(applied(&before))));
        row.push(json!(verdict.rightly.len()));
        row.push(json!(verdict.offline.len()));
        row.push(json!(verdict.falsely.len()));
        row.push(json!(more.saturating_sub(struck.len() as u64)));
        self.report.row("faults", &columns.concat(), row);
        for (device, why) in verdict.falsely.iter().take(5) {
            self.report.note(format!(
                "{}: {device} was falsely shown as absent: {why}",
                fault.name()
            ));
        }
        if !self.cluster.pids().iter().any(|(id, _)| *id == victim) {
            self.cluster.start_replica(victim).await?;
        }
        self.cluster.settled(BACK).await?;
        Ok(verdict.falsely.len())
    }
}
