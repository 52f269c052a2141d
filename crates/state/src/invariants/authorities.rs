//! Rules about roots and authorities.

use std::collections::BTreeSet;

use super::{Findings, all};
use crate::ca::{self, AuthorityStatus, Phase};
use crate::identity::{CertificateStatus, DeviceStatus, device};
use crate::read::Read;
use crate::{cluster, limits, meta, tables};

pub(super) fn check(r: &dyn Read, findings: &mut Findings) {
    let Some(born) = cluster::cluster(r) else { return };
    roots(r, &born, findings);
    authorities(r, findings);
    acknowledgements(r, findings);
    certificates(r, findings);
}

fn roots(r: &dyn Read, born: &cluster::Cluster, findings: &mut Findings) {
    const RULE: &str = "a root is trusted and signs";
    let state = ca::ca(r);
    let trusted = ca::trusted_roots(r);
    findings.equal(RULE, "trusted roots", trusted.len(), state.trusted().len());
    findings.equal(
        RULE,
        "no rotation, no other root",
        state.phase() == Phase::Idle,
        state.other == 0,
    );
    if let Some(signs) = ca::root(r, state.issuing) {
        findings.expect(RULE, signs.der == born.root_cert_der, || {
            "the cluster's is another".to_owned()
        });
    }
    for root in ca::roots(r) {
        let is_trusted = state.trusted().contains(&root.number);
        let name = || format!("root {}", root.number);
        findings.expect(
            "a retired root has no key",
            root.key_sealed.is_empty() != is_trusted && (root.retired_at == 0) == is_trusted,
            name,
        );
        findings.expect(
            "numbers of roots are given once",
            root.number < state.next_root,
            name,
        );
    }
    findings.expect("roots are bounded", ca::roots(r).len() <= limits::ROOTS, || {
        ca::roots(r).len().to_string()
    });
}

fn authorities(r: &dyn Read, findings: &mut Findings) {
    let trusted = ca::ca(r).trusted();
    for one in ca::authorities(r) {
        let name = || format!("authority {} of replica {}", one.number, one.replica_id);
        let roots: Vec<u32> = one
            .certificates
            .iter()
            .map(|certificate| certificate.root)
            .collect();
        let unique: BTreeSet<&u32> = roots.iter().collect();
        findings.expect(
            "an authority is under a trusted root",
            !roots.is_empty() && roots.iter().all(|root| trusted.contains(root)),
            name,
        );
        findings.expect(
            "one certificate of an authority per root",
            unique.len() == roots.len(),
            name,
        );
    }
    for replica in cluster::replicas(r) {
        let of = ca::authorities_of(r, replica.id);
        let active = of.iter().filter(|one| one.status() == AuthorityStatus::Active);
        findings.equal(
            "a member issues with one authority",
            &replica.name,
            active.count(),
            usize::from(replica.is_member()),
        );
        findings.expect("authorities are bounded", of.len() <= limits::AUTHORITIES, || {
            replica.name.clone()
        });
    }
}

fn acknowledgements(r: &dyn Read, findings: &mut Findings) {
    const RULE: &str = "acknowledgements are counted";
    let state = ca::ca(r);
    let devices = all(r, &tables::DEVICES);
    let trusted = devices.iter().filter(|one| one.status() == DeviceStatus::Trusted);
    findings.equal(RULE, "trusted devices", state.devices, trusted.count() as u64);
    let ids = tables::DEVICE_ACKS.ids(r, (), None, usize::MAX);
    let mut acked = 0;
    for id in ids {
        let known = device(r, id).is_some_and(|one| one.status() == DeviceStatus::Trusted);
        findings.expect(RULE, known, || format!("{id} is not trusted"));
        let number = ca::device_ack(r, id).map_or(0, |ack| ack.number);
        findings.expect(RULE, number <= state.generation, || format!("{id} is ahead"));
        acked += u64::from(number == state.generation);
    }
    findings.equal(RULE, "acknowledged", state.devices_acked, acked);
}

fn certificates(r: &dyn Read, findings: &mut Findings) {
    let now = meta::clock(r);
    for certificate in all(r, &tables::CERTIFICATES) {
        let name = || format!("{} of {}", certificate.fingerprint, certificate.subject);
        let (replica_id, number) = certificate.issuer();
        let key = (
            (replica_id, number, certificate.not_after),
            certificate.fingerprint,
        );
        if certificate.not_after <= now {
            continue;
        }
        if replica_id != 0 {
            findings.expect(
                "a live certificate has an authority that is trusted",
                ca::authority(r, replica_id, number).is_some_and(|one| {
                    one.last_not_after >= certificate.not_after && !one.certificates.is_empty()
                }),
                name,
            );
        }
        findings.expect(
            "what was issued is on the books",
            tables::ISSUED.has(r, key),
            name,
        );
        let listed = tables::REVOKED.has(r, key);
        let revoked = certificate.status() == CertificateStatus::Revoked;
        findings.expect(
            "what was revoked is on the list of its issuer",
            listed == revoked,
            name,
        );
    }
}

pub(super) fn check_step(before: &dyn Read, after: &dyn Read, findings: &mut Findings) {
    const RULE: &str = "a rotation goes one phase at a time";
    let (old, new) = (ca::ca(before), ca::ca(after));
    if old.generation == 0 {
        return;
    }
    findings.expect(
        RULE,
        new.generation >= old.generation && new.step >= old.step,
        || format!("{old:?} became {new:?}"),
    );
    if old.step == new.step {
        findings.expect(RULE, old.trusted() == new.trusted(), || {
            format!("{old:?} became {new:?}")
        });
        return;
    }
    let kept = old.trusted().iter().any(|root| new.trusted().contains(root));
    let next = matches!(
        (old.phase(), new.phase()),
        (Phase::Idle, Phase::Distribute)
            | (Phase::Distribute, Phase::Issue | Phase::Idle)
            | (Phase::Issue, Phase::Distribute | Phase::Idle)
    );
    findings.expect(RULE, kept && next && new.step == old.step + 1, || {
        format!("{old:?} became {new:?}")
    });
    let changed: BTreeSet<u32> = old.trusted().into_iter().collect();
    let same = changed == new.trusted().into_iter().collect();
    findings.expect(
        "a changed bundle has a new generation",
        same == (old.generation == new.generation),
        || format!("{old:?} became {new:?}"),
    );
}
