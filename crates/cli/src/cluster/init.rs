//! `palyra cluster init`: the birth of a cluster, offline.
//!
//! What is made: the cluster's root and its key encryption key, the first replica's authority, the first
//! operator's credential, and the first log entry, which says all that to the cluster. What never lives here:
//! the names and contexts of the files (`palyra_pki::layout`), and starting anything.
//! Invariants: the folder appears whole or not at all (made aside, synced, renamed); nothing that exists is
//! overwritten; the first entry is one that the state machine accepts; no private key is written unsealed,
//! but the operator's own, which its owner alone can read; the root's key exists in no file but the entry.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use palyra_client::context::{Adding, Contexts, check_name};
use palyra_client::{Class, fill_random, new_ulid, wall_ms};
use palyra_pki::ca::{CaError, HostNames, IssuedCert};
use palyra_pki::layout::{self, NewConfig};
use palyra_pki::{
    Authority, Credential, Kek, KeyPair, Purpose, Role, Root, SpiffeId, TrustBundle, TrustDomain,
};
use palyra_state::cluster::{Action, Addresses, Command, Genesis};
use palyra_state::identity::NewCertificate;
use palyra_state::{Actor, Digest, Envelope, Id, MemRead, Position};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use zeroize::Zeroizing;

use super::Init;
use crate::failure::{Failure, Result};
use crate::output::note;
use crate::output::table::facts;
use crate::session::Global;

/// The first replica's id.
const FIRST: u64 = 1;
const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
/// How long the first operator's certificate is good.
const OPERATOR_VALIDITY_MS: u64 = 365 * DAY_MS;
/// How long the certificate in the first entry is good; the replica makes itself fresh ones.
const REPLICA_VALIDITY_MS: u64 = 30 * DAY_MS;

/// A cluster that was made, and is not on disk yet.
struct Newborn {
    cluster_id: String,
    trust_domain: TrustDomain,
    kek: Kek,
    authority_key_sealed: Vec<u8>,
    authority_cert: Vec<u8>,
    root_cert: Vec<u8>,
    root_pin: [u8; 32],
    genesis: Vec<u8>,
    credential: Credential,
}

/// Makes a cluster and says what to type next.
pub(crate) fn run(global: &Global, init: &Init) -> Result {
    let data_dir =
        std::path::absolute(&init.data_dir).map_err(|error| Failure::file("find", &init.data_dir, &error))?;
    refuse_existing(&data_dir)?;
    check_hosts(init)?;
    let home = Global::home()?;
    let newborn = conceive(init, wall_ms())?;
    let context = match &global.context {
        Some(name) => name.clone(),
        None => format!("palyra-{}", newborn.cluster_id[..8].to_ascii_lowercase()),
    };
    check_name(&context)?;
    refuse_context(&home, &context)?;
    let _held = hold_signals();
    tell_left_over(&data_dir);
    let aside = write_aside(&data_dir, init, &newborn)?;
    // The credential first: a folder without it would be a cluster that nobody can operate.
    let adding = Adding {
        endpoints: None,
        replace: false,
        make_current: true,
    };
    let added = Contexts::add(&home, &context, &newborn.credential, adding).map_err(Failure::from);
    let placed = added.and_then(|_| put_in_place(&aside, &data_dir).inspect_err(|_| forget(&home, &context)));
    if let Err(failure) = placed {
        // Best effort: what is left aside has another name, and never becomes a replica.
        let _ = fs::remove_dir_all(&aside);
        return Err(failure);
    }
    report(global, init, &newborn, &data_dir, &context)
}

/// From here on an interrupt waits: what follows takes a moment, and half of it is worth nothing. Where signals
/// cannot be held, one may leave a folder aside, which the next birth tells.
fn hold_signals() -> [Option<Signal>; 3] {
    [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
    ]
    .map(|kind| signal(kind).ok())
}

/// A folder that ext4 puts into each of its file systems.
const LOST_AND_FOUND: &str = "lost+found";

