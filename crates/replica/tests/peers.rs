//! The peer protocol as it looks to whoever speaks it wrongly: strangers, impostors, removed replicas, and streams
//! that hold back, repeat, or leave out.
#![allow(clippy::unwrap_used)]

mod kit;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use kit::{World, get, run, set};
use palyra_platform as platform;
use palyra_proto::peer::v1 as wire;
use palyra_replica::{PeerError, PeerHandler, PeerService, ProposeError, Refusal};
use palyra_state::Envelope;
use palyra_storage::{Engine, Family};
use prost::Message;

fn origin(cluster: u128, from: u64, to: u64) -> wire::Origin {
    wire::Origin {
        cluster_id: Bytes::copy_from_slice(&cluster.to_be_bytes()),
        from,
        to,
    }
}

fn request(from: u64, to: u64, body: wire::request::Body) -> Bytes {
    request_in(kit::CLUSTER, from, to, body)
}

fn request_in(cluster: u128, from: u64, to: u64, body: wire::request::Body) -> Bytes {
    let request = wire::Request {
        origin: Some(origin(cluster, from, to)),
        body: Some(body),
    };
    request.encode_to_vec().into()
}

/// A layer above that knows one replica to be removed.
struct Without(u64);

impl PeerHandler for Without {
    fn admits(&self, from: u64) -> bool {
        from != self.0
    }

    fn handle(
        &self,
        _from: u64,
        _topic: String,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        Box::pin(async move { Ok(body) })
    }
}

fn refusal<T>(result: Result<T, PeerError>) -> Option<Refusal> {
    match result {
        Err(PeerError::Refused { refusal, .. }) => Some(refusal),
        _ => None,
    }
}

#[test]
fn a_removed_replica_commands_nobody_over_a_connection_that_it_still_has() {
    run(25, || async {
        let mut world = World::born(3).await;
        let leader = world.leader().await;
        let removed = world.replicas.keys().copied().find(|id| *id != leader).unwrap();
        let forwarded = request(removed, leader, propose(&world.envelope(set(5))));
        let service = world.replicas[&leader].peer_service();
        service.handle_call(removed, forwarded.clone()).await.unwrap();
        world.replicas[&leader].set_peer_handler(Arc::new(Without(removed)));
        let refused = service.handle_call(removed, forwarded).await;
        assert_eq!(refusal(refused), Some(Refusal::Removed));
        let limit = Duration::from_secs(1);
        let asked = world.replicas[&removed]
            .call_peer(leader, "any", Bytes::new(), limit)
            .await;
        assert_eq!(refusal(asked), Some(Refusal::Removed));
        // To the replica itself it is a leader that does not take its commands.
        let envelope = world.envelope(set(6));
        let error = world.replicas[&removed].propose_within(envelope, limit).await;
        assert!(
            matches!(error, Err(ProposeError::Unavailable { .. })),
            "{error:?}"
        );
        assert_eq!(get(&world.replicas[&leader].view()), 5);
    });
}

#[test]
fn a_leader_takes_on_a_bounded_number_of_forwarded_bytes() {
    run(26, || async {
        let mut world = World::new();
        world.in_flight_bytes = 1;
        world.birth(3).await;
        let leader = world.leader().await;
        let other = world.replicas.keys().copied().find(|id| *id != leader).unwrap();
        let service = world.replicas[&leader].peer_service();
        // Nothing is committed any more: what the leader takes on stays with it.
        world.bus.isolate(leader);
        let first = request(other, leader, propose(&world.envelope(set(5))));
        let held = service.clone();
        let held = platform::scope_sync(leader, || {
            platform::spawn(async move { held.handle_call(other, first).await })
        });
        tokio::task::yield_now().await;
        let next = request(other, leader, propose(&world.envelope(set(6))));
        let answer = service.handle_call(other, next).await.unwrap();
        let answer = wire::Response::decode(answer).unwrap();
        let not_leader = wire::propose_response::Outcome::NotLeader(0);
        let refused = wire::ProposeResponse {
            outcome: Some(not_leader),
        };
        assert_eq!(answer.body, Some(wire::response::Body::Propose(refused)));
        assert!(!held.is_finished());
        // There is room again once it is decided.
        world.bus.heal();
        held.await.unwrap().unwrap();
        let index = world.set(other, 7).await;
        world.converged(index).await;
    });
}

fn commands(from: u64, to: u64, envelopes: impl IntoIterator<Item = Bytes>) -> Result<Bytes, PeerError> {
    let commands = (1..).zip(envelopes);
    let message = wire::ForwardRequest {
        origin: Some(origin(kit::CLUSTER, from, to)),
        commands: commands
            .map(|(number, envelope)| wire::Forwarded { number, envelope })
            .collect(),
    };
    Ok(message.encode_to_vec().into())
}

