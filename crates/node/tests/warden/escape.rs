//! Tools that want out: of their folder, of their network, of their processes.

use palyra_node::worker::execute::How;

use crate::kit::{Lease, is_root, processes, until};

pub(crate) const TESTS: &[(&str, fn())] = &[
    (
        "a_tool_gets_parameters_and_answers",
        a_tool_gets_parameters_and_answers,
    ),
    ("nothing_outside_is_written", nothing_outside_is_written),
    ("nothing_outside_is_read", nothing_outside_is_read),
    ("landlock_alone_holds_the_same", landlock_alone_holds_the_same),
    ("there_is_no_network", there_is_no_network),
    (
        "no_other_process_is_seen_or_signalled",
        no_other_process_is_seen_or_signalled,
    ),
    ("nobody_leaves_by_forking_away", nobody_leaves_by_forking_away),
    (
        "nobody_leaves_without_a_pid_namespace_either",
        nobody_leaves_without_a_pid_namespace_either,
    ),
    ("no_right_comes_back", no_right_comes_back),
    (
        "a_workspace_is_only_what_the_scope_names",
        a_workspace_is_only_what_the_scope_names,
    ),
    (
        "what_is_required_and_missing_is_not_begun",
        what_is_required_and_missing_is_not_begun,
    ),
    (
        "links_in_a_workspace_lead_nowhere",
        links_in_a_workspace_lead_nowhere,
    ),
];

fn a_tool_gets_parameters_and_answers() {
    let mut lease = Lease::new("pwd >&2; env | sort >&2; ls / >&2; cat; echo > out/made; exit 3");
    let ended = lease.run();
    assert_eq!(ended.how, How::Exited(3), "{ended:?} {}", lease.words());
    assert_eq!(ended.stdout, b"{\"answer\": 42}");
    assert!(ended.gone && lease.out("made").exists());
    let words = lease.words();
    for line in ["/work", "PALYRA_WORK=/work", "TMPDIR=/tmp", "PWD=/work"] {
        assert!(words.lines().any(|said| said == line), "{line}: {words}");
    }
    assert!(
        !words.contains("root") && !words.contains("home") && !words.contains("CARGO"),
        "{words}"
    );
    println!("  sandbox here: {}", ended.sandbox.join(" "));
}

fn nothing_outside_is_written() {
    let outside = tempfile::tempdir().unwrap();
    let file = outside.path().join("file");
    let script = format!(
        "for f in {} /etc/x /usr/x $PALYRA_WORK/x $PALYRA_WORK/../x /palyra/tool/x \
           /proc/sys/kernel/core_pattern /dev/x; do\n\
           (echo bad > $f) 2>/dev/null && echo wrote $f\n\
         done\n\
         (echo bad >> $PALYRA_WORK/../params) 2>/dev/null && echo wrote params\n\
         ln -s {} out/link; (echo bad > out/link) 2>/dev/null && echo wrote through a link\n\
         ln /usr/bin/env out/hard 2>/dev/null && echo linked\n\
         mknod out/null c 1 3 2>/dev/null && echo made a device\n\
         cp /bin/true out/program && chmod +x out/program && out/program 2>/dev/null && echo executed what it wrote\n\
         echo fine > out/ok && echo fine > /tmp/ok && echo done",
        file.display(),
        file.display()
    );
    assert_eq!(Lease::new(&script).said(), "done\n");
    assert!(!file.exists());
}

fn nothing_outside_is_read() {
    let secret = tempfile::tempdir().unwrap();
    std::fs::write(secret.path().join("credential.json"), "key").unwrap();
    let other = Lease::new("true");
    std::fs::write(other.place.work().join("in/theirs"), "theirs").unwrap();
    let script = format!(
        "for f in /etc/shadow {} {} /root /home /var/log /proc/1/environ /proc/1/root/etc/shadow /sys/kernel; do\n\
           ((cat $f || ls $f/) | grep -q .) 2>/dev/null && echo read $f\n\
         done\n\
         cat /etc/os-release > /dev/null 2>&1; cat /etc/passwd > /dev/null && echo done",
        secret.path().join("credential.json").display(),
        other.place.work().join("in/theirs").display(),
    );
    assert_eq!(Lease::new(&script).said(), "done\n");
}

