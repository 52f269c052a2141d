//! The harness's own fabric between real namespaces: rules of a run's links are felt by sockets, are counted where
//! they were, and are gone when their layer is. The test runs itself once more under `unshare`; where that is not
//! allowed it says that it is skipped.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jepsen::net::tap::Tap;
use jepsen::net::{Net, Rule, Rules, Seat, between, tool};
use nix::sched::{CloneFlags, setns};

const INSIDE: &str = "JEPSEN_TAP_INSIDE";
const TEST: &str = "rules_of_links_are_felt_counted_and_lifted";
/// Only ever waited for by a test that fails.
const PATIENCE: Duration = Duration::from_secs(20);

fn inside() -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let unshare = ["-n", "-m", "--propagation", "private", "--"];
    let allowed = Command::new("unshare")
        .args(unshare)
        .args(["test", "-r", "/dev/net/tun"])
        .output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        eprintln!("{TEST} is skipped: this machine allows no network namespaces, or has no /dev/net/tun");
        return false;
    }
    let mut command = Command::new("unshare");
    command.args(unshare).arg(std::env::current_exe().unwrap());
    let status = command
        .args(["--exact", TEST, "--nocapture"])
        .env(INSIDE, "1")
        .status();
    assert!(
        status.unwrap().success(),
        "{TEST} failed inside of its namespaces"
    );
    false
}

/// Does something in a seat, on a thread of its own.
fn within<T: Send + 'static>(
    seat: Seat,
    work: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    let place = File::open(seat.namespace().unwrap()).unwrap();
    std::thread::spawn(move || {
        setns(place, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
}

/// Answers each byte with itself, on any number of connections, for as long as the test lives.
fn echo(seat: Seat) -> SocketAddr {
    let (bound, listening) = std::sync::mpsc::channel();
    within(seat, move || {
        let listener = TcpListener::bind((seat.address(), 0)).unwrap();
        bound.send(listener.local_addr().unwrap()).unwrap();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut byte = [0];
                while matches!(stream.read(&mut byte), Ok(1)) && stream.write_all(&byte).is_ok() {}
            });
        }
    });
    listening.recv().unwrap()
}

fn connect(seat: Seat, to: SocketAddr) -> TcpStream {
    let stream = within(seat, move || TcpStream::connect_timeout(&to, PATIENCE).unwrap());
    let stream = stream.join().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

fn round_trip(stream: &mut TcpStream) -> std::io::Result<Duration> {
    let begun = Instant::now();
    stream.write_all(b"x")?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    Ok(begun.elapsed())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_of_links_are_felt_counted_and_lifted() {
    if !inside() {
        return;
    }
    tool(&["mount", "-t", "tmpfs", "none", "/run"], "").await.unwrap();
    let net = Net::new(Some(Arc::new(Tap::build(7).await.unwrap())));
    let [one, two] = [1, 2].map(Seat::Replica);
    for seat in [one, two] {
        net.attach(seat).await.unwrap();
    }
    let at = echo(two);
    let mut stream = connect(one, at);
    let whole = round_trip(&mut stream).unwrap();
    let before = net.frames().await.unwrap();

    let delayed = Rule {
        delay_us: 30_000,
        ..Rule::NONE
    };
    let layer = net.put(between(&[one], &[two], delayed)).await.unwrap();
    let slow = round_trip(&mut stream).unwrap();
    assert!(slow >= Duration::from_millis(60), "30 ms each way took {slow:?}");
    let counted = net.frames().await.unwrap()[&(one, two)].since(&before[&(one, two)]);
    assert!(
        counted.slowed > 0 && counted.held_mean() >= Duration::from_millis(10),
        "{counted:?}"
    );
    assert!(net.lift(layer).await.unwrap() >= counted.slowed);
    println!("a round trip took {whole:?}, with 30 ms each way {slow:?}");
    // What was under way keeps its delay; this one has none.
    while round_trip(&mut stream).unwrap() >= Duration::from_millis(60) {}

    // One direction: the answers to segments of the other one would be reset in turn.
    let reset = Rule {
        reset: true,
        ..Rule::NONE
    };
    let layer = net.put(Rules::from([((one, two), reset)])).await.unwrap();
    let error = round_trip(&mut stream).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(net.lift(layer).await.unwrap() > 0, "and that was counted");
    round_trip(&mut connect(one, at)).unwrap();

    // The harness itself is at the switch as well.
    let at = echo(one);
    let mut own = TcpStream::connect_timeout(&at, PATIENCE).unwrap();
    let layer = net.put(between(&[one], &[two], Rule::CUT)).await.unwrap();
    round_trip(&mut own).unwrap();
    net.lift(layer).await.unwrap();
    net.heal().await.unwrap();
    round_trip(&mut connect(two, at)).unwrap();
}
