//! Nodes: registration and renewal by the nodes themselves, and how operators look at them.

use std::collections::BTreeMap;

use palyra_state::identity;
use palyra_state::nodes::{self as records, Capability, Node, NodeStatus, Register};
use palyra_state::{Code, Id, Read, Reject, Reply, dispatch};
use prost::Message as _;

use crate::caller::Caller;
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo};
use crate::dispatch::{Page, next_page, page_size, page_start};
use crate::endpoints::Endpoint;
use crate::error::Error;
use crate::limits::PAGE_BYTES;
use crate::liveness::LastSeen;
use crate::selector;

/// What a node says of itself.
#[derive(Debug, Clone, Default)]
pub struct Registration {
    /// A ULID, the same for each try; empty for a fresh one.
    pub request_id: String,
    /// Operating system and architecture, `linux/x86_64`.
    pub platform: String,
    /// Version of the agent.
    pub agent_version: String,
    /// What it can do.
    pub capabilities: Vec<Capability>,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// How long it may be offline before it counts as gone; 0: as the cluster has it, `limits::NEVER`: as long as
    /// it takes.
    pub lost_after_ms: u64,
    /// Dispatches that it takes at a time; 0: as many as there may be.
    pub max_concurrency: u32,
    /// Dispatches that may wait for it; 0: as many as there may be.
    pub queue_limit: u32,
}

/// What registration answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registered {
    /// Counts changes of the registration.
    pub generation: u64,
    /// Where the replicas are.
    pub endpoints: Vec<Endpoint>,
    /// The entry.
    pub write: WriteInfo,
}

/// A node as operators see it.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeView {
    /// The record.
    pub record: Node,
    /// Name of its device.
    pub name: String,
    /// Dispatches that have not ended.
    pub open_dispatches: u32,
    /// When it was last heard.
    pub last_seen: LastSeen,
    /// Of these, with the node.
    pub bound_dispatches: u32,
}

impl Control {
    /// Records what a node can do. The caller has been admitted as node, under its own device id.
    ///
    /// # Errors
    /// What the state machine refuses.
    pub async fn register(&self, caller: &Caller, registration: Registration) -> Result<Registered, Error> {
        let device_id = node_id(caller)?;
        let request_id = self.request_id(&registration.request_id)?;
        let command = Register {
            device_id,
            platform: registration.platform,
            agent_version: registration.agent_version,
            capabilities: registration.capabilities,
            labels: registration.labels,
            lost_after: registration.lost_after_ms,
            max_concurrency: registration.max_concurrency,
            queue_limit: registration.queue_limit,
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        let Reply::Registered(registered) = written.reply else {
            return Err(self.odd_reply("nodes.register"));
        };
        self.fresh_after(written.receipt)?;
        Ok(Registered {
            generation: registered.generation,
            endpoints: self.endpoints(),
            write: written.info,
        })
    }

    /// Nodes by device id; `status` may be empty, and all `labels` must match.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad status or page, and what a read can say.
    pub async fn list_nodes(
        &self,
        read: ReadOptions,
        status: &str,
        labels: &BTreeMap<String, String>,
        after: &str,
        limit: u32,
    ) -> Result<Page<NodeView>, Error> {
        let (view, info) = self.read(read).await?;
        let wanted = match status {
            "" => None,
            text => Some(NodeStatus::parse(text).ok_or_else(|| {
                let cause = format!("{:?} is no status", text.chars().take(32).collect::<String>());
                Error::invalid("status", cause, "use online, suspect, offline or gone")
            })?),
        };
        let limit = page_size(limit);
        let mut after = page_start(after)?;
        let mut items: Vec<Node> = Vec::new();
        let mut fits = Fits::default();
        while items.len() <= limit && !fits.is_full() {
            let page = match wanted {
                Some(status) => records::by_status(&view, status, after, limit),
                None => records::nodes(&view, after, limit),
            };
            let Some(last) = page.last() else { break };
            after = Some(last.device_id);
            items.extend(page.into_iter().filter(|node| {
                labels
                    .iter()
                    .all(|(name, value)| node.labels.get(name) == Some(value))
            }));
            fits.count(&items);
        }
        let limit = fits.cut(limit);
        let next = next_page(&mut items, limit, |node| node.device_id.to_string());
        let seen = self.last_seen(&items).await;
        let items = items
            .into_iter()
            .zip(seen)
            .map(|(node, seen)| node_view(&view, node, seen))
            .collect();
        Ok(Page {
            items,
            next,
            read: info,
        })
    }

    /// One node, by device id, prefix or name.
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is none, and what a read can say.
    pub async fn get_node(&self, read: ReadOptions, selector: &str) -> Result<(NodeView, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        let id = selector::device(&view, selector)?;
        let node = records::node(&view, id).ok_or_else(|| Reject::new(Code::NodeUnknown, [&id]))?;
        let seen = self.last_seen(std::slice::from_ref(&node)).await;
        let seen = seen.first().copied().unwrap_or(LastSeen::Never);
        Ok((node_view(&view, node, seen), info))
    }
}

fn node_view(view: &dyn Read, record: Node, last_seen: LastSeen) -> NodeView {
    let id = record.device_id;
    NodeView {
        name: identity::device(view, id)
            .map(|device| device.name)
            .unwrap_or_default(),
        open_dispatches: dispatch::open_count(view, id),
        bound_dispatches: dispatch::queue_length(view, id).bound,
        last_seen,
        record,
    }
}

/// How many of a list's nodes fit one answer.
#[derive(Debug, Default)]
struct Fits {
    items: usize,
    bytes: usize,
}

impl Fits {
    /// Goes on counting, until the answer is full.
    fn count(&mut self, nodes: &[Node]) {
        for node in &nodes[self.items..] {
            if self.is_full() {
                return;
            }
            self.bytes += node.encoded_len();
            self.items += 1;
        }
    }

    fn is_full(&self) -> bool {
        self.bytes >= PAGE_BYTES
    }

    /// The length of a page that may have `limit` entries. A full one leaves out the node that filled it, so
    /// that something is seen to follow.
    fn cut(&self, limit: usize) -> usize {
        if self.is_full() {
            limit.min(self.items - 1).max(1)
        } else {
            limit
        }
    }
}

/// The device of a caller that was admitted as node.
fn node_id(caller: &Caller) -> Result<Id, Error> {
    match caller {
        Caller::Node { device_id, .. } => Ok(*device_id),
        other => Err(Error::Internal(format!(
            "{:?} was let into a node's call",
            other.actor()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(bytes: usize) -> Node {
        Node {
            agent_version: "x".repeat(bytes),
            ..Node::default()
        }
    }

    #[test]
    fn a_page_ends_where_an_answer_would_be_too_large() {
        let mut fits = Fits::default();
        fits.count(&[node(10), node(20)]);
        assert_eq!((fits.is_full(), fits.cut(500)), (false, 500));
        fits.count(&[node(10), node(20), node(PAGE_BYTES), node(1), node(1)]);
        assert_eq!((fits.is_full(), fits.cut(500), fits.cut(1)), (true, 2, 1));
    }
}
