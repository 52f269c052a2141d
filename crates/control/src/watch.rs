//! The watch over the sessions of this replica: silence, stalled readers, certificates that run out, this replica's
//! own freshness, and sessions that the state believes to be here and that nobody holds.
//!
//! What never lives here: how a session ends (`sessions`). Invariant: a session is looked at when something about it
//! may be due, not each time that the watch comes round, so that ten thousand quiet ones cost next to nothing.

use std::sync::Arc;
use std::time::Duration;

use palyra_platform::{self as platform, Instant};
use palyra_state::nodes::{self, Ended};
use palyra_state::{Id, limits};

use crate::control::Control;
use crate::limits::{ORPHANS_PAUSE, WATCH_PAUSE};
use crate::outbox::End;
use crate::registry::{Entry, Transport};

impl Control {
    /// Watches over the sessions, until this replica stops.
    pub(crate) async fn watch_sessions(self) {
        let timings = *self.timings();
        let pause = (timings.heartbeat_interval / 2).min(WATCH_PAUSE);
        let mut stopping = self.stopping();
        loop {
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop) => return,
                () = platform::sleep(pause) => {}
            }
            self.polled().sweep();
            for connection in self.readers().reap(timings.stall_timeout) {
                self.connections().close(connection, End::SlowReader);
            }
            let stale = self.check_fresh().is_err();
            if stale {
                // Readers had better read where something happens.
                self.readers().wake_all();
                for entry in self.registry().all() {
                    self.end_session(&entry, End::Stale);
                }
                // Who waits here hears nothing of the cluster, and had better ask another replica.
                self.waiters().wake_all();
            }
            let now = platform::now();
            for entry in self.registry().due(now) {
                if let Some(next) = self.look_at(&entry, stale, now) {
                    self.registry().look_again(&entry, next);
                }
            }
        }
    }

    /// Looks at one session; says when to look again.
    fn look_at(&self, entry: &Arc<Entry>, stale: bool, now: Instant) -> Option<Instant> {
        let timings = self.timings();
        if let Some(since) = entry.outbox.ended_for() {
            if entry.is_released() {
                return None;
            }
            // It ended a while ago, and still its stream is not read to the goodbye.
            if since > timings.stall_timeout {
                self.connections().close(entry.connection, End::SlowReader);
            }
            return Some(
                now + timings
                    .stall_timeout
                    .saturating_sub(since)
                    .max(timings.heartbeat_interval),
            );
        }
        // A poll may be away for as long as the node takes to come back with the next one.
        let patience = match entry.transport {
            Transport::Poll => timings.heartbeat_timeout * 2,
            _ => timings.heartbeat_timeout,
        };
        // An attach that waits for its turn or its commit is bounded by itself.
        let silence = if entry.epoch() == 0 || stale {
            Duration::ZERO
        } else {
            entry.silence()
        };
        let stalled = entry.outbox.stalled();
        // Planted: a stream that is open outlives its certificate.
        let unwatched = palyra_fault::planted("expiry-unwatched");
        let expires = if unwatched {
            u64::MAX
        } else {
            entry.peer.not_after_ms
        };
        let left = expires.saturating_sub(platform::wall_ms());
        let end = if silence > patience {
            Some(End::Silent)
        } else if stalled > timings.stall_timeout {
            Some(End::SlowReader)
        } else {
            (left == 0).then_some(End::Expired)
        };
        match end {
            // Which has it looked at again.
            Some(end) => {
                self.end_session(entry, end);
                None
            }
            None => {
                let next = patience
                    .saturating_sub(silence)
                    .min(timings.stall_timeout.saturating_sub(stalled))
                    .min(Duration::from_millis(left));
                Some(now + next.max(Duration::from_millis(1)))
            }
        }
    }

    /// Looks for orphans now and then, apart from the watch over sessions, which must not wait for a commit.
    pub(crate) async fn sweep_orphans(self) {
        let mut stopping = self.stopping();
        loop {
            if self.check_fresh().is_ok() {
                self.detach_orphans().await;
            }
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop) => return,
                () = platform::sleep(self.timings().heartbeat_interval.min(ORPHANS_PAUSE)) => {}
            }
        }
    }

    /// Ends sessions that the state believes to be here and that are not: those of an earlier run of this
    /// process, and attaches that were committed after their caller had given up.
    pub(crate) async fn detach_orphans(&self) {
        let orphans = self.orphans();
        for batch in orphans.chunks(limits::DETACH_BATCH) {
            let still = batch.iter().filter(|end| !self.is_looked_after(end.device_id));
            self.detach_all(still.cloned().collect()).await;
        }
    }

    fn orphans(&self) -> Vec<Ended> {
        let view = self.replica().view();
        // An orphan is one that the state counts and the registry does not: most of the time there is none to look for.
        if nodes::session_count(&view, self.replica_id()) <= self.registry().attached() as u64 {
            return Vec::new();
        }
        let mut orphans = Vec::new();
        let mut after = None;
        loop {
            let page = nodes::sessions_of(&view, self.replica_id(), after, limits::PAGE);
            let Some(last) = page.last() else { break };
            after = Some(*last);
            for device_id in page.into_iter().filter(|id| !self.is_looked_after(*id)) {
                let session = nodes::node(&view, device_id).and_then(|node| node.session);
                let attached_at = session.as_ref().map_or(0, |session| session.attached_at);
                orphans.extend(session.map(|session| Ended {
                    device_id,
                    epoch: session.epoch,
                    reason: End::Disconnected.as_str().to_owned(),
                    how: nodes::How::Lost as i32,
                    // Nobody knows when it was heard; it was when it attached.
                    silent_for: self.now_ms(&view).saturating_sub(attached_at),
                }));
            }
        }
        orphans
    }

    /// Whether a session of this device is live here, is being attached, or is being detached.
    fn is_looked_after(&self, device_id: Id) -> bool {
        let here = self.registry().of_device(device_id);
        here.iter().any(|entry| !entry.is_settled())
    }
}
