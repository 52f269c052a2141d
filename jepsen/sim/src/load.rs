//! What clients do in a run: each workload alone, or a mix that the seed draws; and how patient replicas are with
//! them.
//!
//! Never here: how they do it. Invariant: what a workload is there for runs in each of its seeds; a mix always has the
//! registry, by which the end of a run sees that the cluster serves.

use std::time::Duration;

use palyra_control::Timings;

use crate::chance;

/// A workload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Workload {
    /// Registers in nodes' labels, written and read at all replicas
    Registry,
    /// Machines that race for codes and approvals
    Pairing,
    /// Devices that are revoked while they talk, and their certificates shown to all replicas all the time
    Revocation,
    /// Workers that hold leases for runs, by clocks of their own
    Lease,
    /// Nodes that move between replicas with the work that they were given
    Dispatch,
    /// Commands of all domains, and what the journal has of each
    Journal,
    /// Watchers of the journal: at one replica, moving, slow, new
    Watch,
    /// Registers while replicas are replaced one after another
    Membership,
    /// Registers at a fixed rate, and how long nobody is served
    Failover,
    /// Some of all of it, drawn by the seed
    #[default]
    Mix,
}

/// Who takes part in a run, and how many of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    /// Clients of the registers, each with one operation at a time.
    pub(crate) clients: u64,
    /// Those that send at a fixed rate, whatever is answered.
    pub(crate) steady: u64,
    /// Nodes that work.
    pub(crate) nodes: usize,
    /// Doors at which machines pair, are used and revoked.
    pub(crate) doors: usize,
    /// Whether certificates are shown all the time.
    pub(crate) probes: usize,
    /// Workers that hold leases.
    pub(crate) workers: usize,
    /// Watchers of the journal that move between replicas, and that stay where they are.
    pub(crate) roaming: usize,
    pub(crate) settled: usize,
    /// Readers of the journal's pages and heads.
    pub(crate) readers: usize,
    /// Whether replicas are replaced all the time.
    pub(crate) replaced: bool,
}

impl Workload {
    /// As the command line has it.
    pub(crate) fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// Draws who takes part.
    pub(crate) fn draw(self) -> Load {
        let calm = Load {
            clients: 2,
            ..Load::default()
        };
        match self {
            Workload::Registry => Load { clients: 6, ..calm },
            Workload::Pairing => Load { doors: 3, ..calm },
            Workload::Revocation => Load {
                doors: 2,
                probes: 3,
                ..calm
            },
            Workload::Lease => Load {
                workers: 3,
                clients: 1,
                ..calm
            },
            Workload::Dispatch => Load { nodes: 4, ..calm },
            Workload::Journal => Load {
                clients: 3,
                nodes: 2,
                doors: 1,
                roaming: 2,
                readers: 2,
                ..calm
            },
            Workload::Watch => Load {
                clients: 4,
                roaming: 4,
                settled: 2,
                ..calm
            },
            Workload::Membership => Load {
                clients: 4,
                replaced: true,
                ..calm
            },
            Workload::Failover => Load {
                steady: 3,
                clients: 1,
                ..calm
            },
            Workload::Mix => mix(),
        }
    }
}

/// Durations of the control planes, drawn once for all of them: short ones, for a run takes seconds.
pub(crate) fn timings() -> Timings {
    let heartbeat = chance::between(200, 600);
    Timings {
        heartbeat_interval: Duration::from_millis(heartbeat),
        heartbeat_timeout: Duration::from_millis(2 * heartbeat + chance::between(200, 1_500)),
        max_staleness: Duration::from_millis(chance::between(1_000, 2_500)),
        replica_lost_after: Duration::from_millis(chance::between(1_000, 3_000)),
        call_timeout: Duration::from_millis(chance::between(1_500, 4_000)),
        stall_timeout: Duration::from_secs(5),
        suspect_for: Duration::from_millis(chance::between(150, 1_000)),
        lost_after: Some(Duration::from_millis(chance::between(400, 2_000))),
        attach_wait: Duration::from_secs(3),
        ..Timings::default()
    }
}

/// Each part of it in most seeds, and all of them in some.
fn mix() -> Load {
    let some = |percent, most: u64| {
        let number = if chance::percent(percent) {
            chance::between(1, most)
        } else {
            0
        };
        usize::try_from(number).unwrap_or(0)
    };
    let doors = some(70, 1);
    Load {
        clients: chance::between(2, 4),
        steady: 0,
        nodes: some(80, 2),
        doors,
        probes: doors.min(some(80, 1)),
        workers: some(60, 2),
        roaming: some(70, 2),
        settled: some(30, 1),
        readers: some(40, 1),
        replaced: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum as _;

    #[test]
    fn each_workload_has_what_it_is_there_for_and_registers_at_the_end() {
        for workload in Workload::value_variants() {
            let load = workload.draw();
            assert!(load.clients > 0, "{workload:?}");
            assert_eq!(
                Workload::from_str(&workload.name(), false),
                Ok(*workload),
                "its name is that of the command line"
            );
            match workload {
                Workload::Pairing => assert!(load.doors > 1),
                Workload::Revocation => assert!(load.doors > 0 && load.probes > 0),
                Workload::Lease => assert!(load.workers > 1),
                Workload::Dispatch => assert!(load.nodes > 1),
                Workload::Watch => assert!(load.roaming > 1),
                Workload::Journal => assert!(load.roaming > 1 && load.readers > 0),
                Workload::Membership => assert!(load.replaced),
                Workload::Failover => assert!(load.steady > 0),
                Workload::Registry | Workload::Mix => {}
            }
        }
    }
}
