//! What the server's own rows say of pairings, against what was asked and answered.

use std::collections::BTreeMap;

use super::{Account, is_ok};
use crate::evidence::{Row, Rows, field, violation};
use crate::history::Kind;
use crate::verdict::{Check, Violation};

/// One proof for each code, by somebody who tried; one certificate for each pairing.
pub(super) fn one_certificate(account: &Account<'_>) -> Check {
    let name = "pairing.one-certificate";
    let Some(rows) = account.rows.as_ref().filter(|rows| rows.whole) else {
        return Check::unknown(name, "the journal was not read to its end");
    };
    let mut found = Vec::new();
    let proved = proofs(account, rows, &mut found);
    let mut certificates: BTreeMap<&str, &str> = BTreeMap::new();
    for row in rows.of_action("pairing.approved") {
        if certificates
            .insert(&row.subject, row.detail("fingerprint"))
            .is_some()
        {
            found.push(rows.violation(format!("pairing {} was given two certificates", row.subject)));
        }
        if !proved.contains_key(row.subject.as_str()) {
            found.push(rows.violation(format!("pairing {} was approved without a proof", row.subject)));
        }
    }
    for (id, pairing) in &account.pairings {
        for op in pairing.redeems.iter().filter(is_ok) {
            let same = proved
                .get(id)
                .is_some_and(|row| field(op, "device") == row.detail("device"));
            if !same {
                found.push(violation(
                    format!("pairing {id} was accepted and the journal lacks it"),
                    &[op],
                ));
            }
        }
        for op in account.certificates(pairing) {
            let has: Option<&&str> = certificates.get(id);
            if field(op, "certificate").as_str() != has.copied() {
                let what = format!(
                    "pairing {id} was answered with certificate {}, the journal has {}",
                    field(op, "certificate"),
                    has.copied().unwrap_or("none")
                );
                found.push(violation(what, &[op]));
            }
        }
        // Refused everywhere, or never asked for.
        if certificates.contains_key(id) && pairing.approves.iter().all(|op| op.kind() == Kind::Fail) {
            found.push(rows.violation(format!("pairing {id} has a certificate that nobody approved")));
        }
    }
    Check::of(name, found)
        .fact("proofs", proved.len())
        .fact("certificates", certificates.len())
}

/// Proofs by pairing; and those that are a second one of their code, or of somebody who did not try.
fn proofs<'r>(
    account: &Account<'_>,
    rows: &'r Rows,
    found: &mut Vec<Violation>,
) -> BTreeMap<&'r str, &'r Row> {
    // Proofs name a code's number.
    let codes: BTreeMap<&str, &str> = rows
        .of_action("pairing.code_minted")
        .map(|row| (row.detail("number"), row.subject.as_str()))
        .collect();
    let mut proved: BTreeMap<&str, &Row> = BTreeMap::new();
    let mut used: BTreeMap<&str, &Row> = BTreeMap::new();
    for row in rows.of_action("pairing.proved") {
        proved.insert(&row.subject, row);
        let (number, device) = (row.detail("number"), row.detail("device"));
        let code = codes.get(number).copied().unwrap_or(number);
        if let Some(before) = used.insert(code, row) {
            let what = format!(
                "code {code} was proved by {} and by {device}",
                before.detail("device")
            );
            found.push(rows.violation(what));
        }
        // Codes of others than the harness are none of this history's.
        let Some(known) = account.codes.get(code) else {
            continue;
        };
        let mut tries = known.redeems.iter().filter(|op| op.kind() != Kind::Fail);
        if !tries.any(|op| field(op, "device") == device) {
            let what = format!("code {code} was proved by {device}, who did not try, or was refused");
            found.push(rows.violation(what));
        }
    }
    proved
}