#[test]
fn a_command_that_nobody_understands_harms_none_beside_it_and_a_wrong_message_ends_the_stream() {
    run(32, || async {
        let mut world = World::born(3).await;
        let leader = world.leader().await;
        let other = world.replicas.keys().copied().find(|id| *id != leader).unwrap();
        let service = world.replicas[&leader].peer_service();
        let good = Bytes::from(world.envelope(set(5)).encode());
        let message = commands(other, leader, [Bytes::from_static(b"\xff"), good.clone()]);
        let mut answers = service.handle_forward(other, stream::iter([message]).boxed());
        let mut outcomes = std::collections::BTreeMap::new();
        while let Some(reply) = answers.next().await {
            for answer in wire::ForwardReply::decode(reply.unwrap()).unwrap().answers {
                outcomes.insert(answer.number, answer.response.unwrap().outcome.unwrap());
            }
        }
        use wire::propose_response::Outcome;
        assert!(matches!(outcomes[&1], Outcome::NotLeader(0)));
        assert!(matches!(outcomes[&2], Outcome::Committed(_)));

        let stranger = 6 - leader - other;
        let many = std::iter::repeat_n(good.clone(), 257);
        for (wrong, expected) in [
            (commands(stranger, leader, [good.clone()]), Refusal::Impostor),
            (commands(other, stranger, [good.clone()]), Refusal::WrongReplica),
            (commands(other, leader, many), Refusal::Malformed),
            (Ok(Bytes::from_static(b"\xff")), Refusal::Malformed),
        ] {
            let mut answers = service.handle_forward(other, stream::iter([wrong]).boxed());
            assert_eq!(refusal(answers.next().await.unwrap()), Some(expected));
            assert!(answers.next().await.is_none());
        }
    });
}

fn propose(envelope: &Envelope) -> wire::request::Body {
    wire::request::Body::Propose(wire::ProposeRequest {
        envelope: envelope.encode().into(),
    })
}

/// Speaks as the leader of a cluster of two to its follower.
struct Puppeteer {
    leader: u64,
    follower: u64,
    term: u64,
    /// Index of the follower's last entry when this began.
    last: u64,
}

impl Puppeteer {
    async fn of(world: &World) -> Puppeteer {
        let leader = world.leader().await;
        let follower = world.replicas.keys().copied().find(|id| *id != leader).unwrap();
        let status = world.replicas[&follower].status();
        Puppeteer {
            leader,
            follower,
            term: status.term,
            last: status.last_log,
        }
    }

    fn id(&self, index: u64) -> wire::LogId {
        wire::LogId {
            term: self.term,
            replica: self.leader,
            index,
        }
    }

    fn vote(&self) -> wire::Vote {
        wire::Vote {
            term: self.term,
            replica: self.leader,
            committed: true,
        }
    }

    fn origin(&self) -> wire::Origin {
        origin(kit::CLUSTER, self.leader, self.follower)
    }

    /// An append of blank entries behind the follower's last.
    fn append(&self, indexes: &[u64], commit: Option<u64>) -> Bytes {
        let entry = |index: &u64| {
            let blank = wire::entry::Payload::Blank(wire::Blank {});
            let entry = wire::Entry {
                log_id: Some(self.id(*index)),
                payload: Some(blank),
            };
            Bytes::from(entry.encode_to_vec())
        };
        let append = wire::AppendRequest {
            origin: Some(self.origin()),
            vote: Some(self.vote()),
            prev: Some(self.id(self.last)),
            entries: indexes.iter().map(entry).collect(),
            leader_commit: commit.map(|index| self.id(index)),
            ..wire::AppendRequest::default()
        };
        append.encode_to_vec().into()
    }

    /// A snapshot of nothing that reaches up to `index`.
    fn snapshot(&self, index: u64) -> [Bytes; 2] {
        const SHA256_OF_NOTHING: [u8; 32] = [
            0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24,
            0x27, 0xae, 0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
        ];
        let header = wire::SnapshotHeader {
            origin: Some(self.origin()),
            vote: Some(self.vote()),
            meta: Some(wire::SnapshotMeta {
                last: Some(self.id(index)),
                membership: None,
            }),
            format: 1,
        };
        let trailer = wire::SnapshotTrailer {
            count: 0,
            sha256: Bytes::from_static(&SHA256_OF_NOTHING),
        };
        [
            frame(wire::snapshot_frame::Frame::Header(header)),
            frame(wire::snapshot_frame::Frame::Trailer(trailer)),
        ]
    }
}

