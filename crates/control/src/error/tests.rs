//! Each error has a code, a class and a page of its own.

use super::*;

fn of_sessions() -> [Error; 3] {
    let pace = Pace::default();
    let values = String::new();
    [
        SessionRefusal::Draining { pace }.into(),
        SessionRefusal::TooManyAttaches { waiting: 1, pace }.into(),
        SessionRefusal::StalenessDiffers { values }.into(),
    ]
}

fn all() -> Vec<Error> {
    let text = String::new;
    let refusals = [
        Refusal::WrongRole {
            found: text(),
            expected: "node",
        },
        Refusal::NotYetValid {
            not_before_ms: 0,
            now_ms: 0,
        },
        Refusal::OtherCluster {
            found: text(),
            expected: text(),
        },
        Refusal::NotFound {
            kind: "device",
            selector: text(),
        },
        Refusal::Ambiguous {
            kind: "device",
            selector: text(),
            matches: Vec::new(),
        },
        Refusal::UnknownExchange,
        Refusal::WrongPin,
        Refusal::WrongTicket,
        Refusal::UnknownNonce,
        Refusal::OtherCsr,
        Refusal::WrongFetchToken,
        Refusal::ShownOnce { what: text() },
        Refusal::WrongJoinProof,
        Refusal::WouldLoseMajority {
            replica_id: 1,
            voters_left: 2,
            alive: 2,
        },
        Refusal::SessionEnded { code: "silent" },
        Refusal::Protocol {
            cause: "a second attach",
        },
        Refusal::Signing { cause: text() },
        Refusal::Feed(FeedRefusal::NotYet {
            cursor: text(),
            applied: 1,
        }),
        Refusal::Feed(FeedRefusal::Beyond {
            cursor: text(),
            applied: 1,
        }),
        Refusal::Feed(FeedRefusal::Elsewhere {
            found: text(),
            expected: text(),
        }),
        Refusal::Feed(FeedRefusal::Stalled),
    ];
    let mut errors: Vec<Error> = refusals.into_iter().map(Error::Refused).collect();
    errors.extend(of_sessions());
    errors.extend([
        Error::Unavailable { leader_hint: None },
        Error::Unknown { request_id: text() },
        Error::Stale { age_ms: 1 },
        Error::Invalid {
            field: "payload",
            cause: text(),
            next: text(),
        },
        Error::Busy { what: "sessions" },
        Error::Internal(text()),
    ]);
    errors
}

#[test]
fn every_error_has_a_code_of_its_own_and_a_page_that_agrees() {
    let pages = std::path::Path::new(".").join("../../docs/errors");
    let mut codes = std::collections::BTreeSet::new();
    for error in all() {
        let code = error.code();
        assert!(codes.insert(code.clone()), "{code} stands for two errors");
        let path = pages.join(format!("{code}.md"));
        // A test may read what a replica may not.
        #[allow(clippy::disallowed_methods)]
        let page = std::fs::read_to_string(&path).unwrap();
        let class = format!("Class: `{}`", error.class().as_str());
        assert!(page.contains(&class), "{code} is not {class}");
    }
}

#[test]
fn what_is_internal_stays_internal() {
    let error = Error::Internal("password 123".to_owned());
    assert!(!error.to_string().contains("123") && !error.next().contains("123"));
    assert!(error.for_log().contains("123"), "where it is of use");
}

#[test]
fn every_class_of_the_state_machine_is_one_of_ours() {
    for code in palyra_state::Code::ALL {
        assert!(Class::parse(code.class().as_str()).is_some(), "{code}");
    }
}
