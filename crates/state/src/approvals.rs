//! Approvals, which people decide, and grants, which they give: permission to run one run.
//!
//! What never lives here: what a pairing or a run is. A pairing request opens an approval and its decision
//! closes it (`pairing`); a run uses a grant (`leases`). Invariants: an approval is decided once, before its
//! end; nobody allows what they asked for, or the request of a code that they minted, while four eyes are
//! required (refusing it they may); a grant is active only by an approval that allows it; a grant starts one
//! run, once, before its end; a decision covers nothing of another operator, tool or session, nothing that is
//! riskier, and nothing once it ends, its asker is removed or who decided may not decide any more; an
//! approval of a grant that waits or stands is in the due index, no other is; every pending pairing request
//! has a pending approval under its own id.

mod decide;
mod grants;
mod pairings;
mod queries;
mod rules;
mod store;
#[cfg(test)]
mod tests;

pub(crate) use grants::{operator_gone, use_grant};
pub(crate) use pairings::{check_pairing, close_pairing, open_pairing};
pub use queries::{
    approval, approval_status, approvals, approvals_by_prefix, approvals_by_state, due_approvals, due_grants,
    grant, grant_of_run, grant_status, grants, grants_by_prefix, grants_by_state, next_due, policy, totals,
};
pub(crate) use rules::apply;
pub(crate) use store::{approval_due, grant_due, live_key, standing_key};

use crate::ids::Id;

/// What an approval is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Subject {
    /// A pairing request.
    Pairing = 0,
    /// A grant.
    Grant = 1,
}

impl Subject {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Subject::Pairing => "pairing",
            Subject::Grant => "grant",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Subject> {
        [Subject::Pairing, Subject::Grant]
            .into_iter()
            .find(|subject| subject.as_str() == text)
    }
}

/// How much is at stake, as the asking side says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Risk {
    /// Little.
    Low = 0,
    /// Something.
    Medium = 1,
    /// Much.
    High = 2,
    /// Everything.
    Critical = 3,
}

impl Risk {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Risk::Low => "low",
            Risk::Medium => "medium",
            Risk::High => "high",
            Risk::Critical => "critical",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Risk> {
        [Risk::Low, Risk::Medium, Risk::High, Risk::Critical]
            .into_iter()
            .find(|risk| risk.as_str() == text)
    }
}

/// Where an approval stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum ApprovalState {
    /// Waits for a person.
    Pending = 0,
    /// Somebody allowed it.
    Allowed = 1,
    /// Somebody denied it.
    Denied = 2,
    /// Nobody decided in time.
    Expired = 3,
    /// What it was about went away, or a decision that stood was taken back.
    Withdrawn = 4,
}

impl ApprovalState {
    /// All of them.
    pub const ALL: [ApprovalState; 5] = [
        ApprovalState::Pending,
        ApprovalState::Allowed,
        ApprovalState::Denied,
        ApprovalState::Expired,
        ApprovalState::Withdrawn,
    ];

    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            ApprovalState::Pending => "pending",
            ApprovalState::Allowed => "allowed",
            ApprovalState::Denied => "denied",
            ApprovalState::Expired => "expired",
            ApprovalState::Withdrawn => "withdrawn",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<ApprovalState> {
        ApprovalState::ALL
            .into_iter()
            .find(|state| state.as_str() == text)
    }
}

/// What a decision covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Scope {
    /// What was asked, and nothing else.
    Once = 0,
    /// What the same operator asks for the same tool in the same session, until it ends.
    Session = 1,
    /// What the same operator asks for the same tool, until it ends.
    Timeboxed = 2,
}

impl Scope {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Scope::Once => "once",
            Scope::Session => "session",
            Scope::Timeboxed => "timeboxed",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Scope> {
        [Scope::Once, Scope::Session, Scope::Timeboxed]
            .into_iter()
            .find(|scope| scope.as_str() == text)
    }
}

/// What the person who decides is shown.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Prompt {
    /// One line.
    #[prost(string, tag = "1")]
    pub title: String,
    /// How much is at stake.
    #[prost(enumeration = "Risk", tag = "2")]
    pub risk: i32,
    /// What will happen, in words.
    #[prost(string, tag = "3")]
    pub summary: String,
    /// What can be chosen.
    #[prost(message, repeated, tag = "4")]
    pub options: Vec<PromptOption>,
}

/// Something that can be chosen.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PromptOption {
    /// Short name, such as `allow-once`.
    #[prost(string, tag = "1")]
    pub id: String,
    /// For people.
    #[prost(string, tag = "2")]
    pub label: String,
    /// Whether it allows.
    #[prost(bool, tag = "3")]
    pub allow: bool,
    /// What it covers.
    #[prost(enumeration = "Scope", tag = "4")]
    pub scope: i32,
}

