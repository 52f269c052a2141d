//! The commands about runs and leases, as scripts write them. A lease is named by its run and attempt,
//! `run/1`, and has the fence that the ledger gave it unless another is said; `file=name:size` stands for
//! bytes that the name makes.

use bytes::Bytes;
use palyra_state::dispatch::{Effect, Failure};
use palyra_state::fleet::Evidence;
use palyra_state::leases::{self, HeldState, Manifest, ManifestEntry, Outcome};
use palyra_state::{Actor, Command, Digest, Id, nodes};

use super::Args;
use crate::kit::{World, commands, fleet};

/// Gives every lease its name, `run/attempt`.
pub(crate) fn name_all(world: &mut World) {
    for lease in leases::leases(&world.state, None, usize::MAX) {
        let run = world.names.iter().find(|(_, id)| **id == lease.run_id);
        if let Some((run, _)) = run {
            let name = format!("{run}/{}", lease.attempt);
            world.names.insert(name, lease.id);
        }
    }
}

/// `policy 2` (slots of a worker), `lax policy` (their word is enough), `worker w1 slots 1, evidence 1` (what it
/// shows, as in attacks), `grant run lint`.
pub(crate) fn given(world: &mut World, made: &str) {
    let mut words = made.splitn(3, ' ');
    let (what, name, rest) = (
        words.next().unwrap(),
        words.next().unwrap(),
        words.next().unwrap_or_default(),
    );
    match what {
        "cluster" => {
            let genesis = commands::genesis(world);
            world.accept(Actor::System, genesis);
        }
        "lax" => fleet::lax(world),
        "policy" => fleet::policy(world, name.parse().expect(made)),
        "worker" => {
            let steps: Vec<&str> = rest.split(", ").filter(|step| !step.is_empty()).collect();
            fleet::ready(world, name, &steps);
        }
        "grant" => fleet::grant(world, name, rest),
        _ => panic!("{made}"),
    }
}

/// The bytes of a file with this name and size.
pub(crate) fn file(name: &str, size: usize) -> Bytes {
    let seed = name.bytes().fold(7u8, u8::wrapping_add);
    let byte = |at: usize| seed.wrapping_add((at % 251) as u8);
    Bytes::from((0..size).map(byte).collect::<Vec<u8>>())
}

fn sized(text: &str) -> (String, Bytes) {
    let (name, size) = text.split_once(':').expect(text);
    (name.to_owned(), file(name, size.parse().expect(text)))
}

/// `a:5,b:7` as files that are kept with the run.
fn manifest(text: &str) -> Option<Manifest> {
    if text.is_empty() {
        return None;
    }
    let entry = |text: &str| {
        let (path, bytes) = sized(text);
        ManifestEntry {
            path,
            digest: Digest::of(&bytes),
            size: bytes.len() as u64,
            stored: true,
            executable: false,
        }
    };
    let entries = text.split(',').map(entry).collect();
    Some(Manifest { entries })
}

/// The lease of `run/attempt`, and its fence.
pub(crate) fn named_lease(args: &mut Args<'_>, name: &str) -> (Id, u64) {
    let Some((run, attempt)) = name.split_once('/') else {
        return (args.world.id(name), 0);
    };
    let run_id = args.world.id(run);
    let of_run = leases::leases_of_run(&args.world.state, run_id);
    let attempt: u32 = attempt.parse().expect(name);
    let found = of_run.into_iter().find(|lease| lease.attempt == attempt);
    let found = found.unwrap_or_else(|| panic!("{name} is not leased"));
    args.world.names.insert(name.to_owned(), found.id);
    (found.id, found.fence)
}

/// `epoch=`, or that of the worker's present session.
fn epoch(args: &Args<'_>, worker_id: Id) -> u64 {
    let session = nodes::node(&args.world.state, worker_id).and_then(|node| node.session);
    let present = session.map_or(0, |session| session.epoch);
    args.has("epoch").map_or(present, |_| args.number("epoch"))
}

/// `lease=run/1`, and `fence=` when it is another one.
fn lease(args: &mut Args<'_>) -> (Id, u64) {
    let name = args.text("lease");
    let (id, fence) = named_lease(args, &name);
    let said = args.has("fence").map(|_| args.number("fence"));
    (id, said.unwrap_or(fence))
}

fn start(args: &mut Args<'_>) -> leases::StartRun {
    let labels = args.text("labels");
    let labels = labels.split(',').filter_map(|pair| pair.split_once(':'));
    leases::StartRun {
        run_id: args.id("run"),
        tool: args.text("tool"),
        params: Bytes::from_static(b"{}"),
        inputs: manifest(&args.text("inputs")),
        effect: Effect::parse(&args.has("effect").unwrap_or_else(|| "once".to_owned())).expect(args.line)
            as i32,
        max_attempts: args.number("attempts") as u32,
        ttl_ms: args.number("ttl"),
        timeout_ms: args.number("timeout"),
        min_evidence: Evidence::parse(&args.text("evidence")).expect(args.line) as i32,
        labels: labels
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        ..leases::StartRun::default()
    }
}

