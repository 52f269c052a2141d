//! The rules as data: frames, a seed and virtual time go in; what comes out, and what is counted, is compared.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use palyra_jepsen_switch::{Counters, Damage, Engine, Rule};

const MS: u64 = 1_000_000;

fn frame(to: u8, from: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5];
    bytes.extend_from_slice(content);
    bytes
}

fn broadcast(from: u8) -> Vec<u8> {
    let mut bytes = frame(0, from, b"who has");
    bytes[..6].copy_from_slice(&[0xff; 6]);
    bytes
}

/// Three ports whose addresses 1, 2 and 3 are known.
fn engine() -> Engine {
    let mut engine = Engine::new(7);
    for port in 0..3 {
        assert_eq!(engine.attach(), port);
    }
    for port in 0..3 {
        engine.accept(0, port, &broadcast(port as u8 + 1));
    }
    assert_eq!(drain(&mut engine, 0).len(), 6);
    engine
}

/// What is due at a moment: port and content.
fn drain(engine: &mut Engine, now: u64) -> Vec<(usize, Vec<u8>)> {
    let all = std::iter::from_fn(|| engine.take(now));
    all.map(|delivery| (delivery.to, delivery.frame[14..].to_vec()))
        .collect()
}

fn send(engine: &mut Engine, now: u64, content: &[u8]) {
    engine.accept(now, 0, &frame(2, 1, content));
}

/// Everything that comes out of the link from port 0 to 1, with its time, when `count` numbered frames go in, one each
/// `gap` nanoseconds.
fn through(rule: Rule, count: u32, gap: u64) -> (Vec<(u64, u32)>, Counters) {
    let mut engine = engine();
    let before = engine.counters(0, 1);
    engine.set(0, 1, rule).unwrap();
    let mut out = Vec::new();
    let mut settle = |engine: &mut Engine, until: u64| {
        while let Some(due) = engine.next_due().filter(|due| *due <= until) {
            for (_, content) in drain(engine, due) {
                out.push((due, u32::from_be_bytes(content[..4].try_into().unwrap())));
            }
        }
    };
    for number in 0..count {
        let now = u64::from(number) * gap;
        settle(&mut engine, now);
        let mut content = number.to_be_bytes().to_vec();
        content.resize(1000, 0);
        send(&mut engine, now, &content);
    }
    settle(&mut engine, u64::MAX);
    let counters = engine.counters(0, 1).since(&before);
    assert_eq!(
        counters.frames + counters.duplicated,
        counters.delivered + counters.cut + counters.lost + counters.overflowed,
        "each frame is counted once: {counters:?}"
    );
    assert_eq!(counters.delivered, out.len() as u64);
    (out, counters)
}

fn percent_of(part: u64, whole: u64) -> u64 {
    part * 100 / whole
}

#[test]
fn it_learns_who_is_where() {
    let mut engine = Engine::new(0);
    for _ in 0..3 {
        engine.attach();
    }
    engine.accept(0, 0, &frame(2, 1, b"unknown"));
    let flooded: Vec<usize> = drain(&mut engine, 0).iter().map(|(port, _)| *port).collect();
    assert_eq!(flooded, [1, 2], "to all but the sender");
    engine.accept(0, 1, &frame(1, 2, b"known"));
    assert_eq!(drain(&mut engine, 0), [(0, b"known".to_vec())]);
    engine.accept(0, 0, &frame(2, 1, b"learned"));
    assert_eq!(drain(&mut engine, 0), [(1, b"learned".to_vec())]);
    engine.accept(0, 0, &frame(1, 1, b"to itself"));
    engine.accept(0, 0, b"short");
    engine.accept(0, 9, &frame(1, 2, b"no such port"));
    assert_eq!(drain(&mut engine, 0), []);
    // A machine that is plugged in elsewhere is found there.
    engine.accept(0, 2, &broadcast(1));
    drain(&mut engine, 0);
    engine.accept(0, 1, &frame(1, 2, b"moved"));
    assert_eq!(drain(&mut engine, 0), [(2, b"moved".to_vec())]);
}

#[test]
fn without_rules_frames_pass_at_once_and_in_order() {
    let (out, counters) = through(Rule::default(), 100, MS);
    let expected: Vec<(u64, u32)> = (0..100).map(|n| (u64::from(n) * MS, n)).collect();
    assert_eq!(out, expected);
    assert_eq!(
        (counters.held_ns, counters.late_ns_max, counters.slowed),
        (0, 0, 0)
    );
    assert_eq!(counters.bytes, 100 * 1014);
}

#[test]
fn delay_is_exact_and_jitter_keeps_the_order() {
    let delay = Duration::from_millis(25);
    let (out, counters) = through(
        Rule {
            delay,
            ..Rule::default()
        },
        50,
        MS,
    );
    assert!(out.iter().all(|(at, n)| *at == u64::from(*n) * MS + 25 * MS));
    assert_eq!((counters.held_mean(), counters.slowed), (delay, 50));

    let jitter = Duration::from_millis(40);
    let rule = Rule {
        delay,
        jitter,
        ..Rule::default()
    };
    let (out, _) = through(rule, 500, MS);
    let numbers: Vec<u32> = out.iter().map(|(_, n)| *n).collect();
    assert_eq!(numbers, (0..500).collect::<Vec<u32>>());
    assert!(
        out.iter()
            .all(|(at, n)| (25 * MS..=65 * MS).contains(&(at - u64::from(*n) * MS)))
    );
    let late = out
        .iter()
        .filter(|(at, n)| at - u64::from(*n) * MS > 45 * MS)
        .count();
    assert!(late > 100, "only {late} of 500 came late");
}