/// A question to a person.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Approval {
    /// Names it. Of a pairing: the pairing request's id.
    #[prost(message, required, tag = "1")]
    pub id: Id,
    /// What it is about.
    #[prost(enumeration = "Subject", tag = "2")]
    pub subject: i32,
    /// The pairing request, or the grant.
    #[prost(message, required, tag = "3")]
    pub subject_id: Id,
    /// What is shown.
    #[prost(message, required, tag = "4")]
    pub prompt: Prompt,
    /// Where it stands.
    #[prost(enumeration = "ApprovalState", tag = "5")]
    pub state: i32,
    /// Who asked: the operator, or of a pairing the operator who minted its code.
    #[prost(string, tag = "6")]
    pub requested_by: String,
    /// When.
    #[prost(uint64, tag = "7")]
    pub requested_at: u64,
    /// First moment at which it cannot be decided any more.
    #[prost(uint64, tag = "8")]
    pub expires_at: u64,
    /// Actor who decided.
    #[prost(string, tag = "9")]
    pub decided_by: String,
    /// When; 0: nobody has.
    #[prost(uint64, tag = "10")]
    pub decided_at: u64,
    /// Why.
    #[prost(string, tag = "11")]
    pub reason: String,
    /// What the decision covers.
    #[prost(enumeration = "Scope", tag = "12")]
    pub scope: i32,
    /// First moment at which it covers nothing more; 0: it covers what was asked.
    #[prost(uint64, tag = "13")]
    pub valid_until: u64,
    /// The session that was asked for; may be empty.
    #[prost(string, tag = "14")]
    pub session: String,
    /// The tool; empty for a pairing.
    #[prost(string, tag = "15")]
    pub tool: String,
    /// Grants that rest on it.
    #[prost(uint64, tag = "16")]
    pub covered: u64,
    /// It is allowed and covers more of what is asked still.
    #[prost(bool, tag = "17")]
    pub standing: bool,
    /// First moment at which nothing can rest on it any more, and it may be forgotten; 0: it waits.
    #[prost(uint64, tag = "18")]
    pub over_at: u64,
}

/// Where a grant stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum GrantState {
    /// Waits for its approval.
    Pending = 0,
    /// Its run may be started.
    Active = 1,
    /// Its run was started.
    Used = 2,
    /// Its approval was denied.
    Denied = 3,
    /// Taken back, or its operator was removed.
    Revoked = 4,
    /// Nobody decided, or nobody started, in time.
    Expired = 5,
}

impl GrantState {
    /// All of them.
    pub const ALL: [GrantState; 6] = [
        GrantState::Pending,
        GrantState::Active,
        GrantState::Used,
        GrantState::Denied,
        GrantState::Revoked,
        GrantState::Expired,
    ];

    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            GrantState::Pending => "pending",
            GrantState::Active => "active",
            GrantState::Used => "used",
            GrantState::Denied => "denied",
            GrantState::Revoked => "revoked",
            GrantState::Expired => "expired",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<GrantState> {
        GrantState::ALL.into_iter().find(|state| state.as_str() == text)
    }
}

/// Permission to run one run.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Grant {
    /// Names it.
    #[prost(message, required, tag = "1")]
    pub id: Id,
    /// The run.
    #[prost(message, required, tag = "2")]
    pub run_id: Id,
    /// The tool.
    #[prost(string, tag = "3")]
    pub tool: String,
    /// A session of the operator; may be empty.
    #[prost(string, tag = "4")]
    pub session: String,
    /// Name of the operator who asked, and alone may use it.
    #[prost(string, tag = "5")]
    pub requested_by: String,
    /// The approval that it rests on.
    #[prost(message, required, tag = "6")]
    pub approval_id: Id,
    /// Where it stands.
    #[prost(enumeration = "GrantState", tag = "7")]
    pub state: i32,
    /// When it was asked for.
    #[prost(uint64, tag = "8")]
    pub created_at: u64,
    /// First moment at which it starts nothing any more.
    #[prost(uint64, tag = "9")]
    pub expires_at: u64,
    /// Actor who ended it.
    #[prost(string, tag = "10")]
    pub ended_by: String,
    /// Why.
    #[prost(string, tag = "11")]
    pub reason: String,
    /// Its approval was there before.
    #[prost(bool, tag = "12")]
    pub covered: bool,
    /// When its run was started, also of one that was revoked later; 0: it was not.
    #[prost(uint64, tag = "13")]
    pub used_at: u64,
    /// When it became useless: used, denied, revoked or expired; 0: it is pending or active.
    #[prost(uint64, tag = "14")]
    pub ended_at: u64,
}

/// What approvals are held to; there is one, or the defaults.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Policy {
    /// Nobody allows what they asked for.
    #[prost(bool, tag = "1")]
    pub four_eyes: bool,
    /// How long an approval of a grant waits, in milliseconds.
    #[prost(uint64, tag = "2")]
    pub timeout: u64,
    /// Longest validity of a decision that covers more than what was asked, in milliseconds; 0: there are
    /// none.
    #[prost(uint64, tag = "3")]
    pub max_timebox: u64,
    /// When it was set; 0: never.
    #[prost(uint64, tag = "4")]
    pub set_at: u64,
    /// Actor who set it.
    #[prost(string, tag = "5")]
    pub set_by: String,
}

