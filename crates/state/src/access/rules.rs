//! How operators change.

use super::{
    Action, AddOperator, Operator, OperatorStatus, RemoveOperator, Role, SetRole, operator, operators,
};
use crate::identity::{self, CertificateKind};
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::reply::Reply;
use crate::txn::Txn;
use crate::{approvals, ca, check, limits, tables};

pub(crate) fn apply(txn: &mut Txn<'_>, action: &Action) -> Result<Reply, Reject> {
    match action {
        Action::AddOperator(command) => add(txn, command),
        Action::RemoveOperator(command) => remove(txn, command),
        Action::SetRole(command) => set_role(txn, command),
    }
}

/// The operator with this name, if it is let in.
pub(crate) fn active(r: &dyn Read, name: &str) -> Result<Operator, Reject> {
    operator(r, name)
        .filter(|operator| operator.status() == OperatorStatus::Active)
        .ok_or_else(|| Reject::new(Code::NoSuchOperator, [&name]))
}

/// Whether this operator is an admin, and no other admin has a certificate that works at `now`: without this
/// one nobody could change operators any more.
pub(crate) fn is_last_admin(r: &dyn Read, name: &str, now: u64) -> bool {
    let (admins, others): (Vec<Operator>, Vec<Operator>) = operators(r)
        .into_iter()
        .filter(|operator| operator.status() == OperatorStatus::Active && operator.role() == Role::Admin)
        .partition(|operator| operator.name == name);
    let can_act = |other: &Operator| identity::has_working_certificate(r, &other.name, now);
    !admins.is_empty() && !others.iter().any(can_act)
}

fn add(txn: &mut Txn<'_>, command: &AddOperator) -> Result<Reply, Reject> {
    let name = command.name.as_str();
    if !check::is_short_name(name) {
        return Err(Reject::new(Code::BadOperatorName, [&check::quoted(name)]));
    }
    match operator(txn, name) {
        Some(known) if known.status() == OperatorStatus::Active => {
            return Err(Reject::new(Code::OperatorExists, [&name]));
        }
        Some(_) => {}
        None if operators(txn).len() >= limits::OPERATORS => {
            return Err(Reject::new(Code::TooManyOperators, [&limits::OPERATORS]));
        }
        None => {}
    }
    admit(txn, name, command.role(), &command.certificate)?;
    Ok(Reply::done())
}

/// Writes an operator and its first certificate; genesis uses it too.
pub(crate) fn admit(
    txn: &mut Txn<'_>,
    name: &str,
    role: Role,
    certificate: &identity::NewCertificate,
) -> Result<(), Reject> {
    let operator = Operator {
        name: name.to_owned(),
        role: role as i32,
        status: OperatorStatus::Active as i32,
        created_at: txn.now,
        created_by: txn.actor.to_string(),
        removed_at: 0,
    };
    txn.put(&tables::OPERATORS, name, &operator);
    ca::operator_added(txn, name);
    let fingerprint = identity::record(txn, CertificateKind::Operator, name, certificate, None)?;
    txn.emit(
        "access.operator_added",
        name,
        [
            ("role", role.as_str().to_owned()),
            ("fingerprint", fingerprint.to_string()),
        ],
    );
    Ok(())
}

fn remove(txn: &mut Txn<'_>, command: &RemoveOperator) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let name = command.name.as_str();
    let mut operator = active(txn, name)?;
    if is_last_admin(txn, name, txn.now) {
        return Err(Reject::new(Code::LastAdmin, [&name]));
    }
    operator.set_status(OperatorStatus::Removed);
    operator.removed_at = txn.now;
    txn.put(&tables::OPERATORS, name, &operator);
    ca::operator_gone(txn, name);
    let certificates = identity::revoke_all(txn, CertificateKind::Operator, name);
    txn.emit(
        "access.operator_removed",
        name,
        [
            ("reason", command.reason.clone()),
            ("certificates", certificates.to_string()),
        ],
    );
    approvals::operator_gone(txn, name, "its operator was removed");
    Ok(Reply::done())
}

fn set_role(txn: &mut Txn<'_>, command: &SetRole) -> Result<Reply, Reject> {
    let name = command.name.as_str();
    let mut operator = active(txn, name)?;
    let (before, after) = (operator.role(), command.role());
    if before == after {
        return Ok(Reply::done());
    }
    if is_last_admin(txn, name, txn.now) {
        return Err(Reject::new(Code::LastAdmin, [&name]));
    }
    operator.set_role(after);
    txn.put(&tables::OPERATORS, name, &operator);
    txn.emit(
        "access.role_changed",
        name,
        [
            ("from", before.as_str().to_owned()),
            ("to", after.as_str().to_owned()),
        ],
    );
    if after < Role::Operator {
        approvals::operator_gone(txn, name, "its operator lost the role");
    }
    Ok(Reply::done())
}
