//! Samples of what the life of certificates adds to records.

use std::collections::BTreeMap;

use palyra_state::identity;

use crate::records::{add, text};

/// A device, a certificate, and the policy.
pub(crate) fn records(
    all: &mut BTreeMap<String, Vec<u8>>,
    device: &identity::Device,
    certificate: &identity::Certificate,
) {
    add(all, "record.device.life", &lived(device));
    let used = identity::Certificate {
        issued_index: 5,
        used_at: 6,
        superseded_at: 7,
        counter: 8,
        ..certificate.clone()
    };
    add(all, "record.certificate.life", &used);
    let policy = identity::CertificatePolicy {
        recovery_ms: 1,
        set_at: 2,
        set_by: text("operator/root"),
    };
    add(all, "record.certificate_policy", &policy);
}

/// A device with everything that its certificates' life adds.
fn lived(device: &identity::Device) -> identity::Device {
    identity::Device {
        counter: 20,
        counter_source: text("192.0.2.7"),
        counter_at: 22,
        suspicion: Some(identity::CloneSuspicion {
            since: 1,
            taken_from: text("192.0.2.7"),
            refused_from: text("192.0.2.8"),
            shown_counter: 4,
            counter: 5,
            how: text("renewal"),
        }),
        rotation: Some(identity::Rotation {
            requested_at: 1,
            requested_by: text("operator/root"),
            reason: text("spring"),
            deadline_at: 4,
            index: 5,
            fetched_at: 6,
            fetched_index: 7,
            used_at: 8,
        }),
        recovered_at: 25,
        resync: true,
        ..device.clone()
    }
}
