//! Pairing: codes that operators mint, attempts to use them, and the requests that operators decide.
//!
//! What never lives here: PINs, tickets and keys. A code holds a sealed blob that only the edge can open.
//! Invariants: an attempt is counted before it is answered; a code makes at most one request; at most
//! `limits::CODES_OPEN` codes are open; an approved request has exactly one certificate, recorded in the same
//! entry; a request waits with an approval of its own, and ends with it (`approvals`); `limits::FAILURES` unproved
//! attempts within the window close pairing for everybody.

mod attempts;
mod codes;
mod decide;
mod requests;
mod rules;

pub use codes::{code, code_by_number, code_status, codes, due_codes, failures, open_codes, reopens_at};
pub(crate) use decide::end_pending;
pub use requests::{
    due_requests, pending, pending_of, request, request_status, requests, requests_by_prefix,
};
pub(crate) use rules::apply;

use bytes::Bytes;

use crate::identity::NewCertificate;
use crate::ids::{Digest, Fingerprint, Id};
use crate::read::Read;
use crate::tables;

/// How a machine proves that it was invited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Method {
    /// Eight digits, by OPAQUE.
    Pin = 0,
    /// A 128-bit secret, by HMAC.
    Ticket = 1,
}

impl Method {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Method::Pin => "pin",
            Method::Ticket => "ticket",
        }
    }
}

/// Where a code stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum CodeStatus {
    /// May be tried.
    Open = 0,
    /// Made its request.
    Used = 1,
    /// Too many attempts.
    Burned = 2,
    /// Its time has passed.
    Expired = 3,
    /// An operator took it back.
    Revoked = 4,
}

impl CodeStatus {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            CodeStatus::Open => "open",
            CodeStatus::Used => "used",
            CodeStatus::Burned => "burned",
            CodeStatus::Expired => "expired",
            CodeStatus::Revoked => "revoked",
        }
    }
}

/// An attempt that was counted and not given back.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Attempt {
    /// Names it.
    #[prost(message, required, tag = "1")]
    pub id: Id,
    /// When it began.
    #[prost(uint64, tag = "2")]
    pub at: u64,
    /// The replica said that its proof was wrong.
    #[prost(bool, tag = "3")]
    pub failed: bool,
    /// Device that it was for; a proof for another is refused.
    #[prost(message, required, tag = "4")]
    pub device_id: Id,
}

/// An invitation: a PIN or a ticket.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Code {
    /// Names it.
    #[prost(message, required, tag = "1")]
    pub id: Id,
    /// Small number for people; shown as `C7`.
    #[prost(uint32, tag = "2")]
    pub number: u32,
    /// PIN or ticket.
    #[prost(enumeration = "Method", tag = "3")]
    pub method: i32,
    /// What the edge needs to check a proof, sealed under the cluster's KEK.
    #[prost(bytes = "bytes", tag = "4")]
    pub sealed: Bytes,
    /// When it was minted.
    #[prost(uint64, tag = "5")]
    pub created_at: u64,
    /// First moment at which it is not good any more.
    #[prost(uint64, tag = "6")]
    pub expires_at: u64,
    /// Actor who minted it.
    #[prost(string, tag = "7")]
    pub issued_by: String,
    /// Attempts counted against it; at most `limits::ATTEMPTS`.
    #[prost(message, repeated, tag = "8")]
    pub attempts: Vec<Attempt>,
    /// As it was last written; see [`code_status`] for what the clock makes of it.
    #[prost(enumeration = "CodeStatus", tag = "9")]
    pub status: i32,
    /// Name for the device, given by the operator; may be empty.
    #[prost(string, tag = "10")]
    pub device_name: String,
    /// When it stopped being open; 0 while it is.
    #[prost(uint64, tag = "11")]
    pub closed_at: u64,
    /// Request that it made.
    #[prost(message, optional, tag = "12")]
    pub request_id: Option<Id>,
}

/// Where a pairing request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum RequestStatus {
    /// Waits for an operator.
    PendingApproval = 0,
    /// Approved; its certificate waits to be fetched.
    Approved = 1,
    /// An operator said no, or the device was revoked meanwhile.
    Rejected = 2,
    /// The node has fetched its certificate.
    Completed = 3,
    /// Nobody decided in time, or a newer request of the same device took its place.
    Expired = 4,
}

impl RequestStatus {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            RequestStatus::PendingApproval => "pending_approval",
            RequestStatus::Approved => "approved",
            RequestStatus::Rejected => "rejected",
            RequestStatus::Completed => "completed",
            RequestStatus::Expired => "expired",
        }
    }
}

