//! Tools that take too much.

use palyra_node::worker::execute::How;

use crate::kit::{Lease, bounds};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("who_fills_the_disk_is_ended", who_fills_the_disk_is_ended),
    ("files_without_a_name_count_too", files_without_a_name_count_too),
    ("a_fork_bomb_stays_small", a_fork_bomb_stays_small),
    ("a_memory_bomb_is_ended", a_memory_bomb_is_ended),
    ("an_endless_answer_is_cut", an_endless_answer_is_cut),
];

/// Whether the sandbox has it; says loudly when not.
fn has(part: &str) -> bool {
    let ended = Lease::new("true").run();
    let has = ended.sandbox.iter().any(|one| one == part);
    if !has {
        let why = ended.sandbox.iter().find(|one| one.contains(part));
        println!(
            "  SKIPPED: this machine has no {part} ({})",
            why.map_or("", String::as_str)
        );
    }
    has
}

fn killed(lease: &mut Lease) -> (String, String) {
    let ended = lease.run();
    assert!(ended.gone, "{ended:?}");
    match ended.how {
        How::Killed { why, message } => (why, message),
        other => panic!("{other:?}: {}", lease.words()),
    }
}

fn who_fills_the_disk_is_ended() {
    let mut bounds = bounds();
    bounds.disk_bytes = 8 << 20;
    let script = "i=0; while :; do i=$((i+1)); head -c 1000000 /dev/zero > out/$i || exit 1; done";
    let mut lease = Lease::with(script, bounds);
    let (why, message) = killed(&mut lease);
    assert!(
        why == "disk" && message.contains("8388608 are allowed"),
        "{why} {message}"
    );
    // One file alone cannot be larger either.
    let mut lease = Lease::with("head -c 20000000 /dev/zero > out/big; stat -c %s out/big", bounds);
    assert!(lease.said().trim().parse::<u64>().unwrap() <= 8 << 20);
}

fn files_without_a_name_count_too() {
    if !has("cgroup:pids") {
        return;
    }
    let mut bounds = bounds();
    bounds.disk_bytes = 8 << 20;
    let script = "for i in 3 4 5 6 7 8 9; do eval \"exec $i>out/x\"; rm out/x; head -c 3000000 /dev/zero >&$i; done\n\
                  sleep 1000";
    let (why, _) = killed(&mut Lease::with(script, bounds));
    assert_eq!(why, "disk");
}

fn a_fork_bomb_stays_small() {
    if !has("cgroup:pids") {
        return;
    }
    let mut bounds = bounds();
    bounds.processes = 20;
    let script = "i=0; while [ $i -lt 100 ]; do i=$((i+1)); sleep 1000 & done 2>/dev/null\n\
                  ls -d /proc/[0-9]* | wc -l";
    let mut lease = Lease::with(script, bounds);
    let ended = lease.run();
    assert!(ended.gone, "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stdout)
        .trim()
        .parse::<u32>()
        .unwrap_or(0);
    assert!(said <= 24, "{said} processes");
}

fn a_memory_bomb_is_ended() {
    if !has("cgroup:memory") {
        return;
    }
    let mut bounds = bounds();
    bounds.memory_bytes = 64 << 20;
    let mut lease = Lease::with("exec tail /dev/zero", bounds);
    let ended = lease.run();
    assert_eq!(ended.how, How::Exited(-9), "{ended:?}");
    assert!(lease.place.out_of_memory() && ended.gone);
}

fn an_endless_answer_is_cut() {
    let (why, message) = killed(&mut Lease::new("yes"));
    assert!(why == "result" && message.contains("262144"), "{why} {message}");
    // And what it writes to stderr costs nothing but time.
    let mut lease = Lease::new("yes | head -c 3000000 >&2; echo 1");
    assert_eq!(lease.said(), "1\n");
    assert_eq!(lease.stderr.len(), 3_000_000);
}
