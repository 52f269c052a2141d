//! Three replicas on a bus: elections, forwarding, reads, the feed, membership, snapshots, freshness.
#![allow(clippy::unwrap_used)]

mod kit;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use kit::{PATIENCE, World, death, get, run, set, until};
use palyra_platform as platform;
use palyra_replica::{
    Compaction, FeedItem, MemberError, OpenError, PeerError, PeerHandler, ProposeError, ReadError, Refusal,
    Role,
};
use palyra_state::{Actor, Code, Cursor, Envelope, cluster};

#[test]
fn any_replica_takes_commands_and_serves_reads() {
    run(1, || async {
        let mut world = World::born(3).await;
        for value in 1..=30 {
            let at = value % 3 + 1;
            let index = world.set(at, value).await;
            let reader = &world.replicas[&((value + 1) % 3 + 1)];
            assert!(reader.read_barrier().await.unwrap() >= index);
            assert_eq!(get(&reader.view()), value);
        }
        let last = world.set(2, 77).await;
        world.converged(last).await;
        assert_eq!(world.replicas[&3].status().members.voters, [1, 2, 3].into());
    });
}

#[test]
fn commands_of_many_callers_at_once_are_each_answered_whatever_the_leader_knows() {
    run(31, || async {
        let mut world = World::born(3).await;
        let leader = world.leader().await;
        let other = world.replicas.keys().copied().find(|id| *id != leader).unwrap();
        for old in [false, true] {
            if old {
                world.bus.make_old(leader);
                // The stream that is open stays so; another replica has none yet.
            }
            let from = if old { 6 - leader - other } else { other };
            let commands: Vec<Envelope> = (1..=700).map(|value| world.envelope(set(value))).collect();
            let replica = world.replicas[&from].clone();
            let answers = commands.into_iter().map(|envelope| {
                let replica = replica.clone();
                async move { replica.propose(envelope).await.unwrap() }
            });
            let answers = futures::future::join_all(answers).await;
            let indexes: std::collections::BTreeSet<u64> = answers.iter().map(|one| one.index).collect();
            assert_eq!(indexes.len(), 700, "each has an entry of its own");
            assert!(answers.iter().all(|one| one.reply.is_ok() && !one.duplicate));
            world.converged(*indexes.last().unwrap()).await;
        }
    });
}

#[test]
fn a_retry_is_answered_and_not_applied_again() {
    run(2, || async {
        let mut world = World::born(3).await;
        let envelope = world.envelope(set(5));
        let first = world.replicas[&2].propose(envelope.clone()).await.unwrap();
        let rows = palyra_state::meta(&world.replicas[&2].view()).journal_rows;
        let again = world.replicas[&3].propose(envelope).await.unwrap();
        assert_eq!(first.reply, again.reply);
        assert!(again.index > first.index);
        assert!(!first.duplicate && again.duplicate, "who asks again is told so");
        assert_eq!(palyra_state::meta(&world.replicas[&3].view()).journal_rows, rows);
        // A refusal is an answer, too.
        let envelope = Envelope::new(world.request(), Actor::System, cluster::MintJoinToken::default());
        let refused = world.replicas[&2].propose(envelope).await.unwrap();
        assert_eq!(refused.reply.unwrap_err().kind(), Code::NotAllowed);
    });
}

#[test]
fn the_cluster_survives_its_leader_within_the_promised_time() {
    let mut worst = Duration::ZERO;
    for seed in 10..20 {
        run(seed, || async {
            let mut world = World::born(3).await;
            world.set(1, 1).await;
            let leader = world.leader().await;
            let survivor = world.replicas.keys().copied().find(|id| *id != leader).unwrap();
            world.kill(leader);
            let died = platform::now();
            let index = world.set(survivor, 2).await;
            worst = worst.max(platform::now() - died);
            world.boot(leader).await;
            world.converged(index).await;
            assert_eq!(get(&world.replicas[&leader].view()), 2);
        });
    }
    assert!(
        worst <= Duration::from_millis(2_500),
        "the next write took {worst:?}"
    );
}