/// Tells of folders that a birth which was killed has left next to the wanted one. (What one has left inside of it
/// makes the folder one that is not empty, which is refused.)
fn tell_left_over(data_dir: &Path) {
    let (Some(parent), Some(name)) = (data_dir.parent(), data_dir.file_name()) else {
        return;
    };
    let beginning = aside_prefix(name);
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&beginning) {
            let path = entry.path();
            let path = path.display();
            note(&format!(
                "{path} is left of a birth that was cut off; no cluster knows it: rm -r {path}"
            ));
        }
    }
}

fn aside_prefix(name: &std::ffi::OsStr) -> String {
    format!(".{}.new-", name.to_string_lossy())
}

/// Takes back the context of a cluster that was not made.
fn forget(home: &Path, context: &str) {
    let _ = Contexts::remove(home, context);
}

fn refuse_existing(data_dir: &Path) -> Result {
    let stranger = match fs::read_dir(data_dir) {
        // Some file systems are born with a folder for what a repair finds.
        Ok(entries) => entries
            .flatten()
            .map(|entry| entry.file_name())
            .find(|name| name != LOST_AND_FOUND),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(Failure::file("read", data_dir, &error)),
    };
    let Some(stranger) = stranger else {
        return Ok(());
    };
    let folder = data_dir.display();
    let what = if data_dir.join(layout::CONFIG).exists() {
        "is the folder of a replica already".to_owned()
    } else {
        format!("is not empty (it holds {})", stranger.display())
    };
    Err(Failure::local(
        Class::Conflict,
        format!("{folder} {what}; nothing was changed"),
        "choose another folder: --data-dir DIR",
    ))
}

fn refuse_context(home: &Path, name: &str) -> Result {
    if !Contexts::load(home)?.contexts.contains_key(name) {
        return Ok(());
    }
    let message = format!("there is a context {name:?} already; nothing was made");
    let next = format!("choose another name: --context NAME, or remove it: palyra context rm {name}");
    Err(Failure::local(Class::Conflict, message, next))
}

/// A host that others cannot use, or ports beyond the last one, would only show when the second replica
/// joins.
fn check_hosts(init: &Init) -> Result {
    let unspecified = |host: &str| {
        host.parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_unspecified())
    };
    let advertised = init.advertise_host.as_deref().unwrap_or(&init.listen_host);
    if unspecified(advertised) {
        let message = format!("{advertised} is no address that others can connect to");
        return Err(Failure::usage(
            message,
            "name this machine as others reach it: --advertise-host HOST",
        ));
    }
    if init.base_port == 0 || init.base_port.checked_add(layout::METRICS_PORT).is_none() {
        return Err(Failure::usage(
            format!("{} leaves no room for six ports", init.base_port),
            "--base-port 7440",
        ));
    }
    Ok(())
}

fn defect(what: &dyn std::fmt::Display) -> Failure {
    Failure::local(
        Class::Internal,
        format!("the cluster cannot be made: {what}"),
        "palyra version",
    )
}

fn invalid(what: &dyn std::fmt::Display) -> Failure {
    Failure::usage(what, "palyra cluster init --help")
}

