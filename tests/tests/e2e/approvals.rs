//! Approvals by the commands that people type: two operators, four eyes, decisions that stand, machines,
//! time.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use palyra_tests::cluster::{Answer, Cluster, binary, eventually};
use palyra_tests::node::{Heard, by_pin, pair_folder};

/// Another operator with a folder of its own.
struct Operator {
    home: PathBuf,
}

impl Operator {
    fn new(cluster: &Cluster, name: &str) -> Operator {
        let home = cluster.path().join(format!("home-{name}"));
        let credential = cluster.path().join(format!("{name}.json"));
        let file = credential.to_str().unwrap();
        cluster
            .palyra(&["operator", "add", name, "--role", "operator", "--out", file])
            .ok();
        let operator = Operator { home };
        operator
            .palyra(&["context", "add", "e2e", "--credential", file])
            .ok();
        operator
    }

    fn palyra(&self, arguments: &[&str]) -> Answer {
        palyra_in(&self.home, arguments)
    }
}

fn palyra_in(home: &Path, arguments: &[&str]) -> Answer {
    let mut command = Command::new(binary("palyra"));
    let output = command.args(arguments).env("PALYRA_HOME", home).output().unwrap();
    Answer {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// One field of an answer, as text.
fn text(answer: &Answer, field: &str) -> String {
    answer.field(field).as_str().unwrap_or_default().to_owned()
}

fn create(operator: &Operator, more: &[&str]) -> Answer {
    let words = [
        "grant", "create", "--run", "new", "--tool", "resize", "-o", "json",
    ];
    operator.palyra(&[&words, more].concat())
}

fn policy(cluster: &Cluster, more: &[&str]) {
    cluster
        .palyra(&[&["approval", "policy", "set"], more].concat())
        .ok();
}

pub(crate) async fn grants_are_asked_for_and_decided_by_others(cluster: &mut Cluster) {
    policy(cluster, &["--four-eyes", "on"]);
    let (anna, bob) = (Operator::new(cluster, "anna"), Operator::new(cluster, "bob"));
    let asked = create(&anna, &["--summary", "thumbnails", "--risk", "low"]).ok();
    assert_eq!(asked.field("state"), "pending");
    let (grant, approval) = (text(&asked, "id"), text(&asked, "approval_id"));
    let listed = bob
        .palyra(&["approval", "ls", "--subject", "grant", "-o", "name"])
        .ok();
    assert_eq!(listed.out.trim(), approval);

    let own = anna.palyra(&["approval", "decide", &approval, "--allow"]);
    assert_eq!(own.code, 3, "{}", own.err);
    assert!(
        own.err.contains("E0913") && own.err.contains("docs/errors/E0913.md"),
        "{}",
        own.err
    );
    let words = [
        "approval",
        "decide",
        &approval,
        "--allow",
        "--scope",
        "timeboxed",
        "--ttl",
        "10m",
    ];
    bob.palyra(&words).ok();
    assert_eq!(
        anna.palyra(&["grant", "show", &grant, "-o", "json"])
            .ok()
            .field("state"),
        "active"
    );

    // The decision stands: the next is covered, until it is taken back.
    let next = create(&anna, &["--risk", "low", "--wait"]).ok();
    assert_eq!(
        (next.field("state"), next.field("covered")),
        ("active".into(), true.into())
    );
    assert_eq!(next.field("approval_id"), approval.as_str());
    let withdraw = ["approval", "withdraw", &approval, "--reason", "enough", "--yes"];
    bob.palyra(&withdraw).ok();
    let gone = anna
        .palyra(&["grant", "show", &text(&next, "id"), "-o", "json"])
        .ok();
    assert_eq!(gone.field("state"), "revoked");

    // Denied, while who asked waits for it: the exit code says so.
    let (waiting, denied) = {
        let home = anna.home.clone();
        let words = [
            "grant", "create", "--run", "new", "--tool", "convert", "--wait", "-o", "json",
        ];
        let waiting = std::thread::spawn(move || palyra_in(&home, &words));
        let waits = eventually("the approval", async || {
            let listed = bob.palyra(&["approval", "ls", "-o", "name"]);
            Some(listed.out.trim().to_owned()).filter(|id| !id.is_empty() && !id.contains('\n'))
        });
        let id = waits.await;
        let denied = bob.palyra(&["approval", "decide", &id, "--deny", "--reason", "not on a Friday"]);
        (waiting.join().unwrap(), denied)
    };
    denied.ok();
    assert_eq!(waiting.code, 6, "{}", waiting.err);
    assert_eq!(waiting.field("state"), "denied");
    policy(cluster, &["--four-eyes", "off"]);
}

pub(crate) async fn a_pairing_is_decided_by_another_operator(cluster: &mut Cluster) {
    policy(cluster, &["--four-eyes", "on"]);
    let carl = Operator::new(cluster, "carl");
    let (pin, code) = cluster.mint(1).await;
    let ui = Heard::default();
    let dir = cluster.path().join("by-approval");
    let endpoints = [cluster.enrol_addr(2)];
    let approve = async {
        let request = cluster.request_of("by-approval", 3).await;
        let sas = ui.sas().await;
        let own = cluster.palyra(&["approval", "decide", &request.id, "--allow", "--sas", &sas]);
        assert!(own.err.contains("E0913"), "it minted the code: {}", own.err);
        let wrong = if request.sas.starts_with('0') {
            "111111"
        } else {
            "000000"
        };
        let wrong = carl.palyra(&["approval", "decide", &request.id, "--allow", "--sas", wrong]);
        assert!(wrong.err.contains("E0416"), "{}", wrong.err);
        let words = [
            "approval",
            "decide",
            &request.id,
            "--allow",
            "--sas",
            &sas,
            "--reason",
            "compared",
        ];
        let decided = carl.palyra(&[&words[..], &["-o", "json"]].concat()).ok();
        assert_eq!(
            (decided.field("state"), decided.field("subject")),
            ("allowed".into(), "pairing".into())
        );
    };
    let method = by_pin(&pin, code, &endpoints);
    let paired = pair_folder(&dir, method, Duration::from_secs(30), &ui);
    let (paired, ()) = tokio::join!(paired, approve);
    paired.unwrap();
    policy(cluster, &["--four-eyes", "off"]);
}

pub(crate) fn what_nobody_decides_ends_in_time(cluster: &mut Cluster) {
    policy(cluster, &["--wait-for", "1s"]);
    let dora = Operator::new(cluster, "dora");
    let waited = create(&dora, &["--wait"]);
    assert_eq!(waited.code, 7, "{}", waited.err);
    assert_eq!(waited.field("state"), "expired");
    let approval = text(&waited, "approval_id");
    let late = cluster.palyra(&["approval", "decide", &approval, "--allow"]);
    assert!(
        late.err.contains("E0911") || late.err.contains("E0912"),
        "{}",
        late.err
    );
    // Removing an operator takes back what it holds.
    policy(cluster, &["--wait-for", "1h"]);
    let asked = create(&dora, &[]).ok();
    cluster
        .palyra(&["approval", "decide", &text(&asked, "approval_id"), "--allow"])
        .ok();
    cluster
        .palyra(&["operator", "remove", "dora", "--reason", "left"])
        .ok();
    let gone = cluster
        .palyra(&["grant", "show", &text(&asked, "id"), "-o", "json"])
        .ok();
    assert_eq!(
        (gone.field("state"), gone.field("ended_by")),
        ("revoked".into(), "operator/admin".into())
    );
}
