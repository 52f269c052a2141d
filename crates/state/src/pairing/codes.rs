//! Reading codes, and what the clock makes of them.

use super::{Code, CodeStatus, Method, totals};
use crate::ids::Id;
use crate::limits;
use crate::read::Read;
use crate::tables;

/// The code with this id.
#[must_use]
pub fn code(r: &dyn Read, id: Id) -> Option<Code> {
    tables::CODES.get(r, id)
}

/// The newest code with this number.
#[must_use]
pub fn code_by_number(r: &dyn Read, number: u32) -> Option<Code> {
    // At most `limits::CODES` rows: an index would cost every mint more than this costs the few that ask.
    tables::CODES
        .list(r, (), usize::MAX)
        .into_iter()
        .rfind(|code| code.number == number)
}

/// All codes that are kept, oldest first.
#[must_use]
pub fn codes(r: &dyn Read) -> Vec<Code> {
    tables::CODES.list(r, (), usize::MAX)
}

/// Codes that are open at `now`, oldest first.
#[must_use]
pub fn open_codes(r: &dyn Read, now: u64) -> Vec<Code> {
    open_rows(r)
        .into_iter()
        .filter(|code| code_status(code, now) == CodeStatus::Open)
        .collect()
}

/// Codes that are written as open, but that the clock has ended: for the sweeper.
#[must_use]
pub fn due_codes(r: &dyn Read, now: u64) -> Vec<Id> {
    let ended = |code: &Code| code_status(code, now) != CodeStatus::Open;
    open_rows(r)
        .iter()
        .filter(|code| ended(code))
        .map(|code| code.id)
        .collect()
}

/// Where a code stands at `now`: an open one may be expired, or burned because its last attempt ran out.
#[must_use]
pub fn code_status(code: &Code, now: u64) -> CodeStatus {
    if code.status() != CodeStatus::Open {
        return code.status();
    }
    if now >= code.expires_at {
        return CodeStatus::Expired;
    }
    let spent = code.attempts.len() >= limits::ATTEMPTS as usize;
    if spent
        && code
            .attempts
            .iter()
            .all(|attempt| attempt.failed || is_over(attempt.at, now))
    {
        return CodeStatus::Burned;
    }
    CodeStatus::Open
}

/// Attempts without a right proof within the window that ends at `now`.
#[must_use]
pub fn failures(r: &dyn Read, now: u64) -> usize {
    totals(r)
        .failures
        .iter()
        .filter(|attempt| is_recent(attempt.at, now))
        .count()
}

/// When pairing, closed by too many failures, opens again; `None` when it is open at `now`.
#[must_use]
pub fn reopens_at(r: &dyn Read, now: u64) -> Option<u64> {
    let recent: Vec<u64> = totals(r)
        .failures
        .iter()
        .map(|attempt| attempt.at)
        .filter(|at| is_recent(*at, now))
        .collect();
    if recent.len() < limits::FAILURES {
        return None;
    }
    recent.first().map(|oldest| oldest + limits::FAILURE_WINDOW)
}

/// Whether an attempt that began at `at` can be proved no more.
pub(super) fn is_over(at: u64, now: u64) -> bool {
    now >= at.saturating_add(limits::ATTEMPT_TTL)
}

/// Whether a failure at `at` still counts.
pub(super) fn is_recent(at: u64, now: u64) -> bool {
    now < at.saturating_add(limits::FAILURE_WINDOW)
}

/// Codes that are written as open.
pub(super) fn open_rows(r: &dyn Read) -> Vec<Code> {
    let ids = tables::CODES_OPEN.ids(r, (), None, usize::MAX);
    ids.into_iter().filter_map(|id| code(r, id)).collect()
}

/// Open PINs at `now`.
pub(super) fn open_pins(r: &dyn Read, now: u64) -> Vec<Code> {
    open_codes(r, now)
        .into_iter()
        .filter(|code| code.method() == Method::Pin)
        .collect()
}