#[test]
fn an_isolated_leader_answers_neither_writes_nor_reads() {
    run(3, || async {
        let mut world = World::born(3).await;
        world.set(1, 1).await;
        let old = world.leader().await;
        world.bus.isolate(old);
        let lonely = world.replicas[&old].clone();
        let write = world.envelope(set(666));
        let patience = Duration::from_secs(3);
        let error = lonely.propose_within(write, patience).await.unwrap_err();
        assert!(
            matches!(error, ProposeError::Unknown | ProposeError::Unavailable { .. }),
            "{error:?}"
        );
        let read = lonely.read_barrier_within(patience).await.unwrap_err();
        assert!(matches!(read, ReadError::Unavailable { .. }));
        let other = world.replicas.keys().copied().find(|id| *id != old).unwrap();
        let index = world.set(other, 2).await;
        assert!(
            lonely.quorum_age().unwrap() > Duration::from_secs(2),
            "{:?}",
            lonely.quorum_age()
        );
        world.bus.heal();
        world.converged(index).await;
        let now = lonely.read_barrier().await.unwrap();
        assert!(now >= index);
        assert_eq!(get(&lonely.view()), 2);
        until(&lonely, |status| {
            status
                .quorum_age
                .is_some_and(|age| age < Duration::from_millis(500))
        })
        .await;
    });
}

#[test]
fn freshness_is_known_everywhere_and_ages_with_the_silence() {
    run(4, || async {
        let mut world = World::born(3).await;
        world.set(1, 1).await;
        for replica in world.replicas.values() {
            until(replica, |status| {
                status
                    .quorum_age
                    .is_some_and(|age| age < Duration::from_millis(400))
            })
            .await;
        }
        let leader = world.leader().await;
        let follower = world.replicas.keys().copied().find(|id| *id != leader).unwrap();
        world.bus.isolate(follower);
        let cut = platform::now();
        platform::sleep(Duration::from_secs(4)).await;
        let age = world.replicas[&follower].quorum_age().unwrap();
        assert!(age >= platform::now() - cut, "{age:?} is younger than the cut");
        let others = world.replicas.iter().filter(|(id, _)| **id != follower);
        for (_, replica) in others {
            assert!(replica.quorum_age().unwrap() < Duration::from_millis(400));
        }
    });
}

#[test]
fn the_feed_is_the_same_everywhere_and_misses_nothing() {
    run(5, || async {
        let mut world = World::born(3).await;
        let mut feeds: Vec<_> = world
            .replicas
            .values()
            .map(|replica| replica.feed(Cursor::default()))
            .collect();
        let mut last = 0;
        for value in 1..=20 {
            last = world.set(value % 3 + 1, value).await;
        }
        let mut seen = Vec::new();
        for feed in &mut feeds {
            let mut rows = Vec::new();
            while feed.cursor().index < last {
                match platform::timeout(PATIENCE, feed.next()).await.unwrap().unwrap() {
                    FeedItem::Rows(more) => rows.extend(more),
                    FeedItem::Gap { first } => panic!("a gap before {first:?}"),
                }
            }
            assert!(rows.windows(2).all(|pair| pair[0].cursor() < pair[1].cursor()));
            seen.push(rows);
        }
        assert!(seen[0].len() >= 20);
        assert_eq!(seen[0], seen[1]);
        assert_eq!(seen[0], seen[2]);
    });
}

#[test]
fn a_replica_that_is_far_behind_gets_a_snapshot() {
    run(6, || async {
        let mut world = World::new();
        world.compaction = Compaction {
            snapshot_every: 30,
            keep: 5,
            purge_batch: 1,
        };
        world.birth(3).await;
        let follower = 3;
        if world.leader().await == follower {
            world.replicas[&follower].transfer_leader(None).await.unwrap();
        }
        world.kill(follower);
        let mut index = 0;
        for value in 1..=100 {
            index = world.set(1, value).await;
        }
        until(&world.replicas[&world.leader().await], |status| {
            status.purged > 20
        })
        .await;
        let before = world.bus.snapshots();
        world.boot(follower).await;
        world.converged(index).await;
        assert!(world.bus.snapshots() > before, "it caught up without a snapshot");
        assert_eq!(get(&world.replicas[&follower].view()), 100);
        // What a snapshot brought survives a power loss, and the log goes on behind it.
        let index = world.set(follower, 101).await;
        world.converged(index).await;
        world.power_loss(follower, 0);
        world.boot(follower).await;
        world.converged(index).await;
    });
}

#[test]
fn a_log_of_large_commands_stays_within_its_bytes() {
    run(23, || async {
        let mut world = World::new();
        world.log_bytes = 12 * 1024 * 1024;
        world.birth(1).await;
        let large = cluster::MintJoinToken {
            secret_key_sealed: Bytes::from(vec![7; 900_000]),
            ..cluster::MintJoinToken::default()
        };
        for _ in 0..40 {
            let envelope = world.envelope(large.clone());
            // It is refused; the entry is in the log all the same.
            world.replicas[&1]
                .propose(envelope)
                .await
                .unwrap()
                .reply
                .unwrap_err();
        }
        until(&world.replicas[&1], |status| status.purged > 20).await;
    });
}

