//! Scripts: commands in, replies and journal rows out. `UPDATE_EXPECT=1 cargo test` rewrites what is
//! expected.
//!
//! A script is a text of blocks. `+90s` moves the clock. `actor command key=value ..` proposes; the lines
//! below it, up to the next command, are what came of it. `given ..` makes what a script about leases begins with.
//! `# ..` is a comment. Names stand for ids, `$name`
//! in what is expected.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod kit;
#[path = "kit/script.rs"]
mod script;
#[path = "kit/times.rs"]
mod times;

use std::fmt::Write as _;
use std::path::Path;

use kit::{World, fingerprint};
use palyra_state::Envelope;
use script::{duration, lease_script};
use times::relative_times;

#[test]
fn scripts_come_out_as_expected() {
    let folder = Path::new(".").join("tests/scripts");
    let mut paths: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty());
    let mut failed = Vec::new();
    for path in paths {
        let expected = std::fs::read_to_string(&path).unwrap();
        let found = play(&expected);
        if found == expected {
            continue;
        }
        if std::env::var("UPDATE_EXPECT").is_ok() {
            std::fs::write(&path, found).unwrap();
            continue;
        }
        let differs = found
            .lines()
            .zip(expected.lines())
            .find(|(one, other)| one != other);
        let (found, expected) = differs.unwrap_or(("(more or fewer lines)", ""));
        failed.push(format!(
            "{}:\n  expected {expected}\n  found    {found}",
            path.display()
        ));
    }
    assert!(
        failed.is_empty(),
        "{}\nUPDATE_EXPECT=1 rewrites them",
        failed.join("\n")
    );
}

/// The script with what comes of it.
fn play(script: &str) -> String {
    let mut world = World::new();
    let mut out = String::new();
    for line in script.lines() {
        let line = line.trim_end();
        if line.starts_with("  ") {
            continue; // what was expected
        }
        writeln!(out, "{line}").unwrap();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(step) = line.strip_prefix('+') {
            world.advance(duration(step));
            continue;
        }
        if let Some(made) = line.strip_prefix("given ") {
            lease_script::given(&mut world, made);
            continue;
        }
        let outcome = run(&mut world, line);
        lease_script::name_all(&mut world);
        for line in outcome.lines() {
            writeln!(out, "  {}", named(&world, line)).unwrap();
        }
    }
    out
}

fn run(world: &mut World, line: &str) -> String {
    let (actor, command, request) = script::parse(world, line);
    let applied = match request {
        Some(name) => {
            let request_id = world.id(&name);
            world.apply(&Envelope {
                request_id,
                actor,
                command,
            })
        }
        None => world.run(actor, command),
    };
    let mut out = String::new();
    let again = if applied.duplicate { "again " } else { "" };
    match &applied.reply {
        Ok(reply) => writeln!(out, "{again}ok {reply:?}").unwrap(),
        Err(reject) => {
            writeln!(
                out,
                "{again}refused {} {}: {}",
                reject.code(),
                reject.class().as_str(),
                reject.message()
            )
            .unwrap();
        }
    }
    for row in &applied.rows {
        write!(
            out,
            "{}.{} {} {} {}",
            row.index, row.ordinal, row.actor, row.action, row.subject
        )
        .unwrap();
        for (key, value) in &row.detail {
            write!(out, " {key}={value}").unwrap();
        }
        out.push('\n');
    }
    out
}

/// Ids and fingerprints of known names become `$name` and `#name`; times become relative.
fn named(world: &World, line: &str) -> String {
    let mut line = line.to_owned();
    for (name, id) in &world.names {
        line = line.replace(&id.to_string(), &format!("${name}"));
        line = line.replace(&fingerprint(name).to_string(), &format!("#{name}"));
        line = line.replace(&kit::key(name).to_string(), &format!("#key-of-{name}"));
    }
    for name in ["root", "alice", "bob", "r1", "r2", "r3", "alice2", "root2", "n1b"] {
        line = line.replace(&fingerprint(name).to_string(), &format!("#{name}"));
    }
    relative_times(&line)
}
