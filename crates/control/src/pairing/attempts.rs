//! Attempts to prove a code: counted in the log, and refused without a word in it where nothing is to be
//! counted.
//!
//! Invariant: whoever knows no open code cannot make the log grow.

use palyra_state::identity::{self, DeviceStatus};
use palyra_state::pairing::{
    self as records, BeginAttempt, Code as CodeRecord, CodeStatus, FailAttempt, Method,
};
use palyra_state::reply::{AttemptCounted, AttemptOutcome};
use palyra_state::{Code, Id, Reject, Reply, limits};

use crate::caller::EnrolSource;
use crate::control::Control;
use crate::error::Error;

impl Control {
    /// Commits an attempt, and answers it with its code.
    pub(crate) async fn count_attempt(
        &self,
        source: &EnrolSource,
        device_id: Id,
        code_id: Option<Id>,
        code_number: u32,
        method: Method,
    ) -> Result<(AttemptCounted, CodeRecord), Error> {
        self.may_begin(device_id, code_id, code_number, method).await?;
        let begin = BeginAttempt {
            attempt_id: self.fresh_id(),
            code_id,
            code_number,
            device_id,
            source: source.address.clone(),
            method: method as i32,
        };
        let written = self.propose(self.fresh_id(), self.as_replica(), begin).await?;
        let Reply::Attempt(counted) = written.reply else {
            return Err(self.odd_reply("pairing.begin_attempt"));
        };
        if counted.outcome() == AttemptOutcome::Burned {
            let number = format!("C{}", counted.code_number);
            return Err(Reject::new(Code::CodeBurned, [&number, &limits::ATTEMPTS]).into());
        }
        self.applied(written.receipt).await?;
        let code = records::code(&self.replica().view(), counted.code_id)
            .ok_or_else(|| Reject::new(Code::NoSuchCode, [&counted.code_id]))?;
        Ok((counted, code))
    }

    /// Refuses, at no cost for the log, what the state machine would refuse without counting it: whoever
    /// knows no open code must not be able to make the log grow. Says nothing that depends on a secret.
    pub(super) async fn may_begin(
        &self,
        device_id: Id,
        code_id: Option<Id>,
        code_number: u32,
        method: Method,
    ) -> Result<(), Error> {
        if self
            .begin_refusal(device_id, code_id, code_number, method)
            .is_none()
        {
            return Ok(());
        }
        // Perhaps the code was minted a moment ago, at another replica.
        self.barrier().await?;
        match self.begin_refusal(device_id, code_id, code_number, method) {
            Some(reject) => Err(reject.into()),
            None => Ok(()),
        }
    }

    fn begin_refusal(
        &self,
        device_id: Id,
        code_id: Option<Id>,
        code_number: u32,
        method: Method,
    ) -> Option<Reject> {
        let view = self.replica().view();
        let now = self.now_ms(&view);
        if let Some(at) = records::reopens_at(&view, now) {
            return Some(Reject::new(Code::PairingClosed, [&limits::FAILURES, &at]));
        }
        let revoked = |device: identity::Device| device.status() == DeviceStatus::Revoked;
        if identity::device(&view, device_id).is_some_and(revoked) {
            return Some(Reject::new(Code::DeviceRevoked, [&device_id]));
        }
        let found = match (code_id, code_number) {
            (Some(id), _) => records::code(&view, id).ok_or(Reject::new(Code::NoSuchCode, [&id])),
            (None, 0) => {
                let open = records::open_codes(&view, now).into_iter();
                let mut fitting: Vec<CodeRecord> = open.filter(|code| code.method() == method).collect();
                match fitting.len() {
                    0 => Err(Reject::new(Code::NoOpenCode, [])),
                    1 => Ok(fitting.remove(0)),
                    many => Err(Reject::new(Code::CodeAmbiguous, [&many])),
                }
            }
            (None, number) => records::code_by_number(&view, number)
                .ok_or_else(|| Reject::new(Code::NoSuchCode, [&format_args!("C{number}")])),
        };
        match found {
            Ok(code) => unusable(&code, method, now),
            Err(reject) => Some(reject),
        }
    }

    /// Closes an attempt whose proof was wrong. It is counted already, so a failure to say so costs nothing.
    pub(crate) async fn fail_attempt(&self, source: &EnrolSource, attempt_id: Id, code_id: Id) {
        let fail = FailAttempt {
            attempt_id,
            code_id,
            source: source.address.clone(),
        };
        if let Err(error) = self.propose(self.fresh_id(), self.as_replica(), fail).await {
            tracing::debug!(attempt = %attempt_id, cause = %error, "a failed attempt was not closed");
        }
    }
}

/// Why a code cannot be tried, in the state machine's words.
fn unusable(code: &CodeRecord, method: Method, now: u64) -> Option<Reject> {
    let number = format!("C{}", code.number);
    match records::code_status(code, now) {
        CodeStatus::Used => Some(Reject::new(Code::CodeUsed, [&number])),
        CodeStatus::Burned => Some(Reject::new(Code::CodeBurned, [&number, &code.attempts.len()])),
        CodeStatus::Expired => Some(Reject::new(Code::CodeExpired, [&number, &code.expires_at])),
        CodeStatus::Revoked => Some(Reject::new(Code::CodeRevoked, [&number])),
        CodeStatus::Open if code.method() != method => {
            let (is, wanted) = (code.method().as_str(), method.as_str());
            Some(Reject::new(Code::CodeMethod, [&number, &is, &wanted]))
        }
        CodeStatus::Open => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_of_a_code_has_its_own_refusal() {
        let open = CodeRecord {
            number: 3,
            expires_at: 1_000,
            ..CodeRecord::default()
        };
        let ended = |status: CodeStatus| CodeRecord {
            status: status as i32,
            ..open.clone()
        };
        let refusal =
            |code: &CodeRecord, method, now| unusable(code, method, now).map(|reject| reject.kind());
        assert_eq!(refusal(&open, Method::Pin, 999), None);
        assert_eq!(refusal(&open, Method::Ticket, 999), Some(Code::CodeMethod));
        assert_eq!(
            refusal(&open, Method::Pin, 1_000),
            Some(Code::CodeExpired),
            "before anybody has written it down"
        );
        for (status, expected) in [
            (CodeStatus::Used, Code::CodeUsed),
            (CodeStatus::Burned, Code::CodeBurned),
            (CodeStatus::Expired, Code::CodeExpired),
            (CodeStatus::Revoked, Code::CodeRevoked),
        ] {
            for method in [Method::Pin, Method::Ticket] {
                assert_eq!(refusal(&ended(status), method, 0), Some(expected));
            }
        }
    }
}
