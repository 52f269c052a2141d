//! Real wardens and sandboxes on this machine: what a tool that misbehaves can do, and what becomes of it.
//!
//! The wardens are this very program, started again, so it has a main of its own. `cargo test -p palyra-node
//! --test warden -- NAME` runs the tests whose names contain NAME. A test whose sandbox this machine cannot
//! make says so loudly.
#![allow(clippy::unwrap_used)]

#[path = "warden/escape.rs"]
mod escape;
#[path = "warden/kit.rs"]
mod kit;
#[path = "warden/lifetime.rs"]
mod lifetime;
#[path = "warden/limits.rs"]
mod limits;

use std::process::ExitCode;

type Test = (&'static str, fn());

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["worker", "warden"] => return palyra_node::worker::warden::main(false),
        ["worker", "warden", "--init"] => return palyra_node::worker::warden::main(true),
        ["supervise", spec] => return lifetime::supervise(spec),
        _ => {}
    }
    let filter = words.iter().find(|word| !word.starts_with('-'));
    let all: Vec<Test> = [escape::TESTS, limits::TESTS, lifetime::TESTS].concat();
    let chosen: Vec<Test> = all
        .into_iter()
        .filter(|(name, _)| filter.is_none_or(|part| name.contains(part)))
        .collect();
    if words.contains(&"--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let mut failed = Vec::new();
    for (name, test) in &chosen {
        let passed = std::panic::catch_unwind(test).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        if !passed {
            failed.push(*name);
        }
    }
    println!(
        "\ntest result: {}. {} passed; {} failed",
        if failed.is_empty() { "ok" } else { "FAILED" },
        chosen.len() - failed.len(),
        failed.len()
    );
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