/// Makes all keys and certificates, and the entry that tells the cluster about them.
fn conceive(init: &Init, now_ms: u64) -> Result<Newborn> {
    let rng = &mut fill_random;
    let cluster_id = new_ulid();
    let trust_domain = match &init.trust_domain {
        Some(text) => TrustDomain::new(text),
        None => TrustDomain::for_cluster(&cluster_id),
    };
    let trust_domain = trust_domain.map_err(|error| invalid(&error))?;
    let kek = Kek::generate(rng);
    let root = Root::create(&cluster_id, &trust_domain, now_ms, rng).map_err(|error| defect(&error))?;
    let key = KeyPair::generate(rng).map_err(|error| defect(&error))?;
    let csr = key.make_csr().map_err(|error| defect(&error))?;
    let signed = root
        .sign_authority(&csr, FIRST, now_ms, rng)
        .map_err(|error| defect(&error))?;
    let authority = Authority::new(signed.der, key).map_err(|error| defect(&error))?;
    let seal = |purpose, context: &[u8], key: &KeyPair| {
        kek.seal(purpose, context, key.to_pkcs8(), &mut fill_random)
            .map_err(|error| defect(&error))
    };
    let root_key_sealed = seal(Purpose::RootKey, &layout::root_context(&cluster_id), root.key())?;
    let authority_context = layout::authority_context(&cluster_id, FIRST);
    let authority_key_sealed = seal(Purpose::ReplicaKey, &authority_context, authority.key())?;
    let replica = replica_certificate(&authority, &trust_domain, init, now_ms)?;
    let (operator, credential) = first_operator(&authority, &root, &cluster_id, &trust_domain, init, now_ms)?;
    let genesis = Genesis {
        cluster_id: state_id(&cluster_id)?,
        trust_domain: trust_domain.to_string(),
        root_cert_der: root.der().to_vec().into(),
        root_key_sealed: root_key_sealed.into(),
        replica_name: init.name.clone(),
        addresses: addresses(init),
        authority_cert_der: authority.der().to_vec().into(),
        replica_certificate: recorded(&replica)?,
        operator_name: init.operator.clone(),
        operator_certificate: recorded(&operator)?,
    };
    Ok(Newborn {
        genesis: first_entry(genesis, now_ms)?,
        root_pin: root.pin(),
        root_cert: root.der().to_vec(),
        authority_cert: authority.der().to_vec(),
        cluster_id,
        trust_domain,
        kek,
        authority_key_sealed,
        credential,
    })
}

/// The envelope's bytes. The state machine is asked before anything is written: what it refuses (a name, an
/// address) would otherwise only show when the replica starts.
fn first_entry(genesis: Genesis, now_ms: u64) -> Result<Vec<u8>> {
    let command = Command {
        action: Some(Action::Genesis(genesis)),
    };
    let envelope = Envelope::new(
        state_id(&new_ulid())?,
        Actor::System,
        palyra_state::Command::Cluster(command),
    );
    let encoded = envelope.encode();
    let position = Position { term: 1, index: 1 };
    let applied = palyra_state::apply(&MemRead::new(), position, now_ms, &envelope, &encoded);
    applied
        .reply
        .map_err(|reject| Failure::usage(reject.message(), reject.next()))?;
    Ok(encoded)
}

fn state_id(text: &str) -> Result<Id> {
    Id::parse(text).ok_or_else(|| defect(&format!("{text} is no ULID")))
}

fn advertise_host(init: &Init) -> &str {
    init.advertise_host.as_deref().unwrap_or(&init.listen_host)
}

fn addresses(init: &Init) -> Addresses {
    let at = |offset| layout::address(advertise_host(init), init.base_port, offset);
    Addresses {
        peer: at(layout::PEERS_PORT),
        node: at(layout::NODE_PORT),
        enrol: at(layout::ENROL_PORT),
        http: String::new(),
        // Metrics are for this machine only unless its configuration says otherwise.
        metrics: layout::address("127.0.0.1", init.base_port, layout::METRICS_PORT),
        quic: at(layout::QUIC_PORT),
    }
}

/// A certificate for the record. Its key is dropped here: a replica makes itself a new one at each start.
fn replica_certificate(
    authority: &Authority,
    domain: &TrustDomain,
    init: &Init,
    now_ms: u64,
) -> Result<IssuedCert> {
    let id = SpiffeId::replica(domain.clone(), FIRST).map_err(|error| defect(&error))?;
    let names = HostNames::from_hosts([init.listen_host.as_str(), advertise_host(init)]);
    issue(authority, &fresh_key()?, &id, REPLICA_VALIDITY_MS, &names, now_ms)
}

