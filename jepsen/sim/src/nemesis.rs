//! Faults: which kinds a seed uses, when they strike, and whom.
//!
//! Each seed draws a subset of the kinds, so that some runs see one kind again and again and others see all of them
//! mixed. Never here: what a fault does, which belongs to the disk, the bus and the world.

use std::rc::Rc;
use std::time::Duration;

use palyra_platform as platform;
use palyra_storage::Fault;

use crate::breaks::Break;
use crate::chance;
use crate::change;
use crate::cluster::Cluster;

/// Longest stall of a disk, in virtual milliseconds; beyond the trust that a follower has in a silent leader.
const STALL_MS: u64 = 3_000;
/// Replacements of a replica in one run, at most: ids are small numbers.
const CHANGES: u64 = 3;

/// Places at which a replica can be made to die; `palyra_platform::io_point` names them.
const POINTS: [&str; 10] = [
    "log.write",
    "log.sync",
    "log.synced",
    "apply.write",
    "apply.answer",
    "snapshot.build",
    "snapshot.send",
    "snapshot.receive",
    "snapshot.flip",
    "snapshot.flipped",
];

/// Places that a replica passes while it catches up by a snapshot.
const INSTALL: [&str; 6] = [
    "snapshot.receive",
    "snapshot.flip",
    "snapshot.flipped",
    "log.write",
    "log.sync",
    "log.synced",
];

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Kill,
    Power,
    PowerAll,
    CrashSoon,
    CrashAt,
    Isolate,
    Skew,
    Snapshot,
    BreakDisk,
    StallDisk,
    HandOver,
    Replace,
    CatchUp,
}

const KINDS: [Kind; 13] = [
    Kind::Kill,
    Kind::Power,
    Kind::PowerAll,
    Kind::CrashSoon,
    Kind::CrashAt,
    Kind::Isolate,
    Kind::Skew,
    Kind::Snapshot,
    Kind::BreakDisk,
    Kind::StallDisk,
    Kind::HandOver,
    Kind::Replace,
    Kind::CatchUp,
];

/// Everything between birth and peace.
pub(crate) async fn strike(cluster: &Rc<Cluster>) {
    let kinds: Vec<Kind> = KINDS.into_iter().filter(|_| chance::percent(60)).collect();
    cluster.world.note(&format!("faults: {kinds:?}"));
    let mut changes = 0;
    for _ in 0..chance::between(8, 18) {
        platform::sleep(Duration::from_millis(chance::between(100, 1_000))).await;
        cluster.bury();
        if cluster.world.broken() == Some(Break::NoFaults) {
            continue;
        }
        // Whatever a seed uses, it heals as well, or little else would ever happen.
        if kinds.is_empty() || chance::percent(25) {
            cluster.world.note("heal");
            cluster.bus.heal(false);
            cluster.start_all().await;
            continue;
        }
        let kind = kinds[usize::try_from(chance::below(kinds.len() as u64)).unwrap_or(0)];
        if kind == Kind::Replace {
            if changes < CHANGES && !cluster.changing.replace(true) {
                changes += 1;
                tokio::task::spawn_local(change::replace(cluster.clone(), cluster.any_member()));
            }
            continue;
        }
        do_one(cluster, kind, cluster.any_member()).await;
    }
}

async fn do_one(cluster: &Rc<Cluster>, kind: Kind, victim: u64) {
    match kind {
        Kind::Kill => cluster.kill(victim, false),
        Kind::Power => cluster.kill(victim, true),
        Kind::PowerAll => {
            cluster.world.reach("power-all");
            cluster
                .members()
                .into_iter()
                .for_each(|id| cluster.kill(id, true));
        }
        Kind::CrashSoon => cluster
            .world
            .crash_at_io_point(victim, chance::between(1, 40), None),
        Kind::CrashAt => {
            let at = POINTS[usize::try_from(chance::below(POINTS.len() as u64)).unwrap_or(0)];
            cluster
                .world
                .crash_at_io_point(victim, chance::between(1, 3), Some(at));
        }
        Kind::Isolate => isolate(cluster, victim),
        Kind::Skew => skew(cluster, victim),
        Kind::Snapshot => snapshot(cluster, victim).await,
        Kind::BreakDisk => break_disk(cluster, victim),
        Kind::StallDisk => cluster.world.stall_disk(victim, chance::between(100, STALL_MS)),
        Kind::HandOver => hand_over(cluster, victim).await,
        Kind::CatchUp => catch_up(cluster, victim).await,
        Kind::Replace => {}
    }
}

/// Leaves a replica behind until only a snapshot helps, and lets it die while it takes that in.
async fn catch_up(cluster: &Rc<Cluster>, victim: u64) {
    cluster.kill(victim, chance::percent(50));
    platform::sleep(Duration::from_millis(chance::between(800, 2_500))).await;
    for id in cluster.members() {
        snapshot(cluster, id).await;
    }
    platform::sleep(Duration::from_millis(chance::between(50, 300))).await;
    let at = INSTALL[usize::try_from(chance::below(INSTALL.len() as u64)).unwrap_or(0)];
    cluster
        .world
        .crash_at_io_point(victim, chance::between(1, 2), Some(at));
    cluster.start(victim).await;
}

fn skew(cluster: &Cluster, victim: u64) {
    let ms = i64::try_from(chance::below(8_000)).unwrap_or(0) - 4_000;
    cluster.world.note(&format!("skew r{victim} {ms} ms"));
    cluster.world.reach("clock-skewed");
    cluster.world.skew(victim, ms);
}

/// Fails one operation of the victim's disk: it must end itself, and come back with what it had promised.
fn break_disk(cluster: &Cluster, victim: u64) {
    let faults = [
        Fault::WriteFails,
        Fault::WriteFindsNoSpace,
        Fault::SyncFails,
        Fault::SyncFindsNoSpace,
        Fault::ReadFindsCorruption,
    ];
    let fault = faults[usize::try_from(chance::below(faults.len() as u64)).unwrap_or(0)];
    cluster.world.note(&format!("disk of r{victim}: {fault:?}"));
    if let Some(disk) = cluster.disk(victim) {
        disk.inject(fault);
    }
}

/// Lets the victim hand leadership over, if it leads.
async fn hand_over(cluster: &Cluster, at: u64) {
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

/// Cuts a replica off, in one direction or in both.
fn isolate(cluster: &Cluster, victim: u64) {
    let (out, inward) = match chance::below(3) {
        0 => (true, false),
        1 => (false, true),
        _ => (true, true),
    };
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
