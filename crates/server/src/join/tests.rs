//! What `palyrad join` makes of the folder that it is given, before and after it asked.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use palyra_pki::layout::{CONFIG, NewConfig, render_config};
use palyra_pki::{JoinToken, ticket};

use super::{PENDING, addresses, already_joined, begin, config_text, refusal};
use crate::cli::JoinArgs;
use crate::join::Trouble;

const CLUSTER: &str = "01JD7Z8QK3M5N7P9R1S3T5V7X9";
const OTHER: &str = "01JD7ZB2C4D6E8F0G1H3J5K7M9";

fn args(dir: &Path, name: &str) -> JoinArgs {
    JoinArgs {
        token: None,
        token_file: None,
        data_dir: dir.join("r2"),
        name: name.to_owned(),
        listen_host: "127.0.0.1".to_owned(),
        base_port: 7450,
        advertise_host: Some("r2.example".to_owned()),
    }
}

fn token(cluster_id: &str, id: &str) -> JoinToken {
    JoinToken {
        cluster_id: cluster_id.to_owned(),
        id: id.to_owned(),
        secret: ticket::Secret::from_bytes(&[7; 16]).unwrap(),
        root_pin: [1; 32],
        endpoints: vec!["127.0.0.1:7442".to_owned()],
    }
}

#[test]
fn what_is_begun_is_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let (args, token) = (args(dir.path(), "r2"), token(CLUSTER, OTHER));
    let told = || addresses(&args).unwrap();
    let first = begin(&args, &token, told()).unwrap();
    assert_eq!(
        already_joined(&args, &token).unwrap(),
        None,
        "a join that is under way is no stranger's folder"
    );
    let again = begin(&args, &token, told()).unwrap();
    assert_eq!(
        (&again.replica_key, &again.authority_key),
        (&first.replica_key, &first.authority_key)
    );
    // The cluster may have recorded the first addresses: with others nobody would ever reach this replica.
    let mut elsewhere = told();
    elsewhere[0] = "r2.example:9999".to_owned();
    let failure = begin(&args, &token, elsewhere).err().unwrap().to_string();
    assert!(
        failure.contains("r2.example:7454") && failure.contains("--base-port"),
        "{failure}"
    );
    let mode = fs::metadata(args.data_dir.join(PENDING))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn another_token_does_not_take_the_keys_over() {
    let dir = tempfile::tempdir().unwrap();
    let args = args(dir.path(), "r2");
    begin(&args, &token(CLUSTER, OTHER), addresses(&args).unwrap()).unwrap();
    let failure = begin(&args, &token(CLUSTER, CLUSTER), addresses(&args).unwrap())
        .err()
        .unwrap()
        .to_string();
    assert!(
        failure.contains(PENDING) && failure.contains("another token"),
        "{failure}"
    );
}

#[test]
fn a_strangers_folder_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let args = args(dir.path(), "r2");
    fs::create_dir(&args.data_dir).unwrap();
    assert_eq!(
        already_joined(&args, &token(CLUSTER, OTHER)).unwrap(),
        None,
        "an empty one will do"
    );
    fs::write(args.data_dir.join("photos"), "x").unwrap();
    let failure = already_joined(&args, &token(CLUSTER, OTHER))
        .unwrap_err()
        .to_string();
    assert!(
        failure.contains("photos") && failure.contains("--data-dir"),
        "{failure}"
    );
}

#[test]
fn a_finished_join_says_so_and_another_clusters_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let args = args(dir.path(), "r2");
    fs::create_dir(&args.data_dir).unwrap();
    fs::write(
        args.data_dir.join(CONFIG),
        config_text(&args, CLUSTER, "palyra.internal", 5),
    )
    .unwrap();
    let said = already_joined(&args, &token(CLUSTER, OTHER)).unwrap().unwrap();
    assert!(said.contains("replica 5"), "{said}");
    let failure = already_joined(&args, &token(OTHER, CLUSTER))
        .unwrap_err()
        .to_string();
    assert!(failure.contains(CLUSTER), "{failure}");
}

#[test]
fn the_configuration_is_what_the_command_line_said() {
    let dir = tempfile::tempdir().unwrap();
    let expected = render_config(&NewConfig {
        cluster_id: CLUSTER,
        trust_domain: "palyra.internal",
        replica_id: 5,
        name: "r2",
        listen_host: "127.0.0.1",
        base_port: 7450,
        advertise_host: "r2.example",
    });
    assert_eq!(
        config_text(&args(dir.path(), "r2"), CLUSTER, "palyra.internal", 5),
        expected
    );
}

#[test]
fn only_what_may_change_is_asked_elsewhere() {
    let status = |error| crate::status::status(&error, 1);
    let next = refusal(&status(palyra_control::Error::Unavailable { leader_hint: None }));
    assert!(matches!(next, Trouble::Next(_)));
    let last = refusal(&status(palyra_control::Refusal::WrongJoinProof.into()));
    assert!(matches!(last, Trouble::Refused(failure) if failure.to_string().contains("E1030")));
    let defect = refusal(&status(palyra_control::Error::Internal("disk".to_owned())));
    assert!(
        matches!(defect, Trouble::Next(_)),
        "the keys stay: the replica may have been admitted"
    );
    assert!(matches!(
        refusal(&tonic::Status::unavailable("no detail")),
        Trouble::Next(_)
    ));
}