fn put(args: &mut Args<'_>) -> leases::PutArtifact {
    let (_, bytes) = sized(&args.text("file"));
    let offset = args.number("offset") as usize;
    let end = bytes.len().min(offset + palyra_state::limits::ARTIFACT_CHUNK);
    let mut chunk = bytes.slice(offset.min(end)..end).to_vec();
    if args.has("spoilt").is_some() {
        chunk[0] ^= 1;
    }
    let from = args.has("lease").map(|_| lease(args));
    leases::PutArtifact {
        run_id: args.id("run"),
        digest: Digest::of(&bytes),
        size: bytes.len() as u64,
        offset: offset as u64,
        chunk: Bytes::from(chunk),
        lease_id: from.map(|(id, _)| id),
        fence: from.map_or(0, |(_, fence)| fence),
    }
}

fn finish(args: &mut Args<'_>) -> leases::Finish {
    let (lease_id, fence) = lease(args);
    let outcome = Outcome::parse(&args.text("outcome")).expect(args.line);
    leases::Finish {
        lease_id,
        fence,
        outcome: outcome as i32,
        exit_code: args.has("exit").map(|code| code.parse().expect("a number")),
        result: Bytes::from_static(b"{}"),
        outputs: manifest(&args.text("outputs")),
        error: args.has("error").map(|code| Failure {
            code,
            message: String::new(),
        }),
        ..leases::Finish::default()
    }
}

/// `run/1:running,run/2:cleaned`.
fn held(args: &mut Args<'_>) -> Vec<leases::Held> {
    let list = args.text("held");
    let said = args.has("fence").map(|_| args.number("fence"));
    let list = list.split(',').filter_map(|held| held.split_once(':'));
    list.map(|(name, state)| {
        let (lease_id, fence) = named_lease(args, name);
        let state = match state {
            "running" => HeldState::Running,
            "finished" => HeldState::Finished,
            "cleaned" => HeldState::Cleaned,
            "unclean" => HeldState::Unclean,
            other => panic!("{other}"),
        };
        leases::Held {
            lease_id,
            fence: said.unwrap_or(fence),
            state: state as i32,
            message: String::new(),
        }
    })
    .collect()
}

/// `leases=a/1`, of the worker that is named.
fn renew(args: &mut Args<'_>) -> leases::Renew {
    let names = args.text("leases");
    let said = args.has("fence").map(|_| args.number("fence"));
    let worker_id = args.id("worker");
    let epoch = epoch(args, worker_id);
    let wish = |name: &str| {
        let (lease_id, fence) = named_lease(args, name);
        leases::LeaseRef {
            lease_id,
            fence: said.unwrap_or(fence),
            worker_id,
            epoch,
        }
    };
    leases::Renew {
        leases: names.split(',').map(wish).collect(),
    }
}

pub(crate) fn command(args: &mut Args<'_>, name: &str) -> Command {
    match name {
        "leases.start_run" => start(args).into(),
        "leases.put_artifact" => put(args).into(),
        "leases.cancel_run" => leases::CancelRun {
            run_id: args.id("run"),
            reason: args.text("reason"),
        }
        .into(),
        "leases.accept" => {
            let (lease_id, fence) = lease(args);
            let found = leases::lease(&args.world.state, lease_id).unwrap_or_default();
            let epoch = epoch(args, found.worker_id);
            leases::Accept {
                lease_id,
                fence,
                epoch,
            }
            .into()
        }
        "leases.renew" => renew(args).into(),
        "leases.finish" => finish(args).into(),
        "leases.cleaned" => {
            let (lease_id, fence) = lease(args);
            leases::Cleaned {
                lease_id,
                fence,
                ok: args.text("ok") != "no",
                message: args.text("message"),
                ..leases::Cleaned::default()
            }
            .into()
        }
        "leases.revoke_lease" => leases::RevokeLease {
            lease_id: lease(args).0,
            reason: args.text("reason"),
        }
        .into(),
        "leases.expire" => {
            let names = args.text("leases");
            let names = names.split(',').filter(|name| !name.is_empty());
            leases::Expire {
                leases: names.map(|name| named_lease(args, name).0).collect(),
                runs: args.ids("runs"),
            }
            .into()
        }
        "leases.reconcile" => {
            let worker_id = args.id("worker");
            leases::Reconcile {
                worker_id,
                epoch: epoch(args, worker_id),
                held: held(args),
            }
            .into()
        }
        _ => panic!("no such command: {name}"),
    }
}
