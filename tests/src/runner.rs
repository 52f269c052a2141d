//! Runs tests one after the other on one cluster, each with its time, and ends the cluster whatever happens.
//!
//! The standard harness runs tests on several threads and never drops what they share; a cluster of real
//! processes needs the opposite.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::LocalBoxFuture;

use crate::cluster::Cluster;

/// No test may take longer.
const LIMIT: Duration = Duration::from_secs(90);

/// A test: its name, and what it does with the cluster.
pub type Test = (
    &'static str,
    for<'a> fn(&'a mut Cluster) -> LocalBoxFuture<'a, ()>,
);

/// Runs those whose name contains one of the words on the command line, all without words, in order. Answers
/// the exit code: 0 when each held, 101 otherwise. `--list` prints the names.
#[must_use]
pub fn run(tests: &[Test]) -> i32 {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        for (name, _) in tests {
            println!("{name}: test");
        }
        return 0;
    }
    let words: Vec<&String> = arguments
        .iter()
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let chosen: Vec<&Test> = tests
        .iter()
        .filter(|(name, _)| words.is_empty() || words.iter().any(|word| name.contains(word.as_str())))
        .collect();
    if chosen.is_empty() {
        println!("no end-to-end test of that name");
        return 0;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let begun = Instant::now();
    let mut cluster = Cluster::birth(3);
    println!(
        "a cluster of three was born in {} ms",
        begun.elapsed().as_millis()
    );
    let mut failed = Vec::new();
    for (name, test) in &chosen {
        let begun = Instant::now();
        let outcome = runtime.block_on(async {
            tokio::time::timeout(LIMIT, AssertUnwindSafe(test(&mut cluster)).catch_unwind()).await
        });
        let held = matches!(outcome, Ok(Ok(())));
        println!(
            "test {name} ... {} ({} ms)",
            if held { "ok" } else { "FAILED" },
            begun.elapsed().as_millis()
        );
        if !held {
            failed.push(*name);
        }
    }
    println!(
        "{} of {} held in {} s",
        chosen.len() - failed.len(),
        chosen.len(),
        begun.elapsed().as_secs()
    );
    if failed.is_empty() {
        return 0;
    }
    println!(
        "failed: {}; the folder stays: {}",
        failed.join(", "),
        cluster.keep().display()
    );
    101
}
