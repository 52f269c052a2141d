//! House rules that no compiler holds: a module doc in every file, files that one reads in a sitting, no leftovers,
//! documents that point at things that exist, and a page for every error code.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::PathBuf;

/// Lines of a source file; tests and generated code are held to it as well.
const FILE_LINES_MAX: usize = 600;
/// Characters of a source line. Code is formatted to 110; a sentence of a comment may run a word further.
const LINE_CHARS_MAX: usize = 120;

fn root() -> PathBuf {
    std::env::current_dir().unwrap().parent().unwrap().to_path_buf()
}

/// All files of the checkout with one of the endings, outside of build and run folders.
fn files(endings: &[&str]) -> Vec<(PathBuf, String)> {
    let root = root();
    walkdir::WalkDir::new(&root)
        .into_iter()
        .filter_entry(|entry| {
            let name = entry.file_name().to_string_lossy();
            name != "target" && name != ".git" && name != ".run"
        })
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_file())
        .filter(|entry| {
            endings
                .iter()
                .any(|e| entry.path().to_string_lossy().ends_with(e))
        })
        .map(|entry| {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            (entry.path().strip_prefix(&root).unwrap().to_path_buf(), text)
        })
        .collect()
}

fn report(problems: Vec<String>) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn every_source_file_says_what_lives_in_it() {
    let problems = files(&[".rs"])
        .into_iter()
        .filter(|(_, text)| !text.lines().take(3).any(|line| line.starts_with("//!")))
        .map(|(path, _)| format!("{}: no module doc at the top", path.display()))
        .collect();
    report(problems);
}

#[test]
fn files_are_read_in_a_sitting() {
    let mut problems = Vec::new();
    for (path, text) in files(&[".rs"]) {
        let lines = text.lines().count();
        if lines > FILE_LINES_MAX {
            problems.push(format!(
                "{}: {lines} lines, at most {FILE_LINES_MAX}",
                path.display()
            ));
        }
        for (number, line) in text.lines().enumerate() {
            if line.chars().count() > LINE_CHARS_MAX && !line.contains("://") {
                problems.push(format!(
                    "{}:{}: over {LINE_CHARS_MAX} characters",
                    path.display(),
                    number + 1
                ));
            }
        }
    }
    report(problems);
}

#[test]
fn nothing_is_left_over() {
    // Spelled in two halves, so that this file does not find itself.
    let leftovers = [
        ["TO", "DO"],
        ["FIX", "ME"],
        ["todo", "!("],
        ["unimple", "mented!("],
        ["dbg", "!("],
        ["#[ign", "ore"],
    ];
    let mut problems = Vec::new();
    for (path, text) in files(&[".rs", ".proto", ".toml", ".sh"]) {
        for (number, line) in text.lines().enumerate() {
            for halves in &leftovers {
                if line.contains(&halves.concat()) {
                    problems.push(format!("{}:{}: {}", path.display(), number + 1, halves.concat()));
                }
            }
        }
    }
    report(problems);
}

/// Four-digit error codes that stand as string literals or words in a text.
fn codes(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let starts = text.match_indices("\"E").chain(text.match_indices("\"N"));
    for (at, _) in starts {
        let code: String = text[at + 1..].chars().take(5).collect();
        let closed = text[at + 1..].chars().nth(5) == Some('"');
        if closed && code.len() == 5 && code[1..].chars().all(|c| c.is_ascii_digit()) {
            found.insert(code);
        }
    }
    found
}

#[test]
fn every_error_code_has_a_page_and_every_page_a_code() {
    let used: BTreeSet<String> = files(&[".rs"])
        .into_iter()
        .filter(|(path, _)| path.starts_with("crates") && path.components().any(|c| c.as_os_str() == "src"))
        .flat_map(|(_, text)| codes(&text))
        .collect();
    let pages: BTreeSet<String> = std::fs::read_dir(root().join("docs/errors"))
        .unwrap()
        .filter_map(|entry| {
            entry
                .ok()?
                .file_name()
                .to_string_lossy()
                .strip_suffix(".md")
                .map(String::from)
        })
        .filter(|name| name.starts_with(['E', 'N']))
        .collect();
    let mut problems: Vec<String> = used
        .difference(&pages)
        .map(|c| format!("docs/errors/{c}.md is missing"))
        .collect();
    // The state machine's codes, E0xxx, are numbers in the log; its own test holds them to their pages.
    let unused = pages.difference(&used).filter(|code| !code.starts_with("E0"));
    problems.extend(unused.map(|c| format!("docs/errors/{c}.md: nothing answers with this code")));
    report(problems);
}

#[test]
fn documents_point_at_things_that_exist() {
    let root = root();
    let mut problems = Vec::new();
    for (path, text) in files(&[".md"]) {
        let folder = root.join(&path).parent().unwrap().to_path_buf();
        for (at, _) in text.match_indices("](") {
            let target: String = text[at + 2..].chars().take_while(|c| *c != ')').collect();
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            if !folder.join(file).exists() {
                problems.push(format!(
                    "{}: links to {file}, which does not exist",
                    path.display()
                ));
            }
        }
    }
    report(problems);
}

#[test]
fn decisions_are_listed() {
    let index = std::fs::read_to_string(root().join("docs/decisions/README.md")).unwrap();
    let problems = std::fs::read_dir(root().join("docs/decisions"))
        .unwrap()
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| name.ends_with(".md") && name != "README.md" && !index.contains(name.as_str()))
        .map(|name| format!("docs/decisions/README.md does not list {name}"))
        .collect();
    report(problems);
}

#[test]
fn bincode_stays_in_one_file() {
    let users: Vec<String> = files(&[".rs"])
        .into_iter()
        .filter(|(_, text)| text.contains(&["bincode", "::"].concat()))
        .map(|(path, _)| path.display().to_string())
        .collect();
    assert!(
        users.len() <= 1,
        "bincode is for one disposable cache only, and stands in {users:?}"
    );
}
