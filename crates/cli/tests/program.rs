//! The program as a shell sees it, without a cluster: exit codes, the two output channels, and what a birth
//! leaves.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A home of its own, removed with the value.
struct Home(PathBuf);

impl Home {
    fn new() -> Home {
        let path = std::env::temp_dir().join(format!("palyra-program-{}", palyra_client::new_ulid()));
        std::fs::create_dir(&path).unwrap();
        Home(path)
    }

    fn palyra(&self, arguments: &[&str]) -> Ran {
        let output = Command::new(env!("CARGO_BIN_EXE_palyra"))
            .args(arguments)
            .env_clear()
            .env("PALYRA_HOME", self.0.join("operator"))
            .current_dir(&self.0)
            .output()
            .unwrap();
        Ran::from(output)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Ran {
        Ran {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// A port that nothing listens on.
fn closed_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

#[test]
fn a_birth_is_whole_and_happens_once() {
    let home = Home::new();
    let init = [
        "cluster",
        "init",
        "--data-dir",
        "r1",
        "--name",
        "r1",
        "--context",
        "home",
        "-o",
        "json",
    ];
    let born = home.palyra(&init);
    assert_eq!(born.code, 0, "{}", born.err);
    let told: Value = serde_json::from_str(&born.out).unwrap();
    assert_eq!(told["context"], "home");
    assert!(home.0.join("r1/genesis.pb").is_file() && home.0.join("r1/palyrad.toml").is_file());
    assert_eq!(
        std::fs::read_dir(&home.0).unwrap().count(),
        2,
        "nothing is left aside"
    );

    let again = home.palyra(&init);
    assert_eq!(again.code, 11, "{}", again.err);
    assert!(again.out.is_empty(), "{}", again.out);
    let error: Value = serde_json::from_str(&again.err).unwrap();
    assert_eq!(
        (&error["error"]["exit_code"], &error["error"]["class"]),
        (&11.into(), &"conflict".into())
    );

    let other = home.palyra(&["cluster", "init", "--data-dir", "r2", "--context", "home"]);
    assert_eq!(other.code, 11, "the context's name is taken: {}", other.err);
    assert!(!home.0.join("r2").exists(), "then no folder is made");

    let shown = home.palyra(&["context", "show", "-o", "json"]);
    let shown: Value = serde_json::from_str(&shown.out).unwrap();
    assert_eq!(shown["cluster_id"], told["cluster_id"]);
    assert!(
        shown["identity"].as_str().unwrap().ends_with("/operator/admin"),
        "{shown}"
    );
}

#[test]
fn a_cluster_that_is_not_there_is_exit_code_four() {
    let home = Home::new();
    let base = closed_port().to_string();
    let born = home.palyra(&["cluster", "init", "--data-dir", "r1", "--base-port", &base]);
    assert_eq!(born.code, 0, "{}", born.err);
    let ran = home.palyra(&["node", "ls", "--timeout", "100ms", "-o", "json"]);
    assert_eq!((ran.code, ran.out.as_str()), (4, ""), "{}", ran.err);
    let error: Value = serde_json::from_str(&ran.err).unwrap();
    assert_eq!(error["error"]["code"], "E9001");
    assert!(!error["error"]["attempts"].as_array().unwrap().is_empty());
    let ran = home.palyra(&["node", "ls", "--timeout", "100ms"]);
    assert!(
        ran.err.starts_with("error[E9001]: ") && ran.err.contains("\n  next: "),
        "{}",
        ran.err
    );
}

#[test]
fn mistakes_on_the_command_line_are_exit_code_two() {
    let home = Home::new();
    for arguments in [
        &["no-such-noun"][..],
        &["node", "ls", "-o", "xml"],
        &["node", "ls", "--timeout", "soon"],
        &["node", "ls", "--timeout", "0s"],
        &["node", "ls", "--limit", "0"],
        &[
            "device",
            "revoke",
            "x",
            "--reason",
            "r",
            "--request-id",
            "no-ulid",
        ],
        &["node", "pair", "--pin", "12345678"],
        &["cluster", "init", "--data-dir", "r1", "--listen-host", "0.0.0.0"],
        &["cluster", "init", "--data-dir", "r1", "--operator", "NOT ALLOWED"],
        &["cluster", "init", "--data-dir", "r1", "--context", "../up"],
        &["whoami"],
    ] {
        let ran = home.palyra(arguments);
        assert_eq!(ran.code, 2, "{arguments:?}: {}", ran.err);
        assert!(ran.out.is_empty() && !ran.err.is_empty(), "{arguments:?}");
    }
    assert!(!Path::new(&home.0).join("r1").exists());
}

#[test]
fn contexts_come_and_go() {
    let home = Home::new();
    for (folder, context) in [("a", "first"), ("b", "second")] {
        assert_eq!(
            home.palyra(&["cluster", "init", "--data-dir", folder, "--context", context])
                .code,
            0
        );
    }
    let names = |ran: &Ran| -> Vec<(String, bool)> {
        let list: Value = serde_json::from_str(&ran.out).unwrap();
        let items = list["items"].as_array().unwrap();
        items
            .iter()
            .map(|i| {
                (
                    i["name"].as_str().unwrap().to_owned(),
                    i["current"].as_bool().unwrap(),
                )
            })
            .collect()
    };
    let listed = home.palyra(&["context", "ls", "-o", "json"]);
    assert_eq!(
        names(&listed),
        [("first".to_owned(), false), ("second".to_owned(), true)]
    );
    assert_eq!(home.palyra(&["context", "use", "first"]).code, 0);
    assert_eq!(home.palyra(&["context", "use", "third"]).code, 8);
    assert_eq!(
        home.palyra(&["context", "add", "first", "--endpoints", "h:1,i:2"])
            .code,
        0
    );
    let shown = home.palyra(&["context", "show", "-o", "json"]);
    let shown: Value = serde_json::from_str(&shown.out).unwrap();
    assert_eq!(shown["endpoints"], serde_json::json!(["h:1", "i:2"]));
    let credential = home.0.join("operator/credentials/first.json");
    let taken = home.palyra(&[
        "context",
        "add",
        "second",
        "--credential",
        &credential.display().to_string(),
    ]);
    assert_eq!(
        taken.code, 11,
        "a name does not change its cluster unasked: {}",
        taken.err
    );
    assert_eq!(home.palyra(&["context", "rm", "first"]).code, 0);
    assert!(!credential.exists(), "the credential goes with it");
}

#[test]
fn pipes_get_no_colour_and_a_closed_one_is_no_failure() {
    let home = Home::new();
    let script = home.palyra(&["completion", "bash"]);
    assert_eq!(script.code, 0);
    assert!(script.out.contains("palyra") && !script.out.contains('\u{1b}'));
    let mut child = Command::new(env!("CARGO_BIN_EXE_palyra"))
        .args(["completion", "zsh"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn what_is_no_json_is_refused_before_anybody_is_asked() {
    let home = Home::new();
    let base = closed_port().to_string();
    let born = home.palyra(&["cluster", "init", "--data-dir", "r1", "--base-port", &base]);
    assert_eq!(born.code, 0, "{}", born.err);
    std::fs::write(home.0.join("bad.json"), "{\"a\":").unwrap();
    std::fs::write(home.0.join("good.json"), "{\"a\":1}").unwrap();
    let invoke = |input: &str| {
        home.palyra(&[
            "node",
            "invoke",
            "web-1",
            "echo",
            "--input",
            input,
            "--timeout",
            "100ms",
        ])
    };
    for bad in ["{", "", "@bad.json", "-"] {
        let ran = invoke(bad);
        assert_eq!(ran.code, 2, "{bad:?}: {}", ran.err);
        assert!(
            ran.out.is_empty() && ran.err.contains("JSON"),
            "{bad:?}: {}",
            ran.err
        );
    }
    assert_eq!(invoke("@missing.json").code, 8);
    // Nobody is there: whoever gets this far has asked.
    for good in ["{}", "-1", "@good.json"] {
        let ran = invoke(good);
        assert_eq!(ran.code, 4, "{good:?}: {}", ran.err);
    }
}

#[test]
fn what_a_killed_birth_left_is_told_and_left_alone() {
    let home = Home::new();
    let left = home.0.join(".r1.new-1");
    std::fs::create_dir(&left).unwrap();
    let born = home.palyra(&["cluster", "init", "--data-dir", "r1"]);
    assert_eq!(born.code, 0, "{}", born.err);
    assert!(
        born.err.contains("r1.new-1") && born.err.contains("rm -r"),
        "{}",
        born.err
    );
    assert!(left.exists());
}

#[test]
fn each_shell_gets_its_completion() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = home.palyra(&["completion", shell]);
        assert_eq!(script.code, 0, "{shell}");
        for word in ["transfer-leader", "describe", "request-id"] {
            assert!(script.out.contains(word), "{shell} does not know {word}");
        }
    }
}
