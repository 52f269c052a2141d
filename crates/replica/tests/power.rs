//! Crashes at every step that touches the disk, and power losses: nothing acknowledged is lost, nothing half
//! done stays, and replicas that hold the same index hold the same state.
#![allow(clippy::unwrap_used)]

mod kit;

use std::sync::Arc;
use std::time::Duration;

use kit::medium::{self, Medium};
use kit::{PATIENCE, World, death, forget_deaths, get, light_fuse, run, set, until};
use palyra_platform as platform;
use palyra_replica::{Compaction, ProposeError};

type NewDisk = fn(u64) -> Arc<dyn Medium>;

/// Writes the numbers up to `count` at replica `at`, as far as it lives; returns the last that was
/// acknowledged.
async fn write_until_death(world: &mut World, at: u64, count: u64) -> u64 {
    let mut acked = 0;
    for value in 1..=count {
        let envelope = world.envelope(set(value));
        let replica = world.replicas[&at].clone();
        let limit = Duration::from_secs(2);
        let proposal = async move { replica.propose_within(envelope, limit).await };
        match platform::scope_sync(at, || platform::spawn(proposal)).await {
            Ok(Ok(committed)) => {
                committed.reply.unwrap();
                acked = value;
            }
            Ok(Err(ProposeError::Unknown | ProposeError::Unavailable { .. })) | Err(_) => break,
            Ok(Err(error)) => panic!("{error}"),
        }
        if death(at).is_some() {
            break;
        }
    }
    acked
}

/// One replica that makes snapshots and purges all the time, and dies at its `fuse`-th IO point.
async fn lonely_life(fuse: u64, power: bool, new_disk: NewDisk) -> bool {
    let mut world = World::new();
    world.new_disk = new_disk;
    world.compaction = Compaction {
        snapshot_every: 7,
        keep: 2,
        purge_batch: 1,
    };
    world.birth(1).await;
    let index = world.set(1, 0).await;
    assert!(world.replicas[&1].wait_applied(index, PATIENCE).await);
    light_fuse(1, fuse);
    let acked = write_until_death(&mut world, 1, 30).await;
    let died = death(1).is_some();
    forget_deaths();
    if power {
        world.power_loss(1, 0)
    } else {
        world.kill(1)
    }
    world.boot(1).await;
    let after = world.set(1, 1_000).await;
    world.replicas[&1].read_barrier().await.unwrap();
    assert_eq!(get(&world.replicas[&1].view()), 1_000);
    let rows = palyra_state::journal::last_rows(&world.replicas[&1].view(), usize::MAX);
    let seen = rows
        .iter()
        .filter(|row| row.action == "cluster.replica_moved")
        .count() as u64;
    assert!(
        seen > acked,
        "fuse {fuse}: {acked} writes were acknowledged, {seen} rows are there"
    );
    palyra_state::journal::verify_all(&world.replicas[&1].view()).unwrap();
    assert!(after > acked);
    died
}

fn at_every_step(power: bool, new_disk: NewDisk) {
    let mut fuse = 1;
    loop {
        let mut died = true;
        run(fuse, || async { died = lonely_life(fuse, power, new_disk).await });
        if !died {
            break;
        }
        fuse += 1;
    }
    assert!(fuse > 60, "only {fuse} steps were tried");
}

#[test]
fn one_replica_can_die_at_every_step() {
    at_every_step(false, medium::in_memory);
}

#[test]
fn one_replica_can_lose_its_power_at_every_step() {
    at_every_step(true, medium::in_memory);
}

#[test]
fn one_replica_on_a_real_disk_can_die_at_every_step() {
    at_every_step(false, medium::on_disk);
}

#[test]
fn one_replica_on_a_real_disk_can_lose_its_power_at_every_step() {
    at_every_step(true, medium::on_disk);
}