#[test]
fn reordered_frames_are_overtaken() {
    let rule = Rule {
        reorder: 20.0,
        reorder_by: Duration::from_millis(10),
        ..Rule::default()
    };
    let (out, counters) = through(rule, 1000, MS);
    assert_eq!(out.len(), 1000);
    let overtaken = out.windows(2).filter(|pair| pair[1].1 < pair[0].1).count();
    assert!(overtaken > 50, "{overtaken} pairs are out of order");
    assert!((15..25).contains(&percent_of(counters.reordered, counters.frames)));
}

#[test]
fn loss_duplication_and_damage_come_as_often_as_asked() {
    let rule = Rule {
        loss: 30.0,
        duplicate: 10.0,
        corrupt: 50.0,
        ..Rule::default()
    };
    let (_, counters) = through(rule, 10_000, MS);
    assert!((28..32).contains(&percent_of(counters.lost, counters.frames)));
    let passed = counters.frames - counters.lost;
    assert!((8..12).contains(&percent_of(counters.duplicated, passed)));
    assert!((48..52).contains(&percent_of(counters.corrupted, counters.delivered)));
    let (out, _) = through(
        Rule {
            loss: 100.0,
            ..Rule::default()
        },
        100,
        MS,
    );
    assert_eq!(out, []);
}

#[test]
fn sealed_damage_spares_what_it_cannot_seal() {
    let rule = Rule {
        corrupt: 100.0,
        damage: Damage::Sealed,
        ..Rule::default()
    };
    let (out, counters) = through(rule, 100, MS);
    assert_eq!(counters.corrupted, 0, "these frames are neither TCP nor UDP");
    assert!(out.iter().enumerate().all(|(n, (_, number))| n as u32 == *number));
}

#[test]
fn a_slow_link_sends_at_its_rate_and_drops_what_does_not_fit() {
    // 1014 bytes a millisecond.
    let rule = Rule {
        rate: Some(1_014_000),
        queue: 20,
        ..Rule::default()
    };
    let (out, counters) = through(rule, 10, 0);
    let at: Vec<u64> = out.iter().map(|(at, _)| *at).collect();
    assert_eq!(at, (1..=10).map(|n| n * MS).collect::<Vec<u64>>());
    assert_eq!(counters.overflowed, 0);
    let (out, counters) = through(rule, 100, 0);
    assert_eq!((out.len(), counters.overflowed), (20, 80));
    let (out, counters) = through(rule, 100, MS);
    assert_eq!(
        (out.len(), counters.overflowed),
        (100, 0),
        "no backlog at its rate"
    );
}

#[test]
fn a_cut_stops_what_is_under_way_and_one_direction_only() {
    let mut engine = engine();
    let slow = Rule {
        delay: Duration::from_millis(5),
        ..Rule::default()
    };
    engine.set(0, 1, slow).unwrap();
    send(&mut engine, 0, b"under way");
    let cut = Rule {
        cut: true,
        ..Rule::default()
    };
    engine.set(0, 1, cut).unwrap();
    send(&mut engine, 0, b"stopped");
    engine.accept(0, 1, &frame(1, 2, b"back"));
    assert_eq!(drain(&mut engine, 10 * MS), [(0, b"back".to_vec())]);
    assert_eq!(engine.counters(0, 1).cut, 2);
    engine.set(0, 1, Rule::default()).unwrap();
    send(&mut engine, 10 * MS, b"healed");
    assert_eq!(drain(&mut engine, 10 * MS), [(1, b"healed".to_vec())]);
    assert_eq!(engine.rule(0, 1), Rule::default());
    assert_eq!(engine.total().cut, 2);
}

#[test]
fn lateness_is_the_callers_and_is_told() {
    let mut engine = engine();
    send(&mut engine, 0, b"due at once");
    assert_eq!(drain(&mut engine, 3 * MS).len(), 1);
    assert_eq!(engine.counters(0, 1).late_ns_max, 3 * MS);
}

#[test]
fn the_same_seed_and_frames_give_the_same_run() {
    let rule = Rule {
        jitter: Duration::from_millis(9),
        reorder: 5.0,
        reorder_by: Duration::from_millis(30),
        loss: 10.0,
        duplicate: 10.0,
        corrupt: 10.0,
        ..Rule::default()
    };
    assert_eq!(through(rule, 2000, MS), through(rule, 2000, MS));
}

#[test]
fn rules_for_links_that_are_not_there_are_refused() {
    let mut engine = engine();
    assert!(
        engine
            .set(0, 3, Rule::default())
            .unwrap_err()
            .contains("there are 3 ports")
    );
    let senseless = Rule {
        loss: -1.0,
        ..Rule::default()
    };
    assert!(engine.set(0, 1, senseless).is_err());
    assert_eq!(engine.rule(0, 1), Rule::default());
}
