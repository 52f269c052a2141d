//! The faults at work: every strike of the plan at its moment, whom it hits and how.
//!
//! What a fault does belongs to the disk, the bus and the world; which kinds there are and when they strike, to
//! `faults`. Invariant: a strike takes its details from its own stream, never from the run's.

use std::rc::Rc;
use std::time::Duration;

use palyra_platform as platform;
use palyra_replica::Replica;
use palyra_storage::Fault;
use tokio::task::{JoinHandle, spawn_local};

use crate::chance::Stream;
use crate::change;
use crate::cluster::Cluster;
use crate::faults::{Kind, Strike};
use crate::world::Life;

/// Longest stall of a disk, in virtual milliseconds; beyond the trust that a follower has in a silent leader.
const STALL_MS: u64 = 3_000;
/// Replacements of a replica in one run, at most: ids are small numbers.
const CHANGES: u64 = 3;
/// How often it is looked whether the others have purged what a dead replica lacks.
const LEFT_BEHIND: u64 = 4;

/// Places at which a replica can be made to die; `palyra_platform::io_point` names them.
pub(crate) const POINTS: [&str; 22] = [
    "vote.save",
    "vote.saved",
    "log.truncate",
    "log.purge",
    "log.write",
    "log.sync",
    "log.synced",
    "apply.write",
    "apply.answer",
    "propose.append",
    "propose.appended",
    "propose.forward",
    "propose.forwarded",
    "read.index",
    "members.change",
    "members.changed",
    "snapshot.build",
    "snapshot.send",
    "snapshot.receive",
    "snapshot.received",
    "snapshot.flip",
    "snapshot.flipped",
];

/// Places that a replica passes while it catches up by a snapshot; the first four it passes only then.
static INSTALL: [&str; 7] = [
    "snapshot.receive",
    "snapshot.received",
    "snapshot.flip",
    "snapshot.flipped",
    "log.write",
    "log.sync",
    "log.synced",
];

/// Everything between birth and peace.
pub(crate) async fn strike(cluster: &Rc<Cluster>) {
    cluster.world.arm_points(cluster.setup.points);
    let begin = platform::now();
    let mut busy: Vec<JoinHandle<()>> = Vec::new();
    let mut changes = 0;
    for strike in cluster.setup.plan.strikes.clone() {
        platform::sleep_until(begin + Duration::from_millis(strike.at_ms)).await;
        cluster.bury();
        let Strike { kind, mut draw, .. } = strike;
        let Some(kind) = kind else {
            cluster.world.note("heal");
            cluster.relieve(false);
            busy.push(spawn_local(start_all(cluster.clone())));
            continue;
        };
        let members = cluster.members();
        let Some(victim) = draw.pick(&members).copied() else {
            continue;
        };
        if matches!(kind, Kind::Replace | Kind::RuinDisk) {
            let spare = kind == Kind::Replace || members.len() > 2;
            if changes < CHANGES && spare && !cluster.changing.replace(true) {
                changes += 1;
                if kind == Kind::RuinDisk {
                    ruin(cluster, victim);
                }
                cluster.world.struck(kind);
                spawn_local(change::replace(cluster.clone(), victim));
            }
            continue;
        }
        cluster.world.struck(kind);
        busy.push(spawn_local(do_one(cluster.clone(), kind, victim, draw)));
    }
    let end = begin + Duration::from_millis(cluster.setup.plan.end_ms);
    platform::sleep_until(end).await;
    for task in busy {
        if let Err(died) = task.await {
            cluster.problem(format!("a fault did not end: {died}"));
        }
    }
}

async fn start_all(cluster: Rc<Cluster>) {
    cluster.start_all().await;
}