fn first_operator(
    authority: &Authority,
    root: &Root,
    cluster_id: &str,
    domain: &TrustDomain,
    init: &Init,
    now_ms: u64,
) -> Result<(IssuedCert, Credential)> {
    let id =
        SpiffeId::new(domain.clone(), Role::Operator, &init.operator).map_err(|error| invalid(&error))?;
    let key = fresh_key()?;
    let issued = issue(
        authority,
        &key,
        &id,
        OPERATOR_VALIDITY_MS,
        &HostNames::default(),
        now_ms,
    )?;
    let trust = TrustBundle::new(cluster_id, domain.clone(), vec![root.der().to_vec()])
        .map_err(|error| defect(&error))?;
    let chain = [issued.der.clone(), authority.der().to_vec()];
    let endpoint = layout::address(advertise_host(init), init.base_port, layout::NODE_PORT);
    let credential =
        Credential::new(&trust, vec![endpoint], &chain, &key).map_err(|error| invalid(&error))?;
    Ok((issued, credential))
}

fn fresh_key() -> Result<KeyPair> {
    KeyPair::generate(&mut fill_random).map_err(|error| defect(&error))
}

fn issue(
    authority: &Authority,
    key: &KeyPair,
    id: &SpiffeId,
    validity_ms: u64,
    names: &HostNames,
    now_ms: u64,
) -> Result<IssuedCert> {
    let csr = key.make_csr().map_err(|error| defect(&error))?;
    authority
        .issue_from_csr(&csr, id, validity_ms, names, now_ms, &mut fill_random)
        .map_err(|error| match error {
            // The hosts come from the command line.
            CaError::Names(what) => invalid(&what),
            other => defect(&other),
        })
}

fn recorded(issued: &IssuedCert) -> Result<NewCertificate> {
    let serial = hex::decode(&issued.serial).map_err(|error| defect(&error))?;
    Ok(NewCertificate {
        der: issued.der.clone().into(),
        spki: Digest::from_bytes(issued.spki_sha256),
        serial: serial.into(),
        not_before: issued.not_before_ms,
        not_after: issued.not_after_ms,
        authority: FIRST,
        authority_number: 0,
    })
}

/// Writes all files into a folder aside, durably: next to the wanted one, or in it when it exists, which may be a
/// volume of its own.
fn write_aside(data_dir: &Path, init: &Init, newborn: &Newborn) -> Result<PathBuf> {
    let name = data_dir
        .file_name()
        .ok_or_else(|| invalid(&format!("{} has no name", data_dir.display())))?;
    let parent = if data_dir.exists() {
        data_dir
    } else {
        data_dir.parent().unwrap_or(Path::new("/"))
    };
    let aside = parent.join(format!("{}{}", aside_prefix(name), std::process::id()));
    let absent: Vec<&Path> = parent.ancestors().filter(|folder| !folder.exists()).collect();
    let tls = aside.join(layout::TLS_DIR);
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&tls);
    made.map_err(|error| Failure::file("make the folder", &tls, &error))?;
    // Folders on the way that are new are as durable as what is put there.
    for folder in absent {
        sync_dir(folder.parent().unwrap_or(Path::new("/")))?;
    }
    let config = layout::render_config(&NewConfig {
        cluster_id: &newborn.cluster_id,
        trust_domain: newborn.trust_domain.as_str(),
        replica_id: FIRST,
        name: &init.name,
        listen_host: &init.listen_host,
        base_port: init.base_port,
        advertise_host: advertise_host(init),
    });
    let kek: Zeroizing<String> = newborn.kek.to_text();
    let authority = layout::certificates_to_pem(&[&newborn.authority_cert]);
    let root = layout::certificates_to_pem(&[&newborn.root_cert]);
    let files: [(&str, &[u8], u32); 6] = [
        (layout::KEK, kek.as_bytes(), 0o600),
        (layout::AUTHORITY_KEY, &newborn.authority_key_sealed, 0o600),
        (layout::AUTHORITY_CERT, authority.as_bytes(), 0o644),
        (layout::ROOT_CERT, root.as_bytes(), 0o644),
        (layout::GENESIS, &newborn.genesis, 0o600),
        (layout::CONFIG, config.as_bytes(), 0o644),
    ];
    let written = files
        .iter()
        .try_for_each(|(name, contents, mode)| write_new(&aside.join(name), contents, *mode));
    let synced = written
        .and_then(|()| sync_dir(&aside.join(layout::TLS_DIR)))
        .and_then(|()| sync_dir(&aside));
    match synced {
        Ok(()) => Ok(aside),
        Err(failure) => {
            let _ = fs::remove_dir_all(&aside);
            Err(failure)
        }
    }
}