/// A machine that proved its invitation and asks for a certificate.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// The pairing id.
    #[prost(message, required, tag = "1")]
    pub id: Id,
    /// Code that it used.
    #[prost(message, required, tag = "2")]
    pub code_id: Id,
    /// The id that the machine wants.
    #[prost(message, required, tag = "3")]
    pub device_id: Id,
    /// What it calls itself, or the operator's name for it when the code has one.
    #[prost(string, tag = "4")]
    pub device_name: String,
    /// Certificate signing request, DER.
    #[prost(bytes = "bytes", tag = "5")]
    pub csr_der: Bytes,
    /// SHA-256 of the CSR's SubjectPublicKeyInfo.
    #[prost(message, required, tag = "6")]
    pub csr_spki: Fingerprint,
    /// Six digits that both screens show.
    #[prost(string, tag = "7")]
    pub sas: String,
    /// Address that it came from.
    #[prost(string, tag = "8")]
    pub source: String,
    /// PIN or ticket.
    #[prost(enumeration = "Method", tag = "9")]
    pub method: i32,
    /// Replica that checked the proof.
    #[prost(uint64, tag = "10")]
    pub served_by: u64,
    /// SHA-256 of the token with which the node fetches the outcome.
    #[prost(message, required, tag = "11")]
    pub fetch_token_hash: Digest,
    /// As it was last written; see [`request_status`] for what the clock makes of it.
    #[prost(enumeration = "RequestStatus", tag = "12")]
    pub status: i32,
    /// Actor who decided; empty while it is pending.
    #[prost(string, tag = "13")]
    pub decided_by: String,
    /// When it was decided; 0 while it is pending.
    #[prost(uint64, tag = "14")]
    pub decided_at: u64,
    /// Why.
    #[prost(string, tag = "15")]
    pub reason: String,
    /// The certificate, once approved.
    #[prost(message, optional, tag = "16")]
    pub certificate: Option<Fingerprint>,
    /// When the proof was accepted.
    #[prost(uint64, tag = "17")]
    pub created_at: u64,
    /// First moment at which it can be decided no more.
    #[prost(uint64, tag = "18")]
    pub expires_at: u64,
}

/// The pending pairing request of a device.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Pending {
    /// The request.
    #[prost(message, required, tag = "1")]
    pub pairing_id: Id,
}

/// Counters of pairing; there is one.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Totals {
    /// Number that the next code gets.
    #[prost(uint32, tag = "1")]
    pub next_number: u32,
    /// Codes kept.
    #[prost(uint64, tag = "2")]
    pub codes: u64,
    /// Requests kept.
    #[prost(uint64, tag = "3")]
    pub requests: u64,
    /// Requests that wait for an operator.
    #[prost(uint64, tag = "4")]
    pub pending: u64,
    /// Attempts that were counted and not given back, oldest first; at most `limits::FAILURES`.
    #[prost(message, repeated, tag = "5")]
    pub failures: Vec<Attempt>,
}

/// What is asked about pairing.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// The one thing that is asked.
    #[prost(oneof = "Action", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9")]
    pub action: Option<Action>,
}

/// One thing to ask about pairing.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Action {
    /// See [`MintCode`].
    #[prost(message, tag = "1")]
    MintCode(MintCode),
    /// See [`RevokeCode`].
    #[prost(message, tag = "2")]
    RevokeCode(RevokeCode),
    /// See [`BeginAttempt`].
    #[prost(message, tag = "3")]
    BeginAttempt(BeginAttempt),
    /// See [`FailAttempt`].
    #[prost(message, tag = "4")]
    FailAttempt(FailAttempt),
    /// See [`Prove`].
    #[prost(message, tag = "5")]
    Prove(Prove),
    /// See [`Approve`].
    #[prost(message, tag = "6")]
    Approve(Approve),
    /// See [`Reject`].
    #[prost(message, tag = "7")]
    Reject(Reject),
    /// See [`MarkCompleted`].
    #[prost(message, tag = "8")]
    MarkCompleted(MarkCompleted),
    /// See [`Expire`].
    #[prost(message, tag = "9")]
    Expire(Expire),
}

/// Opens a code. Actor: operator. Reply: `CodeMinted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MintCode {
    /// The code's id.
    #[prost(message, required, tag = "1")]
    pub code_id: Id,
    /// PIN or ticket.
    #[prost(enumeration = "Method", tag = "2")]
    pub method: i32,
    /// What the edge needs to check a proof, sealed.
    #[prost(bytes = "bytes", tag = "3")]
    pub sealed: Bytes,
    /// Life in milliseconds, 30 s to 24 h; 0: ten minutes.
    #[prost(uint64, tag = "4")]
    pub ttl_ms: u64,
    /// Name for the device; may be empty.
    #[prost(string, tag = "5")]
    pub device_name: String,
}

