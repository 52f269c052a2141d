//! The wire messages and services of Palyra, generated from `proto/*.proto`.
//!
//! Generated code only: no logic lives here. The durable records of the state machine are another thing and live in
//! `palyra-state`; `palyra-server` maps one to the other.
#![allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]

macro_rules! package {
    ($name:ident, $package:literal) => {
        #[doc = concat!("`", $package, "`.")]
        pub mod $name {
            #[doc = concat!("`", $package, "`.")]
            pub mod v1 {
                tonic::include_proto!($package);
            }
        }
    };
}

package!(access, "palyra.access.v1");
package!(approval, "palyra.approval.v1");
package!(ca, "palyra.ca.v1");
package!(cluster, "palyra.cluster.v1");
package!(common, "palyra.common.v1");
package!(dispatch, "palyra.dispatch.v1");
package!(journal, "palyra.journal.v1");
package!(node, "palyra.node.v1");
package!(pairing, "palyra.pairing.v1");
package!(peer, "palyra.peer.v1");
package!(quic, "palyra.quic.v1");
package!(run, "palyra.run.v1");
package!(worker, "palyra.worker.v1");

/// The descriptors of all packages, for gRPC reflection: an encoded `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