fn write_new(path: &Path, contents: &[u8], mode: u32) -> Result {
    let fail = |error: std::io::Error| Failure::file("write", path, &error);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(fail)?;
    file.write_all(contents).map_err(fail)?;
    file.sync_all().map_err(fail)
}

fn sync_dir(path: &Path) -> Result {
    let synced = File::open(path).and_then(|folder| folder.sync_all());
    synced.map_err(|error| Failure::file("sync", path, &error))
}

/// A rename onto a folder fails unless that is empty: what somebody made meanwhile is never lost.
fn put_in_place(aside: &Path, data_dir: &Path) -> Result {
    if aside.parent() == Some(data_dir) {
        return move_up(aside, data_dir);
    }
    fs::rename(aside, data_dir).map_err(|error| Failure::file("make", data_dir, &error))?;
    sync_dir(data_dir.parent().unwrap_or(Path::new("/")))
}

/// Into a folder that exists, file by file. The configuration goes last: before it, this is no replica's folder.
fn move_up(aside: &Path, data_dir: &Path) -> Result {
    let fail = |error: std::io::Error| Failure::file("fill", data_dir, &error);
    let mut names = Vec::new();
    for entry in fs::read_dir(aside).map_err(fail)? {
        names.push(entry.map_err(fail)?.file_name());
    }
    names.sort_by_key(|name| name == layout::CONFIG);
    for name in names {
        fs::rename(aside.join(&name), data_dir.join(&name)).map_err(fail)?;
    }
    fs::remove_dir(aside).map_err(fail)?;
    sync_dir(data_dir)
}

#[derive(Serialize)]
struct Born<'a> {
    cluster_id: &'a str,
    trust_domain: &'a str,
    root_pin: String,
    data_dir: &'a Path,
    config: PathBuf,
    replica: &'a str,
    operator: &'a str,
    context: &'a str,
    endpoints: &'a [String],
}

fn report(global: &Global, init: &Init, newborn: &Newborn, data_dir: &Path, context: &str) -> Result {
    let born = Born {
        cluster_id: &newborn.cluster_id,
        trust_domain: newborn.trust_domain.as_str(),
        root_pin: hex::encode(newborn.root_pin),
        data_dir,
        config: data_dir.join(layout::CONFIG),
        replica: &init.name,
        operator: &init.operator,
        context,
        endpoints: &newborn.credential.endpoints,
    };
    let text = facts(&[
        ("cluster", format!("{} ({})", born.cluster_id, born.trust_domain)),
        ("root pin", born.root_pin.clone()),
        ("replica", format!("{} in {}", init.name, data_dir.display())),
        (
            "operator",
            format!(
                "{}, an admin; its credential is context {context:?}",
                init.operator
            ),
        ),
        (
            "keep safe",
            format!(
                "{}: every sealed key of the cluster opens with it",
                data_dir.join(layout::KEK).display()
            ),
        ),
    ]);
    let next = format!(
        "\nnext: palyrad run --config {}\nthen: palyra cluster status\n      \
         palyra cluster join-token --name r2   # for each further replica; three survive a loss\n      \
         palyra pairing code                   # to let the first machine in\n",
        born.config.display()
    );
    global.out().plain(&born, &(text + &next))
}

#[cfg(test)]
mod tests;
