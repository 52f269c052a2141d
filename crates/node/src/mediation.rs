//! Questions for the person at the machine, and their answers.
//!
//! What never lives here: what is asked for (see `work`), the socket (see `socket`).
//!
//! Invariants: a question is answered once; it is gone when it was answered, cancelled or ran out; only who
//! can open the agent's socket, the folder's owner, can answer.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::socket::{self, Answer, Question};
use crate::{Error, Home, Kind, Result};

/// A dispatch that waits for the person at the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The dispatch.
    pub id: String,
    /// The capability that would run.
    pub capability: String,
    /// Its description, from the owner's file.
    pub description: String,
    /// The JSON that it would get; a longer one is cut after 4 KiB, and says so at its end.
    pub payload: String,
    /// Waiting since (Unix ms).
    pub since_ms: u64,
    /// Refused on its own then (Unix ms).
    pub deadline_at_ms: u64,
}

/// Asks the running agent what waits for a decision, oldest first.
///
/// Errors: no agent runs, no such folder.
pub async fn list(data_dir: &Path) -> Result<Vec<Pending>> {
    match socket::ask(&Home::open(data_dir)?, &Question::Mediation).await? {
        Answer::Mediation(pending) => Ok(pending),
        other => Err(socket::odd(&other)),
    }
}

/// Tells the running agent the person's decision. `id` may be a prefix that names one dispatch.
///
/// Errors: no agent runs, nothing of that id waits, the prefix names several.
pub async fn decide(data_dir: &Path, id: &str, allow: bool) -> Result<Pending> {
    let question = Question::Decide {
        id: id.to_owned(),
        allow,
    };
    match socket::ask(&Home::open(data_dir)?, &question).await? {
        Answer::Decided(pending) => Ok(pending),
        other => Err(socket::odd(&other)),
    }
}

/// The open questions of the running agent.
#[derive(Default)]
pub(crate) struct Desk {
    open: Mutex<BTreeMap<String, (Pending, oneshot::Sender<bool>)>>,
}

impl Desk {
    /// Puts a question. The receiver fails only when the same dispatch is asked for again.
    pub(crate) fn ask(&self, pending: Pending) -> oneshot::Receiver<bool> {
        let (sender, receiver) = oneshot::channel();
        self.lock().insert(pending.id.clone(), (pending, sender));
        receiver
    }

    /// Takes a question back; nothing happens when it was answered.
    pub(crate) fn withdraw(&self, id: &str) {
        self.lock().remove(id);
    }

    /// The open questions, oldest first.
    pub(crate) fn list(&self) -> Vec<Pending> {
        let mut all: Vec<Pending> = self.lock().values().map(|(pending, _)| pending.clone()).collect();
        all.sort_by(|a, b| (a.since_ms, &a.id).cmp(&(b.since_ms, &b.id)));
        all
    }

    /// Answers a question by its id or a prefix of it.
    pub(crate) fn decide(&self, prefix: &str, allow: bool) -> Result<Pending> {
        let prefix = prefix.to_ascii_uppercase();
        let mut open = self.lock();
        let found: Vec<String> = open
            .keys()
            .filter(|id| id.starts_with(&prefix))
            .cloned()
            .collect();
        let next = "see what waits: palyra node mediation ls";
        let id = match found.as_slice() {
            [one] if !prefix.is_empty() => one,
            [] => {
                return Err(Error::new(
                    Kind::NotFound,
                    "N0601",
                    format!("nothing of id {prefix:?} waits here"),
                    next,
                ));
            }
            _ => {
                let message = format!("{prefix:?} names {} dispatches that wait", found.len());
                return Err(Error::new(Kind::Usage, "N0602", message, next));
            }
        };
        let gone = || {
            Error::new(
                Kind::NotFound,
                "N0601",
                format!("{prefix:?} does not wait any more"),
                next,
            )
        };
        let (pending, answer) = open.remove(id).ok_or_else(gone)?;
        answer.send(allow).map_err(|_| gone())?;
        Ok(pending)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, (Pending, oneshot::Sender<bool>)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(id: &str, since_ms: u64) -> Pending {
        let text = || String::new();
        Pending {
            id: id.to_owned(),
            capability: text(),
            description: text(),
            payload: text(),
            since_ms,
            deadline_at_ms: 0,
        }
    }

    #[tokio::test]
    async fn a_question_is_answered_once_by_an_unambiguous_prefix() {
        let desk = Desk::default();
        let first = desk.ask(pending("01AA", 2));
        let second = desk.ask(pending("01AB", 1));
        assert_eq!(desk.list()[0].id, "01AB", "oldest first");
        assert_eq!(desk.decide("01A", true).unwrap_err().code, "N0602");
        assert_eq!(desk.decide("", true).unwrap_err().code, "N0602");
        assert_eq!(desk.decide("01aa", true).unwrap().id, "01AA");
        assert!(first.await.unwrap());
        assert_eq!(desk.decide("01AA", true).unwrap_err().exit_code(), 8);
        desk.withdraw("01AB");
        assert!(second.await.is_err() && desk.list().is_empty());
    }
}
