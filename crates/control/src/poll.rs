//! The fallback where streams do not pass: sessions that live from poll to poll.
//!
//! Invariants: a polled session is a session like any other (epoch, liveness, revocation); a poll that is
//! dropped half-way loses no message that the state does not hold, and what it took and could not hand over
//! is bound to the session still, to be delivered again with the next one.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palyra_pki::PeerIdentity;
use palyra_platform as platform;
use palyra_state::Id;

use crate::caller::Caller;
use crate::control::{Control, bounded_wait};
use crate::dispatch::Completion;
use crate::error::{Error, Refusal};
use crate::limits::POLL_WAIT_MAX;
use crate::outbox::{End, Outbound, ResultAnswer, Taken};
use crate::sessions::{AttachRequest, Session, Unpacked, result_answer};

/// Most messages in one answer, and most assignments: their payloads share one message.
const MESSAGES: usize = 64;
const ASSIGNMENTS: usize = 4;

/// Polled sessions between their polls.
#[derive(Debug, Default)]
pub(crate) struct Polled {
    sessions: Mutex<BTreeMap<Id, Session>>,
}

impl Polled {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Id, Session>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, device_id: Id, session: Session) {
        let old = self.lock().insert(device_id, session);
        // Dropped outside of the lock: its end may take others.
        drop(old);
    }

    fn remove(&self, device_id: Id, epoch: u64) {
        let mut sessions = self.lock();
        let same = sessions
            .get(&device_id)
            .is_some_and(|session| session.attached().epoch == epoch);
        let old = if same { sessions.remove(&device_id) } else { None };
        drop(sessions);
        drop(old);
    }

    /// Lets go of every session that has ended.
    pub(crate) fn sweep(&self) {
        let mut sessions = self.lock();
        let ended: Vec<Id> = sessions
            .iter()
            .filter(|(_, session)| session.has_ended())
            .map(|(device, _)| *device)
            .collect();
        let dropped: Vec<Session> = ended
            .iter()
            .filter_map(|device| sessions.remove(device))
            .collect();
        drop(sessions);
        drop(dropped);
    }
}

/// What a poll answers.
#[derive(Debug)]
pub struct PollAnswer {
    /// The session; name it in the next poll.
    pub epoch: u64,
    /// What to do, oldest first; none when nothing came in time.
    pub messages: Vec<Outbound>,
}

impl Control {
    /// One poll: attaches first when `attach` is given, then waits for messages, `wait_ms` at most (30,000).
    ///
    /// # Errors
    /// What admission and attach refuse; [`Refusal::SessionEnded`] when the named session is over: attach
    /// again.
    pub async fn poll(
        &self,
        peer: &PeerIdentity,
        device_id: &str,
        epoch: u64,
        attach: Option<AttachRequest>,
        wait_ms: u64,
    ) -> Result<PollAnswer, Error> {
        let Caller::Node { device_id, .. } = self.admit_node_as(peer, device_id)? else {
            return Err(Error::Internal(
                "a node's admission answered another caller".to_owned(),
            ));
        };
        let epoch = match attach {
            Some(attach) => {
                let session = self.attach(peer, attach).await?;
                let epoch = session.attached().epoch;
                self.polled().insert(device_id, session);
                epoch
            }
            None => epoch,
        };
        let ended = || {
            Error::from(Refusal::SessionEnded {
                code: End::Superseded.as_str(),
            })
        };
        let entry = self.registry().live(device_id, epoch).ok_or_else(ended)?;
        let _working = entry.work();
        let wait = bounded_wait(wait_ms, Duration::ZERO, POLL_WAIT_MAX);
        let mut messages = Vec::new();
        let first = match entry.outbox.try_take() {
            Some(taken) => Some(taken),
            None => platform::timeout(wait, entry.outbox.take()).await.ok(),
        };
        let mut taken = first;
        let mut assignments = 0;
        while let Some(next) = taken {
            let goodbye = matches!(next, Taken::Goodbye(_) | Taken::Over);
            if let Unpacked::Message(message) = self.unpack(&entry, next) {
                assignments += usize::from(matches!(message, Outbound::Assignment(_)));
                messages.push(message);
            }
            if goodbye {
                self.polled().remove(device_id, epoch);
                break;
            }
            let full = messages.len() >= MESSAGES || assignments >= ASSIGNMENTS;
            taken = if full { None } else { entry.outbox.try_take() };
        }
        // What was taken out stays bound to the session, and is delivered again in the next.
        self.check_fresh()?;
        Ok(PollAnswer { epoch, messages })
    }

    /// Ends a polled session because its node goes. A poll that waits gets the goodbye.
    ///
    /// # Errors
    /// What admission refuses.
    pub fn leave(&self, peer: &PeerIdentity, device_id: &str, epoch: u64) -> Result<(), Error> {
        if let Caller::Node { device_id, .. } = self.admit_node_as(peer, device_id)?
            && let Some(entry) = self.registry().live(device_id, epoch)
        {
            self.end_session(&entry, End::Left);
        }
        Ok(())
    }

    /// A result outside of a stream.
    ///
    /// # Errors
    /// What admission refuses; a refused result is an answer, not an error.
    pub async fn report(
        &self,
        peer: &PeerIdentity,
        device_id: &str,
        completion: Completion,
    ) -> Result<ResultAnswer, Error> {
        let caller = self.admit_node_as(peer, device_id)?;
        let dispatch_id = crate::selector::parse_id("dispatch_id", &completion.dispatch_id)?;
        let session = match &caller {
            Caller::Node { device_id, .. } => self.registry().live(*device_id, completion.epoch),
            _ => None,
        };
        let _working = session.as_ref().map(|entry| entry.work());
        let outcome = self.complete(&caller, completion).await;
        self.check_fresh()?;
        Ok(result_answer(dispatch_id, &outcome))
    }
}
