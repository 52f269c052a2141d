//! What ten thousand live leases cost the log, over three replicas, under virtual time.
//!
//! A test program of its own: the hooks of virtual time are one process's.
#![allow(clippy::unwrap_used, missing_docs, dead_code, unused_imports)]

#[path = "../control/beginning.rs"]
mod beginning;
#[path = "../control/hands.rs"]
mod hands;
#[path = "../control/messages.rs"]
mod messages;
#[path = "../control/support.rs"]
mod support;

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use palyra_control::{Control, FromWorker, LeaseName, Outbound, Outgoing, ToWorker};
use palyra_platform::{self as platform, AbortHandle, Hooks, IoVerdict};
use palyra_state::leases::{self, LeaseState, StartRun};
use palyra_state::nodes;

use hands::{Hand, TOOL, named, policy, propose};
use support::{Cluster, quick, until};

const WORKERS: u64 = 160;
const SLOTS: u64 = 63;
const LEASES: u64 = 10_000;
/// A third of the leases' time.
const RENEW: Duration = Duration::from_secs(10);
/// How long it is measured: as long as two renewals of each take.
const MEASURED: u64 = 20;
/// Entries a second that they may cost.
const BUDGET: u64 = 40;

thread_local! {
    static START: RefCell<Option<platform::Instant>> = const { RefCell::new(None) };
    static SEED: RefCell<u64> = const { RefCell::new(1) };
}

struct Virtual;

fn virtual_ms() -> u64 {
    let now = platform::now();
    START.with(|start| {
        now.duration_since(*start.borrow_mut().get_or_insert(now))
            .as_millis() as u64
    })
}

impl Hooks for Virtual {
    fn on_spawn(&self, _tag: Option<u64>, _name: &str, _task: AbortHandle) {}

    fn wall_ms(&self, _tag: Option<u64>) -> u64 {
        1_700_000_000_000 + virtual_ms()
    }

    fn boot_ms(&self, _tag: Option<u64>) -> u64 {
        1_000_000 + virtual_ms()
    }

    fn fill_random(&self, _tag: Option<u64>, buf: &mut [u8]) {
        SEED.with(|seed| {
            for byte in buf {
                let mut seed = seed.borrow_mut();
                *seed = seed
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                *byte = (*seed >> 33) as u8;
            }
        });
    }

    fn io_point(&self, _tag: Option<u64>, _name: &'static str) -> Option<BoxFuture<'static, IoVerdict>> {
        None
    }

    fn abort(&self, _tag: Option<u64>, reason: &str) {
        panic!("{reason}");
    }
}

/// A worker that keeps what it is given: it takes nothing and renews everything.
async fn keep(hand: Hand, first: Duration, refused: Arc<AtomicU64>) {
    let mut leases: Vec<LeaseName> = Vec::new();
    let mut next = platform::now() + first;
    for sequence in 1.. {
        while let Ok(message) = platform::timeout(
            next.saturating_duration_since(platform::now()),
            hand.outgoing.next(),
        )
        .await
        {
            match message {
                Some(Outbound::Worker(message)) => match *message {
                    ToWorker::Offer(offer) => leases.push(named(&offer)),
                    ToWorker::Renewed { leases, .. } => {
                        let lost = leases.iter().filter(|lease| !lease.renewed).count();
                        refused.fetch_add(lost as u64, Ordering::Relaxed);
                    }
                    ToWorker::End(end) => panic!("{end:?}"),
                    _ => {}
                },
                other => panic!("{other:?}"),
            }
        }
        let leases = leases.clone();
        hand.send(FromWorker::Renew { sequence, leases }).await.unwrap();
        next += RENEW;
    }
}

async fn ten_thousand_leases() {
    let (one, two, three) = Cluster::of_three(quick()).await;
    one.hold_workers_to(policy()).await;
    let controls: Vec<Control> = vec![one.control.clone(), two.control.clone(), three.control.clone()];
    let refused = Arc::new(AtomicU64::new(0));
    for number in 0..WORKERS {
        let machine = one.node(&format!("w{number}")).await;
        let control = &controls[number as usize % 3];
        let replica = [&one.replica, &two.replica, &three.replica][number as usize % 3];
        until(replica, |view| nodes::node(view, machine.device_id).is_some()).await;
        let mut hand = Hand::attach(machine, control).await;
        hand.report(Vec::new()).await;
        hand.attest(SLOTS as u32).await;
        let first = RENEW * number as u32 / WORKERS as u32;
        platform::spawn(keep(hand, first, Arc::clone(&refused))).detach();
    }
    for batch in 0..LEASES / 50 {
        let start = async |number: u64| {
            let run = StartRun {
                run_id: one.grant().await,
                tool: TOOL.to_owned(),
                ttl_ms: 30_000,
                timeout_ms: 3_600_000,
                ..StartRun::default()
            };
            propose(&one.replica, one.root(), run).await;
            number
        };
        // The first decides for all that come later.
        let at_once = if batch == 0 { 1 } else { 50 };
        for chunk in (0..50).collect::<Vec<u64>>().chunks(at_once) {
            join_all(chunk.iter().map(|number| start(*number))).await;
        }
    }
    let totals = leases::totals(&one.replica.view());
    assert_eq!(totals.live, LEASES, "{totals:?}");
    // Each has been renewed once at least when this is over.
    platform::sleep(RENEW).await;

    let cost = || {
        controls
            .iter()
            .map(|control| control.renewal_counts().entries)
            .sum::<u64>()
    };
    let (log, entries) = (one.last_log(), cost());
    platform::sleep(Duration::from_secs(MEASURED)).await;
    let (log, entries) = (one.last_log() - log, cost() - entries);
    println!(
        "{LEASES} live leases, renewed every {} s: {} entries of the log in {MEASURED} s, {} of them renewals",
        RENEW.as_secs(),
        log,
        entries
    );
    assert!(log <= BUDGET * MEASURED, "{log} entries in {MEASURED} s");
    assert_eq!(refused.load(Ordering::Relaxed), 0);
    let view = one.replica.view();
    let now = palyra_state::clock(&view);
    let mut after = None;
    let mut seen = 0;
    loop {
        let page = leases::leases(&view, after, 1_000);
        let Some(last) = page.last() else { break };
        after = Some(last.id);
        seen += page.len() as u64;
        for lease in page {
            assert_eq!(lease.state(), LeaseState::Granted, "{lease:?}");
            assert!(lease.renewed_at + 12_000 > now, "{lease:?} at {now}");
        }
    }
    assert_eq!(seen, LEASES);
}

#[test]
fn ten_thousand_leases_cost_tens_of_entries_a_second() {
    platform::install(&Virtual);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(ten_thousand_leases());
}
