//! A lease, as the session sees it, and what its tool wrote that is to go out.

use std::sync::Arc;

use palyra_proto::worker::v1 as wire;
use palyra_proto::worker::v1::worker_message::Body;
use tokio::sync::watch;
use tokio::time::Instant;

use super::OUTPUT_EVERY;
use crate::output::Output;

/// A lease, as the session sees it.
pub(super) struct Held {
    pub(super) fence: u64,
    pub(super) ttl_ms: u64,
    pub(super) run_ends_ms: u64,
    pub(super) state: &'static str,
    pub(super) message: String,
    /// When it is to be renewed; nothing when it is not.
    pub(super) renew_at: Option<Instant>,
    pub(super) kill_at: watch::Sender<u64>,
    pub(super) stop: watch::Sender<Option<String>>,
    pub(super) clean: watch::Sender<u64>,
    pub(super) output: Arc<Output>,
    pub(super) output_at: Option<Instant>,
    pub(super) output_sent: Option<Instant>,
}

impl Held {
    /// What is to go out of what its tool wrote.
    pub(super) fn written(&mut self, lease_id: &str, now: Instant) -> Vec<Body> {
        let (lines, progress, more) = self.output.take();
        self.output_sent = Some(now);
        self.output_at = more.then_some(now + OUTPUT_EVERY);
        let (fence, lease_id) = (self.fence, lease_id.to_owned());
        let lines = lines.map(|lines| {
            let (first, lines) = (lines.first, lines.lines);
            Body::Log(wire::RunLog {
                lease_id: lease_id.clone(),
                fence,
                first,
                lines,
            })
        });
        let progress = progress.map(|said| {
            let (percent, message) = (said.percent, said.message);
            Body::Progress(wire::RunProgress {
                lease_id: lease_id.clone(),
                fence,
                percent,
                message,
            })
        });
        lines.into_iter().chain(progress).collect()
    }

    pub(super) fn rest(&mut self, lease_id: &str) -> Vec<Body> {
        let now = Instant::now();
        let mut bodies = self.written(lease_id, now);
        while self.output_at.is_some() {
            bodies.extend(self.written(lease_id, now));
        }
        bodies
    }
}
