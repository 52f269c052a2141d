//! The cases whose instructions are counted (`benches/commands.rs`): there is one for each command, it is run, and its
//! entry is accepted.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "kit/cases.rs"]
mod cases;
mod kit;
#[path = "kit/script.rs"]
mod script;

use std::collections::BTreeSet;

use kit::large;

/// The names that `Command::name` gives, as they stand in its source: no list of them exists otherwise.
fn commands() -> BTreeSet<&'static str> {
    let source = include_str!("../src/command.rs");
    let names = source
        .lines()
        .filter_map(|line| line.split_once("(_) => \"")?.1.split('"').next());
    names.collect()
}

#[test]
fn every_command_has_a_case_that_is_run() {
    let cases = cases::names();
    let (found, runs) = (
        cases.iter().copied().collect(),
        include_str!("../benches/commands.rs"),
    );
    assert_eq!(commands(), found);
    assert_eq!(cases.len(), found.len(), "a case is told twice");
    for name in cases {
        let id = name.replace('.', "_");
        assert!(
            runs.contains(&format!("#[bench::{id}(\"{name}\")]")),
            "{name} is not run by benches/commands.rs"
        );
    }
}

#[test]
fn every_case_is_accepted_and_the_state_is_always_the_same() {
    let world = large::large();
    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("large-state");
    large::keep(&world, &file);
    let kept = large::kept(&file);
    assert_eq!(
        (kept.index, kept.at, &kept.names),
        (world.index, world.at, &world.names)
    );
    assert!(kept.state == world.state);
    let broken = palyra_state::invariants::check(&world.state);
    assert!(broken.is_empty(), "{broken:#?}");
    let mut refused = Vec::new();
    for name in cases::names() {
        let applied = cases::case(world.clone(), name).apply();
        if let Err(reject) = applied.reply {
            refused.push(format!("{name}: {} {}", reject.code(), reject.message()));
        }
    }
    assert!(refused.is_empty(), "{refused:#?}");
}
