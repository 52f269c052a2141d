//! Rules about devices, certificates, pairing, and sessions.

use std::collections::{BTreeMap, BTreeSet};

use super::people::live_certificates;
use super::{Findings, all, keys};
use crate::identity::{
    CertificateKind, CertificateStatus, Device, DeviceStatus, certificate_by_fingerprint, certificates_of,
    device, device_of_key,
};
use crate::ids::{Fingerprint, Id};
use crate::nodes;
use crate::pairing::{self, CodeStatus, RequestStatus};
use crate::read::Read;
use crate::{dispatch, limits, tables};

pub(super) fn check(r: &dyn Read, findings: &mut Findings) {
    let devices = all(r, &tables::DEVICES);
    findings.equal(
        "devices are counted",
        "devices",
        nodes::totals(r).devices,
        devices.len() as u64,
    );
    for device in &devices {
        check_device(r, device, findings);
    }
    bans(r, findings);
    certificates(r, findings);
    codes(r, findings);
    requests(r, findings);
}

fn check_device(r: &dyn Read, device: &Device, findings: &mut Findings) {
    let name = device.id.to_string();
    let owner = device_of_key(r, device.spki);
    findings.equal("a device owns its keys", &name, owner, Some(device.id));
    if device.status() != DeviceStatus::Revoked {
        return;
    }
    const RULE: &str = "revoked means revoked";
    findings.equal(
        RULE,
        "live certificates",
        live_certificates(r, CertificateKind::Node, &name),
        0,
    );
    let session = nodes::node(r, device.id).and_then(|node| node.session);
    findings.expect(RULE, session.is_none(), || format!("{name} has a session"));
    findings.equal(
        RULE,
        "open dispatches",
        dispatch::open_of_device(r, device.id, None, 1).len(),
        0,
    );
    findings.expect(RULE, pairing::pending_of(r, device.id).is_none(), || {
        format!("{name} is pairing")
    });
    findings.expect(RULE, device.revoked_index != 0, || {
        format!("{name} has no index of revocation")
    });
}

/// What a removed device was known by is refused, and nothing else of it is left.
fn bans(r: &dyn Read, findings: &mut Findings) {
    const RULE: &str = "removed devices stay refused";
    let bans = all(r, &tables::BANS);
    let count = nodes::totals(r).bans;
    findings.equal("bans are counted", "bans", count, bans.len() as u64);
    findings.expect("bans are bounded", count <= limits::BANS, || count.to_string());
    let mut due = BTreeSet::new();
    for ban in &bans {
        let name = ban.id.to_string();
        findings.expect(RULE, device(r, ban.id).is_none(), || format!("{name} is there"));
        findings.expect(RULE, nodes::node(r, ban.id).is_none(), || {
            format!("{name} has a node")
        });
        findings.equal(
            RULE,
            "live certificates",
            live_certificates(r, CertificateKind::Node, &name),
            0,
        );
        for key in &ban.keys {
            findings.equal(RULE, "owner of its key", device_of_key(r, *key), Some(ban.id));
        }
        if !certificates_of(r, CertificateKind::Node, &name).is_empty() {
            due.insert(tables::BANS_DUE.key((ban.expires_at, ban.id))[1..].to_vec());
        }
    }
    let listed: BTreeSet<Vec<u8>> = keys(r, &tables::BANS_DUE).into_iter().collect();
    findings.expect("bans that hold certificates are due", listed == due, || {
        format!("{} listed, {} due", listed.len(), due.len())
    });
}

/// The certificate in use, and what was issued and not used: nothing older than the former works.
fn certificates_are_in_order(r: &dyn Read, findings: &mut Findings) {
    const RULE: &str = "nothing older than the certificate in use works";
    let all = all(r, &tables::CERTIFICATES);
    let active: BTreeMap<(i32, &str), u64> = all
        .iter()
        .filter(|certificate| certificate.status() == CertificateStatus::Active)
        .map(|found| ((found.kind, found.subject.as_str()), found.issued_index))
        .collect();
    for certificate in &all {
        let name = || format!("{} of {}", certificate.fingerprint, certificate.subject);
        let used = active.get(&(certificate.kind, certificate.subject.as_str()));
        if certificate.status() == CertificateStatus::Issued {
            let newer = used.is_none_or(|used| certificate.issued_index > *used);
            findings.expect(RULE, newer && certificate.used_at == 0, name);
        }
        let ended = certificate.superseded_at != 0;
        let stands = matches!(
            certificate.status(),
            CertificateStatus::Active | CertificateStatus::Issued
        );
        findings.expect(
            "no certificate works after its supersession",
            !(ended && stands),
            name,
        );
    }
}