fn landlock_alone_holds_the_same() {
    // No root of its own, no other user: what is left is Landlock.
    let secret = tempfile::tempdir().unwrap();
    let file = secret.path().join("credential.json");
    std::fs::write(&file, "key").unwrap();
    let script = format!(
        "(cat {0}) 2>&1; (cat /etc/shadow) 2>&1; (echo bad > {0}) 2>&1; (echo bad > $PALYRA_WORK/x) 2>&1\n\
         (ls /root) 2>&1; echo fine > out/ok && echo done",
        file.display()
    );
    let mut lease = Lease::new(&script).without(&["mountns"]);
    let said = lease.said();
    assert_eq!(said.matches("ermission denied").count(), 5, "{said}");
    assert!(said.ends_with("done\n"), "{said}");
    assert_eq!(std::fs::read(&file).unwrap(), b"key");
}

fn there_is_no_network() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    for without in [&[][..], &["netns"][..]] {
        let script = format!(
            "exec 2>/dev/null; bash -c 'echo > /dev/tcp/127.0.0.1/{port}' && echo connected; echo done"
        );
        let mut lease = Lease::new(&script);
        if !without.is_empty() {
            // Then it is Landlock that refuses.
            lease = lease.without(without);
        }
        assert_eq!(lease.said(), "done\n");
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "somebody connected");
}

fn no_other_process_is_seen_or_signalled() {
    let mut victim = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = victim.id();
    for without in [&[][..], &["pidns", "mountns"][..]] {
        let script = format!(
            "exec 2>/dev/null; kill -9 {pid} && echo signalled; cat /proc/{pid}/mem >/dev/null &&\
             echo read its memory\n\
             cat /proc/{pid}/environ | grep -q . && echo read its environment; echo done"
        );
        let mut lease = Lease::new(&script);
        if !without.is_empty() {
            lease = lease.without(without);
            if is_root() && !scopes_signals() {
                println!("  SKIPPED without a PID namespace: this kernel's Landlock does not hold signals");
                continue;
            }
        }
        assert_eq!(lease.said(), "done\n", "without {without:?}");
    }
    assert!(victim.try_wait().unwrap().is_none(), "it was ended");
    victim.kill().unwrap();
    victim.wait().unwrap();
}

fn scopes_signals() -> bool {
    let mut lease = Lease::new("true").without(&["pidns", "mountns"]);
    let ended = lease.run();
    let abi = ended
        .sandbox
        .iter()
        .find_map(|part| part.strip_prefix("landlock:"));
    abi.and_then(|abi| abi.parse::<u32>().ok())
        .is_some_and(|abi| abi >= 6)
}

const FORKS: &str = "setsid sh -c 'setsid sleep MARK & exec sleep MARK' </dev/null >/dev/null 2>&1 &\n\
                     (setsid sleep MARK </dev/null >/dev/null 2>&1 &) ; nohup sleep MARK </dev/null >/dev/null 2>&1 &\n\
                     while [ $(ls -d /proc/[0-9]* | wc -l) -lt 5 ]; do :; done; echo true";

fn forks_away(mark: &str, without: &[&str]) {
    let mut lease = Lease::new(&FORKS.replace("MARK", mark));
    if !without.is_empty() {
        lease = lease.without(without);
    }
    assert_eq!(lease.said(), "true\n");
    // The warden says that all are gone: they are, at that moment, not some time after.
    assert_eq!(processes(mark), Vec::<i32>::new());
}

fn nobody_leaves_by_forking_away() {
    forks_away("98765401", &[]);
}

fn nobody_leaves_without_a_pid_namespace_either() {
    forks_away("98765402", &["pidns"]);
    until("nothing", || processes("98765402").is_empty());
}

