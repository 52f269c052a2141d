//! Every code has its page in `docs/errors`, and every page its code.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use palyra_state::{Class, Code, Reject};
use prost::Message as _;

fn pages() -> PathBuf {
    Path::new(".").join("../../docs/errors")
}

#[test]
fn every_code_has_a_page() {
    for code in Code::ALL {
        let path = pages().join(format!("{code}.md"));
        let page =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(
            page.starts_with(&format!("# {code} {code:?}\n")),
            "the title of {}",
            path.display()
        );
        let class = format!("Class: `{}`", code.class().as_str());
        assert!(page.contains(&class), "{} does not say {class}", path.display());
        for heading in ["## Why\n", "## What to do\n"] {
            assert!(page.contains(heading), "{} has no {heading}", path.display());
        }
    }
}

#[test]
fn every_page_of_a_refusal_has_a_code() {
    let codes: BTreeSet<String> = Code::ALL.iter().map(|code| format!("{code}.md")).collect();
    // Other planes of errors may have pages of other letters or numbers beside these.
    let mine = |name: &str| {
        let domain = name.strip_prefix("E0").and_then(|rest| rest.get(..1));
        matches!(domain, Some("1" | "2" | "3" | "4" | "5" | "6" | "7" | "8" | "9"))
    };
    for entry in std::fs::read_dir(pages()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!mine(&name) || codes.contains(&name), "{name} has no code");
    }
}

#[test]
fn a_refusal_names_its_arguments_and_survives_its_encoding() {
    let reject = Reject::new(Code::JoinTokenUsed, [&"T", &2]);
    assert_eq!(reject.code(), "E0107");
    assert_eq!(reject.message(), "join token T was used already, by replica 2");
    assert!(reject.next().contains("palyra cluster join-token"));
    let decoded = Reject::decode(reject.encode_to_vec().as_slice()).unwrap();
    assert_eq!(decoded, reject);
}

#[test]
fn texts_are_complete_sentences_without_an_end() {
    for code in Code::ALL {
        let reject = Reject::decode(prost_message(*code as i32).as_slice()).unwrap();
        for text in [reject.message(), reject.next()] {
            assert!(!text.is_empty() && !text.ends_with('.'), "{code}: {text}");
        }
    }
}

#[test]
fn pages_quote_what_is_said() {
    for code in Code::ALL {
        let reject = Reject::decode(prost_message(*code as i32).as_slice()).unwrap();
        let page = std::fs::read_to_string(pages().join(format!("{code}.md"))).unwrap();
        let quoted: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("> ")).collect();
        let said = [sentence(&reject.message()), sentence(&reject.next())];
        assert_eq!(quoted, said, "{code}");
    }
}

fn sentence(text: &str) -> String {
    let mut symbols = text.chars();
    let first = symbols.next().unwrap().to_uppercase();
    format!("{first}{}.", symbols.as_str())
}

#[test]
fn a_code_of_a_later_version_does_not_pass_for_another() {
    let reject = Reject::decode(prost_message(990).as_slice()).unwrap();
    assert_eq!(
        (reject.code().as_str(), reject.class()),
        ("E0990", Class::Precondition)
    );
    assert!(reject.message().contains("later version"), "{reject}");
}

#[test]
fn an_argument_cannot_pose_as_another() {
    let reject = Reject::new(Code::JoinTokenName, [&"{1}", &"r2", &"{0}"]);
    assert_eq!(
        reject.message(),
        "join token {1} is for a replica named r2, not {0}"
    );
}

/// A refusal without arguments, as bytes: field 1, a number.
fn prost_message(number: i32) -> Vec<u8> {
    let mut bytes = vec![0x08];
    prost::encoding::encode_varint(number as u64, &mut bytes);
    bytes
}