fn certificates(r: &dyn Read, findings: &mut Findings) {
    certificates_are_in_order(r, findings);
    let mut active = BTreeSet::new();
    let mut holders: BTreeMap<(i32, String), usize> = BTreeMap::new();
    let mut listed = BTreeSet::new();
    let mut by_pairing = BTreeSet::new();
    for certificate in all(r, &tables::CERTIFICATES) {
        let holder = (certificate.kind, certificate.subject.clone());
        let name = || format!("{} of {}", certificate.fingerprint, certificate.subject);
        let own = Fingerprint::of(&certificate.der) == certificate.fingerprint;
        findings.expect("a fingerprint is that of the certificate", own, name);
        if certificate.status() == CertificateStatus::Active {
            findings.expect(
                "one certificate of a holder is active",
                active.insert(holder.clone()),
                name,
            );
        }
        if certificate.kind() == CertificateKind::Node {
            let owner = device_of_key(r, certificate.spki).map(|owner| owner.to_string());
            findings.equal(
                "a device owns its keys",
                &name(),
                owner,
                Some(certificate.subject.clone()),
            );
        }
        if let Some(pairing) = certificate.pairing_id {
            findings.expect("one certificate per approval", by_pairing.insert(pairing), name);
        }
        *holders.entry(holder).or_default() += 1;
        let key = (
            certificate.kind as u32,
            tables::Text(&certificate.subject),
            certificate.fingerprint,
        );
        listed.insert(tables::CERTIFICATES_OF.key(key)[1..].to_vec());
    }
    for (holder, count) in holders {
        findings.expect(
            "certificates of a holder are bounded",
            count <= limits::CERTIFICATES,
            || format!("{holder:?} has {count}"),
        );
    }
    let index: BTreeSet<Vec<u8>> = keys(r, &tables::CERTIFICATES_OF).into_iter().collect();
    findings.expect("certificates are listed by holder", index == listed, || {
        format!("{} listed, {} kept", index.len(), listed.len())
    });
}

fn codes(r: &dyn Read, findings: &mut Findings) {
    let codes = all(r, &tables::CODES);
    let totals = pairing::totals(r);
    findings.equal("codes are counted", "codes", totals.codes, codes.len() as u64);
    findings.expect("codes are bounded", totals.codes <= limits::CODES, || {
        totals.codes.to_string()
    });
    let is_open = |code: &&pairing::Code| code.status() == CodeStatus::Open;
    let open: BTreeSet<Id> = codes.iter().filter(is_open).map(|code| code.id).collect();
    let listed: BTreeSet<Id> = tables::CODES_OPEN
        .ids(r, (), None, usize::MAX)
        .into_iter()
        .collect();
    findings.equal("open codes are listed", "open codes", &listed, &open);
    findings.expect("open codes are bounded", open.len() <= limits::CODES_OPEN, || {
        open.len().to_string()
    });
    let mut numbers = BTreeSet::new();
    for code in &codes {
        let number = || format!("C{}", code.number);
        findings.expect("numbers of codes are unique", numbers.insert(code.number), number);
        let bounded = code.attempts.len() <= limits::ATTEMPTS as usize;
        findings.expect("attempts at a code are bounded", bounded, number);
        let used = code.status() == CodeStatus::Used;
        findings.expect(
            "a code that is used made a request",
            used == code.request_id.is_some(),
            number,
        );
    }
    let failures = totals.failures.len();
    findings.expect("failures are bounded", failures <= limits::FAILURES, || {
        failures.to_string()
    });
}

fn requests(r: &dyn Read, findings: &mut Findings) {
    let requests = all(r, &tables::PAIRINGS);
    let totals = pairing::totals(r);
    findings.equal(
        "pairing requests are counted",
        "requests",
        totals.requests,
        requests.len() as u64,
    );
    findings.expect(
        "pairing requests are bounded",
        totals.requests <= limits::REQUESTS,
        || totals.requests.to_string(),
    );
    let mut pending = 0;
    let mut by_code = BTreeSet::new();
    for request in &requests {
        let name = || request.id.to_string();
        findings.expect("a code is consumed once", by_code.insert(request.code_id), name);
        let approved = matches!(
            request.status(),
            RequestStatus::Approved | RequestStatus::Completed
        );
        findings.expect(
            "an approval has its certificate",
            approved == request.certificate.is_some(),
            name,
        );
        // The record may be forgotten since; when it is there, it must be the one of this approval.
        if let Some(certificate) = request
            .certificate
            .and_then(|known| certificate_by_fingerprint(r, known))
        {
            let right = certificate.pairing_id == Some(request.id) && certificate.spki == request.csr_spki;
            findings.expect("an approval has its certificate", right, name);
        }
        if request.status() == RequestStatus::PendingApproval {
            pending += 1;
            let listed = pairing::pending_of(r, request.device_id).map(|found| found.id);
            findings.equal("pending requests are listed", "request", listed, Some(request.id));
        }
    }
    findings.equal("pairing requests are counted", "pending", totals.pending, pending);
    let listed = keys(r, &tables::PAIRINGS_PENDING).len() as u64;
    findings.equal("pending requests are listed", "requests", listed, pending);
    findings.expect(
        "pending requests are bounded",
        pending <= limits::REQUESTS_PENDING,
        || pending.to_string(),
    );
}