async fn do_one(cluster: Rc<Cluster>, kind: Kind, victim: u64, mut draw: Stream) {
    let cluster = &cluster;
    match kind {
        Kind::Kill => cluster.kill(victim, false),
        Kind::Power => cluster.kill(victim, true),
        Kind::PowerAll => {
            cluster.world.reach("power-all");
            // Often while the disks are slow: what was said before it was written is lost everywhere.
            if draw.below(2) == 0 {
                let slow = draw.between(40, 200);
                let members = cluster.members().into_iter();
                members.for_each(|id| cluster.world.stall_disk(id, slow));
                // And often while they vote.
                if draw.percent(50)
                    && let Some((leader, _)) = cluster.leaders().first()
                {
                    spawn_local(hand_over(cluster.clone(), leader.replica()));
                }
                platform::sleep(Duration::from_millis(slow / 2)).await;
            }
            let members = cluster.members();
            members.into_iter().for_each(|id| cluster.kill(id, true));
        }
        Kind::CrashSoon => cluster.world.crash_at_io_point(victim, draw.between(1, 40), None),
        Kind::CrashAt => {
            let at = draw.pick(&POINTS).copied();
            cluster.world.crash_at_io_point(victim, draw.between(1, 3), at);
        }
        Kind::Isolate => isolate(cluster, victim, draw.below(3)),
        Kind::CutLink => cut_link(cluster, victim, &mut draw),
        Kind::IsolateLeader => isolate_leader(cluster, draw.below(3)),
        Kind::Halves | Kind::Bridge | Kind::Ring => split(cluster, kind, &mut draw),
        Kind::Swizzle => swizzle(cluster, &mut draw).await,
        Kind::Storm => {
            let (percent, ms) = (draw.between(5, 40), draw.between(300, 1_500));
            cluster.bus.storm(percent, Duration::from_millis(ms)).await;
        }
        Kind::Slow => {
            let (latency, ms) = (draw.between(30, 300), draw.between(300, 1_500));
            cluster.bus.slow(latency, Duration::from_millis(ms)).await;
        }
        Kind::LoseAnswers => {
            let (percent, ms) = (draw.between(10, 60), draw.between(300, 2_000));
            cluster.bus.lose_answers(percent, Duration::from_millis(ms)).await;
        }
        Kind::Skew => skew(cluster, victim, &mut draw),
        Kind::Snapshot => {
            if draw.percent(20) {
                let world = cluster.world;
                world.crash_at_io_point(victim, 1, Some("snapshot.build"));
            }
            snapshot(cluster, victim).await;
        }
        Kind::BreakDisk => break_disk(cluster, victim, &mut draw),
        Kind::FillDisk => fill_disk(cluster, victim, draw.between(200, 2_000)).await,
        Kind::StallDisk => cluster.world.stall_disk(victim, draw.between(100, STALL_MS)),
        Kind::HandOver => hand_over(cluster.clone(), victim).await,
        Kind::CatchUp => catch_up(cluster, victim, &mut draw).await,
        // Those two are the plan's own business; the rest goes on all the time.
        Kind::Replace | Kind::RuinDisk | Kind::Loss | Kind::Repeat | Kind::Points | Kind::Drift => {}
    }
}

/// Leaves a replica behind until only a snapshot helps, and lets it die while it takes that in.
async fn catch_up(cluster: &Rc<Cluster>, victim: u64, draw: &mut Stream) {
    let status = |(life, replica): &(Life, Replica)| Cluster::status(*life, replica);
    let last = cluster
        .replica(victim)
        .as_ref()
        .and_then(status)
        .map_or(0, |status| status.last_log);
    cluster.kill(victim, draw.percent(50));
    // Who starts everybody meanwhile would bring it back too early.
    cluster.hold(victim, true);
    let purged = |leader: &(Life, Replica)| {
        leader.0.replica() != victim && status(leader).is_some_and(|status| status.purged > last)
    };
    let mut places = &INSTALL[..];
    for _ in 0..LEFT_BEHIND {
        platform::sleep(Duration::from_millis(draw.between(300, 700))).await;
        for id in cluster.members() {
            snapshot(cluster, id).await;
        }
        if cluster.leaders().iter().any(purged) {
            cluster.world.reach("left-behind");
            places = &INSTALL[..4];
            break;
        }
    }
    platform::sleep(Duration::from_millis(draw.between(50, 300))).await;
    let at = draw.pick(places).copied();
    cluster.world.crash_at_io_point(victim, 1, at);
    cluster.hold(victim, false);
    cluster.start(victim).await;
}

fn skew(cluster: &Cluster, victim: u64, draw: &mut Stream) {
    // Mostly as clocks are that nobody disciplines; now and then far more, if less than what a join token lives.
    let most = if draw.percent(10) { 1_800_000 } else { 4_000 };
    let ms = i64::try_from(draw.below(2 * most)).unwrap_or(0) - i64::try_from(most).unwrap_or(0);
    cluster.world.note(&format!("skew r{victim} {ms} ms"));
    cluster.world.reach("clock-skewed");
    cluster.world.skew(victim, ms);
}

/// Fails one operation of the victim's disk: it must end itself, and come back with what it had promised.
fn break_disk(cluster: &Cluster, victim: u64, draw: &mut Stream) {
    let faults = [
        Fault::WriteFails,
        Fault::WriteFindsNoSpace,
        Fault::SyncFails,
        Fault::SyncFindsNoSpace,
        Fault::ReadFails,
        Fault::ReadFindsCorruption,
    ];
    let (Some(fault), Some(disk)) = (draw.pick(&faults), cluster.disk(victim)) else {
        return;
    };
    cluster.world.note(&format!("disk of r{victim}: {fault:?}"));
    disk.inject(*fault);
}

