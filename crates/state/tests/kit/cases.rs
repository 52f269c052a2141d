//! The cases of `benches/commands.txt`, one for each command: a state, and the entry that meets it.
//!
//! Needs `crate::kit` and `crate::script`. Invariant: nothing of a case depends on where or when it is
//! played.

use palyra_state::{Applied, Envelope, MemRead, Position, apply, leases, nodes};

use crate::kit::{World, id_at};
use crate::script::{self, duration, lease_script};

const TEXT: &str = include_str!("../../benches/commands.txt");

/// An entry that was not applied yet, over the state that it meets.
pub(crate) struct Case {
    pub(crate) state: MemRead,
    pub(crate) position: Position,
    pub(crate) at: u64,
    pub(crate) envelope: Envelope,
    pub(crate) bytes: Vec<u8>,
}

impl Case {
    pub(crate) fn apply(&self) -> Applied {
        apply(&self.state, self.position, self.at, &self.envelope, &self.bytes)
    }
}

/// The names of all cases.
#[allow(dead_code)]
pub(crate) fn names() -> Vec<&'static str> {
    TEXT.lines().filter_map(|line| line.strip_prefix("== ")).collect()
}

/// A case, over a world as `kit::large::large` makes it.
pub(crate) fn case(mut world: World, name: &str) -> Case {
    let lines = TEXT.lines().skip_while(|line| *line != format!("== {name}"));
    let lines = lines.skip(1).take_while(|line| !line.starts_with("== "));
    let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
    let (last, before) = lines.split_last().unwrap_or_else(|| panic!("no case {name}"));
    for line in before {
        if *line == "given nothing" {
            world = World::new();
        } else if let Some(made) = line.strip_prefix("given ") {
            lease_script::given(&mut world, made);
        } else if let Some(step) = line.strip_prefix('+') {
            world.advance(duration(step));
        } else {
            let line = looked_up(&mut world, line);
            let (actor, command, _) = script::parse(&mut world, &line);
            let applied = world.run(actor, command);
            assert!(applied.reply.is_ok(), "{name}: {line}: {:?}", applied.reply);
        }
    }
    let line = looked_up(&mut world, last);
    let (actor, command, _) = script::parse(&mut world, &line);
    assert_eq!(command.name(), name, "the case ends with another command");
    let envelope = Envelope::new(id_at(world.at, 1 << 41), actor, command);
    Case {
        position: Position {
            term: 1,
            index: world.index + 1,
        },
        at: world.at,
        bytes: envelope.encode(),
        envelope,
        state: world.state,
    }
}

/// The line with what stands for a number: `@node` for the epoch of its session, `@run/1` for the fence of a lease.
fn looked_up(world: &mut World, line: &str) -> String {
    if !line.contains("=@") {
        return line.to_owned();
    }
    lease_script::name_all(world);
    let words = line.split(' ').map(|word| match word.split_once("=@") {
        None => word.to_owned(),
        Some((key, name)) => {
            let id = world.id(name);
            let epoch = nodes::node(&world.state, id).map(|node| node.last_epoch);
            let fence = leases::lease(&world.state, id).map(|lease| lease.fence);
            let number = epoch.or(fence).unwrap_or_else(|| panic!("{line}"));
            format!("{key}={number}")
        }
    });
    words.collect::<Vec<_>>().join(" ")
}
