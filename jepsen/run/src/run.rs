//! A run: what workloads and nemeses are given to work with.
//!
//! Never here: the order in which things happen (`conduct`) and what is made of it (`judge`).

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::abilities::Abilities;
use crate::chance::Chance;
use crate::cluster::{Cluster, Leaders};
use crate::machines::Machines;
use crate::net::Net;
use crate::record::Record;
use crate::target::Target;

/// What a run was asked to be. Stored with it, so that it can be judged and done again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// The workload.
    pub workload: String,
    /// Names of nemeses, as asked for.
    pub nemeses: Vec<String>,
    /// How long clients work, faults and the quiet before and after included.
    pub time: Duration,
    /// Decides generators and plan.
    pub seed: u64,
    /// Replicas at the beginning.
    pub replicas: u64,
    /// Operations a second, of all clients.
    pub rate: u64,
    /// Clients.
    pub concurrency: u64,
    /// From one fault to the next, about.
    pub interval: Duration,
    /// Whom faults strike, when it is not the nemesis's choice.
    pub target: Option<String>,
    /// Network: `auto`, `bridge`, `tap`.
    pub fabric: String,
    /// Whether each replica's clock since boot starts at another time.
    #[serde(default)]
    pub boot_offsets: bool,
    /// Data folders: `auto`, `tmpfs`, `faultfs`, `dir`.
    pub disk: String,
    /// Folder of the binaries.
    pub binary: Option<PathBuf>,
    /// Folder of the binaries of an earlier release.
    pub old_binary: Option<PathBuf>,
    /// A plan to apply instead of drawing one.
    pub plan: Option<PathBuf>,
    /// Data folders are kept: `fail` or `always`.
    pub keep: String,
}

impl Settings {
    /// How long it is quiet before faults begin, and again after they ended.
    #[must_use]
    pub fn quiet(&self) -> Duration {
        (self.time / 6)
            .clamp(Duration::from_secs(2), Duration::from_secs(10))
            .min(self.time / 3)
    }

    /// How long there are faults.
    #[must_use]
    pub fn window(&self) -> Duration {
        self.time.saturating_sub(2 * self.quiet())
    }

    /// Whom faults strike.
    #[must_use]
    pub fn target(&self) -> Option<Target> {
        self.target.as_ref().and_then(|text| text.parse().ok())
    }
}

/// What is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The workload prepares; nothing of it is in the history.
    Prepare,
    /// Clients work, and nothing is harmed.
    Before,
    /// Faults.
    Faults,
    /// Faults have ended; clients go on.
    After,
    /// Clients have ended. Everything is started and made whole; last reads.
    Final,
    /// It is over.
    Over,
}

/// Everything about a run. Shared by clients, nemeses and watchers.
pub struct Run {
    /// What it was asked to be.
    pub settings: Settings,
    /// The replicas.
    pub cluster: Arc<Cluster>,
    /// The network.
    pub net: Net,
    /// The history.
    pub record: Record,
    /// Who leads.
    pub leaders: Leaders,
    /// What this machine can do.
    pub abilities: Abilities,
    /// Machines of the fleet: how many.
    pub host_count: u64,
    /// Their agents, of those that are real.
    pub machines: Machines,
    /// Cancelled when the run is to be broken off.
    pub stop: CancellationToken,
    /// The journal's last reads are put off: a workload of many parts reads it once, after all of them.
    pub journal_held: AtomicBool,
    /// Held by whoever changes who is a member, and by whoever has ruined files of one: each alone leaves a quorum.
    pub membership: Arc<tokio::sync::Mutex<()>>,
    phase: watch::Sender<Phase>,
}

/// What a [`Run`] is made of.
pub struct Ingredients {
    /// See [`Run::settings`].
    pub settings: Settings,
    /// See [`Run::cluster`].
    pub cluster: Arc<Cluster>,
    /// See [`Run::net`].
    pub net: Net,
    /// See [`Run::record`].
    pub record: Record,
    /// See [`Run::abilities`].
    pub abilities: Abilities,
    /// See [`Run::host_count`].
    pub host_count: u64,
    /// See [`Run::stop`].
    pub stop: CancellationToken,
}

impl Run {
    /// One that prepares.
    #[must_use]
    pub fn new(parts: Ingredients) -> Run {
        Run {
            settings: parts.settings,
            cluster: parts.cluster,
            net: parts.net,
            record: parts.record,
            leaders: Leaders::default(),
            abilities: parts.abilities,
            host_count: parts.host_count,
            machines: Machines::default(),
            stop: parts.stop,
            journal_held: AtomicBool::new(false),
            membership: Arc::default(),
            phase: watch::Sender::new(Phase::Prepare),
        }
    }

    /// What is going on.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Whether clients are to work: their loops go on while this is so.
    #[must_use]
    pub fn is_loading(&self) -> bool {
        (Phase::Before..=Phase::After).contains(&self.phase()) && !self.stop.is_cancelled()
    }

    /// Returns when clients are to end. For a client that waits for something: `select!` with this.
    pub async fn load_ended(&self) {
        let mut phase = self.phase.subscribe();
        tokio::select! {
            _ = phase.wait_for(|phase| *phase > Phase::After) => {},
            () = self.stop.cancelled() => {},
        }
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
        self.record.fault("phase", serde_json::json!({"phase": phase}));
    }

    /// A client's own chance.
    #[must_use]
    pub fn chance(&self, name: &str) -> Chance {
        Chance::named(self.settings.seed, name)
    }

    /// Waits before a client's next operation, so that all of them together come to the rate; less than asked for
    /// when they are slow. `share` of the clients' rate is this client's: `1.0` when all do the same.
    pub async fn pace(&self, chance: &mut Chance) {
        let mean_us = 1_000_000 * self.settings.concurrency.max(1) / self.settings.rate.max(1);
        let pause = Duration::from_micros(chance.between(0, 2 * mean_us));
        tokio::select! {
            () = tokio::time::sleep(pause) => {},
            () = self.load_ended() => {},
        }
    }

    /// A replica for a client's next operation: mostly the one that it was at, any one of the members otherwise.
    #[must_use]
    pub fn pick(&self, chance: &mut Chance, last: Option<u64>) -> u64 {
        let members = self.cluster.replicas();
        match last {
            Some(id) if members.contains(&id) && !chance.percent(10) => id,
            _ if members.is_empty() => 1,
            _ => *chance.one(&members),
        }
    }

    /// Numbers of the machines of the fleet.
    #[must_use]
    pub fn hosts(&self) -> Vec<u64> {
        (1..=self.host_count).collect()
    }
}

#[cfg(test)]
pub(crate) fn settings_for_tests() -> Settings {
    Settings {
        workload: "registry".to_owned(),
        nemeses: vec!["kill".to_owned()],
        time: Duration::from_secs(60),
        seed: 1,
        replicas: 3,
        rate: 100,
        concurrency: 6,
        interval: Duration::from_secs(5),
        target: None,
        fabric: "auto".to_owned(),
        boot_offsets: false,
        disk: "auto".to_owned(),
        binary: None,
        old_binary: None,
        plan: None,
        keep: "fail".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_any_length_has_quiet_and_faults() {
        for seconds in [1, 6, 15, 60, 1_800] {
            let mut settings = settings_for_tests();
            settings.time = Duration::from_secs(seconds);
            let (quiet, window) = (settings.quiet(), settings.window());
            assert!(
                !quiet.is_zero() && window >= quiet,
                "{seconds}: {quiet:?} {window:?}"
            );
            assert_eq!(2 * quiet + window, settings.time);
        }
    }
}