#[test]
fn members_come_as_learners_and_go_for_good() {
    run(7, || async {
        let mut world = World::born(3).await;
        world.boot(4).await;
        world.enlarge(4).await;
        let leader = world.replicas[&world.leader().await].clone();
        until(&leader, |status| {
            status.members.voters == [1, 2, 3, 4].into() && !status.members.joint
        })
        .await;
        assert!(matches!(leader.promote(9).await, Err(MemberError::Impossible(_))));
        assert!(matches!(
            leader.remove(leader.id()).await,
            Err(MemberError::Impossible(_))
        ));
        let follower = world.replicas.values().find(|replica| !replica.leads()).unwrap();
        assert!(matches!(
            follower.add_learner(5).await,
            Err(MemberError::NotLeader { .. })
        ));
        let gone = follower.id();
        leader.remove(gone).await.unwrap();
        until(&leader, |status| {
            !status.members.voters.contains(&gone) && !status.members.joint
        })
        .await;
        assert!(!leader.status().members.learners.contains(&gone));
        world.kill(gone);
        let index = world.set(leader.id(), 3).await;
        world.converged(index).await;
        assert!(!leader.flatten_membership().await.unwrap());
    });
}

#[test]
fn leadership_is_handed_over_without_waiting_for_a_timeout() {
    run(8, || async {
        let mut world = World::born(3).await;
        world.set(1, 1).await;
        let old = world.leader().await;
        let to = world.replicas.keys().copied().find(|id| *id != old).unwrap();
        let start = platform::now();
        world.replicas[&old].transfer_leader(Some(to)).await.unwrap();
        until(&world.replicas[&to], |status| status.role == Role::Leader).await;
        assert!(
            platform::now() - start < Duration::from_millis(400),
            "{:?}",
            platform::now() - start
        );
        let index = world.set(old, 2).await;
        world.converged(index).await;
        // A replica that stops in good order leaves a leader behind.
        let stopping = world.leader().await;
        world.replicas[&stopping].shutdown().await;
        world.kill(stopping);
        let start = platform::now();
        let rest = *world.replicas.keys().next().unwrap();
        world.set(rest, 3).await;
        assert!(
            platform::now() - start < Duration::from_millis(400),
            "{:?}",
            platform::now() - start
        );
        assert_eq!(death(stopping), None);
    });
}

#[test]
fn a_folder_of_somebody_else_is_refused() {
    run(9, || async {
        let mut world = World::born(1).await;
        world.kill(1);
        let disk = world.disks[&1].clone();
        world.disks.insert(2, disk);
        let error = world.try_boot(2).await.unwrap_err();
        assert!(matches!(error, OpenError::NotOurs { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains("replica 1 of cluster") && text.contains("replica 2 of cluster"),
            "{text}"
        );
    });
}

struct Echo;

impl PeerHandler for Echo {
    fn handle(&self, from: u64, topic: String, body: Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        Box::pin(async move {
            Ok(Bytes::from(format!(
                "{from} {topic} {}",
                String::from_utf8_lossy(&body)
            )))
        })
    }
}

#[test]
fn the_layer_above_can_call_its_like() {
    run(21, || async {
        let world = World::born(2).await;
        let limit = Duration::from_secs(1);
        let one = &world.replicas[&1];
        let none = one.call_peer(2, "echo", Bytes::new(), limit).await.unwrap_err();
        assert!(
            matches!(
                none,
                PeerError::Refused {
                    refusal: Refusal::Unsupported,
                    ..
                }
            ),
            "{none:?}"
        );
        world.replicas[&2].set_peer_handler(Arc::new(Echo));
        let answer = one
            .call_peer(2, "echo", Bytes::from_static(b"hello"), limit)
            .await
            .unwrap();
        assert_eq!(&answer[..], b"1 echo hello");
        assert!(matches!(
            one.call_peer(1, "echo", Bytes::new(), limit).await,
            Err(PeerError::Unreachable(_))
        ));
        assert!(matches!(
            one.call_peer(9, "echo", Bytes::new(), limit).await,
            Err(PeerError::Unreachable(_))
        ));
    });
}
