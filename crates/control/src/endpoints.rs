//! Where the replicas are reached: what nodes and enrolling machines are told with many an answer.
//!
//! Invariant: a list is made anew at least once a second; whoever uses one that has become old finds a replica that it
//! names, or asks the next.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use palyra_platform::{self as platform, Instant};
use palyra_state::cluster;

use crate::control::Control;

/// For how long an answer is given again.
const TOLD_FOR: Duration = Duration::from_secs(1);

/// The last answer, and when it was made.
#[derive(Debug, Default)]
pub(crate) struct Told(Mutex<Option<(Instant, Vec<Endpoint>)>>);

/// Where a replica is reached from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The replica.
    pub replica_id: u64,
    /// gRPC for nodes and operators, `host:port`.
    pub node_addr: String,
    /// Enrolment, `host:port`.
    pub enrol_addr: String,
    /// QUIC for nodes, `host:port`; empty when it does not listen for it.
    pub quic_addr: String,
}

impl Control {
    /// Where nodes and enrolling machines reach the replicas, this one first, as it was within the last second.
    #[must_use]
    pub fn endpoints(&self) -> Vec<Endpoint> {
        let mut told = self
            .told_endpoints()
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &*told {
            Some((at, endpoints)) if at.elapsed() < TOLD_FOR => endpoints.clone(),
            _ => {
                let endpoints = self.endpoints_now();
                *told = Some((platform::now(), endpoints.clone()));
                endpoints
            }
        }
    }

    fn endpoints_now(&self) -> Vec<Endpoint> {
        let members = cluster::replicas(&self.replica().view())
            .into_iter()
            .filter(cluster::Replica::is_member);
        let mut endpoints: Vec<Endpoint> = members
            .map(|replica| Endpoint {
                replica_id: replica.id,
                node_addr: replica.addresses.node,
                enrol_addr: replica.addresses.enrol,
                quic_addr: replica.addresses.quic,
            })
            .collect();
        endpoints.sort_by_key(|endpoint| (endpoint.replica_id != self.replica_id(), endpoint.replica_id));
        endpoints
    }
}
