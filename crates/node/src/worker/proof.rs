//! When the worker attests, and what came of it.
//!
//! What never lives here: what is said (see `attest`). Invariants: a statement is renewed at half of its
//! life; a refusal is kept until one passes, and tried again, for a policy may change; each challenge is
//! answered once.

use std::sync::Arc;
use std::time::Duration;

use palyra_client::new_ulid;
use palyra_proto::worker::v1 as wire;
use palyra_proto::worker::v1::worker_message::Body;
use tokio::time::Instant;

use super::attest::{self, Parties, Provider};
use super::lease::Shared;
use crate::link::Link;

/// A question that is not answered is asked again after this long.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// A refused statement is made again after this long.
const AGAIN: Duration = Duration::from_secs(30);
/// A question that was not decided.
const SOON: Duration = Duration::from_millis(500);

/// The state of a worker's proof.
pub(crate) struct Proof {
    provider: Option<Arc<Provider>>,
    /// Until when the control plane takes it; nothing when it does not.
    good_until: Option<Instant>,
    evidence: String,
    refusal: String,
    /// When a challenge is to be asked for.
    ask_at: Instant,
    /// The questions that are open.
    open: Vec<String>,
}

impl Proof {
    pub(crate) fn new(provider: Option<Arc<Provider>>) -> Self {
        Self {
            provider,
            good_until: None,
            evidence: String::new(),
            refusal: String::new(),
            ask_at: Instant::now(),
            open: Vec::new(),
        }
    }

    /// In words.
    pub(crate) fn describe(&self) -> String {
        match (&self.good_until, self.refusal.is_empty()) {
            (_, false) => format!("not admitted ({})", self.refusal),
            (Some(until), _) if *until > Instant::now() => format!("admitted ({})", self.evidence),
            _ => "not attested yet".to_owned(),
        }
    }

    /// The session ended: what was asked in it is void.
    pub(crate) fn detached(&mut self) {
        if !self.open.is_empty() {
            self.ask_at = Instant::now();
        }
        self.open.clear();
    }

    /// What was attested is not true any more.
    pub(crate) fn ask_now(&mut self) {
        self.good_until = None;
        self.ask_at = Instant::now();
    }

    /// When [`Proof::due`] has something to say.
    pub(crate) fn next(&self) -> Option<Instant> {
        Some(self.ask_at)
    }

    pub(crate) fn due(&mut self, now: Instant) -> Vec<Body> {
        if self.ask_at > now {
            return Vec::new();
        }
        self.ask_at = now + ANSWER_WITHIN;
        let request_id = new_ulid();
        self.open = vec![request_id.clone()];
        vec![Body::Challenge(wire::ChallengeRequest { request_id })]
    }

    /// A challenge is there, asked for or not.
    pub(crate) fn challenged(
        &mut self,
        shared: &Shared,
        challenge: &wire::Challenge,
        link: &dyn Link,
    ) -> Vec<Body> {
        let now = Instant::now();
        self.ask_at = now + ANSWER_WITHIN;
        let parties = Parties {
            worker_id: shared.device_id.clone(),
        };
        let provider = self.provider.as_deref();
        let made = attest::statement(&shared.config, &shared.measured(), provider, &parties, challenge);
        let signed = made.and_then(|statement| {
            let (public_key, signature) = link.sign_statement(&statement)?;
            Ok((statement, public_key, signature))
        });
        match signed {
            Ok((statement, public_key, signature)) => {
                let request_id = new_ulid();
                self.open.push(request_id.clone());
                tracing::info!(reason = challenge.reason, "attesting");
                vec![Body::Attest(wire::Attest {
                    request_id,
                    statement: statement.into(),
                    public_key: public_key.into(),
                    signature: signature.into(),
                })]
            }
            Err(error) => {
                tracing::error!(%error, "nothing could be attested");
                self.refusal = error.to_string();
                self.ask_at = now + AGAIN;
                Vec::new()
            }
        }
    }

    /// What the control plane thinks of the statement.
    pub(crate) fn answered(&mut self, answer: &wire::AttestAnswer) {
        let now = Instant::now();
        self.open.retain(|id| *id != answer.request_id);
        if answer.admitted {
            let life = Duration::from_millis(answer.expires_in_ms);
            tracing::info!(evidence = answer.evidence, ?life, "admitted");
            self.good_until = Some(now + life);
            self.ask_at = now + (life / 2).max(SOON);
            self.evidence.clone_from(&answer.evidence);
            self.refusal.clear();
            self.open.clear();
        } else {
            let (code, message, next) = (&answer.code, &answer.message, &answer.next);
            tracing::warn!(
                code,
                message,
                next,
                "not admitted; nothing is given to this worker"
            );
            self.good_until = None;
            self.ask_at = now + AGAIN;
            self.refusal = format!("{code}: {message}");
        }
    }

    /// A question was not taken. Whether it was one of these.
    pub(crate) fn not_now(&mut self, answer: &wire::Answer) -> bool {
        if !self.open.contains(&answer.request_id) {
            return false;
        }
        if !answer.accepted {
            self.open.retain(|id| *id != answer.request_id);
            self.ask_at = Instant::now() + if answer.retry { SOON } else { AGAIN };
            if !answer.retry {
                tracing::warn!(
                    code = answer.code,
                    answer.message,
                    "the question for a challenge was refused"
                );
                self.refusal = format!("{}: {}", answer.code, answer.message);
            }
        }
        true
    }
}
