//! What a birth leaves on disk: read back as a replica and an operator would.

use std::os::unix::fs::PermissionsExt;

use palyra_pki::PeerIdentity;

use super::*;

fn init(data_dir: &Path) -> Init {
    Init {
        data_dir: data_dir.to_owned(),
        name: "r1".to_owned(),
        listen_host: "127.0.0.1".to_owned(),
        advertise_host: None,
        base_port: 7440,
        operator: "admin".to_owned(),
        trust_domain: None,
    }
}

/// A folder that is removed with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        let path = std::env::temp_dir().join(format!("palyra-init-{}", new_ulid()));
        fs::create_dir(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn born(scratch: &Scratch) -> (PathBuf, Newborn) {
    let dir = scratch.0.join("r1");
    let init = init(&dir);
    let newborn = conceive(&init, wall_ms()).unwrap();
    let aside = write_aside(&dir, &init, &newborn).unwrap();
    put_in_place(&aside, &dir).unwrap();
    (dir, newborn)
}

#[test]
fn a_folder_that_exists_is_filled() {
    let scratch = Scratch::new();
    let dir = scratch.0.join("r1");
    // A volume of its own looks like this, and cannot be replaced by a rename.
    fs::create_dir_all(dir.join(LOST_AND_FOUND)).unwrap();
    refuse_existing(&dir).unwrap();
    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    let before = inode(&dir);
    let (dir, _) = born(&scratch);
    assert_eq!(inode(&dir), before, "the folder itself stays");
    let mut names: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["genesis.pb", "kek.key", LOST_AND_FOUND, "palyrad.toml", "tls"]
    );
    assert!(refuse_existing(&dir).is_err());
}

#[test]
fn the_folder_opens_with_its_key_file() {
    let scratch = Scratch::new();
    let (dir, newborn) = born(&scratch);
    let kek = Kek::from_text(&fs::read_to_string(dir.join(layout::KEK)).unwrap()).unwrap();
    let context = layout::authority_context(&newborn.cluster_id, 1);
    let sealed = fs::read(dir.join(layout::AUTHORITY_KEY)).unwrap();
    let key = KeyPair::from_pkcs8(&kek.open(Purpose::ReplicaKey, &context, &sealed).unwrap()).unwrap();
    let pem = fs::read_to_string(dir.join(layout::AUTHORITY_CERT)).unwrap();
    let certificate = layout::certificates_from_pem(&pem).unwrap().remove(0);
    Authority::new(certificate, key).unwrap();
    let mode = |name: &str| fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        [layout::KEK, layout::AUTHORITY_KEY, layout::GENESIS].map(mode),
        [0o600; 3]
    );
    assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    let config: toml::Table = fs::read_to_string(dir.join(layout::CONFIG))
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(
        config["replica"]["cluster_id"].as_str(),
        Some(newborn.cluster_id.as_str())
    );
}

#[test]
fn the_first_entry_decodes_and_its_root_key_opens() {
    let scratch = Scratch::new();
    let (dir, newborn) = born(&scratch);
    let envelope = palyra_state::decode(&fs::read(dir.join(layout::GENESIS)).unwrap()).unwrap();
    let palyra_state::Command::Cluster(Command {
        action: Some(Action::Genesis(genesis)),
    }) = envelope.command
    else {
        panic!("not a genesis");
    };
    assert_eq!(envelope.actor, Actor::System);
    assert_eq!(genesis.cluster_id.to_string(), newborn.cluster_id);
    assert_eq!(genesis.addresses.node, "127.0.0.1:7441");
    let context = layout::root_context(&newborn.cluster_id);
    let key = newborn
        .kek
        .open(Purpose::RootKey, &context, &genesis.root_key_sealed)
        .unwrap();
    let root = Root::open(genesis.root_cert_der.to_vec(), KeyPair::from_pkcs8(&key).unwrap()).unwrap();
    assert_eq!(root.pin(), newborn.root_pin);
    let operator = PeerIdentity::from_der(&genesis.operator_certificate.der).unwrap();
    assert_eq!(operator.id, newborn.credential.identity().unwrap().id);
    assert_eq!(
        genesis.operator_certificate.spki,
        Digest::from_bytes(operator.spki_sha256)
    );
    let replica = PeerIdentity::from_der(&genesis.replica_certificate.der).unwrap();
    assert_eq!(replica.id.replica_id(), Some(1));
}

#[test]
fn no_plain_private_key_lies_in_the_folder() {
    let scratch = Scratch::new();
    let (dir, newborn) = born(&scratch);
    let secrets = [&newborn.credential.key];
    for file in walk(&dir) {
        let contents = fs::read(&file).unwrap();
        let text = String::from_utf8_lossy(&contents);
        assert!(!text.contains("PRIVATE KEY"), "{}", file.display());
        assert!(
            secrets.iter().all(|secret| !text.contains(secret.as_str())),
            "{}",
            file.display()
        );
    }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(walk(&path))
        } else {
            files.push(path)
        }
    }
    assert!(!files.is_empty());
    files
}

#[test]
fn nothing_is_overwritten() {
    let scratch = Scratch::new();
    let (dir, _) = born(&scratch);
    let before = fs::read(dir.join(layout::KEK)).unwrap();
    assert_eq!(refuse_existing(&dir).unwrap_err().exit_code(), 11);
    let init = init(&dir);
    let second = conceive(&init, wall_ms()).unwrap();
    let aside = write_aside(&dir, &init, &second).unwrap();
    assert!(
        put_in_place(&aside, &dir).is_err(),
        "a rename onto a folder with contents fails"
    );
    assert_eq!(fs::read(dir.join(layout::KEK)).unwrap(), before);
    let empty = scratch.0.join("empty");
    fs::create_dir(&empty).unwrap();
    refuse_existing(&empty).unwrap();
    put_in_place(&aside, &empty).unwrap();
}

#[test]
fn what_the_cluster_would_refuse_is_refused_before_anything_is_written() {
    let scratch = Scratch::new();
    let base = init(&scratch.0.join("r1"));
    let bad = [
        Init {
            name: "no spaces".to_owned(),
            ..init(&base.data_dir)
        },
        Init {
            operator: "Admin".to_owned(),
            ..init(&base.data_dir)
        },
        Init {
            trust_domain: Some("UPPER".to_owned()),
            ..init(&base.data_dir)
        },
        Init {
            listen_host: "bad host".to_owned(),
            ..init(&base.data_dir)
        },
    ];
    for init in bad {
        let failure = conceive(&init, wall_ms())
            .err()
            .unwrap_or_else(|| panic!("{init:?} was accepted"));
        assert_eq!(failure.exit_code(), 2, "{init:?}: {failure:?}");
    }
    let unspecified = Init {
        listen_host: "0.0.0.0".to_owned(),
        ..init(&base.data_dir)
    };
    assert_eq!(check_hosts(&unspecified).unwrap_err().exit_code(), 2);
    let high = Init {
        base_port: 65_533,
        ..init(&base.data_dir)
    };
    assert_eq!(check_hosts(&high).unwrap_err().exit_code(), 2);
    assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 0);
}