/// The grant of a run.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct GrantOfRun {
    /// Its id.
    #[prost(message, required, tag = "1")]
    pub grant_id: Id,
}

/// Counters of approvals and grants; there is one.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Totals {
    /// Approvals that wait.
    #[prost(uint64, tag = "1")]
    pub pending: u64,
    /// Approvals that are kept.
    #[prost(uint64, tag = "2")]
    pub approvals: u64,
    /// Grants that are kept.
    #[prost(uint64, tag = "3")]
    pub grants: u64,
}

/// What is asked about approvals and grants.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// The one thing that is asked.
    #[prost(oneof = "Action", tags = "1, 2, 3, 4, 5, 6")]
    pub action: Option<Action>,
}

/// One thing to ask about approvals and grants.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Action {
    /// See [`CreateGrant`].
    #[prost(message, tag = "1")]
    CreateGrant(CreateGrant),
    /// See [`RevokeGrant`].
    #[prost(message, tag = "2")]
    RevokeGrant(RevokeGrant),
    /// See [`Decide`].
    #[prost(message, tag = "3")]
    Decide(Decide),
    /// See [`Expire`].
    #[prost(message, tag = "4")]
    Expire(Expire),
    /// See [`SetPolicy`].
    #[prost(message, tag = "5")]
    SetPolicy(SetPolicy),
    /// See [`Withdraw`].
    #[prost(message, tag = "6")]
    Withdraw(Withdraw),
}

/// Asks for a grant: active at once when a decision of earlier covers it (and then never beyond that
/// decision's end), else it waits for an approval of its own. A run has one grant; another may be asked for
/// once the first can start nothing and never did. Actor: operator. Reply: `GrantCreated`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateGrant {
    /// The grant's id.
    #[prost(message, required, tag = "1")]
    pub grant_id: Id,
    /// The run's id.
    #[prost(message, required, tag = "2")]
    pub run_id: Id,
    /// The tool.
    #[prost(string, tag = "3")]
    pub tool: String,
    /// A session of the operator; may be empty.
    #[prost(string, tag = "4")]
    pub session: String,
    /// How long the run may be started, from now; 0: `limits::GRANT_TTL`.
    #[prost(uint64, tag = "5")]
    pub ttl_ms: u64,
    /// For the person who decides.
    #[prost(string, tag = "6")]
    pub summary: String,
    /// How much is at stake.
    #[prost(enumeration = "Risk", tag = "7")]
    pub risk: i32,
    /// Id of the approval, should one be needed.
    #[prost(message, required, tag = "8")]
    pub approval_id: Id,
}

/// Takes a grant back: one that waits, one that is active, or one that was used, whose run goes on unless it
/// is cancelled, too. Again: does nothing but cancel. Actor: operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RevokeGrant {
    /// The grant.
    #[prost(message, required, tag = "1")]
    pub grant_id: Id,
    /// Why.
    #[prost(string, tag = "2")]
    pub reason: String,
    /// Cancel the run that it started, too.
    #[prost(bool, tag = "3")]
    pub cancel_run: bool,
}

/// Decides an approval of a grant; that of a pairing is decided by the pairing's own commands. While four
/// eyes are required, who asked may deny and not allow. Actor: operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Decide {
    /// The approval.
    #[prost(message, required, tag = "1")]
    pub approval_id: Id,
    /// Whether it is allowed.
    #[prost(bool, tag = "2")]
    pub allow: bool,
    /// What the decision covers.
    #[prost(enumeration = "Scope", tag = "3")]
    pub scope: i32,
    /// How long, of one that covers more; 0: an hour.
    #[prost(uint64, tag = "4")]
    pub ttl_ms: u64,
    /// Why.
    #[prost(string, tag = "5")]
    pub reason: String,
}

/// Ends those approvals, standing decisions and grants of the lists whose time has passed; others are left
/// alone. Actor: system or a replica. Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Expire {
    /// At most `limits::EXPIRE_BATCH`.
    #[prost(message, repeated, tag = "1")]
    pub approvals: Vec<Id>,
    /// At most `limits::EXPIRE_BATCH`.
    #[prost(message, repeated, tag = "2")]
    pub grants: Vec<Id>,
}

/// Sets what approvals are held to from now on; what waits keeps its time. Actor: admin. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SetPolicy {
    /// Time and actor are set by apply.
    #[prost(message, required, tag = "1")]
    pub policy: Policy,
}

/// Takes back an approval of a grant that waits, or a decision that stands: nothing more is covered, and what
/// rests on it and was not used is revoked. Actor: operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Withdraw {
    /// The approval.
    #[prost(message, required, tag = "1")]
    pub approval_id: Id,
    /// Why.
    #[prost(string, tag = "2")]
    pub reason: String,
}