fn no_right_comes_back() {
    let script = "exec 2>/dev/null; grep -E '^(CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs)' /proc/self/status\n\
                  mount -t tmpfs x /tmp && echo mounted; unshare -U true && echo unshared\n\
                  chroot / true && echo chrooted\n\
                  hostname other && echo renamed; ulimit -n 100000 && echo raised; su -c true && echo su; echo done";
    let said = Lease::new(script).said();
    for set in ["Inh", "Prm", "Eff", "Bnd", "Amb"] {
        assert!(said.contains(&format!("Cap{set}:\t0000000000000000")), "{said}");
    }
    assert!(said.contains("NoNewPrivs:\t1"), "{said}");
    // A user namespace gives rights in itself only, and none over what Landlock holds.
    for bad in ["mounted", "chrooted", "renamed", "raised", "su\n"] {
        assert!(!said.contains(bad), "{bad}: {said}");
    }
    assert!(said.ends_with("done\n"), "{said}");
}

fn a_workspace_is_only_what_the_scope_names() {
    use std::os::unix::fs::PermissionsExt;
    let space = tempfile::tempdir().unwrap();
    for name in ["data", "data/fixed", "hidden"] {
        std::fs::create_dir(space.path().join(name)).unwrap();
        std::fs::set_permissions(space.path().join(name), std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    std::fs::write(space.path().join("hidden/file"), "hidden").unwrap();
    std::fs::write(space.path().join("data/fixed/file"), "fixed").unwrap();
    let script = "exec 2>/dev/null; cd $PALYRA_WORKSPACE; echo new > data/new && echo wrote\n\
                  cat data/fixed/file && echo\n\
                  echo bad > data/fixed/new && echo wrote fixed; echo bad > data/fixed/file && echo changed fixed\n\
                  cat hidden/file && echo read hidden; echo bad > hidden/new && echo wrote hidden\n\
                  cat data/../hidden/file && echo read hidden; echo x > $PALYRA_WORK/out/o && echo done";
    let mut lease = Lease::new(script);
    lease.spec.workspace = Some(space.path().to_owned());
    lease.spec.allowed = vec!["data".into()];
    lease.spec.read_only = vec!["data/fixed".into()];
    assert_eq!(lease.said(), "wrote\nfixed\ndone\n");
    assert!(space.path().join("data/new").exists() && lease.out("o").exists());
}

fn what_is_required_and_missing_is_not_begun() {
    let mut lease = Lease::new("echo ran > out/ran").without(&["landlock"]);
    lease.spec.require = vec!["landlock".to_owned(), "pidns".to_owned()];
    let ended = lease.run();
    let How::Refused { code, message } = &ended.how else {
        panic!("{ended:?}")
    };
    assert!(
        code == "sandbox_unavailable" && message.contains("landlock"),
        "{message}"
    );
    assert!(ended.gone && !lease.out("ran").exists());
}

fn links_in_a_workspace_lead_nowhere() {
    let (space, secret) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::create_dir(secret.path().join("sub")).unwrap();
    std::fs::write(secret.path().join("sub/file"), "secret").unwrap();
    // An earlier run left this where a later scope names a folder.
    std::os::unix::fs::symlink(secret.path(), space.path().join("data")).unwrap();
    for without in [&[][..], &["mountns"][..]] {
        let script =
            "cat $PALYRA_WORKSPACE/data/sub/file; echo bad > $PALYRA_WORKSPACE/data/sub/file; echo done";
        let mut lease = Lease::new(script);
        lease.spec.workspace = Some(space.path().to_owned());
        lease.spec.allowed = vec!["data/sub".into()];
        if !without.is_empty() {
            lease = lease.without(without);
        }
        let ended = lease.run();
        assert!(
            ended.gone && !String::from_utf8_lossy(&ended.stdout).contains("secret"),
            "{ended:?}"
        );
        assert_eq!(std::fs::read(secret.path().join("sub/file")).unwrap(), b"secret");
    }
}
