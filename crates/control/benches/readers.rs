//! Instructions of a step of the feed and of an admission check, over an engine in memory.
//!
//! Run by `./tests/run`, which compares the counts with `tests/budgets.txt`. The state is that of
//! `crates/state/tests/kit/large.rs`; only the body of a function below is counted. An admission reads two clocks,
//! which is one system call each, and takes the same way whatever they say.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]
// The macros of the benchmarks make public items, and code that would open files if `perf` were asked to count.
#![allow(missing_docs, unreachable_pub, clippy::disallowed_types)]

#[path = "../../state/tests/kit/mod.rs"]
mod kit;

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;

use gungraun::{Callgrind, LibraryBenchmarkConfig, library_benchmark, library_benchmark_group, main};
use kit::{World, large};
use palyra_control::{Caller, Control, ControlConfig, Keys, Limits, Timings};
use palyra_pki::{
    Authority, Kek, KeyPair, PeerIdentity, Role as CertificateRole, Root, SpiffeId, TrustDomain,
};
use palyra_replica::testing::Bus;
use palyra_replica::{Feed, FeedItem, Replica, ReplicaConfig};
use palyra_state::access::Role;
use palyra_state::{Cursor, cluster, journal};
use palyra_storage::{Batch, Disk, Engine as _, Family, MemEngine};
use tokio::runtime::{Builder, Runtime};

/// Rows that the feed hands over at a time.
const PAGE: usize = 256;

/// Where the state lies while the benchmarks run.
fn file() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_TARGET_TMPDIR"), "/counted-readers-state"))
}

/// A runtime that nothing runs on but while something is awaited.
fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// A replica that has this state, opened and not started.
async fn opened(world: &World) -> Replica {
    let engine = MemEngine::open(&Disk::new("r1")).unwrap();
    let pairs: Vec<(&[u8], &[u8])> = world.state.iter().collect();
    for pairs in pairs.chunks(1_000) {
        let mut batch = Batch::new();
        for (key, value) in pairs {
            // State keys lie under the generation, which is 0 in an engine that says nothing about it.
            let key = [&[0; 4], *key].concat();
            batch.put(Family::State, key, value.to_vec());
        }
        engine.write(batch).unwrap();
    }
    let cluster_id = cluster::cluster(&world.state).unwrap().cluster_id;
    let config = ReplicaConfig::new(1, cluster_id);
    Replica::open(config, Arc::new(engine), Bus::new().transport(1))
        .await
        .unwrap()
}

/// A follower who has not seen the newest `rows` rows.
fn follower(rows: usize) -> &'static mut Feed {
    let world = large::kept(&file());
    let last = journal::last_rows(&world.state, rows + 1);
    let seen = last.first().map_or_else(Cursor::default, journal::Row::cursor);
    let runtime = runtime();
    let replica = runtime.block_on(opened(&world));
    let feed = Box::leak(Box::new(replica.feed(seen)));
    std::mem::forget((replica, runtime, world, last));
    kit::large::settle();
    feed
}

#[library_benchmark(setup = follower)]
#[bench::page(2 * PAGE)]
#[bench::row(1)]
#[bench::nothing(0)]
fn feed_step(feed: &'static mut Feed) -> Option<FeedItem> {
    black_box(feed).try_next()
}

/// The control plane of a cluster of one, which leads and has heard from itself; and who calls.
struct Calling {
    control: Control,
    peer: PeerIdentity,
}

/// Bytes that look random and are always the same.
fn repeatable() -> impl FnMut(&mut [u8]) {
    let mut word: u64 = 0x9E37_79B9_7F4A_7C15;
    move |out| {
        for byte in out {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            *byte = word.to_be_bytes()[0];
        }
    }
}

fn keys(cluster_id: &str, domain: &TrustDomain) -> Keys {
    let mut rng = repeatable();
    let kek = Kek::generate(&mut rng);
    let root = Root::create(cluster_id, domain, kit::T0, &mut rng).unwrap();
    let key = KeyPair::generate(&mut rng).unwrap();
    let signed = root
        .sign_authority(&key.make_csr().unwrap(), 1, kit::T0, &mut rng)
        .unwrap();
    let authority = Authority::new(signed.der, key).unwrap();
    Keys { authority, kek }
}

fn calling(role: CertificateRole, name: &str) -> &'static Calling {
    let mut world = large::kept(&file());
    let born = cluster::cluster(&world.state).unwrap();
    let domain = TrustDomain::new(&born.trust_domain).unwrap();
    let id = match role {
        CertificateRole::Node => world.id(name).to_string(),
        _ => name.to_owned(),
    };
    let peer = PeerIdentity {
        id: SpiffeId::new(domain.clone(), role, &id).unwrap(),
        fingerprint: kit::fingerprint(name).to_bytes(),
        serial: "07".to_owned(),
        not_before_ms: 0,
        not_after_ms: u64::MAX,
        spki_sha256: kit::key(name).to_bytes(),
    };
    let runtime = runtime();
    let control = runtime.block_on(async {
        let replica = opened(&world).await;
        let config = ControlConfig {
            replica_id: 1,
            cluster_id: born.cluster_id,
            trust_domain: domain.clone(),
            version: "counted".to_owned(),
            timings: Timings::default(),
            limits: Limits::default(),
        };
        replica.start();
        replica.initialize().await.unwrap();
        // A view says up to which entry it goes: from the first one on.
        replica.applied().wait_for(|index| *index > 0).await.unwrap();
        let control = Control::start(config, replica, keys(&born.cluster_id.to_string(), &domain));
        while control.check_fresh().is_err() {
            tokio::task::yield_now().await;
        }
        control
    });
    std::mem::forget((runtime, world));
    kit::large::settle();
    Box::leak(Box::new(Calling { control, peer }))
}

#[library_benchmark]
#[bench::known(calling(CertificateRole::Node, "node-0003"))]
fn admit_node(calling: &'static Calling) -> Caller {
    let Calling { control, peer } = black_box(calling);
    control.admit_node(peer).unwrap()
}

#[library_benchmark]
#[bench::known(calling(CertificateRole::Operator, "operator-07"))]
fn admit_operator(calling: &'static Calling) -> Caller {
    let Calling { control, peer } = black_box(calling);
    control.admit_operator(peer, Role::Operator).unwrap()
}

library_benchmark_group!(
    name = readers,
    setup = large::keep(&large::large(), &file()),
    benchmarks = [feed_step, admit_node, admit_operator]
);

main!(
    config = LibraryBenchmarkConfig::default().tool(Callgrind::with_args(["--cache-sim=no"])),
    library_benchmark_groups = readers
);
