//! Instructions of apply for each command, and of encoding and decoding entries and records.
//!
//! Run by `./tests/run`, which compares the counts with `tests/budgets.txt`. A case is prepared over a state of
//! realistic size (`tests/kit/large.rs`); only the body of a function below is counted. No clock and no chance is read.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]
// The macros of the benchmarks make public items, and code that would open files if `perf` were asked to count.
#![allow(missing_docs, unreachable_pub, clippy::disallowed_types)]

#[path = "../tests/kit/cases.rs"]
mod cases;
#[path = "../tests/kit/mod.rs"]
mod kit;
#[path = "../tests/kit/script.rs"]
mod script;

use std::hint::black_box;
use std::path::PathBuf;

use cases::Case;
use gungraun::{Callgrind, LibraryBenchmarkConfig, library_benchmark, library_benchmark_group, main};
use kit::large;
use palyra_state::{Applied, Envelope, Id, decode, nodes, tables};
use prost::Message as _;

/// Where the state lies while the benchmarks run.
fn file() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_TARGET_TMPDIR"), "/counted-state"))
}

/// A case that is never dropped: freeing the state is none of what is counted.
fn prepared(name: &str) -> &'static Case {
    let case = Box::leak(Box::new(cases::case(large::kept(&file()), name)));
    large::settle();
    case
}

#[library_benchmark(setup = prepared)]
#[bench::cluster_genesis("cluster.genesis")]
#[bench::cluster_mint_join_token("cluster.mint_join_token")]
#[bench::cluster_allocate_replica("cluster.allocate_replica")]
#[bench::cluster_admit_replica("cluster.admit_replica")]
#[bench::cluster_set_replica_status("cluster.set_replica_status")]
#[bench::cluster_update_replica_addresses("cluster.update_replica_addresses")]
#[bench::cluster_remove_replica("cluster.remove_replica")]
#[bench::cluster_raise_feature_level("cluster.raise_feature_level")]
#[bench::cluster_announce_certificate("cluster.announce_certificate")]
#[bench::access_add_operator("access.add_operator")]
#[bench::access_remove_operator("access.remove_operator")]
#[bench::access_set_role("access.set_role")]
#[bench::identity_revoke_device("identity.revoke_device")]
#[bench::identity_renew_certificate("identity.renew_certificate")]
#[bench::identity_revoke_operator_certificate("identity.revoke_operator_certificate")]
#[bench::identity_renew_operator_certificate("identity.renew_operator_certificate")]
#[bench::identity_confirm_certificate("identity.confirm_certificate")]
#[bench::identity_rotate_device("identity.rotate_device")]
#[bench::identity_recover_device("identity.recover_device")]
#[bench::identity_clear_clone("identity.clear_clone")]
#[bench::identity_set_policy("identity.set_policy")]
#[bench::identity_remove_device("identity.remove_device")]
#[bench::identity_purge_device("identity.purge_device")]
#[bench::pairing_mint_code("pairing.mint_code")]
#[bench::pairing_revoke_code("pairing.revoke_code")]
#[bench::pairing_begin_attempt("pairing.begin_attempt")]
#[bench::pairing_fail_attempt("pairing.fail_attempt")]
#[bench::pairing_prove("pairing.prove")]
#[bench::pairing_approve("pairing.approve")]
#[bench::pairing_reject("pairing.reject")]
#[bench::pairing_mark_completed("pairing.mark_completed")]
#[bench::pairing_expire("pairing.expire")]
#[bench::nodes_register("nodes.register")]
#[bench::nodes_attach("nodes.attach")]
#[bench::nodes_detach("nodes.detach")]
#[bench::nodes_detach_replica("nodes.detach_replica")]
#[bench::nodes_detach_many("nodes.detach_many")]
#[bench::nodes_lapse("nodes.lapse")]
#[bench::dispatch_submit("dispatch.submit")]
#[bench::dispatch_complete("dispatch.complete")]
#[bench::dispatch_await_mediation("dispatch.await_mediation")]
#[bench::dispatch_resume_from_mediation("dispatch.resume_from_mediation")]
#[bench::dispatch_cancel("dispatch.cancel")]
#[bench::dispatch_expire("dispatch.expire")]
#[bench::dispatch_wake("dispatch.wake")]
#[bench::ca_begin_root("ca.begin_root")]
#[bench::ca_advance_root("ca.advance_root")]
#[bench::ca_revert_root("ca.revert_root")]
#[bench::ca_certify_authority("ca.certify_authority")]
#[bench::ca_rotate_authority("ca.rotate_authority")]
#[bench::ca_ask_rotation("ca.ask_rotation")]
#[bench::ca_retire_authority("ca.retire_authority")]
#[bench::ca_acknowledge("ca.acknowledge")]
#[bench::ca_replica_ready("ca.replica_ready")]
#[bench::ca_publish_crl("ca.publish_crl")]
#[bench::approvals_create_grant("approvals.create_grant")]
#[bench::approvals_decide("approvals.decide")]
#[bench::approvals_withdraw("approvals.withdraw")]
#[bench::approvals_revoke_grant("approvals.revoke_grant")]
#[bench::approvals_expire("approvals.expire")]
#[bench::approvals_set_policy("approvals.set_policy")]
#[bench::fleet_set_policy("fleet.set_policy")]
#[bench::fleet_open_challenge("fleet.open_challenge")]
#[bench::fleet_attest("fleet.attest")]
#[bench::fleet_quarantine("fleet.quarantine")]
#[bench::fleet_reverify("fleet.reverify")]
#[bench::fleet_release("fleet.release")]
#[bench::fleet_drain("fleet.drain")]
#[bench::fleet_cleanup("fleet.cleanup")]
#[bench::fleet_violate("fleet.violate")]
#[bench::fleet_lapse("fleet.lapse")]
#[bench::fleet_recheck("fleet.recheck")]
#[bench::fleet_reap("fleet.reap")]
#[bench::leases_start_run("leases.start_run")]
#[bench::leases_put_artifact("leases.put_artifact")]
#[bench::leases_cancel_run("leases.cancel_run")]
#[bench::leases_accept("leases.accept")]
#[bench::leases_renew("leases.renew")]
#[bench::leases_finish("leases.finish")]
#[bench::leases_cleaned("leases.cleaned")]
#[bench::leases_revoke_lease("leases.revoke_lease")]
#[bench::leases_expire("leases.expire")]
#[bench::leases_reconcile("leases.reconcile")]
fn apply(case: &'static Case) -> Applied {
    let applied = black_box(case).apply();
    assert!(applied.reply.is_ok());
    applied
}

