//! Rules about the cluster, its replicas, and its operators.

use std::collections::BTreeSet;

use super::{Findings, all};
use crate::access::{OperatorStatus, Role};
use crate::cluster::{self, ReplicaStatus};
use crate::identity::{CertificateKind, CertificateStatus, certificates_of};
use crate::read::Read;
use crate::{limits, tables};

pub(super) fn check(r: &dyn Read, findings: &mut Findings) {
    let Some(born) = cluster::cluster(r) else {
        findings.expect(
            "nothing is there before genesis",
            all(r, &tables::REPLICAS).is_empty(),
            || "replicas without a cluster".to_owned(),
        );
        return;
    };
    replicas(r, &born, findings);
    operators(r, findings);
}

fn replicas(r: &dyn Read, born: &cluster::Cluster, findings: &mut Findings) {
    let replicas = all(r, &tables::REPLICAS);
    let mut names = BTreeSet::new();
    for replica in &replicas {
        findings.expect(
            "replica ids come from the counter",
            replica.id < born.next_replica_id,
            || {
                format!(
                    "replica {} while the next is {}",
                    replica.id, born.next_replica_id
                )
            },
        );
        if replica.status() == ReplicaStatus::Removed {
            let live = live_certificates(r, CertificateKind::Replica, &replica.id.to_string());
            findings.equal("a removed replica has no certificate", &replica.name, live, 0);
        } else {
            findings.expect(
                "names of replicas are unique",
                names.insert(&replica.name),
                || replica.name.clone(),
            );
        }
        let admitted = replica.is_member();
        findings.expect(
            "a member has its certificate",
            !admitted || !replica.certificate.is_zero(),
            || replica.name.clone(),
        );
    }
    let voters = replicas
        .iter()
        .filter(|replica| replica.status() == ReplicaStatus::Voter)
        .count();
    findings.expect("there is a voter", voters > 0, || "none".to_owned());
    findings.expect("replicas are bounded", names.len() <= limits::REPLICAS, || {
        names.len().to_string()
    });
    let tokens = all(r, &tables::JOIN_TOKENS);
    findings.expect(
        "join tokens are bounded",
        tokens.len() <= limits::JOIN_TOKENS,
        || tokens.len().to_string(),
    );
    let used: Vec<u64> = tokens
        .iter()
        .map(|token| token.used_by)
        .filter(|used| *used != 0)
        .collect();
    let once: BTreeSet<&u64> = used.iter().collect();
    findings.equal(
        "a token admits one replica",
        "tokens used",
        once.len(),
        used.len(),
    );
}

fn operators(r: &dyn Read, findings: &mut Findings) {
    let operators = all(r, &tables::OPERATORS);
    let admins = operators
        .iter()
        .filter(|operator| operator.status() == OperatorStatus::Active && operator.role() == Role::Admin)
        .count();
    findings.expect("there is an admin", admins > 0, || "none".to_owned());
    let count = operators.len();
    findings.expect("operators are bounded", count <= limits::OPERATORS, || {
        count.to_string()
    });
    for operator in operators
        .iter()
        .filter(|operator| operator.status() == OperatorStatus::Removed)
    {
        let live = live_certificates(r, CertificateKind::Operator, &operator.name);
        findings.equal("a removed operator has no certificate", &operator.name, live, 0);
    }
}

pub(super) fn live_certificates(r: &dyn Read, kind: CertificateKind, subject: &str) -> usize {
    let live = certificates_of(r, kind, subject);
    live.iter()
        .filter(|certificate| {
            matches!(
                certificate.status(),
                CertificateStatus::Active | CertificateStatus::Issued
            )
        })
        .count()
}
