//! Operators and their roles.
//!
//! What never lives here: nodes and replicas, which have no role but their kind.
//! Invariants: one operator per name; there is always an active admin, and no entry takes the last one's last
//! certificate; a removed operator's certificates are revoked in the same entry, and so are the grants and standing
//! decisions of one that is removed or loses the role.

mod rules;

pub(crate) use rules::{active, admit, apply, is_last_admin};

use crate::identity::NewCertificate;
use crate::read::Read;
use crate::tables;

/// What an operator may do. Each role includes the ones below it; greater is more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Role {
    /// Reads.
    Viewer = 0,
    /// Pairs, dispatches, revokes devices.
    Operator = 1,
    /// Changes operators and replicas.
    Admin = 2,
}

impl Role {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Role> {
        [Role::Viewer, Role::Operator, Role::Admin]
            .into_iter()
            .find(|role| role.as_str() == text)
    }
}

/// Whether an operator is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum OperatorStatus {
    /// Let in.
    Active = 0,
    /// Not any more.
    Removed = 1,
}

impl OperatorStatus {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            OperatorStatus::Active => "active",
            OperatorStatus::Removed => "removed",
        }
    }
}

/// A human or a tool that acts through CLI or API.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Operator {
    /// `[a-z0-9][a-z0-9._-]{0,62}`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// What it may do.
    #[prost(enumeration = "Role", tag = "2")]
    pub role: i32,
    /// Whether it is let in.
    #[prost(enumeration = "OperatorStatus", tag = "3")]
    pub status: i32,
    /// When it was added.
    #[prost(uint64, tag = "4")]
    pub created_at: u64,
    /// Actor who added it.
    #[prost(string, tag = "5")]
    pub created_by: String,
    /// When it was removed; 0 when it was not.
    #[prost(uint64, tag = "6")]
    pub removed_at: u64,
}

/// What is asked about operators.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// The one thing that is asked.
    #[prost(oneof = "Action", tags = "1, 2, 3")]
    pub action: Option<Action>,
}

/// One thing to ask about operators.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Action {
    /// See [`AddOperator`].
    #[prost(message, tag = "1")]
    AddOperator(AddOperator),
    /// See [`RemoveOperator`].
    #[prost(message, tag = "2")]
    RemoveOperator(RemoveOperator),
    /// See [`SetRole`].
    #[prost(message, tag = "3")]
    SetRole(SetRole),
}

/// Lets an operator in, with its first certificate. A removed name may come back. Actor: admin. Reply:
/// `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AddOperator {
    /// The name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The role.
    #[prost(enumeration = "Role", tag = "2")]
    pub role: i32,
    /// The certificate.
    #[prost(message, required, tag = "3")]
    pub certificate: NewCertificate,
}

/// Shuts an operator out and revokes its certificates. Actor: admin. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RemoveOperator {
    /// The name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Why; may be empty.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Changes an operator's role. Actor: admin. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SetRole {
    /// The name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The new role.
    #[prost(enumeration = "Role", tag = "2")]
    pub role: i32,
}

/// The operator with this name, removed or not.
#[must_use]
pub fn operator(r: &dyn Read, name: &str) -> Option<Operator> {
    tables::OPERATORS.get(r, name)
}

/// All operators by name, removed ones too.
#[must_use]
pub fn operators(r: &dyn Read) -> Vec<Operator> {
    tables::OPERATORS.list(r, (), usize::MAX)
}
