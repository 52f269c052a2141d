//! Bugs that are planted for the fault harness never get into a product: a release with them does not compile, and an
//! ordinary binary has none of their names in it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    std::env::current_dir().unwrap().parent().unwrap().to_path_buf()
}

/// Names of bugs in the sources of the product.
fn names() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in walkdir::WalkDir::new(root().join("crates"))
        .into_iter()
        .filter_map(Result::ok)
    {
        if entry.path().extension().is_none_or(|end| end != "rs") {
            continue;
        }
        let text = std::fs::read_to_string(entry.path()).unwrap();
        let names = text.split("palyra_fault::planted(\"").skip(1);
        found.extend(names.map(|rest| rest[..rest.find('"').unwrap()].to_owned()));
    }
    assert!(found.len() >= 32, "only {} bugs are planted", found.len());
    found
}

/// Those of the names that are in a file.
fn in_file(path: &Path) -> Vec<String> {
    let mut bytes = std::fs::read(path).unwrap();
    // As text, which is searched much faster than bytes are.
    bytes
        .iter_mut()
        .filter(|byte| !byte.is_ascii())
        .for_each(|byte| *byte = 0);
    let text = String::from_utf8(bytes).unwrap();
    names()
        .into_iter()
        .filter(|name| text.contains(name.as_str()))
        .collect()
}

#[test]
fn a_release_with_planted_bugs_does_not_compile() {
    let folder = tempfile::tempdir().unwrap();
    let check = |profile: &[&str]| {
        Command::new(env!("CARGO"))
            .args(["check", "--locked", "-p", "palyra-fault", "--features", "planted"])
            .args(profile)
            .arg("--target-dir")
            .arg(folder.path())
            .current_dir(root())
            .output()
            .unwrap()
    };
    let release = check(&["--release"]);
    let said = String::from_utf8_lossy(&release.stderr);
    assert!(!release.status.success(), "a release took planted bugs in");
    assert!(
        said.contains("it is for debug builds of the harness only"),
        "{said}"
    );
    let debug = check(&[]);
    assert!(
        debug.status.success(),
        "{}",
        String::from_utf8_lossy(&debug.stderr)
    );
}

#[test]
fn the_ordinary_binaries_have_no_bug_s_name_in_them() {
    for name in ["palyrad", "palyra"] {
        let path = palyra_tests::cluster::binary(name);
        assert_eq!(in_file(&path), Vec::<String>::new(), "in {}", path.display());
    }
    // What is looked for is there in a binary that has them: `jepsen mutants` puts one here.
    let folder = palyra_tests::cluster::binary("palyrad");
    let planted = folder.with_file_name("planted").join("palyrad");
    if planted.exists() {
        let found = in_file(&planted).len();
        assert!(found >= 32, "only {found} names are in {}", planted.display());
    }
}
