//! The switch between real devices of real namespaces. Each test runs itself once more under `unshare -n -m`, so
//! nothing of the machine's own network is touched and the kernel takes all of it away; where that is not allowed the
//! test says that it is skipped.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use palyra_jepsen_switch::{Counters, Damage, Rule, Switch, Tap};

const INSIDE: &str = "JEPSEN_SWITCH_INSIDE";
/// Longer than anything here takes, and only ever waited for by a test that fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// True inside of the namespaces. Outside, runs the test of that name inside, and insists that it passes.
fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let unshare = ["-n", "-m", "--propagation", "private", "--"];
    let allowed = Command::new("unshare")
        .args(unshare)
        .args(["test", "-r", "/dev/net/tun"])
        .output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        eprintln!("{test} is skipped: this machine allows no network namespaces, or has no /dev/net/tun");
        return false;
    }
    let status = Command::new("unshare")
        .args(unshare)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(INSIDE, "1")
        .status();
    assert!(
        status.unwrap().success(),
        "{test} failed inside of its namespaces"
    );
    false
}

fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Two namespaces, `a` and `b`, at ports 0 and 1 of a switch.
fn pair() -> Switch {
    sh("mkdir -p /run/netns; mount -t tmpfs none /run/netns");
    let switch = Switch::start(3).unwrap();
    for (number, name) in ["a", "b"].iter().enumerate() {
        sh(&format!("ip netns add {name}"));
        let tap = Tap::open(format!("/run/netns/{name}").as_ref(), "tap0").unwrap();
        assert_eq!(tap.name(), "tap0");
        assert_eq!(switch.attach(tap), number);
        let address = number + 1;
        sh(&format!(
            "ip -n {name} link set lo up; ip -n {name} addr add 10.77.0.{address}/24 dev tap0; \
             ip -n {name} link set tap0 address 02:00:00:00:00:0{address} up"
        ));
    }
    // Who has which address is settled here, not in the time that a test measures.
    sh(
        "ip -n a neigh replace 10.77.0.2 lladdr 02:00:00:00:00:02 dev tap0 nud permanent; \
        ip -n b neigh replace 10.77.0.1 lladdr 02:00:00:00:00:01 dev tap0 nud permanent",
    );
    switch
}