/// The leader takes the answer for a durable copy; openraft gives it as soon as the entries are accepted.
#[test]
fn a_snapshot_of_entries_that_are_not_written_yet_is_not_answered_yet() {
    run(30, || async {
        let world = World::born(2).await;
        let leader = Puppeteer::of(&world).await;
        let service = world.replicas[&leader.follower].peer_service();
        kit::stall(Some(leader.follower));
        let index = leader.last + 1;
        let append = stream::iter([Ok(leader.append(&[index], Some(index)))]).chain(stream::pending());
        let mut appended = service.handle_append(leader.leader, append.boxed());
        let brief = Duration::from_millis(200);
        assert!(platform::timeout(brief, appended.next()).await.is_err());
        let frames = stream::iter(leader.snapshot(index).map(Ok)).boxed();
        let mut answer = Box::pin(service.handle_snapshot(leader.leader, frames));
        assert!(platform::timeout(brief, &mut answer).await.is_err());
        kit::stall(None);
        answer.await.unwrap();
    });
}

#[test]
fn entries_out_of_sequence_never_reach_the_log() {
    run(27, || async {
        let world = World::born(2).await;
        let puppeteer = Puppeteer::of(&world).await;
        let (leader, follower, last) = (puppeteer.leader, puppeteer.follower, puppeteer.last);
        for indexes in [[last + 2, last + 3], [last + 1, last + 3], [last + 1, last + 1]] {
            let bodies = stream::iter([Ok(puppeteer.append(&indexes, None))]);
            let service = world.replicas[&follower].peer_service();
            let mut answers = service.handle_append(leader, Box::pin(bodies));
            let answer = answers.next().await.unwrap();
            assert_eq!(refusal(answer), Some(Refusal::Malformed), "{indexes:?}");
        }
        assert_eq!(world.replicas[&follower].status().last_log, last);
    });
}

fn vote(replica: u64) -> wire::Vote {
    wire::Vote {
        term: 99,
        replica,
        committed: true,
    }
}

fn snapshot(origin: wire::Origin, vote: wire::Vote, last_term: u64) -> Bytes {
    let last = wire::LogId {
        term: last_term,
        replica: vote.replica,
        index: 1_000,
    };
    frame(wire::snapshot_frame::Frame::Header(wire::SnapshotHeader {
        origin: Some(origin),
        vote: Some(vote),
        meta: Some(wire::SnapshotMeta {
            last: Some(last),
            membership: None,
        }),
        format: 1,
    }))
}

fn frame(frame: wire::snapshot_frame::Frame) -> Bytes {
    wire::SnapshotFrame { frame: Some(frame) }.encode_to_vec().into()
}

fn chunk() -> Bytes {
    let pair = wire::Pair {
        key: Bytes::from_static(b"key"),
        value: Bytes::from_static(b"value"),
    };
    let pairs = Bytes::from(wire::Pairs { pairs: vec![pair] }.encode_to_vec());
    let crc32c = crc32c::crc32c(&pairs);
    frame(wire::snapshot_frame::Frame::Chunk(wire::SnapshotChunk {
        pairs,
        crc32c,
    }))
}

/// Each way to speak, with an origin and a vote of the caller's choice, as the certificate of `from`.
async fn say(service: &PeerService, from: u64, origin: &wire::Origin, by: u64) -> [Option<Refusal>; 3] {
    let body = wire::request::Body::Vote(wire::VoteRequest {
        vote: Some(vote(by)),
        ..wire::VoteRequest::default()
    });
    let request = wire::Request {
        origin: Some(origin.clone()),
        body: Some(body),
    };
    let append = wire::AppendRequest {
        origin: Some(origin.clone()),
        vote: Some(vote(by)),
        ..wire::AppendRequest::default()
    };
    let append = stream::iter([Ok(append.encode_to_vec().into())]).boxed();
    let mut answers = service.handle_append(from, append);
    let snapshot = stream::iter([Ok(snapshot(origin.clone(), vote(by), 99))]).boxed();
    [
        refusal(service.handle_call(from, request.encode_to_vec().into()).await),
        refusal(answers.next().await.unwrap()),
        refusal(service.handle_snapshot(from, snapshot).await),
    ]
}

