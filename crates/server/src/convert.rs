//! Wire forms of what several domains share: read and write information, pages, endpoints, trust bundles.

pub(crate) mod run;

use palyra_control::{CertificateTimes, Endpoint, ReadInfo, ReadOptions, WriteInfo};
use palyra_pki::TrustBundle;
use palyra_proto::common::v1 as common;
use palyra_proto::journal::v1 as journal;
use palyra_proto::node::v1 as node;
use palyra_proto::pairing::v1 as pairing;
use palyra_state::Cursor;
use palyra_state::identity::{Certificate, CertificateStatus};

pub(crate) fn read_options(read: Option<common::ReadOptions>) -> ReadOptions {
    let read = read.unwrap_or_default();
    ReadOptions {
        local: read.consistency() == common::Consistency::Local,
        min_index: read.min_index,
    }
}

pub(crate) fn read_info(read: ReadInfo) -> Option<common::ReadInfo> {
    Some(common::ReadInfo {
        index: read.index,
        served_by: read.served_by,
        age_ms: read.age_ms,
    })
}

pub(crate) fn write_info(write: WriteInfo) -> Option<common::WriteInfo> {
    Some(common::WriteInfo {
        index: write.index,
        served_by: write.served_by,
        duplicate: write.duplicate,
    })
}

pub(crate) fn page_info(next: String) -> Option<common::PageInfo> {
    Some(common::PageInfo { next })
}

pub(crate) fn node_endpoints(endpoints: Vec<Endpoint>) -> Vec<node::NodeEndpoint> {
    endpoints
        .into_iter()
        .map(|endpoint| node::NodeEndpoint {
            replica_id: endpoint.replica_id,
            node_addr: endpoint.node_addr,
            enrol_addr: endpoint.enrol_addr,
            quic_addr: endpoint.quic_addr,
        })
        .collect()
}

pub(crate) fn trust_bundle(trust: &TrustBundle, endpoints: Vec<Endpoint>) -> Option<pairing::TrustBundle> {
    Some(pairing::TrustBundle {
        cluster_id: trust.cluster_id().to_owned(),
        trust_domain: trust.trust_domain().to_string(),
        roots: trust.roots().iter().map(|root| root.to_vec().into()).collect(),
        endpoints: endpoints
            .into_iter()
            .map(|endpoint| pairing::Endpoint {
                replica_id: endpoint.replica_id,
                node_addr: endpoint.node_addr,
                enrol_addr: endpoint.enrol_addr,
                quic_addr: endpoint.quic_addr,
            })
            .collect(),
    })
}

/// The times of a certificate.
pub(crate) fn certificate_times(times: CertificateTimes) -> node::CertificateTimes {
    let millis = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    node::CertificateTimes {
        renew_in_ms: millis(times.renew_in),
        expires_in_ms: millis(times.expires_in),
        life_ms: millis(times.life),
    }
}

/// How a certificate stands at this moment.
pub(crate) fn certificate_status(certificate: &Certificate) -> &'static str {
    let over = certificate.not_after <= palyra_platform::wall_ms();
    match certificate.status() {
        CertificateStatus::Active | CertificateStatus::Issued if over => "expired",
        status => status.as_str(),
    }
}

pub(crate) fn chain(chain: Vec<Vec<u8>>) -> Vec<bytes::Bytes> {
    chain.into_iter().map(Into::into).collect()
}

pub(crate) fn cursor(cursor: Cursor) -> journal::Cursor {
    journal::Cursor {
        index: cursor.index,
        ordinal: cursor.ordinal,
    }
}

/// Whole milliseconds.
pub(crate) fn millis(span: std::time::Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