/// Takes an open code back. Actor: operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RevokeCode {
    /// The code.
    #[prost(message, required, tag = "1")]
    pub code_id: Id,
    /// Why; may be empty.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Counts an attempt, before anything is answered to the machine. Actor: a replica. Reply: `Attempt`, also
/// when the attempt was refused because the code is burned: the count is kept.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BeginAttempt {
    /// Names the attempt.
    #[prost(message, required, tag = "1")]
    pub attempt_id: Id,
    /// Which code, by id; absent: by number.
    #[prost(message, optional, tag = "2")]
    pub code_id: Option<Id>,
    /// Which code, by number; 0: the only open PIN code.
    #[prost(uint32, tag = "3")]
    pub code_number: u32,
    /// The id that the machine wants.
    #[prost(message, required, tag = "4")]
    pub device_id: Id,
    /// Address that it came from.
    #[prost(string, tag = "5")]
    pub source: String,
    /// PIN or ticket.
    #[prost(enumeration = "Method", tag = "6")]
    pub method: i32,
}

/// Says that an attempt's proof was wrong. It was counted already; this closes it, and burns the code when it
/// was the last. Actor: a replica. Reply: `Attempt`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FailAttempt {
    /// The attempt.
    #[prost(message, required, tag = "1")]
    pub attempt_id: Id,
    /// Its code.
    #[prost(message, required, tag = "2")]
    pub code_id: Id,
    /// Address that it came from.
    #[prost(string, tag = "3")]
    pub source: String,
}

/// Says that a machine proved a code: the attempt is given back, the code is used up, and a request waits for
/// an operator. Of two for one code the first in the log wins. Actor: a replica. Reply: `Proved`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Prove {
    /// The pairing id of the request that it makes.
    #[prost(message, required, tag = "1")]
    pub pairing_id: Id,
    /// The attempt; tickets may go without.
    #[prost(message, optional, tag = "2")]
    pub attempt_id: Option<Id>,
    /// The code.
    #[prost(message, required, tag = "3")]
    pub code_id: Id,
    /// The id that the machine wants.
    #[prost(message, required, tag = "4")]
    pub device_id: Id,
    /// What the machine calls itself.
    #[prost(string, tag = "5")]
    pub device_name: String,
    /// Certificate signing request, DER.
    #[prost(bytes = "bytes", tag = "6")]
    pub csr_der: Bytes,
    /// SHA-256 of the CSR's SubjectPublicKeyInfo.
    #[prost(message, required, tag = "7")]
    pub csr_spki: Fingerprint,
    /// Six digits.
    #[prost(string, tag = "8")]
    pub sas: String,
    /// Address that it came from.
    #[prost(string, tag = "9")]
    pub source: String,
    /// Replica that checked the proof.
    #[prost(uint64, tag = "10")]
    pub served_by: u64,
    /// SHA-256 of the fetch token.
    #[prost(message, required, tag = "11")]
    pub fetch_token_hash: Digest,
}

/// Lets the machine in: device and certificate are recorded in this entry. Actor: operator. Reply:
/// `Approved`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Approve {
    /// The pairing request.
    #[prost(message, required, tag = "1")]
    pub pairing_id: Id,
    /// The certificate, signed for the request's key.
    #[prost(message, required, tag = "2")]
    pub certificate: NewCertificate,
    /// What the operator read off the machine's screen; empty: not compared.
    #[prost(string, tag = "3")]
    pub sas: String,
    /// Why; may be empty.
    #[prost(string, tag = "4")]
    pub reason: String,
}

/// Says no. Actor: operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reject {
    /// The pairing request.
    #[prost(message, required, tag = "1")]
    pub pairing_id: Id,
    /// Why; may be empty. The machine is told.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Says that the node has fetched its certificate. Actor: a replica. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MarkCompleted {
    /// The pairing request.
    #[prost(message, required, tag = "1")]
    pub pairing_id: Id,
}

/// Writes down what the clock has ended: codes and requests. Others of the list are left alone.
/// Actor: system or a replica. Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Expire {
    /// Codes, at most `limits::EXPIRE_BATCH` together with the requests.
    #[prost(message, repeated, tag = "1")]
    pub codes: Vec<Id>,
    /// Pairing requests.
    #[prost(message, repeated, tag = "2")]
    pub requests: Vec<Id>,
}

/// Counters of pairing.
#[must_use]
pub fn totals(r: &dyn Read) -> Totals {
    tables::PAIRING_TOTALS.get(r, ()).unwrap_or_default()
}