#[test]
fn whoever_is_not_who_it_says_is_refused_on_every_way_to_speak() {
    run(22, || async {
        let world = World::born(2).await;
        let service = world.replicas[&2].peer_service();
        let before = world.replicas[&2].status();
        for (origin, from, by, expected) in [
            // Another certificate than the message says; another addressee; another cluster; ourselves.
            (origin(kit::CLUSTER, 1, 2), 3, 1, Refusal::Impostor),
            (origin(kit::CLUSTER, 1, 3), 1, 1, Refusal::WrongReplica),
            (origin(7, 1, 2), 1, 1, Refusal::WrongCluster),
            (origin(kit::CLUSTER, 2, 2), 2, 2, Refusal::Impostor),
            // The vote of somebody else.
            (origin(kit::CLUSTER, 1, 2), 1, 3, Refusal::Impostor),
        ] {
            let refused = say(&service, from, &origin, by).await;
            assert_eq!(refused, [Some(expected); 3], "{origin:?} from {from} by {by}");
        }
        let malformed = service.handle_call(1, Bytes::from_static(b"\xff\xff")).await;
        assert_eq!(refusal(malformed), Some(Refusal::Malformed));
        let anonymous = wire::Request {
            origin: None,
            body: Some(wire::request::Body::ReadIndex(wire::ReadIndexRequest {})),
        };
        let anonymous = service.handle_call(1, anonymous.encode_to_vec().into()).await;
        assert_eq!(refusal(anonymous), Some(Refusal::Malformed));
        let unknown = wire::Request {
            origin: Some(origin(kit::CLUSTER, 1, 2)),
            body: None,
        };
        let unknown = service.handle_call(1, unknown.encode_to_vec().into()).await;
        assert_eq!(refusal(unknown), Some(Refusal::Malformed));
        let after = world.replicas[&2].status();
        assert_eq!(
            (after.term, after.role),
            (before.term, before.role),
            "none of it reached Raft"
        );
        let read = wire::request::Body::ReadIndex(wire::ReadIndexRequest {});
        service.handle_call(1, request(1, 2, read)).await.unwrap();
    });
}

/// How many states lie beside each other on a disk.
fn generations(engine: &dyn Engine) -> usize {
    let mut found = std::collections::BTreeSet::new();
    let note = &mut |key: &[u8], _: &[u8]| {
        found.insert(key[..4].to_vec());
        std::ops::ControlFlow::Continue(())
    };
    engine.scan(Family::State, &[], &[u8::MAX; 5], note).unwrap();
    found.len()
}

#[test]
fn a_snapshot_that_is_not_whole_changes_nothing() {
    run(28, || async {
        let mut world = World::born(2).await;
        let service = world.replicas[&2].peer_service();
        let header = || snapshot(origin(kit::CLUSTER, 1, 2), vote(1), 99);
        let mut torn = chunk().to_vec();
        *torn.last_mut().unwrap() ^= 1;
        let wrong_count = wire::SnapshotTrailer {
            count: 2,
            sha256: Bytes::from_static(&[0; 32]),
        };
        let trailer = frame(wire::snapshot_frame::Frame::Trailer(wrong_count));
        let impossible = snapshot(origin(kit::CLUSTER, 1, 2), vote(1), 100);
        for frames in [
            vec![chunk()],
            vec![header(), Bytes::from(torn)],
            vec![header(), chunk(), trailer],
            vec![header(), chunk(), header()],
            vec![impossible, chunk()],
        ] {
            let frames = stream::iter(frames.into_iter().map(Ok)).boxed();
            let refused = service.handle_snapshot(1, frames).await;
            assert_eq!(refusal(refused), Some(Refusal::Malformed));
        }
        let cut = stream::iter([Ok(header()), Ok(chunk())]).boxed();
        let lost = service.handle_snapshot(1, cut).await;
        assert!(matches!(lost, Err(PeerError::Lost(_))), "{lost:?}");
        let index = world.set(1, 5).await;
        world.converged(index).await;
        // Nothing of it is left over, either.
        world.kill(2);
        assert_eq!(generations(&*world.disks[&2].open().await), 1);
    });
}

#[test]
fn a_snapshot_whose_sender_falls_silent_is_given_up_and_a_newer_one_ends_an_older_one() {
    run(29, || async {
        let world = World::born(2).await;
        let service = world.replicas[&2].peer_service();
        let header = || snapshot(origin(kit::CLUSTER, 1, 2), vote(1), 99);
        let begun = move || {
            stream::iter([Ok(header()), Ok(chunk())])
                .chain(stream::pending())
                .boxed()
        };
        let start = platform::now();
        let given_up = service.handle_snapshot(1, begun()).await;
        assert!(matches!(given_up, Err(PeerError::Timeout(_))), "{given_up:?}");
        assert!(platform::now() - start < Duration::from_secs(60));

        let (older, newer) = (service.clone(), service.clone());
        let older = platform::spawn(async move { older.handle_snapshot(1, begun()).await });
        tokio::task::yield_now().await;
        let start = platform::now();
        let frames = stream::iter([Ok(header())]).chain(stream::pending()).boxed();
        let newer = platform::spawn(async move { newer.handle_snapshot(1, frames).await });
        let ended = older.await.unwrap();
        assert!(
            matches!(&ended, Err(PeerError::Lost(why)) if why.contains("newer")),
            "{ended:?}"
        );
        assert_eq!(platform::now(), start, "it did not wait for its own sender");
        newer.abort();
    });
}
