//! How a replica leaves its nodes: it takes no new sessions, sends those that it has to the others, a few at a time,
//! and waits until the state knows and what they reported is committed.
//!
//! What never lives here: leadership (the server hands it over first), and sockets. Invariants: every wait is
//! bounded; a node keeps its session until its own goodbye; an attach that comes later sees that this replica
//! stops.

use palyra_platform as platform;

use crate::control::Control;
use crate::error::Error;
use crate::limits::{GOODBYE_PAUSE, MOVE_SPREAD};
use crate::outbox::End;
use crate::pace::{Pace, SessionRefusal};

/// Most results that are committed at one time; a bound for counting them only.
pub(crate) const COMMITS: u32 = 1 << 20;

impl Control {
    /// Ends every session with `draining`, over [`crate::Timings::drain`] at most, begins no other, waits for a while
    /// until the ends and the results under way are committed, and stops the background work.
    pub async fn shutdown(&self) {
        // Before the sessions are listed: an attach that is not among them sees this.
        self.begin_drain();
        self.say_goodbyes().await;
        let mut changed = self.registry().watch();
        let told = async {
            while self.registry().unsettled() > 0 && changed.changed().await.is_ok() {}
            // All of them are back: nothing is being committed any more.
            drop(self.committing().acquire_many(COMMITS).await);
        };
        if platform::timeout(self.timings().call_timeout, told)
            .await
            .is_err()
        {
            let sessions = self.registry().unsettled();
            tracing::warn!(sessions, "stopping before everything was committed");
        }
        self.stop();
    }

    async fn say_goodbyes(&self) {
        let entries = self.registry().all();
        let count = u32::try_from(entries.len()).unwrap_or(u32::MAX).max(1);
        let pause = GOODBYE_PAUSE.min(self.timings().drain / count);
        let begun = platform::now();
        for (at, entry) in (0..).zip(entries) {
            let due = begun + pause.saturating_mul(at);
            if due > platform::now() {
                platform::sleep_until(due).await;
            }
            self.end_session(&entry, End::Draining);
        }
    }

    /// Refuses new sessions once this replica is about to stop.
    pub(crate) fn check_not_draining(&self) -> Result<(), Error> {
        if !self.is_draining() {
            return Ok(());
        }
        let pace = Pace::spread_over(MOVE_SPREAD);
        Err(SessionRefusal::Draining { pace }.into())
    }
}