/// Does something in a namespace, on a thread of its own.
fn within<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    let place = File::open(format!("/run/netns/{name}")).unwrap();
    std::thread::spawn(move || {
        setns(place, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
}

fn udp(name: &str, address: &str) -> UdpSocket {
    let address = address.to_owned();
    let socket = within(name, move || UdpSocket::bind(address).unwrap());
    let socket = socket.join().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A socket in each namespace, connected to one another.
fn sockets() -> (UdpSocket, UdpSocket) {
    let (a, b) = (udp("a", "10.77.0.1:7000"), udp("b", "10.77.0.2:7000"));
    a.connect("10.77.0.2:7000").unwrap();
    b.connect("10.77.0.1:7000").unwrap();
    (a, b)
}

fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 2000];
    let length = socket.recv(&mut buffer).unwrap();
    buffer[..length].to_vec()
}

fn set(switch: &Switch, rule: Rule) {
    switch.set(0, 1, rule).unwrap();
    switch.set(1, 0, rule).unwrap();
}

/// Waits until the counters of the link from `a` to `b` are as wanted.
fn until(switch: &Switch, wanted: impl Fn(&Counters) -> bool) {
    let begun = Instant::now();
    while !wanted(&switch.counters(0, 1)) {
        assert!(begun.elapsed() < PATIENCE, "{:?}", switch.counters(0, 1));
        switch.health().unwrap();
        std::thread::yield_now();
    }
}

#[test]
fn delay_is_felt_both_ways_and_ends_at_once() {
    if !inside("delay_is_felt_both_ways_and_ends_at_once") {
        return;
    }
    let switch = pair();
    let (a, b) = sockets();
    let round_trip = || {
        let begun = Instant::now();
        a.send(b"ping").unwrap();
        assert_eq!(receive(&b), b"ping");
        b.send(b"pong").unwrap();
        assert_eq!(receive(&a), b"pong");
        begun.elapsed()
    };
    let fast = round_trip();
    let delay = Duration::from_millis(25);
    set(
        &switch,
        Rule {
            delay,
            ..Rule::default()
        },
    );
    let slow = round_trip();
    assert!(slow >= 2 * delay, "25 ms each way took {slow:?}");
    set(&switch, Rule::default());
    let healed = round_trip();
    println!("round trips: {fast:?}, with 25 ms each way {slow:?}, healed {healed:?}");
    println!(
        "of the link: {:?}, refused {}",
        switch.counters(0, 1),
        switch.refused()
    );
    switch.health().unwrap();
}

#[test]
fn a_cut_stops_one_direction_and_is_counted() {
    if !inside("a_cut_stops_one_direction_and_is_counted") {
        return;
    }
    let switch = pair();
    let (a, b) = sockets();
    let cut = Rule {
        cut: true,
        ..Rule::default()
    };
    switch.set(0, 1, cut).unwrap();
    let before = switch.counters(0, 1).cut;
    a.send(b"lost").unwrap();
    until(&switch, |counters| counters.cut > before);
    b.send(b"the other way").unwrap();
    assert_eq!(receive(&a), b"the other way");
    switch.set(0, 1, Rule::default()).unwrap();
    a.send(b"healed").unwrap();
    assert_eq!(receive(&b), b"healed", "and not what was cut");
}

#[test]
fn a_datagram_comes_twice_and_a_sealed_bit_reaches_the_program() {
    if !inside("a_datagram_comes_twice_and_a_sealed_bit_reaches_the_program") {
        return;
    }
    let switch = pair();
    let (a, b) = sockets();
    let twice = Rule {
        duplicate: 100.0,
        ..Rule::default()
    };
    set(&switch, twice);
    a.send(b"once").unwrap();
    assert_eq!([receive(&b), receive(&b)], [b"once", b"once"]);

    let sealed = Rule {
        corrupt: 100.0,
        damage: Damage::Sealed,
        ..Rule::default()
    };
    set(&switch, sealed);
    let whole = vec![0x55; 900];
    a.send(&whole).unwrap();
    let got = receive(&b);
    let turned: u32 = got.iter().zip(&whole).map(|(x, y)| (x ^ y).count_ones()).sum();
    assert_eq!(
        (got.len(), turned),
        (900, 1),
        "the kernel found its checksum right"
    );

    let visible = Rule {
        damage: Damage::Visible,
        ..sealed
    };
    set(&switch, visible);
    let before = switch.counters(0, 1);
    a.send(&whole).unwrap();
    until(&switch, |counters| counters.since(&before).delivered > 0);
    set(&switch, Rule::default());
    a.send(b"whole again").unwrap();
    assert_eq!(
        receive(&b),
        b"whole again",
        "the damaged one was dropped by the kernel"
    );
}

#[test]
fn tcp_gets_through_everything_at_once_and_slowly() {
    if !inside("tcp_gets_through_everything_at_once_and_slowly") {
        return;
    }
    let switch = pair();
    let rule = Rule {
        delay: Duration::from_millis(1),
        jitter: Duration::from_millis(2),
        reorder: 2.0,
        reorder_by: Duration::from_millis(3),
        loss: 1.0,
        duplicate: 2.0,
        corrupt: 1.0,
        ..Rule::default()
    };
    set(&switch, rule);
    let took = transfer(300_000);
    let counters = switch.counters(0, 1);
    println!("300 kB took {took:?}: {counters:?}");
    assert!(counters.delivered > 200);

    let rate = 1_000_000;
    let slow = Rule {
        rate: Some(rate),
        queue: 100,
        ..Rule::default()
    };
    set(&switch, slow);
    let took = transfer(500_000);
    println!("500 kB at {rate} bytes a second took {took:?}");
    assert!(
        took >= Duration::from_millis(450),
        "faster than the link: {took:?}"
    );
    set(&switch, Rule::default());
    let took = transfer(20_000_000);
    println!("20 MB without a rule took {took:?}");
    switch.health().unwrap();
}

/// Sends bytes from `a` to `b`, which compares them. Answers how long that took.
fn transfer(bytes: usize) -> Duration {
    let pattern = |at: usize| (at % 251) as u8;
    let (bound, listening) = std::sync::mpsc::channel();
    let receiver = within("b", move || {
        let listener = TcpListener::bind("10.77.0.2:0").unwrap();
        bound.send(listener.local_addr().unwrap()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut got = Vec::with_capacity(bytes);
        stream.read_to_end(&mut got).unwrap();
        got
    });
    let address = listening.recv().unwrap();
    let begun = Instant::now();
    let sender = within("a", move || {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
        stream
            .write_all(&(0..bytes).map(pattern).collect::<Vec<u8>>())
            .unwrap();
    });
    sender.join().unwrap();
    let got = receiver.join().unwrap();
    let took = begun.elapsed();
    assert_eq!(got.len(), bytes);
    assert!(
        got.iter().enumerate().all(|(at, byte)| *byte == pattern(at)),
        "damage got through"
    );
    took
}

#[test]
fn devices_end_with_the_switch_and_bad_names_are_refused() {
    if !inside("devices_end_with_the_switch_and_bad_names_are_refused") {
        return;
    }
    let switch = pair();
    sh("ip -n a link show tap0");
    let taken = Tap::open("/run/netns/a".as_ref(), "tap0")
        .map(|_| ())
        .unwrap_err();
    assert!(taken.to_string().contains("tap0"), "{taken}");
    let long = Tap::open("/run/netns/a".as_ref(), "a-name-that-is-too-long")
        .map(|_| ())
        .unwrap_err();
    assert_eq!(long.kind(), ErrorKind::InvalidInput);
    let nowhere = Tap::open("/run/netns/z".as_ref(), "tap0")
        .map(|_| ())
        .unwrap_err();
    assert!(nowhere.to_string().contains("/run/netns/z"), "{nowhere}");
    drop(switch);
    sh("! ip -n a link show tap0 2>/dev/null");
}