/// A disk without space: its replica ends, cannot be started, and is whole again when there is space.
async fn fill_disk(cluster: &Rc<Cluster>, victim: u64, ms: u64) {
    let Some(disk) = cluster.disk(victim) else { return };
    cluster.world.note(&format!("disk of r{victim} is full"));
    disk.fill(true);
    platform::sleep(Duration::from_millis(ms / 2)).await;
    cluster.start(victim).await;
    platform::sleep(Duration::from_millis(ms / 2)).await;
    cluster.world.note(&format!("disk of r{victim} has space"));
    disk.fill(false);
    cluster.start(victim).await;
    if cluster.replica(victim).is_some() {
        cluster.world.reach("space-came-back");
    }
}

/// Every block of a disk is damaged from now on: what it holds must never be served again, and only another replica
/// helps.
fn ruin(cluster: &Cluster, victim: u64) {
    cluster.world.note(&format!("disk of r{victim} is ruined"));
    cluster.world.reach("disk-ruined");
    if let Some(disk) = cluster.disk(victim) {
        disk.ruin();
    }
}

/// Lets the victim hand leadership over, if it leads.
async fn hand_over(cluster: Rc<Cluster>, at: u64) {
    let Some((life, replica)) = cluster.replica(at) else {
        return;
    };
    cluster.world.note(&format!("hand over r{at}"));
    let task = platform::scope_sync(life.tag(), || {
        platform::spawn(async move { replica.transfer_leader(None).await })
    });
    if matches!(task.await, Ok(Ok(()))) {
        cluster.world.reach("handed-over");
    }
}

/// Cuts a replica off, in one direction (0 out, 1 in) or in both.
fn isolate(cluster: &Cluster, victim: u64, how: u64) {
    let (out, inward) = (how != 1, how != 0);
    cluster
        .world
        .note(&format!("isolate r{victim} out={out} in={inward}"));
    for other in cluster.members().into_iter().filter(|other| *other != victim) {
        if out {
            cluster.bus.cut(victim, other);
        }
        if inward {
            cluster.bus.cut(other, victim);
        }
    }
}

fn isolate_leader(cluster: &Cluster, how: u64) {
    if let Some((life, _)) = cluster.leaders().first() {
        cluster.world.reach("leader-isolated");
        isolate(cluster, life.replica(), how);
    }
}

fn cut_link(cluster: &Cluster, from: u64, draw: &mut Stream) {
    let mut others = cluster.members();
    others.retain(|other| *other != from);
    if let Some(to) = draw.pick(&others) {
        cluster.world.note(&format!("cut r{from} -> r{to}"));
        cluster.bus.cut(from, *to);
    }
}

/// Cuts every link that a topology does not have.
fn split(cluster: &Cluster, kind: Kind, draw: &mut Stream) {
    let mut members = cluster.members();
    draw.shuffle(&mut members);
    let count = members.len();
    cluster.world.note(&format!("{} {members:?}", kind.name()));
    let sees = |a: usize, b: usize| match kind {
        Kind::Halves => (a < count / 2) == (b < count / 2),
        // The first of them is the one in the middle.
        Kind::Bridge => a == 0 || b == 0 || (a <= count / 2) == (b <= count / 2),
        _ => a.abs_diff(b) <= 1 || a.abs_diff(b) == count - 1,
    };
    for a in 0..count {
        for b in (0..count).filter(|b| *b != a && !sees(a, *b)) {
            cluster.bus.cut(members[a], members[b]);
        }
    }
}

/// Clogs replicas one by one, and unclogs them in another order.
async fn swizzle(cluster: &Rc<Cluster>, draw: &mut Stream) {
    let mut chosen = cluster.members();
    draw.shuffle(&mut chosen);
    chosen.truncate(usize::try_from(draw.between(1, chosen.len().max(1) as u64)).unwrap_or(1));
    cluster.world.note(&format!("swizzle {chosen:?}"));
    cluster.world.reach("swizzled");
    for id in &chosen {
        isolate(cluster, *id, 2);
        platform::sleep(Duration::from_millis(draw.between(30, 400))).await;
    }
    draw.shuffle(&mut chosen);
    for id in chosen {
        cluster.world.note(&format!("unclog r{id}"));
        cluster.bus.unclog(id);
        platform::sleep(Duration::from_millis(draw.between(30, 400))).await;
    }
}

async fn snapshot(cluster: &Cluster, at: u64) {
    let Some((life, replica)) = cluster.replica(at) else {
        return;
    };
    cluster.world.note(&format!("snapshot r{at}"));
    let task = platform::scope_sync(life.tag(), || {
        platform::spawn(async move { replica.trigger_snapshot().await })
    });
    drop(task.await);
}
