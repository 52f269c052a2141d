//! `jepsen doctor`: what this machine can do, found out by doing it, with the reason for each no.

use std::process::{Command, Stdio};

use anyhow::Result;
use serde_json::json;

use crate::cli::{DoctorArgs, Form};
use crate::cluster::Programs;
use crate::inside::{self, Ground};

/// One ability.
struct Probe {
    name: &'static str,
    /// What goes without it.
    serves: &'static str,
    /// Run inside namespaces, by `sh -ec`; it says why not on its standard error.
    script: &'static str,
}

/// Each is done in namespaces of its own and leaves nothing.
const PROBES: &[Probe] = &[
    Probe {
        name: "bridge",
        serves: "--fabric bridge: partitions, loss",
        script: "ip link add br0 type bridge; ip link add v0 type veth peer name v1; ip link set v0 master br0 up",
    },
    Probe {
        name: "namespaces-in-namespaces",
        serves: "a network namespace for each replica",
        script: "mount -t tmpfs none /run; mkdir /run/netns; ip netns add r1; ip -n r1 link set lo up",
    },
    Probe {
        name: "nft",
        serves: "partitions, loss:N, reset",
        script: "nft 'table inet t { chain input { type filter hook input priority 0; \
                 numgen random mod 100 < 5 counter drop; meta l4proto tcp counter reject with tcp reset; }; }'; \
                 nft -j list ruleset >/dev/null",
    },
    Probe {
        name: "tap",
        serves: "--fabric tap: delay, jitter, reorder, dup, corrupt",
        script: "ip tuntap add dev t0 mode tap; ip link set t0 up",
    },
    Probe {
        name: "tmpfs",
        serves: "data folders that do not share a disk",
        script: "mount -t tmpfs none /run; echo x > /run/x",
    },
    Probe {
        name: "fuse",
        serves: "--disk faultfs: power, disk:*",
        script: "test -c /dev/fuse || { echo 'no /dev/fuse: modprobe fuse' >&2; exit 1; }; exec 3<>/dev/fuse",
    },
    Probe {
        name: "cgroups",
        serves: "memory, cpu",
        script: "if test -f /sys/fs/cgroup/cgroup.controllers && grep -q memory /sys/fs/cgroup/cgroup.controllers; \
                 then d=/sys/fs/cgroup/jepsen-doctor-$$; else \
                 grep -q '^memory\\s.*\\s1$' /proc/cgroups || { echo 'no controller for memory' >&2; exit 1; }; \
                 d=$(grep ' - cgroup .*memory' /proc/self/mountinfo | cut -d' ' -f5 | head -n1)/jepsen-doctor-$$; fi; \
                 mkdir \"$d\"; rmdir \"$d\"",
    },
    Probe {
        name: "time-namespaces",
        serves: "--boot-offsets",
        script: "unshare --time --boottime 1000 true",
    },
];

/// Prints it. Exit code 2 when not even processes on loopback can be run.
///
/// # Errors
/// When it can't be printed.
pub fn main(args: &DoctorArgs) -> Result<u8> {
    let (ground, reduced) = inside::best_ground();
    let mut rows = vec![(
        "namespaces",
        "everything but kill and pause",
        apart(ground, reduced.clone()),
    )];
    for probe in PROBES {
        let able = if ground.is_apart() {
            attempt(ground, probe.script)
        } else {
            Err("it needs namespaces".to_owned())
        };
        rows.push((probe.name, probe.serves, able));
    }
    let programs = Programs::find(args.binary.as_deref());
    let found = programs
        .as_ref()
        .map(|_| ())
        .map_err(|error| format!("{error:#}"));
    let can_run = found.is_ok();
    rows.push(("palyrad", "everything", found));
    match args.output {
        Form::Json => {
            let row = |(name, serves, able): &(&str, &str, Result<(), String>)| {
                let why = able.as_ref().err();
                json!({"name": name, "serves": serves, "able": able.is_ok(), "why": why})
            };
            let rows: Vec<_> = rows.iter().map(row).collect();
            println!(
                "{}",
                json!({"ground": ground, "reduced": reduced, "abilities": rows})
            );
        }
        Form::Text => {
            for (name, serves, able) in &rows {
                match able {
                    Ok(()) => println!("yes  {name:<25} {serves}"),
                    Err(why) => println!("no   {name:<25} {serves}: {why}"),
                }
            }
            println!(
                "runs are on the ground {}{}",
                ground.word(),
                reduced.map(|why| format!(": {why}")).unwrap_or_default()
            );
        }
    }
    Ok(if can_run { 0 } else { 2 })
}

fn apart(ground: Ground, reduced: Option<String>) -> Result<(), String> {
    if ground.is_apart() {
        Ok(())
    } else {
        Err(reduced.unwrap_or_else(|| "refused".to_owned()))
    }
}

/// Runs a script in namespaces of its own.
fn attempt(ground: Ground, script: &str) -> Result<(), String> {
    let mut command = Command::new("unshare");
    command
        .args(ground.flags())
        .args(["--propagation", "private", "sh", "-ec", script]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(said.lines().next().unwrap_or("it said nothing").to_owned())
        }
        Err(error) => Err(format!("unshare does not start: {error}")),
    }
}
