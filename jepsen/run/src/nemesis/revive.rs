//! What nemeses of disks and machines share: a replica that a fault may have ended is to serve again.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep};

use crate::cluster::State;
use crate::run::Run;

/// A start replays the log; after a fault several may start at once, on few processors.
const SERVES: Duration = Duration::from_secs(75);
const POLL: Duration = Duration::from_millis(50);

/// Waits until a replica serves, starting it when nobody does. A paused one is left to whoever paused it.
pub(super) async fn serves(run: &Arc<Run>, id: u64) -> Result<()> {
    let until = Instant::now() + SERVES;
    let mut last = String::new();
    loop {
        match run.cluster.state(id) {
            State::Paused | State::Removed => return Ok(()),
            State::Up if run.cluster.metrics(id).await.is_ok() => return Ok(()),
            State::Up => {}
            // Whoever minds processes may be faster; then this says so, and the next look finds it.
            State::Down | State::Ended => {
                if let Err(error) = run.cluster.start(id).await {
                    last = format!("{error:#}");
                }
            }
        }
        if Instant::now() >= until {
            bail!(
                "r{id} does not serve {} s after the fault: {last}",
                SERVES.as_secs()
            );
        }
        sleep(POLL).await;
    }
}

/// Waits until a replica's process is another than `before`, or none. Whether that came to be in time.
pub(super) async fn ends(run: &Arc<Run>, id: u64, before: Option<u32>, within: Duration) -> bool {
    let until = Instant::now() + within;
    while run.cluster.pid(id) == before {
        if Instant::now() >= until {
            return false;
        }
        sleep(POLL).await;
    }
    true
}
