//! Wire forms of what several domains share: read and write information, pages, endpoints, trust bundles.

use palyra_control::{Endpoint, ReadInfo, ReadOptions, WriteInfo};
use palyra_pki::TrustBundle;
use palyra_proto::common::v1 as common;
use palyra_proto::journal::v1 as journal;
use palyra_proto::node::v1 as node;
use palyra_proto::pairing::v1 as pairing;
use palyra_state::Cursor;

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
            })
            .collect(),
    })
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