#[library_benchmark(setup = prepared)]
#[bench::dispatch_submit("dispatch.submit")]
#[bench::nodes_register("nodes.register")]
#[bench::leases_renew("leases.renew")]
#[bench::fleet_attest("fleet.attest")]
fn encode_entry(case: &'static Case) -> Vec<u8> {
    black_box(&case.envelope).encode()
}

#[library_benchmark(setup = prepared)]
#[bench::dispatch_submit("dispatch.submit")]
#[bench::nodes_register("nodes.register")]
#[bench::leases_renew("leases.renew")]
#[bench::fleet_attest("fleet.attest")]
fn decode_entry(case: &'static Case) -> Envelope {
    decode(black_box(&case.bytes)).unwrap()
}

fn record() -> nodes::Node {
    let mut world = large::kept(&file());
    let id: Id = world.id(&large::node(3));
    nodes::node(&world.state, id).unwrap()
}

fn record_bytes() -> &'static [u8] {
    Box::leak(record().encode_to_vec().into_boxed_slice())
}

#[library_benchmark]
#[bench::node(record())]
fn encode_record(record: nodes::Node) -> (Vec<u8>, nodes::Node) {
    (black_box(&record).encode_to_vec(), record)
}

#[library_benchmark]
#[bench::node(record_bytes())]
fn decode_record(bytes: &'static [u8]) -> nodes::Node {
    tables::NODES.decode(black_box(bytes))
}

library_benchmark_group!(
    name = entries,
    setup = large::keep(&large::large(), &file()),
    benchmarks = [apply, encode_entry, decode_entry, encode_record, decode_record]
);

main!(
    config = LibraryBenchmarkConfig::default().tool(Callgrind::with_args(["--cache-sim=no"])),
    library_benchmark_groups = entries
);
