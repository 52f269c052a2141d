//! The configuration of a run: every seed draws its own, and says it in its trace.
//!
//! Swarm testing: a run in which everything happens a little finds less than many runs in each of which something
//! happens a lot. Never here: what happens when, see `faults`.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use palyra_replica::{Compaction, Timing};

use crate::case::Case;
use crate::chance::Stream;
use crate::faults::{Kind, Plan};

/// How the network is.
#[derive(Clone, Debug)]
pub(crate) struct Net {
    /// Longest usual time of a message, in virtual milliseconds.
    pub(crate) latency_ms: u64,
    /// Of a hundred messages, so many take forty times as long: they overtake nothing in their stream, but others do.
    pub(crate) late_percent: u64,
    /// Of a hundred messages, so many are lost.
    pub(crate) loss_percent: u64,
    /// Of a hundred calls, so many arrive twice.
    pub(crate) repeat_percent: u64,
}

/// The configuration of a run.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// Replicas at the cluster's birth.
    pub(crate) replicas: u64,
    pub(crate) timing: Timing,
    pub(crate) compaction: Compaction,
    pub(crate) net: Net,
    /// Longest usual time of a sync, in virtual milliseconds.
    pub(crate) sync_ms: u64,
    /// Named places in the code that wait or die now and then: the seed for which they are drawn.
    pub(crate) points: Option<u64>,
    /// How many parts in a thousand a replica's clocks and timers are too fast; negative: too slow.
    pub(crate) drift: BTreeMap<u64, i64>,
    pub(crate) plan: Plan,
}

/// Ids that replicas can have in one run.
pub(crate) const IDS: u64 = 15;

impl Setup {
    /// Draws it.
    pub(crate) fn draw(case: &Case) -> Setup {
        let plan = Plan::draw(case);
        let mut draw = Stream::new(case.seed, "setup");
        let replicas = *draw.pick(&[1, 3, 3, 3, 3, 3, 3, 3, 5, 5]).unwrap_or(&3);
        let election_min = draw.between(250, 600);
        let timing = Timing {
            heartbeat: Duration::from_millis(draw.between(60, 120)),
            election_min: Duration::from_millis(election_min),
            election_max: Duration::from_millis(election_min + draw.between(150, 500)),
            deadline: Duration::from_secs(4),
        };
        let compaction = Compaction {
            snapshot_every: draw.between(10, 200),
            keep: draw.between(0, 50),
            purge_batch: draw.between(1, 16),
        };
        let mut net = Net {
            latency_ms: *draw.pick(&[1, 2, 4, 8, 12]).unwrap_or(&4),
            late_percent: draw.below(4),
            loss_percent: draw.between(1, 3),
            repeat_percent: draw.between(1, 5),
        };
        if !plan.uses(Kind::Loss) {
            net.loss_percent = 0;
        }
        if !plan.uses(Kind::Repeat) {
            net.repeat_percent = 0;
        }
        let sync_ms = draw.between(1, 8);
        let points = plan.uses(Kind::Points).then_some(case.seed);
        // Far beyond any real crystal: what holds only while clocks agree must not be a matter of safety.
        let most = *draw.pick(&[1, 10, 50]).unwrap_or(&1);
        let mut drift = BTreeMap::new();
        for id in 1..=IDS {
            let parts = i64::try_from(draw.between(0, 2 * most)).unwrap_or(0) - most.cast_signed();
            if plan.uses(Kind::Drift) {
                drift.insert(id, parts);
            }
        }
        Setup {
            replicas,
            timing,
            compaction,
            net,
            sync_ms,
            points,
            drift,
            plan,
        }
    }
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (timing, net) = (&self.timing, &self.net);
        write!(
            f,
            "replicas {}, heartbeat {:?}, election {:?}..{:?}, snapshot every {} keeping {}, purged by {}, ",
            self.replicas,
            timing.heartbeat,
            timing.election_min,
            timing.election_max,
            self.compaction.snapshot_every,
            self.compaction.keep,
            self.compaction.purge_batch,
        )?;
        write!(
            f,
            "latency {} ms, late {} %, lost {} %, repeated {} %, sync {} ms, drift {:?}; {}",
            net.latency_ms,
            net.late_percent,
            net.loss_percent,
            net.repeat_percent,
            self.sync_ms,
            self.drift.values().take(5).collect::<Vec<_>>(),
            self.plan
        )
    }
}