#[test]
fn three_replicas_lose_power_at_once_and_nothing_acknowledged() {
    for seed in 0..40 {
        run(seed, || async move {
            let mut world = World::born(3).await;
            let mut last = 0;
            for value in 1..=seed + 3 {
                last = world.set(value % 3 + 1, value).await;
            }
            // Between the acknowledgement and this line nothing more was synced.
            for id in 1..=3 {
                let keep = platform::random_below(world.disks[&id].unsynced() as u64 + 1) as usize;
                world.power_loss(id, keep);
            }
            for id in 1..=3 {
                world.boot(id).await;
            }
            let index = world.replicas[&2].read_barrier().await.unwrap();
            assert!(index >= last);
            assert_eq!(get(&world.replicas[&2].view()), seed + 3, "seed {seed}");
            world.converged(index).await;
        });
    }
}

#[test]
fn a_disk_that_lies_is_what_these_tests_can_see() {
    run(60, || async {
        let mut world = World::born(3).await;
        let index = world.set(1, 1).await;
        world.converged(index).await;
        for disk in world.disks.values() {
            disk.lie_about_sync(true);
        }
        world.set(1, 2).await;
        for id in 1..=3 {
            world.disks[&id].lie_about_sync(false);
            world.power_loss(id, 0);
        }
        for id in 1..=3 {
            world.boot(id).await;
        }
        world.replicas[&1].read_barrier().await.unwrap();
        assert_eq!(
            get(&world.replicas[&1].view()),
            1,
            "an acknowledged write survived a disk that never synced it"
        );
    });
}

/// A follower that dies at its `fuse`-th IO point while a snapshot is sent to it.
async fn installing(fuse: u64, power: bool) -> bool {
    let mut world = World::new();
    world.compaction = Compaction {
        snapshot_every: 20,
        keep: 2,
        purge_batch: 1,
    };
    world.birth(3).await;
    let follower = if world.leader().await == 3 { 2 } else { 3 };
    let index = world.set(1, 1).await;
    world.converged(index).await;
    world.kill(follower);
    let mut index = 0;
    for value in 2..=60 {
        index = world.set(world.leader().await, value).await;
    }
    until(&world.replicas[&world.leader().await], |status| {
        status.purged > 30
    })
    .await;
    light_fuse(follower, fuse);
    world.try_boot(follower).await.unwrap();
    let replica = world.replicas[&follower].clone();
    let caught_up = async {
        while death(follower).is_none() && !replica.wait_applied(index, Duration::from_millis(50)).await {}
    };
    platform::timeout(PATIENCE, caught_up)
        .await
        .expect("it dies or it catches up");
    drop(replica);
    let died = death(follower).is_some();
    forget_deaths();
    if power {
        world.power_loss(follower, 0)
    } else {
        world.kill(follower)
    }
    // What is there now is the old state or the new one: a replica that could not tell would differ, or not
    // open.
    world.boot(follower).await;
    let index = world.set(follower, 61).await;
    world.converged(index).await;
    assert!(world.bus.snapshots() > 0);
    palyra_state::journal::verify_all(&world.replicas[&follower].view()).unwrap();
    died
}

#[test]
fn a_follower_can_die_at_every_step_of_an_installation() {
    for power in [false, true] {
        let mut fuse = 1;
        loop {
            let mut died = true;
            run(fuse, || async { died = installing(fuse, power).await });
            if !died {
                break;
            }
            fuse += 1;
        }
        assert!(fuse > 8, "only {fuse} steps were tried");
    }
}

#[test]
fn a_disk_that_fails_ends_the_replica_and_not_the_cluster() {
    use palyra_storage::Fault;
    for fault in [
        Fault::SyncFails,
        Fault::WriteFails,
        Fault::WriteFindsNoSpace,
        Fault::SyncFindsNoSpace,
    ] {
        run(50, || async {
            forget_deaths();
            let mut world = World::born(3).await;
            world.set(1, 1).await;
            let victim = world.leader().await;
            world.disks[&victim].inject(fault);
            let other = world.replicas.keys().copied().find(|id| *id != victim).unwrap();
            world.set(other, 2).await;
            let why = death(victim).expect("it must not go on with a disk that failed");
            assert!(why.contains("cannot be"), "{why}");
            forget_deaths();
            world.kill(victim);
            world.boot(victim).await;
            let index = world.set(victim, 3).await;
            world.converged(index).await;
        });
    }
}
