//! The commands about workers, as scripts write them.

use palyra_state::{Command, fleet};

use super::Args;
use crate::kit::{attack, workers};

pub(crate) fn command(args: &mut Args<'_>, name: &str) -> Command {
    let (worker_id, reason) = (args.id("worker"), args.text("reason"));
    let (worker, force) = (args.text("worker"), args.has("force").is_some());
    match name {
        "fleet.set_policy" => {
            let step = format!("policy {}", args.text("as"));
            let mut policy = args
                .has("as")
                .map_or_else(attack::policy, |_| attack::policy_after(&step).unwrap());
            if args.has("slots").is_some() {
                policy.leases_per_worker = args.number("slots") as u32;
            }
            if args.has("image").is_some() {
                policy.images = vec![attack::digest(&args.text("image"))];
            }
            let mut set = workers::set_policy(args.world, policy);
            if args.has("on").is_some() {
                set.expected_version = args.number("on");
            }
            fleet::SetPolicy { reason, ..set }.into()
        }
        "fleet.open_challenge" => workers::challenge(args.world, &worker).into(),
        "fleet.attest" => {
            let steps = args.text("steps");
            let steps: Vec<&str> = steps.split(';').filter(|step| !step.is_empty()).collect();
            let at = workers::situation(args.world, &worker);
            let shown = attack::forge(&at, &attack::key(&worker), &steps);
            workers::attest(args.world, &worker, shown).into()
        }
        "fleet.quarantine" => fleet::Quarantine { worker_id, reason }.into(),
        "fleet.reverify" => fleet::Reverify { worker_id, reason }.into(),
        "fleet.release" => fleet::Release { worker_id, reason }.into(),
        "fleet.drain" => fleet::Drain {
            worker_id,
            reason,
            deadline_ms: args.number("deadline") * 1_000,
            force,
        }
        .into(),
        "fleet.cleanup" => fleet::Cleanup {
            worker_id,
            reason,
            force,
        }
        .into(),
        "fleet.violate" => fleet::Violate {
            worker_id,
            lease_id: args.id("lease"),
            fence: args.number("fence"),
            kind: args.text("kind"),
            message: args.text("message"),
        }
        .into(),
        "fleet.lapse" => fleet::Lapse { ids: args.ids("ids") }.into(),
        "fleet.recheck" => fleet::Recheck { ids: args.ids("ids") }.into(),
        "fleet.reap" => fleet::Reap {
            older_than_ms: args.number("older") * 1_000,
        }
        .into(),
        _ => panic!("no such command: {name}"),
    }
}
