//! End to end: three real `palyrad` processes with real TLS and real disks, the real `palyra`, and nodes that
//! behave and nodes that don't.
#![allow(clippy::unwrap_used)]

mod approvals;
mod attacks;
mod authorities;
mod certificates;
mod damage;
mod depth;
mod dispatch;
mod faults;
mod hostile;
mod liveness;
mod operations;
mod pairing;
mod quic;
mod revocation;
mod unclean;
mod workers;

use palyra_tests::runner::{self, Test};

/// In this order: what breaks replicas comes last.
const TESTS: &[Test] = &[
    ("birth_gives_three_voters", |c| {
        Box::pin(operations::birth_gives_three_voters(c))
    }),
    ("a_foreign_data_folder_is_refused", |c| {
        Box::pin(async { operations::a_foreign_data_folder_is_refused(c) })
    }),
    ("an_unknown_key_in_a_config_is_named", |c| {
        Box::pin(async { operations::an_unknown_key_in_a_config_is_named(c) })
    }),
    ("a_port_in_use_is_named", |c| {
        Box::pin(async { operations::a_port_in_use_is_named(c) })
    }),
    ("a_pin_pairs_across_three_replicas", |c| {
        Box::pin(pairing::a_pin_pairs_across_three_replicas(c))
    }),
    ("a_ticket_pairs", |c| Box::pin(pairing::a_ticket_pairs(c))),
    ("a_pairing_goes_on_after_an_interruption", |c| {
        Box::pin(pairing::a_pairing_goes_on_after_an_interruption(c))
    }),
    ("a_rejected_machine_hears_why", |c| {
        Box::pin(pairing::a_rejected_machine_hears_why(c))
    }),
    ("wrong_pins_burn_the_code", |c| {
        Box::pin(pairing::wrong_pins_burn_the_code(c))
    }),
    ("grants_are_asked_for_and_decided_by_others", |c| {
        Box::pin(approvals::grants_are_asked_for_and_decided_by_others(c))
    }),
    ("a_pairing_is_decided_by_another_operator", |c| {
        Box::pin(approvals::a_pairing_is_decided_by_another_operator(c))
    }),
    ("what_nobody_decides_ends_in_time", |c| {
        Box::pin(async { approvals::what_nobody_decides_ends_in_time(c) })
    }),
    ("one_code_pairs_one_of_two_machines", |c| {
        Box::pin(pairing::one_code_pairs_one_of_two_machines(c))
    }),
    ("expired_and_revoked_codes_are_refused", |c| {
        Box::pin(pairing::expired_and_revoked_codes_are_refused(c))
    }),
    ("frames_that_are_no_messages_get_a_code", |c| {
        Box::pin(pairing::frames_that_are_no_messages_get_a_code(c))
    }),
    ("every_replica_reaches_the_node", |c| {
        Box::pin(dispatch::every_replica_reaches_the_node(c))
    }),
    ("failures_say_what_failed", |c| {
        Box::pin(dispatch::failures_say_what_failed(c))
    }),
    ("bad_requests_are_refused_and_leave_nothing", |c| {
        Box::pin(dispatch::bad_requests_are_refused(c))
    }),
    ("the_person_at_the_machine_is_asked", |c| {
        Box::pin(dispatch::the_person_at_the_machine_is_asked(c))
    }),
    ("a_cancelled_job_ends_on_the_node", |c| {
        Box::pin(dispatch::a_cancelled_job_ends_on_the_node(c))
    }),
    ("a_once_job_is_not_run_again_by_a_new_agent", |c| {
        Box::pin(dispatch::a_once_job_is_not_run_again(c))
    }),
    ("what_a_program_writes_is_seen_at_every_replica", |c| {
        Box::pin(depth::what_a_program_writes_is_seen(c))
    }),
    ("what_fails_for_a_while_is_tried_again", |c| {
        Box::pin(depth::what_fails_for_a_while_is_tried_again(c))
    }),
    ("slots_and_queues_are_kept", |c| {
        Box::pin(depth::slots_and_queues_are_kept(c))
    }),
    ("results_late_foreign_or_twice_change_nothing", |c| {
        Box::pin(hostile::results_late_foreign_or_twice(c))
    }),
    ("messages_in_anothers_name_end_the_stream", |c| {
        Box::pin(hostile::messages_in_anothers_name(c))
    }),
    ("certificates_are_good_for_their_role_only", |c| {
        Box::pin(hostile::certificates_for_their_role_only(c))
    }),
    ("a_certificate_of_another_cluster_is_refused", |c| {
        Box::pin(hostile::another_clusters_certificate(c))
    }),
    ("a_reader_that_stalls_holds_up_nobody", |c| {
        Box::pin(hostile::a_reader_that_stalls_holds_up_nobody(c))
    }),
    ("pairing_messages_out_of_order_are_refused", |c| {
        Box::pin(hostile::pairing_messages_out_of_order(c))
    }),
    ("a_nonce_is_worth_nothing_on_another_connection", |c| {
        Box::pin(hostile::a_nonce_on_another_connection(c))
    }),
    ("a_node_without_streams_polls", |c| {
        Box::pin(hostile::a_node_without_streams_polls(c))
    }),
    ("a_renewed_certificate_works_beside_the_old", |c| {
        Box::pin(hostile::a_renewed_certificate_works_beside_the_old(c))
    }),
    ("certificates_that_live_seconds", |c| {
        Box::pin(certificates::certificates_that_live_seconds(c))
    }),
    ("a_node_lives_on_quic_alone", |c| {
        Box::pin(quic::a_node_lives_on_quic_alone(c))
    }),
    ("without_udp_a_node_falls_back_and_says_so", |c| {
        Box::pin(quic::without_udp_a_node_falls_back_and_says_so(c))
    }),
    ("a_session_survives_a_change_of_address", |c| {
        Box::pin(quic::a_session_survives_a_change_of_address(c))
    }),
    ("the_agent_runs_in_the_background", |c| {
        Box::pin(dispatch::the_agent_runs_in_the_background(c))
    }),
    // First of those about workers: the cluster has no policy until then.
    ("the_attack_table_over_the_wire", |c| {
        Box::pin(attacks::the_attack_table_over_the_wire(c))
    }),
    ("old_fences_and_failed_cleanups", |c| {
        Box::pin(unclean::old_fences_and_failed_cleanups(c))
    }),
    ("a_policy_is_changed_by_what_was_shown", |c| {
        Box::pin(workers::a_policy_is_changed_by_what_was_shown(c))
    }),
    ("a_runs_lines_are_followed", |c| {
        Box::pin(workers::a_runs_lines_are_followed(c))
    }),
    ("operators_hold_a_worker", |c| {
        Box::pin(workers::operators_hold_a_worker(c))
    }),
    ("a_changed_tool_is_never_run", |c| {
        Box::pin(workers::a_changed_tool_is_never_run(c))
    }),
    ("a_revoked_worker_has_nothing", |c| {
        Box::pin(workers::a_revoked_worker_has_nothing(c))
    }),
    ("a_dead_workers_run_goes_on_elsewhere", |c| {
        Box::pin(workers::a_dead_workers_run_goes_on_elsewhere(c))
    }),
    ("a_run_survives_the_leader", |c| {
        Box::pin(workers::a_run_survives_the_leader(c))
    }),
    ("a_node_survives_each_replica_in_turn", |c| {
        Box::pin(faults::a_node_survives_each_replica_in_turn(c))
    }),
    ("work_in_flight_ends_right", |c| {
        Box::pin(depth::work_in_flight_ends_right(c))
    }),
    ("work_goes_on_after_the_leader_is_killed", |c| {
        Box::pin(faults::work_goes_on_after_the_leader_is_killed(c))
    }),
    ("a_frozen_replica_is_left", |c| {
        Box::pin(faults::a_frozen_replica_is_left(c))
    }),
    ("a_replica_that_stops_moves_its_nodes", |c| {
        Box::pin(liveness::a_replica_that_stops_moves_its_nodes(c))
    }),
    ("a_lost_node_is_suspect_and_comes_back_elsewhere", |c| {
        Box::pin(liveness::a_lost_node_is_suspect_and_comes_back_elsewhere(c))
    }),
    ("an_agent_that_stops_is_offline_at_once", |c| {
        Box::pin(liveness::an_agent_that_stops_is_offline_at_once(c))
    }),
    ("a_revoked_device_is_out_everywhere", |c| {
        Box::pin(faults::a_revoked_device_is_out_everywhere(c))
    }),
    ("a_woken_replica_serves_no_revoked_request", |c| {
        Box::pin(revocation::a_woken_replica_serves_no_revoked_request(c))
    }),
    ("a_device_is_revoked_removed_and_purged", |c| {
        Box::pin(revocation::a_device_is_revoked_removed_and_purged(c))
    }),
    ("a_feed_hops_between_replicas", |c| {
        Box::pin(revocation::a_feed_hops_between_replicas(c))
    }),
    // After the revocations: they have to reach a replica that was removed a moment ago, and would wait for this one.
    ("a_join_token_is_good_once", |c| {
        Box::pin(operations::a_join_token_is_good_once(c))
    }),
    ("every_format_is_what_it_says", |c| {
        Box::pin(async { operations::every_format_is_what_it_says(c) })
    }),
    ("commands_leave_a_frozen_replica", |c| {
        Box::pin(operations::commands_leave_a_frozen_replica(c))
    }),
    ("a_watch_goes_on_elsewhere", |c| {
        Box::pin(operations::a_watch_goes_on_elsewhere(c))
    }),
    ("authorities_are_replaced_one_and_all", |c| {
        Box::pin(authorities::authorities_are_replaced_one_and_all(c))
    }),
    ("a_stranger_checks_the_lists_of_revoked_certificates", |c| {
        Box::pin(authorities::a_stranger_checks_the_lists_of_revoked_certificates(
            c,
        ))
    }),
    ("the_root_is_replaced_while_nodes_come_and_go", |c| {
        Box::pin(authorities::the_root_is_replaced_while_nodes_come_and_go(c))
    }),
    ("the_journal_holds", |c| {
        Box::pin(async { operations::the_journal_holds(c) })
    }),
    ("one_changed_byte_is_found", |c| {
        Box::pin(damage::one_changed_byte_is_found(c))
    }),
    ("a_folder_from_the_future_is_refused", |c| {
        Box::pin(damage::a_folder_from_the_future_is_refused(c))
    }),
    ("a_replica_without_its_database_stays_out", |c| {
        Box::pin(damage::a_replica_without_its_database_stays_out(c))
    }),
    ("a_full_disk_stops_one_replica", |c| {
        Box::pin(damage::a_full_disk_stops_one_replica(c))
    }),
];

fn main() {
    std::process::exit(runner::run(TESTS));
}
